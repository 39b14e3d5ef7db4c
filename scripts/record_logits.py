"""Run teachers over a data set once and store what they say beside the images.

    python scripts/record_logits.py --teachers conv=outputs/conv inv=outputs/inv --output_dir outputs/table
    python scripts/record_logits.py --teachers conv=outputs/conv inv=outputs/inv --num_views 30 --output_dir outputs/views
    accelerate launch --num_processes 2 scripts/record_logits.py --teachers conv=outputs/conv --output_dir outputs/table

Interrupted, it continues where it stopped when it is called again.
"""

from dataclasses import dataclass, field

from arguments import DataArguments, ViewArguments, name_folders, parse_arguments, run

from hf_ibdistill import logits_metrics, record_teacher_logits


@dataclass
class RecordingArguments:
    teachers: list[str] = field(metadata={"help": "NAME=FOLDER or NAME=HUB_ID for each teacher."})
    output_dir: str = field(metadata={"help": "Folder of the table."})
    top_k: int | None = field(
        default=None, metadata={"help": "Store the k largest logits and the sum of the rest; by default all."}
    )
    dtype: str = field(default="float16", metadata={"help": "How logits are stored: float16 or float32."})
    bf16: bool = field(
        default=False,
        metadata={
            "help": "Run the teachers under bf16 autocast: faster where the hardware has it, less exact for good."
        },
    )
    batch_size: int = field(default=64, metadata={"help": "Images (views) a forward pass."})
    shard_size: int = field(default=4096, metadata={"help": "Rows a shard: what an interruption can cost."})
    num_workers: int | None = field(
        default=None,
        metadata={
            "help": "Processes that decode images ahead of the teachers; by default none on a CPU, else up to 8."
        },
    )
    skip_unreadable: bool = field(
        default=False, metadata={"help": "Leave out rows whose image cannot be decoded, instead of stopping."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the code that a teacher's Hub repository brings."}
    )


def main():
    data, views, recording = parse_arguments(DataArguments, ViewArguments, RecordingArguments)
    tables = record_teacher_logits(
        data.load(),
        name_folders(recording.teachers),
        output_dir=recording.output_dir,
        views=views.recipe(),
        top_k=recording.top_k,
        dtype=recording.dtype,
        bf16=recording.bf16,
        batch_size=recording.batch_size,
        shard_size=recording.shard_size,
        num_workers=recording.num_workers,
        skip_unreadable=recording.skip_unreadable,
        image_column=data.image_column,
        label_column=data.label_column,
        trust_remote_code=recording.trust_remote_code,
    )
    for split, table in tables.items():
        print(f"{split}: {len(table)} rows, {', '.join(table.column_names)}")
        metrics = logits_metrics(table, label_column=data.label_column)
        print(", ".join(f"{name} {value:.3f}" for name, value in metrics.items()))


if __name__ == "__main__":
    run(main)
