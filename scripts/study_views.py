"""What stored views are worth: the same student undistilled, distilled from one un-augmented row, from stored views,
and with the teachers online on the same views. Digits, few images, several seeds.

    python scripts/study_views.py --seeds 0 1 2 3 4 --output_dir outputs/study_views

A seed whose results are there already is not run again. Every student takes the same steps.
"""

import json
import shutil
from pathlib import Path

from arguments import parse_arguments, result_split, run
from quickstart import PRESETS, QuickstartArguments, QuickstartData, QuickstartViews, build_student, train

from hf_ibdistill import (
    EnsembleDistillationTrainer,
    IBResNetConfig,
    IBResNetForImageClassification,
    ImageClassificationTrainer,
    build_image_processor,
    class_config,
    evaluate_model,
    record_teacher_logits,
)
from hf_ibdistill.report import markdown_table, mean_and_spread


def run_seed(data, views, quick, seed: int, folder: Path) -> dict:
    """Method → test accuracy."""
    # What an interrupted run of this seed left is by other teachers.
    shutil.rmtree(folder, ignore_errors=True)
    data.split_seed = seed
    splits = data.load()
    test = splits[result_split(splits)]
    processor = build_image_processor(splits["train"], data.image_column)
    classes = class_config(splits["train"], data.label_column)
    recipe = views.recipe()
    shared = {"seed": seed, "quick": quick, "splits": splits, "data": data, "processor": processor}
    loss = {"temperature": [quick.temperature], "teacher_weights": [quick.teacher_weight]}
    accuracies = {}

    def measure(name, trainer):
        accuracies[name] = evaluate_model(trainer.model, processor, test)["accuracy"]
        return trainer.model

    teachers = {}
    for name, preset in PRESETS.items():
        model = IBResNetForImageClassification(IBResNetConfig.from_preset(preset, **classes))
        trainer = train(ImageClassificationTrainer, model, folder / name, **shared, views=recipe)
        teachers[name] = (measure(name, trainer).eval(), processor)

    def distil(name, table, views=None, online=None):
        trainer = train(
            EnsembleDistillationTrainer, build_student(tuple(PRESETS), processor, classes, seed), folder / name,
            **shared, views=views, train_dataset=table, teachers=online, **loss,
        )  # fmt: skip
        measure(name, trainer)

    for name, student_views in (("undistilled", None), ("undistilled, same views", recipe)):
        student = build_student((), processor, classes, seed)
        measure(name, train(ImageClassificationTrainer, student, folder / name, **shared, views=student_views))
    plain = record_teacher_logits(splits["train"], teachers, output_dir=folder / "plain")
    stored = record_teacher_logits(splits["train"], teachers, output_dir=folder / "views", views=recipe)
    distil("one un-augmented row", plain)
    distil("stored views", stored)
    distil("online, same views", splits["train"], recipe, teachers)
    return accuracies


def main():
    data, views, quick = parse_arguments(QuickstartData, QuickstartViews, QuickstartArguments)
    results = []
    for seed in quick.seeds:
        folder = Path(quick.output_dir) / f"seed_{seed}"
        path = folder / "accuracies.json"
        if not path.exists():
            accuracies = run_seed(data, views, quick, seed, folder)
            path.write_text(json.dumps(accuracies, indent=2))
        results.append(json.loads(path.read_text()))
    rows = []
    for name in results[0]:
        values = [accuracies[name] for accuracies in results]
        rows.append([name, mean_and_spread(values), " ".join(f"{100 * value:.1f}" for value in values)])
    print(markdown_table(["method", "test accuracy (%)", f"seeds {' '.join(map(str, quick.seeds))}"], rows))


if __name__ == "__main__":
    run(main)
