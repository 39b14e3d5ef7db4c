"""The quickstart, on few images and for a step."""

import json
import re
import shutil

import numpy as np
import PIL.Image
import pytest
from datasets import load_from_disk
from running import run, run_on_terminal
from transformers import AutoImageProcessor

from hf_ibdistill import IBViTForImageClassification
from hf_ibdistill.commands.quickstart import check_reloaded


MODELS = ["conv", "inv", "both teachers, mean probability", "student without teachers", "student with both teachers"]


def test_quickstart_leaves_table_student_card_and_picture(outputs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    few = ["--dataset", outputs.images, "--images_per_class", "2", "--num_views", "2", "--output_dir", "."]
    # What an earlier run with other settings left: a table of other teachers.
    shutil.copytree(outputs.table, tmp_path / "seed_1" / "table")
    run("quickstart", *few, "--teacher_steps", "1", "--student_steps", "2", "--batch_size", "6", "--seeds", "0", "1")
    printed, errors = capsys.readouterr()
    assert_fits(f"{errors}{printed}".splitlines())
    train = load_from_disk(tmp_path / "seed_1" / "table")["train"]
    labels = train["label"][:]
    assert sorted(label for label in labels if label is not None) == [0, 0, 1, 1, 2, 2]
    counts = f"6 images with a label, {len(labels) - 6} without"
    assert len(labels) > 6 and counts in printed
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["seeds"] == [0, 1] and [list(metrics) for metrics in summary["metrics"]] == [MODELS, MODELS]
    for model in MODELS:
        accuracies = [100 * metrics[model]["accuracy"] for metrics in summary["metrics"]]
        spread = rf"{np.mean(accuracies):.1f} ± {np.std(accuracies, ddof=1):.1f}"
        assert re.search(rf"^{model} +{spread} +\d", printed, re.MULTILINE)
        assert f"| {model} | {spread} | " in (tmp_path / "summary.md").read_text()
    student = tmp_path / "seed_1" / "student"
    results = json.loads((student / "results.json").read_text())
    assert results["metrics"] == summary["metrics"][1]["student with both teachers"]
    assert results["recipe"]["steps"] == 2 and results["recipe"]["training images"] == len(labels)
    assert results["recipe"]["training images without label"] == len(labels) - 6
    assert f"| accuracy | {results['metrics']['accuracy']:.4f} |" in (student / "README.md").read_text()
    for name in ("curves", "classes", "calibration", "examples", "attention"):
        assert f"](pictures/{name}.png)" in (student / "README.md").read_text()
        with PIL.Image.open(student / "pictures" / f"{name}.png") as picture:
            assert min(picture.size) > 300
    # What the student gains over the one without teachers.
    assert "student_alone" in results["pictures"]["pictures/examples.png"]
    # Nothing that must be unpickled: only safetensors, JSON, Markdown, HTML, pictures and the code of the model.
    endings = {path.suffix for path in student.rglob("*") if path.is_file()}
    assert endings == {".safetensors", ".json", ".md", ".html", ".png", ".py"}


def assert_fits(lines):
    """Two screens, a line at the end of each stage, and the table of accuracies with the students last."""
    assert len(lines) <= 48 and max(map(len, lines)) <= 100
    text = "\n".join(lines)
    # No bar, and no dictionary of transformers.
    assert not re.search(r"\r|\x1b|it/s|%\||█|\{", text)
    for stage in ("train conv", "train inv", "record train", "train student_alone", "train student"):
        assert re.search(rf"^{stage}[,:].* (steps|images), [\d.]+ s, [\d,.]+ images/s", text, re.MULTILINE), stage
    assert [text.index(f"\n{model}  ") for model in MODELS] == sorted(text.index(f"\n{model}  ") for model in MODELS)
    assert lines[-3].startswith("  hf-ibdistill predict --model ")


def test_the_terminal_holds_two_screens_at_the_end(outputs, tmp_path):
    few = ["--dataset", outputs.images, "--images_per_class", "2", "--num_views", "2", "--output_dir", "q"]
    few += ["--teacher_steps", "1", "--student_steps", "1"]
    code = "import os, sys; os.chdir(sys.argv.pop()); from hf_ibdistill.commands import main; main()"
    written, lines = run_on_terminal(["-c", code, "quickstart", *few, tmp_path])
    assert lines.pop() == ""
    assert_fits(lines)


def test_a_saved_student_that_predicts_something_else_is_an_error(outputs, tmp_path):
    class Trainer:
        model = IBViTForImageClassification.from_pretrained(outputs.student)
        processing_class = AutoImageProcessor.from_pretrained(outputs.student)

    images = load_from_disk(outputs.images)["test"]
    check_reloaded(Trainer, outputs.student, images)
    Trainer.model.class_head.bias.data[0] += 1
    with pytest.raises(RuntimeError, match="student"):
        check_reloaded(Trainer, outputs.student, images)
