"""Logits ↔ columns: dense and top-k against distributions computed by hand, and random access against decoding."""

import math
import pickle

import numpy as np
import pyarrow as pa
import pytest
import scipy.special
import torch
from datasets import Dataset, Features, List, Value, concatenate_datasets, load_from_disk
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_ibdistill.logits.encoding import (
    LogitsEncoding,
    NonFiniteLogitsError,
    StoredLogits,
    _top_k,
    _top_k_of_tensor,
    concatenate_views,
    decode,
    describe_column,
    missing_rows,
    recorded_teachers,
    unusable_rows,
)


def saved(column, feature, folder):
    """The column in a table that went through a file."""
    features = Features({"a_logits": feature})
    Dataset(pa.table({"a_logits": column}).cast(features.arrow_schema)).cast(features).save_to_disk(folder)
    return load_from_disk(folder)


def random_logits(*shape, seed=0, scale=5):
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


def expected_top_k(row, k):
    """The stored distribution by hand: the k largest probabilities, and the rest in equal parts."""
    row = row.astype(np.float64)
    probabilities = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
    largest = sorted(range(len(row)), key=lambda i: (-row[i], i))[:k]
    rest = max(0, 1 - probabilities[largest].sum()) / (len(row) - k)
    return np.array([probabilities[i] if i in largest else rest for i in range(len(row))])


def softmax(logits):
    logits = logits.astype(np.float64)
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


@pytest.mark.parametrize("num_views", [None, 1, 3])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_dense_round_trip_through_a_saved_table(dtype, num_views, tmp_path):
    logits = random_logits(13, *([] if num_views is None else [num_views]), 7)
    encoding = LogitsEncoding(dtype)
    table = saved(encoding.encode(logits, num_views is not None), encoding.feature(7, num_views), tmp_path / "t")
    assert describe_column(table.features["a_logits"]) == (encoding, num_views, 7)
    rows = [5, 0, 12]
    for view in [None] if num_views is None else range(num_views):
        read = decode(table.with_format("arrow")[rows]["a_logits"], 7, view)
        assert read.dtype == dtype
        assert np.array_equal(read, (logits if view is None else logits[:, view])[rows].astype(dtype))


@pytest.mark.parametrize("num_views", [None, 2])
@pytest.mark.parametrize("k", [2, 5, 19])
def test_top_k_keeps_the_largest_and_spreads_the_rest(k, num_views, tmp_path):
    logits = random_logits(11, *([] if num_views is None else [num_views]), 20)
    encoding = LogitsEncoding("float32", top_k=k)
    table = saved(encoding.encode(logits, num_views is not None), encoding.feature(20, num_views), tmp_path / "t")
    assert describe_column(table.features["a_logits"]) == (encoding, num_views, None)
    for view in [None] if num_views is None else range(num_views):
        read = decode(table.with_format("arrow")[:]["a_logits"], 20, view)
        for row, original in zip(softmax(read), logits if view is None else logits[:, view]):
            np.testing.assert_allclose(row, expected_top_k(original, k), rtol=1e-4, atol=1e-9)


def test_the_rest_follows_the_temperature():
    # The others' logits are normal, of which the expansion is exact but for the sample and the byte.
    logits = random_logits(50, 2000, scale=2)
    column = LogitsEncoding(top_k=10).encode(logits)
    for temperature in (1, 2, 4, 8):
        read = softmax(decode(column, 2000, temperature=temperature) / temperature)
        whole = softmax(logits / temperature)
        stored = np.array(column.field("class_ids").to_pylist())
        masses = [np.take_along_axis(p, stored, -1).sum(-1) for p in (read, whole)]
        np.testing.assert_allclose(1 - masses[0], 1 - masses[1], rtol=0.05)
        # The sum at temperature 1 alone would be further off.
        if temperature > 1:
            fixed = softmax(decode(column, 2000) / temperature)
            fixed = np.take_along_axis(fixed, stored, -1).sum(-1)
            assert np.abs(fixed - masses[1]).mean() > 2 * np.abs(masses[0] - masses[1]).mean()


@settings(max_examples=60, deadline=None)
@given(
    num_rows=st.integers(1, 5),
    num_classes=st.integers(3, 40),
    scale=st.sampled_from([0.0, 0.1, 3.0, 50.0]),
    seed=st.integers(0, 2**32 - 1),
    data=st.data(),
)
def test_both_encodings_round_trip_for_any_logits(num_rows, num_classes, scale, seed, data):
    logits = random_logits(num_rows, num_classes, seed=seed, scale=scale)
    dense = decode(LogitsEncoding().encode(logits), num_classes)
    assert np.array_equal(dense, logits.astype(np.float16))
    k = data.draw(st.integers(2, num_classes - 1))
    read = softmax(decode(LogitsEncoding(top_k=k).encode(logits), num_classes))
    for row, original in zip(read, logits):
        # float16 keeps 11 bits of a difference of up to some 100, hence the absolute error of a log-probability.
        expected = expected_top_k(original, k)
        error = np.abs(np.log(row + 1e-30) - np.log(expected + 1e-30))
        assert (error[expected > 1e-12] < 0.001 * (1 + np.ptp(original))).all()


def test_decoding_a_slice_equals_slicing_the_decoded():
    # Arrow slices share their parent's buffers; a reader that forgets the offset reads other rows.
    logits = random_logits(10, 3, 20)
    for encoding in (LogitsEncoding(), LogitsEncoding(top_k=4)):
        column = encoding.encode(logits, views=True)
        assert np.array_equal(decode(column[4:7], 20, 1), decode(column, 20, 1)[4:7])


@pytest.mark.parametrize("encoding", [LogitsEncoding(), LogitsEncoding("float32"), LogitsEncoding(top_k=4)])
def test_concatenated_views_are_the_bytes_of_encoding_them_together(encoding):
    logits = random_logits(6, 5, 20)
    first, second = encoding.encode(logits[:, :2], views=True), encoding.encode(logits[:, 2:], views=True)
    joined, whole = concatenate_views(first, second), encoding.encode(logits, views=True)
    assert joined.equals(whole.cast(joined.type))


def test_equal_logits_are_stored_in_the_order_of_their_classes():
    column = LogitsEncoding(top_k=3).encode(np.zeros((1, 6), np.float32))
    assert column.to_pylist() == [
        {"class_ids": [0, 1, 2], "differences": [0, 0], "rest": [pytest.approx(math.log(3), rel=1e-3)], "gap": [0]}
    ]


def test_bytes_of_a_row():
    logits = random_logits(100, 1000)
    assert LogitsEncoding().encode(logits).nbytes == 100 * 2000
    # Ten ids of two bytes, nine differences of two, the rest in two, the gap in one.
    assert LogitsEncoding(top_k=10).encode(logits).nbytes == 100 * 41


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite_are_named(value, top_k):
    logits = np.zeros((6, 2, 3), np.float32)
    logits[1, 0, 2] = logits[4, 1, 0] = value
    with pytest.raises(NonFiniteLogitsError, match=r"2 rows .*\[1, 4\].*Check the teacher") as error:
        LogitsEncoding(top_k=top_k).encode(logits, views=True)
    assert error.value.rows.tolist() == [1, 4]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("top_k", [None, 2, 3])
@pytest.mark.parametrize("value", [6e4, 1e5, 3e7, 3e38])
def test_logits_of_any_size_keep_their_probabilities(value, top_k, dtype):
    logits = np.array([[value, -value, 0, 1], [1, 2, 3, 4], [-value, -value, value, value]], np.float32)
    for views in (False, True):
        given = logits[:, None] if views else logits
        encoded = LogitsEncoding(dtype, top_k).encode(given, views=views)
        for temperature in (0.5, 1.0, 4.0, 100.0):
            read = decode(encoded, 4, 0 if views else None, temperature).astype(np.float64)
            assert np.isfinite(read).all()
            expected = scipy.special.softmax(logits.astype(np.float64) / temperature, axis=-1)
            # What the top k leaves out of an ordinary row is shared evenly.
            rows = [0, 2] if top_k else [0, 1, 2]
            np.testing.assert_allclose(scipy.special.softmax(read / temperature, -1)[rows], expected[rows], atol=1e-6)


def test_more_than_65536_classes():
    logits = random_logits(2, 70_000)
    logits[0, 69_999] = 100
    read = decode(LogitsEncoding("float32", top_k=2).encode(logits), 70_000)
    assert read.argmax(-1).tolist() == [69_999, int(logits[1].argmax())]


def test_wrong_encodings_are_refused():
    with pytest.raises(ValueError, match='dtype="int8".*float16, float32 or packed'):
        LogitsEncoding("int8")
    with pytest.raises(ValueError, match="top_k=1 .*2"):
        LogitsEncoding(top_k=1)
    with pytest.raises(ValueError, match=r"top_k=5 .*\(5\)"):
        LogitsEncoding(top_k=5).feature(5, None)
    for feature in (Value("float16"), List(Value("float16")), List(List(Value("float16"), length=3))):
        with pytest.raises(ValueError, match="fixed number of logits but "):
            describe_column(feature)


def test_recorded_teachers_are_found_by_their_columns():
    table = Dataset.from_dict({"image": [0], "b_logits": [0], "a_b_logits": [0], "logits": [0]})
    assert recorded_teachers(table) == ["b", "a_b"]


@pytest.mark.parametrize("num_views", [None, 3])
@pytest.mark.parametrize(
    "encoding", [LogitsEncoding("float16"), LogitsEncoding("float32", top_k=4), LogitsEncoding("packed", 2)], ids=str
)
def test_random_access_equals_decoding_the_rows(encoding, num_views, tmp_path):
    logits = random_logits(1300, *([] if num_views is None else [num_views]), 7)
    column, feature = encoding.encode(logits, num_views is not None), encoding.feature(7, num_views)
    # Names of another length for each row, as images have: chunks in the file lie at uneven distances.
    features = Features({"name": Value("string"), "a_logits": feature})
    names = pa.array(["x" * (i % 17) for i in range(1300)])
    in_memory = Dataset(pa.table({"name": names, "a_logits": column}).cast(features.arrow_schema)).cast(features)

    def written(table, name, **options):
        table.save_to_disk(tmp_path / name, **options)
        return load_from_disk(tmp_path / name)

    parts = [written(in_memory.select(rows), str(rows)) for rows in (range(500, 1300), range(500))]
    one_file = written(in_memory, "t")
    tables = {
        "in memory": in_memory,
        "one file": one_file,
        "shards": written(in_memory, "s", num_shards=3),
        "several folders": concatenate_datasets(parts),
        "shuffled": one_file.shuffle(seed=0),
        "filtered": one_file.filter(lambda name: len(name) % 2 == 0, input_columns="name"),
    }
    views = [None] if num_views is None else range(num_views)
    for made, table in tables.items():
        stored = StoredLogits(table, "a_logits")
        rows = [len(table) - 1, 0, 999, 1000, 7, 7, -2]
        batch = table.with_format("arrow")[[row % len(table) for row in rows]]["a_logits"]
        for view in views:
            expected = decode(batch, 7, view, 2.0)
            read = stored.read(rows, 7, view, 2.0)
            assert read.dtype == expected.dtype
            np.testing.assert_array_equal(read, expected, made)
        # Another process gets what was not read yet and what was.
        sent = pickle.loads(pickle.dumps(stored))
        np.testing.assert_array_equal(sent.read(rows, 7, views[-1], 2.0), read, made)


@pytest.mark.parametrize("num_views", [None, 2])
@pytest.mark.parametrize("dtype, top_k", [("float32", None), ("float32", 3), ("packed", 2)])
def test_rows_without_logits_move_no_others(dtype, top_k, num_views, tmp_path):
    encoding, feature = LogitsEncoding(dtype, top_k), LogitsEncoding(dtype, top_k).feature(5, num_views)
    logits = random_logits(*(4, 5) if num_views is None else (4, num_views, 5))
    whole = saved(encoding.encode(logits, views=num_views is not None), feature, tmp_path / "w")
    without = Dataset.from_dict({"other": range(3)})
    joined = concatenate_datasets([whole.select(range(1)), without, whole.select(range(1, 4))])
    has_logits = np.array([True] + [False] * 3 + [True] * 3)
    view = None if num_views is None else 1
    expected = decode(whole.data.column("a_logits"), 5, view)
    # One array, as a batch of a stream, and a part that begins in the middle.
    column = joined.data.column("a_logits").combine_chunks()
    decoded = decode(column, 5, view)
    assert np.isnan(decoded[~has_logits]).all() and np.array_equal(decoded[has_logits], expected)
    assert np.array_equal(decode(column.slice(2), 5, view)[2:], expected[1:])
    joined.save_to_disk(tmp_path / "j")
    for table in (joined, load_from_disk(tmp_path / "j")):
        stored = StoredLogits(table, "a_logits")
        assert np.array_equal(stored.read([6, 4], 5, view), expected[[3, 1]])
        with pytest.raises(ValueError, match='Row 2: the column "a_logits"'):
            stored.read([0, 2], 5, view)
        left = table.select(np.flatnonzero(has_logits))
        assert np.array_equal(StoredLogits(left, "a_logits").read(range(4), 5, view), expected)
    assert np.array_equal(missing_rows(column), [1, 2, 3])
    if top_k is None and num_views:
        inner = pa.array(
            [[[1.0, 2.0], [3.0, None]], [[1.0, 2.0], None], [[0.0, 0.0]] * 2], pa.list_(pa.list_(pa.float32(), 2), 2)
        )
        assert missing_rows(inner).tolist() == [0, 1]


@pytest.mark.parametrize("num_views", [None, 3])
@pytest.mark.parametrize("dtype, top_k", [("float16", None), ("float16", 4), ("packed", 8)])
def test_unusable_rows_are_those_that_are_not_decoded(dtype, top_k, num_views):
    """Random bytes are put over the column, so that every part of it is damaged somewhere."""
    rng, encoding = np.random.default_rng(0), LogitsEncoding(dtype, top_k)
    shape = (400, 100) if num_views is None else (400, num_views, 100)
    column = encoding.encode(random_logits(*shape), views=num_views is not None)
    valid = rng.random(len(column)) > 0.02

    def damage(array):
        buffers = []
        for buffer in array.buffers():
            content = None if buffer is None else np.frombuffer(buffer, np.uint8).copy()
            if content is not None:
                content[rng.integers(len(content), size=max(1, len(content) // 400))] = 0xFF
            buffers.append(None if content is None else pa.py_buffer(content.tobytes()))
        return pa.Array.from_buffers(array.type, len(array), buffers)

    def rebuilt(array):
        if pa.types.is_struct(array.type):
            parts = [rebuilt(array.field(i)) for i in range(array.type.num_fields)]
            return pa.StructArray.from_arrays(parts, fields=list(array.type), mask=pa.array(~valid))
        if pa.types.is_fixed_size_list(array.type):
            mask = pa.array(~valid) if len(array) == len(valid) and num_views != 1 else None
            return pa.FixedSizeListArray.from_arrays(rebuilt(array.values), type=array.type, mask=mask)
        return damage(array)

    column = rebuilt(column).slice(3)
    views = [None] if num_views is None else range(num_views)
    is_whole = np.all([np.isfinite(decode(column, 100, view)).all(axis=1) for view in views], axis=0)
    assert 10 < (~is_whole).sum() < 390
    assert unusable_rows(column, 100).tolist() == np.flatnonzero(~is_whole).tolist()


@pytest.mark.parametrize("shape", [(300, 200), (40, 5, 200)])
@pytest.mark.parametrize("step", [None, 0.5, 2.0, 1e30])
def test_an_accelerator_stores_what_the_processor_does(shape, step):
    """Rounded logits tie, within the largest and at their end. The tensor is on the CPU here, and takes the same path."""
    logits = random_logits(*shape)
    logits = logits if step is None else (logits / min(step, 2.0)).round() * np.float32(step)
    ids, stored, rest, gap = _top_k(logits, 10)
    if step is not None:
        by_size = np.sort(logits, axis=-1)
        assert (by_size[..., -10] == by_size[..., -11]).any()
    of_tensor = _top_k_of_tensor(torch.from_numpy(logits), 10)
    np.testing.assert_array_equal(of_tensor[0], ids)
    np.testing.assert_array_equal(of_tensor[1], stored)
    np.testing.assert_allclose(of_tensor[2], rest, rtol=1e-5, atol=1e-5)
    assert np.abs(of_tensor[3].astype(int) - gap.astype(int)).max() <= 1
    # And both what scipy makes of the others, from differences that end at the largest number of float16.
    differences = np.maximum(logits.astype(np.float64) - logits.max(-1, keepdims=True), -65504)
    np.put_along_axis(differences, ids, -np.inf, axis=-1)
    expected = scipy.special.logsumexp(differences, axis=-1, keepdims=True)
    np.testing.assert_allclose(rest, expected, rtol=1e-5, atol=1e-5)


def test_an_accelerator_refuses_logits_that_are_not_finite():
    logits = torch.zeros(4, 2, 20)
    logits[2, 1, 3] = math.nan
    with pytest.raises(NonFiniteLogitsError) as refused:
        _top_k_of_tensor(logits, 5)
    assert refused.value.rows.tolist() == [2]
