"""Decoded images → pixel values, by the image processor of each model."""

from collections.abc import Mapping, Sequence

import numpy as np
import PIL.Image
import torch
from datasets import Dataset, Image
from transformers import BaseImageProcessor, ViTImageProcessor
from transformers.image_processing_backends import TorchvisionBackend

from ..checks import check_numbers
from ..data.columns import IMAGE, as_image_table, require_table
from .decoding import decode_image


def build_image_processor(
    dataset: Dataset, image_column: str | None = None, image_size: int | None = None
) -> ViTImageProcessor:
    """An image processor for a new model: resizes images to squares and scales the pixels to −1 … 1.

    Args:
        dataset: a table with an image column.
        image_column: that column; found if not given.
        image_size: side in pixels, at least 2. `None` takes the longer side of the first image if it is at most 64, otherwise 224.

    Raises:
        ValueError: the column cannot be found, the first image cannot be decoded, or the size is out of range.
    """
    require_table(dataset, "dataset")
    if image_size is None:
        table = as_image_table(dataset, image_column, needs_label=False).cast_column(IMAGE, Image(decode=False))
        try:
            largest = max(decode_image(table[0][IMAGE]).size)
        except ValueError as error:
            raise ValueError(f"Row 0: {error}") from error
        image_size = max(2, largest) if largest <= 64 else 224
    # torch resizes no image to one pixel.
    check_numbers(2, whole=True, image_size=image_size)
    # Users of a published processor will give it grayscale and transparent images.
    return ViTImageProcessor(size={"height": image_size, "width": image_size}, do_convert_rgb=True)


def pixel_values(
    images: Sequence[PIL.Image.Image | torch.Tensor], processors: Mapping[str, BaseImageProcessor]
) -> dict[str, torch.Tensor]:
    """The batch that each image processor makes of the images. Processors of the same class with the same settings share
    one tensor.

    Args:
        images: N images, or views (channels, height, width) of type uint8.
        processors: name → image processor.

    Returns:
        Name → (N, channels, H, W).

    Raises:
        ValueError: a processor makes images of several sizes.
    """
    batches, results = {}, {}
    for name, processor in processors.items():
        # The settings contain the name of the class, but code of two repositories may share a name.
        settings = (type(processor), processor.to_json_string()) if len(processors) > 1 else name
        if settings not in batches:
            batches[settings] = _preprocess(processor, images)
        results[name] = batches[settings]
    return results


def _preprocess(processor, images):
    options = {}
    if isinstance(processor, TorchvisionBackend):
        # On a CPU it takes images one by one by default: twice as slow for small ones, twice as fast for large ones.
        largest = max(max(im.size if isinstance(im, PIL.Image.Image) else im.shape[-2:]) for im in images)
        options["disable_grouping"] = None if largest > 64 else False
    try:
        return processor(images, return_tensors="pt", **options)["pixel_values"]
    except ValueError as error:
        sizes = {np.shape(image)[-2:] for image in processor(images, **options)["pixel_values"]}
        if len(sizes) < 2:
            raise
        settings = {name: value for name, value in processor.to_dict().items() if "crop" in name or "size" in name}
        raise ValueError(
            f"{type(processor).__name__} makes images of several sizes with {settings}. Set one, for example "
            'size={"height": 224, "width": 224}, or a crop, do_center_crop=True and crop_size.'
        ) from error
