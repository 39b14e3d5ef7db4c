"""Train the models of the study: one cell is one model, and one JSON file with its recipe, metrics and predictions."""

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from datasets import ClassLabel, Dataset, concatenate_datasets
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    PreTrainedModel,
    set_seed,
)

from hf_ibdistill import (
    DistillationArguments,
    EnsembleDistillationTrainer,
    IBResNetConfig,
    IBResNetForImageClassification,
    IBViTConfig,
    IBViTForImageClassification,
    ImageClassificationTrainer,
    ImageTrainingArguments,
    build_image_processor,
    class_config,
    load_image_dataset,
    logits_metrics,
    predict,
    record_teacher_logits,
    select_per_class,
)
from hf_ibdistill.data.classes import label_ids
from hf_ibdistill.evaluation import classification_metrics, log_mean_probability
from hf_ibdistill.files import write_text
from hf_ibdistill.logits.provenance import attach_record, only_record
from hf_ibdistill.models.configuration_ibvit import FUSIONS
from hf_ibdistill.publishing.machine import describe_machine
from hf_ibdistill.students import build_student, load_with_classes
from hf_ibdistill.training.arguments import has_bf16_units
from hf_ibdistill.training.finetuning import freeze_backbone

from ..pretrained import save_efficientnet
from .ingredients import (
    AveragedWeights,
    MixedClassificationTrainer,
    MixedDistillationTrainer,
    RandAugmentCollator,
)
from .recipes import DATASETS, FAMILIES, FOLDS, METHODS, SAME_RECIPE, DataSet, Recipe
from .targets import ConsistencyTrainer


def study_folders(name: str, results_dir: str | None, work_dir: str | None) -> tuple[Path, Path]:
    """The folders of the cells and of the models, by default those of this data set.

    Raises:
        ValueError: there is no study of this name.
    """
    if name not in DATASETS:
        raise ValueError(f"name={name} is unknown. Choose from {', '.join(DATASETS)}.")
    return (
        Path(results_dir or f"results/data_efficiency/{name}"),
        Path(work_dir or f"outputs/data_efficiency/{name}"),
    )


@dataclass
class Study:
    """The images, the cells and the models."""

    name: str  # of the data set, in DATASETS
    source: str  # of its images
    results_dir: Path  # of the cells
    work_dir: Path  # of the models and the tables
    # Hold out a fifth of the training images and measure on it; the test images stay closed.
    is_search: bool = False
    # Other steps than those of the study, to try it out.
    teacher_steps: int | None = None
    student_steps: int | None = None
    # Under bf16 or not; by default on hardware with bf16 units.
    bf16: bool | None = None

    def __post_init__(self):
        if self.bf16 is None:
            self.bf16 = has_bf16_units(use_cpu=not torch.accelerator.is_available())

    @property
    def data(self) -> DataSet:
        return DATASETS[self.name]

    @cached_property
    def _splits(self) -> dict[str, Dataset]:
        # Opened when the first cell needs images, because most starts of a study only read cells.
        splits, label = load_image_dataset(self.source), ClassLabel(names=list(self.data.classes))
        return {name: rows.cast_column("label", label) for name, rows in splits.items()}

    @cached_property
    def train(self) -> Dataset:
        """All training images; the study takes its own splits out of them."""
        return concatenate_datasets([self._splits["train"], self._splits["validation"]])

    @property
    def recipes_path(self) -> Path:
        return self.results_dir / "recipes.json"

    def recipe(self, method: str, images: int, seed: int, changes: dict) -> Recipe:
        """The recipe of the study, changed by that of the method, then by `changes`."""
        if METHODS[method].preset:
            steps = self.teacher_steps or self.data.teacher_steps[images]
        else:
            steps = self.student_steps or (self.data.search_steps if self.is_search else self.data.steps[images])
            steps *= 3 if method == "undistilled_long" else 1
        values = {**self.data.recipe, **METHODS[method].recipe, **changes}
        steps = round(steps * values.pop("patience", 1))
        rows = images * 4 // 5 if self.is_search and not self.data.validates_on_split else images
        if METHODS[method].uses_unlabelled:
            rows = len(self._splits["train"] if self.is_search else self.train)
        if values.get("fold") is not None:
            rows = rows * (FOLDS - 1) // FOLDS
        # A view of each image for every epoch; but to store a view costs more than the step that it saves.
        views = max(math.ceil(steps * Recipe.batch_size / rows), values.get("views_per_image", 1))
        if METHODS[method].logits == "views":
            views = min(views, self.data.max_stored_views)
        return Recipe(method, images, seed, self.is_search, steps, **{"num_views": views, **values})

    def chosen(self, method: str) -> dict:
        """The changes that the search chose for a method. In the search itself there are none.

        Raises:
            ValueError: the recipes are not fixed yet.
        """
        if self.is_search:
            return {}
        if not self.recipes_path.exists():
            raise ValueError(f"There is no {self.recipes_path}. Run --stage search, then --stage choose.")
        recipes = json.loads(self.recipes_path.read_text())
        # A method that came after the search has the recipe of the one that it is compared with.
        return recipes[method if method in recipes else SAME_RECIPE.get(method, method)]

    def rows(self, recipe: Recipe) -> tuple[Dataset, Dataset | None]:
        """The rows to train on and, in a search, the held-out rows."""
        holds_out_split = recipe.held_out and self.data.validates_on_split
        source = self._splits["train"] if holds_out_split else self.train
        images_per_class = recipe.images // len(self.data.classes)
        train, held_out = select_per_class(source, images_per_class, seed=recipe.seed), None
        if holds_out_split:
            held_out = self._splits["validation"]
        elif recipe.held_out:
            parts = train.train_test_split(test_size=0.2, stratify_by_column="label", seed=recipe.seed)
            train, held_out = parts["train"], parts["test"]
        if METHODS[recipe.method].uses_unlabelled:
            mixed = select_per_class(source, images_per_class, seed=recipe.seed, keep_rest=True)
            rest = np.flatnonzero(label_ids(mixed) == -1)
            train = concatenate_datasets([train, mixed.select(rest)])
        if recipe.fold is not None:
            train = train.select(np.flatnonzero(fold_numbers(train, recipe.seed) != recipe.fold))
        return train, held_out

    def test_rows(self) -> Dataset:
        """The test images.

        Raises:
            ValueError: the recipes are not fixed yet.
        """
        if not self.recipes_path.exists():
            raise ValueError(f"The test images stay closed until the recipes are fixed in {self.recipes_path}.")
        return self._splits["test"]

    def folder(self, recipe: Recipe) -> Path:
        """Folder of the models and tables of this subset."""
        return self.work_dir / f"{recipe.images}_{recipe.seed}{'_held_out' if recipe.held_out else ''}"

    def run_cell(self, recipe: Recipe, variation: str) -> dict:
        """The results of a cell, from its file if there is one.

        Raises:
            ValueError: the file was made by another recipe.
        """
        stage = "search" if recipe.held_out else "grid"
        # The teachers of folds serve a method, and are none themselves.
        folder = self.results_dir / stage / ("" if recipe.fold is None else "folds")
        path = folder / f"{recipe.images}_{recipe.method}_{variation}_{recipe.seed}.json"
        model_folder = self.folder(recipe) / f"{recipe.method}_{variation}"
        if path.exists():
            cell = json.loads(path.read_text())
            if Recipe(**cell["recipe"]) != recipe:
                raise ValueError(f"{path} was made by another recipe: {cell['recipe']} instead of {asdict(recipe)}.")
            # Students need the weights of a teacher, which are not part of its cell.
            if METHODS[recipe.method].preset is None or model_folder.exists():
                return cell
        train, held_out = self.rows(recipe)
        measured = self.test_rows() if held_out is None else held_out
        if METHODS[recipe.method].is_ensemble:
            cell = self._measure_ensemble(recipe, measured)
        else:
            cell = self._train_and_measure(recipe, train, measured, model_folder)
        cell = {
            "recipe": asdict(recipe),
            "variation": variation,
            "split": "test" if held_out is None else "held out",
            "rows": len(train),
            **cell,
            "machine": describe_machine(),
        }
        # Those of a search on parts of the training images are other images for each seed.
        labels_path = self.results_dir / f"{'test' if held_out is None else 'validation'}_labels.json"
        if (held_out is None or self.data.validates_on_split) and not labels_path.exists():
            write(labels_path, digits(label_ids(measured)))
        write(path, cell)
        print(f"{path.name}: {100 * cell['metrics']['accuracy']:.2f} %", flush=True)
        return cell

    def _train_and_measure(self, recipe, train, measured, folder):
        method = METHODS[recipe.method]
        if method.preset == "efficientnet-lite0":
            model, processor = build_pretrained(recipe, self.folder(recipe) / "efficientnet", class_config(train))
        else:
            processor = build_image_processor(train)
            model = build_model(recipe, class_config(train), processor.size["height"])
        evaluated = {}
        if recipe.early_stopping:
            # What chooses the weights does not measure them.
            evaluated["eval_dataset"] = measured.select(range(0, len(measured), 2))
            measured = measured.select(range(1, len(measured), 2))
        trainer, recording, logits = self._prepare(recipe, model, processor, train, **evaluated)
        seconds = stopwatch()
        trainer.train()
        seconds = seconds()
        prediction = stopwatch()
        outputs = predict(model, processor, measured, batch_size=256)
        prediction = prediction() | {"images": len(measured)}
        # Those of tokens; a student without tokens has none.
        names = getattr(model.config, "teacher_names", ())
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        return {
            "parameters": model.num_parameters(),
            "metrics": classification_metrics(**outputs, teacher_names=names),
            "fusions": fusion_accuracies(model, outputs),
            "logits": logits,
            "seconds": {"training": seconds, "prediction": prediction, **recording},
            "losses": [entry for entry in trainer.state.log_history if "loss" in entry],
            # Of early stopping, whose weights are those of the best.
            "validation": [entry["eval_accuracy"] for entry in trainer.state.log_history if "eval_accuracy" in entry],
            # One digit an image, in the order of the split.
            "predictions": digits(outputs["logits"].argmax(-1)),
            "bf16": trainer.args.bf16,
        }

    def _measure_ensemble(self, recipe, measured):
        """The mean of the teachers' probabilities."""
        logits, parameters = [], 0
        for folder in self._teachers(recipe)[0].values():
            model = AutoModelForImageClassification.from_pretrained(folder)
            outputs = predict(model, AutoImageProcessor.from_pretrained(folder), measured, batch_size=256)
            logits.append(outputs["logits"])
            parameters += model.num_parameters()
        logits = log_mean_probability(np.stack(logits))
        return {
            "parameters": parameters,
            "metrics": classification_metrics(logits, outputs["labels"]),
            "seconds": {"training": {"wall": 0.0, "cpu": 0.0}},
            "predictions": digits(logits.argmax(-1)),
        }

    def _teachers(self, recipe, fold: int | None = None) -> tuple[dict[str, str], list[dict[str, float]]]:
        """The folders of the teachers of a cell, which are trained if they are not there, and the seconds of their training.
        With a `fold`, they did not train on this part of the labelled rows."""
        folders, seconds, variation = {}, [], "base" if fold is None else f"fold_{fold}"
        for name in METHODS[recipe.method].teachers:
            changes = {**self.chosen(name), "fold": fold}
            cell = self.run_cell(self.recipe(name, recipe.images, recipe.seed, changes), variation)
            folders[name] = str(self.folder(recipe) / f"{name}_{variation}")
            seconds.append(cell["seconds"]["training"])
        return folders, seconds

    def _prepare(self, recipe, model, processor, train, **kwargs):
        """The trainer, the seconds of recording, and the metrics of the recorded logits."""
        method = METHODS[recipe.method]
        if method.logits is None:
            return self._trainer(recipe, model, processor, train, **kwargs), {}, {}
        if method.logits == "online":
            kwargs["teachers"] = self._teachers(recipe)[0]
            return self._trainer(recipe, model, processor, train, **kwargs), {}, {}
        if method.uses_folds:
            table, seconds = self._record_folds(recipe, train)
        else:
            views = recipe.views() if method.logits == "views" else None
            table, recording = self._record(recipe, train, self._teachers(recipe)[0], views)
            seconds = {"recording": recording}
        logits = logits_metrics(table, temperature=recipe.temperature)
        return self._trainer(recipe, model, processor, table, **kwargs), seconds, logits

    def _record_folds(self, recipe, train):
        """The table whose labelled rows have the logits of teachers that did not train on them, in the order of `train`. Rows
        without a label have those of the teachers of all labelled rows. Also the seconds of all these teachers and of
        recording."""
        folds = fold_numbers(train, recipe.seed)
        parts, order, recording, training = [], [], [], []
        for fold in np.unique(folds):
            rows = np.flatnonzero(folds == fold)
            if fold < 0:
                teachers, seconds = self._teachers(recipe)
                # The table of the method without folds, which may be there already.
                table, spent = self._record(recipe, train, teachers, recipe.views())
                part = table.select(rows)
            else:
                teachers, seconds = self._teachers(recipe, int(fold))
                part, spent = self._record(recipe, train.select(rows), teachers, recipe.views(), int(fold))
            parts.append(part)
            order.append(rows)
            recording.append(spent)
            training += seconds
        table = concatenate_datasets(parts).select(np.argsort(np.concatenate(order)))
        # The package refuses several teachers of one name. To the student, the teachers of the parts are one.
        records = [only_record(part) for part in parts]
        described = []
        for same in zip(*(record["teachers"] for record in records)):
            weights = "".join(teacher["weights_sha256"] for teacher in same)
            described.append({**same[0], "weights_sha256": hashlib.sha256(weights.encode()).hexdigest()})
        attach_record(table, {**records[0], "teachers": described})
        return table, {"recording": total(recording), "teachers": total(training)}

    def _record(self, recipe, train, teachers, views, fold=None):
        kind = "row"
        if views is not None:
            kind = hashlib.sha256(json.dumps(views.to_dict(), sort_keys=True).encode()).hexdigest()[:12]
        if fold is not None:
            kind += f"_fold_{fold}"
        elif METHODS[recipe.method].uses_unlabelled:
            kind += "_all"
        folder = self.folder(recipe) / "tables" / "_".join([*teachers, kind])
        path = folder.with_suffix(".json")
        seconds = stopwatch()
        table = record_teacher_logits(train, teachers, output_dir=folder, views=views, bf16=self.bf16, batch_size=256)
        if not path.exists():
            write(path, seconds())
        return table, json.loads(path.read_text())

    def _trainer(self, recipe, model, processor, train, **kwargs):
        arguments, loss = ImageTrainingArguments, {}
        trainer, mixed_trainer = ImageClassificationTrainer, MixedClassificationTrainer
        if METHODS[recipe.method].teachers:
            arguments, loss = DistillationArguments, recipe.loss()
            trainer, mixed_trainer = EnsembleDistillationTrainer, MixedDistillationTrainer
        evaluation = {"eval_strategy": "no"}
        if recipe.early_stopping:
            every = max(1, recipe.steps // 20)
            evaluation = {"eval_strategy": "steps", "eval_steps": every, "save_strategy": "steps", "save_steps": every}
            evaluation |= {"load_best_model_at_end": True, "metric_for_best_model": "accuracy", "save_total_limit": 1}
        args = arguments(
            str(self.folder(recipe) / "trainer"),
            max_steps=recipe.steps,
            per_device_train_batch_size=recipe.batch_size,
            label_smoothing_factor=recipe.label_smoothing,
            **evaluation,
            logging_strategy="steps",
            logging_steps=max(1, recipe.steps // 10),
            disable_tqdm=True,
            bf16=self.bf16,
            seed=recipe.training_seed,
            **recipe.pick("learning_rate", "weight_decay", "views_per_image"),
            **loss,
        )
        if recipe.consistency is not None:
            trainer, kwargs["min_target_confidence"] = ConsistencyTrainer, recipe.consistency
        kwargs |= {"train_dataset": train, "processing_class": processor, "views": recipe.views()}
        if recipe.ema:
            kwargs["callbacks"] = [AveragedWeights(recipe.ema)]
        if recipe.mixing != "none":
            trainer, kwargs["mixing"] = mixed_trainer, recipe.mixing
        trainer = trainer(model, args, **kwargs)
        if recipe.rand_augment:
            trainer.data_collator = RandAugmentCollator(trainer.data_collator, recipe.rand_augment)
        return trainer


def fold_numbers(rows: Dataset, seed: int) -> np.ndarray:
    """The fold of each row, 0 to FOLDS - 1, each with the same share of every class; -1 for a row without a label."""
    labels, random = label_ids(rows), np.random.default_rng(seed)
    folds = np.full(len(labels), -1)
    for class_id in np.unique(labels[labels >= 0]):
        of_class = np.flatnonzero(labels == class_id)
        folds[random.permutation(of_class)] = np.arange(len(of_class)) % FOLDS
    return folds


def build_model(recipe: Recipe, classes: dict, image_size: int) -> PreTrainedModel:
    """An untrained teacher or student."""
    set_seed(recipe.training_seed)
    method = METHODS[recipe.method]
    if method.preset:
        return IBResNetForImageClassification(IBResNetConfig.from_preset(method.preset, **classes))
    if recipe.student != "ibvit":
        return build_student(recipe.student, image_size=image_size, **FAMILIES[recipe.student], **classes)
    shape = {"image_size": image_size, "intermediate_size": 2 * recipe.hidden_size}
    shape |= recipe.pick("fusion", "patch_embedding", "patch_size")
    shape |= recipe.pick("hidden_size", "num_hidden_layers", "num_attention_heads")
    shape["drop_path_rate"] = recipe.drop_path
    # A token whose loss has no weight would stay untaught.
    names = method.teachers if recipe.teacher_weight else ()
    return IBViTForImageClassification(IBViTConfig(teacher_names=names, **shape, **classes))


def build_pretrained(recipe: Recipe, folder: Path, classes: dict) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """A teacher with a new head on the frozen weights of ImageNet-1k."""
    set_seed(recipe.training_seed)
    model = load_with_classes(save_efficientnet(folder, image_size=96), **classes)
    freeze_backbone(model)
    return model, AutoImageProcessor.from_pretrained(folder)


def fusion_accuracies(model: IBViTForImageClassification, outputs: dict[str, np.ndarray]) -> dict[str, float]:
    """Accuracy by each kind of fusion. One training serves all kinds, because the loss does not depend on fusion."""
    if outputs.get("teacher_token_logits") is None:
        return {}
    heads = [torch.from_numpy(outputs[name]) for name in ("class_logits", "teacher_token_logits")]
    chosen, accuracies = model.config.fusion, {}
    for fusion in FUSIONS:
        model.config.fusion = fusion
        accuracies[fusion] = float((model.fuse(*heads).argmax(-1).numpy() == outputs["labels"]).mean())
    model.config.fusion = chosen
    return accuracies


def stopwatch() -> Callable[[], dict[str, float]]:
    """A function that returns the seconds from now to its call: on the wall, and of processor time, which other
    processes on the machine do not lengthen."""
    wall, cpu = time.perf_counter(), time.process_time()
    return lambda: {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def total(seconds: list[dict[str, float]]) -> dict[str, float]:
    """The sums of several measurements of a stopwatch."""
    return {clock: sum(found[clock] for found in seconds) for clock in ("wall", "cpu")}


def digits(classes) -> str:
    """One digit for each class id."""
    return "".join(map(str, classes))


def write(path: Path, content) -> None:
    write_text(path, json.dumps(content, indent=1))
