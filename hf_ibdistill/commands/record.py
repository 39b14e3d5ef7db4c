"""Run the teachers over a dataset once and store their logits beside the images.

hf-ibdistill record --teachers conv=outputs/conv inv=outputs/inv --output_dir outputs/table
hf-ibdistill record --teachers conv=outputs/conv inv=user/teacher --dataset my_images/ \\
    --num_views 10 --output_dir outputs/table

A second call continues an interrupted recording. Under torchrun or accelerate launch, the processes
share the work.
"""

from dataclasses import dataclass, replace

from accelerate import PartialState
from transformers.hf_argparser import HfArg

from ..data import load_image_dataset
from ..data.columns import IMAGE
from ..files import read_json
from ..recording.assessment import logits_metrics
from ..recording.recorder import record_teacher_logits
from .arguments import CLASSES_HELP, MixedDataArguments, ViewArguments, name_folders, parse, run
from .display import beside, data_flags, metric_rows, show_results


@dataclass
class RecordingDataArguments(MixedDataArguments):
    streaming: bool = HfArg(
        default=False, help="Read a Hub id or Parquet files as a stream, which may be larger than memory and disk."
    )

    def load(self, skip_unreadable: bool = False):
        """The splits, or streams of them."""
        if not self.streaming:
            return super().load(skip_unreadable)
        given = {"images_per_class": self.images_per_class, "pixel_range": self.pixel_range}
        given |= {"unlabelled": self.unlabelled, "keep_rest": self.keep_rest or None}
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"{name}={value} needs the whole table. Leave out --streaming.")
        columns = {"image_column": self.image_column, "label_column": self.label_column}
        return load_image_dataset(self.dataset, streaming=True, **columns)


@dataclass
class RecordingArguments:
    _argument_group_name = "recording"

    teachers: list[str] = HfArg(help="NAME=FOLDER or NAME=HUB_ID for each teacher.")
    output_dir: str = HfArg(help="Folder of the table, or an address such as hf://datasets/user/table.")
    top_k: int | None = HfArg(
        default=None, help="Store the k largest logits and the sum of the rest; all logits if not given."
    )
    dtype: str = HfArg(
        default="float16",
        help="Type of the stored logits: float16, float32, or packed (top_k classes, 26 by default).",
    )
    bf16: bool = HfArg(
        default=False, help="Run the teachers under bf16 autocast: faster on hardware with bf16 units, less exact."
    )
    batch_size: int = HfArg(default=64, help="Images (views) in a batch.")
    shard_size: int | None = HfArg(
        default=None, help="Rows per shard: what an interruption can cost. 4096, or a share of what is larger."
    )
    num_workers: int | None = HfArg(
        default=None, help="Processes that decode images; by default none on a CPU, up to 8 on an accelerator."
    )
    skip_unreadable: bool = HfArg(
        default=False, help="Leave out rows whose image cannot be decoded, instead of stopping."
    )
    with_images: bool | None = HfArg(
        default=None,
        help="Copy the images into the table. By default yes, up to 32 GiB. Otherwise their paths stay, or nothing.",
    )
    trust_remote_code: bool = HfArg(default=False, help="Run the code of the teacher repositories.")
    teacher_classes: str | None = HfArg(default=None, help=CLASSES_HELP)


def following(data, recording, tables) -> list[list[str]]:
    """The command that trains on this table."""
    source = ["--dataset", recording.output_dir]
    if IMAGE not in next(iter(tables.values())).column_names:
        source = [*data_flags(replace(data, streaming=False)), "--logits", recording.output_dir]
    return [["distill", *source, "--output_dir", beside(recording.output_dir, "student")]]


def main(arguments):
    data, views, recording = parse(
        "record", __doc__, arguments, RecordingDataArguments, ViewArguments, RecordingArguments
    )
    # The flags have the names of the parameters.
    settings = vars(recording) | {"teachers": name_folders(recording.teachers)}
    if recording.teacher_classes is not None:
        settings["teacher_classes"] = read_json(recording.teacher_classes)
    tables = record_teacher_logits(data.load(recording.skip_unreadable), views=views.recipe(), **settings)
    if PartialState().is_main_process:
        metrics = {split: logits_metrics(table) for split, table in tables.items()}
        facts = {
            split: {"rows": len(table), "columns": table.column_names, "metrics": metrics[split]}
            for split, table in tables.items()
        }
        rows = [["images", *(f"{len(table):,}" for table in tables.values())], *metric_rows(*metrics.values())]
        show_results(facts, [recording.output_dir, *tables], rows, *following(data, recording, tables))


if __name__ == "__main__":
    run("record", main)
