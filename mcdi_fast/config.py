"""Every default once, with its bounds and where it comes from: (paper), (measured) with the measurement, or (ours) for a plain choice.

(record): one change at a time on validation characters of Omniglot, in docs/records/2026-11-25-ablation-omniglot-5way1shot.json, whose table is
"One change at a time" in docs/results.md. With fifty comparisons, treat differences below 0.1 % as noise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Generic, Literal, TypeVar

from mcdi_fast.backend import DEFAULT_PRECISION, Impl, Precision
from mcdi_fast.bounds import Range

Options = TypeVar("Options")

AtLeastZero = Annotated[int, Range(ge=0)]
AtLeastOne = Annotated[int, Range(ge=1)]
AtLeastTwo = Annotated[int, Range(ge=2)]
Seed = Annotated[int, Range(ge=0, lt=1_000_000)]
Positive = Annotated[float, Range(gt=0)]
NotNegative = Annotated[float, Range(ge=0)]
Share = Annotated[float, Range(ge=0, le=1)]


@dataclass(frozen=True)
class PrepareConfig:
    """Stage 1, weight preparation: Adam + SAM on many training tasks."""

    tasks: AtLeastOne = 20000
    """Training tasks in the bank (record: 5000 and 10 000 alike; drawings take 2000, docs/choices.md)."""
    steps: AtLeastOne = 60
    """M, optimizer steps of a trajectory. A multiple of the segments k (record: 30 and 120 alike)."""
    learning_rate: Positive = 0.2
    """Adam's. 0.2 suits heads, whose features have norm 1 and whose entries are about 1."""
    rho: NotNegative = 0.05
    """SAM's radius. 0 turns SAM off (record: 0, 0.2, 0.5 alike)."""
    weight_decay: NotNegative = 0.003
    """Adds weight_decay / 2 ||theta||^2 to the loss (record: 0.001, 0.01 alike)."""
    start_std: NotNegative = 0.01
    """Std of the Gaussian part of theta_0. A large value leaves noise in the targets that the condition cannot predict (measured: 0.01 beats 0.1)."""


@dataclass(frozen=True)
class DiffusionConfig:
    """The local consistency diffusion."""

    steps: AtLeastOne = 20
    """T, steps of the whole chain (paper; record: 6, 10, 40 alike)."""
    segments: AtLeastOne = 3
    """k, local targets of a trajectory (paper)."""
    objective: Literal["local-consistency", "vanilla", "naive-local"] = "local-consistency"
    """Mc-Di, Mv-Di or Tw-Di (paper, table 4)."""
    beta_start: float = 0.8
    """1 - alpha at t = 0, noise. With 0.8 a chain really starts from noise (ours, the paper gives none; record: 0.5, 0.95 alike)."""
    beta_end: float = 0.01
    """1 - alpha at t = T - 1, weights (ours; record: 0.001 to 0.5 alike)."""
    window: Literal["whole", "segment"] = "segment"
    """Steps t at which target i of Mc-Di is trained. whole: 0 to e_i (paper). segment: e_{i-1} to e_i, where the chain heads for it
    (record: whole is 0.15 ± 0.06 % worse; docs/choices.md)."""
    residual: Literal["scaled", "unscaled", "target", "none"] = "scaled"
    """What the network adds to: f = skip_t x + scale_t net. unscaled: scale 1. none: skip 0 (record: 0.09 ± 0.05 and 0.13 ± 0.06 % worse)."""
    carry: Literal["full", "scaled"] = "scaled"
    """How a chain of Mc-Di goes on from a local target. full: as it is (paper). scaled: times sqrt(abar^{i+1}), the size of the signal that
    training showed at that step (measured, docs/choices.md: weight error 0.36 to 0.31; record: accuracy alike)."""


@dataclass(frozen=True)
class DenoiserConfig:
    """The network f_phi."""

    width: AtLeastOne = 256
    """H, the hidden width (record: 128, 512 alike)."""
    depth: AtLeastOne = 2
    """L, residual blocks (record: 1, 4 alike)."""


@dataclass(frozen=True)
class MetaConfig:
    """Stage 2, meta-training: Reptile over the denoiser."""

    steps: AtLeastOne = 1000
    """Outer steps (paper: 6000 meta epochs, without a word what an epoch holds; measured, docs/choices.md: no gain behind 500)."""
    meta_batch: AtLeastOne = 32
    """B, base learners an outer step, one (task, local target) each (record: 8 is 0.10 ± 0.06 % worse, 128 alike)."""
    inner_steps: AtLeastOne = 3
    """K, SGD steps of a base learner (paper; record: 1 alike)."""
    samples: AtLeastOne = 4
    """S, noised samples an inner step (record: 1, 16 alike)."""
    inner_lr: Positive = 0.005
    """eta (paper; record: 0.02 alike)."""
    outer: Literal["adam", "reptile"] = "adam"
    """What takes the Reptile difference. adam: as a gradient. reptile: phi <- phi + zeta * difference (paper; record: 7 % worse after 300 steps)."""
    outer_lr: Positive = 0.003
    """zeta at its peak, for either. It warms up over the first 1 % of the steps and falls linearly to 0 (paper: 0.001, for plain Reptile;
    measured, docs/choices.md: after 250 steps 98.35 % against 98.24 with 0.001)."""
    ema: Annotated[float, Range(ge=0, lt=1)] = 0.999
    """Decay of the average of phi that is sampled from. 0 turns it off (record: alike)."""
    normalizer_floor: NotNegative = 0.1
    """Least deviation of a column in the normalisers, as a share of all columns' (record: 0.03 and 1 alike; with 0 the inner loop diverged)."""
    checkpoint_every: AtLeastOne = 500
    """Outer steps between checkpoints."""
    on_bad_step: Literal["stop", "skip"] = "stop"
    """After a step whose loss is not finite. stop: end with an error. skip: leave phi as it is, count the step and go on."""


@dataclass(frozen=True)
class EvaluateConfig:
    """The fixed protocol: the same test tasks for every method."""

    tasks: AtLeastTwo = 600
    """Test tasks (protocol)."""
    validation_tasks: AtLeastTwo = 300
    """Validation tasks, for the learning curve and the choice of sampling steps and of fine-tuning's settings."""
    finetune_steps: tuple[AtLeastOne, ...] = (100,)
    """Numbers of Adam steps tried for fine-tuning on the support. Validation tasks choose."""
    finetune_lrs: tuple[Positive, ...] = (0.01, 0.05, 0.2)
    """Learning rates tried likewise."""
    finetune_decays: tuple[NotNegative, ...] = (0.0003, 0.001, 0.003, 0.01)
    """Weight decays tried likewise, for a second row of fine-tuning that regularises (finetune-decay)."""
    sampling_steps: AtLeastOne | None = None
    """Steps of the reported chain, from one a segment to T. By default the fewest that are level with the best on the validation tasks (one standard
    error, paired)."""
    eta_noise: Share = 0.0
    """0 noise-free, 1 full noise (record: 0.5 is 0.17 ± 0.07 % worse, 1 is 0.67 ± 0.14 % worse)."""


@dataclass(frozen=True)
class TrainConfig(Generic[Options]):
    """Learn to generate weights: prepare trajectories of many tasks, meta-train, sample for new tasks, report.

    Runs the whole method in stages and writes everything into the run folder. Stopped at any moment, the same command goes on
    where it was, to the same result bit for bit (on the CPU).
    """

    dataset: str = "glyphs"
    """Which family of tasks: glyphs, omniglot, tiny-imagenet, pacs, digits (heads); waves, digit-networks (whole networks); glue, intents (language);
    or package.module:function of your own (docs/own-network.md). The options --task.… are its own: --dataset NAME --help shows them."""
    run_dir: Path | None = None
    """Where config, bank, checkpoint, generator, metrics and report go. runs/<dataset>-seed<seed> by default."""
    data_dir: Path | None = None
    """Folder that holds the data, such as omniglot/…; without it MCDI_DATA_DIR, then a download."""
    cache_dir: Path = Path("runs/cache")
    """Downloads and trained backbones, shared by runs."""
    seed: Seed = 0
    """Of tasks, starts, noise and meta-training. A backbone has its own."""
    device: str = "cpu"
    """cpu, cuda or cuda:<number>. The CPU by default, even beside a GPU: no GPU has run this yet."""
    impl: Impl = "auto"
    """Triton kernels or torch. auto: the environment variable MCDI_IMPL where set, else kernels on a GPU, torch on a CPU."""
    precision: Precision = DEFAULT_PRECISION
    """Of matrix products by kernels, and by compiled code on a CPU with AMX (tf32: within 4e-6). Sums are float32. Measured: no accuracy lost."""
    task: Options = field(default=None)  # type: ignore[assignment]
    """Options of the family."""
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    meta: MetaConfig = field(default_factory=MetaConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
