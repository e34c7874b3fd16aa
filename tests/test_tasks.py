import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mcdi_fast.errors import McdiError
from mcdi_fast.tasks import FAMILIES, ClassImages, Episodes, check_episodes, load_dataset, sample_episodes

SIZES = {"ways": 5, "shots": 2, "queries": 3}


def error_of(call, *args, **options):
    with pytest.raises(McdiError) as caught:
        call(*args, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def same(a, b):
    return all(torch.equal(value, getattr(b, name)) for name, value in vars(a).items())


def part(episodes, start, end):
    return Episodes(**{name: value[start:end] for name, value in vars(episodes).items()})


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_episodes_are_valid_whatever_the_sizes(data):
    classes, drawers = data.draw(st.integers(2, 30)), data.draw(st.integers(1, 20))
    ways = data.draw(st.integers(2, classes))
    shots = data.draw(st.integers(1, drawers))
    queries = data.draw(st.integers(0, drawers - shots))
    count, seed = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 2**40))
    start = data.draw(st.integers(0, 10**9))
    sizes = {"ways": ways, "shots": shots, "queries": queries, "seed": seed}
    episodes = sample_episodes(classes, drawers, **sizes, start=start, count=count)
    assert episodes.classes.shape == (count, ways)
    assert episodes.support.shape == (count, ways, shots)
    assert episodes.query.shape == (count, ways, queries)
    for value in vars(episodes).values():
        assert value.dtype == torch.int64
    for i in range(count):
        chosen = episodes.classes[i].tolist()
        assert len(set(chosen)) == ways
        assert set(chosen) <= set(range(classes))
        for way in range(ways):
            used = [*episodes.support[i, way].tolist(), *episodes.query[i, way].tolist()]
            assert len(set(used)) == shots + queries  # no drawer in both, none twice
            assert set(used) <= set(range(drawers))
    cut = data.draw(st.integers(0, count))
    first = sample_episodes(classes, drawers, **sizes, start=start, count=cut)
    second = sample_episodes(classes, drawers, **sizes, start=start + cut, count=count - cut)
    assert same(first, part(episodes, 0, cut))
    assert same(second, part(episodes, cut, count))


def test_another_seed_or_number_is_another_task():
    episodes = sample_episodes(100, 20, **SIZES, seed=0, start=0, count=50)
    others = sample_episodes(100, 20, **SIZES, seed=1, start=0, count=50)
    seen = {tuple(row.tolist()) for e in (episodes, others) for row in e.classes}
    assert len(seen) == 100
    assert not torch.equal(episodes.support[:, 0], episodes.support[:, 1])  # ways draw their own drawers


def test_every_class_and_drawer_gets_its_turn():
    episodes = sample_episodes(10, 6, **SIZES, seed=0, start=0, count=2000)
    for value, size in ((episodes.classes, 10), (episodes.support, 6), (episodes.query, 6)):
        count = value.flatten().bincount(minlength=size)
        expected = value.numel() / size
        assert ((count - expected).abs() < 6 * expected**0.5).all()
    first = episodes.classes[:, 0].bincount(minlength=10)  # the order of the ways is random too
    assert ((first - 200).abs() < 6 * 200**0.5).all()


def test_take():
    episodes = sample_episodes(7, 6, **SIZES, seed=0, start=0, count=4)
    images = np.arange(7 * 6).reshape(7, 6)
    features = torch.from_numpy(images)[..., None, None] + torch.zeros(3, 2)
    support, query = episodes.take(features)
    assert support.shape == (4, 5, 2, 3, 2)
    assert query.shape == (4, 5, 3, 3, 2)
    for i in range(4):
        for way in range(5):
            label = int(episodes.classes[i, way])
            for found, drawer in ((support, episodes.support), (query, episodes.query)):
                expected = [images[label, d] for d in drawer[i, way].tolist()]
                assert found[i, way, :, 0, 0].tolist() == expected
    assert episodes.take(torch.zeros(7, 6))[0].shape == (4, 5, 2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ways": 1}, ("--task.ways = 1", "at least 2")),
        ({"ways": -3}, ("--task.ways = -3",)),
        ({"ways": 8}, ("--task.ways = 8", "7 classes")),
        ({"shots": 0}, ("--task.shots = 0",)),
        ({"shots": -1}, ("--task.shots = -1",)),
        ({"queries": -1}, ("--task.queries = -1",)),
        ({"queries": 5}, ("--task.shots 2", "--task.queries 5", "7", "6 images")),
        ({"shots": 7, "queries": 0}, ("--task.shots 7", "6 images")),
    ],
)
def test_what_cannot_be_drawn(change, words):
    sizes = SIZES | change
    for message in (
        error_of(check_episodes, 7, 6, **sizes),
        error_of(sample_episodes, 7, 6, **sizes, seed=0, start=0, count=1),
    ):
        for word in words:
            assert word in message


def test_the_largest_that_can_be_drawn():
    check_episodes(7, 6, ways=7, shots=6, queries=0)
    check_episodes(7, 6, ways=2, shots=1, queries=5)
    episodes = sample_episodes(7, 6, ways=7, shots=1, queries=5, seed=0, start=0, count=1)
    assert episodes.classes.sort().values.tolist() == [list(range(7))]


def test_class_images():
    images = ClassImages(np.zeros((3, 4, 28, 28), np.uint8))
    assert (images.num_classes, images.images_per_class) == (3, 4)


@pytest.mark.parametrize("name", ["mnist", "", "Omniglot", "omniglot.py", "../omniglot", "__init__"])
def test_an_unknown_dataset_names_those_there_are(name, tmp_path):
    message = error_of(load_dataset, name, None, tmp_path)
    assert f"{name!r}" in message
    for family in FAMILIES:
        assert family in message


def test_glyphs_by_name(tmp_path):
    data = load_dataset("glyphs", None, tmp_path)
    assert data.name == "glyphs"
    assert not list(tmp_path.iterdir())
