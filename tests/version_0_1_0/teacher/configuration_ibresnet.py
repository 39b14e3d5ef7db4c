"""Configuration of the teachers: one residual skeleton, convolution or involution as its spatial operator."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


_DEPTHS = {"26": (1, 2, 4, 1), "38": (2, 3, 5, 2), "50": (3, 4, 6, 3), "101": (3, 4, 23, 3), "152": (3, 8, 36, 3)}
_SMALL = {
    "stem": "plain",
    "embedding_size": 32,
    "hidden_sizes": (64, 128, 256),
    "depths": (2, 2, 2),
    "downsample_strides": (1, 2, 2),
    "reduction": 3,
}

PRESETS = {
    **{f"rednet{name}": {"spatial_operator": "involution", "depths": depths} for name, depths in _DEPTHS.items()},
    **{f"resnet{name}": {"spatial_operator": "convolution", "depths": depths} for name, depths in _DEPTHS.items()},
    "convolution-small": {"spatial_operator": "convolution", **_SMALL},
    "involution-small": {"spatial_operator": "involution", "kernel_size": 5, **_SMALL},
}


@strict
class IBResNetConfig(PreTrainedConfig):
    r"""Configuration of [`IBResNetForImageClassification`], a bottleneck residual network (arXiv 1512.03385) whose K×K
    operator is a convolution or an involution (RedNet, arXiv 2103.06255). Nothing else differs between the two.

    Args:
        spatial_operator: `"convolution"` or `"involution"`.
        num_channels: channels of the input image.
        stem: `"imagenet"` divides the resolution by 4 (ResNet's 7×7 stem for convolution, RedNet's involution stem for
            involution); `"plain"` is one 3×3 layer at full resolution, for images of 8 to 64 pixels.
        embedding_size: channels that leave the stem.
        hidden_sizes: channels that leave each stage.
        depths: blocks in each stage.
        downsample_strides: stride of the first block of each stage.
        reduction: a block's inner channels are `hidden_size / reduction`, rounded to a multiple of
            `involution_group_channels`.
        kernel_size: K of the blocks' operator; `None` is 3 for convolution and 7 for involution.
        involution_group_channels: channels that share an involution kernel.
        involution_reduction: reduction in the generation of involution kernels.
        hidden_act: activation function.

    Raises:
        StrictDataclassClassValidationError: an unknown operator or stem, an even kernel size, or stages described by lists
            of different lengths.

    Example:

    ```python
    >>> from hf_ibdistill import IBResNetConfig, IBResNetForImageClassification

    >>> config = IBResNetConfig.from_preset("involution-small", num_labels=10)
    >>> model = IBResNetForImageClassification(config)
    ```
    """

    model_type = "ibresnet"

    spatial_operator: str = "convolution"
    num_channels: int = 3
    stem: str = "imagenet"
    embedding_size: int = 64
    hidden_sizes: list[int] | tuple[int, ...] = (256, 512, 1024, 2048)
    depths: list[int] | tuple[int, ...] = (3, 4, 6, 3)
    downsample_strides: list[int] | tuple[int, ...] = (1, 2, 2, 2)
    reduction: int = 4
    kernel_size: int | None = None
    involution_group_channels: int = 16
    involution_reduction: int = 4
    hidden_act: str = "relu"

    def __post_init__(self, **kwargs):
        self.hidden_sizes, self.depths = list(self.hidden_sizes), list(self.depths)
        self.downsample_strides = list(self.downsample_strides)
        if self.kernel_size is None:
            self.kernel_size = 7 if self.spatial_operator == "involution" else 3
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Part of `@strict`-powered validation."""
        if self.spatial_operator not in ("convolution", "involution"):
            raise ValueError(f'spatial_operator is "convolution" or "involution"; got "{self.spatial_operator}".')
        if self.stem not in ("imagenet", "plain"):
            raise ValueError(f'stem is "imagenet" or "plain"; got "{self.stem}".')
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is odd, so that a kernel has a middle; got {self.kernel_size}.")
        if not len(self.hidden_sizes) == len(self.depths) == len(self.downsample_strides):
            raise ValueError(
                "hidden_sizes, depths and downsample_strides have one entry a stage; got "
                f"{self.hidden_sizes}, {self.depths} and {self.downsample_strides}."
            )

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "IBResNetConfig":
        """The configuration of a named network; `overrides` replace any of its fields.

        `"rednet26"`, `"rednet38"`, `"rednet50"`, `"rednet101"`, `"rednet152"`: the RedNets of arXiv 2103.06255
        (9.23, 12.39, 15.54, 25.65, 33.99 M parameters at 1,000 classes). `"resnet26"` … `"resnet152"`: their
        convolution counterparts. `"convolution-small"`, `"involution-small"`: light teachers for images of 8 to 64
        pixels, below 0.5 M parameters.

        Raises:
            ValueError: there is no preset of this name.
        """
        if name not in PRESETS:
            raise ValueError(f'There is no preset "{name}"; choose one of {", ".join(PRESETS)}.')
        return cls(**{**PRESETS[name], **overrides})


__all__ = ["IBResNetConfig"]
