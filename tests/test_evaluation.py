"""Metrics against scikit-learn and naive loops, and predictions against the model called by hand."""

import copy
import statistics

import evaluate
import numpy as np
import PIL.Image
import pytest
import scipy.stats
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value, concatenate_datasets
from scipy.special import log_softmax as scipys_log_softmax
from sklearn.metrics import accuracy_score, log_loss, top_k_accuracy_score
from transformers import EvalPrediction, ResNetConfig, ResNetForImageClassification, ViTImageProcessor

from hf_ibdistill import IBViTConfig, IBViTForImageClassification, evaluate_model, passes, predict, token_attention
from hf_ibdistill.evaluation import (
    RunningMetrics,
    accuracy_interval,
    calibration_bins,
    classification_metrics,
    expected_calibration_error,
    log_softmax,
    negative_log_likelihood,
    paired_difference,
    top_k_accuracy,
)
from hf_ibdistill.logits.encoding import LogitsEncoding
from hf_ibdistill.metrics import ExpectedCalibrationError, NegativeLogLikelihood, TopKAccuracy
from hf_ibdistill.teachers import without_autocast


NAMES = ["cat", "dog", "owl"]
LABELS = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
PROCESSOR = ViTImageProcessor(size={"height": 8, "width": 8})
PLAIN_KEYS = {"accuracy", "negative_log_likelihood", "expected_calibration_error"}


def random_logits(rows, classes, scale=2.0, seed=0):
    return (scale * np.random.default_rng(seed).normal(size=(rows, classes))).astype(np.float32)


def random_labels(rows, classes, seed=1):
    labels = np.random.default_rng(seed).integers(0, classes, rows)
    labels[:classes] = np.arange(classes)[:rows]
    return labels


def softmax(logits):
    exponentials = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


# Metrics


@pytest.mark.parametrize("scale", [0.01, 2.0, 30.0])
@pytest.mark.parametrize("classes", [2, 3, 7, 20])
def test_metrics_equal_scikit_learns(classes, scale):
    logits, labels = random_logits(200, classes, scale), random_labels(200, classes)
    metrics = classification_metrics(logits, labels)
    assert metrics["accuracy"] == pytest.approx(accuracy_score(labels, logits.argmax(axis=1)), abs=1e-12)
    for k in range(1, classes):
        if classes > 2:  # of two, scikit-learn wants the scores of one
            expected = top_k_accuracy_score(labels, logits, k=k, labels=range(classes))
            assert top_k_accuracy(logits, labels, k) == pytest.approx(expected, abs=1e-12)
    if classes > 5:
        assert metrics["top_5_accuracy"] == top_k_accuracy(logits, labels, 5)
    if scale < 30:  # scikit-learn clips probabilities below its smallest number
        expected = log_loss(labels, softmax(logits), labels=range(classes))
        assert metrics["negative_log_likelihood"] == pytest.approx(expected, rel=1e-5)


def test_log_likelihood_of_hopeless_predictions_is_finite_and_exact():
    # Softmax first would give log 0.
    metrics = classification_metrics(np.array([[0.0, 2000.0], [0.0, 0.0]], np.float32), np.array([0, 1]))
    assert metrics["negative_log_likelihood"] == pytest.approx((2000 + np.log(2)) / 2, rel=1e-6)


def naive_calibration_error(logits, labels, bins):
    """Equation 3 of arXiv 1706.04599, bins (m/M, (m+1)/M]."""
    probabilities, error = softmax(logits), 0
    for m in range(bins):
        hits = confidence = rows = 0
        for row, label in zip(probabilities, labels):
            if m / bins < max(row) <= (m + 1) / bins:
                rows += 1
                confidence += max(row)
                hits += list(row).index(max(row)) == label
        if rows:
            error += rows / len(labels) * abs(hits / rows - confidence / rows)
    return error


@pytest.mark.parametrize("scale", [0.3, 2.0, 30.0])
@pytest.mark.parametrize("classes", [2, 7])
def test_calibration_error_equals_a_naive_loop(classes, scale):
    logits, labels = random_logits(200, classes, scale), random_labels(200, classes)
    expected = naive_calibration_error(logits, labels, 15)
    metrics = classification_metrics(logits, labels)
    assert metrics["expected_calibration_error"] == pytest.approx(expected, abs=1e-6)
    for bins in (1, 2, 40):
        expected = naive_calibration_error(logits, labels, bins)
        assert expected_calibration_error(logits, labels, bins) == pytest.approx(expected, abs=1e-6)


def test_calibration_error_by_hand():
    # Sure and right three times of four: the confidence is 1, the accuracy 3/4.
    logits = np.array([[100.0, 0.0]] * 4, np.float32)
    metrics = classification_metrics(logits, np.array([0, 0, 0, 1]))
    assert metrics["expected_calibration_error"] == pytest.approx(0.25, abs=1e-6)


def test_a_confidence_on_the_edge_of_two_bins_belongs_to_the_lower():
    # One row of confidence 1/2, wrong, and one of 3/4, right: in one bin their gaps would cancel in part.
    logits = np.array([[0, 0], [np.log(3), 0]], np.float32)
    error = expected_calibration_error(logits, np.array([1, 0]), num_bins=2)
    assert error == pytest.approx((1 / 2 + 1 / 4) / 2, abs=1e-6)


def test_ties_are_not_counted_as_right():
    # A model that prefers no class is right as often as its argmax.
    logits, labels = np.zeros((9, 3), np.float32), np.repeat([0, 1, 2], 3)
    assert classification_metrics(logits, labels)["accuracy"] == pytest.approx(1 / 3)
    assert classification_metrics(np.zeros((8, 8), np.float32), np.arange(8))["top_5_accuracy"] == pytest.approx(5 / 8)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("values", [[0.0, 1.0, 2.0], [0.0, 1.0, np.nan], [-np.inf, 0.0, np.inf, np.nan]], ids=str)
def test_a_class_is_among_the_first_k_of_a_stable_sort(values, dtype):
    # Few values, so that there are many ties; NaN is below all of them.
    random = np.random.default_rng(0)
    logits, labels = random.choice(values, (60, 6)).astype(dtype), random.integers(0, 6, 60)
    for k in (1, 2, 5, 6, 9):
        hits = 0
        for row, label in zip(logits.tolist(), labels):
            order = sorted(
                range(6), key=lambda c, row=row: (np.isnan(row[c]), -row[c] if row[c] == row[c] else 0.0, c)
            )
            hits += label in order[:k]
        assert top_k_accuracy(logits, labels, k) == hits / 60


def test_log_probabilities_are_scipys():
    logits = np.stack([random_logits(5, 4, scale, seed=1) for scale in (0.1, 10.0, 1e4)])
    np.testing.assert_allclose(log_softmax(logits), scipys_log_softmax(logits.astype(np.float64), axis=-1), rtol=1e-12)
    assert log_softmax(logits).dtype == np.float64


def test_the_evaluate_modules_are_the_functions():
    logits, labels = random_logits(50, 7), random_labels(50, 7)
    modules = [TopKAccuracy(), NegativeLogLikelihood(), ExpectedCalibrationError()]
    expected = {
        "accuracy": top_k_accuracy(logits, labels),
        "negative_log_likelihood": negative_log_likelihood(logits, labels),
        "expected_calibration_error": expected_calibration_error(logits, labels),
    }
    assert evaluate.combine(modules).compute(predictions=logits, references=labels) == pytest.approx(expected)
    for module, (name, value) in zip(modules, expected.items()):
        module.add_batch(predictions=logits[:20].tolist(), references=labels[:20].tolist())
        module.add_batch(predictions=logits[20:], references=labels[20:])
        assert module.compute() == {name: pytest.approx(value)}
    settings = {"predictions": logits, "references": labels}
    assert modules[0].compute(**settings, k=3) == {"top_3_accuracy": top_k_accuracy(logits, labels, 3)}
    found = modules[2].compute(**settings, num_bins=4)
    assert found == {"expected_calibration_error": pytest.approx(expected_calibration_error(logits, labels, 4))}


@pytest.mark.parametrize("label", [-100, -1, 4])
def test_a_label_that_is_no_class_is_not_measured(label):
    logits, labels = random_logits(5, 4), np.array([0, 1, label, 3, 2])
    metrics = top_k_accuracy, negative_log_likelihood, expected_calibration_error, classification_metrics
    for measure in metrics:
        with pytest.raises(ValueError, match="labels: 1 of 5 .* 4 classes"):
            measure(logits, labels)


def test_a_diverged_model_is_not_perfect():
    logits, labels = np.full((12, 6), np.nan, np.float32), np.arange(12) % 6
    metrics = classification_metrics(logits, labels)
    assert not metrics["accuracy"] > 1 / 6
    assert not metrics["top_5_accuracy"] > 5 / 6
    assert np.isnan(metrics["negative_log_likelihood"])


def student_arrays(rows=30, teachers=2, classes=4):
    logits = [random_logits(rows, classes, seed=seed) for seed in range(2 + 2 * teachers)]
    token, own = np.stack(logits[2 : 2 + teachers], axis=1), np.stack(logits[2 + teachers :], axis=1)
    return logits[0], random_labels(rows, classes), logits[1], token, own


def test_metrics_of_plain_models():
    assert classification_metrics(random_logits(9, 5), random_labels(9, 5)).keys() == PLAIN_KEYS
    metrics = classification_metrics(random_logits(9, 6), random_labels(9, 6))
    assert metrics.keys() == PLAIN_KEYS | {"top_5_accuracy"}
    assert all(type(value) is float for value in metrics.values())


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("with_teachers", [True, False])
def test_metrics_of_students(with_teachers, named):
    logits, labels, class_logits, token_logits, teacher_logits = student_arrays()
    names = ["inv", "conv"] if named else ["0", "1"]
    metrics = classification_metrics(
        logits,
        labels,
        class_logits,
        token_logits,
        teacher_logits if with_teachers else None,
        names if named else None,
    )
    expected = classification_metrics(logits, labels)
    expected["class_token_accuracy"] = accuracy_score(labels, class_logits.argmax(axis=1))
    for i, name in enumerate(names):
        expected[f"{name}_token_accuracy"] = accuracy_score(labels, token_logits[:, i].argmax(axis=1))
        if with_teachers:
            pairs = [(logits[n].argmax(), teacher_logits[n, i].argmax()) for n in range(len(labels))]
            expected[f"{name}_agreement"] = sum(ours == theirs for ours, theirs in pairs) / len(labels)
    assert metrics == pytest.approx(expected)


def test_the_trainers_predictions_are_understood():
    logits, labels, class_logits, token_logits, _ = student_arrays()
    assert RunningMetrics()(EvalPrediction(logits, labels)) == classification_metrics(logits, labels)
    outputs = (logits, class_logits, token_logits)
    expected = classification_metrics(logits, labels, class_logits, token_logits, teacher_names=["a", "b"])
    assert RunningMetrics(["a", "b"])(EvalPrediction(outputs, labels)) == expected


@pytest.mark.parametrize("sizes", [[200], [1] * 200, [64, 64, 64, 8], [199, 1]], ids=len)
def test_metrics_batch_by_batch_are_those_of_all_rows(sizes):
    arrays = student_arrays(200)
    expected = classification_metrics(*arrays, teacher_names=["a", "b"])
    metrics, start = RunningMetrics(["a", "b"]), 0
    for _ in range(2):  # the second time, nothing of the first is left
        for start, size in zip(np.cumsum([0, *sizes]), sizes):
            logits, labels, *others = (torch.tensor(array[start : start + size]) for array in arrays)
            metrics.update(logits, labels, *others)
        assert metrics.compute() == pytest.approx(expected, rel=1e-12)


# Predictions


def student(**overrides):
    sizes = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = IBViTConfig(num_attention_heads=2, initializer_range=0.5, **{**sizes, **LABELS, **overrides})
    return IBViTForImageClassification(config).eval()


def plain():
    config = ResNetConfig(layer_type="basic", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], **LABELS)
    return ResNetForImageClassification(config).eval()


def table(rows=11, names=NAMES, image_column="image", label_column="label", logits=()):
    random = np.random.default_rng(0)
    features = Features({image_column: Image(), label_column: ClassLabel(names=names)})
    images = [PIL.Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(rows)]
    dataset = Dataset.from_dict({image_column: images, label_column: random_labels(rows, 3)}, features=features)
    for name in logits:
        values = random_logits(rows, 3, seed=len(name))
        dataset = dataset.add_column(f"{name}_logits", list(values), feature=List(Value("float32"), length=3))
    return dataset


def by_hand(model, dataset, name="logits"):
    with torch.no_grad():
        results = [model(PROCESSOR(image, return_tensors="pt")["pixel_values"])[name] for image in dataset["image"]]
    return torch.cat(results).numpy()


@pytest.mark.parametrize("batch_size", [1, 4, 11, 128])
def test_predictions_are_the_models_in_the_order_of_the_rows(batch_size):
    model, dataset = plain(), table().shuffle(seed=2)
    outputs = predict(model, PROCESSOR, dataset, batch_size=batch_size)
    assert outputs.keys() == {"logits", "labels"}
    np.testing.assert_allclose(outputs["logits"], by_hand(model, dataset), atol=1e-5)
    np.testing.assert_array_equal(outputs["labels"], dataset["label"][:])
    assert outputs["logits"].dtype == np.float32


def test_parts_of_a_batch_are_predicted_as_the_whole(monkeypatch):
    model, dataset, sizes = student(), table(), []
    expected = predict(model, PROCESSOR, dataset)
    model.register_forward_hook(lambda module, inputs, outputs: sizes.append(len(outputs.logits)))
    # No output fits, so that a part has one image for each thread.
    monkeypatch.setattr(passes, "_LARGEST_OUTPUT", 1)
    found = predict(model, PROCESSOR, dataset)
    assert sum(sizes) == 1 + len(dataset) and max(sizes) == torch.get_num_threads()
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, atol=1e-5)


def test_a_model_that_is_being_trained_in_bf16_is_measured_as_it_will_be_saved():
    model, dataset, pixels = student(), table(), torch.randn(2, 3, 8, 8)
    expected, exact = predict(model, PROCESSOR, dataset), model(pixels).logits
    images = dataset["image"][:2]
    expected_maps = token_attention(model, PROCESSOR, images)
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare(model)
        rounded = prepared(pixels).logits
        found = predict(prepared, PROCESSOR, dataset)
        # The pictures of a run, whose call needs what the class has around its `forward`.
        maps = token_attention(prepared, PROCESSOR, images)
        # Others may have put a function in the place of `forward`.
        replaced = copy.copy(prepared)
        replaced._original_forward = lambda pixel_values, **kwargs: "its own"
        assert without_autocast(replaced)(pixels) == "its own"
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    np.testing.assert_array_equal(found["logits"], expected["logits"])
    np.testing.assert_equal(maps, expected_maps)
    # The training that goes on still runs in bf16.
    assert not torch.equal(rounded, exact) and torch.equal(prepared(pixels).logits, rounded)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_models_in_half_precision(dtype):
    # transformers opens a checkpoint in the type it was saved in, but image processors return float32.
    model, dataset = plain(), table()
    expected = by_hand(model, dataset)
    outputs = predict(model.to(dtype), PROCESSOR, dataset)
    assert outputs["logits"].dtype == np.float32
    np.testing.assert_allclose(outputs["logits"], expected, atol=2e-2)


def test_predictions_of_a_student():
    model, dataset = student(teacher_names=("conv", "inv")), table().select([10, 3, 0, 7, 5])
    outputs = predict(model, PROCESSOR, dataset, batch_size=2)
    assert outputs.keys() == {"logits", "class_logits", "teacher_token_logits", "labels"}
    for name in ("logits", "class_logits", "teacher_token_logits"):
        np.testing.assert_allclose(outputs[name], by_hand(model, dataset, name), atol=1e-5)
    assert outputs["teacher_token_logits"].shape == (5, 2, 3)


def test_measuring_leaves_every_module_in_its_mode():
    model = plain().train()
    frozen = next(module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)).eval()
    before = {name: module.training for name, module in model.named_modules()}
    statistics = frozen.running_mean.clone()
    evaluate_model(model, PROCESSOR, table())
    assert {name: module.training for name, module in model.named_modules()} == before
    torch.testing.assert_close(frozen.running_mean, statistics, rtol=0, atol=0)


def test_objects_of_another_kind():
    for given, message in (
        (("outputs/student", PROCESSOR), "model='outputs/student'"),
        ((plain(), "outputs/student"), "image_processor='outputs/student'"),
        ((PROCESSOR, plain()), "model=ViTImageProcessor"),
    ):
        for measure in (predict, evaluate_model):
            with pytest.raises(TypeError, match=message):
                measure(*given, table())
    for measure in (predict, evaluate_model):
        with pytest.raises(ValueError, match="IBViTForImageClassification are on the meta device"):
            measure(student().to("meta"), PROCESSOR, table())


def test_labels_may_be_missing(caplog):
    model, dataset = plain(), table()
    expected = predict(model, PROCESSOR, dataset)
    unnamed = predict(model, PROCESSOR, dataset.remove_columns("label"))
    assert unnamed.keys() == {"logits"}
    labels = [None if n in (2, 5) else label for n, label in enumerate(dataset["label"])]
    mixed = Dataset.from_dict({**dataset[:], "label": labels}, features=dataset.features)
    outputs = predict(model, PROCESSOR, mixed)
    for found in (unnamed, outputs):
        np.testing.assert_array_equal(found["logits"], expected["logits"])
    assert outputs["labels"].tolist() == [-100 if label is None else label for label in labels]
    labelled = dataset.select([n for n in range(len(dataset)) if n not in (2, 5)])
    assert evaluate_model(model, PROCESSOR, mixed) == pytest.approx(evaluate_model(model, PROCESSOR, labelled))
    assert "2 of 11 rows have no label" in caplog.text
    with pytest.raises(ValueError, match="no label column"):
        evaluate_model(model, PROCESSOR, dataset.remove_columns("label"))


def test_models_that_return_tuples():
    model, dataset = plain(), table()
    expected = predict(model, PROCESSOR, dataset)["logits"]
    model.config.return_dict = False
    np.testing.assert_array_equal(predict(model, PROCESSOR, dataset)["logits"], expected)


def test_predictions_of_a_student_without_teachers():
    model, dataset = student(teacher_names=()), table(logits=["conv"])
    outputs = predict(model, PROCESSOR, dataset)
    assert outputs.keys() == {"logits", "class_logits", "labels"}
    assert evaluate_model(model, PROCESSOR, dataset).keys() == PLAIN_KEYS


def test_teacher_logits_come_from_the_columns_in_the_students_order():
    dataset = table(logits=["conv", "unrelated", "inv"]).shuffle(seed=4)
    outputs = predict(student(teacher_names=("inv", "conv")), PROCESSOR, dataset, batch_size=3)
    expected = np.stack([dataset["inv_logits"], dataset["conv_logits"]], axis=1)
    np.testing.assert_array_equal(outputs["teacher_logits"], expected.astype(np.float32))


def test_there_are_no_teacher_logits_if_a_column_is_missing():
    outputs = predict(student(teacher_names=("conv", "inv")), PROCESSOR, table(logits=["conv"]))
    assert "teacher_logits" not in outputs


def test_logits_of_views_are_not_taken_for_logits_of_the_image():
    feature = LogitsEncoding("float32").feature(num_classes=3, num_views=2)
    dataset = table().add_column("conv_logits", np.zeros((11, 2, 3)).tolist(), feature=feature)
    assert "teacher_logits" not in predict(student(teacher_names=("conv",)), PROCESSOR, dataset)


def test_agreement_with_stored_teachers():
    model, dataset = student(teacher_names=("conv", "inv")), table(logits=["conv", "inv"])
    metrics = evaluate_model(model, PROCESSOR, dataset, batch_size=4)
    chosen = by_hand(model, dataset).argmax(axis=1)
    heads = by_hand(model, dataset, "teacher_token_logits").argmax(axis=2)
    assert metrics.keys() == PLAIN_KEYS | {"class_token_accuracy"} | {
        f"{name}_{kind}" for name in ("conv", "inv") for kind in ("token_accuracy", "agreement")
    }
    assert metrics["accuracy"] == pytest.approx(accuracy_score(dataset["label"][:], chosen))
    for i, name in enumerate(("conv", "inv")):
        theirs = np.argmax(dataset[f"{name}_logits"], axis=1)
        assert metrics[f"{name}_agreement"] == pytest.approx(np.mean(chosen == theirs))
        assert metrics[f"{name}_token_accuracy"] == pytest.approx(accuracy_score(dataset["label"][:], heads[:, i]))


def test_columns_of_other_names_are_found_or_given():
    model, dataset = plain(), table()
    expected = predict(model, PROCESSOR, dataset)["logits"]
    renamed = table(image_column="scan", label_column="kind").add_column("width", [8] * 11)
    np.testing.assert_array_equal(predict(model, PROCESSOR, renamed)["logits"], expected)
    # Of several columns, the given ones.
    others = table(image_column="mask", label_column="breed").select(range(10, -1, -1))
    both = concatenate_datasets([others, renamed], axis=1)
    given = {"image_column": "scan", "label_column": "kind"}
    outputs = predict(model, PROCESSOR, both, **given)
    np.testing.assert_array_equal(outputs["logits"], expected)
    np.testing.assert_array_equal(outputs["labels"], dataset["label"][:])
    metrics = evaluate_model(model, PROCESSOR, both, **given)
    assert metrics == pytest.approx(classification_metrics(expected, np.array(dataset["label"])))
    for column, message in (("image", "mask, scan"), ("label", "breed, kind")):
        found = {name: value for name, value in given.items() if name != f"{column}_column"}
        with pytest.raises(ValueError, match=f"{message}.*{column}_column"):
            predict(model, PROCESSOR, both, **found)


def test_other_image_modes_are_converted():
    features = Features({"image": Image(), "label": ClassLabel(names=NAMES)})
    image = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8))
    modes = [image, image.convert("RGB"), image.convert("RGBA"), image.convert("LA")]
    dataset = Dataset.from_dict({"image": modes, "label": [0, 1, 2, 0]}, features=features)
    logits = predict(plain(), PROCESSOR, dataset)["logits"]
    np.testing.assert_allclose(logits, np.broadcast_to(logits[:1], logits.shape), atol=1e-5)


def test_predictions_without_dropout_even_from_a_model_in_training_mode():
    model, dataset = student(hidden_dropout_prob=0.5), table()
    expected = by_hand(model, dataset)
    np.testing.assert_allclose(predict(model.train(), PROCESSOR, dataset)["logits"], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["cat", "dog", "owl", "yak"], "model.* 3 .* 4"),
        (["cat", "dog", "yak"], r"model.*\['yak'\].*\['owl'\]"),
        (["dog", "cat", "owl"], "model.*another order"),
    ],
)
def test_other_classes_than_the_models_are_refused(names, message):
    with pytest.raises(ValueError, match=message):
        evaluate_model(plain(), PROCESSOR, table(names=names))


def test_classes_without_names_pass_by_their_number():
    unnamed = [f"LABEL_{i}" for i in range(3)]
    assert predict(plain(), PROCESSOR, table(names=unnamed))["logits"].shape == (11, 3)
    unnamed = {"id2label": dict(enumerate(unnamed)), "label2id": {name: i for i, name in enumerate(unnamed)}}
    assert predict(student(**unnamed), PROCESSOR, table())["logits"].shape == (11, 3)


def test_an_empty_dataset_and_several_splits_are_refused():
    with pytest.raises(ValueError, match="empty"):
        evaluate_model(plain(), PROCESSOR, table().select([]))
    with pytest.raises(TypeError, match="dataset .*test, train"):
        evaluate_model(plain(), PROCESSOR, DatasetDict(test=table(), train=table()))
    with pytest.raises(TypeError, match="dataset .*IterableDataset"):
        evaluate_model(plain(), PROCESSOR, table().to_iterable_dataset())


def test_an_unreadable_image_names_its_row():
    dataset = table().cast_column("image", Image(decode=False))
    cells = list(dataset["image"])
    cells[7] = {"bytes": b"not an image", "path": None}
    rows = {"image": cells, "label": dataset["label"][:]}
    with pytest.raises(ValueError, match="Row 7: "):
        predict(plain(), PROCESSOR, Dataset.from_dict(rows, features=table().features), batch_size=4)


# Attention


def attention_by_hand(model, images):
    """The last layer's, from its queries and keys: (N, tokens, tokens), mean over two heads."""
    last, outputs = model.ibvit.layers[-1].attention, {}

    def keep(module, _, output):
        outputs[module] = output.numpy()

    hooks = [projection.register_forward_hook(keep) for projection in (last.q_proj, last.k_proj)]
    with torch.no_grad():
        model(PROCESSOR(images, return_tensors="pt")["pixel_values"])
    for hook in hooks:
        hook.remove()
    heads = [np.split(outputs[projection], 2, axis=-1) for projection in (last.q_proj, last.k_proj)]
    rows = [[softmax(q @ k.T / np.sqrt(q.shape[1])) for q, k in zip(*head)] for head in zip(*heads)]
    return np.mean(rows, axis=0)


@pytest.mark.parametrize("teacher_names", [(), ("inv", "conv")], ids=str)
def test_attention_equals_the_softmax_of_queries_and_keys(teacher_names):
    model, images = student(teacher_names=teacher_names, patch_size=2, num_hidden_layers=2), table(3)["image"][:]
    expected = attention_by_hand(model, images)
    maps = token_attention(model, PROCESSOR, images)
    assert list(maps) == ["class token", *teacher_names]
    for i, found in enumerate(maps.values()):
        assert found.shape == (3, 4, 4) and found.dtype == np.float32
        np.testing.assert_allclose(found, expected[:, i, len(maps) :].reshape(3, 4, 4), atol=1e-6)
        assert (found.sum(axis=(1, 2)) < 1).all()


@pytest.mark.parametrize(("turn", "axis"), [("FLIP_TOP_BOTTOM", 0), ("FLIP_LEFT_RIGHT", 1)])
def test_attention_follows_the_patches(turn, axis):
    model = student(patch_size=2, patch_embedding="linear")
    # The attention then depends on the content of a patch, not on its position.
    torch.nn.init.zeros_(model.ibvit.embeddings.position_embeddings)
    colors = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    image = PIL.Image.fromarray(colors).resize((8, 8), PIL.Image.Resampling.NEAREST)
    maps = token_attention(model, PROCESSOR, [image, image.transpose(PIL.Image.Transpose[turn])])
    for plain, turned in maps.values():
        assert np.ptp(plain) > 0.01
        np.testing.assert_allclose(turned, np.flip(plain, axis), atol=1e-6)


def test_attention_of_a_model_with_fused_attention_in_half_precision_or_training_mode():
    model, images = student(attention_probs_dropout_prob=0.5, num_hidden_layers=2), table(3)["image"][:]
    expected = token_attention(model, PROCESSOR, images)
    model.set_attn_implementation("sdpa")
    np.testing.assert_equal(token_attention(model, PROCESSOR, images), expected)
    assert model.config._attn_implementation == "sdpa"
    found = token_attention(model.to(torch.bfloat16).train(), PROCESSOR, images)
    for name, maps in found.items():
        assert maps.dtype == np.float32
        np.testing.assert_allclose(maps, expected[name], atol=2e-2)


def test_a_teacher_called_class_does_not_take_the_metric_of_the_class_token():
    logits, labels = np.eye(3, dtype=np.float32), np.arange(3)
    metrics = classification_metrics(logits, labels, logits, -logits[:, None], teacher_names=["class"])
    assert (metrics["class_token_accuracy"], metrics["0_token_accuracy"]) == (1, 0)


# Intervals


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.999])
@pytest.mark.parametrize("pairs", [2, 5, 40])
def test_the_interval_of_a_difference_equals_that_of_scipys_test(pairs, confidence):
    first, second = np.random.default_rng(pairs).normal([[0.7], [0.6]], 0.05, size=(2, pairs))
    expected = scipy.stats.ttest_rel(first, second).confidence_interval(confidence)
    mean = statistics.mean(first) - statistics.mean(second)
    assert paired_difference(first, second, confidence) == pytest.approx((mean, expected.low, expected.high))


def test_intervals_of_three_seeds_hold_the_true_difference_as_often_as_their_confidence():
    # With the normal distribution in place of Student's it would be 81 %.
    runs = np.random.default_rng(0).normal(size=(2000, 2, 3))
    intervals = [paired_difference(first, second)[1:] for first, second in runs]
    assert np.mean([low < 0 < high for low, high in intervals]) == pytest.approx(0.95, abs=0.015)


def test_a_difference_that_never_varies_is_certain_and_one_pair_is_not():
    assert paired_difference([0.75, 0.5, 1.0], [0.5, 0.25, 0.75]) == (0.25, 0.25, 0.25)
    assert paired_difference([0.25], [0.75]) == pytest.approx((-0.5, np.nan, np.nan), nan_ok=True)


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_the_interval_of_an_accuracy_equals_that_of_scipy(confidence):
    right, rows = np.array([0, 3, 60, 7]), np.array([4, 5, 60, 1000])
    for i, (low, high) in enumerate(accuracy_interval(right, rows, confidence).T):
        expected = scipy.stats.binomtest(int(right[i]), int(rows[i])).proportion_ci(confidence, method="wilson")
        assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert np.isnan(accuracy_interval(0, 0)).all()


def test_bins_of_confidence_add_up_to_the_calibration_error():
    logits, labels = random_logits(500, 4), random_labels(500, 4)
    probabilities = np.exp(scipys_log_softmax(logits.astype(np.float64), axis=-1))
    confidence, is_right = probabilities.max(-1), probabilities.argmax(-1) == labels
    rows, confidences, right = calibration_bins(confidence, is_right, 10).numpy()
    for i in range(10):
        inside = (confidence > i / 10) & (confidence <= (i + 1) / 10)
        assert (rows[i], right[i]) == (inside.sum(), is_right[inside].sum())
        assert confidences[i] == pytest.approx(confidence[inside].sum())
    error = np.abs(right - confidences).sum() / 500
    assert error == pytest.approx(expected_calibration_error(logits, labels, 10))
