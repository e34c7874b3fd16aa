"""Every default once, with where it comes from: (paper), or (measured) with the measurement, or (ours) for a plain choice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class BackboneConfig:
    """Conv4-64, trained on training classes only, frozen afterwards."""

    steps: int = 3000
    """Training episodes."""
    ways: int = 64
    """Classes an episode (ours)."""
    images_per_class: int = 6
    """One support image and the rest queries (ours)."""
    learning_rate: float = 0.002
    """Adam, falling to zero by a cosine."""
    seed: int = 0
    """Of its own, so that runs with other seeds share the backbone."""
    checkpoint_every: int = 200
    """Steps between checkpoints of the backbone's training."""


@dataclass(frozen=True)
class PrepareConfig:
    """Stage 1, weight preparation: Adam + SAM on many training tasks."""

    tasks: int = 20000
    """Training tasks in the bank."""
    steps: int = 60
    """M, optimizer steps a trajectory; a multiple of the segments k."""
    learning_rate: float = 0.05
    """Adam's."""
    rho: float = 0.05
    """SAM's radius; 0 turns SAM off."""
    weight_decay: float = 0.03
    """Added to the loss as weight_decay / 2 ||theta||^2."""
    start_deviation: float = 0.01
    """Of the Gaussian start theta_0 (measured: 0.01 beats 0.1, whose remains in the targets no condition predicts)."""
    copies: int = 2
    """Versions of each image in the preparation: the image and copies - 1 augmented ones; 1 turns augmentation off."""


@dataclass(frozen=True)
class DiffusionConfig:
    """The local consistency diffusion."""

    steps: int = 20
    """T, sampling steps (paper)."""
    segments: int = 3
    """k, local targets a trajectory (paper)."""
    objective: Literal["local-consistency", "vanilla", "naive-local"] = "local-consistency"
    """Mc-Di, Mv-Di or Tw-Di (paper, table 4)."""
    beta_start: float = 0.8
    """1 - alpha at t = 0, noise (ours: with it a chain really starts from noise; the paper gives no schedule)."""
    beta_end: float = 0.01
    """1 - alpha at t = T - 1, weights (ours, as above)."""


@dataclass(frozen=True)
class DenoiserConfig:
    """The network f_phi."""

    width: int = 256
    """H, the hidden width."""
    depth: int = 2
    """L, residual blocks."""


@dataclass(frozen=True)
class MetaConfig:
    """Stage 2, meta-training: Reptile over the denoiser."""

    steps: int = 6000
    """Outer steps (paper: 6000 meta epochs; it does not say what an epoch holds)."""
    meta_batch: int = 32
    """B, base learners an outer step, one (task, local target) each."""
    inner_steps: int = 3
    """K, SGD steps of a base learner (paper)."""
    samples: int = 4
    """S, noised samples an inner step."""
    inner_rate: float = 0.005
    """eta (paper)."""
    outer: Literal["adam", "reptile"] = "adam"
    """What takes the Reptile difference: Adam as a gradient, or phi <- phi + zeta * difference (the paper's)."""
    outer_rate: float = 0.001
    """zeta (paper) at its peak, the rate of either; it warms up over the first 1 % and falls linearly to 0."""
    ema: float = 0.999
    """Decay of the average of phi that is sampled from; 0 turns it off."""
    checkpoint_every: int = 500
    """Outer steps between checkpoints."""
