"""Tables, pictures and model cards from the cells of study_data_efficiency.py.

    python scripts/report_data_efficiency.py
    python scripts/report_data_efficiency.py --dataset FOLDER --work_dir outputs/data_efficiency

Reads nothing but the cells, and writes RESULTS_DIR/README.md with its pictures. With the images (`--dataset`) it also writes the
cards of the best models and, where the best student is in WORK_DIR, draws where its tokens look.
"""

import json
import os
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from arguments import parse_arguments, run
from study_data_efficiency import (
    CLASSES,
    METHODS,
    TEACHERS,
    Recipe,
    Study,
    StudyArguments,
    build_student,
    build_teacher,
    undigits,
)
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_ibdistill import build_image_processor, class_config
from hf_ibdistill.data import select_per_class
from hf_ibdistill.evaluation import token_attention
from hf_ibdistill.images import ImageRows
from hf_ibdistill.model_card import create_model_card
from hf_ibdistill.models.configuration_ibvit import FUSIONS
from hf_ibdistill.report import (
    markdown_table,
    mean_and_spread,
    paired_difference,
    plot_accuracy,
    plot_attention,
    plot_corrections,
)


OURS = "both_views"
# What ours is compared with, pair by pair; the teachers last.
RIVALS = (*(name for name in METHODS if name not in (OURS, *TEACHERS)), *TEACHERS)


@dataclass
class ReportArguments:
    results_dir: str = field(default="results/data_efficiency", metadata={"help": "Folder of the cells."})
    dataset: str | None = field(default=None, metadata={"help": "Fashion-MNIST, for attention maps and model cards."})
    work_dir: str = field(default="outputs/data_efficiency", metadata={"help": "Folder of the models."})
    cards_dir: str = field(default="model_cards", metadata={"help": "Folder of the cards."})
    card_images: list[int] = field(
        default_factory=lambda: [10000, 60000], metadata={"help": "Sizes whose best models get a card."}
    )


def read_cells(folder: Path) -> dict:
    """Variation → method → images → seed → cell; the chosen recipes are the variation "base"."""
    cells = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    for path in sorted(folder.glob("*.json")):
        cell = json.loads(path.read_text())
        recipe = cell["recipe"]
        cells[cell["variation"]][recipe["method"]][recipe["images"]][recipe["seed"]] = cell
    return {
        variation: {method: dict(by_method[method]) for method in METHODS if method in by_method}
        for variation, by_method in cells.items()
    }


def accuracies(cells: dict) -> list[float]:
    return [cells[seed]["metrics"]["accuracy"] for seed in sorted(cells)]


def right(cell: dict, labels: np.ndarray) -> np.ndarray:
    """Whether each test image is classified rightly."""
    return predicted(cell) == labels


def predicted(cell: dict) -> np.ndarray:
    return undigits(cell["predictions"])


def accuracy_table(cells: dict) -> str:
    sizes = sorted({images for sizes in cells.values() for images in sizes})
    rows = [
        [METHODS[name].title, *(_accuracy(by_size.get(images)) for images in sizes)] for name, by_size in cells.items()
    ]
    return markdown_table(["method", *(f"{images:,} images" for images in sizes)], rows)


def _accuracy(by_seed):
    if not by_seed:
        return "–"
    return mean_and_spread(accuracies(by_seed)) + (f" ({len(by_seed)} seeds)" if len(by_seed) > 1 else " (1 seed)")


def difference_table(cells: dict, labels: np.ndarray, ours: str = OURS, rivals: tuple = RIVALS) -> str:
    """Ours against each rival at each size; and over all sizes that both have, since three seeds of one size tell little. The
    subsets of a seed are nested, so the pairs of several sizes are not wholly independent."""
    sizes, rows = sorted(cells.get(ours, {})), []
    groups = [[images] for images in sizes] + ([sizes] if len(sizes) > 1 else [])
    for group in groups:
        for name in rivals:
            common = [
                images for images in group if set(cells[ours][images]) & set(cells.get(name, {}).get(images, {}))
            ]
            if not common or (len(group) > 1 and len(common) == 1):
                continue
            pooled = [
                {(images, seed): cell for images in common for seed, cell in cells[method][images].items()}
                for method in (ours, name)
            ]
            title = " + ".join(f"{images:,}" for images in common)
            rows.append([title, METHODS[name].title, *_difference(*pooled, labels)])
    return markdown_table(["images", "against", *_DIFFERENCE], rows)


def ablation_table(cells: dict, labels: np.ndarray) -> str:
    """What one change of a method's recipe does to its test accuracy, over the seeds that have both."""
    base, rows = cells["base"], []
    for variation, by_method in sorted(cells.items()):
        for name, by_size in by_method.items():
            for images, by_seed in sorted(by_size.items()):
                unchanged = base.get(name, {}).get(images, {})
                if variation != "base" and by_seed.keys() & unchanged.keys():
                    difference = _difference(by_seed, unchanged, labels)
                    rows.append([f"{images:,}", METHODS[name].title, variation, *difference])
    return markdown_table(["images", "method", "change", *_DIFFERENCE], rows)


_DIFFERENCE = ["pairs", "points", "95 % interval over seeds", "95 % interval over test images"]


def _difference(first: dict, second: dict, labels: np.ndarray) -> list:
    """Of two methods' cells by seed, over the seeds that both have."""
    seeds = sorted(set(first) & set(second))
    pairs = [[cells[seed] for seed in seeds] for cells in (first, second)]
    over_seeds = paired_difference(*([cell["metrics"]["accuracy"] for cell in side] for side in pairs))
    over_images = paired_difference(*(np.mean([right(cell, labels) for cell in side], axis=0) for side in pairs))
    return [len(seeds), _points(over_seeds[:1]), _interval(over_seeds), _interval(over_images)]


def _points(values):
    return " … ".join(f"{100 * value:+.2f}" for value in values)


def _interval(difference):
    return "–" if np.isnan(difference[1]) else _points(difference[1:])


def gap_table(cells: dict) -> str:
    """How much of the distance from the undistilled student to the better teacher each method closes."""
    students = [name for name in cells if name not in (*TEACHERS, "undistilled")]
    rows = []
    for images, by_seed in sorted(cells["undistilled"].items()):
        teachers = [np.mean(accuracies(cells[name][images])) for name in TEACHERS if images in cells[name]]
        if not teachers:
            continue
        bottom, top = np.mean(accuracies(by_seed)), max(teachers)
        shares = [_share(cells, name, images) for name in students]
        rows.append([f"{images:,}", f"{100 * bottom:.1f} → {100 * top:.1f}", *shares])
    return markdown_table(["images", "distance", *(METHODS[name].title for name in students)], rows)


def _share(cells, method, images):
    # Over the seeds that all of them have: one seed's subset is easier than another's.
    teachers = [name for name in TEACHERS if images in cells[name]]
    by_method = {name: cells[name].get(images, {}) for name in (method, "undistilled", *teachers)}
    seeds = set.intersection(*(set(by_seed) for by_seed in by_method.values()))
    if not seeds:
        return "–"
    means = {name: np.mean(accuracies({s: cells_[s] for s in seeds})) for name, cells_ in by_method.items()}
    bottom, top = means["undistilled"], max(means[name] for name in teachers)
    return f"{100 * (means[method] - bottom) / (top - bottom):.0f} %"


def teacher_table(cells: dict, labels: np.ndarray) -> str:
    """Whether two teachers can teach more than one: how often they agree, and how often either of them is right."""
    rows = []
    for images, ours in sorted(cells[OURS].items()):
        seeds = set(ours).intersection(*(cells[name][images] for name in TEACHERS))
        pairs = [[cells[name][images][seed] for name in TEACHERS] for seed in sorted(seeds)]
        agree = np.mean([predicted(first) == predicted(second) for first, second in pairs])
        either = np.mean([right(first, labels) | right(second, labels) for first, second in pairs])
        errors = [np.mean([pair[i]["metrics"]["expected_calibration_error"] for pair in pairs]) for i in (0, 1)]
        tokens = [f"{token}_token_accuracy" for token in ("class", *TEACHERS)]
        alone = [np.mean([ours[seed]["metrics"][token] for seed in seeds]) for token in tokens]
        fused = np.mean([ours[seed]["metrics"]["accuracy"] for seed in seeds])
        rows.append([f"{images:,}", *(f"{100 * value:.1f}" for value in (*errors, agree, either, *alone, fused))])
    header = ["images", "calibration error: convolution", "involution", "teachers agree", "either is right",
              "class token", "convolution token", "involution token", "fused"]  # fmt: skip
    return markdown_table(header, rows)


def fusion_table(cells: dict) -> str:
    """The same students' accuracy by each kind of fusion, of the cells that tell it."""
    rows = []
    for name, by_size in cells.items():
        for images, by_seed in sorted(by_size.items()):
            found = [cell["fusions"] for cell in by_seed.values() if cell.get("fusions")]
            if found:
                means = [mean_and_spread([fusions[fusion] for fusions in found]) for fusion in FUSIONS]
                rows.append([METHODS[name].title, f"{images:,}", len(found), *means])
    return markdown_table(["method", "images", "seeds", *FUSIONS], rows)


def logits_table(cells: dict) -> str:
    """What the stored logits say of the images they were recorded on, by the distillation temperature's softmax."""
    conv, inv = TEACHERS
    keys = [
        f"{conv}_accuracy", f"{inv}_accuracy", f"{conv}_entropy", f"{inv}_entropy", f"{conv}_view_divergence",
        f"{inv}_view_divergence", f"{conv}_{inv}_divergence",
    ]  # fmt: skip
    rows = []
    for images, by_seed in sorted(cells[OURS].items()):
        found = [cell["logits"] for cell in by_seed.values() if cell.get("logits")]
        if found:
            values = [np.mean([metrics[key] for metrics in found]) for key in keys]
            shares, nats = values[:2], values[2:]
            rows.append([f"{images:,}", len(found), *(f"{100 * v:.1f}" for v in shares), *(f"{v:.3f}" for v in nats)])
    header = ["images", "seeds", "convolution right (%)", "involution right (%)", "entropy: convolution (nats)", "involution",
              "divergence between views: convolution", "involution", "divergence between teachers"]  # fmt: skip
    return markdown_table(header, rows)


def on_one_machine(cells: dict) -> dict:
    """The cells whose seconds compare: those made, with their teachers, on the kind of machine that made most of their size."""
    kinds = defaultdict(Counter)
    for by_size in cells.values():
        for images, by_seed in by_size.items():
            kinds[images].update(map(_machine, by_seed.values()))
    kept = defaultdict(dict)
    for name, by_size in cells.items():
        for images, by_seed in by_size.items():
            usual = kinds[images].most_common(1)[0][0]
            sources = [by_seed, *(cells[teacher][images] for teacher in METHODS[name].teachers)]
            seeds = [seed for seed in by_seed if all(_machine(source[seed]) == usual for source in sources)]
            if seeds:
                kept[name][images] = {seed: by_seed[seed] for seed in seeds}
    return kept


def _machine(cell: dict) -> tuple:
    return tuple(cell["machine"].get(key) for key in ("cpu", "vectors", "cores", "threads"))


def seconds(cells: dict, method: str, images: int, seed: int) -> dict[str, float]:
    """Processor seconds of a cell's parts: its teachers, the recording, its own training."""
    own = cells[method][images][seed]["seconds"]
    teachers = sum(cells[name][images][seed]["seconds"]["training"]["cpu"] for name in METHODS[method].teachers)
    return {
        "teachers": teachers,
        "recording": own.get("recording", {}).get("cpu", 0.0),
        "training": own["training"]["cpu"],
    }


def time_table(cells: dict) -> str:
    rows = []
    for name, by_size in cells.items():
        for images, by_seed in sorted(by_size.items()):
            parts = [seconds(cells, name, images, seed) for seed in by_seed]
            means = [np.mean([part[key] for part in parts]) for key in ("teachers", "recording", "training")]
            rows.append([METHODS[name].title, f"{images:,}", *(f"{value:.0f}" for value in [*means, sum(means)])])
    return markdown_table(["method", "images", "teachers", "recording", "training", "all"], rows)


def trial_table(folder: Path) -> str:
    """The search's cells: accuracy on held-out images, mean over seeds."""
    trials = defaultdict(list)
    for path in sorted(folder.glob("*.json")):
        cell = json.loads(path.read_text())
        trials[cell["recipe"]["method"], cell["recipe"]["images"], cell["variation"]].append(cell["metrics"])
    rows = []
    for (method, images, variation), metrics in trials.items():
        log_likelihood = np.mean([values["negative_log_likelihood"] for values in metrics])
        accuracy = mean_and_spread([values["accuracy"] for values in metrics])
        rows.append([METHODS[method].title, f"{images:,}", variation, len(metrics), accuracy, f"{log_likelihood:.3f}"])
    return markdown_table(["method", "images", "trial", "seeds", "held-out accuracy (%)", "−log p"], rows)


def draw_lines(cells: dict, folder: Path) -> None:
    sizes = sorted({images for by_size in cells.values() for images in by_size})
    by_images = {
        METHODS[name].title: {images: accuracies(by_seed) for images, by_seed in by_size.items()}
        for name, by_size in cells.items()
    }
    ours = METHODS[OURS].title
    plot_accuracy(folder / "accuracy_images.png", {"Fashion-MNIST": by_images}, "training images", ours)
    comparable = on_one_machine(cells)
    by_time = {
        f"{images:,} images": {
            METHODS[name].title: accuracies_by_seconds(cells, comparable, name, images) for name in cells
        }
        for images in sizes
    }
    plot_accuracy(folder / "accuracy_time.png", by_time, "processor seconds: teachers, recording and training", ours)


def accuracies_by_seconds(cells, comparable, method, images):
    """Mean seconds → accuracies. These are of all seeds: one machine's alone would be misplaced beside another method's."""
    spent = [sum(seconds(comparable, method, images, seed).values()) for seed in comparable[method].get(images, {})]
    return {np.mean(spent): accuracies(cells[method][images])} if spent else {}


def write_cards(study: Study, cells: dict, args: ReportArguments, folder: Path) -> None:
    """The cards of the best seed's teachers and student; and where that student's tokens look, if it is at hand."""
    classes, side = class_config(study.train), build_image_processor(study.train).size["height"]
    for images in args.card_images:
        for name in (*TEACHERS, OURS) if images in cells[OURS] else ():
            by_seed, is_student, picture = cells[name][images], name == OURS, ""
            seed, cell = max(by_seed.items(), key=lambda item: item[1]["metrics"]["accuracy"])
            # A card tells of a model's shape, not of its weights, which may be on another machine.
            recipe = Recipe(**cell["recipe"])
            model = build_student(recipe, classes, side) if is_student else build_teacher(recipe, classes)
            weights = study.folder(recipe) / f"{name}_base"
            if is_student and images == min(args.card_images):
                attention = folder / f"attention_{images}_{seed}.png"
                if weights.exists():
                    draw_attention(study, weights, attention)
                # Also when it was drawn where the weights were.
                if attention.exists():
                    where = Path(os.path.relpath(attention, args.cards_dir)).as_posix()
                    picture = f"\n\n![Where each token looks, on one test image of each class]({where})"
            card = create_model_card(
                model,
                title=f"{METHODS[name].title}, {images:,} images of Fashion-MNIST",
                data_name="zalando-datasets/fashion_mnist",
                split="test",
                metrics=cell["metrics"],
                recipe=cell["recipe"],
                # Those that taught it, of its own seed.
                teacher_metrics={t: cells[t][images][seed]["metrics"] for t in TEACHERS} if is_student else None,
                machine=cell["machine"],
                train_seconds=cell["seconds"]["training"]["cpu"],
                notes=f"Test accuracy of the seeds {sorted(by_seed)}: "
                f"{', '.join(f'{100 * value:.2f}' for value in accuracies(by_seed))} %.{picture}",
            )
            path = Path(args.cards_dir) / f"fashion_mnist_{images}_{'student' if is_student else name}.md"
            path.parent.mkdir(parents=True, exist_ok=True)
            card.save(path)


def draw_attention(study: Study, weights: Path, path: Path) -> None:
    model, processor = (
        kind.from_pretrained(weights) for kind in (AutoModelForImageClassification, AutoImageProcessor)
    )
    rows = select_per_class(study.test_rows(), 1, "label").sort("label")
    chosen = ImageRows(rows, "image", ["label"]).__getitems__(range(len(rows)))
    images = [row["image"] for row in chosen]
    maps = token_attention(model, processor, images)
    plot_attention(path, images, [CLASSES[row["label"]] for row in chosen], maps)


def main():
    (args,) = parse_arguments(ReportArguments)
    folder = Path(args.results_dir)
    variations = read_cells(folder / "grid")
    cells = variations.get("base", {})
    missing = [name for name in (*TEACHERS, "undistilled", OURS) if name not in cells]
    if missing:
        raise ValueError(
            f"{folder / 'grid'} has no cells of {', '.join(missing)}; run study_data_efficiency.py --stage grid first."
        )
    labels = undigits(json.loads((folder / "test_labels.json").read_text()))
    sections = {
        "Test accuracy (%)": accuracy_table(cells),
        f"{METHODS[OURS].title}, against": difference_table(cells, labels),
        f"{METHODS['both_row'].title}, against": difference_table(cells, labels, "both_row", ("conv_row", "inv_row")),
        "Share of the distance to the better teacher": gap_table(cells),
        "What the teachers and the student's tokens know (%)": teacher_table(cells, labels),
        "Fusions of the same heads (%)": fusion_table(cells),
        "What stored views say of the training images": logits_table(cells),
        "Changes of the recipe, against it": ablation_table(variations, labels),
        "Processor seconds, one thread": time_table(on_one_machine(cells)),
        "Search on held-out images": trial_table(folder / "search"),
    }
    text = "\n\n".join(f"## {title}\n\n{table}" for title, table in sections.items())
    (folder / "README.md").write_text(f"# How many images does a student need?\n\n{text}\n")
    print(text)
    draw_lines(cells, folder)
    # Of the few images that the method is for.
    smallest = min(cells[OURS].keys() & cells["undistilled"].keys())
    before, after = ([predicted(cell) for cell in cells[name][smallest].values()] for name in ("undistilled", OURS))
    plot_corrections(folder / "corrections.png", labels, before, after, CLASSES)
    if args.dataset is not None:
        study = Study(StudyArguments(args.dataset, results_dir=args.results_dir, work_dir=args.work_dir))
        write_cards(study, cells, args, folder)


if __name__ == "__main__":
    run(main)
