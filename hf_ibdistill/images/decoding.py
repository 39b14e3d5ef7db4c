"""Encoded image → 8-bit RGB image. Recording and training decode only through here."""

import io
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps


def decode_image(value: dict | None) -> PIL.Image.Image:
    """Decode an undecoded `datasets.Image` value into an 8-bit RGB image; grayscale, palette and RGBA are converted.

    Args:
        value: `{"bytes": …, "path": …}`.

    Raises:
        ValueError: there is no image, or it cannot be decoded.
    """
    path = value and value.get("path")
    try:
        if value is None or (value.get("bytes") is None and path is None):
            raise ValueError("the row has no image")
        content = value["bytes"] if value.get("bytes") is not None else Path(path).read_bytes()
        with PIL.Image.open(io.BytesIO(content)) as opened:
            # Cameras store their orientation and leave the pixels unturned.
            PIL.ImageOps.exif_transpose(opened, in_place=True)
            image = opened
            if image.mode.startswith("I"):
                # PIL clips 16-bit images to 255 when it converts them, which would turn them white.
                levels = np.asarray(image)
                image = PIL.Image.fromarray((levels // (257 if levels.max() > 255 else 1)).astype(np.uint8))
            return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:  # which error a damaged file raises depends on its format
        file = f" ({path})" if path else ""
        raise ValueError(f"The image{file} cannot be decoded: {error}") from error
