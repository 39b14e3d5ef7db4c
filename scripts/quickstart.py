"""The whole method on images that come with it: teachers → recorded logits → students with and without teachers.

    python scripts/quickstart.py
    python scripts/quickstart.py --images_per_class 50 --seeds 0 1 2
    python scripts/quickstart.py --dataset my_images/ --images_per_class 100 --output_dir outputs/mine

Ends with a table, a picture, and a distilled student in OUTPUT_DIR/seed_N/student that `from_pretrained` and `pipeline`
load.
"""

import json
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from arguments import DataArguments, ViewArguments, default_patch_size, parse_arguments, result_split, run
from transformers import AutoImageProcessor, AutoModelForImageClassification, set_seed

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
    predict,
    record_teacher_logits,
)
from hf_ibdistill.data import class_names
from hf_ibdistill.images import ImageRows
from hf_ibdistill.report import markdown_table, mean_and_spread, plot_run
from hf_ibdistill.training.finish import evaluate_and_save


PRESETS = {"conv": "convolution-small", "inv": "involution-small"}
PICTURE = "quickstart.png"


@dataclass
class QuickstartData(DataArguments):
    images_per_class: int | None = field(
        default=20,
        metadata={"help": "Training images of each class; 0 takes all. Few images are what the method is for."},
    )

    def __post_init__(self):
        self.images_per_class = self.images_per_class or None


@dataclass
class QuickstartViews(ViewArguments):
    num_views: int = field(
        default=50,
        metadata={
            "help": "Stored views of each image; 0 stores one row of logits of the image as it is (the paper's way)."
        },
    )


@dataclass
class QuickstartArguments:
    output_dir: str = field(default="outputs/quickstart", metadata={"help": "Folder of everything that it makes."})
    seeds: list[int] = field(
        default_factory=lambda: [0],
        metadata={"help": "One run for each: the seed of the subset, the first weights and the order of the images."},
    )
    teacher_steps: int = field(default=400, metadata={"help": "Training steps of each teacher."})
    student_steps: int = field(default=1000, metadata={"help": "Training steps of each student."})
    batch_size: int = field(default=50, metadata={"help": "Images a step."})
    teacher_learning_rate: float = field(default=1e-2, metadata={"help": "Peak learning rate of the teachers."})
    student_learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate of the students."})
    temperature: float = field(default=4.0, metadata={"help": "Softens the teachers' distributions."})
    teacher_weight: float = field(default=1.0, metadata={"help": "Weight of each teacher's term in the loss."})


class Stopwatch:
    """Seconds of each step of the run."""

    def __init__(self):
        self.seconds, self._last = {}, time.perf_counter()

    def lap(self, name):
        now = time.perf_counter()
        self.seconds[name], self._last = now - self._last, now


def train(
    trainer_class,
    model,
    folder,
    seed,
    quick,
    splits,
    data,
    processor,
    views,
    train_dataset=None,
    teachers=None,
    **settings,
):
    is_student = isinstance(model, IBViTForImageClassification)
    steps = quick.student_steps if is_student else quick.teacher_steps
    arguments_class = DistillationArguments if trainer_class is EnsembleDistillationTrainer else ImageTrainingArguments
    args = arguments_class(
        output_dir=str(folder),
        seed=seed,
        max_steps=steps,
        learning_rate=quick.student_learning_rate if is_student else quick.teacher_learning_rate,
        per_device_train_batch_size=quick.batch_size,
        eval_strategy="steps",
        eval_steps=max(1, steps // 10),
        logging_strategy="steps",
        logging_steps=max(1, steps // 10),
        **settings,
    )
    trainer = trainer_class(
        model,
        args,
        train_dataset=train_dataset or splits["train"],
        eval_dataset=splits["validation"],
        processing_class=processor,
        image_column=data.image_column,
        label_column=data.label_column,
        views=views,
        **({} if teachers is None else {"teachers": teachers}),
    )
    trainer.train()
    return trainer


def build_student(teacher_names, processor, classes, seed) -> IBViTForImageClassification:
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


def run_seed(data, views, quick, seed: int, folder: Path) -> tuple[dict, dict]:
    """One run; returns the metrics of each model and the seconds of each step."""
    watch = Stopwatch()
    data.split_seed = seed
    splits = data.load()
    split = result_split(splits)
    classes = class_config(splits["train"], data.label_column)
    processor = build_image_processor(splits["train"], data.image_column)
    shared = {
        "seed": seed, "quick": quick, "splits": splits, "data": data, "processor": processor, "views": views.recipe()
    }  # fmt: skip
    metrics = {}
    watch.lap("load the images")

    for name, preset in PRESETS.items():
        set_seed(seed)
        model = IBResNetForImageClassification(IBResNetConfig.from_preset(preset, **classes))
        trainer = train(ImageClassificationTrainer, model, folder / name, **shared)
        metrics[name] = evaluate_and_save(trainer, splits[split], split, title=preset, data_name=data.dataset)
        watch.lap(f"train the teacher {name}")

    # An earlier run's table is by other teachers, unless nothing at all was changed.
    shutil.rmtree(folder / "table", ignore_errors=True)
    table = record_teacher_logits(
        splits,
        {name: str(folder / name) for name in PRESETS},
        output_dir=folder / "table",
        views=views.recipe(),
        image_column=data.image_column,
        label_column=data.label_column,
    )
    watch.lap("record their logits")

    alone = train(
        ImageClassificationTrainer, build_student((), processor, classes, seed), folder / "student_alone", **shared
    )
    metrics["student without teachers"] = evaluate_and_save(
        alone, splits[split], split, title="Student without teachers", data_name=data.dataset
    )
    watch.lap("train the student without teachers")

    distilled = train(
        EnsembleDistillationTrainer,
        build_student(tuple(PRESETS), processor, classes, seed),
        folder / "student",
        **shared,
        train_dataset=table["train"],
        temperature=[quick.temperature],
        teacher_weights=[quick.teacher_weight],
    )
    metrics["student with both teachers"] = evaluate_and_save(
        distilled,
        table[split],
        split,
        title="Distilled student",
        data_name=data.dataset,
        teacher_metrics={name: metrics[name] for name in PRESETS},
        picture=PICTURE,
    )
    watch.lap("distil the student")

    trainers = {"without teachers": alone, "with both teachers": distilled}
    draw(trainers, splits[split].shuffle(seed=seed).select(range(min(8, len(splits[split])))), folder, data)
    check_reloaded(distilled, folder / "student", splits[split], data)
    watch.lap("draw and reload")
    return metrics, watch.seconds


def draw(trainers, sample, folder, data) -> None:
    """The picture: learning curves of both students, and what each token says of a few images."""
    student = trainers["with both teachers"]
    outputs = predict(student.model, student.processing_class, sample)
    names = class_names(sample, data.label_column)
    tokens = {"fused": outputs["logits"], "class": outputs["class_logits"]}
    tokens |= {name: outputs["teacher_token_logits"][:, i] for i, name in enumerate(PRESETS)}
    plot_run(
        folder / "student" / PICTURE,
        {name: trainer.state.log_history for name, trainer in trainers.items()},
        [row[data.image_column] for row in ImageRows(sample, data.image_column).__getitems__(range(len(sample)))],
        [names[label] for label in outputs["labels"]],
        {token: [names[i] for i in logits.argmax(-1)] for token, logits in tokens.items()},
    )


def check_reloaded(trainer, folder, dataset, data) -> None:
    """The saved student predicts what the trained one predicts."""
    reloaded = AutoModelForImageClassification.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder)
    before = predict(trainer.model, trainer.processing_class, dataset)["logits"]
    if not (before == predict(reloaded, processor, dataset)["logits"]).all():
        raise RuntimeError(f"The student in {folder} does not predict what the trained one predicts.")


def main():
    data, views, quick = parse_arguments(QuickstartData, QuickstartViews, QuickstartArguments)
    output_dir = Path(quick.output_dir)
    results, seconds = [], []
    for seed in quick.seeds:
        metrics, laps = run_seed(data, views, quick, seed, output_dir / f"seed_{seed}")
        results.append(metrics)
        seconds.append(laps)

    def column(name, metric):
        return [metrics[name][metric] for metrics in results]

    rows = [
        [name, mean_and_spread(column(name, "accuracy")), f"{sum(column(name, 'negative_log_likelihood')) / len(results):.3f}"]
        for name in results[0]
    ]  # fmt: skip
    table = markdown_table(["model", "test accuracy (%)", "test −log p"], rows)
    times = markdown_table(
        ["step", "seconds"], [[name, f"{sum(lap[name] for lap in seconds) / len(seconds):.1f}"] for name in seconds[0]]
    )
    images = "all training images" if data.images_per_class is None else f"{data.images_per_class} images a class"
    images += f", {views.num_views} views" if views.num_views else ", no views"
    summary = (
        f"{data.dataset}, {images}, seeds {quick.seeds}, {torch.get_num_threads()} threads\n\n{table}\n\n{times}\n"
    )
    (output_dir / "summary.md").write_text(summary)
    (output_dir / "summary.json").write_text(
        json.dumps({"images_per_class": data.images_per_class, "num_views": views.num_views, "seeds": quick.seeds, "metrics": results, "seconds": seconds}, indent=2)
    )  # fmt: skip
    student = output_dir / f"seed_{quick.seeds[-1]}" / "student"
    print(f"\n{summary}\nStudent, card and picture: {student}\nTry it:\n")
    print(
        f"  python -c \"import hf_ibdistill, transformers; print(transformers.pipeline('image-classification', '{student}'))\""
    )


if __name__ == "__main__":
    run(main)
