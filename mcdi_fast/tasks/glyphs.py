"""Glyphs: a built-in handwritten alphabet, drawn by rule, that needs no data.

How a character comes about follows the motor programs of Omniglot's makers (Lake et al., Science 350, 2015): an
alphabet has a pool of strokes, a character takes 2 to 5 of them and joins each to one drawn before (at its start, its
end, along it, or not at all), and a drawer writes that program with a style of their own and an unsteady hand.
Twenty characters share one pool, so tasks meet characters that differ in one stroke or one junction.

Quarter turns are not added as classes, as they are for Omniglot: there they stretch a fixed set of characters; here
more characters cost milliseconds, and they bring new strokes where turns bring none.

Every draw is `Generator.random()` and every image comes from it by ``+ - * / min max sqrt`` and comparisons, which IEEE
754 rounds the same way everywhere: no sin, no exp, no matrix product, no thread. Keep it so; a test pins a fingerprint.
"""

from dataclasses import dataclass, field

import numpy as np

from mcdi_fast.backbone import BackboneConfig
from mcdi_fast.errors import McdiError
from mcdi_fast.store import digest
from mcdi_fast.tasks import Setup, register
from mcdi_fast.tasks.drawings import SIDE, ClassImages, DrawingOptions, FewShotData, drawing_defaults, drawing_family
from mcdi_fast.tasks.heads import HeadFamily

ALPHABET = 20  # characters that share a pool of strokes and a group of drawers
POOL = 9  # strokes in it
MAX_STROKES = 5
SAMPLES = 48  # points a stroke is drawn with: closer than a pixel, so that thin pens leave no gaps
SPLIT_STRIDE = 1_000_000  # first character index of val, and half that of test: any split grows without moving another

_STREAM_ALPHABET, _STREAM_DRAWERS, _STREAM_HAND = range(3)


def load(
    train_characters: int = 400, val_characters: int = 60, test_characters: int = 150, drawers: int = 20, seed: int = 0
) -> FewShotData:
    """Draw the alphabet: three splits of `[characters, drawers, 28, 28]` uint8, 0 = paper, 255 = ink.

    The image of a character by a drawer depends on (seed, split, position of the character in the split, drawer) alone,
    so any count can be raised and what was there stays bit by bit. The default takes about 2 s on one core and 10 MB.

    Raises:
        McdiError: a count is below 1 or above 1 000 000, or the seed is negative.
    """
    counts = {
        "train_characters": train_characters,
        "val_characters": val_characters,
        "test_characters": test_characters,
    }
    for option, value in {**counts, "drawers": drawers}.items():
        if not 1 <= value <= SPLIT_STRIDE:
            raise McdiError(f"glyphs: {option} is {value}, expected 1 to {SPLIT_STRIDE}: ask for a count in that range")
    if seed < 0:
        raise McdiError(f"glyphs: seed is {seed}, expected 0 or more: choose a seed that is not negative")
    splits = [
        _draw_characters(seed, split * SPLIT_STRIDE, count, drawers) for split, count in enumerate(counts.values())
    ]
    fingerprint = digest("glyphs", *(part for images in splits for part in (repr(images.shape), images)))
    train, val, test = (ClassImages(images) for images in splits)
    return FewShotData(name="glyphs", train=train, val=val, test=test, fingerprint=fingerprint)


def _draw_characters(seed: int, first: int, count: int, drawers: int) -> np.ndarray:
    """Images uint8 `[count, drawers, 28, 28]` of the characters first, first + 1, ..."""
    images = np.empty((count, drawers, SIDE, SIDE), np.uint8)
    for start in range(0, count, ALPHABET):
        alphabet = (first + start) // ALPHABET
        characters = range(first + start, first + min(start + ALPHABET, count))
        strokes, counts = _compose(_rng(seed, _STREAM_ALPHABET, alphabet))
        style = _rng(seed, _STREAM_DRAWERS, alphabet).random((drawers, 8)) * 2 - 1
        hand = np.stack([_rng(seed, _STREAM_HAND, c).random((drawers, MAX_STROKES + 1, 5, 2, 2)) for c in characters])
        hand = hand.sum(axis=-1) - 1
        for own, strokes_here in zip(hand, counts, strict=False):  # a repeated first stroke must fall on itself
            own[:, strokes_here:MAX_STROKES] = own[:, :1]
        points, radius = _write(strokes[: len(characters)], style, hand)
        images[start : start + len(characters)] = _ink(points, radius).reshape(len(characters), drawers, SIDE, SIDE)
    return images


def _rng(seed: int, stream: int, index: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, stream, index))))


def _bezier(controls: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Points `[..., len(t), 2]` at t of cubic Bezier curves with control points `[..., 4, 2]`."""
    t = t[:, None]
    s = 1 - t
    a, b, c, d = (controls[..., None, i, :] for i in range(4))
    return s * s * s * a + 3 * s * s * t * b + 3 * s * t * t * c + t * t * t * d


def _stroke_pool(rng: np.random.Generator) -> np.ndarray:
    """Cubic Beziers `[POOL, 4, 2]` that start at the origin: lines, arcs, S-curves, loops, a dot now and then."""
    pool = np.zeros((POOL, 4, 2))
    for i in range(POOL):
        kind, bend, turn, size = rng.random(4)
        # Ends lie on a jittered grid, so that strokes of unlike characters agree in direction and length.
        column, row = np.floor(rng.random(2) * 5) - 2
        if column == row == 0:
            column = 1.0
        end = np.array([column, row]) * 0.5 + (rng.random(2) - 0.5) * 0.2
        side = np.array([-end[1], end[0]]) * (1.0 if turn < 0.5 else -1.0)
        if kind < 0.40:  # line, hardly bent
            pull, push = 0.15 * (bend - 0.5), 0.15 * (bend - 0.5)
        elif kind < 0.70:  # arc, up to a bowl
            pull = push = 0.4 + 0.8 * bend
        elif kind < 0.82:  # S
            pull, push = 0.6 + 0.5 * bend, -0.6 - 0.5 * bend
        else:  # loop: comes back near its start; the dot is the smallest of them
            if kind > 0.96:
                size, end = 0.0, end * 0.15
            reach = 0.3 + size
            length = np.sqrt(end[0] * end[0] + end[1] * end[1])
            along, side = end / length * reach, side / length * reach
            pool[i, 1], pool[i, 2], pool[i, 3] = along + side, along - side, end * 0.2
            continue
        pool[i, 1], pool[i, 2], pool[i, 3] = end / 3 + side * pull, end * 2 / 3 + side * push, end
    return pool


def _compose(rng: np.random.Generator) -> tuple[np.ndarray, list[int]]:
    """The programs of an alphabet: control points `[ALPHABET, MAX_STROKES, 4, 2]` and the number of strokes of each.

    Their curves lie within [-1, 1]. A character with fewer strokes repeats its first, to keep the array rectangular.
    """
    pool = _stroke_pool(rng)
    characters = np.empty((ALPHABET, MAX_STROKES, 4, 2))
    counts: list[int] = []
    seen: set[frozenset[int]] = set()  # no two characters of an alphabet use the same strokes, or they could be one
    t = np.linspace(0, 1, 9)
    for character in range(ALPHABET):
        while True:
            count = 2 + int((rng.random() + rng.random()) / 2 * (MAX_STROKES - 1))  # 2, 3, 4, 5 as 1 : 3 : 3 : 1
            chosen = np.argsort(rng.random(POOL), kind="stable")[:count]
            if frozenset(chosen.tolist()) not in seen:
                break
        seen.add(frozenset(chosen.tolist()))
        counts.append(count)
        placed: list[np.ndarray] = []
        for stroke in pool[chosen]:
            relation, where, own = rng.random(3)
            free = (rng.random(2) - 0.5) * 1.6
            if placed and relation < 0.8:
                host = placed[int(where * len(placed))]
                spot = 0.0 if relation < 0.2 else 1.0 if relation < 0.45 else 0.3 + relation - 0.45
                origin = _bezier(host, np.array([spot]))[0] - (stroke[3] if own < 0.2 else 0)
            else:
                origin = free
            placed.append(stroke + origin)
        program = np.stack(placed + placed[:1] * (MAX_STROKES - count))
        curve = _bezier(program, t).reshape(-1, 2)
        low, high = curve.min(axis=0), curve.max(axis=0)
        span = high - low
        # Fill the box along the longer side, and lend the other some of it, or lines would be hairs across the page.
        stretch = 2 / np.maximum(span, 0.6 * span.max())
        characters[character] = (program - (low + high) / 2) * stretch
    return characters, counts


def _write(strokes: np.ndarray, style: np.ndarray, hand: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Have every drawer write every character.

    Args:
        strokes: `[C, S, 4, 2]`, the programs.
        style: `[D, 8]` in [-1, 1], a drawer's habits, alike in all characters of the alphabet.
        hand: `[C, D, S + 1, 5, 2]` in [-1, 1] (triangular), what went differently this once: four control points and
            a shift for each stroke, and in the last row the slip of the whole character.

    Returns:
        Points in pixels `[S * SAMPLES, 2, C * D]` and pen radius in pixels `[C * D]`, float32.
    """
    slant, tilt, scale, aspect, shift_x, shift_y, pen, rounding = style.T
    slip = hand[:, :, -1]
    # Drawers round corners or cut them: the inner control points move off the chord or towards it.
    chord = strokes[..., :1, :] + (strokes[..., 3:, :] - strokes[..., :1, :]) * np.arange(4)[:, None] / 3
    round_ = (1 + 0.3 * rounding)[:, None, None, None]
    controls = chord[:, None] + (strokes - chord)[:, None] * round_
    controls = controls + 0.35 * hand[:, :, :-1, :4] + 0.26 * hand[:, :, :-1, 4:]
    points = _bezier(controls, np.linspace(0, 1, SAMPLES))  # [C, D, S, SAMPLES, 2]

    def per_image(value: np.ndarray) -> np.ndarray:
        return np.broadcast_to(value, hand.shape[:2])[:, :, None, None]

    x, y = points[..., 0], points[..., 1]
    x, y = (
        x + per_image(0.22 * slant - 0.12 * tilt + 0.16 * slip[..., 0, 0]) * y,
        y + per_image(0.12 * tilt + 0.10 * slip[..., 0, 1]) * x,
    )
    size = 8.6 * (1 + 0.15 * scale + 0.08 * slip[..., 1, 0])
    width = 1 + 0.16 * aspect + 0.08 * slip[..., 1, 1]
    x = SIDE / 2 + per_image(size * width) * x + per_image(1.2 * shift_x + 1.2 * slip[..., 2, 0])
    y = SIDE / 2 + per_image(size / width) * y + per_image(1.2 * shift_y + 1.2 * slip[..., 2, 1])
    images = hand.shape[0] * hand.shape[1]
    pixels = np.stack([x, y], axis=-1).reshape(images, -1, 2).transpose(1, 2, 0)
    radius = np.broadcast_to(0.95 + 0.30 * pen, hand.shape[:2]).reshape(images)
    return np.ascontiguousarray(pixels, np.float32), radius.astype(np.float32)


def _ink(points: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Antialiased images uint8 `[N, 28, 28]` from points `[P, 2, N]` and pen radii `[N]`, float32, in pixels.

    Ink falls from full to none over the pixel whose centre lies a radius away from the nearest point.
    Images run along the last axis: the distance separates into x and y, and a point costs one add and one min.
    """
    centres = np.arange(SIDE, dtype=np.float32) + np.float32(0.5)
    pictures = np.empty((points.shape[2], SIDE, SIDE), np.uint8)
    block = 128  # images at once: nearest and sum stay in the cache
    for start in range(0, points.shape[2], block):
        here = points[:, :, start : start + block]
        offset = here[:, :, None] - centres[:, None]  # [P, 2, 28, n]
        offset *= offset
        nearest = np.full((SIDE, SIDE, here.shape[2]), np.inf, np.float32)
        total = np.empty_like(nearest)
        for x, y in offset:
            np.add(y[:, None], x[None, :], out=total)
            np.minimum(nearest, total, out=nearest)
        ink = np.clip(radius[start : start + block] + np.float32(0.5) - np.sqrt(nearest), 0, 1)
        pictures[start : start + block] = (ink * 255 + np.float32(0.5)).astype(np.uint8).transpose(2, 0, 1)
    return pictures


@dataclass(frozen=True)
class GlyphOptions(DrawingOptions):
    """A few-shot task on glyphs."""

    backbone: BackboneConfig = field(default_factory=lambda: BackboneConfig(steps=250))


@register(drawing_defaults)
def glyphs(options: GlyphOptions, setup: Setup) -> HeadFamily:
    """Built in, drawn by rule: needs no data, and its whole run takes minutes."""
    return drawing_family(load, options, setup)
