"""Can figures of a recorded table, known before a student is trained, predict what the student will gain?

    python -m studies.data_efficiency.advice

An example is a student of the grid and the table that it learned from. A rule compares one figure of the table with a
threshold. It is fitted to the examples of all data sets but one, and asked about that one; each is left out in turn. Of many
figures, one is right by chance. So the figure is chosen on the other data sets as well. The cells support advice if its rule
is right more often than one answer for all tables, and than the rule of the better teacher's accuracy.
Reads only the cells, and writes results/data_efficiency/advice.json.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from hf_ibdistill.publishing.cards import markdown_table

from .recipes import DATASETS, METHODS
from .runs import study_folders, write
from .tables import predicted, read_cells


# Answered by the sign of a difference of test accuracies.
QUESTIONS = {
    "teachers_help": "Is a student with teachers better than one without, on labelled images alone?",
    "unlabelled_help": "Do images without labels make the student better?",
    "beats_teacher": "Is the student better than its better teacher?",
}
# With unlabelled images → the same teachers' table of labelled images.
UNLABELLED = {"both_all": "both_views", "pretrained_all": "pretrained_row"}
# Figures of a table. Those on new images are of test images here, because cells have no validation images.
FEATURES = {
    "teacher_accuracy": "accuracy of the better teacher on new images",
    "calibration_error": "its calibration error",
    "memorization": "accuracy of the teachers on labelled rows minus that on new images",
    "ensemble_gain": "accuracy of the mean probability minus that of the better teacher, on new images",
    "disagreement": "share of new images for which two teachers choose different classes",
    "divergence": "divergence between two teachers times the square of the temperature",
    "view_divergence": "divergence between views times the square of the temperature",
    "labelled": "number of labelled rows",
    "unlabelled_share": "share of rows without a label",
}
BASELINE = "teacher_accuracy"
# Not figures of a table, but of the recipe, which no advice may rest on. Cells have divergences at the temperature of the
# recipe. They shrink by its square, as long as probabilities differ little.
CONTROLS = {
    "divergence_as_trained": "divergence between two teachers at the temperature of the recipe",
    "temperature": "two teachers, and the temperature of the recipe",
}


@dataclass(frozen=True)
class Example:
    """A student: its data set, the figures of its table (NaN if the cells lack one), and the test accuracy it gained."""

    data: str
    features: Mapping[str, float]
    gain: float


def accuracy(cell: Mapping) -> float:
    return cell["metrics"]["accuracy"]


def features(cells: Mapping, method: str, images: int, seed: int) -> dict[str, float]:
    """The figures of the table that this student learned from."""
    cell, names = cells[method][images][seed], METHODS[method].teachers
    teachers = [cells[name][images][seed] for name in names]
    best, temperature, is_pair = max(teachers, key=accuracy), cell["recipe"]["temperature"], len(names) == 2
    # The first cells were made without them.
    logits = defaultdict(lambda: np.nan, cell.get("logits", {}))
    gain = disagreement = divergence = 0.0
    if is_pair:
        (mean,) = (name for name, of in METHODS.items() if of.is_ensemble and of.teachers == names)
        ensemble = cells.get(mean, {}).get(images, {}).get(seed)
        gain = np.nan if ensemble is None else accuracy(ensemble) - accuracy(best)
        disagreement = float(np.mean(predicted(teachers[0]) != predicted(teachers[1])))
        divergence = logits["_".join(names) + "_divergence"]
    return {
        "teacher_accuracy": accuracy(best),
        "calibration_error": best["metrics"]["expected_calibration_error"],
        "memorization": float(np.mean([logits[f"{n}_accuracy"] - accuracy(t) for n, t in zip(names, teachers)])),
        "ensemble_gain": gain,
        "disagreement": disagreement,
        "divergence": temperature**2 * divergence,
        "view_divergence": temperature**2 * float(np.mean([logits[f"{name}_view_divergence"] for name in names])),
        "labelled": images,
        "unlabelled_share": 1 - images / cell["rows"],
        "divergence_as_trained": divergence,
        "temperature": temperature if is_pair else np.inf,
    }


def examples(data: str, cells: Mapping) -> Iterator[tuple[str, Example]]:
    """(question, example) of the cells of a data set, method → images → seed → cell."""
    for method, by_size in cells.items():
        kind = METHODS[method]
        # Teachers of folds have memorized nothing. Of pseudo-labels, the logits are not taught.
        if kind.logits not in ("row", "views") or kind.uses_folds or kind.recipe:
            continue
        for images, seed in ((images, seed) for images, by_seed in by_size.items() for seed in by_seed):
            found = {name: of[images][seed] for name, of in cells.items() if seed in of.get(images, {})}
            if not found.keys() >= {*kind.teachers}:
                continue
            figures, reached = features(cells, method, images, seed), accuracy(found[method])
            teacher = max(accuracy(found[name]) for name in kind.teachers)
            yield "beats_teacher", Example(data, figures, reached - teacher)
            labelled = UNLABELLED.get(method)
            if labelled in found:
                # What is known before the further images are recorded, and their number.
                known = features(cells, labelled, images, seed) | {"unlabelled_share": figures["unlabelled_share"]}
                yield "unlabelled_help", Example(data, known, reached - accuracy(found[labelled]))
            if labelled is None and "undistilled" in found:
                yield "teachers_help", Example(data, figures, reached - accuracy(found["undistilled"]))


@dataclass(frozen=True)
class Rule:
    """Yes if the figure is above the threshold, or below it. Without the figure, or a `feature`, there is one answer."""

    feature: str | None
    threshold: float
    is_yes_above: bool
    otherwise: bool
    # Of the examples that it was fitted to.
    rate: float

    def __call__(self, example: Example) -> bool:
        value = np.nan if self.feature is None else example.features[self.feature]
        return self.otherwise if np.isnan(value) else bool((value > self.threshold) == self.is_yes_above)


def shares(given: Sequence[Example]) -> np.ndarray:
    """The weight of each example; all data sets have the same."""
    names = [example.data for example in given]
    return np.array([1 / names.count(name) for name in names]) / len(set(names))


def fit(given: Sequence[Example], feature: str | None) -> Rule:
    """The rule that is right most often. Of equal ones, it is the constant answer, or that of the widest gap around the
    threshold."""
    weights, answers = shares(given), np.array([example.gain > 0 for example in given])
    otherwise = bool(weights @ answers >= 0.5)
    best = Rule(None, np.nan, True, otherwise, float(weights @ (answers == otherwise)))
    values = np.array([np.nan if feature is None else example.features[feature] for example in given])
    known = np.unique(values[np.isfinite(values)])
    for _, threshold in sorted(zip(np.diff(known), (known[1:] + known[:-1]) / 2), reverse=True):
        for is_yes_above in (True, False):
            rule = Rule(feature, float(threshold), is_yes_above, otherwise, 0.0)
            rate = float(weights @ [rule(example) == answer for example, answer in zip(given, answers)])
            if rate > best.rate + 1e-9:
                best = Rule(feature, float(threshold), is_yes_above, otherwise, rate)
    return best


def fit_best(given: Sequence[Example]) -> Rule:
    """The best rule of all figures."""
    return max((fit(given, feature) for feature in FEATURES), key=lambda rule: rule.rate)


def left_out(given: Sequence[Example]) -> Iterator[tuple[str, list[Example], list[Example]]]:
    """For each data set: its name, the examples of the others, and its own."""
    for data in dict.fromkeys(example.data for example in given):
        yield data, *([e for e in given if (e.data == data) is is_own] for is_own in (False, True))


def hits(given: Sequence[Example], how: Callable[[Sequence[Example]], Rule]) -> dict:
    """How often rules are right about a data set that `how` did not fit them to."""
    by_data = {}
    for data, others, own in left_out(given):
        rule = how(others)
        by_data[data] = [sum(rule(example) == (example.gain > 0) for example in own), len(own)]
    rate = float(np.mean([right / count for right, count in by_data.values()]))
    return {"right": sum(right for right, _ in by_data.values()), "rate": round(rate, 4), "by_data": by_data}


def mean_error(given: Sequence[Example], feature: str | None) -> float:
    """Mean distance of the gain from a line in the figure that was fitted to the other data sets; without a `feature`, from
    their mean. NaN if an example lacks the figure."""
    errors = []
    for _, others, own in left_out(given):

        def design(rows):
            return np.array([[1, 0 if feature is None else row.features[feature]] for row in rows], float)

        if not (np.isfinite(design(others)).all() and np.isfinite(design(own)).all()):
            return np.nan
        roots = np.sqrt(shares(others))
        line = np.linalg.lstsq(design(others) * roots[:, None], [e.gain for e in others] * roots, rcond=None)[0]
        errors.append(np.abs(design(own) @ line - [e.gain for e in own]).mean())
    return float(np.mean(errors))


def assess(given: Sequence[Example]) -> dict:
    """How well each rule answers a question, and the figure that supports advice, if there is one."""
    rules = {"constant": partial(fit, feature=None), "best_on_the_others": fit_best}
    rules |= {feature: partial(fit, feature=feature) for feature in (*FEATURES, *CONTROLS)}
    found = {name: hits(given, how) for name, how in rules.items()}
    for name in ("constant", *FEATURES):
        error = mean_error(given, None if name == "constant" else name)
        found[name]["mean_error"] = None if np.isnan(error) else round(error, 4)
    baselines, chosen = (found["constant"], found[BASELINE]), found["best_on_the_others"]
    is_better = all(chosen[measure] > max(one[measure] for one in baselines) for measure in ("right", "rate"))
    yes = sum(example.gain > 0 for example in given)
    # What the other data sets say most often can be wrong here most of the time, which is easy to beat. Advice must also be right
    # more often than the more frequent answer of all.
    is_better = is_better and chosen["right"] > max(yes, len(given) - yes)
    return {
        "examples": len(given),
        "yes": yes,
        "rules": found,
        "supported": fit_best(given).feature if is_better else None,
    }


def read_examples() -> dict[str, list[Example]]:
    """Question → the examples of all committed cells."""
    found = {question: [] for question in QUESTIONS}
    for name, data in DATASETS.items():
        cells = read_cells(study_folders(name, None, None)[0] / "grid").get("base", {})
        # Two studies of the same images are one data set.
        for question, example in examples(data.title, cells):
            found[question].append(example)
    return found


def table(found: Mapping) -> str:
    """The hit rates of a question, in Markdown."""
    header = ["rule", "right", *found["rules"]["constant"]["by_data"], "mean of data sets", "points off"]
    rows = []
    for name, rule in found["rules"].items():
        error = rule.get("mean_error")
        parts = [f"{right} of {count}" for right, count in rule["by_data"].values()]
        points = "–" if error is None else f"{100 * error:.1f}"
        rows.append([name, f"{rule['right']} of {found['examples']}", *parts, f"{100 * rule['rate']:.0f} %", points])
    return markdown_table(header, rows)


@dataclass
class AdviceArguments:
    output_file: str = HfArg(default="results/data_efficiency/advice.json", help="Where to write the hit rates.")


def main(arguments=None):
    parser = HfArgumentParser(AdviceArguments, description=__doc__.splitlines()[0])
    (args,) = parser.parse_args_into_dataclasses(arguments)
    found = {question: assess(given) for question, given in read_examples().items()}
    write(Path(args.output_file), found)
    for question, answers in found.items():
        print(f"{QUESTIONS[question]} Yes for {answers['yes']} of {answers['examples']}.\n\n{table(answers)}")
        print(f"\nFigure that supports advice: {answers['supported'] or 'none'}\n")


if __name__ == "__main__":
    main()
