"""Stage 3, sampling: weights of new tasks from noise, without a gradient. This is what other trainers embed."""

from __future__ import annotations

import functools
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from mcdi_fast.backend import DEFAULT_PRECISION, Backend, numba_module, one_thread, resolve
from mcdi_fast.denoiser import FoldedDenoiser
from mcdi_fast.diffusion import chain_table, check_num_steps, sample_chain
from mcdi_fast.errors import McdiError, reason_of
from mcdi_fast.generated import GeneratedWeights
from mcdi_fast.generator import WeightGenerator
from mcdi_fast.noise import Seeds, philox_normal, seed_bits, seed_numbers

if TYPE_CHECKING:
    from mcdi_fast.kernels.chain_weights import ChainWeights

_Method = TypeVar("_Method", bound=Callable[..., Any])
MAX_WIDTH = 4096  # of a token in the kernels' chain, which multiplies a matrix [D, D]
CHUNK = 512  # tasks of a chain by torch on a CPU: their rows stay in its caches (4096 tasks: 1.7 s in chunks of 512, 2.3 at once, 1.9 of 256)
ONE_THREAD_ROWS = 64
"""Tokens of all tasks up to which a chain by torch runs on one thread of a CPU, whatever torch is set to. Beside busy processes a second thread is
waited for in each of its hundred small products: on two cores one head took 12 ms on one thread and more than a second on two."""


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

    >>> sampler = Sampler("runs/omniglot/generator")  # doctest: +SKIP
    >>> weights = sampler.sample(condition, seeds=range(len(condition)))  # doctest: +SKIP
    >>> weights.load_into(head, 0)  # doctest: +SKIP

    On a GPU, `Sampler(generator, "cuda")`, a chain is one launch of a kernel (backend.py); with `seeds` as a tensor there, nothing in `sample` waits
    for the host, and a CUDA graph can hold the call. It may be sent to other processes: each makes its own caches.

    Attributes:
        generator: on the sampler's device. device, impl, precision: as given.
    """

    def __init__(
        self,
        generator: WeightGenerator | str | os.PathLike[str],
        device: torch.device | str = "cpu",
        *,
        impl: str = "auto",
        precision: str = DEFAULT_PRECISION,
    ):
        """Take the generator to `device`.

        Args:
            generator: or what `WeightGenerator.from_pretrained` takes, a folder or a hub id.
            impl: "auto", "triton" or "torch" (backend.py). precision: of products, "ieee", "tf32" or "bf16" (backend.py).

        Raises:
            McdiError: an unknown or absent device; an implementation that cannot run there; as `from_pretrained`.
        """
        backend = Backend.at_door(device, impl, precision)
        self.device, self.impl, self.precision = backend.device, impl, precision
        if not isinstance(generator, WeightGenerator):
            generator = WeightGenerator.from_pretrained(generator)
        self.generator = generator.to(self.device)
        mask = generator.layout.mask
        # padding is no weight: its noise would only pollute the token's other columns
        self._mask = None if mask.all() else mask.to(self.device, torch.float32)
        self._tables: dict[int | None, tuple[Tensor, Tensor]] = {}
        self._packed: tuple[FoldedDenoiser, Any] | None = None
        layout = self.generator.layout
        self._expected = (
            self.generator.normalizer.mean.device,
            layout.num_tokens,
            self.generator.condition_width,
            self.generator.any_number_of_tokens,
        )
        wide = f"its chain holds tokens of width {MAX_WIDTH} at most, here {layout.width}"
        self._kernels = resolve(impl, self.device, wide if layout.width > MAX_WIDTH else None) == "triton"
        self._compiled = self.device.type == "cpu" and backend.compiled
        if self._kernels:
            self._kernel_weights()

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs; its caches it makes itself."""
        return {name: vars(self)[name] for name in ("generator", "device", "impl", "precision")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As made there."""
        self.__init__(**state)  # type: ignore[misc]

    @_outside_compiled_code
    @torch.no_grad()
    def sample(
        self,
        condition: Tensor | np.ndarray | Sequence,
        seeds: Seeds,
        *,
        num_steps: int | None = None,
        eta_noise: float = 0.0,
        callback: Callable[[int, Tensor], None] | None = None,
    ) -> GeneratedWeights:
        """Draw the weights of B tasks.

        Args:
            condition: [B, N, C], a vector a token; [B, 1, C] or [B, C], the same vector for every token; [C], one task. A floating-point
                tensor on the sampler's device, a NumPy array or lists; it is taken to float32. Where tokens are exchangeable
                (`layout.exchangeable`) N is free: a generator of five classes writes heads of ten for a condition [B, 10, C].
            seeds: B integers in [0, 2^64), or an int64 tensor of their bits; one integer for one task. A sample depends on its own seed and
                condition, not on the batch around it: to the bit in compiled code on a CPU (the extra `cpu`), elsewhere its noise to the bit and
                the result to rounding, because matrix products of other sizes round differently.
            num_steps: of the chain, from one a segment to T; `generator.num_steps` by default.
            eta_noise: 0 noise-free (default: the chain Theorem 1 is about, and the more accurate one), 1 full noise.
            callback: callback(t, x_t), normalised x_t [B, N, D], before each step, and (T, x_T).

        Returns:
            GeneratedWeights with tokens float32 [B, N, D], on the sampler's device. All is computed in float32, inside `torch.autocast` too. On
            a GPU a condition with NaN gives that task NaN, and a chain that diverged gives what it has come to: looking would wait for the GPU.

        Raises:
            McdiError: a condition of another shape, kind or device, or (on a CPU) with NaN; another number of seeds; num_steps or eta_noise
                out of range; weights that are not finite (on a CPU); impl="triton" with noise or a callback, which the kernel does not have.
        """
        condition = self._condition(condition)
        if not isinstance(seeds, Tensor) or seeds.dtype != torch.int64 or seeds.ndim != 1:
            seeds = seed_numbers(seeds)
        num_steps = self.generator.num_steps if num_steps is None else num_steps
        tasks, num_tokens, _ = condition.shape
        if len(seeds) != tasks:
            raise McdiError(f"seeds: {len(seeds)}, expected {tasks}, one a task")
        compiled = numba_module("cpu_chain") if self._compiled and eta_noise == 0 and callback is None else None
        if compiled:
            packed = self._packed_as(lambda: compiled.PackedChain(self.generator, self._mask, self.precision))
            tokens = packed.sample(seeds, condition, *self._table(num_steps))
        else:
            normal = self._chain(condition, seeds, num_steps, eta_noise, callback)
            tokens = self.generator.normalizer.denormalize(normal)
        if self.device.type == "cpu":
            _check_finite(
                tokens,
                "weights of task {} are not finite: its condition is far from those of training, or the training diverged",
            )
        layout = self.generator.layout
        return GeneratedWeights(layout if num_tokens == layout.num_tokens else layout.resized(num_tokens), tokens)

    def _chain(
        self,
        condition: Tensor,
        seeds: list[int] | Tensor,
        num_steps: int | None,
        eta_noise: float,
        callback: Callable[[int, Tensor], None] | None,
    ) -> Tensor:
        """Normalised weights by the kernel or by torch."""
        tasks, num_tokens, _ = condition.shape
        if self._kernels:
            from mcdi_fast.kernels.layered_chain import MAX_TOKENS

            missing = None
            if num_tokens > MAX_TOKENS:
                missing = f"its chain holds at most {MAX_TOKENS} tokens, here are {num_tokens}"
            elif eta_noise != 0:
                missing = f"its chain is noise-free, eta_noise = {eta_noise}"
            elif callback is not None:
                missing = "its chain has no callback"
            if resolve(self.impl, self.device, missing) == "triton":
                return self._chain_by_kernels(condition, seeds, num_steps)
        on_cpu = self.device.type == "cpu"
        if on_cpu and tasks > CHUNK and callback is None:
            parts = zip(condition.split(CHUNK), (seeds[i : i + CHUNK] for i in range(0, tasks, CHUNK)), strict=True)
            return torch.cat([self._chain_by_steps(*part, num_steps, eta_noise, None) for part in parts])
        with one_thread(on_cpu and tasks * num_tokens <= ONE_THREAD_ROWS):
            return self._chain_by_steps(condition, seeds, num_steps, eta_noise, callback)

    def _condition(self, given: Any) -> Tensor:
        """float32 [B, N, C] on the device, checked."""
        device, tokens, width, free = self._expected
        condition = given if isinstance(given, Tensor) else _tensor(given, device)
        if not condition.is_floating_point():
            raise McdiError(f"condition: {condition.dtype}, expected floating point; convert it by .float()")
        if condition.device != device:
            raise McdiError(f"condition: on {condition.device}, expected {device}, where the sampler is")
        shape, condition = condition.shape, condition.float()
        if condition.ndim in (1, 2):
            condition = condition[None, None] if condition.ndim == 1 else condition.unsqueeze(1)
        fits = condition.ndim == 3 and condition.shape[2] == width and condition.numel()
        if not fits or not (free or condition.shape[1] in (1, tokens)):
            many = f"any N, such as {tokens}" if free else tokens
            raise McdiError(
                f"condition: shape {list(shape)}, expected [B, {many}, {width}], [B, {width}] or, for one task, [{width}], with B >= 1"
            )
        if device.type == "cpu":
            _check_finite(condition, "condition: task {} has NaN or infinity, expected finite numbers")
        return condition.expand(-1, tokens, -1) if condition.shape[1] == 1 else condition

    def _table(self, num_steps: int | None) -> tuple[Tensor, Tensor]:
        """Steps and coefficients of a chain, on the device."""
        num_steps = check_num_steps(num_steps)
        if num_steps not in self._tables:
            steps, coefficients = chain_table(self.generator.schedule, self.generator.objective, num_steps)
            self._tables[num_steps] = steps.to(self.device), coefficients.to(self.device, torch.float32)
        return self._tables[num_steps]

    def _packed_as(self, make: Callable[[], Any]) -> Any:
        """What `make` makes of the folded phi, made again when phi has changed."""
        folded, packed = self.generator.folded(), self._packed
        if packed is None or packed[0] is not folded:
            packed = self._packed = folded, make()
        return packed[1]

    def _kernel_weights(self) -> ChainWeights:
        from mcdi_fast.kernels.chain_weights import pack_weights

        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        return self._packed_as(lambda: pack_weights(self.generator.folded(), dtype))

    def _noise(self, seeds: list[int] | Tensor, stream: int, tokens: int) -> Tensor:
        width = self.generator.layout.width
        z = philox_normal(seeds, tokens * width, stream).view(len(seeds), tokens, width).to(self.device)
        return z if self._mask is None else z * self._mask

    def _chain_by_kernels(self, condition: Tensor, seeds: list[int] | Tensor, num_steps: int | None) -> Tensor:
        from mcdi_fast.kernels.normal_noise import normal_noise
        from mcdi_fast.kernels.run_chain import run_chain

        bits = seeds if isinstance(seeds, Tensor) else seed_bits(seeds)
        shape = condition.shape[1], self.generator.layout.width
        x = normal_noise(bits.to(self.device, non_blocking=True), shape, 0, self._mask)
        told = self.generator.network_condition(condition)
        weights, table = self._kernel_weights(), self._table(num_steps)
        return run_chain(weights, x, told, *table, self._mask, out=x, precision=self.precision)

    def _chain_by_steps(
        self,
        condition: Tensor,
        seeds: list[int] | Tensor,
        num_steps: int | None,
        eta_noise: float,
        callback: Callable[[int, Tensor], None] | None,
    ) -> Tensor:
        mask, f_full, tokens = self._mask, self.generator.f(condition), condition.shape[1]
        f: Callable[[Tensor, int], Tensor] = f_full
        if mask is not None:

            def f(x: Tensor, t: int) -> Tensor:  # the network's output for padding is near 0, not 0 as in training
                return f_full(x, t) * mask

        return sample_chain(
            f,
            self._noise(seeds, 0, tokens),
            self.generator.schedule,
            ends=self.generator.objective.ends,
            num_steps=num_steps,
            eta_noise=eta_noise,
            noise=lambda t: self._noise(seeds, t + 1, tokens),
            callback=callback,
        )


def _tensor(condition: Any, device: torch.device) -> Tensor:
    """A NumPy array or (lists of) numbers, arrays or tensors, as float32 on `device`."""
    try:
        if isinstance(condition, (list, tuple)) and condition and isinstance(condition[0], Tensor):
            return torch.stack(list(condition))
        array = np.asarray(condition)
        if isinstance(condition, np.ndarray) and array.dtype.kind != "f":
            raise McdiError(f"condition: {array.dtype}, expected floating point; convert it by .astype(np.float32)")
        return torch.from_numpy(np.array(array, np.float32, order="C")).to(device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise McdiError(
            f"condition: {type(condition).__name__} that makes no array of numbers ({reason_of(error)}); "
            "give a tensor, an array or lists of numbers of one length"
        ) from error


def _check_finite(x: Tensor, message: str) -> None:
    """x [B, ...]. Raise McdiError with the first task that is not finite in place of {}. The sum alone is quick, and may overflow."""
    if not math.isfinite(x.sum()) and not (finite := x.isfinite().flatten(1).all(1)).all():
        raise McdiError(message.format(int((~finite).nonzero()[0])))


class StaticSampler:
    """Sampling of fixed shapes into fixed memory: what a CUDA graph or compiled code around it can hold on to.

    >>> static = StaticSampler(Sampler(generator, "cuda"), tasks=8)  # doctest: +SKIP
    >>> static.condition.copy_(condition); static.seeds.copy_(seeds)  # doctest: +SKIP
    >>> static()  # doctest: +SKIP
    >>> static.weights.functional_call(head, x)  # the same tensors after every call  # doctest: +SKIP

    Through the kernels (backend.py) a call is one CUDA graph, made at the first. It waits for nothing, so it may be captured in a larger one.
    `torch.compile` goes around the call, and as no shape or address changes, what is around it is compiled once.

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
        if not isinstance(tasks, int) or tasks < 1:
            raise McdiError(f"tasks = {tasks!r:.40}: expected an integer, at least 1")
        layout, device = sampler.generator.layout, sampler.device
        self._sampler, self._num_steps = sampler, num_steps
        with torch.inference_mode(False):  # memory made there could not be written to outside
            shape = tasks, layout.num_tokens, sampler.generator.condition_width
            self.condition = torch.zeros(shape, dtype=torch.float32, device=device)
            self.seeds = torch.zeros(tasks, dtype=torch.int64, device=device)
            tokens = torch.zeros(tasks, layout.num_tokens, layout.width, dtype=torch.float32, device=device)
            self.weights = GeneratedWeights(layout, tokens)
        self._graph: tuple[FoldedDenoiser, Callable[[], None]] | None = None
        self()

    def __getstate__(self) -> dict[str, Any]:
        """Copies: sent to another process, this one's memory would move, and both would write to it."""
        weights = GeneratedWeights(self.weights.layout, self.weights.tokens.clone())
        inputs = {"condition": self.condition.clone(), "seeds": self.seeds.clone()}
        return vars(self) | inputs | {"weights": weights, "_graph": None}

    @_outside_compiled_code
    @torch.no_grad()
    def __call__(self) -> GeneratedWeights:
        """Fill `weights` from `condition` and `seeds`. Raises as `Sampler.sample`."""
        sampler, device = self._sampler, self._sampler.device
        kernels = device.type == "cuda" and len(self.condition[0]) <= 64 and resolve(sampler.impl, device) == "triton"
        # a graph of the caller's holds the launches themselves
        if not kernels or torch.cuda.is_current_stream_capturing():
            self._fill()
        elif self._graph is not None and self._graph[0] is sampler.generator.folded():
            self._graph[1]()
        else:
            from mcdi_fast.kernels.launch import capture

            self._fill()
            self._graph = sampler.generator.folded(), capture(self._fill, device)
        return self.weights

    def _fill(self) -> None:
        found = self._sampler.sample(self.condition, self.seeds, num_steps=self._num_steps)
        self.weights.tokens.copy_(found.tokens)
