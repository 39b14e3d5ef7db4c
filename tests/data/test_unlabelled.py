"""Images without labels: added to the training split alone, and never ones that results are measured on."""

import numpy as np
import PIL.Image
import pytest
from datasets import Dataset, DatasetDict, Features, Image, Value
from numbered import NAMED, cell, numbers, picture, save, table, write_class_folders

from hf_ibdistill import load_image_dataset
from hf_ibdistill.commands.arguments import MixedDataArguments
from hf_ibdistill.data.classes import label_ids


@pytest.fixture
def labelled(tmp_path):
    return save(tmp_path, train=table([0, 1, 2] * 4), validation=table([0, 1], start=50), test=table([2, 1], start=60))


def of_images(found, name="image"):
    return Dataset.from_dict({name: [cell(number) for number in found]}, features=Features({name: Image()}))


def write_folder(root, found):
    for number in found:
        path = root / f"{number % 3}" / "deep" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(path)
    return root


def check(splits, found):
    """The rows after the 12 labelled ones are these pictures, without labels; the other splits are as they were."""
    assert numbers(splits["train"]) == [*range(12), *found]
    assert label_ids(splits["train"]).tolist() == [0, 1, 2] * 4 + [-1] * len(found)
    assert splits["train"].features["label"] == NAMED
    assert numbers(splits["validation"]) == [50, 51] and numbers(splits["test"]) == [60, 61]
    # No label is shown, whatever reads it.
    assert all(label in (None, -1) for label in splits["train"]["label"][12:])


def test_a_folder_of_images_at_any_depth(labelled, tmp_path, caplog):
    folder = write_folder(tmp_path / "more", [100, 101, 102, 103])
    (folder / "notes.txt").write_text("none")
    splits = load_image_dataset(labelled, unlabelled=folder)
    check(splits, [102, 100, 103, 101])
    assert "adds 4 images without labels to 12 training images" in caplog.text and "1 with .txt" in caplog.text


def test_reading_more_images_copies_no_more_class_names(labelled, feature_copies):
    counts = set()
    for number in (10, 60):
        feature_copies.clear()
        load_image_dataset(labelled, unlabelled=of_images(range(100, 100 + number)))
        counts.add(len(feature_copies))
    assert len(counts) == 1, counts


def test_a_table_a_stream_and_other_sources(labelled, tmp_path, caplog):
    found = [100, 101, 102]
    other = of_images(found, "photo")
    check(load_image_dataset(labelled, unlabelled=other), found)
    check(load_image_dataset(labelled, unlabelled=other.to_iterable_dataset()), found)
    check(load_image_dataset(labelled, unlabelled=other.to_iterable_dataset().filter(lambda row: True)), found)
    other.to_parquet(tmp_path / "photos.parquet")
    check(load_image_dataset(labelled, unlabelled=tmp_path / "photos.parquet"), found)
    others = table([0], start=7)
    source = save(tmp_path / "splits", unlabeled=other, extra=others)
    check(load_image_dataset(labelled, unlabelled=source), found)
    assert "splits extra (1 rows) are left out" in caplog.text
    with pytest.raises(ValueError, match="has the splits test, extra"):
        load_image_dataset(labelled, unlabelled=save(tmp_path / "more splits", test=other, extra=others))
    with pytest.raises(TypeError, match="unlabelled is a DatasetDict"):
        load_image_dataset(labelled, unlabelled=DatasetDict(train=other))
    assert "has labels" not in caplog.text


def test_a_recording_leaves_out_broken_images_if_it_may(labelled, tmp_path, caplog):
    broken = write_folder(tmp_path / "more", [100, 101])
    (broken / "broken.png").write_bytes(b"none")
    arguments = MixedDataArguments(dataset=str(labelled), unlabelled=str(broken))
    with pytest.raises(ValueError, match="1 images that cannot be decoded"):
        arguments.load()
    assert len(arguments.load(skip_unreadable=True)["train"]) == 15
    assert "has 1 images that cannot be decoded" in caplog.text


def test_labels_of_the_source_are_left_out_and_reported(labelled, caplog):
    check(load_image_dataset(labelled, unlabelled=table([0, 1], start=100)), [100, 101])
    assert "unlabelled=Dataset has labels" in caplog.text


def test_other_columns_are_empty_in_the_new_rows(tmp_path):
    train = table([0, 1, 2] * 2).add_column("note", list("abcdef"))
    splits = load_image_dataset(save(tmp_path, train=train, validation=train), unlabelled=of_images([90]))
    assert splits["train"]["note"][:] == [*"abcdef", None]


def test_rows_are_held_out_of_the_labelled_ones_alone(tmp_path):
    source = save(tmp_path, train=table([0, 1, 2] * 10))
    splits = load_image_dataset(source, unlabelled=of_images(range(100, 160)), validation_fraction=0.2)
    assert sorted(splits["validation"]["label"][:]) == [0, 0, 1, 1, 2, 2]
    assert sorted(numbers(splits["train"]) + numbers(splits["validation"])) == [*range(30), *range(100, 160)]


@pytest.mark.parametrize(
    ("found", "message"),
    [([100, 51, 60, 61], "3 images .*1 in the validation split, 2 in the test"), ([50], "1 images")],
)
def test_images_to_measure_on_are_refused(found, message, labelled):
    with pytest.raises(ValueError, match=message):
        load_image_dataset(labelled, unlabelled=of_images(found))


def test_the_same_pixels_in_another_file_are_refused(labelled, tmp_path):
    picture(60).save(tmp_path / "copy.bmp")
    (tmp_path / "more").mkdir()
    (tmp_path / "copy.bmp").rename(tmp_path / "more" / "copy.bmp")
    with pytest.raises(ValueError, match="1 images .*test split"):
        load_image_dataset(labelled, unlabelled=tmp_path / "more")


def test_a_held_out_image_is_refused_as_well(tmp_path):
    """The pool that the labelled images came from holds the validation images that were drawn from them."""
    source = save(tmp_path, train=table([0, 1, 2] * 10))
    with pytest.raises(ValueError, match="6 images .*6 in the validation split"):
        load_image_dataset(source, unlabelled=of_images(range(30)), validation_fraction=0.2)


def test_wrong_sources_are_refused(labelled, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "a.txt").write_text("none")
    with pytest.raises(ValueError, match="empty.*no image.*1 files with .txt"):
        load_image_dataset(labelled, unlabelled=empty)
    with pytest.raises(ValueError, match="unlabelled=Dataset holds no image"):
        load_image_dataset(labelled, unlabelled=of_images([100]).select([]))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_image_dataset(labelled, unlabelled=tmp_path / "nowhere")
    with pytest.raises(TypeError, match="unlabelled is a int"):
        load_image_dataset(tmp_path / "not opened", unlabelled=3)
    write_class_folders(tmp_path / "tree" / "train", start=100)
    write_class_folders(tmp_path / "tree" / "Test", start=200)
    with pytest.raises(ValueError, match="split folders Test"):
        load_image_dataset(labelled, unlabelled=tmp_path / "tree")
    broken = Dataset.from_dict({"image": [{"path": None, "bytes": b"none"}]}, features=Features({"image": Image()}))
    with pytest.raises(ValueError, match="unlabelled=Dataset has 1 images that cannot be decoded.*Row 0"):
        load_image_dataset(labelled, unlabelled=broken)
    no_image = Dataset.from_dict({"number": [1]}, features=Features({"number": Value("int64")}))
    with pytest.raises(ValueError, match="unlabelled=Dataset.*no image column.*number"):
        load_image_dataset(labelled, unlabelled=no_image)


def test_other_columns_of_the_source_do_not_matter(labelled):
    other = of_images([100, 101], "photo").add_column("image", ["a", "b"]).add_column("label", [[1], [2]])
    check(load_image_dataset(labelled, unlabelled=other.add_column("class", [0, 1])), [100, 101])
    check(load_image_dataset(labelled, unlabelled=other.to_iterable_dataset()), [100, 101])


def test_images_with_labels_that_cannot_be_decoded_are_left_to_whoever_reads_them(tmp_path, caplog):
    parts = {split: table([0, 1, 2], start=start) for split, start in (("train", 0), ("validation", 50), ("test", 60))}
    for split in ("train", "validation"):
        cells = [{"path": None, "bytes": b"none"}, *map(cell, numbers(parts[split])[1:])]
        parts[split] = Dataset.from_dict({**parts[split][:], "image": cells}, features=parts[split].features)
    source = save(tmp_path, **parts)
    assert len(load_image_dataset(source, unlabelled=of_images([100]))["train"]) == 4
    assert '1 images of the split "validation" cannot be decoded' in caplog.text and "Row 0" in caplog.text
    with pytest.raises(ValueError, match="2 images .*1 in the validation split, 1 in the test"):
        load_image_dataset(source, unlabelled=of_images([51, 60]))


def test_float_images_are_scaled_like_those_with_labels(tmp_path):
    random = np.random.default_rng(0)
    for folder in ("in/cat", "in/dog", "more"):
        (tmp_path / folder).mkdir(parents=True)
        for i in range(4):
            PIL.Image.fromarray(random.random((4, 4), dtype=np.float32)).save(tmp_path / folder / f"{i}.tiff")
    sources = {"dataset": str(tmp_path / "in"), "unlabelled": str(tmp_path / "more")}
    train = MixedDataArguments(**sources, pixel_range=[0.0, 0.5]).load()["train"]
    for i, image in enumerate(train["image"][-4:]):
        with PIL.Image.open(tmp_path / "more" / f"{i}.tiff") as levels:
            expected = 255 * np.clip(np.asarray(levels) / 0.5, 0, 1)
        assert np.abs(np.asarray(image.convert("L")) - expected).max() <= 0.51


@pytest.mark.parametrize(("mode", "size"), [("L", (2, 2)), ("RGB", (5, 7))])
def test_other_colors_and_sizes_are_reported(mode, size, labelled, tmp_path, caplog):
    folder = tmp_path / "more"
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(3):
        levels = random.integers(256, size=(size[1], size[0], 3), dtype=np.uint8)
        PIL.Image.fromarray(levels).convert(mode).save(folder / f"{i}.png")
    train = load_image_dataset(labelled, unlabelled=folder)["train"]
    assert len(train) == 15 and train[14]["image"].size == size
    assert ("gray" in caplog.text) == (mode == "L") and ("5×7 instead of 2×2" in caplog.text) == (size == (5, 7))
