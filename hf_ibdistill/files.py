"""Write a file whole or not at all, and hash files."""

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


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
        # Windows flushes a handle only if it may write.
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())
        before_rename(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file whole or not at all, in UTF-8."""
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def sha256(path: str | os.PathLike) -> str:
    """The SHA-256 of a file's content, as hexadecimal digits."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


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
