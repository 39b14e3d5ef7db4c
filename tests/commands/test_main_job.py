"""Teachers → table → student → evaluation, by the commands, in one process."""

import json

import numpy as np
import pytest
from datasets import DatasetDict, load_from_disk
from running import run
from safetensors.numpy import load_file
from small import NAMES
from transformers import DeiTConfig, DeiTForImageClassification, ViTImageProcessor

from hf_ibdistill import IBResNetForImageClassification, IBViTForImageClassification, load_student

from .conftest import QUICK


def read(path):
    return json.loads(path.read_text())


def one_line(path):
    return " ".join(path.read_text().split())


def test_teachers_table_and_student_fit_together(outputs):
    tables = load_from_disk(outputs.table)
    assert {name: len(table) for name, table in tables.items()} == {"train": 30, "validation": 12, "test": 12}
    results = read(outputs.student / "results.json")
    assert results["split"] == "test"
    assert {"accuracy", "conv_token_accuracy", "inv_agreement"} <= results["metrics"].keys()
    card = (outputs.student / "README.md").read_text()
    assert f"| accuracy | {results['metrics']['accuracy']:.4f} |" in card
    # The test images have logits as well, so the card shows how good the teachers were, but not where they lay.
    for name in ("conv", "inv"):
        measured = read(outputs.root / name / "results.json")["metrics"]["accuracy"]
        assert f"| {name} | {name} | {100 * measured:.2f} % |" in card
    assert results["recipe"]["model"]["patch_embedding"] == "convolution" and str(outputs.root) not in card


def test_evaluate_repeats_the_measured_figures(outputs, tmp_path, capsys):
    measured = read(outputs.student / "results.json")["metrics"]
    file = tmp_path / "metrics.json"
    capsys.readouterr()
    run("evaluate", "--model", outputs.student, "--dataset", outputs.table, "--output_file", file)
    printed = json.loads(capsys.readouterr().out)
    # Another batch size may round differently.
    assert printed["metrics"] == pytest.approx(measured, rel=1e-4)
    assert printed["split"] == "test" and read(file) == printed
    run("evaluate", "--model", outputs.conv, "--dataset", outputs.images, "--split", "validation")
    assert json.loads(capsys.readouterr().out)["split"] == "validation"


def test_logits_without_images_teach_the_same_student(outputs, tmp_path):
    teachers = ["--teachers", *outputs.teachers]
    run(
        "record", "--dataset", outputs.images, *teachers, "--with_images", "false", "--output_dir", tmp_path / "logits"
    )
    assert "image" not in load_from_disk(tmp_path / "logits")["train"].column_names
    with pytest.raises(SystemExit, match="holds logits without images.*--logits TABLE"):
        run("distill", "--dataset", tmp_path / "logits", *QUICK, "--output_dir", tmp_path / "student")
    given = ["--dataset", outputs.images, "--logits", tmp_path / "logits", *QUICK]
    run("distill", *given, "--output_dir", tmp_path / "student")
    first, second = (load_file(folder / "model.safetensors") for folder in (outputs.student, tmp_path / "student"))
    assert all(np.array_equal(first[name], second[name]) for name in first)
    measured = [read(folder / "results.json")["metrics"] for folder in (outputs.student, tmp_path / "student")]
    assert measured[0] == measured[1] and "inv_agreement" in measured[1]


def test_parquet_files_are_recorded_as_a_stream(outputs, tmp_path):
    (tmp_path / "data").mkdir()
    for split, table in load_from_disk(outputs.images).items():
        table.to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    given = ["--dataset", tmp_path / "data", "--streaming", "--teachers", *outputs.teachers]
    run("record", *given, "--output_dir", tmp_path / "table")
    for split, table in load_from_disk(outputs.table).items():
        streamed = load_from_disk(tmp_path / "table")[split]
        assert streamed.with_format("arrow")[:].to_pylist() == table.with_format("arrow")[:].to_pylist()
    with pytest.raises(SystemExit, match="validation_fraction=0.2 has no effect with streaming=True"):
        run("record", *given, "--validation_fraction", "0.2", "--output_dir", tmp_path / "other")
    with pytest.raises(SystemExit, match="images_per_class=3 needs the whole table"):
        run("record", *given, "--images_per_class", "3", "--output_dir", tmp_path / "other")


def test_verify_finds_teachers_that_are_not_those_of_the_table(outputs, tmp_path, capsys):
    capsys.readouterr()
    run("verify", "--table", outputs.table, "--teachers", *outputs.teachers)
    report = json.loads(capsys.readouterr().out)
    assert report["problems"] == [] and [(check["split"], check["teacher"]) for check in report["checks"]] == [
        (split, name) for split in ("train", "validation", "test") for name in ("conv", "inv")
    ]
    assert all(check["largest_difference"] < 1e-2 for check in report["checks"])
    changed = IBResNetForImageClassification.from_pretrained(outputs.conv)
    changed.classifier.bias.data[0] += 1
    changed.save_pretrained(tmp_path)
    ViTImageProcessor.from_pretrained(outputs.conv).save_pretrained(tmp_path)
    with pytest.raises(SystemExit) as exit:
        run("verify", "--table", outputs.table, "--teachers", f"conv={tmp_path}", "--num_rows", "4")
    assert all(f"{split}: " in exit.value.code for split in ("train", "validation", "test"))


def test_online_teachers_and_a_student_without_teachers(outputs, tmp_path):
    arguments = ["--dataset", outputs.images, *QUICK]
    run("distill", *arguments, "--teachers", outputs.teachers[0], "--output_dir", tmp_path / "online")
    assert read(tmp_path / "online" / "config.json")["teacher_names"] == ["conv"]
    alone = ["--without_teachers", "--drop_path_rate", "0.25", "--num_views", "2", "--geometric_ops", "3"]
    run("distill", *arguments, *alone, "--output_dir", tmp_path / "alone")
    config = read(tmp_path / "alone" / "config.json")
    assert (config["teacher_names"], config["drop_path_rate"]) == ([], 0.25)
    assert read(tmp_path / "alone" / "results.json")["recipe"]["views"]["geometric_ops"] == 3


@pytest.fixture(scope="module")
def few(outputs, tmp_path_factory):
    """The table with few rows, for tests about weights alone."""
    folder = tmp_path_factory.mktemp("few")
    tables = load_from_disk(outputs.table)
    DatasetDict({name: table.select(range(6)) for name, table in tables.items()}).save_to_disk(folder)
    return folder


def test_a_saved_student_learns_from_other_teachers(outputs, few, tmp_path):
    start = IBViTForImageClassification.from_pretrained(outputs.student)
    start.config.fusion = "class_token"
    start.save_pretrained(tmp_path / "start")
    ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.4, 0.5, 0.6]).save_pretrained(tmp_path / "start")
    names = ["--teacher_names", "inv", "--learning_rate", "1e-9", "--image_size", "12"]
    arguments = ["--dataset", few, "--model", tmp_path / "start", *QUICK, *names]
    run("distill", *arguments, "--output_dir", tmp_path / "student")
    config = read(tmp_path / "student" / "config.json")
    assert (config["teacher_names"], config["image_size"], config["fusion"]) == (["inv"], 12, "class_token")
    # Its own preprocessing and, after a step that is next to none, weights.
    processor = read(tmp_path / "student" / "preprocessor_config.json")
    assert processor["image_mean"] == [0.4, 0.5, 0.6] and processor["size"] == {"height": 12, "width": 12}
    expected = load_student(tmp_path / "start", ["inv"], image_size=12).state_dict()
    found = IBViTForImageClassification.from_pretrained(tmp_path / "student").state_dict()
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name], tensor, atol=1e-6, err_msg=name)
    card = one_line(tmp_path / "student" / "README.md")
    assert "(inv)" in card and "the model start" in card and str(tmp_path) not in card
    run("distill", *arguments, "--fusion", "mean_logits", "--output_dir", tmp_path / "fused")
    assert read(tmp_path / "fused" / "config.json")["fusion"] == "mean_logits"


@pytest.mark.parametrize("flags", [[], ["--without_teachers"]])
def test_a_deit_to_start_from(flags, few, tmp_path):
    shape = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16}
    DeiTForImageClassification(DeiTConfig(num_attention_heads=2, **shape)).save_pretrained(tmp_path / "deit")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "deit")
    run(
        "distill", "--dataset", few, "--model", tmp_path / "deit", *QUICK, *flags, "--output_dir", tmp_path / "student"
    )
    config = read(tmp_path / "student" / "config.json")
    assert config["teacher_names"] == ([] if flags else ["conv", "inv"]) and config["model_type"] == "ibvit"
    assert config["fusion"] == "mean_probabilities" and list(config["id2label"].values()) == NAMES
    card = one_line(tmp_path / "student" / "README.md")
    assert "the model deit" in card and str(tmp_path) not in card
    assert ("on labels alone" in card) == bool(flags)


def test_a_student_does_not_replace_a_recorded_teacher(outputs):
    with pytest.raises(SystemExit, match="output_dir=.* the teacher conv"):
        run("distill", "--dataset", outputs.table, *QUICK, "--output_dir", outputs.conv)
