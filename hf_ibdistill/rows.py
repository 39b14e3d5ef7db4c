"""Table → rows → batch: decoded images or their views, with labels and stored logits, from a mapped or a streamed table."""

import contextlib
import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from operator import itemgetter

import numpy as np
import PIL.Image
import pyarrow as pa
import torch
from datasets import Dataset, Image, IterableDataset
from datasets.distributed import split_dataset_by_node
from transformers import BaseImageProcessor

from .data.classes import check_streamed_labels
from .data.columns import IMAGE, LABEL
from .images.cache import ImageCache, build_cache
from .images.decoding import decode_image
from .images.preprocessing import pixel_values, processor_settings
from .images.views import ViewRecipe, make_views, row_key
from .logits.encoding import ROW_KEY, StoredLogits, column_name, decode, describe_column


# The step of a stream that `IterableDataset.shuffle` adds.
SHUFFLE_BUFFER = "BufferShuffledExamplesIterable"


class _RowDecoder:
    """The common part of [`ImageRows`] and [`StreamedImageRows`]."""

    def __init__(
        self,
        table: Dataset | IterableDataset,
        columns: Sequence[str] = (),
        logits_columns: Sequence[str] = (),
        num_classes: int | None = None,
        views: ViewRecipe | None = None,
        temperatures: Sequence[float] | None = None,
        views_per_image: int = 1,
    ):
        self.table = table
        self.columns, self.logits_columns = list(columns), list(logits_columns)
        self.num_classes, self.views, self.views_per_image = num_classes, views, views_per_image
        if views_per_image > (1 if views is None else views.num_views):
            problem = (
                "there are no views. Leave it out, or train on views: views=ViewRecipe(…), on the command line --num_views."
                if views is None
                else f"there are {views.num_views} views of an image. Choose at most that many, or make more views."
            )
            raise ValueError(f"views_per_image={views_per_image}, but {problem}")
        self.temperatures = dict(zip(self.logits_columns, temperatures or [1.0] * len(self.logits_columns)))
        stored_key = [ROW_KEY] if views is not None and ROW_KEY in table.column_names else []
        # Those of a table are read apart.
        logits = self.logits_columns if isinstance(table, IterableDataset) else []
        wanted = dict.fromkeys([IMAGE, *self.columns, *stored_key, *logits])
        self._has_views = {
            column: describe_column(table.features[column])[1] is not None for column in self.logits_columns
        }
        encoded = table.select_columns(list(wanted))
        if isinstance(table, IterableDataset) and table.features[IMAGE].decode:
            encoded = encoded.cast_column(IMAGE, Image(decode=False))
        self._cache: ImageCache | None = None
        # Rows of a table come encoded in this format.
        if isinstance(encoded, IterableDataset):
            encoded = encoded.with_format("arrow")
        else:
            # `with_format` would copy the description of every file.
            encoded.set_format("arrow")
        self._encoded = encoded
        self._mode = table.features[IMAGE].mode
        # Shared memory: persistent workers hold a copy of this object, made before the first epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    # Not `set_epoch`, which data loaders of Accelerate call with counts of their own, or not at all.
    def start_epoch(self, epoch: int) -> None:
        """Switch to the views of this epoch."""
        self._epoch.fill_(epoch)

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def views_of_pass(self, number: int) -> list[int | None]:
        """The views of each image that this pass over the images uses."""
        if self.views is None:
            return [None]
        first = number * self.views_per_image
        return [(first + offset) % self.views.num_views for offset in range(self.views_per_image)]

    def _decode_logits(
        self,
        read: Callable[..., np.ndarray],
        column: str,
        source,
        numbers: Sequence[int],
        view: int | Sequence[int] | None,
    ) -> np.ndarray:
        view = np.asarray(view) if self._has_views[column] and self.views is not None else None
        logits = read(source, self.num_classes, view, self.temperatures[column])
        # Before training, only a sample is checked.
        bad = np.flatnonzero(~np.isfinite(logits).all(axis=1))
        if len(bad):
            raise ValueError(
                f'Row {numbers[bad[0]]}: the column "{column}" has missing, NaN or infinite logits, or those of a class that '
                "does not exist. Record this row again, or remove it."
            )
        return logits

    def _decode(self, rows: Iterable[dict], numbers: Iterable[int], views: Iterable[int | None]) -> Iterator[dict]:
        """One image at a time, so that a caller decides how many decoded images are held. Views of one image that follow
        one another are made together."""
        for number, same in itertools.groupby(zip(numbers, rows, views), key=itemgetter(0)):
            same = list(same)
            image, key = self._read_image(number, same[0][1])
            if self.views is None:
                images = [PIL.Image.fromarray(image) if isinstance(image, np.ndarray) else image] * len(same)
            else:
                images = make_views([image] * len(same), self.views, [key] * len(same), [view for _, _, view in same])
            # Otherwise it would be held while the next is decoded.
            del image
            for _, row, _ in same:
                row = {**row, IMAGE: images.pop(0)}
                if self.views is not None:
                    row.pop(ROW_KEY, None)
                yield row

    def _read_image(self, number: int, row: dict) -> tuple[PIL.Image.Image | np.ndarray, int]:
        """The image of a row, or its pixels if they are kept, and, for views, its key."""
        if self._cache is not None and (kept := self._cache.get(number)) is not None:
            return kept
        try:
            image = decode_image(row[IMAGE], self._mode)
        except ValueError as error:
            raise ValueError(f"Row {number}: {error}") from error
        key = row.get(ROW_KEY)
        if key is None:
            key = 0 if self.views is None else row_key(image)
        if self._cache is not None:
            self._cache.put(number, np.asarray(image), key)
        return image, key


def _as_rows(table: pa.Table) -> list[dict]:
    return [dict(zip(table.column_names, row)) for row in zip(*(column.to_pylist() for column in table.columns))]


def _with_logits(rows: Iterable[dict], logits: Mapping[str, np.ndarray]) -> Iterator[dict]:
    """The rows with the logits of each column. An array is (rows, …)."""
    if not logits:
        return iter(rows)
    return (row | {name: values[place] for name, values in logits.items()} for place, row in enumerate(rows))


class ImageRows(_RowDecoder, torch.utils.data.Dataset):
    """The rows of a table with their images decoded to RGB, as dicts.

    With a view recipe, the image is a view of it: (3, height, width), uint8. Its number is the epoch modulo the number of
    views, so that training uses them in turn. `start_epoch` sets the epoch, even in data loader workers that already run.
    An index (row, view) asks for another view.

    Args:
        table: a table that passed the door ([`as_image_table`]); its rows keep their numbers.
        columns: other columns to return, as they are.
        logits_columns: columns to decode into arrays of `num_classes` logits, of the same view as the image.
        num_classes: number of classes of the logits columns.
        views: recipe of the views to make; `None` returns the images as they are.
        temperatures: for each logits column, the temperature that it will be used at; top-k columns depend on it.
        views_per_image: views of an image in a batch.
        keeps_images: keep the decoded images in memory if together they need at most 256 MiB, which all data loader workers
            share. Only images as large as the first one are kept.

    Raises:
        ValueError: there are fewer views than `views_per_image`. On reading a row whose image cannot be decoded; the
            message names the row.
    """

    def __init__(self, table: Dataset, *args, keeps_images: bool = False, **kwargs):
        super().__init__(table, *args, **kwargs)
        self._stored_logits = {column: StoredLogits(table, column) for column in self.logits_columns}
        if keeps_images and len(table):
            # Whoever reads the row reports it.
            with contextlib.suppress(ValueError):
                image, _ = self._read_image(0, _as_rows(self._encoded[:1])[0])
                self._cache = build_cache(len(table), *image.size)

    def __len__(self) -> int:
        return len(self._encoded)

    def __getitem__(self, index: int | tuple[int, int]) -> dict:
        return next(self.read([index]))

    def __getitems__(self, indices: Sequence[int] | Sequence[tuple[int, int]]) -> Sequence[dict]:
        return _LazyRows(self, indices)

    def read(self, indices: Iterable[int] | Iterable[tuple[int, int]], with_logits: bool = True) -> Iterator[dict]:
        """The rows of these indices, with one decoded image at a time."""
        pairs = self.with_views(indices)
        numbers, views = zip(*pairs) if pairs else ((), ())
        logits = self.read_logits(pairs) if with_logits else {}
        distinct = {number: place for place, number in enumerate(dict.fromkeys(numbers))}
        rows = _as_rows(self._encoded[list(distinct)])
        return self._decode(_with_logits([rows[distinct[number]] for number in numbers], logits), numbers, views)

    def with_views(self, indices: Iterable[int] | Iterable[tuple[int, int]]) -> list[tuple[int, int | None]]:
        """The indices as (row, view). Those without a view get that of the epoch."""
        current = self.views_of_pass(self.epoch)[0]
        return [index if isinstance(index, tuple) else (index, current) for index in indices]

    def read_logits(self, pairs: Sequence[tuple[int, int | None]]) -> dict[str, np.ndarray]:
        """Column → the logits (N, classes) of N pairs (row, view)."""
        numbers, views = zip(*pairs) if pairs else ((), ())
        return {
            name: self._decode_logits(stored.read, name, numbers, numbers, views)
            for name, stored in self._stored_logits.items()
        }


class SeveralViews(torch.utils.data.Sampler):
    """Indices (row, view) of an epoch with several views of each image, one after another.

    A pass over the images uses the next `views_per_image` views of each. Passes follow one another without a gap. An epoch
    takes as many views from them as there are rows, rounded up to whole images. So each epoch is as long as with one view,
    has fewer images to decode, and is a function of seed and epoch.

    Args:
        rows: what is indexed; it knows the epoch.
        seed: seed of the order of the images in a pass; `None` keeps the order of the rows.
    """

    def __init__(self, rows: ImageRows, seed: int | None):
        self.rows, self.seed = rows, seed

    @property
    def _num_images(self) -> int:
        return -(-len(self.rows) // self.rows.views_per_image)

    def __len__(self) -> int:
        return self._num_images * self.rows.views_per_image

    def __iter__(self) -> Iterator[tuple[int, int]]:
        size, first = len(self.rows), self.rows.epoch * self._num_images
        number = order = None
        for place in range(first, first + self._num_images):
            if place // size != number:
                number = place // size
                random = np.random.default_rng((self.seed or 0, number))
                order = np.arange(size) if self.seed is None else random.permutation(size)
            for view in self.rows.views_of_pass(number):
                yield int(order[place % size]), view


class _LazyRows(Sequence):
    """The rows of a batch. Each is decoded when it is read, because those of photos would not fit into memory together."""

    def __init__(self, rows: ImageRows, indices: Sequence[int]):
        self.rows, self.indices = rows, list(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position):
        chosen = self.indices[position]
        return _LazyRows(self.rows, chosen) if isinstance(position, slice) else self.rows[chosen]

    def __iter__(self) -> Iterator[dict]:
        return self.rows.read(self.indices)


class StreamedImageRows(_RowDecoder, torch.utils.data.IterableDataset):
    """[`ImageRows`] of a streamed table, in its own order or drawn from a buffer. Data loader workers share the rows.

    Args:
        table: a stream that passed the door ([`as_image_table`]).
        buffer_size: rows that are held; the next row is drawn from them at random. 0 keeps the order of the stream.
        seed: seed of the draws, with the epoch.
        labelled_only: skip rows without a label, which is null or −1.
        views_per_image: views of an image that follow one another. A pass over the stream is as many times as long.
        args, kwargs: as for [`ImageRows`].

    Raises:
        ValueError: `datasets` would take wrong rows out of a shuffled stream. On reading, if an image cannot be decoded,
            logits are not finite, a label is no class, or no row has a label; the message counts rows from the first that
            this worker was given. A row decodes its image when that is read.
    """

    def __init__(
        self,
        table: IterableDataset,
        *args,
        buffer_size: int = 0,
        seed: int = 0,
        labelled_only: bool = False,
        **kwargs,
    ):
        super().__init__(table, *args, **kwargs)
        self.buffer_size, self.seed, self.labelled_only = buffer_size, seed, labelled_only
        if any(self._has_views.values()) and _may_take_rows(table) and not _takes_the_right_rows():
            raise ValueError(
                f"The stream is shuffled or filtered. pyarrow {pa.__version__} then takes wrong rows of logits of views, "
                "without an error. Leave out shuffle and filter; shuffle_buffer_size of the training arguments shuffles a "
                "stream."
            )

    def start_epoch(self, epoch: int) -> None:
        super().start_epoch(epoch)
        self._encoded.set_epoch(epoch)

    def __iter__(self):
        views = self.views_of_pass(self.epoch)
        for number, row in self._shuffle(self._read(views)):
            images = _LazyImages(self, row, number, views)
            shown = {name: value for name, value in row.items() if self.views is None or name != ROW_KEY}
            for place in range(len(views)):
                logits = {name: row[name][place] for name in self.logits_columns}
                yield _LazyRow(shown | logits, images, place)

    def _read(self, views: Sequence[int | None]) -> Iterator[tuple[int, dict]]:
        """(number, row with an encoded image and the logits of these views), in the order of the stream."""
        worker = torch.utils.data.get_worker_info()
        table = self._encoded
        if worker is not None:
            table = split_dataset_by_node(table, rank=worker.id, world_size=worker.num_workers)
        first = count = 0
        for batch in table.iter(batch_size=64):
            numbers = range(first, first + len(batch))
            # (rows, views, classes)
            logits = {
                name: np.stack([self._decode_logits(decode, name, batch[name], numbers, view) for view in views], 1)
                for name in self.logits_columns
            }
            if self.num_classes is not None and LABEL in batch.column_names:
                check_streamed_labels(batch[LABEL].to_pylist(), self.num_classes, first)
            rows = _with_logits(_as_rows(batch.drop_columns(self.logits_columns)), logits)
            for number, row in zip(numbers, rows):
                if self.labelled_only and row.get(LABEL) in (None, -1):
                    continue
                count += 1
                yield number, row
            first += len(batch)
        # Another worker may have rows with a label.
        if worker is None and first > count == 0:
            raise ValueError(f"None of {first} rows of the stream has a label. Add labelled images of every class.")

    def _shuffle(self, rows: Iterator) -> Iterator:
        random, held = np.random.default_rng((self.seed, self.epoch)), []
        for row in rows:
            if len(held) < self.buffer_size:
                held.append(row)
            elif held:
                drawn = random.integers(len(held))
                yield held[drawn]
                held[drawn] = row
            else:
                yield row
        random.shuffle(held)
        yield from held


class _LazyImages:
    """A row of a stream in several views. They are made when the first is asked for, and each is given away once."""

    def __init__(self, rows: StreamedImageRows, row: dict, number: int, views: Sequence[int | None]):
        self.rows, self.row, self.number, self.views, self.made = rows, row, number, views, {}

    def take(self, place: int) -> PIL.Image.Image | torch.Tensor:
        if place not in self.made:
            views = self.views[place:]
            decoded = self.rows._decode([self.row] * len(views), [self.number] * len(views), views)
            self.made = {place + i: row[IMAGE] for i, row in enumerate(decoded)}
        return self.made.pop(place)


class _LazyRow(Mapping):
    """A row of a stream whose image is decoded when it is read. A data loader collects the rows of a batch, and decoded photos
    would not fit into memory together."""

    def __init__(self, row: dict, images: _LazyImages, place: int):
        self.row, self.images, self.place = row, images, place

    def __getitem__(self, name):
        return self.images.take(self.place) if name == IMAGE else self.row[name]

    def __iter__(self):
        return iter(self.row)

    def __len__(self):
        return len(self.row)

    # Another process gets the decoded row.
    def __reduce__(self):
        return dict, (dict(self),)


def stream_steps(stream: IterableDataset) -> set[str] | None:
    """The names of the steps that rows of a stream pass, as `datasets` names them; `None` if it does not show them."""
    step = getattr(stream, "_ex_iterable", None)
    if step is None:
        return None
    steps = set()
    while step is not None:
        steps.add(type(step).__name__)
        step = getattr(step, "ex_iterable", None)
    return steps


def _may_take_rows(stream) -> bool:
    """Whether a shuffle buffer or a filter takes rows out of the Arrow tables of the stream."""
    steps = stream_steps(stream)
    return steps is None or bool(steps & {SHUFFLE_BUFFER, "FilteredExamplesIterable"})


@lru_cache
def _takes_the_right_rows() -> bool:
    """Whether this pyarrow takes the right rows of a slice of nested lists, such as logits of views. No version from 17 to
    26 does."""
    nested = pa.array(range(12))
    for length in (2, 2):
        nested = pa.FixedSizeListArray.from_arrays(nested, length)
    rows = nested.slice(1)
    return rows.take(pa.array([1, 0])).to_pylist() == [rows[1].as_py(), rows[0].as_py()]


class DistillationCollator:
    """Rows → batch: preprocess the images, stack labels and teacher logits.

    Args:
        image_processor: prepares the student's images.
        teacher_names: stack the logits of these teachers, in this order, if the rows have them.
        teacher_image_processors: name → image processor of each online teacher.

    A batch has `pixel_values` (N, channels, H, W); `labels` (N,), −100 for a row without a label; `teacher_logits`
    (N, T, C) in the stored type, if the rows have the column of every teacher; and `teacher_pixel_values`, name → (N, channels, H, W), for online teachers.
    """

    def __init__(
        self,
        image_processor: BaseImageProcessor,
        teacher_names: Sequence[str] = (),
        teacher_image_processors: Mapping[str, BaseImageProcessor] | None = None,
    ):
        self.image_processor = image_processor
        self.logits_columns = [column_name(name) for name in teacher_names]
        self.teacher_image_processors = dict(teacher_image_processors or {})

    def __call__(self, rows: Sequence[dict]) -> dict:
        # No teacher has the name "": names are identifiers.
        tensors, labels, others = _preprocess(rows, {"": self.image_processor, **self.teacher_image_processors})
        batch = {"pixel_values": tensors.pop(""), "labels": labels}
        if self.logits_columns and all(column in others[0] for column in self.logits_columns):
            # Not float32 yet: half the bytes are half the way to the device.
            logits = np.concatenate([row[column] for row in others for column in self.logits_columns])
            logits = logits.reshape(len(others), len(self.logits_columns), -1)
            batch["teacher_logits"] = torch.from_numpy(logits)
        if tensors:
            batch["teacher_pixel_values"] = tensors
        return batch


def _preprocess(rows: Iterable[dict], processors: Mapping) -> tuple[dict, torch.Tensor, list[dict]]:
    """The pixel values of each image processor, the labels (N,), and the rows without their images, which are read as they
    are needed."""
    others = []

    def images():
        for row in rows:
            others.append({name: row[name] for name in row if name != IMAGE})
            yield row[IMAGE]

    tensors = pixel_values(images(), processors)
    labels = [row.get(LABEL) for row in others]
    return tensors, torch.tensor([-100 if label in (None, -1) else int(label) for label in labels]), others


class SharedCollator:
    """Rows → one batch for several students. An image is decoded once, and preprocessed once for each different image
    processor; logits are read once for each different choice of columns and temperatures.

    Args:
        rows: for each student, the [`ImageRows`] that it would read alone. They differ in their logits alone.
        image_processors: for each student.

    A batch has `labels` (N,), and `pixel_values` and `teacher_logits`, number of a student → tensor, each different one
    once. [`batch_of`] makes the batch of one student of it.
    """

    def __init__(self, rows: Sequence[ImageRows], image_processors: Sequence[BaseImageProcessor]):
        self.rows, self.image_processors = list(rows), list(image_processors)
        # For each student, the first that takes the same.
        self._pixels_of = _first_equal([processor_settings(processor) for processor in image_processors])
        self._logits_of = _first_equal([list(one.temperatures.items()) for one in rows])

    def __call__(self, rows: _LazyRows) -> dict:
        # Views of the epoch of these rows, because those of a student that has ended stay where they are.
        pairs = rows.rows.with_views(rows.indices)
        processors = {place: self.image_processors[place] for place in set(self._pixels_of)}
        tensors, labels, _ = _preprocess(rows.rows.read(pairs, with_logits=False), processors)
        logits = {place: self.rows[place].read_logits(pairs) for place in set(self._logits_of)}
        stacked = {place: torch.from_numpy(np.stack([*one.values()], 1)) for place, one in logits.items() if one}
        return {"pixel_values": tensors, "labels": labels, "teacher_logits": stacked}

    def batch_of(self, student: int, shared: dict) -> dict:
        """The batch of this student, as [`DistillationCollator`] makes it."""
        batch = {"pixel_values": shared["pixel_values"][self._pixels_of[student]], "labels": shared["labels"]}
        logits = shared["teacher_logits"].get(self._logits_of[student])
        return batch if logits is None else batch | {"teacher_logits": logits}


def _first_equal(values: Sequence) -> list[int]:
    return [values.index(value) for value in values]


def default_num_workers(use_cpu: bool) -> int:
    """Number of processes that decode images ahead of a model.

    0 on a CPU, because they would compete with the model for it. 0 if starting a process would run the script of the user
    again. Otherwise this process's share of the machine, less one processor for itself, and at most 8.
    """
    start_method = multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    if use_cpu or start_method != "fork":
        return 0
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(8, available // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1))
