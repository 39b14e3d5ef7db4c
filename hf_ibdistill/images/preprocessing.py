"""Decoded images → pixel values, by the image processor of each model."""

from collections.abc import Iterable, Mapping

import numpy as np
import PIL.Image
import torch
from datasets import Dataset
from transformers import BaseImageProcessor, ViTImageProcessor
from transformers.image_processing_backends import TorchvisionBackend

from ..checks import check_numbers
from ..data.columns import IMAGE, as_image_table, in_arrow, require_table
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
        table = in_arrow(as_image_table(dataset, image_column, needs_label=False), [IMAGE])
        try:
            largest = max(decode_image(table[:1][IMAGE][0].as_py()).size)
        except ValueError as error:
            raise ValueError(f"Row 0: {error}") from error
        image_size = max(2, largest) if largest <= 64 else 224
    # torch resizes no image to one pixel.
    check_numbers(2, whole=True, image_size=image_size)
    # Users of a published processor will give it grayscale and transparent images.
    return ViTImageProcessor(size={"height": image_size, "width": image_size}, do_convert_rgb=True)


# Pixels that are held decoded at once, unless a single image has more: 48 MiB as bytes.
PIXELS = 1 << 24


def pixel_values(
    images: Iterable[PIL.Image.Image | torch.Tensor], processors: Mapping[str, BaseImageProcessor]
) -> dict[str, torch.Tensor]:
    """The batch that each image processor makes of the images. Processors of the same class with the same settings share
    one tensor.

    Args:
        images: N images, or views (channels, height, width) of type uint8. They are read as they are needed: an iterator
            that decodes them needs memory for one, or for as many as have 17 million pixels.
        processors: name → image processor.

    Returns:
        Name → (N, channels, H, W); an empty dict without images.

    Raises:
        ValueError: a processor makes images of several sizes.
    """
    chosen, settings = {}, {}
    for name, processor in processors.items():
        settings[name] = processor_settings(processor) if len(processors) > 1 else name
        chosen.setdefault(settings[name], processor)
    parts = {setting: [] for setting in chosen}
    for group in _groups(images):
        for setting, processor in chosen.items():
            parts[setting].append(_preprocess(processor, group))
        # Otherwise it would be held while the next is decoded.
        del group
    batches = {setting: _concatenate(made, chosen[setting]) for setting, made in parts.items() if made}
    return {name: batches[setting] for name, setting in settings.items() if setting in batches}


def processor_settings(processor: BaseImageProcessor) -> tuple[type, str]:
    """Equal for image processors that make the same of an image."""
    # The settings contain the name of the class, but code of two repositories may share a name.
    return type(processor), processor.to_json_string()


def _groups(images):
    """Lists of images with up to 17 million pixels together, or one image with more."""
    group, pixels = [], 0
    for image in images:
        width, height = _size(image)
        size = width * height
        if group and pixels + size > PIXELS:
            yield group
            group, pixels = [], 0
        group.append(image)
        pixels += size
    if group:
        yield group


def _size(image):
    return image.size if isinstance(image, PIL.Image.Image) else image.shape[-2:]


def _preprocess(processor, images):
    options = {}
    if isinstance(processor, TorchvisionBackend):
        # On a CPU it takes images one by one by default: twice as slow for small ones, twice as fast for large ones.
        options["disable_grouping"] = None if max(max(_size(image)) for image in images) > 64 else False
    try:
        return processor(images, return_tensors="pt", **options)["pixel_values"]
    except ValueError:
        _check_sizes(processor, {np.shape(image)[-2:] for image in processor(images, **options)["pixel_values"]})
        raise


def _concatenate(parts, processor):
    _check_sizes(processor, {part.shape[-2:] for part in parts})
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _check_sizes(processor, sizes):
    if len(sizes) > 1:
        settings = {name: value for name, value in processor.to_dict().items() if "crop" in name or "size" in name}
        raise ValueError(
            f"{type(processor).__name__} makes images of several sizes with {settings}. Set one, for example "
            'size={"height": 224, "width": 224}, or a crop, do_center_crop=True and crop_size.'
        )
