"""Assess what recorded logits can teach, before a student is trained."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import combinations

import numpy as np
import scipy.special
from datasets import Dataset

from ..checks import check_numbers
from ..data.classes import check_labels, class_names, label_ids
from ..data.columns import LABEL, as_image_table, require_table
from ..evaluation import RunningMetrics, log_mean_probability, log_softmax
from ..logits.encoding import StoredLogits, column_name, describe_column, recorded_teachers
from ..logits.provenance import described_teachers


# Logits that are read at once.
_BLOCK_VALUES = 2**20
_OF_A_TEACHER = ("accuracy", "expected_calibration_error", "entropy", "view_divergence")
_OF_THE_ENSEMBLE = ("accuracy", "negative_log_likelihood", "expected_calibration_error")


def logits_metrics(
    dataset: Dataset,
    *,
    temperature: float = 4.0,
    num_rows: int = 1000,
    seed: int = 0,
    label_column: str | None = None,
) -> dict[str, float]:
    """Measure what the recorded logits of a table can teach, and whether views and further teachers add to it.

    Args:
        dataset: a recorded table.
        temperature: the student matches the softmax at this temperature.
        num_rows: rows in the random sample, with all their views.
        seed: seed of the sample.
        label_column: the label column; found if not given.

    Returns:
        Means over rows and views. Entropies and Jensen–Shannon divergences (Lin 1991, equation 5.1) are in nats.
            - `<teacher>_accuracy` and `<teacher>_expected_calibration_error`, of the rows with a label, if there are any;
              with several teachers, `ensemble_accuracy`, `ensemble_negative_log_likelihood` (nats) and
              `ensemble_expected_calibration_error` of their mean probability at temperature 1;
            - `<teacher>_entropy`; near log(C), the logits hardly distinguish the classes;
            - `<teacher>_view_divergence`, with views: how much a prediction depends on the view. Near 0, one view of each
              image would teach as much;
            - `<one>_<other>_agreement`: the share of views for which two teachers predict the same class;
            - `<one>_<other>_divergence`; near 0, one of the two would teach as much.

    Raises:
        TypeError: `dataset` is not one table.
        ValueError: the table is empty, holds no logits, or has a label that is no class.
    """
    require_table(dataset, "dataset")
    _check_sampling(temperature, num_rows, seed)
    names = recorded_teachers(dataset)
    if len(dataset) == 0 or not names:
        columns = ", ".join(dataset.column_names)
        raise ValueError(f"There are no logits in these {len(dataset)} rows of {columns}. Pass a recorded table.")
    dataset = as_image_table(dataset, label_column=label_column, needs_image=False, needs_label=None)
    return _measure(dataset, _sample(np.arange(len(dataset)), num_rows, seed), temperature)


def assess_table(
    tables: Mapping[str, Dataset],
    *,
    temperature: float = 4.0,
    num_rows: int = 10_000,
    seed: int = 0,
    label_column: str | None = None,
) -> dict:
    """Measure what is known about a recorded table before a student is trained. No model runs, and the test split stays
    closed.

    Args:
        tables: the splits of the table: "train" and, for figures on new images, "validation".
        temperature: the student matches the softmax at this temperature.
        num_rows: rows in each random sample: of training rows with a label, of those without, and of the validation split.
        seed: seed of the samples.
        label_column: the label column; found if not given.

    Returns:
        A dict for JSON.
            - `rows`: the numbers of `labelled` and `unlabelled` training rows, and of `validation` rows;
            - `metrics`: what [`logits_metrics`] returns for each of these three that has rows and logits;
            - `memorization`: teacher → its accuracy on labelled training rows minus that on the validation split;
            - `ensemble_gain`: accuracy of the teachers' mean probability on the validation split minus that of the best
              teacher; `None` if it is not known;
            - `missing`: sentences about figures that cannot be given, and what to do.

    Raises:
        TypeError: `tables` is not a mapping of tables.
        ValueError: there is no training split, it has no rows or logits, or a label is no class.
    """
    if not isinstance(tables, Mapping):
        raise TypeError(
            f'tables is a {type(tables).__name__}. Pass the splits of a recorded table: {{"train": table}}.'
        )
    _check_sampling(temperature, num_rows, seed)
    if "train" not in tables:
        raise ValueError(
            f'tables has the splits {", ".join(tables) or "none"}. Name the one of the training images "train".'
        )
    splits = {}
    for name in ("train", "validation"):
        if name in tables:
            require_table(tables[name], f'tables["{name}"]')
            splits[name] = as_image_table(tables[name], label_column=label_column, needs_image=False, needs_label=None)
    names = {name: recorded_teachers(table) for name, table in splits.items()}
    if len(splits["train"]) == 0 or not names["train"]:
        raise ValueError(
            f'tables["train"] has {len(splits["train"])} rows of {", ".join(splits["train"].column_names)}, without logits. '
            "Record it with record_teacher_logits."
        )
    labels = {name: _labels(table) for name, table in splits.items()}
    groups = {
        "labelled": ("train", np.flatnonzero(labels["train"] != -1)),
        "unlabelled": ("train", np.flatnonzero(labels["train"] == -1)),
        "validation": ("validation", np.arange(len(labels.get("validation", ())))),
    }
    metrics = {
        group: _measure(splits[name], _sample(rows, num_rows, seed), temperature)
        for group, (name, rows) in groups.items()
        if len(rows) and names[name]
    }
    trained, new = metrics.get("labelled", {}), metrics.get("validation", {})
    accuracies = {name: new[f"{name}_accuracy"] for name in names.get("validation", ()) if f"{name}_accuracy" in new}
    trained = {name: trained[f"{name}_accuracy"] for name in accuracies if f"{name}_accuracy" in trained}
    gain = new["ensemble_accuracy"] - max(accuracies.values()) if "ensemble_accuracy" in new else None
    return {
        "rows": {group: len(rows) for group, (_, rows) in groups.items()},
        "metrics": metrics,
        "memorization": {name: value - accuracies[name] for name, value in trained.items()},
        "ensemble_gain": gain,
        "missing": list(_missing(names, labels)),
    }


def _missing(names, labels) -> Iterator[str]:
    """What is not known, why, and what to do; both arguments map splits: to the names of teachers, and to labels (N,)."""
    if (labels["train"] == -1).all():
        yield "Memorization is not known, because no training row has a label. Record the labelled images as well."
    unknown = "Accuracy and calibration on new images, and memorization, are not known"
    if "validation" not in names:
        yield f"{unknown}, because the table has no validation split. Record all splits of the images."
        return
    absent = [name for name in names["train"] if name not in names["validation"]]
    if absent:
        yield (
            f"{unknown} for {', '.join(absent)}, because the validation split has no logits of theirs. Record that split with "
            "these teachers."
        )
    if (labels["validation"] == -1).all():
        yield f"{unknown}, because no validation row has a label. Add the labels."


def _check_sampling(temperature, num_rows, seed):
    check_numbers(1, whole=True, num_rows=num_rows)
    check_numbers(0, whole=True, seed=seed)
    check_numbers(1e-6, temperature=temperature)


def _sample(rows, count, seed):
    """At most `count` of these rows, in the order of the table, which a disk reads fastest."""
    return np.sort(np.random.default_rng(seed).choice(rows, size=min(count, len(rows)), replace=False))


def _labels(dataset):
    is_named = LABEL in dataset.column_names
    return check_labels(dataset, unlabelled=True) if is_named else label_ids(dataset)


def _measure(dataset: Dataset, sample: np.ndarray, temperature: float) -> dict[str, float]:
    """The metrics of these rows of a table that passed the door, block by block."""
    names, is_named = recorded_teachers(dataset), LABEL in dataset.column_names
    described = {teacher["name"]: len(teacher["label_names"]) for teacher in described_teachers(dataset)}
    columns, size = {}, len(sample)
    for name in names:
        column = column_name(name)
        _, num_views, num_classes = describe_column(dataset.features[column])
        num_classes = len(class_names(dataset)) if is_named else described.get(name, num_classes)
        views = [None] if num_views is None else range(num_views)
        columns[name] = StoredLogits(dataset, column), views, num_classes
        size = min(size, max(1, _BLOCK_VALUES // (len(views) * num_classes)))
    labels, sums = _labels(dataset.select(sample)), defaultdict(float)
    # Those of each teacher, and of the mean probability of several.
    of_labels = {name: RunningMetrics() for name in (names if len(names) == 1 else [*names, "ensemble"])}
    for start in range(0, len(sample), size):
        rows, own = sample[start : start + size], labels[start : start + size]
        probabilities, predictions = {}, []
        for name, (stored, views, num_classes) in columns.items():
            # Only top-k logits depend on the temperature.
            read = {
                tau: np.stack([stored.read(rows, num_classes, view, tau) for view in views]).astype(np.float32)
                for tau in ({temperature} if stored.encoding.top_k is None else {temperature, 1.0})
            }
            logits = read[temperature]
            predictions.append(read.get(1.0, logits)[:, own != -1])
            values = probabilities[name] = np.exp(log_softmax(logits / temperature))
            sums[f"{name}_entropy"] += len(rows) * float(_entropy(values).mean())
            if views != [None]:
                sums[f"{name}_view_divergence"] += len(rows) * _divergence(values)
        if len(names) > 1:
            predictions.append(log_mean_probability(np.stack(predictions)))
        for running, logits in zip(of_labels.values(), predictions):
            if logits.size:
                running.update(logits.reshape(-1, logits.shape[-1]), np.tile(own[own != -1], len(logits)))
        for first, second in combinations(probabilities, 2):
            pair = np.stack([probabilities[first], probabilities[second]])
            is_same = pair[0].argmax(-1) == pair[1].argmax(-1)
            sums[f"{first}_{second}_agreement"] += len(rows) * float(is_same.mean())
            sums[f"{first}_{second}_divergence"] += len(rows) * _divergence(pair)
    found = {name: total / len(sample) for name, total in sums.items()}
    of_teachers = [f"{name}_{metric}" for name in names for metric in _OF_A_TEACHER]
    shown = [*of_teachers, *(f"ensemble_{metric}" for metric in _OF_THE_ENSEMBLE), *found]
    found |= {f"{name}_{metric}": v for name, one in of_labels.items() for metric, v in one.compute().items()}
    return {name: found[name] for name in shown if name in found}


def _entropy(probabilities):
    return -scipy.special.xlogy(probabilities, probabilities).sum(-1)


def _divergence(distributions):
    """Jensen–Shannon divergence of the distributions along the first axis, mean over the others."""
    return float((_entropy(distributions.mean(0)) - _entropy(distributions).mean(0)).mean())
