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
        stem: `"imagenet"` divides the resolution by 4, by the 7×7 stem of ResNet (convolution) or the involution stem of
            RedNet (involution). `"plain"` is one 3×3 layer at full resolution, for images of 8 to 64 pixels.
        embedding_size: channels that leave the stem.
        hidden_sizes: channels that leave each stage.
        depths: blocks in each stage.
        downsample_strides: stride of the first block of each stage.
        reduction: a block has `hidden_size / reduction` inner channels, rounded to a multiple of
            `involution_group_channels`.
        kernel_size: K of the operator in the blocks; `None` is 3 for convolution and 7 for involution.
        involution_group_channels: channels that share an involution kernel.
        involution_reduction: reduction in the generation of involution kernels.
        hidden_act: activation function.

    Raises:
        StrictDataclassClassValidationError: the operator or stem is unknown, the kernel size is even, or the lists that
            describe the stages differ in length.

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
        if isinstance(self.id2label, (list, tuple)):
            self.id2label = dict(enumerate(self.id2label))
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Part of `@strict`-powered validation."""
        if self.spatial_operator not in ("convolution", "involution"):
            raise ValueError(
                f'spatial_operator="{self.spatial_operator}" is unknown. Choose "convolution" or "involution".'
            )
        if self.stem not in ("imagenet", "plain"):
            raise ValueError(f'stem="{self.stem}" is unknown. Choose "imagenet" or "plain".')
        if self.kernel_size % 2 == 0:
            raise ValueError(
                f"kernel_size={self.kernel_size} is even. Choose an odd size, so that a kernel has a middle."
            )
        if not len(self.hidden_sizes) == len(self.depths) == len(self.downsample_strides):
            raise ValueError(
                f"hidden_sizes={self.hidden_sizes}, depths={self.depths} and "
                f"downsample_strides={self.downsample_strides} differ in length. Give each one entry per stage."
            )

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "IBResNetConfig":
        """The configuration of a named network; `overrides` replace any of its fields.

        `"rednet26"`, `"rednet38"`, `"rednet50"`, `"rednet101"`, `"rednet152"`: the RedNets of arXiv 2103.06255
        (9.23, 12.39, 15.54, 25.65, 33.99 M parameters at 1,000 classes). `"resnet26"` … `"resnet152"`: the same with
        convolution. `"convolution-small"`, `"involution-small"`: light teachers for images of 8 to 64 pixels, below
        0.5 M parameters at 10 classes.

        Raises:
            ValueError: there is no preset of this name.
        """
        if name not in PRESETS:
            raise ValueError(f'preset="{name}" is unknown. Choose one of {", ".join(PRESETS)}.')
        return cls(**{**PRESETS[name], **overrides})


__all__ = ["IBResNetConfig"]
