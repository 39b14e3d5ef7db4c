"""Configuration of the student: a vision transformer with one token for each teacher."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


# DeiT's shapes (arXiv 2012.12877, table 1) and its code's epsilon; 224 pixels, patches of 16 and 12 layers are the defaults.
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
    r"""Configuration of [`IBViTModel`] and [`IBViTForImageClassification`]: a ViT (arXiv 2010.11929) with a class token
    and one teacher token, with a head of its own, for each teacher (arXiv 2310.00369; for one teacher: DeiT,
    arXiv 2012.12877). Fields that ViT has too carry ViT's names and, but for `initializer_range`, its defaults.

    Args:
        teacher_names: the teachers' names, in the order of the teacher tokens; none makes it a plain ViT.
        fusion: how the heads' predictions become `logits`: `"mean_probabilities"` averages the heads' softmax,
            `"mean_logits"` (Co-advise, arXiv 2106.12378) their logits, `"class_token"` takes the class head alone.
        patch_embedding: `"linear"` is ViT's own; `"convolution"` puts 3×3 convolutions at full resolution before the
            patch projection; `"bias_stems"` (Co-advise) has a convolution stem and an involution stem, sums their patch
            embeddings, and adds the mean of one stem's patches to each teacher token.
        stem_channels: channels of the stems, for `"bias_stems"` a multiple of 16; unused by `"linear"`.
        num_stem_layers: 3×3 layers in a stem, for `"bias_stems"` at least 2; unused by `"linear"`.
        teacher_spatial_operators: for `"bias_stems"`, the stem (`"convolution"` or `"involution"`) whose mean
            initialises each teacher token, in the order of `teacher_names`; `None` alternates, convolution first.
        hidden_size: width of the transformer.
        num_hidden_layers: depth of the transformer.
        num_attention_heads: attention heads a layer.
        intermediate_size: width of the feed-forward layers.
        hidden_act: activation of the feed-forward layers and the stems.
        hidden_dropout_prob: dropout on embeddings and residual branches.
        attention_probs_dropout_prob: dropout on attention probabilities.
        initializer_range: standard deviation of the initial tokens and position embeddings. More than ViT's 0.02: patches
            come in at a deviation of 1, beside which a student of few images would be slow to find out where they are.
        layer_norm_eps: epsilon of the layer norms.
        image_size: height and width of the images, in pixels.
        patch_size: height and width of a patch, in pixels.
        num_channels: channels of the images.
        qkv_bias: whether queries, keys and values have a bias.

    Raises:
        StrictDataclassClassValidationError: an unknown fusion or patch embedding, repeated teacher names, sizes that do
            not divide, or stems that their operator does not allow.

    Example:

    ```python
    >>> from hf_ibdistill import IBViTConfig, IBViTForImageClassification

    >>> config = IBViTConfig(teacher_names=("conv", "inv"), image_size=32, patch_size=4, hidden_size=96,
    ...                      num_hidden_layers=6, num_attention_heads=3, intermediate_size=384, num_labels=10)
    >>> model = IBViTForImageClassification(config)
    ```
    """

    model_type = "ibvit"
    # What `Trainer` and `pipeline` see is the fused prediction alone, as from any image classifier.
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
    initializer_range: float = 0.5
    layer_norm_eps: float = 1e-12
    image_size: int = 224
    patch_size: int = 16
    num_channels: int = 3
    qkv_bias: bool = True

    def __post_init__(self, **kwargs):
        self.teacher_names = list(self.teacher_names)
        super().__post_init__(**kwargs)

    @property
    def teacher_token_stems(self) -> list[str]:
        """For `"bias_stems"`, the stem whose mean initialises each teacher token, in the order of `teacher_names`."""
        alternating = [("convolution", "involution")[i % 2] for i in range(len(self.teacher_names))]
        return alternating if self.teacher_spatial_operators is None else list(self.teacher_spatial_operators)

    def validate_architecture(self):
        """Part of `@strict`-powered validation."""
        if len(set(self.teacher_names)) != len(self.teacher_names):
            raise ValueError(f"Each teacher needs a name of its own; got teacher_names={self.teacher_names}.")
        if self.fusion not in FUSIONS:
            raise ValueError(f'fusion is "mean_probabilities", "mean_logits" or "class_token"; got "{self.fusion}".')
        if self.patch_embedding not in ("linear", "convolution", "bias_stems"):
            raise ValueError(
                f'patch_embedding is "linear", "convolution" or "bias_stems"; got "{self.patch_embedding}".'
            )
        if self.patch_embedding == "bias_stems" and (self.num_stem_layers < 2 or self.stem_channels % 16 != 0):
            raise ValueError(
                'The involution stem of "bias_stems" needs num_stem_layers of at least 2 and stem_channels in multiples '
                f"of 16; got {self.num_stem_layers} and {self.stem_channels}."
            )
        stems = self.teacher_token_stems
        if len(stems) != len(self.teacher_names) or not set(stems) <= {"convolution", "involution"}:
            raise ValueError(
                'teacher_spatial_operators has "convolution" or "involution" for each teacher; got '
                f"{stems} for {self.teacher_names}."
            )
        if self.hidden_size % self.num_attention_heads != 0:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must divide hidden_size ({self.hidden_size})."
            )
        if self.image_size % self.patch_size != 0:
            raise ValueError(f"patch_size ({self.patch_size}) must divide image_size ({self.image_size}).")

    @classmethod
    def from_preset(cls, name: str, **overrides) -> "IBViTConfig":
        """The configuration of a named network; `overrides` replace any of its fields.

        `"deit-tiny"`, `"deit-small"`, `"deit-base"`: the sizes of DeiT (arXiv 2012.12877) for 224 pixels (5.7, 22 and 86 M
        parameters at 1,000 classes without teachers; each teacher adds a token and a head).

        Raises:
            ValueError: there is no preset of this name.
        """
        if name not in PRESETS:
            raise ValueError(f'There is no preset "{name}"; choose one of {", ".join(PRESETS)}.')
        return cls(**{**PRESETS[name], **overrides})


__all__ = ["IBViTConfig"]
