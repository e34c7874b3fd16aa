"""The generated heads inside a Lightning module: the backbone is trained, every episode's head is sampled.

    pip install lightning
    python examples/lightning_module.py [--steps 100]

The sampler is no submodule: nothing of it is trained or stored in the module's checkpoints. It moves with the module to its device.
"""

import argparse

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from training_loop import QUERIES, SHOTS, WAYS, episodes, small_generator

from mcdi_fast import Sampler, WeightGenerator
from mcdi_fast.heads import support_condition


class Episodes(IterableDataset):
    def __iter__(self):
        draw = torch.Generator().manual_seed(2)
        while True:
            yield episodes(8, draw)


class FewShot(lightning.LightningModule):
    def __init__(self, generator: WeightGenerator):
        super().__init__()
        width = generator.layout.width - 1
        self.network = nn.Sequential(
            nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, width), nn.LayerNorm(width, elementwise_affine=False)
        )
        self.head = nn.Linear(width, WAYS).requires_grad_(False)
        self.generator, self.sampler = generator, None
        self.history = []

    def on_fit_start(self):
        self.sampler = Sampler(self.generator, self.device)

    def training_step(self, batch, index):
        features = self.network(batch) / self.head.in_features**0.5
        support, query = features.split([SHOTS, QUERIES], 2)
        seeds = range(8 * index, 8 * index + 8)
        weights = self.sampler.sample(support_condition(support.detach()), seeds)
        logits = weights.functional_call(self.head, query.flatten(1, 2)).flatten(0, 1)
        label = torch.arange(WAYS, device=self.device).repeat_interleave(QUERIES).repeat(len(batch))
        self.history.append(float((logits.argmax(-1) == label).float().mean()))
        return nn.functional.cross_entropy(logits, label)

    def configure_optimizers(self):
        return torch.optim.Adam(self.network.parameters(), 1e-3)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--generator", help="folder or hub id; a small one is trained without")
    parser.add_argument("--folder", default="runs/example-bank", help="of the small one's trajectories")
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args(arguments)
    lightning.seed_everything(0, verbose=False)
    generator = (
        WeightGenerator.from_pretrained(options.generator) if options.generator else small_generator(options.folder, 16)
    )
    module = FewShot(generator)
    trainer = lightning.Trainer(
        max_steps=options.steps, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(Episodes(), batch_size=None))
    last = module.history[-50:]
    print(f"accuracy of the last {len(last)} steps: {100 * sum(last) / len(last):.1f} %")
    return module


if __name__ == "__main__":
    main()
