"""Peak memory of recording and of training, at two sizes of the data set; it should not grow with the size.

    python scripts/benchmark_memory.py --num_rows 10000 100000

Every measurement is a process of its own. Images are the bundled digits, repeated; the teacher is untrained, since only
memory is measured. Two peaks are reported:

    anonymous  what the process allocated, the libraries' share included; Linux only, looked up every 20 ms
    resident   the same and what is in memory of mapped files: the table, which the system drops when it needs the room,
               and the libraries' code
"""

import json
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

from arguments import parse_arguments, run
from timing import measure_in_process, peak_memory, write_results

from hf_ibdistill.report import markdown_table


@dataclass
class MemoryArguments:
    num_rows: list[int] = field(default_factory=lambda: [10_000, 100_000], metadata={"help": "Sizes to measure."})
    num_classes: int = field(default=1000, metadata={"help": "Classes of the teacher, so width of the columns."})
    top_k: int | None = field(default=None, metadata={"help": "Store the k largest logits; by default all."})
    output_file: str = field(default="outputs/benchmark_memory.json", metadata={"help": "Where the figures go."})
    step: str | None = field(default=None, metadata={"help": "Used by the script itself: prepare, record or train."})
    folder: str | None = field(default=None, metadata={"help": "Used by the script itself."})


def measured_step(arguments: MemoryArguments) -> None:
    """What one process does before it reports its peak."""
    from datasets import ClassLabel, concatenate_datasets, load_from_disk

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

    folder, (num_rows,) = Path(arguments.folder), arguments.num_rows
    names = [str(i) for i in range(arguments.num_classes)]
    if arguments.step == "prepare":
        digits = load_image_dataset("digits")["train"].cast_column("label", ClassLabel(names=names))
        repeated = concatenate_datasets([digits] * -(-num_rows // len(digits))).select(range(num_rows))
        repeated.save_to_disk(folder / "images")
        return
    images = load_from_disk(folder / "images")
    processor = build_image_processor(images)
    if arguments.step == "record":
        config = IBResNetConfig.from_preset(
            "convolution-small", depths=(1, 1, 1), hidden_sizes=(16, 16, 16), num_labels=len(names)
        )
        teachers = {"conv": (IBResNetForImageClassification(config), processor)}
        record_teacher_logits(images, teachers, output_dir=folder / "table", top_k=arguments.top_k, batch_size=256)
        return
    config = IBViTConfig(
        teacher_names=("conv",), image_size=8, patch_size=4, hidden_size=32, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=32, num_labels=len(names),
    )  # fmt: skip
    settings = DistillationArguments(
        str(folder / "student"), num_train_epochs=1, per_device_train_batch_size=256, eval_strategy="no", use_cpu=True
    )
    table = load_from_disk(folder / "table")
    student = IBViTForImageClassification(config)
    EnsembleDistillationTrainer(student, settings, train_dataset=table, processing_class=processor).train()


def main():
    (arguments,) = parse_arguments(MemoryArguments)
    if arguments.step is not None:
        print(json.dumps(peak_memory(lambda: measured_step(arguments))))
        return
    rows = []
    for num_rows in arguments.num_rows:
        with tempfile.TemporaryDirectory() as folder:
            peaks = {}
            for step in ("prepare", "record", "train"):
                given = {**asdict(arguments), "step": step, "folder": folder, "num_rows": [num_rows]}
                peaks[step] = measure_in_process(__file__, given)
            size = sum(path.stat().st_size for path in (Path(folder) / "table").glob("*.arrow"))
        rows.append({"num_rows": num_rows, "table_bytes": size, "peak_bytes": peaks})
    columns = [(kind, step) for kind in ("anonymous", "resident") for step in ("record", "train")]
    names = {"record": "recording", "train": "training"}
    header = ["rows", "table (MB)", *(f"{kind} peak of {names[step]} (MB)" for kind, step in columns)]
    cells = []
    for row in rows:
        peaks = [row["peak_bytes"][step].get(kind) for kind, step in columns]
        megabytes = ["–" if size is None else round(size / 1e6) for size in (row["table_bytes"], *peaks)]
        cells.append([row["num_rows"], *megabytes])
    print(markdown_table(header, cells))
    write_results(arguments.output_file, {"arguments": asdict(arguments), "rows": rows})


if __name__ == "__main__":
    run(main)
