"""The student: a vision transformer with a class token, and with one token and head for each teacher."""

import math
import os
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.vit.modeling_vit import ViTAttention, ViTLayer, eager_attention_forward
from transformers.utils import ModelOutput, logging
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .configuration_ibvit import IBViTConfig
from .conversion_vit import convert_vit, interpolate_positions
from .involution import Involution2d


logger = logging.get_logger(__name__)


def fastest_attention_forward(module, query, key, value, attention_mask, **kwargs):
    """The fused attention of PyTorch, with two exceptions. It cannot return the attention itself. Below float32 on a CPU, two
    plain matrix products are faster in training."""
    is_slow_when_fused = query.device.type == "cpu" and query.dtype.itemsize < 4
    if kwargs.get("output_attentions") or (is_slow_when_fused and key.shape[2] < 64):
        forward = eager_attention_forward
    else:
        forward = lean_attention_forward if is_slow_when_fused else sdpa_attention_forward
    return forward(module, query, key, value, attention_mask, **kwargs)


def lean_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """`eager_attention_forward` without its float32 copy of the attention, which costs memory and time. The softmax computes
    in float32 all the same, and rounds once."""
    scores = torch.matmul(query, key.transpose(2, 3)).mul_(scaling)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.dropout(scores.softmax(-1), dropout, module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


AttentionInterface.register("fastest", fastest_attention_forward)


@dataclass
class IBViTImageClassifierOutput(ModelOutput):
    """
    Args:
        loss: mean over all heads of their cross-entropy, if labels were given.
        logits: (N, classes), the fused prediction. With `"mean_probabilities"`, its softmax is the mean over the heads.
        class_logits: (N, classes), of the head on the class token.
        teacher_token_logits: (N, teachers, classes), of the heads on the teacher tokens, in the order of `teacher_names`;
            `None` without teachers.
        hidden_states: a tuple of (N, tokens, hidden_size), after the embeddings and after each layer.
        attentions: a tuple of (N, heads, tokens, tokens), one per layer.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    class_logits: torch.Tensor | None = None
    teacher_token_logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class IBViTPatchProjection(nn.Conv2d):
    """The convolution whose stride is the size of its kernel: (N, C, H, W) → (N, hidden_size, H/patch, W/patch).

    Below float32 on a CPU, it is computed as a matrix product. The convolution of oneDNN (in PyTorch 2.14) is slower there. In
    bf16 on processors with AMX, it returns wrong numbers for patches of 4 or more pixels and 4 to 31 channels.
    """

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        is_autocast = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if is_autocast else pixel_values.dtype
        if pixel_values.device.type != "cpu" or dtype.itemsize >= 4:
            return super().forward(pixel_values)
        size, weight = self.kernel_size[0], self.weight
        # Pixels left over at the right and the bottom are dropped, as by the convolution.
        height, width = (side // size * size for side in pixel_values.shape[2:])
        if pixel_values.is_contiguous(memory_format=torch.channels_last):
            # A patch in the order of the memory, so that whole runs of channels are copied, not single numbers. The gradient is
            # in that order as well: if it were in another than the pixels, a GELU before would take several times as long.
            pixels = pixel_values.permute(0, 2, 3, 1)[:, :height, :width]
            # (N, H/patch, patch, W/patch, patch, C)
            patches = pixels.unflatten(2, (-1, size)).unflatten(1, (-1, size)).transpose(2, 3)
            weight = weight.permute(0, 2, 3, 1)
        else:
            # (N, C, H/patch, patch, W/patch, patch)
            patches = pixel_values[:, :, :height, :width].unflatten(3, (-1, size)).unflatten(2, (-1, size))
            patches = patches.permute(0, 2, 4, 1, 3, 5)
        return nn.functional.linear(patches.flatten(3), weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class IBViTStem(nn.Sequential):
    """3×3 layers at full resolution, then the patch projection: pixels → (N, hidden_size, H/patch, W/patch).

    The first layer is a convolution in both kinds of stem, because involution keeps the number of channels. The norm is a
    group norm instead of the batch norm of ResNets, because a row must not depend on the other rows of its batch.
    """

    def __init__(self, config: IBViTConfig, spatial_operator: str, num_layers: int):
        layers, channels = [], config.num_channels
        for i in range(num_layers):
            layers.append(
                nn.Conv2d(channels, config.stem_channels, 3, padding=1)
                if spatial_operator == "convolution" or i == 0
                else Involution2d(config.stem_channels, 3, norm=partial(nn.GroupNorm, 1))
            )
            channels = config.stem_channels
            layers += [nn.GroupNorm(1, channels), ACT2FN[config.hidden_act]]
        layers.append(IBViTPatchProjection(channels, config.hidden_size, config.patch_size, config.patch_size))
        super().__init__(*layers)


class IBViTEmbeddings(nn.Module):
    """Pixels (N, channels, H, W) → tokens (N, 1 + teachers + patches, hidden_size): class, teachers, patches."""

    def __init__(self, config: IBViTConfig):
        super().__init__()
        self.config = config
        num_teachers = len(config.teacher_names)
        num_patches = (config.image_size // config.patch_size) ** 2
        self.class_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        # Not an empty parameter, which not every library can shard or save.
        self.teacher_tokens = nn.Parameter(torch.zeros(1, num_teachers, config.hidden_size)) if num_teachers else None
        self.position_embeddings = nn.Parameter(torch.zeros(1, 1 + num_teachers + num_patches, config.hidden_size))
        operators = ("convolution", "involution") if config.patch_embedding == "bias_stems" else ("convolution",)
        num_layers = 0 if config.patch_embedding == "linear" else config.num_stem_layers
        self.stems = nn.ModuleDict({name: IBViTStem(config, name, num_layers) for name in operators})
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def interpolate_pos_encoding(self, height: int, width: int) -> torch.Tensor:
        """The position embeddings for images of another size; see [`interpolate_positions`]."""
        patch_size = self.config.patch_size
        size = (height // patch_size, width // patch_size)
        return interpolate_positions(self.position_embeddings, self.config.image_size // patch_size, size)

    def forward(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False) -> torch.Tensor:
        batch_size, num_channels, height, width = pixel_values.shape
        config = self.config
        if num_channels != config.num_channels:
            raise ValueError(
                f"The images have {num_channels} channels. The model needs num_channels={config.num_channels}."
            )
        if not interpolate_pos_encoding and (height, width) != (config.image_size, config.image_size):
            raise ValueError(
                f"The images have {height}×{width} pixels, but the model has image_size={config.image_size}. Resize them with "
                "the image processor, or pass interpolate_pos_encoding=True."
            )
        if pixel_values.is_floating_point():
            pixel_values = pixel_values.to(self.class_token.dtype)
        if config.patch_embedding == "convolution":
            # Convolutions are faster channels last. Involution would have to copy its operands.
            pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        patches = {name: stem(pixel_values).flatten(2).transpose(1, 2) for name, stem in self.stems.items()}
        tokens = [self.class_token.expand(batch_size, -1, -1)]
        if self.teacher_tokens is not None:
            teacher_tokens = self.teacher_tokens.expand(batch_size, -1, -1)
            if config.patch_embedding == "bias_stems":
                means = [patches[name].mean(1) for name in config.teacher_token_stems]
                teacher_tokens = teacher_tokens + torch.stack(means, dim=1)
            tokens.append(teacher_tokens)
        embeddings = torch.cat((*tokens, sum(patches.values())), dim=1)
        positions = (
            self.interpolate_pos_encoding(height, width) if interpolate_pos_encoding else self.position_embeddings
        )
        return self.dropout(embeddings + positions)


class IBViTDropPath(nn.Dropout):
    """A residual branch (N, tokens, hidden_size), in training dropped for whole images with probability `p` and otherwise
    divided by 1 − `p` (arXiv 1603.09382)."""

    def forward(self, branch: torch.Tensor) -> torch.Tensor:
        return branch * super().forward(torch.ones_like(branch[:, :1, :1])) if self.training else branch


class IBViTPreTrainedModel(PreTrainedModel):
    config: IBViTConfig
    base_model_prefix = "ibvit"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    # The whole embeddings: there may be two stems.
    _input_embed_layer = "embeddings"
    # Version 0.1.0 saved an empty tensor for a student without teachers.
    _keys_to_ignore_on_load_unexpected = [r"embeddings\.teacher_tokens$"]
    _no_split_modules = ["IBViTEmbeddings", "ViTLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": ViTLayer, "attentions": ViTAttention}

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """The requested implementation, or by default the fastest for the device and type."""
        return super().get_correct_attn_implementation(requested_attention or "fastest", is_init_check)

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, IBViTEmbeddings):
            init.trunc_normal_(module.class_token, std=std)
            if module.teacher_tokens is not None:
                init.trunc_normal_(module.teacher_tokens, std=std)
            init.trunc_normal_(module.position_embeddings, std=std)
        elif isinstance(module, nn.GroupNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            # As in the published code of ViT. A fixed deviation of 0.02 suits a width of 768. A narrower transformer would
            # start so close to the identity that it would learn nothing for hundreds of steps.
            init.xavier_uniform_(module.weight)
        elif isinstance(module, nn.Conv2d):
            # The stems keep the scale of the signal. A small fixed deviation would not.
            init.normal_(module.weight, std=1 / math.sqrt(module.weight[0].numel()))

    def save_pretrained(self, *args, **kwargs):
        if self._auto_class is not None:
            # The code that is saved with the model has the transformer without heads as well.
            self.config.auto_map = {
                **(getattr(self.config, "auto_map", None) or {}),
                "AutoModel": "modeling_ibvit.IBViTModel",
            }
        super().save_pretrained(*args, **kwargs)


class IBViTModel(IBViTPreTrainedModel):
    """The transformer without heads. See [`IBViTConfig`] for its shape."""

    def __init__(self, config: IBViTConfig):
        super().__init__(config)
        self.embeddings = IBViTEmbeddings(config)
        self.layers = nn.ModuleList([ViTLayer(config) for _ in range(config.num_hidden_layers)])
        if config.drop_path_rate:
            # The first layer drops nothing.
            for i, layer in enumerate(self.layers[1:], start=1):
                rate = config.drop_path_rate * i / (len(self.layers) - 1)
                layer.dropout = nn.Sequential(layer.dropout, IBViTDropPath(rate))
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False, **kwargs) -> BaseModelOutput:
        """
        Args:
            pixel_values: (N, num_channels, H, W).
            interpolate_pos_encoding: accept images of another size than `image_size`.

        Returns:
            `last_hidden_state` (N, 1 + teachers + patches, hidden_size): class token, teacher tokens, patches. On request,
            `hidden_states` and `attentions`.

        Raises:
            ValueError: the images have another number of channels, or another size without `interpolate_pos_encoding`.
        """
        hidden_states = self.embeddings(pixel_values, interpolate_pos_encoding)
        for layer in self.layers:
            hidden_states = layer(hidden_states, **kwargs)
        return BaseModelOutput(last_hidden_state=self.layernorm(hidden_states))


# torch.compile calls it while it compiles. A plain call would break the graph.
@torch.compiler.assume_constant_result
def _warn_of_missing_labels(fusion: str) -> None:
    logger.warning_once(
        f'The student is trained on outputs of a call without labels, with fusion="{fusion}". A loss of `logits` alone, such '
        "as that of label_smoothing_factor in transformers' Trainer, does not teach every head. Pass labels=… (and "
        "label_smoothing=…) and train on `loss`, or teach `class_logits` and `teacher_token_logits`."
    )


class IBViTForImageClassification(IBViTPreTrainedModel):
    """The transformer with a linear head on the class token and one on each teacher token, fused into one prediction.
    See [`IBViTConfig`] for its shape and the kinds of fusion."""

    def __init__(self, config: IBViTConfig):
        super().__init__(config)
        self.ibvit = IBViTModel(config)
        self.class_head = nn.Linear(config.hidden_size, config.num_labels)
        self.teacher_heads = nn.ModuleList(
            [nn.Linear(config.hidden_size, config.num_labels) for _ in config.teacher_names]
        )
        self.post_init()

    @classmethod
    def from_vit(
        cls,
        name_or_path: str | os.PathLike,
        teacher_names: list[str] | tuple[str, ...] = ("conv", "inv"),
        image_size: int | None = None,
        **kwargs,
    ) -> "IBViTForImageClassification":
        r"""A student that starts as a trained ViT (arXiv 2010.11929) or DeiT (arXiv 2012.12877), in evaluation mode.

        Without teacher names, it predicts exactly what the class of transformers predicts from the checkpoint. With
        `image_size`, it predicts what that class predicts with `interpolate_pos_encoding=True`.

        A distilled DeiT attends to its distillation token, which therefore always stays. Without teacher names, it becomes a
        teacher token named `"distillation"`, with a warning. Then `fusion` becomes `"mean_logits"` for
        `DeiTForImageClassificationWithTeacher`, and `"class_token"` for `DeiTForImageClassification` and for new heads.
        A student with one teacher name and this fusion predicts exactly what the DeiT predicts.

        The parts of the student start as follows:
        - transformer, patch projection, class token and position embeddings: those of the checkpoint. The positions of the
            patches are interpolated (bicubic) to `image_size`.
        - first teacher token, with its position and head: the distillation token, if the checkpoint has one.
        - other teacher tokens, with their positions and heads: copies of the last token of the checkpoint, which is the
            distillation token or else the class token. So they predict something sensible at once, and part as soon as
            their teachers differ. Because the other tokens attend to them, the prediction is near the original, not equal.
        - all heads: new, with a warning of transformers, if the checkpoint has no heads or `num_labels` differs.

        A pooler, a mask token and the decoder of masked image modeling are left out, as in the classifiers of transformers.

        Args:
            name_or_path: a folder or a Hub id with a safetensors checkpoint of type `"vit"` or `"deit"` (plain DeiTs are
                stored as `"vit"`), with or without a classification head.
            teacher_names: as in [`IBViTConfig`].
            image_size: height and width of the images, in pixels; `None` keeps those of the checkpoint.
            kwargs: as in `from_pretrained`: where the checkpoint is (`revision`, `token`, `cache_dir`, …), how to load it
                (`dtype`, `device_map`, `attn_implementation`, …), and fields of [`IBViTConfig`] (`fusion`, `num_labels`,
                `id2label`, `label2id`, …). Other fields are those of the checkpoint.

        Raises:
            ValueError: the checkpoint is of another type, its images or patches are not square, or it has too many or too few
                tensors. Or a given field does not fit its weights, such as `patch_size` or `patch_embedding`.
            StrictDataclassClassValidationError: as from [`IBViTConfig`].
            OSError: there is no such checkpoint, or none in safetensors.

        Example:

        ```python
        >>> from hf_ibdistill import IBViTForImageClassification

        >>> student = IBViTForImageClassification.from_vit(
        ...     "facebook/deit-tiny-patch16-224", teacher_names=("conv", "inv"), num_labels=10
        ... )
        ```
        """
        return convert_vit(cls, name_or_path, teacher_names, image_size, **kwargs)

    def fuse(self, class_logits: torch.Tensor, teacher_token_logits: torch.Tensor | None) -> torch.Tensor:
        """Class head (N, classes) and teacher heads (N, teachers, classes) → logits (N, classes), by `config.fusion`."""
        if teacher_token_logits is None or self.config.fusion == "class_token":
            return class_logits
        logits = torch.cat((class_logits[:, None], teacher_token_logits), dim=1)
        if self.config.fusion == "mean_logits":
            return logits.mean(1)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits.log_softmax(-1).logsumexp(1) - math.log(logits.shape[1])

    def _mean_loss(self, logits, labels, label_smoothing, num_items_in_batch=None, **kwargs):
        """The loss of (N, heads, classes), mean over the heads."""
        num_heads = logits.shape[1]
        logits = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
        labels = labels.to(logits.device).repeat_interleave(num_heads, dim=0)
        if num_items_in_batch is not None:
            num_items_in_batch = num_items_in_batch * num_heads
        if not label_smoothing:
            return self.loss_function(labels, logits, self.config, num_items_in_batch=num_items_in_batch, **kwargs)
        if labels.is_floating_point():
            raise ValueError(
                f"label_smoothing={label_smoothing} needs class ids, but the labels are numbers of type {labels.dtype}. Smooth "
                "such labels before they are passed."
            )
        reduction = "mean" if num_items_in_batch is None else "sum"
        loss = nn.functional.cross_entropy(
            logits, labels.flatten(), reduction=reduction, label_smoothing=label_smoothing
        )
        return loss if num_items_in_batch is None else loss / torch.as_tensor(num_items_in_batch, device=loss.device)

    # `label_smoothing` is no named argument, because `Trainer` takes every argument with "label" in its name for a column.
    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs,
    ) -> IBViTImageClassifierOutput:
        """
        Args:
            pixel_values: (N, num_channels, H, W).
            labels: (N,) class ids, −100 for a row without label. With them, the output has the mean over all heads of their
                cross-entropy as `loss`, computed in float32.
            interpolate_pos_encoding: accept images of another size than `image_size`.
            kwargs: `label_smoothing` (0 to 1, default 0) of the loss; `num_items_in_batch`, which divides the sum of the loss
                over the rows (by default, the rows with a label); and options of all models, such as `output_attentions`.

        Raises:
            ValueError: the images have another number of channels, or another size without `interpolate_pos_encoding`. Or
                `label_smoothing` is given for labels that are not class ids.
        """
        label_smoothing = kwargs.pop("label_smoothing", 0.0)
        if labels is None and self.teacher_heads and self.training and torch.is_grad_enabled():
            _warn_of_missing_labels(self.config.fusion)
        outputs = self.ibvit(
            pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, return_dict=True, **kwargs
        )
        tokens = outputs.last_hidden_state
        class_logits = self.class_head(tokens[:, 0])
        heads, teacher_token_logits = class_logits[:, None], None
        if self.teacher_heads:
            teacher_token_logits = torch.stack(
                [head(tokens[:, 1 + i]) for i, head in enumerate(self.teacher_heads)], dim=1
            )
            heads = torch.cat((heads, teacher_token_logits), dim=1)
        return IBViTImageClassifierOutput(
            loss=self._mean_loss(heads, labels, label_smoothing, **kwargs) if labels is not None else None,
            logits=self.fuse(class_logits, teacher_token_logits),
            class_logits=class_logits,
            teacher_token_logits=teacher_token_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = ["IBViTForImageClassification", "IBViTImageClassifierOutput", "IBViTModel", "IBViTPreTrainedModel"]
