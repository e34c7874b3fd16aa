"""Generated weights in modules as people have them: shared, wrapped, empty, and what torch.vmap cannot run."""

import copy
import dataclasses
import warnings

import numpy as np
import pytest
import torch
from helpers import error_of
from torch import nn
from torch.nn.utils import parametrizations, weight_norm
from torch.optim.swa_utils import AveragedModel

from mcdi_fast import GeneratedWeights, WeightLayout
from mcdi_fast.tasks.modules import ModuleFamily

TASKS = 3


def generated(module, tasks=TASKS, **options):
    layout = WeightLayout.from_module(module, **options)
    return GeneratedWeights(layout, torch.randn(tasks, layout.num_tokens, layout.width))


def snapshot(module):
    """Everything a caller can see of a module: its tensors themselves, their values, its attributes."""
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return (
        [(name, id(tensor), tensor.detach().clone()) for name, tensor in tensors],
        [{name: id(value) for name, value in vars(child).items()} for child in module.modules()],
    )


def assert_as_before(module, before):
    tensors, attributes = snapshot(module)
    assert attributes == before[1]
    for (name, address, value), (old_name, old_address, old_value) in zip(tensors, before[0], strict=True):
        assert (name, address) == (old_name, old_address)
        assert torch.equal(value, old_value)


def one_by_one(weights, module, x, make=None):
    """The oracle: a copy of the module for each task, loaded and called."""
    outputs = []
    for i in range(len(weights)):
        own = make() if make else copy.deepcopy(module)
        own.load_state_dict(module.state_dict())
        weights.load_into(own, i)
        outputs.append(own(x[i]))
    return outputs


def shared_layer():
    shared = nn.Linear(4, 4)
    return nn.Sequential(shared, nn.Tanh(), shared)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.last.weight = self.first.weight

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


class First(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)[0]


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 5)

    def forward(self, x):
        y = self.linear(x)
        return y if y.sum() > 0 else -y


class Remembers(nn.Module):
    """Keeps what it has seen, counts its calls and updates a buffer."""

    def __init__(self):
        super().__init__()
        self.linear, self.calls = nn.Linear(4, 2), 0
        self.register_buffer("total", torch.zeros(2))
        self.again = nn.Module()
        self.again.register_buffer("total", self.total)

    def forward(self, x):
        self.calls += 1
        self.last = y = self.linear(x)
        self.total += 1
        return y + self.again.total


def old_weight_norm():
    return nn.Sequential(weight_norm(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, 2))


VMAPPED = {
    "a layer that occurs twice": shared_layer,
    "two layers with one weight": Tied,
    "attributes and buffers": Remembers,
    "spectral norm in eval": lambda: parametrizations.spectral_norm(nn.Linear(4, 3)).eval(),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(4, 3)),
    "batch norm in eval": lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).eval(),
    "batch norm without statistics": lambda: nn.Sequential(
        nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False)
    ),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm")  # the old one is deprecated
@pytest.mark.parametrize("name", [*VMAPPED, "weight norm", "old weight norm"])
def test_the_module_is_left_as_it_is(name):
    torch.manual_seed(0)
    others = {"weight norm": lambda: parametrizations.weight_norm(nn.Linear(4, 3)), "old weight norm": old_weight_norm}
    make = (VMAPPED | others)[name]
    module, x = make(), torch.randn(TASKS, 6, 4)
    weights = generated(module, buffers=False)
    expected = one_by_one(weights, module, x, make)
    before = snapshot(module)
    with warnings.catch_warnings():
        warnings.simplefilter("error" if name in VMAPPED else "ignore")  # torch has a fast rule for these
        found = weights.functional_call(module, x)
    assert_as_before(module, before)
    torch.testing.assert_close(list(found), expected)
    module.state_dict()
    module(x[0])


CANNOT = {
    "LSTM": (lambda: First(nn.LSTM(5, 6, num_layers=2, batch_first=True)), "'inner' (LSTM)"),
    "GRU": (lambda: First(nn.GRU(5, 6, batch_first=True)), "'inner' (GRU)"),
    "RNN": (lambda: First(nn.RNN(5, 6, batch_first=True)), "'inner' (RNN)"),
    "LSTMCell": (lambda: nn.Sequential(First(nn.LSTMCell(5, 6))), "'0.inner' (LSTMCell)"),
    "branch": (Branch, "Branch"),
    "spectral norm in train": (lambda: parametrizations.spectral_norm(nn.Linear(5, 5)), "(_SpectralNorm)"),
    "item": (lambda: nn.Sequential(nn.Linear(5, 2), Apply(lambda y: y * y.sum().item())), "'1' (Apply)"),
}


class Apply(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize("name", CANNOT)
def test_what_vmap_cannot_run_goes_task_by_task(name):
    torch.manual_seed(0)
    make, named = CANNOT[name]
    module, x = make(), torch.randn(TASKS, 4, 7, 5)
    x = x[:, :, 0] if "Cell" in name else x
    weights = generated(module)
    module(x[0])  # a spectral norm's buffers move
    expected = one_by_one(weights, module, x)
    before = snapshot(module)
    with pytest.warns(UserWarning, match="one by one") as caught:
        found = weights.functional_call(module, x)
    (warning,) = caught
    assert named in str(warning.message)
    assert "\n" not in str(warning.message)
    assert warning.filename == __file__
    assert_as_before(module, before)
    torch.testing.assert_close(found, torch.stack(expected))


def test_task_by_task_is_differentiable():
    layout = WeightLayout.from_module(Branch().double())
    tokens = torch.randn(2, layout.num_tokens, layout.width, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    module = Branch().double()
    with pytest.warns(UserWarning, match="Branch"):
        assert torch.autograd.gradcheck(lambda t: GeneratedWeights(layout, t).functional_call(module, x), (tokens,))


def test_the_module_is_left_as_it_is_when_the_call_raises():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = Remembers(), nn.Linear(2, 2)

        def forward(self, x):
            self.left = self.linear(self.norm(x))
            raise KeyError("mine")

    module = Fails()
    weights = generated(module)
    before = snapshot(module)
    with pytest.raises(KeyError, match="mine"):  # what the module raises, not what torch.vmap says about it
        weights.functional_call(module, torch.randn(TASKS, 5, 4))
    assert_as_before(module, before)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        generated(Tied()).functional_call(Tied(), torch.randn(TASKS, 5, 7))


# --- inputs and outputs ---


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, x, mask=None, scale=1.0, double=False):
        y = self.linear(x if mask is None else x * mask) * scale
        return 2 * y if double else y


def test_inputs_as_modules_take_them():
    module = Two()
    weights = generated(module)
    x, mask = torch.randn(TASKS, 3, 4), torch.rand(TASKS, 3, 4)
    expected = []
    for i in range(TASKS):
        weights.load_into(module, i)
        expected.append(module(x[i], mask[i], 0.5))
    call = weights.functional_call
    for found in (
        call(module, (x, mask, 0.5)),
        call(module, {"x": x, "mask": mask, "scale": 0.5}),
        call(module, x, {"mask": mask, "scale": 0.5}),
        call(module, (x,), {"mask": mask, "scale": torch.full((TASKS,), 0.5)}),
        call(module, {"x": x}, {"mask": mask, "scale": 0.5}),
        call(module, (x.numpy(), mask.numpy(), 0.5)),
        call(module, (x, mask, 0.25, True)),
    ):
        torch.testing.assert_close(list(found), expected)
    for wrong in ((x, mask[:2]), {"x": x, "scale": torch.tensor(2.0)}, x[:2], {"x": x, "mask": mask[0, :1]}):
        assert "one input a task" in error_of(call, module, wrong)
    torch.testing.assert_close(
        call(module, (x, mask[:1].expand(TASKS, -1, -1))), torch.stack([call(module, (x, mask[:1].repeat(3, 1, 1)))])[0]
    )


@pytest.mark.parametrize("by_vmap", [True, False])
def test_outputs_as_modules_return_them(by_vmap):
    @dataclasses.dataclass
    class Unknown:
        y: torch.Tensor

    def outputs(y):
        if not by_vmap:
            y = y if y.sum() > 0 else -y
        return {"logits": y, "loss": None, "parts": (y.sum(), [y[0], 3, "text"]), "count": 2.5, "none": []}

    module = nn.Sequential(nn.Linear(4, 2), Apply(outputs))
    weights, x = generated(module), torch.randn(TASKS, 3, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error" if by_vmap else "ignore")
        found = weights.functional_call(module, x)
    assert (found["loss"], found["count"], found["none"], found["parts"][1][1:]) == (None, 2.5, [], [3, "text"])
    expected = one_by_one(weights, module, x)
    torch.testing.assert_close(list(found["logits"]), [each["logits"] for each in expected])
    torch.testing.assert_close(list(found["parts"][0]), [each["parts"][0] for each in expected])
    torch.testing.assert_close(list(found["parts"][1][0]), [each["parts"][1][0] for each in expected])
    module[1].function = Unknown
    assert "returns a Unknown" in error_of(weights.functional_call, module, x)
    module[1].function = lambda y: None
    assert weights.functional_call(module, x) is None


def test_outputs_that_differ_between_tasks():
    module = nn.Sequential(nn.Linear(4, 2), Apply(lambda y: y.sum().item()))
    weights, x = generated(module), torch.randn(TASKS, 3, 4)
    with pytest.warns(UserWarning, match="one by one"):
        assert weights.functional_call(module, x) == one_by_one(weights, module, x)  # numbers: a list of them
    weights.tokens[:] = torch.tensor([-1.0, 1.0, 1.0])[:, None, None]
    x = torch.ones(TASKS, 3, 4)
    module[1].function = lambda y: y[y > 0]
    assert "of different tasks" in error_of(weights.functional_call, module, x)
    module[1].function = lambda y: (y, y) if y.sum() > 0 else y
    assert "other parts" in error_of(weights.functional_call, module, x)


# --- wrapped modules ---


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.fc = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(self.body(x))


def compiled(module):
    return torch.compile(module, backend="eager")


WRAPPERS = {
    "compiled": compiled,
    "DataParallel": nn.DataParallel,
    "both": lambda module: nn.DataParallel(compiled(module)),
    "average": AveragedModel,
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrapped_modules_are_found(wrap):
    plain = Net()
    layout = WeightLayout.from_module(plain)
    wrapped = wrap(Net())
    assert WeightLayout.from_module(wrapped) == layout
    assert WeightLayout.from_module(wrapped, select=["fc"]).names == ("fc.weight", "fc.bias")
    weights = generated(plain)
    weights.layout.check_module(wrapped)
    weights.load_into(wrapped, 1)
    weights.load_into(plain, 1)
    assert torch.equal(layout.pack(wrapped), layout.pack(plain))
    state = {name: value for name, value in wrapped.state_dict().items() if name != "n_averaged"}
    assert torch.equal(layout.pack(state), layout.pack(plain))
    x = torch.randn(TASKS, 6, 3)
    torch.testing.assert_close(weights.functional_call(wrapped, x), weights.functional_call(plain, x))
    # a wrapper within
    plain.body = wrap(plain.body)
    weights.load_into(plain, 2)
    torch.testing.assert_close(plain(x[2]), weights.functional_call(Net(), x)[2])


def test_a_part_of_a_network_by_prefix():
    torch.manual_seed(0)
    net, x = Net(), torch.randn(TASKS, 5, 3)
    weights = generated(nn.Linear(4, 2))
    layout = weights.layout
    for call in (
        lambda **options: weights.load_into(net, 0, **options),
        lambda **options: weights.functional_call(net, x, **options),
        lambda **options: layout.check_module(net, **options),
        lambda **options: layout.pack(net, **options),
        lambda **options: layout.pack(net.state_dict(), **options),
        lambda **options: layout.pack_batch([net.state_dict()], **options),
    ):
        assert "pass prefix='fc'" in error_of(call)
        assert "no parameter 'head.weight'" in (message := error_of(call, prefix="head")) or "is missing" in message
        call(prefix="fc")
        call(prefix="fc.")
    found = weights.functional_call(nn.DataParallel(net), x, prefix="fc")
    for i in range(TASKS):
        weights.load_into(net, i, prefix="fc.")
        torch.testing.assert_close(found[i], net(x[i]))
        assert torch.equal(layout.pack(net, prefix="fc"), weights.tokens[i])
    # names alike elsewhere, shapes not
    assert "prefix" not in error_of(generated(nn.Linear(4, 3)).load_into, net, 0, prefix="fc")


def test_modules_that_do_not_fit():
    weights = generated(nn.ModuleDict({"first": nn.Linear(4, 4, bias=False), "last": nn.Linear(4, 4, bias=False)}))
    assert "one tensor, in the layout they are two" in error_of(weights.load_into, Tied(), 0)
    for wrong in (Tied().state_dict(), None, "net"):
        assert "expected a torch.nn.Module" in error_of(weights.load_into, wrong, 0)
        assert "expected a torch.nn.Module" in error_of(WeightLayout.from_module, wrong)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript():
    x = torch.randn(TASKS, 5, 3)
    net, plain = Net(), Net()
    net.load_state_dict(plain.state_dict())
    net.body = torch.jit.script(net.body)
    weights = generated(plain)
    weights.load_into(net, 0)
    torch.testing.assert_close(net(x[0]), weights.functional_call(plain, x)[0])
    assert "TorchScript" in error_of(weights.functional_call, net, x)
    head = generated(plain, select=["fc"])  # on a frozen body
    plain.body = net.body
    torch.testing.assert_close(head.functional_call(net, x), head.functional_call(plain, x))


# --- modules without values ---


def test_load_into_a_module_on_the_meta_device():
    with torch.device("meta"):
        module = nn.Sequential(Tied(), nn.LSTM(4, 2), nn.BatchNorm1d(2)).bfloat16()
    module[1].weight_hh_l0.requires_grad_(False)
    real = nn.Sequential(Tied(), nn.LSTM(4, 2), nn.BatchNorm1d(2))
    weights = generated(real, buffers=True)
    assert WeightLayout.from_module(module, buffers=True) == weights.layout
    assert "holds no numbers" in error_of(weights.layout.pack, module)
    weights.load_into(module, 1)
    weights.load_into(real, 1)
    assert module[0].first.weight is module[0].last.weight
    for name, parameter in module.named_parameters():
        assert isinstance(parameter, nn.Parameter)
        assert (parameter.device.type, parameter.dtype) == ("cpu", torch.bfloat16)
        assert parameter.requires_grad is (name != "1.weight_hh_l0")
        assert torch.equal(parameter, real.get_parameter(name).bfloat16())
    assert torch.equal(module[2].running_mean, real[2].running_mean.bfloat16())
    x = torch.randn(5, 3, 4)
    torch.testing.assert_close(module.float()[1](x)[0], real.bfloat16().float()[1](x)[0])
    weights.tokens.zero_()  # copies of their own
    assert module[0].first.weight.any()


def test_functional_call_of_a_module_on_the_meta_device():
    with torch.device("meta"):
        module = Net()
    weights, x = generated(module), torch.randn(TASKS, 5, 3)
    torch.testing.assert_close(weights.functional_call(module, x), weights.functional_call(Net(), x))
    assert all(parameter.is_meta for parameter in module.parameters())
    head = generated(module, select=["fc"])
    assert "'body.weight' is on the meta device" in error_of(head.functional_call, module, x)


def test_a_module_that_accelerate_offloads_is_refused():
    accelerate = pytest.importorskip("accelerate")
    module = accelerate.cpu_offload(nn.Sequential(nn.Linear(4, 2)), torch.device("cpu"))
    weights = generated(nn.Sequential(nn.Linear(4, 2)))
    assert "offloaded" in error_of(weights.load_into, module, 0)
    with accelerate.init_empty_weights():
        empty = nn.Sequential(nn.Linear(4, 2))
    weights.load_into(empty, 0)
    torch.testing.assert_close(empty(torch.ones(1, 4)), weights.functional_call(empty, torch.ones(TASKS, 1, 4))[0])


def test_array_inputs_of_other_kinds():
    module = nn.Linear(4, 2).double()
    weights = generated(module)
    x = np.random.default_rng(0).normal(size=(TASKS, 5, 4))
    x.flags.writeable = False
    torch.testing.assert_close(
        weights.functional_call(module, x[:, ::-1]), weights.functional_call(module, torch.tensor(x).flip(1))
    )


@pytest.mark.parametrize(
    "make", [shared_layer, Tied, Remembers, lambda: nn.DataParallel(Tied()), lambda: compiled(Tied())]
)
def test_the_module_of_a_family_is_left_as_it_is(make):
    torch.manual_seed(0)
    module = make()
    before = snapshot(module)
    family = ModuleFamily(module, None, lambda net, data: net(data["x"]).square().mean())
    theta, x = torch.randn(TASKS, family.layout.num_tokens, family.layout.width), torch.randn(TASKS, 5, 4)
    found = family.gradient(theta, {"x": x})
    weights = GeneratedWeights(family.layout, theta.requires_grad_())
    (expected,) = torch.autograd.grad(weights.functional_call(module, x).square().mean((1, 2)).sum(), theta)
    torch.testing.assert_close(found, expected)
    assert_as_before(module, before)
