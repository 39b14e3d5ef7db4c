"""Turn the checkpoint of a ViT or DeiT into a student."""

import logging
import math
import os

import torch
from torch import nn
from transformers import (
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    PreTrainedConfig,
    PreTrainedModel,
    ViTForImageClassification,
)

from .configuration_ibvit import IBViTConfig


logger = logging.getLogger(__name__)


def convert_vit(
    model_class: type[PreTrainedModel],
    name_or_path: str | os.PathLike,
    teacher_names: list[str] | tuple[str, ...],
    image_size: int | None,
    **kwargs,
) -> PreTrainedModel:
    """A model of this class with the weights of a ViT or DeiT; see [`IBViTForImageClassification.from_vit`]."""
    names = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token", "variant")
    location = {name: kwargs.pop(name) for name in names if name in kwargs}
    saved_config, _ = PreTrainedConfig.get_config_dict(name_or_path, **location)
    model_type = saved_config.get("model_type")
    if model_type not in ("vit", "deit"):
        raise ValueError(
            f'{name_or_path} is of type "{model_type}". Give from_vit a checkpoint of type "vit" or "deit".'
        )
    source_class = ViTForImageClassification if model_type == "vit" else DeiTForImageClassification
    if DeiTForImageClassificationWithTeacher.__name__ in (saved_config.get("architectures") or ()):
        source_class = DeiTForImageClassificationWithTeacher
    source_config = source_class.config_class.from_dict(saved_config)
    keeps_distillation_token = model_type == "deit" and not teacher_names
    if keeps_distillation_token:
        teacher_names = ("distillation",)
    has_fusion, dtype = "fusion" in kwargs, kwargs.pop("dtype", "auto")
    config, kwargs = _convert_config(source_config, teacher_names, image_size, **kwargs)

    source, loaded = source_class.from_pretrained(
        name_or_path, config=source_config, use_safetensors=True, output_loading_info=True, **location
    )
    left_out = {"pooler", "mask_token", "decoder"}
    unused = [name for name in sorted(loaded["unexpected_keys"]) if not left_out & {*name.split(".")}]
    missing = [name for name in sorted(loaded["missing_keys"]) if "classifier" not in name]
    if unused or missing:
        raise ValueError(
            f"{name_or_path} is no {source_class.__name__}: its tensors {unused} are unknown, and {missing} are missing."
        )
    has_heads = not loaded["missing_keys"] and config.num_labels == source_config.num_labels
    if keeps_distillation_token:
        if not has_fusion:
            is_mean = has_heads and source_class is DeiTForImageClassificationWithTeacher
            config.fusion = "mean_logits" if is_mean else "class_token"
        logger.warning(
            '%s attends to a distillation token. It stays as the teacher token "distillation", with fusion="%s".',
            name_or_path,
            config.fusion,
        )
    weights = _convert_weights(source, config, has_heads)
    model = model_class.from_pretrained(None, config=config, state_dict=weights, dtype=dtype, **kwargs)
    model.config.name_or_path = model.name_or_path = str(name_or_path)
    return model


def interpolate_positions(positions: torch.Tensor, side: int, size: tuple[int, int]) -> torch.Tensor:
    """Position embeddings for another grid of patches.

    Args:
        positions: (1, tokens + side², hidden_size).
        side: patches per side that the embeddings are for.
        size: patches per side of the new grid, vertically and horizontally.

    Returns:
        (1, tokens + size[0] · size[1], hidden_size). The tokens keep theirs; those of the patches are interpolated (bicubic).
    """
    if size == (side, side):
        return positions
    tokens, patches = positions[:, : -(side**2)], positions[:, -(side**2) :]
    patches = patches.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    patches = nn.functional.interpolate(patches, size, mode="bicubic", align_corners=False)
    return torch.cat((tokens, patches.flatten(2).transpose(1, 2)), dim=1)


def _convert_config(
    source: PreTrainedConfig, teacher_names: list[str] | tuple[str, ...], image_size: int | None, **kwargs
) -> tuple[IBViTConfig, dict]:
    """Our configuration with the fields of a `ViTConfig` or `DeiTConfig`, and the `kwargs` that are no fields. Fields among
    the `kwargs` come first."""
    names = IBViTConfig().to_dict().keys() - {"model_type", "architectures", "transformers_version"}
    fields = {name: value for name, value in source.to_dict().items() if name in names}
    for name in ("image_size", "patch_size"):
        sides = fields[name] if isinstance(fields[name], (list, tuple)) else [fields[name]]
        if len(set(sides)) > 1:
            raise ValueError(f"The checkpoint has {name}={fields[name]}. Images and patches must be square.")
        fields[name] = sides[0]
    shape = ("patch_size", "num_channels", "hidden_size", "num_hidden_layers", "num_attention_heads", "qkv_bias")
    shape = {"patch_embedding": "linear", **{name: fields[name] for name in (*shape, "intermediate_size")}}
    fields["teacher_names"] = teacher_names
    if image_size is not None:
        fields["image_size"] = image_size
    config, kwargs = IBViTConfig.from_dict(fields, return_unused_kwargs=True, **kwargs)
    config.validate()
    for name, value in shape.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"{name}={getattr(config, name)!r} does not fit the weights, which are for {name}={value!r}. Leave it out."
            )
    return config, kwargs


def _convert_weights(source: PreTrainedModel, config: IBViTConfig, has_heads: bool) -> dict[str, torch.Tensor]:
    """The weights of a ViT or DeiT of transformers under our names; see [`IBViTForImageClassification.from_vit`]."""
    weights = source.base_model.state_dict()
    names = [f"embeddings.{name}_token" for name in ("cls", "distillation")]
    tokens = torch.cat([weights.pop(name) for name in names if name in weights], dim=1)
    num_tokens = tokens.shape[1]
    # The token of the checkpoint that each of our tokens starts as.
    starts = [min(i, num_tokens - 1) for i in range(1 + len(config.teacher_names))]
    weights["embeddings.class_token"] = tokens[:, :1]
    if config.teacher_names:
        weights["embeddings.teacher_tokens"] = tokens[:, starts[1:]]
    positions, side = weights["embeddings.position_embeddings"], config.image_size // config.patch_size
    positions = interpolate_positions(positions, math.isqrt(positions.shape[1] - num_tokens), (side, side))
    positions = torch.cat((positions[:, starts], positions[:, num_tokens:]), dim=1)
    weights["embeddings.position_embeddings"] = positions
    weights = {name.replace("patch_embeddings.projection", "stems.convolution.0"): weights[name] for name in weights}
    weights = {f"ibvit.{name}": tensor for name, tensor in weights.items()}
    if has_heads:
        heads = [module for name, module in source.named_children() if name.endswith("classifier")]
        names = ["class_head", *(f"teacher_heads.{i}" for i in range(len(config.teacher_names)))]
        for name, start in zip(names, starts):
            head = heads[min(start, len(heads) - 1)].state_dict()
            weights |= {f"{name}.{key}": tensor.clone() for key, tensor in head.items()}
    return weights
