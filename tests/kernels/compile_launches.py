"""Run every launcher of the registry through Triton's compiler for sm_90 with a driver that launches nothing: what only the compiled path refuses.

The interpreter accepts what the compiler does not (exp of bfloat16, a constant where a tensor is expected); inspect.py compiles default sizes, this
sizes of 1, where integers become constants, ragged ones, and inputs in bfloat16. Run by test_kernel_switch.py in a process of its own.
"""

import torch
from kernel_helpers import in_bfloat16

from mcdi_fast.kernels.inspect import TARGETS, compile_launch
from mcdi_fast.kernels.launch import Turn, recording
from mcdi_fast.kernels.operations import ONE, TINY, Maker, each

TURN = {"turn": Turn(torch.zeros(1, dtype=torch.int64), 7, 3)}
MORE = {  # what the registry's inputs leave out
    "noise_batch": [{"seed": 0}, {"seed": 1}, {"seed": 2**40}, {"mask": torch.ones(TINY.tokens, TINY.width)}, TURN],
    "load_batch_": [TURN],
    "normal_noise": [{"stream": 1}, {"stream": 2**40}, {"mask": torch.ones(TINY.tokens, TINY.width)}],
    "judge_": [{"skip": True}, TURN],
    "outer_update_": [{"outer": "reptile"}],
    "head_trajectory": [{"pick": None, "sample_weight": None}],
    "run_chain": [{"mask": torch.ones(TINY.tokens, TINY.width)}],
}
with recording() as launches:
    for sizes in (ONE, TINY):
        for _, operation, z, precision in each(sizes):
            if precision == "tf32" or operation.name == "inner_loop":  # the operations before it, one after the other
                continue
            inputs = operation.inputs(z, Maker())
            for given in (inputs, in_bfloat16(operation, inputs)):
                operation(given, precision)
            for more in MORE.get(operation.name, ()) if sizes is TINY else ():
                operation(inputs | more, precision)
compiled = {compile_launch(launch, TARGETS["cuda:90"].gpu).hash for launch in launches}
print(f"compiled {len({launch.kernel.__name__ for launch in launches})} kernels in {len(compiled)} forms")
