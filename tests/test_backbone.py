"""Training: its pass, its loss, its optimizer. Features of images: of the image, of an augmented copy, of the mean of several views."""

import copy

import torch

from mcdi_fast import backbone
from mcdi_fast.backbone import Muon, augment, conv4, episode_loss, extract_features, to_float, training_features
from mcdi_fast.tasks import glyphs


def test_features_of_several_views_are_their_mean(monkeypatch):
    monkeypatch.setattr(backbone, "native_bfloat16", lambda device: False)
    images = glyphs.load(3, 1, 1, drawers=4).train
    torch.manual_seed(0)
    network = conv4().eval()
    shape = (images.num_classes, images.images_per_class, 64)
    x = to_float(torch.from_numpy(images.images))

    def features(*views):
        with torch.no_grad():
            return torch.stack([network(view) for view in views]).double().mean(0).view(shape)

    def drawn(seed, count):
        generator = torch.Generator().manual_seed(seed)
        return [augment(x, generator) for _ in range(count)]

    assert torch.equal(extract_features(network, images), extract_features(network, images, views=1))
    for found, expected in [
        (extract_features(network, images, views=3), features(x, *drawn(0, 2))),
        (extract_features(network, images, augment_seed=5, views=2), features(*drawn(5, 2))),
    ]:
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_features_in_bfloat16_are_as_near_as_autocast_s(monkeypatch):
    """float32 tensors, no further from float64 than the network under autocast."""
    monkeypatch.setattr(backbone, "native_bfloat16", lambda device: True)
    images = glyphs.load(3, 1, 1, drawers=4).train
    torch.manual_seed(0)
    network = conv4().eval()
    x = to_float(torch.from_numpy(images.images))
    with torch.no_grad():
        exact = copy.deepcopy(network).double()(x.double())
        with torch.autocast("cpu", torch.bfloat16):
            coarse = network(x).double()
    found = extract_features(network, images)
    assert found.dtype == torch.float32
    error, allowed = (found.flatten(0, 1) - exact).norm(), (coarse - exact).norm()
    assert 0 < error < 1.5 * allowed < 0.1 * exact.norm()


def test_training_features_are_those_of_the_plain_network(monkeypatch):
    """The first batch norm inside the weights: values, gradients and running statistics."""
    monkeypatch.setattr(backbone, "native_bfloat16", lambda device: False)
    torch.manual_seed(0)
    ours = conv4().double().train()
    for parameter in ours.parameters():  # batch norms of both signs
        parameter.data += 0.5 * torch.randn_like(parameter) if parameter.ndim == 1 else 0
    plain = copy.deepcopy(ours)
    x = torch.rand(12, 1, 28, 28, dtype=torch.float64)
    weight = torch.randn(12, 64, dtype=torch.float64)
    found, expected = training_features(ours, x), plain(x)
    torch.testing.assert_close(found, expected)
    for features in (found, expected):
        (features * weight).sum().backward()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6)
    for a, b in zip(ours.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_relu_behind_the_pool_is_the_same_network():
    torch.manual_seed(0)
    network, x = conv4().eval(), torch.rand(4, 1, 28, 28)
    layers = list(network)
    swapped = [layers[i + j] for i in (0, 4, 8, 12) for j in (0, 1, 3, 2)]
    assert torch.equal(network(x), torch.nn.Sequential(*swapped, *layers[16:])(x))


def test_every_image_is_the_support_once():
    features = torch.randn(5, 3, 8)
    losses = []
    for support in range(3):
        for query in set(range(3)) - {support}:
            distance = (features[:, query, None] - features[None, :, support]).square().sum(-1)
            losses.append(torch.nn.functional.cross_entropy(-distance, torch.arange(5)))
    torch.testing.assert_close(episode_loss(features), torch.stack(losses).mean(), rtol=1e-4, atol=1e-5)


def test_muon_against_its_definition():
    torch.manual_seed(0)
    matrix, bias = (torch.nn.Parameter(torch.randn(shape)) for shape in ((8, 4, 3, 3), (8,)))
    plain = torch.nn.Parameter(bias.detach().clone())
    ours, adam = Muon([matrix], [bias], 0.01), torch.optim.Adam([plain], 0.01)
    momentum = torch.zeros(8, 36)
    for _ in range(3):
        matrix.grad, bias.grad = torch.randn(8, 4, 3, 3), torch.randn(8)
        plain.grad = bias.grad.clone()
        momentum = 0.95 * momentum + matrix.grad.flatten(1)
        before, wanted = matrix.detach().clone(), matrix.grad.flatten(1) + 0.95 * momentum
        ours.step()
        adam.step()
        step = (before - matrix.detach()).flatten(1) / 0.05
        u, _, v = torch.linalg.svd(wanted, full_matrices=False)
        inside = u.mT @ step @ v.mT
        assert inside.diagonal().min() > 0.6
        assert inside.diagonal().max() < 1.3
        torch.testing.assert_close(inside - inside.diagonal().diag(), torch.zeros(8, 8), atol=2e-3, rtol=0)
        torch.testing.assert_close(bias, plain)
