"""The comparison on natural images, `python -m mcdi_fast.study.images --dataset tiny-imagenet`: new classes, other data sets, other domains.

A cell is one seed of one setting: a bank, a generator for each objective, and every method on the same tasks of every target. Cells that are there
are never computed again; `--out docs` writes the page, its pictures and the record from all of them.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from mcdi_fast import environment  # noqa: F401

# isort: split

import torch
from torch import Tensor

from mcdi_fast.backend import Backend
from mcdi_fast.bank import TrajectoryBank
from mcdi_fast.cli import Stages, open_run, parse, run_command, stopped
from mcdi_fast.config import AtLeastTwo, Options, Seed, TrainConfig
from mcdi_fast.denoiser import Parameters, denoise, init_parameters
from mcdi_fast.evaluate import TEST_SEED, VALIDATION_SEED, finetune, generate, step_counts, trained_targets
from mcdi_fast.figures import new_figure, png
from mcdi_fast.generator import WeightGenerator
from mcdi_fast.heads import head_accuracy, prototype_head
from mcdi_fast.meta import fit
from mcdi_fast.prepare import prepare_bank
from mcdi_fast.report import git_sha, machine, table
from mcdi_fast.sampler import Sampler
from mcdi_fast.store import atomic_write, make_folder, read_json, write_json
from mcdi_fast.study.baselines import ReptileConfig, Start, adapt, reptile_step
from mcdi_fast.tasks import Setup, TaskBatch, TaskFamily, find_family
from mcdi_fast.tasks.heads import HeadFamily
from mcdi_fast.tasks.photos import PhotoFamily, transfer_family
from mcdi_fast.tasks.prior import ridge_head
from mcdi_fast.train import check_config, kind_of, main_job

OBJECTIVES: dict[str, Any] = {"mc": "local-consistency", "mv": "vanilla", "tw": "naive-local"}
TITLES = {
    "mc-few": "**Mc-Di, 3 steps**",
    "mc": "Mc-Di, T steps",
    "mv-few": "Mv-Di, 3 steps",
    "mv": "Mv-Di, T steps",
    "tw-few": "Tw-Di, 3 steps",
    "tw": "Tw-Di, T steps",
    "ocd": "single-level diffusion with its noise (OCD)",
    "flow-few": "flow matching, 3 steps",
    "flow": "flow matching, T steps",
    "class-prior": "class prior's head, closed form",
    "finetune-prior": "Adam from that head, with decay",
    "finetune": "Adam from zero",
    "finetune-decay": "Adam from zero, with decay",
    "logistic": "logistic regression",
    "ridge": "ridge regression",
    "reptile": "Reptile's head",
    "nearest-prototype": "nearest class mean",
    "ceiling": "trained on every image (ceiling)",
}
SUPPORT_ONLY = ("finetune", "finetune-decay", "logistic", "ridge")
"""Tuned methods that see a task's support and nothing else; the best of them is what Mc-Di is held against."""
PAIRS = (("mc", "mc-few"), ("mc", "mv"), ("mc", "tw"))
"""Differences beside those of mc-few to every method."""
_FREE = ("run_dir", "out", "data_dir", "cache_dir", "seeds")
_PENALTIES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
_LRS, _DECAYS = (0.01, 0.02, 0.05), (0.03, 0.1, 0.3, 1.0, 3.0)
_LOGISTIC_STEPS = 300  # at which it has converged
_FEW = 3
_REPTILE_STEPS = 200
_FLOW_BATCH = 384  # samples a step, as many as 32 base learners of three inner steps see


class Families(NamedTuple):
    """One table of features, as differences from the prior's heads and as whole heads."""

    family: PhotoFamily
    plain: HeadFamily

    @classmethod
    def of(cls, family: PhotoFamily) -> Families:
        """Both of a family."""
        return cls(family, HeadFamily(family.splits, family.options))


Head = Callable[[Families, TaskBatch], Tensor]
"""A method: tasks -> whole heads [B, ways, K + 1]."""


@dataclass(frozen=True)
class ImagesConfig(TrainConfig[Options]):
    """Compare every method on natural images: new classes, other data sets, all classes of a data set at once, held-out domains.

    Stopped at any moment, the same command goes on; seeds may be added later.
    """

    out: Path | None = None
    """Where images-results.md, figures/ and records/ go. The run folder by default; `docs` for the repository's own."""
    seeds: tuple[Seed, ...] = (0, 1, 2, 3, 4)
    """Of tasks, banks and training; --seed is not used."""
    targets: tuple[str, ...] = ()
    """Further data sets: tasks of each, and of each of its domains where it has some."""
    target_tasks: AtLeastTwo = 200
    """Test tasks of each further data set."""
    baselines_only: bool = False
    """Leave the other objectives and flow matching out: Mc-Di and the baselines."""


def images_study(config: ImagesConfig[Any]) -> Path:
    """Make the cells that are missing, then the record, the page and the pictures; returns the page's path."""
    config = replace(config, **{k: v for k, v in vars(check_config(main_job(config))).items() if k != "seed"})
    folder = config.run_dir or Path("runs") / f"images-{_label(config)}"
    stages = Stages()
    with open_run(folder, config, _FREE), stopped():
        setup = Setup(config.data_dir, config.cache_dir, stage=stages)
        family: TaskFamily
        if config.targets:
            family = transfer_family(config.task, setup, config.targets)
        else:
            family = find_family(config.dataset).family(config.task, setup)
        assert isinstance(family, PhotoFamily)
        with stages("cells", len(config.seeds), "seeds") as bar:
            for seed in config.seeds:
                path = make_folder(folder / "cells") / f"{_label(config)}-seed{seed}.json"
                if not path.exists():
                    write_json(path, _cell(folder, family, config, seed))
                bar.update()
    out = make_folder(config.out or folder)
    for path in sorted((folder / "cells").glob("*.json")):
        write_json(make_folder(out / "records" / "images") / path.name, read_json(path))
    return render(out)


def _label(config: ImagesConfig[Any]) -> str:
    task = config.task
    held_out = [task.held_out or "last"] if hasattr(task, "held_out") else []
    across = ["across"] if getattr(task, "across", False) else []
    return "-".join([config.dataset, *held_out, *across, f"{task.ways}way{task.shots}shot"])


# ---------------------------------------------------------------------- methods


@dataclass
class Flow:
    """Rectified flow on the tokens: x_t = (1 - t) noise + t weights, the network of the denoiser for the velocity.

    Beside a share of x that is the best linear guess of normalised weights, as the diffusions have it.
    """

    phi: Parameters
    like: WeightGenerator

    @staticmethod
    def _skip(t: Tensor) -> Tensor:
        return (2 * t - 1) / (t.square() + (1 - t).square())

    @classmethod
    def fit(cls, bank: TrajectoryBank, like: WeightGenerator, steps: int, seed: int) -> Flow:
        """like: a generator trained on the bank, whose normalisers and sizes are taken."""
        size, times = like.denoiser, like.diffusion.steps
        targets, condition = bank.gather(torch.arange(len(bank)))
        x1 = like.normalizer.normalize(targets[:, -1])
        c = like.network_condition(condition)
        phi = init_parameters(x1.shape[-1], c.shape[-1], times, size.width, size.depth, seed)
        phi = {name: value.requires_grad_() for name, value in phi.items()}
        adam, g = torch.optim.Adam(phi.values(), 2e-3), torch.Generator().manual_seed(seed)
        for step in range(steps):
            adam.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
            pick = torch.randint(len(x1), (_FLOW_BATCH,), generator=g)
            at = torch.randint(times, (_FLOW_BATCH, 1), generator=g)
            noise, t = torch.randn(x1[pick].shape, generator=g), (at / times).unsqueeze(-1)
            x = (1 - t) * noise + t * x1[pick]
            found = cls._skip(t) * x + denoise(phi, x.unsqueeze(1), at, c[pick]).squeeze(1)
            adam.zero_grad()
            (found - (x1[pick] - noise)).square().mean().backward()
            adam.step()
        return cls({name: value.detach() for name, value in phi.items()}, like)

    def sample(self, tasks: TaskBatch, steps: int, seed: int) -> Tensor:
        """Euler steps from noise: [B, N, D]."""
        like, times = self.like, self.like.diffusion.steps
        c = like.network_condition(tasks.condition)
        tokens = (tasks.condition.shape[1], like.layout.width)
        x = torch.randn(len(tasks), *tokens, generator=torch.Generator().manual_seed(seed))
        ends = torch.linspace(0, times, steps + 1).round().long()
        for start, end in itertools.pairwise(ends.tolist()):
            at = torch.full((len(x), 1), start)
            v = self._skip(torch.tensor(start / times)) * x + denoise(self.phi, x.unsqueeze(1), at, c).squeeze(1)
            x = x + (end - start) / times * v
        return like.normalizer.denormalize(x)


def _adam(f: Families, tasks: TaskBatch, lr: float, decay: float, steps: int = 100) -> Tensor:
    return finetune(f.plain, tasks, steps, lr, decay, Backend())


def _from_prior(f: Families, tasks: TaskBatch, lr: float, decay: float) -> Tensor:
    return f.family.heads(finetune(f.family, tasks, 100, lr, decay, Backend()), tasks.support)


def _correct(family: PhotoFamily, head: Tensor, tasks: TaskBatch) -> Tensor:
    return head_accuracy(head, family.features(tasks.query), tasks.query["label"])


def _tuned(f: Families, validation: TaskBatch, chosen: dict[str, Any], seed: int) -> dict[str, Head]:
    """The baselines, each with what the validation tasks have chosen."""

    def best(name: str, tried: Sequence[Any], head: Callable[..., Tensor]) -> Head:
        scores = {one: float(_correct(f.family, head(f, validation, *one), validation).mean()) for one in tried}
        chosen[name] = max(scores, key=lambda one: scores[one])
        return lambda f, tasks: head(f, tasks, *chosen[name])

    def ridge(f: Families, tasks: TaskBatch, penalty: float) -> Tensor:
        return ridge_head(f.family.support_features(tasks), penalty)

    return {
        "class-prior": lambda f, tasks: tasks.support["base"],
        "finetune-prior": best("finetune-prior", list(itertools.product((0.003, 0.01), (0.1, 0.3))), _from_prior),
        "finetune": best("finetune", [(lr, 0.0) for lr in (0.003, *_LRS)], _adam),
        "finetune-decay": best("finetune-decay", list(itertools.product(_LRS, _DECAYS)), _adam),
        "logistic": best("logistic", [(0.05, decay, _LOGISTIC_STEPS) for decay in _DECAYS], _adam),
        "ridge": best("ridge", [(penalty,) for penalty in _PENALTIES], ridge),
        "reptile": best("reptile", *_reptile(f, seed)),
        "nearest-prototype": lambda f, tasks: prototype_head(f.family.support_features(tasks)),
    }


def _reptile(f: Families, seed: int) -> tuple[list[Any], Callable[..., Tensor]]:
    """What is tried, learning rates and test steps, and how."""
    c, rows = ReptileConfig(), f.plain.splits["train"]
    shots = min(c.train_shots, int(rows.counts.min()) - 1)
    training, starts = HeadFamily({"train": rows}, replace(f.plain.options, shots=shots, queries=1)), {}
    for lr in c.head_lrs:
        theta = torch.zeros(training.layout.mask.shape)
        starts[lr] = Start(theta, torch.zeros_like(theta), 0, lr)
        for outer in range(_REPTILE_STEPS):
            reptile_step(training, starts[lr], c, outer, c.head_batch, _REPTILE_STEPS, seed)

    def head(f: Families, tasks: TaskBatch, lr: float, steps: int) -> Tensor:
        return adapt(f.plain, starts[lr], tasks.support, (steps,))[0]

    return list(itertools.product(c.head_lrs, c.test_steps)), head


# ---------------------------------------------------------------------- a cell


def _cell(folder: Path, family: PhotoFamily, config: ImagesConfig[Any], seed: int) -> dict[str, Any]:
    job = main_job(config, seed=seed)
    place = folder / "banks" / f"{_label(config)}-seed{seed}"
    bank = prepare_bank(place, family, job.prepare, job.diffusion.segments, seed)
    names, generators = ["mc"] if config.baselines_only else list(OBJECTIVES), {}
    for name in names:
        diffusion = replace(job.diffusion, objective=OBJECTIVES[name])
        generators[name] = fit(bank, job.meta, diffusion, job.denoiser, seed=seed, progress=False)
    samplers = {name: Sampler(generator) for name, generator in generators.items()}
    validation = family.tasks("val", 0, job.evaluate.validation_tasks, VALIDATION_SEED + seed)
    chosen: dict[str, Any] = {}
    both = Families.of(family)
    heads = _tuned(both, validation, chosen, seed)

    def written(name: str, steps: int | None, f: Families, tasks: TaskBatch, **options: Any) -> Tensor:
        return f.family.heads(generate(samplers[name], tasks, seed, num_steps=steps, **options), tasks.support)

    for name in names:
        heads |= {f"{name}-few": partial(written, name, _FEW), name: partial(written, name, None)}
    if not config.baselines_only:
        heads["ocd"] = partial(written, "mv", None, eta_noise=1.0)
        flow = Flow.fit(bank, generators["mc"], job.meta.steps, seed)

        def flowed(steps: int, f: Families, tasks: TaskBatch) -> Tensor:
            return f.family.heads(flow.sample(tasks, steps, seed), tasks.support)

        heads |= {"flow-few": partial(flowed, _FEW), "flow": partial(flowed, job.diffusion.steps)}

    def ceiling(f: Families, tasks: TaskBatch) -> Tensor:
        return f.family.heads(trained_targets(f.family, tasks, job.prepare, 1, seed, Backend())[:, -1], tasks.support)

    heads["ceiling"] = ceiling
    found: dict[str, Any] = {}
    further = [name for name in family.splits if name not in ("train", "val", "test")]
    for split in ("test", *further):
        count = config.evaluate.tasks if split == "test" else config.target_tasks
        found[split] = _compare(both, heads, family.tasks(split, 0, count, TEST_SEED + seed))
        classes = len(family.splits[split].counts)
        if further and classes > family.options.ways:  # all classes at once, from the same generator
            part = dict.fromkeys(("train", "test"), family.splits[split])
            options = replace(config.task, ways=classes)
            wide = Families.of(PhotoFamily(part, options, family.prior, family.projection))
            of_any = {name: head for name, head in heads.items() if name not in ("reptile", "ceiling")}
            tasks = wide.family.tasks("test", 0, max(2, config.target_tasks // 2), TEST_SEED + seed)
            found[f"{split}, all {classes}"] = _compare(wide, of_any, tasks)
    tasks = family.tasks("test", 0, config.evaluate.tasks, TEST_SEED + seed)
    curve = {
        name: {
            str(n): 100 * float(_correct(family, written(name, n, both, tasks), tasks).mean())
            for n in step_counts(generators[name])
        }
        for name in names
    }
    return {
        "label": _label(config),
        "seed": seed,
        "splits": found,
        "curve": curve,
        "chosen": chosen,
        "budget": {"trajectories": job.prepare.tasks, "outer_steps": job.meta.steps},
        "task": asdict(job.task),
        "git": git_sha(),
        "machine": machine(),
    }


def _compare(f: Families, heads: dict[str, Head], tasks: TaskBatch) -> dict[str, Any]:
    """Every method on the same tasks: means, and differences with their variance over tasks, from which those of several seeds follow."""
    correct = {name: 100 * _correct(f.family, head(f, tasks), tasks).double() for name, head in heads.items()}

    def difference(ours: str, theirs: str) -> list[float]:
        d = correct[ours] - correct[theirs]
        return [round(float(d.mean()), 4), round(float(d.var()), 4)]

    pairs = [("mc-few", name) for name in correct if name != "mc-few"] + [p for p in PAIRS if p[1] in correct]
    return {
        "tasks": len(tasks),
        "distance": round(float((1 - tasks.support["trust"]).mean()), 4),
        "mean": {name: round(float(values.mean()), 4) for name, values in correct.items()},
        "minus": {f"{ours} - {theirs}": difference(ours, theirs) for ours, theirs in pairs},
    }


# ---------------------------------------------------------------------- the page


def pooled(cells: Sequence[dict[str, Any]], split: str, pair: str) -> tuple[float, float]:
    """A paired difference over the tasks of all seeds and half its 95 % interval."""
    found = [cell["splits"][split] for cell in cells if split in cell["splits"]]
    rows = [(one["tasks"], *one["minus"][pair]) for one in found]
    n = sum(count for count, _, _ in rows)
    mean = sum(count * m for count, m, _ in rows) / n
    squares = sum((count - 1) * v + count * (m - mean) ** 2 for count, m, v in rows)
    return mean, 1.96 * (squares / (n - 1) / n) ** 0.5


def _average(cells: Sequence[dict[str, Any]], split: str, name: str) -> float:
    found = [cell["splits"][split]["mean"][name] for cell in cells if split in cell["splits"]]
    return sum(found) / len(found)


def _best(cells: Sequence[dict[str, Any]], split: str) -> str:
    """The support-only method that is best on these very test tasks: no other choice is harder to beat."""
    return max(SUPPORT_ONLY, key=lambda name: _average(cells, split, name))


def render(out: Path) -> Path:
    """Write images-results.md and its figures from `<out>/records/images`; returns its path."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for path in sorted((out / "records" / "images").glob("*.json")):
        cell = read_json(path)
        groups.setdefault(cell["label"], []).append(cell)
    text = [
        "# Results on natural images",
        "",
        "Written by `python -m mcdi_fast.study.images … --out docs` from [records/images](records/images); do not edit it by hand. What it means:"
        " [images.md](images.md).",
        "",
        "Accuracy in %: mean over seeds. In brackets Mc-Di in 3 steps minus the row, paired over the tasks of all seeds, ± half of the 95 % interval."
        " Rates, decays and penalties are chosen on validation tasks of the source.",
        "",
    ]
    few, domains = [g for name, g in groups.items() if not _held_out(g)], [g for g in groups.values() if _held_out(g)]
    for cells in few:
        text += _setting(cells)
    text += _domains(domains)
    if few:
        figures = make_folder(out / "figures")
        atomic_write(figures / "images-steps.png", _plot_steps(few))
        atomic_write(figures / "images-distance.png", _plot_distance(few + domains))
        text += ["## Steps and distance", ""]
        text += ["![accuracy against sampling steps](figures/images-steps.png)", ""]
        text += ["![what is gained against the distance](figures/images-distance.png)", ""]
    path = out / "images-results.md"
    atomic_write(path, ("\n".join(text).rstrip() + "\n").encode())
    return path


def _held_out(cells: Sequence[dict[str, Any]]) -> bool:
    return "held_out" in cells[0]["task"]


def _shown(cells: Sequence[dict[str, Any]], split: str, name: str) -> str:
    if name not in cells[0]["splits"][split]["mean"]:
        return ""
    mean = f"{_average(cells, split, name):.2f}"
    if name == "mc-few":
        return mean
    d, half = pooled(cells, split, f"mc-few - {name}")
    return f"{mean} ({d:+.2f} ± {half:.2f})"


def _row(cells: Sequence[dict[str, Any]], split: str, *columns: str) -> list[str]:
    """Distance, seeds, Mc-Di, the best baseline by its name, and further methods."""
    best, having = _best(cells, split), [cell for cell in cells if split in cell["splits"]]
    distance = sum(cell["splits"][split]["distance"] for cell in having) / len(having)
    shown = [_shown(having, split, name) for name in ("mc-few", best, *columns)]
    seeds = str(len({cell["seed"] for cell in having}))
    return [f"{distance:.2f}", seeds, shown[0], f"{shown[1]}, {TITLES[best]}", *shown[2:]]


def _setting(cells: list[dict[str, Any]]) -> list[str]:
    first, budget = cells[0]["splits"], cells[0]["budget"]
    counts = sorted({one["tasks"] for split, one in first.items() if split != "test"})
    elsewhere = f" and {' or '.join(map(str, counts))} elsewhere" if counts else ""
    machines = ", ".join(sorted({cell["machine"]["processor"] for cell in cells}))
    text = [
        f"## {cells[0]['label']}",
        "",
        f"{len(cells)} seeds; {first['test']['tasks']} test tasks a seed on new classes{elsewhere}; {budget['trajectories']} tasks in the bank,"
        f" {budget['outer_steps']} outer steps; {machines}, git {', '.join(sorted({cell['git'] for cell in cells}))}.",
        "",
    ]
    rows = [[TITLES[name], _shown(cells, "test", name)] for name in TITLES if name in first["test"]["mean"]]
    text += table(["method", "new classes"], rows)
    shown = [
        [f"{TITLES[a]} minus {TITLES[b]}", "{:+.2f} ± {:.2f}".format(*pooled(cells, "test", f"{a} - {b}"))]
        for a, b in PAIRS
        if f"{a} - {b}" in first["test"]["minus"]
    ]
    text += table(["difference", "new classes"], shown)
    lines = [[split, *_row(cells, split, "class-prior", "mv-few", "flow-few", "nearest-prototype")] for split in first]
    header = "tasks of|distance|seeds|Mc-Di, 3 steps|best tuned baseline|class prior|Mv-Di, 3 steps|flow matching, 3 steps|nearest class mean"
    return text + table(header.split("|"), lines) if len(first) > 1 else text


def _domains(groups: Sequence[list[dict[str, Any]]]) -> list[str]:
    if not groups:
        return []
    lines, columns = [], ("class-prior", "finetune-prior", "reptile", "nearest-prototype", "ceiling")
    together: dict[str, list[dict[str, Any]]] = {}
    for cells in groups:
        label = cells[0]["label"]
        lines.append([label, *_row(cells, "test", *columns)])
        name = label.replace(f"-{cells[0]['task']['held_out']}-", ", mean, ")
        together.setdefault(name, []).extend(cells)
    for name, cells in together.items():
        if len({cell["label"] for cell in cells}) > 1:
            lines.append([f"**{name}**", *_row(cells, "test", *columns)])
    header = "held out|distance|seeds|Mc-Di, 3 steps|best tuned baseline|class prior|Adam from it|Reptile's head|nearest class mean|ceiling"
    tasks, budget = groups[0][0]["splits"]["test"]["tasks"], groups[0][0]["budget"]
    note = (
        "Training sees the other domains, of the same classes. `across`: the support is of one of those, the query of the one held out."
        f" {tasks} test tasks a seed; {budget['trajectories']} tasks in the bank, {budget['outer_steps']} outer steps."
    )
    return ["## Domains held out", "", note, "", *table(header.split("|"), lines)]


def _plot_steps(groups: Sequence[list[dict[str, Any]]]) -> bytes:
    figure, axes = new_figure(len(groups))
    for ax, cells in zip([axes] if len(groups) == 1 else axes, groups, strict=True):
        for name, title in (("mc", "Mc-Di"), ("mv", "Mv-Di"), ("tw", "Tw-Di")):
            curves = [cell["curve"][name] for cell in cells if name in cell["curve"]]
            if curves:
                counts = sorted(map(int, curves[0]))
                ax.plot(counts, [sum(c[str(n)] for c in curves) / len(curves) for n in counts], "o-", ms=3, label=title)
        for name in ("class-prior", _best(cells, "test")):
            ax.axhline(_average(cells, "test", name), ls=":", color="0.5")
            ax.annotate(TITLES[name], (1, _average(cells, "test", name)), fontsize=6, va="bottom")
        ax.set(xscale="log", xlabel="sampling steps", ylabel="accuracy, %", title=cells[0]["label"])
        ax.legend(fontsize=7)
    return png(figure)


def _plot_distance(groups: Sequence[list[dict[str, Any]]]) -> bytes:
    figure, ax = new_figure()
    for cells in groups:
        points = []
        for split in cells[0]["splits"]:
            d, half = pooled(cells, split, f"mc-few - {_best(cells, split)}")
            points.append((float(_row(cells, split)[0]), d, half))
        x, y, e = zip(*points, strict=True)
        ax.errorbar(x, y, e, fmt="o", ms=3, lw=0.8, label=cells[0]["label"] if not _held_out(cells) else None)
    ax.axhline(0, color="0.6", lw=0.8)
    ax.set(xlabel="distance from the training classes", ylabel="Mc-Di minus best tuned baseline, %", ylim=(-3, 8))
    ax.legend(fontsize=6)
    return png(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run. Returns the exit code."""
    kind = kind_of(ImagesConfig)
    return run_command(lambda: print(images_study(parse(kind, "mcdi_fast.study.images", arguments, "tiny-imagenet"))))


if __name__ == "__main__":
    sys.exit(main())
