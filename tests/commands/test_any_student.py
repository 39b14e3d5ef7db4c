"""A student of any architecture through every command: trained, resumed, measured, exported, tuned and published."""

import json

import pytest
import torch
from datasets import load_from_disk
from hub_server import WRITE_TOKEN
from huggingface_hub import ModelCard, constants, snapshot_download
from running import run
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_ibdistill import load_student


ARCHITECTURES = {
    "mobilenet_v2": ["mobilenet_v2", "depth_multiplier=0.25"],
    "resnet": ["resnet", "embedding_size=8", "hidden_sizes=[8, 16]", "depths=[1, 1]", "layer_type=basic"],
    "vit": ["vit", "hidden_size=16", "num_hidden_layers=2", "num_attention_heads=2", "patch_size=8"],
    "poolformer": ["poolformer", "hidden_sizes=[8, 8, 8, 8]", "depths=[1, 1, 1, 1]"],
    "timm": ["timm/test_efficientnet"],
}
STEPS = ["--eval_strategy", "no", "--disable_tqdm", "--image_size", "32", "--max_steps", "3"]
# A head that the labels teach, because its family has no token of a teacher.
HEADS = ("classifier", "head")


def distill(outputs, architecture, folder, *arguments):
    student = ["--student_config", *ARCHITECTURES[architecture]]
    run("distill", "--dataset", outputs.table, *student, *STEPS, "--output_dir", folder, *arguments)
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def student(request, outputs, tmp_path_factory):
    """The architecture of a student, its folder and its weights."""
    folder = tmp_path_factory.mktemp("any") / "student"
    whole = distill(outputs, request.param, folder, "--save_strategy", "steps", "--save_steps", "2")
    return request.param, folder, whole


@pytest.mark.parametrize("student", ARCHITECTURES, indirect=True)
def test_any_student(student, outputs, hub, monkeypatch, tmp_path, capsys):
    architecture, folder, whole = student
    results, card = json.loads((folder / "results.json").read_text()), ModelCard.load(folder / "README.md")
    assert {"conv_agreement", "inv_agreement", "accuracy"} <= results["metrics"].keys()
    assert "conv" in card.text and "inv" in card.text and card.data.pipeline_tag == "image-classification"

    resumed = distill(outputs, architecture, tmp_path / "b", "--resume_from_checkpoint", folder / "checkpoint-2")
    assert whole.keys() == resumed.keys() and all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())

    capsys.readouterr()
    run("evaluate", "--model", folder, "--dataset", outputs.table)
    measured = json.loads(capsys.readouterr().out)["metrics"]
    assert measured == pytest.approx(results["metrics"], rel=1e-4)

    run("export", "--model", folder, "--dataset", outputs.images, "--quantize", "--max_accuracy_drop", "1")
    report = json.loads(capsys.readouterr().out)
    assert report["accuracy"] == pytest.approx(results["metrics"]["accuracy"])
    assert report["model.onnx"]["largest_difference"] < 1e-3 and (folder / "onnx" / "model_quantized.onnx").exists()

    tuned = ["finetune", "--model", folder, "--dataset", outputs.images, *STEPS, "--output_dir", tmp_path / "tuned"]
    run(*tuned, "--linear_probe")
    # A ViT becomes a student of this package, under other names.
    start = load_student(folder).state_dict()
    tuned = load_file(tmp_path / "tuned/model.safetensors")
    changed = {name for name, tensor in tuned.items() if not torch.equal(tensor, start[name])}
    assert changed and all(any(head in name for head in HEADS) for name in changed)

    with monkeypatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", hub.endpoint)
        patch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
        patch.setenv("HF_TOKEN", WRITE_TOKEN)
        run("push", "--folder", folder, "--repo_id", "alice/student")
    published = snapshot_download("alice/student", endpoint=hub.endpoint, cache_dir=tmp_path / "cache")
    model = AutoModelForImageClassification.from_pretrained(published).eval()
    images = [image.convert("RGB") for image in load_from_disk(outputs.images)["test"]["image"]]
    pixels = AutoImageProcessor.from_pretrained(published)(images, return_tensors="pt")["pixel_values"]
    local = AutoModelForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(pixel_values=pixels).logits, local(pixel_values=pixels).logits)


@pytest.mark.parametrize(
    ("student", "has_layers"),
    [("resnet", True), ("vit", True), ("poolformer", False), ("timm", True)],
    indirect=["student"],
)
def test_layers_are_frozen_and_decayed_where_the_family_has_them(student, has_layers, outputs, tmp_path):
    folder = student[1]
    tuned = ["finetune", "--model", folder, "--dataset", outputs.images, *STEPS, "--output_dir", tmp_path / "tuned"]
    flags = [["--layer_decay", "0.5"], ["--freeze_layers", "1"]]
    if not has_layers:
        for flag in flags:
            with pytest.raises(SystemExit, match="no list of layers"):
                run(*tuned, *flag)
    else:
        run(*tuned, *flags[0], *flags[1])
        after, before = load_file(tmp_path / "tuned/model.safetensors"), load_student(folder).state_dict()
        kept = [name for name, tensor in after.items() if torch.equal(tensor, before[name])]
        assert 0 < len(kept) < len(after)
