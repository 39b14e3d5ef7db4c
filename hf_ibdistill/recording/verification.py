"""Run the teachers again on a sample of a recorded table and compare."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, Image, IterableDataset
from torch.utils.data import DataLoader

from ..checks import check_numbers
from ..data.columns import IMAGE, as_image_table, require_table
from ..evaluation import log_softmax
from ..images.preprocessing import pixel_values
from ..images.views import make_view, row_key
from ..logits.encoding import (
    FILE_KEY,
    ROW_KEY,
    LogitsEncoding,
    StoredLogits,
    check_keys,
    column_name,
    recorded_teachers,
    unusable_rows,
)
from ..logits.provenance import (
    damaged_files,
    described_teachers,
    is_recorded,
    only_record,
    stored_views,
    teacher_differences,
)
from ..progress import Progress
from ..rows import ImageRows
from ..teachers import TeacherLike, load_teachers


_BATCH_SIZE = 32
# Rows that are read at once to check all.
_BLOCK = 256


@dataclass
class Verification:
    """The result of a check. `problems` is empty if the table is as recording wrote it."""

    num_rows: int
    largest_differences: dict[str, float]
    problems: list[str]


def verify_teacher_logits(
    dataset: Dataset,
    teachers: Mapping[str, TeacherLike],
    *,
    num_rows: int = 256,
    seed: int = 0,
    tolerance: float = 0.02,
    image_column: str | None = None,
    trust_remote_code: bool = False,
) -> Verification:
    """Run the teachers on a random sample of rows, each on one random view, and compare with the recorded logits.

    The check compares the teachers with the provenance of the table, and the row keys with the images. If the table was
    loaded from the folder that recording wrote, it compares the files with their checksums.

    Args:
        dataset: a recorded table.
        teachers: name → Hub id, folder, model or (model, image processor), for each column to verify.
        num_rows: rows in the sample.
        seed: seed of the sample.
        tolerance: allowed difference of a log-probability, relative to the range of the row's logits (at least 1).
        image_column: the image column; found if not given.
        trust_remote_code: run the code that a Hub repository or folder contains.

    Raises:
        TypeError: `dataset` is not one table.
        ValueError: a teacher without a column, a table without provenance, or an image that cannot be decoded.
    """
    require_table(dataset, "dataset")
    check_numbers(1, whole=True, num_rows=num_rows)
    check_numbers(0, whole=True, seed=seed)
    check_numbers(0, tolerance=tolerance)
    dataset = as_image_table(dataset, image_column, needs_label=False)
    loaded = load_teachers(teachers, trust_remote_code=trust_remote_code)
    described = {teacher["name"]: teacher for teacher in described_teachers(dataset)}
    problems = [f"The file {path.name} is not the one that recording wrote." for path in damaged_files(dataset)]
    for teacher in loaded:
        column = column_name(teacher.name)
        if column not in dataset.column_names or teacher.name not in described:
            raise ValueError(
                f'The table has no column "{column}", or no provenance of it; its columns are '
                f"{', '.join(dataset.column_names)}. Verify teachers that record_teacher_logits ran for this table."
            )
        expected = described[teacher.name]
        teacher.bf16 = expected.get("bf16", False)
        teacher.classes = expected.get("classes")
        # Another teacher may not have these classes; the comparison of both descriptions reports it.
        with suppress(ValueError):
            teacher.match_classes(expected["label_names"])
        differing = teacher_differences(expected, teacher.describe(LogitsEncoding(**expected["encoding"])))
        if differing:
            problems.append(f'The teacher "{teacher.name}" is not the one that was recorded: {", ".join(differing)}.')

    random = np.random.default_rng(seed)
    sample = np.sort(random.choice(len(dataset), size=min(num_rows, len(dataset)), replace=False)).tolist()
    recipe = stored_views(dataset)
    views = random.integers(1 if recipe is None else recipe.num_views, size=len(sample)).tolist()
    has_keys, wrong = ROW_KEY in dataset.column_names, []
    rows = ImageRows(dataset, [ROW_KEY] if has_keys else [])
    comparable = [t for t in loaded if len(t.class_names) == len(described[t.name]["label_names"])]
    predicted: dict[str, list[np.ndarray]] = {teacher.name: [] for teacher in comparable}
    with Progress("verify with the teachers", len(sample)) as progress:
        for start in range(0, len(sample), _BATCH_SIZE):
            batch, images = sample[start : start + _BATCH_SIZE], []
            for number, view, row in zip(batch, views[start:], rows.read(batch)):
                key = row_key(row[IMAGE])
                if has_keys and key != row[ROW_KEY]:
                    wrong.append(number)
                    key = row[ROW_KEY]
                images.append(row[IMAGE] if recipe is None else make_view(row[IMAGE], recipe, key, view))
            for teacher in comparable:
                inputs = pixel_values(images, {"": teacher.image_processor})[""]
                predicted[teacher.name].append(teacher.logits(inputs).cpu().numpy())
            progress.update(len(batch))
    if wrong:
        problems.append(f"The images of {len(wrong)} rows are not the ones that were recorded (first {wrong[:10]}).")

    largest = {teacher.name: float("inf") for teacher in loaded}
    for name, batches in predicted.items():
        fresh, column = np.concatenate(batches), column_name(name)
        stored = StoredLogits(dataset, column)
        places = [([row], None if recipe is None else view) for row, view in zip(sample, views)]
        recorded = np.concatenate([stored.read(row, fresh.shape[1], view) for row, view in places])
        # What the encoding leaves out is missing on both sides.
        fresh = [stored.nearest(row, logits[None], view) for (row, view), logits in zip(places, fresh)]
        fresh = np.concatenate(fresh).astype(np.float32)
        # Packed rows were compared in the classes that they hold.
        top_k = None if stored.encoding.is_packed else stored.encoding.top_k
        differences = _largest_differences(
            log_softmax(fresh.astype(float)), log_softmax(recorded.astype(float)), top_k
        )
        largest[name] = float(differences.max())
        allowed = tolerance * np.maximum(1, np.ptp(fresh, axis=1))
        wrong = [row for row, is_wrong in zip(sample, ~(differences <= allowed)) if is_wrong]
        if wrong:
            problems.append(
                f'"{column}" differs from what the teacher predicts in {len(wrong)} of {len(sample)} rows (first {wrong[:10]}).'
            )
    return Verification(len(sample), largest, problems)


def verify_rows(dataset: Dataset | IterableDataset, *, num_workers: int = 0) -> list[str]:
    """Check every row of a recorded table, without its teachers: logits are there, finite and of known classes, images have
    their recorded keys, and files their checksums. Every image whose file has changed is decoded.

    Args:
        dataset: a recorded table, or a stream of one, which is read once.
        num_workers: processes that read a table; 0 is this one. A stream is read by this process.

    Returns:
        The problems; an empty list if there are none.

    Raises:
        TypeError: `dataset` is not one table or stream.
        ValueError: the table has not exactly one provenance record, or a column is not of the type that it describes.
    """
    require_table(dataset, "dataset", streams=True)
    classes = {teacher["name"]: len(teacher["label_names"]) for teacher in only_record(dataset)["teachers"]}
    unknown = [name for name in recorded_teachers(dataset) if name not in classes]
    if unknown:
        raise ValueError(
            f"The table has logits of {', '.join(unknown)}, but its provenance describes {', '.join(classes)}. Remove these "
            "columns, or record them."
        )
    stored_views(dataset)
    check_keys(dataset)
    is_streamed = isinstance(dataset, IterableDataset)
    blocks = _Blocks(dataset, {column_name(name): classes[name] for name in recorded_teachers(dataset)})
    if is_streamed:
        found = (blocks.check(block) for block in blocks.table.iter(batch_size=_BLOCK))
    else:
        found = DataLoader(blocks, batch_size=None, num_workers=num_workers, collate_fn=_as_it_is)
    problems = [f"The file {path.name} is not the one that recording wrote." for path in damaged_files(dataset)]
    rows: dict[str, list[int]] = {}
    start = 0
    with Progress("verify every row", None if is_streamed else len(dataset), "rows") as progress:
        for size, bad in found:
            for what, numbers in bad.items():
                rows.setdefault(what, []).extend(start + number for number in numbers)
            start += size
            progress.update(size)
    return problems + [
        f"{what} in {len(numbers)} of {start} rows (first {numbers[:10]})." for what, numbers in rows.items()
    ]


def _as_it_is(found):
    return found


class _Blocks(torch.utils.data.Dataset):
    """What is wrong in each block of rows: the number of its rows, and problem → rows of the block."""

    def __init__(self, dataset, classes):
        self.classes, features = classes, dataset.features
        self.mode = features[IMAGE].mode if IMAGE in features else None
        keys = [name for name in (ROW_KEY, FILE_KEY) if name in features]
        table = dataset.select_columns([*classes, *keys, *([IMAGE] if IMAGE in features else [])])
        if IMAGE in features:
            table = table.cast_column(IMAGE, Image(decode=False))
        self.table = table.with_format("arrow")

    def __len__(self):
        return -(-len(self.table) // _BLOCK)

    def __getitem__(self, block):
        return self.check(self.table[block * _BLOCK : (block + 1) * _BLOCK])

    def check(self, block: pa.Table) -> tuple[int, dict[str, list[int]]]:
        bad = {}
        for column, num_classes in self.classes.items():
            values = block[column].combine_chunks()
            bad[f'"{column}" has no usable logits'] = unusable_rows(values, num_classes).tolist()
        if IMAGE in block.column_names:
            keys = [
                block[n].to_pylist() if n in block.column_names else [None] * len(block) for n in (ROW_KEY, FILE_KEY)
            ]
            changed, unreadable = [], []
            for number, (cell, *key) in enumerate(zip(block[IMAGE].to_pylist(), *keys)):
                try:
                    if not is_recorded(cell, self.mode, *key):
                        changed.append(number)
                except (ValueError, OSError):
                    unreadable.append(number)
            bad |= {"The image is not the one that was recorded": changed, "The image cannot be decoded": unreadable}
        return len(block), {what: numbers for what, numbers in bad.items() if numbers}


def _largest_differences(first, second, top_k):
    """Log-probabilities (N, C) twice → the largest difference in each row, (N,)."""
    differences = np.abs(first - second)
    if top_k is not None:
        # Two classes of almost the same logit may change places at the end of the k. A class that only one side stores
        # differs at least by its distance from the smallest one that the other side stores.
        ends = [np.sort(values, axis=1)[:, [-top_k]] for values in (first, second)]
        is_in_first, is_in_second = first >= ends[0], second >= ends[1]
        differences = np.where(is_in_first & ~is_in_second, np.maximum(0, first - ends[1]), differences)
        differences = np.where(is_in_second & ~is_in_first, np.maximum(0, second - ends[0]), differences)
    return differences.max(axis=1)
