"""The report of a run, and the comparison of several: one HTML page that needs no other file and no network."""

import base64
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np
from datasets import Dataset
from transformers import AutoImageProcessor, BaseImageProcessor, PreTrainedModel

from ..data.classes import labelled_rows
from ..data.columns import IMAGE
from ..data.sources import public_name
from ..evaluation import accuracy_interval, paired_difference, predict, token_attention
from ..files import read_json, user_path, write_text
from ..models.modeling_ibvit import IBViTForImageClassification
from ..rows import ImageRows
from ..teachers import load_classifier
from .cards import TEMPLATES, in_a_line
from .picture import (
    LETTERS,
    MATRIX_CLASSES,
    Example,
    class_accuracies,
    confused_pairs,
    curve,
    drawn_names,
    plot_attention,
    plot_calibration,
    plot_class_differences,
    plot_classes,
    plot_curves,
    plot_examples,
    shorten,
)
from .predictions import PREDICTIONS, Predictions, Rows


logger = logging.getLogger(__name__)

RESULTS, REPORT, PICTURES = "results.json", "report.html", "pictures"
KINDS = ("curves", "classes", "calibration", "examples", "attention")
# Photos are reduced to this side, in pixels.
_LARGEST = 1024
_MISSING = (
    f"There is no {PREDICTIONS} in this folder, as in those of version 0.1.0. `hf-ibdistill report RUN --dataset DATASET` "
    "predicts the images and fills this part."
)
_NO_IMAGES = "`hf-ibdistill report RUN --dataset DATASET` adds images."


class Picture(NamedTuple):
    """A PNG, and what it shows for those who do not see it."""

    png: bytes
    alt: str


@dataclass
class Run:
    """A finished run: a name, the facts of its `results.json`, and the predictions for each row, if they are known."""

    name: str
    results: Mapping[str, object]
    predictions: Predictions | None = None
    folder: Path | None = None
    images: dict[str, Picture] = field(default_factory=dict)


# Read runs


def read_runs(folders: Sequence[str | os.PathLike]) -> list[Run]:
    """The runs in these folders. Their names are the shortest ends of the paths that differ.

    Raises:
        ValueError: a folder holds no run, is given twice, or holds damaged files.
    """
    paths = [Path(user_path(folder, "runs")) for folder in folders]
    for folder, path in zip(folders, paths):
        if not (path / RESULTS).is_file():
            raise ValueError(
                f"runs={folder} holds no {RESULTS}. Give the folder of a model that train-teacher, distill, finetune or "
                "quickstart left."
            )
    paths = [path.resolve() for path in paths]
    for i, path in enumerate(paths):
        if path in paths[:i]:
            raise ValueError(f"runs={folders[i]} is given twice. Leave one out.")
    length = 1
    while len({path.parts[-length:] for path in paths}) < len(paths):
        length += 1
    runs = [_read_run(path, "/".join(path.parts[-length:])) for path in paths]
    if len(runs) == 1:
        # Pictures of images that training left. They belong to this run alone.
        (run,) = runs
        alts = run.results.get("pictures") or {}
        for kind in ("examples", "attention"):
            file = f"{PICTURES}/{kind}.png"
            if file in alts and (run.folder / file).is_file():
                run.images[kind] = Picture((run.folder / file).read_bytes(), alts[file])
    return runs


def _read_run(folder, name):
    predictions = Predictions.load(folder / PREDICTIONS) if (folder / PREDICTIONS).exists() else None
    return Run(name, read_json(folder / RESULTS), predictions, folder)


def check_same_rows(runs: Sequence[Run]) -> None:
    """Refuse to compare runs that were measured on different rows.

    Raises:
        ValueError: they differ in split, classes, labels or images; the message names both runs.
    """
    first, *others = runs
    for other in others:
        if first.predictions is not None and other.predictions is not None:
            difference = first.predictions.rows.difference(other.predictions.rows)
        else:
            splits = [str(run.results.get("split")) for run in (first, other)]
            difference = None if len(set(splits)) == 1 else f"the splits {' and '.join(splits)}"
        if difference is not None:
            raise ValueError(
                f"runs={first.name} and {other.name} were measured on different rows: {difference}. Compare runs of the same "
                "data and split."
            )


def add_images(runs: Sequence[Run], rows: Dataset) -> None:
    """Add the pictures of images: the most confident mistakes of a single run, or what the others gain over the first, and
    the attention of students. A run without predictions gets them.

    Args:
        runs: the runs, with their folders.
        rows: the split that they were measured on, a table that passed the door.

    Raises:
        ValueError: a run was measured on other rows.
    """
    rows = labelled_rows(rows, "The split")
    given = Rows.of(rows)
    for run in runs:
        difference = None if run.predictions is None else run.predictions.rows.difference(given)
        if difference is not None:
            raise ValueError(
                f"dataset: runs={run.name} was measured on other rows: {difference}. Give the data and the split "
                f"({run.results.get('data')}, {run.results.get('split')}) of the run."
            )
    models = {}
    for run in runs:
        model, processor = models[run.name] = (
            load_classifier(run.folder, f"runs={run.name}"),
            AutoImageProcessor.from_pretrained(run.folder),
        )
        if run.predictions is None:
            tokens = getattr(model.config, "teacher_names", None)
            run.predictions = Predictions.of_outputs(predict(model, processor, rows), rows, tokens)
    first, *others = runs
    for run in others or [first]:
        run.images = draw_images(run, rows, *models[run.name], first if others else None)


# Pictures


def draw_facts(run: Run) -> dict[str, Picture]:
    """The pictures of a run that show no image: "curves", "classes" and "calibration", as far as their facts are known."""
    pictures, history, found = {}, run.results.get("log_history") or [], run.predictions
    curves = plot_curves({run.name: history})
    if curves is not None:
        steps, accuracies = curve(history, "eval_accuracy")
        alt = "Learning curves: loss against steps."
        if len(steps):
            alt = f"Learning curves: accuracy and loss against steps. Validation accuracy ends at {_percent(accuracies[-1])}."
        pictures["curves"] = Picture(curves, alt)
    if found is not None:
        labels, predicted, names = found.rows.labels, found.predicted, found.rows.class_names
        pairs = confused_pairs(labels, predicted, len(names))[:3]
        confused = "; ".join(f"{names[true]} taken for {names[taken]} ({count:,})" for true, taken, count in pairs)
        alt = f"Confusions and accuracy of {len(names):,} classes. Most frequent: {confused or 'none'}."
        pictures["classes"] = Picture(plot_classes(labels, predicted, names), alt)
        alt = (
            f"Accuracy against confidence. Mean confidence {_percent(found.confidence.mean())}, accuracy "
            f"{_percent(found.is_right.mean())}."
        )
        pictures["calibration"] = Picture(plot_calibration({run.name: (found.confidence, found.is_right)}), alt)
    return pictures


def draw_images(
    run: Run,
    rows: Dataset,
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    baseline: Run | None = None,
) -> dict[str, Picture]:
    """The pictures of a run that show images: "examples", and "attention" of a student of this package.

    Args:
        run: a run with predictions.
        rows: the rows that were predicted, a table that passed the door.
        model, image_processor: the model of the run.
        baseline: a run on the same rows, such as one without teachers. The examples are those where the probability of the
            true class rises and falls most from it. Without it, they are the most confident mistakes.
    """
    found, names, pictures = run.predictions, drawn_names(run.predictions.rows.class_names, 12), {}
    if baseline is None:
        wrong = np.flatnonzero(~found.is_right)
        order = wrong[np.argsort(-found.confidence[wrong], kind="stable")][:12]
        groups = {"Most confident mistakes": order[:6], "": order[6:]}
        alt = "Images of the most confident mistakes, with the prediction of each token."
    else:
        gains = np.exp(found.log_probability) - np.exp(baseline.predictions.log_probability)
        order = np.argsort(-gains, kind="stable")
        what = f"{shorten(baseline.name, 40)} (probability of the true class)"
        groups = {
            f"Largest gain over {what}": [i for i in order[:6] if gains[i] > 0],
            f"Largest loss against {what}": [i for i in order[::-1][:6] if gains[i] < 0],
        }
        alt = (
            f"Images where the probability of the true class rises and falls most from {baseline.name} to {run.name}."
        )
    groups = {title: list(map(int, chosen)) for title, chosen in groups.items() if len(chosen)}
    shown = list(dict.fromkeys(i for chosen in groups.values() for i in chosen))
    looked_at = (shown or np.unique(np.linspace(0, len(rows) - 1, 6).astype(int)).tolist())[:6]
    wanted = list(dict.fromkeys([*shown, *looked_at]))
    images = {}
    for i, row in zip(wanted, ImageRows(rows).read(wanted)):
        images[i] = row[IMAGE]
        if max(images[i].size) > _LARGEST:
            images[i].thumbnail((_LARGEST, _LARGEST))

    def line(who, values, i, share=None):
        what = names[values[i]] if share is None else f"{names[values[i]]}, {_percent(share, 0)}"
        return f"{shorten(who, max(6, LETTERS - 2 - len(what)))}: {what}", bool(values[i] == found.rows.labels[i])

    def example(i):
        lines = [(f"true: {names[found.rows.labels[i]]}", None)]
        if baseline is None:
            lines.append(line("predicted", found.predicted, i, found.confidence[i]))
        else:
            # The probability of the true class, which is what changes.
            for one in (baseline, run):
                lines.append(line(one.name, one.predictions.predicted, i, np.exp(one.predictions.log_probability[i])))
        return Example(images[i], lines + [line(token, values, i) for token, values in found.tokens.items()])

    if groups:
        drawn = plot_examples({title: [example(i) for i in chosen] for title, chosen in groups.items()})
        pictures["examples"] = Picture(drawn, alt)
    if isinstance(model, IBViTForImageClassification):
        maps = token_attention(model, image_processor, [images[i] for i in looked_at])
        drawn = plot_attention([example(i) for i in looked_at], maps)
        alt = f"Where the {', '.join(maps)} look{'s' if len(maps) == 1 else ''} in the last layer, on {len(looked_at)} images."
        pictures["attention"] = Picture(drawn, alt)
    return pictures


# Pages


@dataclass
class Section:
    """A part of a page: text, pictures and tables. The first column of a table names its rows."""

    title: str
    text: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
    tables: Sequence[tuple[Sequence[str], Sequence[Sequence[str]]]] = ()
    is_folded: bool = False


def write_page(path: str | os.PathLike, title: str, sections: Sequence[Section]) -> None:
    """Write an HTML page whole or not at all. All text is escaped; there is no script and no address to load."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["base64"] = lambda content: base64.b64encode(content).decode()
    write_text(path, environment.get_template("report.html").render(title=title, sections=sections))


def write_report(path: str | os.PathLike, run: Run, pictures: Mapping[str, Picture] | None = None) -> None:
    """Write the page of a run.

    Args:
        path: the HTML file.
        run: the run.
        pictures: what [`draw_facts`] returned; drawn if not given.
    """
    pictures = {**(draw_facts(run) if pictures is None else pictures), **run.images}
    results, found = run.results, run.predictions
    metrics, teachers = results.get("metrics") or {}, dict(results.get("teachers") or {})
    if results.get("ensemble") and len(teachers) > 1:
        teachers["mean probability"] = {"metrics": results["ensemble"]}
    summary = {
        "data": results.get("data"),
        "split": results.get("split"),
        "rows": None if found is None else f"{len(found.predicted):,}",
        "accuracy": _accuracy(run),
        "parameters": _count(results.get("parameters")),
        "started from": results.get("base_model"),
        "training": _seconds(results.get("train_seconds")),
    }
    rows = [[name, *_measured(teacher)] for name, teacher in teachers.items()]
    tables = {
        "metrics": [(["metric", results.get("split") or "value"], [[k, _number(v)] for k, v in metrics.items()])],
        "teachers": [(["teacher", "from", "accuracy", "−log p"], rows)] if rows else [],
    }

    def pictured(title, kind, *text, missing=_MISSING, **more):
        if kind in pictures:
            return Section(title, text, [pictures[kind]], **more)
        return Section(title, [missing], **more)

    has_attention = "attention" in pictures or any("token" in name for name in metrics)
    sections = [
        Section(
            "Summary", [results.get("notes") or "", *_explain_interval(found)], tables=[(["", ""], _filled(summary))]
        ),
        Section("Results", tables=tables["metrics"]),
        Section("Teachers", tables=tables["teachers"]),
        pictured("Learning curves", "curves", missing="The run logged no loss and no evaluation."),
        pictured(
            "Classes", "classes", "Rows are true classes, columns predicted ones; darker is a larger share of the row."
        )
        if found is None or len(found.rows.class_names) <= MATRIX_CLASSES
        else pictured("Classes", "classes"),
        Section(
            "Each class", _numbered(found), tables=[_class_table([run])] if found is not None else [], is_folded=True
        ),
        pictured(
            "Calibration",
            "calibration",
            "On the dotted line, confidence is accuracy. Bars are 95 % intervals of the accuracy in a bin (Wilson).",
        ),
        pictured(
            "Examples",
            "examples",
            "Blue is right, orange is wrong.",
            missing=_NO_IMAGES if found is None or not found.is_right.all() else "No row is wrong.",
        ),
        pictured(
            "Attention",
            "attention",
            "Yellow is where a token looks most, in the last layer. Each map has its own scale.",
            missing=_NO_IMAGES,
        )
        if has_attention
        else Section("Attention"),
        Section("Recipe", tables=[(["setting", "value"], _filled(results.get("recipe") or {}))]),
        Section("Machine", tables=[(["", ""], _filled(results.get("machine") or {}))]),
    ]
    write_page(path, str(results.get("title") or run.name), sections)


def write_comparison(path: str | os.PathLike, runs: Sequence[Run]) -> None:
    """Write the page that compares runs with the first of them.

    Args:
        path: the HTML file.
        runs: two or more runs that [`check_same_rows`] let pass.
    """
    first, *others = runs
    known = {run.name: run.predictions for run in runs if run.predictions is not None}
    unknown = [f"{run.name}: {_MISSING}" for run in runs if run.predictions is None]
    header = ["run", "data", "accuracy", "−log p", "calibration error", "parameters", "steps", "training"]
    table = [
        [
            run.name,
            f"{run.results.get('data') or '–'}, {run.results.get('split') or '–'}",
            _accuracy(run) or "–",
            *(_number(_metric(run, name)) for name in ("negative_log_likelihood", "expected_calibration_error")),
            _count(run.results.get("parameters")) or "–",
            _count((run.results.get("recipe") or {}).get("steps")) or "–",
            _seconds(run.results.get("train_seconds")) or "–",
        ]
        for run in runs
    ]
    checked = (
        "Labels and images of the runs were compared: they are the same rows."
        if len(known) == len(runs)
        else "The folders do not show whether the runs were measured on the same rows."
    )
    sections = [Section("Runs", [checked, *_explain_interval(*known.values()), *unknown], tables=[(header, table)])]
    compared = [run for run in others if first.name in known and run.name in known]
    if compared:
        text = [
            f"Each run minus {first.name}, on the same rows, in points and nats. The 95 % intervals are Student's, of the mean "
            "of the differences over rows. They cover the choice of test images, not that of the seed."
        ]
        header = ["run", "accuracy", "95 %", "−log p", "95 %", "right here only", f"right in {first.name} only"]
        sections.append(Section("Differences", text, tables=[(header, [_difference(first, run) for run in compared])]))
    curves = plot_curves({run.name: run.results.get("log_history") or [] for run in runs})
    if curves is not None:
        alt = f"Validation accuracy and loss of {_listed(runs)} against steps."
        sections.append(Section("Learning curves", pictures=[Picture(curves, alt)]))
    if compared:
        of_runs = [first, *compared]
        names = first.predictions.rows.class_names
        accuracies = {run.name: _class_accuracies(run)[0] for run in of_runs}
        alt = f"Accuracy of each class minus that of {first.name}."
        drawn = plot_class_differences(accuracies, names)
        note = [] if len(names) <= MATRIX_CLASSES else [f"The {MATRIX_CLASSES} classes that differ most."]
        sections.append(Section("Classes", note, [Picture(drawn, alt)]))
        text = _numbered(first.predictions)
        sections.append(Section("Each class", text, tables=[_class_table(of_runs)], is_folded=True))
    if known:
        drawn = plot_calibration({name: (found.confidence, found.is_right) for name, found in known.items()})
        alt = f"Accuracy against confidence of {_listed(runs)}."
        text = [
            "On the dotted line, confidence is accuracy. Bars are 95 % intervals of the accuracy in a bin (Wilson)."
        ]
        sections.append(Section("Calibration", text, [Picture(drawn, alt)]))
    has_images = False
    for run in others:
        drawn = [run.images[kind] for kind in ("examples", "attention") if kind in run.images]
        has_images |= bool(drawn)
        text = [
            "Predicted class, and the probability of the true class. Blue is right, orange is wrong. Below, yellow is where "
            "a token looks most."
        ]
        sections.append(Section(f"{run.name} and {first.name}", text, drawn))
    if not has_images:
        text = ["`hf-ibdistill report RUN RUN --dataset DATASET` adds the images that gain most, and attention."]
        sections.append(Section("Examples", text))
    write_page(path, f"{first.name} and {', '.join(run.name for run in others)}", sections)


def _difference(first, run):
    a, b = first.predictions, run.predictions
    accuracy, *ends = (100 * x for x in paired_difference(b.is_right.astype(float), a.is_right.astype(float)))
    surprise, low, high = paired_difference(-b.log_probability.astype(float), -a.log_probability.astype(float))
    counts = [int((one.is_right & ~other.is_right).sum()) for one, other in ((b, a), (a, b))]
    return [
        run.name,
        _signed(accuracy, 2),
        " to ".join(_signed(end, 2) for end in ends),
        _signed(surprise, 4),
        f"{_signed(low, 4)} to {_signed(high, 4)}",
        *(f"{count:,}" for count in counts),
    ]


def _class_accuracies(run):
    rows = run.predictions.rows
    return class_accuracies(rows.labels, run.predictions.predicted, len(rows.class_names))


def _class_table(runs):
    """Number, name, rows and accuracy of each class; of one run, what it is most often taken for as well."""
    rows = runs[0].predictions.rows
    names, counts = rows.class_names, _class_accuracies(runs[0])[1]
    accuracies = [_class_accuracies(run)[0] for run in runs]
    table = [
        [f"#{i} {name}", f"{counts[i]:,}", *(_percent(values[i]) if counts[i] else "–" for values in accuracies)]
        for i, name in enumerate(names)
    ]
    if len(runs) > 1:
        return ["class", "rows", *(run.name for run in runs)], table
    taken_for = {}
    for true, taken, count in confused_pairs(rows.labels, runs[0].predictions.predicted, len(names)):
        taken_for.setdefault(true, f"{names[taken]} ({count:,})")
    return ["class", "rows", "accuracy", "most often taken for"], [
        [*line, taken_for.get(i, "–")] for i, line in enumerate(table)
    ]


def _numbered(found):
    if found is None:
        return [_MISSING]
    if drawn_names(found.rows.class_names) == found.rows.class_names:
        return []
    return ["Pictures shorten long names, and show the number of a class whose letters their font lacks."]


def _explain_interval(*found):
    return ["Behind an accuracy is its 95 % interval over the choice of test images (Wilson)."] if any(found) else []


def _accuracy(run):
    accuracy = _metric(run, "accuracy")
    if accuracy is None:
        return None
    if run.predictions is None:
        return _percent(accuracy, 2)
    low, high = 100 * accuracy_interval(run.predictions.is_right.sum(), len(run.predictions.predicted))
    return f"{_percent(accuracy, 2)} ({low:.2f} to {high:.2f})"


def _metric(run, name):
    return (run.results.get("metrics") or {}).get(name)


def _measured(teacher):
    metrics = teacher.get("metrics") or {}
    accuracy = metrics.get("accuracy")
    source = public_name(teacher["source"]) if teacher.get("source") else "–"
    return [
        source,
        "–" if accuracy is None else _percent(accuracy, 2),
        _number(metrics.get("negative_log_likelihood")),
    ]


def _listed(runs):
    return ", ".join(run.name for run in runs)


def _signed(value, digits):
    return f"{value:+.{digits}f}".replace("-", "−")


def _percent(share, digits=1):
    return f"{100 * share:.{digits}f} %"


def _number(value):
    return "–" if value is None else f"{value:.4f}"


def _count(value):
    return None if value is None else f"{value:,}"


def _seconds(value):
    return None if value is None else f"{value:,.1f} s"


def _filled(facts):
    """The rows of a table of these facts, without those that are not known."""
    return [[name, _shown(value)] for name, value in facts.items() if value not in (None, "")]


def _shown(value):
    if isinstance(value, Mapping) and all(isinstance(v, str) for v in value.values()):
        return in_a_line(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
