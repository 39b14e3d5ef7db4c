"""What an earlier version costs against today's, measured in one run.

    git worktree add outputs/version_0_1_0 7136c32
    OMP_NUM_THREADS=1 python benchmarks/versions.py --old outputs/version_0_1_0

Each step is a process of its own, under either checkout in turn, with the same installed libraries and files. Today's
version writes the files, which the earlier one reads as well. A process runs its step twice: the first run fills caches
and shows the growth of memory, the second is timed by processor seconds. Results that `datasets` keeps of the first run are
not used in the second.

    open_table, open_folders   `load_image_dataset` on a `save_to_disk` folder of digits, on class folders of PNG files
    start                      `EnsembleDistillationTrainer` on a recorded table, opening included
    read_batch, read_rows      its first batch; its first 64 batches
    evaluate                   `evaluate_model`
    compute_metrics            `classification_metrics` of logits of many classes
    record_digits              `record_teacher_logits` of digits in eight views, with two untrained teachers
    record_rows, record_photos the same with a smaller teacher, without views, of many digits and of large photos
    record_large               the same of digits as images of 224 pixels, with an untrained MobileNetV2
    attach_digits              `attach_teacher_logits` of that table's size to 1,000 digits
    attach_photos              the same to large photos, by the keys of their files
    attach_photos_by_pixels    the same, from a table that has keys of pixels alone
    publish                    `export_logits_table` without the images, of a teacher of 1,000 classes that has learned
                               little in 200 steps
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
from datasets import load_from_disk
from process_memory import peak_bytes
from transformers import MobileNetV2Config, MobileNetV2ForImageClassification, ViTImageProcessor, set_seed
from transformers.hf_argparser import HfArg

# Nothing else of today's at the top, because the earlier version lacks the names.
import hf_ibdistill as package
from hf_ibdistill.evaluation import classification_metrics


NEW = Path(__file__).resolve().parents[1]
BATCHES = 64
# A teacher that costs little beside what recording does.
SMALL = {"depths": (1, 1, 1), "hidden_sizes": (16, 16, 16)}


@dataclass
class VersionsArguments:
    old: str = HfArg(default="outputs/version_0_1_0", help="A checkout of the earlier version.")
    output_file: str = HfArg(default="outputs/benchmark_versions.json", help="Where the results go.")
    steps: list[str] | None = HfArg(default=None, help="Names of the steps to measure; by default all.")
    num_rows: int = HfArg(default=100_000, help="Rows of the tables of digits.")
    num_views: int = HfArg(default=10, help="Views of an image of these tables and of the published one.")
    num_files: int = HfArg(default=5000, help="PNG files of the class folders.")
    num_predictions: int = HfArg(default=20_000, help="Rows of the logits whose metrics are computed.")
    num_classes: int = HfArg(default=1000, help="Classes of these logits.")
    num_recorded: int = HfArg(default=600, help="Digits to record in views.")
    num_recorded_rows: int = HfArg(default=20_000, help="Digits to record as they are, and to evaluate on.")
    num_attached: int = HfArg(default=1000, help="Digits that get logits.")
    num_recorded_large: int = HfArg(default=256, help="Digits to record as images of 224 pixels.")
    num_photos: int = HfArg(default=64, help="Photos to record, or that get logits.")
    megapixels: float = HfArg(default=12.0, help="Size of a photo.")
    num_published: int = HfArg(default=500, help="Images of the published table.")
    teacher_steps: int = HfArg(default=200, help="Training steps of the published table's teacher.")
    teacher_images: int = HfArg(default=6400, help="Different images to train it on.")
    teacher_batch_size: int = HfArg(default=64, help="Images of such a step.")
    repetitions: int = HfArg(default=3, help="How often each process runs.")


def prepare(bench: VersionsArguments, folder: Path) -> None:
    """Write what the steps read."""
    from memory import MemoryArguments, make_photos, record
    from scale import ScaleArguments, make_table
    from storage import StorageArguments, side_by_side, train_teacher

    digits = package.load_image_dataset("digits")["train"]
    digits.select(np.arange(bench.num_rows) % len(digits)).save_to_disk(folder / "open")
    digits.select(range(min(bench.num_recorded, len(digits)))).save_to_disk(folder / "recorded")
    digits.select(np.arange(bench.num_recorded_rows) % len(digits)).save_to_disk(folder / "rows")
    digits.select(range(min(bench.num_attached, len(digits)))).save_to_disk(folder / "attached")
    make_table(digits, bench.num_rows, bench.num_views, ScaleArguments(), folder / "table")
    for number in range(bench.num_files):
        row = digits[number % len(digits)]
        path = folder / "folders" / str(row["label"]) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        row["image"].save(path)
    photos = MemoryArguments(num_photos=bench.num_photos)
    make_photos(photos, bench.megapixels, folder / "photos")
    record(photos, folder / "photos")

    storage = StorageArguments(
        teacher_steps=bench.teacher_steps, teacher_images=bench.teacher_images, batch_size=bench.teacher_batch_size
    )
    splits = package.load_image_dataset("digits")
    processor = ViTImageProcessor(size={"height": 8, "width": 24})
    images = side_by_side(splits["train"], storage.teacher_images, 0)
    teachers = {"conv": (train_teacher(images, processor, storage, folder / "teacher"), processor)}
    images = side_by_side(splits["validation"], bench.num_published, 1)
    views = package.ViewRecipe(num_views=bench.num_views)
    package.record_teacher_logits(images, teachers, output_dir=folder / "publish", views=views, top_k=10)


def measure(run: Callable[[], object], units: int = 1) -> dict[str, float]:
    before = peak_bytes()
    run()
    growth, begin = peak_bytes() - before, time.process_time()
    run()
    seconds = time.process_time() - begin
    return {"s": seconds, "µs each": 1e6 * seconds / units, "MB more": growth / 1e6}


def open_table(bench, folder, work):
    return measure(lambda: package.load_image_dataset(folder / "open"))


def open_folders(bench, folder, work):
    return measure(lambda: package.load_image_dataset(folder / "folders"), bench.num_files)


def make_trainer(folder, work):
    shape = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    table = load_from_disk(folder / "table")
    config = package.IBViTConfig(teacher_names=("conv",), intermediate_size=16, **shape, **package.class_config(table))
    # Processor seconds of one process vary less.
    how = {"max_steps": BATCHES, "eval_strategy": "no", "report_to": [], "dataloader_num_workers": 0}
    arguments = package.DistillationArguments(str(work), **how)
    model, processor = package.IBViTForImageClassification(config), package.build_image_processor(table)
    return package.EnsembleDistillationTrainer(model, arguments, train_dataset=table, processing_class=processor)


def start(bench, folder, work):
    return measure(lambda: make_trainer(folder, work))


def read_batch(bench, folder, work):
    trainers = [make_trainer(folder, work) for _ in range(2)]
    return measure(lambda: next(iter(trainers.pop().get_train_dataloader())))


def read_rows(bench, folder, work):
    trainers = [make_trainer(folder, work) for _ in range(2)]
    return measure(lambda: deque(islice(trainers.pop().get_train_dataloader(), BATCHES), maxlen=0), BATCHES * 64)


def evaluate(bench, folder, work):
    images, model = load_from_disk(folder / "rows"), make_trainer(folder, work).model
    processor = package.build_image_processor(images)
    return measure(lambda: package.evaluate_model(model, processor, images), len(images))


def compute_metrics(bench, folder, work):
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((bench.num_predictions, bench.num_classes), dtype=np.float32)
    labels = rng.integers(bench.num_classes, size=bench.num_predictions)
    return measure(lambda: classification_metrics(logits, labels))


def record(images, work, presets, views=None, **shape):
    processor, teachers = package.build_image_processor(images, image_size=8), {}
    for seed, preset in enumerate(presets):
        set_seed(seed)
        config = package.IBResNetConfig.from_preset(preset, **shape, **package.class_config(images))
        teachers[f"teacher_{seed}"] = (package.IBResNetForImageClassification(config), processor)
    return record_with(images, teachers, work, views)


def record_with(images, teachers, work, views=None):
    def run():
        folder = tempfile.mkdtemp(dir=work)
        package.record_teacher_logits(images, teachers, output_dir=folder, views=views, num_workers=0)

    return measure(run, len(images))


def record_digits(bench, folder, work):
    views = package.ViewRecipe(num_views=8)
    return record(load_from_disk(folder / "recorded"), work, ["convolution-small"] * 2, views)


def record_rows(bench, folder, work):
    return record(load_from_disk(folder / "rows"), work, ["convolution-small"], **SMALL)


def record_large(bench, folder, work):
    images = load_from_disk(folder / "rows").select(range(bench.num_recorded_large))
    set_seed(0)
    model = MobileNetV2ForImageClassification(MobileNetV2Config(**package.class_config(images)))
    return record_with(images, {"large": (model, package.build_image_processor(images, image_size=224))}, work)


def record_photos(bench, folder, work):
    return record(load_from_disk(folder / "photos" / "images"), work, ["convolution-small"], **SMALL)


def attach(images, table):
    return measure(lambda: package.attach_teacher_logits(images, table), len(images))


def attach_digits(bench, folder, work):
    return attach(load_from_disk(folder / "attached"), load_from_disk(folder / "table"))


def attach_photos(bench, folder, work):
    images, table = (load_from_disk(folder / "photos" / name) for name in ("images", "table"))
    return attach(images, table.remove_columns("image"))


def attach_photos_by_pixels(bench, folder, work):
    images, table = (load_from_disk(folder / "photos" / name) for name in ("images", "table"))
    return attach(images, table.select_columns(["row_key", "conv_logits"]))


def publish(bench, folder, work):
    table = load_from_disk(folder / "publish").remove_columns(["image", "label"])
    exported = package.export_logits_table(table, work / "published")
    size = sum(file.stat().st_size for file in exported.glob("data/*.parquet"))
    return {"bytes a view": size / (len(table) * bench.num_views)}


# What the printed rows are called, their step, and the measures of it that they show.
ROWS = [
    ("open a saved table of {num_rows:,} digits", open_table, ["s"]),
    ("open {num_files:,} PNG files in class folders", open_folders, ["µs each"]),
    ("start a trainer on {num_rows:,} rows × {num_views} views", start, ["s"]),
    ("read the first batch of it", read_batch, ["s"]),
    ("read rows of it in random order", read_rows, ["µs each"]),
    ("evaluate a student on {num_recorded_rows:,} digits", evaluate, ["µs each", "MB more"]),
    ("metrics of {num_predictions:,} × {num_classes:,} logits", compute_metrics, ["s", "MB more"]),
    ("record {num_recorded:,} digits × 8 views, two teachers", record_digits, ["s"]),
    ("record {num_recorded_rows:,} digits, a small teacher", record_rows, ["µs each"]),
    ("record {num_recorded_large} images of 224 pixels, MobileNetV2", record_large, ["s"]),
    ("record {num_photos:,} photos of {megapixels:g} megapixels", record_photos, ["s", "MB more"]),
    ("attach {num_rows:,} rows to {num_attached:,} digits", attach_digits, ["µs each"]),
    ("attach to {num_photos:,} photos of {megapixels:g} megapixels", attach_photos, ["s", "MB more"]),
    ("attach to these photos by their pixels", attach_photos_by_pixels, ["s", "MB more"]),
    ("publish the ten largest of 1,000 logits", publish, ["bytes a view"]),
]
STEPS = {step.__name__: step for _, step, _ in ROWS}


def run_step(name: str, arguments: str, folder: str, checkout: str) -> None:
    """Print the measures of a step; what a process of its own does."""
    found = Path(package.__file__).resolve().parents[1]
    if found != Path(checkout):
        raise ImportError(f"hf_ibdistill is that of {found}, not of {checkout}.")
    with tempfile.TemporaryDirectory() as work:
        datasets.disable_caching()
        measured = STEPS[name](VersionsArguments(**json.loads(arguments)), Path(folder), Path(work))
    print(json.dumps(measured))


def run_under(checkout: Path, name: str, bench: VersionsArguments, folder: Path) -> dict[str, float]:
    path = os.pathsep.join(map(str, (checkout, NEW / "benchmarks")))
    code = "import sys, versions; versions.run_step(*sys.argv[1:])"
    command = [sys.executable, "-c", code, name, json.dumps(asdict(bench)), str(folder), str(checkout)]
    # Python looks for modules in the current folder first, which may hold the other checkout.
    how = {"cwd": folder, "env": {**os.environ, "PYTHONPATH": path}}
    done = subprocess.run(command, **how, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} failed under {checkout}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def commit_of(checkout: Path) -> str:
    done = subprocess.run(["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def main():
    from timing import parse, quartiles, spread, write_results

    from hf_ibdistill.publishing.cards import markdown_table

    bench = parse(VersionsArguments, __doc__)
    sides = {"old": Path(bench.old).resolve(), "new": NEW}
    unknown = sorted(set(bench.steps or ()) - set(STEPS))
    if unknown:
        raise ValueError(f"steps={unknown} are unknown. Choose from {', '.join(STEPS)}.")
    measured = {name: {side: [] for side in sides} for name in bench.steps or STEPS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(bench, folder)
        for repetition in range(bench.repetitions):
            for step, of_step in measured.items():
                # The other side first each time, because the machine's speed drifts.
                for side in sorted(sides, reverse=repetition % 2 == 0):
                    of_step[side].append(run_under(sides[side], step, bench, folder))
    cells, figures = [], []
    for what, step, units in ROWS:
        if step.__name__ not in measured:
            continue
        for unit in units:
            old, new = (np.array([run[unit] for run in measured[step.__name__][side]]) for side in sides)
            # Memory may not grow at all.
            ratio = quartiles(new / old) if old.all() else None
            title, digits = what.format(**asdict(bench)), 0 if np.median(old) >= 100 else 2
            shown = [spread(quartiles(values), digits) for values in (old, new)]
            cells.append([title, unit, *shown, spread(ratio, 2) if ratio else "–"])
            figures.append({"what": title, "unit": unit, "old": old.tolist(), "new": new.tolist(), "ratio": ratio})
    print(markdown_table(["", "", "old", "new", "new / old"], cells))
    write_results(bench, commits={side: commit_of(path) for side, path in sides.items()}, figures=figures)


if __name__ == "__main__":
    main()
