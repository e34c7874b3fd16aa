"""What must be known before torch and triton are imported, unless the caller says otherwise."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run in Triton's interpreter
# One thread a process: tests run on all cores by processes (`make test`), and their bits depend on no other work of the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
