"""Logits ↔ Arrow columns: dense, the k largest with the log-sum-exp of the others, or the same packed into few bits."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, Features, List, Value

from ..checks import check_numbers
from .packing import LEVEL_BITS, join_ids, level_bounds, pack_levels, split_ids, unpack_levels


DTYPES = ("float16", "float32", "packed")
ROW_KEY = "row_key"
FILE_KEY = "file_key"
_TOP_K_PARTS = ("class_ids", "differences", "rest", "gap")
# The high bits of the ids are there if a class needs more than eight.
_PACKED_PARTS = ("class_ids", "class_ids_high", "top", "levels", "scale", "rest", "gap")
# Less loss than the ten largest logits of each view, in half the bytes (docs/benchmarks.md).
_PACKED_CLASSES = 26
_GAP_STEPS = 8
# The largest number of float16.
LARGEST = 65504.0


@dataclass(frozen=True)
class LogitsEncoding:
    """How a row's logits are stored: every one of them (dense), the k largest with their class ids and the log-sum-exp
    of all others (top-k), or k classes that all views of the image share, at eight levels (packed).

    Top-k stores differences from the largest logit. A softmax depends on differences only, and differences keep more
    digits. Dense rows with a number that float16 cannot hold are stored in the same way. The stored classes have exact
    probabilities; the others share the rest evenly.

    How much is left for the others depends on the temperature τ. Let m others have mean logit μ and log-sum-exp L. The
    cumulant expansion to second order is log Σ exp(l/τ) ≈ log m + μ/τ + g/τ². It is exact at τ = 1 for
    g = L − log m − μ, which is never negative. g is stored in one byte, in eighths.

    Packed keeps the k classes of the largest mean probability over the views of an image. Their ids, of ⌈log₂ C⌉ bits each,
    are stored once for all views. A view has the id of its own largest logit; one of eight levels for each of the k classes,
    of the differences from that logit, dense near 0; the largest difference in one byte; and L and g as above. That is
    3k / 8 + 6 bytes a view, with ids of 16 bits, and k · ⌈log₂ C⌉ / 8 bytes an image.

    Args:
        dtype: `"float16"`, `"float32"` or `"packed"`.
        top_k: k, or `None` for dense; with `"packed"`, `None` is 26.

    Raises:
        ValueError: another dtype, or a `top_k` below 2.
    """

    dtype: str = "float16"
    top_k: int | None = None

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ValueError(
                f'dtype="{self.dtype}" is not supported. Choose {", ".join(DTYPES[:-1])} or {DTYPES[-1]}.'
            )
        if self.is_packed and self.top_k is None:
            object.__setattr__(self, "top_k", _PACKED_CLASSES)
        if self.top_k is not None:
            check_numbers(2, whole=True, top_k=self.top_k)

    @property
    def is_packed(self) -> bool:
        """Whether the views of an image share their classes."""
        return self.dtype == "packed"

    def to_dict(self) -> dict:
        """The encoding as a dict for JSON."""
        return asdict(self)

    def feature(self, num_classes: int, num_views: int | None):
        """The type of the column: one encoding a row, or, with views, lists of `num_views`.

        Raises:
            ValueError: `top_k` is not below the number of classes, or packed logits would take more bytes than all of them.
        """

        def a_list(dtype, length, times=num_views):
            one = List(Value(dtype), length=length)
            return one if num_views is None else List(one, length=times)

        if self.top_k is None:
            return a_list(self.dtype, num_classes)
        if self.top_k >= num_classes:
            raise ValueError(
                f"top_k={self.top_k} is not below the number of classes ({num_classes}). Leave it out to store all logits."
            )
        id_dtype = _id_dtype(num_classes)
        if self.is_packed:
            ids = split_ids(np.zeros(self.top_k, np.uint32), num_classes)
            levels = -(-self.top_k * LEVEL_BITS // 8)
            num_bytes = levels + 4 + np.dtype(id_dtype).itemsize + sum(map(len, ids)) / (num_views or 1)
            if num_bytes >= 2 * num_classes or self.top_k + 1 == num_classes:
                raise ValueError(
                    f'dtype="packed" with top_k={self.top_k} takes {num_bytes:.0f} bytes a view, all {num_classes} logits '
                    f"{2 * num_classes} in float16. Leave dtype out to store all logits."
                )
            return {
                **{name: a_list("uint8", len(part), 1) for name, part in zip(_PACKED_PARTS, ids)},
                "top": a_list(id_dtype, 1),
                "levels": a_list("uint8", levels),
                "scale": a_list("uint8", 1),
                "rest": a_list("float16", 1),
                "gap": a_list("uint8", 1),
            }
        # The difference of the largest logit from itself is 0 and not stored.
        return {
            "class_ids": a_list(id_dtype, self.top_k),
            "differences": a_list(self.dtype, self.top_k - 1),
            "rest": a_list(self.dtype, 1),
            "gap": a_list("uint8", 1),
        }

    def encode(self, logits: np.ndarray | torch.Tensor, views: bool = False) -> pa.Array:
        """Logits (N, C), or (N, V, C) with `views`, → an Arrow array of the type of [`feature`].

        The largest logits of a tensor on an accelerator are found there. The log-sum-exp of the others may then differ in its
        last bit.

        Raises:
            NonFiniteLogitsError: a logit is NaN or infinite.
        """
        is_far = isinstance(logits, torch.Tensor) and logits.device.type != "cpu"
        if is_far and self.top_k is not None and not self.is_packed:
            return self._to_column(*_top_k_of_tensor(logits, self.top_k), logits.shape[-1])
        logits = logits.cpu().numpy() if isinstance(logits, torch.Tensor) else logits
        bad = np.flatnonzero(~np.isfinite(logits.reshape(len(logits), -1)).all(axis=1))
        if len(bad):
            raise NonFiniteLogitsError(bad)
        num_classes = logits.shape[-1]
        arrow_type = _arrow_type(self, num_classes, logits.shape[1] if views else None)
        if self.top_k is None:
            is_large = (np.abs(logits) > np.finfo(self.dtype).max).any(axis=-1, keepdims=True)
            if is_large.any():
                logits = np.where(is_large, _differences(logits), logits)
            return _to_arrow(logits.astype(self.dtype)).cast(arrow_type)
        logits = logits.astype(np.float32)
        if self.is_packed:
            parts = _pack(logits if views else logits[:, None], self.top_k)
            arrays = [_to_arrow(part if views else part[:, 0]) for part in parts]
            return pa.StructArray.from_arrays(arrays, names=[field.name for field in arrow_type]).cast(arrow_type)
        return self._to_column(*_top_k(logits, self.top_k), num_classes)

    def _to_column(self, ids, stored, rest, gap, num_classes):
        arrow_type = _arrow_type(self, num_classes, ids.shape[1] if ids.ndim == 3 else None)
        parts = ids.astype(_id_dtype(num_classes)), stored[..., 1:].astype(self.dtype), rest.astype(self.dtype), gap
        return pa.StructArray.from_arrays(map(_to_arrow, parts), names=_TOP_K_PARTS).cast(arrow_type)


@lru_cache
def _arrow_type(encoding, num_classes, num_views):
    return Features({"column": encoding.feature(num_classes, num_views)}).arrow_schema.field("column").type


def _id_dtype(num_classes):
    return "uint16" if num_classes <= 2**16 else "uint32"


_NARROW_PARTS = tuple(name for name in _PACKED_PARTS if name != "class_ids_high")


def _largest(logits, k):
    """The classes (…, k) of the k largest logits (…, C). Equal logits keep the order of their classes, so that the same logits
    always give the same bytes."""
    ids = np.argpartition(-logits, k - 1, axis=-1)[..., :k]
    return np.take_along_axis(ids, np.lexsort((ids, -np.take_along_axis(logits, ids, -1)), axis=-1), -1)


def _top_k(logits, k):
    """Logits (…, C) → the classes of the k largest and their differences (…, k), and what [`_rest_and_gap`] returns."""
    ids, differences = _largest(logits, k), _differences(logits)
    is_other = np.ones(logits.shape, bool)
    np.put_along_axis(is_other, ids, False, axis=-1)
    return ids, np.take_along_axis(differences, ids, -1), *_rest_and_gap(differences, is_other)


def _top_k_of_tensor(logits, k):
    """[`_top_k`] on the device of the logits."""
    logits = logits.float()
    bad = (~torch.isfinite(logits)).flatten(1).any(1).nonzero()[:, 0]
    if len(bad):
        raise NonFiniteLogitsError(bad.cpu().numpy())
    values, ids = logits.sort(dim=-1, descending=True, stable=True)
    # Which of equal logits is the last to be stored is for numpy to choose, as ever.
    is_tied = values[..., k - 1] == values[..., k]
    ids = ids[..., :k].contiguous()
    if is_tied.any():
        chosen = _largest(logits[is_tied].cpu().numpy(), k)
        ids[is_tied] = torch.from_numpy(chosen).to(ids.device)
    differences = (logits - values[..., :1]).clamp(min=-LARGEST)
    others = differences.scatter(-1, ids, -math.inf)
    stored, rest = differences.gather(-1, ids), others.logsumexp(-1, keepdim=True)
    num_others = logits.shape[-1] - k
    mean = others.masked_fill(others == -math.inf, 0).sum(-1, keepdim=True) / num_others
    gap = ((rest - math.log(num_others) - mean) * _GAP_STEPS).round().clamp(0, 255).to(torch.uint8)
    return [part.cpu().numpy() for part in (ids, stored, rest, gap)]


def _rest_and_gap(differences, is_other):
    """(…, C) → the log-sum-exp of the other classes (…, 1), and their gap in steps (…, 1)."""
    counts = is_other.sum(-1, keepdims=True)
    mean = np.where(is_other, differences, 0).sum(-1, keepdims=True) / counts
    others = np.where(is_other, differences, -np.inf)
    # Much faster than `np.logaddexp.reduce`.
    largest = others.max(axis=-1, keepdims=True)
    rest = largest + np.log(np.exp(others - largest).sum(axis=-1, keepdims=True))
    gap = rest - np.log(counts) - mean
    return rest, (gap * _GAP_STEPS).round().clip(0, 255).astype(np.uint8)


def _pack(logits, k):
    """Logits (N, V, C) → the parts of a packed column in the order of its type, each (N, V, ·), but the ids (N, 1, ·)."""
    num_classes, differences = logits.shape[-1], _differences(logits)
    weights = np.exp(differences)
    score = (weights / weights.sum(-1, keepdims=True)).mean(1)
    ids = np.sort(np.argpartition(-score, k - 1, axis=-1)[:, :k], axis=-1)[:, None]
    top, of_views = logits.argmax(-1)[..., None], np.broadcast_to(ids, (*logits.shape[:2], k))
    is_other = np.ones(logits.shape, bool)
    np.put_along_axis(is_other, of_views, False, axis=-1)
    np.put_along_axis(is_other, top, False, axis=-1)
    rest, gap = _rest_and_gap(differences, is_other)
    levels, scale = pack_levels(np.take_along_axis(differences, of_views, -1))
    top = top.astype(_id_dtype(num_classes))
    return [*split_ids(ids, num_classes), top, levels, scale, rest.astype(np.float16), gap]


class NonFiniteLogitsError(ValueError):
    """Some rows have NaN or infinite logits: `rows`, counted from the first encoded one."""

    def __init__(self, rows: np.ndarray):
        self.rows = rows
        super().__init__(
            f"Logits are NaN or infinite in {len(rows)} rows (first {rows[:10].tolist()}). Check the teacher and these images."
        )


def _differences(logits):
    """Logits (…, C) less the largest of each row. None is below −65,504, which float16 holds: there, the probability is 0 in
    float32 at any temperature below 600."""
    with np.errstate(over="ignore"):
        return np.maximum(logits - logits.max(axis=-1, keepdims=True), -LARGEST)


def column_name(teacher_name: str) -> str:
    """The name of the column with the logits of this teacher."""
    return f"{teacher_name}_logits"


def check_keys(dataset: Dataset) -> None:
    """Refuse keys of images that are no longer whole numbers of 64 bits.

    Raises:
        ValueError: `row_key` or `file_key` has another type.
    """
    for key in (ROW_KEY, FILE_KEY):
        if (found := (dataset.features or {}).get(key, Value("int64"))) != Value("int64"):
            raise ValueError(
                f'The column "{key}" is of type {getattr(found, "dtype", found)}, but keys of images are int64. Take the '
                "column as recording wrote it; a column of your own needs another name."
            )


def check_teacher_names(names: Iterable[str]) -> None:
    """Refuse the names of teachers whose metrics would have the names of other metrics.

    Raises:
        ValueError: such as "label", because "label_loss" is the loss of the labels.
    """
    for name in names:
        if re.fullmatch("(label|class|view|train|(eval|test)(_.*)?)", name.lower()):
            raise ValueError(
                f'"{name}" cannot name a teacher, because other metrics begin with it, such as "label_loss". Choose another '
                f'name, such as "my_{name}".'
            )


def recorded_teachers(dataset: Dataset) -> list[str]:
    """The names of the teachers whose logits the table holds."""
    suffix = column_name("")
    return [name.removesuffix(suffix) for name in dataset.column_names if name.endswith(suffix)]


def describe_column(feature) -> tuple[LogitsEncoding, int | None, int | None]:
    """Read the type of a logits column.

    Returns:
        The encoding, the number of views (`None` without views), and the number of classes (`None` for top-k, whose type
        does not contain it).

    Raises:
        ValueError: the column has another type.
    """
    is_packed = isinstance(feature, dict) and set(feature) in (set(_PACKED_PARTS), set(_NARROW_PARTS))
    is_top_k = isinstance(feature, dict) and set(feature) == set(_TOP_K_PARTS)
    inner = feature["levels"] if is_packed else feature["class_ids"] if is_top_k else feature
    num_views = None
    if isinstance(inner, List) and isinstance(inner.feature, List):
        num_views, inner = inner.length, inner.feature
    if not isinstance(inner, List) or not isinstance(inner.feature, Value) or inner.length < 1 or num_views == -1:
        raise ValueError(f"not a list of a fixed number of logits but {feature}")
    if is_packed:
        ids = feature["class_ids"] if num_views is None else feature["class_ids"].feature
        return LogitsEncoding("packed", ids.length), num_views, None
    if not is_top_k:
        return LogitsEncoding(inner.feature.dtype), num_views, inner.length
    rest = feature["rest"].feature
    return LogitsEncoding((rest if num_views is None else rest.feature).dtype, inner.length), num_views, None


def decode(
    column: pa.Array | pa.ChunkedArray, num_classes: int, view: int | None = None, temperature: float = 1.0
) -> np.ndarray:
    """N rows of a logits column → (N, C) in the stored type. A row without logits, or with a class that does not exist,
    becomes NaN.

    Top-k and packed logits come back in float32, as differences from the largest of the row. The classes that were not stored
    get the value at which their probabilities sum up to the stored rest at this temperature.

    Args:
        column: the rows.
        num_classes: C.
        view: which view of a column with views; `None` for a column without.
        temperature: the temperature at which the logits will be used.
    """
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    parts = _to_parts(column)
    if view is not None:
        num_views = max(part.shape[1] for part in parts)
        parts = [part[:, _group(view, part.shape[1], num_views)] for part in parts]
    missing = missing_rows(column)
    if not len(missing):
        return _expand(parts, num_classes, temperature)
    # What memory holds there may not even be a class.
    parts = [part.copy() for part in parts]
    for part in parts:
        part[missing] = 0
    logits = _expand(parts, num_classes, temperature)
    logits[missing] = np.nan
    return logits


def _group(view, num_groups, num_views):
    """The number of the group of a view. The ids of packed logits are those of groups of views, all of the same size."""
    return view * num_groups // num_views


class StoredLogits:
    """Random access to one view in a logits column. Indexing the table would first copy all views of the rows."""

    def __init__(self, dataset: Dataset, column: str):
        self.encoding = describe_column(dataset.features[column])[0]
        self._dataset, self._column, self._chunks = dataset, column, None

    def __getstate__(self):
        # The arrays are mapped files. Pickling would copy their content into the other process.
        return {**self.__dict__, "_chunks": None, "_parts": None}

    def read(
        self, rows: Sequence[int], num_classes: int, view: int | None = None, temperature: float = 1.0
    ) -> np.ndarray:
        """What [`decode`] returns for these rows, (N, C). Negative numbers count from the end.

        Raises:
            ValueError: a row has no logits.
        """
        return _expand(self._read_parts(rows, view), num_classes, temperature)

    def nearest(self, rows: Sequence[int], logits: np.ndarray, view: int | None = None) -> np.ndarray:
        """Other logits of these rows, (N, C), as the rows would hold them: what equals the recorded logits but for rounding
        becomes what [`read`] returns. Errors are those of [`read`]."""
        if not self.encoding.is_packed:
            return decode(self.encoding.encode(logits), logits.shape[1])
        return _round_alike(self._read_parts(rows, view), logits)

    def _read_parts(self, rows, view):
        if self._chunks is None:
            chunks = [chunk for chunk in self._dataset.data.column(self._column).chunks if len(chunk)]
            self._starts = np.cumsum([0, *map(len, chunks)])
            self._parts = [_as_one(arrays) for arrays in zip(*map(_to_parts, chunks))]
            self._missing = {start + row for start, chunk in zip(self._starts, chunks) for row in missing_rows(chunk)}
            self._most_views = max(num_views for _, _, num_views in self._parts)
            self._chunks = chunks  # keeps the memory of the parts alive
        given = rows = np.asarray(rows) % len(self._dataset)
        # `select` and `shuffle` leave the files alone and list the rows here.
        if self._dataset._indices is not None:
            rows = self._dataset._indices.column(0).take(pa.array(rows)).to_numpy().astype(np.int64)
        missing = [] if not self._missing else given[[row in self._missing for row in rows.tolist()]].tolist()
        if missing:
            raise ValueError(f'Row {missing[0]}: the column "{self._column}" has no logits. Remove such rows.')
        chunks = np.searchsorted(self._starts, rows, side="right") - 1
        rows = rows - self._starts[chunks]
        parts = []
        for values, starts, num_views in self._parts:
            row = rows if view is None else rows * num_views + _group(view, num_views, self._most_views)
            parts.append(values[starts[chunks] + row * values.shape[1]])
        return parts


def _as_one(arrays):
    """One array over all chunks of a part, each (N, ·) or (N, V, ·), from which any row is taken in one step.

    Returns:
        The array, with a row that begins at every value; the number of the row at which each chunk begins; and V.
    """
    # Arrow aligns its memory to 8 bytes, so distances are whole numbers of values.
    addresses = np.array([array.__array_interface__["data"][0] for array in arrays])
    first = arrays[addresses.argmin()]
    starts = (addresses - addresses.min()) // first.itemsize
    end = max(start + array.size for start, array in zip(starts.tolist(), arrays))
    length = first.shape[-1]
    # The memory between the chunks belongs to no row and is never read.
    values = np.lib.stride_tricks.as_strided(
        first, (end - length + 1, length), (first.itemsize, first.itemsize), writeable=False
    )
    return values, starts, first.shape[1] if first.ndim == 3 else 1


def _to_parts(column):
    """An Arrow column → [logits (N, C)] or the parts of a struct in the order of their names above, each (N, ·), or (N, V, ·)
    with views."""
    if not pa.types.is_struct(column.type):
        return [_to_numpy(column)]
    return [_to_numpy(column.field(name)) for name in _part_names(column.type)]


def _part_names(struct):
    names = {field.name for field in struct}
    return next(parts for parts in (_TOP_K_PARTS, _PACKED_PARTS, _NARROW_PARTS) if names == set(parts))


def _unpack(parts, num_classes):
    """The parts of packed rows → ids (N, k), top (N,), the log-sum-exp of each other class if all are equal, at temperature 1
    (N, 1), gap (N, 1), levels and scale; and whether a row names a class that does not exist (N,)."""
    *ids, top, levels, scale, rest, gap = parts
    ids, top = join_ids(ids, num_classes), top[:, 0].astype(np.int64)
    is_outside = (ids >= num_classes).any(axis=1) | (top >= num_classes)
    if is_outside.any():
        ids, top = np.where(ids < num_classes, ids, 0), np.where(top < num_classes, top, 0)
    num_others = num_classes - ids.shape[1] - ~(ids == top[:, None]).any(axis=1, keepdims=True)
    even = rest.astype(np.float32) - np.log(num_others).astype(np.float32)
    return ids, top, even, gap, levels, scale, is_outside


def _round_alike(parts, logits):
    ids, top, _, _, levels, scale, is_outside = _unpack(parts, logits.shape[1])
    rows = np.arange(len(ids))
    differences = (logits - logits[rows, top][:, None]).astype(np.float32)
    value, low, high = level_bounds(levels, scale, ids.shape[1])
    given = differences[rows[:, None], ids]
    is_other = np.ones(logits.shape, bool)
    is_other[rows[:, None], ids] = is_other[rows, top] = False
    others = np.where(is_other, differences, -np.inf)
    result = np.empty(logits.shape, np.float32)
    result[:] = np.logaddexp.reduce(others, axis=1, keepdims=True) - np.log(is_other.sum(1, keepdims=True))
    # Beyond the bounds, by as much as it is beyond them.
    result[rows[:, None], ids] = value + np.minimum(given - low, 0) + np.maximum(given - high, 0)
    result[rows, top] = 0
    result[is_outside] = np.nan
    return result


def _expand(parts, num_classes, temperature):
    if len(parts) == 1:
        return parts[0]
    if len(parts) > len(_TOP_K_PARTS):
        ids, top, even, gap, levels, scale, is_outside = _unpack(parts, num_classes)
        logits = np.empty((len(ids), num_classes), dtype=np.float32)
        logits[:] = even - gap.astype(np.float32) * ((1 - 1 / temperature) / _GAP_STEPS)
        rows = np.arange(len(ids))
        logits[rows[:, None], ids] = unpack_levels(levels, scale, ids.shape[1])
        logits[rows, top] = 0
        logits[is_outside] = np.nan
        return logits
    ids, differences, rest, gap = parts
    is_outside = None
    if ids.max(initial=0) >= num_classes:
        is_outside = (ids >= num_classes).any(axis=1)
        ids = np.where(ids < num_classes, ids, 0)
    even = rest.astype(np.float32) - np.float32(np.log(num_classes - ids.shape[1]))
    # τ·(μ/τ + g/τ²), with μ = even − g.
    even -= gap.astype(np.float32) * ((1 - 1 / temperature) / _GAP_STEPS)
    logits = np.empty((len(ids), num_classes), dtype=np.float32)
    logits[:] = even
    rows = np.arange(len(ids))
    logits[rows, ids[:, 0]] = 0
    logits[rows[:, None], ids[:, 1:]] = differences
    if is_outside is not None:
        logits[is_outside] = np.nan
    return logits


def largest_class(column: pa.Array, num_classes: int) -> int:
    """The largest class id in a top-k or packed column; `ValueError` if its ids are packed for another number of classes."""
    return max(int(ids.max(initial=0)) for ids in _class_ids(_to_parts(column), num_classes))


def _class_ids(parts, num_classes):
    """The class ids in the parts of a column: none if it holds all logits."""
    if len(parts) <= len(_TOP_K_PARTS):
        return parts[: len(parts) // len(_TOP_K_PARTS)]
    *ids, top, _, _, _, _ = parts
    return [join_ids(ids, num_classes), top]


def unusable_rows(column: pa.Array, num_classes: int) -> np.ndarray:
    """The numbers of the rows that are missing in a logits column, or in which, in any view, a number is not finite or a class
    does not exist: those of which [`decode`] makes NaN or infinite logits."""
    parts = _to_parts(column)
    bad = [~np.isfinite(part) for part in parts if part.dtype.kind == "f"]
    bad += [ids >= num_classes for ids in _class_ids(parts, num_classes)]
    rows = [np.flatnonzero(part.reshape(len(part), -1).any(axis=1)) for part in bad]
    return np.unique(np.concatenate([missing_rows(column), *rows]))


def concatenate_views(first: pa.Array | pa.ChunkedArray, second: pa.Array) -> pa.Array:
    """Join two columns with views of the same rows: first the views of `first`, then those of `second`, bit for bit. Packed
    logits keep the ids of each group of views."""
    if isinstance(first, pa.ChunkedArray):
        first = first.combine_chunks()
    sides = [_to_parts(first), _to_parts(second)]
    if len(sides[0]) > len(_TOP_K_PARTS):
        size = math.gcd(*map(_views_per_group, sides))
        sides = [_regroup(parts, size) for parts in sides]
    joined = [_to_arrow(np.concatenate(parts, axis=1)) for parts in zip(*sides)]
    if len(joined) == 1:
        return joined[0]
    return pa.StructArray.from_arrays(joined, names=_part_names(first.type))


def _views_per_group(parts):
    return parts[-1].shape[1] // parts[0].shape[1]


def _regroup(parts, size):
    """The parts of a packed column whose ids are those of groups of `size` views, which divides the size of today."""
    num_views, times = parts[-1].shape[1], _views_per_group(parts) // size
    return [part if part.shape[1] == num_views else np.repeat(part, times, axis=1) for part in parts]


def joined_feature(first, second):
    """The type of a column that [`concatenate_views`] makes of columns of these types."""
    empty = [Features({"column": each}).arrow_schema.empty_table()["column"] for each in (first, second)]
    joined = concatenate_views(empty[0], empty[1].combine_chunks())
    return Features.from_arrow_schema(pa.schema({"column": joined.type}))["column"]


def _to_arrow(array):
    """A numpy array of 2 or 3 dimensions → nested lists of fixed lengths, without a copy."""
    nested = pa.array(np.ascontiguousarray(array).reshape(-1))
    for length in reversed(array.shape[1:]):
        nested = pa.FixedSizeListArray.from_arrays(nested, length)
    return nested


def _to_numpy(array):
    """Every row, also a missing one, with whatever the memory holds there."""
    shape = [len(array)]
    while pa.types.is_fixed_size_list(array.type):
        shape.append(array.type.list_size)
        array = _items(array)
    values = pa.Array.from_buffers(array.type, len(array), [None, array.buffers()[1]], offset=array.offset)
    return values.to_numpy().reshape(shape)


def _items(lists):
    # `flatten` leaves out the items of missing lists, and moves all that follow.
    size = lists.type.list_size
    return lists.values.slice(lists.offset * size, len(lists) * size)


def missing_rows(array: pa.Array) -> np.ndarray:
    """The numbers of the rows of a column that are missing, or in which a value is."""
    missing = [np.flatnonzero(array.is_null()) if array.null_count else np.array([], np.int64)]
    if pa.types.is_struct(array.type):
        missing += [missing_rows(array.field(i)) for i in range(array.type.num_fields)]
    elif pa.types.is_fixed_size_list(array.type):
        missing.append(missing_rows(_items(array)) // array.type.list_size)
    return np.unique(np.concatenate(missing))
