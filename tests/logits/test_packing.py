"""Bits against Python's integers, and packed logits against their definition, written out class by class."""

import math

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, Features, load_from_disk
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_ibdistill.logits.encoding import (
    LogitsEncoding,
    StoredLogits,
    concatenate_views,
    decode,
    describe_column,
    joined_feature,
    largest_class,
)
from hf_ibdistill.logits.packing import pack_bits, unpack_bits


SHARES = [(i / 7) ** 1.5 for i in range(8)]
SHARES[0] = SHARES[1] / 4


def make_logits(num_rows, num_views, num_classes, seed=0, scale=4.0):
    """Views of an image have similar logits."""
    random = np.random.default_rng(seed)
    images = random.normal(size=(num_rows, 1, num_classes)) * scale
    return (images + random.normal(size=(num_rows, num_views, num_classes)) * scale / 3).astype(np.float32)


def by_hand(views, k, temperature):
    """The logits (V, C) of an image's views as they are stored, in float64, one class after another."""
    views = views.astype(np.float64)
    num_classes = len(views[0])
    probabilities = np.exp(views - views.max(-1, keepdims=True))
    probabilities /= probabilities.sum(-1, keepdims=True)
    shared = sorted(range(num_classes), key=lambda c: -probabilities[:, c].mean())[:k]
    results = []
    for logits in views:
        top = int(logits.argmax())
        largest = max(logits[top] - logits[c] for c in shared)
        # The next power of 2 in eighths.
        scale = 0 if largest == 0 else 2 ** (math.ceil(8 * math.log2(largest)) / 8)
        result = {}
        for c in shared:
            given = logits[top] - logits[c]
            result[c] = -min((share * scale for share in SHARES), key=lambda level: abs(level - given))
        result[top] = 0.0
        others = [logits[c] - logits[top] for c in range(num_classes) if c not in result]
        rest = math.log(sum(math.exp(value) for value in others))
        gap = rest - math.log(len(others)) - sum(others) / len(others)
        even = float(np.float16(rest)) - math.log(len(others)) - min(255, round(8 * gap)) / 8 * (1 - 1 / temperature)
        results.append([result.get(c, even) for c in range(num_classes)])
    return np.array(results)


def read_all(column, num_classes, num_views, temperature=1.0):
    return np.stack([decode(column, num_classes, view, temperature) for view in range(num_views)], 1)


@given(bits=st.integers(1, 20), data=st.data())
def test_bits_are_those_of_one_whole_number(bits, data):
    values = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=30))
    packed = pack_bits(np.array([values]), bits)
    whole = sum(value << i * bits for i, value in enumerate(values))
    assert packed.tobytes() == whole.to_bytes(-(-bits * len(values) // 8), "little")
    assert unpack_bits(packed, bits, len(values)).tolist() == [values]


@settings(max_examples=60, deadline=None)
@given(
    num_rows=st.integers(1, 3),
    num_views=st.integers(1, 4),
    num_classes=st.sampled_from([30, 256, 257, 1000]),
    k=st.integers(2, 26),
    scale=st.sampled_from([0.3, 3.0, 12.0]),
    temperature=st.sampled_from([1.0, 2.0, 4.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_what_is_read_follows_from_the_definition(num_rows, num_views, num_classes, k, scale, temperature, seed):
    logits = make_logits(num_rows, num_views, num_classes, seed, scale)
    column = LogitsEncoding("packed", k).encode(logits, views=True)
    for tau, allowed in ((1.0, 2e-3), (temperature, 0.13)):
        read = read_all(column, num_classes, num_views, tau)
        expected = np.stack([by_hand(views, k, tau) for views in logits])
        # float32 decides otherwise than float64 only at the edge between two levels, scales or eighths of the gap.
        assert np.isclose(read, expected, rtol=2e-3, atol=allowed).mean() > 0.97
    assert (read.argmax(-1) == logits.argmax(-1)).all()


def test_without_views_each_row_has_its_own_classes(tmp_path):
    logits = make_logits(7, 1, 50)
    encoding = LogitsEncoding("packed", 6)
    features = Features({"a_logits": encoding.feature(50, None)})
    Dataset(pa.table({"a_logits": encoding.encode(logits[:, 0])}).cast(features.arrow_schema)).save_to_disk(
        tmp_path / "t"
    )
    table = load_from_disk(tmp_path / "t")
    assert describe_column(table.features["a_logits"]) == (encoding, None, None)
    expected = np.stack([by_hand(views, 6, 1.0)[0] for views in logits])
    np.testing.assert_allclose(StoredLogits(table, "a_logits").read(range(7), 50), expected, atol=2e-3)


def test_bytes_of_a_view():
    column = LogitsEncoding("packed").encode(make_logits(100, 10, 1000), views=True)
    # 26 ids of 10 bits for ten views, then 26 levels of 3 bits, an id in two bytes, scale, rest in two, gap.
    assert column.nbytes == 100 * (26 + 7 + 10 * (10 + 2 + 1 + 2 + 1))
    assert LogitsEncoding("packed").to_dict() == {"dtype": "packed", "top_k": 26}


def test_more_than_65536_classes():
    logits = make_logits(2, 3, 70_000)
    logits[0, :, 69_999] = 100
    read = read_all(LogitsEncoding("packed", 8).encode(logits, views=True), 70_000, 3)
    assert (read.argmax(-1) == logits.argmax(-1)).all() and (read[0].argmax(-1) == 69_999).all()


@pytest.mark.parametrize("counts", [(2, 3), (4, 6), (3, 3), (1, 5)])
def test_joined_views_are_those_of_both_columns(counts):
    encoding = LogitsEncoding("packed", 5)
    parts = [make_logits(6, count, 300, seed=count) for count in counts]
    columns = [encoding.encode(part, views=True) for part in parts]
    joined, total = concatenate_views(*columns), sum(counts)
    expected = np.concatenate([read_all(column, 300, count) for column, count in zip(columns, counts)], 1)
    assert np.array_equal(read_all(joined, 300, total), expected)
    feature = joined_feature(*(encoding.feature(300, count) for count in counts))
    assert describe_column(feature) == (encoding, total, None)
    assert Features({"column": feature}).arrow_schema.field("column").type == joined.type
    # And once more, behind groups of another size than those of the third part.
    third = encoding.encode(make_logits(6, 4, 300, seed=9), views=True)
    whole = read_all(concatenate_views(joined, third), 300, total + 4)
    assert np.array_equal(whole, np.concatenate([expected, read_all(third, 300, 4)], 1))


def stored_table(logits, encoding):
    feature = Features({"a_logits": encoding.feature(logits.shape[-1], logits.shape[1])})
    return Dataset(pa.table({"a_logits": encoding.encode(logits, views=True)}).cast(feature.arrow_schema)).cast(
        feature
    )


def test_logits_that_would_be_rounded_alike_are_equal_and_others_differ_by_what_they_do():
    logits = make_logits(40, 3, 300)
    stored = StoredLogits(stored_table(logits, LogitsEncoding("packed", 12)), "a_logits")
    rows = [3, 17, 39]
    recorded = stored.read(rows, 300, 1)
    # The recorded logits themselves are alike, by another constant as well.
    np.testing.assert_allclose(stored.nearest(rows, logits[rows, 1] + 7, 1), recorded, atol=5e-3)
    other = logits[rows, 1].copy()
    shared = np.argsort(-recorded, -1)[:, 5]
    other[range(3), shared] += 20
    moved = stored.nearest(rows, other, 1) - recorded
    for row, c in enumerate(shared):
        # Up to half of the distance to the next level is rounding.
        assert 15 < moved[row, c] <= 20
        assert np.abs(np.delete(moved[row], c)).max() < 5e-3
    # A class of the rest that becomes likely shows in the rest.
    other = logits[rows, 1].copy()
    other[range(3), recorded.argmin(-1)] += 30
    assert (np.abs(stored.nearest(rows, other, 1) - recorded).max(-1) > 5).all()


@pytest.mark.parametrize("value", [200.0, 6e4, 3e38])
def test_large_logits_keep_their_probabilities(value):
    logits = np.zeros((2, 2, 60), np.float32)
    logits[..., :20] = -value
    logits[..., 20:] = -value / 2
    logits[:, :, 33] = value
    column = LogitsEncoding("packed", 5).encode(logits, views=True)
    for temperature in (1.0, 4.0):
        read = read_all(column, 60, 2, temperature) / temperature
        assert np.isfinite(read).all()
        probabilities = np.exp(read) / np.exp(read).sum(-1, keepdims=True)
        assert (probabilities[..., 33] > 1 - 1e-6).all()


def test_equal_logits_are_read_as_equal():
    read = read_all(LogitsEncoding("packed", 4).encode(np.full((1, 2, 40), 3, np.float32), views=True), 40, 2)
    # The rest is stored in float16.
    np.testing.assert_allclose(read, 0, atol=1e-3)


def test_what_cannot_be_packed_is_refused():
    # One byte of levels, scale, rest in two, gap, an id in two, and three ids.
    with pytest.raises(ValueError, match=r'dtype="packed" with top_k=3 takes 11 bytes a view, all 5 logits 10'):
        LogitsEncoding("packed", 3).feature(5, None)
    with pytest.raises(ValueError, match=r"top_k=9 takes .* all 10 logits"):
        LogitsEncoding("packed", 9).feature(10, 100)
    with pytest.raises(ValueError, match=r"top_k=26 .*\(20\)"):
        LogitsEncoding("packed").feature(20, 3)


def test_ids_of_another_number_of_classes_are_refused():
    column = LogitsEncoding("packed", 6).encode(make_logits(2, 2, 200), views=True)
    assert largest_class(column, 200) < 200
    with pytest.raises(ValueError, match="not those of 1000 classes"):
        decode(column, 1000, 0)
    # A class that does not exist, as in a damaged file.
    assert np.isnan(decode(column, 20, 0)).all(axis=1).any()
