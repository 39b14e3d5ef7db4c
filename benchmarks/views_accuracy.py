"""Accuracy against training time with several views of each decoded photo in a batch.

    python benchmarks/views_accuracy.py --dataset FOLDER
    python benchmarks/views_accuracy.py --dataset FOLDER --photo_size 432 --image_size 224 --steps 300 600 1200

The training images are some of each class. A convolution teacher learns them, and its logits are recorded for each of `num_views`
views (random crops, resized and mirrored). For each K of `views_per_image` and each number of steps, a student with a schedule of
that many steps learns from the table. All have the same number of views in a step. So K views of an image mean fewer different
images in a step, and less time.

With `photo_size`, the images are enlarged to JPEG files of that side first, so that decoding costs what it costs with photos. The
teacher still sees its own, smaller size. Time is processor time of `trainer.train()`; the accuracy is that of test images.
"""

import io
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset, Image, load_from_disk
from matplotlib.figure import Figure
from PIL.Image import Resampling
from timing import parse, processor_seconds, write_results
from transformers import PrinterCallback, ViTImageProcessor, set_seed
from transformers.hf_argparser import HfArg

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
    evaluate_model,
    load_image_dataset,
    record_teacher_logits,
    select_per_class,
)
from hf_ibdistill.publishing.cards import markdown_table, mean_and_spread


TEACHER = "conv"


@dataclass
class ViewsAccuracyArguments:
    output_file: str = HfArg(default="outputs/benchmark_views_accuracy.json", help="Where the results go.")
    picture: str | None = HfArg(default=None, help="PNG file of accuracy against time; by default none.")
    dataset: str = HfArg(default="digits", help="Images with labels.")
    images_per_class: int = HfArg(default=500, help="Training images.")
    num_test: int = HfArg(default=2000, help="Test images.")
    photo_size: int = HfArg(default=0, help="Enlarge the images to JPEG files of this side; 0 keeps them.")
    image_size: int = HfArg(default=32, help="Side of a student's view.")
    teacher_size: int = HfArg(default=32, help="Side of the teacher's images.")
    num_views: int = HfArg(default=8, help="Stored views of an image.")
    views_per_image: list[int] = HfArg(default_factory=lambda: [1, 2, 4], help="Views of an image in a batch.")
    steps: list[int] = HfArg(default_factory=lambda: [500, 1000, 2000], help="One schedule each.")
    seeds: list[int] = HfArg(default_factory=lambda: [0, 1, 2], help="One student each.")
    teacher_steps: int = HfArg(default=1000, help="Steps of the teacher.")
    hidden_size: int = HfArg(default=64, help="Width of the students.")
    batch_size: int = HfArg(default=64, help="Views in a batch.")
    learning_rate: float = HfArg(default=2e-3, help="Peak learning rate of the students.")


def enlarge(rows: Dataset, side: int, folder: Path) -> Dataset:
    """The rows with their images as JPEG files of another size, mapped from disk."""
    cells = []
    for image in rows["image"]:
        file = io.BytesIO()
        image.convert("RGB").resize((side, side), Resampling.BICUBIC).save(file, "JPEG", quality=90)
        cells.append({"bytes": file.getvalue(), "path": None})
    larger = Dataset.from_dict({"image": cells, "label": rows["label"]}).cast_column("image", Image())
    larger.cast_column("label", rows.features["label"]).save_to_disk(folder)
    return load_from_disk(folder)


def make_arguments(kind: type, bench: ViewsAccuracyArguments, work: Path, **settings):
    return kind(
        str(work), per_device_train_batch_size=bench.batch_size, eval_strategy="no", logging_strategy="no",
        report_to="none", disable_tqdm=True, **settings,
    )  # fmt: skip


def train_teacher(rows: Dataset, bench: ViewsAccuracyArguments, work: Path):
    """A convolution teacher and its image processor."""
    set_seed(0)
    model = IBResNetForImageClassification(IBResNetConfig.from_preset("convolution-small", **class_config(rows)))
    processor = ViTImageProcessor(size={"height": bench.teacher_size, "width": bench.teacher_size})
    args = make_arguments(ImageTrainingArguments, bench, work, max_steps=bench.teacher_steps, learning_rate=1e-2)
    # A view for every epoch, of another seed than the recorded ones.
    views = recipe(bench, num_views=-(-bench.teacher_steps * bench.batch_size // len(rows)), seed=1)
    ImageClassificationTrainer(model, args, rows, processing_class=processor, views=views).train()
    return model, processor


def recipe(bench: ViewsAccuracyArguments, **settings) -> ViewRecipe:
    return ViewRecipe(crop="resized", scale=(0.5, 1.0), horizontal_flip=0.5, **settings)


def run_student(table, test, steps, views_per_image, seed, bench, work) -> dict:
    set_seed(seed)
    processor = build_image_processor(table, image_size=bench.image_size)
    config = IBViTConfig(
        teacher_names=(TEACHER,), image_size=bench.image_size, patch_size=bench.image_size // 8,
        hidden_size=bench.hidden_size, num_hidden_layers=2, num_attention_heads=2, intermediate_size=2 * bench.hidden_size,
        patch_embedding="linear", **class_config(table),
    )  # fmt: skip
    args = make_arguments(
        DistillationArguments, bench, work, max_steps=steps, views_per_image=views_per_image, seed=seed,
        learning_rate=bench.learning_rate,
    )  # fmt: skip
    student = IBViTForImageClassification(config)
    trainer = EnsembleDistillationTrainer(student, args, train_dataset=table, processing_class=processor)
    trainer.remove_callback(PrinterCallback)
    seconds = processor_seconds()
    trainer.train()
    seconds = processor_seconds() - seconds
    accuracy = evaluate_model(student, processor, test)["accuracy"]
    return {"views_per_image": views_per_image, "steps": steps, "seed": seed, "seconds": seconds, "accuracy": accuracy}


def group(runs: list[dict]) -> dict[int, dict[int, tuple[float, list[float]]]]:
    """Views of an image → steps → mean seconds, and the accuracy of each seed."""
    found = defaultdict(lambda: defaultdict(list))
    for run in runs:
        found[run["views_per_image"]][run["steps"]].append((run["seconds"], run["accuracy"]))
    return {
        views: {steps: (float(np.mean([s for s, _ in of])), [a for _, a in of]) for steps, of in sorted(by_steps.items())}
        for views, by_steps in sorted(found.items())
    }  # fmt: skip


def draw(runs: list[dict], path: str) -> None:
    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for (views, by_steps), marker in zip(group(runs).items(), "os^Dv<"):
        seconds, accuracies = zip(*by_steps.values())
        accuracies = [100 * np.array(values) for values in accuracies]
        spreads = [values.std(ddof=1) if len(values) > 1 else 0 for values in accuracies]
        label = f"{views} view{'s' if views > 1 else ''} of an image in a batch"
        axes.errorbar(
            seconds, [values.mean() for values in accuracies], spreads, label=label, marker=marker, capsize=3
        )
    axes.set(xscale="log", xlabel="processor seconds of training", ylabel="test accuracy (%)")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_minor_formatter("{x:,.0f}")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def report(runs: list[dict]) -> str:
    grouped = group(runs)
    first, rows = grouped[min(grouped)], []
    for views, by_steps in grouped.items():
        for steps, (seconds, accuracies) in by_steps.items():
            speed = f"{first[steps][0] / seconds:.2f}"
            rows.append([views, steps, f"{seconds:.1f}", speed, mean_and_spread(accuracies)])
    header = [
        "views of an image",
        "steps",
        "processor seconds",
        f"speed, × that of {min(grouped)}",
        "test accuracy (%)",
    ]
    return markdown_table(header, rows)


def main():
    bench = parse(ViewsAccuracyArguments, __doc__)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        splits = load_image_dataset(bench.dataset)
        train = select_per_class(splits["train"], bench.images_per_class)
        test = splits["test"].select(range(min(bench.num_test, len(splits["test"]))))
        teacher = train_teacher(train, bench, work / "teacher")
        if bench.photo_size:
            train, test = (
                enlarge(rows, bench.photo_size, work / name) for name, rows in (("train", train), ("test", test))
            )
        views = recipe(bench, num_views=bench.num_views, image_size=bench.image_size)
        table = record_teacher_logits(train, {TEACHER: teacher}, output_dir=work / "table", views=views)
        metrics = evaluate_model(*teacher, test)
        runs = []
        # In another order each time, so that a drift of the machine's speed reaches every case.
        for seed in bench.seeds:
            cases = [(steps, views) for steps in bench.steps for views in bench.views_per_image]
            for index in np.random.default_rng(seed).permutation(len(cases)):
                runs.append(run_student(table, test, *cases[index], seed, bench, work / "student"))
                print(runs[-1], flush=True)
    write_results(bench, teacher=metrics, runs=runs)
    if bench.picture is not None:
        draw(runs, bench.picture)
    print(f"The teacher is right on {100 * metrics['accuracy']:.1f} % of the test images.\n\n{report(runs)}")


if __name__ == "__main__":
    main()
