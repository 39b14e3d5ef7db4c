"""Cells → Markdown tables. Cells are grouped by method, number of images and seed."""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from hf_ibdistill.evaluation import paired_difference
from hf_ibdistill.models.configuration_ibvit import FUSIONS
from hf_ibdistill.publishing.cards import markdown_table, mean_and_spread

from .recipes import FAMILIES, INGREDIENTS, METHODS, PAIRS, TEACHERS


OURS = "both_views"
# The methods that ours is compared with, pair by pair; the teachers last.
RIVALS = (*(name for name, method in METHODS.items() if name != OURS and method.preset is None), *TEACHERS)


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


def walk(cells: dict) -> Iterator[tuple[str, int, dict]]:
    """Method, images, and the cells of all seeds."""
    for name, by_size in cells.items():
        for images, by_seed in sorted(by_size.items()):
            yield name, images, by_seed


def accuracies(by_seed: dict) -> list[float]:
    return [by_seed[seed]["metrics"]["accuracy"] for seed in sorted(by_seed)]


def undigits(text: str) -> np.ndarray:
    """Class ids from one digit each."""
    return np.array([int(digit) for digit in text])


def predicted(cell: dict) -> np.ndarray:
    """The predicted class of each test image."""
    return undigits(cell["predictions"])


def accuracy_table(cells: dict) -> str:
    sizes = sorted({images for _, images, _ in walk(cells)})
    rows = [[METHODS[name].title, *(_accuracy(of.get(images)) for images in sizes)] for name, of in cells.items()]
    return markdown_table(["method", *(f"{images:,} images" for images in sizes)], rows)


def _accuracy(by_seed):
    if not by_seed:
        return "–"
    return f"{mean_and_spread(accuracies(by_seed))} ({len(by_seed)} seed{'s' if len(by_seed) > 1 else ''})"


def difference_table(cells: dict, labels: np.ndarray, ours: str = OURS, rivals: tuple = RIVALS) -> str:
    """Ours against each rival at each size, and over all sizes that both have, because few seeds leave wide intervals. The
    subsets of a seed are nested, so the pairs of several sizes are not wholly independent."""
    sizes, rows = sorted(cells.get(ours, {})), []
    for group in [*([images] for images in sizes), sizes]:
        for name in rivals:
            rival = cells.get(name, {})
            common = [images for images in group if cells[ours][images].keys() & rival.get(images, {}).keys()]
            # What only one size has is not repeated as that of all sizes.
            if not common or (group is sizes and len(common) == 1):
                continue
            pooled = [
                {(images, seed): cell for images in common for seed, cell in cells[method][images].items()}
                for method in (ours, name)
            ]
            title = " + ".join(f"{images:,}" for images in common)
            rows.append([title, METHODS[name].title, *_difference(*pooled, labels)])
    return markdown_table(["images", "against", *_DIFFERENCE], rows)


def ablation_table(cells: dict, labels: np.ndarray) -> str:
    """The effect of one change of a recipe on test accuracy, over the seeds that have both."""
    rows = []
    for variation, changed in sorted(cells.items()):
        for name, images, by_seed in walk(changed):
            unchanged = cells["base"].get(name, {}).get(images, {})
            if variation not in ("base", *FAMILIES) and by_seed.keys() & unchanged.keys():
                difference = _difference(by_seed, unchanged, labels)
                rows.append([f"{images:,}", METHODS[name].title, variation, *difference])
    return markdown_table(["images", "method", "change", *_DIFFERENCE], rows)


_DIFFERENCE = ["pairs", "points", "95 % interval over seeds", "95 % interval over test images"]


def _difference(first: dict, second: dict, labels: np.ndarray) -> list:
    """Of two methods' cells by seed, over the seeds that both have."""
    seeds = sorted(set(first) & set(second))
    pairs = [[cells[seed] for seed in seeds] for cells in (first, second)]
    over_seeds = paired_difference(*([cell["metrics"]["accuracy"] for cell in side] for side in pairs))
    over_images = paired_difference(*(np.mean([predicted(cell) == labels for cell in side], axis=0) for side in pairs))
    return [len(seeds), _points(over_seeds[:1]), _interval(over_seeds), _interval(over_images)]


def _points(values):
    return " … ".join(f"{100 * value:+.2f}" for value in values)


def _interval(difference):
    return "–" if np.isnan(difference[1]) else _points(difference[1:])


def gap_table(cells: dict) -> str:
    """The share of the distance from the undistilled student to the better teacher that each method closes."""
    students = [name for name in cells if name != "undistilled" and METHODS[name].preset is None]
    rows = []
    for images, by_seed in sorted(cells["undistilled"].items()):
        teachers = [np.mean(accuracies(cells[name][images])) for name in TEACHERS if images in cells[name]]
        if teachers:
            bottom, top = np.mean(accuracies(by_seed)), max(teachers)
            shares = [_share(cells, name, images) for name in students]
            rows.append([f"{images:,}", f"{100 * bottom:.1f} → {100 * top:.1f}", *shares])
    return markdown_table(["images", "distance", *(METHODS[name].title for name in students)], rows)


def _share(cells, method, images):
    # Over the seeds that all of them have, because the subset of one seed is easier than that of another.
    teachers = [name for name in TEACHERS if images in cells[name]]
    by_method = {name: cells[name].get(images, {}) for name in (method, "undistilled", *teachers)}
    seeds = set.intersection(*map(set, by_method.values()))
    if not seeds or not teachers:
        return "–"
    means = {name: np.mean(accuracies({s: by_seed[s] for s in seeds})) for name, by_seed in by_method.items()}
    bottom, top = means["undistilled"], max(means[name] for name in teachers)
    return f"{100 * (means[method] - bottom) / (top - bottom):.0f} %"


def teacher_table(cells: dict, labels: np.ndarray) -> str:
    """Whether two teachers can teach more than one: how often they agree, and how often either is right."""
    rows = []
    for images, ours in sorted(cells[OURS].items()):
        seeds = set(ours).intersection(*(cells[name][images] for name in TEACHERS))
        pair = [{seed: cells[name][images][seed] for seed in seeds} for name in TEACHERS]
        overlap = _overlap(*pair, labels)
        errors = [np.mean([cell["metrics"]["expected_calibration_error"] for cell in of.values()]) for of in pair]
        heads = [*(f"{token}_token_accuracy" for token in ("class", *TEACHERS)), "accuracy"]
        own = [np.mean([ours[seed]["metrics"][head] for seed in seeds]) for head in heads]
        rows.append([f"{images:,}", *(f"{100 * value:.1f}" for value in (*errors, *overlap, *own))])
    header = ["images", "calibration error: convolution", "involution", "teachers agree", "either is right",
              "class token", "convolution token", "involution token", "fused"]  # fmt: skip
    return markdown_table(header, rows)


def pair_table(cells: dict, labels: np.ndarray) -> str:
    """Two teachers of two kinds, against two of one kind: how much more a pair has to teach, and what its student learned. All
    figures of a size are of the seeds that have every pair of that size."""
    rows = []
    for images, ours in sorted(cells.get(OURS, {}).items()):
        found = [student for student in PAIRS if images in cells.get(student, {})]
        parts = [name for student in found for name in (student, PAIRS[student], *METHODS[student].teachers)]
        seeds = sorted(set(ours).intersection(*(cells.get(name, {}).get(images, {}) for name in parts)))
        if len(found) < 2 or not seeds:
            continue
        for student in found:
            members = METHODS[student].teachers
            names = (OURS, student, PAIRS[student], *members)
            of = {name: {seed: cells[name][images][seed] for seed in seeds} for name in names}
            overlap = (f"{100 * share:.1f}" for share in _overlap(*(of[name] for name in members), labels))
            shown = (mean_and_spread(accuracies(of[name])) for name in (*members, PAIRS[student], student))
            against = ["–"] * 3 if student == OURS else _difference(of[OURS], of[student], labels)[1:]
            rows.append([f"{images:,}", METHODS[student].title, len(seeds), *overlap, *shown, *against])
    header = ["images", "student", "seeds", "teachers agree (%)", "either is right (%)", "first teacher (%)", "second teacher (%)",
              "mean of the teachers (%)", "student (%)", f"points of {METHODS[OURS].title} above it", *_DIFFERENCE[2:]]  # fmt: skip
    return markdown_table(header, rows)


def _overlap(first: dict, second: dict, labels: np.ndarray) -> tuple[float, float]:
    """The share of test images on which two teachers agree, and on which either is right; mean over the seeds."""
    choices = [(predicted(first[seed]), predicted(second[seed])) for seed in first]
    agree = np.mean([one == other for one, other in choices])
    return float(agree), float(np.mean([(one == labels) | (other == labels) for one, other in choices]))


def patch_embedding_table(variations: dict, labels: np.ndarray) -> str:
    """Students with the linear patch embedding, which looks at each patch alone, beside the same methods with the convolution
    stem: the gain over the undistilled student of the same embedding."""
    linear, rows = variations.get("linear", {}), []
    teachers = {name: variations["base"][name] for name in TEACHERS if name in variations["base"]}
    for images in sorted(linear.get("undistilled", {})):
        for title, cells in (("convolution", variations["base"]), ("linear", teachers | linear)):
            names = [name for name in (*TEACHERS, *linear) if images in cells.get(name, {})]
            baseline = cells.get("undistilled", {}).get(images, {})
            for name in names:
                by_seed, against, share = cells[name][images], ["–"] * 4, "–"
                if name != "undistilled" and by_seed.keys() & baseline.keys():
                    against = _difference(by_seed, baseline, labels)
                    share = _share(cells, name, images)
                rows.append([f"{images:,}", title, METHODS[name].title, _accuracy(by_seed), *against, share])
    header = ["images", "patch embedding", "method", "test accuracy (%)", "pairs", "points above no teachers",
              *_DIFFERENCE[2:], "of the distance to the better teacher"]  # fmt: skip
    return markdown_table(header, rows)


def online_table(variations: dict, labels: np.ndarray) -> str:
    """Students of stored logits against one whose teachers run in every step. The time is that of recording and training,
    without the teachers' own training, over the seeds of which one kind of machine made both."""
    rows = []
    for variation, cells in sorted(variations.items()):
        # Online teachers store no views, so another number of stored views changes nothing.
        source = variations.get("base", {}) if variation.startswith("views_") else cells
        online = source.get("co_advise", {})
        for method in (OURS, "both_row"):
            stored = cells.get(method, {})
            for images in sorted(stored.keys() & online.keys()):
                seeds = stored[images].keys() & online[images].keys()
                if not seeds:
                    continue
                pairs = [(stored[images][seed], online[images][seed]) for seed in sorted(seeds)]
                comparable = [pair for pair in pairs if _machine(pair[0]) == _machine(pair[1])]
                spent = [sum(map(_own_seconds, side)) for side in zip(*comparable)]
                seconds = [f"{side / len(comparable):.0f}" for side in spent] or ["–", "–"]
                ratio = f"{spent[0] / spent[1]:.2f}" if spent else "–"
                difference = _difference(stored[images], online[images], labels)
                title = METHODS[method].title
                rows.append([f"{images:,}", title, variation, *difference, len(comparable), *seconds, ratio])
    header = ["images", "stored", "change", *_DIFFERENCE, "pairs of one machine", "processor seconds: stored", "online",
              "stored / online"]  # fmt: skip
    return markdown_table(header, rows)


def _own_seconds(cell):
    """Processor seconds of recording and training."""
    return cell["seconds"]["training"]["cpu"] + cell["seconds"].get("recording", {}).get("cpu", 0.0)


def fusion_table(cells: dict) -> str:
    """The accuracy of the same students by each kind of fusion, of the cells that hold it."""
    rows = []
    for name, images, by_seed in walk(cells):
        found = [cell["fusions"] for cell in by_seed.values() if cell.get("fusions")]
        if found:
            means = [mean_and_spread([fusions[fusion] for fusions in found]) for fusion in FUSIONS]
            rows.append([METHODS[name].title, f"{images:,}", len(found), *means])
    return markdown_table(["method", "images", "seeds", *FUSIONS], rows)


def logits_table(cells: dict) -> str:
    """What the stored logits can teach about the training images, by the softmax at the distillation temperature."""
    conv, inv = TEACHERS
    keys = [f"{name}_{key}" for key in ("accuracy", "entropy", "view_divergence") for name in TEACHERS]
    keys.append(f"{conv}_{inv}_divergence")
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


def family_table(variations: dict, labels: np.ndarray) -> str:
    """Students of several families, each with and without teachers, from the same tables. Speeds are of the cells of the kind
    of machine that made most."""
    # Of the student that the study is about, only what another family was trained by.
    trained = {(name, images) for family in FAMILIES for name, images, _ in walk(variations.get(family, {}))}
    found = [
        (family, name, images, by_seed)
        for family in ("base", *FAMILIES)
        for name, images, by_seed in walk(variations.get(family, {}))
        if (name, images) in trained
    ]
    usual, rows = _usual_machine(cell for *_, by_seed in found for cell in by_seed.values()), []
    for family, name, images, by_seed in found:
        cells = list(by_seed.values())
        comparable = [cell for cell in cells if _machine(cell) == usual]
        spent = [cell["seconds"]["training"]["cpu"] for cell in comparable]
        trained_images = [_images_trained(cell) / cell["seconds"]["training"]["cpu"] for cell in comparable]
        speeds = [cell["seconds"]["prediction"] for cell in comparable if "prediction" in cell["seconds"]]
        alone = variations[family].get("undistilled", {}).get(images, {})
        against = ["–"] * 3
        if name != "undistilled" and by_seed.keys() & alone.keys():
            against = _difference(by_seed, alone, labels)[:3]
        measured = [spent, trained_images, [speed["images"] / speed["cpu"] for speed in speeds]]
        title = "IBViT" if family == "base" else family
        title = [title, f"{cells[0]['parameters']:,}", METHODS[name].title, f"{images:,}", _accuracy(by_seed)]
        rows.append([*title, *against, *(f"{np.mean(values):,.0f}" if values else "–" for values in measured)])
    header = ["student", "parameters", "method", "images", "test accuracy (%)", "pairs", "points above no teachers",
              "95 % interval over seeds", "training, processor seconds", "trained images per processor second",
              "predicted images per processor second"]  # fmt: skip
    return markdown_table(header, rows)


def _images_trained(cell):
    """Images of all steps; the last batch of an epoch is smaller."""
    recipe, rows = cell["recipe"], cell["rows"]
    return recipe["steps"] * rows / math.ceil(rows / recipe["batch_size"])


def on_one_machine(cells: dict) -> dict:
    """The cells whose seconds compare: made, with their teachers, on the kind of machine that made most of their size."""
    made = defaultdict(list)
    for _, images, by_seed in walk(cells):
        made[images].extend(by_seed.values())
    kept = defaultdict(dict)
    for name, images, by_seed in walk(cells):
        usual = _usual_machine(made[images])
        sources = [by_seed, *(cells[teacher][images] for teacher in METHODS[name].teachers)]
        seeds = [seed for seed in by_seed if all(_machine(source[seed]) == usual for source in sources)]
        if seeds:
            kept[name][images] = {seed: by_seed[seed] for seed in seeds}
    return kept


def _usual_machine(cells):
    """The kind of machine that made most of these cells; `None` without cells."""
    counts = Counter(map(_machine, cells))
    return counts.most_common(1)[0][0] if counts else None


def _machine(cell):
    return tuple(str(cell["machine"].get(key)) for key in ("cpu", "vectors", "accelerators", "cores", "threads"))


def seconds(cells: dict, method: str, images: int, seed: int) -> dict[str, float]:
    """Processor seconds of the parts of a cell: its teachers, the recording, its own training."""
    own = cells[method][images][seed]["seconds"]
    if "teachers" in own:  # those of folds, which are no cells of a method
        teachers = own["teachers"]["cpu"]
    else:
        teachers = sum(cells[name][images][seed]["seconds"]["training"]["cpu"] for name in METHODS[method].teachers)
    recording = own.get("recording", {}).get("cpu", 0.0)
    return {"teachers": teachers, "recording": recording, "training": own["training"]["cpu"]}


def time_table(cells: dict) -> str:
    rows = []
    for name, images, by_seed in walk(cells):
        parts = [seconds(cells, name, images, seed) for seed in by_seed]
        means = [np.mean([part[key] for part in parts]) for key in ("teachers", "recording", "training")]
        rows.append([METHODS[name].title, f"{images:,}", *(f"{value:.0f}" for value in [*means, sum(means)])])
    return markdown_table(["method", "images", "teachers", "recording", "training", "all"], rows)


def accuracies_by_seconds(cells: dict, comparable: dict, method: str, images: int) -> dict[float, list[float]]:
    """Mean seconds → accuracies. The accuracies are of all seeds, because those of the seeds of one machine would be out of
    place beside another method's."""
    spent = [sum(seconds(comparable, method, images, seed).values()) for seed in comparable[method].get(images, {})]
    return {np.mean(spent): accuracies(cells[method][images])} if spent else {}


def ingredient_table(folder: Path, labels: np.ndarray) -> str:
    """The effect of one ingredient on the held-out accuracy of the search's cells: each against the same variation without it, over
    the seeds that have both.

    Args:
        folder: of the search's cells.
        labels: of the held-out images, which must be the same for all seeds.
    """
    cells, rows = read_cells(folder), []
    for variation, by_method in sorted(cells.items()):
        parts = variation.split("+")
        added = [part for part in parts if part in INGREDIENTS]
        without = "+".join(part for part in parts if part not in INGREDIENTS) or "base"
        for name, images, by_seed in walk(by_method) if len(added) == 1 else ():
            unchanged = cells.get(without, {}).get(name, {}).get(images, {})
            seeds = sorted(by_seed.keys() & unchanged.keys())
            if not seeds:
                continue
            # The weights of early stopping were chosen on the other half of the images.
            part = slice(1, None, 2) if added == ["early_stopping"] else slice(None)
            right = [
                np.mean([predicted(by_seed[seed]) == labels[part] for seed in seeds], axis=0),
                np.mean([predicted(unchanged[seed])[part] == labels[part] for seed in seeds], axis=0),
            ]
            difference = paired_difference(*right)
            steps = f"{by_seed[seeds[0]]['recipe']['steps']:,}"
            row = [METHODS[name].title, f"{images:,}", added[0], without, steps, len(seeds)]
            row += [f"{100 * side.mean():.1f}" for side in right]
            rows.append([*row, _points(difference[:1]), _interval(difference)])
    header = ["method", "images", "ingredient", "recipe", "steps", "seeds", "held-out accuracy with it (%)", "without (%)",
              "points", "95 % interval over held-out images"]  # fmt: skip
    return markdown_table(header, rows)


def trial_table(folder: Path) -> str:
    """The cells of the search: accuracy on held-out images, mean over seeds."""
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
