"""A recording of the size of ImageNet-1k, killed and continued, and training on its table: time, memory and disk.

    python benchmarks/rehearsal.py --rows 20000
    python benchmarks/rehearsal.py --folder /large/disk

A generator makes JPEG files of 32 pixels, which differ in every row, so that no dataset of this size is needed. Two small
untrained teachers run over ten views of each; the ten largest logits are kept. The recording is a process of its own, which is
killed (SIGKILL) at random points and started again. Further processes check the table and train on it:

    record    from the start of the process to its end, once for each kill and once to the end
    check     every label, and the keys of 1,000 images, against what the generator makes again
    train     opens the table, makes a trainer, and takes its steps

Linux only, because the memory of the processes is read from /proc.
"""

import io
import json
import multiprocessing
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Features, Image, IterableDataset, load_from_disk
from PIL.Image import Resampling, fromarray
from timing import KINDS, check, check_table, parse, write_results
from transformers import ViTImageProcessor
from transformers.hf_argparser import HfArg

from hf_ibdistill import (
    DistillationArguments,
    EnsembleDistillationTrainer,
    IBResNetConfig,
    IBResNetForImageClassification,
    IBViTConfig,
    IBViTForImageClassification,
    ViewRecipe,
    class_config,
    record_teacher_logits,
)
from hf_ibdistill.data.classes import label_ids
from hf_ibdistill.data.columns import in_arrow
from hf_ibdistill.files import write_text
from hf_ibdistill.images.decoding import file_key
from hf_ibdistill.logits.encoding import FILE_KEY, column_name
from hf_ibdistill.publishing.cards import markdown_table


SIZE, TEMPLATES, NOISE = 32, 64, 1 << 20
# What the teachers see of an image, so that they cost no more than the rest.
TEACHER_SIZE = 16
TEACHERS = {"conv": "convolution-small", "inv": "involution-small"}
# Rows that the stream makes in one go. Continuing makes the rows of one part again.
PART = 1000
COMPARED = 1000


@dataclass
class RehearsalArguments:
    output_file: str = HfArg(default="outputs/benchmark_rehearsal.json", help="Where the results go.")
    folder: str | None = HfArg(
        default=None, help="Where the table is made and removed; by default the folder for temporary files."
    )
    rows: int = HfArg(default=1_280_000, help="Images.")
    num_classes: int = HfArg(default=1000, help="Classes.")
    num_views: int = HfArg(default=10, help="Views of an image.")
    top_k: int = HfArg(default=10, help="Logits that are stored of a view.")
    batch_size: int = HfArg(default=320, help="Views in a forward pass of the teachers.")
    shard_size: int | None = HfArg(default=None, help="Rows in a shard; by default as recording chooses.")
    num_workers: int | None = HfArg(default=None, help="Threads that make views; by default as recording chooses.")
    kills: int = HfArg(default=3, help="How often the recording is killed.")
    steps: int = HfArg(default=200, help="Steps of training.")
    train_batch_size: int = HfArg(default=256, help="Images in a step.")
    seed: int = HfArg(default=0, help="Seed of images, teachers and kills.")


def image_maker(bench: RehearsalArguments):
    """A function: row → (encoded image, label)."""
    rng = np.random.default_rng(bench.seed)
    small = [fromarray(rng.integers(40, 216, (4, 4, 3), np.uint8)) for _ in range(TEMPLATES)]
    templates = [np.array(image.resize((SIZE, SIZE), Resampling.BICUBIC), np.int16) for image in small]
    noise = rng.integers(-20, 21, NOISE + SIZE * SIZE * 3, np.int16)

    def make(row: int) -> tuple[bytes, int]:
        label, *starts = np.random.default_rng((bench.seed, row)).integers((bench.num_classes, NOISE, NOISE))
        first, second = (noise[start : start + SIZE * SIZE * 3].reshape(SIZE, SIZE, 3) for start in starts)
        pixels = (templates[label % TEMPLATES] + first + second).clip(0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        fromarray(pixels).save(buffer, "JPEG", quality=90)
        return buffer.getvalue(), int(label)

    return make


def make_rows(bench: RehearsalArguments, parts: list[tuple[int, int]]):
    make = image_maker(bench)
    for first, end in parts:
        for row in range(first, end):
            content, label = make(row)
            yield {"image": {"bytes": content, "path": None}, "label": label}


def class_names(bench: RehearsalArguments) -> list[str]:
    return [f"class {number}" for number in range(bench.num_classes)]


def make_teachers(bench: RehearsalArguments, folder: Path) -> None:
    for name, preset in TEACHERS.items():
        names = dict(enumerate(class_names(bench)))
        shape = {"stem": "imagenet", "embedding_size": 32}
        shape |= {"depths": (1, 1), "hidden_sizes": (16, 32), "downsample_strides": (1, 2)}
        config = IBResNetConfig.from_preset(preset, **shape, num_labels=len(names), id2label=names)
        IBResNetForImageClassification(config).save_pretrained(folder / name)
        ViTImageProcessor(size={"height": TEACHER_SIZE, "width": TEACHER_SIZE}).save_pretrained(folder / name)


def record(bench: RehearsalArguments, folder: Path) -> dict:
    features = Features({"image": Image(), "label": ClassLabel(names=class_names(bench))})
    parts = [(first, min(first + PART, bench.rows)) for first in range(0, bench.rows, PART)]
    stream = IterableDataset.from_generator(make_rows, features=features, gen_kwargs={"bench": bench, "parts": parts})
    record_teacher_logits(
        stream,
        {name: folder / name for name in TEACHERS},
        output_dir=folder / "table",
        views=ViewRecipe(num_views=bench.num_views, horizontal_flip=0.5),
        top_k=bench.top_k,
        batch_size=bench.batch_size,
        shard_size=bench.shard_size,
        num_workers=bench.num_workers,
    )
    return {}


def check_rows(bench: RehearsalArguments, folder: Path) -> dict:
    """How many rows are missing, or are not what the generator makes."""
    table, make = load_from_disk(folder / "table"), image_maker(bench)
    size = np.array((bench.num_classes, NOISE, NOISE))
    expected = [np.random.default_rng((bench.seed, row)).integers(size)[0] for row in range(bench.rows)]
    wrong = abs(len(table) - bench.rows) + int((label_ids(table)[: bench.rows] != expected[: len(table)]).sum())
    rows = np.random.default_rng(bench.seed).choice(len(table), min(COMPARED, len(table)), replace=False).tolist()
    keys = in_arrow(table, [FILE_KEY])[rows][FILE_KEY].to_pylist()
    differing = sum(key != file_key({"bytes": make(row)[0], "path": None}) for row, key in zip(rows, keys))
    return {"wrong_labels": wrong, "wrong_images": differing, "files": len(table.cache_files)}


def train(bench: RehearsalArguments, folder: Path) -> dict:
    seconds, start = {}, time.perf_counter()

    def lap(name):
        seconds[name] = time.perf_counter() - start - sum(seconds.values())

    table = load_from_disk(folder / "table")
    lap("open")
    config = IBViTConfig(
        teacher_names=tuple(TEACHERS), image_size=SIZE, patch_size=8, hidden_size=64, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=128, **class_config(table),
    )  # fmt: skip
    arguments = DistillationArguments(
        str(folder / "student"), max_steps=bench.steps, per_device_train_batch_size=bench.train_batch_size,
        eval_strategy="no", save_strategy="no", logging_strategy="steps", logging_steps=max(1, bench.steps // 10),
        report_to=[], disable_tqdm=True,
    )  # fmt: skip
    student, processor = IBViTForImageClassification(config), ViTImageProcessor(size={"height": SIZE, "width": SIZE})
    trainer = EnsembleDistillationTrainer(student, arguments, train_dataset=table, processing_class=processor)
    lap("start")
    trainer.train()
    lap("steps")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"seconds": seconds, "first_loss": losses[0], "last_loss": losses[-1]}


def run_stage(stage, bench: RehearsalArguments, folder: Path) -> None:
    write_text(folder / f"{stage.__name__}.json", json.dumps(stage(bench, folder)))


def rows_on_disk(folder: Path) -> int:
    """The row at which the last whole shard begins."""
    return max((int(path.stem.removeprefix("data-")) for path in (folder / "table").glob("data-*.arrow")), default=0)


def watch(stage, bench: RehearsalArguments, folder: Path, kill_at: int | None = None, delay: float = 0) -> dict:
    """Run a stage in a process of its own.

    Args:
        kill_at: kill the process once it has written a shard that begins at this row or behind it.
        delay: how much later, as a share of the time that a shard has taken.

    Returns:
        Seconds, peak memory, whether it was killed, and what the stage found.
    """
    process = multiprocessing.get_context("spawn").Process(target=run_stage, args=(stage, bench, folder))
    first, start, peaks = rows_on_disk(folder), time.perf_counter(), {}
    last_shard, shard_seconds, kill_time = start, 0.0, None
    process.start()
    status, rows = Path(f"/proc/{process.pid}/status"), first
    while process.is_alive():
        now = time.perf_counter()
        if kill_time is not None and now >= kill_time:
            process.kill()
            break
        for line in status.read_text().splitlines():
            name, _, value = line.partition(":")
            if name in KINDS:
                peaks[KINDS[name]] = max(peaks.get(KINDS[name], 0), int(value.split()[0]) * 1024)
        if kill_at is not None and kill_time is None and (found := rows_on_disk(folder)) > rows:
            rows, last_shard, shard_seconds = found, now, now - last_shard
            if rows >= kill_at and rows > first:
                kill_time = now + delay * shard_seconds
        time.sleep(0.02)
    process.join()
    result = folder / f"{stage.__name__}.json"
    if process.exitcode != 0 and kill_time is None:
        raise SystemExit(f"{stage.__name__} failed with exit code {process.exitcode}.")
    measured = {"stage": stage.__name__, "seconds": time.perf_counter() - start, "peak_bytes": peaks}
    measured |= {"killed": process.exitcode != 0, "rows_before": first, "rows_after": rows_on_disk(folder)}
    return measured | {"found": json.loads(result.read_text()) if process.exitcode == 0 else {}}


def megabytes(measured: dict, kind: str) -> str:
    size = measured["peak_bytes"].get(kind)
    return "–" if size is None else f"{size / 1e6:,.0f}"


def main():
    bench = parse(RehearsalArguments, __doc__)
    rng = np.random.default_rng(bench.seed)
    with tempfile.TemporaryDirectory(dir=bench.folder) as work:
        folder = Path(work)
        make_teachers(bench, folder)
        places = np.sort(rng.uniform(0.05, 0.75, bench.kills)) * bench.rows
        stages = [watch(record, bench, folder, int(place), rng.uniform()) for place in places]
        stages.append(watch(record, bench, folder))
        stages += [watch(stage, bench, folder) for stage in (check_rows, train)]
        table = load_from_disk(folder / "table")
        files = sum(path.stat().st_size for path in (folder / "table").iterdir())
        columns = in_arrow(table, [column_name(name) for name in TEACHERS]).data.nbytes
    kills = [measured for measured in stages if measured["killed"]]
    found = {measured["stage"]: measured["found"] for measured in stages if not measured["killed"]}
    recording = sum(measured["seconds"] for measured in stages if measured["stage"] == "record")
    rows = [
        [
            measured["stage"] + (", killed" if measured["killed"] else ""),
            f"{measured['rows_before']:,}",
            f"{measured['rows_after']:,}",
            f"{measured['seconds']:,.1f}",
            *(megabytes(measured, kind) for kind in ("anonymous", "resident")),
        ]
        for measured in stages
    ]
    header = ["stage", "shards from row", "to row", "seconds", "anonymous peak (MB)", "resident peak (MB)"]
    print(markdown_table(header, rows))
    print(
        f"{bench.rows / recording:,.0f} images/s over all recordings, {bench.rows * bench.num_views / recording:,.0f} views/s"
    )
    print(
        f"{files / 1e6:,.1f} MB on disk, of which logits {columns / 1e6:,.1f} MB; {found['check_rows']['files']} files"
    )
    print(", ".join(f"{name} {value:.2f} s" for name, value in found["train"]["seconds"].items()))
    found_wrong = found["check_rows"]["wrong_labels"] + found["check_rows"]["wrong_images"]
    checks = [
        check(f"killed {bench.kills} times", len(kills), len(kills) == bench.kills),
        check("rows that are not those of the generator", found_wrong, found_wrong == 0),
        check(
            "the loss falls", found["train"]["last_loss"], found["train"]["last_loss"] < found["train"]["first_loss"]
        ),
    ]
    print(check_table(checks))
    write_results(
        bench, stages=stages, checks=checks, bytes_on_disk=files, bytes_of_logits=columns, recording_seconds=recording
    )


if __name__ == "__main__":
    main()
