"""A training step at DeiT's sizes: its time and its peak memory, against transformers' DeiT.

    python benchmarks/deit.py
    python benchmarks/deit.py --presets deit-tiny deit-small deit-base

The images are JPEG files, crops of scikit-learn's two photographs, in a table on disk with 1,000 classes. Two teachers
recorded dense columns for them. They are untrained, because logits do not change the time. On this table are trained:

    ours          the preset of `IBViTConfig`, with a token and a head for each of the two teachers, by
                  `EnsembleDistillationTrainer` on the columns
    transformers  `DeiTForImageClassificationWithTeacher` of the same size, by transformers' own `Trainer`. The class is for
                  inference, its forward takes no labels; the loss is the cross-entropy of its `logits`, the mean of both
                  heads. It has one token and one head less, no teachers and no columns to read.

Both decode the same files into the same batches of pixel values, by `ImageRows` and `DistillationCollator`, with the same
arguments and precision. Each has its own default attention: PyTorch's fused one in transformers, and the same in ours except
for bf16 on a CPU. There two plain matrix products are faster, but keep the attention of every layer for the backward pass.

The whole of `train()` is timed, without logging, evaluation and saving. `training.py` describes how to avoid the time that
glibc adds to a step.

Memory is that of as many steps in a process of their own, "anonymous" and "resident" as in `memory.py`. That of an
accelerator is not included.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from datasets import load_from_disk
from recording import make_photographs, make_teacher
from timing import Case, parse, peak_memory, spread, time_in_turn, write_results
from torch.nn.functional import cross_entropy
from training import make_arguments
from transformers import (
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    PrinterCallback,
    Trainer,
    set_seed,
)
from transformers.hf_argparser import HfArg

from hf_ibdistill import (
    EnsembleDistillationTrainer,
    IBViTConfig,
    IBViTForImageClassification,
    build_image_processor,
    class_config,
    record_teacher_logits,
)
from hf_ibdistill.models.configuration_ibvit import PRESETS
from hf_ibdistill.publishing.cards import markdown_table
from hf_ibdistill.rows import DistillationCollator, ImageRows


OURS, TRANSFORMERS = "ours", "transformers"
TEACHERS = {"conv": "convolution-small", "inv": "involution-small"}
TEACHER_SIZE = 32


@dataclass
class DeiTArguments:
    output_file: str = HfArg(default="outputs/benchmark_deit.json", help="Where the results go.")
    presets: list[str] = HfArg(default_factory=lambda: ["deit-tiny"], help=f"Sizes to measure: {', '.join(PRESETS)}.")
    num_rows: int = HfArg(default=256, help="Images in the table.")
    num_classes: int = HfArg(default=1000, help="Classes of the images, so width of the columns.")
    batch_size: int = HfArg(default=32, help="Images a step.")
    steps: int = HfArg(default=8, help="Steps of each model in a repetition.")
    repetitions: int = HfArg(default=5, help="How often each model is timed.")
    bf16: bool | None = HfArg(default=None, help="Mixed precision; by default the Trainer's choice.")
    num_workers: int | None = HfArg(default=None, help="Loader workers; by default the Trainer's.")
    seed: int = HfArg(default=0, help="Seed of images, weights and orders.")

    def __post_init__(self):
        if self.num_rows < self.batch_size:
            raise ValueError(f"num_rows={self.num_rows} is less than batch_size={self.batch_size}.")
        for preset in self.presets:
            if preset not in PRESETS:
                raise ValueError(f"presets={preset} is unknown. Choose from {', '.join(PRESETS)}.")


class CrossEntropyTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(pixel_values=inputs["pixel_values"])
        loss = cross_entropy(outputs.logits, inputs["labels"])
        return (loss, outputs) if return_outputs else loss


def record_table(bench: DeiTArguments, folder: Path) -> None:
    make_photographs(bench.num_rows, bench.num_classes, bench.seed).save_to_disk(folder / "images")
    images = load_from_disk(folder / "images")
    processor = build_image_processor(images, image_size=TEACHER_SIZE)
    batches = [processor(rows["image"], return_tensors="pt")["pixel_values"] for rows in images.iter(bench.batch_size)]
    teachers = {
        name: (make_teacher(preset, class_config(images), batches, bench.seed), processor)
        for name, preset in TEACHERS.items()
    }
    record_teacher_logits(images, teachers, output_dir=folder / "table")


def make_trainer(model: str, preset: str, bench: DeiTArguments, folder: Path) -> Trainer:
    args = make_arguments(bench, folder / "model", max_steps=bench.steps, per_device_train_batch_size=bench.batch_size)
    table = load_from_disk(folder / "table")
    processor, classes = build_image_processor(table), class_config(table)
    set_seed(bench.seed)
    if model == OURS:
        config = IBViTConfig.from_preset(preset, teacher_names=tuple(TEACHERS), **classes)
        student = IBViTForImageClassification(config)
        trainer = EnsembleDistillationTrainer(student, args, train_dataset=table, processing_class=processor)
    else:
        deit = DeiTForImageClassificationWithTeacher(DeiTConfig(**PRESETS[preset], **classes))
        rows = ImageRows(table, ["label"])
        trainer = CrossEntropyTrainer(deit, args, train_dataset=rows, data_collator=DistillationCollator(processor))
    trainer.remove_callback(PrinterCallback)
    return trainer


def train(*arguments) -> None:
    make_trainer(*arguments).train()


def measure(preset: str, bench: DeiTArguments, folder: Path) -> dict:
    """Time and memory of both models of a size."""
    trainers = {model: make_trainer(model, preset, bench, folder) for model in (OURS, TRANSFORMERS)}
    cases = {
        model: Case(model, lambda _, trainer=trainer: trainer.train(), bench.steps * bench.batch_size)
        for model, trainer in trainers.items()
    }
    time_in_turn(list(cases.values()), bench.repetitions, bench.seed)
    models = {
        model: {
            "parameters": trainers[model].model.num_parameters(),
            "peak_bytes": peak_memory(train, model, preset, bench, folder),
            **case.measured,
        }
        for model, case in cases.items()
    }
    ratios = cases[OURS].ratios(cases[TRANSFORMERS])
    return {"preset": preset, "bf16": trainers[OURS].args.bf16, "models": models, "ratios": ratios}


def report(entries: list[dict], batch_size: int) -> str:
    header = ["preset", "model", "parameters (M)", "s a step", "images/s (quartiles)"]
    header += ["× transformers'", "by CPU time", "anonymous peak (MB)", "resident peak (MB)"]
    rows = []
    for entry in entries:
        for model, measured in entry["models"].items():
            rate, peaks = measured["units_per_second"], measured["peak_bytes"]
            ratios = [spread(entry["ratios"][clock], 3) if model == OURS else "1" for clock in ("wall", "cpu")]
            megabytes = [f"{peaks[kind] / 1e6:,.0f}" if kind in peaks else "–" for kind in ("anonymous", "resident")]
            size, step = f"{measured['parameters'] / 1e6:.2f}", f"{batch_size / rate['median']:.2f}"
            rows.append([entry["preset"], model, size, step, spread(rate, 1), *ratios, *megabytes])
    return markdown_table(header, rows)


def main():
    bench = parse(DeiTArguments, __doc__)
    with tempfile.TemporaryDirectory() as folder:
        record_table(bench, Path(folder))
        entries = [measure(preset, bench, Path(folder)) for preset in bench.presets]
    write_results(bench, entries=entries)
    precision = "bf16" if entries[0]["bf16"] else "float32"
    print(f"\n{precision}, {bench.batch_size} images a step, {bench.steps} steps a run\n")
    print(report(entries, bench.batch_size))


if __name__ == "__main__":
    main()
