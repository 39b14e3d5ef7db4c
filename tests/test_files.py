"""Files are written whole or not at all, hashed, and read the same in every locale."""

import ast
import errno
import hashlib
import os
import re
from pathlib import Path

import numpy as np
import pytest

import hf_ibdistill
from hf_ibdistill.files import (
    PART,
    checksums,
    explain_full_disk,
    output_folder,
    read_json,
    sha256,
    write_text,
    write_whole,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_written_with_its_folders_and_replaced(tmp_path):
    path = tmp_path / "a" / "b" / "file.bin"
    write_whole(path, lambda temporary: temporary.write_bytes(b"first"))
    assert path.read_bytes() == b"first"
    write_whole(str(path), lambda temporary: temporary.write_bytes(b"second"))
    assert path.read_bytes() == b"second" and names(path.parent) == ["file.bin"]
    write_text(path, "Größe\n")
    assert path.read_text(encoding="utf-8") == "Größe\n"


def test_the_file_appears_only_when_it_is_complete(tmp_path):
    path, seen = tmp_path / "file.txt", []
    path.write_text("old")

    def before_rename(temporary):
        # In the same folder: renaming across disks would copy.
        seen.append((temporary.parent, temporary.read_text(), path.read_text()))

    write_whole(path, lambda temporary: temporary.write_text("new"), before_rename)
    assert seen == [(tmp_path, "new", "old")] and path.read_text() == "new"


@pytest.mark.parametrize("stage", ["write", "flush", "before_rename", "rename"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()], ids=["full disk", "interrupt"])
def test_a_failure_leaves_the_old_file_and_nothing_else(stage, error, tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail(*_):
        raise error

    def write(temporary):
        temporary.write_text("half of the ne")
        if stage == "write":
            fail()

    if stage in ("flush", "rename"):
        monkeypatch.setattr(os, {"flush": "fsync", "rename": "replace"}[stage], fail)
    with pytest.raises(type(error)):
        write_whole(path, write, fail if stage == "before_rename" else lambda _: None)
    assert path.read_text() == "old" and names(tmp_path) == ["file.txt"]


def test_a_failure_before_the_first_byte_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError):
        write_whole(tmp_path / "file.txt", lambda _: 1 / 0)
    # A writer that writes nothing is an error, not an empty file.
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "file.txt", lambda _: None)
    assert names(tmp_path) == []


# Empty, short, and longer than the blocks that are read at once.
@pytest.mark.parametrize("size", [0, 3, 1 << 20, (1 << 20) + 1, 3 << 20])
def test_sha256_is_that_of_hashlib(size, tmp_path):
    content = bytes(range(251)) * (size // 251 + 1)
    (tmp_path / "file.bin").write_bytes(content[:size])
    assert (
        sha256(tmp_path / "file.bin")
        == sha256(str(tmp_path / "file.bin"))
        == hashlib.sha256(content[:size]).hexdigest()
    )


def test_a_full_disk_is_explained_and_other_errors_pass():
    for number in (errno.ENOSPC, errno.EDQUOT):
        with (
            pytest.raises(OSError, match="some/folder .*Free some space") as explained,
            explain_full_disk("some/folder", "Free some space."),
        ):
            raise OSError(number, "full")
        assert explained.value.errno == number and isinstance(explained.value.__cause__, OSError)
    for error in (PermissionError(errno.EACCES, "closed"), ValueError("other")):
        with pytest.raises(type(error)) as passed, explain_full_disk("some/folder", "Free some space."):
            raise error
        assert passed.value is error


@pytest.mark.parametrize("size", [0, 3, PART - 1, PART, PART + 1, 2 * PART])
def test_checksums_cover_every_byte_once(size, tmp_path):
    content = np.random.default_rng(0).bytes(size)
    (tmp_path / "file.bin").write_bytes(content)
    parts = [content[start : start + PART] for start in range(0, size, PART)]
    found = checksums(tmp_path / "file.bin")
    assert found == {"size": size, "sha256": [hashlib.sha256(part).hexdigest() for part in parts]}


def opens_text_without_encoding(call):
    name = getattr(call.func, "attr", getattr(call.func, "id", None))
    if name == "write_text" and isinstance(call.func, ast.Name):
        return False  # that of this package, which is always UTF-8
    mode = call.args[1].value if name == "open" and isinstance(call.func, ast.Name) and len(call.args) > 1 else "r"
    is_text = name in ("read_text", "write_text") or (isinstance(call.func, ast.Name) and name == "open")
    return is_text and "b" not in mode and not any(keyword.arg == "encoding" for keyword in call.keywords)


def test_text_has_the_same_encoding_on_every_system():
    # Without one, Python takes that of the locale: cp1252 on Windows, ASCII where LANG=C.
    for path in sorted(Path(hf_ibdistill.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.Call) and opens_text_without_encoding(node)), f"{path}:{node.lineno}"


@pytest.mark.parametrize("path", ["hf://datasets/user/table", "memory://table", "s3://bucket/table", Path("gs+x://a")])
def test_an_address_is_no_folder(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"output_dir={re.escape(str(path))} "):
        output_folder(path)
    assert not [*tmp_path.iterdir()]
    # One letter is a drive, and a folder may have a colon in its name.
    assert output_folder("c://tables").parts[-1] == "tables" and output_folder("a: b/c").parts == ("a: b", "c")


def test_the_folder_of_a_user(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert output_folder("~/a/b") == tmp_path / "a" / "b"
    assert output_folder(tmp_path) == tmp_path
    (tmp_path / "file").write_text("x", encoding="utf-8")
    (tmp_path / "link").symlink_to("nowhere")
    for path in (
        None,
        "",
        3,
        "a\0b",
        tmp_path / "file",
        tmp_path / "file" / "below",
        "~/link",
        tmp_path / "link" / "a",
    ):
        with pytest.raises(ValueError, match="output_dir="):
            output_folder(path)


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"{", b"\xff", b"[" * 10_000])
def test_damaged_json_is_named(content, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "a.json"))):
        read_json(tmp_path / "a.json")
