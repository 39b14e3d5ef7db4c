"""Decoded images of small tables, kept in memory from epoch to epoch."""

import mmap

import numpy as np


# 50,000 images of 40 pixels, or 1,700 of 224.
MAX_BYTES = 1 << 28


class ImageCache:
    """Images of one size, which all processes forked after this object share.

    Memory is taken as images are put into it. A process that was not forked starts with an empty one.

    Args:
        num_rows: number of rows of the table.
        width: width of each image.
        height: height of each image.
    """

    def __init__(self, num_rows: int, width: int, height: int):
        self._arguments = num_rows, width, height
        self._pixels = self._shared(np.uint8, num_rows, height, width, 3)
        self._keys = self._shared(np.int64, num_rows)
        self._is_kept = self._shared(np.bool_, num_rows)

    def __reduce__(self):
        return type(self), self._arguments

    @staticmethod
    def _shared(dtype, *shape):
        # Not `share_memory_`: its files are in /dev/shm, which has 64 MB in many containers.
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return np.frombuffer(mmap.mmap(-1, size), dtype).reshape(shape)

    def get(self, number: int) -> tuple[np.ndarray, int] | None:
        """The pixels of a row, (height, width, 3), and its key, if they are there."""
        if not self._is_kept[number]:
            return None
        pixels = self._pixels[number]
        pixels.flags.writeable = False
        return pixels, int(self._keys[number])

    def put(self, number: int, pixels: np.ndarray, key: int) -> None:
        """Keep the pixels and the key of a row, unless the image has another size."""
        if pixels.shape == self._pixels.shape[1:]:
            self._pixels[number], self._keys[number] = pixels, key
            # Last, because another process may read this row.
            self._is_kept[number] = True


def build_cache(num_rows: int, width: int, height: int) -> ImageCache | None:
    """A cache for a table whose first image has this size, if all images of this size need at most 256 MiB."""
    return ImageCache(num_rows, width, height) if 0 < num_rows * width * height * 3 <= MAX_BYTES else None
