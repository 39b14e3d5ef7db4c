"""Encoded image → 8-bit RGB image. Recording and training decode only through here."""

import contextlib
import functools
import hashlib
import io
import logging
import math
import re
import struct
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import fsspec
import numpy as np
import PIL.Image
import PIL.ImageFile
from datasets import Dataset, DatasetDict, Image
from datasets.fingerprint import get_temporary_cache_files_directory

from ..data.columns import IMAGE, as_image_table, require_table


logger = logging.getLogger(__name__)

_TURNS = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112
_BITS, _WHITE_IS_ZERO, _SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF files


def decode_image(value: Mapping | None, mode: str | None = None) -> PIL.Image.Image:
    """Decode an undecoded `datasets.Image` value into an 8-bit RGB image.

    Grayscale, palette and other color spaces are converted, transparency is dropped, and of several frames the first is
    used. Unsigned levels of up to 16 bits are scaled by their type.

    Args:
        value: `{"bytes": …, "path": …}`.
        mode: that of the column (`datasets.Image.mode`), which the image passes through.

    Raises:
        ValueError: there is no image, it cannot be decoded, it is larger than `PIL.Image.MAX_IMAGE_PIXELS`, or its levels
            have no fixed range; [`scale_pixels`] gives them one.
    """
    try:
        image = _load(read_file(value))
        wide = _wide_levels(image)
        if wide is None:
            image.info.pop("transparency", None)  # only a warning of Pillow depends on it
            rgb = image if image.mode == "RGB" else image.convert("RGB")
        else:
            levels, highest, is_negative = wide
            if highest is None:
                raise ValueError(
                    f"levels of type {levels.dtype.name} have no fixed range. Give them one: scale_pixels(dataset, minimum, "
                    "maximum), on the command line --pixel_range MINIMUM MAXIMUM"
                )
            if highest == 65535 and 0 < levels.max() <= 255:
                _warn_once(
                    "An image has 16 bits, but only levels up to 255, and turns black. If that is its range, use "
                    "scale_pixels(dataset, 0, 255)."
                )
            rgb = _from_levels(levels.astype(np.uint32) * 255 // highest, is_negative).convert("RGB")
        rgb = _upright(rgb, image)
        return rgb if mode in (None, "RGB") else rgb.convert(mode).convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # which error a damaged file raises depends on its format
        file = f" ({value['path']})" if value and value.get("path") else ""
        reason = str(error).partition(" <_io")[0] or type(error).__name__
        raise ValueError(f"The image{file} cannot be decoded: {reason}") from error


def file_key(value: Mapping) -> int:
    """A hash of 64 bits of the encoded file, `{"bytes": …, "path": …}`, whatever its decoder makes of it."""
    return int.from_bytes(hashlib.blake2b(read_file(value), digest_size=8).digest(), "little", signed=True)


def scale_pixels(
    dataset: Dataset | DatasetDict, minimum: float, maximum: float, *, image_column: str | None = None
) -> Dataset | DatasetDict:
    """Make 8-bit images of gray levels of 16 or 32 bits, signed or float: `minimum` becomes black, `maximum` white.

    Levels outside become black or white, and a warning has their rows. 8-bit images stay as they are.

    Args:
        dataset: a table with an image column, or several splits.
        minimum: the level of black.
        maximum: the level of white.
        image_column: the image column; found if not given.

    Raises:
        TypeError: `dataset` is neither a `Dataset` nor a `DatasetDict`.
        ValueError: `minimum` is not below `maximum`, or a level is NaN; the message names the row.
    """
    if not -math.inf < minimum < maximum < math.inf:
        raise ValueError(f"minimum={minimum}, maximum={maximum}: choose two numbers in ascending order.")
    dataset = as_image_table(dataset, image_column, needs_label=False)
    if isinstance(dataset, Mapping):
        return DatasetDict({name: scale_pixels(split, minimum, maximum) for name, split in dataset.items()})
    require_table(dataset, "dataset")
    outside = []

    def scale(value, row):
        try:
            image = _load(read_file(value))
        except Exception:
            return {IMAGE: value}  # whoever reads the row reports it
        wide = _wide_levels(image)
        if wide is None:
            return {IMAGE: value}
        levels, _, is_negative = wide
        if np.isnan(levels).any():
            raise ValueError(f"Row {row}: the image has levels that are NaN. Remove the row, or replace them.")
        shares = (levels.astype(np.float64) - minimum) / (maximum - minimum)
        if shares.min() < 0 or shares.max() > 1:
            outside.append(row)
        gray, encoded = _from_levels(np.rint(shares.clip(0, 1) * 255), is_negative), io.BytesIO()
        _upright(gray, image).save(encoded, "PNG")
        return {IMAGE: {"bytes": encoded.getvalue(), "path": value["path"]}}

    encoded = dataset.with_format(None).cast_column(IMAGE, Image(decode=False))
    scaled = encoded.map(
        scale,
        input_columns=[IMAGE],
        with_indices=True,
        features=encoded.features,
        # Neither beside the files of the user nor in memory.
        cache_file_name=str(Path(tempfile.mkdtemp(dir=get_temporary_cache_files_directory()), "scaled.arrow")),
        load_from_cache_file=False,
        writer_batch_size=64,
        desc="Scaling the images",
    )
    if outside:
        logger.warning(
            "%d of %d images have levels outside of minimum=%s, maximum=%s, which become black or white (rows %s%s).",
            len(outside), len(dataset), minimum, maximum, outside[:10], ", …" if len(outside) > 10 else "",
        )  # fmt: skip
    return scaled.cast_column(IMAGE, Image())


def read_file(value: Mapping | None) -> bytes:
    """The encoded file of an undecoded `datasets.Image` value. A stream may have URLs as paths.

    Raises:
        ValueError: there is no image.
        OSError: there is no such file.
    """
    if value is None or (value.get("bytes") is None and value.get("path") is None):
        raise ValueError("the row has no image")
    if value.get("bytes") is not None:
        return value["bytes"]
    if "://" not in value["path"]:
        return Path(value["path"]).read_bytes()
    with fsspec.open(value["path"], "rb") as file:
        return file.read()


def _load(content) -> PIL.Image.Image:
    """The first frame, with its pixels read."""
    may_be_truncated = PIL.ImageFile.LOAD_TRUNCATED_IMAGES
    # With it, the missing part of an image would become gray.
    PIL.ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        return _open(content)
    except Exception:
        if not content.startswith(b"\x89PNG"):
            raise
        return _open(_without_metadata(content))
    finally:
        PIL.ImageFile.LOAD_TRUNCATED_IMAGES = may_be_truncated


# How the files of most data sets begin. Otherwise Pillow asks each of its formats in turn, a sixth of the time of a small image.
_BEGINNINGS = {b"\x89PNG\r\n\x1a\n": ["PNG"], b"\xff\xd8\xff": ["JPEG"]}


def _open(content):
    formats = next((formats for beginning, formats in _BEGINNINGS.items() if content.startswith(beginning)), None)
    image = PIL.Image.open(io.BytesIO(content), formats=formats)
    limit = PIL.Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise ValueError(
            f"{image.width}×{image.height} pixels are more than PIL.Image.MAX_IMAGE_PIXELS={limit}. Make the image "
            "smaller, or raise this limit"
        )
    if image.format not in ("MPO", "PSD") and getattr(image, "is_animated", False):
        _warn_once("An image has several frames. The first is used, here and in other such images.")
    if not isinstance(image.info.get("xmp", b""), bytes):
        del image.info["xmp"]  # Pillow would search it for the orientation
    try:
        image.load()
    except KeyError:
        # Pillow before 13 looks for a directory that the metadata of a TIFF file only name, when the pixels are read.
        image.load()
    return image


def _without_metadata(png) -> bytes:
    """The chunks of a PNG file that its pixels and its orientation need. Pillow refuses damage in any other."""
    kept, start = [png[:8]], 8
    while start + 12 <= len(png):
        kind, end = png[start + 4 : start + 8], start + 12 + int.from_bytes(png[start : start + 4], "big")
        if kind == b"eXIf":
            kept.append(png[start : end - 4] + zlib.crc32(png[start + 4 : end - 4]).to_bytes(4, "big"))
        elif kind[:1].isupper():
            kept.append(png[start:end])
        start = end
    return b"".join(kept)


# Entries of `Image.info` that may hold the orientation.
_METADATA = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"}


def _upright(picture, image):
    """`picture`, turned as the metadata of `image` demand. Cameras leave the pixels unturned."""
    if not hasattr(image, "tag_v2") and _METADATA.isdisjoint(image.info):
        return picture
    orientation = None
    with contextlib.suppress(Exception):  # which error broken metadata raise depends on what is broken
        orientation = image.getexif().get(_ORIENTATION)
    if orientation is None:
        # Pillow before 13 stops at a broken entry in front of it.
        orientation = _orientation(image.info.get("exif", b"").removeprefix(b"Exif\0\0"))
    if orientation is None:
        # Pillow looks there as well, but not if EXIF is broken.
        found = re.search(rb'tiff:Orientation(?:="|>)([0-9])', image.info.get("xmp", b""))
        orientation = found and int(found[1])
    return picture.transpose(_TURNS[orientation]) if orientation in _TURNS else picture


def _orientation(metadata) -> int | None:
    """The orientation in the first directory of TIFF metadata, if it is there."""
    order = {b"II": "<", b"MM": ">"}.get(metadata[:2])
    with contextlib.suppress(struct.error):  # the end of the metadata
        start = struct.unpack_from(f"{order}I", metadata, 4)[0] if order else len(metadata)
        for i in range(struct.unpack_from(f"{order}H", metadata, start)[0]):
            tag, _, _, value = struct.unpack_from(f"{order}HHIH", metadata, start + 2 + 12 * i)
            if tag == _ORIENTATION:
                return value
    return None


def _wide_levels(image) -> tuple[np.ndarray, int | None, bool] | None:
    """The gray levels of an image that are not unsigned bytes.

    Returns:
        `None` for 8-bit images. Otherwise the levels (height, width); the level of white, if it follows from the type of
        the file, with 0 as black; and whether black and white are exchanged.
    """
    tags = getattr(image, "tag_v2", {})
    is_signed = tags.get(_SAMPLE_FORMAT, (1,))[0] == 2 or image.format == "FITS"
    if image.mode[:1] not in "IF" and not (image.mode == "L" and is_signed and image.format == "TIFF"):
        return None
    levels = np.asarray(image)
    if levels.dtype.kind == "u" and is_signed:
        levels = levels.view(levels.dtype.str.replace("u", "i"))
    bits = tags.get(_BITS, (16,))[0]
    if image.format == "TIFF" and bits == 32 and levels.dtype.kind == "i" and not is_signed:
        levels = levels.view(np.uint32)
    is_unsigned = levels.dtype.kind != "f" and not is_signed and bits <= 16
    highest = 2**bits - 1 if is_unsigned and image.format in ("PNG", "PPM", "JPEG2000", "TIFF") else None
    return levels, highest, tags.get(_WHITE_IS_ZERO) == 0


def _from_levels(levels, is_negative):
    levels = levels.astype(np.uint8)
    return PIL.Image.fromarray(255 - levels if is_negative else levels)


@functools.cache
def _warn_once(message):
    logger.warning(message)
