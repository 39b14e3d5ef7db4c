"""What the study compares: methods, their recipes, and changes of these."""

from dataclasses import dataclass, field

from hf_ibdistill import ViewRecipe


TEACHERS = {"conv": "convolution-small", "inv": "involution-small"}
# Parts of the labelled images that teachers leave out of their training, one part each.
FOLDS = 5


@dataclass(frozen=True)
class DataSet:
    """A data set of ten classes.

    Args:
        title: its name in tables and cards.
        source: its Hub id, or another source that every machine has.
        copy: what the images of the cells are, if they differ from those of the source.
        classes: names of the classes, by id.
        steps: number of labelled training images → steps of a student.
        teacher_steps: the same for the teachers.
        search_steps: steps of a student in the search.
        max_stored_views: views of an image that are stored at most.
        validates_on_split: the search measures on the validation split, instead of a fifth of the labelled images.
        recipe: what differs from the defaults of [`Recipe`].
    """

    title: str
    source: str
    classes: tuple[str, ...]
    steps: dict[int, int]
    teacher_steps: dict[int, int]
    search_steps: int
    max_stored_views: int = 16
    validates_on_split: bool = True
    recipe: dict = field(default_factory=dict)
    copy: str | None = None


_FASHION = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
DATASETS = {
    "fashion_mnist": DataSet(
        "Fashion-MNIST",
        "zalando-datasets/fashion_mnist",
        _FASHION,
        steps={1000: 2000, 3000: 3000, 10000: 10000, 60000: 9000},
        teacher_steps={1000: 800, 3000: 1200, 10000: 4700, 60000: 6000},
        search_steps=1200,
        validates_on_split=False,
    ),
    # Other steps and another validation split than in the study of labelled images above.
    "fashion_mnist_unlabelled": DataSet(
        "Fashion-MNIST",
        "zalando-datasets/fashion_mnist",
        _FASHION,
        steps={1000: 3000},
        teacher_steps={1000: 800},
        search_steps=1200,
    ),
    "cifar10": DataSet(
        "CIFAR-10 (as JPEG)",
        "uoft-cs/cifar10",
        ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        steps={1000: 4000, 5000: 4000, 50000: 10000},
        teacher_steps={1000: 600, 5000: 1500, 50000: 6000},
        search_steps=600,
        max_stored_views=8,
        copy="JPEG files of quality about 75, which are not the original arrays",
    ),
    "digits": DataSet(
        "scikit-learn's digits",
        "digits",
        tuple("0123456789"),
        steps={200: 1000},
        teacher_steps={200: 400},
        search_steps=1000,
        max_stored_views=50,
        recipe={"horizontal_flip": 0.0, "patch_size": 2},
    ),
}


@dataclass(frozen=True)
class Method:
    """The teachers of a student, and the source of their logits: "row" (one stored un-augmented row), "views" (stored
    views) or "online". With `uses_unlabelled` it trains on all images, of which `images` have a label. With `uses_folds` the
    logits of a labelled image are those of teachers that did not train on it. A method with a `preset` is a teacher. One with
    teachers and no `logits` is their mean probability, and trains nothing."""

    title: str
    teachers: tuple[str, ...] = ()
    logits: str | None = None
    recipe: dict = field(default_factory=dict)
    uses_unlabelled: bool = False
    uses_folds: bool = False
    preset: str | None = None

    @property
    def is_ensemble(self) -> bool:
        return bool(self.teachers) and self.logits is None


_DEIT = {"distillation_mode": "hard", "teacher_weight": 0.5, "label_weight": 0.5}
_TEACHER = {"learning_rate": 1e-2}
_SECOND_TEACHER = {**_TEACHER, "seed_offset": 100}
# The labels and the teachers' choices as labels, nothing else.
_PSEUDO_LABELS = {"unlabelled_target": "pseudo_labels", "min_confidence": 0.0, "teacher_weight": 0.0}
_BOTH, _PRETRAINED = tuple(TEACHERS), ("pretrained",)
# Two teachers of one kind, which differ by their seed.
_TWO_CONV, _TWO_INV = ("conv", "conv_b"), ("inv", "inv_b")
METHODS = {
    "conv": Method("convolution teacher", recipe=_TEACHER, preset=TEACHERS["conv"]),
    "inv": Method("involution teacher", recipe=_TEACHER, preset=TEACHERS["inv"]),
    "conv_b": Method("convolution teacher of another seed", recipe=_SECOND_TEACHER, preset=TEACHERS["conv"]),
    "inv_b": Method("involution teacher of another seed", recipe=_SECOND_TEACHER, preset=TEACHERS["inv"]),
    "ensemble": Method("both teachers, mean probability", _BOTH),
    "two_conv_ensemble": Method("two convolution teachers, mean probability", _TWO_CONV),
    "two_inv_ensemble": Method("two involution teachers, mean probability", _TWO_INV),
    "pretrained": Method(
        "EfficientNet-Lite0 of ImageNet-1k, linear probe", recipe={"learning_rate": 1e-3}, preset="efficientnet-lite0"
    ),
    "undistilled": Method("no teachers"),
    "undistilled_long": Method("no teachers, three times the steps"),
    "deit": Method("DeiT: convolution, hard, online", ("conv",), "online", _DEIT),
    "conv_row": Method("convolution, one stored row", ("conv",), "row"),
    "inv_row": Method("involution, one stored row", ("inv",), "row"),
    "both_row": Method("both, one stored row", _BOTH, "row"),
    "conv_views": Method("convolution, stored views", ("conv",), "views"),
    "inv_views": Method("involution, stored views", ("inv",), "views"),
    "both_views": Method("both, stored views", _BOTH, "views"),
    "two_conv": Method("two convolution teachers, stored views", _TWO_CONV, "views"),
    "two_inv": Method("two involution teachers, stored views", _TWO_INV, "views"),
    "both_all": Method("both, stored views, with unlabelled images", _BOTH, "views", uses_unlabelled=True),
    "both_folds": Method("both, stored views, out of fold", _BOTH, "views", uses_folds=True),
    "both_all_folds": Method(
        "both, stored views, out of fold, with unlabelled images",
        _BOTH,
        "views",
        uses_unlabelled=True,
        uses_folds=True,
    ),
    "pseudo_labels": Method("pseudo-labels of both", _BOTH, "views", _PSEUDO_LABELS, uses_unlabelled=True),
    "pretrained_row": Method("pretrained, one stored row", _PRETRAINED, "row"),
    "pretrained_all": Method("pretrained, with unlabelled images", _PRETRAINED, "row", uses_unlabelled=True),
    "pretrained_pseudo_labels": Method(
        "pseudo-labels of the pretrained", _PRETRAINED, "row", _PSEUDO_LABELS, uses_unlabelled=True
    ),
    "both_online": Method("both, online", _BOTH, "online"),
    "co_advise": Method("Co-advise: both, online", _BOTH, "online", {"temperature": 1.0}),
}
# Students of two teachers → the mean of these teachers. Does a second kind of teacher teach more than a second teacher?
PAIRS = {"both_views": "ensemble", "two_conv": "two_conv_ensemble", "two_inv": "two_inv_ensemble"}


@dataclass(frozen=True)
class Recipe:
    """Everything except the code that decides the result of a cell. `seed` chooses the images; with `seed_offset` added, it
    is the seed of the weights, of the order and of the views. A teacher with a `fold` does not train on that part of the
    labelled images. `consistency` is the confidence from which another view teaches the class token; `None` is never."""

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
    unlabelled_target: str = "none"
    min_confidence: float = 0.95
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
    student: str = "ibvit"
    views_per_image: int = 1
    # Of ingredients.py. `ema` is the decay of the average, `rand_augment` a magnitude. `early_stopping` keeps the weights that
    # were best on half of the held-out images.
    mixing: str = "none"
    drop_path: float = 0.0
    ema: float = 0.0
    rand_augment: int = 0
    early_stopping: bool = False
    seed_offset: int = 0
    fold: int | None = None
    consistency: float | None = None
    # Of the views, and so of stored logits too.
    photometric_ops: int = 0
    geometric_ops: int = 0

    def __post_init__(self):
        method = METHODS[self.method]
        if method.logits in ("row", "views") and (self.mixing != "none" or self.rand_augment):
            raise ValueError(
                f"mixing={self.mixing} and rand_augment={self.rand_augment} change images, but {self.method} has stored "
                "logits of unchanged images. Choose a method with online teachers, or none."
            )
        if self.early_stopping and not self.held_out:
            raise ValueError(
                "early_stopping=True needs held-out images, and the test images choose no weights. Run it with --stage search."
            )
        if self.drop_path and (method.preset or self.student != "ibvit"):
            raise ValueError(
                f"drop_path={self.drop_path} needs an IBViT. Leave it out for {self.method}, student={self.student}."
            )

    @property
    def training_seed(self) -> int:
        return self.seed + self.seed_offset

    def views(self) -> ViewRecipe:
        same = self.pick(
            "num_views", "crop", "padding", "horizontal_flip", "erasing", "photometric_ops", "geometric_ops"
        )
        return ViewRecipe(scale=(self.min_scale, 1.0), seed=self.training_seed, **same)

    def loss(self) -> dict:
        same = self.pick("distillation_mode", "label_weight", "standardize_logits", "confidence_weighting")
        same |= self.pick("unlabelled_target", "min_confidence")
        return {"temperature": [self.temperature], "teacher_weights": [self.teacher_weight], **same}

    def pick(self, *names: str) -> dict:
        """Arguments that elsewhere have the same names."""
        return {name: getattr(self, name) for name in names}


# Students of other families, for 32 pixels: the fields of their configurations.
FAMILIES = {
    "vit": {
        "patch_size": 4,
        "hidden_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 192,
    },
    "mobilenet_v2": {"depth_multiplier": 0.35, "output_stride": 8},
    "resnet": {"embedding_size": 32, "hidden_sizes": [32, 64, 128], "depths": [2, 2, 2], "layer_type": "basic"},
    "convnext": {"patch_size": 2, "hidden_sizes": [32, 64, 128], "depths": [2, 2, 2], "num_stages": 3},
}
# Another view of an unlabelled image teaches the class token, instead of the teachers.
_CONSISTENCY = {"consistency": 0.0, "views_per_image": 2, "unlabelled_target": "none"}
# Changes of the recipe; "+" joins several. "patience" multiplies the steps.
VARIATIONS = {
    "base": {},
    "learning_rate_5e-4": {"learning_rate": 5e-4},
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
    "target_none": {"unlabelled_target": "none"},
    "target_teachers": {"unlabelled_target": "teachers"},
    "target_pseudo_labels": {"unlabelled_target": "pseudo_labels"},
    "views_1": {"num_views": 1},
    "views_4": {"num_views": 4},
    "views_32": {"num_views": 32},
    "views_64": {"num_views": 64},
    "views_per_image_2": {"views_per_image": 2},
    "views_per_image_4": {"views_per_image": 4},
    "consistency": _CONSISTENCY,
    "consistency_confident": {**_CONSISTENCY, "consistency": 0.95},
    "patience_0.5": {"patience": 0.5},
    "patience_2": {"patience": 2},
    "patience_6": {"patience": 6},
    "erasing": {"erasing": 0.25},
    "resized": {"crop": "resized", "min_scale": 0.5},
    "mixup": {"mixing": "mixup"},
    "cutmix": {"mixing": "cutmix"},
    "drop_path": {"drop_path": 0.1},
    "ema": {"ema": 0.999},
    "rand_augment": {"rand_augment": 7},
    # As strong, but of the package, so that logits of such views can be stored.
    "color_and_geometry": {"photometric_ops": 1, "geometric_ops": 1},
    "early_stopping": {"early_stopping": True},
    "linear": {"patch_embedding": "linear"},
    "bias_stems": {"patch_embedding": "bias_stems"},
    # Four times as wide, with heads of the same size.
    "wide": {"hidden_size": 384, "num_attention_heads": 16},
    **{family: {"student": family} for family in FAMILIES},
}
# Changes that make another student, which is compared with others of its own shape.
OTHER_STUDENTS = ("linear", "bias_stems", "wide", *FAMILIES)
# Of strong recipes. Each is compared with the same variation without it.
INGREDIENTS = ("mixup", "cutmix", "drop_path", "ema", "rand_augment", "color_and_geometry", "early_stopping")
# Every student has the same number of trials. The teachers keep the defaults of the package.
_LABEL_TRIALS = ("base", "learning_rate_1e-3", "label_smoothing_0.1")
_LOGITS_TRIALS = ("base", "learning_rate_1e-3", "temperature_1")
TRIALS = {
    **dict.fromkeys(("undistilled", "deit", "co_advise", "pseudo_labels"), _LABEL_TRIALS),
    **dict.fromkeys(("both_row", "both_views", "both_all"), _LOGITS_TRIALS),
}
# A longer baseline, or a method with other teachers, takes the recipe of the method it is compared with.
SAME_RECIPE = {
    "undistilled_long": "undistilled",
    "conv_row": "both_row",
    "inv_row": "both_row",
    "conv_views": "both_views",
    "inv_views": "both_views",
    "both_online": "both_views",
    "two_conv": "both_views",
    "two_inv": "both_views",
    "both_folds": "both_views",
    "both_all_folds": "both_all",
    "pretrained_row": "both_views",
    "pretrained_all": "both_all",
    "pretrained_pseudo_labels": "pseudo_labels",
}


def combine(variation: str) -> dict:
    """The changes that "+" joins."""
    return {key: value for name in variation.split("+") for key, value in VARIATIONS[name].items()}
