"""Assess what recorded logits can teach, before a student is trained."""

from itertools import combinations

import numpy as np
import scipy.special
from datasets import Dataset

from ..checks import check_numbers
from ..data.classes import check_labels, class_names, label_ids
from ..data.columns import LABEL, as_image_table, require_table
from ..evaluation import classification_metrics, log_mean_probability, log_softmax
from ..logits.encoding import StoredLogits, column_name, describe_column, recorded_teachers
from ..logits.provenance import described_teachers


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
            - `<teacher>_accuracy`, of the rows with a label, if there are any; with several teachers, `ensemble_accuracy`,
              `ensemble_negative_log_likelihood` (nats) and `ensemble_expected_calibration_error` of their mean probability
              at temperature 1. These bound what a student can learn;
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
    check_numbers(1, whole=True, num_rows=num_rows)
    check_numbers(0, whole=True, seed=seed)
    check_numbers(1e-6, temperature=temperature)
    names = recorded_teachers(dataset)
    if len(dataset) == 0 or not names:
        columns = ", ".join(dataset.column_names)
        raise ValueError(f"There are no logits in these {len(dataset)} rows of {columns}. Pass a recorded table.")
    dataset = as_image_table(dataset, label_column=label_column, needs_image=False, needs_label=None)
    is_named = LABEL in dataset.column_names
    described = {teacher["name"]: len(teacher["label_names"]) for teacher in described_teachers(dataset)}
    sample = np.random.default_rng(seed).choice(len(dataset), size=min(num_rows, len(dataset)), replace=False)
    rows = dataset.select(sample)
    labels = check_labels(rows, unlabelled=True) if is_named else label_ids(rows)
    has_label = labels != -1
    probabilities, plain_logits, metrics = {}, [], {}
    for name in names:
        column = column_name(name)
        encoding, num_views, num_classes = describe_column(dataset.features[column])
        stored = StoredLogits(dataset, column)
        views = [None] if num_views is None else range(num_views)
        num_classes = len(class_names(dataset)) if is_named else described.get(name, num_classes)
        # Only top-k logits depend on the temperature.
        read = {
            tau: np.stack([stored.read(sample, num_classes, view, tau) for view in views]).astype(np.float32)
            for tau in ({temperature} if encoding.top_k is None else {temperature, 1.0})
        }
        logits, plain = read[temperature], read.get(1.0, read[temperature])
        values = probabilities[name] = np.exp(log_softmax(logits / temperature))
        plain_logits.append(plain[:, has_label])
        if has_label.any():
            metrics[f"{name}_accuracy"] = float((plain.argmax(-1) == labels)[:, has_label].mean())
        metrics[f"{name}_entropy"] = float(_entropy(values).mean())
        if num_views is not None:
            metrics[f"{name}_view_divergence"] = _divergence(values)
    if len(names) > 1 and has_label.any():
        ensemble = log_mean_probability(np.stack(plain_logits))
        views_of_labels = np.tile(labels[has_label], len(ensemble))
        ensemble = ensemble.reshape(len(views_of_labels), -1)
        measured = classification_metrics(ensemble, views_of_labels)
        for name in ("accuracy", "negative_log_likelihood", "expected_calibration_error"):
            metrics[f"ensemble_{name}"] = measured[name]
    for first, second in combinations(probabilities, 2):
        pair = np.stack([probabilities[first], probabilities[second]])
        metrics[f"{first}_{second}_agreement"] = float((pair[0].argmax(-1) == pair[1].argmax(-1)).mean())
        metrics[f"{first}_{second}_divergence"] = _divergence(pair)
    return metrics


def _entropy(probabilities):
    return -scipy.special.xlogy(probabilities, probabilities).sum(-1)


def _divergence(distributions):
    """Jensen–Shannon divergence of the distributions along the first axis, mean over the others."""
    return float((_entropy(distributions.mean(0)) - _entropy(distributions).mean(0)).mean())
