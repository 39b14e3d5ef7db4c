"""Recorded tables as Parquet files: what is written opens again, with its provenance."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from datasets import DatasetDict, concatenate_datasets, load_dataset, load_from_disk
from huggingface_hub import DatasetCard

from hf_ibdistill import (
    ViewRecipe,
    attach_record,
    attach_teacher_logits,
    export_logits_table,
    open_logits_table,
    push_logits_to_hub,
    record_teacher_logits,
)
from hf_ibdistill.logits.provenance import read_records


@pytest.fixture(scope="module", params=[None, 2], ids=["dense", "top-k"])
def table(request, teachers, images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("t") / "t"
    return record_teacher_logits(
        images(30), teachers, output_dir=folder, views=ViewRecipe(num_views=2), top_k=request.param
    )


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_types_and_provenance_come_back(table, streaming, tmp_path):
    opened = open_logits_table(export_logits_table(table, tmp_path / "p", rows_per_file=12), streaming=streaming)
    assert opened.features == table.features
    (expected,) = read_records(table)
    for teacher in expected["teachers"]:
        # A path describes a machine, so only its last part is published.
        assert Path(teacher["source"]).is_absolute()
        teacher["source"] = Path(teacher["source"]).name
    assert read_records(opened) == [expected]
    assert [row["conv_logits"] for row in opened] == table["conv_logits"][:]
    assert len(list((tmp_path / "p" / "data").iterdir())) == 3


@pytest.mark.parametrize("split", ["train", "validation"])
def test_datasets_alone_opens_the_rows(table, split, tmp_path):
    folder = export_logits_table(table, tmp_path / "p", rows_per_file=12, split=split)
    assert {path.name for path in folder.iterdir()} == {"data", "provenance.json", "README.md"}
    opened = load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    assert list(opened) == [split] and opened[split].features == table.features
    assert opened[split]["conv_logits"][:] == table["conv_logits"][:]
    assert len(open_logits_table(folder, split=split, cache_dir=str(tmp_path / "cache"))) == 30


def test_a_card_is_written_beside(table, tmp_path):
    card = DatasetCard.load(export_logits_table(table, tmp_path / "p", repo_id="user/logits") / "README.md")
    assert card.data.pretty_name == "Logits of conv, inv" and 'open_logits_table("user/logits")' in card.text
    assert "about 30 images, 2 augmented views of each" in card.text
    assert "attach_teacher_logits" not in card.text
    alone = export_logits_table(table.select_columns(["row_key", "conv_logits"]), tmp_path / "q")
    text = DatasetCard.load(alone / "README.md").text
    assert "attach_teacher_logits(images, table)" in text and "inv" not in text.partition("## Teachers")[2]
    assert 'open_logits_table("path/to/this/folder")' in text


def test_logits_without_images_find_their_images(table, images, tmp_path):
    folder = export_logits_table(table.select_columns(["row_key", "conv_logits"]), tmp_path / "p")
    joined = attach_teacher_logits(images(30), open_logits_table(folder))
    assert joined["conv_logits"][:] == table["conv_logits"][:]


def test_a_folder_is_a_name_and_no_pattern(table, tmp_path):
    # What the name would match as a pattern.
    export_logits_table(table.select(range(3)), tmp_path / "my v z aab {x,y}")
    folder = export_logits_table(
        table.select(range(9)), tmp_path / "my [v2] ? a*b {x,y}", split="validation", rows_per_file=4
    )
    how = {"cache_dir": str(tmp_path / "cache [1]")}
    for streaming in (False, True):
        opened = open_logits_table(folder, split="validation", streaming=streaming, **how)
        assert [row["note"] for row in opened] == table["note"][:9]
    with pytest.raises(ValueError, match="train"):
        open_logits_table(folder)
    # Another file beside them belongs to another split.
    table.select(range(9, 12)).to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    assert len(open_logits_table(folder, split="validation", **how)) == 9
    assert open_logits_table(folder, split="test[:1]", **how)["note"] == ["row 9"]


def test_a_damaged_table_is_neither_exported_nor_published(teachers, images, tmp_path):
    record_teacher_logits(images(20), teachers, output_dir=tmp_path / "t")
    data = tmp_path / "t" / "data-000000000000.arrow"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    damaged = load_from_disk(tmp_path / "t")
    for move in (
        lambda: export_logits_table(damaged, tmp_path / "p"),
        # Before a repository is made.
        lambda: push_logits_to_hub(damaged, "user/logits", token="no"),
        lambda: push_logits_to_hub(damaged.shuffle(seed=0), "user/logits", with_images=True, token="no"),
        lambda: attach_teacher_logits(images(20), damaged),
    ):
        with pytest.raises(ValueError, match=f"damaged.*{data}"):
            move()
    assert not (tmp_path / "p").exists()


def test_what_is_published_has_no_path_of_this_machine(save_teacher, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_teacher("outputs/conv")
    # Windows and Linux read each other's tables.
    recorded = record_teacher_logits(images(10), {"conv": "outputs/conv"}, output_dir="t")
    record = read_records(recorded)[0]
    shutil.rmtree("outputs")
    for source in ("outputs/conv", r"C:\Users\me\conv", r"outputs\conv", "/home/me/conv", "../me/conv"):
        record["teachers"][0]["source"] = source
        attach_record(recorded, record)
        folder = export_logits_table(recorded, tmp_path / f"p{len(list(tmp_path.iterdir()))}")
        text = (folder / "README.md").read_text() + (folder / "provenance.json").read_text()
        for word in ("outputs", "me/", "me\\", str(tmp_path), "huggingface.co/outputs"):
            assert word not in text, (source, word)
        assert json.loads((folder / "provenance.json").read_text())["teachers"][0]["source"] == "conv"


def test_nothing_is_overwritten_and_provenance_is_needed(table, tmp_path):
    folder = export_logits_table(table, tmp_path / "p")
    before = sorted((path.name, path.stat().st_mtime_ns) for path in folder.rglob("*"))
    with pytest.raises(ValueError, match=f"output_dir={folder} is not empty"):
        export_logits_table(table, folder)
    assert sorted((path.name, path.stat().st_mtime_ns) for path in folder.rglob("*")) == before
    record = folder / "provenance.json"
    assert json.loads(record.read_text())["teachers"][0]["name"] == "conv"
    record.unlink()
    with pytest.raises(ValueError, match="has no provenance.json"):
        open_logits_table(folder)
    bare = table.select_columns(["image"])
    bare.info.description = ""
    for dataset, changes, kind, message in (
        (bare, {}, ValueError, "has 0 provenance records"),
        (table.select([]), {}, ValueError, "is empty"),
        (table, {"rows_per_file": 0}, ValueError, "rows_per_file=0"),
        (table, {"rows_per_file": -1}, ValueError, "rows_per_file=-1"),
        (table, {"split": "../train"}, ValueError, 'split="../train"'),
        (DatasetDict({"train": table}), {}, TypeError, "^dataset .*train"),
    ):
        with pytest.raises(kind, match=message):
            export_logits_table(dataset, tmp_path / "q", **changes)
        assert not (tmp_path / "q").exists()


def test_damage_and_missing_parts_are_named(table, images, tmp_path):
    folder = export_logits_table(table, tmp_path / "p")
    for content in (b"{", b"[]", b"{}", b"\xff"):
        (folder / "provenance.json").write_bytes(content)
        with pytest.raises(ValueError, match="provenance.json"):
            open_logits_table(folder)
    for source in (tmp_path / "nowhere", "", None):
        with pytest.raises(ValueError, match=f"{source}.*provenance.json|source="):
            open_logits_table(source)
    joined = concatenate_datasets([table, images(2)])
    with pytest.raises(ValueError, match=r'_logits" .*2 rows \(first \[30, 31\]\)'):
        export_logits_table(joined, tmp_path / "q")
    assert not (tmp_path / "q").exists()


def test_logits_take_fewer_bytes_than_datasets_would_need(table, tmp_path):
    folder = export_logits_table(table, tmp_path / "p")
    (file,) = (folder / "data").iterdir()
    table.to_parquet(tmp_path / "plain.parquet")

    def columns(path):
        group = pq.ParquetFile(path).metadata.row_group(0)
        return {c.path_in_schema: c for c in (group.column(i) for i in range(group.num_columns))}

    written, plain = columns(file), columns(tmp_path / "plain.parquet")
    assert written.keys() == plain.keys()
    logits = [name for name in written if "_logits." in name]
    assert logits and {written[name].compression for name in logits} == {"ZSTD"}
    assert all("BYTE_STREAM_SPLIT" in written[name].encodings for name in logits)
    assert sum(written[n].total_compressed_size for n in logits) < sum(plain[n].total_compressed_size for n in logits)
    # Encoded images are as they were.
    assert written["image.bytes"].compression == "UNCOMPRESSED"
    assert pq.read_schema(file).metadata == pq.read_schema(tmp_path / "plain.parquet").metadata
