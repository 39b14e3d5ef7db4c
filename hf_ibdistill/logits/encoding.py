"""Logits ↔ Arrow columns."""

import numpy as np
import pyarrow as pa
from datasets import Dataset, List, Value


DTYPES = ("float16", "float32")


def column_name(teacher_name: str) -> str:
    """The column that holds this teacher's logits."""
    return f"{teacher_name}_logits"


def dense_feature(num_classes: int, dtype: str = "float16") -> List:
    """The type of a dense logits column: a list of `num_classes` numbers a row.

    Raises:
        ValueError: `dtype` is neither `"float16"` nor `"float32"`.
    """
    if dtype not in DTYPES:
        raise ValueError(f'Logits are stored as {" or ".join(DTYPES)}; got "{dtype}".')
    return List(Value(dtype), length=num_classes)


def encode_dense(logits: np.ndarray, dtype: str = "float16") -> pa.FixedSizeListArray:
    """(N, classes) → an Arrow column of `dense_feature`'s type.

    Raises:
        ValueError: a logit is NaN or infinite, or becomes infinite in `dtype`; the message tells the rows, counted from
            the array's first.
    """
    with np.errstate(over="ignore"):
        encoded = np.ascontiguousarray(logits, dtype=dtype)
    bad = np.flatnonzero(~np.isfinite(encoded).all(axis=1))
    if len(bad):
        raise NonFiniteLogitsError(bad, fits_wider=bool(np.isfinite(logits).all()))
    return pa.FixedSizeListArray.from_arrays(pa.array(encoded.reshape(-1)), logits.shape[1])


class NonFiniteLogitsError(ValueError):
    """Some rows' logits are NaN or infinite. `rows` counts from the first row of the encoded array."""

    def __init__(self, rows: np.ndarray, fits_wider: bool):
        self.rows, self.fits_wider = rows, fits_wider
        advice = 'they fit into dtype="float32"' if fits_wider else "check the teacher and these images"
        super().__init__(f"Logits are NaN or infinite in {len(rows)} rows (first {rows[:10].tolist()}): {advice}.")


def recorded_teachers(dataset: Dataset) -> list[str]:
    """The names of the teachers whose logits the table holds."""
    suffix = column_name("")
    return [name.removesuffix(suffix) for name in dataset.column_names if name.endswith(suffix)]
