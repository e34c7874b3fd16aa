"""Kernels run in Triton's interpreter unless the caller says otherwise; it must know before anything imports triton."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
