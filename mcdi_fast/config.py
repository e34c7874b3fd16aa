"""Every default once, with where it comes from: (paper), or (measured) with the measurement, or (ours) for a plain choice.

(record): one change at a time on validation characters of Omniglot, in docs/records/2026-11-25-ablation-omniglot-5way1shot.json, whose table is
"One change at a time" in docs/results.md. Fifty were tried; a difference below 0.1 % is none among so many.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from mcdi_fast.backend import DEFAULT_PRECISION, Impl, Precision


@dataclass(frozen=True)
class TaskConfig:
    """A few-shot task."""

    ways: int = 5
    """Classes a task (paper)."""
    shots: int = 1
    """Support images a class (paper)."""
    queries: int = 15
    """Query images a class, in evaluation (protocol)."""


@dataclass(frozen=True)
class BackboneConfig:
    """Conv4-64, trained on training classes only, frozen afterwards."""

    steps: int = 1500
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
    views: int = 1
    """Views of an image, itself and augmented ones, whose features are averaged when features are taken; the training of the backbone is the
    same. Nine times the time for features buys 0.3 % (measured, docs/choices.md)."""


@dataclass(frozen=True)
class PrepareConfig:
    """Stage 1, weight preparation: Adam + SAM on many training tasks."""

    tasks: int = 20000
    """Training tasks in the bank (record: 5000 and 10 000 alike)."""
    steps: int = 60
    """M, optimizer steps a trajectory; a multiple of the segments k (record: 30 and 120 alike)."""
    learning_rate: float = 0.2
    """Adam's; features have norm 1, so heads have entries of about 1."""
    rho: float = 0.05
    """SAM's radius; 0 turns SAM off (record: 0, 0.2, 0.5 alike)."""
    weight_decay: float = 0.003
    """Added to the loss as weight_decay / 2 ||theta||^2 (record: 0.001, 0.01 alike)."""
    start_std: float = 0.01
    """Of the Gaussian start theta_0 (measured: 0.01 beats 0.1, whose remains in the targets no condition predicts)."""
    support_loss_weight: float | None = 0.8
    """Share of a task's loss that its support images have; the other images of its classes share the rest; None weighs all alike.

    Measured on validation characters, heads regressed on the condition: None 98.0, 0.5 98.3, 0.8 98.3, 1.0 98.35 %. What a target owes
    to images that the condition does not show is noise to the generator, and its mean is a worse head than the prototype's.
    """
    copies: int = 1
    """Versions of each image in the preparation: the image and copies - 1 augmented ones; 1 is without augmentation (paper: with; record, five
    seeds: 2 is 0.07 ± 0.03 % worse)."""


@dataclass(frozen=True)
class DiffusionConfig:
    """The local consistency diffusion."""

    steps: int = 20
    """T, sampling steps (paper; record: 6, 10, 40 alike)."""
    segments: int = 3
    """k, local targets a trajectory (paper)."""
    objective: Literal["local-consistency", "vanilla", "naive-local"] = "local-consistency"
    """Mc-Di, Mv-Di or Tw-Di (paper, table 4)."""
    beta_start: float = 0.8
    """1 - alpha at t = 0, noise (ours: with it a chain really starts from noise; the paper gives no schedule; record: 0.5, 0.95 alike)."""
    beta_end: float = 0.01
    """1 - alpha at t = T - 1, weights (ours, as above; record: 0.001 to 0.5 alike)."""
    window: Literal["whole", "segment"] = "segment"
    """At which steps t target i of Mc-Di is trained: whole, all of 0 to e_i (paper), or segment, e_{i-1} to e_i, where the chain heads for it
    (record: whole is 0.15 ± 0.06 % worse; docs/choices.md)."""
    residual: Literal["scaled", "unscaled", "none"] = "scaled"
    """What the network adds to: f = skip_t x + scale_t net. unscaled: scale 1. none: skip 0 (record: 0.09 ± 0.05 and 0.13 ± 0.06 % worse)."""
    carry: Literal["full", "scaled"] = "scaled"
    """How a chain of Mc-Di goes on from a local target it has reached: full, with it as it is (paper), or scaled by sqrt(abar^{i+1}), as large as the
    signal that training showed at that step (measured, docs/choices.md: weight error 0.36 to 0.31; record: accuracy alike)."""


@dataclass(frozen=True)
class DenoiserConfig:
    """The network f_phi."""

    width: int = 256
    """H, the hidden width (record: 128, 512 alike)."""
    depth: int = 2
    """L, residual blocks (record: 1, 4 alike)."""


@dataclass(frozen=True)
class MetaConfig:
    """Stage 2, meta-training: Reptile over the denoiser."""

    steps: int = 1000
    """Outer steps (paper: 6000 meta epochs, without a word what an epoch holds; measured, docs/choices.md: no gain behind 500)."""
    meta_batch: int = 32
    """B, base learners an outer step, one (task, local target) each (record: 8 is 0.10 ± 0.06 % worse, 128 alike)."""
    inner_steps: int = 3
    """K, SGD steps of a base learner (paper; record: 1 alike)."""
    samples: int = 4
    """S, noised samples an inner step (record: 1, 16 alike)."""
    inner_lr: float = 0.005
    """eta (paper; record: 0.02 alike)."""
    outer: Literal["adam", "reptile"] = "adam"
    """What takes the Reptile difference: Adam as a gradient, or phi <- phi + zeta * difference (the paper's; record: 7 % worse after 300 steps)."""
    outer_lr: float = 0.003
    """zeta at its peak, the rate of either; it warms up over the first 1 % and falls linearly to 0 (paper: 0.001, for plain Reptile;
    measured, docs/choices.md: after 250 steps 98.35 % against 98.24 with 0.001)."""
    ema: float = 0.999
    """Decay of the average of phi that is sampled from; 0 turns it off (record: alike)."""
    normalizer_floor: float = 0.1
    """Least deviation of a column in the normalisers, as a share of all columns' (record: 0.03 and 1 alike; with 0 the inner loop diverged)."""
    checkpoint_every: int = 500
    """Outer steps between checkpoints."""
    on_bad_step: Literal["stop", "skip"] = "stop"
    """After a step whose loss is not finite: stop, or leave phi as it is, count the step and go on (ours)."""


@dataclass(frozen=True)
class EvaluateConfig:
    """The fixed protocol: the same test tasks for every method."""

    tasks: int = 600
    """Test tasks (protocol)."""
    validation_tasks: int = 300
    """Validation tasks: learning curve, and the choice of fine-tuning's rate."""
    finetune_steps: int = 100
    """Adam steps of head fine-tuning."""
    finetune_lrs: tuple[float, ...] = (0.01, 0.05, 0.2)
    """Adam rates tried on the validation tasks; the best is used on the test tasks."""
    finetune_decays: tuple[float, ...] = (0.0003, 0.001, 0.003, 0.01)
    """Weight decays tried likewise, for a second row of fine-tuning that regularises (head-finetune-decay)."""
    sampling_steps: int | None = None
    """Steps of the reported chain, from one a segment to T; T by default, fewer is faster."""
    eta_noise: float = 0.0
    """0 noise-free, 1 full noise (record: 0.5 is 0.17 ± 0.07 % worse, 1 is 0.67 ± 0.14 % worse)."""


@dataclass(frozen=True)
class TrainConfig:
    """Learn to generate classification heads from a few images: prepare trajectories, meta-train, sample, report.

    Runs the whole method in stages and writes everything into the run folder. Stopped at any moment, the same command goes on
    where it was, to the same result bit for bit (on the CPU).
    """

    dataset: Literal["glyphs", "omniglot"] = "glyphs"
    """glyphs: built in, drawn by rule, needs no data. omniglot: real; downloaded unless found."""
    run_dir: Path | None = None
    """Where config, bank, checkpoint, generator, metrics and report go; runs/<dataset>-seed<seed> by default."""
    data_dir: Path | None = None
    """Folder that holds omniglot/…; without it MCDI_DATA_DIR, then a download."""
    cache_dir: Path = Path("runs/cache")
    """Downloads and trained backbones, shared by runs."""
    seed: int = 0
    """Of tasks, starts, noise and meta-training. The backbone has its own."""
    device: str = "cpu"
    """cpu, cuda or cuda:<number>. The CPU by default, even beside a GPU: no GPU has run this yet."""
    impl: Impl = "auto"
    """Triton kernels or torch; auto: the environment variable MCDI_IMPL where set, else kernels on a GPU, torch on a CPU."""
    precision: Precision = DEFAULT_PRECISION
    """Of the kernels' matrix products; sums are float32 always, and so is torch on a CPU (measured: no accuracy lost)."""
    task: TaskConfig = field(default_factory=TaskConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    meta: MetaConfig = field(default_factory=MetaConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


def default_config(dataset: str) -> TrainConfig:
    """The defaults for a task family: glyphs is a small problem, and its whole run takes minutes."""
    config = TrainConfig(dataset=dataset)  # type: ignore[arg-type]
    if dataset != "glyphs":
        return config
    return replace(
        config,
        backbone=replace(config.backbone, steps=250),
        prepare=replace(config.prepare, tasks=5000),
        meta=replace(config.meta, steps=500),
    )
