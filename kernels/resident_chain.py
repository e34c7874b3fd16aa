"""The sampling chain of one or a few tasks, spread over many multiprocessors: `chain_weights.run_chain_ref`.

Each program keeps its own columns of every matrix in registers for the whole chain; a step costs no byte of matrices. Programs exchange what they
computed through the L2, in 8-byte packets {float32, number of the step}, as NCCL's LL protocol does: a packet is there when it carries the number
that is awaited, so no counter, fence or grid barrier is needed. All programs must run at the same time: a cooperative launch.

A step has one exchange a layer and one for x. What does not depend on the newest arrival is summed while that is on its way. Waiting is bounded:
a packet that never comes costs about a second and gives NaN.
"""

# ruff: noqa: RUF005 (Triton knows no (*tuple, element))
# mypy: disable-error-code="assignment, var-annotated"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mcdi_fast.errors import McdiError
from mcdi_fast.kernels.chain_weights import ChainWeights, check_chain
from mcdi_fast.kernels.launch import chip, compiled, launch, output

MAX_ROWS = 16
"""Tokens of all tasks, padded: every program holds all of them."""
LIMITS = {1: (15_000, 32_768), 2: (15_000, 32_768), 3: (8_192, 8_192)}
"""By depth: numbers of matrices a program keeps, and of its products before their sums. A multiprocessor has 65,536 registers, which also hold
activations and addresses; compiled for sm_90 these spill nothing. Deeper chains are streamed."""


@triton.jit
def _times(rows, weight):
    """[R, K] @ [K, O], float32."""
    return tl.sum(rows[:, :, None] * weight[None, :, :], 1)


@triton.jit
def _mean(rows, tokens, TASKS: tl.constexpr, TOKENS: tl.constexpr):
    """[TASKS * TOKENS, K] -> [TASKS, K]; rows of padding are 0."""
    return tl.sum(tl.reshape(rows, [TASKS, TOKENS, rows.shape[1]]), 1) / tokens


@triton.jit
def _to_rows(per_task, TASKS: tl.constexpr, TOKENS: tl.constexpr):
    width: tl.constexpr = per_task.shape[1]
    return tl.reshape(tl.broadcast_to(per_task[:, None, :], [TASKS, TOKENS, width]), [TASKS * TOKENS, width])


@triton.jit
def _put(packets, at, value, inside, number):
    bits = value.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    tl.store(packets + at, ((tl.zeros_like(bits) + number) << 32) | bits, mask=inside)


@triton.jit
def _take(packets, at, inside, number, polls):
    """The floats, once every packet carries `number`; NaN for those that did not come."""
    packet = tl.load(packets + at, mask=inside, other=0, volatile=True)
    count = 0
    while (tl.max(tl.max(tl.where(inside & ((packet >> 32) != number), 1, 0), 1), 0) > 0) & (count < polls):
        packet = tl.load(packets + at, mask=inside, other=0, volatile=True)
        count += 1
    value = tl.where((packet >> 32) == number, packet.to(tl.int32).to(tl.float32, bitcast=True), float("nan"))
    return tl.where(inside, value, 0.0)


@triton.jit
def _part(weight, first_row, rows, columns, column, inside, K: tl.constexpr):
    """[K, O] of a matrix [any, columns]: rows first_row … + rows, the program's own columns."""
    k = tl.arange(0, K)
    return tl.load(
        weight + (first_row + k)[:, None] * columns + column[None, :], mask=(k < rows)[:, None] & inside[None, :], other=0.0
    ).to(tl.float32)  # fmt: skip


@triton.jit
def resident_chain_kernel(
    condition, steps, coefficients, mask, w_token, w_sample, w_step, w_last, w_condition, w_condition_mean, packets, x, out,
    num_tasks, tokens, width, condition_width, wide, hidden, num_rows, first_step, last_step, num_steps, polls,
    DEPTH: tl.constexpr, PHASE: tl.constexpr, TASKS: tl.constexpr, TOKENS: tl.constexpr,
    KX: tl.constexpr, KH: tl.constexpr, KC: tl.constexpr, OWN: tl.constexpr, OWN_LAST: tl.constexpr,
):  # fmt: skip
    """PHASE -1: steps first … last in one launch. PHASE l < DEPTH: u_l alone; DEPTH: x alone: the same code for programs that run one by one."""
    R: tl.constexpr = TASKS * TOKENS
    program = tl.program_id(0)
    row = tl.arange(0, R)
    token = row % TOKENS
    inside = (row // TOKENS < num_tasks) & (token < tokens)
    source = row // TOKENS * tokens + token
    kx, kh, kc = tl.arange(0, KX), tl.arange(0, KH), tl.arange(0, KC)
    mine, last = program * OWN + tl.arange(0, OWN), program * OWN_LAST + tl.arange(0, OWN_LAST)
    my_hidden, my_last = mine < hidden, last < width
    in_x, in_h = inside[:, None] & (kx < width)[None, :], inside[:, None] & (kh < hidden)[None, :]
    own_h, own_x = inside[:, None] & my_hidden[None, :], inside[:, None] & my_last[None, :]
    # packets: x [2, R, KX], turn about, for an x is overwritten while others still read the old one; then u_l [R, KH]
    at_x, at_h = row[:, None] * KX + kx[None, :], row[:, None] * KH + kh[None, :]
    put_x, put_h = row[:, None] * KX + last[None, :], row[:, None] * KH + mine[None, :]
    u_packets = packets + 2 * R * KX

    # kept: for layer l token and sample of x, u_0 … u_{l-1}, from l (l + 1) on; the last matrix of x, u_0 …; what the condition gives
    c = tl.load(
        condition + source[:, None] * condition_width + kc[None, :], mask=inside[:, None] & (kc < condition_width)[None, :], other=0.0
    ).to(tl.float32)  # fmt: skip
    c_mean = _mean(c, tokens, TASKS, TOKENS)
    every = DEPTH * hidden + wide
    kept = ()
    kept_last = (_part(w_last, 0, width, wide, last, my_last, KX),)
    cond_bias = ()
    first = 0
    for layer in tl.static_range(DEPTH):
        kept = kept + (
            _part(w_token, first, width, hidden, mine, my_hidden, KX),
            _part(w_sample, first, width, hidden, mine, my_hidden, KX),
        )
        for j in tl.static_range(layer):
            at = first + wide + j * hidden
            kept = kept + (
                _part(w_token, at, hidden, hidden, mine, my_hidden, KH),
                _part(w_sample, at, hidden, hidden, mine, my_hidden, KH),
            )
        first += wide + layer * hidden
        kept_last = kept_last + (_part(w_last, wide + layer * hidden, hidden, wide, last, my_last, KH),)
        by_token = _times(c, _part(w_condition + layer * hidden, 0, condition_width, every, mine, my_hidden, KC))
        by_mean = _times(
            c_mean, _part(w_condition_mean + layer * hidden, 0, condition_width, DEPTH * hidden, mine, my_hidden, KC)
        )
        cond_bias = cond_bias + (by_token + _to_rows(by_mean, TASKS, TOKENS),)
    last_bias = _times(c, _part(w_condition + DEPTH * hidden, 0, condition_width, every, last, my_last, KC))

    for j in range(first_step, last_step):
        t = tl.load(steps + j)
        if j == 0:
            x_now = tl.load(x + source[:, None] * width + kx[None, :], mask=in_x, other=0.0)
            old = tl.load(x + source[:, None] * width + last[None, :], mask=own_x, other=0.0)
        else:
            x_now = _take(packets + j % 2 * R * KX, at_x, in_x, j, polls)
            old = _take(packets + j % 2 * R * KX, put_x, own_x, j, polls)
        x_mean = _mean(x_now, tokens, TASKS, TOKENS)
        us = ()
        means = ()
        for layer in tl.static_range(DEPTH):
            if PHASE == -1 or layer <= PHASE:
                a = cond_bias[layer]
                if PHASE == -1 or layer == PHASE:
                    a += tl.load(w_step + (layer * num_rows + t) * hidden + mine, mask=my_hidden, other=0.0).to(
                        tl.float32
                    )[None, :]
                    a += _times(x_now, kept[layer * (layer + 1)])
                    a += _to_rows(_times(x_mean, kept[layer * (layer + 1) + 1]), TASKS, TOKENS)
                    for i in tl.static_range(layer - 1):
                        a += _times(us[i], kept[layer * (layer + 1) + 2 * i + 2])
                        a += _to_rows(_times(means[i], kept[layer * (layer + 1) + 2 * i + 3]), TASKS, TOKENS)
                if layer > 0:
                    us = us + (_take(u_packets + (layer - 1) * R * KH, at_h, in_h, j + 1, polls),)
                    means = means + (_mean(us[layer - 1], tokens, TASKS, TOKENS),)
                if PHASE == -1 or layer == PHASE:
                    if layer > 0:
                        a += _times(us[layer - 1], kept[layer * (layer + 1) + 2 * layer])
                        a += _to_rows(
                            _times(means[layer - 1], kept[layer * (layer + 1) + 2 * layer + 1]), TASKS, TOKENS
                        )
                    _put(u_packets + layer * R * KH, put_h, a / (1 + tl.exp(-a)), own_h, j + 1)
        if PHASE == -1 or PHASE == DEPTH:
            keep_x, keep_f = tl.load(coefficients + 3 * j), tl.load(coefficients + 3 * j + 1)
            move = tl.load(coefficients + 3 * j + 2)
            net = last_bias + _times(x_now, kept_last[0])
            for i in tl.static_range(DEPTH - 1):
                net += _times(us[i], kept_last[i + 1])
            net += _times(_take(u_packets + (DEPTH - 1) * R * KH, at_h, in_h, j + 1, polls), kept_last[DEPTH])
            f = keep_f * old + move * net
            if mask is not None:
                f *= tl.load(mask + token[:, None] * width + last[None, :], mask=own_x, other=0.0)
            new = keep_x * old + f
            _put(packets + (j + 1) % 2 * R * KX, put_x, new, own_x, j + 1)
            if j + 1 == num_steps:
                tl.store(out + source[:, None] * width + last[None, :], new, mask=own_x)


def _up(number: int) -> int:
    return triton.next_power_of_2(number)


def _shape(weights: ChainWeights, x: Tensor, multiprocessors: int) -> tuple[int, int, int]:
    """Programs, TASKS, TOKENS. Eight columns of a hidden matrix a program, four where there is more to hold: as far as the multiprocessors go."""
    (depth, _, hidden), (b, n, _) = weights.step.shape, x.shape
    tasks = _up(b)
    tokens = max(_up(n), 8 // tasks)  # fewer rows than 8 make the sums over columns spill
    programs = _up(triton.cdiv(hidden, 8 if tasks * tokens <= 8 and depth <= 2 else 4))
    while programs > multiprocessors:
        programs //= 2
    return programs, tasks, tokens


def fits(weights: ChainWeights, x: Tensor, condition: Tensor) -> bool:
    """Whether the chain of these few tasks can be spread over the chip, every program with its columns in registers."""
    facts, (depth, _, hidden), d = chip(x.device), weights.step.shape, x.shape[-1]
    programs, tasks, tokens = _shape(weights, x, facts.multiprocessors)
    own, own_last = _up(triton.cdiv(hidden, programs)), _up(triton.cdiv(d, programs))
    kept = (2 * depth * own + own_last) * _up(d) + (depth * (depth - 1) * own + depth * own_last) * _up(hidden)
    rows = tasks * tokens
    at_once = rows * max(_up(hidden), 2 * _up(condition.shape[-1])) * own * max(1, rows // 8)
    most_kept, most_at_once = LIMITS.get(depth, (0, 0))
    return facts.capability > 0 and rows <= MAX_ROWS and kept <= most_kept and at_once <= most_at_once


def resident_chain(
    weights: ChainWeights,
    x: Tensor,
    condition: Tensor,
    steps: Tensor,
    coefficients: Tensor,
    mask: Tensor | None = None,
    *,
    out: Tensor | None = None,
    fused: bool | None = None,
    polls: int = 1_000_000,
) -> Tensor:
    """As `run_chain.run_chain`, for a few tasks (`fits`), in float32 whatever the precision.

    Args:
        fused: one launch, which needs a GPU; False: a launch a phase, for the interpreter. None: by the device.
        polls: how often a program looks for a packet before it gives up and takes NaN.

    Raises:
        McdiError: as `run_chain`; more than `fits`.
    """
    check_chain(weights, x, condition, steps, coefficients, mask, "ieee")
    if not fits(weights, x, condition):
        raise McdiError(f"x: {tuple(x.shape)} at width {weights.step.shape[-1]}, expected a few tasks; use run_chain")
    (b, n, d), (depth, num_rows, hidden), device = x.shape, weights.step.shape, x.device
    out = output("out", out, (b, n, d), device)
    (programs, tasks, tokens), kx, kh = _shape(weights, x, chip(device).multiprocessors), _up(d), _up(hidden)
    packets = torch.zeros(tasks * tokens * (2 * kx + depth * kh), dtype=torch.int64, device=device)
    fused = compiled(device) if fused is None else fused
    start = x.clone() if out is x and not fused else x  # all programs have read x before one writes its last
    count = len(steps)
    options = {"num_warps": 8, "maxnreg": 255} | ({"launch_cooperative_grid": True} if fused else {})
    for phase, first, last in (
        [(-1, 0, count)] if fused else [(p, j, j + 1) for j in range(count) for p in range(depth + 1)]
    ):
        launch(
            "resident_chain", resident_chain_kernel, (programs,), device, options,
            condition=condition, steps=steps, coefficients=coefficients, mask=mask, w_token=weights.token, w_sample=weights.sample,
            w_step=weights.step, w_last=weights.last, w_condition=weights.condition, w_condition_mean=weights.condition_mean,
            packets=packets, x=start, out=out, num_tasks=b, tokens=n, width=d, condition_width=condition.shape[-1],
            wide=weights.last.shape[1], hidden=hidden, num_rows=num_rows,
            first_step=first, last_step=last, num_steps=count, polls=polls, DEPTH=depth, PHASE=phase, TASKS=tasks, TOKENS=tokens,
            KX=kx, KH=kh, KC=_up(condition.shape[-1]), OWN=_up(triton.cdiv(hidden, programs)), OWN_LAST=_up(triton.cdiv(d, programs)),
        )  # fmt: skip
    return out
