"""The one list of operations: what runs, its reference, inputs of any size, and the work that cannot be avoided.

The kernel tests, the benchmarks, the ahead-of-time compilation (inspect.py) and bench/gpu_check.py all read it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mcdi_fast.backend import PRECISIONS
from mcdi_fast.config import DenoiserConfig, DiffusionConfig, MetaConfig, PrepareConfig
from mcdi_fast.denoiser import FoldedDenoiser, init_parameters, parameter_shapes
from mcdi_fast.diffusion import InnerBatch, Objective, chain_table, diffusion_tables
from mcdi_fast.kernels import head_trajectory as heads
from mcdi_fast.kernels import inner_loop as inner
from mcdi_fast.kernels import layered_chain as layered
from mcdi_fast.kernels import load_batch as load
from mcdi_fast.kernels import noise_batch as noise
from mcdi_fast.kernels import normal_noise as normals
from mcdi_fast.kernels import outer_update as outer
from mcdi_fast.kernels import resident_chain as resident
from mcdi_fast.kernels import run_chain as chain
from mcdi_fast.kernels import sam_adam as steps
from mcdi_fast.kernels import task_linear as linear
from mcdi_fast.kernels import weight_update as update
from mcdi_fast.kernels.chain_weights import pack_weights, run_chain_ref
from mcdi_fast.kernels.launch import padded
from mcdi_fast.outer import OuterScalars, OuterState


class Work(NamedTuple):
    """What no implementation can avoid: bytes that must move, operations that must be done; 0 where it is not counted."""

    bytes: int = 0
    flop: int = 0


@dataclass(frozen=True)
class Sizes:
    """Of everything: B base learners, K inner steps, S samples, N tokens of width D, conditions of width C, the network's H, L and T; heads."""

    tasks: int
    inner: int
    samples: int
    tokens: int
    width: int
    condition: int
    hidden: int
    depth: int
    steps: int
    heads: int
    rows: int
    ways: int
    features: int
    adam_steps: int
    chains: int

    @property
    def objective(self) -> Objective:
        """Of three segments."""
        return diffusion_tables(DiffusionConfig(steps=self.steps))[1]


DEFAULT = Sizes(
    MetaConfig().meta_batch, MetaConfig().inner_steps, MetaConfig().samples, 5, 65, 65, DenoiserConfig().width, DenoiserConfig().depth,
    DiffusionConfig().steps, 500, 100, 5, 64, PrepareConfig().steps, 32,
)  # fmt: skip
"""5-way heads of 64 features, 100 rows a task."""
TINY = Sizes(3, 2, 2, 3, 13, 7, 33, 2, 4, 3, 23, 3, 10, 6, 3)
"""Odd and ragged, for the interpreter."""
ONE = Sizes(1, 1, 1, 1, 1, 1, 1, 1, 3, 1, 1, 2, 1, 3, 1)
"""What can be 1 is: there integers become constants of a kernel, and dimensions vanish. Not ways: the gradient of one way is the rounding of
x / x - 1, which Adam divides by itself."""
WIDE = Sizes(2, 2, 4, 17, 70, 40, 70, 1, 3, 2, 130, 17, 20, 3, 5)
"""More than one block of everything."""


class Maker:
    """Random inputs on a device, the same for the same number of calls."""

    def __init__(self, device: torch.device | str = "cpu"):
        """device: where the inputs go."""
        self.device, self.generator = torch.device(device), torch.Generator().manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        """Standard normals, float32."""
        return torch.randn(*shape, generator=self.generator).to(self.device)

    def integers(self, below: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """From 0 to below - 1."""
        return torch.randint(below, shape, generator=self.generator, dtype=dtype).to(self.device)

    def rows(self, *shape: int) -> Tensor:
        """Normals with the last dimension padded by zeros, as the engine keeps rows."""
        found = torch.zeros(*shape[:-1], padded(shape[-1]), device=self.device)
        found[..., : shape[-1]] = self.normal(*shape)
        return found

    def mask(self, n: int, d: int) -> Tensor:
        """[N, D], the last token half as wide as the others."""
        mask = torch.ones(n, d, device=self.device)
        mask[-1, d // 2 + 1 :] = 0
        return mask

    def phi(self, z: Sizes) -> dict[str, Tensor]:
        """No zero matrix: a wrong gradient behind one would not show."""
        shapes = init_parameters(z.width, z.condition, z.steps, z.hidden, z.depth, 0)
        return {name: self.normal(*value.shape) / value.shape[0] ** 0.5 for name, value in shapes.items()}


@dataclass(frozen=True)
class Operation:
    """One entry of the list.

    Attributes:
        run: the launcher, called as run(**inputs) or, where `precisions` is not empty, run(**inputs, precision=…).
        reference: called as reference(**inputs), in any dtype.
        inputs: (sizes, maker) -> keyword arguments.
        work: sizes -> Work. changes: inputs that the operation writes; None: it returns its result.
        depth: products in a row, each of which rounds its operands.
    """

    name: str
    run: Callable[..., Any]
    reference: Callable[..., Any]
    inputs: Callable[[Sizes, Maker], dict[str, Any]]
    work: Callable[[Sizes], Work] = lambda sizes: Work()
    precisions: tuple[str, ...] = ()
    changes: tuple[str, ...] | None = None
    depth: Callable[[Sizes], int] = lambda sizes: 1

    def __call__(self, inputs: dict[str, Any], precision: str | None = None) -> list[Tensor]:
        """The result as a flat list of tensors."""
        return self.results(self.run, inputs, {"precision": precision} if precision else {})

    def exact(self, inputs: dict[str, Any], dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """The reference's result in `dtype`, from the same inputs."""
        return self.results(self.reference, convert(inputs, dtype))

    def results(
        self, function: Callable[..., Any], inputs: dict[str, Any], options: dict[str, Any] | None = None
    ) -> list[Tensor]:
        """What `function` returns or, where the operation changes its inputs, has made of them."""
        options = options or {}
        if self.changes is None:
            return list(tensors(function(**inputs, **options)))
        function(**inputs, **options)
        return [tensor for name in self.changes for tensor in tensors(inputs[name])]


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in tuples, lists, dicts and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors(part)
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors(getattr(value, field.name))


def relative_error(found: Any, exact: Any) -> float:
    """The largest error of all tensors in `found`, each relative to the norm of the one in `exact`; infinite where one is not finite."""
    worst = 0.0
    for one, two in zip(tensors(found), tensors(exact), strict=True):
        assert one.shape == two.shape
        if not bool(one.isfinite().all()):
            return float("inf")
        worst = max(worst, float((one.double() - two.double()).norm() / two.double().norm().clamp_min(1e-300)))
    return worst


def convert(value: Any, dtype: torch.dtype | None = None) -> Any:
    """A copy with every floating tensor in `dtype`, by default its own; views of one storage become tensors of their own."""
    if isinstance(value, Tensor):
        return value.to(dtype, copy=True) if dtype is not None and value.is_floating_point() else value.clone()
    if isinstance(value, dict):
        return {name: convert(part, dtype) for name, part in value.items()}
    if isinstance(value, list | tuple):
        parts = [convert(part, dtype) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if is_dataclass(value) and not isinstance(value, type) and any(True for _ in tensors(value)):
        return replace(value, **{field.name: convert(getattr(value, field.name), dtype) for field in fields(value)})
    return value


def _noise_batch(z: Sizes, make: Maker) -> dict[str, Any]:
    objective, segment = z.objective, torch.randint(3, (z.tasks,), generator=make.generator)
    share = torch.rand(z.tasks, z.inner, z.samples, generator=make.generator)
    step = (share * objective.ends[segment][:, None, None]).long()
    return {
        "target": make.normal(z.tasks, z.tokens, z.width), "segment": segment.to(make.device), "step": step.to(make.device), "seed": 3,
        "streams": torch.arange(z.tasks, device=make.device), "tables": noise.noise_tables(objective).float().to(make.device),
    }  # fmt: skip


def _load_batch(z: Sizes, make: Maker) -> dict[str, Any]:
    step, (b, n, d, c) = make.integers(z.steps, z.tasks, z.inner, z.samples), (z.tasks, z.tokens, z.width, z.condition)
    storage = torch.zeros(2, z.inner, b, z.samples * n, padded(2 * z.hidden + z.steps), device=make.device)
    return {
        "targets": make.normal(3 * b, n, d), "conditions": make.normal(b, n, c), "row": make.integers(3 * b, b), "task": make.integers(b, b),
        "step": step, "mean": make.normal(n, d), "std": make.normal(n, d).abs() + 0.5, "condition_mean": make.normal(n, c),
        "condition_std": make.normal(n, c).abs() + 0.5, "target": make.normal(b, n, d),
        "enter": make.rows(z.inner, b, z.samples * n, d + c), "blocks": list(storage), "first": d, "first_step": 2 * z.hidden,
        "num_steps": z.steps,
    }  # fmt: skip


def _judge(z: Sizes, make: Maker) -> dict[str, Any]:
    losses = make.normal(z.inner, z.tasks, 2).abs()
    return {
        "verdict": outer.Verdict.start(losses[..., 0]), "total": make.normal(1) + float("nan") * (z.tasks % 2), "losses": losses,
        "number": make.integers(100, 1) + 1, "scalars": make.normal(4).double(), "skip": False,
    }  # fmt: skip


def _of_task(z: Sizes) -> int:
    return z.samples * z.tokens


def _linear(
    name: str,
    i: str,
    o: str,
    *,
    stacked=False,
    backward=False,
    add=False,
    activation="none",
    fold=False,
    means=False,
    loss=False,
) -> Operation:
    """A map of the denoiser as the inner loop calls it in its last step, widths by name; backward: o -> i."""

    def widths(z: Sizes) -> tuple[int, int]:
        found = vars(z) | {"enter": z.width + z.condition, "block": 2 * z.hidden + z.steps}
        return found[i], found[o]

    def inputs(z: Sizes, make: Maker) -> dict[str, Any]:
        (i, o), r = widths(z), _of_task(z)
        tasks = (z.tasks,) if stacked else ()
        weight = torch.zeros(*tasks, i, padded(o), device=make.device)
        weight[..., :o] = make.normal(*tasks, i, o) / i**0.5
        out = z.hidden if backward else o
        found: dict[str, Any] = {
            "weight": weight[..., : out * (1 + fold), :].mT if backward else weight if loss else weight[..., :o]
        }
        stored = [make.rows(z.inner - 1, z.tasks, r, i), make.rows(z.inner - 1, z.tasks, r, o)]
        found |= {"rows": make.rows(z.tasks, r, o if backward else i), "inner_lr": 0.05, "activation": activation}
        found["earlier"] = None if stacked else tuple(reversed(stored)) if backward else tuple(stored)
        found |= {"tokens": z.tokens if fold or means else 0, "fold": fold, "mean_at": out if means else 0}
        if add:
            found["add_to"] = make.normal(z.tasks, r, out)
        if activation == "silu_backward":
            found["pre_activation"] = make.normal(z.tasks, r, out)
        if loss:
            shape, mask = (z.tasks, z.samples, z.tokens, z.width), make.mask(z.tokens, z.width)
            found["residual"] = linear.Residual(make.normal(*shape[:2]), make.normal(*shape), mask, int(mask.sum()))
        return found

    def run(**given: Any) -> tuple[Tensor, Tensor | None]:
        out, more = linear.task_linear(**given)
        return out, more.sum(-1, keepdim=True) if loss and more is not None else more

    def work(z: Sizes) -> Work:
        (i, o), r = widths(z), _of_task(z)
        keys = 0 if stacked else (z.inner - 1) * r
        moved = z.tasks * r * (i + o) + z.tasks * keys * (i + o) + i * o * (z.tasks if stacked else 1)
        return Work(4 * moved, z.tasks * (2 * r * i * o + 2 * r * keys * (i + o)))

    return Operation(f"task_linear {name}", run, linear.task_linear_ref, inputs, work, PRECISIONS, depth=lambda z: 3)


_LINEAR = [
    _linear("in", "enter", "hidden", means=True),
    _linear("token", "block", "hidden", activation="silu"),
    _linear("token stacked", "block", "hidden", stacked=True, activation="silu"),
    _linear("out", "hidden", "hidden", add=True, means=True),
    _linear("loss", "hidden", "width", loss=True),
    _linear("out backward", "hidden", "hidden", backward=True, activation="silu_backward"),
    _linear("token backward", "block", "hidden", backward=True, add=True, fold=True),
    _linear("token stacked backward", "block", "hidden", stacked=True, backward=True, fold=True),
]


def layer_rows(z: Sizes) -> dict[str, tuple[int, int, int]]:
    """Rows of a task, in, out of every matrix of phi."""
    return {
        name: (
            z.tokens if name == "in.condition" else z.samples if name.endswith("sample") else z.samples * z.tokens,
            *shape,
        )
        for name, shape in parameter_shapes(z.width, z.condition, z.steps, z.hidden, z.depth).items()
    }


def _reptile_delta(z: Sizes, make: Maker) -> dict[str, Any]:
    layers, k, b = layer_rows(z).values(), z.inner, z.tasks
    storages = [
        torch.zeros(sum(k * b * r * padded((i, o)[side]) for r, i, o in layers), device=make.device) for side in (0, 1)
    ]
    out, found = torch.empty(sum(i * o for _, i, o in layers), device=make.device), []
    starts = [0, 0, 0]
    for r, i, o in layers:
        views = []
        for side, width in enumerate((i, o)):
            view = storages[side].narrow(0, starts[side], k * b * r * padded(width)).view(k, b, r, padded(width))
            view[..., :width] = make.normal(k, b, r, width)
            starts[side] += view.numel()
            views.append(view)
        found.append((*views, out.narrow(0, starts[2], i * o).view(i, o)))
        starts[2] += i * o
    return {"layers": found, "inner_lr": 0.05}


def _reptile_work(z: Sizes) -> Work:
    rows = z.inner * z.tasks
    layers = layer_rows(z).values()
    return Work(
        4 * sum(rows * r * (i + o) + i * o for r, i, o in layers), 2 * rows * sum(r * i * o for r, i, o in layers)
    )


def _sgd_step(z: Sizes, make: Maker) -> dict[str, Any]:
    r, h = _of_task(z), z.hidden
    return {
        "weights": make.normal(z.tasks, h, h), "inputs": make.rows(z.tasks, r, h), "gradients": make.rows(z.tasks, r, h), "inner_lr": 0.05
    }  # fmt: skip


def _adam_step(z: Sizes, make: Maker) -> dict[str, Any]:
    shape = (z.heads, z.ways, z.features + 1)
    names = ("theta", "gradient", "exp_avg", "exp_avg_sq")
    return {name: make.normal(*shape).abs() for name in names} | {"rate": 0.05, "root": 0.5}


def _outer_update(z: Sizes, make: Maker) -> dict[str, Any]:
    count = sum(i * o for _, i, o in layer_rows(z).values())
    return {
        "state": OuterState(*(make.normal(count).abs() for _ in range(4))), "delta": make.normal(count),
        "scalars": torch.tensor(OuterScalars(0.01, 0.5, -3.0, 0.1), dtype=torch.float64, device=make.device),
        "good": torch.ones(1, dtype=torch.int32, device=make.device), "outer": "adam",
    }  # fmt: skip


def _head_trajectory(z: Sizes, make: Maker) -> dict[str, Any]:
    return {
        "start": make.normal(z.heads, z.ways, z.features + 1) * 0.01, "features": make.normal(2, z.heads, z.rows, z.features),
        "labels": make.integers(z.ways, z.heads, z.rows), "config": PrepareConfig(steps=z.adam_steps, rho=0.05), "segments": 3,
        "pick": make.integers(2, z.adam_steps, z.heads, z.rows, dtype=torch.int32),
        "sample_weight": make.normal(z.rows).abs() / z.rows,
    }  # fmt: skip


def _head_work(z: Sizes) -> Work:
    products = 2 * 2 * z.rows * z.ways * z.features  # logits and gradient
    return Work(
        4 * z.heads * (2 * z.rows * z.features + 4 * z.ways * (z.features + 1)), 2 * z.heads * z.adam_steps * products
    )


def _tiled_heads(name: str, of: Callable[[Sizes], Sizes]) -> Operation:
    """Heads that go in tiles whatever their size."""
    return Operation(
        f"head_trajectory {name}", partial(heads.head_trajectory, tiled=True), heads.head_trajectory_ref,
        lambda z, make: _head_trajectory(of(z), make), lambda z: _head_work(of(z)), PRECISIONS, depth=lambda z: 4 * z.adam_steps,
    )  # fmt: skip


def inner_batch(z: Sizes, make: Maker, masked: bool = False) -> InnerBatch:
    """What B base learners see, at random."""
    shape = (z.tasks, z.inner, z.samples, z.tokens, z.width)
    return InnerBatch(
        make.normal(*shape), make.integers(z.steps, *shape[:3]), make.normal(z.tasks, z.tokens, z.condition),
        make.normal(*shape[:3]).abs() + 0.5, make.normal(*shape), make.mask(z.tokens, z.width) if masked else None,
    )  # fmt: skip


def _inner_loop(z: Sizes, make: Maker) -> dict[str, Any]:
    return {"phi": make.phi(z), "batch": inner_batch(z, make, masked=True), "inner_lr": 0.05}


def _inner_work(z: Sizes) -> Work:
    """Forward and weight gradient of every matrix, input gradient of those that have an input to learn."""
    rows, parts = z.inner * z.tasks, layer_rows(z)
    moved = sum(
        2 * i * o + 2 * rows * r * (i + o) for r, i, o in parts.values()
    )  # phi, delta; rows in and gradients, twice
    products = sum(r * i * o * (2 if name.startswith("in.") else 3) for name, (r, i, o) in parts.items())
    return Work(4 * (moved + 2 * rows * _of_task(z) * z.width + z.tasks * z.tokens * z.condition), 2 * rows * products)


def chain_inputs(z: Sizes, make: Maker, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """A whole chain of `z.chains` tasks."""
    schedule, objective = diffusion_tables(DiffusionConfig(steps=z.steps))
    now, coefficients = chain_table(schedule, objective)
    phi = {name: 0.5 * value for name, value in make.phi(z).items()}
    return {
        "weights": pack_weights(FoldedDenoiser(phi), dtype), "x": make.normal(z.chains, z.tokens, z.width),
        "condition": make.normal(z.chains, z.tokens, z.condition), "steps": now.to(make.device),
        "coefficients": coefficients.float().to(make.device),
    }  # fmt: skip


def _long(z: Sizes) -> Sizes:
    return replace(z, tokens=25 * z.tokens)


def chain_work(z: Sizes) -> Work:
    """Of the folded matrices, read once; the condition's products are done once and not counted."""
    hidden = (z.depth * z.width + z.depth * (z.depth - 1) // 2 * z.hidden) * z.hidden
    last = (z.width + z.depth * z.hidden) * z.width
    return Work(4 * (2 * hidden + last), 2 * z.chains * z.steps * (z.tokens * (hidden + last) + hidden))


OPERATIONS = [
    Operation(
        "sam_ascent", steps.sam_ascent, steps.sam_ascent_ref,
        lambda z, make: {name: make.normal(z.heads, z.ways, z.features + 1) for name in ("theta", "gradient")} | {"rho": 0.05},
        lambda z: Work(4 * 3 * z.heads * z.ways * (z.features + 1)),
    ),
    Operation(
        "adam_step_", steps.adam_step_, steps.adam_step_ref, _adam_step, lambda z: Work(4 * 7 * z.heads * z.ways * (z.features + 1)),
        changes=("theta", "exp_avg", "exp_avg_sq"),
    ),
    Operation(
        "normal_noise", normals.normal_noise, normals.normal_noise_ref,
        lambda z, make: {"seeds": torch.arange(z.chains, device=make.device), "shape": (z.tokens, z.width)},
        lambda z: Work(4 * z.chains * z.tokens * z.width),
    ),
    Operation(
        "load_batch_", load.load_batch_, load.load_batch_ref, _load_batch,
        lambda z: Work(4 * z.tasks * z.tokens * (2 * z.width + z.condition + z.inner * z.samples * (z.condition + 2 * z.steps))),
        changes=("target", "enter", "blocks"),
    ),
    Operation(
        "noise_batch", noise.noise_batch, noise.noise_batch_ref, _noise_batch,
        lambda z: Work(4 * z.tasks * z.tokens * z.width * (2 * z.inner * z.samples + 1)),
    ),
    *_LINEAR,
    Operation(
        "reptile_delta_", update.reptile_delta_, update.reptile_delta_ref, _reptile_delta, _reptile_work, PRECISIONS, ("layers",)
    ),
    Operation(
        "sgd_step_", update.sgd_step_, update.sgd_step_ref, _sgd_step,
        lambda z: Work(4 * z.tasks * (2 * z.hidden**2 + 2 * _of_task(z) * z.hidden), 2 * z.tasks * _of_task(z) * z.hidden**2),
        PRECISIONS, ("weights",),
    ),
    Operation(
        "inner_loop", inner.inner_loop_triton, inner.inner_loop_ref, _inner_loop, _inner_work, PRECISIONS,
        depth=lambda z: 2 * (2 + 3 * z.depth) * z.inner,
    ),
    Operation("judge_", outer.judge_, outer.judge_ref, _judge, lambda z: Work(4 * z.inner * z.tasks), changes=("verdict",)),
    Operation(
        "outer_update_", outer.outer_update_, outer.outer_update_ref, _outer_update,
        lambda z: Work(4 * 9 * sum(i * o for _, i, o in layer_rows(z).values())), changes=("state",),
    ),
    Operation(
        "head_trajectory", heads.head_trajectory, heads.head_trajectory_ref, _head_trajectory, _head_work, PRECISIONS,
        depth=lambda z: 4 * z.adam_steps,
    ),
    _tiled_heads("wide", lambda z: replace(z, features=20 * z.features)),  # 5 x 1281 at default sizes
    _tiled_heads("of many", lambda z: replace(z, ways=min(heads.MAX_WAYS, 20 * z.ways), features=8 * z.features)),  # 100 x 513
    Operation(
        "resident_chain", resident.resident_chain, run_chain_ref, lambda z, make: chain_inputs(replace(z, chains=1), make),
        lambda z: chain_work(replace(z, chains=1)), depth=lambda z: 6 * z.steps,
    ),
    Operation(
        "layered_chain", layered.layered_chain, run_chain_ref, lambda z, make: chain_inputs(_long(z), make),
        lambda z: chain_work(_long(z)), PRECISIONS, depth=lambda z: 6 * z.steps,
    ),
    Operation("run_chain", chain.run_chain, run_chain_ref, chain_inputs, chain_work, PRECISIONS, depth=lambda z: 6 * z.steps),
    Operation(
        "run_chain from bf16", chain.run_chain, run_chain_ref, lambda z, make: chain_inputs(z, make, torch.bfloat16), chain_work,
        ("bf16",), depth=lambda z: 6 * z.steps,
    ),
]  # fmt: skip


def each(sizes: Sizes, chains: tuple[int, ...] = ()) -> Iterator[tuple[str, Operation, Sizes, str | None]]:
    """(name, operation, sizes, precision) of every configuration to compile, check and time at these sizes.

    chains: further numbers of tasks of `run_chain`, which takes another kernel or other blocks for them.
    """
    for operation in OPERATIONS:
        for count in (sizes.chains, *(chains if operation.run is chain.run_chain else ())):
            for precision in operation.precisions or (None,):
                tasks = f"{count} tasks" if operation.run is chain.run_chain else None
                name = " ".join(filter(None, (operation.name, precision, tasks)))
                yield name, operation, replace(sizes, chains=count), precision
