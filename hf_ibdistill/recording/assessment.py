"""Assess what recorded logits can teach, before a student is trained."""

from itertools import combinations

import numpy as np
import scipy.special
from datasets import Dataset

from ..checks import check_numbers
from ..data.classes import class_names
from ..data.columns import LABEL, as_image_table, require_table
from ..evaluation import log_softmax
from ..logits.encoding import StoredLogits, column_name, describe_column, recorded_teachers


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
        Means over rows and views; entropies and Jensen–Shannon divergences (Lin 1991, equation 5.1) in nats:
            - `<teacher>_accuracy`;
            - `<teacher>_entropy`; near log(C), the logits hardly distinguish the classes;
            - `<teacher>_view_divergence`, with views: how much a prediction depends on the view. Near 0, one view of each
              image would teach as much;
            - `<one>_<other>_agreement`: the share of views for which two teachers predict the same class;
            - `<one>_<other>_divergence`; near 0, one of the two would teach as much.

    Raises:
        TypeError: `dataset` is not one table.
        ValueError: the table is empty, or holds no logits or no labels.
    """
    require_table(dataset, "dataset")
    check_numbers(1, whole=True, num_rows=num_rows)
    check_numbers(0, whole=True, seed=seed)
    check_numbers(1e-6, temperature=temperature)
    names = recorded_teachers(dataset)
    if len(dataset) == 0 or not names:
        raise ValueError(
            f"There are no logits in these {len(dataset)} rows of {', '.join(dataset.column_names)}. Pass a table made by "
            "record_teacher_logits."
        )
    dataset = as_image_table(dataset, label_column=label_column)
    num_classes = len(class_names(dataset))
    sample = np.random.default_rng(seed).choice(len(dataset), size=min(num_rows, len(dataset)), replace=False)
    labels = np.asarray(dataset.select_columns([LABEL])[sample][LABEL])
    probabilities, metrics = {}, {}
    for name in names:
        column = column_name(name)
        num_views = describe_column(dataset.features[column])[1]
        stored = StoredLogits(dataset, column)
        views = [None] if num_views is None else range(num_views)
        logits = np.stack([stored.read(sample, num_classes, view, temperature) for view in views])
        values = probabilities[name] = np.exp(log_softmax(logits.astype(np.float32) / temperature))
        metrics[f"{name}_accuracy"] = float((values.argmax(-1) == labels).mean())
        metrics[f"{name}_entropy"] = float(_entropy(values).mean())
        if num_views is not None:
            metrics[f"{name}_view_divergence"] = _divergence(values)
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
