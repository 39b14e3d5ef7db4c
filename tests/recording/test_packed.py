"""Packed logits through recording, further views, verification, publishing and training."""

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Value

from hf_ibdistill import (
    DistillationArguments,
    EnsembleDistillationTrainer,
    IBViTConfig,
    IBViTForImageClassification,
    ViewRecipe,
    build_image_processor,
    export_logits_table,
    load_teachers,
    open_logits_table,
    record_teacher_logits,
    verify_rows,
    verify_teacher_logits,
)
from hf_ibdistill.logits.encoding import LogitsEncoding, StoredLogits, decode, describe_column
from hf_ibdistill.logits.provenance import attach_record, only_record


CLASSES = [f"class {i}" for i in range(40)]
TWO, FIVE = (ViewRecipe(num_views=count, horizontal_flip=0.5) for count in (2, 5))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, save_teacher):
    folder = save_teacher(tmp_path_factory.mktemp("teacher"), names=CLASSES)
    (loaded,) = load_teachers({"conv": folder})
    return {"conv": (loaded.model, loaded.image_processor)}


@pytest.fixture(scope="module")
def photos(images):
    return images(12).cast_column("label", Value("int64")).cast_column("label", ClassLabel(names=CLASSES))


@pytest.fixture(scope="module")
def table(teacher, photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "t"
    return record_teacher_logits(photos, teacher, output_dir=folder, views=FIVE, dtype="packed", top_k=8)


def test_the_table_holds_what_the_encoding_makes_of_the_dense_logits(table, teacher, photos, tmp_path):
    dense = record_teacher_logits(photos, teacher, output_dir=tmp_path / "d", views=FIVE, dtype="float32")
    column = dense.with_format("arrow")[:]["conv_logits"].combine_chunks()
    logits = np.stack([decode(column, 40, view) for view in range(5)], 1)
    expected = LogitsEncoding("packed", 8).encode(logits, views=True)
    assert describe_column(table.features["conv_logits"]) == (LogitsEncoding("packed", 8), 5, None)
    found = table.with_format("arrow")[:]["conv_logits"].combine_chunks()
    for view in range(5):
        np.testing.assert_allclose(decode(found, 40, view, 2.0), decode(expected, 40, view, 2.0), atol=5e-3)


def test_more_views_join_the_recorded_ones(table, teacher, photos, tmp_path):
    packed = {"dtype": "packed", "top_k": 8}
    two = record_teacher_logits(photos, teacher, output_dir=tmp_path / "2", views=TWO, **packed)
    five = record_teacher_logits(two, teacher, output_dir=tmp_path / "5", views=FIVE, **packed)
    for view in range(2):
        old, new = (StoredLogits(t, "conv_logits").read(range(12), 40, view) for t in (two, five))
        assert np.array_equal(old, new)
    assert verify_teacher_logits(five, teacher).problems == verify_rows(five) == []


def test_a_table_verifies_and_other_logits_do_not(table, teacher):
    assert verify_teacher_logits(table, teacher).problems == verify_rows(table) == []
    # The logits of other views, whose provenance is the same.
    column = table.with_format("arrow")[:]["conv_logits"].combine_chunks()
    order = np.roll(np.arange(12), 1)
    moved = table.remove_columns("conv_logits").add_column(
        "conv_logits", column.take(order), feature=table.features["conv_logits"]
    )
    attach_record(moved, only_record(table))
    problems = verify_teacher_logits(moved, teacher).problems
    assert len(problems) == 1 and '"conv_logits" differs from what the teacher predicts in' in problems[0]


def test_a_published_table_reads_alike(table, tmp_path):
    export_logits_table(table.remove_columns("image"), tmp_path / "e")
    opened = open_logits_table(tmp_path / "e")
    for view in range(5):
        expected, read = (StoredLogits(t, "conv_logits").read(range(12), 40, view, 4.0) for t in (table, opened))
        assert np.array_equal(expected, read)
    streamed = next(open_logits_table(tmp_path / "e", streaming=True).with_format("arrow").iter(12))
    column = streamed["conv_logits"].combine_chunks()
    assert np.array_equal(decode(column, 40, 4, 4.0), StoredLogits(table, "conv_logits").read(range(12), 40, 4, 4.0))


def test_a_student_learns_from_it(table, tmp_path):
    torch.manual_seed(0)
    config = IBViTConfig(
        image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        teacher_names=("conv",), id2label=dict(enumerate(CLASSES)),
        label2id={name: i for i, name in enumerate(CLASSES)},
    )  # fmt: skip
    args = DistillationArguments(
        str(tmp_path / "s"),
        max_steps=3,
        eval_strategy="no",
        per_device_train_batch_size=4,
        logging_steps=1,
        temperature=[2.0],
    )
    trainer = EnsembleDistillationTrainer(
        IBViTForImageClassification(config), args, train_dataset=table, processing_class=build_image_processor(table)
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["teacher_logits"].shape == (4, 1, 40)
    trainer.train()
    assert all(np.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)
