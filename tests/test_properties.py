"""Any input works, and rightly, or gives this project's own one-line error: never a traceback from the depths, never a silent wrong result.

1,350 cases of hypothesis in all, the same in every run; what they found is kept in the tests of the module concerned.
"""

import contextlib
import json
import math
import struct
import typing
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from mcdi_fast import (
    DenoiserConfig,
    DiffusionConfig,
    GeneratedWeights,
    McdiError,
    MetaConfig,
    Sampler,
    TrajectoryBank,
    WeightGenerator,
    WeightLayout,
    fit,
    store,
    train,
)
from mcdi_fast.denoiser import init_parameters
from mcdi_fast.meta import MetaTrainer
from mcdi_fast.normalizer import Normalizer
from mcdi_fast.tasks import find_family


def cases(count):
    return settings(
        max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )


@contextlib.contextmanager
def ours():
    """Inside, nothing but an McdiError of one line may be raised; it ends the case."""
    message = "one line"
    try:
        yield
    except McdiError as error:
        message = str(error)
    else:
        return
    assert "\n" not in message
    assert len(message) > 10


# --- configurations ---

WHOLE = st.sampled_from([-(2**63), -1, 0, 1, 2, 3, 4, 7, 20, 2**31, 2**70])
REAL = st.sampled_from(
    [-math.inf, -1.0, -0.0, 0.0, 1e-300, 1e-3, 0.01, 0.5, 0.8, 1.0, 2.0, 1e30, 1e300, math.inf, math.nan]
)
OF_TYPE = {int: WHOLE, float: REAL, float | None: st.none() | REAL, int | None: st.none() | WHOLE}


@cases(300)
@given(st.data())
def test_any_settings_of_the_main_job_are_checked(data):
    """One to four settings of the command line at once, of any number: accepted or refused by name before any work."""
    config = find_family("glyphs").config()
    for _ in range(data.draw(st.integers(1, 4))):
        group = data.draw(st.sampled_from(["task", "prepare", "diffusion", "denoiser", "meta", "evaluate"]))
        part = getattr(config, group)
        hints = typing.get_type_hints(type(part))
        name = data.draw(st.sampled_from([name for name, kind in hints.items() if kind in OF_TYPE]))
        value = data.draw(OF_TYPE[hints[name]])
        config = replace(config, **{group: replace(part, **{name: value})})
    with ours():
        train.check_config(config)


LAYOUT = WeightLayout.from_module(nn.Linear(2, 2))


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    bank = TrajectoryBank.create(tmp_path_factory.mktemp("bank"), LAYOUT, 2, 2)
    g = torch.Generator().manual_seed(0)
    bank.append(torch.randn(6, 2, 2, 3, generator=g), torch.randn(6, 2, 2, generator=g))
    return bank


GOOD = {
    "meta": {
        "steps": st.integers(1, 3),
        "meta_batch": st.integers(1, 3),
        "inner_steps": st.integers(1, 3),
        "samples": st.integers(1, 2),
        "inner_lr": st.sampled_from([1e-3, 0.05]),
        "outer": st.sampled_from(["adam", "reptile"]),
        "outer_lr": st.sampled_from([1e-3, 0.1]),
        "ema": st.sampled_from([0.0, 0.9]),
        "on_bad_step": st.sampled_from(["stop", "skip"]),
    },
    "diffusion": {
        "steps": st.integers(2, 6),
        "segments": st.just(2),
        "objective": st.sampled_from(["local-consistency", "vanilla", "naive-local"]),
        "beta_start": st.sampled_from([0.8, 0.5]),
        "beta_end": st.sampled_from([0.01, 1e-6]),
    },
    "denoiser": {"width": st.integers(1, 5), "depth": st.integers(1, 2)},
}
BAD = {
    "int": [-1, 0, 2**70],
    "float": [-1.0, 0.0, 1.0, 1e25, 1e-300, math.nan, math.inf],
    "str": ["", "none"],
}


@cases(150)
@given(
    st.fixed_dictionaries({group: st.fixed_dictionaries(fields) for group, fields in GOOD.items()}),
    st.sampled_from([0, 1, 2**31 - 1]) | st.sampled_from([2**32, -1, 2**80]),
    st.none() | st.sampled_from([(group, name) for group, fields in GOOD.items() for name in fields]),
    st.data(),
)
def test_any_training_is_the_oracle_s_or_refused(bank, parts, seed, spoil, data):
    """`fit` at random sizes: refused, or the same as plain autograd's loop, and finite."""
    if spoil and spoil[1] not in ("meta_batch", "samples", "inner_steps", "width", "depth"):
        group, name = spoil
        kind = type(parts[group][name]).__name__
        parts[group][name] = data.draw(st.sampled_from(BAD[kind][: 2 if name == "steps" and group == "meta" else None]))
    elif spoil:
        parts[spoil[0]][spoil[1]] = data.draw(st.sampled_from([-1, 0]))
    meta, diffusion, denoiser = (
        MetaConfig(**parts["meta"]),
        DiffusionConfig(**parts["diffusion"]),
        DenoiserConfig(**parts["denoiser"]),
    )
    with ours():
        generator = fit(bank, meta, diffusion, denoiser, seed=seed)
        expected = MetaTrainer(bank, meta, diffusion, denoiser, seed, impl="reference")
        for _ in range(meta.steps):
            expected.outer_step()
        for name, value in expected.generator().phi.items():
            assert generator.phi[name].isfinite().all()
            # where a gradient is zero, Adam takes a step of its rate in the direction of whatever rounding left
            slack = 2.1 * meta.outer_lr * meta.steps if meta.outer == "adam" else 0
            torch.testing.assert_close(generator.phi[name], value, rtol=1e-4, atol=1e-5 * max(1, meta.outer_lr) + slack)
        weights = Sampler(generator).sample(torch.ones(2, 2), [3, 4])
        assert weights.tokens.shape == (2, 2, 3)
        assert weights.tokens.isfinite().all()


# --- layouts of any module ---

LEAF = st.one_of(
    st.builds(nn.Linear, st.integers(1, 4), st.integers(1, 4), st.booleans()),
    st.builds(
        lambda i, o, k, bias: nn.Conv2d(i, o, k, bias=bias),
        st.integers(1, 3),
        st.integers(1, 3),
        st.integers(1, 3),
        st.booleans(),
    ),
    st.builds(lambda o, k: nn.Conv1d(o, 2 * o, k, groups=o), st.integers(1, 3), st.integers(1, 3)),
    st.builds(lambda i, o: nn.ConvTranspose2d(i, o, 2), st.integers(1, 3), st.integers(1, 3)),
    st.builds(nn.LayerNorm, st.lists(st.integers(1, 3), min_size=1, max_size=2)),
    st.builds(lambda n, affine: nn.BatchNorm2d(n, affine=affine), st.integers(1, 4), st.booleans()),
    st.builds(lambda n: nn.GroupNorm(n, 2 * n), st.integers(1, 3)),
    st.builds(nn.Embedding, st.integers(1, 5), st.integers(1, 4)),
    st.builds(nn.GRUCell, st.integers(1, 3), st.integers(1, 3)),
    st.builds(nn.PReLU, st.integers(1, 3)),
    st.builds(nn.Bilinear, st.integers(1, 2), st.integers(1, 2), st.integers(1, 3)),
    st.just(nn.Tanh()),
)
MODULE = st.recursive(
    LEAF, lambda inner: st.lists(inner, min_size=1, max_size=3).map(lambda ms: nn.Sequential(*ms)), max_leaves=5
)


@cases(300)
@given(MODULE, st.data())
def test_any_module_goes_into_tokens_and_back(module, data):
    """Whole or in part: packing and loading give the bits back, in JSON too, and what is not selected is not touched."""
    names = [name for name, _ in module.named_parameters()]
    parts = [name for name, _ in module.named_modules() if name]
    select = data.draw(st.none() | st.lists(st.sampled_from([*names, *parts, "nothing.here"]), max_size=3))
    with ours():
        layout = WeightLayout.from_module(module, select, buffers=False)
        assert WeightLayout.from_dict(json.loads(json.dumps(layout.to_dict()))) == layout
        before = {name: value.detach().clone() for name, value in module.named_parameters()}
        tokens = layout.pack(module)
        assert tokens.shape == layout.mask.shape
        assert int(layout.mask.sum()) == sum(before[name].numel() for name in layout.names)
        assert not tokens[~layout.mask].any()
        weights = GeneratedWeights(layout, torch.stack([tokens, -tokens]).detach())
        weights.load_into(module, 1)
        for name, value in module.named_parameters():
            assert torch.equal(value, -before[name] if name in layout.names else before[name])
        assert all(torch.equal(value, before[name]) for name, value in weights.state_dict(0).items())


# --- shapes and dtypes ---

SHAPE = st.lists(st.sampled_from([0, 1, 2, 3, 5]), max_size=5)
DTYPE = st.sampled_from(
    [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64]
)


def make_generator():
    one = Normalizer(torch.zeros(1, 3), torch.ones(1, 3)), Normalizer(torch.zeros(1, 2), torch.ones(1, 2))
    return WeightGenerator(
        init_parameters(3, 2 + LAYOUT.position_width, 6, 4, 1, 0), LAYOUT, *one, DiffusionConfig(6, 3)
    )


GENERATOR = make_generator()


@cases(300)
@given(
    shape=SHAPE | st.sampled_from([[2, 2], [2, 2, 2], [1, 2], [3, 2, 2]]),
    dtype=DTYPE | st.just(torch.float32),
    seeds=st.lists(st.sampled_from([0, 1, 2**64 - 1, -1, 2**64, 0.5, "1", None]), max_size=3)
    | st.sampled_from([[0, 1], [5]]),
    steps=st.sampled_from([None, None, 0, 3, 4, 6, 7]),
    noise=st.sampled_from([0.0, 0.0, 0.5, 1.0, -0.1, math.nan]),
    call=st.sampled_from(["sample", "tokens", "pack", "gather", "normalize", "append"]),
)
def test_any_shape_and_dtype(bank, shape, dtype, seeds, steps, noise, call):
    tensor = torch.zeros(shape, dtype=dtype)
    with ours():
        if call == "sample":
            weights = Sampler(GENERATOR).sample(tensor, seeds, num_steps=steps, eta_noise=noise)
            assert weights.tokens.shape == (shape[0], 2, 3)
            assert weights.tokens.isfinite().all()
            assert len(seeds) == shape[0]
        elif call == "tokens":
            weights = GeneratedWeights(LAYOUT, tensor)
            out = weights.functional_call(nn.Linear(2, 2), torch.ones(len(weights), 4, 2))
            assert out.shape == (shape[0], 4, 2)
        elif call == "pack":
            assert LAYOUT.pack_batch({"weight": tensor, "bias": torch.zeros(shape[:-1], dtype=dtype)}).shape[-2:] == (
                2,
                3,
            )
        elif call == "gather":
            targets, _ = bank.gather(tensor)
            assert targets.shape == (shape[0], 2, 2, 3)
        elif call == "normalize":
            assert GENERATOR.normalizer.normalize(tensor).shape == tensor.shape
        else:
            before = len(bank)
            bank.append(tensor, tensor)
            assert len(bank) == before


# --- files ---


@pytest.fixture(scope="module")
def files(tmp_path_factory, bank):
    """Good files of every kind: folder, file in it, and what reads the folder."""
    folder = tmp_path_factory.mktemp("files")
    GENERATOR.save_pretrained(folder / "generator")
    again = TrajectoryBank.create(folder / "bank", LAYOUT, 2, 2)
    again.append(*bank.gather(torch.arange(6)))

    def read_bank(place):
        found = TrajectoryBank.open(place)
        found.check_finite()
        if len(found):
            found.gather(torch.tensor([len(found) - 1]))

    def read_generator(place):
        found = WeightGenerator.from_pretrained(place)
        condition = torch.zeros(1, found.layout.num_tokens, found.condition_width)
        assert Sampler(found).sample(condition, [0]).tokens.numel()

    good = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    return good, {folder / "generator": read_generator, folder / "bank": read_bank}


@cases(300)
@given(st.data())
def test_any_damage_to_a_file_is_seen_or_harmless(files, data):
    """Bytes flipped, cut, put in, a number in JSON or in a header replaced by any other."""
    good, readers = files
    path = data.draw(st.sampled_from(list(good)))
    content = bytearray(good[path])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(len(content) - 1, 0)))
        kind = data.draw(st.sampled_from(["flip", "cut", "insert", "number", "length"]))
        if kind == "flip" and content:
            content[at] ^= data.draw(st.integers(1, 255))
        elif kind == "cut":
            del content[at : at + data.draw(st.integers(1, 2**12))]
        elif kind == "insert":
            content[at:at] = data.draw(
                st.binary(max_size=8) | st.sampled_from([b"[" * 5000, b"1e999", b"null", b'"', b"{}"])
            )
        elif kind == "number":
            digits = [i for i, byte in enumerate(content[:4096]) if chr(byte).isdigit()]
            if digits:
                where = data.draw(st.sampled_from(digits))
                content[where : where + 1] = data.draw(
                    st.sampled_from([b"0", b"-1", b"9" * 25, b"1.5", b"true", b"1e5"])
                )
        elif len(content) >= 8:
            content[:8] = struct.pack("<Q", data.draw(st.sampled_from([0, 1, 2**20, 2**40, 2**63, 2**64 - 1])))
    path.write_bytes(content)
    try:
        with ours():
            readers[path.parent](path.parent)
        if path.suffix == ".json":
            with ours():
                store.read_json(path)
    finally:
        path.write_bytes(good[path])
