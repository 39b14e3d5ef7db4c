"""Encoded images as cells of a table, and tables of them."""

import io

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
