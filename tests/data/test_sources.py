"""Sources: every format on disk. Folders of images are in test_folders.py, the digits in test_loading.py."""

import gzip
import shutil
import struct

import numpy as np
import pytest
from datasets import ClassLabel, DatasetDict, Value
from numbered import ANIMALS, numbers, save, table, write_class_folders
from torchvision.datasets.mnist import read_image_file

from hf_ibdistill.data.sources import open_source, public_name


def contents(splits):
    """Split → (number of the picture, label) of its rows, in their order."""
    return {name: list(zip(numbers(split), split["label"])) for name, split in splits.items()}


# Tables


def test_saved_tables(tmp_path):
    table([0, 1, 2]).save_to_disk(tmp_path / "one")
    assert contents(open_source(tmp_path / "one", {})) == {"train": [(0, 0), (1, 1), (2, 2)]}
    source = save(tmp_path, train=table([0, 1, 2]), val=table([2, 1], start=10), testing=table([0], start=20))
    assert contents(open_source(str(source), {})) == {
        "train": [(0, 0), (1, 1), (2, 2)],
        "val": [(10, 2), (11, 1)],
        "testing": [(20, 0)],
    }


@pytest.mark.parametrize("shards", [None, {"train": 1, "test": 1}], ids=["no file", "an empty file"])
def test_an_empty_saved_split_is_named(shards, tmp_path):
    # By default `save_to_disk` writes no file at all for a split without rows.
    parts = DatasetDict(train=table([0, 1]), test=table([0]).select([]))
    parts.save_to_disk(tmp_path / "data", num_shards=shards)
    if shards is not None:
        assert len(open_source(tmp_path / "data", {})["test"]) == 0  # which `name_splits` refuses
        return
    with pytest.raises(ValueError, match='"test" of .*data is empty'):
        open_source(tmp_path / "data", {})


def test_parquet_files(tmp_path):
    rows = table([0, 1, 2])
    rows.to_parquet(tmp_path / "animals.parquet")
    opened = open_source(tmp_path / "animals.parquet", {})
    assert contents(opened) == {"train": [(0, 0), (1, 1), (2, 2)]}
    assert opened["train"].features == rows.features

    (tmp_path / "data").mkdir()
    for start, name in ((0, "train"), (10, "validation"), (20, "test")):
        file = tmp_path / "data" / f"{name}-00000-of-00001.parquet"
        table(["owl", "cat"], Value("string"), start).to_parquet(file)
    assert contents(open_source(tmp_path / "data", {})) == {
        "train": [(0, "owl"), (1, "cat")],
        "validation": [(10, "owl"), (11, "cat")],
        "test": [(20, "owl"), (21, "cat")],
    }


def test_a_folder_of_images(tmp_path):
    for start, name in ((0, "train"), (100, "test")):
        write_class_folders(tmp_path / "data" / name, start=start)
    opened = open_source(tmp_path / "data", {})
    assert {name: sorted(rows) for name, rows in contents(opened).items()} == {
        name: [(start + 10 * label + i, label) for label in range(3) for i in range(2)]
        for start, name in ((0, "train"), (100, "test"))
    }
    assert opened["test"].features["label"].names == ANIMALS


def test_a_saved_table_that_is_not_whole_is_named(tmp_path):
    source = save(tmp_path, train=table([0, 1, 2]), test=table([0]))
    for name in ("dataset_dict.json", "train/state.json", "test/dataset_info.json", "test/data-00000-of-00001.arrow"):
        content = (source / name).read_bytes()
        for part in (content[: len(content) // 2], None):
            if part is not None:
                (source / name).write_bytes(part)
            elif name != "dataset_dict.json":
                (source / name).unlink()
            with pytest.raises(ValueError, match=f"{source} cannot be opened as a saved table"):
                open_source(source, {})
        (source / name).write_bytes(content)
    assert open_source(source, {}).keys() == {"train", "test"}


def test_what_is_not_read_is_named_with_its_number(tmp_path, caplog):
    source = save(tmp_path, train=table([0, 1, 2]))
    table([1]).save_to_disk(source / "test")
    open_source(source, {})
    assert "1 files that dataset_dict.json does not name are left out (test)" in caplog.text

    rows = table([0, 1, 2])
    for name in ("train.parquet", "test.PARQUET", "metadata.csv", "deep/photo.jpg", "elsewhere/more.parquet"):
        (tmp_path / "p" / name).parent.mkdir(parents=True, exist_ok=True)
        rows.to_parquet(tmp_path / "p" / name)
    (tmp_path / "p" / "elsewhere").rename(tmp_path / "linked")
    (tmp_path / "p" / "val").symlink_to(tmp_path / "linked")
    opened = open_source(tmp_path / "p", {})
    assert {name: len(split) for name, split in opened.items()} == {"train": 3, "test": 3, "validation": 3}
    assert "2 files beside the Parquet files are left out (photo.jpg, metadata.csv)" in caplog.text

    (tmp_path / "idx").mkdir()
    write_idx_folder(tmp_path / "idx", train=6)
    for name in ("extra-images-idx3-ubyte", "LICENSE", ".DS_Store"):
        (tmp_path / "idx" / name).write_bytes(b"")
    open_source(tmp_path / "idx", {})
    assert "2 files beside the IDX files are left out (LICENSE, extra-images-idx3-ubyte)" in caplog.text


def test_an_unfinished_recording_is_no_dataset(tmp_path):
    for folder in (tmp_path, tmp_path / "train"):
        folder.mkdir(exist_ok=True)
        (folder / "recording.json").write_text("{}")
        with pytest.raises(ValueError, match=f"{folder} holds a recording that is not finished"):
            open_source(tmp_path, {})
        (folder / "recording.json").unlink()


@pytest.mark.parametrize("name", ["my [v2] set", "what? a*b {x,y}"])
def test_a_folder_is_a_name_and_no_pattern(name, tmp_path):
    for other in ("my v set", "whatx aab x"):
        (tmp_path / other).mkdir()
        table([2, 2]).to_parquet(tmp_path / other / "train.parquet")
    (tmp_path / name).mkdir()
    table([0, 1]).to_parquet(tmp_path / name / "train.parquet")
    table([0, 1]).save_to_disk(tmp_path / name / "saved")
    write_class_folders(tmp_path / name / "images")
    expected = {"train": [(0, 0), (1, 1)]}
    assert contents(open_source(tmp_path / name / "train.parquet", {})) == expected
    assert contents(open_source(tmp_path / name / "saved", {})) == expected
    assert len(open_source(tmp_path / name / "images", {})["train"]) == 6
    for path in (tmp_path / name / "images", tmp_path / name / "saved"):
        shutil.rmtree(path)
    assert contents(open_source(tmp_path / name, {})) == expected


def write_parquet(root, **files):
    """Name with __ for / → a table."""
    for name, rows in files.items():
        path = root / (name.replace("__", "/") + ".parquet")
        path.parent.mkdir(parents=True, exist_ok=True)
        rows.to_parquet(path)
    return root


@pytest.mark.parametrize(
    "train, test",
    [
        ("default__train__0000", "default__test__0000"),
        ("data__train__a", "data__TEST__a"),
        ("mnist_train", "mnist_test"),
        ("train_mnist", "test_mnist"),
        ("mnistTrain", "mnistTest"),
        ("traindata", "testdata"),
        ("partial-train__0", "hold-out__0"),
    ],
)
def test_split_words_below_the_root_decide(train, test, tmp_path):
    write_parquet(tmp_path, **{train: table([0, 1]), test: table([2], start=50)})
    assert contents(open_source(tmp_path, {})) == {"train": [(0, 0), (1, 1)], "test": [(50, 2)]}
    test_file = tmp_path / (test.replace("__", "/") + ".parquet")
    if "test" in test_file.stem.lower():
        assert open_source(test_file, {}).keys() == {"test"}


@pytest.mark.parametrize("names", [("train", "more"), ("a__train", "b__more"), ("train__test", "train__a")])
def test_files_whose_split_is_not_clear_are_refused(names, tmp_path):
    write_parquet(tmp_path, **{name: table([0, 1]) for name in names})
    with pytest.raises(ValueError, match=names[0].split("__")[-1] + r"\.parquet"):
        open_source(tmp_path, {})


def test_each_parquet_split_keeps_its_own_classes(tmp_path):
    other = ClassLabel(names=ANIMALS[::-1])
    write_parquet(
        tmp_path, train=table([0, 1, 2]), test=table([0, 0], other), validation=table(["owl"], Value("string"))
    )
    opened = open_source(tmp_path, {})
    assert opened["train"].features["label"].names == ANIMALS and opened["test"].features["label"] == other
    assert opened["validation"]["label"][:] == ["owl"]


def test_parquet_files_of_one_split_are_alike(tmp_path):
    for i, second in enumerate(
        (
            table([1], ClassLabel(names=ANIMALS[::-1])),
            table(["cat"], Value("string")),
            table([1], Value("int64")),
            table([1]).remove_columns("label"),
        )
    ):
        root = write_parquet(tmp_path / str(i), **{"train-0": table([0, 1]), "train-1": second})
        with pytest.raises(ValueError, match=r'"label" .*"train" .*train-0\.parquet.*train-1\.parquet'):
            open_source(root, {})


def test_a_parquet_file_that_is_not_whole_is_named(tmp_path):
    write_parquet(tmp_path, train=table([0, 1]), test=table([0]))
    file = tmp_path / "test.parquet"
    whole = file.read_bytes()
    for content in (b"", whole[:-20], whole[20:-8], b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"test\.parquet is not a whole Parquet file"):
            open_source(tmp_path, {})
    # The footer is whole, the columns are not.
    footer = int.from_bytes(whole[-8:-4], "little") + 8
    file.write_bytes(bytes(len(whole) - footer) + whole[-footer:])
    with pytest.raises(ValueError, match='"test" in .*test.parquet'):
        open_source(tmp_path, {})
    table([0]).select([]).to_parquet(file)
    with pytest.raises(ValueError, match=r'"test" in .*test\.parquet is empty'):
        open_source(tmp_path, {})


def test_arguments_that_would_be_ignored_are_refused(tmp_path):
    write_class_folders(tmp_path / "images")
    table([0, 1]).save_to_disk(tmp_path / "saved")
    write_parquet(tmp_path / "parquet", train=table([0, 1, 2]), test=table([0], start=9))
    (tmp_path / "idx").mkdir()
    write_idx_folder(tmp_path / "idx", train=6)
    for source in ("digits", *(tmp_path / name for name in ("images", "saved", "parquet", "idx"))):
        for name in ("revision", "name", "data_files", "data_dir", *["split"] * ("parquet" not in str(source))):
            with pytest.raises(ValueError, match=f"{name}='x' .*{source}"):
                open_source(source, {name: "x"})
    assert contents(open_source(tmp_path / "parquet", {"split": "train[:1]"})) == {"train": [(0, 0)]}
    for wrong in ({"split": ["train"]}, {"split": "train+test"}, {"split": 3}, {"nothing": 1}):
        with pytest.raises(ValueError, match="split|nothing"):
            open_source(tmp_path / "parquet", wrong)


@pytest.mark.parametrize("kind", [Value("string"), ClassLabel(names=["train", "test"])])
def test_a_column_named_split_divides_a_table(kind, tmp_path):
    rows = table([0, 1, 2]).add_column("split", ["train", "test", "train"])
    rows.cast_column("split", kind).save_to_disk(tmp_path / "saved")
    assert contents(open_source(tmp_path / "saved", {})) == {"train": [(0, 0), (2, 2)], "test": [(1, 1)]}
    for i, values in enumerate((["train", "test", "unknown"], ["train", None, "test"])):
        table([0, 1, 2]).add_column("split", values).save_to_disk(tmp_path / str(i))
        with pytest.raises(ValueError, match='"split".*row . belongs to no split'):
            open_source(tmp_path / str(i), {})
    table([0, 1, 2]).add_column("split", ["a", "b", "a"]).save_to_disk(tmp_path / "other")
    assert len(open_source(tmp_path / "other", {})["train"]) == 3


# IDX files


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(struct.pack(">I", length) for length in array.shape)
    with (gzip.open if path.suffix == ".gz" else open)(path, "wb") as file:
        file.write(header + array.astype(np.uint8).tobytes())


def write_idx_folder(folder, suffix="", **counts):
    """prefix → number of images."""
    random, arrays = np.random.default_rng(0), {}
    for prefix, count in counts.items():
        arrays[prefix] = random.integers(0, 256, (count, 5, 4)), np.arange(count) % 3
        for array, part in zip(arrays[prefix], ("images-idx3-ubyte", "labels-idx1-ubyte")):
            write_idx(folder / f"{prefix}-{part}{suffix}", array)
    return arrays


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files(suffix, tmp_path):
    arrays = write_idx_folder(tmp_path, suffix, train=20, t10k=9)
    opened = open_source(tmp_path, {})
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images, labels = arrays[prefix]
        assert opened[split]["label"][:] == labels.tolist()
        np.testing.assert_array_equal([np.asarray(image) for image in opened[split]["image"]], images)
    assert opened.keys() == {"train", "test"}


def test_idx_files_as_torchvision_reads_them(tmp_path):
    write_idx_folder(tmp_path, train=12)
    expected = read_image_file(str(tmp_path / "train-images-idx3-ubyte")).numpy()
    opened = open_source(tmp_path, {})
    assert opened.keys() == {"train"}
    np.testing.assert_array_equal([np.asarray(image) for image in opened["train"]["image"]], expected)


def test_damaged_idx_files_are_named(tmp_path):
    write_idx_folder(tmp_path, train=12)
    images, labels = tmp_path / "train-images-idx3-ubyte", tmp_path / "train-labels-idx1-ubyte"
    whole = images.read_bytes()
    for content in (b"", whole[:2], b"PNG" + whole, whole[:-1], whole + b"x"):
        images.write_bytes(content)
        with pytest.raises(ValueError, match="train-images-idx3-ubyte is not a whole IDX file"):
            open_source(tmp_path, {})
    images.write_bytes(whole)
    write_idx(labels, np.arange(11))
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte .*\(12, 5, 4\).*train-labels-idx1-ubyte.*\(11,\)"):
        open_source(tmp_path, {})
    labels.unlink()
    with pytest.raises(ValueError, match="train-images-idx3-ubyte and train-labels-idx1-ubyte"):
        open_source(tmp_path, {})


@pytest.mark.parametrize("form", ["train-images.idx3-ubyte", "train-images-idx3-ubyte/train-images-idx3-ubyte"])
def test_idx_files_as_kaggle_has_them(form, tmp_path):
    images, _ = write_idx_folder(tmp_path, train=6)["train"]
    for file in [*tmp_path.iterdir()]:
        content = file.read_bytes()
        file.unlink()
        part = form.replace("images", "labels").replace("idx3", "idx1") if "labels" in file.name else form
        (tmp_path / part).parent.mkdir(exist_ok=True)
        (tmp_path / part).write_bytes(content)
    np.testing.assert_array_equal([np.asarray(image) for image in open_source(tmp_path, {})["train"]["image"]], images)


# Paths


@pytest.mark.parametrize("source", ["imagefolder", "csv", "parquet", "webdataset", "", " "])
def test_a_format_or_no_name_does_not_open_the_working_folder(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_class_folders(tmp_path / "data")
    with pytest.raises(ValueError, match=f"source='{source}'"):
        open_source(source, {})


def test_names_that_are_not_utf8_and_links_to_themselves_are_refused(tmp_path):
    write_class_folders(tmp_path)
    try:
        (tmp_path / "cat" / "caf\udce9.png").write_bytes(b"")
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    for source in (tmp_path, tmp_path / "caf\udce9"):
        with pytest.raises(ValueError, match=r"caf\\udce9.* UTF-8"):
            open_source(source, {})
    (tmp_path / "cat" / "caf\udce9.png").unlink()
    for folder in (tmp_path, tmp_path / "cat"):
        (folder / "loop").symlink_to("loop")
        with pytest.raises(ValueError, match="loop"):
            open_source(tmp_path, {})
        (folder / "loop").unlink()


@pytest.mark.parametrize("source", ["{tmp}/nothing", "./nothing", "some/where/else"])
def test_a_path_to_nothing_is_named(source, tmp_path):
    source = source.format(tmp=tmp_path)
    with pytest.raises(FileNotFoundError, match=source):
        open_source(source, {})


def test_a_file_of_another_format_is_named(tmp_path):
    (tmp_path / "data.csv").write_text("image,label\n")
    with pytest.raises(ValueError, match=r"data\.csv .*\.parquet"):
        open_source(tmp_path / "data.csv", {})


def test_a_card_shows_no_path_of_this_machine(tmp_path, monkeypatch):
    (tmp_path / "pets").mkdir()
    monkeypatch.chdir(tmp_path)
    assert (
        public_name(tmp_path / "pets") == public_name("pets") == public_name("../" + tmp_path.name + "/pets") == "pets"
    )
    assert public_name(tmp_path / "gone") == "gone"
    assert public_name("user/pets") == "user/pets" and public_name("digits") == "digits"
    for gone in (r"C:\Users\me\gone", r"data\gone", "./gone", "~/gone", "a/b/gone", "/home/me/gone"):
        assert public_name(gone) == "gone"
