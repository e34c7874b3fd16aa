import numpy as np
import pytest
from helpers import error_of

from mcdi_fast.tasks import glyphs
from mcdi_fast.tasks.drawings import FewShotData


@pytest.fixture(scope="module")
def data() -> FewShotData:
    return glyphs.load()


def test_shapes_and_types(data):
    assert data.name == "glyphs"
    for split, characters in ((data.train, 400), (data.val, 60), (data.test, 150)):
        assert split.images.shape == (characters, 20, 28, 28)
        assert split.images.dtype == np.uint8
        assert split.images.flags.c_contiguous
    assert len(data.fingerprint) == 16
    assert set(data.fingerprint) <= set("0123456789abcdef")


@pytest.mark.parametrize("counts", [(1, 1, 1, 1), (23, 2, 41, 3)])
def test_odd_sizes(counts):
    *characters, drawers = counts
    small = glyphs.load(*counts)
    got = [split.images.shape[:2] for split in (small.train, small.val, small.test)]
    assert got == [(count, drawers) for count in characters]


def test_the_same_again_and_on_every_machine():
    first, again = glyphs.load(21, 3, 5, drawers=4), glyphs.load(21, 3, 5, drawers=4)
    np.testing.assert_array_equal(first.train.images, again.train.images)
    assert first.fingerprint == again.fingerprint
    # Every operation is exactly rounded, so this holds anywhere. Whoever redraws the alphabet on purpose pins the new
    # value, and knows that backbones and banks made before belong to the old one.
    assert first.fingerprint == "1c2fdc3ce1802269"


def test_growth_leaves_what_was_there(data):
    # 7 and 33: one cut inside the first alphabet, one inside the second; a block of the painter ends elsewhere too.
    small = glyphs.load(33, 7, 33, drawers=6)
    for less, more in ((small.train, data.train), (small.val, data.val), (small.test, data.test)):
        np.testing.assert_array_equal(less.images, more.images[: len(less.images), :6])


def test_seed_and_every_count_reach_the_fingerprint():
    sizes = [(2, 2, 2, 2), (3, 2, 2, 2), (2, 3, 2, 2), (2, 2, 3, 2), (2, 2, 2, 3)]
    prints = {glyphs.load(*size).fingerprint for size in sizes} | {glyphs.load(*sizes[0], seed=1).fingerprint}
    assert len(prints) == 6


def test_splits_share_no_image(data):
    flat = np.concatenate([split.images.reshape(-1, 784) for split in (data.train, data.val, data.test)])
    assert len({row.tobytes() for row in flat}) == len(flat)


def test_ink_on_paper(data):
    for split in (data.train, data.val, data.test):
        ink = (split.images / 255).mean(axis=(2, 3))
        # Measured 3 to 36 % of the page. A blank one, a blot, or ink and paper swapped lie far outside.
        assert ink.min() > 0.02
        assert ink.max() < 0.6
        share_grey = ((split.images > 0) & (split.images < 255)).mean()
        assert 0.02 < share_grey < 0.3  # edges are antialiased, and only edges are grey


def test_ink_is_the_distance_to_the_nearest_point():
    rng = np.random.default_rng(3)
    points = (rng.random((7, 2, 130)) * 34 - 3).astype(np.float32)  # 130: a whole block and a rest; some off the page
    radius = (0.5 + rng.random(130)).astype(np.float32)
    centres = np.arange(28) + 0.5
    x, y = (points[:, axis].astype(np.float64).T[:, :, None, None] for axis in (0, 1))
    distance = np.sqrt((x - centres) ** 2 + (y - centres[:, None]) ** 2).min(axis=1)
    expected = np.clip(radius[:, None, None] + 0.5 - distance, 0, 1) * 255
    # Half a level from rounding to uint8; float32 adds 255 * 40 px * 2^-23, under a hundredth.
    assert np.abs(glyphs._ink(points, radius) - expected).max() < 0.51


def test_drawers_agree_more_on_a_character_than_characters_do(data):
    pixels = data.test.images[:, ::4].reshape(150, 5, 784) / 255.0
    distance = np.sqrt(np.maximum(_squared_distances(pixels.reshape(750, 784), pixels.reshape(750, 784)), 0))
    same = np.kron(np.eye(150, dtype=bool), np.ones((5, 5), dtype=bool))
    within = distance[same & ~np.eye(750, dtype=bool)].mean()
    assert within < 0.95 * distance[~same].mean()


def test_difficulty_for_raw_pixels(data):
    """Nearest neighbour on pixels, 5-way 1-shot: hard, and far above chance (20 %)."""
    rng = np.random.default_rng(0)
    pixels = data.test.images.reshape(150, 20, 784).astype(np.float32) / 255
    episodes, right = 300, 0
    for _ in range(episodes):
        classes = rng.choice(150, 5, replace=False)
        drawn = np.stack([pixels[c, rng.permutation(20)[:6]] for c in classes])
        distance = _squared_distances(drawn[:, 1:].reshape(25, 784), drawn[:, 0])
        right += (distance.argmin(axis=1) == np.repeat(np.arange(5), 5)).sum()
    # Measured 60 % over 1000 episodes; over 300 the standard error is 0.9 %.
    assert 0.55 < right / (25 * episodes) < 0.70


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * a).sum(1)[:, None] - 2 * a @ b.T + (b * b).sum(1)


@pytest.mark.parametrize("option", ["train_characters", "val_characters", "test_characters", "drawers"])
@pytest.mark.parametrize("value", [0, -3, 1_000_001])
def test_bad_counts(option, value):
    assert f"{option} is {value}, expected 1 to" in error_of(glyphs.load, **{option: value})


def test_bad_seed():
    assert "seed is -1" in error_of(glyphs.load, 1, 1, 1, seed=-1)
