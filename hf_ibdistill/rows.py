"""Table → rows → batch: decoded images or their views, with labels and stored logits, from a mapped or a streamed table."""

import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, Image, IterableDataset
from datasets.distributed import split_dataset_by_node
from transformers import BaseImageProcessor

from .data.columns import IMAGE, LABEL
from .images.decoding import decode_image
from .images.preprocessing import pixel_values
from .images.views import ViewRecipe, make_views, row_key
from .logits.encoding import ROW_KEY, StoredLogits, column_name, decode, describe_column


class _RowDecoder:
    """The common part of [`ImageRows`] and [`StreamedImageRows`]."""

    def __init__(
        self,
        table: Dataset | IterableDataset,
        columns: Sequence[str] = (),
        logits_columns: Sequence[str] = (),
        num_classes: int | None = None,
        views: ViewRecipe | None = None,
        skip_unreadable: bool = False,
        temperatures: Sequence[float] | None = None,
    ):
        self.table = table
        self.columns, self.logits_columns = list(columns), list(logits_columns)
        self.num_classes, self.views, self.skip_unreadable = num_classes, views, skip_unreadable
        self.temperatures = dict(zip(self.logits_columns, temperatures or [1.0] * len(self.logits_columns)))
        stored_key = [ROW_KEY] if views is not None and ROW_KEY in table.column_names else []
        wanted = dict.fromkeys([IMAGE, *self.columns, *stored_key, *self.logits_columns])
        self._has_views = {
            column: describe_column(table.features[column])[1] is not None for column in self.logits_columns
        }
        encoded = table.select_columns(list(wanted))
        if table.features[IMAGE].decode:
            encoded = encoded.cast_column(IMAGE, Image(decode=False))
        self._encoded = encoded.with_format("arrow")
        # Shared memory: persistent workers hold a copy of this object, made before the first epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    # Not `set_epoch`, which data loaders of Accelerate call with counts of their own, or not at all.
    def start_epoch(self, epoch: int) -> None:
        """Switch to the views of this epoch."""
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
                row[IMAGE] = decode_image(row[IMAGE])
            except ValueError as error:
                if not self.skip_unreadable:
                    raise ValueError(f"Row {number}: {error}") from error
                row[IMAGE] = None
        if self.views is not None:
            readable = [row for row in rows if row[IMAGE] is not None]
            images = [row[IMAGE] for row in readable]
            keys = [row.pop(ROW_KEY) if ROW_KEY in row else row_key(image) for row, image in zip(readable, images)]
            views = make_views(images, self.views, keys, [self._view] * len(images))
            for row, view in zip(readable, views):
                row[IMAGE] = view
        return rows


class ImageRows(_RowDecoder, torch.utils.data.Dataset):
    """The rows of a table with their images decoded to RGB, as dicts.

    With a view recipe, the image is a view of it: (3, height, width), uint8. Its number is the epoch modulo the number of
    views, so that training uses them in turn. `start_epoch` sets the epoch, even in data loader workers that already run.

    Args:
        table: a table that passed the door ([`as_image_table`]); its rows keep their numbers.
        columns: other columns to return, as they are.
        logits_columns: columns to decode into arrays of `num_classes` logits, of the same view as the image.
        num_classes: number of classes of the logits columns.
        views: recipe of the views to make; `None` returns the images as they are.
        skip_unreadable: return `None` for an image that cannot be decoded, instead of raising.
        temperatures: for each logits column, the temperature that it will be used at; top-k columns depend on it.

    Raises:
        ValueError: on reading a row whose image cannot be decoded; the message names the row.
    """

    def __init__(self, table: Dataset, *args, **kwargs):
        super().__init__(table, *args, **kwargs)
        self._stored_logits = {column: StoredLogits(table, column) for column in self.logits_columns}
        self._encoded = self._encoded.remove_columns(self.logits_columns)

    def __len__(self) -> int:
        return len(self._encoded)

    def __getitem__(self, index: int) -> dict:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict]:
        indices = list(indices)
        logits = {
            name: self._decode_logits(stored.read, name, indices) for name, stored in self._stored_logits.items()
        }
        return self._decode(self._encoded[indices], indices, logits)


class StreamedImageRows(_RowDecoder, torch.utils.data.IterableDataset):
    """[`ImageRows`] of a streamed table, whose rows come in its own order. Data loader workers share the rows.

    Raises:
        ValueError: on reading a row whose image cannot be decoded or whose logits are not finite. The message counts rows
            from the first that this worker was given.
    """

    def start_epoch(self, epoch: int) -> None:
        super().start_epoch(epoch)
        self._encoded.set_epoch(epoch)

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        table = self._encoded
        if worker is not None:
            table = split_dataset_by_node(table, rank=worker.id, world_size=worker.num_workers)
        first = 0
        for batch in table.iter(batch_size=64):
            logits = {name: self._decode_logits(decode, name, batch[name]) for name in self.logits_columns}
            rows = self._decode(batch, range(first, first + len(batch)), logits)
            for number, row in enumerate(rows, first):
                for name in self.logits_columns:
                    # A stream cannot be checked before it is trained on.
                    if not np.isfinite(row[name]).all():
                        raise ValueError(f'Row {number}: the column "{name}" has NaN or infinite logits.')
                yield row
            first += len(batch)


class DistillationCollator:
    """Rows → batch: preprocess the images, stack labels and teacher logits.

    Args:
        image_processor: prepares the student's images.
        teacher_names: stack the logits of these teachers, in this order, if the rows have them.
        teacher_image_processors: name → image processor of each online teacher.

    A batch has `pixel_values` (N, channels, H, W); `labels` (N,); `teacher_logits` (N, T, C) in the stored type, if the
    rows have the column of every teacher; and `teacher_pixel_values`, name → (N, channels, H, W), for online teachers.
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
        images = [row[IMAGE] for row in rows]
        # No teacher has the name "": names are identifiers.
        tensors = pixel_values(images, {"": self.image_processor, **self.teacher_image_processors})
        batch = {
            "pixel_values": tensors.pop(""),
            "labels": torch.tensor([int(row[LABEL]) for row in rows]),
        }
        if self.logits_columns and all(column in rows[0] for column in self.logits_columns):
            # Not float32 yet: half the bytes are half the way to the device.
            logits = np.concatenate([row[column] for row in rows for column in self.logits_columns])
            logits = logits.reshape(len(rows), len(self.logits_columns), -1)
            batch["teacher_logits"] = torch.from_numpy(logits)
        if tensors:
            batch["teacher_pixel_values"] = tensors
        return batch


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
