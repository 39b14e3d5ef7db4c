"""What stored views are worth: one student, trained five ways on few digits, over several seeds.

    python -m studies.stored_views --seeds 0 1 2 3 4

The student is trained without teachers, without teachers on the same views, on one stored un-augmented row, on stored views,
and with the teachers online on the same views; every time for the same steps. A seed whose results are in OUTPUT_DIR is not
run again.
"""

import json
import shutil
from pathlib import Path

from transformers import HfArgumentParser

from hf_ibdistill import build_image_processor, class_config, evaluate_model, record_teacher_logits
from hf_ibdistill.commands.arguments import result_split
from hf_ibdistill.commands.quickstart import (
    PRESETS,
    QuickstartArguments,
    QuickstartData,
    QuickstartViews,
    build_student,
    build_teacher,
    train,
)
from hf_ibdistill.publishing.cards import markdown_table, mean_and_spread


def run_seed(data, views, quick, seed: int, folder: Path) -> dict[str, float]:
    """Method → test accuracy."""
    # The rest of an interrupted run belongs to other teachers.
    shutil.rmtree(folder, ignore_errors=True)
    data.split_seed = seed
    splits = data.load()
    images, test, recipe = splits["train"], splits[result_split(splits)], views.recipe()
    processor, classes = build_image_processor(images), class_config(images)
    accuracies = {}

    def measure(name, model, table, **kwargs):
        trainer = train(model, folder / name, seed, quick, table, splits["validation"], processor, **kwargs)
        accuracies[name] = evaluate_model(trainer.model, processor, test)["accuracy"]
        return trainer.model

    teachers = {}
    for name in PRESETS:
        teachers[name] = (measure(name, build_teacher(name, classes, seed), images, views=recipe).eval(), processor)
    plain = record_teacher_logits(images, teachers, output_dir=folder / "plain")
    stored = record_teacher_logits(images, teachers, output_dir=folder / "views", views=recipe)
    for name, teacher_names, table, kwargs in (
        ("undistilled", (), images, {}),
        ("undistilled, same views", (), images, {"views": recipe}),
        ("one un-augmented row", tuple(PRESETS), plain, {}),
        ("stored views", tuple(PRESETS), stored, {}),
        ("online, same views", tuple(PRESETS), images, {"views": recipe, "teachers": teachers}),
    ):
        measure(name, build_student(teacher_names, processor, classes, seed), table, **kwargs)
    return accuracies


def main(arguments=None):
    kinds = QuickstartData, QuickstartViews, QuickstartArguments
    parser = HfArgumentParser(kinds, description=__doc__.splitlines()[0])
    # Longer than the quickstart, and on labelled images alone.
    parser.set_defaults(output_dir="outputs/stored_views", num_views=50, teacher_steps=400, student_steps=1000)
    parser.set_defaults(drop_rest=True)
    data, views, quick = parser.parse_args_into_dataclasses(arguments)
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
    main()
