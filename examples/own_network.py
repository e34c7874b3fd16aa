"""A weight generator for a small network of one's own: networks that draw a sine of given amplitude and phase, without training them.

    python examples/own_network.py [--steps 2000]

Four steps, each of which may be replaced by one's own: a module, its layout, trajectories of its training in a bank, `fit`. Then a network
for any (amplitude, phase) is sampled in milliseconds.
"""

import argparse
import shutil

import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from mcdi_fast import DenoiserConfig, DiffusionConfig, MetaConfig, Sampler, TrajectoryBank, WeightLayout, fit


def network():
    return nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))


X = torch.linspace(-2, 2, 64).unsqueeze(1)


def wave(task):
    """Tasks [B, 2] -> what their networks should draw, [B, 64, 1]."""
    amplitude, phase = task.unbind(1)
    return amplitude[:, None, None] * torch.sin(2 * X + phase[:, None, None])


def trajectories(net, task, steps=300, record=3):
    """Adam on all tasks at once, from one start: {name: [B, record, *shape]}. A common start keeps the networks comparable."""
    target = wave(task)
    state = {name: p.detach().expand(len(task), *p.shape).clone() for name, p in net.named_parameters()}

    def loss(weights, y):
        return (functional_call(net, weights, (X,)) - y).square().mean()

    optimizer = torch.optim.Adam(state.values(), 0.02)
    kept = {name: [] for name in state}
    for step in range(1, steps + 1):
        for name, gradient in vmap(grad(loss))(state, target).items():
            state[name].grad = gradient
        optimizer.step()
        if step % (steps // record) == 0:
            for name, value in state.items():
                kept[name].append(value.clone())
    return {name: torch.stack(values, 1) for name, values in kept.items()}


def draw_tasks(count, seed):
    uniform = torch.rand(count, 2, generator=torch.Generator().manual_seed(seed))
    return torch.stack([0.5 + uniform[:, 0], 3 * uniform[:, 1]], 1)


def tell(task, num_tokens):
    """The condition [B, N, C] of tasks: the wave, and for every token which one it is.

    The tokens of a network are its units, and each has a place; the denoiser treats tokens alike unless the condition tells them apart.
    """
    amplitude, phase = task.unbind(1)
    wave = torch.stack([amplitude * phase.cos(), amplitude * phase.sin(), amplitude], 1)
    place = torch.eye(num_tokens).expand(len(task), -1, -1)
    return torch.cat([wave[:, None].expand(-1, num_tokens, -1), place], 2)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000, help="of meta-training")
    parser.add_argument("--tasks", type=int, default=500)
    parser.add_argument("--folder", default="runs/example-waves")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)

    net = network()
    layout = WeightLayout.from_module(net)  # select=["0", "2.bias"] would take some of the layers only
    task = draw_tasks(options.tasks, seed=1)
    shutil.rmtree(options.folder, ignore_errors=True)
    condition = tell(task, layout.num_tokens)
    bank = TrajectoryBank.create(options.folder, layout, num_segments=3, condition_width=condition.shape[-1])
    bank.append(layout.pack_batch(trajectories(net, task)), condition)

    meta = MetaConfig(steps=options.steps, meta_batch=16, samples=2, ema=0.99)
    generator = fit(bank, meta, DiffusionConfig(steps=12), DenoiserConfig(128, 2))
    generator.save_pretrained(f"{options.folder}/generator")

    new = draw_tasks(50, seed=2)
    weights = Sampler(generator).sample(tell(new, layout.num_tokens), seeds=range(50))
    drawn = weights.functional_call(net, X.expand(50, -1, -1))
    error = float((drawn - wave(new)).square().mean().sqrt())
    guess = float((wave(task).mean(0) - wave(new)).square().mean().sqrt())
    print(f"generated networks: error {error:.3f}; the mean of all waves: {guess:.3f}")
    weights.load_into(net, 0)  # one of them, as an ordinary module
    return error, guess


if __name__ == "__main__":
    main()
