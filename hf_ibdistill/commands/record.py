"""Run the teachers over a dataset once and store their logits beside the images.

hf-ibdistill record --teachers conv=outputs/conv inv=outputs/inv --output_dir outputs/table
hf-ibdistill record --teachers conv=outputs/conv inv=user/teacher --dataset my_images/ \\
    --num_views 10 --output_dir outputs/table

A second call continues an interrupted recording. Under torchrun or accelerate launch, the processes
share the work.
"""

from dataclasses import dataclass, field

from accelerate import PartialState

from ..recording.assessment import logits_metrics
from ..recording.recorder import record_teacher_logits
from .arguments import DataArguments, ViewArguments, name_folders, parse, run


@dataclass
class RecordingArguments:
    _argument_group_name = "recording"

    teachers: list[str] = field(metadata={"help": "NAME=FOLDER or NAME=HUB_ID for each teacher."})
    output_dir: str = field(metadata={"help": "Folder of the table."})
    top_k: int | None = field(
        default=None, metadata={"help": "Store the k largest logits and the sum of the rest; all logits if not given."}
    )
    dtype: str = field(default="float16", metadata={"help": "Type of the stored logits: float16 or float32."})
    bf16: bool = field(
        default=False,
        metadata={"help": "Run the teachers under bf16 autocast: faster on hardware with bf16 units, less exact."},
    )
    batch_size: int = field(default=64, metadata={"help": "Images (views) per forward pass."})
    shard_size: int = field(default=4096, metadata={"help": "Rows per shard: what an interruption can cost."})
    num_workers: int | None = field(
        default=None,
        metadata={"help": "Processes that decode images; by default none on a CPU, up to 8 on an accelerator."},
    )
    skip_unreadable: bool = field(
        default=False, metadata={"help": "Leave out rows whose image cannot be decoded, instead of stopping."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the code of the teacher repositories."})


def main(arguments):
    data, views, recording = parse("record", __doc__, arguments, DataArguments, ViewArguments, RecordingArguments)
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
        trust_remote_code=recording.trust_remote_code,
    )
    if PartialState().is_main_process:
        for split, table in tables.items():
            print(f"{split}: {len(table)} rows, {', '.join(table.column_names)}")
            print(", ".join(f"{name} {value:.3f}" for name, value in logits_metrics(table).items()))


if __name__ == "__main__":
    run("record", main)
