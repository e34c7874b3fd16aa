"""What every record carries: machine, threads, versions, git sha."""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "100000")  # as in mcdi_fast/train.py

from mcdi_fast.report import machine


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.clear()  # the default names the host
    machine_info.update(machine())
