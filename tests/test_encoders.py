"""Encoders: their fingerprint, the cache of features (resumed, damaged), what a user's module may get wrong; the projection."""

import sys

import numpy as np
import pytest
import torch
from helpers import error_of
from torch import nn

from mcdi_fast.tasks import encoders
from mcdi_fast.tasks.encoders import LITE0, Encoder, Projection, ScaledImages, encode, load_encoder
from mcdi_fast.tasks.images import LabelledRows


class Mean(nn.Module):
    """Mean colour, and how often it was asked."""

    def __init__(self, gain=1.0):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))
        self.seen = 0

    def forward(self, images):
        self.seen += len(images)
        return self.gain * images.float().mean((1, 2))


def images(n=10, side=4):
    pixels = np.random.default_rng(0).integers(0, 256, (n, side, side, 3), np.uint8)
    return LabelledRows.of(torch.from_numpy(pixels), torch.arange(n) % 2)


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """A module of the user's with functions that make good and bad networks."""
    (tmp_path / "users_encoder.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self, f):\n"
        "        super().__init__()\n"
        "        self.f = f\n"
        "    def forward(self, x):\n"
        "        return self.f(x)\n"
        "def good(): return Net(lambda x: x.float().mean((1, 2)))\n"
        "def half(): return Net(lambda x: x.float().mean((1, 2)).half())\n"
        "def flat(): return Net(lambda x: x.float().mean((1, 2, 3)))\n"
        "def nan(): return Net(lambda x: x.float().mean((1, 2)) / 0)\n"
        "def fails(): return Net(lambda x: x @ x)\n"
        "def no_module(): return 3\n"
        "def no_weights(): raise OSError('weights.pt is\\nnot there')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield "users_encoder"
    sys.modules.pop("users_encoder", None)


def test_features_are_computed_once(tmp_path, monkeypatch):
    monkeypatch.setattr(encoders, "CHUNK", 4)
    data, network = images(), Mean()
    encoder = Encoder("mean", network)
    found = encode(encoder, data, tmp_path)
    assert torch.allclose(found.rows, data.rows.float().mean((1, 2)))
    assert found.class_names == data.class_names
    assert network.seen == 10
    files = sorted((tmp_path / "features" / f"{data.fingerprint}-{encoder.fingerprint}").iterdir())
    assert [file.name for file in files] == ["000000.safetensors", "000001.safetensors", "000002.safetensors"]
    files[1].unlink()  # a run that was stopped
    again = encode(encoder, data, tmp_path)
    assert network.seen == 14
    assert torch.equal(again.rows, found.rows)
    other = Encoder("mean", Mean(2.0))
    assert torch.equal(encode(other, data, tmp_path).rows, 2 * found.rows)
    assert encode(encoder, found, tmp_path) is found  # ready-made features


def test_a_damaged_cache_is_named(tmp_path):
    data, encoder = images(), Encoder("mean", Mean())
    encode(encoder, data, tmp_path)
    (file,) = tmp_path.rglob("*.safetensors")
    encode(encoder, images(8), tmp_path)
    (other,) = set(tmp_path.rglob("*.safetensors")) - {file}
    other.replace(file)
    assert f"{file}: does not hold the features of 10 images" in error_of(encode, encoder, data, tmp_path)
    file.write_bytes(file.read_bytes()[:-5])
    assert str(file) in error_of(encode, encoder, data, tmp_path)


def test_fingerprint_changes_with_name_network_and_weights():
    network = ScaledImages(Mean(), 8, 0.5, 0.5)
    others = [
        Encoder("a", ScaledImages(Mean(), 8, 0.5, 0.5)),
        Encoder("b", network),
        Encoder("a", ScaledImages(Mean(2.0), 8, 0.5, 0.5)),
        Encoder("a", ScaledImages(Mean(), 4, 0.5, 0.5)),
        Encoder("a", ScaledImages(Mean(), 8, 0.4, 0.5)),
        Encoder("a", ScaledImages(Mean(), 8, [0.5] * 3, 0.5)),
    ]
    found = [encoder.fingerprint for encoder in others]
    assert found[0] == Encoder("a", network).fingerprint
    assert len(set(found)) == len(found)


def test_scaled_images():
    network = ScaledImages(nn.Flatten(), 2, (0.5, 0.25, 0.0), (0.5, 1.0, 2.0))
    pixels = torch.zeros(1, 4, 4, 3, dtype=torch.uint8)
    pixels[..., 0], pixels[..., 1], pixels[..., 2] = 255, 0, 51
    expected = torch.tensor([[1.0] * 4 + [-0.25] * 4 + [0.1] * 4])
    assert torch.allclose(network(pixels), expected)


def test_an_encoder_of_the_users(user_module):
    pixels = images().rows
    assert torch.allclose(load_encoder(f"{user_module}:good")(pixels), pixels.float().mean((1, 2)))
    assert load_encoder(f"{user_module}:half")(pixels).dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet", "expected efficientnet-lite0 or package.module:function"),
        ("users_encoder:", "expected efficientnet-lite0 or"),
        ("users_encoder:absent", "AttributeError"),
        ("no_such_module_at_all:f", "ModuleNotFoundError"),
        ("users_encoder:no_module", "returned int, expected a torch module"),
        ("users_encoder:no_weights", "OSError (weights.pt is not there)"),
    ],
)
def test_what_is_no_encoder_is_named(user_module, name, message):
    assert message in error_of(load_encoder, name)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("flat", "gives [10] for 10 images"),
        ("nan", "NaN or infinity"),
        ("fails", "RuntimeError for uint8 images [10, 4, 4, 3]"),
    ],
)
def test_what_an_encoder_does_wrong_is_named(user_module, function, message):
    assert message in error_of(load_encoder(f"{user_module}:{function}"), images().rows)


def test_lite0_without_its_packages(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    assert "run pip install 'mcdi_fast[vision]'" in error_of(load_encoder, LITE0)


def test_lite0_features():
    """Against the package's own forward, head removed, image by image; 64 and 32 pixels."""
    pytest.importorskip("efficientnet_lite_pytorch")
    encoder = load_encoder(LITE0)
    for side in (32, 64):
        pixels = images(3, side).rows
        x = nn.functional.interpolate(pixels.permute(0, 3, 1, 2) / 255, size=(128, 128), mode="bilinear")
        whole = load_encoder(LITE0).network.network.whole.double()
        whole._fc, whole._dropout = nn.Identity(), nn.Identity()
        with torch.no_grad():
            expected = torch.cat([whole(one[None].double()).flatten(1) for one in (x - 0.498) / 0.502])
        found = encoder(pixels)
        assert found.shape == (3, 1280)
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    assert encoder.fingerprint == load_encoder(LITE0).fingerprint


def test_projection_against_the_decomposition(tmp_path):
    x = torch.randn(200, 7, generator=torch.Generator().manual_seed(0)) @ torch.diag(torch.arange(1.0, 8)) + 3
    projection = Projection.fit(x, 3)
    found = projection(x)
    centred = x.double() - x.double().mean(0)
    _, values, vectors = torch.linalg.svd(centred, full_matrices=False)
    expected = centred @ vectors[:3].T / (values[:3].square().sum() / len(x)).sqrt()
    assert torch.allclose(found.abs(), expected.abs().float(), atol=1e-5)
    assert abs(found.square().sum(1).mean() - 1) < 1e-5
    assert projection(x.view(10, 20, 7)).shape == (10, 20, 3)
    whole = Projection.fit(x, None)(x)
    distance = torch.cdist(centred, centred) / centred.square().sum(1).mean().sqrt()
    assert torch.allclose(torch.cdist(whole.double(), whole.double()), distance, atol=1e-5)
    projection.save(tmp_path / "p.safetensors")
    again = Projection.load(tmp_path / "p.safetensors")
    assert again.fingerprint == projection.fingerprint != Projection.fit(x, 4).fingerprint
    assert torch.equal(again(x), found)


def test_features_that_are_never_negative_are_rooted(tmp_path):
    x = torch.rand(50, 4, generator=torch.Generator().manual_seed(0))
    rooted = Projection.fit(x, None)
    centred = x.sqrt() - x.sqrt().mean(0)
    assert torch.allclose(rooted(x), centred / centred.square().sum(1).mean().sqrt(), atol=1e-6)
    assert torch.allclose(rooted(-x) + rooted.mean @ rooted.basis, -(rooted(x) + rooted.mean @ rooted.basis), atol=1e-6)
    assert rooted.fingerprint != Projection(rooted.mean, rooted.basis, False).fingerprint
    rooted.save(tmp_path / "p.safetensors")
    assert torch.equal(Projection.load(tmp_path / "p.safetensors")(x), rooted(x))
    x[3, 2] = -0.1
    assert not Projection.fit(x, None).root


def test_projections_that_cannot_be(tmp_path):
    assert "all features are alike" in error_of(Projection.fit, torch.ones(5, 3), 2)
    assert "expected at least 2 and 1" in error_of(Projection.fit, torch.ones(1, 3), 2)
    assert "expected at least 2 and 1" in error_of(Projection.fit, torch.randn(5, 3), 0)
    bad = Projection(torch.zeros(3), torch.full((3, 2), float("nan")), False)
    bad.save(tmp_path / "p.safetensors")
    assert "holds no projection" in error_of(Projection.load, tmp_path / "p.safetensors")
    Projection(torch.zeros(4), torch.zeros(3, 2), False).save(tmp_path / "p.safetensors")
    assert "holds no projection" in error_of(Projection.load, tmp_path / "p.safetensors")
