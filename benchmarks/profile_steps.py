"""Where the time of a training step and of a recording step goes: text profiles, the slowest operators first.

    python benchmarks/profile_steps.py --output_dir outputs/profiles

Digits enlarged to 28 pixels, both small teachers, a student of 52 tokens. Training reads stored views; recording makes
them. Ten steps of each are profiled after two that are not.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import concatenate_datasets
from timing import parse
from training import PRESETS, make_images
from transformers import TrainerCallback
from transformers.hf_argparser import HfArg

from hf_ibdistill import (
    DistillationArguments,
    EnsembleDistillationTrainer,
    IBResNetConfig,
    IBResNetForImageClassification,
    IBViTConfig,
    IBViTForImageClassification,
    ViewRecipe,
    build_image_processor,
    class_config,
    record_teacher_logits,
)


WARM_UP, STEPS = 2, 10


@dataclass
class ProfileArguments:
    output_dir: str = HfArg(default="outputs/profiles", help="Where the profiles go.")
    image_size: int = HfArg(default=28, help="Side that the digits are enlarged to.")
    batch_size: int = HfArg(default=64, help="Images a step.")
    num_views: int = HfArg(default=4, help="Stored views of each image.")
    rows: int = HfArg(default=30, help="Lines of a profile.")


class StepProfiler(TrainerCallback):
    def __init__(self):
        self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == WARM_UP:
            self.profiler.start()

    def on_train_end(self, args, state, control, **kwargs):
        self.profiler.stop()


def write_profile(profiler, path: Path, rows: int) -> None:
    table = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=rows, max_name_column_width=48)
    path.write_text(table)
    print(f"{path}:\n{table}")


def main():
    bench = parse(ProfileArguments, __doc__)
    folder, size = Path(bench.output_dir), bench.image_size
    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    views, shown = ViewRecipe(num_views=bench.num_views), bench.batch_size // bench.num_views
    images = make_images((WARM_UP + STEPS) * shown, size)
    processor, classes = build_image_processor(images), class_config(images)
    teachers = {
        name: (IBResNetForImageClassification(IBResNetConfig.from_preset(preset, **classes)), processor)
        for name, preset in PRESETS.items()
    }
    warm, rest = images.select(range(WARM_UP * shown)), images.select(range(WARM_UP * shown, len(images)))
    # An untrained involution network's logits are beyond float16.
    settings = {"views": views, "batch_size": bench.batch_size, "dtype": "float32"}
    tables = [record_teacher_logits(warm, teachers, output_dir=work / "warm_table", **settings)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        tables.append(record_teacher_logits(rest, teachers, output_dir=work / "table", **settings))
    write_profile(profiler, folder / "recording.txt", bench.rows)

    config = IBViTConfig(
        image_size=size, patch_size=4, hidden_size=128, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=256, patch_embedding="convolution", **classes,
    )  # fmt: skip
    step_profiler = StepProfiler()
    args = DistillationArguments(
        str(work / "student"), max_steps=WARM_UP + STEPS, per_device_train_batch_size=bench.batch_size,
        eval_strategy="no", logging_strategy="no", report_to="none",
    )  # fmt: skip
    student, how = IBViTForImageClassification(config), {"processing_class": processor, "callbacks": [step_profiler]}
    EnsembleDistillationTrainer(student, args, train_dataset=concatenate_datasets(tables), **how).train()
    write_profile(step_profiler.profiler, folder / "training.txt", bench.rows)
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
