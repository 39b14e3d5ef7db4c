"""A table at an address, such as `hf://datasets/user/table` or `s3://bucket/table`: a folder of this machine that mirrors it.

All work happens in the folder. While a recording runs, what is whole there is uploaded; so it continues on another machine.
"""

import hashlib
import logging
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
from filelock import FileLock
from fsspec.core import url_to_fs
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, HfFileSystem
from huggingface_hub.hf_file_system import HfFileSystemResolvedRepositoryPath

from .files import CHECKSUMS, checksums, read_json, write_whole


logger = logging.getLogger(__name__)

# Seconds between two uploads. The Hub limits the number of commits an hour.
_PAUSE = 60
# The files of a table and of its recording; a repository has others. Whoever reads a table looks for the last two first.
_STATE, _SPLITS = "state.json", "dataset_dict.json"
_FILES = re.compile(
    rf"([^/]+/)?(data-[^/]*\.arrow|(data-[^/]*\.arrow\.json|recording\.json)|{CHECKSUMS}|dataset_info\.json|{_STATE})|{_SPLITS}"
)


class Mirror:
    """A folder of this machine that mirrors a table at an address.

    Args:
        address: of a file system that fsspec knows. A repository of the Hub must exist.

    Attributes:
        folder: in the cache folder of `datasets`, the same for the same address.

    Raises:
        ValueError: the address is of no known file system, or of a repository that does not exist.
    """

    def __init__(self, address: str):
        # A `Path` has made one slash of two. A file on this machine has one, or three.
        address = re.sub("^(?!file:)([^:]*):/(?!/)", r"\1://", str(address)).rstrip("/")
        # For messages: it may hold a user and a password.
        self.address = re.sub("//[^/@]*@", "//", address)
        try:
            self._fs, self._root = url_to_fs(address)
            self._repo = self._fs.resolve_path(self._root) if isinstance(self._fs, HfFileSystem) else None
        except (ImportError, ValueError, FileNotFoundError, NotImplementedError) as error:
            raise ValueError(
                f"{self.address} cannot be opened: {error}. Check the address; a repository of the Hub must exist."
            ) from error
        name = hashlib.sha256(self.address.encode()).hexdigest()[:16]
        self.folder = Path(datasets.config.HF_DATASETS_CACHE) / "hf_ibdistill" / name
        # Name → size and time of the file that is at the address, as it was here.
        self._known: dict[str, tuple[int, int]] = {}

    def pull(self) -> list[str]:
        """Make the folder hold what is at the address, and return the names of these files. What has another content here is
        downloaded."""
        self.folder.mkdir(parents=True, exist_ok=True)
        # Another process of this machine may want the same table.
        with FileLock(self.folder.with_suffix(".lock")):
            # The descriptions say which content the other files have.
            names = sorted(self._listed(), key=lambda name: not name.endswith(".json"))
            for name in names:
                path, source = self.folder / name, f"{self._root}/{name}"
                if path.suffix == ".json" or not (self._is_known(name) or _has_content(path)):
                    write_whole(path, lambda temporary, source=source: self._fs.get_file(source, str(temporary)))
                self._known[name] = _signature(path)
        return names

    def push(self) -> None:
        """Upload what is whole in the folder and not at the address. Once a table is finished, what only its recording needed
        is removed there."""
        files = {name: _signature(self.folder / name) for name in self._names()}
        new = [name for name in files if not self._is_known(name)]
        finished = {name.removesuffix(_STATE) for name in files if name.endswith(_STATE)}
        old = [name for name in self._known if name not in files and _folder_of(name) in finished]
        if new or old:
            # What marks a table as finished arrives last, in a file system without commits.
            self._change(sorted(new, key=lambda name: (name == _SPLITS, name.endswith(_STATE))), old)
        self._known = {name: files[name] for name in files}

    def _is_known(self, name) -> bool:
        """Whether this object has downloaded or uploaded the file as it is here."""
        path = self.folder / name
        return path.is_file() and self._known.get(name) == _signature(path)

    @contextmanager
    def uploading(self) -> Iterator[None]:
        """Upload once a minute while something else is done, and when it ends or fails."""
        stopped = threading.Event()

        def upload():
            while True:
                is_last = stopped.wait(_PAUSE)
                try:
                    self.push()
                except Exception as error:  # whatever the file system raises
                    kind = type(error).__name__
                    logger.warning("Uploading to %s failed, and is tried again. %s: %s", self.address, kind, error)
                if is_last:
                    return

        thread = threading.Thread(target=upload, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stopped.set()
            thread.join()

    def _names(self) -> list[str]:
        """The names of what is whole in the folder."""
        paths = [path for pattern in ("*", "*/*") for path in self.folder.glob(pattern)]
        names = [path.relative_to(self.folder).as_posix() for path in paths if path.is_file()]
        finished = {name.removesuffix(_STATE) for name in names if name.endswith(_STATE)}
        # Another machine may have finished the table.
        return [
            name
            for name in names
            if (match := _FILES.fullmatch(name)) and not (match[3] and _folder_of(name) in finished)
        ]

    def _listed(self) -> list[str]:
        """The names of what is at the address."""
        self._fs.invalidate_cache()
        names = (path.removeprefix(self._root).lstrip("/") for path in self._fs.find(self._root))
        return [name for name in names if _FILES.fullmatch(name)]

    def _change(self, new, old) -> None:
        if isinstance(self._repo, HfFileSystemResolvedRepositoryPath):
            path = f"{self._repo.path_in_repo}/".lstrip("/")
            operations = [CommitOperationAdd(path + name, self.folder / name) for name in new]
            operations += [CommitOperationDelete(path + name) for name in old]
            HfApi(self._fs.endpoint, token=self._fs.token).create_commit(
                self._repo.repo_id,
                operations,
                commit_message="Record the logits of teachers",
                repo_type=self._repo.repo_type,
                revision=self._repo.revision,
            )
            return
        for name in new:
            self._fs.makedirs(f"{self._root}/{name}".rpartition("/")[0], exist_ok=True)
            self._fs.put_file(str(self.folder / name), f"{self._root}/{name}")
        for name in old:
            self._fs.rm_file(f"{self._root}/{name}")


def _has_content(path) -> bool:
    """Whether a data file has the content that the note beside it or the table's description names."""
    try:
        note, sums = path.with_name(f"{path.name}.json"), path.with_name(CHECKSUMS)
        expected = read_json(note) if note.exists() else read_json(sums)[path.name]
        return {key: expected[key] for key in ("size", "sha256")} == checksums(path)
    except (OSError, LookupError, TypeError, ValueError):
        return False


def _folder_of(name):
    """The name of a folder, with its slash."""
    return name[: name.rfind("/") + 1]


def _signature(path):
    status = path.stat()
    return status.st_size, status.st_mtime_ns
