"""Write a file whole or not at all, checksums, and no cache files in the folders of users."""

import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from datasets import disable_caching, enable_caching, is_caching_enabled


T, R = TypeVar("T"), TypeVar("R")


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


def read_json(path: str | os.PathLike) -> dict:
    """Read a JSON file that holds a dict.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not a dict")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}. Restore it from a copy, or write its folder again.") from error
    return content


def user_path(path: str | os.PathLike, argument: str) -> str:
    """The path that a user gives, with "~" replaced by the folder of the user.

    Raises:
        ValueError: it is no path.
    """
    if not isinstance(path, (str, os.PathLike)) or not str(path) or "\0" in str(path):
        raise ValueError(f"{argument}={path!r} is not a path. Give the path of a folder.")
    return os.path.expanduser(os.fspath(path))


def is_address(path: str | os.PathLike) -> bool:
    """Whether a path names a place in another file system than this machine's, such as `hf://datasets/user/table`."""
    # Windows has paths such as "C:/tables". A `Path` has made one slash of two.
    return re.match("[a-z0-9+.-]{2,}:/", str(path), re.IGNORECASE) is not None


def output_folder(path: str | os.PathLike) -> Path:
    """The `output_dir` that a user gives, which need not exist yet.

    Raises:
        ValueError: it is no path but an address, or a file or a link to nothing is in its place or above it.
    """
    if is_address(path):
        raise ValueError(
            f"output_dir={path} is an address, not a folder of this machine. Give the path of a folder, and upload what is "
            "written there: to the Hub by hf-ibdistill push --folder."
        )
    folder = Path(user_path(path, "output_dir"))
    for part in (folder, *folder.parents):
        if os.path.lexists(part) and not part.is_dir():
            raise ValueError(f"output_dir={path}: {part} is not a folder. Choose another path.")
    return folder


def flush(path: str | os.PathLike) -> None:
    """Wait until the content of a file is on the disk."""
    # Windows flushes a handle only if it may write.
    with open(path, "r+b") as file:
        os.fsync(file.fileno())


# The file of a table that has the checksums of the others.
CHECKSUMS = "checksums.json"
# The part of a file that one checksum covers, in bytes.
PART = 1 << 24


def sha256(path: str | os.PathLike, part: int | None = None) -> str:
    """The SHA-256 of a file, or of one of its parts of 16 MiB, as hexadecimal digits."""
    with open(path, "rb") as file:
        file.seek(PART * (part or 0))
        digest = hashlib.sha256(file.read(PART))
        while part is None and (block := file.read(PART)):
            digest.update(block)
    return digest.hexdigest()


def checksums(path: str | os.PathLike) -> dict:
    """The size of a file and the SHA-256 of each of its parts, for JSON."""
    size = os.path.getsize(path)
    return {"size": size, "sha256": [sha256(path, part) for part in range(-(-size // PART))]}


def in_threads(function: Callable[[T], R], values: Iterable[T]) -> list[R]:
    """What a function returns for each value, in their order. Threads call it: reading and hashing files releases Python's lock."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(function, values))


@contextmanager
def no_cache_files() -> Iterator[None]:
    """Let the methods of a `Dataset` write their cache files to the folder for temporary files, not beside those of users."""
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
