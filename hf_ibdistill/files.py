"""Write a file whole or not at all, checksums, and no cache files in the folders of users."""

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from datasets import disable_caching, enable_caching, is_caching_enabled


def write_whole(
    path: str | os.PathLike,
    write: Callable[[Path], object],
    before_rename: Callable[[Path], object] = lambda _: None,
) -> None:
    """Write a file under a temporary name, flush it to disk, then rename it.

    Args:
        path: the final file; missing parent folders are made.
        write: writes the content to the path that it is given.
        before_rename: called with the complete temporary file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        write(temporary)
        flush(temporary)
        before_rename(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file whole or not at all, in UTF-8."""
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def flush(path: str | os.PathLike) -> None:
    """Wait until the content of a file is on the disk."""
    # Windows flushes a handle only if it may write.
    with open(path, "r+b") as file:
        os.fsync(file.fileno())


# The part of a file that one checksum covers, in bytes.
PART = 1 << 24


def sha256(path: str | os.PathLike, part: int | None = None) -> str:
    """The SHA-256 of a file, or of one of its parts of 16 MiB, as hexadecimal digits."""
    with open(path, "rb") as file:
        left = os.path.getsize(path) if part is None else PART
        file.seek(PART * (part or 0))
        digest = hashlib.sha256()
        while left > 0 and (block := file.read(min(left, 1 << 20))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


def checksums(path: str | os.PathLike) -> dict:
    """The size of a file and the SHA-256 of each of its parts, for JSON."""
    size = os.path.getsize(path)
    return {"size": size, "sha256": [sha256(path, part) for part in range(-(-size // PART))]}


@contextmanager
def no_cache_files() -> Iterator[None]:
    """Keep the methods of a `Dataset` from writing cache files beside the files of the user. What they write goes to the
    folder for temporary files."""
    was_enabled = is_caching_enabled()
    disable_caching()
    try:
        yield
    finally:
        if was_enabled:
            enable_caching()


@contextmanager
def explain_full_disk(folder: str | os.PathLike, advice: str) -> Iterator[None]:
    """Add to an error about a full disk which folder it concerns and what to do.

    Raises:
        OSError: the disk is full; other errors pass unchanged.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(error.errno, f"The disk that holds {folder} is full. {advice}") from error
