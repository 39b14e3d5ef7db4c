"""Rows without a label, and students without teacher tokens: each step against the formula, written out row by row."""

import dataclasses
import tempfile

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetInfo, Features
from distilling import (
    CLASSES,
    NUM_ROWS,
    PROCESSOR,
    arguments,
    assert_same_weights,
    distill,
    logged,
    plain_vit,
    small_images,
    small_student,
    small_teachers,
    with_columns,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import ViTForImageClassification

from hf_ibdistill import EnsembleDistillationTrainer, ImageClassificationTrainer, evaluate_and_save, predict
from hf_ibdistill.logits.encoding import LogitsEncoding
from hf_ibdistill.training.losses import UNLABELLED_TARGETS


class NoKwargsForImageClassification(ViTForImageClassification):
    """A student whose `forward` takes nothing that `Trainer` could pass to it."""

    def forward(self, pixel_values, labels=None):
        return super().forward(pixel_values, labels=labels)


STUDENTS = {
    "tokens": small_student,
    "plain": plain_vit,
    "no kwargs": lambda: plain_vit(NoKwargsForImageClassification),
}


@pytest.fixture(scope="module")
def table():
    return with_columns(small_images(), small_teachers())


def hide(table, rows, mark=None):
    """The same rows; these have no label."""
    labels = [mark if i in rows else label for i, label in enumerate(table["label"])]
    return Dataset.from_dict({**table[:], "label": labels}, features=table.features)


def softmax(logits, temperature=1.0):
    exponentials = (logits / temperature).exp()
    return exponentials / exponentials.sum()


def naive_loss(model, table, hidden, args):
    """The formula, row by row, in float64."""
    pixels = PROCESSOR([image.convert("RGB") for image in table["image"]], return_tensors="pt")["pixel_values"]
    outputs = model.double()(pixels.double())
    total = 0.0
    for n in range(len(table)):
        z = outputs.get("class_logits", outputs["logits"])[n]
        t = [torch.tensor(table[name][n], dtype=torch.float64) for name in ("conv_logits", "inv_logits")]
        mean = (softmax(t[0]) + softmax(t[1])) / 2
        if n not in hidden:
            uniform = torch.full_like(z, 1 / len(CLASSES))
            target = torch.zeros_like(z)
            target[table["label"][n]] = 1.0
            target = (1 - args.label_smoothing_factor) * target + args.label_smoothing_factor * uniform
            class_term = -(target * softmax(z).log()).sum()
        elif args.unlabelled_target == "teachers":
            class_term = (mean * (mean.log() - softmax(z).log())).sum()
        elif args.unlabelled_target == "pseudo_labels" and mean.max() >= args.min_confidence:
            class_term = -softmax(z).log()[mean.argmax()]
        else:
            class_term = 0.0
        total = total + args.label_weight * class_term
        likely = [softmax(logits)[table["label"][n]] for logits in t] if n not in hidden else [0.5, 0.5]
        for i in range(2):
            s = outputs["teacher_token_logits"][n, i] if "teacher_token_logits" in outputs else z
            tau, weight = args.temperature[i], args.teacher_weights[i]
            if args.confidence_weighting:
                weight = weight * 2 * likely[i] / sum(likely)
            if args.distillation_mode == "hard":
                total = total - weight * softmax(s).log()[t[i].argmax()]
            else:
                p, q = softmax(t[i], tau), softmax(s, tau)
                total = total + weight * tau**2 * (p * (p.log() - q.log())).sum()
    return total / len(table)


@given(data=st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_steps_gradient_is_the_formulas_for_any_mix_of_rows(table, data):
    hidden = data.draw(st.sets(st.integers(0, NUM_ROWS - 1)), label="rows without a label")
    batch_size = data.draw(st.sampled_from([1, 3, 4, 16]), label="rows of a batch")
    student = STUDENTS[data.draw(st.sampled_from(sorted(STUDENTS)), label="student")]
    chosen = {
        "distillation_mode": data.draw(st.sampled_from(["soft", "hard"])),
        "unlabelled_target": data.draw(st.sampled_from(UNLABELLED_TARGETS)),
        "min_confidence": data.draw(st.sampled_from([0.0, 0.7, 1.0])),
        "label_smoothing_factor": data.draw(st.sampled_from([0.0, 0.2])),
        "confidence_weighting": data.draw(st.booleans()),
    }
    mark = data.draw(st.sampled_from([None, -1]))
    with tempfile.TemporaryDirectory() as folder:
        steps = -(-NUM_ROWS // batch_size)
        sizes = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": steps}
        rate = {"learning_rate": 1.0, "num_train_epochs": 1}
        trainer = distill(folder, hide(table, hidden, mark), student(), **sizes, **rate, **chosen)
        args = trainer.args
        assert trainer.state.global_step == 1
    model = student()
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    loss = naive_loss(model, table, hidden, args)
    loss.backward()
    assert logged(trainer, ["loss"])[0][0] == pytest.approx(loss.item(), rel=1e-3, abs=1e-4)
    after = dict(trainer.model.named_parameters())
    for name, parameter in model.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close((before[name] - after[name]).double(), gradient, rtol=1e-3, atol=2e-5, msg=name)


def test_the_target_needs_dense_logits_unless_the_temperature_is_1(table, tmp_path):
    columns = {name: np.array(table[name], np.float32) for name in ("conv_logits", "inv_logits")}
    plain, encoding = table.remove_columns([*columns]), LogitsEncoding("float32", top_k=3)
    data = plain.data.table
    for name, logits in columns.items():
        data = data.append_column(name, encoding.encode(logits))
    features = {**plain.features, **dict.fromkeys(columns, encoding.feature(len(CLASSES), None))}
    top_k = Dataset(data, info=DatasetInfo(features=Features(features)))
    with pytest.raises(ValueError, match='unlabelled_target="teachers".*"conv_logits"'):
        distill(tmp_path, hide(top_k, {3}), unlabelled_target="teachers", train=False)
    distill(tmp_path, hide(top_k, {3}), unlabelled_target="teachers", temperature=1.0)


def test_a_stream_takes_the_same_steps(table, tmp_path):
    mixed = hide(table, {1, 2, 3, 8, 15})
    chosen = {"per_device_train_batch_size": 4, "max_steps": 4, "unlabelled_target": "teachers"}
    ordered = {"train_sampling_strategy": "sequential"}
    mapped = distill(tmp_path / "mapped", mixed, **chosen, **ordered)
    streamed = distill(tmp_path / "streamed", mixed.to_iterable_dataset(), **chosen)
    assert_same_weights(streamed.model, mapped.model, rtol=1e-5, atol=1e-6)


def test_supervised_training_takes_the_labelled_rows_alone(table, tmp_path, caplog):
    hidden = {0, 5, 6, 7, 13}
    mixed, labelled = hide(table, hidden), table.select([n for n in range(NUM_ROWS) if n not in hidden])
    chosen = {"trainer_class": ImageClassificationTrainer, "per_device_train_batch_size": 4}
    trainer = distill(tmp_path / "mixed", mixed, **chosen)
    assert "training set: 5 of 16 rows have no label" in caplog.text
    expected = distill(tmp_path / "labelled", labelled, **chosen)
    assert_same_weights(trainer.model, expected.model, rtol=0, atol=0)
    streams = [
        distill(tmp_path / "s", part.to_iterable_dataset(), max_steps=2, **chosen) for part in (mixed, labelled)
    ]
    assert_same_weights(streams[0].model, streams[1].model, rtol=0, atol=0)
    with pytest.raises(ValueError, match="training set: None of 16 rows has a label"):
        distill(tmp_path, hide(table, set(range(NUM_ROWS))), trainer_class=ImageClassificationTrainer)


@pytest.mark.parametrize("batch_size", [2, 3])
def test_accumulation_is_exact_for_a_model_without_kwargs(batch_size, table, tmp_path):
    """7 rows in batches of 2 or 3: the last is smaller."""
    trainers = []
    for size, steps in ((7, 1), (batch_size, -(-7 // batch_size))):
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "num_train_epochs": 1}
        for smoothing in (0.0, 0.3):
            settings["label_smoothing_factor"] = smoothing
            rows, kind = table.select(range(7)), ImageClassificationTrainer
            trainers.append(distill(tmp_path, rows, plain_vit(NoKwargsForImageClassification), kind, **settings))
    for whole, parts in zip(trainers[:2], trainers[2:]):
        assert_same_weights(parts.model, whole.model, rtol=1e-5, atol=1e-6)
        assert logged(parts, ["loss"]) == pytest.approx(np.array(logged(whole, ["loss"])), rel=1e-4)


def test_the_teachers_of_a_student_without_tokens(table, tmp_path):
    def names(rows=table, max_steps=-1, **kwargs):
        given = {"train_dataset": rows, "processing_class": PROCESSOR, **kwargs}
        args = arguments(tmp_path, max_steps=max_steps)
        return EnsembleDistillationTrainer(plain_vit(), args, **given).teacher_names

    assert names() == ["conv", "inv"] == names(table.to_iterable_dataset(), max_steps=1)
    assert names(teacher_names=["inv", "conv"]) == ["inv", "conv"]
    assert names(table.remove_columns(["conv_logits", "inv_logits"]), teachers=small_teachers()) == ["conv", "inv"]
    with pytest.raises(ValueError, match='no column "third_logits"'):
        names(teacher_names=["conv", "third"])
    with pytest.raises(ValueError, match=r"ViTForImageClassification\) has no teachers.*ImageClassificationTrainer"):
        names(small_images())
    with pytest.raises(TypeError, match='teacher_names="conv"'):
        names(teacher_names="conv")
    with pytest.raises(ValueError, match=r"teacher_names=\['conv'\].*\['conv', 'inv'\]"):
        EnsembleDistillationTrainer(
            small_student(),
            arguments(tmp_path),
            train_dataset=table,
            processing_class=PROCESSOR,
            teacher_names=["conv"],
        )


def test_online_teachers_teach_a_student_without_tokens(table, tmp_path):
    stored = distill(tmp_path / "stored", table, plain_vit())
    plain = table.remove_columns(["conv_logits", "inv_logits"])
    online = distill(tmp_path / "online", plain, plain_vit(), teachers=small_teachers())
    assert_same_weights(online.model, stored.model, rtol=1e-4, atol=1e-5)


def test_no_label_column_is_needed_without_a_weight_of_labels(table, tmp_path):
    unnamed = table.remove_columns("label")
    with pytest.raises(ValueError, match="no label column"):
        distill(tmp_path, unnamed)
    trainer = distill(tmp_path, unnamed, label_weight=0.0)
    expected = distill(tmp_path, hide(table, set(range(NUM_ROWS))), label_weight=0.0)
    assert_same_weights(trainer.model, expected.model, rtol=0, atol=0)


def test_rows_without_a_label_are_not_evaluated(table, tmp_path, caplog):
    mixed = hide(table, {0, 3, 4})
    trainer = distill(tmp_path, table, plain_vit())
    expected = trainer.evaluate(table.select([n for n in range(NUM_ROWS) if n not in {0, 3, 4}]))
    found = trainer.evaluate(mixed)
    for name in ("eval_loss", "eval_accuracy", "eval_negative_log_likelihood"):
        assert found[name] == pytest.approx(expected[name], rel=1e-6), name
    assert "evaluation set: 3 of 16 rows have no label" in caplog.text
    with pytest.raises(ValueError, match="3 rows have no label"):
        trainer.predict(mixed)


def test_results_of_a_student_without_tokens(table, tmp_path):
    trainer = distill(tmp_path, hide(table, {1, 2}), plain_vit(), eval_dataset=table)
    metrics = evaluate_and_save(trainer, table, "test", title="Any student", data_name="animals")
    model = ViTForImageClassification.from_pretrained(tmp_path)
    outputs = predict(model, PROCESSOR, table, teacher_names=["conv", "inv"])
    choices = {name: np.array(table[f"{name}_logits"]).argmax(1) for name in ("conv", "inv")}
    for name, choice in choices.items():
        assert metrics[f"{name}_agreement"] == pytest.approx((outputs["logits"].argmax(1) == choice).mean())
    card = (tmp_path / "README.md").read_text()
    assert "conv" in card and "inv" in card and "An image classifier taught by" in card


@pytest.mark.parametrize(
    ("name", "value"), [("unlabelled_target", "labels"), ("min_confidence", 1.5), ("min_confidence", -0.1)]
)
def test_settings_out_of_range(name, value, tmp_path):
    with pytest.raises(ValueError, match=f"{name}=.*{value}"):
        dataclasses.replace(arguments(tmp_path), **{name: value})
