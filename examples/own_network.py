"""Small networks that draw a sine of given amplitude and phase, without training them: a family of tasks of one's own.

    python examples/own_network.py [--steps 2000]

Three things are needed: a module, a loss, and tasks that are the same for the same (split, seed, number). `train` does the rest: trajectories of
many tasks, a bank, meta-training, and a report against fine-tuning, the bank's mean, the nearest training task and the trained targets.
`python -m mcdi_fast.train --dataset own_network:family` does the same from the command line, in this folder.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from mcdi_fast import DenoiserConfig, DiffusionConfig, MetaConfig, Sampler, WeightGenerator
from mcdi_fast.config import EvaluateConfig, PrepareConfig, TrainConfig
from mcdi_fast.tasks import TaskBatch, register
from mcdi_fast.tasks.modules import ModuleFamily
from mcdi_fast.train import train

X = torch.linspace(-2, 2, 64).unsqueeze(1)
SPLITS = ("train", "val", "test")


def draw(split, start, count, seed):
    """Tasks are waves. The condition says which; a new network may also be fine-tuned on ten points of it."""
    keys = [np.random.SeedSequence((SPLITS.index(split), seed, number)) for number in range(start, start + count)]
    u = torch.from_numpy(np.stack([np.random.default_rng(key).random(2) for key in keys])).float()
    amplitude, phase = 0.5 + u[:, :1], 3 * u[:, 1:]
    y = (amplitude * torch.sin(2 * X[:, 0] + phase)).unsqueeze(-1)
    every = {"x": X.expand(count, -1, -1), "y": y}
    ten = {name: value[:, 3::6] for name, value in every.items()}
    condition = torch.cat([amplitude * phase.cos(), amplitude * phase.sin(), amplitude], 1)
    return TaskBatch(condition.unsqueeze(1), support=ten, query=every, train=every)


def loss(net, data):
    return F.mse_loss(net(data["x"]), data["y"])


def defaults(config):
    return replace(
        config,
        prepare=PrepareConfig(tasks=500, steps=300, learning_rate=0.02, rho=0.0, weight_decay=0.0, start_std=0.0),
        diffusion=DiffusionConfig(steps=12),
        denoiser=DenoiserConfig(128, 2),
        meta=MetaConfig(steps=2000, meta_batch=16, samples=2, ema=0.99),
        evaluate=EvaluateConfig(
            tasks=100, validation_tasks=50, finetune_steps=(10, 100), finetune_decays=(0.0003, 0.003)
        ),
    )


@register(defaults)
def family():
    torch.manual_seed(0)  # its weights are the start of every task
    return ModuleFamily(nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1)), draw, loss)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000, help="of meta-training")
    parser.add_argument("--tasks", type=int, default=500)
    parser.add_argument("--folder", type=Path, default=Path("runs/example-waves"))
    options = parser.parse_args(arguments)

    waves, config = family(), defaults(TrainConfig(dataset="waves", run_dir=options.folder))
    config = replace(
        config, meta=replace(config.meta, steps=options.steps), prepare=replace(config.prepare, tasks=options.tasks)
    )
    train(config, family=waves)

    # from here on it is any generator
    generator = WeightGenerator.from_pretrained(options.folder / "generator")
    new = waves.tasks("test", 1000, 50, seed=0)
    weights = Sampler(generator).sample(new.condition, seeds=range(50))
    drawn = weights.functional_call(waves.module, new.query["x"])
    error = float((drawn - new.query["y"]).square().mean().sqrt())
    guess = float((waves.tasks("train", 0, 500, 0).query["y"].mean(0) - new.query["y"]).square().mean().sqrt())
    print(f"generated networks: error {error:.3f}; the mean of all waves: {guess:.3f}")
    weights.load_into(waves.module, 0)  # one of them, as an ordinary module
    return error, guess


if __name__ == "__main__":
    main()
