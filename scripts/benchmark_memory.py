"""Peak resident memory of recording and of training, at two sizes of the data set; it should not grow with the size.

    python scripts/benchmark_memory.py --num_rows 10000 100000

Every measurement is a process of its own. Images are the bundled digits, repeated; the teacher is untrained, since only
memory is measured.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from arguments import parse_arguments, run

from hf_ibdistill.report import describe_machine, markdown_table


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
        measured_step(arguments)
        print(json.dumps({"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
        return
    rows = []
    for num_rows in arguments.num_rows:
        with tempfile.TemporaryDirectory() as folder:
            peaks = {}
            for step in ("prepare", "record", "train"):
                command = [sys.executable, __file__, "--step", step, "--folder", folder, "--num_rows", str(num_rows)]
                command += ["--num_classes", str(arguments.num_classes)]
                command += [] if arguments.top_k is None else ["--top_k", str(arguments.top_k)]
                # Nothing may be kept in memory because it was small enough to.
                environment = {**os.environ, "HF_DATASETS_IN_MEMORY_MAX_SIZE": "0"}
                done = subprocess.run(command, env=environment, capture_output=True, text=True)
                if done.returncode != 0:
                    raise RuntimeError(done.stderr[-2000:])
                peaks[step] = json.loads(done.stdout.splitlines()[-1])["peak"]
            size = sum(path.stat().st_size for path in (Path(folder) / "table").glob("*.arrow"))
        rows.append({"num_rows": num_rows, "table_bytes": size, "peak_bytes": peaks})
    header = ["rows", "table (MB)", "peak of recording (MB)", "peak of training (MB)"]
    cells = [
        [row["num_rows"], *(round(n / 1e6) for n in (row["table_bytes"], row["peak_bytes"]["record"], row["peak_bytes"]["train"]))]
        for row in rows
    ]  # fmt: skip
    print(markdown_table(header, cells))
    report = {"machine": describe_machine(), "rows": rows}
    path = Path(arguments.output_file)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    run(main)
