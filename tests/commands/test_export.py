"""The command that exports a model and measures the files."""

import json
import shutil

import pytest
import torch
from datasets import load_from_disk
from running import run
from small import NAMES
from transformers import AutoImageProcessor, ViTImageProcessor

from hf_ibdistill import IBViTConfig, IBViTForImageClassification, evaluate_model
from hf_ibdistill.commands import export


@pytest.fixture(scope="module")
def student(outputs, tmp_path_factory):
    """A student that is right about 9 of the 12 test images, and sure of it. No training: its heads solve a linear system."""
    folder = tmp_path_factory.mktemp("student")
    shape = {"image_size": 8, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    classes = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
    model = IBViTForImageClassification(IBViTConfig(**shape, **classes, intermediate_size=64)).eval()
    processor, test = ViTImageProcessor(size={"height": 8, "width": 8}), load_from_disk(outputs.images)["test"]
    predictions = torch.tensor(test["label"])
    predictions[:3] = (predictions[:3] + 1) % 3
    wanted = 10.0 * torch.nn.functional.one_hot(predictions)
    with torch.no_grad():
        pixel_values = processor([image.convert("RGB") for image in test["image"]], return_tensors="pt").pixel_values
        tokens = model.ibvit(pixel_values).last_hidden_state
        for i, head in enumerate([model.class_head, *model.teacher_heads]):
            head.weight.copy_(torch.linalg.lstsq(tokens[:, i], wanted, driver="gelsd").solution.T)
            head.bias.zero_()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_export_measures_what_it_writes(outputs, student, capsys, monkeypatch, tmp_path):
    run("export", "--model", student, "--dataset", outputs.images, "--quantize", "--batch_size", "5")
    report = json.loads(capsys.readouterr().out)
    model = IBViTForImageClassification.from_pretrained(student)
    images = load_from_disk(outputs.images)["test"]
    measured = evaluate_model(model, AutoImageProcessor.from_pretrained(student), images)["accuracy"]
    assert report["images"] == 12 and report["accuracy"] == measured == 0.75
    files = {name: student / "onnx" / name for name in ("model.onnx", "model_quantized.onnx")}
    for name, file in files.items():
        assert report[name]["accuracy"] == measured and report[name]["bytes"] == file.stat().st_size
    assert 0 <= report["model.onnx"]["largest_difference"] < 1e-4
    assert 1e-3 < report["model_quantized.onnx"]["largest_difference"] < 3
    assert files["model_quantized.onnx"].stat().st_size < files["model.onnx"].stat().st_size

    # A quantized file that is worse is not kept; even an equal one is worse than this. The exported files are there already.
    monkeypatch.setattr(export, "export_onnx", lambda model, processor, path: shutil.copy(files[path.name], path))
    monkeypatch.setattr(export, "quantize_onnx", lambda source, path: shutil.copy(files[path.name], path))
    arguments = ["--model", student, "--dataset", outputs.images, "--quantize", "--output_dir", tmp_path]
    with pytest.raises(SystemExit) as exit:
        run("export", *arguments, "--max_accuracy_drop", "-1")
    assert "max_accuracy_drop=-1.0" in exit.value.code and "model_quantized.onnx" in exit.value.code
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


def test_classes_that_differ_are_refused_before_the_export(outputs, student, monkeypatch, tmp_path):
    model = IBViTForImageClassification.from_pretrained(student)
    model.config.id2label = {i: f"other {i}" for i in range(3)}
    model.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path)
    monkeypatch.setattr(export, "export_onnx", lambda *_: pytest.fail("exported"))
    with pytest.raises(SystemExit, match="other 0"):
        run("export", "--model", tmp_path, "--dataset", outputs.images)
    assert not (tmp_path / "onnx").exists()
