"""Start a student from any checkpoint, for other teachers, images and classes."""

import itertools
import math
import os

import torch
from transformers import AutoImageProcessor, BaseImageProcessor, PreTrainedConfig

from .data.classes import config_class_names
from .models.configuration_ibvit import IBViTConfig
from .models.conversion_vit import interpolate_positions
from .models.modeling_ibvit import IBViTForImageClassification
from .teachers import explain_loading


def load_student(
    name_or_path: str | os.PathLike, teacher_names: list[str] | tuple[str, ...] | None = None, **kwargs
) -> IBViTForImageClassification:
    """A student for other teachers, classes or another image size, in evaluation mode and float32.

    The token, position, head and (in `"bias_stems"`) stem of a teacher belong to its name. They are kept if the name stays
    and left out if it goes. A new name gets copies of the token, position and head of the class token, and the default
    stem. If the names of the classes differ, all heads start from nothing, with a warning of transformers. Position
    embeddings of the patches are interpolated (bicubic).

    Args:
        name_or_path: folder or Hub id of a saved student, or of a ViT or DeiT checkpoint (see
            [`IBViTForImageClassification.from_vit`]; the distillation token of a DeiT becomes the first teacher's).
        teacher_names: as in [`IBViTConfig`]. `None` keeps the model's own, which suits fine-tuning without teachers,
            because the other tokens attend to them.
        kwargs: fields of [`IBViTConfig`] to change, such as `image_size`, `fusion` and those of [`class_config`]. `None` keeps
            the field of the checkpoint.

    Raises:
        TypeError: `name_or_path` is no path, or a field does not exist.
        ValueError: the checkpoint is of another type, or its files are damaged.
        StrictDataclassClassValidationError: as from [`IBViTConfig`].
        RuntimeError: the weights do not fit a given field, such as `patch_size`.
        OSError: there is no such checkpoint.

    Example:

    ```python
    >>> model = load_student("user/student", image_size=32, **class_config(images))
    >>> model = load_student("facebook/deit-tiny-patch16-224", teacher_names=("conv", "inv"), **class_config(images))
    ```
    """
    if not isinstance(name_or_path, (str, os.PathLike)):
        raise TypeError(f"name_or_path is a {type(name_or_path).__name__}. Pass the folder or Hub id of a checkpoint.")
    with explain_loading("The student", name_or_path):
        model_type = PreTrainedConfig.get_config_dict(name_or_path)[0].get("model_type")
        if model_type == IBViTConfig.model_type:
            model = IBViTForImageClassification.from_pretrained(name_or_path, dtype=torch.float32)
        else:
            # Unless it has another name, `from_vit` would keep a distillation token that is not wanted.
            names = () if teacher_names is None else teacher_names or ("left_out",)
            model = IBViTForImageClassification.from_vit(name_or_path, teacher_names=names, dtype=torch.float32)
    old, weights = model.config, model.state_dict()
    fields = old.to_dict()
    if teacher_names is not None:
        fields["teacher_names"] = teacher_names
        fields["teacher_spatial_operators"] = None
        if old.patch_embedding == "bias_stems":
            stems = dict(zip(old.teacher_names, old.teacher_token_stems))
            alternating = itertools.cycle(("convolution", "involution"))
            fields["teacher_spatial_operators"] = [stems.get(n, stem) for n, stem in zip(teacher_names, alternating)]
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    config, kwargs = IBViTConfig.from_dict(fields, return_unused_kwargs=True, **kwargs)
    if kwargs:
        name, value = next(iter(kwargs.items()))
        raise TypeError(f"{name}={value!r} is no field of IBViTConfig. Check its spelling.")
    config.validate()
    weights = _match_teachers(weights, old.teacher_names, config.teacher_names)
    if config_class_names(config) != config_class_names(old):
        heads = ("class_head.", "teacher_heads.")
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith(heads)}
    if config.image_size != old.image_size:
        name, side = "ibvit.embeddings.position_embeddings", config.image_size // old.patch_size
        weights[name] = interpolate_positions(weights[name], old.image_size // old.patch_size, (side, side))
    model = IBViTForImageClassification.from_pretrained(None, config=config, state_dict=weights, dtype=torch.float32)
    model.config.name_or_path = model.name_or_path = str(name_or_path)
    return model


def _match_teachers(weights: dict[str, torch.Tensor], old: list[str], new: list[str]) -> dict[str, torch.Tensor]:
    """The weights of a student for other teachers, by their names; see [`load_student`]."""
    # For each new token, the old one that it starts as; the class token is number 0.
    starts = [0, *(1 + old.index(name) if name in old else 0 for name in new)]
    embeddings = "ibvit.embeddings"
    kinds = ("class_token", "teacher_tokens") if old else ("class_token",)
    tokens = torch.cat([weights[f"{embeddings}.{kind}"] for kind in kinds], dim=1)
    positions = weights[f"{embeddings}.position_embeddings"]
    matched = {name: tensor for name, tensor in weights.items() if not name.startswith("teacher_heads.")}
    matched.pop(f"{embeddings}.teacher_tokens", None)
    if new:
        matched[f"{embeddings}.teacher_tokens"] = tokens[:, starts[1:]]
    matched[f"{embeddings}.position_embeddings"] = torch.cat(
        (positions[:, starts], positions[:, 1 + len(old) :]), dim=1
    )
    heads = ["class_head", *(f"teacher_heads.{i}" for i in range(len(old)))]
    for i, start in enumerate(starts[1:]):
        for part in ("weight", "bias"):
            matched[f"teacher_heads.{i}.{part}"] = weights[f"{heads[start]}.{part}"].clone()
    return matched


def load_image_processor(name_or_path: str | os.PathLike, image_size: int | None = None) -> BaseImageProcessor:
    """The image processor of a checkpoint.

    Args:
        name_or_path: folder or Hub id of the checkpoint.
        image_size: side of its images in pixels, as in [`load_student`]. `None` keeps the size of the checkpoint.

    Raises:
        OSError: there is no such image processor.
    """
    sizes = {}
    if image_size is not None:
        # The processor of a DeiT cuts the middle out of a larger image.
        side = {"height": image_size, "width": image_size}
        sizes = {"size": side, "crop_size": side}
    return AutoImageProcessor.from_pretrained(name_or_path, **sizes)


def default_patch_size(image_size: int) -> int:
    """Side of a patch in pixels: the divisor of the image's side that is nearest to 2 (below 16 pixels), 4 (up to 64) or
    16, by ratio."""
    target = 2 if image_size < 16 else 4 if image_size <= 64 else 16
    divisors = [side for side in range(1, image_size + 1) if image_size % side == 0]
    return min(divisors, key=lambda side: abs(math.log(side / target)))
