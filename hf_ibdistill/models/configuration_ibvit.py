"""Configuration of the student: a vision transformer with one token for each teacher."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


# Shapes of DeiT (arXiv 2012.12877, table 1) and the epsilon of its code. 224 pixels, patches of 16 and 12 layers are defaults.
PRESETS = {
    f"deit-{name}": {
        "hidden_size": width,
        "num_attention_heads": width // 64,
        "intermediate_size": 4 * width,
        "layer_norm_eps": 1e-6,
    }
    for name, width in {"tiny": 192, "small": 384, "base": 768}.items()
}
FUSIONS = ("mean_probabilities", "mean_logits", "class_token")


@strict
class IBViTConfig(PreTrainedConfig):
    r"""Configuration of [`IBViTModel`] and [`IBViTForImageClassification`]: a ViT (arXiv 2010.11929) with a class token,
    and with one token and head for each teacher (arXiv 2310.00369; for one teacher: DeiT, arXiv 2012.12877). Fields that
    ViT has as well carry the names of ViT and, except `initializer_range`, its defaults.

    Args:
        teacher_names: the names of the teachers, in the order of their tokens. Without names it is a plain ViT.
        fusion: how the predictions of the heads become `logits`. `"mean_probabilities"` averages their softmax,
            `"mean_logits"` (Co-advise, arXiv 2106.12378) their logits. `"class_token"` takes the class head alone.
        patch_embedding: `"linear"` is that of ViT. `"convolution"` puts 3×3 convolutions at full resolution before the
            patch projection. `"bias_stems"` (Co-advise) has a convolution stem and an involution stem. It sums their patch
            embeddings, and adds the mean patch of one stem to each teacher token.
        stem_channels: channels of the stems, for `"bias_stems"` a multiple of 16; unused by `"linear"`.
        num_stem_layers: 3×3 layers in a stem, for `"bias_stems"` at least 2; unused by `"linear"`.
        teacher_spatial_operators: for `"bias_stems"`, the stem (`"convolution"` or `"involution"`) whose mean patch is
            added to each teacher token, in the order of `teacher_names`. `None` alternates, convolution first.
        hidden_size: width of the transformer.
        num_hidden_layers: depth of the transformer.
        num_attention_heads: attention heads per layer.
        intermediate_size: width of the feed-forward layers.
        hidden_act: activation of the feed-forward layers and the stems.
        hidden_dropout_prob: dropout on embeddings and residual branches.
        attention_probs_dropout_prob: dropout on attention probabilities.
        drop_path_rate: probability that training drops a residual branch of the last layer for a whole image (stochastic
            depth, arXiv 1603.09382). It rises linearly over the layers, from 0 in the first.
        initializer_range: standard deviation of the initial tokens and position embeddings. It is above the 0.02 of ViT,
            because patch embeddings have a deviation of 1. From few images, a student would be slow to learn positions that
            are small beside them.
        layer_norm_eps: epsilon of the layer norms.
        image_size: height and width of the images, in pixels.
        patch_size: height and width of a patch, in pixels.
        num_channels: channels of the images.
        qkv_bias: whether queries, keys and values have a bias.

    Raises:
        StrictDataclassClassValidationError: the fusion or patch embedding is unknown, a teacher name is repeated, sizes do
            not divide each other, an operator does not allow the shape of its stem, or `drop_path_rate` is no probability
            below 1.

    Example:

    ```python
    >>> from hf_ibdistill import IBViTConfig, IBViTForImageClassification

    >>> config = IBViTConfig(teacher_names=("conv", "inv"), image_size=32, patch_size=4, hidden_size=96,
    ...                      num_hidden_layers=6, num_attention_heads=3, intermediate_size=384, num_labels=10)
    >>> model = IBViTForImageClassification(config)
    ```
    """

    model_type = "ibvit"
    # `Trainer` and `pipeline` get the fused prediction alone, as from any image classifier.
    keys_to_ignore_at_inference = ["class_logits", "teacher_token_logits", "hidden_states", "attentions"]

    teacher_names: list[str] | tuple[str, ...] = ("conv", "inv")
    fusion: str = "mean_probabilities"
    patch_embedding: str = "linear"
    stem_channels: int = 32
    num_stem_layers: int = 2
    teacher_spatial_operators: list[str] | tuple[str, ...] | None = None
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    drop_path_rate: float | int = 0.0
    initializer_range: float = 0.5
    layer_norm_eps: float = 1e-12
    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    qkv_bias: bool = True

    def __post_init__(self, **kwargs):
        self.teacher_names = list(self.teacher_names)
        if isinstance(self.id2label, (list, tuple)):
            self.id2label = dict(enumerate(self.id2label))
        super().__post_init__(**kwargs)

    @property
    def teacher_token_stems(self) -> list[str]:
        """For `"bias_stems"`, the stem whose mean patch is added to each teacher token, in the order of `teacher_names`."""
        alternating = [("convolution", "involution")[i % 2] for i in range(len(self.teacher_names))]
        return alternating if self.teacher_spatial_operators is None else list(self.teacher_spatial_operators)

    def validate_architecture(self):
        """Part of `@strict`-powered validation."""
        if len(set(self.teacher_names)) != len(self.teacher_names):
            raise ValueError(f"teacher_names={self.teacher_names} has a name twice. Give each teacher another name.")
        if self.fusion not in FUSIONS:
            raise ValueError(
                f'fusion="{self.fusion}" is unknown. Choose "mean_probabilities", "mean_logits" or "class_token".'
            )
        if self.patch_embedding not in ("linear", "convolution", "bias_stems"):
            raise ValueError(
                f'patch_embedding="{self.patch_embedding}" is unknown. Choose "linear", "convolution" or "bias_stems".'
            )
        if self.patch_embedding == "bias_stems" and (self.num_stem_layers < 2 or self.stem_channels % 16 != 0):
            raise ValueError(
                f"num_stem_layers={self.num_stem_layers} and stem_channels={self.stem_channels} do not fit the involution "
                'stem of "bias_stems". It needs at least 2 layers, and a multiple of 16 channels.'
            )
        stems = self.teacher_token_stems
        if len(stems) != len(self.teacher_names) or not set(stems) <= {"convolution", "involution"}:
            raise ValueError(
                f"teacher_spatial_operators={stems} does not fit teacher_names={self.teacher_names}. Give "
                '"convolution" or "involution" for each teacher.'
            )
        sizes = (
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "image_size",
            "patch_size",
        )
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"drop_path_rate={self.drop_path_rate} must be at least 0 and below 1.")
        if self.hidden_size % self.num_attention_heads != 0:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must divide hidden_size={self.hidden_size}."
            )
        if self.image_size % self.patch_size != 0:
            raise ValueError(f"patch_size={self.patch_size} must divide image_size={self.image_size}.")

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "IBViTConfig":
        """The configuration of a named network; `overrides` replace any of its fields.

        `"deit-tiny"`, `"deit-small"`, `"deit-base"`: the sizes of DeiT (arXiv 2012.12877) for 224 pixels. They have 5.7, 22
        and 86 M parameters at 1,000 classes without teachers; each teacher adds a token and a head.

        Raises:
            ValueError: there is no preset of this name.
        """
        if name not in PRESETS:
            raise ValueError(f'preset="{name}" is unknown. Choose one of {", ".join(PRESETS)}.')
        return cls(**{**PRESETS[name], **overrides})


__all__ = ["IBViTConfig"]
