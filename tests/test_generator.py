import copy
import json
import math
import os

import pytest
import torch
from helpers import error_of
from torch import nn

from mcdi_fast import store
from mcdi_fast.config import DiffusionConfig
from mcdi_fast.denoiser import denoise, init_parameters
from mcdi_fast.diffusion import OBJECTIVES
from mcdi_fast.generator import WeightGenerator
from mcdi_fast.normalizer import Normalizer
from mcdi_fast.weights import WeightLayout

LAYOUT = WeightLayout.from_module(nn.Linear(4, 3))  # N = 3, D = 5
C, H, L = 6, 8, 2


def make(diffusion=None, layout=LAYOUT, seed=0, rows=None, **changes):
    """A generator with no parameter at zero."""
    diffusion = diffusion or DiffusionConfig(steps=7)
    g = torch.Generator().manual_seed(seed)
    shapes = init_parameters(layout.width, C + layout.position_width, diffusion.steps, H, L, 0)
    phi = {name: torch.randn(value.shape, generator=g) / len(value) ** 0.5 for name, value in shapes.items()}
    rows = rows or layout.num_tokens

    def normalizer(width):
        return Normalizer(torch.randn(rows, width, generator=g), torch.rand(rows, width, generator=g) + 0.5)

    parts = {
        "phi": phi,
        "layout": layout,
        "normalizer": normalizer(layout.width),
        "condition_normalizer": normalizer(C),
        "diffusion": diffusion,
        "provenance": {"git": "abc", "seed": seed, "nested": {"list": [1, 2.5, None, "é"]}},
    }
    return WeightGenerator(**parts | changes)


def edit(folder, change):
    """Change config.json in place (or by what `change` returns)."""
    path = folder / "config.json"
    data = json.loads(path.read_text())
    result = change(data)
    path.write_text(json.dumps(data if result is None else result))


def rewrite(folder, change, kind="generator", meta=None):
    """Change the tensors of model.safetensors in place."""
    tensors, found = store.load_tensors(folder / "model.safetensors", "generator")
    tensors = {name: value.clone() for name, value in tensors.items()}
    change(tensors)
    store.save_tensors(folder / "model.safetensors", tensors, found if meta is None else meta, kind)


@pytest.fixture
def folder(tmp_path):
    make().save_pretrained(tmp_path / "generator")
    return tmp_path / "generator"


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("rows", [None, 1])
def test_round_trip_is_bit_exact(tmp_path, objective, rows):
    diffusion = DiffusionConfig(9, 4, objective, 0.7 + 1e-16 + 1 / 3e5, 0.1 / 3)
    generator = make(diffusion, rows=rows)
    generator.save_pretrained(tmp_path / "deep" / "er")
    assert sorted(os.listdir(tmp_path / "deep" / "er")) == ["config.json", "model.safetensors"]
    again = WeightGenerator.from_pretrained(str(tmp_path / "deep" / "er"))
    assert again.phi.keys() == generator.phi.keys()
    for name, value in generator.phi.items():
        assert torch.equal(again.phi[name], value)
    for name in ("normalizer", "condition_normalizer"):
        for part in ("mean", "std"):
            assert torch.equal(getattr(getattr(again, name), part), getattr(getattr(generator, name), part))
    assert again.layout == generator.layout
    assert again.diffusion == generator.diffusion
    assert again.provenance == generator.provenance
    assert again.condition_width == C
    assert again.objective.name == objective
    for name in ("alpha", "abar", "abar_segment"):
        assert torch.equal(getattr(again.schedule, name), getattr(generator.schedule, name))
    condition, x = torch.randn(2, 3, C), torch.randn(2, 3, 5)
    for t in (0, 4, 8):
        assert torch.equal(again.f(condition)(x, t), generator.f(condition)(x, t))
    again.save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "deep" / "er" / name).read_bytes()


def test_f_is_skip_x_plus_scale_net():
    generator = make()
    condition, x = torch.randn(2, 3, C), torch.randn(2, 3, 5)
    normal = generator.network_condition(condition)
    for t in range(7):
        for b in range(2):
            net = denoise(generator.phi, x[b][None], torch.tensor([t]), normal[b])[0]
            expected = generator.objective.skip[t] * x[b].double() + generator.objective.scale[t] * net.double()
            torch.testing.assert_close(generator.f(condition)(x, t)[b].double(), expected, rtol=1e-5, atol=1e-5)


def test_leftovers_of_a_killed_save_are_removed(folder):
    leftover, other = folder / ".model.safetensors.0123abcd.tmp", folder / ".notes.0123abcd.tmp"
    leftover.write_bytes(b"half")
    other.write_bytes(b"")
    make().save_pretrained(folder)
    assert not leftover.exists()
    assert other.exists()


def test_saving_over_another_generator(folder):
    other = make(DiffusionConfig(steps=5), seed=3)
    other.save_pretrained(folder)
    assert torch.equal(WeightGenerator.from_pretrained(folder).phi["in.token"], other.phi["in.token"])


def test_saving_what_json_cannot_hold_leaves_the_old_generator(folder):
    for provenance in ({"x": math.nan}, {"x": object()}):
        assert "config.json" in error_of(make(seed=4, provenance=provenance).save_pretrained, folder)
        assert WeightGenerator.from_pretrained(folder).provenance["seed"] == 0


def test_saving_where_it_is_not_possible(tmp_path):
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in error_of(make().save_pretrained, tmp_path / "file")
    assert str(tmp_path / "file") in error_of(make().save_pretrained, tmp_path / "file" / "deeper")


# --- loading ---


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_empty_and_truncated(folder, name):
    path = folder / name
    data = path.read_bytes()
    for size in (len(data) - 5, len(data) // 2, 7, 0):
        path.write_bytes(data[:size])
        assert str(path) in error_of(WeightGenerator.from_pretrained, folder)
    path.write_bytes(b"\xff" * 100)
    assert str(path) in error_of(WeightGenerator.from_pretrained, folder)
    path.unlink()
    assert str(path) in error_of(WeightGenerator.from_pretrained, folder)
    path.mkdir()
    assert str(path) in error_of(WeightGenerator.from_pretrained, folder)


def test_no_such_folder(tmp_path):
    assert str(tmp_path / "none") in error_of(WeightGenerator.from_pretrained, tmp_path / "none")
    assert "\\n" in error_of(WeightGenerator.from_pretrained, tmp_path / "two\nlines")


@pytest.mark.parametrize("value", ["bank", None, 3])
def test_another_kind(folder, value):
    edit(folder, lambda data: data.__setitem__("kind", value))
    assert str(folder / "config.json") in error_of(WeightGenerator.from_pretrained, folder)


@pytest.mark.parametrize("value", [[], "generator", None, 3, {}])
def test_a_configuration_that_is_none(folder, value):
    (folder / "config.json").write_text(json.dumps(value))
    assert str(folder / "config.json") in error_of(WeightGenerator.from_pretrained, folder)


@pytest.mark.parametrize("value", [0, 3, "1", 2.0, True, None, [2]])
def test_another_format(folder, value):
    edit(folder, lambda data: data.__setitem__("format", value))
    message = error_of(WeightGenerator.from_pretrained, folder)
    assert str(folder / "config.json") in message
    assert repr(value) in message


def test_a_model_of_another_kind(folder):
    rewrite(folder, lambda tensors: None, kind="backbone")
    message = error_of(WeightGenerator.from_pretrained, folder)
    assert str(folder / "model.safetensors") in message
    assert "'backbone'" in message


@pytest.mark.parametrize(
    "other",
    [
        {"diffusion": DiffusionConfig(steps=8)},
        {"diffusion": DiffusionConfig(steps=7, segments=2)},
        {"diffusion": DiffusionConfig(steps=7, objective="vanilla")},
        {"diffusion": DiffusionConfig(steps=7, beta_start=0.79)},
        {"layout": WeightLayout.from_module(nn.Linear(5, 3))},
        {"layout": WeightLayout.from_module(nn.Linear(4, 2))},
        {"layout": WeightLayout.from_module(nn.Sequential(nn.Linear(4, 3)))},
    ],
)
def test_swapped_files(folder, tmp_path, other):
    """Also where every shape fits: another schedule would give wrong weights without a word."""
    make(**other).save_pretrained(tmp_path / "other")
    for name in ("config.json", "model.safetensors"):
        mixed = tmp_path / f"with-{name}"
        mixed.mkdir()
        for file in ("config.json", "model.safetensors"):
            source = tmp_path / "other" if file == name else folder
            (mixed / file).write_bytes((source / file).read_bytes())
        message = error_of(WeightGenerator.from_pretrained, mixed)
        assert str(mixed) in message
        assert "different generators" in message


def sign(folder):
    """Give the model the digest of the configuration as it is: an attacker can."""
    from mcdi_fast.generator import _digest

    config = json.loads((folder / "config.json").read_text())
    rewrite(folder, lambda tensors: None, meta={"config": _digest(config)})


@pytest.mark.parametrize(
    "change",
    [
        *({"steps": value} for value in (0, -1, 7.0, True, "7", None, [7], 8, 10**12, 1e400)),
        *({"segments": value} for value in (0, -1, 3.0, True, "3", None, 8, 10**12)),
        *({"objective": value} for value in ("local", "", None, 3, ["vanilla"])),
        *({"beta_start": value} for value in (0.0, 1.0, 1.5, -0.5, 0.001, 1, "0.8", None, True)),
        *({"beta_end": value} for value in (0.0, 0.9, -0.1, 0, "0.01", None, [0.01])),
        {"unknown": 1},
        {"two\nlines": 1},
        {"steps": 10**6, "segments": 10**6},
    ],
)
def test_malformed_diffusion(folder, change):
    edit(folder, lambda data: data["diffusion"].update(change))
    assert str(folder / "config.json") in error_of(WeightGenerator.from_pretrained, folder)
    sign(folder)
    assert str(folder) in error_of(WeightGenerator.from_pretrained, folder)


@pytest.mark.parametrize("name", ["steps", "window", "carry"])
def test_a_missing_setting_of_the_diffusion_is_not_guessed(folder, name):
    edit(folder, lambda data: data["diffusion"].__delitem__(name))
    sign(folder)
    message = error_of(WeightGenerator.from_pretrained, folder)
    assert str(folder / "config.json") in message
    assert name in message


@pytest.mark.parametrize("key", ["diffusion", "layout", "condition_width", "provenance"])
def test_a_missing_or_malformed_entry(folder, key):
    good = (folder / "config.json").read_text()
    edit(folder, lambda data: data.pop(key))
    assert str(folder / "config.json") in error_of(WeightGenerator.from_pretrained, folder)
    for value in (None, [], "text", 3, [["a", 1]]):
        (folder / "config.json").write_text(good)
        edit(folder, lambda data, value=value: data.__setitem__(key, value))
        assert str(folder) in error_of(WeightGenerator.from_pretrained, folder)
        if key == "layout":
            sign(folder)
            assert "layout" in error_of(WeightGenerator.from_pretrained, folder)


def test_an_edited_provenance_is_free(folder):
    edit(folder, lambda data: data["provenance"].__setitem__("note", "mine"))
    assert WeightGenerator.from_pretrained(folder).provenance["note"] == "mine"


NAMES = [
    *(f"phi.{name}" for name in init_parameters(1, 1, 1, 1, L, 0)),
    "normalizer.mean",
    "normalizer.std",
    "condition_normalizer.mean",
    "condition_normalizer.std",
]


@pytest.mark.parametrize("name", NAMES)
def test_malformed_tensors(folder, name):
    good = (folder / "model.safetensors").read_bytes()

    def spoil(value, position=0):
        value = value.clone()
        value.view(-1)[position] = math.nan
        return value

    for change in (
        None,
        spoil,
        lambda value: spoil(value, -1),
        lambda value: value / 0,
        lambda value: value.double(),
        lambda value: value.half(),
        lambda value: value.long(),
        lambda value: value[:-1],
        lambda value: value[:, 1:],
        lambda value: value[:, :0],
        lambda value: value[:0],
        lambda value: value.new_zeros(10**9, 0),  # declares much, holds nothing
        lambda value: value[0, 0],
        lambda value: value[0],
        lambda value: value[None],
    ):
        (folder / "model.safetensors").write_bytes(good)
        if change is None:
            rewrite(folder, lambda tensors: tensors.pop(name))
        else:
            rewrite(folder, lambda tensors, change=change: tensors.__setitem__(name, change(tensors[name])))
        assert str(folder) in error_of(WeightGenerator.from_pretrained, folder)


def test_a_nan_is_named(folder):
    rewrite(folder, lambda tensors: tensors["phi.block1.token"].view(-1)[5:6].fill_(math.nan))
    message = error_of(WeightGenerator.from_pretrained, folder)
    assert "block1.token" in message
    assert "NaN" in message


def test_more_tensors_than_there_should_be(folder):
    for name in ("phi.block2.out", "phi.x.out", "phi.more"):
        good = (folder / "model.safetensors").read_bytes()
        rewrite(folder, lambda tensors, name=name: tensors.__setitem__(name, torch.zeros(8, 8)))
        assert str(folder) in error_of(WeightGenerator.from_pretrained, folder)
        (folder / "model.safetensors").write_bytes(good)


# --- parts that do not fit each other ---


def test_parts_that_do_not_fit():
    good = make()
    ones = torch.ones(3, 5)
    assert "normalizer" in error_of(make, normalizer=Normalizer(ones[:2].cumsum(0), ones[:2]))
    assert "normalizer" in error_of(make, normalizer=Normalizer(ones[:, :4], ones[:, :4]))
    two = torch.ones(2, C).cumsum(0)
    assert "condition_normalizer" in error_of(make, condition_normalizer=Normalizer(two, two))
    wide = torch.ones(3, C + 1)
    assert "in.condition" in error_of(make, condition_normalizer=Normalizer(wide, wide))
    for diffusion, word in (
        (DiffusionConfig(steps=8), "sample"),
        (DiffusionConfig(steps=2), "k = 3"),
        (DiffusionConfig(steps=7, beta_end=0.9), "beta_end"),
        (DiffusionConfig(steps=7, objective="x"), "'x'"),
    ):
        assert word in error_of(make, phi=good.phi, diffusion=diffusion)
    for name in good.phi:
        phi = copy.copy(good.phi)
        del phi[name]
        assert "parameter" in error_of(make, phi=phi)
    assert "parameter" in error_of(make, phi={})
    message = error_of(make, phi=good.phi | {"in.token": good.phi["in.token"].double()})
    assert "'in.token' is torch.float64 [5, 8], expected torch.float32 [5, 8]" in message


def test_parameters_changed_in_place_are_seen():
    """`f` keeps products of the parameters from call to call."""
    generator = make()
    tokens, width = generator.layout.num_tokens, generator.layout.width
    condition, x = torch.randn(2, tokens, generator.condition_width), torch.randn(2, tokens, width)
    before = generator.f(condition)(x, 1)
    assert torch.equal(generator.f(condition)(x, 1), before)
    for value in generator.phi.values():
        value.mul_(0.5)
    after = generator.f(condition)(x, 1)
    assert not torch.equal(after, before)
    assert torch.equal(copy.deepcopy(generator).f(condition)(x, 1), after)


def test_repr_is_one_line():
    text = repr(make())
    assert text == (
        "WeightGenerator(3 tokens of width 5 from conditions of width 6: local-consistency, T = 7, k = 3, 7 sampling steps, 648 parameters)"
    )


def test_equal_are_those_that_write_the_same():
    one = make()
    assert one == make()
    assert one == make(provenance={})
    assert one == copy.deepcopy(one)
    assert one != "generator"
    nudged = make()
    nudged.phi["out.token"].view(-1)[0] += 1e-6
    others = (
        nudged,
        make(seed=1),
        make(DiffusionConfig(steps=7, beta_end=0.02)),
        make(layout=WeightLayout.from_module(nn.Linear(4, 2))),
        make(normalizer=Normalizer(torch.zeros(3, 5), torch.ones(3, 5))),
        make(phi=init_parameters(5, C + 3, 7, H, 1, 0)),
    )
    for other in others:
        assert one != other
    with pytest.raises(TypeError, match="unhashable"):
        hash(one)


def as_format_1(folder, **diffusion):
    """What the version before this one wrote: positions and the residual were no entries."""

    def older(data):
        data["format"] = 1
        del data["layout"]["exchangeable"], data["diffusion"]["residual"]
        data["diffusion"] |= diffusion

    edit(folder, older)
    sign(folder)


def test_format_1_is_read_as_it_was_trained(tmp_path):
    """Without positions, whatever the layout; a row a token in the normalisers, all alike."""
    layout = WeightLayout.from_module(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)))  # 5 tokens, some of them padded
    older = WeightLayout(layout.entries, exchangeable=True)
    mean = torch.randn(1, 5).expand(5, -1)
    parts = {"normalizer": Normalizer(mean.masked_fill(~layout.mask, 0), torch.ones(5, 5))}
    parts["condition_normalizer"] = Normalizer(torch.randn(1, C).expand(5, -1).contiguous(), torch.ones(5, C))
    one = make(layout=older, **parts)
    one.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["format"] == 2
    as_format_1(tmp_path)
    two = WeightGenerator.from_pretrained(tmp_path)
    assert two == one
    assert two.diffusion.residual == "scaled"
    condition, x = torch.randn(2, 5, C), torch.randn(2, 5, 5)
    assert torch.equal(one.f(condition)(x, 3), two.f(condition)(x, 3))


@pytest.mark.parametrize("objective", ["vanilla", "naive-local"])
def test_format_1_of_a_wrong_scale_is_refused_by_name(tmp_path, objective):
    make(
        DiffusionConfig(7, objective=objective), layout=WeightLayout(LAYOUT.entries, exchangeable=True)
    ).save_pretrained(tmp_path)
    as_format_1(tmp_path)
    message = error_of(WeightGenerator.from_pretrained, tmp_path)
    assert f"objective {objective!r} of format 1" in message
    assert "train it again" in message


def test_its_own_number_of_sampling_steps(tmp_path):
    """Kept in the file and by `to`; an older file without it takes T; a number that no chain has is refused."""
    generator = make(num_steps=4)
    generator.save_pretrained(tmp_path)
    again = WeightGenerator.from_pretrained(tmp_path)
    assert again == generator
    assert again.num_steps == 4
    assert "4 sampling steps" in repr(again)
    assert generator != make()
    assert make().num_steps is None
    assert "sampling steps = 8: expected 3" in error_of(make, num_steps=8)
    edit(tmp_path, lambda config: config.pop("num_steps") and None)
    assert "edited" in error_of(WeightGenerator.from_pretrained, tmp_path)
    make().save_pretrained(tmp_path)
    edit(tmp_path, lambda config: config.update(num_steps="4"))
    assert error_of(WeightGenerator.from_pretrained, tmp_path)
