"""Imported before torch by the commands and the benchmarks: what torch and OpenMP read when they are loaded, unless set already.

The measurements are in docs/choices.md.
"""

import os

# Threads that wait spin for 0.1 to 1.5 ms, as the processor has it, then sleep. Two torch processes on two cores are ten times slower when they spin
# on; the inner loop's many small operations are 1.5 times slower when they sleep at once.
os.environ.setdefault("GOMP_SPINCOUNT", "100000")
# Large pages for large tensors: 0.52 s a backbone episode instead of 0.83.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
