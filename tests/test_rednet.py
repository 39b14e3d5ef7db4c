"""The conversion of the published RedNets, against a naive rendering of their architecture that shares nothing with
the package."""

import datetime
import tempfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from running import run
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForImageClassification

from hf_ibdistill import IBResNetConfig, IBResNetForImageClassification, load_teachers
from hf_ibdistill.rednet import authors_name, detect_preset


DEPTHS = {26: (1, 2, 4, 1), 38: (2, 3, 5, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


# The published architecture: its names, and involution by its definition


def named(**layers):
    return nn.Sequential(OrderedDict(layers))


def conv_bn_relu(channels, out_channels, size=1, stride=1):
    conv = nn.Conv2d(channels, out_channels, size, stride, size // 2, bias=False)
    return named(conv=conv, bn=nn.BatchNorm2d(out_channels), activate=nn.ReLU())


class Involution(nn.Module):
    def __init__(self, channels, size, stride=1):
        super().__init__()
        self.channels, self.size, self.stride = channels, size, stride
        self.conv1 = conv_bn_relu(channels, channels // 4)
        self.conv2 = named(conv=nn.Conv2d(channels // 4, size**2 * channels // 16, 1))

    def forward(self, x):
        kernel = self.conv2(self.conv1(nn.functional.avg_pool2d(x, self.stride)))
        height, width = kernel.shape[2:]
        patches = nn.functional.unfold(x, self.size, padding=self.size // 2, stride=self.stride)
        patches = patches.view(len(x), self.channels // 16, 16, self.size**2, height, width)
        kernel = kernel.view(len(x), self.channels // 16, self.size**2, height, width)
        return torch.einsum("bgkhw,bgckhw->bgchw", kernel, patches).flatten(1, 2)


class Bottleneck(nn.Module):
    def __init__(self, channels, out_channels, stride):
        super().__init__()
        inner = out_channels // 4
        self.conv1, self.bn1 = nn.Conv2d(channels, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = Involution(inner, 7, stride), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = nn.Conv2d(inner, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)
        if channels != out_channels:
            projection = nn.Conv2d(channels, out_channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(out_channels))

    def forward(self, x):
        identity = self.downsample(x) if hasattr(self, "downsample") else x
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.conv2(x)).relu()
        return (self.bn3(self.conv3(x)) + identity).relu()


def published_rednet(depth, num_classes=10):
    stem = nn.Sequential(
        conv_bn_relu(3, 32, 3, stride=2), Involution(32, 3), nn.BatchNorm2d(32), nn.ReLU(), conv_bn_relu(32, 64, 3)
    )
    layers, channels = {}, 64
    for stage, blocks in enumerate(DEPTHS[depth]):
        out_channels, stride = 256 * 2**stage, 1 if stage == 0 else 2
        first = Bottleneck(channels, out_channels, stride)
        layers[f"layer{stage + 1}"] = nn.Sequential(
            first, *(Bottleneck(out_channels, out_channels, 1) for _ in range(blocks - 1))
        )
        channels = out_channels
    backbone = named(stem=stem, maxpool=nn.MaxPool2d(3, 2, padding=1), **layers)
    neck = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return named(backbone=backbone, neck=neck, head=named(fc=nn.Linear(channels, num_classes)))


@torch.no_grad()
def randomize(model, pixel_values):
    """Make every tensor random, without activations and rounding errors that grow from block to block, as they would if
    involution multiplied one random feature with another. The statistics are, layer by layer, near those of the images, and
    a block changes little of its input."""

    def draw_statistics(norm, inputs):
        variance, mean = torch.var_mean(inputs[0], (0, 2, 3))
        norm.running_mean.normal_().mul_(0.3 * variance.sqrt()).add_(mean)
        norm.running_var.uniform_(0.5, 2.0).mul_(variance)
        norm.num_batches_tracked.random_(1000)

    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_(std=0.3)
    for block in (module for module in model.modules() if isinstance(module, Bottleneck)):
        block.bn3.weight.mul_(0.1)
        block.bn3.bias.mul_(0.1)
    hooks = [norm.register_forward_pre_hook(draw_statistics) for norm in norms]
    model.eval()(pixel_values)
    for hook in hooks:
        hook.remove()
    return model


def blank_checkpoint(depth=26, num_classes=10, **meta):
    """The names and shapes of a checkpoint; each tensor's elements are one and the same, so its file is small."""
    with torch.device("meta"):
        tensors = published_rednet(depth, num_classes).state_dict()
    state_dict = {name: torch.ones((), dtype=tensor.dtype).expand(tensor.shape) for name, tensor in tensors.items()}
    return {"state_dict": state_dict, "meta": meta}


def convert(folder, checkpoint, *flags, **save_options):
    """Run the command as a user does; returns the folder that it wrote."""
    if not isinstance(checkpoint, Path):
        torch.save(checkpoint, folder / "rednet.pth", **save_options)
        checkpoint = folder / "rednet.pth"
    run("convert-rednet", "--checkpoint", checkpoint, "--output_dir", folder / "converted", *flags)
    return folder / "converted"


def mistake(folder, checkpoint, *flags, **save_options):
    with pytest.raises(SystemExit) as exit:
        convert(folder, checkpoint, *flags, **save_options)
    assert "\n" not in exit.value.code
    assert not (folder / "converted").exists()
    return exit.value.code


# What the converted model computes


@pytest.mark.parametrize("depth", DEPTHS)
def test_every_depth_is_recognized_and_has_the_published_tensors(depth):
    with torch.device("meta"):
        published = published_rednet(depth).state_dict()
        assert detect_preset(published) == f"rednet{depth}"
        model = IBResNetForImageClassification(IBResNetConfig.from_preset(f"rednet{depth}", num_labels=10))
    ours = {authors_name(name): tensor.shape for name, tensor in model.state_dict().items()}
    assert ours == {name: tensor.shape for name, tensor in published.items()}


# The other depths repeat the same blocks.
@pytest.mark.parametrize("depth", [26, 50])
def test_the_converted_model_computes_what_the_published_one_does(depth, capsys):
    pixel_values = torch.randn(3, 3, 64, 64)
    published = randomize(published_rednet(depth), pixel_values)
    # Not tmp_path, which would keep the weights after the tests.
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        converted = convert(Path(folder), {"state_dict": published.state_dict(), "meta": {"epoch": 130}})
        model = AutoModelForImageClassification.from_pretrained(converted)
        expected, logits = published(pixel_values), model(pixel_values).logits
    assert type(model) is IBResNetForImageClassification
    assert f"rednet{depth}, 10 classes, " in capsys.readouterr().out
    # Agreement means something only if the logits are of a usual size and depend on the image.
    assert 0.1 < (expected[0] - expected[1]).abs().max() < 10
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    # Each tensor is somewhere, once; so are the counters, which no logit depends on.
    theirs, ours = (sorted(t.double().sum().item() for t in m.state_dict().values()) for m in (published, model))
    assert ours == theirs


def test_the_rendering_has_the_published_number_of_parameters():
    with torch.device("meta"):
        counts = {depth: sum(p.numel() for p in published_rednet(depth, 1000).parameters()) / 1e6 for depth in DEPTHS}
    assert counts == pytest.approx({26: 9.23, 38: 12.39, 50: 15.54, 101: 25.65, 152: 33.99}, abs=0.0055)


# Forms of a checkpoint


def without_counters(state_dict):
    return {name: tensor for name, tensor in state_dict.items() if not name.endswith("num_batches_tracked")}


@pytest.mark.parametrize("form", ["mmcls", "plain", "before zip", "safetensors", "without counters"])
def test_forms_of_a_checkpoint(form, tmp_path):
    checkpoint = blank_checkpoint(epoch=130, config="model = dict()")
    checkpoint["state_dict"]["head.fc.bias"] = torch.arange(10.0)
    options = {}
    if form == "plain":
        checkpoint = checkpoint["state_dict"]
    elif form == "before zip":
        options["_use_new_zipfile_serialization"] = False
    elif form == "safetensors":
        tensors = {name: tensor.contiguous() for name, tensor in checkpoint["state_dict"].items()}
        checkpoint = tmp_path / "rednet.safetensors"
        save_file(tensors, checkpoint)
    elif form == "without counters":
        checkpoint["state_dict"] = without_counters(checkpoint["state_dict"])
    folder = convert(tmp_path, checkpoint, **options)
    assert {path.name for path in folder.iterdir()} >= {"config.json", "model.safetensors", "preprocessor_config.json"}
    model = IBResNetForImageClassification.from_pretrained(folder)
    assert model.classifier.bias.tolist() == list(range(10))
    assert model.config.id2label[3] == "LABEL_3"


# Names of classes


@pytest.mark.parametrize("kind", [list, tuple])
def test_names_that_the_checkpoint_brings(kind, tmp_path):
    names = [f"class, number {i}" for i in range(10)]
    (teacher,) = load_teachers({"inv": convert(tmp_path, blank_checkpoint(CLASSES=kind(names)))})
    assert teacher.class_names == names
    assert teacher.model.config.label2id == {name: i for i, name in enumerate(names)}


def test_names_from_a_file_come_first(tmp_path):
    (tmp_path / "names.txt").write_text("".join(f"größe {i}\n" for i in range(10)), encoding="utf-8")
    checkpoint = blank_checkpoint(CLASSES=list("abcdefghij"))
    folder = convert(tmp_path, checkpoint, "--class_names", str(tmp_path / "names.txt"))
    (teacher,) = load_teachers({"inv": folder})
    assert teacher.class_names == [f"größe {i}" for i in range(10)]


@pytest.mark.parametrize("meta", [{}, {"CLASSES": None}, {"CLASSES": list(range(1000))}])
def test_a_thousand_unnamed_classes_are_imagenets(meta, tmp_path):
    (teacher,) = load_teachers({"inv": convert(tmp_path, blank_checkpoint(num_classes=1000, **meta))})
    assert (teacher.class_names[0], teacher.class_names[207]) == ("tench", "golden retriever")
    assert len(set(teacher.class_names)) == 1000


def test_another_number_of_names_than_classes_is_refused(tmp_path):
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    message = mistake(tmp_path, blank_checkpoint(), "--class_names", str(tmp_path / "names.txt"))
    assert "10 classes" in message and "class_names has 2 names" in message
    message = mistake(tmp_path, blank_checkpoint(CLASSES=["cat", "dog", "owl"]))
    assert "10 classes" in message and "checkpoint has 3 names" in message


# Image processor


def test_images_are_prepared_as_the_authors_evaluation_does(tmp_path):
    (teacher,) = load_teachers({"inv": convert(tmp_path, blank_checkpoint())})
    # Made larger, which OpenCV and this library do alike: 256 × 384, of which the middle is taken.
    image = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (100, 150, 3), dtype=np.uint8))
    pixel_values = teacher.image_processor(image, return_tensors="pt")["pixel_values"]
    pixels = np.asarray(image.resize((384, 256), PIL.Image.Resampling.BILINEAR))[16:240, 80:304]
    expected = (pixels - [123.675, 116.28, 103.53]) / [58.395, 57.12, 57.375]
    np.testing.assert_allclose(pixel_values[0].permute(1, 2, 0), expected, rtol=0, atol=1.5 / 57)
    assert teacher.logits(pixel_values).shape == (1, 10)


# Mistakes


def test_a_tensor_left_over_is_named(tmp_path):
    checkpoint = blank_checkpoint()
    checkpoint["state_dict"]["neck.fpn.weight"] = torch.ones(1)
    assert "1 left over (neck.fpn.weight)" in mistake(tmp_path, checkpoint)


def test_a_missing_tensor_is_named(tmp_path):
    checkpoint = blank_checkpoint()
    for name in ("conv1.conv.weight", "conv1.bn.weight", "conv1.bn.bias", "conv2.conv.bias"):
        del checkpoint["state_dict"][f"backbone.layer3.1.conv2.{name}"]
    assert "4 missing (backbone.layer3.1.conv2.conv1.conv.weight, " in mistake(tmp_path, checkpoint)


def test_a_tensor_of_another_shape_is_named(tmp_path):
    checkpoint = blank_checkpoint()
    checkpoint["state_dict"]["backbone.layer2.0.conv2.conv2.conv.weight"] = torch.ones(9 * 8, 32, 1, 1)
    message = mistake(tmp_path, checkpoint)
    assert all(
        part in message for part in ("backbone.layer2.0.conv2.conv2.conv.weight", "(72, 32, 1, 1)", "(392, 32, 1, 1)")
    )


def test_another_depth_is_refused_with_the_known_ones(tmp_path):
    checkpoint = blank_checkpoint(50)
    state_dict = checkpoint["state_dict"]
    checkpoint["state_dict"] = {name: state_dict[name] for name in state_dict if ".layer4.2." not in name}
    message = mistake(tmp_path, checkpoint)
    assert "(3, 4, 6, 2)" in message and "rednet26 (1, 2, 4, 1), " in message


def test_a_backbone_alone_is_refused(tmp_path):
    state_dict = blank_checkpoint()["state_dict"]
    backbone = {name.removeprefix("backbone."): tensor for name, tensor in state_dict.items() if "head" not in name}
    assert '"head.fc.weight"' in mistake(tmp_path, backbone)


@pytest.mark.parametrize("is_zip", [True, False])
def test_what_must_be_unpickled_is_refused(is_zip, tmp_path):
    checkpoint = blank_checkpoint(started=datetime.timedelta(1))
    message = mistake(tmp_path, checkpoint, _use_new_zipfile_serialization=is_zip)
    assert "(datetime.timedelta)" in message and "weights_only=False" in message
    # The advice of the message works.
    tensors = torch.load(tmp_path / "rednet.pth", weights_only=False)["state_dict"]
    assert (convert(tmp_path, tensors) / "model.safetensors").exists()


@pytest.mark.parametrize("name", ["rednet.pth", "rednet.safetensors"])
@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"PK\x03\x04 broken"])
def test_a_damaged_file_is_refused(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert f"{tmp_path / name} is damaged" in mistake(tmp_path, tmp_path / name)


@pytest.mark.parametrize("content", [[torch.ones(2)], {"epoch": 3}, {"state_dict": [1]}])
def test_a_file_without_tensors_by_name_is_refused(content, tmp_path):
    assert "no state dict" in mistake(tmp_path, content)


def test_no_file_at_all(tmp_path):
    assert "No such file or directory" in mistake(tmp_path, tmp_path / "nowhere.pth")
