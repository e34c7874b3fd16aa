import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcdi_fast.errors import McdiError
from mcdi_fast.noise import philox_normal

MASK = 2**32 - 1


def philox(counter, key):
    """Philox4x32-10 in plain Python, as its authors write it (Salmon et al., SC 2011)."""
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & MASK, (a >> 32) ^ c[3] ^ k[1], a & MASK]
        k = [(k[0] + 0x9E3779B9) & MASK, (k[1] + 0xBB67AE85) & MASK]
    return c


def normals(bits):
    """Box-Muller of four words as Triton's randn4x does it, in float64 but for the rounding of the uniforms."""
    signed = [b - 2**32 if b >= 2**31 else b for b in bits]
    uniform = [np.float32(-s - 1 if s < 0 else s) * np.float32(4.6566127342e-10) for s in signed]
    result = []
    for u, v in ((uniform[0], uniform[1]), (uniform[2], uniform[3])):
        radius = math.sqrt(-2 * math.log(max(1e-7, float(u))))
        result += [radius * math.cos(2 * math.pi * float(v)), radius * math.sin(2 * math.pi * float(v))]
    return result


def test_known_answers():
    """The vectors `philox4x32 10` of Random123's kat_vectors: counter, key, answer."""
    for counter, key, answer in (
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([MASK] * 4, [MASK] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ):
        assert philox(counter, key) == answer
    # float32 rounding of an angle below 2 pi, times a radius below 5.7
    np.testing.assert_allclose(
        philox_normal([0], 4)[0], normals([0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]), rtol=1e-5, atol=4e-6
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=3), st.integers(1, 30), st.integers(0, MASK))
def test_equals_plain_python(seeds, count, stream):
    found = philox_normal(seeds, count, stream)
    assert found.dtype == np.float32
    assert found.shape == (len(seeds), count)
    for row, seed in zip(found, seeds, strict=True):
        key = [seed & MASK, seed >> 32]
        blocks = [normals(philox([block, stream, 0, 0], key)) for block in range((count + 3) // 4)]
        np.testing.assert_allclose(row, np.concatenate(blocks)[:count], rtol=1e-5, atol=4e-6)


KERNEL = """
import json, sys
import torch, triton
import triton.language as tl

@triton.jit
def draw(out, seed, stream, BLOCK: tl.constexpr):
    block = tl.arange(0, BLOCK)
    a, b, c, d = tl.randn4x(seed, block.to(tl.int64) + (stream.to(tl.int64) << 32))
    tl.store(out + block * 4, a)
    tl.store(out + block * 4 + 1, b)
    tl.store(out + block * 4 + 2, c)
    tl.store(out + block * 4 + 3, d)

rows = []
for seed, stream in json.loads(sys.argv[1]):
    out = torch.empty(64)
    draw[(1,)](out, torch.tensor([seed]).item(), stream, BLOCK=16)
    rows.append(out.tolist())
print(json.dumps(rows))
"""


def test_equals_triton(tmp_path):
    """Under the interpreter, which must be chosen before triton is imported: a process of its own."""
    pytest.importorskip("triton")
    script = tmp_path / "kernel.py"  # triton reads the kernel's source from its file
    script.write_text(KERNEL)
    cases = [(0, 0), (1, 0), (7, 3), (2**31 + 5, 1), (2**40 + 12345, 20), (2**63 - 1, 2)]
    result = subprocess.run(
        [sys.executable, script, json.dumps(cases)],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    found = np.array(json.loads(result.stdout), np.float32)
    expected = np.concatenate([philox_normal([seed], 64, stream) for seed, stream in cases])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=4e-6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=40), st.integers(1, 70), st.integers(0, 30))
def test_a_row_depends_on_its_own_seed_alone(seeds, count, stream):
    whole = philox_normal(seeds, count, stream)
    for i in {0, len(seeds) // 2, len(seeds) - 1}:
        assert philox_normal([seeds[i]], count, stream).tobytes() == whole[i].tobytes()
    assert np.array_equal(philox_normal(seeds[::-1], count, stream), whole[::-1])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 200), st.integers(0, 200))
def test_an_entry_does_not_depend_on_the_count(seed, one, two):
    short, long = sorted((one, two))
    found = philox_normal([seed], long)
    assert found.shape == (1, long)
    assert philox_normal([seed], short).tobytes() == found[:, :short].tobytes()


def test_seeds_of_any_integer_type():
    expected = philox_normal([3, 2**40], 10)
    assert np.array_equal(philox_normal(np.array([3, 2**40], np.uint64), 10), expected)
    assert np.array_equal(philox_normal(np.array([3, 2**40]), 10), expected)
    assert np.array_equal(philox_normal((3, 2**40), 10), expected)
    assert np.array_equal(philox_normal(range(3, 5), 10)[:1], expected[:1])
    assert philox_normal([], 10).shape == (0, 10)
    assert philox_normal([1], 0).shape == (1, 0)


def test_standard_normal_and_uncorrelated():
    x = philox_normal(range(100), 10_000, 4).astype(np.float64)
    n = x.size
    # six deviations of each estimate
    assert abs(x.mean()) < 6 / math.sqrt(n)
    assert abs(x.var() - 1) < 6 * math.sqrt(2 / n)
    assert abs((x**3).mean()) < 6 * math.sqrt(15 / n)
    assert abs((x**4).mean() - 3) < 6 * math.sqrt(96 / n)
    assert abs((np.abs(x) < 1).mean() - math.erf(1 / math.sqrt(2))) < 6 * math.sqrt(0.22 / n)
    assert np.isfinite(x).all()
    assert 4 < np.abs(x).max() < 5.7  # the uniform is kept above 1e-7
    for shifted in (x[:, 1:] * x[:, :-1], x[:, 2:] * x[:, :-2], x[1:] * x[:-1], x * philox_normal(range(100), 10_000)):
        assert abs(shifted.mean()) < 6 / math.sqrt(shifted.size)


def test_seeds_and_streams_differ_in_every_bit():
    rows = [philox_normal([1 << bit], 8) for bit in range(64)] + [philox_normal([0], 8, s) for s in range(32)]
    assert len({row.tobytes() for row in rows}) == 96


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, math.nan, "7", None])
def test_bad_seeds(seed):
    with pytest.raises(McdiError) as caught:
        philox_normal([0, seed], 4)
    message = str(caught.value)
    assert f"seed {seed}" in message
    assert "\n" not in message
