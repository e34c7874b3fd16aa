"""Run every launcher through Triton's compiler for sm_90 with a driver that launches nothing: what only the compiled path refuses.

The interpreter accepts what the compiler does not (exp of bfloat16, a constant where a tensor is expected), and the ahead-of-time table
builds its own argument lists; this one takes the launchers' own, at sizes of 1, where integers become constants, and ragged ones.
Run by test_kernel_switch.py in a process of its own.
"""

import torch

from mcdi_fast.config import PrepareConfig
from mcdi_fast.kernels.chain_weights import ChainWeights
from mcdi_fast.kernels.head_trajectory import head_trajectory
from mcdi_fast.kernels.inspect import TARGETS, compile_launch
from mcdi_fast.kernels.launch import recording
from mcdi_fast.kernels.noise_batch import noise_batch
from mcdi_fast.kernels.normal_noise import normal_noise
from mcdi_fast.kernels.outer_update import outer_update_
from mcdi_fast.kernels.residual_loss import residual_loss
from mcdi_fast.kernels.sam_adam import adam_step_, sam_ascent
from mcdi_fast.kernels.streamed_chain import streamed_chain
from mcdi_fast.kernels.task_linear import Broadcast, task_linear
from mcdi_fast.kernels.weight_update import reptile_delta_, sgd_step_
from mcdi_fast.outer import OuterState


def f32(*shape):
    return torch.ones(*shape)


def index(*shape):
    return torch.zeros(*shape, dtype=torch.int64)


with recording() as launches:
    for dtype in (torch.float32, torch.bfloat16):

        def ones(*shape, dtype=dtype):
            return torch.ones(*shape, dtype=dtype)

        sam_ascent(f32(1, 1), f32(1, 1), 0.1)
        adam_step_(f32(1, 1), f32(1, 1), f32(1, 1), f32(1, 1), 0.1, 0.1)
        for outer in ("adam", "reptile"):
            outer_update_(OuterState(f32(1), f32(1), f32(1), f32(1)), f32(1), f32(4), torch.ones(1).int(), outer)
        for stream in (0, 1, 2**40):
            normal_noise(index(1), (1,), stream, f32(1))
        residual_loss(ones(1, 1, 1, 1), ones(1, 1), ones(1, 1, 1, 1), f32(1, 1), 1)
        for seed in (0, 1, 2**40):
            noise_batch(ones(1, 1, 1), index(1), index(1, 1, 1), seed, index(1), f32(1, 1, 5), ones(1, 1))
        for p in ("ieee", "bf16"):
            for r, o in ((0, 1), (1, 1), (2, 7)):
                earlier = (ones(r, 3, 1, 1), ones(r, 3, 1, o))
                more = dict(add_to=ones(3, 1, o), broadcast=Broadcast(ones(3, 1, o)), activation="silu")
                task_linear(ones(3, 1, 1), ones(1, o), earlier, 0.1, **more, precision=p)
                more = dict(activation="silu_backward", pre_activation=ones(3, 1, o))
                task_linear(ones(3, 1, 1), ones(3, 1, o), **more, precision=p)
            reptile_delta_([(ones(1, 1, 1, 32), ones(1, 1, 1, 32), f32(1, 1))], 0.1, precision=p)
            sgd_step_(f32(1, 1, 1), ones(1, 1, 1), ones(1, 1, 1), 0.1, precision=p)
            config = PrepareConfig(steps=2)
            head_trajectory(f32(1, 1, 2), ones(1, 1, 1, 1), index(1, 1), config, 1, precision=p)
            head_trajectory(
                f32(3, 5, 65),
                ones(2, 3, 130, 64),
                index(3, 130),
                config,
                2,
                index(2, 3, 130).int(),
                f32(130),
                precision=p,
            )
            for tokens in (1, 3, 64):
                weights = ChainWeights(
                    ones(32, 32), ones(32, 32), ones(1, 1, 32), ones(64, 32), ones(32, 64), ones(32, 32)
                )
                x, mask = f32(1, tokens, 1), f32(tokens, 1)
                streamed_chain(weights, x, ones(1, tokens, 1), index(1), f32(1, 3), mask, precision=p)
compiled = {compile_launch(launch, TARGETS["cuda:90"].gpu).hash for launch in launches}
print(f"compiled {len({launch.kernel.__name__ for launch in launches})} kernels in {len(compiled)} forms")
