"""Start from a saved student: load it for other teachers, images and labels. Fine-tune it without teachers: freeze layers,
choose each layer's learning rate, and let every head learn the labels. All for any `Trainer`."""

import itertools
import os

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, Trainer

from ..data import config_class_names
from ..models.configuration_ibvit import IBViTConfig
from ..models.modeling_ibvit import IBViTForImageClassification, IBViTImageClassifierOutput, interpolate_positions


def load_student(
    name_or_path: str | os.PathLike, teacher_names: list[str] | tuple[str, ...] | None = None, **kwargs
) -> IBViTForImageClassification:
    """A student for other teachers, classes or another image size, in evaluation mode and float32.

    A teacher's token, position, head and, in `"bias_stems"`, stem go with its name: they stay where the name does; a new
    name's start as copies of the class token's, its stem as by default; others are left out. Heads start anew, with
    transformers' warning, where the classes' names are others, also as many; position embeddings of the patches are
    interpolated (bicubic).

    Args:
        name_or_path: folder or Hub id of a saved student, or of a ViT or DeiT checkpoint (see
            [`IBViTForImageClassification.from_vit`], by which a DeiT's distillation token becomes the first teacher's).
        teacher_names: as in [`IBViTConfig`]. `None` keeps the model's own, as fine-tuning without teachers wants it, since
            the other tokens attend to them.
        kwargs: fields of [`IBViTConfig`] to change: `image_size`, `fusion`, those of [`class_config`], dropout, ….

    Raises:
        ValueError: the checkpoint is of another type.
        StrictDataclassClassValidationError: as from [`IBViTConfig`].
        RuntimeError: a field was given that the weights do not fit, such as `patch_size`.
        OSError: there is no such checkpoint.

    Example:

    ```python
    >>> model = load_student("user/student", image_size=32, **class_config(images))
    >>> model = load_student("facebook/deit-tiny-patch16-224", teacher_names=("conv", "inv"), **class_config(images))
    ```
    """
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
    config, kwargs = IBViTConfig.from_dict(fields, return_unused_kwargs=True, **kwargs)
    config.validate()
    weights = _match_teachers(weights, old.teacher_names, config.teacher_names)
    if config_class_names(config) != config_class_names(old):
        heads = ("class_head.", "teacher_heads.")
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith(heads)}
    if config.image_size != old.image_size:
        name, side = "ibvit.embeddings.position_embeddings", config.image_size // old.patch_size
        weights[name] = interpolate_positions(weights[name], old.image_size // old.patch_size, (side, side))
    model = IBViTForImageClassification.from_pretrained(
        None, config=config, state_dict=weights, dtype=torch.float32, **kwargs
    )
    model.config.name_or_path = model.name_or_path = str(name_or_path)
    return model


def _match_teachers(weights: dict[str, torch.Tensor], old: list[str], new: list[str]) -> dict[str, torch.Tensor]:
    """A student's weights for other teachers, by their names; see [`load_student`]."""
    # Which of the old tokens, the class token first, each of the new starts as.
    starts = [0, *(1 + old.index(name) if name in old else 0 for name in new)]
    embeddings = "ibvit.embeddings"
    tokens = torch.cat([weights[f"{embeddings}.{kind}"] for kind in ("class_token", "teacher_tokens")], dim=1)
    positions = weights[f"{embeddings}.position_embeddings"]
    matched = {name: tensor for name, tensor in weights.items() if not name.startswith("teacher_heads.")}
    matched[f"{embeddings}.teacher_tokens"] = tokens[:, starts[1:]]
    matched[f"{embeddings}.position_embeddings"] = torch.cat(
        (positions[:, starts], positions[:, 1 + len(old) :]), dim=1
    )
    heads = ["class_head", *(f"teacher_heads.{i}" for i in range(len(old)))]
    for i, start in enumerate(starts[1:]):
        for part in ("weight", "bias"):
            matched[f"teacher_heads.{i}.{part}"] = weights[f"{heads[start]}.{part}"].clone()
    return matched


def _parts(model: PreTrainedModel) -> tuple[nn.Module, nn.ModuleList]:
    """A vision transformer's embeddings and layers."""
    backbone = model.base_model
    embeddings, layers = getattr(backbone, "embeddings", None), getattr(backbone, "layers", None)
    if embeddings is None or not isinstance(layers, nn.ModuleList):
        raise ValueError(
            f"{type(backbone).__name__} has no `embeddings` and `layers`; students (IBViT), ViT and DeiT have them."
        )
    return embeddings, layers


def freeze_layers(model: PreTrainedModel, num_layers: int) -> None:
    """Freeze the embeddings and the first `num_layers` layers of a student, ViT or DeiT; 0 freezes nothing.

    For a linear probe freeze everything but the heads, as with any transformers model:
    `model.base_model.requires_grad_(False)`.

    Raises:
        ValueError: the model has fewer layers, or is of another kind.
    """
    embeddings, layers = _parts(model)
    if not 0 <= num_layers <= len(layers):
        raise ValueError(f"The model has {len(layers)} layers; freeze 0 to {len(layers)} of them, not {num_layers}.")
    for part in [embeddings, *layers[:num_layers]] if num_layers else []:
        part.requires_grad_(False)


def layer_decay_groups(
    model: PreTrainedModel, learning_rate: float, layer_decay: float, weight_decay: float = 0.0
) -> list[dict]:
    r"""Parameter groups for an optimizer, with layer-wise learning-rate decay (BEiT, arXiv 2106.08254):

        learning rate = learning_rate · layer_decay^(L + 1 − depth)

    of L layers, where the embeddings (stems, tokens, positions) have depth 0, layer i = 0 … L − 1 has depth i + 1, and
    all else (last layer norm, heads) L + 1. What is pretrained and general so changes less than what is new.

    Args:
        model: a student (IBViT), ViT or DeiT; frozen parameters are left out.
        learning_rate: of the heads.
        layer_decay: above 0, at most 1; 1 gives all the same.
        weight_decay: of the parameters that `Trainer` decays.

    Returns:
        One group for each depth and weight decay, the heads' first, since `Trainer` logs the first group's rate.

    Raises:
        ValueError: `layer_decay` is not in range, or the model is of another kind.

    Example:

    ```python
    >>> optimizer = torch.optim.AdamW(layer_decay_groups(model, 5e-4, layer_decay=0.75, weight_decay=0.05))
    >>> trainer = Trainer(model, args, optimizers=(optimizer, None), train_dataset=images)
    ```
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay is above 0 and at most 1; got {layer_decay}.")
    embeddings, layers = _parts(model)
    depths = dict.fromkeys(embeddings.parameters(), 0)
    depths |= {parameter: depth for depth, layer in enumerate(layers, 1) for parameter in layer.parameters()}
    # It looks at nothing but the model.
    decayed = set(Trainer.get_decay_parameter_names(None, model))
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = depths.get(parameter, len(layers) + 1), name in decayed
            groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": groups[depth, is_decayed],
            "lr": learning_rate * layer_decay ** (len(layers) + 1 - depth),
            "weight_decay": weight_decay if is_decayed else 0.0,
        }
        for depth, is_decayed in sorted(groups, reverse=True)
    ]


def all_heads_loss(
    outputs: IBViTImageClassifierOutput,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """The labels' cross-entropy, mean over the class head and all teacher heads; `Trainer`'s `compute_loss_func`.

    A student's own loss is its class head's, since teachers train the other heads. Without teachers this loss does.

    Args:
        outputs: of a student.
        labels: (N,), class ids.
        num_items_in_batch: the rows of the whole accumulated batch, which the sum over these is divided by; by default N.
        label_smoothing: as in `torch.nn.functional.cross_entropy`.

    Example:

    ```python
    >>> trainer = Trainer(model, args, compute_loss_func=all_heads_loss, train_dataset=images)
    ```
    """
    logits = outputs.class_logits[:, None]
    if outputs.teacher_token_logits is not None:
        logits = torch.cat((logits, outputs.teacher_token_logits), dim=1)
    num_heads = logits.shape[1]
    losses = nn.functional.cross_entropy(
        logits.flatten(0, 1).float(),
        labels.repeat_interleave(num_heads),
        reduction="sum",
        label_smoothing=label_smoothing,
    )
    return losses / num_heads / (len(labels) if num_items_in_batch is None else num_items_in_batch)
