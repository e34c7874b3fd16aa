"""Networks of different starts made comparable: hidden units permuted onto those of a reference.

Weight matching of Git Re-Basin (Ainsworth et al., 2023).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mcdi_fast.errors import McdiError, needs
from mcdi_fast.weights import WeightLayout

_ROUNDS = 20  # over the hidden layers; each only raises the agreement, and two or three are usual


@torch.no_grad()
def align(points: Tensor, layout: WeightLayout, reference: Tensor, odd: bool = False) -> Tensor:
    """Permute the hidden units of each network so that its weights agree most with the reference's (largest inner product). Its function stays.

    Networks that were trained from different starts have no mean, and a generator nothing to learn: unit 3 of one is unit 7 of another.

    Args:
        points: [B, k, N, D], points of B trajectories, as of a bank. The last one is matched; the others take its permutation.
        layout: of linear layers in the order in which they are applied, each a weight [out, in] and perhaps a bias [out].
        reference: [N, D]: one of the networks, or a mean of aligned ones.
        odd: units may change their sign too, which is right where act(-x) = -act(x), as with tanh.

    Returns:
        [B, k, N, D]

    Raises:
        McdiError: other shapes; a layout of something else than linear layers in a row; scipy is not installed.
    """
    with needs("align", "scipy", "scipy"):
        from scipy.optimize import linear_sum_assignment
    layout.check_tokens(reference)
    if points.ndim != 4 or points.shape[2:] != reference.shape:
        raise McdiError(f"points: shape {list(points.shape)}, expected [B, k, {layout.num_tokens}, {layout.width}]")
    layers = _layers(layout)
    found, goal = layout.unpack(points), layout.unpack(reference)
    found = {name: tensor.clone() for name, tensor in found.items()}

    def agreement(b: int, layer: int) -> Tensor:
        """[units of the reference, units of network b], in float64."""
        following = layers[layer + 1][0]
        theirs, mine = (
            torch.cat([*(part[name].reshape(len(part[name]), -1) for name in layers[layer]), part[following].T], 1)
            for part in (goal, {name: tensor[b, -1] for name, tensor in found.items()})
        )
        return theirs.double() @ mine.double().T

    for b in range(len(points)):
        for _ in range(_ROUNDS):
            moved = False
            for layer in range(len(layers) - 1):
                gain = agreement(b, layer)
                value = gain.abs() if odd else gain
                unit = torch.from_numpy(linear_sum_assignment(value.numpy(), maximize=True)[1])
                sign = gain.gather(1, unit[:, None])[:, 0].sign() if odd else torch.ones(len(unit))
                sign = torch.where(sign == 0, 1.0, sign).to(points)
                moved |= bool((unit != torch.arange(len(unit))).any() or (sign < 0).any())
                for name in layers[layer]:
                    tensor = found[name][b][:, unit]
                    found[name][b] = tensor * (sign[:, None] if tensor.ndim == 3 else sign)
                following = layers[layer + 1][0]
                found[following][b] = found[following][b][:, :, unit] * sign
            if not moved:
                break
    return layout.pack_batch(found, dtype=points.dtype)


def _layers(layout: WeightLayout) -> list[list[str]]:
    """Names of each linear layer's tensors: the weight, then the bias where there is one."""
    layers: list[list[str]] = []
    shapes = layout.shapes
    for name, shape in shapes.items():
        if len(shape) == 2 and (not layers or shape[1] == shapes[layers[-1][0]][0]):
            layers.append([name])
        elif len(shape) == 1 and layers and len(layers[-1]) == 1 and shape[0] == shapes[layers[-1][0]][0]:
            layers[-1].append(name)
        else:
            raise McdiError(f"align: {name} of shape {list(shape)} is no linear layer behind the ones before it")
    return layers
