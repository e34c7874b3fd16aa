"""What the comparison is made of: its options, its cells, and each cell's settings as those of a main job."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from mcdi_fast.bounds import check
from mcdi_fast.config import (
    AtLeastOne,
    AtLeastTwo,
    DenoiserConfig,
    DiffusionConfig,
    EvaluateConfig,
    MetaConfig,
    Positive,
    PrepareConfig,
    Seed,
    TrainConfig,
)
from mcdi_fast.errors import McdiError
from mcdi_fast.study.baselines import ReptileConfig
from mcdi_fast.tasks import find_family
from mcdi_fast.tasks.drawings import DrawingOptions
from mcdi_fast.train import check_config

SettingName = Literal["5way1shot", "5way5shot", "20way1shot"]
MethodName = Literal[
    "prototype", "finetune", "finetune-decay", "reptile-head", "reptile-net", "ocd", "mv-di", "tw-di", "mc-di-paper", "mc-di", "ceiling"
]  # fmt: skip
VariantName = Literal["sam-augment", "sam", "augment", "plain"]
PartName = Literal["comparison", "analysis", "variants", "segments", "selection", "latency"]

SETTINGS: dict[str, tuple[int, int]] = {"5way1shot": (5, 1), "5way5shot": (5, 5), "20way1shot": (20, 1)}
"""Ways and shots."""
METHODS: tuple[MethodName, ...] = MethodName.__args__  # type: ignore[attr-defined]
VARIANTS: tuple[VariantName, ...] = VariantName.__args__  # type: ignore[attr-defined]
PARTS: tuple[PartName, ...] = PartName.__args__  # type: ignore[attr-defined]
OBJECTIVES: dict[str, Any] = {
    "ocd": "vanilla",
    "mv-di": "vanilla",
    "tw-di": "naive-local",
    "mc-di-paper": "local-consistency",
    "mc-di": "local-consistency",
}
PREPARED = (*OBJECTIVES, "ceiling")
"""Methods whose training data is what the preparation makes."""

# Of a cell's record. 1, not written: before Tw-Di's scale and the draws of two seeds were corrected (report.py says what that means).
REVISION = 2

# One change of Mc-Di at a time, judged on validation characters: dotted options, and two that are none (`family`: baselines.py; `sampler`).
CHANGES: dict[str, dict[str, Any]] = {
    "default": {},
    "window-whole": {"diffusion.window": "whole"},
    "carry-full": {"sampler": {"carry": "full"}},
    "schedule-start-0.5": {"diffusion.beta_start": 0.5},
    "schedule-start-0.95": {"diffusion.beta_start": 0.95},
    "schedule-end-0.001": {"diffusion.beta_end": 0.001},
    "schedule-end-0.1": {"diffusion.beta_end": 0.1},
    "schedule-end-0.3": {"diffusion.beta_end": 0.3},
    "schedule-end-0.5": {"diffusion.beta_end": 0.5},
    "T-6": {"diffusion.steps": 6},
    "T-10": {"diffusion.steps": 10},
    "T-40": {"diffusion.steps": 40},
    "full-noise": {"sampler": {"eta_noise": 1.0}},
    "half-noise": {"sampler": {"eta_noise": 0.5}},
    "3-sampling-steps": {"sampler": {"num_steps": 3}},
    "5-sampling-steps": {"sampler": {"num_steps": 5}},
    "B-8": {"meta.meta_batch": 8},
    "B-128": {"meta.meta_batch": 128},
    "S-1": {"meta.samples": 1},
    "S-16": {"meta.samples": 16},
    "K-1": {"meta.inner_steps": 1},
    "inner-lr-0.02": {"meta.inner_lr": 0.02},
    "plain-reptile-outer": {"meta.outer": "reptile", "meta.outer_lr": 1.0},
    "outer-lr-0.001": {"meta.outer_lr": 0.001},
    "outer-lr-0.01": {"meta.outer_lr": 0.01},
    "no-ema": {"meta.ema": 0.0},
    "M-30": {"prepare.steps": 30},
    "M-120": {"prepare.steps": 120},
    "rho-0": {"prepare.rho": 0.0},
    "rho-0.2": {"prepare.rho": 0.2},
    "rho-0.5": {"prepare.rho": 0.5},
    "decay-0.001": {"prepare.weight_decay": 0.001},
    "decay-0.01": {"prepare.weight_decay": 0.01},
    "support-loss-weight-0.5": {"task.support_loss_weight": 0.5},
    "support-loss-weight-1": {"task.support_loss_weight": 1.0},
    "no-augmentation": {"task.augmentation": 0},
    "4-copies": {"task.augmentation": 3},
    "twice-the-tasks": {"prepare.tasks": 2.0},  # a factor: the budget's own number is the base
    "residual-to-prototype-head": {"family": "residual"},
    "condition-prototypes": {"family": "prototypes"},
    "condition-spread": {"family": "spread"},
    "condition-all-support": {"family": "support"},
    "width-128": {"denoiser.width": 128},
    "width-512": {"denoiser.width": 512},
    "depth-1": {"denoiser.depth": 1},
    "depth-4": {"denoiser.depth": 4},
    "no-skip": {"diffusion.residual": "none"},
    "unscaled-residual": {"diffusion.residual": "unscaled"},
    "normalizer-floor-0.03": {"meta.normalizer_floor": 0.03},
    "normalizer-floor-1": {"meta.normalizer_floor": 1.0},
    "half-the-steps": {"meta.steps": 0.5},
    "twice-the-steps": {"meta.steps": 2.0},
}


@dataclass(frozen=True)
class StudyConfig:
    """Compare the methods on the same tasks: every row of the paper's tables, with intervals, times and gradient steps.

    The work is a list of cells (setting x seed x method x preparation). Each finished cell is a record under the run folder and is never
    computed again. Stopped at any moment, the same command goes on. Which cells to compute (settings, seeds, methods, parts) may change
    from call to call; the budget and every other setting belong to the run folder.
    """

    dataset: Literal["glyphs", "omniglot"] = "omniglot"
    """glyphs: built in, needs no data. omniglot: real; downloaded unless found."""
    run_dir: Path | None = None
    """Where cells, banks, generators and the report go. runs/study-<dataset> by default."""
    out: Path | None = None
    """Where results.md, figures/ and records/ go. The run folder by default; `docs` for the repository's own."""
    data_dir: Path | None = None
    """Folder that holds omniglot/…; without it MCDI_DATA_DIR, then a download."""
    cache_dir: Path = Path("runs/cache")
    """Downloads, trained backbones and features, shared by runs."""
    settings: tuple[SettingName, ...] = tuple(SETTINGS)  # type: ignore[arg-type]
    """Few-shot settings. The parts analysis, segments and selection use the first one only."""
    seeds: tuple[Seed, ...] = (0, 1, 2, 3, 4)
    """Of tasks, starts, noise and training. The backbone has its own. The part selection uses the first."""
    methods: tuple[MethodName, ...] = METHODS
    """Rows of the comparison."""
    variants: tuple[VariantName, ...] = VARIANTS
    """Preparations: with and without SAM and augmentation. The part comparison uses sam-augment, the part variants the others."""
    parts: tuple[PartName, ...] = PARTS
    """comparison: the rows. analysis: theorem 1, chains, novelty. variants: the rows without SAM or augmentation. segments: k against
    accuracy. selection: one change at a time, on validation characters. latency: every row's time for one task, one row after the other in
    one process; to time again on an idle machine, remove `cells/*latency.json`."""
    segment_numbers: tuple[AtLeastOne, ...] = (1, 2, 3, 4, 5, 6, 7, 8)
    """k of the part segments. M is rounded up to a multiple of each."""
    changes: tuple[str, ...] = tuple(CHANGES)
    """Changes that the part selection tries."""
    time_limit: Positive | None = None
    """Stop after about so many seconds, at a point from which the same command goes on (exit code 3). No limit by default."""
    device: str = "cpu"
    """cpu, cuda or cuda:<number>. No GPU has run it yet."""
    report_only: bool = False
    """Compute nothing: write tables and figures from the records there are."""
    selection_tasks: AtLeastTwo = 1000
    """Validation tasks that judge a change; other ones than those that choose rates."""
    task: DrawingOptions = field(default_factory=lambda: DrawingOptions(augmentation=1))
    """Tasks and backbone. Ways and shots are those of --settings; augmentation as in the paper."""
    prepare: PrepareConfig = field(default_factory=lambda: PrepareConfig(tasks=5000))
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    meta: MetaConfig = field(default_factory=lambda: MetaConfig(steps=300, checkpoint_every=50))
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    reptile: ReptileConfig = field(default_factory=ReptileConfig)


BUDGET = "dataset selection_tasks task prepare diffusion denoiser meta evaluate reptile".split()
"""What a run folder and a record belong to. Everything else may change from call to call."""
FREE = [name for name in StudyConfig.__dataclass_fields__ if name not in BUDGET]


@dataclass(frozen=True)
class Cell:
    """One record to make.

    Attributes:
        method: a `MethodName`, "analysis" or "latency". variant: "" where the preparation does not matter. segments: k, 0 where it does not matter.
        change: a name of `CHANGES` for the part selection (then on validation tasks), else "".
    """

    setting: str
    seed: int
    method: str
    variant: str = ""
    segments: int = 0
    change: str = ""

    @property
    def changed(self) -> dict[str, Any]:
        """What the change is, of `CHANGES`."""
        return CHANGES.get(self.change, {})

    @property
    def name(self) -> str:
        """Of its record."""
        k = f"k{self.segments}" if self.segments else ""
        parts = (self.setting, f"seed{self.seed}", self.method, self.variant, k, self.change)
        return "_".join(part for part in parts if part)


def plan(config: StudyConfig) -> list[Cell]:
    """The cells that a configuration asks for, in the order in which they are made, none twice."""
    k = config.diffusion.segments
    cells: list[Cell] = []

    def rows(setting: str, seed: int, variant: str) -> Iterable[Cell]:
        for method in config.methods:
            if method in PREPARED:
                segments = {"ceiling": 0, "ocd": 1, "mv-di": 1}.get(method, k)
                yield Cell(setting, seed, method, variant, segments)
            elif variant == "sam-augment":
                yield Cell(setting, seed, method)

    first = config.settings[0]
    for setting in config.settings:
        for seed in config.seeds:
            if "comparison" in config.parts and "sam-augment" in config.variants:
                cells += rows(setting, seed, "sam-augment")
            if "analysis" in config.parts and setting == first:
                cells.append(Cell(setting, seed, "analysis", "sam-augment", k))
    if "segments" in config.parts:
        cells += [Cell(first, s, "mc-di", "sam-augment", n) for s in config.seeds for n in config.segment_numbers]
    if "variants" in config.parts:
        for setting in config.settings:
            for seed in config.seeds:
                for variant in config.variants:
                    if variant != "sam-augment":
                        cells += [cell for cell in rows(setting, seed, variant) if cell.method in PREPARED]
    if "selection" in config.parts:
        cells += [Cell(first, config.seeds[0], "mc-di", "sam-augment", k, change) for change in config.changes]
    if "latency" in config.parts:
        cells += [Cell(setting, config.seeds[0], "latency") for setting in config.settings]
    return list(dict.fromkeys(cells))


def check_study(config: StudyConfig) -> StudyConfig:
    """The configuration with plain numbers; raises McdiError, naming the option, for whatever can be seen to be wrong before any work is done."""
    config = check(config)
    for name in ("settings", "seeds", "parts", "methods", "variants", "segment_numbers", "changes"):
        values = getattr(config, name)
        if len(set(values)) < len(values):
            raise McdiError(f"--{name.replace('_', '-')} {' '.join(map(str, values))}: one stands twice")
    if unknown := [change for change in config.changes if change not in CHANGES]:
        raise McdiError(f"--changes {unknown[0]!r}: expected some of {', '.join(CHANGES)}")
    if (config.task.ways, config.task.shots) != SETTINGS["5way1shot"]:
        raise McdiError("--task.ways, --task.shots: the study has its own; choose by --settings")
    if not plan(config):
        raise McdiError("no cell to make: --parts, --methods and --variants exclude each other; ask for more of them")
    for cell in plan(config):
        check_config(train_config(config, cell))
    return config


def train_config(config: StudyConfig, cell: Cell) -> TrainConfig[DrawingOptions]:
    """A cell's settings as those of a main job: preparation, segments and change applied."""
    ways, shots = SETTINGS[cell.setting]
    task, prepare, meta = replace(config.task, ways=ways, shots=shots), config.prepare, config.meta
    if cell.variant in ("plain", "augment"):
        prepare = replace(prepare, rho=0.0)
    if cell.variant in ("plain", "sam"):
        task = replace(task, augmentation=0)
    k = cell.segments or config.diffusion.segments
    diffusion = replace(config.diffusion, segments=k)
    if cell.method in OBJECTIVES:
        diffusion = replace(diffusion, objective=OBJECTIVES[cell.method])
    if cell.method == "mc-di-paper":
        diffusion = replace(diffusion, window="whole", carry="full")
    if cell.method == "ocd":  # plain stochastic gradients: one "inner step" sees what the others see in all of theirs
        meta = replace(meta, inner_steps=1, samples=meta.samples * meta.inner_steps, outer="adam")
    parts = dict[str, Any](task=task, prepare=prepare, diffusion=diffusion, denoiser=config.denoiser, meta=meta)
    for key, value in cell.changed.items():
        if "." in key:
            part, name = key.split(".")
            old = getattr(parts[part], name)
            is_factor = isinstance(old, int) and isinstance(value, float)
            parts[part] = replace(parts[part], **{name: round(old * value) if is_factor else value})
    steps = -(-parts["prepare"].steps // k) * k  # every k divides its own M
    parts["prepare"] = replace(parts["prepare"], steps=steps)
    return TrainConfig(config.dataset, seed=cell.seed, device=config.device, evaluate=config.evaluate, **parts)


def default_study_config(dataset: str) -> StudyConfig:
    """The defaults for a data set: the backbone of glyphs takes seconds."""
    default = StudyConfig(dataset=dataset)  # type: ignore[arg-type]
    return replace(default, task=replace(default.task, backbone=find_family(dataset).options().backbone))


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Settings by dotted name, as JSON has them, of a dataclass or of (partly) nested dicts."""
    result: dict[str, Any] = {}
    for name, value in (config if isinstance(config, dict) else asdict(config)).items():
        if isinstance(value, dict):
            result |= flat(value, f"{prefix}{name}.")
        else:
            result[prefix + name] = list(value) if isinstance(value, tuple) else value
    return result
