"""Folders of users stay as they are: whatever reads a saved table leaves no file beside it."""

import copy

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Value, load_from_disk

from hf_ibdistill import (
    ImageClassificationTrainer,
    ImageTrainingArguments,
    attach_teacher_logits,
    class_config,
    evaluate_model,
    export_logits_table,
    load_image_dataset,
    logits_metrics,
    record_teacher_logits,
    select_per_class,
    verify_teacher_logits,
)


@pytest.fixture
def kept(tmp_path):
    """Folders whose files and times must be the same at the end."""
    folders, before = [], {}

    def listing(folder):
        return {path.relative_to(folder): path.stat().st_mtime_ns for path in folder.rglob("*")}

    def keep(folder):
        folders.append(folder)
        before[folder] = listing(folder)
        return folder

    yield keep
    assert folders
    for folder in folders:
        assert listing(folder) == before[folder]


def save(table, folder, kept):
    table.save_to_disk(folder)
    return kept(folder)


@pytest.mark.parametrize("labels", ["classes", "texts", "few"])
def test_opening_a_saved_table(labels, images, kept, tmp_path):
    table = images(5 if labels == "few" else 30)
    names = table.features["label"].names
    if labels == "texts":
        texts = [names[label] for label in table["label"]]
        table = table.remove_columns("label").add_column("label", texts, feature=Value("string"))
    splits = DatasetDict(train=table, test=table.select([2, 1, 0]))
    opened = load_image_dataset(save(splits, tmp_path / "t", kept))
    assert opened.keys() == {"train", "validation", "test"} and opened["test"].features["label"].names == names
    assert opened["test"]["label"][:] == [2, 1, 0] and opened["test"]["note"][:] == ["row 2", "row 1", "row 0"]
    notes = sorted(int(note[4:]) for name in ("train", "validation") for note in opened[name]["note"])
    assert notes == list(range(len(table)))
    if labels != "few":
        assert len(select_per_class(opened["train"], 3)) == 9


def test_recording_attaching_and_reading(images, loaded, kept, tmp_path):
    rows = save(images(24), tmp_path / "rows", kept)
    teachers = {"conv": loaded["conv"]}
    chosen = load_from_disk(rows).shuffle(seed=0, keep_in_memory=True).select(range(16))
    table = record_teacher_logits(chosen, teachers, output_dir=tmp_path / "t")
    assert sorted(table["note"]) == sorted(chosen["note"])
    assert len(list((tmp_path / "t").iterdir())) == 4
    folder = kept(tmp_path / "t")
    assert len(record_teacher_logits(chosen, teachers, output_dir=folder)) == 16
    assert verify_teacher_logits(load_from_disk(folder), teachers).problems == []
    assert logits_metrics(load_from_disk(folder))["conv_entropy"] > 0
    exported = export_logits_table(load_from_disk(folder).shuffle(seed=1, keep_in_memory=True), tmp_path / "exported")
    kept(exported)
    for given in (load_from_disk(rows), load_from_disk(rows).select([5, 3, 1])):
        joined = attach_teacher_logits(given, load_from_disk(folder), skip_missing=True)
        expected = dict(zip(table["note"], table["conv_logits"]))
        assert len(joined) > 0 and dict(zip(joined["note"], joined["conv_logits"])).items() <= expected.items()


def test_a_finished_recording_of_several_splits_is_returned_as_it_is(images, loaded, kept, tmp_path):
    splits = DatasetDict(train=images(8), test=images(4))
    record_teacher_logits(splits, {"conv": loaded["conv"]}, output_dir=tmp_path / "t")
    kept(tmp_path / "t")
    again = record_teacher_logits(splits, {"conv": loaded["conv"]}, output_dir=tmp_path / "t")
    assert {name: len(split) for name, split in again.items()} == {"train": 8, "test": 4}


def test_training_and_measuring(images, loaded, kept, tmp_path):
    rows = load_from_disk(save(images(12), tmp_path / "rows", kept))
    model, processor = copy.deepcopy(loaded["conv"])
    assert class_config(rows)["num_labels"] == 3
    assert 0 <= evaluate_model(model, processor, rows)["accuracy"] <= 1
    args = ImageTrainingArguments(
        str(tmp_path / "out"), max_steps=1, report_to="none", disable_tqdm=True, use_cpu=True
    )
    args.save_strategy = "no"
    train = rows.select(np.arange(12)[::-1])
    ImageClassificationTrainer(model, args, train_dataset=train, eval_dataset=rows, processing_class=processor).train()


def test_a_saved_table_is_opened_by_its_labels_alone(images, tmp_path, monkeypatch):
    DatasetDict(train=images(30), test=images(6)).save_to_disk(tmp_path / "t")
    read, query = [], Dataset._getitem

    def spy(table, key, **kwargs):
        found = query(table, key, **kwargs)
        read.append((table.column_names, len(table)))
        return found

    monkeypatch.setattr(Dataset, "_getitem", spy)
    load_image_dataset(tmp_path / "t")
    assert read and all(columns == ["label"] for columns, _ in read)
    # However many rows there are, a split is read a few times and not once a row.
    assert len(read) <= 8
