"""The cost of logits columns to a training run that reads them, against the images alone and against torchdistill.

    python benchmarks/loading.py
    python benchmarks/loading.py --image_size 32 --rows 1000 10000
    pip install "torchdistill<1.1.5" && python benchmarks/loading.py    # with the comparison

Every figure is of a table on disk, opened by `load_from_disk`, whose rows are read in random order, in batches:

    images       `ImageRows` → torch's `DataLoader` without workers → `DistillationCollator`; without logits, and with two
                 teachers' columns, dense (float16), top-k or packed. A pass ends in the tensors that a training step gets.
    views        the same with a view of each image, and columns that hold the logits of several
    columns      the columns alone: rows → `StoredLogits` → one tensor (N, teachers, classes)
    torchdistill its `CacheableDataset`, one file a row with the logits of both teachers, as one tensor like ours. The class
                 was removed in torchdistill 1.1.5. Without it this part is left out.

The images are scikit-learn's handwritten digits, shifted so that they differ. Smaller ones are rare, so images cost less
beside their logits here than elsewhere. Only reading is timed, so the logits are random numbers, those of the first rows
repeated. Everything is read once before it is timed, and is in the page cache.

All cases of one number of rows are timed in turn, and read the same rows. The requirements are checked by processor seconds.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, Image, concatenate_datasets, load_from_disk
from PIL.Image import Resampling, fromarray
from timing import Case, check, check_table, parse, spread, time_in_turn, write_results
from transformers import ViTImageProcessor
from transformers.hf_argparser import HfArg

from hf_ibdistill import ViewRecipe, load_image_dataset
from hf_ibdistill.logits.encoding import ROW_KEY, LogitsEncoding, StoredLogits, column_name
from hf_ibdistill.publishing.cards import markdown_table
from hf_ibdistill.rows import DistillationCollator, ImageRows


TEACHERS = ("conv", "inv")
COLUMNS = [column_name(name) for name in TEACHERS]
RANDOM_ROWS = 1000
WITH_COLUMNS, AGAINST_FILES, FLAT = 0.95, 10.0, 1.1


@dataclass
class LoadingArguments:
    output_file: str = HfArg(default="outputs/benchmark_loading.json", help="Where the results go.")
    rows: list[int] = HfArg(default_factory=lambda: [1_000, 10_000, 100_000], help="Sizes of the tables.")
    classes: list[int] = HfArg(default_factory=lambda: [10, 1_000, 21_000], help="Numbers of classes.")
    top_k: int = HfArg(default=10, help="Stored logits of top-k columns; half of the classes at most.")
    num_views: int = HfArg(default=10, help="Views of each image in tables with views.")
    image_size: int = HfArg(default=8, help="Side of the images; above 8 the digits are enlarged.")
    batch_size: int = HfArg(default=64, help="Rows in a batch.")
    rows_read: int = HfArg(default=1024, help="Rows read in a repetition.")
    repetitions: int = HfArg(default=7, help="How often each case is timed.")
    max_table_megabytes: int = HfArg(default=450, help="Tables with larger columns are left out.")
    max_files: int = HfArg(default=10_000, help="Of larger tables no torchdistill files are made.")
    seed: int = HfArg(default=0, help="Seed of shifts, logits, views and orders.")


@dataclass
class LoadingCase(Case):
    classes: int | None = None
    rows: int = 0
    baseline: str | None = None


def make_images(count: int, bench: LoadingArguments) -> Dataset:
    """Digits with labels and row keys; each repetition of the digits is shifted by another number of pixels."""
    digits = load_image_dataset("digits", seed=bench.seed)["train"]
    pixels = [np.asarray(image.convert("L")) for image in digits["image"]]
    encode, images = Image(), []
    for i in range(count):
        shift, digit = divmod(i, len(digits))
        picture = fromarray(np.roll(pixels[digit], (shift // 8, shift % 8), axis=(0, 1)))
        if bench.image_size != 8:
            picture = picture.resize((bench.image_size, bench.image_size), Resampling.BICUBIC)
        images.append(encode.encode_example(picture))
    keys = np.random.default_rng(bench.seed).integers(2**63, size=count, dtype=np.uint64)
    table = {"image": images, "label": np.resize(digits["label"], count), ROW_KEY: keys}
    return Dataset.from_dict(table).cast_column("image", Image())


def make_columns(count: int, num_classes: int, encoding: LogitsEncoding, num_views: int | None, seed: int) -> Dataset:
    """Logits columns of random numbers."""
    rng, columns = np.random.default_rng(seed), {}
    shape = (min(count, RANDOM_ROWS), *([num_views] if num_views else []), num_classes)
    for name in COLUMNS:
        block = encoding.encode(rng.standard_normal(shape, dtype=np.float32), views=num_views is not None)
        columns[name] = pa.concat_arrays([block] * -(-count // len(block))).slice(0, count)
    return Dataset(pa.table(columns))


def read_images(dataset: Dataset, num_classes: int | None, views: ViewRecipe | None, size: int) -> Callable:
    names, columns = (TEACHERS, COLUMNS) if num_classes else ((), ())
    rows = ImageRows(dataset, ["label"], columns, num_classes, views)
    collator = DistillationCollator(ViTImageProcessor(size={"height": size, "width": size}), teacher_names=names)

    def read(batches):
        for batch in torch.utils.data.DataLoader(rows, batch_sampler=batches, collate_fn=collator):
            assert ("teacher_logits" in batch) == bool(num_classes)

    return read


def read_columns(dataset: Dataset, num_classes: int, view: int | None) -> Callable:
    columns = [StoredLogits(dataset, name) for name in COLUMNS]

    def read(batches):
        for batch in batches:
            torch.from_numpy(np.stack([column.read(batch, num_classes, view) for column in columns], axis=1))

    return read


def read_files(count: int, num_classes: int, folder: Path, seed: int) -> Callable | None:
    """torchdistill's cached outputs, or `None` without torchdistill."""
    try:
        import torchvision.datasets  # noqa: F401  torchdistill uses it without importing it
        from torchdistill.datasets.wrapper import CacheableDataset, default_idx2subpath
    except ImportError:
        return None

    rng = np.random.default_rng(seed)
    for index in range(count):
        path = folder / f"{default_idx2subpath(index)}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        logits = torch.from_numpy(rng.standard_normal((len(TEACHERS), num_classes), dtype=np.float32))
        # What torchdistill saves, with no intermediate outputs asked for.
        torch.save({"teacher_outputs": logits, "extracted_outputs": {}}, path)
    # Without images.
    dataset = CacheableDataset([(0, 0)] * count, str(folder), idx2subpath_func=default_idx2subpath)

    def read(batches):
        for batch in batches:
            torch.stack([dataset[index][2]["cached_data"]["teacher_outputs"] for index in batch])

    return read


def read_random_rows(read: Callable, count: int, bench: LoadingArguments, rng: np.random.Generator) -> None:
    order = np.concatenate([rng.permutation(count) for _ in range(-(-bench.rows_read // count))])
    order = order[: bench.rows_read].tolist()
    read([order[i : i + bench.batch_size] for i in range(0, len(order), bench.batch_size)])


def make_cases(images: Dataset, bench: LoadingArguments, work: Path) -> list[LoadingCase]:
    """Everything that is timed on tables of this many rows."""
    count, size = len(images), bench.image_size
    recipe = ViewRecipe(num_views=bench.num_views, seed=bench.seed)

    def case(name, classes, read, baseline):
        run = partial(read_random_rows, read, count, bench)
        return LoadingCase(name, run, bench.rows_read, classes=classes, rows=count, baseline=baseline)

    images.save_to_disk(work / f"{count}")
    plain = load_from_disk(work / f"{count}")
    cases = [
        case("images", None, read_images(plain, None, None, size), None),
        case("views", None, read_images(plain, None, recipe, size), None),
    ]
    for classes in bench.classes:
        top_k, values = min(bench.top_k, classes // 2), len(TEACHERS) * count
        fits = count <= bench.max_files and 4e-6 * classes * values <= bench.max_table_megabytes
        files = read_files(count, classes, work / f"{count}_{classes}_files", bench.seed) if fits else None
        if files is not None:
            cases.append(case("torchdistill", classes, files, None))
        encodings = {"dense": (LogitsEncoding(), classes), "top-k": (LogitsEncoding(top_k=top_k), 2 * top_k)}
        if classes > 100:
            encodings["packed"] = (LogitsEncoding("packed"), top_k)
        for kind, views in {"images": None, "views": recipe}.items():
            for name, (encoding, width) in encodings.items():
                num_views, title = (None, "columns") if views is None else (views.num_views, "columns of views")
                if 2e-6 * width * values * (num_views or 1) > bench.max_table_megabytes:
                    continue
                columns = make_columns(count, classes, encoding, num_views, bench.seed)
                folder = work / f"{count}_{classes}_{kind}_{name}"
                concatenate_datasets([images, columns], axis=1).save_to_disk(folder)
                table = load_from_disk(folder)
                read = read_columns(table, classes, None if views is None else 0)
                cases += [
                    case(f"{kind}, {name}", classes, read_images(table, classes, views, size), kind),
                    case(f"{title}, {name}", classes, read, "torchdistill" if files else None),
                ]
    return cases


def summarize(cases: list[LoadingCase]) -> list[dict]:
    found = {(case.name, case.classes, case.rows): case for case in cases}
    entries = []
    for case in cases:
        entry = {"case": case.name, "classes": case.classes, "rows": case.rows, "baseline": case.baseline}
        entry |= case.measured
        if case.baseline is not None:
            classes = case.classes if case.baseline == "torchdistill" else None
            baseline = found[case.baseline, classes, case.rows]
            ratios = case.ratios(baseline)
            entry |= {"ratio": ratios["wall"], "cpu_ratio": ratios["cpu"]}
        entries.append(entry)
    return entries


def check_all(entries: list[dict]) -> list[dict]:
    """The requirements, by processor time; of the tables of a case, the one that is furthest from it."""
    ratios, costs = {}, {}
    for entry in entries:
        case = (entry["case"], entry["classes"])
        if entry["baseline"] is not None:
            ratios.setdefault((*case, entry["baseline"]), []).append(entry["cpu_ratio"]["median"])
        if entry["case"] != "torchdistill":
            costs.setdefault(case, {})[entry["rows"]] = float(np.median(entry["cpu_seconds_per_unit"]))
    checks = []
    for (name, classes, baseline), measured in ratios.items():
        limit = AGAINST_FILES if baseline == "torchdistill" else WITH_COLUMNS
        what = f"{name}, {classes:,} classes: at least {limit:g} × {baseline}"
        checks.append(check(what, min(measured), min(measured) >= limit))
    for (name, classes), by_rows in costs.items():
        few, many = min(by_rows), max(by_rows)
        if few < many:
            growth = by_rows[many] / by_rows[few]
            title = f"{name}, {classes:,} classes" if classes else f"{name} without columns"
            what = f"{title}: a row of {many:,} costs at most {FLAT:g} × one of {few:,}"
            checks.append(check(what, growth, growth <= FLAT))
    return checks


def report(entries: list[dict], checks: list[dict]) -> str:
    rows = []
    for entry in entries:
        cells = [entry["case"], entry["classes"] or "–", entry["rows"], spread(entry["units_per_second"], 0)]
        cells.append(f"{1e6 * np.median(entry['cpu_seconds_per_unit']):.1f}")
        cells += [spread(entry[key], 3) if key in entry else "–" for key in ("ratio", "cpu_ratio")]
        rows.append([*cells, entry["baseline"] or "–"])
    header = ["read", "classes", "rows", "rows/s (quartiles)", "CPU µs a row", "ratio", "ratio of CPU time", "to"]
    return f"{markdown_table(header, rows)}\n\n{check_table(checks)}\n"


def main():
    bench = parse(LoadingArguments, __doc__)
    begin = time.perf_counter()
    images, cases = make_images(max(bench.rows), bench), []
    with tempfile.TemporaryDirectory() as folder:
        for count in bench.rows:
            cases += (of_count := make_cases(images.select(range(count)), bench, Path(folder)))
            time_in_turn(of_count, bench.repetitions, bench.seed)
    entries = summarize(cases)
    checks = check_all(entries)
    has_files = any(case.name == "torchdistill" for case in cases)
    used = version("torchdistill") if has_files else None
    seconds = time.perf_counter() - begin
    write_results(bench, torchdistill=used, entries=entries, checks=checks, seconds=seconds)
    print(f"\n{report(entries, checks)}")
    if not has_files:
        print("Left out: torchdistill's cached outputs; its CacheableDataset (torchdistill < 1.1.5) is not installed.")


if __name__ == "__main__":
    main()
