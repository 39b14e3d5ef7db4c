"""Streams of Hub ids and Parquet files, opened by name."""

import pytest
from datasets import Value
from small import make_images

from hf_ibdistill import load_image_dataset


@pytest.fixture
def folder(tmp_path):
    for split, rows in {"train": range(20), "test": range(20, 26)}.items():
        (tmp_path / "data").mkdir(exist_ok=True)
        table = make_images(26).select(rows).rename_columns({"image": "photo", "label": "animal"})
        table.to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    return tmp_path / "data"


def test_parquet_files_as_streams(folder, caplog):
    splits = load_image_dataset(folder, streaming=True)
    assert {*splits} == {"train", "test"} and "no validation split" in caplog.text
    expected = load_image_dataset(folder, validation_fraction=0.05)
    assert splits["train"].features["label"] == expected["train"].features["label"]
    assert [row["note"] for row in splits["train"]] == [f"row {number}" for number in range(20)]


def test_what_a_stream_cannot_do_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="unlabelled='x' needs a table"):
        load_image_dataset(folder, streaming=True, unlabelled="x")
    for source in ("digits", tmp_path / "saved"):
        make_images(6).save_to_disk(tmp_path / "saved")
        with pytest.raises(ValueError, match="streaming=True does not apply"):
            load_image_dataset(source, streaming=True)
    make_images(6).cast_column("label", Value("int64")).to_parquet(tmp_path / "plain.parquet")
    with pytest.raises(ValueError, match="label column is .*int64.*without class names"):
        load_image_dataset(tmp_path / "plain.parquet", streaming=True)
