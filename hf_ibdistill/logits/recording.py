"""Run the teachers over a data set, shard by shard, and write what they say beside its images.

A shard is a run of consecutive rows. It is written under another name and renamed when it is whole, so an interrupted
recording keeps every shard that it finished and continues with the next. Batches never cross shards: which rows share a
batch depends on neither the number of processes nor on where a recording was interrupted.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from datasets import Dataset, DatasetDict, Features, Image, Value, concatenate_datasets, load_from_disk
from datasets.arrow_writer import ArrowWriter
from tqdm.auto import tqdm

from ..data import class_names, find_columns
from ..images import ImageRows, pixel_values
from ..teachers import Teacher, TeacherLike, load_teachers
from .encoding import NonFiniteLogitsError, column_name, dense_feature, encode_dense
from .provenance import attach_record, build_record, check_class_names, read_records, record_differences


logger = logging.getLogger(__name__)

_ROW = "__row__"
_MANIFEST = "recording.json"


def record_teacher_logits(
    dataset: Dataset | DatasetDict,
    teachers: Mapping[str, TeacherLike],
    *,
    output_dir: str | os.PathLike,
    dtype: str = "float16",
    batch_size: int = 64,
    shard_size: int = 4096,
    num_workers: int = 0,
    skip_unreadable: bool = False,
    image_column: str | None = None,
    label_column: str | None = None,
    trust_remote_code: bool = False,
) -> Dataset | DatasetDict:
    """Record what each teacher says about each image, once, in a column `<name>_logits` (arXiv 2310.00369).

    Every image is decoded once and shown to all teachers, un-augmented, each through its own image processor. Run under
    `accelerate launch`, the processes share the shards. Called again on the same folder it continues an interrupted
    recording, or returns the finished one.

    Args:
        dataset: rows with an image and a `ClassLabel` column; or several splits of them, all of which are recorded, so
            that agreement with the teachers can be measured on the held-out ones.
        teachers: name → Hub id, folder, model loaded by `from_pretrained`, or (model, image processor).
        output_dir: folder of the finished table, readable by `datasets.load_from_disk`.
        dtype: `"float16"` or `"float32"`, how the logits are stored.
        batch_size: images in a forward pass.
        shard_size: rows in a shard, rounded up to whole batches: what an interruption can cost.
        num_workers: processes that decode images ahead of the teachers.
        skip_unreadable: leave rows out whose image cannot be decoded, and report them, instead of stopping.
        image_column: the image column; found when not given.
        label_column: the label column; found when not given.
        trust_remote_code: run the code of Hub repositories that bring their own.

    Returns:
        The input's columns plus a list of as many numbers as there are classes for each teacher, memory-mapped from
        `output_dir`, with its provenance. For several splits a `DatasetDict`.

    Raises:
        ValueError: before any teacher runs: teachers and data set differ in their classes, a column exists already, the
            folder holds another recording or one by other teachers. While recording: an image cannot be decoded, or
            a logit is not finite; the message names the row, and finished shards are kept.
    """
    teachers = load_teachers(teachers, trust_remote_code=trust_remote_code)
    output_dir = Path(output_dir)
    shard_size = -(-shard_size // batch_size) * batch_size
    layout = {"batch_size": batch_size, "shard_size": shard_size, "skip_unreadable": skip_unreadable}
    splits = dataset if isinstance(dataset, DatasetDict) else {None: dataset}
    columns = {}
    for name, split in splits.items():
        columns[name] = find_columns(split, image_column, label_column)
        _check_before_recording(split, name, teachers, columns[name][1])
    accelerator = Accelerator()
    recorded = {}
    for name, split in splits.items():
        folder = output_dir / name if name else output_dir
        recorded[name] = _record_split(
            accelerator, split, teachers, folder, dtype, layout, num_workers, *columns[name]
        )
    if not isinstance(dataset, DatasetDict):
        return recorded[None]
    if accelerator.is_main_process:
        # What makes `datasets.load_from_disk` see the folders as the splits of one data set.
        splits_file = output_dir / "dataset_dict.json"
        _write_beside(splits_file, lambda beside: beside.write_text(json.dumps({"splits": list(splits)})))
    accelerator.wait_for_everyone()
    return DatasetDict(recorded)


def _check_before_recording(dataset, split, teachers, label_column) -> None:
    if len(dataset) == 0:
        what = f'split "{split}"' if split else "data set"
        raise ValueError(f"The {what} is empty; there is nothing to record.")
    for teacher in teachers:
        if column_name(teacher.name) in dataset.column_names:
            raise ValueError(
                f'The data set already has a column "{column_name(teacher.name)}"; rename the teacher or remove it.'
            )
        check_class_names(teacher.class_names, class_names(dataset, label_column), f'the teacher "{teacher.name}"')


def _record_split(accelerator, dataset, teachers, folder, dtype, layout, num_workers, image_column, label_column):
    record = build_record(
        teachers, _describe_dataset(dataset, image_column, label_column), {"kind": "dense", "dtype": dtype}
    )
    dense = {column_name(t.name): dense_feature(t.model.config.num_labels, dtype) for t in teachers}
    features = Features({_ROW: Value("int64"), **dense})
    with accelerator.main_process_first():
        finished = _open_folder(folder, {"record": record, "layout": layout})
    if finished:
        logger.warning("%s already holds this recording; nothing to do.", folder)
        return load_from_disk(str(folder))

    size = layout["shard_size"]
    shards = [range(start, min(start + size, len(dataset))) for start in range(0, len(dataset), size)]
    pending = [rows for rows in shards if not _shard_path(folder, rows).exists()]
    # Nobody writes before everybody has seen what is there.
    accelerator.wait_for_everyone()
    with accelerator.split_between_processes(pending) as own_shards:
        loader = _image_batches(dataset, image_column, teachers, own_shards, layout, num_workers)
        _record_shards(accelerator, teachers, own_shards, loader, folder, features, dtype)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _assemble(dataset, [_shard_path(folder, rows) for rows in shards], record, folder)
    accelerator.wait_for_everyone()
    return load_from_disk(str(folder))


def _describe_dataset(dataset, image_column, label_column) -> dict:
    """What tells this data set from another: its size, its labels, and a sample of its images."""
    digest = hashlib.sha256(np.asarray(dataset.with_format("numpy")[label_column], dtype=np.int64).tobytes())
    sample = sorted({int(row) for row in np.linspace(0, len(dataset) - 1, 64)})
    for image in dataset.cast_column(image_column, Image(decode=False)).select(sample)[image_column]:
        digest.update(image["bytes"] or str(image["path"]).encode())
    source = dataset.info.dataset_name or dataset.builder_name
    return {"source": source, "split": str(dataset.split), "num_rows": len(dataset), "sha256": digest.hexdigest()}


def _open_folder(output_dir, manifest) -> bool:
    """Begin or continue a recording in the folder; True if it is finished already."""
    path = output_dir / _MANIFEST
    if (output_dir / "state.json").exists():
        records = read_records(load_from_disk(str(output_dir)))
        if len(records) != 1:
            raise ValueError(f"{output_dir} holds another table; choose an empty folder.")
        differences = record_differences(manifest["record"], records[0])
        if differences:
            raise ValueError(
                f"{output_dir} holds a finished recording that differs: {'; '.join(differences)}. "
                "Choose another folder, or delete this one."
            )
        return True
    if path.exists():
        found = json.loads(path.read_text())
        differences = record_differences(manifest["record"], found["record"])
        differences += [
            f"{key} {found['layout'].get(key)} instead of {value}"
            for key, value in manifest["layout"].items()
            if found["layout"].get(key) != value
        ]
        if differences:
            raise ValueError(
                f"{output_dir} holds an interrupted recording that differs: {'; '.join(differences)}. "
                "Continue it with what it was begun with, choose another folder, or delete this one."
            )
        return False
    if output_dir.exists() and any(output_dir.iterdir()):
        raise ValueError(f"{output_dir} holds something else than a recording; choose an empty folder.")
    output_dir.mkdir(parents=True, exist_ok=True)
    _write_beside(path, lambda beside: beside.write_text(json.dumps(manifest, indent=2)))
    return False


def _shard_path(output_dir, rows) -> Path:
    return output_dir / "shards" / f"{rows.start:012d}-{rows.stop:012d}.arrow"


def _write_beside(path, write) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        write(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _image_batches(dataset, image_column, teachers, shards, layout, num_workers):
    """(row numbers, each teacher's pixel values) batch by batch, in the order of the shards."""
    images = ImageRows(dataset.select_columns([image_column]), image_column, skip_unreadable=layout["skip_unreadable"])
    processors = {teacher.name: teacher.image_processor for teacher in teachers}
    batch_size = layout["batch_size"]
    batches = [list(rows[start : start + batch_size]) for rows in shards for start in range(0, len(rows), batch_size)]

    def collate(rows):
        readable = [(number, row[image_column]) for number, row in rows if row[image_column] is not None]
        numbers = [number for number, _ in readable]
        return len(rows), numbers, pixel_values([image for _, image in readable], processors) if readable else {}

    return torch.utils.data.DataLoader(
        _Numbered(images), batch_sampler=batches, collate_fn=collate, num_workers=num_workers
    )


class _Numbered(torch.utils.data.Dataset):
    """(row number, row) in place of row."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitems__(self, indices):
        return list(zip(indices, self.rows.__getitems__(indices)))


def _record_shards(
    accelerator: Accelerator,
    teachers: list[Teacher],
    shards: list[range],
    loader: torch.utils.data.DataLoader,
    output_dir: Path,
    features: Features,
    dtype: str,
) -> None:
    for teacher in teachers:
        teacher.model.to(accelerator.device)
    batches = _teacher_outputs(accelerator, teachers, loader)
    total = sum(len(rows) for rows in shards)
    with tqdm(
        total=total, unit="image", desc="Recording logits", disable=not accelerator.is_local_main_process
    ) as bar:
        for rows in shards:

            def write(beside, rows=rows):
                with ArrowWriter(features=features, path=str(beside)) as writer:
                    seen = 0
                    while seen < len(rows):
                        size, numbers, logits = next(batches)
                        if numbers:
                            writer.write_table(_encode(numbers, logits, features, dtype))
                        seen += size
                        bar.update(size)
                    writer.finalize()

            _write_beside(_shard_path(output_dir, rows), write)


def _teacher_outputs(accelerator, teachers, loader) -> Iterator[tuple[int, list[int], dict[str, np.ndarray]]]:
    for size, numbers, inputs in loader:
        inputs = send_to_device(inputs, accelerator.device)
        with accelerator.autocast():
            logits = {t.name: t.logits(inputs[t.name]).cpu().numpy() for t in teachers} if numbers else {}
        yield size, numbers, logits


def _encode(numbers, logits, features, dtype) -> pa.Table:
    columns = {_ROW: pa.array(numbers, pa.int64())}
    for name, values in logits.items():
        try:
            columns[column_name(name)] = encode_dense(values, dtype)
        except NonFiniteLogitsError as error:
            rows = [numbers[row] for row in error.rows]
            advice = 'they fit into dtype="float32"' if error.fits_wider else "check the teacher and these images"
            raise ValueError(
                f'The teacher "{name}" gave NaN or infinite logits for row {rows[0]} '
                f"({len(rows)} of its batch, rows {rows[:10]}): {advice}."
            ) from error
    return pa.table(columns).cast(features.arrow_schema)


def _assemble(dataset, shards, record, output_dir) -> None:
    """Join images and logits into one table in the folder; `state.json` arrives last and marks it as finished."""
    logits = concatenate_datasets([Dataset.from_file(str(path)) for path in shards])
    rows = np.asarray(logits.with_format("numpy")[_ROW])
    if len(rows) < len(dataset):
        skipped = np.setdiff1d(np.arange(len(dataset)), rows)
        logger.warning("%d rows were left out, their images cannot be decoded: %s.", len(skipped), skipped.tolist())
        dataset = dataset.select(rows)
    table = concatenate_datasets([dataset, logits.remove_columns(_ROW)], axis=1)
    attach_record(table, record)
    finished = output_dir / "finished"
    shutil.rmtree(finished, ignore_errors=True)
    table.save_to_disk(str(finished))
    for path in sorted(finished.iterdir(), key=lambda path: path.name == "state.json"):
        os.replace(path, output_dir / path.name)
    del logits, table
    finished.rmdir()
    shutil.rmtree(output_dir / "shards")
    (output_dir / _MANIFEST).unlink()
