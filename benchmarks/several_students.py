"""Training speed of several students in one pass over the photos, against separate runs of the same students.

    python benchmarks/several_students.py
    python benchmarks/several_students.py --num_students 8 --hidden_size 128

Photos, views and logits are those of `views_per_image.py`. For each number N of students, in turn:

    together      `train_together`: the photos are read once
    separately    `trainer.train()` of each, one after another

Students have the same size, and differ in seed and temperature. Units are images times students.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset
from timing import Case, parse, spread, time_in_turn, write_results
from transformers import PrinterCallback, set_seed
from transformers.hf_argparser import HfArg
from views_per_image import make_table

from hf_ibdistill import (
    DistillationArguments,
    EnsembleDistillationTrainer,
    IBViTConfig,
    IBViTForImageClassification,
    build_image_processor,
    class_config,
    train_together,
)
from hf_ibdistill.logits.encoding import recorded_teachers
from hf_ibdistill.publishing.cards import markdown_table


@dataclass
class SeveralStudentsArguments:
    output_file: str = HfArg(default="outputs/benchmark_several_students.json", help="Where the results go.")
    num_students: list[int] = HfArg(default_factory=lambda: [1, 2, 4], help="Students in a pass.")
    photo_size: list[int] = HfArg(default_factory=lambda: [500, 375], help="Width and height of the files.")
    image_size: int = HfArg(default=224, help="Side of a view.")
    num_photos: int = HfArg(default=512, help="Rows of the table; so many that a trainer does not keep them decoded.")
    epochs: int = HfArg(default=1, help="Epochs of a run.")
    num_views: int = HfArg(default=8, help="Stored views of a photo.")
    num_classes: int = HfArg(default=10, help="Classes, of random labels and logits.")
    hidden_size: int = HfArg(default=64, help="Width of the students.")
    batch_size: int = HfArg(default=32, help="Views in a batch.")
    repetitions: int = HfArg(default=5, help="How often each case is timed.")
    seed: int = HfArg(default=0, help="Seed of everything random.")


def make_trainers(table: Dataset, bench: SeveralStudentsArguments, work: Path) -> list[EnsembleDistillationTrainer]:
    processor, trainers = build_image_processor(table, image_size=bench.image_size), []
    config = IBViTConfig(
        teacher_names=recorded_teachers(table), image_size=bench.image_size, patch_size=bench.image_size // 8,
        hidden_size=bench.hidden_size, num_hidden_layers=2, num_attention_heads=2, intermediate_size=2 * bench.hidden_size,
        patch_embedding="linear", **class_config(table),
    )  # fmt: skip
    for number in range(max(bench.num_students)):
        set_seed(bench.seed + number)
        args = DistillationArguments(
            str(work / str(number)), num_train_epochs=bench.epochs, per_device_train_batch_size=bench.batch_size,
            dataloader_drop_last=True, eval_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True,
            seed=bench.seed + number, data_seed=bench.seed, temperature=1.0 + number,
        )  # fmt: skip
        student = IBViTForImageClassification(config)
        trainers.append(EnsembleDistillationTrainer(student, args, train_dataset=table, processing_class=processor))
        trainers[-1].remove_callback(PrinterCallback)
    return trainers


def make_cases(trainers: list[EnsembleDistillationTrainer], bench: SeveralStudentsArguments) -> dict[str, Case]:
    def separately(count):
        for trainer in trainers[:count]:
            trainer.train()

    images = bench.epochs * (bench.num_photos // bench.batch_size * bench.batch_size)
    cases = {}
    for count in bench.num_students:
        kinds = {
            "together": lambda rng, n=count: train_together(trainers[:n]),
            "separately": lambda rng, n=count: separately(n),
        }
        for name, run in kinds.items():
            cases[f"{name}, {count}"] = Case(f"{name}, {count}", run, count * images)
    return cases


def main():
    bench = parse(SeveralStudentsArguments, __doc__)
    with tempfile.TemporaryDirectory() as name:
        table, _ = make_table(bench, Path(name, "table"))
        cases = make_cases(make_trainers(table, bench, Path(name, "work")), bench)
        time_in_turn(list(cases.values()), bench.repetitions, bench.seed)
    rows, ratios = [], {}
    for count in bench.num_students:
        together, separately = cases[f"together, {count}"], cases[f"separately, {count}"]
        ratios[count] = together.ratios(separately)
        rates = [spread(case.rate, 1) for case in (separately, together)]
        rows.append([count, *rates, *(spread(ratios[count][clock], 2) for clock in ("wall", "cpu"))])
    write_results(bench, cases={name: case.measured for name, case in cases.items()}, ratios=ratios)
    header = ["students", "separately, images/s", "together, images/s", "× separately", "by processor time"]
    print(markdown_table(header, rows))


if __name__ == "__main__":
    main()
