"""Peak memory of recording and of training, at two sizes of the dataset; it should not grow with the size.

    python benchmarks/memory.py --num_rows 10000 100000

Every measurement is a process of its own. The images are the bundled digits, repeated. The teacher is untrained, because only
memory is measured. Two peaks are reported:

    anonymous  what the process allocated, including its libraries; Linux only, looked up every 20 ms
    resident   the same and the mapped files in memory: the table, which the system drops if it needs the room, and the
               code of the libraries
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from datasets import ClassLabel, concatenate_datasets, load_from_disk
from timing import parse, peak_memory, write_results
from transformers.hf_argparser import HfArg

from hf_ibdistill import (
    DistillationArguments,
    EnsembleDistillationTrainer,
    IBResNetConfig,
    IBResNetForImageClassification,
    IBViTConfig,
    IBViTForImageClassification,
    build_image_processor,
    load_image_dataset,
    record_teacher_logits,
)
from hf_ibdistill.publishing.cards import markdown_table


@dataclass
class MemoryArguments:
    num_rows: list[int] = HfArg(default_factory=lambda: [10_000, 100_000], help="Sizes to measure.")
    num_classes: int = HfArg(default=1000, help="Classes of the teacher, so width of the columns.")
    top_k: int | None = HfArg(default=None, help="Store the k largest logits; by default all.")
    output_file: str = HfArg(default="outputs/benchmark_memory.json", help="Where the results go.")


def make_images(bench: MemoryArguments, num_rows: int, folder: Path) -> None:
    names = [str(i) for i in range(bench.num_classes)]
    digits = load_image_dataset("digits")["train"].cast_column("label", ClassLabel(names=names))
    repeated = concatenate_datasets([digits] * -(-num_rows // len(digits))).select(range(num_rows))
    repeated.save_to_disk(folder / "images")


def record(bench: MemoryArguments, folder: Path) -> None:
    images = load_from_disk(folder / "images")
    config = IBResNetConfig.from_preset(
        "convolution-small", depths=(1, 1, 1), hidden_sizes=(16, 16, 16), num_labels=bench.num_classes
    )
    teachers = {"conv": (IBResNetForImageClassification(config), build_image_processor(images))}
    record_teacher_logits(images, teachers, output_dir=folder / "table", top_k=bench.top_k, batch_size=256)


def train(bench: MemoryArguments, folder: Path) -> None:
    table = load_from_disk(folder / "table")
    config = IBViTConfig(
        teacher_names=("conv",), image_size=8, patch_size=4, hidden_size=32, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=32, num_labels=bench.num_classes,
    )  # fmt: skip
    args = DistillationArguments(
        str(folder / "student"), num_train_epochs=1, per_device_train_batch_size=256, eval_strategy="no", use_cpu=True
    )
    student, processor = IBViTForImageClassification(config), build_image_processor(table)
    EnsembleDistillationTrainer(student, args, train_dataset=table, processing_class=processor).train()


def main():
    bench = parse(MemoryArguments, __doc__)
    entries, cells = [], []
    for num_rows in bench.num_rows:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            make_images(bench, num_rows, folder)
            peaks = {step.__name__: peak_memory(step, bench, folder) for step in (record, train)}
            size = sum(path.stat().st_size for path in (folder / "table").glob("*.arrow"))
        entries.append({"num_rows": num_rows, "table_bytes": size, "peak_bytes": peaks})
        measured = [peaks[step].get(kind) for kind in ("anonymous", "resident") for step in ("record", "train")]
        cells.append([num_rows, *("–" if size is None else round(size / 1e6) for size in (size, *measured))])
    write_results(bench, rows=entries)
    steps = ("recording", "training")
    header = [f"{kind} peak of {step} (MB)" for kind in ("anonymous", "resident") for step in steps]
    print(markdown_table(["rows", "table (MB)", *header], cells))


if __name__ == "__main__":
    main()
