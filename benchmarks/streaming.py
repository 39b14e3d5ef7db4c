"""The rate of training rows from a streamed table of Parquet files, against the same table mapped from the disk.

    python benchmarks/streaming.py
    python benchmarks/streaming.py --image_size 28 --num_workers 0 2

Both give the batches of a training step: decoded images or their views, preprocessed, with labels and two teachers' logits. The
mapped rows are read in random order, the streamed ones through a shuffle buffer. Images are the bundled digits, enlarged, and the
logits random numbers. Everything is in the page cache. The requirement is checked by processor seconds, workers included.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import concatenate_datasets, load_dataset, load_from_disk
from loading import TEACHERS, make_columns, make_images
from timing import CLOCKS, Case, check, check_table, parse, spread, time_in_turn, write_results
from transformers import ViTImageProcessor
from transformers.hf_argparser import HfArg

from hf_ibdistill import ViewRecipe
from hf_ibdistill.data.columns import as_image_table
from hf_ibdistill.logits.encoding import LogitsEncoding, column_name
from hf_ibdistill.publishing.cards import markdown_table
from hf_ibdistill.rows import DistillationCollator, ImageRows, StreamedImageRows


RATE = 0.9


@dataclass
class StreamingArguments:
    output_file: str = HfArg(default="outputs/benchmark_streaming.json", help="Where the results go.")
    rows: int = HfArg(default=8192, help="Rows of the table, read once a pass.")
    files: int = HfArg(default=4, help="Parquet files, which workers share.")
    num_classes: int = HfArg(default=10, help="Classes of the logits.")
    image_size: int = HfArg(default=28, help="Side of the images; above 8 the digits are enlarged.")
    num_views: int = HfArg(default=4, help="Views of each image in the table with views.")
    num_workers: list[int] = HfArg(default_factory=lambda: [0, 2], help="Worker processes.")
    batch_size: int = HfArg(default=64, help="Rows in a batch.")
    repetitions: int = HfArg(default=5, help="How often each case is timed.")
    seed: int = HfArg(default=0, help="Seed of the logits and of the order.")


def make_table(bench: StreamingArguments, num_views: int | None, folder: Path) -> None:
    columns = make_columns(bench.rows, bench.num_classes, LogitsEncoding(), num_views, bench.seed)
    table = concatenate_datasets([make_images(bench.rows, bench), columns], axis=1)
    table.save_to_disk(folder / "mapped")
    for number in range(bench.files):
        part = table.shard(bench.files, number)
        part.to_parquet(folder / "parquet" / f"{number}.parquet")


def make_cases(bench: StreamingArguments, num_views: int | None, folder: Path) -> dict[str, Case]:
    views = None if num_views is None else ViewRecipe(num_views=num_views)
    files = str(folder / "parquet" / "*.parquet")
    stream = as_image_table(load_dataset("parquet", data_files=files, split="train", streaming=True))
    given = (["label"], [column_name(name) for name in TEACHERS], bench.num_classes, views)
    mapped = ImageRows(load_from_disk(folder / "mapped"), *given)
    streamed = StreamedImageRows(stream, *given, buffer_size=1000)
    size = bench.image_size
    collator = DistillationCollator(ViTImageProcessor(size={"height": size, "width": size}), teacher_names=TEACHERS)
    cases = {}
    for num_workers in bench.num_workers:
        for name, rows, options in (("mapped", mapped, {"shuffle": True}), ("streamed", streamed, {})):
            loader = torch.utils.data.DataLoader(
                rows, bench.batch_size, collate_fn=collator, num_workers=num_workers, **options
            )

            def run(rng, loader=loader):
                assert sum(len(batch["labels"]) for batch in loader) == bench.rows

            title = f"{name}, {'plain' if views is None else 'views'}, {num_workers} workers"
            cases[f"{name} {num_workers}"] = Case(title, run, bench.rows)
    return cases


def main():
    bench = parse(StreamingArguments, __doc__)
    table, entries, checks = [], [], []
    for num_views in (None, bench.num_views):
        with tempfile.TemporaryDirectory() as work:
            folder = Path(work)
            (folder / "parquet").mkdir()
            make_table(bench, num_views, folder)
            cases = make_cases(bench, num_views, folder)
            time_in_turn(list(cases.values()), bench.repetitions)
        for num_workers in bench.num_workers:
            mapped, streamed = cases[f"mapped {num_workers}"], cases[f"streamed {num_workers}"]
            ratios = streamed.ratios(mapped)
            what = "plain" if num_views is None else f"{num_views} views"
            table.append([what, num_workers, *(spread(case.rate, 0) for case in (mapped, streamed))])
            table[-1] += [spread(ratios[clock], 2) for clock in CLOCKS]
            entries.append({"views": num_views, "num_workers": num_workers, "ratios": ratios})
            ratio = ratios["cpu"]["median"]
            checks.append(check(f"{what}, {num_workers} workers: streamed ≥ {RATE} × mapped", ratio, ratio >= RATE))
    print(
        markdown_table(
            ["images", "workers", "mapped, images/s", "streamed, images/s", *(f"ratio, {clock}" for clock in CLOCKS)],
            table,
        )
    )
    print(check_table(checks))
    write_results(bench, cases=entries, checks=checks)


if __name__ == "__main__":
    main()
