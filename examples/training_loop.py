"""A plain training loop that asks for fresh heads in every episode: the features are trained, the heads are generated.

    python examples/training_loop.py [--generator runs/glyphs-seed0/generator] [--episodes 200]

In few-shot learning the head of every episode is usually fitted by gradient steps, or taken as the class means. Here a generator writes it, in one
call for all episodes of a batch, and the gradient of the query loss flows through the head's use into the features. Without --generator
a small one is trained first, on heads of random linear problems; the loop is the same for both.
"""

import argparse

import torch
from torch import nn

from mcdi_fast import DenoiserConfig, DiffusionConfig, MetaConfig, Sampler, TrajectoryBank, WeightGenerator, fit
from mcdi_fast.config import PrepareConfig
from mcdi_fast.heads import head_layout, support_condition
from mcdi_fast.prepare import prepare_bank
from mcdi_fast.tasks.heads import ClassRows, HeadFamily, HeadOptions

WAYS, SHOTS, QUERIES = 5, 1, 5


def small_generator(folder, width):
    """Trajectories of heads on Gaussian classes, and a generator trained on them: seconds."""
    classes = torch.randn(40, 1, width, generator=torch.Generator().manual_seed(0))
    features = classes + 0.3 * torch.randn(40, 20, width, generator=torch.Generator().manual_seed(1))
    features = features / features.square().sum(-1).mean().sqrt()
    family = HeadFamily({"train": ClassRows.of_grid(features)}, HeadOptions(WAYS, SHOTS, QUERIES))
    bank: TrajectoryBank = prepare_bank(folder, family, PrepareConfig(tasks=500, steps=30), 3, seed=0)
    return fit(bank, MetaConfig(steps=300, meta_batch=16), DiffusionConfig(steps=12), DenoiserConfig(64, 1))


def episodes(count, generator):
    """Inputs [count, ways, shots + queries, 16] whose classes differ in a plane that the network has to find."""
    centre = torch.randn(count, WAYS, 1, 16, generator=generator)
    centre[..., 4:] = 0
    return centre + 0.6 * torch.randn(count, WAYS, SHOTS + QUERIES, 16, generator=generator)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--generator", help="folder or hub id; a small one is trained without")
    parser.add_argument("--folder", default="runs/example-bank", help="of the small one's trajectories")
    parser.add_argument("--episodes", type=int, default=200)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)

    generator = (
        WeightGenerator.from_pretrained(options.generator) if options.generator else small_generator(options.folder, 16)
    )
    width = generator.layout.width - 1
    assert generator.layout == head_layout(WAYS, width), "a generator of five-way heads is needed"
    sampler = Sampler(generator)

    network = nn.Sequential(
        nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, width), nn.LayerNorm(width, elementwise_affine=False)
    )
    head = nn.Linear(width, WAYS)  # of the right shape; its own weights are not used
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    draw = torch.Generator().manual_seed(2)
    label = torch.arange(WAYS).repeat_interleave(QUERIES).repeat(8)
    history = []
    for episode in range(options.episodes):
        features = network(episodes(8, draw)) / width**0.5
        support, query = features.split([SHOTS, QUERIES], 2)
        with torch.no_grad():
            weights = sampler.sample(support_condition(support), seeds=range(8 * episode, 8 * episode + 8))
        logits = weights.functional_call(head, query.flatten(1, 2))  # every episode with its own head
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(float((logits.flatten(0, 1).argmax(-1) == label).float().mean()))
        if (episode + 1) % 50 == 0:
            print(f"episode {episode + 1}: accuracy {100 * sum(history[-50:]) / 50:.1f} %")
    return history


if __name__ == "__main__":
    main()
