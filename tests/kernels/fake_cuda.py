"""The hot paths on tensors that claim to be on a GPU: no mixing of devices, no waiting for the device, outputs where they belong.

PyTorch's fake tensors carry shape, dtype and device but no numbers. An operation between a CUDA and a CPU tensor raises as on a GPU, and so
does reading a number back, for there is none. Launches are only recorded. Run by test_kernel_switch.py in a process of its own.
"""

import contextlib
from types import SimpleNamespace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mcdi_fast import heads
from mcdi_fast.backend import Backend
from mcdi_fast.config import DiffusionConfig, MetaConfig, PrepareConfig
from mcdi_fast.denoiser import FoldedDenoiser, parameter_shapes
from mcdi_fast.diffusion import Draws, chain_table, make_objective, make_schedule
from mcdi_fast.generator import WeightGenerator
from mcdi_fast.heads import head_layout
from mcdi_fast.kernels.chain_weights import pack_weights
from mcdi_fast.kernels.head_trajectory import fits, head_trajectory
from mcdi_fast.kernels.launch import recording
from mcdi_fast.kernels.meta_step import MetaStep
from mcdi_fast.kernels.run_chain import run_chain
from mcdi_fast.outer import OuterState, outer_scalars
from mcdi_fast.sampler import Sampler
from mcdi_fast.tasks import optimizer_steps

torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda.current_device = lambda: 0
torch.cuda.get_device_name = lambda device=None: "fake"
torch.cuda.get_device_capability = lambda device=None: (9, 0)
torch.cuda.mem_get_info = lambda device=None: (2**36, 2**36)
torch.cuda.device = lambda device: contextlib.nullcontext()
torch.Tensor.pin_memory = lambda self: self


def names(launched):
    """Of the kernels since the last call, all of whose tensors are on the GPU."""
    found = []
    for launch in launched:
        for name, argument in launch.arguments.items():
            assert not isinstance(argument, torch.Tensor) or argument.device.type == "cuda", (launch.kernel, name)
        found.append(launch.kernel.__name__)
    launched.clear()
    return found


class Transfers(TorchFunctionMode):
    """Copies between the devices, which fake tensors cannot do without CUDA: allowed where the host does not wait."""

    waits = False  # whether waiting is allowed: while things are set up
    copied = 0  # copies from the host since it was set

    def __torch_function__(self, function, types, arguments=(), options=None):
        options = options or {}
        if function is torch.Tensor.to:
            wanted = [a for a in (*arguments[1:], *options.values()) if isinstance(a, str | torch.device)]
            if wanted and torch.device(wanted[0]).type != arguments[0].device.type:
                assert self.waits or options.get("non_blocking"), "a copy that waits"
                return torch.empty_like(arguments[0], device=torch.device(wanted[0]))
        if function is torch.Tensor.copy_:
            if arguments[0].device == arguments[1].device:
                return torch.ops.aten.copy_(*arguments)
            assert arguments[0].device.type == "cuda", "a copy back to the host"
            assert options.get("non_blocking"), "a copy that waits"
            assert arguments[0].shape == arguments[1].shape
            self.copied += 1
            return arguments[0]
        if function is torch.Tensor.__int__ and arguments[0].device.type == "cpu":
            return 1  # how many numbers are real
        if function is torch.Tensor.__getitem__ and arguments[0].device.type == "cuda":
            return taken(*arguments)
        return function(*arguments, **options)


class Operations(TorchDispatchMode):
    """torch's own launches on the GPU, by name: everything but views and memory of no content."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        found = function(*arguments, **(options or {}))
        returned = function._schema.returns
        alias = returned[0].alias_info if returned else None
        view = alias is not None and not alias.is_write
        name = function._schema.name.removeprefix("aten::")
        if isinstance(found, torch.Tensor) and found.device.type == "cuda" and not view and "empty" not in name:
            self.names.append(name)
        return found


def taken(tensor, index):
    """tensor[index] for integers, slices, `...` and None, by operations that need no CUDA library."""
    index, at = index if isinstance(index, tuple) else (index,), 0
    for part in index:
        if part is Ellipsis:
            at = tensor.ndim - sum(i is not None for i in index[index.index(Ellipsis) + 1 :])
        elif part is None:
            tensor, at = tensor.unsqueeze(at), at + 1
        elif isinstance(part, slice):
            tensor, at = torch.ops.aten.slice(tensor, at, part.start, part.stop), at + 1
        else:
            tensor = torch.ops.aten.select(tensor, at, part)
    return tensor


class Bank:
    """What a MetaStep asks of a bank."""

    condition_rows, condition_width, num_segments = 5, 65, 3

    def __init__(self):
        self.layout = SimpleNamespace(mask=torch.ones(5, 65))

    def __len__(self):
        return 50

    def gather(self, index):
        return torch.empty(len(index), 3, 5, 65), torch.empty(len(index), 5, 65)


b, k, s, n, d, c, width, depth, steps = 32, 3, 4, 5, 65, 65, 256, 2, 20
cuda = torch.device("cuda", 0)
schedule = make_schedule(steps, 3)
objective = make_objective(schedule, "local-consistency")
chain = chain_table(schedule, objective)
layout = head_layout(5, 64)
shapes = parameter_shapes(d, c, steps, width, depth)
transfers = Transfers()
with FakeTensorMode(), transfers, torch.no_grad(), recording() as launched:
    there, here = torch.empty(2, device=cuda), torch.empty(2)
    for wrong in (
        lambda: float(there.sum()),
        lambda: bool(there.isfinite().all()),
        lambda: there + here,
        lambda: there.to("cpu"),
    ):
        try:
            wrong()
        except Exception:
            continue
        raise AssertionError("what would wait or mix devices on a GPU went through here")
    normalizer = SimpleNamespace(mean=torch.zeros(n, d), std=torch.ones(n, d))
    flat = torch.empty(sum(rows * columns for rows, columns in shapes.values()), device=cuda)
    state = OuterState(flat, flat.clone(), flat.clone(), flat.clone())
    bank = Bank()
    draws = Draws(
        torch.zeros(b).long(), torch.zeros(b).long(), torch.zeros(b, k, s).long(), torch.zeros(b).long()
    )  # fmt: skip
    for outer in ("adam", "reptile"):
        for resident in (True, False):
            transfers.waits = True
            meta = MetaConfig(outer=outer, meta_batch=b, steps=250)
            step = MetaStep(
                state, bank, lambda number: (draws, outer_scalars(meta, number)),  # noqa: B023
                torch.zeros(3, steps, 5), normalizer, normalizer, torch.ones(n, d), shapes, meta,
                seed=0, precision="tf32",
            )  # fmt: skip
            if not resident:
                step._resident = None
            transfers.waits = False
            launched.clear()
            with Operations() as operations:
                for number in range(3):  # the next would be captured
                    loss = step.step(number)
            assert loss.device == cuda
            where = "resident" if resident else "on the host"
            count, more = len(names(launched)) // 3, len(operations.names) // 3
            print(f"meta-step, {outer}, bank {where}: {count} launches and {more} of torch")
            step._replay, transfers.copied = lambda: None, 0  # what a graph would be
            for number in range(50, 250):  # as of a checkpoint's step
                step.step(number)
            print(f"200 steps, {outer}, bank {where}: {transfers.copied} copies")

    for mask in (None, torch.ones(n, d, device=cuda)):
        transfers.waits = True
        generator = object.__new__(WeightGenerator)
        on_cuda = SimpleNamespace(
            mean=torch.empty(n, d, device=cuda), normalize=lambda x: x + 0, denormalize=lambda x: x + 0
        )  # fmt: skip
        phi = {name: torch.empty(shape, device=cuda) for name, shape in shapes.items()}
        fields = dict(
            phi=phi, layout=layout, normalizer=on_cuda, condition_normalizer=on_cuda, diffusion=DiffusionConfig()
        )
        for name, value in fields.items():
            object.__setattr__(generator, name, value)
        object.__setattr__(generator, "_schedule", schedule)
        object.__setattr__(generator, "_objective", objective)
        sampler = object.__new__(Sampler)
        sampler.device, sampler.generator, sampler.impl, sampler.precision = cuda, generator, "auto", "tf32"
        sampler._expected, sampler._kernels, sampler._compiled = (cuda, n, c, False), True, False
        folded = FoldedDenoiser(phi)
        object.__setattr__(generator, "_folded", folded)
        sampler._mask, sampler._packed = mask, (folded, pack_weights(folded))
        sampler._tables = {
            None: (torch.empty(steps, dtype=torch.int64, device=cuda), torch.empty(steps, 3, device=cuda))
        }
        transfers.waits = False
        launched.clear()
        found = sampler.sample(torch.empty(7, n, c, device=cuda), torch.zeros(7, dtype=torch.int64, device=cuda))
        assert found.tokens.device == cuda
        found = names(launched)
        assert found == ["normal_noise_kernel", "streamed_chain_kernel"], found
        told, x = torch.empty(2, 200, c, device=cuda), torch.empty(2, 200, d, device=cuda)
        many = None if mask is None else torch.ones(200, d, device=cuda)
        run_chain(sampler._packed[1], x, told, *sampler._tables[None], many, out=x)
        assert names(launched) == 2 * ["start_kernel"] + (1 + steps * (depth + 1)) * ["layer_kernel"]
        print(f"sampler, {'with' if mask is not None else 'no'} padding: {len(found)} launches")

    for ways, features in ((5, 64), (5, 1280), (100, 512), (200, 300)):
        launched.clear()
        start, rows = torch.empty(9, ways, features + 1, device=cuda), torch.empty(2, 9, 30, features, device=cuda)
        labels = torch.zeros(9, 30, dtype=torch.int64, device=cuda)
        pick = torch.zeros(6, 9, 30, dtype=torch.int32, device=cuda)
        weight = torch.empty(30, device=cuda)
        given = (start, rows, labels, PrepareConfig(steps=6), 3, pick, weight)
        if fits(ways):
            transfers.waits = True  # Adam's scalars go to the device once and stay: a graph reads them at every replay
            head_trajectory(*given)
            transfers.waits = False
            launched.clear()
            kept = head_trajectory(*given)
        else:
            kept = heads.head_trajectory(*given, **optimizer_steps(Backend(cuda, True)))
        assert kept.shape == (9, 3, ways, features + 1)
        assert kept.device == cuda
        print(f"heads of {ways} x {features}: {len(names(launched))} launches")
