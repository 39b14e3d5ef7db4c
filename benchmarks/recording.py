"""The speed of recording against the bare teachers, and against recording two teachers in two passes.

    python benchmarks/recording.py
    python benchmarks/recording.py --images 256 --repetitions 9 --num_workers 1

Three parts, each with untrained teachers, because only time is measured:

    photographs  JPEG files of 224×224 pixels, crops of scikit-learn's two photographs; one, two and four teachers
    copies       the same files, more of them, and two light teachers that see them scaled down: decoding is a large part
    digits       scikit-learn's handwritten digits of 8×8 pixels; one, two and four light teachers

These are timed in each part:

    bare         the teachers' forward passes under `torch.inference_mode`, in float32, on pixel values in memory
    recorded     `record_teacher_logits`, for all teachers together, of a table on disk into an empty folder
    two passes   `record_teacher_logits` for one teacher and then for the other, each into its own folder; copies only

All teachers of a part share an image processor. Images a second are those of whole recordings. A recording's start, such
as hashing the teachers, takes as long for fifty images as for a million, and weighs too much here. So the first batch is
also recorded alone, and ratios are of the time that each image after it takes. The requirements are checked by wall time and
by processor time. On a shared machine, set OMP_NUM_THREADS=1, because threads that wait for one another count as busy.

"""

import io
import itertools
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from datasets import ClassLabel, Dataset, Features, Image, load_from_disk
from PIL.Image import Resampling, fromarray
from timing import Case, check, check_table, parse, quartiles, spread, time_in_turn, write_results
from transformers import set_seed
from transformers.hf_argparser import HfArg

from hf_ibdistill import (
    IBResNetConfig,
    IBResNetForImageClassification,
    build_image_processor,
    class_config,
    load_image_dataset,
    record_teacher_logits,
)
from hf_ibdistill.publishing.cards import markdown_table


SIDE = 224
COUNTS = (1, 2, 4)
LIMITS = {"bare": 0.9, "two passes": 1.5}


@dataclass
class RecordingArguments:
    output_file: str = HfArg(default="outputs/benchmark_recording.json", help="Where the results go.")
    teachers: list[str] = HfArg(
        default_factory=lambda: ["resnet26", "rednet26", "resnet26", "resnet26"],
        help="Presets of the teachers that see whole photographs: the first, the first two, the first four.",
    )
    light_teachers: list[str] = HfArg(
        default_factory=lambda: ["convolution-small", "involution-small", "convolution-small", "convolution-small"],
        help="Presets of the teachers that see small images.",
    )
    images: int = HfArg(default=40, help="Photographs that the teachers see whole.")
    light_images: int = HfArg(default=512, help="Photographs, and digits, that the light teachers see.")
    light_sizes: list[int] = HfArg(default_factory=lambda: [16, 32], help="Sides that photographs are scaled down to.")
    num_classes: int = HfArg(default=1000, help="Classes of the photographs.")
    batch_size: int = HfArg(default=8, help="Whole photographs in a batch.")
    light_batch_size: int = HfArg(default=64, help="Small images in a batch.")
    num_workers: int | None = HfArg(default=None, help="Processes that decode; by default what recording defaults to.")
    repetitions: int = HfArg(default=5, help="How often each case is timed.")
    seed: int = HfArg(default=0, help="Seed of the photographs, the teachers and the orders.")

    def __post_init__(self):
        if len(self.teachers) < max(COUNTS) or len(self.light_teachers) < max(COUNTS):
            raise ValueError(f"teachers and light_teachers must name at least {max(COUNTS)} presets each.")
        if self.images < 2 * self.batch_size or self.light_images < 2 * self.light_batch_size:
            raise ValueError("images and light_images must be at least two batches; the first is not measured.")


def make_photographs(count: int, num_classes: int, seed: int = 0) -> Dataset:
    """Random crops, as JPEG files; the class is the number of the photograph."""
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(seed)
    photographs = [fromarray(pixels) for pixels in load_sample_images().images]
    labels = rng.integers(len(photographs), size=count)
    files = []
    for label in labels:
        photograph = photographs[label]
        side = rng.integers(SIDE, min(photograph.size) + 1)
        left, top = rng.integers(np.array(photograph.size) - side + 1)
        crop = photograph.resize((SIDE, SIDE), Resampling.BICUBIC, box=(left, top, left + side, top + side))
        file = io.BytesIO()
        crop.save(file, "JPEG", quality=90)
        files.append({"bytes": file.getvalue(), "path": None})
    features = Features({"image": Image(), "label": ClassLabel(names=[str(i) for i in range(num_classes)])})
    return Dataset.from_dict({"image": files, "label": labels}, features)


def make_teacher(preset: str, classes: dict, batches: list[torch.Tensor], seed: int) -> IBResNetForImageClassification:
    """Untrained weights, with batch norm statistics of these images. Without the statistics, the logits of an involution
    network may be infinite, because it multiplies its input by kernels made from the input."""
    set_seed(seed)
    model = IBResNetForImageClassification(IBResNetConfig.from_preset(preset, **classes)).to(batches[0].device)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        for batch in batches:
            model.train()(pixel_values=batch)
    return model.eval()


def make_cases(
    table: Dataset,
    presets: list[str],
    size: int,
    batch_size: int,
    workers: dict,
    folders: Iterator[Path],
    seed: int,
    two_passes: bool = False,
) -> dict[tuple[str, int], Case]:
    """The cases of a table, by name and number of teachers. Each recording takes its own of `folders`."""
    # The device that a recording moves its teachers to.
    device, processor = Accelerator().device, build_image_processor(table, image_size=size)
    batches = [
        processor([image.convert("RGB") for image in rows["image"]], return_tensors="pt")["pixel_values"].to(device)
        for rows in table.iter(batch_size=batch_size)
    ]
    models = {
        f"teacher_{number}": make_teacher(preset, class_config(table), batches, seed + number)
        for number, preset in enumerate(presets)
    }

    def forward(names):
        with torch.inference_mode():
            for batch in batches:
                for name in names:
                    models[name](pixel_values=batch).logits.cpu()

    def record(rows, *passes):
        for names in passes:
            teachers = {name: (models[name], processor) for name in names}
            record_teacher_logits(rows, teachers, output_dir=next(folders), batch_size=batch_size, **workers)

    cases = {}
    for count in [2] if two_passes else COUNTS:
        names = list(models)[:count]
        cases["bare", count] = Case("bare", lambda _, names=names: forward(names), len(table))
        passes = {"recorded": [names]} | ({"two passes": [[name] for name in names]} if two_passes else {})
        for what, lists in passes.items():
            for name, rows in {what: table, f"{what}, one batch": table.select(range(batch_size))}.items():
                cases[name, count] = Case(name, lambda _, r=rows, lists=lists: record(r, *lists), len(rows))
    return cases


def make_parts(bench: RecordingArguments, work: Path) -> dict[str, dict[tuple[str, int], Case]]:
    """The cases of each part."""
    count = max(bench.images, bench.light_images)
    make_photographs(count, bench.num_classes, bench.seed).save_to_disk(work / "photographs")
    load_image_dataset("digits", seed=bench.seed)["train"].save_to_disk(work / "digits")
    photographs, digits = load_from_disk(work / "photographs"), load_from_disk(work / "digits")
    whole, copied = photographs.select(range(bench.images)), photographs.select(range(bench.light_images))
    digits = digits.select(range(min(bench.light_images, len(digits))))
    shared = {
        "workers": {} if bench.num_workers is None else {"num_workers": bench.num_workers},
        "folders": (work / f"recording_{number}" for number in itertools.count()),
        "seed": bench.seed,
    }
    light = {"presets": bench.light_teachers, "batch_size": bench.light_batch_size, **shared}
    parts = {"photographs": make_cases(whole, bench.teachers, SIDE, bench.batch_size, **shared)}
    for size in bench.light_sizes:
        parts[f"copies of {size}²"] = make_cases(copied, size=size, two_passes=True, **light)
    parts["digits"] = make_cases(digits, size=8, **light)
    return parts


def without_start(cases: dict[tuple[str, int], Case], what: str, count: int) -> Case:
    """The time that each image after the first batch takes."""
    case, first = cases[what, count], cases.get((f"{what}, one batch", count))
    if first is None:
        return case
    times = {}
    for clock in ("wall", "cpu"):
        seconds, of_first = (np.array(getattr(timed, clock)) * timed.units for timed in (case, first))
        times[clock] = ((seconds - of_first) / (case.units - first.units)).tolist()
    return replace(case, **times)


def summarize(parts: dict[str, dict[tuple[str, int], Case]]) -> list[dict]:
    """An entry for each part and number of teachers."""
    entries = []
    for part, cases in parts.items():
        for count in sorted({count for _, count in cases}):
            named = {name: case for (name, of), case in cases.items() if of == count}
            entry = {
                "part": part,
                "teachers": count,
                "images": named["recorded"].units,
                "seconds_per_image": {name: {"wall": case.wall, "cpu": case.cpu} for name, case in named.items()},
                "images_per_second": {name: case.rate for name, case in named.items()},
            }
            recorded, whole = without_start(cases, "recorded", count), named["recorded"]
            entry["start_seconds"] = quartiles((np.array(whole.wall) - recorded.wall) * whole.units)
            for baseline in set(LIMITS) & set(named):
                entry[f"against {baseline}"] = recorded.ratios(without_start(cases, baseline, count))
            entries.append(entry)
    return entries


def check_all(entries: list[dict]) -> list[dict]:
    checks = []
    for entry in entries:
        # If decoding is a large part of the work, recording cannot keep up with teachers that decode nothing.
        baseline = "two passes" if "against two passes" in entry else "bare"
        what, limit = f"{entry['part']}, teachers: {entry['teachers']}", LIMITS[baseline]
        for clock, ratio in entry[f"against {baseline}"].items():
            requirement = f"{what}: at least {limit:g} × {baseline}, {clock}"
            checks.append(check(requirement, ratio["median"], ratio["median"] >= limit))
    return checks


def report(entries: list[dict], checks: list[dict]) -> str:
    header = ["images", "teachers", "number", *(f"{name}, images/s" for name in ("bare", "recorded", "two passes"))]
    header += ["start (s)", *(f"{clock} × {name}" for name in LIMITS for clock in ("speed", "CPU"))]
    rows = []
    for entry in entries:
        rates = entry["images_per_second"]
        cells = [entry["part"], entry["teachers"], entry["images"]]
        cells += [spread(rates[name], 0) if name in rates else "–" for name in ("bare", "recorded", "two passes")]
        cells.append(f"{entry['start_seconds']['median']:.2f}")
        for name in LIMITS:
            ratios = entry.get(f"against {name}", {})
            cells += [spread(ratios[clock], 2) if ratios else "–" for clock in ("wall", "cpu")]
        rows.append(cells)
    return f"{markdown_table(header, rows)}\n\n{check_table(checks)}\n"


def main():
    bench = parse(RecordingArguments, __doc__)
    begin = time.perf_counter()
    # All recordings are removed together at the end, so that removing is not timed.
    with tempfile.TemporaryDirectory() as folder:
        parts = make_parts(bench, Path(folder))
        for cases in parts.values():
            time_in_turn(list(cases.values()), bench.repetitions, bench.seed)
    seconds, entries = time.perf_counter() - begin, summarize(parts)
    checks = check_all(entries)
    write_results(bench, entries=entries, checks=checks, seconds=seconds)
    print(f"\n{report(entries, checks)}")


if __name__ == "__main__":
    main()
