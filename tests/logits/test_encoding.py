import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, Features, List, Value, load_from_disk

from hf_ibdistill.logits.encoding import NonFiniteLogitsError, dense_feature, encode_dense, recorded_teachers


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_dense_round_trip_through_a_saved_table(dtype, tmp_path):
    logits = np.random.default_rng(0).normal(size=(13, 7)).astype(np.float32) * 5
    features = Features({"a_logits": dense_feature(7, dtype)})
    table = pa.table({"a_logits": encode_dense(logits, dtype)}).cast(features.arrow_schema)
    Dataset(table).cast(features).save_to_disk(tmp_path / "table")
    loaded = load_from_disk(tmp_path / "table")
    assert loaded.features["a_logits"] == List(Value(dtype), length=7)
    # Not through the numpy format, which widens float16.
    stored = loaded.with_format("arrow")[:]["a_logits"].combine_chunks().flatten().to_numpy()
    assert stored.dtype == dtype
    assert np.array_equal(stored.reshape(13, 7), logits.astype(dtype))


def test_dense_column_takes_two_bytes_a_class():
    column = encode_dense(np.zeros((1000, 10), np.float32))
    assert column.nbytes == 1000 * 10 * 2


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite_are_named(value):
    logits = np.zeros((6, 3), np.float32)
    logits[[1, 4], 2] = value
    with pytest.raises(NonFiniteLogitsError, match=r"2 rows \(first \[1, 4\]\): check the teacher") as error:
        encode_dense(logits)
    assert error.value.rows.tolist() == [1, 4]


def test_logits_too_large_for_float16_are_told_to_use_float32():
    logits = np.full((2, 3), 1e5, np.float32)
    with pytest.raises(NonFiniteLogitsError, match='they fit into dtype="float32"'):
        encode_dense(logits)
    assert encode_dense(logits, "float32").to_pylist() == logits.tolist()


def test_unknown_dtype():
    with pytest.raises(ValueError, match='float16 or float32; got "int8"'):
        dense_feature(3, "int8")


def test_recorded_teachers_are_found_by_their_columns():
    table = Dataset.from_dict({"image": [0], "b_logits": [0], "a_b_logits": [0], "logits": [0]})
    assert recorded_teachers(table) == ["b", "a_b"]
