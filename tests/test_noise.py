import math

import numpy as np
import pytest
import torch
from helpers import error_of
from hypothesis import given, settings
from hypothesis import strategies as st

from mcdi_fast.noise import philox_normal, seed_bits

MASK = 2**64 - 1


def philox(counter, key):
    """Philox4x64-10 in plain Python, as its authors write it (Salmon et al., SC 2011)."""
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [(b >> 64) ^ c[1] ^ k[0], b & MASK, (a >> 64) ^ c[3] ^ k[1], a & MASK]
        k = [(k[0] + 0x9E3779B97F4A7C15) & MASK, (k[1] + 0xBB67AE8584CAA73B) & MASK]
    return c


def normals(words):
    """Box-Muller of the halves of four words as Triton does it, in float64 but for the rounding of the uniforms."""
    result = []
    for word in words:
        signed = [half - 2**32 if half >= 2**31 else half for half in (word & 0xFFFFFFFF, word >> 32)]
        u, v = (float(np.float32(-s - 1 if s < 0 else s) * np.float32(4.6566127342e-10)) for s in signed)
        radius = math.sqrt(-2 * math.log(max(1e-7, u)))
        result += [radius * math.cos(2 * math.pi * v), radius * math.sin(2 * math.pi * v)]
    return result


def test_known_answers():
    """The vectors `philox4x64 10` of Random123's kat_vectors: counter, key, answer."""
    for counter, key, answer in (
        (
            [0] * 4,
            [0] * 2,
            [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B],
        ),
        (
            [MASK] * 4,
            [MASK] * 2,
            [0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0],
        ),
        (
            [0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89],
            [0x452821E638D01377, 0xBE5466CF34E90C6C],
            [0xA528F45403E61D95, 0x38C72DBD566E9788, 0xA5A1610E72FD18B5, 0x57BD43B5E52B7FE6],
        ),
    ):
        assert philox(counter, key) == answer


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, MASK), min_size=1, max_size=3), st.integers(1, 30), st.integers(0, MASK))
def test_equals_plain_python(seeds, count, stream):
    found = philox_normal(seeds, count, stream)
    assert found.dtype == torch.float32
    assert found.shape == (len(seeds), count)
    for row, seed in zip(found, seeds, strict=True):
        blocks = [normals(philox([block + 1, stream, 0, 0], [seed, 0])) for block in range((count + 7) // 8)]
        # float32 rounding of an angle below 2 pi, times a radius below 5.7
        np.testing.assert_allclose(row, np.concatenate(blocks)[:count], rtol=1e-5, atol=4e-6)


def test_a_stream_a_seed():
    found = philox_normal([5, 5, 6], 20, [0, 2**40, 3])
    for row, seed, stream in zip(found, (5, 5, 6), (0, 2**40, 3), strict=True):
        assert torch.equal(row, philox_normal([seed], 20, stream)[0])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=40), st.integers(1, 70), st.integers(0, 30))
def test_a_row_depends_on_its_own_seed_alone(seeds, count, stream):
    whole = philox_normal(seeds, count, stream)
    for i in {0, len(seeds) // 2, len(seeds) - 1}:
        assert philox_normal([seeds[i]], count, stream).numpy().tobytes() == whole[i].numpy().tobytes()
    assert torch.equal(philox_normal(seeds[::-1], count, stream), whole.flip(0))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 200), st.integers(0, 200))
def test_an_entry_does_not_depend_on_the_count(seed, one, two):
    short, long = sorted((one, two))
    found = philox_normal([seed], long)
    assert found.shape == (1, long)
    assert philox_normal([seed], short).numpy().tobytes() == found[:, :short].numpy().tobytes()


def test_seeds_of_any_integer_type():
    expected = philox_normal([3, 2**40], 10)
    assert torch.equal(philox_normal(np.array([3, 2**40], np.uint64), 10), expected)
    assert torch.equal(philox_normal(np.array([3, 2**40]), 10), expected)
    assert torch.equal(philox_normal((3, 2**40), 10), expected)
    assert torch.equal(philox_normal(range(3, 5), 10)[:1], expected[:1])
    assert torch.equal(philox_normal(torch.tensor([3, 2**40]), 10), expected)
    assert torch.equal(philox_normal(seed_bits([MASK]), 10), philox_normal([MASK], 10))
    assert philox_normal([], 10).shape == (0, 10)
    assert philox_normal([1], 0).shape == (1, 0)


def test_standard_normal_and_uncorrelated():
    x = philox_normal(range(100), 10_000, 4).double().numpy()
    n = x.size
    # six deviations of each estimate
    assert abs(x.mean()) < 6 / math.sqrt(n)
    assert abs(x.var() - 1) < 6 * math.sqrt(2 / n)
    assert abs((x**3).mean()) < 6 * math.sqrt(15 / n)
    assert abs((x**4).mean() - 3) < 6 * math.sqrt(96 / n)
    assert abs((np.abs(x) < 1).mean() - math.erf(1 / math.sqrt(2))) < 6 * math.sqrt(0.22 / n)
    assert np.isfinite(x).all()
    assert 4 < np.abs(x).max() < 5.7  # the uniform is kept above 1e-7
    for shifted in (
        x[:, 1:] * x[:, :-1],
        x[:, 2:] * x[:, :-2],
        x[1:] * x[:-1],
        x * philox_normal(range(100), 10_000).numpy(),
    ):
        assert abs(shifted.mean()) < 6 / math.sqrt(shifted.size)


def test_seeds_and_streams_differ_in_every_bit():
    rows = [philox_normal([1 << bit], 8) for bit in range(64)] + [philox_normal([0], 8, s) for s in range(32)]
    assert len({row.numpy().tobytes() for row in rows}) == 96


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, math.nan, "7", None])
def test_bad_seeds(seed):
    assert f"seed {seed}" in error_of(philox_normal, [0, seed], 4)


def test_streams_of_64_bits():
    """NumPy makes a list with such a number a list of floats, and rounds."""
    for stream in (2**63, 2**63 + 1, 2**64 - 1):
        blocks = normals(philox([1, stream, 0, 0], [5, 0]))
        np.testing.assert_allclose(philox_normal([5], 8, stream)[0], blocks, rtol=1e-5, atol=4e-6)
