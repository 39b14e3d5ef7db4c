"""Turn a RedNet checkpoint of the involution paper's authors (github.com/d-li14/involution) into a folder that
`from_pretrained` loads: a ready teacher.

python scripts/convert_rednet_checkpoint.py --checkpoint rednet50.pth --output_dir outputs/rednet50

Takes a file of `torch.save` or safetensors, whose tensors tell the depth and the number of classes. Every tensor is
used once, and none is left over or missing. The image processor does what the authors' evaluation does (short side to
256 pixels, the middle 224 × 224 of it, ImageNet's mean and deviation), except that it smooths before it makes an image
smaller, which their OpenCV does not.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from arguments import parse_arguments, run
from safetensors.torch import load_file
from torchvision.models import ResNet50_Weights
from transformers import BitImageProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling

from hf_ibdistill import IBResNetConfig, IBResNetForImageClassification
from hf_ibdistill.models.configuration_ibresnet import PRESETS


REDNETS = {settings["depths"]: name for name, settings in PRESETS.items() if name.startswith("rednet")}

# Ours → the authors', replaced from top to bottom.
RENAMING = {
    "stem.0.convolution": "backbone.stem.0.conv",
    "stem.0.normalization": "backbone.stem.0.bn",
    "stem.1.involution": "backbone.stem.1",
    "stem.1.normalization": "backbone.stem.2",
    "stem.2.convolution": "backbone.stem.4.conv",
    "stem.2.normalization": "backbone.stem.4.bn",
    "stages.0": "backbone.layer1",
    "stages.1": "backbone.layer2",
    "stages.2": "backbone.layer3",
    "stages.3": "backbone.layer4",
    "reduce.convolution": "conv1",
    "reduce.normalization": "bn1",
    "spatial.involution": "conv2",
    "spatial.normalization": "bn2",
    "expand.convolution": "conv3",
    "expand.normalization": "bn3",
    "shortcut.convolution": "downsample.0",
    "shortcut.normalization": "downsample.1",
    # Within an involution.
    "reduce": "conv1.conv",
    "norm": "conv1.bn",
    "expand": "conv2.conv",
    "classifier": "head.fc",
}


@dataclass
class ConversionArguments:
    checkpoint: str = field(metadata={"help": "The authors' checkpoint: .pth, or the same tensors in .safetensors."})
    output_dir: str = field(metadata={"help": "Folder of the converted model and its image processor."})
    class_names: str | None = field(
        default=None,
        metadata={
            "help": "Text file with the name of a class on each line. By default the names that the checkpoint "
            "brings, else ImageNet's where there are 1,000 classes."
        },
    )


def read_checkpoint(path: str) -> tuple[dict[str, torch.Tensor], list[str] | None]:
    """The tensors by their names, and the names of the classes if it has them. Nothing in the file is executed."""
    try:
        if Path(path).suffix == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # what a damaged file raises depends on the damage: anything
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code is None:
            raise ValueError(
                f"{path} is damaged, or no file of torch.save or safetensors ({type(error).__name__})."
            ) from error
        raise ValueError(
            f"{path} holds more than tensors and plain values ({code[1]}), which could run any code on being loaded; "
            "if you trust its source, save its tensors alone, "
            'torch.save(torch.load(path, weights_only=False)["state_dict"], new_path), and convert that file.'
        ) from error
    wrapper = content if isinstance(content, dict) else {}
    state_dict, meta = wrapper.get("state_dict", wrapper), wrapper.get("meta")
    tensors = state_dict.values() if isinstance(state_dict, dict) else []
    if not tensors or not all(isinstance(tensor, torch.Tensor) for tensor in tensors):
        raise ValueError(f'{path} holds no state dict: name → tensor, either at the top or under "state_dict".')
    names = meta.get("CLASSES") if isinstance(meta, dict) else None
    is_plain = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
    return state_dict, list(names) if is_plain else None


def detect_preset(state_dict: dict[str, torch.Tensor]) -> str:
    blocks = set(re.findall(r"^backbone\.layer(\d+)\.(\d+)\.", "\n".join(state_dict), re.MULTILINE))
    depths = tuple(sum(stage == number for stage, _ in blocks) for number in "1234")
    if depths not in REDNETS:
        known = ", ".join(f"{name} {depths}" for depths, name in REDNETS.items())
        raise ValueError(f"backbone.layer1 to layer4 have {depths} blocks, which no RedNet has: {known}.")
    return REDNETS[depths]


def name_classes(count: int, own_names: list[str] | None, file: str | None) -> dict:
    """The configuration's fields; none where nobody names the classes."""
    names, source = own_names, "The checkpoint"
    if file is not None:
        names, source = Path(file).read_text(encoding="utf-8").splitlines(), file
    elif names is None and count == 1000:
        names = ResNet50_Weights.DEFAULT.meta["categories"]
    if names is None:
        return {"num_labels": count}
    if len(names) != count:
        raise ValueError(
            f"{source} names {len(names):,} classes and the model has {count:,}; give their names by --class_names."
        )
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def authors_name(name: str) -> str:
    for ours, theirs in RENAMING.items():
        name = re.sub(rf"\b{re.escape(ours)}\b", theirs, name)
    return name


def convert(state_dict: dict[str, torch.Tensor], config: IBResNetConfig) -> IBResNetForImageClassification:
    model = IBResNetForImageClassification(config)
    expected = {authors_name(name): (name, tensor) for name, tensor in model.state_dict().items()}
    left_over = [name for name in state_dict if name not in expected]
    # Files from before PyTorch counted batches have no counters, which nothing here reads.
    missing = [name for name in expected if name not in state_dict and not name.endswith("num_batches_tracked")]
    for names, problem in ((left_over, "left over"), (missing, "missing")):
        if names:
            first = f"{', '.join(names[:3])}{', …' if len(names) > 3 else ''}"
            raise ValueError(f"Not the tensors of a RedNet image classifier; {len(names)} {problem}: {first}.")
    converted = {}
    for theirs, (ours, initial) in expected.items():
        converted[ours] = state_dict.get(theirs, initial)
        if converted[ours].shape != initial.shape:
            raise ValueError(f"{theirs} is {tuple(converted[ours].shape)}; a RedNet has {tuple(initial.shape)} there.")
    model.load_state_dict(converted)
    return model


def build_authors_image_processor() -> BitImageProcessor:
    return BitImageProcessor(
        size={"shortest_edge": 256},
        resample=PILImageResampling.BILINEAR,
        crop_size={"height": 224, "width": 224},
        image_mean=IMAGENET_DEFAULT_MEAN,
        image_std=IMAGENET_DEFAULT_STD,
    )


def main():
    (arguments,) = parse_arguments(ConversionArguments)
    state_dict, own_names = read_checkpoint(arguments.checkpoint)
    if "head.fc.weight" not in state_dict:
        raise ValueError(f'{arguments.checkpoint} holds no image classifier: there is no "head.fc.weight".')
    preset = detect_preset(state_dict)
    classes = name_classes(len(state_dict["head.fc.weight"]), own_names, arguments.class_names)
    model = convert(state_dict, IBResNetConfig.from_preset(preset, **classes))
    model.save_pretrained(arguments.output_dir)
    build_authors_image_processor().save_pretrained(arguments.output_dir)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(f"{preset}, {model.config.num_labels:,} classes, {millions:.2f} M parameters: {arguments.output_dir}")


if __name__ == "__main__":
    run(main)
