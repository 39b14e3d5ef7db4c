"""What a folder of images means: the table in docs/data.md, and random trees against the rules written out once more."""

import collections
import io
import logging
import os
import re
import tempfile
import unicodedata
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_ibdistill import load_image_dataset
from hf_ibdistill.data.folders import open_image_folder
from hf_ibdistill.data.splits import name_splits


# 2,000 were run once; each takes some 20 ms.
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 150))
PAGE = Path(__file__).parents[2] / "docs" / "data.md"
ROWS = [
    (re.findall(r"`([^`]+)`", files), result.strip())
    for files, result in re.findall(
        r"^\| (`[^|]*?\.(?:png|zip|heic)`[^|]*) \|([^|]*)\|$", PAGE.read_text(), re.MULTILINE
    )
]


def png(number=0):
    content = io.BytesIO()
    PIL.Image.fromarray(np.full((4, 4), number % 256, np.uint8)).save(content, "PNG")
    return content.getvalue()


CONTENT = png()


def make_tree(root, files):
    for file in files:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(CONTENT if path.suffix in (".png", "") else b"something else")


def counts(splits):
    """Split → class → number of images, with the classes in their order."""
    found = {}
    for name, split in splits.items():
        feature = split.features["label"]
        number = collections.Counter(split["label"])
        found[name] = {feature.int2str(i): number[i] for i in range(feature.num_classes)}
    return found


def open_folder(root):
    return name_splits(open_image_folder(Path(root)), root)


def test_the_table_is_complete():
    assert len(ROWS) >= 20


@pytest.mark.parametrize(("files", "result"), ROWS, ids=[" ".join(files) for files, _ in ROWS])
def test_each_row_of_the_documented_table(files, result, tmp_path, caplog):
    caplog.set_level(logging.WARNING, "hf_ibdistill")
    make_tree(tmp_path, files)
    if result.startswith("error: "):
        with pytest.raises(ValueError) as refused:
            load_image_dataset(tmp_path, validation_fraction=0.5)
        for word in result.removeprefix("error: ").split(", "):
            assert word in str(refused.value)
        return
    expected = {}
    reports = []
    for part in result.split("; "):
        if part.startswith("reports "):
            reports = part.removeprefix("reports ").split(", ")
            continue
        split, _, classes = part.partition(": ")
        expected[split] = {
            name: int(number) for name, number in (entry.rsplit(" ", 1) for entry in classes.split(", "))
        }
    found = counts(open_folder(tmp_path))
    assert found == expected
    assert [list(classes) for classes in found.values()] == [list(classes) for classes in expected.values()]
    assert bool(caplog.messages) == bool(reports)
    for word in reports:
        assert word.removesuffix("s") in " ".join(caplog.messages)


def test_links_are_read_and_loops_refused(tmp_path):
    root, elsewhere = tmp_path / "set", tmp_path / "elsewhere"
    make_tree(elsewhere, ["horse/1.png", "horse/2.png"])
    make_tree(root, ["cat/1.png"])
    (root / "horse").symlink_to(elsewhere / "horse")
    assert counts(open_folder(root)) == {"train": {"cat": 1, "horse": 2}}
    (root / "cat" / "again").symlink_to(root)
    with pytest.raises(ValueError, match="again"):
        open_folder(root)
    (root / "cat" / "again").unlink()
    (root / "cat" / "gone.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=re.escape("gone.png")):
        open_folder(root)


@pytest.mark.parametrize("name", ["unlabelled", "Unlabeled"])
def test_a_folder_of_images_without_labels_is_no_class(name, tmp_path):
    make_tree(tmp_path, ["cat/1.png", "dog/1.png", f"{name}/1.png"])
    with pytest.raises(ValueError, match=f'"{name}".*unlabelled={name}'):
        open_folder(tmp_path)


def test_composed_and_decomposed_names_are_one_class(tmp_path):
    names = [unicodedata.normalize(form, "café") for form in ("NFC", "NFD")]
    make_tree(tmp_path, [f"train/{names[0]}/1.png", "train/bar/1.png", f"validation/{names[1]}/2.png"])
    found = counts(open_folder(tmp_path))
    assert found == {"train": {"bar": 1, names[0]: 1}, "validation": {"bar": 0, names[0]: 1}}


def test_images_keep_their_classes(tmp_path):
    for number, name in enumerate(["b", "a", "c"]):
        for i in range(3):
            path = tmp_path / name / "sub" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(10 * number + i))
    (split,) = open_folder(tmp_path).values()
    for row in split:
        assert np.asarray(row["image"]).max() // 10 == ["b", "a", "c"].index(
            split.features["label"].int2str(row["label"])
        )


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_metadata_file_names_images_and_labels(kind, tmp_path, caplog):
    make_tree(tmp_path, ["train/x/1.png", "train/2.png", "train/left out.png", "test/1.png"])
    for split, files in {"train": ["x/1.png", "2.png"], "test": ["1.png"]}.items():
        rows = [(file, 10 - i) for i, file in enumerate(files)]
        lines = ["file_name,label", *(f"{file},{label}" for file, label in rows)]
        if kind == "jsonl":
            lines = [f'{{"file_name": "{file}", "label": {label}}}' for file, label in rows]
        (tmp_path / split / f"metadata.{kind}").write_text("\n".join(lines) + "\n")
    splits = open_folder(tmp_path)
    assert splits["train"]["label"][:] == [10, 9] and splits["test"]["label"][:] == [10]
    assert splits["train"][0]["image"].size == (4, 4)
    assert any("1 files" in message and "train" in message for message in caplog.messages)
    (tmp_path / "train" / "2.png").unlink()
    with pytest.raises(ValueError, match=re.escape("2.png")):
        open_folder(tmp_path)


def write_metadata(root, content, encoding="utf-8"):
    root.mkdir(parents=True, exist_ok=True)
    (root / "metadata.csv").write_text(content, encoding=encoding)
    make_tree(root, [line.split(",")[0] for line in content.splitlines() if ".png," in line])
    return root


def test_metadata_in_the_root_divides_by_folders(tmp_path):
    lines = "file_name,label\ntrain/a.png,1\nTest_images/a.png,2\ntrain/b.png,2\n"
    opened = open_folder(write_metadata(tmp_path / "set", lines))
    assert {name: split["label"][:] for name, split in opened.items()} == {"train": [1, 2], "test": [2]}
    with pytest.raises(ValueError, match="row 3 belongs to no split"):
        open_folder(write_metadata(tmp_path / "mixed", lines + "more/a.png,1\n"))


def test_metadata_is_numbers_only_if_all_splits_are(tmp_path):
    cases = [
        (["01", "1"], ["1"], "string"),
        (["1", "2"], ["x"], "string"),
        (["1", "-2"], ["0"], "int64"),
        (["1", "2.5"], ["1e3"], "float64"),
        (["1", "1.50"], ["007"], "string"),
        (["1", "NA"], ["2"], "int64"),
        (["no", "NA"], ["no"], "string"),
        (["1" * 30, "1" * 29 + "2"], ["1" * 30], "string"),
    ]
    for i, (train, test, kind) in enumerate(cases):
        for split, values in (("train", train), ("test", test)):
            lines = ["file_name,label", *(f"{j}.png,{value}" for j, value in enumerate(values))]
            write_metadata(tmp_path / str(i) / split, "\n".join(lines))
        opened = open_folder(tmp_path / str(i))
        assert {split.features["label"].dtype for split in opened.values()} == {kind}
        if kind == "string":
            assert opened["train"]["label"][:] == train


@pytest.mark.parametrize(
    "header, encoding", [("file_name, label", None), ("file_name;label", None), ("file_name,é", "utf-16")]
)
def test_a_metadata_header_that_is_not_clear_is_refused(header, encoding, tmp_path):
    with pytest.raises(ValueError, match=f"metadata.csv (has the columns .*{header.split('e')[-1]}|cannot be read)"):
        open_folder(write_metadata(tmp_path, header + "\n1.png,a\n", encoding))


def test_a_metadata_column_comes_once_and_is_utf8(tmp_path):
    with pytest.raises(ValueError, match="'label', 'label'"):
        open_folder(write_metadata(tmp_path / "twice", "file_name,label,label\n1.png,a,b\n"))
    with pytest.raises(ValueError, match="latin/metadata.csv cannot be read.*UTF8"):
        open_folder(write_metadata(tmp_path / "latin", "file_name,label\n1.png,é\n", "latin-1"))


WORDS = ["train", "Test", "val", "dev", "cat", "dog", "test_tube", "a[b]", "1", "10", "extra"]
FILES = ["1.png", "train.png", "test 2.png", "3", "note.txt"]
paths = st.lists(st.sampled_from(WORDS), max_size=3).flatmap(
    lambda folders: st.sampled_from(FILES).map(lambda file: "/".join([*folders, file]))
)
SPLITS = {"train": "train", "Test": "test", "val": "validation", "dev": "validation"}


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(st.lists(paths, min_size=1, max_size=8, unique=True))
def test_random_trees_are_read_by_the_rules_or_refused(files):
    """The rules once more, from the list of files alone: every image is in the class that the rules give it, or an error
    or a report accounts for it."""
    # A file cannot have the name of a folder.
    folders = {"/".join(file.split("/")[:i]) for file in files for i in range(1, len(file.split("/")))}
    files = [file for file in files if file not in folders]
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("hf_ibdistill")
    logger.addHandler(handler)
    try:
        with tempfile.TemporaryDirectory() as root:
            make_tree(Path(root), files)
            try:
                found = counts(open_folder(root))
            except ValueError as error:
                assert str(error)
                return
            finally:
                logger.removeHandler(handler)
    finally:
        logger.removeHandler(handler)
    tops = {file.split("/")[0] for file in files if "/" in file}
    splits = {
        top
        for top in tops
        if top in SPLITS and any(file.startswith(f"{top}/") and file.count("/") > 1 for file in files)
    }
    expected, left_out = collections.Counter(), 0
    for file in files:
        parts = file.split("/")
        is_image = os.path.splitext(file)[1] != ".txt"
        if splits and parts[0] in splits and len(parts) > 2:
            expected[SPLITS[parts[0]], parts[1]] += is_image
            left_out += not is_image
        elif not splits and len(parts) > 1:
            expected["train", parts[0]] += is_image
            left_out += not is_image
        else:
            left_out += 1
    found = {(split, name): number for split, classes in found.items() for name, number in classes.items() if number}
    assert found == {key: number for key, number in expected.items() if number}
    assert bool(messages) == bool(left_out)
