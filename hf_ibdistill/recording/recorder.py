"""Run the teachers over a dataset, shard by shard, and write their logits beside its images.

Batches never cross shards. So neither the number of processes nor the place of an interruption decides which rows share
a batch.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import numpy as np
import PIL.Image
import pyarrow as pa
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import send_to_device
from datasets import Dataset, DatasetDict, Features, Value
from datasets.arrow_writer import ArrowWriter
from tqdm.auto import tqdm

from ..checks import check_numbers
from ..data.classes import class_names, label_ids
from ..data.columns import IMAGE, as_image_table, require_table
from ..data.sources import open_saved
from ..files import output_folder, write_text
from ..images.preprocessing import pixel_values
from ..images.views import ViewRecipe, make_view, make_views, row_key
from ..logits.encoding import (
    FILE_KEY,
    ROW_KEY,
    LogitsEncoding,
    NonFiniteLogitsError,
    check_keys,
    check_teacher_names,
    column_name,
    concatenate_views,
    recorded_teachers,
)
from ..logits.provenance import (
    build_record,
    check_complete,
    check_files,
    check_images,
    only_record,
    read_records,
    teacher_differences,
)
from ..rows import ImageRows, default_num_workers
from ..teachers import Teacher, TeacherLike, load_teachers
from .shards import (
    ROW,
    assemble,
    check_folder_of_splits,
    lock_folder,
    open_folder,
    shard_is_whole,
    shard_keys,
    shard_path,
    write_shard,
)


logger = logging.getLogger(__name__)


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
    """Record the logits of each teacher for each image, once, in a column `<name>_logits` (arXiv 2310.00369).

    Every image is decoded once and shown to all teachers, each through its own image processor. Without `views` they see
    the image as it is. With a recipe they see V augmented views of it, which training makes again. Under `accelerate
    launch` the processes share the shards. Called again on the same folder, it continues an interrupted recording or
    returns the finished one.

    A table that already holds logits takes further teachers, or more views by the same recipe and teachers. Only what is
    new is computed.

    Args:
        dataset: a table with an image and a `ClassLabel` column, or several splits of it, all of which are recorded. Views
            are for training: of several splits, only "train" gets them. The others are recorded as they are, so that
            agreement with the teachers can be measured.
        teachers: name → Hub id, folder, model loaded by `from_pretrained`, or (model, image processor). If a teacher has
            the classes in another order, its logits are put into the order of the dataset, by the names of the classes.
        output_dir: folder of the finished table, which `datasets.load_from_disk` reads.
        views: which views to record, and how many.
        top_k: store the k largest logits and the log-sum-exp of the rest; `None` stores all.
        dtype: `"float16"` or `"float32"`, the type of the stored logits.
        bf16: run the teachers under bf16 autocast. It is faster on hardware with bf16 units, but the stored logits are
            rounded to three digits.
        batch_size: images (views) in a forward pass.
        shard_size: rows in a shard, rounded up to whole batches: what an interruption can cost.
        num_workers: processes that decode images and make views ahead of the teachers. `None` is none on a CPU, and up to
            8 on an accelerator.
        skip_unreadable: leave out rows whose image cannot be decoded, and report them, instead of stopping.
        image_column: the image column; found if not given.
        label_column: the label column; found if not given.
        trust_remote_code: run the code of Hub repositories that bring their own.

    Returns:
        The input with its image and label columns named `image` and `label`, its other columns, `row_key` (64 bits of the
        pixels), `file_key` (64 bits of the encoded file) and a logits column for each teacher, memory-mapped from
        `output_dir`, with its provenance. For several splits a `DatasetDict`.

    Raises:
        TypeError: `dataset` is not a `Dataset` or `DatasetDict`.
        ValueError: before any teacher runs: teachers and dataset differ in their classes, a column exists already, or the
            folder holds another recording, or one of other images or by other teachers. While recording: an image cannot
            be decoded, or a logit is not finite; the message names the row, and finished shards are kept.
        OSError: the disk is full; finished shards are kept.
    """
    teachers = load_teachers(teachers, bf16=bf16, trust_remote_code=trust_remote_code)
    check_teacher_names(teacher.name for teacher in teachers)
    encoding = LogitsEncoding(dtype, top_k)
    layout = {"batch_size": batch_size, "shard_size": shard_size, "skip_unreadable": skip_unreadable}
    check_numbers(1, whole=True, batch_size=batch_size, shard_size=shard_size)
    check_numbers(0, whole=True, num_workers=num_workers or 0)
    if views is not None and not isinstance(views, ViewRecipe):
        raise TypeError(f"views={views!r} is not a ViewRecipe. Pass ViewRecipe(num_views=…).")
    dataset, output_dir = as_image_table(dataset, image_column, label_column), output_folder(output_dir)
    splits = dataset if isinstance(dataset, Mapping) else {None: dataset}
    if isinstance(dataset, Mapping):
        check_folder_of_splits(output_dir)
    plans, sample = {}, None
    for name, split in splits.items():
        _check_before_recording(split, name, teachers)
        recipe = views if name in (None, "train") else None
        image, keys = _look_at_images(split, name)
        sample = sample or (image, recipe)
        # If the training split takes more views, the others stay as they are.
        keeps = name != "train" and "train" in splits
        plans[name] = _plan(split, teachers, recipe, encoding, layout, keys, keeps)
    # The first to finish waits for the last, however long that takes.
    accelerator = Accelerator(
        # Without it, processes that torchrun starts on a CPU would not know of each other and all write the same files.
        cpu=not torch.accelerator.is_available(),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=30))],
    )
    for teacher in teachers:
        teacher.model.to(accelerator.device)
        _try(teacher, *sample)
    recorded = {
        name: _record_split(accelerator, split, plans[name], output_dir / name if name else output_dir, num_workers)
        for name, split in splits.items()
    }
    if not isinstance(dataset, Mapping):
        return recorded[None]
    # This file makes `datasets.load_from_disk` see the folders as the splits of one dataset.
    index, text = output_dir / "dataset_dict.json", json.dumps({"splits": list(splits)})
    # A finished recording may be in a folder that must not be written to.
    if accelerator.is_main_process and not (index.is_file() and index.read_bytes() == text.encode()):
        write_text(index, text)
    accelerator.wait_for_everyone()
    return DatasetDict(recorded)


@dataclass
class _Plan:
    """What to record of one split: teachers, views, encoding, batches and shards."""

    teachers: list[Teacher]
    first_view: dict[str, int]  # by teacher: the views before it are in the table already
    views: ViewRecipe | None
    encoding: LogitsEncoding
    record: dict
    layout: dict  # batch_size, shard_size and skip_unreadable, as given

    @property
    def new_views(self) -> range:
        return range(min(self.first_view.values()), self.views.num_views)

    @property
    def rows_per_batch(self) -> int:
        return max(1, self.layout["batch_size"] // (1 if self.views is None else len(self.new_views)))

    @property
    def rows_per_shard(self) -> int:
        return -(-self.layout["shard_size"] // self.rows_per_batch) * self.rows_per_batch


def _check_before_recording(dataset, split, teachers) -> None:
    require_table(dataset, f'the split "{split}" of the dataset' if split else "dataset")
    if len(dataset) == 0:
        what = f'split "{split}"' if split else "dataset"
        raise ValueError(f"The {what} is empty. Pass at least one row.")
    for key in () if read_records(dataset) else (ROW_KEY, FILE_KEY):
        if key in dataset.column_names:
            raise ValueError(f'The column "{key}" would be overwritten by the keys of the images. Rename it.')
    check_keys(dataset)
    for teacher in teachers:
        teacher.match_classes(class_names(dataset))


def _look_at_images(dataset, split) -> tuple[PIL.Image.Image, list[int | None]]:
    """The first readable one of up to 64 images from all over the dataset, and the key of each, `None` if unreadable."""
    first, keys = None, []
    rows = ImageRows(dataset, skip_unreadable=True)
    for row in sorted({int(row) for row in np.linspace(0, len(dataset) - 1, 64)}):
        image = rows[row][IMAGE]
        first = first or image
        keys.append(None if image is None else row_key(image))
    if first is None:
        try:
            ImageRows(dataset)[0]
        except ValueError as error:
            what = f'split "{split}"' if split else "dataset"
            raise ValueError(
                f"None of {len(keys)} sampled images of the {what} can be decoded, so there is nothing to record. {error}"
            ) from error
    return first, keys


def _try(teacher, image, views) -> None:
    """Run the teacher on one image, so that one that does not fit is refused before the first shard."""
    if views is not None:
        image = make_view(image, views, row_key(image), 0)
    try:
        inputs = pixel_values([image], {"": teacher.image_processor})[""]
    except Exception as error:  # whatever the code of any image processor raises
        raise ValueError(
            f'The image processor of the teacher "{teacher.name}" ({type(teacher.image_processor).__name__}) fails on an '
            f"RGB image: {type(error).__name__}: {error}"
        ) from error
    teacher.logits(inputs)


def _plan(dataset, teachers, views, encoding, layout, sample_keys, keeps_recorded) -> _Plan:
    described = {teacher.name: teacher.describe(encoding) for teacher in teachers}
    for teacher in teachers:
        encoding.feature(teacher.model.config.num_labels, None)
    first_view = dict.fromkeys(described, 0)
    old = {}
    if recorded_teachers(dataset):
        old, old_views = _recorded_so_far(dataset, views)
        for name in [name for name in described if name in old]:
            _check_same_teacher(name, old[name], described[name])
            if keeps_recorded:
                del described[name], first_view[name]
            else:
                first_view[name] = _views_to_keep(name, views, old_views)
        left_behind = [name for name in old if name not in described and not keeps_recorded]
        if left_behind and views is not None and views.num_views != old_views.num_views:
            raise ValueError(
                f"num_views={views.num_views}, but {left_behind} have {old_views.num_views} views in this table. Record "
                f"{old_views.num_views}, or pass these teachers as well, so that they get {views.num_views}."
            )
    return _Plan(
        teachers=[teacher for teacher in teachers if teacher.name in described],
        first_view=first_view,
        views=views,
        encoding=encoding,
        record=build_record(list({**old, **described}.values()), _describe_dataset(dataset, sample_keys), views),
        layout=layout,
    )


def _recorded_so_far(dataset, views) -> tuple[dict[str, dict], ViewRecipe | None]:
    """The teachers whose logits the dataset holds already, and their views."""
    check_files(dataset)
    check_complete(dataset)
    records = read_records(dataset)
    if len(records) != 1:
        raise ValueError(
            f"The dataset has logits columns ({', '.join(map(column_name, recorded_teachers(dataset)))}) and "
            f"{len(records)} provenance records; it needs exactly one to be continued. Remove the columns to start over."
        )
    old_views = None if records[0]["views"] is None else ViewRecipe(**records[0]["views"])
    if (views is None) != (old_views is None) or (views is not None and not views.same_views(old_views)):
        raise ValueError(
            f"The dataset holds logits of other views: {old_views} instead of {views}. Use its recipe (stored_views), "
            "or remove the columns to start over."
        )
    kept = [teacher for teacher in records[0]["teachers"] if teacher["name"] in recorded_teachers(dataset)]
    return {teacher["name"]: teacher for teacher in kept}, old_views


def _check_same_teacher(name, old, new) -> None:
    differences = teacher_differences(new, old)
    if differences:
        raise ValueError(
            f'The dataset already has a column "{column_name(name)}" of another teacher ({", ".join(differences)} '
            "differ). Rename the teacher, or remove the column."
        )


def _views_to_keep(name, views, old_views) -> int:
    if views is None or views.num_views <= old_views.num_views:
        raise ValueError(
            f'The dataset already has the column "{column_name(name)}"'
            f"{'' if views is None else f' with {old_views.num_views} views'}. Leave this teacher out"
            f"{'.' if views is None else ', or record more views.'}"
        )
    return old_views.num_views


def _describe_dataset(dataset, sample_keys) -> dict:
    """What distinguishes this dataset from others: its size, its labels, and a sample of its images."""
    digest = hashlib.sha256(label_ids(dataset).tobytes())
    for key in sample_keys:
        digest.update(b"" if key is None else key.to_bytes(8, "little", signed=True))
    source = dataset.info.dataset_name or dataset.builder_name
    return {"source": source, "split": str(dataset.split), "num_rows": len(dataset), "sha256": digest.hexdigest()}


def _record_split(accelerator, dataset, plan, folder, num_workers) -> Dataset:
    # One process holds the lock for all processes of this recording.
    with lock_folder(folder) if accelerator.is_main_process else nullcontext():
        with accelerator.main_process_first():
            finished = open_folder(folder, plan.record, plan.layout)
        if finished:
            table = open_saved(folder)
            if accelerator.is_main_process:
                _check_finished(dataset, table)
            logger.warning("%s already holds this recording; nothing to do.", folder)
            return table
        size = plan.rows_per_shard
        shards = [range(start, min(start + size, len(dataset))) for start in range(0, len(dataset), size)]
        pending = [rows for rows in shards if not shard_is_whole(shard_path(folder, rows))]
        if accelerator.is_main_process:
            if recorded_teachers(dataset):
                check_images(dataset, range(len(dataset)))
            keys = shard_keys(shard_path(folder, rows) for rows in shards if rows not in pending)
            check_images(dataset, keys.pop(ROW), keys)
        # No process writes before every process has listed the finished shards.
        accelerator.wait_for_everyone()
        with accelerator.split_between_processes(pending) as own_shards:
            _record_shards(accelerator, dataset, plan, own_shards, folder, num_workers)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            assemble(dataset, plan.record, [shard_path(folder, rows) for rows in shards], folder)
        accelerator.wait_for_everyone()
        return open_saved(folder)


def _check_finished(dataset, table) -> None:
    rows = np.setdiff1d(np.arange(len(dataset)), only_record(table).get("skipped_rows", []))
    # An earlier version did not write which rows it left out.
    if len(rows) == len(table):
        keys = table.select_columns([name for name in (ROW_KEY, FILE_KEY) if name in table.column_names])
        check_images(dataset, rows.tolist(), keys[:])


def _record_shards(accelerator, dataset, plan, shards, folder, num_workers) -> None:
    columns = {column_name(t.name): _feature(plan, t) for t in plan.teachers}
    features = Features({**dict.fromkeys((ROW, ROW_KEY, FILE_KEY), Value("int64")), **columns})
    if num_workers is None:
        num_workers = default_num_workers(use_cpu=accelerator.device.type == "cpu")
    batches = _teacher_outputs(accelerator, plan, _image_batches(dataset, plan, shards, num_workers))
    total = sum(len(rows) for rows in shards)
    with tqdm(
        total=total, unit="image", desc="Recording logits", disable=not accelerator.is_local_main_process
    ) as bar:
        for rows in shards:

            def write(path, rows=rows):
                with ArrowWriter(features=features, path=str(path)) as writer:
                    seen = 0
                    while seen < len(rows):
                        size, numbers, keys, logits = next(batches)
                        if numbers:
                            writer.write_table(_encode(dataset, plan, numbers, keys, logits, features))
                        seen += size
                        bar.update(size)
                    writer.finalize()

            write_shard(shard_path(folder, rows), write)


def _feature(plan, teacher):
    return plan.encoding.feature(teacher.model.config.num_labels, None if plan.views is None else plan.views.num_views)


def _image_batches(dataset, plan, shards, num_workers) -> torch.utils.data.DataLoader:
    """(rows, row numbers, (row key, file key) of each, pixel values of each teacher), batch by batch in the order of the
    shards. The new views of a row follow one another."""
    # Views that were recorded before follow from the key that was recorded with them.
    kept = [ROW_KEY] if recorded_teachers(dataset) and ROW_KEY in dataset.column_names else []
    images = ImageRows(dataset, kept, skip_unreadable=plan.layout["skip_unreadable"], file_keys=True)
    processors = {teacher.name: teacher.image_processor for teacher in plan.teachers}
    size = plan.rows_per_batch
    batches = [list(rows[start : start + size]) for rows in shards for start in range(0, len(rows), size)]

    return torch.utils.data.DataLoader(
        _Numbered(images),
        batch_sampler=batches,
        collate_fn=partial(_collate, processors, plan.views, None if plan.views is None else plan.new_views),
        num_workers=num_workers,
        pin_memory=torch.accelerator.is_available(),
    )


def _collate(processors, recipe, views, rows):
    readable = [(number, row) for number, row in rows if row[IMAGE] is not None]
    numbers, pictures = [number for number, _ in readable], [row[IMAGE] for _, row in readable]
    keys = [(row[ROW_KEY] if ROW_KEY in row else row_key(row[IMAGE]), row[FILE_KEY]) for _, row in readable]
    if recipe is not None:
        pictures = make_views(
            [picture for picture in pictures for _ in views],
            recipe,
            [key for key, _ in keys for _ in views],
            list(views) * len(pictures),
        )
    return len(rows), numbers, keys, pixel_values(pictures, processors) if readable else {}


class _Numbered(torch.utils.data.Dataset):
    """(row number, row) in place of row."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitems__(self, indices):
        return list(zip(indices, self.rows.__getitems__(indices)))


def _teacher_outputs(
    accelerator, plan, loader
) -> Iterator[tuple[int, list[int], list[tuple[int, int]], dict[str, np.ndarray]]]:
    for size, numbers, keys, inputs in loader:
        inputs = send_to_device(inputs, accelerator.device)
        with torch.inference_mode():
            logits = {t.name: _logits_that_fit(t, inputs[t.name]).cpu().numpy() for t in plan.teachers if numbers}
        yield size, numbers, keys, logits


def _logits_that_fit(teacher, pixel_values) -> torch.Tensor:
    """The logits of the teacher. A batch that does not fit into the memory of the device is halved until it does."""
    try:
        return teacher.logits(pixel_values)
    except torch.OutOfMemoryError:
        if len(pixel_values) == 1:
            raise
    return torch.cat([_logits_that_fit(teacher, half) for half in pixel_values.tensor_split(2)])


def _encode(dataset, plan, numbers, keys, logits, features) -> pa.Table:
    identity = zip((ROW, ROW_KEY, FILE_KEY), (numbers, *zip(*keys)))
    columns = {name: pa.array(values, pa.int64()) for name, values in identity}
    for name, values in logits.items():
        column, first = column_name(name), plan.first_view[name]
        if plan.views is not None:
            values = values.reshape(len(numbers), len(plan.new_views), -1)[:, first - plan.new_views.start :]
        try:
            columns[column] = plan.encoding.encode(values, views=plan.views is not None)
        except NonFiniteLogitsError as error:
            rows = [numbers[row] for row in error.rows]
            raise ValueError(
                f'The teacher "{name}" predicts NaN or infinite logits for row {rows[0]} '
                f"({len(rows)} of its batch, rows {rows[:10]}): {error.advice}."
            ) from error
        if first > 0:
            kept = dataset.select_columns([column]).with_format("arrow")[numbers][column]
            columns[column] = concatenate_views(kept, columns[column])
    return pa.table(columns).cast(features.arrow_schema)
