"""How many images does a student need, taught by nobody, by one teacher or by both? Fashion-MNIST, nested subsets.

    python scripts/study_data_efficiency.py --dataset FOLDER --stage search --methods both_views --variations trials
    python scripts/study_data_efficiency.py --dataset FOLDER --stage search --methods both_views --variations finalists
    python scripts/study_data_efficiency.py --dataset FOLDER --stage choose
    python scripts/study_data_efficiency.py --dataset FOLDER --stage grid --images 3000 --methods both_views --seeds 0

A cell is one model: a subset, a method, a seed and a recipe. Its JSON file in RESULTS_DIR holds the recipe, versions,
metrics, predictions and time; a cell whose file is there is not run again, so a study that was stopped goes on where it
stopped. Several processes can share a study: give each its own `--seeds` or `--images`.

`--stage search` trains on four fifths of a subset and measures on the fifth that it held out. `--stage choose` fixes the
best recipe of each method in RESULTS_DIR/recipes.json. `--stage grid` trains on all of the subset by these recipes, and only
then opens the test images. `report_data_efficiency.py` turns the cells into tables, pictures and model cards.
"""

import hashlib
import json
import math
import time
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path

import numpy as np
import torch
from arguments import parse_arguments, run
from datasets import ClassLabel, Dataset, concatenate_datasets
from transformers import set_seed

from hf_ibdistill import (
    DistillationArguments,
    EnsembleDistillationTrainer,
    IBResNetConfig,
    IBResNetForImageClassification,
    IBViTConfig,
    IBViTForImageClassification,
    ImageClassificationTrainer,
    ImageTrainingArguments,
    ViewRecipe,
    build_image_processor,
    class_config,
    load_image_dataset,
    logits_metrics,
    predict,
    record_teacher_logits,
)
from hf_ibdistill.data import select_per_class
from hf_ibdistill.evaluation import classification_metrics
from hf_ibdistill.logits.recording import write_beside
from hf_ibdistill.models.configuration_ibvit import FUSIONS
from hf_ibdistill.report import describe_machine
from hf_ibdistill.training.arguments import has_bf16_units


CLASSES = ["T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
TEACHERS = {"conv": "convolution-small", "inv": "involution-small"}
STEPS = {1000: 2000, 3000: 3000, 10000: 10000, 60000: 9000}
SEARCH_STEPS = 1200
TEACHER_STEPS = {1000: 800, 3000: 1200, 10000: 4700, 60000: 6000}
MAX_STORED_VIEWS = 16


@dataclass(frozen=True)
class Method:
    """Whose logits a student learns from, and where they come from: "row" (one stored un-augmented row), "views" (stored
    views) or "online"."""

    title: str
    teachers: tuple[str, ...] = ()
    logits: str | None = None
    recipe: dict = field(default_factory=dict)


_DEIT = {"distillation_mode": "hard", "teacher_weight": 0.5, "label_weight": 0.5}
METHODS = {
    "conv": Method("convolution teacher"),
    "inv": Method("involution teacher"),
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
    """All that decides a cell's result, beside the code."""

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
        return ViewRecipe(
            num_views=self.num_views,
            crop=self.crop,
            padding=self.padding,
            scale=(self.min_scale, 1.0),
            horizontal_flip=self.horizontal_flip,
            erasing=self.erasing,
            seed=self.seed,
        )

    def loss(self) -> dict:
        return {
            "distillation_mode": self.distillation_mode,
            "temperature": [self.temperature],
            "teacher_weights": [self.teacher_weight],
            "label_weight": self.label_weight,
            "standardize_logits": self.standardize_logits,
            "confidence_weighting": self.confidence_weighting,
        }


# Changes of the recipe; several are joined by "+". "patience" multiplies the steps.
VARIATIONS = {
    "base": {},
    "learning_rate_1e-3": {"learning_rate": 1e-3},
    "learning_rate_4e-3": {"learning_rate": 4e-3},
    "label_smoothing_0.05": {"label_smoothing": 0.05},
    "label_smoothing_0.1": {"label_smoothing": 0.1},
    "label_smoothing_0.2": {"label_smoothing": 0.2},
    "temperature_1": {"temperature": 1.0},
    "temperature_2": {"temperature": 2.0},
    "temperature_4": {"temperature": 4.0},
    "temperature_8": {"temperature": 8.0},
    "hard": {"distillation_mode": "hard"},
    "label_weight_0": {"label_weight": 0.0},
    "teacher_weight_0.3": {"teacher_weight": 0.3},
    "teacher_weight_3": {"teacher_weight": 3.0},
    "standardized": {"standardize_logits": True},
    "confidence": {"confidence_weighting": True},
    "views_1": {"num_views": 1},
    "views_4": {"num_views": 4},
    "views_32": {"num_views": 32},
    "views_64": {"num_views": 64},
    "patience_0.5": {"patience": 0.5},
    "patience_2": {"patience": 2},
    "pad_only": {"horizontal_flip": 0.0},
    "erasing": {"erasing": 0.25},
    "resized": {"crop": "resized", "min_scale": 0.5},
    "resized_0.7": {"crop": "resized", "min_scale": 0.7},
    "linear": {"patch_embedding": "linear"},
    "bias_stems": {"patch_embedding": "bias_stems"},
}
# Every student has the same number of trials. The best two run again with twice the steps, and the better of them is chosen.
# The teachers run by the package's defaults.
_LABEL_TRIALS = ("base", "learning_rate_1e-3", "label_smoothing_0.1")
_LOGITS_TRIALS = ("base", "learning_rate_1e-3", "temperature_1")
TRIALS = {
    **dict.fromkeys(("undistilled", "deit", "co_advise"), _LABEL_TRIALS),
    **dict.fromkeys(("both_row", "both_views"), _LOGITS_TRIALS),
}
# Baselines and parts of a method run by the recipe of the whole.
SAME_RECIPE = {
    "undistilled_long": "undistilled",
    "conv_row": "both_row", "inv_row": "both_row", "conv_views": "both_views", "inv_views": "both_views"
}  # fmt: skip


@dataclass
class StudyArguments:
    dataset: str = field(
        default="zalando-datasets/fashion_mnist",
        metadata={"help": "Fashion-MNIST: its id on the Hub, or a folder of its IDX files."},
    )
    stage: str = field(default="grid", metadata={"help": "search, choose or grid."})
    images: list[int] = field(default_factory=lambda: [3000], metadata={"help": "Sizes of the training subset."})
    methods: list[str] = field(default_factory=lambda: list(METHODS), metadata={"help": "Any of the methods."})
    variations: list[str] = field(
        default_factory=lambda: ["base"],
        metadata={
            "help": 'Changes of the recipe; join several by "+". In the search also "trials", the first round, and "finalists", '
            "the second."
        },
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "One cell each."})
    teacher_steps: int | None = field(default=None, metadata={"help": "Other steps than the study's, to try it out."})
    student_steps: int | None = field(default=None, metadata={"help": "Other steps than the study's, to try it out."})
    results_dir: str = field(default="results/data_efficiency", metadata={"help": "Folder of the cells."})
    work_dir: str = field(default="outputs/data_efficiency", metadata={"help": "Folder of models and tables."})


class Study:
    """The images, and the folders of the cells and of the models."""

    def __init__(self, args: StudyArguments):
        self.args, self.results_dir, self.work_dir = args, Path(args.results_dir), Path(args.work_dir)

    @cached_property
    def _splits(self) -> dict[str, Dataset]:
        # Opened when the first cell needs images: most of a study's starts only look at what is there.
        splits = load_image_dataset(self.args.dataset)
        classes = ClassLabel(names=CLASSES)
        return {name: rows.cast_column("label", classes) for name, rows in splits.items()}

    @cached_property
    def train(self) -> Dataset:
        """All training images; our own splits are taken out of them."""
        return concatenate_datasets([self._splits["train"], self._splits["validation"]])

    @property
    def recipes_path(self) -> Path:
        return self.results_dir / "recipes.json"

    @property
    def labels_path(self) -> Path:
        return self.results_dir / "test_labels.json"

    def recipe(self, method: str, images: int, seed: int, changes: dict) -> Recipe:
        """The study's recipe, then the method's, then `changes`."""
        is_teacher, is_search = method in TEACHERS, self.args.stage == "search"
        if is_teacher:
            steps = self.args.teacher_steps or TEACHER_STEPS[images]
        else:
            steps = self.args.student_steps or (SEARCH_STEPS if is_search else STEPS[images])
            steps *= 3 if method == "undistilled_long" else 1
        values = {**({"learning_rate": 1e-2} if is_teacher else {}), **METHODS[method].recipe, **changes}
        steps = round(steps * values.pop("patience", 1))
        # A view of each image for every epoch; but a view that is stored costs more than the step that it saves.
        views = math.ceil(steps * Recipe.batch_size / (images * 4 // 5 if is_search else images))
        if METHODS[method].logits == "views":
            views = min(views, MAX_STORED_VIEWS)
        return Recipe(method, images, seed, is_search, steps, **{"num_views": views, **values})

    def rows(self, recipe: Recipe) -> tuple[Dataset, Dataset | None]:
        """The rows to train on and, in a search, those held out."""
        train = select_per_class(self.train, recipe.images // len(CLASSES), "label", recipe.seed)
        if not recipe.held_out:
            return train, None
        parts = train.train_test_split(test_size=0.2, stratify_by_column="label", seed=recipe.seed)
        return parts["train"], parts["test"]

    def test_rows(self) -> Dataset:
        if not self.recipes_path.exists():
            raise ValueError(f"The test images stay closed until the recipes are fixed in {self.recipes_path}.")
        return self._splits["test"]

    def folder(self, recipe: Recipe) -> Path:
        """Where the teachers and the tables of this subset are."""
        return self.work_dir / f"{recipe.images}_{recipe.seed}{'_held_out' if recipe.held_out else ''}"

    def cell_path(self, recipe: Recipe, variation: str) -> Path:
        stage = "search" if recipe.held_out else "grid"
        return self.results_dir / stage / f"{recipe.images}_{recipe.method}_{variation}_{recipe.seed}.json"

    def run_cell(self, recipe: Recipe, variation: str) -> dict:
        """The cell's results, from its file if it is there."""
        path = self.cell_path(recipe, variation)
        model_folder = self.folder(recipe) / f"{recipe.method}_{variation}"
        if path.exists():
            cell = json.loads(path.read_text())
            if Recipe(**cell["recipe"]) != recipe:
                raise ValueError(f"{path} was made by another recipe: {cell['recipe']} instead of {asdict(recipe)}.")
            # A teacher's weights are needed by its students, and not part of the cell.
            if recipe.method not in TEACHERS or model_folder.exists():
                return cell
        train, held_out = self.rows(recipe)
        processor, classes = build_image_processor(train), class_config(train)
        recording, logits = {}, {}
        if recipe.method in TEACHERS:
            trainer = self._trainer(recipe, build_teacher(recipe, classes), processor, train)
        else:
            student = build_student(recipe, classes, processor.size["height"])
            trainer, recording, logits = self._student_trainer(recipe, student, processor, train)
        seconds = stopwatch()
        trainer.train()
        seconds = seconds()
        rows = self.test_rows() if held_out is None else held_out
        outputs = predict(trainer.model, processor, rows, batch_size=256)
        cell = {
            "recipe": asdict(recipe),
            "variation": variation,
            "split": "test" if held_out is None else "held out",
            "rows": len(train),
            "parameters": trainer.model.num_parameters(),
            "metrics": classification_metrics(**outputs, teacher_names=METHODS[recipe.method].teachers),
            "fusions": fusion_accuracies(trainer.model, outputs),
            "logits": logits,
            "seconds": {"training": seconds, **recording},
            "losses": [entry for entry in trainer.state.log_history if "loss" in entry],
            # One digit an image, in the order of the split.
            "predictions": digits(outputs["logits"].argmax(-1)),
            "bf16": trainer.args.bf16,
            "machine": describe_machine(),
        }
        if held_out is None and not self.labels_path.exists():
            write(self.labels_path, digits(outputs["labels"]))
        trainer.model.save_pretrained(model_folder)
        processor.save_pretrained(model_folder)
        write(path, cell)
        print(f"{path.name}: {100 * cell['metrics']['accuracy']:.2f} % in {seconds['wall']:.0f} s", flush=True)
        return cell

    def teachers(self, recipe: Recipe) -> dict[str, str]:
        """Name → folder of the teachers that this recipe's student learns from; trained if they are not there."""
        folders = {}
        for name in METHODS[recipe.method].teachers:
            self.run_cell(self.recipe(name, recipe.images, recipe.seed, self.chosen(name)), "base")
            folders[name] = str(self.folder(recipe) / f"{name}_base")
        return folders

    def chosen(self, method: str) -> dict:
        """What the search chose for a method; nothing yet in the search itself."""
        if self.args.stage == "search":
            return {}
        if not self.recipes_path.exists():
            raise ValueError(f"There is no {self.recipes_path}; search and choose first.")
        return json.loads(self.recipes_path.read_text())[method]

    def search_accuracy(self, method: str, variation: str) -> float:
        """Accuracy on held-out images, mean over the seeds."""
        paths = (self.results_dir / "search").glob(f"*_{method}_{variation}_[0-9].json")
        values = [json.loads(path.read_text())["metrics"]["accuracy"] for path in paths]
        if not values:
            raise ValueError(f'{method} has no cell of the trial "{variation}"; run the search first.')
        return sum(values) / len(values)

    def finalists(self, method: str) -> list[str]:
        """The second round's trials: the best two of the first, with twice the steps."""
        ranking = sorted(TRIALS[method], key=lambda variation: self.search_accuracy(method, variation), reverse=True)
        return [f"{variation}+patience_2" for variation in ranking[:2]]

    def choose(self) -> None:
        """Fix each method's recipe: the better of its finalists."""
        recipes = dict.fromkeys(TEACHERS, {})
        for method in TRIALS:
            accuracies = {name: self.search_accuracy(method, name) for name in self.finalists(method)}
            best = max(accuracies, key=accuracies.get)
            recipes[method] = combine(best.removesuffix("+patience_2"))
            print(method, {name: round(100 * value, 2) for name, value in accuracies.items()}, recipes[method])
        recipes |= {method: recipes[other] for method, other in SAME_RECIPE.items()}
        write(self.recipes_path, recipes)

    def _student_trainer(self, recipe, student, processor, train):
        method = METHODS[recipe.method]
        if method.logits is None:
            return self._trainer(recipe, student, processor, train), {}, {}
        teachers = self.teachers(recipe)
        if method.logits == "online":
            return self._trainer(recipe, student, processor, train, teachers=teachers), {}, {}
        views = recipe.views() if method.logits == "views" else None
        table, seconds = self.record(recipe, train, teachers, views)
        logits = logits_metrics(table, temperature=recipe.temperature)
        return self._trainer(recipe, student, processor, table), {"recording": seconds}, logits

    def record(self, recipe, train, teachers, views) -> tuple[Dataset, dict]:
        augmentation = "row" if views is None else json.dumps(views.to_dict(), sort_keys=True)
        name = "_".join([*teachers, "row" if views is None else fingerprint(augmentation)])
        folder = self.folder(recipe) / "tables" / name
        path = folder.with_suffix(".json")
        seconds = stopwatch()
        bf16 = has_bf16_units(use_cpu=not torch.accelerator.is_available())
        table = record_teacher_logits(train, teachers, output_dir=folder, views=views, bf16=bf16)
        if not path.exists():
            write(path, seconds())
        return table, json.loads(path.read_text())

    def _trainer(self, recipe, model, processor, train, **kwargs):
        is_distilled = bool(getattr(model.config, "teacher_names", []))
        arguments_class = DistillationArguments if is_distilled else ImageTrainingArguments
        trainer_class = EnsembleDistillationTrainer if is_distilled else ImageClassificationTrainer
        args = arguments_class(
            output_dir=str(self.folder(recipe) / "trainer"),
            seed=recipe.seed,
            max_steps=recipe.steps,
            learning_rate=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            per_device_train_batch_size=recipe.batch_size,
            label_smoothing_factor=recipe.label_smoothing,
            eval_strategy="no",
            logging_strategy="steps",
            logging_steps=max(1, recipe.steps // 10),
            disable_tqdm=True,
            **(recipe.loss() if is_distilled else {}),
        )
        return trainer_class(
            model, args, train_dataset=train, processing_class=processor, views=recipe.views(), **kwargs
        )


def build_teacher(recipe: Recipe, classes: dict) -> IBResNetForImageClassification:
    set_seed(recipe.seed)
    return IBResNetForImageClassification(IBResNetConfig.from_preset(TEACHERS[recipe.method], **classes))


def build_student(recipe: Recipe, classes: dict, image_size: int) -> IBViTForImageClassification:
    set_seed(recipe.seed)
    config = IBViTConfig(
        teacher_names=METHODS[recipe.method].teachers,
        fusion=recipe.fusion,
        patch_embedding=recipe.patch_embedding,
        image_size=image_size,
        patch_size=recipe.patch_size,
        hidden_size=recipe.hidden_size,
        num_hidden_layers=recipe.num_hidden_layers,
        num_attention_heads=recipe.num_attention_heads,
        intermediate_size=2 * recipe.hidden_size,
        **classes,
    )
    return IBViTForImageClassification(config)


def fusion_accuracies(model, outputs: dict[str, np.ndarray]) -> dict[str, float]:
    """Accuracy by each kind of fusion. The loss does not know of fusion, so one training serves all kinds."""
    if "teacher_token_logits" not in outputs:
        return {}
    heads = [torch.from_numpy(outputs[name]) for name in ("class_logits", "teacher_token_logits")]
    chosen, accuracies = model.config.fusion, {}
    for fusion in FUSIONS:
        model.config.fusion = fusion
        accuracies[fusion] = float((model.fuse(*heads).argmax(-1).numpy() == outputs["labels"]).mean())
    model.config.fusion = chosen
    return accuracies


def stopwatch():
    """Called later, it tells the seconds since now: on the wall, and of processor time, which other processes that share
    the machine do not lengthen."""
    wall, cpu = time.perf_counter(), time.process_time()
    return lambda: {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def digits(classes) -> str:
    """One digit for each class id."""
    return "".join(map(str, classes))


def undigits(text: str) -> np.ndarray:
    """[`digits`] back."""
    return np.array([int(digit) for digit in text])


def fingerprint(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def write(path: Path, content) -> None:
    write_beside(path, lambda beside: beside.write_text(json.dumps(content, indent=1)))


def combine(variation: str) -> dict:
    """The changes of variations joined by "+"."""
    changes = {}
    for name in variation.split("+"):
        changes |= VARIATIONS[name]
    return changes


def check(args: StudyArguments) -> None:
    """Refuse names that the study does not know, before a cell is trained."""
    is_round = args.stage == "search" and args.variations in (["trials"], ["finalists"])
    names = [] if is_round else [name for variation in args.variations for name in variation.split("+")]
    sizes = [] if args.student_steps and args.teacher_steps else args.images
    for what, given, known in (
        ("stage", [args.stage], ["search", "choose", "grid"]),
        ("method", args.methods, METHODS),
        ("variation", names, VARIATIONS),
        ("number of images", sizes, STEPS),
    ):
        unknown = [name for name in given if name not in known]
        if unknown:
            raise ValueError(f"There is no {what} {unknown[0]}; choose from {', '.join(map(str, known))}.")


def main():
    (args,) = parse_arguments(StudyArguments)
    check(args)
    study = Study(args)
    if args.stage == "choose":
        return study.choose()
    for images, seed, method in product(args.images, args.seeds, args.methods):
        variations = args.variations
        if variations == ["trials"]:
            variations = TRIALS[method]
        elif variations == ["finalists"]:
            variations = study.finalists(method)
        for variation in variations:
            changes = {**study.chosen(method), **combine(variation)}
            study.run_cell(study.recipe(method, images, seed, changes), variation)


if __name__ == "__main__":
    run(main)
