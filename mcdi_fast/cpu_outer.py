"""The outer step on a CPU in compiled code (numba, the extra `cpu`): `outer.outer_update` in one pass over phi, and whether a delta is finite.

By torch these are a dozen passes, and behind each parallel one OpenMP's threads spin on the cores that the next inner loops want.

Change this file with cpu_core.py, whose functions it compiles in.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from torch import Tensor

from mcdi_fast.cpu_core import FAST, by_threads, compiled
from mcdi_fast.optim import ADAM_BETAS, ADAM_EPS
from mcdi_fast.outer import OuterScalars, OuterState

_BLOCK = 2048
_WORTH = 2**16  # entries that a share must have to be worth a thread


@njit(**FAST)
def _moments(exp_avg, exp_avg_sq, delta, gain, first, second):
    for i in range(len(delta)):
        g = gain * delta[i]
        exp_avg[i] += first * (g - exp_avg[i])
        exp_avg_sq[i] += second * (g * g - exp_avg_sq[i])


@njit(**FAST)
def _move(phi, exp_avg, exp_avg_sq, rate, root, eps):
    for i in range(len(phi)):
        phi[i] -= rate * (exp_avg[i] / (np.sqrt(exp_avg_sq[i]) / root + eps))


@njit(**FAST)
def _add(phi, delta, rate):
    for i in range(len(phi)):
        phi[i] += rate * delta[i]


@njit(**FAST)
def _mix(average, phi, kept):
    for i in range(len(phi)):
        average[i] = phi[i] - kept * (phi[i] - average[i])  # with kept = 0 it is phi


@compiled
def _update(phi, average, exp_avg, exp_avg_sq, delta, scalars, constants, adam):
    """Blocks that stay in the cache, and loops of few arrays: of many the compiler makes no vectors."""
    rate, root, gain, mix = scalars
    first, second, eps = constants
    for start in range(0, len(phi), _BLOCK):
        block = slice(start, start + _BLOCK)
        p, m, v, d = phi[block], exp_avg[block], exp_avg_sq[block], delta[block]
        if adam:
            _moments(m, v, d, gain, first, second)
            _move(p, m, v, rate, root, eps)
        else:
            _add(p, d, rate)
        _mix(average[block], p, np.float32(1) - mix)


@compiled
def _finite(bits):
    largest = np.int32(0)
    for i in range(len(bits)):
        largest = max(largest, bits[i] & np.int32(0x7FFFFFFF))
    return largest < 0x7F800000


def outer_update(state: OuterState, delta: Tensor, scalars: OuterScalars, outer: str) -> None:
    """`outer.outer_update` in float32, but that delta is left as it is."""
    arrays = [t.numpy() for t in (state.phi, state.average, state.exp_avg, state.exp_avg_sq, delta)]
    constants = tuple(np.float32(value) for value in (1 - ADAM_BETAS[0], 1 - ADAM_BETAS[1], ADAM_EPS))
    given = tuple(map(np.float32, scalars)), constants, outer == "adam"
    by_threads(lambda first, end: _update(*(array[first:end] for array in arrays), *given), len(delta), _WORTH)


def finite(delta: Tensor) -> bool:
    """`outer.finite` in float32."""
    bits = delta.numpy().view(np.int32)
    return all(by_threads(lambda first, end: _finite(bits[first:end]), len(delta), _WORTH))
