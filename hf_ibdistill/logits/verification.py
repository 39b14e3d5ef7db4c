"""Ask the teachers again about a sample of a recorded table."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset

from ..data import find_image_column
from ..images import ImageRows, pixel_values
from ..teachers import TeacherLike, load_teachers
from .encoding import ROW_KEY, LogitsEncoding, StoredLogits, column_name, decode, describe_column
from .provenance import describe_teacher, read_records, stored_views, teacher_differences
from .recording import CHECKSUMS, read_checksums, sha256
from .views import make_view, row_key


@dataclass
class Verification:
    """What a check of a table found. `problems` is empty for a table that is as its teachers left it."""

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
    """Run the teachers on a random sample of rows, each on one random view, and compare with what is recorded.

    Also compares the teachers with the table's provenance, the row keys with the images, and, for a table loaded from
    the folder that recording wrote, its files with their checksums.

    Args:
        dataset: a recorded table.
        teachers: name → Hub id, folder, model or (model, image processor), for each column to verify.
        num_rows: rows in the sample.
        seed: seed of the sample.
        tolerance: largest difference of a log-probability that rounding may explain, relative to the range of the row's
            logits (at least 1).
        image_column: the image column; found when not given.
        trust_remote_code: run the code of Hub repositories that bring their own.

    Raises:
        ValueError: a teacher without a column, a table without provenance, or an image that cannot be decoded.
    """
    image_column = find_image_column(dataset, image_column)
    loaded = load_teachers(teachers, trust_remote_code=trust_remote_code)
    described = {teacher["name"]: teacher for record in read_records(dataset) for teacher in record["teachers"]}
    problems = _damaged_files(dataset)
    for teacher in loaded:
        column = column_name(teacher.name)
        if column not in dataset.column_names or teacher.name not in described:
            raise ValueError(
                f'The table has no column "{column}", or no provenance of it; its columns are '
                f"{', '.join(dataset.column_names)}."
            )
        encoding = LogitsEncoding(**described[teacher.name]["encoding"])
        teacher.bf16 = described[teacher.name].get("bf16", False)
        label_names = described[teacher.name]["label_names"]
        if sorted(teacher.class_names) == sorted(label_names):
            teacher.match_classes(label_names)
        differing = teacher_differences(described[teacher.name], describe_teacher(teacher, encoding))
        if differing:
            problems.append(f'The teacher "{teacher.name}" is not the one that was recorded: {", ".join(differing)}.')

    random = np.random.default_rng(seed)
    sample = np.sort(random.choice(len(dataset), size=min(num_rows, len(dataset)), replace=False)).tolist()
    recipe = stored_views(dataset)
    views = random.integers(1 if recipe is None else recipe.num_views, size=len(sample)).tolist()
    images = [row[image_column] for row in ImageRows(dataset, image_column).__getitems__(sample)]
    keys = [row_key(image) for image in images]
    if ROW_KEY in dataset.column_names:
        recorded_keys = dataset.select_columns([ROW_KEY])[sample][ROW_KEY]
        wrong = [row for row, key, other in zip(sample, keys, recorded_keys) if key != other]
        if wrong:
            problems.append(
                f"The images of {len(wrong)} rows are not the ones that were recorded (first {wrong[:10]})."
            )
    if recipe is not None:
        images = [make_view(image, recipe, key, view) for image, key, view in zip(images, keys, views)]

    largest = {}
    for teacher in loaded:
        fresh = teacher.logits(pixel_values(images, {"": teacher.image_processor})[""]).numpy()
        column = column_name(teacher.name)
        encoding, num_views, _ = describe_column(dataset.features[column])
        # What is read back of the fresh logits differs from them as much as the encoding makes it.
        fresh = decode(LogitsEncoding("float32", encoding.top_k).encode(fresh), fresh.shape[1])
        stored = StoredLogits(dataset, column)
        recorded = np.concatenate(
            [
                stored.read([row], fresh.shape[1], None if num_views is None else view)
                for row, view in zip(sample, views)
            ]
        )
        differences = _largest_differences(_log_probabilities(fresh), _log_probabilities(recorded), encoding)
        allowed = tolerance * np.maximum(1, np.ptp(fresh, axis=1))
        wrong = [row for row, is_wrong in zip(sample, ~(differences <= allowed)) if is_wrong]
        largest[teacher.name] = float(differences.max())
        if wrong:
            problems.append(
                f'"{column}" differs from what the teacher says in {len(wrong)} of {len(sample)} rows (first {wrong[:10]}).'
            )
    return Verification(len(sample), largest, problems)


def _log_probabilities(logits):
    logits = logits.astype(np.float64)
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)


def _largest_differences(first, second, encoding):
    if encoding.top_k is not None:
        # Two classes of almost the same logit may change places at the end of the k; sorted, they still agree.
        first, second = -np.sort(-first, axis=1), -np.sort(-second, axis=1)
        agree = first.argmax(1) == second.argmax(1)
        return np.where(agree, np.abs(first - second).max(axis=1), np.inf)
    return np.abs(first - second).max(axis=1)


def _damaged_files(dataset) -> list[str]:
    folders = {Path(file["filename"]).parent for file in dataset.cache_files}
    problems = []
    for folder in sorted(folders):
        if (folder / CHECKSUMS).exists():
            for name, checksum in read_checksums(folder).items():
                if not (folder / name).exists() or sha256(folder / name) != checksum:
                    problems.append(f"The file {name} is not the one that recording wrote.")
    return problems
