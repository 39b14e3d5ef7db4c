"""Where the time of a training step and of a recording step goes: text profiles, the slowest operators first.

    python benchmarks/profile_steps.py --output_dir outputs/profiles
    python benchmarks/profile_steps.py --dataset FOLDER --photo_size 0 --image_size 32 --bf16 false
    python benchmarks/profile_steps.py --dataset FOLDER --photo_size 432 --image_size 224 --batch_size 16

By default digits enlarged to 28 pixels, both small teachers, a student of at most 64 patches. Training reads stored views;
recording makes them. Ten steps of each are profiled after two that are not. Each profile begins with the shares of kinds of
operators. What is left of the time on the wall is Python's: reading, decoding and views of images, the trainer, the table. Shares
are those of one thread, so set OMP_NUM_THREADS=1.
"""

import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import concatenate_datasets
from timing import parse
from training import PRESETS
from transformers import TrainerCallback, set_seed
from transformers.hf_argparser import HfArg
from views_accuracy import enlarge

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
    load_image_dataset,
    record_teacher_logits,
)
from hf_ibdistill.publishing.cards import markdown_table
from hf_ibdistill.training.arguments import has_bf16_units


WARM_UP, STEPS = 2, 10
# The first that fits the name of an operator. Those that call others have no time of their own.
KINDS = {
    "involutions": "involution|addcmul",
    "convolutions": "conv",
    "matrix products": "mm|linear",
    "softmax": "softmax",
    "norms": "norm",
    "activations": "gelu|relu|clamp_min|threshold",
    "copies and conversions": "copy|clone|contiguous|cat|fill|zero",
    "optimizer": "adam",
    "other operators": "",
}
PYTHON = "reading and Python"


@dataclass
class ProfileArguments:
    output_dir: str = HfArg(default="outputs/profiles", help="Where the profiles go.")
    dataset: str = HfArg(default="digits", help="Images with labels.")
    photo_size: int = HfArg(default=28, help="Enlarge the images to JPEG files of this side; 0 keeps them.")
    image_size: int = HfArg(default=28, help="Side of a view.")
    batch_size: int = HfArg(default=64, help="Images a step.")
    num_views: int = HfArg(default=4, help="Stored views of each image.")
    bf16: bool | None = HfArg(default=None, help="Mixed precision; by default on hardware with bf16 units.")
    rows: int = HfArg(default=30, help="Lines of a profile.")


class Profiler:
    """Profiles what runs between `start` and `stop`."""

    def __init__(self):
        self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])

    def start(self):
        self.profiler.start()
        self.begin = time.perf_counter()

    def stop(self):
        self.seconds = time.perf_counter() - self.begin
        self.profiler.stop()

    def shares(self) -> dict[str, float]:
        """Kind of operator → its share of the time on the wall."""
        found = dict.fromkeys(KINDS, 0.0)
        # The loader has a line of its own, which holds what it does in Python.
        for operator in (one for one in self.profiler.key_averages() if not one.key.startswith("enumerate")):
            kind = next(kind for kind, pattern in KINDS.items() if re.search(pattern, operator.key.lower()))
            found[kind] += operator.self_cpu_time_total / 1e6 / self.seconds
        return {**found, PYTHON: 1 - sum(found.values())}

    def write(self, path: Path, rows: int) -> None:
        operators = self.profiler.key_averages()
        table = operators.table(sort_by="self_cpu_time_total", row_limit=rows, max_name_column_width=48)
        shares = [[kind, f"{100 * share:.0f}"] for kind, share in self.shares().items()]
        path.write_text(f"{markdown_table(['kind', '% of the time'], shares)}\n\n{table}", encoding="utf-8")
        print(f"{path}:\n{path.read_text(encoding='utf-8')}")


class StepProfiler(TrainerCallback):
    def __init__(self, profiler: Profiler):
        self.profiler = profiler

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == WARM_UP:
            self.profiler.start()

    def on_train_end(self, args, state, control, **kwargs):
        self.profiler.stop()


def main():
    bench = parse(ProfileArguments, __doc__)
    folder, size = Path(bench.output_dir), bench.image_size
    bf16 = has_bf16_units(use_cpu=True) if bench.bf16 is None else bench.bf16
    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    crop = {} if bench.photo_size == size else {"crop": "resized", "image_size": size}
    views, shown = ViewRecipe(num_views=bench.num_views, **crop), bench.batch_size // bench.num_views
    images = load_image_dataset(bench.dataset)["train"]
    images = images.select([i % len(images) for i in range((WARM_UP + STEPS) * shown)])
    if bench.photo_size:
        images = enlarge(images, bench.photo_size, work / "photos")
    processor, classes = build_image_processor(images, image_size=size), class_config(images)
    # The same networks in every run.
    set_seed(0)
    teachers = {
        name: (IBResNetForImageClassification(IBResNetConfig.from_preset(preset, **classes)), processor)
        for name, preset in PRESETS.items()
    }
    warm, rest = images.select(range(WARM_UP * shown)), images.select(range(WARM_UP * shown, len(images)))
    # An untrained involution network's logits are beyond float16.
    settings = {"views": views, "batch_size": bench.batch_size, "dtype": "float32", "bf16": bf16}
    tables = [record_teacher_logits(warm, teachers, output_dir=work / "warm_table", **settings)]
    profiler = Profiler()
    profiler.start()
    tables.append(record_teacher_logits(rest, teachers, output_dir=work / "table", **settings))
    profiler.stop()
    profiler.write(folder / "recording.txt", bench.rows)

    config = IBViTConfig(
        image_size=size, patch_size=max(4, size // 8), hidden_size=128, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=256, patch_embedding="convolution", teacher_names=tuple(PRESETS), **classes,
    )  # fmt: skip
    profiler = Profiler()
    args = DistillationArguments(
        str(work / "student"), max_steps=WARM_UP + STEPS, per_device_train_batch_size=bench.batch_size,
        eval_strategy="no", logging_strategy="no", report_to="none", bf16=bf16,
    )  # fmt: skip
    student = IBViTForImageClassification(config)
    how = {"processing_class": processor, "callbacks": [StepProfiler(profiler)]}
    EnsembleDistillationTrainer(student, args, train_dataset=concatenate_datasets(tables), **how).train()
    profiler.write(folder / "training.txt", bench.rows)
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
