"""Run the whole method on bundled images: teachers, recorded logits, students, card and picture.

hf-ibdistill quickstart
hf-ibdistill quickstart --images_per_class 50 --seeds 0 1 2
hf-ibdistill quickstart --dataset my_images/ --images_per_class 100 --output_dir outputs/mine

It hides most labels. Teachers learn the labelled images; a student learns from them on all images.
It ends with a table, a picture, and a student in OUTPUT_DIR/seed_N/student for `from_pretrained`
and `pipeline`.
"""

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification, set_seed
from transformers.hf_argparser import HfArg

from ..data.classes import class_config, label_ids
from ..data.sources import public_name
from ..evaluation import predict
from ..files import read_json, write_text
from ..images.preprocessing import build_image_processor
from ..models.configuration_ibresnet import IBResNetConfig
from ..models.configuration_ibvit import IBViTConfig
from ..models.modeling_ibresnet import IBResNetForImageClassification
from ..models.modeling_ibvit import IBViTForImageClassification
from ..publishing.cards import markdown_table, mean_and_spread
from ..publishing.results import RESULTS, evaluate_and_save
from ..recording.recorder import record_teacher_logits
from ..students import default_patch_size
from ..training.arguments import DistillationArguments, ImageTrainingArguments
from ..training.trainer import EnsembleDistillationTrainer, ImageClassificationTrainer
from .arguments import UnlabelledDataArguments, ViewArguments, parse, result_split, run
from .display import next_commands, text_table, training_display


PRESETS = {"conv": "convolution-small", "inv": "involution-small"}


@dataclass
class QuickstartData(UnlabelledDataArguments):
    images_per_class: int | None = HfArg(
        default=20, help="Training images of each class with a label; 0 takes all. The method suits few labels."
    )
    drop_rest: bool = HfArg(
        default=False, help="Leave out the other training images, instead of hiding their labels alone."
    )

    def __post_init__(self):
        self.images_per_class = self.images_per_class or None

    @property
    def keep_rest(self) -> bool:
        """Whether images without a label teach."""
        return not self.drop_rest


@dataclass
class QuickstartViews(ViewArguments):
    num_views: int = HfArg(
        default=10, help="Stored views of each image; 0 stores the logits of the image as it is, as in the paper."
    )


@dataclass
class QuickstartArguments:
    _argument_group_name = "quickstart"

    output_dir: str = HfArg(default="outputs/quickstart", help="Folder of everything that this command writes.")
    seeds: list[int] = HfArg(
        default_factory=lambda: [0],
        help="One run for each seed of the subset, the first weights and the order of the images.",
    )
    teacher_steps: int = HfArg(default=200, help="Training steps of each teacher.")
    student_steps: int = HfArg(default=500, help="Training steps of each student.")
    batch_size: int = HfArg(default=50, help="Images per step.")
    teacher_learning_rate: float = HfArg(default=1e-2, help="Peak learning rate of the teachers.")
    student_learning_rate: float = HfArg(default=1e-3, help="Peak learning rate of the students.")
    temperature: float = HfArg(default=4.0, help="Softens the distributions of the teachers.")
    teacher_weight: float = HfArg(default=1.0, help="Weight of the term of each teacher in the loss.")


def train(
    model, folder: Path, seed: int, quick: QuickstartArguments, train_dataset, eval_dataset, processor, **kwargs
):
    """Train a teacher or student; `kwargs` are those of the trainer, which is returned."""
    is_student = isinstance(model, IBViTForImageClassification)
    is_distilled = is_student and bool(model.config.teacher_names)
    steps = quick.student_steps if is_student else quick.teacher_steps
    loss = {"temperature": [quick.temperature], "teacher_weights": [quick.teacher_weight]} if is_distilled else {}
    args = (DistillationArguments if is_distilled else ImageTrainingArguments)(
        output_dir=str(folder),
        seed=seed,
        max_steps=steps,
        learning_rate=quick.student_learning_rate if is_student else quick.teacher_learning_rate,
        per_device_train_batch_size=quick.batch_size,
        eval_strategy="steps",
        eval_steps=max(1, steps // 10),
        logging_strategy="steps",
        logging_steps=max(1, steps // 10),
        **loss,
    )
    trainer = (EnsembleDistillationTrainer if is_distilled else ImageClassificationTrainer)(
        model, args, train_dataset=train_dataset, eval_dataset=eval_dataset, processing_class=processor, **kwargs
    )
    with training_display(trainer, f"train {folder.name}{f', seed {seed}' if len(quick.seeds) > 1 else ''}"):
        trainer.train()
    return trainer


def build_teacher(name: str, classes: dict, seed: int) -> IBResNetForImageClassification:
    """An untrained teacher of `PRESETS`."""
    set_seed(seed)
    return IBResNetForImageClassification(IBResNetConfig.from_preset(PRESETS[name], **classes))


def build_student(teacher_names, processor, classes: dict, seed: int) -> IBViTForImageClassification:
    """An untrained student for these teachers."""
    set_seed(seed)
    size = processor.size["height"]
    config = IBViTConfig(
        teacher_names=teacher_names,
        patch_embedding="convolution",
        image_size=size,
        patch_size=default_patch_size(size),
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=192,
        **classes,
    )
    return IBViTForImageClassification(config)


def run_seed(data: QuickstartData, views: QuickstartViews, quick: QuickstartArguments, seed: int, folder: Path):
    """One run.

    Returns:
        The metrics of each model, the seconds of each step, and the number of training images with and without a label.
    """
    metrics, seconds, start = {}, {}, time.perf_counter()

    def lap(step):
        nonlocal start
        seconds[step], start = time.perf_counter() - start, time.perf_counter()

    data.split_seed = seed
    splits = data.load()
    split, labels = result_split(splits), label_ids(splits["train"])
    labelled = splits["train"].select(np.flatnonzero(labels != -1))
    counts = {"labelled": len(labelled), "unlabelled": len(labels) - len(labelled)}
    classes, processor = class_config(splits["train"]), build_image_processor(splits["train"])
    shared = {
        "seed": seed,
        "quick": quick,
        "eval_dataset": splits["validation"],
        "processor": processor,
        "views": views.recipe(),
    }
    lap("load the images")

    for name, preset in PRESETS.items():
        teacher = train(build_teacher(name, classes, seed), folder / name, train_dataset=labelled, **shared)
        metrics[name] = evaluate_and_save(teacher, splits[split], split, title=preset, data_name=data.dataset)
        lap(f"train the teacher {name}")

    # The table of an earlier run belongs to other teachers.
    shutil.rmtree(folder / "table", ignore_errors=True)
    table = record_teacher_logits(
        splits,
        {name: str(folder / name) for name in PRESETS},
        output_dir=folder / "table",
        views=views.recipe(),
    )
    lap("record their logits")

    student = build_student((), processor, classes, seed)
    alone = train(student, folder / "student_alone", train_dataset=labelled, **shared)
    metrics["student without teachers"] = evaluate_and_save(
        alone, splits[split], split, title="Student without teachers", data_name=data.dataset
    )
    lap("train the student without teachers")

    student = build_student(tuple(PRESETS), processor, classes, seed)
    distilled = train(student, folder / "student", train_dataset=table["train"], **shared)
    metrics["student with both teachers"] = evaluate_and_save(
        distilled,
        table[split],
        split,
        title="Distilled student",
        data_name=data.dataset,
        teacher_metrics={name: metrics[name] for name in PRESETS},
        baseline=folder / "student_alone",
    )
    lap("distill the student")

    check_reloaded(distilled, folder / "student", splits[split])
    lap("reload")
    ensemble = read_json(folder / "student" / RESULTS)["ensemble"]
    of_teachers = {name: metrics.pop(name) for name in PRESETS}
    return {**of_teachers, "both teachers, mean probability": ensemble, **metrics}, seconds, counts


def check_reloaded(trainer, folder: Path, dataset) -> None:
    """Raise `RuntimeError` unless the saved student predicts what the trained one predicts."""
    reloaded = AutoModelForImageClassification.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder)
    before = predict(trainer.model, trainer.processing_class, dataset)["logits"]
    if not (before == predict(reloaded, processor, dataset)["logits"]).all():
        raise RuntimeError(f"The student in {folder} does not predict what the trained one predicts.")


def summarize(data: QuickstartData, views: QuickstartViews, seeds: list[int], runs: list[tuple]) -> tuple:
    """What [`run_seed`] returned, as a sentence about the images, and two tables of means over the seeds, each a header and
    rows: accuracies and times."""
    results, seconds, (counts, *_) = zip(*runs)
    rows = []
    for name in results[0]:
        accuracy = mean_and_spread([metrics[name]["accuracy"] for metrics in results])
        likelihood = sum(metrics[name]["negative_log_likelihood"] for metrics in results) / len(results)
        rows.append([name, accuracy, f"{likelihood:.3f}"])
    times = [[step, f"{sum(lap[step] for lap in seconds) / len(seconds):.1f}"] for step in seconds[0]]
    images = f"{counts['labelled']:,} images with a label, {counts['unlabelled']:,} without"
    images += f", {views.num_views} views" if views.num_views else ", no views"
    return (
        f"{public_name(data.dataset)}: {images}, seeds {seeds}, threads: {torch.get_num_threads()}",
        (["model", "test accuracy (%)", "test −log p"], rows),
        (["step", "seconds"], times),
    )


def main(arguments):
    data, views, quick = parse("quickstart", __doc__, arguments, QuickstartData, QuickstartViews, QuickstartArguments)
    output_dir = Path(quick.output_dir)
    runs = [run_seed(data, views, quick, seed, output_dir / f"seed_{seed}") for seed in quick.seeds]
    images, accuracies, times = summarize(data, views, quick.seeds, runs)
    results, seconds, counts = zip(*runs)
    facts = {
        "images_per_class": data.images_per_class,
        "training_images": counts,
        "num_views": views.num_views,
        "seeds": quick.seeds,
        "metrics": results,
        "seconds": seconds,
    }
    write_text(output_dir / "summary.md", f"{images}\n\n{markdown_table(*accuracies)}\n\n{markdown_table(*times)}\n")
    write_text(output_dir / "summary.json", json.dumps(facts, indent=2))
    student = output_dir / f"seed_{quick.seeds[-1]}" / "student"
    own = ["--dataset", "my_images/", "--images_per_class", "100", "--output_dir", "outputs/mine"]
    print(f"\n{text_table(*times)}\n\n{images}\n\n{text_table(*accuracies)}\n")
    print(f"Student, card and report.html: {student}\n")
    print(next_commands(["predict", "--model", student, "IMAGES"], ["demo", "--model", student], ["quickstart", *own]))


if __name__ == "__main__":
    run("quickstart", main)
