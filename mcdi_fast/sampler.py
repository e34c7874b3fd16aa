"""Stage 3, sampling: weights of new tasks from noise, without a gradient. This is what other trainers embed."""

from __future__ import annotations

import functools
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor

from mcdi_fast.backend import DEFAULT_PRECISION, check_device, check_precision, requested, resolve
from mcdi_fast.diffusion import chain_table, sample_chain
from mcdi_fast.errors import McdiError
from mcdi_fast.generator import WeightGenerator
from mcdi_fast.noise import philox_normal, seed_bits
from mcdi_fast.weights import GeneratedWeights

if TYPE_CHECKING:
    from mcdi_fast.cpu_chain import PackedChain

_Method = TypeVar("_Method", bound=Callable[..., Any])
CHUNK = 512  # tasks of a chain on a CPU: their rows stay in its caches (4096 tasks: 1.7 s in chunks of 512, 2.3 at once, 1.9 of 256)
FEW_ROWS = 20
"""Tokens of all tasks up to which a CPU's chain is one compiled call (cpu_chain.py), where numba is installed: 4 heads of 5 ways. Measured: one
head 1.2 ms against 2.8, four 5.5 against 5.7, six alike, more slower (one thread, docs/performance.md)."""


@functools.cache
def _packed_chain() -> type[PackedChain] | None:
    if importlib.util.find_spec("numba") is None:
        return None
    try:
        from mcdi_fast.cpu_chain import PackedChain
    except ImportError as error:
        warnings.warn(f"numba is installed but cannot be used, few tasks are sampled by torch: {error}", stacklevel=2)
        return None
    return PackedChain


def _outside_compiled_code(method: _Method) -> _Method:
    """`torch.compiler.disable`, whose import takes a second, for those alone who compile: `torch.compile` goes around the call."""
    disabled: list[Callable] = []

    @functools.wraps(method)
    def call(*args: Any, **options: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return method(*args, **options)
        if not disabled:
            disabled.append(torch.compiler.disable(method))
        return disabled[0](*args, **options)

    return cast(_Method, call)


class Sampler:
    """Draws weights from a generator.

    >>> generator = WeightGenerator.from_pretrained("runs/omniglot/generator")  # doctest: +SKIP
    >>> weights = Sampler(generator).sample(condition, seeds=range(len(condition)))  # doctest: +SKIP
    >>> weights.load_into(head, 0)  # doctest: +SKIP

    On a GPU, `Sampler(generator, "cuda")`, a chain is one launch of a kernel (backend.py); with `seeds` as a tensor there, nothing in `sample` waits
    for the host, and a CUDA graph can hold the call.
    """

    def __init__(
        self,
        generator: WeightGenerator,
        device: torch.device | str = "cpu",
        *,
        impl: str = "auto",
        precision: str = DEFAULT_PRECISION,
    ):
        """Take the generator to `device`.

        Args:
            impl: "auto", "triton" or "torch" (backend.py). precision: of the kernels' products: "ieee", "tf32" or "bf16".

        Raises:
            McdiError: an unknown or absent device; an implementation that cannot run there.
        """
        self.device = check_device(device)
        check_precision(precision)
        self.generator = generator.to(self.device)
        self.impl, self.precision = impl, precision
        mask = generator.layout.mask
        # padding is no weight: its noise would only pollute the token's other columns
        self._mask = None if mask.all() else mask.float().to(self.device)
        self._tables: dict[int | None, tuple[Tensor, Tensor]] = {}
        self._weights = None
        self._packed: PackedChain | None = None
        if resolve(impl, self.device, self._missing()) == "triton":
            from mcdi_fast.kernels.sample_chain import pack_weights

            self._weights = pack_weights(
                self.generator.phi, torch.bfloat16 if precision == "bf16" else torch.float32
            )  # fmt: skip

    def _missing(self, eta_noise: float = 0.0, callback: Callable | None = None) -> str | None:
        """Why the kernel cannot run such a chain; None where it can."""
        tokens = self.generator.layout.num_tokens
        if tokens > 64:
            return f"its chain holds at most 64 tokens, this generator has {tokens}"
        if eta_noise != 0:
            return f"its chain is noise-free, eta_noise = {eta_noise}"
        return "its chain is one launch, without a callback" if callback is not None else None

    @_outside_compiled_code
    @torch.no_grad()
    def sample(
        self,
        condition: Tensor,
        seeds: Sequence[int] | Tensor,
        *,
        num_steps: int | None = None,
        eta_noise: float = 0.0,
        callback: Callable[[int, Tensor], None] | None = None,
    ) -> GeneratedWeights:
        """Draw the weights of B tasks.

        Args:
            condition: float32 [B, N, C], a vector a token, or [B, C], the same vector for every token, on the sampler's device.
            seeds: B integers in [0, 2^64), or an int64 tensor of their bits. A sample depends on its own seed and condition, not on the
                batch around it (its noise to the bit; the result to rounding, because matrix products of other sizes round differently).
            num_steps: a shorter chain, at least one step a segment; T by default.
            eta_noise: 0 noise-free (default: the chain Theorem 1 is about, and the more accurate one), 1 full noise.
            callback: callback(t, x_t), normalised x_t [B, N, D], before each step, and (T, x_T).

        Returns:
            GeneratedWeights with tokens float32 [B, N, D], on the sampler's device. On a GPU a condition with NaN gives that task NaN, and a
            chain that diverged gives what it has come to: looking would wait for the GPU.

        Raises:
            McdiError: a condition of another shape, dtype or device, or (on a CPU) with NaN; another number of seeds; num_steps or eta_noise
                out of range; weights that are not finite (on a CPU); impl="triton" with noise or a callback, which the kernel does not have.
        """
        condition = self._checked(condition, seeds)
        missing = self._missing(eta_noise, callback)
        if resolve(self.impl, self.device, missing) == "triton":
            x = self._sample_in_one_launch(condition, seeds, num_steps)
        elif self._few_tasks(len(seeds)) and eta_noise == 0 and callback is None:
            x = self._sample_few_tasks(condition, seeds, num_steps)
        elif self.device.type == "cpu" and len(seeds) > CHUNK and callback is None:
            parts = zip(
                condition.split(CHUNK), (seeds[i : i + CHUNK] for i in range(0, len(seeds), CHUNK)), strict=True
            )
            x = torch.cat([self._sample_by_steps(*part, num_steps, eta_noise, None) for part in parts])
        else:
            x = self._sample_by_steps(condition, seeds, num_steps, eta_noise, callback)
        tokens = self.generator.normalizer.denormalize(x)
        if self.device.type == "cpu" and not tokens.isfinite().all():
            task = int((~tokens.isfinite()).flatten(1).any(1).nonzero()[0])
            raise McdiError(
                f"weights of task {task} are not finite: its condition is far from those of training, or the training diverged"
            )
        return GeneratedWeights(self.generator.layout, tokens)

    def _checked(self, condition: Tensor, seeds: Sequence[int] | Tensor) -> Tensor:
        """condition as [B, N, C]."""
        shape = (self.generator.layout.num_tokens, self.generator.condition_width)
        if condition.ndim == 2 and condition.shape[1] == shape[1]:
            condition = condition.unsqueeze(1).expand(-1, *shape)
        if condition.ndim != 3 or tuple(condition.shape[1:]) != shape or len(condition) == 0:
            raise McdiError(
                f"condition: shape {list(condition.shape)}, expected [B, {shape[0]}, {shape[1]}] or [B, {shape[1]}] with B >= 1"
            )
        if condition.dtype != torch.float32:
            raise McdiError(f"condition: {condition.dtype}, expected torch.float32; convert it by .float()")
        if condition.device != self.generator.normalizer.mean.device:
            raise McdiError(
                f"condition: on {condition.device}, expected {self.generator.normalizer.mean.device}, where the sampler is"
            )
        if condition.device.type == "cpu" and not condition.isfinite().all():
            task = int((~condition.isfinite()).flatten(1).any(1).nonzero()[0])
            raise McdiError(f"condition: task {task} has NaN or infinity, expected finite numbers")
        if len(seeds) != len(condition):
            raise McdiError(f"seeds: {len(seeds)}, expected {len(condition)}, one a task")
        return condition

    def _table(self, num_steps: int | None) -> tuple[Tensor, Tensor]:
        """Steps and coefficients of a chain, on the device."""
        if num_steps not in self._tables:
            steps, coefficients = chain_table(self.generator.schedule, self.generator.objective, num_steps)
            self._tables[num_steps] = steps.to(self.device), coefficients.float().to(self.device)
        return self._tables[num_steps]

    def _few_tasks(self, tasks: int) -> bool:
        """Whether the compiled chain for a handful of rows is there and is the faster way."""
        rows = tasks * self.generator.layout.num_tokens
        asked = self.device.type == "cpu" and requested(self.impl) == "auto"
        return asked and rows <= FEW_ROWS and _packed_chain() is not None

    def _sample_few_tasks(self, condition: Tensor, seeds: Sequence[int] | Tensor, num_steps: int | None) -> Tensor:
        generator, folded, packed = self.generator, self.generator.folded(), self._packed
        if packed is None or packed.folded is not folded:
            make = _packed_chain()
            assert make is not None
            packed = self._packed = make(folded)
        normalized = generator.condition_normalizer.normalize(condition)
        return packed.run(self._noise(seeds, 0), normalized, *self._table(num_steps), self._mask)

    def _noise(self, seeds: Sequence[int] | Tensor, stream: int) -> Tensor:
        layout = self.generator.layout
        z = philox_normal(seeds, layout.num_tokens * layout.width, stream)
        z = z.view(len(seeds), layout.num_tokens, layout.width).to(self.device)
        return z if self._mask is None else z * self._mask

    def _sample_in_one_launch(self, condition: Tensor, seeds: Sequence[int] | Tensor, num_steps: int | None) -> Tensor:
        from mcdi_fast.kernels.normal_noise import normal_noise
        from mcdi_fast.kernels.sample_chain import sample_chain

        generator = self.generator
        bits = seeds if isinstance(seeds, Tensor) and seeds.dtype == torch.int64 else seed_bits(seeds)
        x = normal_noise(
            bits.to(self.device, non_blocking=True), (generator.layout.num_tokens, generator.layout.width), 0, self._mask
        )  # fmt: skip
        normalized = generator.condition_normalizer.normalize(condition)
        assert self._weights is not None
        return sample_chain(
            self._weights, x, normalized, *self._table(num_steps), self._mask, out=x, precision=self.precision
        )  # fmt: skip

    def _sample_by_steps(
        self,
        condition: Tensor,
        seeds: Sequence[int] | Tensor,
        num_steps: int | None,
        eta_noise: float,
        callback: Callable[[int, Tensor], None] | None,
    ) -> Tensor:
        mask, f_full = self._mask, self.generator.f(condition)
        f: Callable[[Tensor, int], Tensor] = f_full
        if mask is not None:

            def f(x: Tensor, t: int) -> Tensor:  # the network's output for padding is near 0, not 0 as in training
                return f_full(x, t) * mask

        return sample_chain(
            f,
            self._noise(seeds, 0),
            self.generator.schedule,
            ends=self.generator.objective.ends,
            num_steps=num_steps,
            eta_noise=eta_noise,
            noise=lambda t: self._noise(seeds, t + 1),
            callback=callback,
        )


class StaticSampler:
    """Sampling of fixed shapes into fixed memory: what a CUDA graph or compiled code around it can hold on to.

    >>> static = StaticSampler(Sampler(generator, "cuda"), tasks=8)  # doctest: +SKIP
    >>> static.condition.copy_(condition); static.seeds.copy_(seeds)  # doctest: +SKIP
    >>> static()  # doctest: +SKIP
    >>> static.weights.functional_call(head, x)  # the same tensors after every call  # doctest: +SKIP

    Through the kernels (backend.py) a call launches work and waits for nothing, so it may be captured in a larger CUDA graph. `torch.compile`
    goes around the call, and as no shape or address changes, what is around it is compiled once.

    Attributes:
        condition: float32 [B, N, C]. seeds: int64 [B], the seeds' bits. Both on the sampler's device, to be filled before each call.
        weights: GeneratedWeights of B tasks, overwritten by each call.
    """

    def __init__(self, sampler: Sampler, tasks: int, num_steps: int | None = None):
        """Make the buffers and sample once, which compiles the kernels.

        Args:
            tasks: B. num_steps: as of `Sampler.sample`.

        Raises:
            McdiError: B < 1; num_steps out of range.
        """
        if tasks < 1:
            raise McdiError(f"tasks = {tasks}: expected at least 1")
        layout, device = sampler.generator.layout, sampler.device
        self._sampler, self._num_steps = sampler, num_steps
        self.condition = torch.zeros(tasks, layout.num_tokens, sampler.generator.condition_width, device=device)
        self.seeds = torch.zeros(tasks, dtype=torch.int64, device=device)
        self.weights = GeneratedWeights(layout, torch.empty(tasks, layout.num_tokens, layout.width, device=device))
        self()

    @_outside_compiled_code
    @torch.no_grad()
    def __call__(self) -> GeneratedWeights:
        """Fill `weights` from `condition` and `seeds`. Raises as `Sampler.sample`."""
        found = self._sampler.sample(self.condition, self.seeds, num_steps=self._num_steps)
        self.weights.tokens.copy_(found.tokens)
        return self.weights
