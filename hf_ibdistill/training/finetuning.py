"""Fine-tune a student without teachers, by any `Trainer`: freeze layers, and set learning rates by layer."""

from torch import nn
from transformers import PreTrainedModel, Trainer


def _parts(model: PreTrainedModel) -> tuple[nn.Module, nn.ModuleList]:
    """The embeddings and the layers of a vision transformer."""
    backbone = model.base_model
    embeddings, layers = getattr(backbone, "embeddings", None), getattr(backbone, "layers", None)
    if embeddings is None or not isinstance(layers, nn.ModuleList):
        raise ValueError(
            f"{type(backbone).__name__} has no `embeddings` and `layers`. Give a student (IBViT), a ViT or a DeiT."
        )
    return embeddings, layers


def freeze_layers(model: PreTrainedModel, num_layers: int) -> None:
    """Freeze the embeddings and the first `num_layers` layers of a student, ViT or DeiT; 0 freezes nothing.

    For a linear probe, freeze everything but the heads, as with any transformers model:
    `model.base_model.requires_grad_(False)`.

    Raises:
        ValueError: the model has fewer layers than `num_layers`, or is of another kind.
    """
    embeddings, layers = _parts(model)
    if not 0 <= num_layers <= len(layers):
        raise ValueError(
            f"num_layers={num_layers}, but the model has {len(layers)} layers. Freeze 0 to {len(layers)}."
        )
    for part in [embeddings, *layers[:num_layers]] if num_layers else []:
        part.requires_grad_(False)


def layer_decay_groups(
    model: PreTrainedModel, learning_rate: float, layer_decay: float, weight_decay: float = 0.0
) -> list[dict]:
    r"""Parameter groups for an optimizer, with layer-wise learning-rate decay (BEiT, arXiv 2106.08254):

        learning rate = learning_rate · layer_decay^(L + 1 − depth)

    The model has L layers. The embeddings (stems, tokens, positions) have depth 0, layer i = 0 … L − 1 has depth i + 1,
    and everything else (last layer norm, heads) has depth L + 1. So general, pretrained features change less than new
    ones.

    Args:
        model: a student (IBViT), ViT or DeiT; frozen parameters are left out.
        learning_rate: of the heads.
        layer_decay: above 0, at most 1; 1 gives all depths the same rate.
        weight_decay: of the parameters that `Trainer` decays.

    Returns:
        One group for each depth and weight decay. The groups of the heads come first, because `Trainer` logs the rate of
        the first group.

    Raises:
        ValueError: `layer_decay` is not in range, or the model is of another kind.

    Example:

    ```python
    >>> optimizer = torch.optim.AdamW(layer_decay_groups(model, 5e-4, layer_decay=0.75, weight_decay=0.05))
    >>> trainer = Trainer(model, args, optimizers=(optimizer, None), train_dataset=images)
    ```
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay={layer_decay} must be above 0 and at most 1.")
    embeddings, layers = _parts(model)
    depths = dict.fromkeys(embeddings.parameters(), 0)
    depths |= {parameter: depth for depth, layer in enumerate(layers, 1) for parameter in layer.parameters()}
    # A method that uses nothing but the model.
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
