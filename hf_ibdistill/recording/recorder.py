"""Run the teachers over a dataset, shard by shard, and write their logits beside its images.

Batches never cross shards. So neither the number of processes nor the place of an interruption decides which rows share
a batch.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property, partial
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from accelerate import Accelerator, InitProcessGroupKwargs, PartialState
from accelerate.utils import gather_object, send_to_device
from datasets import Dataset, DatasetDict, Features, Image, IterableDataset, IterableDatasetDict, Value
from datasets.distributed import split_dataset_by_node
from datasets.features.features import require_storage_embed
from datasets.table import embed_table_storage

from ..checks import check_numbers
from ..data.classes import check_labels, class_names, label_ids
from ..data.columns import IMAGE, LABEL, as_image_table, require_table
from ..data.sources import open_saved
from ..files import in_threads, is_address, output_folder, write_text
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
    joined_feature,
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
from ..mirror import Mirror
from ..processes import once_a_machine
from ..progress import Progress
from ..rows import SHUFFLE_BUFFER, default_num_workers, stream_steps
from ..teachers import ClassMapping, Teacher, TeacherLike, load_teachers, on_device
from .batches import Preparation, sample_images, stream_batches, table_batches
from .shards import (
    check_folder_of_splits,
    finish,
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
    dataset: Dataset | DatasetDict | IterableDataset | IterableDatasetDict,
    teachers: Mapping[str, TeacherLike],
    *,
    output_dir: str | os.PathLike,
    views: ViewRecipe | None = None,
    top_k: int | None = None,
    dtype: str = "float16",
    bf16: bool = False,
    batch_size: int = 64,
    shard_size: int | None = None,
    num_workers: int | None = None,
    skip_unreadable: bool = False,
    with_images: bool | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    trust_remote_code: bool = False,
    teacher_classes: Mapping[str, ClassMapping] | None = None,
) -> Dataset | DatasetDict:
    """Record the logits of each teacher for each image, once, in a column `<name>_logits` (arXiv 2310.00369).

    Every image is decoded once and shown to all teachers, each through its own image processor: as it is, or with `views`
    as V augmented views, which training makes again. Under `accelerate launch` the processes share the shards. Called again
    on the same folder, it continues an interrupted recording or returns the finished one.

    A stream is recorded as it is read, so it may be larger than memory and disk. An interrupted one continues behind the
    last whole shard, without reading again what is before it. Under `accelerate launch` every process reads its own part of
    a stream (`datasets.distributed.split_dataset_by_node`), and the parts follow one another in the table.

    A table that already holds logits takes further teachers, or more views by the same recipe and teachers. Only what is
    new is computed.

    Args:
        dataset: a table or a stream with an image and a `ClassLabel` column, or several splits, all of which are recorded.
            Rows may have no label (null or −1), or the table no label column; the classes then are those of the first
            teacher. Of several splits, only "train" gets views. The others, which measure agreement with the teachers, get none.
        teachers: name → Hub id, folder, model loaded by `from_pretrained`, or (model, image processor). Logits are put into
            the order of the classes of the dataset, by name. A teacher may have further classes, which are dropped.
        output_dir: folder of the finished table, which `datasets.load_from_disk` reads. Or an address that fsspec knows, such
            as `hf://datasets/user/table`, whose repository exists: finished shards are uploaded once a minute, so the
            recording continues on another machine. The table is in the cache folder of `datasets` as well.
        views: which views to record, and how many.
        top_k: store the k largest logits and the log-sum-exp of the rest; `None` stores all.
        dtype: `"float16"` or `"float32"`, the type of the stored logits; or `"packed"`, which stores `top_k` classes (26 if
            not given) that the views of an image share, at eight levels.
        bf16: run the teachers under bf16 autocast: faster on hardware with bf16 units, but rounded to three digits.
        batch_size: images (views) in a batch. On a CPU, the teachers run parts of it.
        shard_size: rows in a shard, rounded up to whole batches: what an interruption can cost. `None` is 4,096, or a 128th
            of a larger table, or a 32nd of the rows that a stream had before. A shard is a file of the finished table.
        num_workers: processes that decode images and make views ahead of the teachers, or threads if the images come from
            a stream. `None` is none on a CPU, and up to 8 on an accelerator.
        skip_unreadable: leave out rows whose image cannot be decoded, and report them, instead of stopping.
        with_images: whether the table holds the images. If not, images in files keep their paths. Other images are left out,
            and [`attach_teacher_logits`] adds the logits to them. `None` is true, unless the images of a table need more
            than 32 GiB.
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
        TypeError: `dataset` is neither a table nor a stream, nor splits of them.
        ValueError: before any teacher runs: teachers and dataset differ in their classes, a column exists already, or the
            folder holds another recording, or one of other images or by other teachers. While recording: an image cannot
            be decoded, or a logit is not finite; the message names the row, and finished shards are kept.
        OSError: the disk is full; finished shards are kept.
    """
    mirror = Mirror(output_dir) if is_address(output_dir) else None
    output_dir = output_folder(output_dir) if mirror is None else mirror.folder
    teachers = load_teachers(teachers, bf16=bf16, trust_remote_code=trust_remote_code, classes=teacher_classes)
    check_teacher_names(teacher.name for teacher in teachers)
    encoding = LogitsEncoding(dtype, top_k)
    layout = {"batch_size": batch_size, "shard_size": shard_size, "skip_unreadable": skip_unreadable}
    check_numbers(1, whole=True, batch_size=batch_size, shard_size=1 if shard_size is None else shard_size)
    check_numbers(0, whole=True, num_workers=num_workers or 0)
    if views is not None and not isinstance(views, ViewRecipe):
        raise TypeError(f"views={views!r} is not a ViewRecipe. Pass ViewRecipe(num_views=…).")
    dataset = as_image_table(dataset, image_column, label_column, needs_label=None)
    splits = dataset if isinstance(dataset, Mapping) else {None: dataset}
    # The first to finish waits for the last, however long that takes.
    accelerator = Accelerator(
        # Without it, processes that torchrun starts on a CPU would not know of each other and all write the same files.
        cpu=not torch.accelerator.is_available(),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=30))],
    )
    titles = {name: f'split "{name}"' if name else "dataset" for name in splits}
    for name, split in splits.items():
        _check_before_recording(split, titles[name], teachers)
    if mirror is not None:
        once_a_machine(mirror.pull)
    if isinstance(dataset, Mapping):
        check_folder_of_splits(output_dir)
    hashes = once_a_machine(lambda: {teacher.name: teacher.weights_sha256() for teacher in teachers})
    plans, samples = {}, {}
    for name, split in splits.items():
        recipe = views if name in (None, "train") else None
        samples[name] = once_a_machine(partial(sample_images, split, titles[name]))
        # If the training split takes more views, the others stay as they are.
        keeps = name != "train" and "train" in splits
        plans[name] = _plan(split, teachers, hashes, recipe, encoding, layout, samples[name], with_images, keeps)
    with ExitStack() as devices:
        for teacher in teachers:
            devices.enter_context(on_device(teacher.model, accelerator.device))
            name = next(iter(splits))
            _try(teacher, samples[name].image, plans[name].views)
        recorded = {
            name: _record_split(accelerator, split, name, plans[name], output_dir / (name or ""), num_workers, mirror)
            for name, split in splits.items()
        }
    if not isinstance(dataset, Mapping):
        return recorded[None]
    # This file makes `datasets.load_from_disk` see the folders as the splits of one dataset.
    index, text = output_dir / "dataset_dict.json", json.dumps({"splits": list(splits)})
    # A finished recording may be in a folder that must not be written to.
    if accelerator.is_main_process and not (index.is_file() and index.read_bytes() == text.encode()):
        write_text(index, text)
    if mirror is not None:
        _share(mirror)
    accelerator.wait_for_everyone()
    return DatasetDict(recorded)


# Larger images stay where they are.
_LARGE = 1 << 35
# Rows of a shard; of a stream, it may also have this part of the rows before it.
_SHARD_ROWS, _GROWTH = 4096, 32


@dataclass
class _Plan:
    """What to record of one split: teachers, views, encoding, batches and shards."""

    teachers: list[Teacher]
    first_view: dict[str, int]  # by teacher: the views before it are in the table already
    views: ViewRecipe | None
    encoding: LogitsEncoding
    record: dict
    layout: dict  # what decides which rows share a batch and a shard, and what is kept of them
    features: Features  # the columns of the table
    grows: bool  # whether later shards are larger, because the number of rows is not known
    warned: set[str] = field(default_factory=set)  # teachers whose large logits were reported

    @cached_property
    def schema(self) -> pa.Schema:
        """That of the columns, with their features. Each call of `datasets` for it writes out all class names."""
        return self.features.arrow_schema

    @property
    def new_views(self) -> range | None:
        return None if self.views is None else range(min(self.first_view.values()), self.views.num_views)

    @property
    def rows_per_batch(self) -> int:
        return max(1, self.layout["batch_size"] // (1 if self.views is None else len(self.new_views)))

    def rows_of_shard(self, first_row: int) -> int:
        """The rows of the shard that begins at this row: whole batches."""
        rows = max(self.layout["shard_size"], first_row // _GROWTH if self.grows else 0)
        return -(-rows // self.rows_per_batch) * self.rows_per_batch

    def preparation(self, dataset) -> Preparation:
        return Preparation(
            processors={teacher.name: teacher.image_processor for teacher in self.teachers},
            recipe=self.views,
            views=self.new_views,
            mode=dataset.features[IMAGE].mode,
            skip_unreadable=self.layout["skip_unreadable"],
            embeds_files=self.layout.get("with_images", True),
            keeps_keys=bool(recorded_teachers(dataset)) and ROW_KEY in dataset.column_names,
        )


def _check_before_recording(dataset, title, teachers) -> None:
    require_table(dataset, title, streams=True)
    is_streamed = isinstance(dataset, IterableDataset)
    if is_streamed and recorded_teachers(dataset):
        raise ValueError(
            f"The {title} is a stream that holds logits already. Open it without streaming to add others."
        )
    if is_streamed and SHUFFLE_BUFFER in (stream_steps(dataset) or ()):
        raise ValueError(
            f"The {title} is a stream that is shuffled, and a recording that is interrupted would lose the rows in its "
            "buffer. Leave out shuffle."
        )
    for key in () if read_records(dataset) else (ROW_KEY, FILE_KEY):
        if key in dataset.column_names:
            raise ValueError(f'The column "{key}" would be overwritten by the keys of the images. Rename it.')
    check_keys(dataset)
    if LABEL in dataset.column_names:
        names = class_names(dataset)
        if not is_streamed:
            # Their number, because the labels would be sent to every process.
            once_a_machine(lambda: len(check_labels(dataset, unlabelled=True)))
    else:
        names = teachers[0].class_names
    for teacher in teachers:
        teacher.match_classes(names)


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


def _plan(dataset, teachers, hashes, views, encoding, layout, sample, with_images, keeps_recorded) -> _Plan:
    described = {teacher.name: teacher.describe(encoding, hashes[teacher.name]) for teacher in teachers}
    for teacher in teachers:
        encoding.feature(len(teacher.class_names), None if views is None else views.num_views)
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
    first_view = {name: old_views.num_views if name in old else 0 for name in described}
    teachers = [teacher for teacher in teachers if teacher.name in described]
    columns = {}
    for teacher in teachers:
        column = column_name(teacher.name)
        num_views = None if views is None else views.num_views - first_view[teacher.name]
        new = encoding.feature(len(teacher.class_names), num_views)
        columns[column] = joined_feature(dataset.features[column], new) if teacher.name in old else new
    keys = dict.fromkeys((ROW_KEY, FILE_KEY), Value("int64"))
    is_streamed = isinstance(dataset, IterableDataset)
    grows = is_streamed and layout["shard_size"] is None
    if layout["shard_size"] is None:
        # Opening a table takes time for each of its files.
        layout = {**layout, "shard_size": _SHARD_ROWS if is_streamed else max(_SHARD_ROWS, -(-len(dataset) // 128))}
    if with_images is None:
        with_images = is_streamed or sample.bytes_per_image * len(dataset) <= _LARGE
        if not with_images:
            logger.warning(
                "The images need about %.0f GiB, so the table %s; with_images=True copies them into it.",
                sample.bytes_per_image * len(dataset) / 2**30,
                "keeps the paths of their files" if sample.in_files else "leaves them out",
            )
    if not with_images:
        layout = {**layout, "with_images": False}
    kept = {name: feature for name, feature in dataset.features.items() if name not in {*keys, *columns}}
    about_dataset = once_a_machine(lambda: _describe_dataset(dataset, sample.keys))
    # A stream holds encoded images; whoever reads the table wants images.
    kept[IMAGE] = Image(mode=kept[IMAGE].mode)
    if not (with_images or sample.in_files):
        del kept[IMAGE]
    return _Plan(
        teachers=teachers,
        first_view=first_view,
        views=views,
        encoding=encoding,
        record=build_record(list({**old, **described}.values()), about_dataset, views),
        layout=layout,
        features=Features({**kept, **keys, **columns}),
        grows=grows,
    )


def _recorded_so_far(dataset, views) -> tuple[dict[str, dict], ViewRecipe | None]:
    """The teachers whose logits the dataset holds already, and their views."""
    once_a_machine(lambda: (check_files(dataset), check_complete(dataset)))
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
    """What distinguishes this dataset from others: its size and its labels, if it is no stream, and a sample of its images."""
    is_streamed = isinstance(dataset, IterableDataset)
    digest = hashlib.sha256(b"" if is_streamed else label_ids(dataset).tobytes())
    for key in sample_keys:
        digest.update(b"" if key is None else key.to_bytes(8, "little", signed=True))
    return {
        "source": dataset.info.dataset_name or dataset.info.builder_name,
        "split": str(dataset.split),
        "num_rows": None if is_streamed else len(dataset),
        "sha256": digest.hexdigest(),
    }


def _share(mirror: Mirror) -> None:
    """Bring the finished files of the first machine to the address, and from there to the others."""
    once_a_machine(lambda: PartialState().is_main_process and mirror.push())
    once_a_machine(mirror.pull)


def _record_split(accelerator, dataset, name, plan, folder, num_workers, mirror) -> Dataset:
    is_streamed = isinstance(dataset, IterableDataset)
    if num_workers is None:
        num_workers = default_num_workers(use_cpu=accelerator.device.type == "cpu")
    layout = {**plan.layout, "num_processes": accelerator.num_processes} if is_streamed else plan.layout
    # One process holds the lock for all processes of this recording.
    with lock_folder(folder) if accelerator.is_main_process else nullcontext():
        with accelerator.main_process_first():
            finished = open_folder(folder, plan.record, layout)
        if finished:
            table = open_saved(folder)
            if accelerator.is_main_process and not is_streamed:
                _check_finished(dataset, table)
            lacking = sorted({*plan.features} - {*table.column_names})
            logger.warning(
                "%s already holds this recording; nothing to do.%s",
                folder,
                f" Its table has no columns {lacking}; add them to what is returned." if lacking else "",
            )
            if mirror is not None:
                _share(mirror)
            return table
        if mirror is not None:
            # An address that must not be written to is found out before time is spent.
            once_a_machine(mirror.push)
        record = _record_stream if is_streamed else _record_table
        uploads = mirror is not None and accelerator.is_local_main_process
        with mirror.uploading() if uploads else nullcontext():
            shards = record(accelerator, dataset, name, plan, folder, num_workers)
        accelerator.wait_for_everyone()
        if mirror is not None:
            once_a_machine(mirror.push)
            once_a_machine(mirror.pull)
        if accelerator.is_main_process:
            finish(folder, dataset.info.copy(), dataset.split, plan.record, shards)
        accelerator.wait_for_everyone()
        if mirror is not None:
            _share(mirror)
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
        table = embed_table_storage(pa.table(columns).cast(plan.schema), remote_files=False)
        note = {"rows": [first, last], "skipped": sorted({*range(first, last)} - {*numbers})}
        write_shard(shard_path(folder, first), plan.features, [table], note)


def _record_table(accelerator, dataset, name, plan, folder, num_workers) -> list[Path]:
    """Record the shards that are missing, divided between the processes. Returns all shards in the order of their rows."""
    if accelerator.is_main_process:
        _adopt_old_shards(dataset, plan, folder)
    accelerator.wait_for_everyone()
    size = plan.rows_of_shard(0)
    parts = [range(start, min(start + size, len(dataset))) for start in range(0, len(dataset), size)]
    shards = {shard_path(folder, rows.start): rows for rows in parts}
    with accelerator.split_between_processes(list(shards)) as own:
        whole = {path: note for path, note in zip(own, in_threads(read_note, own)) if note}
        for path, note in whole.items():
            rows, keys = shard_keys(path, note)
            check_images(dataset, rows, keys)
    if accelerator.is_main_process and recorded_teachers(dataset):
        check_images(dataset, range(len(dataset)))
    # No process writes before every process has listed the finished shards.
    # Their names, because each machine may have a folder of its own.
    whole = {*gather_object([path.name for path in whole])}
    with accelerator.split_between_processes([path for path in shards if path.name not in whole]) as own:
        own = {path: shards[path] for path in own}
    size = plan.rows_per_batch
    batches = table_batches(dataset, plan.preparation(dataset), list(own.values()), size, num_workers) if own else None
    with _progress(accelerator, name, sum(map(len, own.values()))) as progress:
        for path, rows in own.items():
            note = {"rows": [rows.start] * 2}
            _write(accelerator, plan, path, islice(batches, -(-len(rows) // size)), progress, note)
        progress.finish()
    return list(shards)


def _record_stream(accelerator, stream, name, plan, folder, num_workers) -> list[Path]:
    """Record this process's part of the stream, from the last whole shard. Returns the shards of all parts."""
    part = None
    if accelerator.num_processes > 1:
        part = accelerator.process_index
        stream = split_dataset_by_node(stream, rank=part, world_size=accelerator.num_processes)
    shards, row, state = [], 0, None
    while note := read_note(path := shard_path(folder, row, part)):
        shards.append(path)
        row, state = note["rows"][1], note["state"]
    batches = stream_batches(
        stream,
        plan.preparation(stream),
        row,
        state,
        plan.rows_per_batch,
        num_workers,
        len(plan.teachers[0].class_names),
    )
    with _progress(accelerator, name, None) as progress:
        progress.skip(row)
        for first in batches:
            path, note = shard_path(folder, row, part), {"rows": [row, row], "part": part}
            rest = islice(batches, plan.rows_of_shard(row) // plan.rows_per_batch - 1)
            _write(accelerator, plan, path, chain([first], rest), progress, note)
            shards.append(path)
            row = note["rows"][1]
        progress.finish()
    return [folder / name for name in gather_object([path.name for path in shards])]


def _progress(accelerator, split, total):
    name = f"record {split}" if split else "record"
    unit = "images" if accelerator.num_processes == 1 else "images of this process"
    return Progress(name, total, unit, is_shown=accelerator.is_local_main_process)


def _write(accelerator, plan, path, batches, progress, note) -> None:
    """Run the teachers on the batches of a shard, and write it."""
    note["skipped"] = []

    def tables():
        for batch in batches:
            note["rows"][1] += batch.size
            note["skipped"] += batch.skipped
            note["state"] = batch.state
            if batch.numbers:
                yield _run(plan, batch, send_to_device(batch.inputs, accelerator.device))
            progress.update(batch.size)

    write_shard(path, plan.features, tables(), note)


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
        logits = {t.name: _logits_that_fit(t, inputs[t.name]) for t in plan.teachers}
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
        largest = values.abs().flatten(1).amax(1).cpu().numpy()
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
    table = pa.table({name: columns[name] for name in plan.features}).cast(plan.schema)
    return _embed_other_files(table, plan.features) if plan.layout.get("with_images", True) else table


def _embed_other_files(table, features) -> pa.Table:
    """The table with the content of files in its other columns. That of the images is read where they are decoded."""
    names = [name for name, feature in features.items() if name != IMAGE and require_storage_embed(feature)]
    if not names:
        return table
    embedded = embed_table_storage(table.select(names), remote_files=False)
    return pa.table({name: embedded[name] if name in names else table[name] for name in features}, table.schema)
