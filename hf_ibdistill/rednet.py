"""Turn a published RedNet checkpoint (arXiv 2103.06255, github.com/d-li14/involution) into a teacher."""

import os
import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torchvision.models import ResNet50_Weights
from transformers import BitImageProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling

from .models.configuration_ibresnet import PRESETS, IBResNetConfig
from .models.modeling_ibresnet import IBResNetForImageClassification


# Blocks of each stage → name.
REDNETS = {settings["depths"]: name for name, settings in PRESETS.items() if name.startswith("rednet")}

# Our names → the published names, replaced from top to bottom.
_RENAMING = {
    "stem.0.convolution": "backbone.stem.0.conv",
    "stem.0.normalization": "backbone.stem.0.bn",
    "stem.1.involution": "backbone.stem.1",
    "stem.1.normalization": "backbone.stem.2",
    "stem.2.convolution": "backbone.stem.4.conv",
    "stem.2.normalization": "backbone.stem.4.bn",
    **{f"stages.{i}": f"backbone.layer{i + 1}" for i in range(4)},
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


def convert_rednet_checkpoint(
    checkpoint: str | os.PathLike, output_dir: str | os.PathLike, class_names: list[str] | None = None
) -> IBResNetForImageClassification:
    """Convert a checkpoint into a folder that `from_pretrained` loads, with an image processor.

    The tensors give the depth and the number of classes. Every tensor is used once, and none is left over or missing.

    The image processor repeats the published evaluation: short side to 256 pixels, the middle 224 × 224 of it, mean and
    deviation of ImageNet. One difference remains: it smooths before it makes an image smaller, and OpenCV does not.

    Args:
        checkpoint: a file of `torch.save`, of which only tensors and plain values are read, or of safetensors.
        output_dir: folder of the converted model and its image processor.
        class_names: the names of the classes. `None` takes those of the checkpoint, or of ImageNet for 1,000 classes.

    Returns:
        The model, in training mode.

    Raises:
        ValueError: the file is damaged, holds code, or is no RedNet classifier; or the number of names is wrong.
        OSError: the file cannot be read.
    """
    state_dict, own_names = read_checkpoint(checkpoint)
    if "head.fc.weight" not in state_dict:
        raise ValueError(f'{checkpoint} holds no image classifier, because it has no "head.fc.weight".')
    count = len(state_dict["head.fc.weight"])
    names = own_names if class_names is None else class_names
    if names is None:
        names = ResNet50_Weights.DEFAULT.meta["categories"] if count == 1000 else [f"LABEL_{i}" for i in range(count)]
    if len(names) != count:
        source = "the checkpoint" if class_names is None else "class_names"
        raise ValueError(
            f"The model has {count:,} classes, but {source} has {len(names):,} names. Give one for each class."
        )
    classes = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    model = convert(state_dict, IBResNetConfig.from_preset(detect_preset(state_dict), **classes))
    model.save_pretrained(output_dir)
    BitImageProcessor(
        size={"shortest_edge": 256},
        resample=PILImageResampling.BILINEAR,
        crop_size={"height": 224, "width": 224},
        image_mean=IMAGENET_DEFAULT_MEAN,
        image_std=IMAGENET_DEFAULT_STD,
    ).save_pretrained(output_dir)
    return model


def read_checkpoint(path: str) -> tuple[dict[str, torch.Tensor], list[str] | None]:
    """The tensors by name, and the names of the classes if the file has them. No code in the file is run."""
    try:
        is_safetensors = Path(path).suffix == ".safetensors"
        content = load_file(path) if is_safetensors else torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged file may raise anything
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code is None:
            raise ValueError(
                f"{path} is damaged, or no file of torch.save or safetensors ({type(error).__name__}). Download it again."
            ) from error
        raise ValueError(
            f"{path} holds code ({code[1]}), which loading would run. If you trust its source, convert its tensors alone: "
            'torch.save(torch.load(path, weights_only=False)["state_dict"], new_path).'
        ) from error
    wrapper = content if isinstance(content, dict) else {}
    state_dict, meta = wrapper.get("state_dict", wrapper), wrapper.get("meta")
    tensors = state_dict.values() if isinstance(state_dict, dict) else []
    if not tensors or not all(isinstance(tensor, torch.Tensor) for tensor in tensors):
        raise ValueError(f'{path} holds no state dict: names mapped to tensors, at the top or under "state_dict".')
    names = meta.get("CLASSES") if isinstance(meta, dict) else None
    is_plain = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
    return state_dict, list(names) if is_plain else None


def detect_preset(state_dict: dict[str, torch.Tensor]) -> str:
    blocks = set(re.findall(r"^backbone\.layer(\d+)\.(\d+)\.", "\n".join(state_dict), re.MULTILINE))
    depths = tuple(sum(stage == number for stage, _ in blocks) for number in "1234")
    if depths not in REDNETS:
        known = ", ".join(f"{name} {depths}" for depths, name in REDNETS.items())
        raise ValueError(f"backbone.layer1 to layer4 have {depths} blocks. Give one of the RedNets: {known}.")
    return REDNETS[depths]


def authors_name(name: str) -> str:
    for ours, theirs in _RENAMING.items():
        name = re.sub(rf"\b{re.escape(ours)}\b", theirs, name)
    return name


def convert(state_dict: dict[str, torch.Tensor], config: IBResNetConfig) -> IBResNetForImageClassification:
    model = IBResNetForImageClassification(config)
    expected = {authors_name(name): (name, tensor) for name, tensor in model.state_dict().items()}
    left_over = [name for name in state_dict if name not in expected]
    # Files of old releases of PyTorch have no counters of batches. No prediction depends on them.
    missing = [name for name in expected if name not in state_dict and not name.endswith("num_batches_tracked")]
    for names, problem in ((left_over, "left over"), (missing, "missing")):
        if names:
            first = f"{', '.join(names[:3])}{', …' if len(names) > 3 else ''}"
            raise ValueError(f"These are not the tensors of a RedNet classifier: {len(names)} {problem} ({first}).")
    converted = {}
    for theirs, (ours, initial) in expected.items():
        tensor = converted[ours] = state_dict.get(theirs, initial)
        if tensor.shape != initial.shape:
            raise ValueError(
                f"{theirs} has the shape {tuple(tensor.shape)}. In a RedNet it is {tuple(initial.shape)}."
            )
    model.load_state_dict(converted)
    return model
