"""ONNX files compute what the model computes, at any batch size, in a process that has neither PyTorch nor this package."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from running import run
from transformers import AutoImageProcessor, ResNetConfig, ResNetForImageClassification, ViTImageProcessor

from hf_ibdistill import (
    IBResNetConfig,
    IBResNetForImageClassification,
    IBViTConfig,
    IBViTForImageClassification,
    evaluate_model,
    export_onnx,
    export_program,
    load_image_dataset,
    quantize_onnx,
)


SMALL = {
    "image_size": 8, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 64, "num_labels": 5,
}  # fmt: skip
STUDENTS = {
    "linear": {"patch_embedding": "linear", "teacher_names": ("conv", "inv")},
    "convolution": {"patch_embedding": "convolution", "teacher_names": ("conv",), "fusion": "mean_logits"},
    "bias_stems": {"patch_embedding": "bias_stems", "teacher_names": ("a", "b", "c"), "num_stem_layers": 3},
    "no teachers": {"patch_embedding": "convolution", "teacher_names": ()},
}
# Importing either library would fail.
RUN_ONNX = """
import sys
sys.modules["hf_ibdistill"] = sys.modules["torch"] = sys.modules["transformers"] = None
import numpy as np, onnxruntime
path, pixels, logits = sys.argv[1:]
session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
given = np.load(pixels)
np.savez(logits, **{name: session.run(["logits"], {"pixel_values": given[name]})[0] for name in given})
"""
RUN_PROGRAM = """
import sys
sys.modules["hf_ibdistill"] = sys.modules["transformers"] = None
import torch
program = torch.export.load(sys.argv[1]).module()
for pixels in (torch.ones(1, 3, 8, 8), torch.ones(7, 3, 8, 8)):
    print(*program(pixel_values=pixels)[0].tolist())
"""


def processor(side):
    return ViTImageProcessor(size={"height": side, "width": side})


def build(name):
    torch.manual_seed(0)
    if name in STUDENTS:
        return IBViTForImageClassification(IBViTConfig(**SMALL, **STUDENTS[name])), 8
    if name == "resnet of transformers":
        return ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])), 32
    preset = {"involution": "involution-small", "convolution teacher": "convolution-small"}.get(name, name)
    # Few blocks of each stage, whose strides and kernels are all there are.
    stages = {"depths": (1, 1, 1, 1), "hidden_sizes": (64, 64, 64, 64)} if preset == "rednet26" else {}
    return IBResNetForImageClassification(IBResNetConfig.from_preset(preset, num_labels=5, **stages)), 21


def settle(model, side):
    """Batch-norm statistics that are not those of the start."""
    model.train()
    with torch.no_grad():
        for _ in range(5):
            model(pixel_values=torch.randn(8, 3, side, side))
    return model.eval()


def run_elsewhere(path, batches, tmp_path):
    np.savez(tmp_path / "pixels.npz", **{f"{len(pixels)}": pixels.numpy() for pixels in batches})
    command = [sys.executable, "-c", RUN_ONNX, str(path), str(tmp_path / "pixels.npz"), str(tmp_path / "logits.npz")]
    subprocess.run(command, check=True, cwd=tmp_path)
    found = np.load(tmp_path / "logits.npz")
    return [torch.from_numpy(found[f"{len(pixels)}"]) for pixels in batches]


@pytest.mark.parametrize(
    "name", [*STUDENTS, "involution", "convolution teacher", "rednet26", "resnet of transformers"]
)
def test_an_onnx_file_predicts_without_this_package(name, tmp_path):
    model, side = build(name)
    settle(model, side)
    path = export_onnx(model, processor(side), tmp_path / "onnx" / "model.onnx")
    batches = [torch.randn(size, 3, side, side) for size in (1, 2, 5)]
    for pixels, logits in zip(batches, run_elsewhere(path, batches, tmp_path)):
        with torch.no_grad():
            expected = model(pixel_values=pixels).logits
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-5)
    # ONNX's own operators, which every runtime has.
    assert {node.domain for node in onnx.load(path).graph.node} <= {"", "ai.onnx"}


def test_an_exported_program_runs_without_this_package(tmp_path):
    model, _ = build("bias_stems")
    program = export_program(model, processor(8))
    assert {node.target.namespace for node in program.graph.nodes if hasattr(node.target, "namespace")} == {"aten"}
    torch.export.save(program, tmp_path / "student.pt2")
    command = [sys.executable, "-c", RUN_PROGRAM, str(tmp_path / "student.pt2")]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path).stdout.splitlines()
    with torch.no_grad():
        expected = model.eval()(torch.ones(1, 3, 8, 8)).logits[0]
    for line in printed:
        logits = torch.tensor([float(value) for value in line.split()])
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert len(printed) == 2


def test_the_model_stays_as_it_is(tmp_path):
    model, _ = build("linear")
    model.to(torch.bfloat16).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    path = export_onnx(model, processor(8), tmp_path / "model.onnx")
    assert model.training and model.dtype == torch.bfloat16
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    # Written in float32, and without dropout.
    (logits,) = run_elsewhere(path, [torch.ones(3, 3, 8, 8)], tmp_path)
    with torch.no_grad():
        expected = model.eval().float()(torch.ones(3, 3, 8, 8)).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-5)


def test_quantised_weights_are_integers(tmp_path):
    model, _ = build("linear")
    source = export_onnx(model, processor(8), tmp_path / "model.onnx")
    path = quantize_onnx(source, tmp_path / "model_quantized.onnx")
    weights = [tensor for tensor in onnx.load(path).graph.initializer if len(tensor.dims) == 2]
    weights = [onnx.numpy_helper.to_array(tensor) for tensor in weights if tensor.data_type == onnx.TensorProto.INT8]
    # Products of two of them and of 8-bit activations fit into 16 bits, where processors without VNNI add them.
    assert weights and all(np.abs(weight.astype(int)).max() <= 64 for weight in weights)
    assert path.stat().st_size < 0.6 * source.stat().st_size
    pixels = [torch.randn(16, 3, 8, 8)]
    (exact,), (rounded,) = run_elsewhere(source, pixels, tmp_path), run_elsewhere(path, pixels, tmp_path)
    assert 0 < (rounded - exact).abs().max() < 0.1 * exact.abs().max()


def test_a_file_is_replaced_only_by_a_complete_one(tmp_path, monkeypatch):
    model, _ = build("linear")
    path = tmp_path / "model.onnx"
    path.write_text("the one before")

    def fill_disk(self, destination, **_):
        Path(destination).write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.onnx.ONNXProgram, "save", fill_disk)
    with pytest.raises(OSError, match="No space"):
        export_onnx(model, processor(8), path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"] and path.read_text() == "the one before"


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    model, _ = build("linear")
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxscript" else find(name))
    with pytest.raises(ImportError, match=r'^onnxscript must be installed .* "hf_ibdistill\[onnx\]"'):
        export_onnx(model, processor(8), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A student that knows some digits, in a folder."""
    folder = tmp_path_factory.mktemp("student")
    arguments = ["--num_train_epochs", "8", "--eval_strategy", "no", "--hidden_size", "32", "--num_hidden_layers", "2"]
    run("distill_student.py", "--without_teachers", *arguments, "--output_dir", folder)
    return folder


def test_the_script_measures_what_it_writes(student, capsys):
    run("export_onnx.py", "--model", student, "--quantize")
    report = json.loads(capsys.readouterr().out)
    model = IBViTForImageClassification.from_pretrained(student)
    images = load_image_dataset("digits")["test"]
    measured = evaluate_model(model, AutoImageProcessor.from_pretrained(student), images)["accuracy"]
    assert report["images"] == len(images) and report["accuracy"] == measured > 0.8
    assert report["model.onnx"]["accuracy"] == measured
    assert report["model.onnx"]["largest_difference"] < 1e-4
    assert abs(report["model_quantized.onnx"]["accuracy"] - measured) <= 0.01
    for name in ("model.onnx", "model_quantized.onnx"):
        assert report[name]["bytes"] == (student / "onnx" / name).stat().st_size


def test_a_quantised_file_that_is_worse_is_not_kept(student, tmp_path):
    # Even an equal one loses more than this.
    arguments = ["--model", student, "--quantize", "--output_dir", tmp_path, "--max_accuracy_drop", "-1"]
    with pytest.raises(SystemExit, match="was not kept: it is less accurate"):
        run("export_onnx.py", *arguments)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


def test_a_model_on_the_hub_needs_an_output_folder():
    with pytest.raises(SystemExit, match="user/student is no folder here; say with --output_dir"):
        run("export_onnx.py", "--model", "user/student")
