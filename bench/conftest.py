"""What every record carries: machine, threads, versions, git sha."""

import os

#os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from mcdi_fast.report import machine


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.clear()  # the default names the host
    machine_info.update(machine())
