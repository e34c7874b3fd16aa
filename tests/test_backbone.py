"""Features of images: of the image, of an augmented copy, of the mean of several views."""

import torch

from mcdi_fast.backbone import augment, conv4, extract_features, to_float
from mcdi_fast.tasks import glyphs


def test_features_of_several_views_are_their_mean():
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
