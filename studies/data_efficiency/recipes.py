"""What the study compares: methods, their recipes, and changes of these."""

from dataclasses import dataclass, field

from hf_ibdistill import ViewRecipe


CLASSES = ["T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
TEACHERS = {"conv": "convolution-small", "inv": "involution-small"}
STEPS = {1000: 2000, 3000: 3000, 10000: 10000, 60000: 9000}
SEARCH_STEPS = 1200
TEACHER_STEPS = {1000: 800, 3000: 1200, 10000: 4700, 60000: 6000}
MAX_STORED_VIEWS = 16


@dataclass(frozen=True)
class Method:
    """The teachers of a student, and the source of their logits: "row" (one stored un-augmented row), "views" (stored
    views) or "online"."""

    title: str
    teachers: tuple[str, ...] = ()
    logits: str | None = None
    recipe: dict = field(default_factory=dict)


_DEIT = {"distillation_mode": "hard", "teacher_weight": 0.5, "label_weight": 0.5}
_TEACHER = {"learning_rate": 1e-2}
METHODS = {
    "conv": Method("convolution teacher", recipe=_TEACHER),
    "inv": Method("involution teacher", recipe=_TEACHER),
    "undistilled": Method("no teachers"),
    "undistilled_long": Method("no teachers, three times the steps"),
    "deit": Method("DeiT: convolution, hard, online", ("conv",), "online", _DEIT),
    "conv_row": Method("convolution, one stored row", ("conv",), "row"),
    "inv_row": Method("involution, one stored row", ("inv",), "row"),
    "both_row": Method("both, one stored row", ("conv", "inv"), "row"),
    "conv_views": Method("convolution, stored views", ("conv",), "views"),
    "inv_views": Method("involution, stored views", ("inv",), "views"),
    "both_views": Method("both, stored views", ("conv", "inv"), "views"),
    "co_advise": Method("Co-advise: both, online", ("conv", "inv"), "online", {"temperature": 1.0}),
}


@dataclass(frozen=True)
class Recipe:
    """Everything except the code that decides the result of a cell."""

    method: str
    images: int
    seed: int
    held_out: bool
    steps: int
    num_views: int
    batch_size: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    label_smoothing: float = 0.0
    distillation_mode: str = "soft"
    temperature: float = 4.0
    teacher_weight: float = 1.0
    label_weight: float = 1.0
    standardize_logits: bool = False
    confidence_weighting: bool = False
    padding: float = 0.1
    horizontal_flip: float = 0.5
    crop: str = "pad"
    min_scale: float = 0.5
    erasing: float = 0.0
    patch_embedding: str = "convolution"
    fusion: str = "mean_probabilities"
    hidden_size: int = 96
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    patch_size: int = 4

    def views(self) -> ViewRecipe:
        same = self.pick("num_views", "crop", "padding", "horizontal_flip", "erasing", "seed")
        return ViewRecipe(scale=(self.min_scale, 1.0), **same)

    def loss(self) -> dict:
        same = self.pick("distillation_mode", "label_weight", "standardize_logits", "confidence_weighting")
        return {"temperature": [self.temperature], "teacher_weights": [self.teacher_weight], **same}

    def pick(self, *names: str) -> dict:
        """Arguments that elsewhere have the same names."""
        return {name: getattr(self, name) for name in names}


# Changes of the recipe; "+" joins several. "patience" multiplies the steps.
VARIATIONS = {
    "base": {},
    "learning_rate_1e-3": {"learning_rate": 1e-3},
    "learning_rate_4e-3": {"learning_rate": 4e-3},
    "label_smoothing_0.1": {"label_smoothing": 0.1},
    "temperature_1": {"temperature": 1.0},
    "temperature_8": {"temperature": 8.0},
    "hard": {"distillation_mode": "hard"},
    "label_weight_0": {"label_weight": 0.0},
    "teacher_weight_3": {"teacher_weight": 3.0},
    "standardized": {"standardize_logits": True},
    "confidence": {"confidence_weighting": True},
    "views_1": {"num_views": 1},
    "views_32": {"num_views": 32},
    "views_64": {"num_views": 64},
    "patience_0.5": {"patience": 0.5},
    "patience_2": {"patience": 2},
    "erasing": {"erasing": 0.25},
    "resized": {"crop": "resized", "min_scale": 0.5},
    "linear": {"patch_embedding": "linear"},
    "bias_stems": {"patch_embedding": "bias_stems"},
}
# Every student has the same number of trials. The teachers keep the defaults of the package.
_LABEL_TRIALS = ("base", "learning_rate_1e-3", "label_smoothing_0.1")
_LOGITS_TRIALS = ("base", "learning_rate_1e-3", "temperature_1")
TRIALS = {
    **dict.fromkeys(("undistilled", "deit", "co_advise"), _LABEL_TRIALS),
    **dict.fromkeys(("both_row", "both_views"), _LOGITS_TRIALS),
}
# A longer baseline, or a method with one teacher, takes the recipe of the method it is compared with.
SAME_RECIPE = {
    "undistilled_long": "undistilled",
    "conv_row": "both_row",
    "inv_row": "both_row",
    "conv_views": "both_views",
    "inv_views": "both_views",
}


def combine(variation: str) -> dict:
    """The changes that "+" joins."""
    return {key: value for name in variation.split("+") for key, value in VARIATIONS[name].items()}
