"""Encoded images as cells of a table, and tables of them."""

import io
import struct

import numpy as np
import PIL.Image
from datasets import Dataset, Features, Image, List, Value


UNREADABLE = {"bytes": b"not an image", "path": None}


def random_pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def random_image(size=(8, 8), seed=0):
    """An RGB image of (width, height)."""
    return PIL.Image.fromarray(random_pixels(size[1], size[0], 3, seed=seed))


def encoded(image, format="PNG", **options):
    """An image as an undecoded cell."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def tiff(levels, *tags, bits=None, white_is_zero=False, order="<"):
    """A TIFF file of gray levels (height, width) of any type, written from its specification; `tags` are further
    (tag, type, count, 4 bytes)."""
    height, width = levels.shape
    bits = bits or levels.itemsize * 8
    sample_format = {"u": 1, "i": 2, "f": 3}[levels.dtype.kind]
    if bits == 12:
        pairs = levels.astype(np.uint32).reshape(-1, 2)
        joined = pairs[:, 0] << 12 | pairs[:, 1]
        content = b"".join(int(value).to_bytes(3, "big") for value in joined)
    else:
        content = levels.astype(levels.dtype.newbyteorder(order)).tobytes()
    values = {256: width, 257: height, 258: bits, 259: 1, 262: int(not white_is_zero), 277: 1, 278: height}
    entries = [
        (tag, 3, 1, struct.pack(f"{order}HH", value, 0)) for tag, value in {**values, 339: sample_format}.items()
    ]
    start = 8 + 2 + 12 * (len(entries) + 2 + len(tags)) + 4
    entries += [(273, 4, 1, struct.pack(f"{order}I", start)), (279, 4, 1, struct.pack(f"{order}I", len(content)))]
    entries = sorted([*entries, *tags])
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(entries))
    directory = b"".join(struct.pack(f"{order}HHI", *entry[:3]) + entry[3] for entry in entries)
    return {"bytes": head + directory + bytes(4) + content, "path": None}


def gray(value, size=(2, 2)):
    return encoded(PIL.Image.new("L", size, value))


def cell_table(cells, **columns):
    """A row for each cell, numbered in the column "row"; `columns` are arrays (N, C)."""
    features = Features({"image": Image(decode=False), "row": Value("int64")})
    table = Dataset.from_dict({"image": cells, "row": range(len(cells))}, features=features)
    for name, values in columns.items():
        feature = List(Value(values.dtype.name), length=values.shape[1])
        table = table.add_column(name, list(values), feature=feature)
    return table.cast_column("image", Image())
