"""Fine-tune a classifier by any `Trainer`: freeze layers, and set learning rates by layer."""

import itertools
import operator
from functools import partial

from torch import nn
from transformers import PreTrainedModel, Trainer

from ..students import head_parameters


def _parts(model: PreTrainedModel) -> tuple[list[nn.Parameter], list[nn.Module]]:
    """The parameters before the layers of a backbone, its embeddings or stem, and the layers."""
    backbone = model.base_model
    for path, module in backbone.named_modules():
        *above, name = path.split(".")
        # A list in an entry of another list holds a part of the layers.
        is_whole = name in ("layers", "layer", "stages", "blocks") and not any(part.isdigit() for part in above)
        if is_whole and isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module):
            first = next(module.parameters())
            return list(itertools.takewhile(partial(operator.is_not, first), backbone.parameters())), list(module)
    raise ValueError(
        f"{type(backbone).__name__} has no list of layers, stages or blocks to freeze or decay. Train it as a whole, or its "
        "head alone (linear_probe)."
    )


def freeze_layers(model: PreTrainedModel, num_layers: int) -> None:
    """Freeze what comes before the layers, and the first `num_layers` layers (stages, blocks) of a model; 0 freezes
    nothing. What is frozen stays in evaluation mode.

    Raises:
        ValueError: the model has fewer layers than `num_layers`, or no list of layers.
    """
    before, layers = _parts(model)
    if not 0 <= num_layers <= len(layers):
        raise ValueError(
            f"num_layers={num_layers}, but the model has {len(layers)} layers. Freeze 0 to {len(layers)}."
        )
    if num_layers:
        for parameter in [*before, *(p for layer in layers[:num_layers] for p in layer.parameters())]:
            parameter.requires_grad_(False)
        for module in model.modules():
            parameters = list(module.parameters())
            if parameters and not any(parameter.requires_grad for parameter in parameters):
                _keep_in_evaluation_mode(module)


def _keep_in_evaluation_mode(module):
    module.register_forward_pre_hook(lambda module, _: module.eval() and None)


def freeze_backbone(model: PreTrainedModel) -> None:
    """Freeze everything but the heads of a classifier, for a linear probe. The frozen part stays in evaluation mode, so that
    its batch norms neither use nor take over the statistics of new images."""
    heads = head_parameters(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in heads)
    for name, module in model.named_modules():
        is_above_a_head = any(head.startswith(f"{name}." if name else "") for head in heads)
        if not is_above_a_head:
            _keep_in_evaluation_mode(module)


def check_layer_decay(layer_decay: float) -> None:
    """Raise `ValueError` if the number is not in the range of [`layer_decay_groups`]."""
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay={layer_decay} must be above 0 and at most 1.")


def layer_decay_groups(
    model: PreTrainedModel, learning_rate: float, layer_decay: float, weight_decay: float = 0.0
) -> list[dict]:
    r"""Parameter groups for an optimizer, with layer-wise learning-rate decay (BEiT, arXiv 2106.08254):

        learning rate = learning_rate · layer_decay^(L + 1 − depth)

    The model has L layers (stages, blocks). What comes before them (stems, embeddings) has depth 0, layer i = 0 … L − 1
    has depth i + 1, and everything else (last layer norm, heads) has depth L + 1. So general, pretrained features change
    less than new ones.

    Args:
        model: an image classifier with a list of layers; frozen parameters are left out.
        learning_rate: of the heads.
        layer_decay: above 0, at most 1; 1 gives all depths the same rate.
        weight_decay: of the parameters that `Trainer` decays.

    Returns:
        One group for each depth and weight decay. The groups of the heads come first, because `Trainer` logs the rate of
        the first group.

    Raises:
        ValueError: `layer_decay` is not in range, or the model has no list of layers.

    Example:

    ```python
    >>> optimizer = torch.optim.AdamW(layer_decay_groups(model, 5e-4, layer_decay=0.75, weight_decay=0.05))
    >>> trainer = Trainer(model, args, optimizers=(optimizer, None), train_dataset=images)
    ```
    """
    check_layer_decay(layer_decay)
    before, layers = _parts(model)
    depths = dict.fromkeys(before, 0)
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
