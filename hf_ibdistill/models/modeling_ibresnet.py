"""The teachers: bottleneck residual networks with convolution or involution as the spatial operator."""

import math

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention
from transformers.utils.generic import can_return_tuple

from .configuration_ibresnet import IBResNetConfig
from .involution import Involution2d


class IBResNetConvLayer(nn.Module):
    """Convolution, batch norm and (unless `activation` is None) activation."""

    def __init__(self, in_channels, out_channels, kernel_size=1, stride=1, activation="relu"):
        super().__init__()
        self.convolution = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False
        )
        self.normalization = nn.BatchNorm2d(out_channels)
        self.activation = ACT2FN[activation] if activation is not None else nn.Identity()

    def forward(self, hidden_states):
        return self.activation(self.normalization(self.convolution(hidden_states)))


class IBResNetInvolutionLayer(nn.Module):
    """Involution, batch norm and activation: the counterpart of a K×K `IBResNetConvLayer`."""

    def __init__(self, config: IBResNetConfig, channels, kernel_size, stride=1):
        super().__init__()
        self.involution = Involution2d(
            channels, kernel_size, stride, config.involution_group_channels, config.involution_reduction
        )
        self.normalization = nn.BatchNorm2d(channels)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, hidden_states):
        return self.activation(self.normalization(self.involution(hidden_states)))


class IBResNetStem(nn.Sequential):
    """Pixels (N, num_channels, H, W) → (N, embedding_size, H/4, W/4), or at full resolution for the plain stem."""

    def __init__(self, config: IBResNetConfig):
        channels, act = config.embedding_size, config.hidden_act
        if config.stem == "plain":
            layers = [IBResNetConvLayer(config.num_channels, channels, 3, activation=act)]
        elif config.spatial_operator == "convolution":
            layers = [IBResNetConvLayer(config.num_channels, channels, 7, stride=2, activation=act)]
        else:
            layers = [
                IBResNetConvLayer(config.num_channels, channels // 2, 3, stride=2, activation=act),
                IBResNetInvolutionLayer(config, channels // 2, kernel_size=3),
                IBResNetConvLayer(channels // 2, channels, 3, activation=act),
            ]
        if config.stem == "imagenet":
            layers.append(nn.MaxPool2d(3, stride=2, padding=1))
        super().__init__(*layers)


class IBResNetBlock(nn.Module):
    """1×1 reduction, K×K spatial operator (with the stride), 1×1 expansion, and the residual connection."""

    def __init__(self, config: IBResNetConfig, in_channels, out_channels, stride):
        super().__init__()
        group, act = config.involution_group_channels, config.hidden_act
        inner_channels = max(group, round(out_channels / config.reduction / group) * group)
        self.shortcut = (
            IBResNetConvLayer(in_channels, out_channels, stride=stride, activation=None)
            if stride != 1 or in_channels != out_channels
            else nn.Identity()
        )
        self.reduce = IBResNetConvLayer(in_channels, inner_channels, activation=act)
        self.spatial = (
            IBResNetConvLayer(inner_channels, inner_channels, config.kernel_size, stride, act)
            if config.spatial_operator == "convolution"
            else IBResNetInvolutionLayer(config, inner_channels, config.kernel_size, stride)
        )
        self.expand = IBResNetConvLayer(inner_channels, out_channels, activation=None)
        self.activation = ACT2FN[act]

    def forward(self, hidden_states):
        update = self.expand(self.spatial(self.reduce(hidden_states)))
        return self.activation(update + self.shortcut(hidden_states))


class IBResNetPreTrainedModel(PreTrainedModel):
    config: IBResNetConfig
    base_model_prefix = "ibresnet"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules = ["IBResNetBlock"]
    _input_embed_layer = "stem"

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            bound = 1 / math.sqrt(module.in_features)
            init.uniform_(module.weight, -bound, bound)
            init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.BatchNorm2d):
            init.ones_(module.weight)
            init.zeros_(module.bias)
            init.zeros_(module.running_mean)
            init.ones_(module.running_var)
            init.zeros_(module.num_batches_tracked)


class IBResNetForImageClassification(IBResNetPreTrainedModel):
    """A residual network with convolution or involution as its spatial operator, and a linear head on the mean of the
    last feature map. See [`IBResNetConfig`] for its shape."""

    def __init__(self, config: IBResNetConfig):
        super().__init__(config)
        self.stem = IBResNetStem(config)
        channels = [config.embedding_size, *config.hidden_sizes]
        self.stages = nn.ModuleList(
            nn.Sequential(
                *(
                    IBResNetBlock(config, channels[i] if j == 0 else channels[i + 1], channels[i + 1], stride if j == 0 else 1)
                    for j in range(depth)
                )
            )
            for i, (depth, stride) in enumerate(zip(config.depths, config.downsample_strides))
        )  # fmt: skip
        self.pooler = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels[-1], config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> ImageClassifierOutputWithNoAttention:
        """
        Args:
            pixel_values: (N, num_channels, H, W).
            labels: (N,) class ids; with them, the output has the cross-entropy as `loss`.
            output_hidden_states: return the feature maps that leave the stem and each stage as well.

        Raises:
            ValueError: the images do not have the `num_channels` of the configuration.
        """
        if pixel_values.shape[1] != self.config.num_channels:
            raise ValueError(
                f"The images have {pixel_values.shape[1]} channels. The model needs num_channels={self.config.num_channels}."
            )
        if pixel_values.is_floating_point():
            pixel_values = pixel_values.to(self.stem[0].convolution.weight.dtype)
        if self.config.spatial_operator == "convolution":
            # Convolutions are faster channels last. Involution would have to copy its operands.
            pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        hidden_states = self.stem(pixel_values)
        all_hidden_states = [hidden_states]
        for stage in self.stages:
            hidden_states = stage(hidden_states)
            all_hidden_states.append(hidden_states)
        logits = self.classifier(self.pooler(hidden_states).flatten(1))
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return ImageClassifierOutputWithNoAttention(
            loss=self.loss_function(labels, logits, self.config, **kwargs) if labels is not None else None,
            logits=logits,
            hidden_states=tuple(all_hidden_states) if output_hidden_states else None,
        )


__all__ = ["IBResNetForImageClassification", "IBResNetPreTrainedModel"]
