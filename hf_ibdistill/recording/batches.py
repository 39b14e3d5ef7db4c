"""Rows of a table or a stream → batches of images for the teachers."""

import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath

import PIL.Image
import pyarrow as pa
import torch
from datasets import Dataset, IterableDataset
from transformers import BaseImageProcessor

from ..data.classes import check_streamed_labels
from ..data.columns import IMAGE, LABEL
from ..data.splits import spread
from ..images.decoding import decode_image, file_key, read_file
from ..images.preprocessing import PIXELS, pixel_values
from ..images.views import ViewRecipe, make_views, row_key
from ..logits.encoding import FILE_KEY, ROW_KEY


# Images by which a dataset is recognized.
_SAMPLE = 64


@dataclass
class Sample:
    """What a few images show about a dataset."""

    image: PIL.Image.Image  # the first that can be read
    keys: list[int | None]  # `None` for an image that cannot be read
    bytes_per_image: float
    in_files: bool  # the rows have the paths of files, and not their content


def sample_images(dataset: Dataset | IterableDataset, title: str) -> Sample:
    """Read up to 64 images: from all over a table, or the first ones of a stream.

    Args:
        dataset: a table or stream that passed the door.
        title: its name, for messages.

    Raises:
        ValueError: there are no rows, or none of the images can be decoded.
    """
    rows = dataset.select_columns([IMAGE]).with_format("arrow")
    if isinstance(dataset, IterableDataset):
        part = next(iter(rows.iter(batch_size=_SAMPLE)), None)
        cells = {} if part is None else dict(enumerate(part[IMAGE].to_pylist()))
    else:
        cells = {row: rows[row : row + 1][IMAGE][0].as_py() for row in spread(range(len(dataset)), _SAMPLE)}
    if not cells:
        raise ValueError(f"The {title} is empty. Pass at least one row.")
    # Reading `features` copies all class names.
    mode = dataset.features[IMAGE].mode
    first, keys, sizes, problem = None, [], [], None
    for row, cell in cells.items():
        try:
            content = _with_content(cell)
            image = decode_image(content, mode)
        except ValueError as error:
            problem = problem or ValueError(f"Row {row}: {error}")
            keys.append(None)
        else:
            first = first or image
            keys.append(row_key(image))
            sizes.append(len(content["bytes"]))
    if first is None:
        raise ValueError(
            f"None of {len(keys)} sampled images of the {title} can be decoded, so there is nothing to record. {problem}"
        ) from problem
    in_files = all(cell is not None and cell["bytes"] is None for cell in cells.values())
    return Sample(first, keys, sum(sizes) / len(sizes), in_files)


def _with_content(cell):
    """The cell with the content of its file, as `save_to_disk` would store it."""
    if cell is None or cell["bytes"] is not None or cell["path"] is None:
        return cell
    try:
        return {"bytes": read_file(cell), "path": PurePosixPath(cell["path"]).name}
    except OSError as error:
        raise ValueError(f"The image ({cell['path']}) cannot be read: {error}") from error


@dataclass
class Batch:
    """Rows whose images go through the teachers together."""

    size: int  # with rows that cannot be read
    numbers: list[int]
    rows: pa.Table  # of these numbers, with their keys
    skipped: list[int]
    inputs: dict[str, torch.Tensor]  # teacher → pixel values, in which the views of a row follow one another
    state: dict | None = None  # where a stream continues behind this batch

    # A worker process sends it. Pickle would send all rows of the record batches that these are a slice of.
    def __getstate__(self) -> dict:
        with pa.BufferOutputStream() as file:
            with pa.ipc.new_stream(file, self.rows.schema) as writer:
                writer.write_table(self.rows)
            return {**vars(self), "rows": file.getvalue()}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state, rows=pa.ipc.open_stream(state["rows"]).read_all())

    def pin_memory(self) -> "Batch":
        """Called by data loaders, before the tensors go to an accelerator."""
        self.inputs = {name: tensor.pin_memory() for name, tensor in self.inputs.items()}
        return self


@dataclass
class Preparation:
    """Encoded rows → a batch with their keys and their images, decoded, in views and preprocessed for each teacher."""

    processors: Mapping[str, BaseImageProcessor]
    recipe: ViewRecipe | None
    views: range | None
    mode: str | None
    skip_unreadable: bool
    embeds_files: bool
    keeps_keys: bool  # views that were recorded before follow from the key that was recorded with them

    def __call__(self, rows: tuple[Sequence[int], pa.Table]) -> Batch:
        numbers, table = rows
        cells = table[IMAGE]
        known = table[ROW_KEY].to_pylist() if self.keeps_keys else [None] * len(cells)
        readable, embedded, row_keys, file_keys = [], {}, [], []

        # One decoded image at a time, so that memory does not grow with their size.
        def images():
            for position, (cell, key) in enumerate(zip(cells, known)):
                try:
                    content = _with_content(cell.as_py())
                    image = decode_image(content, self.mode)
                except ValueError as error:
                    if not self.skip_unreadable:
                        raise ValueError(f"Row {numbers[position]}: {error}") from error
                    continue
                readable.append(position)
                if self.embeds_files and not cell["bytes"].is_valid:
                    embedded[position] = content
                file_keys.append(file_key(content))
                row_keys.append(row_key(image) if key is None else key)
                if self.recipe is None:
                    yield image
                else:
                    yield from self._views(image, row_keys[-1])

        inputs = pixel_values(images(), self.processors)
        if len(readable) < len(cells):
            # Not `take`: pyarrow takes wrong rows of logits of views.
            table = pa.concat_tables([table.slice(0, 0), *(table.slice(row, 1) for row in readable)])
        columns = {name: table[name] for name in table.column_names}
        if embedded:
            contents = [embedded.get(row) or cells[row].as_py() for row in readable]
            columns[IMAGE] = pa.array(contents, table.schema.field(IMAGE).type)
        columns |= {ROW_KEY: pa.array(row_keys, pa.int64()), FILE_KEY: pa.array(file_keys, pa.int64())}
        skipped = [numbers[position] for position in sorted({*range(len(cells))} - {*readable})]
        return Batch(len(cells), [numbers[row] for row in readable], pa.table(columns), skipped, inputs)

    def _views(self, image, key) -> Iterator[torch.Tensor]:
        together = max(1, PIXELS // (image.width * image.height))
        for start in range(0, len(self.views), together):
            views = self.views[start : start + together]
            yield from make_views([image] * len(views), self.recipe, [key] * len(views), views)


class EncodedRows(torch.utils.data.Dataset):
    """(row numbers, rows as an Arrow table), with encoded images."""

    def __init__(self, dataset: Dataset):
        self.table = dataset.with_format("arrow")

    def __getitems__(self, numbers: range):
        # A slice is one read; a list is one for each row.
        return numbers, self.table[numbers.start : numbers.stop]


def table_batches(
    dataset: Dataset, prepare: Preparation, parts: Sequence[range], rows_per_batch: int, num_workers: int
) -> Iterator[Batch]:
    """The batches of these parts of a table. No batch has rows of two parts. Worker processes prepare them ahead."""
    batches = torch.utils.data.DataLoader(
        EncodedRows(dataset),
        batch_sampler=[
            rows[start : start + rows_per_batch] for rows in parts for start in range(0, len(rows), rows_per_batch)
        ],
        collate_fn=prepare,
        num_workers=num_workers,
        pin_memory=torch.accelerator.is_available(),
    )
    return iter(batches)


def stream_batches(
    stream: IterableDataset,
    prepare: Preparation,
    first_row: int,
    state: dict | None,
    rows_per_batch: int,
    num_workers: int,
    num_classes: int,
) -> Iterator[Batch]:
    """The batches of a stream, each with the state in which the stream continues behind it. Threads prepare them ahead.

    Args:
        stream: a stream that passed the door.
        prepare: what makes a batch of rows.
        first_row: rows that are left out, because they were recorded.
        state: the state of the stream behind them; `None` reads over them.
        rows_per_batch: rows of a batch.
        num_workers: batches that are prepared at the same time.
        num_classes: a label is below this.

    Raises:
        ValueError: a label is no class.
    """
    rows = stream.with_format("arrow")
    if state is not None:
        rows.load_state_dict(state)
    elif first_row:
        rows = rows.skip(first_row)
    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        ahead = deque()
        for table in rows.iter(batch_size=rows_per_batch):
            if LABEL in table.column_names:
                check_streamed_labels(table[LABEL].to_pylist(), num_classes, first_row)
            numbers = range(first_row, first_row + len(table))
            ahead.append((pool.submit(prepare, (numbers, table)), _json(rows.state_dict())))
            first_row += len(table)
            if len(ahead) > num_workers:
                yield _result(*ahead.popleft())
        while ahead:
            yield _result(*ahead.popleft())


def _result(future, state):
    batch = future.result()
    batch.state = state
    return batch


def _json(state):
    """The state, if it can be written to a file."""
    try:
        return json.loads(json.dumps(state))
    except TypeError:
        return None
