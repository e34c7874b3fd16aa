import contextlib
import copy
import json
import warnings

import numpy as np
import pytest
import torch
from helpers import error_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mcdi_fast import normalizer
from mcdi_fast.errors import McdiError
from mcdi_fast.generated import GeneratedWeights
from mcdi_fast.normalizer import Normalizer
from mcdi_fast.weights import LayoutEntry, WeightLayout


class TiedMLP(nn.Module):
    """Embedding and output layer share one weight."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.hidden = nn.Linear(4, 4)
        self.out = nn.Linear(4, 7)
        self.out.weight = self.embedding.weight

    def forward(self, x):
        return self.out(torch.relu(self.hidden(self.embedding(x))))


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return self.linear(x) * self.scale


def cnn():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 2, 2),
        nn.GroupNorm(1, 2),
        nn.Flatten(),
        nn.Linear(2 * 5 * 5, 3),
    )


MODULES = {
    "linear": (lambda: nn.Linear(4, 3), (3, 5), lambda b: torch.randn(b, 6, 4)),
    "no bias": (lambda: nn.Linear(4, 3, bias=False), (3, 4), lambda b: torch.randn(b, 6, 4)),
    "conv and norm": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)),
        (4 + 2, 19),
        lambda b: torch.randn(b, 2, 2, 5, 6),
    ),
    "embedding": (lambda: nn.Embedding(6, 3), (6, 3), lambda b: torch.randint(6, (b, 4))),
    # Conv 4 tokens, norm 2, transposed convolution 4 + bias of another length 1, norm 2, linear 3 of width 51
    "cnn": (cnn, (4 + 2 + 5 + 2 + 3, 51), lambda b: torch.randn(b, 2, 1, 6, 6)),
    "tied": (TiedMLP, (7 + 4 + 1, 7), lambda b: torch.randint(7, (b, 5))),
    "scalar": (Scale, (1 + 2, 4), lambda b: torch.randn(b, 3)),
    "lstm": (lambda: nn.LSTM(3, 2), (8, 3 + 2 + 1 + 1), None),
    "attention": (lambda: nn.MultiheadAttention(4, 2), (12 + 4, 5), None),
}


def random_parameters(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


pytestmark = pytest.mark.filterwarnings("ignore:.*running_mean. is not generated")


@pytest.fixture(params=MODULES)
def case(request):
    torch.manual_seed(0)
    make, size, inputs = MODULES[request.param]
    return random_parameters(make()), size, inputs


def test_sizes_mask_and_owner(case):
    module, size, _ = case
    layout = WeightLayout.from_module(module)
    assert (layout.num_tokens, layout.width) == size
    assert sum(p.numel() for p in module.parameters()) == int(layout.mask.sum())
    assert layout.owner.shape == (layout.num_tokens,)
    for i, entry in enumerate(layout.entries):
        mine = layout.mask[layout.owner == i]
        assert mine.shape[0] == entry.rows
        assert torch.equal(mine.sum(1), torch.full((entry.rows,), entry.width))
        assert mine[:, : entry.width].all()


def test_round_trip_by_module_and_state_dict(case):
    module, _, _ = case
    layout = WeightLayout.from_module(module)
    tokens = layout.pack(module)
    assert torch.equal(tokens, layout.pack(module.state_dict()))
    assert not tokens[~layout.mask].any()
    found = layout.unpack(tokens)
    expected = dict(module.named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(layout.pack(found), tokens)
    assert all(part.untyped_storage().data_ptr() == tokens.untyped_storage().data_ptr() for part in found.values())


def test_json_round_trip(case):
    layout = WeightLayout.from_module(case[0])
    again = WeightLayout.from_dict(json.loads(json.dumps(layout.to_dict())))
    assert again == layout
    assert hash(again) == hash(layout)
    again.check_module(case[0])


def test_load_into_and_functional_call(case):
    module, _, inputs = case
    module.eval()
    layout = WeightLayout.from_module(module)
    generated = GeneratedWeights(layout, torch.randn(3, layout.num_tokens, layout.width))
    assert len(generated) == 3
    target = copy.deepcopy(module)
    before = layout.pack(module).detach().clone()
    x = inputs(3) if inputs else None
    together = generated.functional_call(module, x) if inputs else None
    assert torch.equal(layout.pack(module), before)
    for i in range(3):
        generated.load_into(target, i)
        assert torch.equal(layout.pack(target)[layout.mask], generated.tokens[i][layout.mask])
        other = copy.deepcopy(module)
        other.load_state_dict(generated.state_dict(i), strict=False)
        assert torch.equal(layout.pack(other), layout.pack(target))
        if inputs:
            torch.testing.assert_close(together[i], target(x[i]))


def test_a_linear_row_is_weights_then_bias():
    module = nn.Linear(3, 2)
    tokens = WeightLayout.from_module(module).pack(module)
    assert torch.equal(tokens, torch.cat([module.weight, module.bias[:, None]], 1))


def test_convolution_row_is_one_filter_and_a_norm_is_two_tokens():
    module = random_parameters(nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3)))
    layout = WeightLayout.from_module(module)
    tokens = layout.pack(module)
    assert torch.equal(tokens[1, :8], module[0].weight[1].flatten())
    assert tokens[1, 8] == module[0].bias[1]
    assert torch.equal(tokens[3, :3], module[1].weight)
    assert torch.equal(tokens[4, :3], module[1].bias)
    assert layout.names == ("0.weight", "0.bias", "1.weight", "1.bias")


def test_tied_weights_stand_once_and_load_into_both():
    module = TiedMLP()
    layout = WeightLayout.from_module(module)
    assert layout.names.count("embedding.weight") == 1
    assert "out.weight" not in layout.names
    GeneratedWeights(layout, torch.ones(1, layout.num_tokens, layout.width)).load_into(module, 0)
    assert module.out.weight is module.embedding.weight
    assert (module.out.weight == 1).all()
    # by its other name alone
    alias = WeightLayout.from_module(module, ["out"])
    assert alias.names == ("out.weight", "out.bias")
    alias.check_module(module)
    shared = nn.ModuleDict({"a": nn.Linear(2, 2)})
    shared["b"] = shared["a"]
    assert WeightLayout.from_module(shared).names == ("a.weight", "a.bias")
    assert WeightLayout.from_module(shared, ["b"]).names == ("b.weight", "b.bias")


def test_select():
    module = nn.ModuleDict({"head": nn.Linear(2, 3), "header": nn.Linear(2, 2), "body": nn.Sequential(nn.Linear(2, 2))})

    def names(select):
        return WeightLayout.from_module(module, select).names

    assert names(["head"]) == ("head.weight", "head.bias")  # a dotted prefix: "header" is another module
    assert names(("body.0", "head.bias")) == ("head.bias", "body.0.weight", "body.0.bias")
    assert names(["body"]) == ("body.0.weight", "body.0.bias")
    assert names(lambda name: name.endswith("bias")) == ("head.bias", "header.bias", "body.0.bias")
    assert len(names(None)) == 6
    assert WeightLayout.from_module(module, ["head.bias"]).num_tokens == 1
    for unknown in ("hea", "head.weigh", "", "head.", "body.1", 3):
        assert f"{unknown!r} matches no parameter" in error_of(names, ["head", unknown])
    assert "write ['head']" in error_of(names, "head")
    assert "no parameter selected" in error_of(names, [])
    assert "no parameter selected" in error_of(names, lambda name: False)
    assert "no parameters" in error_of(WeightLayout.from_module, nn.ReLU())


def test_parameters_that_cannot_be_taken():
    class Odd(nn.Module):
        def __init__(self, tensor):
            super().__init__()
            self.odd = nn.Parameter(tensor, requires_grad=False)

    assert "'odd' is torch.int64" in error_of(WeightLayout.from_module, Odd(torch.ones(2, dtype=torch.int64)))
    assert "'odd' is torch.complex64" in error_of(WeightLayout.from_module, Odd(torch.ones(2, dtype=torch.complex64)))
    assert "no element" in error_of(WeightLayout.from_module, Odd(torch.ones(0, 3)))
    assert "'weight' is not initialised" in error_of(WeightLayout.from_module, nn.LazyLinear(3))
    mixed = Odd(torch.ones(2, dtype=torch.int64))
    mixed.linear = nn.Linear(2, 2)
    assert WeightLayout.from_module(mixed, ["linear"]).num_tokens == 2


def test_check_module_names_the_tensor():
    layout = WeightLayout.from_module(nn.Sequential(nn.Linear(4, 3)))
    message = error_of(layout.check_module, nn.Sequential(nn.Linear(4, 5)))
    assert "'0.weight' has shape [5, 4], expected [3, 4]" in message
    assert "no parameter '0.bias'" in error_of(layout.check_module, nn.Sequential(nn.Linear(4, 3, bias=False)))
    generated = GeneratedWeights(layout, torch.zeros(2, 3, 5))
    wrong = nn.Sequential(nn.Linear(4, 3, bias=False))
    before = wrong[0].weight.detach().clone()
    assert "'0.bias'" in error_of(generated.load_into, wrong, 0)
    assert torch.equal(wrong[0].weight, before)
    assert "'0.bias'" in error_of(generated.functional_call, wrong, torch.zeros(2, 4))


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(1, 4), max_size=4), min_size=1, max_size=5),
    lead=st.lists(st.integers(0, 3), max_size=2),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_any_shapes_round_trip_bit_exactly(shapes, lead, dtype, seed):
    module = nn.ParameterDict({f"p{i}": torch.zeros(shape, dtype=dtype) for i, shape in enumerate(shapes)})
    layout = WeightLayout.from_module(module)
    assert WeightLayout.from_dict(layout.to_dict()) == layout
    generator = torch.Generator().manual_seed(seed)
    state = {
        f"p{i}": torch.randn((*lead, *shape), generator=generator, dtype=torch.float64).to(dtype)
        for i, shape in enumerate(shapes)
    }
    tokens = layout.pack_batch(state)
    assert tokens.dtype == dtype
    assert tokens.shape == (*lead, layout.num_tokens, layout.width)
    found = layout.unpack(tokens)
    assert all(torch.equal(found[name], state[name]) for name in state)
    assert not tokens[..., ~layout.mask].any()


def test_mixed_dtypes_promote_and_come_back_bit_exactly():
    module = nn.Sequential(nn.Linear(3, 2).bfloat16(), nn.Linear(2, 2).double(), nn.Linear(2, 2).half())
    layout = WeightLayout.from_module(module)
    tokens = layout.pack(module)
    assert tokens.dtype == torch.float64
    assert layout.pack(module, torch.float32).dtype == torch.float32
    target = copy.deepcopy(module)
    for parameter in target.parameters():
        nn.init.zeros_(parameter)
    GeneratedWeights(layout, tokens[None].detach()).load_into(target, 0)
    for a, b in zip(module.parameters(), target.parameters(), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_packing_and_unpacking_are_differentiable():
    layout = WeightLayout.from_module(nn.Linear(3, 2))
    tokens = torch.randn(4, 2, 4, dtype=torch.float64, requires_grad=True)
    x = torch.randn(4, 5, 3, dtype=torch.float64)
    module = nn.Linear(3, 2).double()
    assert torch.autograd.gradcheck(lambda t: GeneratedWeights(layout, t).functional_call(module, x), (tokens,))
    assert torch.autograd.gradcheck(lambda t: layout.pack_batch(layout.unpack(t)), (tokens,))


def test_functional_call_with_part_of_a_module_and_with_dropout():
    module = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    layout = WeightLayout.from_module(module, ["2"])
    generated = GeneratedWeights(layout, torch.randn(3, 2, 9))
    x = torch.randn(1, 5, 3).expand(3, 5, 3)
    module(x[0])
    out = generated.functional_call(module, x)  # drawn for each task
    assert out.shape == (3, 5, 2)
    module.eval()
    for i, one in enumerate(generated.functional_call(module, x)):
        other = copy.deepcopy(module)
        generated.load_into(other, i)
        torch.testing.assert_close(one, other(x[i]))


def test_generated_weights_errors_and_copies():
    layout = WeightLayout.from_module(nn.Linear(4, 3))
    tokens = torch.randn(2, 3, 5)
    generated = GeneratedWeights(layout, tokens)
    for i in (-1, 2, 99):
        for call in (generated.state_dict, lambda i: generated.load_into(nn.Linear(4, 3), i)):
            assert f"task {i}: out of range, expected 0 to 1" in error_of(call, i)
    for i in (0.0, "0", None):
        assert f"task {i!r}: " in error_of(generated.state_dict, i)
    for wrong in (tokens[0], tokens[..., 1:], tokens[:, 1:], tokens.long(), [[[1.0] * 5] * 3], None):
        assert "tokens" in error_of(GeneratedWeights, layout, wrong)
    assert "expected [2, ...]" in error_of(generated.functional_call, nn.Linear(4, 3), torch.zeros(3, 4))
    assert "expected [2, ...]" in error_of(generated.functional_call, nn.Linear(4, 3), torch.tensor(0.0))
    state = generated.state_dict(0)
    before = tokens.clone()
    state["weight"].zero_()
    assert torch.equal(tokens, before)
    assert all(t.is_contiguous() for t in state.values())
    norm = nn.BatchNorm1d(3)
    layout = WeightLayout.from_module(norm)
    generated = GeneratedWeights(layout, torch.randn(2, 2, 3))
    assert "call module.eval() first" in error_of(generated.functional_call, norm, torch.randn(2, 4, 3))
    assert generated.functional_call(norm.eval(), torch.randn(2, 4, 3)).shape == (2, 4, 3)


def test_generated_weights_are_a_sequence_of_state_dicts():
    layout = WeightLayout.from_module(nn.Linear(4, 3))
    tokens = torch.randn(3, 3, 5)
    generated = GeneratedWeights(layout, tokens)
    for states in (list(generated), [generated[i] for i in (np.int64(0), 1, 2)], list(reversed(generated))[::-1]):
        assert torch.equal(layout.pack_batch(states), tokens)
    assert torch.equal(generated[-1]["bias"], tokens[2, :, 4])
    part = generated[1:]
    assert len(part) == 2
    assert torch.equal(part[0]["bias"], tokens[1, :, 4])
    for i in (3, -4, 1.0):
        assert "task " in error_of(generated.__getitem__, i)
    assert torch.equal(GeneratedWeights(layout, tokens.numpy()).tokens, tokens)


def test_packing_takes_arrays_and_lists():
    module = nn.Linear(4, 3)
    layout = WeightLayout.from_module(module)
    modules = [nn.Linear(4, 3) for _ in range(4)]
    expected = torch.stack([layout.pack(each) for each in modules])
    states = [each.state_dict() for each in modules]
    arrays = {name: np.stack([state[name].numpy() for state in states]) for name in states[0]}
    arrays["weight"] = arrays["weight"][::-1]
    arrays["weight"].flags.writeable = False
    for source in (modules, states, tuple(states), [states[0], modules[1], states[2], modules[3]]):
        assert torch.equal(layout.pack_batch(source), expected)
    found = layout.pack_batch(arrays)
    assert torch.equal(found[..., :4], expected[..., :4].flip(0))
    assert torch.equal(found[..., 4], expected[..., 4])
    nested = layout.pack_batch([states[:2], states[2:]])  # tasks, segments
    assert torch.equal(nested, expected.reshape(2, 2, 3, 5))
    stacked = {name: value.expand(2, *value.shape) for name, value in states[0].items()}
    assert torch.equal(layout.pack_batch([stacked])[0, 1], expected[0])
    assert layout.pack({name: value.astype(np.float64)[0] for name, value in arrays.items()}).dtype == torch.float64
    mixed = layout.pack_batch([nn.Linear(4, 3).double(), modules[0]])
    assert mixed.dtype == torch.float64
    for wrong in ([], [states, states[0]], [states[:2], states[:1]]):
        assert "state dicts" in error_of(layout.pack_batch, wrong)
    assert "'weight' is missing" in error_of(layout.pack, {0: expected})
    for wrong in (None, "weights", 3, [3], expected):
        assert "expected a module or a dict" in error_of(layout.pack_batch, wrong)
    assert "'weight' is of type list" in error_of(layout.pack, {"weight": [[1.0]], "bias": [0.0]})
    assert "'weight' is of type ndarray" in error_of(layout.pack, {"weight": np.array("text")})
    assert "torch.int64" in error_of(layout.pack, {"weight": np.zeros((3, 4), int)})


def test_other_default_dtypes_and_devices():
    layout = WeightLayout.from_module(nn.Linear(300, 600))
    expected = layout.position(), layout.mask, layout.owner
    state = nn.Linear(300, 600).state_dict()
    tokens = layout.pack(state)
    stats = Normalizer.fit(tokens[None, None], layout.mask)
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        again = WeightLayout.from_dict(layout.to_dict())
        found = again.position(), again.mask, again.owner, again.pack(state)
        twice = Normalizer.fit(tokens[None, None], again.mask)
        out = GeneratedWeights(again, tokens[None])
        out.load_into(nn.Linear(300, 600), 0)
        called = out.functional_call(nn.Linear(300, 600), torch.ones(1, 2, 300, device="cpu"))
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    for one, other in zip((*expected, tokens, stats.mean, stats.std), (*found, twice.mean, twice.std), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    assert called.shape == (1, 2, 600)


def test_state_dict_errors():
    layout = WeightLayout.from_module(nn.Linear(4, 3))
    good = {"weight": torch.ones(2, 3, 4), "bias": torch.ones(2, 3), "more": torch.ones(1)}
    assert layout.pack_batch(good).shape == (2, 3, 5)
    for change, expected in (
        ({"bias": torch.ones(3, 3)}, "'bias' has shape [3, 3], expected [2, 3]"),
        ({"bias": torch.ones(3)}, "'bias' has shape [3], expected [2, 3]"),
        ({"weight": torch.ones(4)}, "'weight' has shape [4], expected [3, 4]"),
        ({"weight": None}, "'weight' is missing"),
        ({"weight": torch.ones(2, 3, 4).long()}, "torch.int64"),
    ):
        assert expected in error_of(layout.pack_batch, good | change)
    assert "expected [3, 4]" in error_of(layout.pack, good)
    assert "expected [..., 3, 5]" in error_of(layout.unpack, torch.zeros(3, 4))


def test_layouts_from_strangers_are_refused():
    good = WeightLayout.from_module(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))).to_dict()

    def refused(change):
        data = copy.deepcopy(good)
        result = change(data)
        message = error_of(WeightLayout.from_dict, data if result is None or not isinstance(result, list) else result)
        assert message.startswith("layout")
        return message

    first = {"rows": 3, "names": ["0.weight", "0.bias"], "shapes": [[3, 2], [3]]}
    assert good["entries"][0] == first
    for entry in (
        first | {"rows": 2},
        first | {"rows": True},
        first | {"rows": -3},
        first | {"rows": "3"},
        first | {"rows": 2**40, "shapes": [[2**40, 2], [2**40]]},
        first | {"names": ["0.weight"]},
        first | {"names": []},
        first | {"names": [], "shapes": []},
        first | {"names": ["0.weight", "0.weight"]},
        first | {"names": ["0", "0.bias"]},
        first | {"names": ["0.weight", "1.bias"]},
        first | {"names": ["0.weight", 5]},
        first | {"names": ["0.weight", ["x"]]},
        first | {"names": ["0.weight", ""]},
        first | {"names": ["0.weight", "a..b"]},
        first | {"names": ["0.weight", "a." * 10**6]},
        first | {"names": "ab"},
        first | {"shapes": [[3, -2], [3]]},
        first | {"shapes": [[3, 0], [3]]},
        first | {"shapes": [[3, 2.0], [3]]},
        first | {"shapes": [[3, 2], [4]]},
        first | {"shapes": [[3, 2], []]},
        first | {"shapes": [[3, 2**30], [3]]},
        first | {"shapes": [[3] + [1] * 100, [3]]},
        first | {"shapes": [[3] + [2**28] * 60, [3]]},
        first | {"shapes": [3, 2]},
        first | {"shapes": None},
        {"rows": 1, "names": ["a", "b"], "shapes": [[4], [5]]},
        {},
        None,
        [],
    ):
        refused(lambda data, entry=entry: data["entries"].__setitem__(0, entry))
    for key, value in (("entries", []), ("entries", None), ("num_tokens", 4), ("width", "3"), ("width", 2)):
        assert key in refused(lambda data, key=key, value=value: data.__setitem__(key, value)) or key == "entries"
    refused(lambda data: data["entries"].append(data["entries"][0]))
    for nothing in (None, [], 3, {}, "x"):
        assert error_of(WeightLayout.from_dict, nothing).startswith("layout")


def test_a_tensor_may_be_cut_along_another_dimension():
    entry = LayoutEntry(3, ("a", "b", "c"), ((3, 2), (4, 3), (2, 2, 3)), (0, 1, 2))
    layout = WeightLayout((entry, LayoutEntry(1, ("d",), ((5,),))), exchangeable=False)
    assert (layout.num_tokens, layout.width) == (4, 2 + 4 + 4)
    state = {name: torch.randn(7, *shape) for name, shape in layout.shapes.items()}
    tokens = layout.pack_batch(state)
    assert torch.equal(tokens[:, 1, 2:6], state["b"][:, :, 1])
    assert torch.equal(tokens[:, 2, 6:], state["c"][..., 2].flatten(1))
    found = layout.unpack(tokens)
    assert all(torch.equal(found[name], state[name]) for name in state)
    assert WeightLayout.from_dict(json.loads(json.dumps(layout.to_dict()))) == layout
    head = WeightLayout((entry,), exchangeable=True)
    assert head.resized(5).shapes == {"a": (5, 2), "b": (4, 5), "c": (2, 2, 5)}
    assert head.resized(5).resized(3) == head
    plain = WeightLayout.from_module(nn.Linear(2, 3))
    assert "axes" not in plain.to_dict()["entries"][0]  # files stay as they were
    for axes in ((0, 0, 0), (0, 1), (0, 1, 3), (0, 1, -1), (0, True, 2), (0, 1.0, 2), ("0", 1, 2)):
        data = head.to_dict()
        data["entries"][0]["axes"] = list(axes)
        assert error_of(WeightLayout.from_dict, data).startswith("layout")
    for axes in (None, 1, "012", {}):
        data["entries"][0]["axes"] = axes
        assert "malformed" in error_of(WeightLayout.from_dict, data)


def test_a_huge_layout_is_refused_before_anything_is_allocated():
    wide = LayoutEntry(1, ("a",), ((2**20,),))
    long = LayoutEntry(2**20, ("b",), ((2**20, 1),))
    assert "numbers at most" in error_of(WeightLayout, (wide, long))


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 5) | st.sampled_from(["a", "a.b", "", 2**70, 1.5]),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.fixed_dictionaries({"rows": JSON_VALUES, "names": JSON_VALUES, "shapes": JSON_VALUES}), max_size=3)
    | JSON_VALUES,
    st.integers(0, 5),
    st.integers(0, 5),
)
def test_any_json_gives_a_layout_or_our_error(entries, num_tokens, width):
    with contextlib.suppress(McdiError):
        layout = WeightLayout.from_dict({"entries": entries, "num_tokens": num_tokens, "width": width})
        layout.unpack(torch.zeros(layout.num_tokens, layout.width))


# --- buffers ---


def small_cnn():
    """Two blocks of convolution and batch norm, for images of two kinds."""
    blocks = [[nn.Conv2d(i, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()] for i in (1, 8)]
    return nn.Sequential(*blocks[0], *blocks[1], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))


@pytest.fixture(scope="module")
def trained_cnns():
    """Networks of six tasks that differ in brightness and contrast: (networks, images, labels)."""
    generator = torch.Generator().manual_seed(1)
    kinds = torch.randn(2, 1, 8, 8, generator=generator)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # of some starts a network does not separate its two kinds
        start, networks = small_cnn().state_dict(), []
    brightness, contrast = 6 * torch.rand(6, generator=generator), 1 + 4 * torch.rand(6, generator=generator)
    y = torch.randint(2, (6, 256), generator=generator)
    x = kinds[y] * contrast[:, None, None, None, None] + brightness[:, None, None, None, None]
    x += 0.3 * torch.randn(x.shape, generator=generator)
    for task in range(6):
        network = small_cnn()
        network.load_state_dict(start)
        optimizer = torch.optim.Adam(network.parameters(), 0.005)
        for step in range(60):
            rows = slice(32 * (step % 4), 32 * (step % 4) + 32)
            torch.nn.functional.cross_entropy(network(x[task, rows]), y[task, rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
        networks.append(network.eval())
    return networks, x, y


def accuracies(networks, x, y):
    with torch.no_grad():
        return [
            float((net.eval()(x[i, 128:]).argmax(1) == y[i, 128:]).float().mean()) for i, net in enumerate(networks)
        ]


def loaded(layout, networks):
    weights, fresh = GeneratedWeights(layout, layout.pack_batch(networks).detach()), [small_cnn() for _ in networks]
    for i, network in enumerate(fresh):
        weights.load_into(network, i)
    return weights, fresh


def test_batch_norm_statistics_are_generated_or_estimated(trained_cnns):
    networks, x, y = trained_cnns
    own = accuracies(networks, x, y)
    assert min(own) > 0.95
    _, without = loaded(WeightLayout.from_module(small_cnn(), buffers=False), networks)
    assert sum(accuracies(without, x, y)) / 6 < 0.8  # the statistics of a fresh network
    for i, network in enumerate(without):
        torch.optim.swa_utils.update_bn([x[i, :128]], network)
    assert min(accuracies(without, x, y)) > 0.95
    layout = WeightLayout.from_module(small_cnn(), buffers=True)
    assert {name for name in layout.names if "running" in name} == {
        f"{block}.running_{kind}" for block in (1, 4) for kind in ("mean", "var")
    }
    weights, fresh = loaded(layout, networks)
    assert accuracies(fresh, x, y) == own
    together = weights.functional_call(small_cnn().eval(), x)
    torch.testing.assert_close(list(together), [net(x[i]) for i, net in enumerate(networks)])
    again = small_cnn()
    again.load_state_dict(weights[0], strict=False)
    torch.testing.assert_close(again.eval()(x[0]), together[0])
    assert WeightLayout.from_dict(layout.to_dict()) == layout


def test_a_generated_variance_is_not_negative():
    norm = nn.BatchNorm1d(2).eval()
    layout = WeightLayout.from_module(norm, buffers=True)
    tokens = torch.ones(1, 4, 2)
    tokens[0, 3] = torch.tensor([-0.5, 1.0])
    weights = GeneratedWeights(layout, tokens)
    assert torch.equal(weights[0]["running_var"], torch.tensor([0.0, 1.0]))
    assert weights.functional_call(norm, torch.ones(1, 3, 2)).isfinite().all()
    weights.load_into(norm, 0)
    assert norm(torch.ones(3, 2)).isfinite().all()


def test_a_layout_without_the_statistics_of_its_norms_warns():
    def warned(module, **options):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            WeightLayout.from_module(module, **options)
        return [str(warning.message) for warning in caught]

    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    (message,) = warned(module)
    assert "'1.running_mean'" in message
    assert "buffers=True" in message
    assert "update_bn" in message
    for select in (["0"], ["1"], ["1.bias", "2"]):
        assert warned(module, select=select)
    assert not warned(module, select=["2"])  # a head on frozen features
    assert not warned(module, buffers=True)
    assert not warned(module, buffers=False)
    assert not warned(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False)))
    assert WeightLayout.from_module(module, select=["1.running_mean"], buffers=True).num_tokens == 1
    assert "matches no parameter" in error_of(WeightLayout.from_module, module, ["1.running_mean"])


def test_buffers_that_no_state_dict_holds_or_that_count_are_left_out():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("kept", torch.zeros(3))
            self.register_buffer("cache", torch.zeros(3), persistent=False)
            self.register_buffer("count", torch.zeros(3, dtype=torch.int64))
            self.register_buffer("none", None)

    assert WeightLayout.from_module(Net(), buffers=True).names == ("kept",)


# --- positions, exchangeable tokens ---


def test_position_tells_tokens_apart():
    small = WeightLayout.from_module(cnn())
    assert torch.equal(small.position(), 4 * torch.eye(16))  # one-hot, each column's mean square 1
    assert small.position() is small.position()  # made once
    # a token in the middle of the largest entry, the only row of another, and 513 tokens: one more than is told one-hot
    large = WeightLayout.from_module(nn.Sequential(nn.Linear(2, 300), nn.LayerNorm(300), nn.Linear(300, 211)))
    assert large.num_tokens == 300 + 2 + 211
    position = large.position()
    assert position.shape == (513, 4 + 9)  # 4 entries; 299 takes 9 bits
    assert position.dtype == torch.float32
    assert len(position.unique(dim=0)) == 513
    assert torch.equal(position[:, :4].argmax(1), large.owner)
    torch.testing.assert_close(position.square().mean(0), torch.ones(13))
    assert ((position[:, :4] != 0).sum(1) == 1).all()
    assert (position[:, 4:].abs() == 1).all()
    row = ((position[:, 4:] + 1) / 2 * 2.0 ** torch.arange(9)).sum(1)
    assert torch.equal(row, torch.cat([torch.arange(300.0), torch.zeros(2), torch.arange(211.0)]))
    assert WeightLayout.from_module(nn.Linear(1, 512)).position().shape == (512, 512)
    assert WeightLayout.from_module(nn.Linear(3, 600), exchangeable=True).position().shape == (600, 0)


def test_a_position_first_asked_for_during_inference_serves_training():
    layout = WeightLayout.from_module(nn.Linear(3, 2))
    with torch.inference_mode():
        layout.position()
    weight = torch.ones(2, 2, requires_grad=True)
    (layout.position() @ weight).sum().backward()
    assert torch.equal(weight.grad, layout.position().sum(0)[:, None].expand(2, 2))


def test_exchangeable_is_kept_and_older_files_are():
    net = nn.Linear(4, 3)
    plain, head = WeightLayout.from_module(net), WeightLayout.from_module(net, exchangeable=True)
    assert not plain.exchangeable
    assert plain != head
    for layout in (plain, head):
        assert WeightLayout.from_dict(json.loads(json.dumps(layout.to_dict()))) == layout
    older = plain.to_dict()
    del older["exchangeable"]
    assert WeightLayout.from_dict(older) == head
    for wrong in (None, 1, "yes"):
        assert "exchangeable" in error_of(WeightLayout.from_dict, head.to_dict() | {"exchangeable": wrong})
    assert "exchangeable" in error_of(WeightLayout.from_module, net, exchangeable=None)


def test_resized_is_the_layout_of_another_number_of_classes():
    def of(ways, **options):
        return WeightLayout.from_module(nn.Linear(4, ways), exchangeable=True, **options)

    for ways in (1, 3, 20):
        assert of(5).resized(ways) == of(ways)
        assert of(ways).resized(np.int64(5)) == of(5)
    assert of(5, select=["bias"]).exchangeable
    for layout in (
        WeightLayout.from_module(nn.Linear(4, 5)),
        WeightLayout.from_module(cnn(), exchangeable=True),
        of(5, select=["bias"]),  # one token of five columns
    ):
        assert "can be 7 instead" in error_of(layout.resized, 7)
    for wrong in (0, -1, 2.0, 2**40, True):
        assert str(wrong) in error_of(of(5).resized, wrong)


# --- normalizer ---


def test_normalizer_statistics(monkeypatch):
    module = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2, bias=False))  # tokens of width 5 and 3
    layout = WeightLayout.from_module(module)
    torch.manual_seed(1)
    targets = torch.randn(11, 2, 5, 5) * torch.tensor([1e-3, 1.0, 1e4, 2.0, 3.0]) + torch.tensor([5.0, 0.1, 1e5, -1, 0])
    targets[..., ~layout.mask] = 99  # padding counts for nothing
    whole = Normalizer.fit(targets, layout.mask)
    monkeypatch.setattr(normalizer, "_CHUNK_ENTRIES", 1)
    by_one = Normalizer.fit(targets, layout.mask)
    torch.testing.assert_close(whole.mean, by_one.mean)
    torch.testing.assert_close(whole.std, by_one.std)
    for column in range(5):
        tokens = layout.mask[:, column]
        values = targets[:, :, tokens, column].double()
        # float32 rounding of the result
        torch.testing.assert_close(
            whole.mean[tokens, column].double(), values.mean().expand(int(tokens.sum())), rtol=1e-7, atol=0
        )
        torch.testing.assert_close(
            whole.std[tokens, column].double(), values.std(correction=0).expand(int(tokens.sum())), rtol=1e-7, atol=0
        )
    assert (whole.mean[~layout.mask] == 0).all()
    assert (whole.std[~layout.mask] == 1).all()
    padded = layout.pack_batch(layout.unpack(targets))
    normal = whole.normalize(padded)
    assert not normal[..., ~layout.mask].any()
    # mean / std is at most 5e3 here and x - mean is rounded at 2^-24 of x
    torch.testing.assert_close(whole.denormalize(normal), padded, rtol=4e-7, atol=1e-6)
    assert torch.equal(whole.to("cpu").mean, whole.mean)


def test_constant_columns_get_deviation_one():
    mask = torch.ones(3, 4, dtype=torch.bool)
    targets = torch.randn(6, 2, 3, 4)
    targets[..., 1] = 0
    targets[..., 2] = 1000.1
    targets[..., 3] = 1e6 + torch.randint(0, 2, (6, 2, 3)) * 0.0625  # one unit in the last place of float32
    found = Normalizer.fit(targets, mask)
    assert found.mean.shape == (1, 4)  # no padding: any number of tokens
    assert (found.std[:, 1:] == 1).all()
    assert (found.std[:, 0] != 1).all()
    assert found.normalize(targets).abs().max() < 10
    one = Normalizer.fit(torch.randn(1, 1, 1, 4), mask[:1])
    assert (one.std == 1).all()
    extreme = Normalizer.fit(
        torch.tensor([3e38, -3e38, 1e-42, 0.0]).reshape(2, 1, 1, 2), torch.ones(1, 2, dtype=torch.bool)
    )
    assert torch.isfinite(extreme.std).all()


def test_normalizer_errors(monkeypatch):
    mask = torch.ones(3, 4, dtype=torch.bool)
    targets = torch.randn(9, 2, 3, 4)
    monkeypatch.setattr(normalizer, "_CHUNK_ENTRIES", 4 * targets[0].numel())
    for value in (float("nan"), float("inf")):
        bad = targets.clone()
        bad[7, 1, 2, 3] = value
        assert "task 7 " in error_of(Normalizer.fit, bad, mask)
        mask_without = mask.clone()
        mask_without[2, 3] = False
        Normalizer.fit(bad, mask_without)
    for wrong in (targets[0], targets[..., 1:], targets[:0], targets[:, :0], targets.long()):
        assert "targets" in error_of(Normalizer.fit, wrong, mask)
    assert "mask" in error_of(Normalizer.fit, targets, mask.float())
    found = Normalizer.fit(targets, mask)
    assert found.normalize(targets[:, :, :2]).shape == (9, 2, 2, 4)
    assert "expected [..., N, 4]" in error_of(found.denormalize, targets[..., :2])
    padded = Normalizer.fit(targets, mask_without)
    assert "expected [..., 3, 4]" in error_of(padded.normalize, targets[:, :, :2])
    assert "expected [..., 3, 4]" in error_of(padded.denormalize, targets[..., :2])
    ones = torch.ones(1, 4)
    assert Normalizer(ones, ones).normalize(targets).shape == targets.shape
    for mean, std in (
        (ones, -ones),
        (ones, 0 * ones),
        (ones / 0, ones),
        (ones, ones / 0),
        (ones, torch.ones(2, 4)),
        (ones.double(), ones),
        (ones[0], ones[0]),
    ):
        assert "normalizer" in error_of(Normalizer, mean, std)


def test_a_normalizer_takes_numbers_with_a_point():
    normalizer = Normalizer(torch.zeros(1, 3), torch.ones(1, 3))
    for dtype in (torch.bool, torch.int64, torch.complex64):
        message = error_of(normalizer.normalize, torch.zeros(2, 3, dtype=dtype))
        assert f"tokens of {dtype}, expected floating point" in message


def test_rows_of_a_normalizer_that_are_alike_become_one():
    for rows in (torch.zeros(3, 4), torch.zeros(1, 4)):
        found = Normalizer(rows, rows + 1)
        assert found.mean.shape == found.std.shape == (1, 4)
        assert found.normalize(torch.zeros(2, 7, 4)).shape == (2, 7, 4)
    for name in ("mean", "std"):
        rows = {"mean": torch.zeros(3, 4), "std": torch.ones(3, 4)}
        rows[name][1, 2] += 1
        found = Normalizer(**rows)
        assert torch.equal(found.mean, rows["mean"])
        assert torch.equal(found.std, rows["std"])


def test_a_whole_network_as_one_token():
    """All parameters side by side, in order; back bit for bit; no classes to add, no other words."""
    net = nn.Sequential(nn.Conv2d(2, 3, 2), nn.GroupNorm(1, 3), nn.Linear(4, 5, bias=False))
    layout = WeightLayout.from_module(net, tokens="network")
    tokens = layout.pack(net)
    assert torch.equal(tokens, torch.cat([p.flatten() for p in net.parameters()])[None])
    assert layout.mask.all()
    assert layout.position_width == 1
    assert all(torch.equal(layout.unpack(tokens)[name], p) for name, p in net.named_parameters())
    assert WeightLayout.from_dict(layout.to_dict()) == layout
    assert "'layer'" in error_of(WeightLayout.from_module, net, tokens="layer")
    both = {"tokens": "network", "exchangeable": True}
    assert "network without exchangeable" in error_of(WeightLayout.from_module, net, **both)
    assert "only exchangeable tokens" in error_of(layout.resized, 2)
