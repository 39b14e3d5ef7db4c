"""Rows of a table → decoded images → pixel values. Recording and training read images only through here."""

import io
import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
import pyarrow as pa
import torch
from datasets import Dataset, Image, IterableDataset
from datasets.distributed import split_dataset_by_node
from transformers import BaseImageProcessor, ViTImageProcessor
from transformers.image_processing_backends import TorchvisionBackend

from .logits.encoding import ROW_KEY, StoredLogits, decode, describe_column
from .logits.views import ViewRecipe, make_views, row_key


_GROUPED_SIDE = 64


def decode_image(value: dict) -> PIL.Image.Image:
    """Decode an undecoded `datasets.Image` value into an 8-bit RGB image; greyscale, palette and RGBA are converted.

    Raises:
        ValueError: there is no image, or it cannot be decoded.
    """
    path = value and value.get("path")
    try:
        if value is None or (value.get("bytes") is None and path is None):
            raise ValueError("the row has no image")
        content = value["bytes"] if value.get("bytes") is not None else Path(path).read_bytes()
        with PIL.Image.open(io.BytesIO(content)) as opened:
            # Cameras store how they were held instead of turning the pixels.
            PIL.ImageOps.exif_transpose(opened, in_place=True)
            image = opened
            if image.mode.startswith("I"):
                # PIL clips 16-bit images to 255 when it converts them, which would turn them white.
                levels = np.asarray(image)
                image = PIL.Image.fromarray((levels // (257 if levels.max() > 255 else 1)).astype(np.uint8))
            return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:  # what a damaged file raises depends on its format: anything
        where = f" ({path})" if path else ""
        raise ValueError(f"The image{where} cannot be decoded: {error}") from error


def default_num_workers(use_cpu: bool) -> int:
    """Processes that decode images ahead of a model: none beside one that runs on the same processors, where they would
    only take its time (measured: 1.1 to 1.5 times slower), nor where starting one runs the user's script again; else up to
    8 of the processors that this process may use."""
    start_method = multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    if use_cpu or start_method != "fork":
        return 0
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(8, available // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1))


class _RowDecoder:
    """What a table's rows are decoded into, for [`ImageRows`] and [`StreamedImageRows`]."""

    def __init__(
        self,
        dataset: Dataset | IterableDataset,
        image_column: str,
        columns: Sequence[str] = (),
        logits_columns: Sequence[str] = (),
        num_classes: int | None = None,
        views: ViewRecipe | None = None,
        skip_unreadable: bool = False,
        temperatures: Sequence[float] | None = None,
    ):
        self.image_column = image_column
        self.columns, self.logits_columns = list(columns), list(logits_columns)
        self.num_classes, self.views, self.skip_unreadable = num_classes, views, skip_unreadable
        self.temperatures = dict(zip(self.logits_columns, temperatures or [1.0] * len(self.logits_columns)))
        stored_key = [ROW_KEY] if views is not None and ROW_KEY in dataset.column_names else []
        wanted = dict.fromkeys([image_column, *self.columns, *stored_key, *self.logits_columns])
        self._has_views = {
            column: describe_column(dataset.features[column])[1] is not None for column in self.logits_columns
        }
        encoded = dataset.select_columns(list(wanted)).cast_column(image_column, Image(decode=False))
        self._table = encoded.with_format("arrow")
        # Shared memory: persistent workers hold a copy of this object, made before the first epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    # Not `set_epoch`, which data loaders of Accelerate call with counts of their own, or not at all.
    def start_epoch(self, epoch: int) -> None:
        """Turn to the views of this epoch."""
        self._epoch.fill_(epoch)

    @property
    def _view(self) -> int | None:
        return None if self.views is None else int(self._epoch) % self.views.num_views

    def _decode_logits(self, read: Callable[..., np.ndarray], column: str, source) -> np.ndarray:
        view = self._view if self._has_views[column] else None
        return read(source, self.num_classes, view, self.temperatures[column])

    def _decode(self, table: pa.Table, numbers: Sequence[int], logits: Mapping[str, np.ndarray]) -> list[dict]:
        values = {name: table[name].to_pylist() for name in table.column_names if name not in logits} | logits
        rows = [dict(zip(values, row)) for row in zip(*values.values())]
        for number, row in zip(numbers, rows):
            try:
                row[self.image_column] = decode_image(row[self.image_column])
            except ValueError as error:
                if not self.skip_unreadable:
                    raise ValueError(f"Row {number}: {error}") from error
                row[self.image_column] = None
        if self.views is not None:
            readable = [row for row in rows if row[self.image_column] is not None]
            images = [row[self.image_column] for row in readable]
            keys = [row.pop(ROW_KEY) if ROW_KEY in row else row_key(image) for row, image in zip(readable, images)]
            views = make_views(images, self.views, keys, [self._view] * len(images))
            for row, view in zip(readable, views):
                row[self.image_column] = view
        return rows


class ImageRows(_RowDecoder, torch.utils.data.Dataset):
    """A table's rows with their images decoded to RGB, as dicts.

    With a view recipe, the image is a view of it (uint8, (3, height, width)): number `epoch` modulo the recipe's number
    of views, so that training walks through them. `start_epoch` says which, also to data loader workers that are already
    running.

    Args:
        dataset: the table; its rows keep their numbers.
        image_column: the column to decode.
        columns: other columns to return, as they are.
        logits_columns: columns to decode into arrays of `num_classes` logits, of the same view as the image.
        num_classes: classes of the logits columns.
        views: recipe of the views to make; `None` returns the images as they are.
        skip_unreadable: give a row whose image cannot be decoded the image `None` instead of raising.
        temperatures: for each logits column, the temperature that it will be used at; top-k columns depend on it.

    Raises:
        ValueError: on reading a row whose image cannot be decoded; the message names the row.
    """

    def __init__(self, dataset: Dataset, *args, **kwargs):
        if dataset.format["type"] == "custom":
            raise ValueError(
                "The data set has a transform of its own. Remove it (dataset.reset_format()): images are decoded and "
                "preprocessed here, so that teachers and student see the same ones."
            )
        super().__init__(dataset, *args, **kwargs)
        self._stored_logits = {column: StoredLogits(dataset, column) for column in self.logits_columns}
        self._table = self._table.remove_columns(self.logits_columns)

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> dict:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict]:
        indices = list(indices)
        logits = {
            name: self._decode_logits(stored.read, name, indices) for name, stored in self._stored_logits.items()
        }
        return self._decode(self._table[indices], indices, logits)


class StreamedImageRows(_RowDecoder, torch.utils.data.IterableDataset):
    """[`ImageRows`] of a streamed table, whose rows come in its own order. Data loader workers share the rows.

    Raises:
        ValueError: on reading a row whose image cannot be decoded or whose logits are not finite; the message counts rows
            from the first that this worker was given.
    """

    def start_epoch(self, epoch: int) -> None:
        super().start_epoch(epoch)
        self._table.set_epoch(epoch)

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        table = self._table
        if worker is not None:
            table = split_dataset_by_node(table, rank=worker.id, world_size=worker.num_workers)
        first = 0
        for batch in table.iter(batch_size=64):
            logits = {name: self._decode_logits(decode, name, batch[name]) for name in self.logits_columns}
            rows = self._decode(batch, range(first, first + len(batch)), logits)
            for number, row in enumerate(rows, first):
                for name in self.logits_columns:
                    # A stream cannot be looked through before it is trained on.
                    if not np.isfinite(row[name]).all():
                        raise ValueError(f'Row {number}: the column "{name}" has NaN or infinite logits.')
                yield row
            first += len(batch)


def build_image_processor(
    dataset: Dataset, image_column: str = "image", image_size: int | None = None
) -> ViTImageProcessor:
    """An image processor for a model trained from nothing on these images: resizes them to squares and scales the pixels
    to −1 … 1.

    Args:
        image_size: side in pixels; when not given, that of the first image if it is at most 64, else 224.
    """
    if image_size is None:
        largest = max(ImageRows(dataset, image_column)[0][image_column].size)
        image_size = largest if largest <= 64 else 224
    # Published, it will be given other people's greyscale and transparent images too.
    return ViTImageProcessor(size={"height": image_size, "width": image_size}, do_convert_rgb=True)


def pixel_values(
    images: Sequence[PIL.Image.Image | torch.Tensor], processors: Mapping[str, BaseImageProcessor]
) -> dict[str, torch.Tensor]:
    """The batch (N, channels, H, W) that each image processor makes of the images. Processors of the same class with the
    same settings share one tensor."""
    batches, results = {}, {}
    for name, processor in processors.items():
        # Settings name the class, but two repositories' own code may give it the same name.
        settings = (type(processor), processor.to_json_string()) if len(processors) > 1 else name
        if settings not in batches:
            batches[settings] = _preprocess(processor, images)
        results[name] = batches[settings]
    return results


def _preprocess(processor, images):
    options = {}
    if isinstance(processor, TorchvisionBackend):
        # On a CPU it takes images one by one by default, which is twice as slow for small ones, twice as fast for large.
        largest = max(max(im.size if isinstance(im, PIL.Image.Image) else im.shape[-2:]) for im in images)
        options["disable_grouping"] = None if largest > _GROUPED_SIDE else False
    try:
        return processor(images, return_tensors="pt", **options)["pixel_values"]
    except ValueError as error:
        sizes = {np.shape(image)[-2:] for image in processor(images, **options)["pixel_values"]}
        if len(sizes) < 2:
            raise
        settings = {name: value for name, value in processor.to_dict().items() if "crop" in name or "size" in name}
        raise ValueError(
            f"{type(processor).__name__} makes images of several sizes, which no batch can hold, with {settings}: give it "
            'a fixed size, for example size={"height": 224, "width": 224}, or a crop, do_center_crop=True and crop_size.'
        ) from error
