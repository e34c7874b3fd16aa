"""What tf32 and bf16 products cost in accuracy, on Omniglot, measured on a CPU: the choice of the kernels' default precision.

    python bench/precision.py --cache-dir runs/cache --output docs/records/DATE-precision.json [--seeds 0 1 2] [--steps 1000]

The whole method from the trajectories on (preparation, meta-training, sampling), with the operands of every matrix product rounded as the
kernels' tensor cores take them and float32 sums: bf16 to nearest; tf32 by cutting 13 bits off, which is what the hardware does to operands
that were not rounded before, and the worse of the two. Accuracy is on validation characters, the same tasks for all. Resumable: a finished
(precision, seed) is in the output file and not done again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from pathlib import Path
from statistics import mean, stdev

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mcdi_fast import backbone as bb
from mcdi_fast.backend import PRECISIONS
from mcdi_fast.cli import run_command
from mcdi_fast.config import MetaConfig, PrepareConfig
from mcdi_fast.evaluate import VALIDATION_SEED, generate, interval
from mcdi_fast.meta import fit
from mcdi_fast.prepare import prepare_bank
from mcdi_fast.report import machine
from mcdi_fast.sampler import Sampler
from mcdi_fast.store import load_tensors, make_folder, save_tensors, write_json
from mcdi_fast.tasks import omniglot
from mcdi_fast.tasks.heads import ClassRows, HeadFamily, HeadOptions

aten = torch.ops.aten
PRODUCTS = {  # where the operands stand
    aten.mm.default: (0, 1), aten.mm.out: (0, 1), aten.bmm.default: (0, 1), aten.bmm.out: (0, 1),
    aten.addmm.default: (1, 2), aten.addmm.out: (1, 2), aten.addmm_.default: (1, 2),
    aten.baddbmm.default: (1, 2), aten.baddbmm.out: (1, 2), aten.baddbmm_.default: (1, 2),
}  # fmt: skip


def rounded(tensor: torch.Tensor, precision: str) -> torch.Tensor:
    """float32 with the operand's digits only."""
    if precision == "bf16":
        return tensor.bfloat16().float()
    return (tensor.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


class RoundedProducts(TorchDispatchMode):
    """Every float32 matrix product with rounded operands."""

    def __init__(self, precision: str):
        super().__init__()
        self.precision, self.count = precision, 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function in PRODUCTS and arguments[0].dtype == torch.float32:
            arguments = list(arguments)
            for at in PRODUCTS[function]:
                arguments[at] = rounded(arguments[at], self.precision)
            self.count += 1
        return function(*arguments, **(options or {}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--cache-dir", type=Path, default=Path("runs/cache"))
    parser.add_argument("--data-dir", type=Path, default=None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--bank-tasks", type=int, default=5000)
    parser.add_argument("--tasks", type=int, default=2000)
    parser.add_argument("--cells", type=int, default=None, help="stop after so many")
    o = parser.parse_args()
    settings = {"steps": o.steps, "bank_tasks": o.bank_tasks, "validation_tasks": o.tasks}
    record = {"settings": settings, "cells": {}}
    if o.output.exists():
        record = json.loads(o.output.read_text())
        if record["settings"] != settings:
            parser.error(f"{o.output}: made with {record['settings']}, now {settings}; choose another --output")
    todo = [(seed, p) for seed in o.seeds for p in PRECISIONS if f"{p} seed {seed}" not in record["cells"]][: o.cells]
    if todo:
        features = o.cache_dir / "precision-features.safetensors"
        if not features.exists():
            data = omniglot.load(o.data_dir, o.cache_dir)
            network = bb.train_backbone(data, bb.BackboneConfig(), make_folder(o.cache_dir / "backbones"))
            copies = [bb.extract_features(network, data.train, augment_seed=copy or None) for copy in range(2)]
            tensors = {"train": torch.stack(copies), "val": bb.extract_features(network, data.val)}
            save_tensors(features, tensors, {}, "features")
        tensors, _ = load_tensors(features, "features")
        splits = {name: ClassRows.of_grid(tensors[name]) for name in ("train", "val")}
        family = HeadFamily(splits, HeadOptions())
        validation = family.tasks("val", 0, o.tasks, VALIDATION_SEED)
        queries = validation.query["row"].shape[1]
    for seed, precision in todo:
        mode = contextlib.nullcontext() if precision == "ieee" else RoundedProducts(precision)
        with tempfile.TemporaryDirectory() as folder, mode:
            bank = prepare_bank(Path(folder), family, PrepareConfig(tasks=o.bank_tasks), 3, seed)
            generator = fit(bank, MetaConfig(steps=o.steps), seed=seed)
            heads = generate(Sampler(generator), validation, 0)
        right = (family.scores(heads, validation.query) * queries).round().int()
        record["cells"][f"{precision} seed {seed}"] = right.tolist()
        record["queries"] = queries
        record["machine"] = machine()
        write_json(o.output, record)
        print(f"{precision}, seed {seed}: {100 * float(right.float().mean()) / record['queries']:.2f} %", flush=True)
    print(
        "\n| precision | accuracy, % (mean ± deviation over seeds) | minus ieee, paired over tasks and seeds |\n| --- | --- | --- |"
    )
    for precision in PRECISIONS:
        pairs = [[record["cells"].get(f"{p} seed {seed}") for p in (precision, "ieee")] for seed in o.seeds]
        done = [torch.tensor(cells) / record["queries"] for cells in pairs if None not in cells]
        if len(done) > 1:
            means = [100 * float(found.mean()) for found, _ in done]
            less = torch.stack([found - exact for found, exact in done]).mean(0)
            paired = f"{100 * float(less.mean()):+.3f} ± {100 * interval(less):.3f}"
            print(f"| {precision} | {mean(means):.2f} ± {stdev(means):.2f} | {paired} |")


if __name__ == "__main__":
    sys.exit(run_command(main))
