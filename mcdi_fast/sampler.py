"""Stage 3, sampling: weights of new tasks from noise, without a gradient. This is what other trainers embed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mcdi_fast.diffusion import sample_chain
from mcdi_fast.errors import McdiError
from mcdi_fast.generator import WeightGenerator
from mcdi_fast.noise import philox_normal
from mcdi_fast.weights import GeneratedWeights


class Sampler:
    """Draws weights from a generator.

    >>> generator = WeightGenerator.from_pretrained("runs/omniglot/generator")  # doctest: +SKIP
    >>> weights = Sampler(generator).sample(condition, seeds=range(len(condition)))  # doctest: +SKIP
    >>> weights.load_into(head, 0)  # doctest: +SKIP
    """

    def __init__(self, generator: WeightGenerator):
        """Keep the generator; nothing is copied."""
        self.generator = generator
        # padding is no weight: its noise would only pollute the token's other columns
        self._mask = generator.layout.mask.float() if not generator.layout.mask.all() else None

    @torch.no_grad()
    def sample(
        self,
        condition: Tensor,
        seeds: Sequence[int],
        *,
        num_steps: int | None = None,
        eta_noise: float = 0.0,
        callback: Callable[[int, Tensor], None] | None = None,
    ) -> GeneratedWeights:
        """Draw the weights of B tasks.

        Args:
            condition: float32 [B, N, C], a vector a token, or [B, C], the same vector for every token.
            seeds: B integers in [0, 2^64). A sample depends on its own seed and condition, not on the batch around it (its noise to the
                bit; the result to rounding, because matrix products of other sizes round differently).
            num_steps: a shorter chain, at least one step a segment; T by default.
            eta_noise: 0 noise-free (default: the chain Theorem 1 is about, and the more accurate one), 1 full noise.
            callback: callback(t, x_t), normalised x_t [B, N, D], before each step, and (T, x_T).

        Returns:
            GeneratedWeights with tokens float32 [B, N, D].

        Raises:
            McdiError: a condition of another shape or dtype, or with NaN; another number of seeds; num_steps or eta_noise out of range.
        """
        layout, width = self.generator.layout, self.generator.condition_width
        shape = (layout.num_tokens, width)
        if condition.ndim == 2 and condition.shape[1] == width:
            condition = condition.unsqueeze(1).expand(-1, *shape)
        if condition.ndim != 3 or tuple(condition.shape[1:]) != shape or len(condition) == 0:
            raise McdiError(
                f"condition: shape {list(condition.shape)}, expected [B, {shape[0]}, {width}] or [B, {width}] with B >= 1"
            )
        if condition.dtype != torch.float32:
            raise McdiError(f"condition: {condition.dtype}, expected torch.float32; convert it by .float()")
        if not condition.isfinite().all():
            task = int((~condition.isfinite()).flatten(1).any(1).nonzero()[0])
            raise McdiError(f"condition: task {task} has NaN or infinity, expected finite numbers")
        if len(seeds) != len(condition):
            raise McdiError(f"seeds: {len(seeds)}, expected {len(condition)}, one a task")

        mask = None if self._mask is None else self._mask.to(condition.device)
        f_full = self.generator.f(condition)
        f: Callable[[Tensor, int], Tensor] = f_full

        def noise(stream: int) -> Tensor:
            flat = philox_normal(seeds, layout.num_tokens * layout.width, stream)
            z = torch.from_numpy(flat).view(len(seeds), layout.num_tokens, layout.width).to(condition.device)
            return z if mask is None else z * mask

        if mask is not None:

            def f(x: Tensor, t: int) -> Tensor:  # the network's output for padding is near 0, not 0 as in training
                return f_full(x, t) * mask

        x = sample_chain(
            f,
            noise(0),
            self.generator.schedule,
            ends=self.generator.objective.ends,
            num_steps=num_steps,
            eta_noise=eta_noise,
            noise=lambda t: noise(t + 1),
            callback=callback,
        )
        return GeneratedWeights(layout, self.generator.normalizer.denormalize(x))
