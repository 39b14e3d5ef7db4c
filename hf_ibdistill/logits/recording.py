"""Run the teachers over a data set, shard by shard, and write what they say beside its images.

A shard is a run of consecutive rows. It is written under another name and renamed when it is whole, so an interrupted
recording keeps every shard that it finished and continues with the next. Batches never cross shards: which rows share a
batch depends on neither the number of processes nor on where a recording was interrupted.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import send_to_device
from datasets import Dataset, DatasetDict, Features, Value, concatenate_datasets, load_from_disk
from datasets.arrow_writer import ArrowWriter
from tqdm.auto import tqdm

from ..data import class_names, find_columns
from ..images import ImageRows, default_num_workers, pixel_values
from ..teachers import Teacher, TeacherLike, load_teachers
from .encoding import (
    ROW_KEY,
    LogitsEncoding,
    NonFiniteLogitsError,
    column_name,
    concatenate_views,
    recorded_teachers,
)
from .provenance import (
    attach_record,
    build_record,
    describe_teacher,
    read_records,
    record_differences,
    teacher_differences,
)
from .views import ViewRecipe, make_views, row_key


logger = logging.getLogger(__name__)

_ROW = "__row__"
_MANIFEST = "recording.json"
CHECKSUMS = "checksums.json"


def record_teacher_logits(
    dataset: Dataset | DatasetDict,
    teachers: Mapping[str, TeacherLike],
    *,
    output_dir: str | os.PathLike,
    views: ViewRecipe | None = None,
    top_k: int | None = None,
    dtype: str = "float16",
    bf16: bool = False,
    batch_size: int = 64,
    shard_size: int = 4096,
    num_workers: int | None = None,
    skip_unreadable: bool = False,
    image_column: str | None = None,
    label_column: str | None = None,
    trust_remote_code: bool = False,
) -> Dataset | DatasetDict:
    """Record what each teacher says about each image, once, in a column `<name>_logits` (arXiv 2310.00369).

    Every image is decoded once and shown to all teachers, each through its own image processor. Without `views` they see
    it as it is; with a recipe they see V augmented views of it, which training makes again. Run under `accelerate
    launch`, the processes share the shards. Called again on the same folder it continues an interrupted recording, or
    returns the finished one.

    A table that already holds logits takes further teachers, or more views by the same recipe and teachers; only what is
    new is computed.

    Args:
        dataset: rows with an image and a `ClassLabel` column; or several splits of them, all of which are recorded. Views
            are for training: of several splits, only "train" gets them, the others are recorded as they are, so that
            agreement with the teachers can be measured.
        teachers: name → Hub id, folder, model loaded by `from_pretrained`, or (model, image processor). The logits of one
            that has the data set's classes in another order are put into the data set's, by the classes' names.
        output_dir: folder of the finished table, readable by `datasets.load_from_disk`.
        views: which views to record, and how many.
        top_k: store the k largest logits and the log-sum-exp of the rest; `None` stores all.
        dtype: `"float16"` or `"float32"`, how the logits are stored.
        bf16: run the teachers under bf16 autocast: faster where the hardware has it, but their logits are rounded to
            three digits, for good.
        batch_size: images (views) in a forward pass.
        shard_size: rows in a shard, rounded up to whole batches: what an interruption can cost.
        num_workers: processes that decode images and make views ahead of the teachers; by default none where the teachers
            run on a CPU, else up to 8.
        skip_unreadable: leave rows out whose image cannot be decoded, and report them, instead of stopping.
        image_column: the image column; found when not given.
        label_column: the label column; found when not given.
        trust_remote_code: run the code of Hub repositories that bring their own.

    Returns:
        The input's columns plus `row_key` (64 bits of the image's content) and a logits column for each teacher,
        memory-mapped from `output_dir`, with its provenance. For several splits a `DatasetDict`.

    Raises:
        ValueError: before any teacher runs: teachers and data set differ in their classes, a column exists already, the
            folder holds another recording or one by other teachers. While recording: an image cannot be decoded, or
            a logit is not finite; the message names the row, and finished shards are kept.
        OSError: the disk is full; finished shards are kept.
    """
    teachers = load_teachers(teachers, bf16=bf16, trust_remote_code=trust_remote_code)
    encoding = LogitsEncoding(dtype, top_k)
    layout = {"batch_size": batch_size, "shard_size": shard_size, "skip_unreadable": skip_unreadable}
    if min(batch_size, shard_size) < 1:
        raise ValueError(f"batch_size and shard_size are at least 1; got {batch_size} and {shard_size}.")
    output_dir = Path(output_dir)
    splits = dataset if isinstance(dataset, DatasetDict) else {None: dataset}
    plans = {}
    for name, split in splits.items():
        columns = find_columns(split, image_column, label_column)
        _check_before_recording(split, name, teachers, columns[1])
        recipe = views if name in (None, "train") else None
        plans[name] = _plan(split, teachers, recipe, encoding, layout, columns)
    # The first to finish waits for the last, however long that takes.
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=30))])
    recorded = {
        name: _record_split(accelerator, split, plans[name], output_dir / name if name else output_dir, num_workers)
        for name, split in splits.items()
    }
    if not isinstance(dataset, DatasetDict):
        return recorded[None]
    if accelerator.is_main_process:
        # What makes `datasets.load_from_disk` see the folders as the splits of one data set.
        write_beside(
            output_dir / "dataset_dict.json", lambda beside: beside.write_text(json.dumps({"splits": list(splits)}))
        )
    accelerator.wait_for_everyone()
    return DatasetDict(recorded)


@dataclass
class _Plan:
    """What is to be recorded of one data set: by whom, which views, how stored, in which batches and shards."""

    teachers: list[Teacher]
    first_view: dict[str, int]  # by teacher: the views before it are in the data set already
    views: ViewRecipe | None
    encoding: LogitsEncoding
    record: dict
    image_column: str
    layout: dict  # batch_size, shard_size and skip_unreadable, as they were asked for

    @property
    def new_views(self) -> range:
        return range(min(self.first_view.values()), self.views.num_views)

    @property
    def rows_per_batch(self) -> int:
        return max(1, self.layout["batch_size"] // (1 if self.views is None else len(self.new_views)))

    @property
    def rows_per_shard(self) -> int:
        return -(-self.layout["shard_size"] // self.rows_per_batch) * self.rows_per_batch


def _check_before_recording(dataset, split, teachers, label_column) -> None:
    if len(dataset) == 0:
        what = f'split "{split}"' if split else "data set"
        raise ValueError(f"The {what} is empty; there is nothing to record.")
    for teacher in teachers:
        teacher.match_classes(class_names(dataset, label_column))


def _plan(dataset, teachers, views, encoding, layout, columns) -> _Plan:
    described = {teacher.name: describe_teacher(teacher, encoding) for teacher in teachers}
    for teacher in teachers:
        encoding.feature(teacher.model.config.num_labels, None)
    first_view = dict.fromkeys(described, 0)
    old = {}
    if recorded_teachers(dataset):
        old, old_views = _recorded_so_far(dataset, views)
        for name in described:
            if name in old:
                first_view[name] = _views_to_keep(name, old[name], described[name], views, old_views)
        left_behind = [name for name in old if name not in described]
        if left_behind and views is not None and views.num_views != old_views.num_views:
            raise ValueError(
                f"{left_behind} have {old_views.num_views} views in this table; record as many, or give these teachers "
                f"too so that they get {views.num_views}."
            )
    return _Plan(
        teachers=teachers,
        first_view=first_view,
        views=views,
        encoding=encoding,
        record=build_record(list({**old, **described}.values()), _describe_dataset(dataset, *columns), views),
        image_column=columns[0],
        layout=layout,
    )


def _recorded_so_far(dataset, views) -> tuple[dict[str, dict], ViewRecipe | None]:
    """The teachers whose logits the data set holds already, and their views."""
    records = read_records(dataset)
    if len(records) != 1:
        raise ValueError(
            f"The data set has logits columns ({', '.join(map(column_name, recorded_teachers(dataset)))}) and "
            f"{len(records)} provenance records; with one it could be continued. Remove the columns to record anew."
        )
    old_views = None if records[0]["views"] is None else ViewRecipe(**records[0]["views"])
    if (views is None) != (old_views is None) or (views is not None and not views.same_views(old_views)):
        raise ValueError(
            f"The data set holds logits of other views: {old_views} instead of {views}. Use its recipe (stored_views), "
            "or remove the columns to record anew."
        )
    kept = [teacher for teacher in records[0]["teachers"] if teacher["name"] in recorded_teachers(dataset)]
    return {teacher["name"]: teacher for teacher in kept}, old_views


def _views_to_keep(name, old, new, views, old_views) -> int:
    differences = teacher_differences(new, old)
    if differences:
        raise ValueError(
            f'The data set already has a column "{column_name(name)}" by another teacher ({", ".join(differences)} '
            "differ); rename the teacher or remove the column."
        )
    if views is None or views.num_views <= old_views.num_views:
        raise ValueError(
            f'The data set already has the column "{column_name(name)}"'
            f"{'' if views is None else f' with {old_views.num_views} views'}; leave this teacher out"
            f"{'.' if views is None else ', or ask for more views.'}"
        )
    return old_views.num_views


def _describe_dataset(dataset, image_column, label_column) -> dict:
    """What tells this data set from another: its size, its labels, and a sample of its images."""
    digest = hashlib.sha256(np.asarray(dataset.with_format("numpy")[label_column], dtype=np.int64).tobytes())
    sample = sorted({int(row) for row in np.linspace(0, len(dataset) - 1, 64)})
    images = ImageRows(dataset, image_column, skip_unreadable=True)
    for row in images.__getitems__(sample):
        digest.update(
            b"" if row[image_column] is None else row_key(row[image_column]).to_bytes(8, "little", signed=True)
        )
    source = dataset.info.dataset_name or dataset.builder_name
    return {"source": source, "split": str(dataset.split), "num_rows": len(dataset), "sha256": digest.hexdigest()}


def _record_split(accelerator, dataset, plan, folder, num_workers) -> Dataset:
    with accelerator.main_process_first():
        finished = _open_folder(folder, plan)
    if finished:
        logger.warning("%s already holds this recording; nothing to do.", folder)
        return load_from_disk(str(folder))
    size = plan.rows_per_shard
    shards = [range(start, min(start + size, len(dataset))) for start in range(0, len(dataset), size)]
    pending = [rows for rows in shards if not _shard_is_whole(_shard_path(folder, rows))]
    # Nobody writes before everybody has seen what is there.
    accelerator.wait_for_everyone()
    with accelerator.split_between_processes(pending) as own_shards:
        _record_shards(accelerator, dataset, plan, own_shards, folder, num_workers)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _say_if_disk_is_full(
            folder, lambda: _assemble(dataset, plan, [_shard_path(folder, rows) for rows in shards], folder)
        )
    accelerator.wait_for_everyone()
    return load_from_disk(str(folder))


def _open_folder(folder, plan) -> bool:
    """Begin or continue a recording in the folder; True if it is finished already."""
    path = folder / _MANIFEST
    if (folder / "state.json").exists():
        records = read_records(load_from_disk(str(folder)))
        if len(records) != 1:
            raise ValueError(f"{folder} holds another table; choose an empty folder.")
        differences = record_differences(plan.record, records[0])
        if differences:
            raise ValueError(
                f"{folder} holds a finished recording that differs: {'; '.join(differences)}. "
                "Choose another folder, or delete this one."
            )
        _remove_scaffolding(folder)
        return True
    if path.exists():
        found = json.loads(path.read_text())
        differences = record_differences(plan.record, found["record"])
        differences += [
            f"{key} {found['layout'].get(key)} instead of {value}"
            for key, value in plan.layout.items()
            if found["layout"].get(key) != value
        ]
        if differences:
            raise ValueError(
                f"{folder} holds an interrupted recording that differs: {'; '.join(differences)}. "
                "Continue it with what it was begun with, choose another folder, or delete this one."
            )
        return False
    # A recording that is killed before its manifest is there leaves nothing else than parts of it.
    if folder.exists() and any(not entry.name.endswith(".partial") for entry in folder.iterdir()):
        raise ValueError(f"{folder} holds something else than a recording; choose an empty folder.")
    manifest = {"record": plan.record, "layout": plan.layout}
    write_beside(path, lambda beside: beside.write_text(json.dumps(manifest, indent=2)))
    return False


def _shard_path(folder, rows) -> Path:
    return folder / "shards" / f"{rows.start:012d}-{rows.stop:012d}.arrow"


def _checksum_path(shard) -> Path:
    return shard.with_name(f"{shard.name}.sha256")


def _shard_is_whole(path) -> bool:
    return path.exists() and _checksum_path(path).exists() and _checksum_path(path).read_text() == sha256(path)


def sha256(path: Path) -> str:
    """The hash of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_checksums(folder: Path) -> dict[str, str]:
    """Of a finished table: the name of each data file → the hash that it had when it was written."""
    return json.loads((folder / CHECKSUMS).read_text())


def write_beside(path: Path, write: Callable[[Path], None], before_rename: Callable[[Path], None] = lambda _: None):
    """Write a file under another name, make sure that it is on the disk, and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        write(beside)
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        before_rename(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _say_if_disk_is_full(folder, write) -> None:
    try:
        write()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            error.errno, f"The disk that holds {folder} is full. What is recorded is kept: free space and call again"
        ) from error


def _record_shards(accelerator, dataset, plan, shards, folder, num_workers) -> None:
    for teacher in plan.teachers:
        teacher.model.to(accelerator.device)
    columns = {column_name(t.name): _feature(plan, t) for t in plan.teachers}
    features = Features({_ROW: Value("int64"), ROW_KEY: Value("int64"), **columns})
    if num_workers is None:
        num_workers = default_num_workers(use_cpu=accelerator.device.type == "cpu")
    batches = _teacher_outputs(accelerator, plan, _image_batches(dataset, plan, shards, num_workers))
    total = sum(len(rows) for rows in shards)
    with tqdm(
        total=total, unit="image", desc="Recording logits", disable=not accelerator.is_local_main_process
    ) as bar:
        for rows in shards:

            def write(beside, rows=rows):
                with ArrowWriter(features=features, path=str(beside)) as writer:
                    seen = 0
                    while seen < len(rows):
                        size, numbers, keys, logits = next(batches)
                        if numbers:
                            writer.write_table(_encode(dataset, plan, numbers, keys, logits, features))
                        seen += size
                        bar.update(size)
                    writer.finalize()

            path = _shard_path(folder, rows)

            def write_checksum(beside, path=path):
                checksum = sha256(beside)
                write_beside(_checksum_path(path), lambda file: file.write_text(checksum))

            _say_if_disk_is_full(folder, lambda p=path, w=write, c=write_checksum: write_beside(p, w, before_rename=c))


def _feature(plan, teacher):
    return plan.encoding.feature(teacher.model.config.num_labels, None if plan.views is None else plan.views.num_views)


def _image_batches(dataset, plan, shards, num_workers) -> torch.utils.data.DataLoader:
    """(rows, row numbers, row keys, each teacher's pixel values) batch by batch, in the order of the shards; of each row
    its new views one after the other."""
    images = ImageRows(dataset, plan.image_column, skip_unreadable=plan.layout["skip_unreadable"])
    processors = {teacher.name: teacher.image_processor for teacher in plan.teachers}
    size = plan.rows_per_batch
    batches = [list(rows[start : start + size]) for rows in shards for start in range(0, len(rows), size)]

    def collate(rows):
        readable = [(number, row[plan.image_column]) for number, row in rows if row[plan.image_column] is not None]
        numbers, keys = [number for number, _ in readable], [row_key(image) for _, image in readable]
        pictures = [image for _, image in readable]
        if plan.views is not None:
            views = list(plan.new_views)
            pictures = make_views(
                [picture for picture in pictures for _ in views],
                plan.views,
                [key for key in keys for _ in views],
                views * len(pictures),
            )
        return len(rows), numbers, keys, pixel_values(pictures, processors) if readable else {}

    return torch.utils.data.DataLoader(
        _Numbered(images),
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=torch.accelerator.is_available(),
    )


class _Numbered(torch.utils.data.Dataset):
    """(row number, row) in place of row."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitems__(self, indices):
        return list(zip(indices, self.rows.__getitems__(indices)))


def _teacher_outputs(accelerator, plan, loader) -> Iterator[tuple[int, list[int], list[int], dict[str, np.ndarray]]]:
    for size, numbers, keys, inputs in loader:
        inputs = send_to_device(inputs, accelerator.device)
        with torch.inference_mode():
            logits = {t.name: _logits_that_fit(t, inputs[t.name]).cpu().numpy() for t in plan.teachers if numbers}
        yield size, numbers, keys, logits


def _logits_that_fit(teacher, pixel_values) -> torch.Tensor:
    """The teacher's logits; of a batch that is too large for the device's memory, half by half."""
    try:
        return teacher.logits(pixel_values)
    except torch.OutOfMemoryError:
        if len(pixel_values) == 1:
            raise
    return torch.cat([_logits_that_fit(teacher, half) for half in pixel_values.tensor_split(2)])


def _encode(dataset, plan, numbers, keys, logits, features) -> pa.Table:
    columns = {_ROW: pa.array(numbers, pa.int64()), ROW_KEY: pa.array(keys, pa.int64())}
    for name, values in logits.items():
        column, first = column_name(name), plan.first_view[name]
        if plan.views is not None:
            values = values.reshape(len(numbers), len(plan.new_views), -1)[:, first - plan.new_views.start :]
        try:
            columns[column] = plan.encoding.encode(values, views=plan.views is not None)
        except NonFiniteLogitsError as error:
            rows = [numbers[row] for row in error.rows]
            raise ValueError(
                f'The teacher "{name}" gave NaN or infinite logits for row {rows[0]} '
                f"({len(rows)} of its batch, rows {rows[:10]}): {error.advice}."
            ) from error
        if first > 0:
            kept = dataset.select_columns([column]).with_format("arrow")[numbers][column]
            columns[column] = concatenate_views(kept, columns[column])
    return pa.table(columns).cast(features.arrow_schema)


def _assemble(dataset, plan, shards, folder) -> None:
    """Join images and logits into one table in the folder; `state.json` arrives last and marks it as finished."""
    logits = concatenate_datasets([Dataset.from_file(str(path)) for path in shards])
    rows = np.asarray(logits.with_format("numpy")[_ROW])
    if len(rows) < len(dataset):
        skipped = np.setdiff1d(np.arange(len(dataset)), rows)
        logger.warning("%d rows were left out, their images cannot be decoded: %s.", len(skipped), skipped.tolist())
        dataset = dataset.select(rows)
    logits = logits.remove_columns(_ROW)
    replaced = [name for name in logits.column_names if name in dataset.column_names]
    table = concatenate_datasets([dataset.remove_columns(replaced), logits], axis=1)
    attach_record(table, plan.record)
    finished = folder / "finished"
    shutil.rmtree(finished, ignore_errors=True)
    try:
        table.save_to_disk(str(finished))
        checksums = {path.name: sha256(path) for path in sorted(finished.glob("*.arrow"))}
        (finished / CHECKSUMS).write_text(json.dumps(checksums, indent=2))
        for path in sorted(finished.iterdir(), key=lambda path: path.name == "state.json"):
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(finished, ignore_errors=True)
    _remove_scaffolding(folder)


def _remove_scaffolding(folder) -> None:
    """Remove what only an unfinished recording needs, and what killed processes left of it."""
    for name in ("shards", "finished"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for path in (folder / _MANIFEST, *folder.glob("*.partial")):
        path.unlink(missing_ok=True)
