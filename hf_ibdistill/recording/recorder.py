"""Run the teachers over a dataset, shard by shard, and write their logits beside its images.

Batches never cross shards. So neither the number of processes nor the place of an interruption decides which rows share
a batch.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import islice

import numpy as np
import PIL.Image
import pyarrow as pa
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import gather_object, send_to_device
from datasets import Dataset, DatasetDict, Features, Value
from datasets.table import embed_table_storage
from tqdm.auto import tqdm
from transformers import BaseImageProcessor

from ..checks import check_numbers
from ..data.classes import check_labels, class_names, label_ids
from ..data.columns import IMAGE, LABEL, as_image_table, require_table
from ..data.sources import open_saved
from ..data.splits import spread
from ..files import output_folder, write_text
from ..images.decoding import decode_image, file_key
from ..images.preprocessing import pixel_values
from ..images.views import ViewRecipe, make_view, row_key
from ..logits.encoding import (
    FILE_KEY,
    LARGEST,
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
from ..teachers import ClassMapping, Teacher, TeacherLike, load_teachers
from .shards import (
    check_folder_of_splits,
    finish,
    first_row,
    lock_folder,
    old_shards,
    open_folder,
    read_note,
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
    teacher_classes: Mapping[str, ClassMapping] | None = None,
) -> Dataset | DatasetDict:
    """Record the logits of each teacher for each image, once, in a column `<name>_logits` (arXiv 2310.00369).

    Every image is decoded once and shown to all teachers, each through its own image processor: as it is, or with `views`
    as V augmented views, which training makes again. Under `accelerate launch` the processes share the shards. Called again
    on the same folder, it continues an interrupted recording or returns the finished one.

    A table that already holds logits takes further teachers, or more views by the same recipe and teachers. Only what is
    new is computed.

    Args:
        dataset: a table with an image and a `ClassLabel` column, or several splits of it, all of which are recorded. Rows
            may have no label (null or −1), or the table no label column; the classes then are those of the first teacher.
            Of several splits, only "train" gets views. The others, which measure agreement with the teachers, get none.
        teachers: name → Hub id, folder, model loaded by `from_pretrained`, or (model, image processor). Logits are put into
            the order of the classes of the dataset, by name. A teacher may have further classes, which are dropped.
        output_dir: folder of the finished table, which `datasets.load_from_disk` reads.
        views: which views to record, and how many.
        top_k: store the k largest logits and the log-sum-exp of the rest; `None` stores all.
        dtype: `"float16"` or `"float32"`, the type of the stored logits.
        bf16: run the teachers under bf16 autocast: faster on hardware with bf16 units, but rounded to three digits.
        batch_size: images (views) in a forward pass.
        shard_size: rows in a shard, rounded up to whole batches: what an interruption can cost.
        num_workers: processes that decode images and make views ahead of the teachers. `None` is none on a CPU, and up to
            8 on an accelerator.
        skip_unreadable: leave out rows whose image cannot be decoded, and report them, instead of stopping.
        image_column: the image column; found if not given.
        label_column: the label column; found if not given.
        trust_remote_code: run the code of Hub repositories that bring their own.
        teacher_classes: teacher → class of the dataset → the teacher's class for it, by name or number, if the names differ.
            A list of classes stands for their log-sum-exp, so that their probabilities add up.

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
    teachers = load_teachers(teachers, bf16=bf16, trust_remote_code=trust_remote_code, classes=teacher_classes)
    check_teacher_names(teacher.name for teacher in teachers)
    encoding = LogitsEncoding(dtype, top_k)
    layout = {"batch_size": batch_size, "shard_size": shard_size, "skip_unreadable": skip_unreadable}
    check_numbers(1, whole=True, batch_size=batch_size, shard_size=shard_size)
    check_numbers(0, whole=True, num_workers=num_workers or 0)
    if views is not None and not isinstance(views, ViewRecipe):
        raise TypeError(f"views={views!r} is not a ViewRecipe. Pass ViewRecipe(num_views=…).")
    output_dir = output_folder(output_dir)
    dataset = as_image_table(dataset, image_column, label_column, needs_label=None)
    splits = dataset if isinstance(dataset, Mapping) else {None: dataset}
    if isinstance(dataset, Mapping):
        check_folder_of_splits(output_dir)
    plans, sample = {}, None
    for name, split in splits.items():
        title = f'split "{name}"' if name else "dataset"
        _check_before_recording(split, title, teachers)
        recipe = views if name in (None, "train") else None
        image, keys = _look_at_images(split, title)
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
        name: _record_split(accelerator, split, plans[name], output_dir / (name or ""), num_workers)
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
    features: Features  # the columns of the table
    warned: set[str] = field(default_factory=set)  # teachers whose large logits were reported

    @property
    def new_views(self) -> range | None:
        return None if self.views is None else range(min(self.first_view.values()), self.views.num_views)

    @property
    def rows_per_batch(self) -> int:
        return max(1, self.layout["batch_size"] // (1 if self.views is None else len(self.new_views)))

    @property
    def rows_per_shard(self) -> int:
        return -(-self.layout["shard_size"] // self.rows_per_batch) * self.rows_per_batch

    def preparation(self, dataset) -> "_Preparation":
        return _Preparation(
            processors={teacher.name: teacher.image_processor for teacher in self.teachers},
            recipe=self.views,
            views=self.new_views,
            mode=dataset.features[IMAGE].mode,
            skip_unreadable=self.layout["skip_unreadable"],
            keeps_keys=bool(recorded_teachers(dataset)) and ROW_KEY in dataset.column_names,
        )


def _check_before_recording(dataset, title, teachers) -> None:
    require_table(dataset, title)
    if len(dataset) == 0:
        raise ValueError(f"The {title} is empty. Pass at least one row.")
    for key in () if read_records(dataset) else (ROW_KEY, FILE_KEY):
        if key in dataset.column_names:
            raise ValueError(f'The column "{key}" would be overwritten by the keys of the images. Rename it.')
    check_keys(dataset)
    if LABEL in dataset.column_names:
        check_labels(dataset, unlabelled=True)
        names = class_names(dataset)
    else:
        names = teachers[0].class_names
    for teacher in teachers:
        teacher.match_classes(names)


def _look_at_images(dataset, title) -> tuple[PIL.Image.Image, list[int | None]]:
    """The first readable one of up to 64 images from all over the dataset, and the key of each, `None` if unreadable."""
    rows, first, keys, problem = ImageRows(dataset), None, [], None
    for row in spread(range(len(dataset)), 64):
        try:
            image = rows[row][IMAGE]
        except ValueError as error:
            problem = problem or error
            keys.append(None)
        else:
            first = first or image
            keys.append(row_key(image))
    if first is None:
        raise ValueError(
            f"None of {len(keys)} sampled images of the {title} can be decoded, so there is nothing to record. {problem}"
        ) from problem
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
        encoding.feature(len(teacher.class_names), None)
    old, old_views = _recorded_so_far(dataset, views) if recorded_teachers(dataset) else ({}, None)
    for name in [name for name in described if name in old]:
        differences = teacher_differences(described[name], old[name])
        if differences:
            raise ValueError(
                f'The dataset already has a column "{column_name(name)}" of another teacher ({", ".join(differences)} '
                "differ). Rename the teacher, or remove the column."
            )
        if keeps_recorded:
            del described[name]
        elif views is None:
            raise ValueError(f'The dataset already has the column "{column_name(name)}". Leave this teacher out.')
        elif views.num_views <= old_views.num_views:
            raise ValueError(
                f'The dataset already has the column "{column_name(name)}" with {old_views.num_views} views. Leave this '
                "teacher out, or record more views."
            )
    left_behind = [name for name in old if name not in described]
    # They differ in the number of views alone.
    if left_behind and views != old_views:
        raise ValueError(
            f"num_views={views.num_views}, but {left_behind} have {old_views.num_views} views in this table. Record "
            f"{old_views.num_views}, or pass these teachers as well, so that they get {views.num_views}."
        )
    num_views = None if views is None else views.num_views
    teachers = [teacher for teacher in teachers if teacher.name in described]
    columns = {column_name(t.name): encoding.feature(len(t.class_names), num_views) for t in teachers}
    keys = dict.fromkeys((ROW_KEY, FILE_KEY), Value("int64"))
    kept = {name: feature for name, feature in dataset.features.items() if name not in {*keys, *columns}}
    return _Plan(
        teachers=teachers,
        first_view={name: old_views.num_views if name in old else 0 for name in described},
        views=views,
        encoding=encoding,
        record=build_record(list({**old, **described}.values()), _describe_dataset(dataset, sample_keys), views),
        layout=layout,
        features=Features({**kept, **keys, **columns}),
    )


def _recorded_so_far(dataset, views) -> tuple[dict[str, dict], ViewRecipe | None]:
    """The teachers whose logits the dataset holds already, and their views."""
    check_files(dataset)
    check_complete(dataset)
    record = only_record(dataset)
    old_views = None if record["views"] is None else ViewRecipe(**record["views"])
    if (views is None) != (old_views is None) or (views is not None and not views.same_views(old_views)):
        raise ValueError(
            f"The dataset holds logits of other views: {old_views} instead of {views}. Use its recipe (stored_views), "
            "or remove the columns to start over."
        )
    recorded = recorded_teachers(dataset)
    return {teacher["name"]: teacher for teacher in record["teachers"] if teacher["name"] in recorded}, old_views


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
            lacking = sorted({*plan.features} - {*table.column_names})
            logger.warning(
                "%s already holds this recording; nothing to do.%s",
                folder,
                f" Its table has no columns {lacking}; add them to what is returned." if lacking else "",
            )
            return table
        if accelerator.is_main_process:
            _adopt_old_shards(dataset, plan, folder)
        accelerator.wait_for_everyone()
        shards = [shard_path(folder, start) for start in range(0, len(dataset), plan.rows_per_shard)]
        with accelerator.split_between_processes(shards) as own:
            whole = {path: note for path in own if (note := read_note(path))}
            for path, note in whole.items():
                rows, keys = shard_keys(path, note)
                check_images(dataset, rows, keys)
        if accelerator.is_main_process and recorded_teachers(dataset):
            check_images(dataset, range(len(dataset)))
        # No process writes before every process has listed the finished shards.
        whole = {*gather_object(list(whole))}
        with accelerator.split_between_processes([path for path in shards if path not in whole]) as own:
            _record_shards(accelerator, dataset, plan, own, num_workers)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            finish(folder, dataset.info.copy(), dataset.split, plan.record, shards)
        accelerator.wait_for_everyone()
        return open_saved(folder)


def _check_finished(dataset, table) -> None:
    rows = np.setdiff1d(np.arange(len(dataset)), only_record(table).get("skipped_rows", []))
    # An earlier version did not write which rows it left out.
    if len(rows) == len(table):
        keys = table.select_columns([name for name in (ROW_KEY, FILE_KEY) if name in table.column_names])
        check_images(dataset, rows.tolist(), keys[:])


def _adopt_old_shards(dataset, plan, folder) -> None:
    """Add images to the shards of a recording that an earlier version began, which hold logits alone."""
    for path, numbers, logits in old_shards(folder):
        first, last = int(path.stem.partition("-")[0]), int(path.stem.rpartition("-")[2])
        rows = dataset.with_format("arrow")[numbers]
        columns = {name: rows[name] for name in rows.column_names} | {
            name: logits[name] for name in logits.column_names
        }
        # The first version had no file keys.
        columns = {name: columns.get(name, pa.nulls(len(rows), pa.int64())) for name in plan.features}
        table = embed_table_storage(pa.table(columns).cast(plan.features.arrow_schema), remote_files=False)
        note = {"rows": [first, last], "skipped": sorted({*range(first, last)} - {*numbers})}
        write_shard(shard_path(folder, first), plan.features, [table], note)


def _record_shards(accelerator, dataset, plan, paths, num_workers) -> None:
    if not paths:
        return
    size = plan.rows_per_batch
    rows = {path: first_row(path) for path in paths}
    rows = {path: range(start, min(start + plan.rows_per_shard, len(dataset))) for path, start in rows.items()}
    if num_workers is None:
        num_workers = default_num_workers(use_cpu=accelerator.device.type == "cpu")
    batches = torch.utils.data.DataLoader(
        _EncodedRows(dataset),
        batch_sampler=[part[start : start + size] for part in rows.values() for start in range(0, len(part), size)],
        collate_fn=plan.preparation(dataset),
        num_workers=num_workers,
        pin_memory=torch.accelerator.is_available(),
    )
    batches = iter(batches)
    with _progress(accelerator, sum(map(len, rows.values()))) as bar:
        for path, part in rows.items():
            _write(accelerator, plan, path, islice(batches, -(-len(part) // size)), bar, part.start)


def _progress(accelerator, total):
    return tqdm(total=total, unit="image", desc="Recording logits", disable=not accelerator.is_local_main_process)


def _write(accelerator, plan, path, batches, bar, start) -> None:
    """Run the teachers on the batches of a shard, and write it."""
    note = {"rows": [start, start], "skipped": []}

    def tables():
        for batch in batches:
            note["rows"][1] += batch.size
            note["skipped"] += batch.skipped
            if batch.numbers:
                yield _run(plan, batch, send_to_device(batch.inputs, accelerator.device))
            bar.update(batch.size)

    write_shard(path, plan.features, tables(), note)


@dataclass
class _Batch:
    """Rows whose images go through the teachers together."""

    size: int  # with rows that cannot be read
    numbers: list[int]
    rows: pa.Table  # of these numbers, with their keys
    skipped: list[int]
    inputs: dict[str, torch.Tensor]  # teacher → pixel values, in which the views of a row follow one another


class _EncodedRows(torch.utils.data.Dataset):
    """(row numbers, rows as an Arrow table), with encoded images."""

    def __init__(self, dataset):
        self.table = dataset.with_format("arrow")

    def __getitems__(self, indices: range):
        # A slice is one read; a list is one for each row.
        return indices, self.table[indices.start : indices.stop]


@dataclass
class _Preparation:
    """Encoded rows → a batch with their keys and their images, decoded, in views and preprocessed for each teacher."""

    processors: dict[str, BaseImageProcessor]
    recipe: ViewRecipe | None
    views: range | None
    mode: str | None
    skip_unreadable: bool
    keeps_keys: bool  # views that were recorded before follow from the key that was recorded with them

    def __call__(self, rows: tuple[Sequence[int], pa.Table]) -> _Batch:
        numbers, table = rows
        cells = table[IMAGE].to_pylist()
        known = table[ROW_KEY].to_pylist() if self.keeps_keys else [None] * len(cells)
        readable, row_keys, file_keys, skipped = [], [], [], []

        def images():
            for position, (cell, key) in enumerate(zip(cells, known)):
                try:
                    image = decode_image(cell, self.mode)
                    file_keys.append(file_key(cell))
                except ValueError as error:
                    if not self.skip_unreadable:
                        raise ValueError(f"Row {numbers[position]}: {error}") from error
                    skipped.append(numbers[position])
                    continue
                readable.append(position)
                row_keys.append(row_key(image) if key is None else key)
                if self.recipe is None:
                    yield image
                else:
                    yield from (make_view(image, self.recipe, row_keys[-1], view) for view in self.views)

        inputs = pixel_values(images(), self.processors)
        if skipped:
            # Not `take`: pyarrow takes wrong rows of logits of views.
            table = pa.concat_tables([table.slice(0, 0), *(table.slice(row, 1) for row in readable)])
        for name, keys in ((ROW_KEY, row_keys), (FILE_KEY, file_keys)):
            column = pa.array(keys, pa.int64())
            position = table.schema.get_field_index(name)
            table = table.append_column(name, column) if position < 0 else table.set_column(position, name, column)
        return _Batch(len(cells), [numbers[position] for position in readable], table, skipped, inputs)


def _logits_that_fit(teacher, pixel_values) -> torch.Tensor:
    """The logits of the teacher. A batch that does not fit into the memory of the device is halved until it does."""
    try:
        return teacher.logits(pixel_values)
    except torch.OutOfMemoryError:
        if len(pixel_values) == 1:
            raise
    return torch.cat([_logits_that_fit(teacher, half) for half in pixel_values.tensor_split(2)])


def _run(plan, batch, inputs) -> pa.Table:
    """Run the teachers on a batch, and encode their logits behind the views that the dataset has of them."""
    numbers = batch.numbers
    columns = {name: batch.rows[name] for name in batch.rows.column_names if name in plan.features}
    with torch.inference_mode():
        logits = {t.name: _logits_that_fit(t, inputs[t.name]).cpu().numpy() for t in plan.teachers}
    for name, values in logits.items():
        column, first = column_name(name), plan.first_view[name]
        if plan.views is not None:
            values = values.reshape(len(numbers), len(plan.new_views), -1)[:, first - plan.new_views.start :]
        try:
            encoded = plan.encoding.encode(values, views=plan.views is not None)
        except NonFiniteLogitsError as error:
            rows = [numbers[row] for row in error.rows]
            raise ValueError(
                f'The teacher "{name}" predicts NaN or infinite logits for row {rows[0]} '
                f"({len(rows)} of its batch, rows {rows[:10]}). Check the teacher and these images."
            ) from error
        largest = np.abs(values).reshape(len(numbers), -1).max(axis=1)
        if largest.max() > LARGEST and name not in plan.warned:
            plan.warned.add(name)
            logger.warning(
                'The teacher "%s" predicts logits of up to %.3g for row %d. It is unstable on such images; trained longer, on '
                "more images or on the recorded views, it may not be. They are stored as differences, which leaves the "
                "probabilities as they are. Further rows are not reported.",
                name,
                largest.max(),
                numbers[largest.argmax()],
            )
        columns[column] = concatenate_views(columns[column], encoded) if first > 0 else encoded
    table = pa.table({name: columns[name] for name in plan.features}).cast(plan.features.arrow_schema)
    return embed_table_storage(table, remote_files=False)
