"""Exported files compute what the model computes, at any batch size, in a process that has neither PyTorch nor this package."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

from hf_ibdistill import (
    IBResNetConfig,
    IBResNetForImageClassification,
    IBViTConfig,
    IBViTForImageClassification,
    export_onnx,
    export_program,
    quantize_onnx,
)


STUDENT = {
    "image_size": 8, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 64, "num_labels": 5,
}  # fmt: skip
TEACHER = {"embedding_size": 32, "hidden_sizes": (64,), "depths": (1,), "downsample_strides": (2,), "num_labels": 5}
MODELS = {
    # Every patch embedding and fusion, and no, one, two and three teachers.
    "students": [
        IBViTConfig(**STUDENT),
        IBViTConfig(**STUDENT, patch_embedding="convolution", teacher_names=("conv",), fusion="mean_logits"),
        IBViTConfig(**STUDENT, patch_embedding="bias_stems", teacher_names=("a", "b", "c"), fusion="class_token"),
        IBViTConfig(**STUDENT, teacher_names=()),
    ],
    # Both operators and stems, with a stride; a kernel of 3 in the stem and of 7 in the block. And a model of transformers.
    "teachers": [
        IBResNetConfig(spatial_operator="involution", **TEACHER),
        IBResNetConfig(spatial_operator="convolution", stem="plain", **TEACHER),
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=5),
    ],
}
SIDES = {"students": 8, "teachers": 21}
CLASSES = {
    IBViTConfig: IBViTForImageClassification,
    IBResNetConfig: IBResNetForImageClassification,
    ResNetConfig: ResNetForImageClassification,
}
# Importing any of the three libraries would fail.
RUN_ONNX = """
import sys
sys.modules["hf_ibdistill"] = sys.modules["torch"] = sys.modules["transformers"] = None
from pathlib import Path
import numpy as np, onnxruntime
for path in map(Path, sys.argv[1:]):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    given = np.load(path.with_name("pixels.npz"))
    logits = {name: session.run(["logits"], {"pixel_values": given[name]})[0] for name in given}
    np.savez(path.with_suffix(".npz"), **logits)
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


class SideBySide(nn.Module):
    """Several image classifiers as one, (N, models · classes), because one export costs less than several."""

    def __init__(self, models):
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, pixel_values):
        return SimpleNamespace(logits=torch.cat([model(pixel_values).logits for model in self.models], dim=1))


def build(name):
    """Models in training mode and bfloat16."""
    torch.manual_seed(0)
    model = SideBySide([CLASSES[type(config)](config) for config in MODELS[name]])
    with torch.no_grad():
        for _ in range(5):  # batch-norm statistics that are not those of the start
            model.train()(torch.randn(8, 3, SIDES[name], SIDES[name]))
    return model.to(torch.bfloat16)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """By name: the file, and for several batches the logits of the file run elsewhere and of the model."""
    found = {}
    for name, side in SIDES.items():
        model = build(name)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        folder = tmp_path_factory.mktemp("exported")
        path = export_onnx(model, processor(side), folder / "model.onnx")
        # The model itself stays as it is.
        assert model.training and {tensor.dtype for tensor in model.parameters()} == {torch.bfloat16}
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        pixels = {str(size): torch.randn(size, 3, side, side) for size in (1, 2, 5, 16)}
        np.savez(folder / "pixels.npz", **{size: batch.numpy() for size, batch in pixels.items()})
        model.eval().float()
        with torch.no_grad():
            expected = {size: model(batch).logits for size, batch in pixels.items()}
        found[name] = SimpleNamespace(path=path, expected=expected)
    source = found["students"].path
    found["quantized"] = SimpleNamespace(path=quantize_onnx(source, source.with_name("quantized.onnx")))
    paths = [str(entry.path) for entry in found.values()]
    subprocess.run([sys.executable, "-c", RUN_ONNX, *paths], check=True, cwd=folder)
    for entry in found.values():
        with np.load(entry.path.with_suffix(".npz")) as logits:
            entry.logits = {size: torch.from_numpy(logits[size]) for size in logits}
    return found


@pytest.mark.parametrize("name", MODELS)
def test_an_onnx_file_predicts_without_this_package(name, exported):
    # In float32 and without dropout, although the model was in bfloat16 and in training mode.
    for size, expected in exported[name].expected.items():
        torch.testing.assert_close(exported[name].logits[size], expected, atol=1e-4, rtol=1e-5)
        assert expected.shape == (int(size), 5 * len(MODELS[name]))
    # The comparison is of something.
    assert exported[name].expected["16"].std(0).min() > 1e-3
    # ONNX's own operators, which every runtime has.
    assert {node.domain for node in onnx.load(exported[name].path).graph.node} <= {"", "ai.onnx"}


def test_quantized_weights_are_integers(exported):
    source, path = exported["students"].path, exported["quantized"].path
    weights = [tensor for tensor in onnx.load(path).graph.initializer if len(tensor.dims) == 2]
    weights = [onnx.numpy_helper.to_array(tensor) for tensor in weights if tensor.data_type == onnx.TensorProto.INT8]
    # Products of two of them and of 8-bit activations fit into 16 bits, where processors without VNNI add them.
    assert weights and all(np.abs(weight.astype(int)).max() <= 64 for weight in weights)
    assert path.stat().st_size < 0.6 * source.stat().st_size
    exact, rounded = exported["students"].logits["16"], exported["quantized"].logits["16"]
    assert 0 < (rounded - exact).abs().max() < 0.1 * exact.abs().max()


def test_an_exported_program_runs_without_this_package(tmp_path):
    # The one with both operators.
    model = build("students").models[2]
    program = export_program(model, processor(8))
    assert {node.target.namespace for node in program.graph.nodes if hasattr(node.target, "namespace")} == {"aten"}
    torch.export.save(program, tmp_path / "student.pt2")
    command = [sys.executable, "-c", RUN_PROGRAM, str(tmp_path / "student.pt2")]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path).stdout.splitlines()
    with torch.no_grad():
        expected = model.eval().float()(torch.ones(1, 3, 8, 8)).logits[0]
    for line in printed:
        logits = torch.tensor([float(value) for value in line.split()])
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert len(printed) == 2


def test_a_file_is_replaced_only_by_a_complete_one(tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    path.write_text("the one before")

    class Program:
        def save(self, destination):
            Path(destination).write_text("half")
            raise OSError(28, "No space left on device")

    # Only the end of an export matters here.
    monkeypatch.setattr("hf_ibdistill.export.export_program", lambda model, image_processor: None)
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: Program())
    with pytest.raises(OSError, match="No space"):
        export_onnx(None, None, path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"] and path.read_text() == "the one before"


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxscript" else find(name))
    with pytest.raises(ImportError, match=r': onnxscript\. .*"hf_ibdistill\[onnx\]"'):
        export_onnx(build("students"), processor(8), tmp_path / "model.onnx")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        quantize_onnx(tmp_path / "nowhere.onnx", tmp_path / "quantized.onnx")
    assert not list(tmp_path.iterdir())


def test_a_model_that_returns_tuples_is_exported():
    model = ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])).eval()
    model.config.return_dict = False
    program = export_program(model, ViTImageProcessor(size={"height": 32, "width": 32}))
    pixels = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(pixel_values=pixels), model(pixel_values=pixels)[0])


def test_a_model_that_cannot_be_traced_is_named(monkeypatch):
    model = ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]))
    forward = ResNetForImageClassification.forward

    def branch(self, pixel_values, **kwargs):
        return forward(self, pixel_values * 2 if pixel_values.sum() > 0 else pixel_values, **kwargs)

    monkeypatch.setattr(ResNetForImageClassification, "forward", branch)
    with pytest.raises(ValueError, match="ResNetForImageClassification cannot be traced"):
        export_program(model, ViTImageProcessor(size={"height": 32, "width": 32}))
