"""What a table costs at several sizes: opening, the start of training, the first batch, an epoch, resuming, attaching.

    python benchmarks/scale.py
    python benchmarks/scale.py --rows 10000 100000 1000000 --num_views 1 10 30

The images are the bundled digits, repeated, with their keys. The logits are random numbers, those of the first rows repeated,
which the package's own writer puts into the shards of a table. So a table of any size is made without a teacher that
runs over it. Every stage is timed in turn over all sizes, by processor seconds, after one round that fills caches:

    open      `load_from_disk`, and the checks of columns and labels
    start     the trainer: provenance, checksums and numbers of a sample, rows
    batch     the first batch of a new loader
    epoch     4,096 random rows of a pass; seconds a row
    resume    the first batch after half a pass, by accelerate's `skip_first_batches`
    attach    the logits of the table to 1,000 images
    sample    files and images of a sample against checksums and keys

The exponent is the slope of log seconds against log rows: 0 does not grow, 1 grows with the table.
"""

import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
from accelerate import skip_first_batches
from datasets import Dataset, Features, Image, Value, load_from_disk
from timing import Case, parse, quartiles, spread, time_in_turn, write_results
from transformers.hf_argparser import HfArg

from hf_ibdistill import (
    DistillationArguments,
    EnsembleDistillationTrainer,
    IBViTConfig,
    IBViTForImageClassification,
    ViewRecipe,
    attach_teacher_logits,
    build_image_processor,
    class_config,
    load_image_dataset,
)
from hf_ibdistill.data.classes import check_labels
from hf_ibdistill.data.columns import as_image_table
from hf_ibdistill.images.decoding import decode_image, file_key
from hf_ibdistill.images.views import row_key
from hf_ibdistill.logits.encoding import FILE_KEY, ROW_KEY, LogitsEncoding
from hf_ibdistill.logits.provenance import build_record, check_files, check_images
from hf_ibdistill.publishing.cards import markdown_table
from hf_ibdistill.recording.shards import finish, shard_path, write_shard


EPOCH_ROWS, ATTACHED = 4096, 1000
STAGES = ("open", "start", "batch", "epoch", "resume", "attach", "sample")


@dataclass
class ScaleArguments:
    output_file: str = HfArg(default="outputs/benchmark_scale.json", help="Where the results go.")
    rows: list[int] = HfArg(default_factory=lambda: [10_000, 100_000, 1_000_000], help="Sizes of the tables.")
    num_views: list[int] = HfArg(default_factory=lambda: [1, 10], help="Views of an image; each makes other tables.")
    top_k: int | None = HfArg(default=None, help="Store the k largest logits; by default all.")
    num_classes: int = HfArg(default=10, help="Classes; the images have 10 of them.")
    repetitions: int = HfArg(default=3, help="How often each stage is timed.")


@dataclass
class ScaleCase(Case):
    stage: str = ""
    rows: int = 0
    num_views: int = 0


def make_table(digits: Dataset, rows: int, num_views: int, bench: ScaleArguments, folder: Path) -> None:
    """Write a recorded table of digits, repeated."""
    cells = digits.cast_column("image", Image(decode=False))["image"]
    keys = np.array([[row_key(decode_image(cell, None)), file_key(cell)] for cell in cells])
    images = digits.with_format("arrow")[:]
    encoding, views = LogitsEncoding(top_k=bench.top_k), ViewRecipe(num_views=num_views)
    block = np.random.default_rng(0).standard_normal((min(rows, 1000), num_views, bench.num_classes), dtype=np.float32)
    block = encoding.encode(block, views=True)
    logits = {"conv_logits": encoding.feature(bench.num_classes, num_views)}
    features = Features({**digits.features, ROW_KEY: Value("int64"), FILE_KEY: Value("int64"), **logits})
    shards, size = [], max(4096, -(-rows // 128))  # as recording divides them
    for start in range(0, rows, size):
        numbers = np.arange(start, min(start + size, rows))
        of_digit = numbers % len(cells)
        # pyarrow would take wrong rows out of a slice of logits of views; this is the whole column.
        new = {
            ROW_KEY: keys[of_digit, 0],
            FILE_KEY: keys[of_digit, 1],
            "conv_logits": block.take(numbers % len(block)),
        }
        table = pa.table({**dict(zip(images.column_names, images.take(of_digit).columns)), **new})
        shards.append(shard_path(folder, start))
        note = {"rows": [start, start + len(numbers)], "skipped": []}
        write_shard(shards[-1], features, [table.cast(features.arrow_schema)], note)
    teacher = {"name": "conv", "label_names": digits.features["label"].names, "encoding": encoding.to_dict()}
    teacher |= {"weights_sha256": "0" * 64, "source": "random"}
    record = build_record([teacher], {"num_rows": rows}, views)
    finish(folder, digits.info.copy(), digits.split, record, shards)


def open_table(folder: Path) -> Dataset:
    table = as_image_table(load_from_disk(folder))
    check_labels(table)
    return table


def make_trainer(folder: Path, work: Path) -> EnsembleDistillationTrainer:
    table = load_from_disk(folder)
    shape = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = IBViTConfig(teacher_names=("conv",), intermediate_size=16, **shape, **class_config(table))
    arguments = DistillationArguments(str(work), max_steps=1, eval_strategy="no", report_to=[])
    model, processor = IBViTForImageClassification(config), build_image_processor(table)
    return EnsembleDistillationTrainer(model, arguments, train_dataset=table, processing_class=processor)


def read_rows(trainer, rng) -> None:
    rows = trainer.train_dataset
    order = rng.permutation(len(rows))[:EPOCH_ROWS].tolist()
    for start in range(0, len(order), 64):
        trainer.data_collator(rows.__getitems__(order[start : start + 64]))


def make_cases(digits: Dataset, rows: int, num_views: int, folder: Path) -> list[ScaleCase]:
    trainer, half = make_trainer(folder, folder / "trainer"), rows // 64 // 2
    images, table = digits.select(range(min(ATTACHED, rows, len(digits)))), load_from_disk(folder)

    def sample(rng):
        check_files(table, quickly=True)
        check_images(table)

    runs = {
        "open": lambda rng: open_table(folder),
        "start": lambda rng: make_trainer(folder, folder / "trainer"),
        "batch": lambda rng: next(iter(trainer.get_train_dataloader())),
        "epoch": partial(read_rows, trainer),
        "resume": lambda rng: next(iter(skip_first_batches(trainer.get_train_dataloader(), half))),
        "attach": lambda rng: attach_teacher_logits(images, table),
        "sample": sample,
    }
    units = {"epoch": min(EPOCH_ROWS, rows)}
    title = f"{rows:,} × {num_views}"
    return [
        ScaleCase(f"{stage}, {title}", run, units.get(stage, 1), stage=stage, rows=rows, num_views=num_views)
        for stage, run in runs.items()
    ]


def exponent(cases: list[ScaleCase]) -> float:
    """The slope of log seconds against log rows; NaN for one size."""
    rows, seconds = np.array([(case.rows, np.median(case.cpu)) for case in cases]).T
    return float(np.polyfit(np.log(rows), np.log(seconds), 1)[0]) if len(set(rows)) > 1 else float("nan")


def main():
    bench = parse(ScaleArguments, __doc__)
    digits = load_image_dataset("digits")["train"]
    cases, disk = [], {}
    with tempfile.TemporaryDirectory() as work:
        for num_views in bench.num_views:
            for rows in bench.rows:
                folder = Path(work) / f"{rows}_{num_views}"
                make_table(digits, rows, num_views, bench, folder)
                disk[f"{rows} × {num_views}"] = sum(file.stat().st_size for file in folder.glob("*.arrow"))
                cases += make_cases(digits, rows, num_views, folder)
        time_in_turn(cases, bench.repetitions)
    table, exponents = [], {}
    for num_views in bench.num_views:
        for stage in STAGES:
            found = [case for case in cases if (case.stage, case.num_views) == (stage, num_views)]
            exponents[f"{stage} × {num_views}"] = exponent(found)
            scale = 1e6 if stage == "epoch" else 1e3
            row = [num_views, stage, "µs a row" if stage == "epoch" else "ms"]
            row += [spread({k: scale * v for k, v in quartiles(np.array(case.cpu)).items()}, 1) for case in found]
            table.append([*row, f"{exponents[f'{stage} × {num_views}']:.2f}"])
    header = ["views", "stage", "unit", *(f"{rows:,} rows" for rows in bench.rows), "exponent"]
    print(markdown_table(header, table))
    measured = [{"stage": c.stage, "rows": c.rows, "num_views": c.num_views, **c.measured} for c in cases]
    write_results(bench, cases=measured, exponents=exponents, bytes_on_disk=disk)


if __name__ == "__main__":
    main()
