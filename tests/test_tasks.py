"""Families: episodes, the door, check_family, networks of one's own."""

import dataclasses
import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import error_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mcdi_fast import bounds, cli, train
from mcdi_fast.align import align
from mcdi_fast.config import PrepareConfig, TrainConfig
from mcdi_fast.heads import prototype_head
from mcdi_fast.tasks import BUILT_IN, Setup, TaskBatch, check_family, digit_networks, find_family, register
from mcdi_fast.tasks.digit_networks import DigitFamily, NetworkOptions
from mcdi_fast.tasks.drawings import ClassImages, DrawingOptions
from mcdi_fast.tasks.encoders import Projection
from mcdi_fast.tasks.heads import ClassRows, HeadFamily, HeadOptions, draw_episodes
from mcdi_fast.tasks.images import LabelledRows
from mcdi_fast.tasks.modules import ModuleFamily
from mcdi_fast.tasks.prior import ClassPrior
from mcdi_fast.tasks.waves import WaveFamily, WaveOptions
from mcdi_fast.weights import WeightLayout

FEW = PrepareConfig(steps=10, learning_rate=0.01, rho=0.0, weight_decay=0.0, start_std=0.0)


# --- episodes ---


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_episodes_are_valid_whatever_the_sizes(data):
    counts = torch.tensor(data.draw(st.lists(st.integers(1, 20), min_size=2, max_size=30)))
    ways, images = data.draw(st.integers(2, len(counts))), data.draw(st.integers(1, int(counts.min())))
    count, seed, start = (
        data.draw(st.integers(0, 5)),
        data.draw(st.integers(0, 2**40)),
        data.draw(st.integers(0, 10**9)),
    )
    rows = draw_episodes(counts, ways, images, seed, start, count)
    assert rows.shape == (count, ways, images)
    assert rows.dtype == torch.int64
    owner = torch.repeat_interleave(torch.arange(len(counts)), counts)
    for task in rows:
        classes = owner[task]
        assert (classes == classes[:, :1]).all()  # one class a way
        assert len(set(classes[:, 0].tolist())) == ways  # none twice
        assert len(set(task.flatten().tolist())) == ways * images  # no image twice
    cut = data.draw(st.integers(0, count))
    parts = (
        draw_episodes(counts, ways, images, seed, start, cut),
        draw_episodes(counts, ways, images, seed, start + cut, count - cut),
    )
    assert torch.equal(torch.cat(parts), rows)


def test_another_seed_or_number_is_another_task():
    counts = torch.full((100,), 20)
    rows = torch.cat([draw_episodes(counts, 5, 2, seed, 0, 50) for seed in (0, 1)])
    assert len({tuple(row.flatten().tolist()) for row in rows}) == 100
    assert not torch.equal(rows[:, 0] % 20, rows[:, 1] % 20)  # ways draw their own images


def test_every_class_and_image_gets_its_turn():
    rows = draw_episodes(torch.tensor([6] * 5 + [9] * 5), 5, 5, 0, 0, 2000)
    count = rows.flatten().bincount(minlength=75).double()
    for part, size in ((count[:30], 6), (count[30:], 9)):
        expected = 2000 * 5 * 5 / 10 / size
        assert ((part - expected).abs() < 6 * expected**0.5).all()


# --- heads ---


def head_family(options=HeadOptions(3, 2, 4), versions=1, seed=0, counts=(9, 7, 8, 12)):  # noqa: B008 (a constant)
    g = torch.Generator().manual_seed(seed)

    def rows():
        total = sum(counts)
        more = torch.randn(versions - 1, total, 6, generator=g) if versions > 1 else None
        return ClassRows(torch.randn(total, 6, generator=g), torch.tensor(counts), more)

    train = rows()
    return HeadFamily(
        {
            "train": train,
            "val": ClassRows(train.rows + 1, train.counts),
            "test": ClassRows(train.rows - 1, train.counts),
        },
        options,
    )


@pytest.mark.parametrize("weight", [None, 0.0, 0.8, 1.0])
@pytest.mark.parametrize("versions", [1, 3])
def test_heads(weight, versions):
    """Ragged classes, augmented versions, weighted rows."""
    family = head_family(HeadOptions(3, 2, 4, weight), versions)
    check_family(family)
    tasks = family.tasks("test", 0, 5, 1)
    support = family.support_features(tasks)
    assert support.shape == (5, 3, 2, 6)
    assert torch.equal(tasks.condition[..., :-1], support.mean(2))
    assert tasks.train["row"].shape == (5, 3 * 7)  # every image that all classes have
    assert set(tasks.support["row"][0].tolist()) <= set(tasks.train["row"][0].tolist())
    assert not set(tasks.support["row"][0].tolist()) & set(tasks.query["row"][0].tolist())
    if weight is not None:
        shares = tasks.train["weight"][0].view(3, 7)
        assert float(shares.sum()) == pytest.approx(1)
        assert float(shares[:, :2].sum()) == pytest.approx(weight)


def test_training_images_alone_have_versions():
    family = head_family(versions=3)
    assert len(family._versions(family.tasks("train", 0, 2, 0).train["row"])) == 3
    assert len(family._versions(family.tasks("test", 0, 2, 0).train["row"])) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (HeadOptions(5, 1, 1), ("--task.ways = 5", "4 classes of the train split")),
        (HeadOptions(2, 3, 5), ("--task.shots 3", "--task.queries 5", "8", "7 images")),
    ],
)
def test_what_cannot_be_drawn(options, words):
    message = error_of(head_family, options)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (HeadOptions(ways=1), "ways = 1: expected at least 2"),
        (HeadOptions(shots=0), "shots = 0: expected at least 1"),
        (HeadOptions(queries=-1), "queries = -1: expected at least 1"),
        (HeadOptions(support_loss_weight=2.0), "support-loss-weight = 2.0: expected 0 to 1"),
        (HeadOptions(shots=2.0), "shots = 2.0: expected an integer, found float"),
        (DrawingOptions(augmentation=-1), "augmentation = -1: expected 0 or more"),
    ],
)
def test_options_out_of_range(options, words):
    assert f"--task.{words}" in error_of(bounds.check, options, "--task.")


def test_features_that_are_not_finite():
    rows = torch.randn(12, 3)
    rows[7, 1] = float("nan")
    part = ClassRows(rows, torch.tensor([6, 6]))
    assert "features of the train split" in error_of(HeadFamily, {"train": part}, HeadOptions(2, 1, 1))


def test_numbers_of_numpy_become_plain():
    found = bounds.check(HeadOptions(np.int64(3), support_loss_weight=np.float32(0.5)))
    assert type(found.ways) is int
    assert type(found.support_loss_weight) is float


# --- modules ---


def network(norm=False):
    torch.manual_seed(0)
    layers = [nn.Linear(2, 4), *([nn.LayerNorm(4)] if norm else []), nn.Tanh(), nn.Linear(4, 1)]
    return nn.Sequential(*layers)


def draw(split, start, count, seed):
    parts = {name: [] for name in ("a", "x", "query")}
    for number in range(start, start + count):
        key = np.random.SeedSequence((seed, number, ("train", "val", "test").index(split)))
        g = torch.Generator().manual_seed(int(key.generate_state(1)[0]))
        parts["a"].append(torch.randn(2, generator=g))
        parts["x"].append(torch.randn(8, 2, generator=g))
        parts["query"].append(torch.randn(5, 2, generator=g))
    a, x, query = (torch.stack(part) for part in parts.values())

    def data(x):
        return {"x": x, "y": torch.tanh((x * a[:, None]).sum(-1, keepdim=True))}

    return TaskBatch(a[:, None], data(x), data(query), data(x))


def mse(net, data):
    return F.mse_loss(net(data["x"]), data["y"])


@pytest.mark.parametrize("select", [None, ["0"], lambda name: name.endswith("bias")])
@pytest.mark.parametrize("norm", [False, True])
def test_any_module(select, norm):
    family = ModuleFamily(network(norm), draw, mse, select=select)
    check_family(family)


def test_trajectories_of_a_module_are_torch_s():
    """Adam + SAM + decay of every task for itself, by torch.optim."""
    net = network(norm=True).double()
    family = ModuleFamily(net, draw, mse)
    family._initial = family._initial.double()
    tasks = draw("train", 0, 3, 0)
    data = {name: value.double() for name, value in tasks.train.items()}
    config = PrepareConfig(steps=6, learning_rate=0.03, rho=0.1, weight_decay=0.01, start_std=0.0)
    found = family.trajectories(data, config, 2, torch.Generator())
    for b in range(3):
        one = {name: value[b] for name, value in data.items()}
        theta = family._initial.clone().requires_grad_()
        optimizer, kept = torch.optim.Adam([theta], lr=0.03), []

        def slope(at, one=one):
            at = at.detach().requires_grad_()
            value = family.loss(at, one) + 0.005 * at.square().sum()
            return torch.autograd.grad(value, at)[0]

        for step in range(6):
            g = slope(theta)
            theta.grad = slope(theta + 0.1 * g / g.norm())
            optimizer.step()
            if step in (2, 5):
                kept.append(theta.detach().clone())
        torch.testing.assert_close(found[b], torch.stack(kept), rtol=1e-10, atol=1e-12)


class Broken(ModuleFamily):
    """With one fault of a family."""

    fault = ""

    def tasks(self, split, start, count, seed):
        if self.fault == "batches":
            made = super().tasks(split, 0, count, seed)
            return made
        return super().tasks(split, start, count, 0 if self.fault == "seed" else seed)

    def gradient(self, theta, data, step=0):
        found = super().gradient(theta, data, step)
        return {"gradient": 1.1, "padding": 1.0}.get(self.fault, 1.0) * found + (self.fault == "padding")

    def start(self, count, config, generator):
        made = super().start(count, config, generator)
        return made + 1 if self.fault == "start" else made

    def baselines(self):
        return {"mine": lambda tasks: torch.zeros(2, 1, 1)} if self.fault == "baseline" else {}


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("batches", "task 2 of seed 7 has another support"),
        ("seed", "seeds 7 and 8 give the same"),
        ("gradient", "gradient on train: off from autograd"),
        ("padding", "gradient on train"),
        ("start", "start: padding is not 0"),
        ("baseline", "baselines['mine']: [2, 1, 1]"),
    ],
)
def test_check_family_names_the_fault(fault, words):
    family = Broken(network(), draw, mse, tokens="unit")  # which has padding
    check_family(family)
    family.fault = fault
    assert words in error_of(check_family, family)


def test_a_large_network_has_a_token_a_unit():
    shapes = [ModuleFamily(nn.Linear(width, 256), draw, mse).layout.mask.shape for width in (255, 256)]
    assert shapes == [(1, 2**16), (256, 257)]


# --- the door ---


@pytest.mark.parametrize("name", ["mnist", "", "Omniglot", "../omniglot", "__init__"])
def test_an_unknown_dataset_names_those_there_are(name):
    message = error_of(find_family, name)
    assert f"{name!r}" in message
    for family in BUILT_IN:
        assert family in message


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("no_such_module:waves", "cannot import it"),
        ("mine:absent", "cannot import it"),
        ("mine:number", "its options are <class 'int'>"),
        ("mine:demanding", "options of Demanding without a default"),
        ("mine:nothing", "gave NoneType, expected a mcdi_fast.tasks.TaskFamily"),
    ],
)
def test_what_is_no_family(tmp_path, monkeypatch, place, words):
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\n"
        "@dataclass\nclass Demanding:\n    x: int\n"
        "def number(options: int): pass\n"
        "def demanding(options: Demanding): pass\n"
        "def nothing(): pass\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    sys.modules.pop("mine", None)
    message = error_of(lambda: find_family(place).family(None, Setup()))
    assert place in message
    assert words in message


def test_built_in_families_have_options_with_defaults():
    for name in BUILT_IN:
        entry = find_family(name)
        assert dataclasses.is_dataclass(entry.options)
        assert bounds.check(entry.config()).dataset == name


def test_class_images():
    images = ClassImages(np.zeros((3, 4, 28, 28), np.uint8))
    assert (images.num_classes, images.images_per_class) == (3, 4)


def test_help_shows_the_options_of_that_family_alone(capsys, monkeypatch):
    for name, own, others in (
        ("waves", "--task.points", "--task.ways"),
        ("glyphs", "--task.backbone.views", "--task.points"),
        (f"{__name__}:lines", "--task.slope", "--task.ways"),
    ):
        with pytest.raises(SystemExit):
            train.main(["--dataset", name, "--help"])
        text = capsys.readouterr().out
        assert own in text
        assert others not in text
        assert "--meta.steps" in text


@dataclasses.dataclass(frozen=True)
class LineOptions:
    """Of the family below."""

    slope: float = 1.0
    """What the condition is multiplied by."""


@register(lambda config: dataclasses.replace(config, seed=3))
def lines(options: LineOptions):
    """A family of one's own."""

    def scaled(*which):
        tasks = draw(*which)
        return dataclasses.replace(tasks, condition=options.slope * tasks.condition)

    return ModuleFamily(network(), scaled, mse, fingerprint=str(options.slope))


SMALL = (
    "--prepare.tasks 30 --prepare.steps 6 --prepare.learning-rate 0.02 --meta.steps 20 --meta.meta-batch 4 "
    "--meta.checkpoint-every 10 --denoiser.width 8 --evaluate.tasks 8 --evaluate.validation-tasks 6 --evaluate.finetune-steps 2 4"
).split()


def test_a_family_of_one_s_own_through_the_door(tmp_path, capsys):
    """By name from the command and handed over: the same bank, resume, report and pictures."""
    options = [*SMALL, "--dataset", f"{__name__}:lines", "--task.slope", "2", "--run-dir", str(tmp_path / "a")]
    assert train.main(options) == 0
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert report["config"]["seed"] == 3
    assert set(report["methods"]) == {
        "local-consistency",
        "finetune",
        "finetune-decay",
        "bank-mean",
        "nearest-task",
        "trained-target",
    }
    assert report["metric"] == {"name": "loss", "unit": "", "higher_is_better": False, "factor": 1.0}
    assert report["methods"]["finetune"]["steps"] in (2, 4)
    assert report["methods"]["trained-target"]["mean"] < report["methods"]["bank-mean"]["mean"]
    for plot in ("learning", "methods", "steps", "norms", "chains"):
        assert (tmp_path / "a" / f"{plot}.png").stat().st_size > 1000
    shards = [path.read_bytes() for path in sorted((tmp_path / "a" / "bank").glob("shard*"))]
    assert train.main(options) == 0  # again: nothing changes
    assert train.main([*options, "--task.slope", "3"]) == 2
    assert "task.slope (2.0, now 3.0)" in capsys.readouterr().err

    entry = find_family(f"{__name__}:lines")
    config = cli.parse(lambda _: (TrainConfig[LineOptions], entry.config()), "x", options)
    config = dataclasses.replace(config, run_dir=tmp_path / "b")
    train.train(config, family=lines(LineOptions(2.0)))
    assert [path.read_bytes() for path in sorted((tmp_path / "b" / "bank").glob("shard*"))] == shards
    other = json.loads((tmp_path / "b" / "report.json").read_text())
    assert other["methods"]["local-consistency"]["mean"] == report["methods"]["local-consistency"]["mean"]

    net = network()  # another start is another bank: nothing is mixed
    with torch.no_grad():
        net[0].bias += 0.1
    other = ModuleFamily(net, draw, mse, fingerprint="2.0")
    assert "module_weights" in error_of(train.train, config, family=other)


def test_waves():
    for options in (WaveOptions(), WaveOptions(5, 4, 3, 2, 0.1, "gaussian"), WaveOptions(width=1, start="random")):
        check_family(WaveFamily(options))
    family = WaveFamily(WaveOptions(width=8, start_steps=20))
    tasks = family.tasks("val", 0, 50, 0)
    before = family.trajectories(tasks.support, FEW, 1, torch.Generator())[:, -1]
    family.meta_learn(Setup())
    after = family.trajectories(tasks.support, FEW, 1, torch.Generator())[:, -1]
    assert family.scores(after, tasks.query).mean() < 0.9 * family.scores(before, tasks.query).mean()
    check_family(family)
    gaussian = WaveFamily(WaveOptions(width=4, start="gaussian"))
    gaussian.find_reference(FEW)
    check_family(gaussian)


def test_the_report_of_waves_has_its_pictures(tmp_path):
    config = find_family("waves").config()
    config = dataclasses.replace(
        config,
        run_dir=tmp_path / "run",
        task=WaveOptions(width=4, start_steps=2),
        prepare=dataclasses.replace(config.prepare, tasks=8, steps=6),
        meta=dataclasses.replace(config.meta, steps=4, meta_batch=4),
        denoiser=dataclasses.replace(config.denoiser, width=8),
        evaluate=dataclasses.replace(
            config.evaluate,
            tasks=5,
            validation_tasks=3,
            finetune_steps=(2,),
            finetune_lrs=(0.01,),
            finetune_decays=(0.01,),
        ),
    )
    folder = train.train(config)
    text = (folder / "report.md").read_text()
    for name in ("waves.png", "networks.png"):
        assert f"]({name})" in text
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_what_points_say_of_a_wave():
    """The family's waves have two dimensions, so three points without noise say all; noise costs as much as least squares on the sines."""
    for points, noise, most in ((3, 0.0, 0.02), (10, 0.3, 0.05)):
        family = WaveFamily(WaveOptions(points=points, noise=noise))
        tasks = family.tasks("test", 0, 200, 0)
        expected = family.prior.posterior(tasks.support["x"][..., 0], tasks.support["y"][..., 0])
        assert float((expected - tasks.train["y"][..., 0]).square().mean()) < most
        torch.testing.assert_close(expected[:, None, ::4].float(), tasks.condition)


@pytest.mark.parametrize("depth", [1, 3])
def test_align_undoes_permutations_and_signs_and_keeps_the_function(depth):
    family = WaveFamily(WaveOptions(width=7, depth=depth))
    weights = family.layout.unpack(family._initial)
    names, moved = list(weights), dict(weights)
    generator = torch.Generator().manual_seed(0)
    for layer in range(0, 2 * depth, 2):
        order = torch.randperm(7, generator=generator)
        sign = torch.randint(2, (7,), generator=generator) * 2.0 - 1
        weight, bias, following = names[layer : layer + 3]
        moved[weight], moved[bias] = moved[weight][order] * sign[:, None], moved[bias][order] * sign
        moved[following] = moved[following][:, order] * sign
    points = family.layout.pack(moved).expand(1, 2, -1, -1)
    query = family.tasks("val", 0, 1, 0).query
    found = align(points, family.layout, family._initial, odd=True)
    torch.testing.assert_close(family.scores(found[:, 0], query), family.scores(points[:, 1], query))
    if depth == 1:  # with more layers the way there is greedy
        torch.testing.assert_close(found[0, 1], family._initial)
    assert float((found * family._initial).sum()) > 2 * float((points * family._initial).sum())
    plain = align(points, family.layout, family._initial)
    torch.testing.assert_close(family.scores(plain[:, 0], query), family.scores(points[:, 0], query))


def test_align_says_what_it_cannot_do():
    family = WaveFamily(WaveOptions(width=3))
    assert "expected [B, k, 1, 10]" in error_of(align, family._initial[None], family.layout, family._initial)
    layout = WeightLayout.from_module(nn.Conv1d(2, 3, 3))
    zero = torch.zeros(layout.mask.shape)
    assert "no linear layer" in error_of(align, zero[None, None], layout, zero)


# --- photographs ---


def feature_file(folder, classes=(8, 5, 5), per_class=9):
    """Features that are never negative, as behind a ReLU, of classes in three splits."""
    rng = np.random.default_rng(0)
    total = sum(classes)
    rows = np.abs(rng.normal(size=(total, 1, 12))) + 0.5 * np.abs(rng.normal(size=(total, per_class, 12)))
    splits = np.repeat(["train"] * classes[0] + ["val"] * classes[1] + ["test"] * classes[2], per_class)
    path = folder / "features.npz"
    np.savez(
        path,
        features=rows.reshape(-1, 12).astype(np.float32),
        labels=np.repeat(np.arange(total), per_class),
        splits=splits,
    )
    return path


def photos(path, **changes):
    entry = find_family("tiny-imagenet")
    options = dataclasses.replace(entry.options(), source=str(path), ways=3, queries=4, components=8, **changes)
    return entry.family(options, Setup())


@pytest.mark.parametrize("shots", [1, 3])
def test_photos(tmp_path, shots):
    """Differences from the class prior's head: 0 is that head; flipped components are the same task in other features."""
    family = photos(feature_file(tmp_path), shots=shots)
    check_family(family)
    tasks = family.tasks("train", 0, 6, 0)
    plain = {name: value for name, value in tasks.train.items() if name != "flip"}
    recipe = PrepareConfig(steps=4, learning_rate=0.05)
    found, expected = (
        family.trajectories(data, recipe, 2, torch.Generator().manual_seed(0)) for data in (tasks.train, plain)
    )
    assert torch.equal(found * tasks.train["flip"].unsqueeze(1), expected)
    assert torch.equal(tasks.condition * tasks.train["flip"], family.condition(family.support_features(tasks)))
    assert (tasks.train["flip"][..., -1] == 1).all()
    assert len({tuple(flip.flatten().tolist()) for flip in tasks.train["flip"]}) > 3
    test = family.tasks("test", 0, 40, 0)
    zero = torch.zeros(40, *family.layout.mask.shape)
    base = (family.support_features(test), test.query, family.scores(zero, test.query))
    assert torch.equal(family.scores(family.baselines()["class-prior"](test), test.query), base[2])
    prototype = family.heads(family.baselines()["nearest-prototype"](test), test.support)
    torch.testing.assert_close(prototype, prototype_head(base[0]), rtol=1e-3, atol=1e-4)
    family.save(tmp_path)
    assert ClassPrior.load(tmp_path / "class-prior.safetensors").fingerprint == family.prior.fingerprint
    assert Projection.load(tmp_path / "projection.safetensors").fingerprint == family.projection.fingerprint
    assert base[2].mean() > 0.6


def test_photos_of_another_data_set(tmp_path):
    (tmp_path / "other").mkdir()
    source, target = feature_file(tmp_path), feature_file(tmp_path / "other", (4, 0, 0), 12)
    family = photos(source, target=str(target))
    check_family(family)
    assert family.provenance()["source"]["test"] != photos(source).provenance()["source"]["test"]


def test_photos_without_splits(tmp_path):
    path = tmp_path / "features.npz"
    np.savez(path, features=np.random.rand(20, 4).astype(np.float32), labels=np.arange(20) % 4)
    assert "no train split; expected classes split into train, val and test" in error_of(photos, path)


@pytest.mark.parametrize("across", [False, True])
def test_a_domain_is_held_out(tmp_path, across):
    """Training never sees it; a task lies in one domain, or its query in another one than its support."""
    rng = np.random.default_rng(0)
    labels, domains = (grid.repeat(12) for grid in np.indices((5, 4)).reshape(2, -1))
    rows = rng.normal(size=(5, 12))[labels] + 3 * rng.normal(size=(4, 12))[domains] + rng.normal(size=(240, 12))
    path, names = tmp_path / "features.npz", ["ink", "paint", "chalk", "neon"]
    np.savez(path, features=rows.astype(np.float32), labels=labels, domains=np.array(names)[domains])
    entry = find_family("pacs")
    options = dataclasses.replace(
        entry.options(), source=str(path), ways=3, queries=3, components=8, across=across, held_out="paint"
    )
    family = entry.family(options, Setup())
    check_family(family)
    where = torch.cdist(family.projection(torch.from_numpy(rows).float()), family._features)

    def places(split, part):
        data = getattr(family.tasks(split, 0, 30, 0), part)
        found = where[:, data["row"]].argmin(0)
        return torch.from_numpy(labels)[found], torch.from_numpy(domains)[found]

    for split in ("train", "val", "test"):
        (label, shown), (asked, seen) = places(split, "support"), places(split, "query")
        assert torch.equal(label.repeat_interleave(3, 1), asked)
        assert all(len(row.unique()) == 1 for row in (*shown, *seen))
        assert bool((shown[:, 0] != seen[:, 0]).all()) == across
        assert set(seen.flatten().tolist()) == ({1} if split == "test" else {0, 2, 3})
        assert set(shown.flatten().tolist()) == ({1} if split == "test" and not across else {0, 2, 3})
    assert not set(family.splits["train"].rows.sum(1).tolist()) & set(family.splits["val"].rows.sum(1).tolist())
    bad = dataclasses.replace(options, held_out="glass")
    assert "not among the domains" in error_of(entry.family, bad, Setup())
    assert "0 domains, expected at least" in error_of(
        entry.family, dataclasses.replace(options, source=str(feature_file(tmp_path))), Setup()
    )


def digit_data(each=60):
    g = torch.Generator().manual_seed(0)
    domain, digit = (part.flatten() for part in torch.meshgrid(torch.arange(3), torch.arange(10), indexing="ij"))
    rows = torch.randint(0, 256, (len(digit), each, 32, 32, 3), generator=g, dtype=torch.uint8).flatten(0, 1)
    labels, domains = (part.repeat_interleave(each) for part in (digit, domain))
    return LabelledRows.of(rows, labels, domains=domains, domain_names=("mnist", "mnist_m", "usps"))


def test_digit_networks():
    """Pairs and domains of the splits do not meet; the base alone is the start with a ridge head; too few images are refused by name."""
    family = DigitFamily(digit_data(), NetworkOptions(width=4, start_steps=2))
    check_family(family)
    pairs = {
        split: {tuple(pair) for pair in family._pairs[rows].tolist()} for split, rows in digit_networks._PAIRS.items()
    }
    assert sum(len(found) for found in pairs.values()) == len(set().union(*pairs.values())) == 45
    before = family._initial.clone()
    family.meta_learn(Setup())
    assert not torch.equal(family._initial, before)
    tasks = family.tasks("train", 0, 3, 0)
    base = tasks.support["base"]
    *_, weight, bias = (found := family.layout.unpack(base))
    for name, tensor in family.layout.unpack(family._initial).items():
        assert name in (weight, bias) or torch.equal(found[name], tensor.expand_as(found[name]))
    assert torch.equal(found[weight][:, 0], -found[weight][:, 1])
    head = torch.cat([found[weight][:, 0], found[bias][:, :1]], 1)
    torch.testing.assert_close(tasks.condition[:, 0, :33], F.normalize(head, dim=1))
    assert family.score(torch.zeros_like(base[0]), {name: value[0] for name, value in tasks.support.items()}) > 0.5
    assert "expected 40" in error_of(DigitFamily, digit_data(39), NetworkOptions())
