"""The chain as a scheduler of diffusers. Needs the extra: pip install 'mcdi_fast[diffusers]'."""

from __future__ import annotations

import torch
from torch import Tensor

from mcdi_fast.config import DiffusionConfig
from mcdi_fast.diffusion import diffusion_tables, sampler_coefficients, sampling_steps
from mcdi_fast.errors import McdiError, needs
from mcdi_fast.generator import WeightGenerator

with needs("the scheduler", "diffusers", "'mcdi_fast[diffusers]'"):
    from diffusers import ConfigMixin, SchedulerMixin
    from diffusers.configuration_utils import register_to_config
    from diffusers.schedulers.scheduling_utils import SchedulerOutput


class McdiScheduler(SchedulerMixin, ConfigMixin):
    """`set_timesteps`, `step` and `add_noise` over this project's schedule; a loop over them is `sample_chain`.

    Timesteps are the paper's: they rise, from 0 (noise) to T - 1, and `model_output` is f(x_t, t, c). Samples are normalised weights, not
    images: nothing is clipped, and the configuration's `clip_sample` may only be False.
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        *,  # diffusers counts what is given by position as left at its default, and `from_config` then drops it
        num_train_timesteps: int = 20,
        segments: int = 3,
        beta_start: float = 0.8,
        beta_end: float = 0.01,
        objective: str = "local-consistency",
        carry: str = "scaled",
        clip_sample: bool = False,
    ):
        """What the generator's `DiffusionConfig` says of its chain; `from_generator` copies it. Its window and residual only matter to f."""
        if clip_sample:
            raise McdiError("clip_sample = True: weights have no range to clip to; set it to False")
        config = DiffusionConfig(num_train_timesteps, segments, objective, beta_start, beta_end, carry=carry)  # type: ignore[arg-type]
        self.schedule, self.objective = diffusion_tables(config)
        self.set_timesteps(num_train_timesteps)

    @classmethod
    def from_generator(cls, generator: WeightGenerator) -> McdiScheduler:
        """The scheduler of a generator's chain."""
        d, names = generator.diffusion, ("segments", "beta_start", "beta_end", "objective", "carry")
        return cls(num_train_timesteps=d.steps, **{name: getattr(d, name) for name in names})

    def set_timesteps(self, num_inference_steps: int | None = None, device: torch.device | str | None = None) -> None:
        """Choose the steps of the next chain, one a segment at least; T by default."""
        steps = sampling_steps(self.schedule, self.objective.ends, num_inference_steps)
        self.num_inference_steps = len(steps) - 1
        self.timesteps = torch.tensor(steps[:-1], device=device or "cpu")
        self._coefficients = dict(zip(steps, sampler_coefficients(self.schedule, steps).tolist(), strict=False))

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """The sample as it is."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        generator: torch.Generator | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """x_t to the next x.

        Args:
            model_output: f(x_t, t, c), like `sample`. timestep: one of `timesteps`.
            eta: 0 noise-free, 1 full noise. variance_noise: the noise, like `sample`; drawn by `generator` otherwise.

        Raises:
            McdiError: a timestep that this chain does not visit.
        """
        if int(timestep) not in self._coefficients:
            raise McdiError(
                f"timestep {int(timestep)}: not among this chain's {self.timesteps.tolist()}; call set_timesteps"
            )
        a, b, sigma = self._coefficients[int(timestep)]
        after = torch.add(a * sample, model_output, alpha=b)
        if eta > 0:
            if variance_noise is None:
                place = generator.device if generator is not None else "cpu"
                drawn = torch.randn(sample.shape, generator=generator, dtype=sample.dtype, device=place)
                variance_noise = drawn.to(sample.device)
            after = after + eta * sigma * variance_noise
        return SchedulerOutput(prev_sample=after) if return_dict else (after,)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = sqrt(abar_t) x + sqrt(1 - abar_t) noise, towards the last target. [B, ...], [B, ...], int64 [B]."""
        abar = self.schedule.abar[timesteps.cpu()].view(-1, *[1] * (original_samples.ndim - 1))
        signal, spread = (part.to(original_samples) for part in (abar.sqrt(), (1 - abar).sqrt()))
        return signal * original_samples + spread * noise

    def __len__(self) -> int:
        """T."""
        return self.schedule.num_steps
