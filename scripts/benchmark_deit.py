"""A 224-pixel training step at DeiT's sizes: its time and its peak memory, beside transformers' DeiT.

    python scripts/benchmark_deit.py
    python scripts/benchmark_deit.py --presets deit-tiny deit-small deit-base

The images are JPEG files, crops of scikit-learn's two photographs, in a table on disk with 1,000 classes. Two untrained
teachers, since what they say makes no difference to the time, recorded dense columns for them. On this table are trained:

    ours          the preset of `IBViTConfig`, with a token and a head for each of the two teachers, by
                  `EnsembleDistillationTrainer` on the columns
    transformers  `DeiTForImageClassificationWithTeacher` of the same size, by transformers' own `Trainer`. The class is for
                  inference, its forward takes no labels; the loss is the cross-entropy of its `logits`, the mean of both
                  heads. It has one token and one head less, no teachers and no columns to read.

Both decode the same files into the same batches of pixel values, by `ImageRows` and `DistillationCollator`, with the same
arguments and precision. Each has its own default attention: PyTorch's fused one in transformers, and in ours the same but
for bf16 on a CPU, where two plain matrix products are faster but keep every layer's attention for the backward pass.

The whole of `train()` is timed, without logging, evaluation and saving, both models in turn, in another order each
repetition. A ratio is the median, with quartiles, over the repetitions of the ratios within one. The processor's time,
which varies less on a machine that others use, is that of this process and of its data loader workers. What glibc adds to
a step by handing memory back and fetching it again, `benchmark_training.py` says how to avoid.

Memory is that of as many steps in a process of their own: "anonymous" what it allocated, the libraries' share included
(Linux only); "resident" the same and what is in memory of mapped files, which are the table and the libraries' code. Memory
on an accelerator is not in it.
"""

import json
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from arguments import parse_arguments, run
from benchmark_recording import make_photographs, make_teacher
from benchmark_training import make_arguments
from datasets import Dataset, load_from_disk
from timing import Case, measure_in_process, peak_memory, spread, time_in_turn, write_results
from torch.nn.functional import cross_entropy
from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher, PrinterCallback, Trainer, set_seed

from hf_ibdistill import (
    EnsembleDistillationTrainer,
    IBViTConfig,
    IBViTForImageClassification,
    build_image_processor,
    class_config,
    record_teacher_logits,
)
from hf_ibdistill.images import ImageRows
from hf_ibdistill.models.configuration_ibvit import PRESETS
from hf_ibdistill.report import markdown_table
from hf_ibdistill.training.collator import DistillationCollator


OURS, TRANSFORMERS = "ours", "transformers"
TEACHERS = {"conv": "convolution-small", "inv": "involution-small"}
TEACHER_SIZE = 32


@dataclass
class DeiTArguments:
    output_file: str = field(default="outputs/benchmark_deit.json", metadata={"help": "Where the results go."})
    presets: list[str] = field(
        default_factory=lambda: ["deit-tiny"], metadata={"help": f"Sizes to measure: {', '.join(PRESETS)}."}
    )
    num_rows: int = field(default=256, metadata={"help": "Images in the table."})
    num_classes: int = field(default=1000, metadata={"help": "Classes of the images, so width of the columns."})
    batch_size: int = field(default=32, metadata={"help": "Images a step."})
    steps: int = field(default=8, metadata={"help": "Steps of each model in a repetition."})
    repetitions: int = field(default=5, metadata={"help": "How often each model is timed."})
    bf16: bool | None = field(default=None, metadata={"help": "Mixed precision; by default the Trainer's choice."})
    num_workers: int | None = field(default=None, metadata={"help": "Loader workers; by default the Trainer's."})
    seed: int = field(default=0, metadata={"help": "Seed of images, weights and orders."})
    model: str | None = field(default=None, metadata={"help": "Used by the script itself: ours or transformers."})
    folder: str | None = field(default=None, metadata={"help": "Used by the script itself."})


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


def make_trainer(model: str, preset: str, table: Dataset, bench: DeiTArguments) -> Trainer:
    args = make_arguments(
        bench, Path(bench.folder, "model"), max_steps=bench.steps, per_device_train_batch_size=bench.batch_size
    )
    processor, classes = build_image_processor(table), class_config(table)
    set_seed(bench.seed)
    if model == OURS:
        student = IBViTForImageClassification(
            IBViTConfig.from_preset(preset, teacher_names=tuple(TEACHERS), **classes)
        )
        trainer = EnsembleDistillationTrainer(student, args, train_dataset=table, processing_class=processor)
    else:
        deit = DeiTForImageClassificationWithTeacher(DeiTConfig(**PRESETS[preset], **classes))
        rows = ImageRows(table, "image", ["label"])
        trainer = CrossEntropyTrainer(deit, args, train_dataset=rows, data_collator=DistillationCollator(processor))
    trainer.remove_callback(PrinterCallback)
    return trainer


def measure(preset: str, table: Dataset, bench: DeiTArguments) -> dict:
    """Time and memory of both models of a size."""
    trainers = {model: make_trainer(model, preset, table, bench) for model in (OURS, TRANSFORMERS)}
    cases = {
        model: Case(model, lambda _, trainer=trainer: trainer.train(), bench.steps * bench.batch_size)
        for model, trainer in trainers.items()
    }
    time_in_turn(list(cases.values()), bench.repetitions, bench.seed)
    models = {}
    for model, case in cases.items():
        entry = {"parameters": trainers[model].model.num_parameters(), "images_per_second": case.rate}
        entry |= {"wall_seconds_per_image": case.wall, "cpu_seconds_per_image": case.cpu}
        entry["peak_bytes"] = measure_in_process(__file__, asdict(replace(bench, presets=[preset], model=model)))
        models[model] = entry
    ratios = {clock: cases[OURS].speed_against(cases[TRANSFORMERS], clock) for clock in ("wall", "cpu")}
    return {"preset": preset, "bf16": trainers[OURS].args.bf16, "models": models, "ratios": ratios}


def report(entries: list[dict], batch_size: int) -> str:
    header = ["preset", "model", "parameters (M)", "s a step", "images/s (quartiles)"]
    header += ["× transformers'", "by CPU time", "anonymous peak (MB)", "resident peak (MB)"]
    rows = []
    for entry in entries:
        for model, measured in entry["models"].items():
            rate, peaks = measured["images_per_second"], measured["peak_bytes"]
            ratios = [spread(entry["ratios"][clock], 3) if model == OURS else "1" for clock in ("wall", "cpu")]
            megabytes = [f"{peaks[kind] / 1e6:,.0f}" if kind in peaks else "–" for kind in ("anonymous", "resident")]
            cells = [
                entry["preset"],
                model,
                f"{measured['parameters'] / 1e6:.2f}",
                f"{batch_size / rate['median']:.2f}",
            ]
            rows.append([*cells, spread(rate, 1), *ratios, *megabytes])
    return markdown_table(header, rows)


def main():
    (bench,) = parse_arguments(DeiTArguments)
    if bench.num_rows < bench.batch_size:
        raise ValueError(f"num_rows is at least one batch, {bench.batch_size}; got {bench.num_rows}.")
    for preset in bench.presets:
        # Or else says which there are, before any time is spent.
        IBViTConfig.from_preset(preset)
    if bench.model is not None:
        trainer = make_trainer(bench.model, *bench.presets, load_from_disk(Path(bench.folder, "table")), bench)
        print(json.dumps(peak_memory(trainer.train)))
        return
    with tempfile.TemporaryDirectory() as folder:
        record_table(bench, Path(folder))
        table, placed = load_from_disk(Path(folder, "table")), replace(bench, folder=folder)
        entries = [measure(preset, table, placed) for preset in bench.presets]
    write_results(bench.output_file, {"arguments": asdict(bench), "entries": entries})
    precision = "bf16" if entries[0]["bf16"] else "float32"
    print(f"\n{precision}, {bench.batch_size} images a step, {bench.steps} steps a run\n")
    print(report(entries, bench.batch_size))


if __name__ == "__main__":
    run(main)
