"""What version 0.1.0 saved loads, trains and verifies: a teacher, a student and a table of three top-k views.

The folder was made by that version on digits. Its table has the columns "img" and "category".
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import load_from_disk
from safetensors.numpy import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification

import hf_ibdistill
from hf_ibdistill import (
    DistillationArguments,
    EnsembleDistillationTrainer,
    predict,
    read_records,
    record_teacher_logits,
    stored_views,
    verify_teacher_logits,
)


FOLDER = Path(__file__).parent / "version_0_1_0"


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    # Reading must not write beside the files of the repository.
    return load_from_disk(str(FOLDER / "table"))


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_models_predict_what_they_predicted(name, tables):
    model = AutoModelForImageClassification.from_pretrained(FOLDER / name)
    assert type(model).__module__.startswith(hf_ibdistill.__name__)
    outputs = predict(model, AutoImageProcessor.from_pretrained(FOLDER / name), tables["test"])
    expected = load_file(FOLDER / "predictions.safetensors")
    np.testing.assert_allclose(outputs["logits"], expected[f"{name}_logits"], atol=1e-5)
    if name == "student":
        np.testing.assert_allclose(outputs["class_logits"], expected["student_class_logits"], atol=1e-5)


def test_the_table_verifies(tables):
    for table in tables.values():
        found = verify_teacher_logits(table, {"inv": FOLDER / "teacher"})
        assert found.problems == []
        assert found.num_rows == len(table)


def test_a_student_trains_on_the_table(tables, tmp_path):
    student = AutoModelForImageClassification.from_pretrained(FOLDER / "student")
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    trainer = EnsembleDistillationTrainer(
        student,
        DistillationArguments(
            tmp_path, max_steps=2, per_device_train_batch_size=8, report_to="none", disable_tqdm=True
        ),
        train_dataset=tables["train"],
        eval_dataset=tables["test"],
        processing_class=AutoImageProcessor.from_pretrained(FOLDER / "student"),
    )
    assert trainer.views == stored_views(tables["train"]) and trainer.views.num_views == 3
    trainer.train()
    assert {"eval_accuracy", "eval_conv_token_accuracy", "eval_inv_token_accuracy"} <= trainer.evaluate().keys()
    after = student.state_dict()
    assert any(not torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_recorded_teacher_gets_more_views(tables, tmp_path):
    record = read_records(tables["train"])[0]
    views = hf_ibdistill.ViewRecipe(**{**record["views"], "num_views": 4})
    table = tables["train"].remove_columns("conv_logits")
    longer = record_teacher_logits(
        table, {"inv": FOLDER / "teacher"}, output_dir=tmp_path / "longer", views=views, top_k=4
    )
    assert {"image", "label"} <= set(longer.column_names)
    old = tables["train"].with_format("numpy")["inv_logits"]
    new = longer.with_format("numpy")["inv_logits"]
    np.testing.assert_array_equal(np.array([row["class_ids"][:3] for row in new]), [row["class_ids"] for row in old])
