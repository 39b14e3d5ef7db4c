"""What recorded logits can teach, against loops over rows and views with scipy's entropy and divergence."""

import numpy as np
import PIL.Image
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, DatasetInfo, Features, Image
from scipy.spatial.distance import jensenshannon
from scipy.special import softmax
from scipy.stats import entropy

from hf_ibdistill import logits_metrics
from hf_ibdistill.logits.encoding import LogitsEncoding


NUM_CLASSES = 4


def images_and_labels(rows):
    random = np.random.default_rng(3)
    features = Features({"image": Image(), "label": ClassLabel(num_classes=NUM_CLASSES)})
    images = [PIL.Image.fromarray(random.integers(0, 256, (8, 8), dtype=np.uint8)) for _ in range(rows)]
    return Dataset.from_dict({"image": images, "label": random.integers(0, NUM_CLASSES, rows)}, features=features)


def add_logits(dataset, values, top_k=None):
    """Columns as recording writes them, of logits (rows, classes) or (rows, views, classes)."""
    encoding = LogitsEncoding("float32", top_k)
    features, columns = dataset.features.copy(), dataset.data.table
    for name, logits in values.items():
        num_views = logits.shape[1] if logits.ndim == 3 else None
        features[f"{name}_logits"] = encoding.feature(logits.shape[-1], num_views)
        columns = columns.append_column(f"{name}_logits", encoding.encode(logits, views=num_views is not None))
    return Dataset(columns, info=DatasetInfo(features=features))


def views_table(rows=9, views=3):
    """Logits of two teachers on views, and of a third that predicts the same for every view."""
    random = np.random.default_rng(3)
    values = {name: 3 * random.normal(size=(rows, views, NUM_CLASSES)).astype(np.float32) for name in ("conv", "inv")}
    values["fixed"] = np.repeat(values["conv"][:, :1], views, axis=1)
    return add_logits(images_and_labels(rows), values), values


def calibration_error(probabilities, labels):
    """Of (rows, views, classes), in 15 bins, one by one."""
    predictions = [(view.max(), view.argmax() == label) for row, label in zip(probabilities, labels) for view in row]
    total = 0.0
    for i in range(15):
        inside = [(p, right) for p, right in predictions if i / 15 < p <= (i + 1) / 15]
        total += abs(sum(right for _, right in inside) - sum(p for p, _ in inside))
    return total / len(predictions)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_metrics_equal_a_loop_over_rows_and_views(temperature):
    dataset, logits = views_table()
    labels = np.array(dataset["label"][:])
    p = {name: softmax(values.astype(np.float64) / temperature, axis=-1) for name, values in logits.items()}
    rows, views = range(len(dataset)), range(3)
    expected = {}
    for name in p:
        expected[f"{name}_accuracy"] = np.mean([p[name][n, v].argmax() == labels[n] for n in rows for v in views])
        plain = softmax(logits[name].astype(np.float64), axis=-1)
        expected[f"{name}_expected_calibration_error"] = calibration_error(plain, labels)
        expected[f"{name}_entropy"] = np.mean([entropy(p[name][n, v]) for n in rows for v in views])
        # The mean divergence of the views from their mean.
        expected[f"{name}_view_divergence"] = np.mean(
            [entropy(p[name][n, v], p[name][n].mean(0)) for n in rows for v in views]
        )
    for first, second in [("conv", "inv"), ("conv", "fixed"), ("inv", "fixed")]:
        pairs = [(p[first][n, v], p[second][n, v]) for n in rows for v in views]
        expected[f"{first}_{second}_agreement"] = np.mean([a.argmax() == b.argmax() for a, b in pairs])
        expected[f"{first}_{second}_divergence"] = np.mean([jensenshannon(a, b) ** 2 for a, b in pairs])
    mean = np.mean([softmax(values.astype(np.float64), axis=-1) for values in logits.values()], axis=0)
    expected["ensemble_accuracy"] = np.mean([mean[n, v].argmax() == labels[n] for n in rows for v in views])
    expected["ensemble_negative_log_likelihood"] = np.mean(
        [-np.log(mean[n, v, labels[n]]) for n in rows for v in views]
    )
    expected["ensemble_expected_calibration_error"] = calibration_error(mean, labels)
    found = logits_metrics(dataset, temperature=temperature)
    assert found == pytest.approx(expected, abs=1e-6)
    assert found["fixed_view_divergence"] == pytest.approx(0, abs=1e-12) and found["conv_view_divergence"] > 0.01
    # Shuffling does not change them, nor does a sample of all rows.
    assert logits_metrics(dataset.shuffle(seed=1), temperature=temperature, num_rows=9) == pytest.approx(found)


def test_the_metrics_of_a_sample_of_a_table_without_views():
    random = np.random.default_rng(1)
    logits = {name: random.normal(size=(40, NUM_CLASSES)).astype(np.float32) for name in ("conv", "i")}
    dataset = add_logits(images_and_labels(40), logits)
    found = logits_metrics(dataset)
    assert found.keys() == {
        "conv_accuracy", "conv_expected_calibration_error", "conv_entropy", "i_accuracy", "i_expected_calibration_error",
        "i_entropy", "conv_i_agreement", "conv_i_divergence",
        "ensemble_accuracy", "ensemble_negative_log_likelihood", "ensemble_expected_calibration_error",
    }  # fmt: skip
    labels = np.array(dataset["label"][:])
    assert found["i_accuracy"] == pytest.approx((logits["i"].argmax(1) == labels).mean())
    sample = np.random.default_rng(5).choice(40, size=12, replace=False)
    assert logits_metrics(dataset, num_rows=12, seed=5) == pytest.approx(logits_metrics(dataset.select(sample)))


def test_the_metrics_of_top_k_logits_are_those_of_what_a_student_reads():
    dataset, logits = views_table()
    stored = add_logits(images_and_labels(9), {"conv": logits["conv"]}, top_k=3)
    # Three of four classes are stored and the fourth is the rest, so nothing is lost.
    expected = logits_metrics(dataset.select_columns(["image", "label", "conv_logits"]))
    assert logits_metrics(stored) == pytest.approx(expected, abs=1e-2)


def test_a_label_column_of_another_name():
    dataset, _ = views_table()
    named = dataset.rename_columns({"image": "picture", "label": "animal"})
    assert logits_metrics(named, label_column="animal") == logits_metrics(named) == logits_metrics(dataset)
    with pytest.raises(ValueError, match='label_column="label"'):
        logits_metrics(named, label_column="label")


def is_of_labelled_rows(name):
    return name.startswith("ensemble") or name.endswith(("_accuracy", "_calibration_error"))


def test_accuracies_are_those_of_the_rows_with_a_label():
    dataset, logits = views_table()
    labels = [None if n in (1, 4) else label for n, label in enumerate(dataset["label"])]
    mixed = Dataset.from_dict({**dataset[:], "label": labels}, features=dataset.features)
    labelled = dataset.select([n for n in range(9) if n not in (1, 4)])
    found, of_labels, of_all = map(logits_metrics, (mixed, labelled, dataset))
    for name, value in found.items():
        is_of_labels = is_of_labelled_rows(name)
        assert value == pytest.approx((of_labels if is_of_labels else of_all)[name], abs=1e-9), name
    # Without labels, what needs none.
    unnamed = logits_metrics(dataset.remove_columns("label"))
    assert unnamed == pytest.approx({name: of_all[name] for name in unnamed}) and "conv_i" not in unnamed
    assert of_all.keys() - unnamed.keys() == {name for name in of_all if is_of_labelled_rows(name)}


def test_a_label_that_is_no_class_is_refused():
    dataset, _ = views_table()
    position = dataset.column_names.index("label")
    columns = dataset.data.table.set_column(position, "label", [[NUM_CLASSES] * len(dataset)])
    with pytest.raises(ValueError, match=rf"9 rows .*\[{NUM_CLASSES}\]"):
        logits_metrics(Dataset(columns, info=dataset.info))


def test_tables_without_logits_or_rows_are_refused():
    dataset, _ = views_table()
    plain = images_and_labels(40)
    for table, kind, message in (
        (plain, ValueError, "no logits in these 40 rows of image, label"),
        (dataset.select([]), ValueError, "no logits in these 0 rows"),
        (DatasetDict({"train": dataset}), TypeError, "^dataset .*train"),
    ):
        with pytest.raises(kind, match=message):
            logits_metrics(table)
