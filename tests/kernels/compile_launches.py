"""Run every launcher through Triton's compiler for sm_90 with a driver that launches nothing: what only the compiled path refuses.

The interpreter accepts what the compiler does not (exp of bfloat16, a constant where a tensor is expected), and the ahead-of-time table
builds its own argument lists; this one takes the launchers' own, at sizes of 1, where integers become constants, and ragged ones.
Run by test_kernel_switch.py in a process of its own.
"""

import importlib

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from mcdi_fast.config import PrepareConfig
from mcdi_fast.kernels import api as K
from mcdi_fast.outer import OuterState


class NoDriver:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


driver.set_active(NoDriver())
run, compiled = JITFunction.run, []


def compile_only(self, *arguments, grid, warmup, **options):
    compiled.append(self.__name__)
    return run(self, *arguments, grid=grid, warmup=True, **options)


JITFunction.run = compile_only
for name in (
    "sam_adam",
    "consistency_loss",
    "noising",
    "denoiser",
    "inner_update",
    "head_trajectory",
    "sample_chain",
    "normal_noise",
    "outer_update",
):
    importlib.import_module(f"mcdi_fast.kernels.{name}").check_runs = lambda *_: None


def f32(*shape):
    return torch.ones(*shape)


def index(*shape):
    return torch.zeros(*shape, dtype=torch.int64)


for dtype in (torch.float32, torch.bfloat16):

    def ones(*shape, dtype=dtype):
        return torch.ones(*shape, dtype=dtype)

    K.sam_ascent(f32(1, 1), f32(1, 1), 0.1)
    K.adam_step_(f32(1, 1), f32(1, 1), f32(1, 1), f32(1, 1), 0.1, 0.1)
    for outer in ("adam", "reptile"):
        K.outer_update_(OuterState(f32(1), f32(1), f32(1), f32(1)), f32(1), f32(4), torch.ones(1).int(), outer)
    for stream in (0, 1, 2**40):
        K.normal_noise(index(1), (1,), stream, f32(1))
    K.consistency_loss(ones(1, 1, 1, 1), ones(1, 1), ones(1, 1, 1, 1))
    for seed in (0, 1, 2**40):
        K.noising(ones(1, 1, 1), index(1), index(1, 1, 1), seed, index(1), f32(1, 1, 5), ones(1, 1))
    for p in ("ieee", "bf16"):
        for r, o in ((0, 1), (1, 1), (2, 7)):
            earlier = (ones(r, 3, 1, 1), ones(r, 3, 1, o))
            more = dict(add_to=ones(3, 1, o), broadcast=K.Broadcast(ones(3, 1, o)), activation="silu")
            K.task_linear(ones(3, 1, 1), ones(1, o), earlier, 0.1, **more, precision=p)
            more = dict(activation="silu_backward", before=ones(3, 1, o))
            K.task_linear(ones(3, 1, 1), ones(3, 1, o), **more, precision=p)
        K.reptile_delta(ones(1, 1, 1, 1), ones(1, 1, 1, 1), 0.1, precision=p)
        K.sgd_step_(f32(1, 1, 1), ones(1, 1, 1), ones(1, 1, 1), 0.1, precision=p)
        config = PrepareConfig(steps=2)
        K.head_trajectory(f32(1, 1, 2), ones(1, 1, 1, 1), index(1, 1), config, 1, precision=p)
        K.head_trajectory(
            f32(3, 5, 65), ones(2, 3, 130, 64), index(3, 130), config, 2, index(2, 3, 130).int(), f32(130), precision=p
        )
        for tokens in (1, 3, 64):
            weights = K.ChainWeights(ones(1, 1), ones(1, 1), ones(1, 1, 1), ones(2, 1), ones(1, 2), ones(1, 1))
            x, mask = f32(1, tokens, 1), f32(tokens, 1)
            K.sample_chain(weights, x, ones(1, tokens, 1), index(1), f32(1, 3), mask, precision=p)
print(f"compiled {len(set(compiled))} kernels in {len(compiled)} launches")
