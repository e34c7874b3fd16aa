"""Labelled rows: sorting, choosing, joining, and what is refused. Readers of zips, folders and feature files, and bad input to each."""

import pytest
import torch

from mcdi_fast.errors import McdiError
from mcdi_fast.tasks.images import LabelledRows, check_class_splits, join


def ragged():
    """Classes a (3 rows), b (1), c (2) in two domains, given unsorted; row r holds the number r."""
    return LabelledRows.of(
        torch.arange(6.0)[:, None],
        torch.tensor([2, 0, 1, 0, 2, 0]),
        ("a", "b", "c"),
        torch.tensor([1, 1, 0, 0, 1, 1]),
        ("x", "y"),
    )


def refused(*parts, **options):
    with pytest.raises(McdiError) as caught:
        LabelledRows.of(*parts, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_rows_are_sorted_by_class_then_domain():
    data = ragged()
    assert data.rows.flatten().tolist() == [3, 1, 5, 2, 0, 4]
    assert data.labels.tolist() == [0, 0, 0, 1, 2, 2]
    assert data.domains.tolist() == [0, 1, 1, 0, 1, 1]
    assert data.counts.tolist() == [3, 1, 2]
    assert data.starts.tolist() == [0, 3, 4]
    assert len(data) == 6


def test_select_renumbers_in_the_order_given():
    chosen = ragged().select(classes=["c", 0], domains=["y"])
    assert chosen.class_names == ("c", "a")
    assert chosen.domain_names == ("y",)
    assert chosen.rows.flatten().tolist() == [0, 4, 1, 5]
    assert chosen.labels.tolist() == [0, 0, 1, 1]
    assert chosen.domains.tolist() == [0] * 4
    assert ragged().select().fingerprint == ragged().fingerprint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": ["d"]}, "'d'"),
        ({"classes": [3]}, "class 3"),
        ({"classes": ["a", 0]}, "given twice"),
        ({"domains": ["z"]}, "'z'"),
        ({"classes": ["b"], "domains": ["y"]}, "expected [n, ...] with n >= 1"),
        ({"classes": ["a", "b"], "domains": ["y"]}, "class b has no rows"),
    ],
)
def test_select_names_what_is_wrong(options, message):
    with pytest.raises(McdiError) as caught:
        ragged().select(**options)
    assert message in str(caught.value)


def test_fingerprint_changes_with_every_part():
    data = ragged()
    others = [
        data.with_rows(data.rows + 1),
        data.with_rows(data.rows.reshape(3, 2).repeat(2, 1)),
        LabelledRows(data.rows, data.labels.flip(0), data.class_names, data.domains, data.domain_names),
        LabelledRows(data.rows, data.labels, ("a", "b", "d"), data.domains, data.domain_names),
        LabelledRows(data.rows, data.labels, data.class_names, 1 - data.domains, data.domain_names),
        LabelledRows(data.rows, data.labels, data.class_names),
    ]
    assert len({part.fingerprint for part in [data, *others]}) == len(others) + 1
    assert all(len(part.fingerprint) == 16 for part in others)


def test_join_takes_classes_of_one_name_as_one():
    data = ragged()
    whole = join([data.select(classes=["c", "b"]), data.select(classes=["a"]), data.select(classes=["b"])])
    assert whole.class_names == ("c", "b", "a")
    assert whole.counts.tolist() == [2, 2, 3]
    assert whole.select(classes=["a"]).rows.flatten().tolist() == [3, 1, 5]
    with pytest.raises(McdiError, match="one shape"):
        join([data, data.with_rows(torch.zeros(6, 2))])


def test_a_class_in_two_splits_is_named():
    data = ragged()
    check_class_splits({"train": data.select(classes=["a"]), "test": data.select(classes=["b", "c"])}, "data")
    with pytest.raises(McdiError, match=r"1 classes are in two splits: b \(train, test\)"):
        check_class_splits({"train": data.select(classes=["a", "b"]), "test": data.select(classes=["b", "c"])}, "data")


def test_too_few_rows_of_a_class_are_named_and_counted():
    with pytest.raises(McdiError, match=r"2 of 3 classes have fewer than 3 rows: b \(1\), c \(2\)"):
        ragged().check_counts(3, "data")
    ragged().check_counts(1, "data")


def test_bad_parts_are_refused():
    rows, labels = torch.zeros(4, 2), torch.tensor([0, 1, 1, 0])
    bad = rows.clone()
    bad[2, 1], bad[3, 0] = float("nan"), float("inf")
    assert "2 of 4 rows hold NaN or infinity (first: row 2)" in refused(bad, labels)
    assert "labels from 0 to 2, expected 0 to 1" in refused(rows, torch.tensor([0, 1, 2, 0]), ("a", "b"))
    assert "labels from -1 to 1" in refused(rows, torch.tensor([0, 1, -1, 0]))
    assert "class 1 has no rows" in refused(rows, torch.tensor([0, 2, 2, 0]))
    assert "expected integers [4]" in refused(rows, labels[:3])
    assert "expected integers [4]" in refused(rows, labels.float())
    assert "stands twice" in refused(rows, labels, ("a", "a"))
    assert "rows of torch.int64" in refused(rows.long(), labels)
    assert "n >= 1" in refused(rows[:0], labels[:0])
