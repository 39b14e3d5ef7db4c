"""What recorded logits can teach, against loops over rows and views with scipy's entropy and divergence."""

import numpy as np
import PIL.Image
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, DatasetInfo, Features, Image
from scipy.spatial.distance import jensenshannon
from scipy.special import softmax
from scipy.stats import entropy
from transformers import set_seed

import hf_ibdistill.recording.assessment
from hf_ibdistill import (
    IBResNetConfig,
    IBResNetForImageClassification,
    ImageClassificationTrainer,
    ImageTrainingArguments,
    ViewRecipe,
    assess_table,
    build_image_processor,
    class_config,
    load_image_dataset,
    logits_metrics,
    record_teacher_logits,
    select_per_class,
)
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


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A recorded table of digits, of which 60 training images have a label and 40 have none, with two views; of two teachers
    that trained on the labelled ones for a few steps."""
    folder = tmp_path_factory.mktemp("digits")
    splits = load_image_dataset("digits")
    splits["train"] = select_per_class(select_per_class(splits["train"], 10), 6, keep_rest=True)
    splits["validation"] = splits["validation"].select(range(50))
    labelled, teachers = splits["train"].filter(lambda label: label is not None, input_columns="label"), {}
    for name, preset in (("conv", "convolution-small"), ("inv", "involution-small")):
        shape = {"depths": (1, 1, 1), "hidden_sizes": (16, 16, 32)}
        config = IBResNetConfig.from_preset(preset, **shape, **class_config(labelled))
        processor = build_image_processor(labelled)
        set_seed(0)
        args = ImageTrainingArguments(
            folder / name,
            max_steps=30,
            learning_rate=1e-2,
            use_cpu=True,
            eval_strategy="no",
            report_to=[],
            save_strategy="no",
        )
        model = IBResNetForImageClassification(config)
        ImageClassificationTrainer(model, args, train_dataset=labelled, processing_class=processor).train()
        teachers[name] = model, processor
    views = ViewRecipe(num_views=2)
    return record_teacher_logits(splits, teachers, views=views, dtype="float32", output_dir=folder / "table")


def test_the_figures_of_a_recorded_table(digits):
    """Against sums over its columns."""
    tau, p, labels = 3.0, {}, {}
    for split in ("train", "validation"):
        labels[split] = np.array([-1 if label is None else label for label in digits[split]["label"]])
        for name in ("conv", "inv"):
            logits = np.array(digits[split][f"{name}_logits"][:], float)
            # Views come first. The validation split has the images alone.
            p[split, name] = logits.transpose(1, 0, 2) if split == "train" else logits[None]
    is_labelled = labels["train"] != -1
    groups = {
        "labelled": ("train", is_labelled),
        "unlabelled": ("train", ~is_labelled),
        "validation": ("validation", slice(None)),
    }
    found = assess_table(digits, temperature=tau)
    assert found["rows"] == {"labelled": 60, "unlabelled": 40, "validation": 50} and found["missing"] == []
    right = {}
    for group, (split, rows) in groups.items():
        logits = {name: p[split, name][:, rows] for name in ("conv", "inv")}
        own, metrics = labels[split][rows], found["metrics"][group]
        plain = {name: softmax(values, axis=-1) for name, values in logits.items()}
        plain["ensemble"] = (plain["conv"] + plain["inv"]) / 2
        for name, values in plain.items():
            right[group, name] = (values.argmax(-1) == own).mean()
            if group == "unlabelled":
                assert f"{name}_accuracy" not in metrics and f"{name}_expected_calibration_error" not in metrics
                continue
            assert metrics[f"{name}_accuracy"] == pytest.approx(right[group, name])
            error = calibration_error(values.transpose(1, 0, 2), own)
            assert metrics[f"{name}_expected_calibration_error"] == pytest.approx(error, abs=1e-5)
        soft = {name: softmax(values / tau, axis=-1) for name, values in logits.items()}
        for name, values in soft.items():
            assert metrics[f"{name}_entropy"] == pytest.approx(entropy(values, axis=-1).mean(), abs=1e-5)
            if split == "train":
                divergence = jensenshannon(*values, axis=-1) ** 2
                assert metrics[f"{name}_view_divergence"] == pytest.approx(divergence.mean(), abs=1e-5)
            else:
                assert f"{name}_view_divergence" not in metrics
        divergence = jensenshannon(soft["conv"], soft["inv"], axis=-1) ** 2
        assert metrics["conv_inv_divergence"] == pytest.approx(divergence.mean(), abs=1e-5)
    # They learned something, or there would be nothing to measure.
    assert right["labelled", "conv"] > 0.15
    for name in ("conv", "inv"):
        expected = right["labelled", name] - right["validation", name]
        assert found["memorization"][name] == pytest.approx(expected)
    best = max(right["validation", "conv"], right["validation", "inv"])
    assert found["ensemble_gain"] == pytest.approx(right["validation", "ensemble"] - best)


def test_blocks_samples_and_the_test_split_change_nothing_else(digits, monkeypatch):
    found = assess_table(digits)
    assert assess_table({name: digits[name] for name in ("train", "validation")}) == found
    # Seven rows of two views and ten classes are read at once, so the last block is smaller.
    monkeypatch.setattr(hf_ibdistill.recording.assessment, "_BLOCK_VALUES", 140)
    in_blocks = assess_table(digits)
    for group, metrics in found["metrics"].items():
        assert in_blocks["metrics"][group] == pytest.approx(metrics, abs=1e-6)
    # A sample is one of each group, is that of its seed, and leaves the numbers of rows alone.
    sample = assess_table(digits, num_rows=20, seed=4)
    assert sample == assess_table(digits, num_rows=20, seed=4) != assess_table(digits, num_rows=20, seed=5)
    assert sample["rows"] == found["rows"]
    assert (20 * sample["metrics"]["validation"]["conv_accuracy"]) % 1 == pytest.approx(0, abs=1e-9)


def test_figures_that_cannot_be_given_are_named(digits):
    train, validation = digits["train"], digits["validation"]
    all_figures = assess_table(digits)
    for tables, groups, words in (
        ({"train": train}, {"labelled", "unlabelled"}, [["no validation split"]]),
        (
            {"train": train, "validation": validation.remove_columns(["conv_logits", "inv_logits"])},
            {"labelled", "unlabelled"},
            [["conv, inv", "no logits"]],
        ),
        ({"train": train, "validation": validation.remove_columns("inv_logits")}, None, [["for inv,", "no logits"]]),
        (
            {"train": train, "validation": validation.remove_columns("label")},
            None,
            [["no validation row has a label"]],
        ),
        (
            {"train": train.remove_columns("label"), "validation": validation},
            {"unlabelled", "validation"},
            [["no training row has a label"]],
        ),
    ):
        found = assess_table(tables)
        assert found["metrics"].keys() == (groups or {"labelled", "unlabelled", "validation"})
        assert len(found["missing"]) == len(words)
        assert all(word in sentence for sentence, given in zip(found["missing"], words) for word in given)
        known = {"conv": all_figures["memorization"]["conv"]} if words == [["for inv,", "no logits"]] else {}
        assert found["memorization"] == known
        # Labels of training rows are not needed for it.
        is_known = words == [["no training row has a label"]]
        assert found["ensemble_gain"] == (all_figures["ensemble_gain"] if is_known else None)


def test_what_is_no_recorded_table_is_refused(digits):
    train = digits["train"]
    for tables, kind, message in (
        (train, TypeError, "^tables is a Dataset"),
        ({"test": train}, ValueError, "^tables has the splits test"),
        ({}, ValueError, "^tables has the splits none"),
        ({"train": train.to_iterable_dataset()}, TypeError, "train"),
        ({"train": train.select([])}, ValueError, r'^tables\["train"\] has 0 rows'),
        (
            {"train": train.select_columns(["image", "label"])},
            ValueError,
            r'^tables\["train"\] has 100 rows of image, label,',
        ),
    ):
        with pytest.raises(kind, match=message):
            assess_table(tables)
    for name, value in (("num_rows", 0), ("seed", -1), ("temperature", 0.0)):
        with pytest.raises(ValueError, match=f"^{name}={value}"):
            assess_table(digits, **{name: value})
