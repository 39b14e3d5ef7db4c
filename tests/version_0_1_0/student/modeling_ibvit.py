"""The student: a vision transformer with a class token and one token, with a head of its own, for each teacher."""

import logging
import math
import os
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers import (
    AttentionInterface,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    PreTrainedConfig,
    PreTrainedModel,
    ViTForImageClassification,
)
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.vit.modeling_vit import ViTAttention, ViTLayer, eager_attention_forward
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .configuration_ibvit import IBViTConfig
from .involution import Involution2d


logger = logging.getLogger(__name__)


def fastest_attention_forward(module, query, key, value, attention_mask, **kwargs):
    """PyTorch's fused attention, except below float32 on a CPU, where two plain matrix products take from a sixth (20
    tokens) to two thirds (1,000 tokens) of its time in training; and where the attention itself is asked for."""
    is_slow_when_fused = query.device.type == "cpu" and query.dtype != torch.float32
    if kwargs.get("output_attentions") or (is_slow_when_fused and key.shape[2] < 64):
        forward = eager_attention_forward
    else:
        forward = lean_attention_forward if is_slow_when_fused else sdpa_attention_forward
    return forward(module, query, key, value, attention_mask, **kwargs)


def lean_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """`eager_attention_forward` without its float32 copy of the attention, which at 200 tokens is a ninth of a step's memory and
    a tenth of its time or more. The softmax computes in float32 all the same and rounds once."""
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
        loss: cross-entropy of the class head, when labels were given.
        logits: (N, classes), the fused prediction; with `"mean_probabilities"` its softmax is the mean of the heads'.
        class_logits: (N, classes), the class token's head.
        teacher_token_logits: (N, teachers, classes), each teacher token's head, in the order of `teacher_names`;
            `None` without teachers.
        hidden_states: a tuple of (N, tokens, hidden_size), after the embeddings and after each layer.
        attentions: a tuple of (N, heads, tokens, tokens), one a layer.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    class_logits: torch.Tensor | None = None
    teacher_token_logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class IBViTPatchProjection(nn.Conv2d):
    """The convolution whose stride is its kernel's size: (N, C, H, W) → (N, hidden_size, H/patch, W/patch).

    Below float32 on a CPU it is computed as the matrix product that it is. oneDNN's convolution (in PyTorch 2.14) returns wrong
    numbers there, in bf16 on processors with AMX, for patches of 4 or more pixels and 4 to 31 channels; and it is slower, at 224
    pixels and three channels by a factor of 2.6.
    """

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        is_autocast = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if is_autocast else pixel_values.dtype
        if pixel_values.device.type != "cpu" or dtype.itemsize >= 4:
            return super().forward(pixel_values)
        size, weight = self.kernel_size[0], self.weight
        # What is left over at the right and below is dropped, as by the convolution.
        height, width = (side // size * size for side in pixel_values.shape[2:])
        pixel_values = pixel_values[:, :, :height, :width]
        # (N, C, H/patch, patch, W/patch, patch)
        patches = pixel_values.unflatten(3, (-1, size)).unflatten(2, (-1, size))
        if pixel_values.is_contiguous(memory_format=torch.channels_last):
            # A patch in the order of the memory: whole runs of channels are copied, not one number at a time.
            patches, weight = patches.permute(0, 2, 4, 3, 5, 1), weight.permute(0, 2, 3, 1)
        else:
            patches = patches.permute(0, 2, 4, 1, 3, 5)
        return nn.functional.linear(patches.flatten(3), weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class IBViTStem(nn.Sequential):
    """3×3 layers at full resolution, then the patch projection: pixels → (N, hidden_size, H/patch, W/patch).

    The first layer is a convolution in both kinds of stem, since involution keeps the number of channels. Group norm,
    where ResNets have batch norm: a row's result must not depend on the other rows of its batch.
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


def interpolate_positions(positions: torch.Tensor, side: int, size: tuple[int, int]) -> torch.Tensor:
    """Position embeddings (1, tokens + side², hidden_size) for another grid of patches: bicubic between the patches, the
    tokens' own kept."""
    if size == (side, side):
        return positions
    tokens, patches = positions[:, : -(side**2)], positions[:, -(side**2) :]
    patches = patches.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    patches = nn.functional.interpolate(patches, size, mode="bicubic", align_corners=False)
    return torch.cat((tokens, patches.flatten(2).transpose(1, 2)), dim=1)


class IBViTEmbeddings(nn.Module):
    """Pixels (N, channels, H, W) → tokens (N, 1 + teachers + patches, hidden_size): class, teachers, patches."""

    def __init__(self, config: IBViTConfig):
        super().__init__()
        self.config = config
        num_teachers = len(config.teacher_names)
        num_patches = (config.image_size // config.patch_size) ** 2
        self.class_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.teacher_tokens = nn.Parameter(torch.zeros(1, num_teachers, config.hidden_size))
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
            raise ValueError(f"The model takes images of {config.num_channels} channels; got {num_channels}.")
        if not interpolate_pos_encoding and (height, width) != (config.image_size, config.image_size):
            raise ValueError(
                f"The model takes images of {config.image_size}×{config.image_size} pixels; got {height}×{width}. "
                "Resize them with the image processor, or pass interpolate_pos_encoding=True."
            )
        pixel_values = pixel_values.to(self.class_token.dtype)
        if config.patch_embedding == "convolution":
            # A tenth of the whole step, on a CPU; involution would pay for turning its operands.
            pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        patches = {name: stem(pixel_values).flatten(2).transpose(1, 2) for name, stem in self.stems.items()}
        class_token = self.class_token.expand(batch_size, -1, -1)
        teacher_tokens = self.teacher_tokens.expand(batch_size, -1, -1)
        if config.patch_embedding == "bias_stems" and config.teacher_names:
            means = [patches[name].mean(1) for name in config.teacher_token_stems]
            teacher_tokens = teacher_tokens + torch.stack(means, dim=1)
        embeddings = torch.cat((class_token, teacher_tokens, sum(patches.values())), dim=1)
        positions = (
            self.interpolate_pos_encoding(height, width) if interpolate_pos_encoding else self.position_embeddings
        )
        return self.dropout(embeddings + positions)


class IBViTPreTrainedModel(PreTrainedModel):
    config: IBViTConfig
    base_model_prefix = "ibvit"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["IBViTEmbeddings", "ViTLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": ViTLayer, "attentions": ViTAttention}

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """What was asked for, or else what is fastest for the device and the type at hand."""
        return super().get_correct_attn_implementation(requested_attention or "fastest", is_init_check)

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, IBViTEmbeddings):
            init.trunc_normal_(module.class_token, std=std)
            init.trunc_normal_(module.teacher_tokens, std=std)
            init.trunc_normal_(module.position_embeddings, std=std)
        elif isinstance(module, nn.GroupNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            # As in the code of ViT's authors. A fixed deviation of 0.02 suits a width of 768; at 96 it starts so close to
            # the identity that the first hundreds of steps are lost.
            init.xavier_uniform_(module.weight)
        elif isinstance(module, nn.Conv2d):
            # The stems keep the scale of the signal, which a small fixed deviation would not.
            init.normal_(module.weight, std=1 / math.sqrt(module.weight[0].numel()))


class IBViTModel(IBViTPreTrainedModel):
    """The transformer without heads. See [`IBViTConfig`] for its shape."""

    def __init__(self, config: IBViTConfig):
        super().__init__(config)
        self.embeddings = IBViTEmbeddings(config)
        self.layers = nn.ModuleList([ViTLayer(config) for _ in range(config.num_hidden_layers)])
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False, **kwargs) -> BaseModelOutput:
        """
        Args:
            pixel_values: (N, num_channels, H, W).
            interpolate_pos_encoding: accept images of another size than the configuration's.

        Returns:
            `last_hidden_state` (N, 1 + teachers + patches, hidden_size): class token, teacher tokens, patches; and
            `hidden_states` and `attentions` when asked for.

        Raises:
            ValueError: the images have another number of channels, or another size without `interpolate_pos_encoding`.
        """
        hidden_states = self.embeddings(pixel_values, interpolate_pos_encoding)
        for layer in self.layers:
            hidden_states = layer(hidden_states, **kwargs)
        return BaseModelOutput(last_hidden_state=self.layernorm(hidden_states))


def config_from_vit(
    source: PreTrainedConfig, teacher_names: list[str] | tuple[str, ...], image_size: int | None, **kwargs
) -> tuple[IBViTConfig, dict]:
    """What our configuration shares with a `ViTConfig` or `DeiTConfig`, but for the fields given; and the other `kwargs`."""
    names = IBViTConfig().to_dict().keys() - {"model_type", "architectures", "transformers_version"}
    fields = {name: value for name, value in source.to_dict().items() if name in names}
    for name in ("image_size", "patch_size"):
        sides = fields[name] if isinstance(fields[name], (list, tuple)) else [fields[name]]
        if len(set(sides)) > 1:
            raise ValueError(f"Images and patches must be square; the checkpoint has {name}={fields[name]}.")
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
            raise ValueError(f"The checkpoint's weights are for {name}={value!r}; got {getattr(config, name)!r}.")
    return config, kwargs


def weights_from_vit(source: PreTrainedModel, config: IBViTConfig, has_heads: bool) -> dict[str, torch.Tensor]:
    """The weights of transformers' ViT or DeiT under our names; see [`IBViTForImageClassification.from_vit`]."""
    weights = source.base_model.state_dict()
    names = [f"embeddings.{name}_token" for name in ("cls", "distillation")]
    tokens = torch.cat([weights.pop(name) for name in names if name in weights], dim=1)
    num_tokens = tokens.shape[1]
    # Which of the checkpoint's tokens each of ours starts as.
    starts = [min(i, num_tokens - 1) for i in range(1 + len(config.teacher_names))]
    weights["embeddings.class_token"], weights["embeddings.teacher_tokens"] = tokens[:, :1], tokens[:, starts[1:]]
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

        Without teacher names it predicts exactly what transformers' own class predicts from the checkpoint, and with
        `image_size` what that predicts with `interpolate_pos_encoding=True`. A distilled DeiT attends to its distillation
        token and so cannot do without: with no teacher names this stays, with a warning, as a teacher token named
        `"distillation"`, and `fusion` becomes the original's: `"mean_logits"` for `DeiTForImageClassificationWithTeacher`,
        `"class_token"` for `DeiTForImageClassification`, and for heads that start anew. One teacher name and that fusion
        predict exactly the same.

        What the student's parts start as:
        - transformer, patch projection, class token and position embeddings: the checkpoint's, the patches' positions
            interpolated (bicubic) to `image_size`;
        - first teacher token, its position and its head: DeiT's distillation token, where there is one;
        - other teacher tokens, their positions and heads: copies of the last that the checkpoint has (the distillation
            token's, or else the class token's). So they predict something sensible at once, and part as soon as their
            teachers differ; but since the others attend to them too, the prediction is near the original's, not equal;
        - all heads, where the checkpoint has none or `num_labels` is another: new, with transformers' warning.

        A pooler, a mask token and the decoder of masked image modeling are left out, as in transformers' classifiers.

        Args:
            name_or_path: a folder or a Hub id with a safetensors checkpoint of type `"vit"` or `"deit"` (plain DeiTs are
                stored as `"vit"`), with or without a classification head.
            teacher_names: as in [`IBViTConfig`].
            image_size: height and width of the student's images, in pixels; `None` keeps the checkpoint's.
            kwargs: as in `from_pretrained`: where to find the checkpoint (`revision`, `token`, `cache_dir`, …), how to
                load it (`dtype`, `device_map`, `attn_implementation`, …), and fields of [`IBViTConfig`] (`fusion`,
                `num_labels`, `id2label`, `label2id`, …); the others are the checkpoint's.

        Raises:
            ValueError: the checkpoint is of another type, has images or patches that are not square, or tensors too many or
                too few; or a field was given that its weights do not fit, such as `patch_size` or `patch_embedding`.
            StrictDataclassClassValidationError: as from [`IBViTConfig`].
            OSError: there is no such checkpoint, or not in safetensors.

        Example:

        ```python
        >>> from hf_ibdistill import IBViTForImageClassification

        >>> student = IBViTForImageClassification.from_vit(
        ...     "facebook/deit-tiny-patch16-224", teacher_names=("conv", "inv"), num_labels=10
        ... )
        ```
        """
        names = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token", "variant")
        location = {name: kwargs.pop(name) for name in names if name in kwargs}
        saved_config, _ = PreTrainedConfig.get_config_dict(name_or_path, **location)
        model_type = saved_config.get("model_type")
        if model_type not in ("vit", "deit"):
            raise ValueError(
                f'from_vit takes checkpoints of type "vit" or "deit"; {name_or_path} is of type "{model_type}".'
            )
        source_class = ViTForImageClassification if model_type == "vit" else DeiTForImageClassification
        if DeiTForImageClassificationWithTeacher.__name__ in (saved_config.get("architectures") or ()):
            source_class = DeiTForImageClassificationWithTeacher
        source_config = source_class.config_class.from_dict(saved_config)
        keeps_distillation_token = model_type == "deit" and not teacher_names
        if keeps_distillation_token:
            teacher_names = ("distillation",)
        has_fusion, dtype = "fusion" in kwargs, kwargs.pop("dtype", "auto")
        config, kwargs = config_from_vit(source_config, teacher_names, image_size, **kwargs)

        source, loaded = source_class.from_pretrained(
            name_or_path, config=source_config, use_safetensors=True, output_loading_info=True, **location
        )
        left_out = {"pooler", "mask_token", "decoder"}
        unused = [name for name in sorted(loaded["unexpected_keys"]) if not left_out & {*name.split(".")}]
        missing = [name for name in sorted(loaded["missing_keys"]) if "classifier" not in name]
        if unused or missing:
            raise ValueError(
                f"{name_or_path} is no {source_class.__name__}: {unused} have no place in it, {missing} are missing."
            )
        has_heads = not loaded["missing_keys"] and config.num_labels == source_config.num_labels
        if keeps_distillation_token:
            if not has_fusion:
                is_mean = has_heads and source_class is DeiTForImageClassificationWithTeacher
                config.fusion = "mean_logits" if is_mean else "class_token"
            logger.warning(
                '%s attends to a distillation token, which is kept as the teacher token "distillation"; fusion is "%s".',
                name_or_path,
                config.fusion,
            )
        weights = weights_from_vit(source, config, has_heads)
        model = cls.from_pretrained(None, config=config, state_dict=weights, dtype=dtype, **kwargs)
        model.config.name_or_path = model.name_or_path = str(name_or_path)
        return model

    def fuse(self, class_logits: torch.Tensor, teacher_token_logits: torch.Tensor | None) -> torch.Tensor:
        """Class head (N, classes) and teacher heads (N, teachers, classes) → logits (N, classes), by `config.fusion`."""
        if teacher_token_logits is None or self.config.fusion == "class_token":
            return class_logits
        logits = torch.cat((class_logits[:, None], teacher_token_logits), dim=1)
        if self.config.fusion == "mean_logits":
            return logits.mean(1)
        return logits.float().log_softmax(-1).logsumexp(1) - math.log(logits.shape[1])

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
            labels: (N,) class ids; when given, the output has the class head's cross-entropy as `loss`.
            interpolate_pos_encoding: accept images of another size than the configuration's.

        Raises:
            ValueError: the images have another number of channels, or another size without `interpolate_pos_encoding`.
        """
        outputs = self.ibvit(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
        tokens = outputs.last_hidden_state
        class_logits = self.class_head(tokens[:, 0])
        teacher_token_logits = None
        if self.config.teacher_names:
            teacher_token_logits = torch.stack(
                [head(tokens[:, 1 + i]) for i, head in enumerate(self.teacher_heads)], dim=1
            )
        return IBViTImageClassifierOutput(
            loss=self.loss_function(labels, class_logits, self.config, **kwargs) if labels is not None else None,
            logits=self.fuse(class_logits, teacher_token_logits),
            class_logits=class_logits,
            teacher_token_logits=teacher_token_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = ["IBViTForImageClassification", "IBViTImageClassifierOutput", "IBViTModel", "IBViTPreTrainedModel"]
