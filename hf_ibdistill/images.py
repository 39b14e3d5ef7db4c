"""Rows of a table → decoded images → pixel values. Recording and training read images only through here."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from datasets import Dataset, Image
from transformers import BaseImageProcessor, ViTImageProcessor


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
        with PIL.Image.open(io.BytesIO(content)) as image:
            if image.mode.startswith("I"):
                # PIL clips 16-bit images to 255 when it converts them, which would turn them white.
                image = PIL.Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        where = f" ({path})" if path else ""
        raise ValueError(f"The image{where} cannot be decoded: {error}") from error


class ImageRows(torch.utils.data.Dataset):
    """A table's rows with their images decoded to RGB, as dicts; the other columns as they are.

    Args:
        dataset: the table; its rows keep their numbers.
        image_column: the column to decode.
        array_columns: list columns to read as numpy arrays, which is many times faster than Python lists.
        skip_unreadable: give a row whose image cannot be decoded the image `None` instead of raising.

    Raises:
        ValueError: on reading a row whose image cannot be decoded; the message names the row.
    """

    def __init__(
        self,
        dataset: Dataset,
        image_column: str,
        array_columns: Sequence[str] = (),
        skip_unreadable: bool = False,
    ):
        if dataset.format["type"] == "custom":
            raise ValueError(
                "The data set has a transform of its own. Remove it (dataset.reset_format()): images are decoded and "
                "preprocessed here, so that teachers and student see the same ones."
            )
        self.image_column = image_column
        self.skip_unreadable = skip_unreadable
        encoded = dataset.cast_column(image_column, Image(decode=False))
        self.rows = encoded.with_format("numpy", columns=list(array_columns), output_all_columns=True)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict]:
        rows = self.rows.__getitems__(list(indices))
        for index, row in zip(indices, rows):
            try:
                row[self.image_column] = decode_image(row[self.image_column])
            except ValueError as error:
                if not self.skip_unreadable:
                    raise ValueError(f"Row {index}: {error}") from error
                row[self.image_column] = None
        return rows


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
    return ViTImageProcessor(size={"height": image_size, "width": image_size})


def pixel_values(
    images: Sequence[PIL.Image.Image], processors: Mapping[str, BaseImageProcessor]
) -> dict[str, torch.Tensor]:
    """The batch (N, channels, H, W) that each image processor makes of the images. Processors with the same settings
    share one tensor."""
    batches, results = {}, {}
    for name, processor in processors.items():
        settings = processor.to_json_string()
        if settings not in batches:
            batches[settings] = processor(images, return_tensors="pt")["pixel_values"]
        results[name] = batches[settings]
    return results
