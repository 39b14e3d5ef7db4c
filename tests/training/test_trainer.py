"""The trainers on real tables: what a step computes, what is logged, what is refused before the first step.

Run as a script, this file is one process of a distributed run; see the last section.
"""

import copy
import doctest
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Image,
    List,
    Value,
    concatenate_datasets,
    load_from_disk,
)
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

import hf_ibdistill
from hf_ibdistill import (
    DistillationArguments,
    EnsembleDistillationTrainer,
    IBResNetConfig,
    IBResNetForImageClassification,
    IBViTConfig,
    IBViTForImageClassification,
    ImageClassificationTrainer,
    ImageTrainingArguments,
    load_teachers,
)
from hf_ibdistill.logits.encoding import LogitsEncoding
from hf_ibdistill.logits.provenance import attach_record, build_record, check_columns, describe_teacher


CLASSES = ["cat", "dog", "owl", "fox"]
NUM_ROWS = 16
PROCESSOR = ViTImageProcessor(size={"height": 8, "width": 8})
TERMS = ["loss", "label_loss", "conv_loss", "inv_loss"]
# Every number differs from its neighbours and from 1, so that none can be swapped or forgotten unseen.
WEIGHTS, TEMPERATURES, LABEL_WEIGHT = [0.5, 2.0], [2.0, 3.0], 0.7


def class_settings(names=CLASSES):
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def small_teacher(operator, names=CLASSES):
    shape = {"embedding_size": 16, "hidden_sizes": (16,), "depths": (1,), "downsample_strides": (1,), "reduction": 1}
    config = IBResNetConfig(spatial_operator=operator, stem="plain", kernel_size=3, **shape, **class_settings(names))
    model = IBResNetForImageClassification(config).eval()
    # A fresh head would give all images almost the same logits.
    torch.nn.init.normal_(model.classifier.weight, std=2.0)
    return model


def small_student(seed=1, names=CLASSES, **overrides):
    torch.manual_seed(seed)
    shape = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    return IBViTForImageClassification(
        IBViTConfig(
            **{**shape, "intermediate_size": 32, "initializer_range": 0.2, **class_settings(names), **overrides}
        )
    )


def small_images(num_rows=NUM_ROWS, seed=0):
    """Noise around a colour that tells the class."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(num_rows) % len(CLASSES))
    colours = np.array([(220, 30, 30), (30, 220, 30), (30, 30, 220), (220, 220, 30)])[labels]
    pixels = (
        colours[:, None, None]
        + rng.integers(-30, 31, (num_rows, 8, 8, 3))
        + rng.integers(-30, 31, (num_rows, 1, 1, 3))
    )
    return Dataset.from_dict(
        {"image": list(pixels.clip(0, 255).astype(np.uint8)), "label": labels},
        features=Features({"image": Image(), "label": ClassLabel(names=CLASSES)}),
    )


def teacher_logits(teachers, images):
    """(N, T, C), as the models themselves give them."""
    pixel_values = PROCESSOR(list(images), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return torch.stack([model(pixel_values).logits for model, _ in teachers.values()], dim=1)


def with_columns(table, teachers, dtype="float32"):
    logits = teacher_logits(teachers, table["image"]).numpy()
    for i, name in enumerate(teachers):
        feature = List(Value(dtype), length=logits.shape[-1])
        table = table.add_column(f"{name}_logits", list(logits[:, i].astype(dtype)), feature=feature)
    return table


@pytest.fixture(scope="module")
def teachers():
    torch.manual_seed(0)
    return {"conv": (small_teacher("convolution"), PROCESSOR), "inv": (small_teacher("involution"), PROCESSOR)}


@pytest.fixture(scope="module")
def plain_table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain_table")
    small_images().save_to_disk(folder)
    return load_from_disk(folder)


@pytest.fixture(scope="module")
def table(plain_table, teachers, tmp_path_factory):
    """The same rows with a float32 column for each teacher."""
    folder = tmp_path_factory.mktemp("table")
    with_columns(plain_table, teachers).save_to_disk(folder)
    return load_from_disk(folder)


SGD = {
    "optim": "sgd", "learning_rate": 0.5, "lr_scheduler_type": "constant", "warmup_steps": 0, "weight_decay": 0.0,
    "max_grad_norm": 0.0,
}  # fmt: skip
# Compared with float32 formulas, on machines with and without bf16 units.
QUIET = {
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "eval_strategy": "no",
    "logging_strategy": "steps",
    "logging_steps": 1,
}
LOSS = {"teacher_weights": WEIGHTS, "temperature": TEMPERATURES, "label_weight": LABEL_WEIGHT}


def arguments(folder, **overrides):
    return DistillationArguments(str(folder), **{**SGD, **QUIET, **LOSS, "num_train_epochs": 1, **overrides})


def distil(folder, table, student=None, trainer_class=EnsembleDistillationTrainer, train=True, **settings):
    """A trainer after its training. `settings` are its own, or the arguments'."""
    names = ("teachers", "eval_dataset", "compute_metrics", "callbacks", "image_column", "label_column")
    own = {name: settings.pop(name) for name in names if name in settings}
    trainer = trainer_class(
        model=student or small_student(),
        args=arguments(folder, **settings),
        train_dataset=table,
        processing_class=PROCESSOR,
        **own,
    )
    if train:
        trainer.train()
    return trainer


def logged(trainer, names=TERMS):
    """The training log's entries, as rows of numbers."""
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert entries, "nothing was logged"
    return [[entry[name] for name in names] for entry in entries]


def tensors_of(table):
    """What a batch of all rows holds, read without the package."""
    pixel_values = PROCESSOR([image.convert("RGB") for image in table["image"]], return_tensors="pt")["pixel_values"]
    logits = [table[name] for name in ("conv_logits", "inv_logits") if name in table.column_names]
    return pixel_values, torch.tensor(table["label"]), torch.tensor(np.array([list(column) for column in logits]))


def textbook_terms(student, table, smoothing=0.0):
    """Label loss and teacher losses, means over all rows, in float64, with gradients."""
    pixel_values, labels, logits = tensors_of(table)
    outputs = student.double()(pixel_values.double())
    targets = torch.nn.functional.one_hot(labels, len(CLASSES)) * (1 - smoothing) + smoothing / len(CLASSES)
    terms = [-(targets * outputs.class_logits.log_softmax(-1)).sum(-1).mean()]
    for i, tau in enumerate(TEMPERATURES[: len(logits)]):
        p, q = ((x / tau).softmax(-1) for x in (logits[i].double(), outputs.teacher_token_logits[:, i]))
        terms.append(tau**2 * (p * (p.log() - q.log())).sum(-1).mean())
    return terms


def weighted(terms):
    """The loss of its terms: labels', then teachers'."""
    return sum(weight * term for weight, term in zip([LABEL_WEIGHT, *WEIGHTS], terms))


def assert_same_weights(model, other, **tolerance):
    expected = other.state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")


# What a step computes


@pytest.mark.parametrize(
    ("num_rows", "batch_size", "accumulation"),
    [
        pytest.param(8, 8, 1, id="one batch"),
        pytest.param(8, 4, 2, id="4 x 2"),
        pytest.param(8, 2, 4, id="2 x 4"),
        pytest.param(7, 4, 2, id="4 + 3"),
        pytest.param(9, 4, 3, id="4 + 4 + 1"),
    ],
)
def test_a_steps_gradient_is_the_formulas_over_all_its_rows(num_rows, batch_size, accumulation, table, tmp_path):
    rows = table.select(range(num_rows))
    trainer = distil(tmp_path, rows, per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation)
    assert trainer.state.global_step == 1

    reference = small_student()
    before = {name: tensor.clone() for name, tensor in reference.named_parameters()}
    terms = textbook_terms(reference, rows)
    weighted(terms).backward()
    assert logged(trainer)[0] == pytest.approx([weighted(terms).item(), *(term.item() for term in terms)], rel=1e-4)
    gradients = {name: tensor.grad for name, tensor in reference.named_parameters()}
    for name, after in trainer.model.named_parameters():
        taken = (before[name] - after.detach()) / SGD["learning_rate"]
        torch.testing.assert_close(taken.double(), gradients[name], rtol=1e-3, atol=1e-5, msg=name)
    assert max(gradient.abs().max() for gradient in gradients.values()) > 0.1


@pytest.mark.parametrize(("batch_size", "accumulation"), [(4, 2), (2, 4), (1, 8)])
def test_accumulation_takes_the_same_steps_as_whole_batches(batch_size, accumulation, table, tmp_path):
    # 14 rows: each epoch has a step of 8 rows and one of 6, which 4 × 2 divides into 4 and 2.
    rows, settings = table.select(range(14)), {"num_train_epochs": 2, "learning_rate": 0.2}
    whole = distil(tmp_path, rows, per_device_train_batch_size=8, **settings)
    parts = distil(
        tmp_path, rows, per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation, **settings
    )
    assert whole.state.global_step == parts.state.global_step == 4
    assert_same_weights(parts.model, whole.model, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(logged(parts), logged(whole), rtol=1e-4)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_labels_alone_accumulate_too(smoothing, plain_table, tmp_path):
    rows, settings = plain_table.select(range(14)), {"label_smoothing_factor": smoothing, "learning_rate": 0.2}
    whole, parts = (
        distil(
            tmp_path, rows, small_student(teacher_names=()), ImageClassificationTrainer,
            per_device_train_batch_size=8 // steps, gradient_accumulation_steps=steps, **settings,
        )
        for steps in (1, 2)
    )  # fmt: skip
    assert_same_weights(parts.model, whole.model, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(logged(parts, ["loss"]), logged(whole, ["loss"]), rtol=1e-4)


def test_stored_logits_and_online_teachers_take_the_same_steps(plain_table, table, teachers, tmp_path):
    weights_before = {name: copy.deepcopy(model.state_dict()) for name, (model, _) in teachers.items()}
    settings = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "learning_rate": 0.1}
    stored = distil(tmp_path, table, **settings)
    # In another order than the student's.
    online = distil(tmp_path, plain_table, teachers=dict(reversed(teachers.items())), **settings)
    assert_same_weights(online.model, stored.model, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(logged(online), logged(stored), rtol=1e-4)
    for name, (model, _) in teachers.items():
        assert not model.training
        for key, tensor in model.state_dict().items():
            assert torch.equal(tensor, weights_before[name][key]), f"training changed the teacher {name}: {key}"


@pytest.mark.parametrize(
    "fusion, settings, untaught",
    [
        ("mean_probabilities", {"label_weight": 0.0}, "class"),
        ("mean_logits", {"teacher_weights": [1.0, 0.0]}, "inv"),
        ("mean_logits", {"label_weight": 0.0, "teacher_weights": 0.0}, "class and conv and inv"),
        ("class_token", {"label_weight": 0.0, "teacher_weights": [1.0, 0.0]}, "class"),
        ("class_token", {"teacher_weights": 0.0}, None),
        ("mean_probabilities", {"label_weight": 0.01}, None),
    ],
)
def test_a_head_that_is_counted_but_not_taught_is_told(fusion, settings, untaught, table, tmp_path, caplog):
    distil(tmp_path, table, small_student(fusion=fusion), train=False, **settings)
    told = f'The fusion "{fusion}" counts the head of the {untaught} token, which a weight of 0 leaves as it started.'
    assert told in caplog.text if untaught else "as it started" not in caplog.text


def test_an_online_teacher_with_the_classes_in_another_order_is_put_right(plain_table, teachers, tmp_path, caplog):
    order = [1, 3, 0, 2]
    turned = copy.deepcopy(teachers["inv"][0])
    turned.config.id2label = {i: CLASSES[j] for i, j in enumerate(order)}
    for parameter in turned.classifier.parameters():
        parameter.data = parameter.data[order]
    expected = distil(tmp_path, plain_table, teachers=teachers, max_steps=3)
    found = distil(tmp_path, plain_table, teachers={**teachers, "inv": (turned, PROCESSOR)}, max_steps=3)
    assert_same_weights(found.model, expected.model, rtol=1e-4, atol=1e-6)
    assert 'The teacher "inv" has the data set\'s classes in another order' in caplog.text


def test_online_teachers_see_the_images_through_their_own_processors(plain_table, teachers, tmp_path):
    other = ViTImageProcessor(size={"height": 12, "width": 12}, image_mean=[0.2] * 3)
    seen = []
    hook = teachers["inv"][0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["pixel_values"]), with_kwargs=True
    )
    online = {"conv": teachers["conv"], "inv": (teachers["inv"][0], other)}
    distil(tmp_path, plain_table, teachers=online, per_device_train_batch_size=NUM_ROWS)
    hook.remove()
    expected = other([image.convert("RGB") for image in plain_table["image"]], return_tensors="pt")["pixel_values"]
    (seen,) = seen
    assert seen.shape == expected.shape
    # In the order of the sampler.
    distances = (seen[:, None] - expected[None]).abs().amax((2, 3, 4))
    assert sorted(distances.argmin(1).tolist()) == list(range(NUM_ROWS)) and distances.amin(1).max() == 0


def test_online_teachers_need_no_columns_and_ignore_those_that_are_there(table, teachers, tmp_path):
    zeros = table.map(lambda row: {"conv_logits": [0.0] * len(CLASSES)})
    settings = {"teachers": teachers, "per_device_train_batch_size": 8}
    assert_same_weights(
        distil(tmp_path, zeros, **settings).model, distil(tmp_path, table, **settings).model, rtol=0, atol=0
    )


# Rows and columns


class PairingTrainer(EnsembleDistillationTrainer):
    """Compares, inside each step, the batch's teacher logits with what the teachers say about the batch's images."""

    reference_teachers = ()

    def compute_loss(self, model, inputs, **kwargs):
        with torch.no_grad():
            recomputed = [teacher(inputs["pixel_values"]).logits for teacher, _ in self.reference_teachers.values()]
        self.compared.append((inputs["teacher_logits"], torch.stack(recomputed, dim=1), inputs["labels"]))
        return super().compute_loss(model, inputs, **kwargs)


@pytest.mark.parametrize("remove_unused_columns", [True, False])
@pytest.mark.parametrize(
    "arrange",
    [
        pytest.param(lambda table: table, id="as recorded"),
        pytest.param(lambda table: table.shuffle(seed=3), id="shuffled"),
        pytest.param(lambda table: table.select([11, 2, 2, 7, 0, 5]), id="selected"),
        pytest.param(lambda table: table.filter(lambda row: row["label"] != 1), id="filtered"),
        pytest.param(lambda table: table.sort("label").train_test_split(0.4, seed=1)["train"], id="sorted and split"),
        pytest.param(
            lambda table: concatenate_datasets([table.select(range(9, 16)), table.select(range(4))]), id="concatenated"
        ),
        pytest.param(lambda table: table.with_format("torch"), id="torch format"),
        pytest.param(lambda table: table.with_format("numpy", columns=["label"]), id="numpy format, one column"),
    ],
)
def test_logits_stay_with_their_images(arrange, remove_unused_columns, table, teachers, tmp_path):
    # Columns that no model knows, between and after the ones that are needed.
    rows = table.select_columns(["inv_logits", "image", "conv_logits", "label"])
    rows = arrange(rows.add_column("note", [f"row {i}" for i in range(len(rows))]))
    trainer = distil(
        tmp_path, rows, trainer_class=PairingTrainer, train=False, per_device_train_batch_size=4,
        remove_unused_columns=remove_unused_columns, num_train_epochs=2,
    )  # fmt: skip
    trainer.reference_teachers, trainer.compared = teachers, []
    trainer.train()

    stored, recomputed, labels = (torch.cat(tensors) for tensors in zip(*trainer.compared))
    assert stored.shape == recomputed.shape == (2 * len(rows), 2, len(CLASSES))
    torch.testing.assert_close(stored, recomputed, rtol=1e-4, atol=1e-4)
    assert sorted(labels.tolist()) == sorted(2 * [int(label) for label in rows.with_format(None)["label"]])


def test_float16_columns(plain_table, teachers, tmp_path):
    with_columns(plain_table, teachers, "float16").save_to_disk(tmp_path / "table")
    table = load_from_disk(tmp_path / "table")
    assert table.features["conv_logits"] == List(Value("float16"), length=len(CLASSES))
    trainer = distil(tmp_path, table, per_device_train_batch_size=NUM_ROWS)
    terms = [term.item() for term in textbook_terms(small_student(), table)]
    assert logged(trainer) == [pytest.approx([weighted(terms), *terms], rel=1e-4)]


def test_rows_can_be_told_apart_by_their_logits(table, teachers):
    # A guard of the test above: swapped rows or swapped teachers must show.
    flat = torch.tensor(np.concatenate([np.array(table[f"{name}_logits"]) for name in teachers]))
    distances = torch.cdist(flat, flat) + 10 * torch.eye(len(flat))
    assert distances.min() > 0.01


def test_other_column_names(table, tmp_path):
    renamed = table.rename_columns({"image": "picture", "label": "animal"})
    expected = distil(tmp_path, table, per_device_train_batch_size=8)
    found = distil(tmp_path, renamed, per_device_train_batch_size=8)
    named = distil(tmp_path, renamed, per_device_train_batch_size=8, image_column="picture", label_column="animal")
    for trainer in (found, named):
        assert_same_weights(trainer.model, expected.model, rtol=0, atol=0)


def test_images_are_decoded_in_worker_processes_too(table, tmp_path):
    settings = {"per_device_train_batch_size": 4, "eval_dataset": table}
    here = distil(tmp_path, table, **settings)
    there = distil(tmp_path, table, dataloader_num_workers=1, **settings)
    assert_same_weights(there.model, here.model, rtol=0, atol=0)


# Logs


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("log", [{"logging_steps": 1}, {"logging_steps": 2}, {"logging_strategy": "epoch"}])
def test_logged_terms_are_the_means_over_the_rows(log, accumulation, table, tmp_path):
    # Without learning every step sees the same student, so an epoch's means are known.
    trainer = distil(
        tmp_path, table, learning_rate=0.0, per_device_train_batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation, num_train_epochs=2, **log,
    )  # fmt: skip
    terms = [term.item() for term in textbook_terms(small_student(), table)]
    assert trainer.state.global_step == 8
    np.testing.assert_allclose(np.mean(logged(trainer), axis=0), [weighted(terms), *terms], rtol=1e-4)


@pytest.mark.parametrize("mode", ["soft", "hard"])
@pytest.mark.parametrize(
    ("num_rows", "log"),
    [
        pytest.param(16, {"logging_steps": 1}, id="every step"),
        pytest.param(16, {"logging_steps": 3}, id="every third step"),
        pytest.param(16, {"logging_strategy": "epoch"}, id="every epoch"),
        pytest.param(14, {"logging_steps": 1}, id="every step, last batch smaller"),
        pytest.param(13, {"logging_strategy": "epoch"}, id="every epoch, last batch smaller"),
    ],
)
def test_the_logged_loss_is_the_weighted_sum_of_its_logged_terms(num_rows, log, mode, table, tmp_path):
    trainer = distil(
        tmp_path, table.select(range(num_rows)), per_device_train_batch_size=4, num_train_epochs=3,
        distillation_mode=mode, learning_rate=0.1, **log,
    )  # fmt: skip
    for loss, *terms in logged(trainer):
        assert loss == pytest.approx(weighted(terms), rel=1e-5)


def test_evaluation_between_steps_does_not_enter_the_training_log(table, tmp_path):
    other = table.filter(lambda row: row["label"] == 0)
    settings = {"learning_rate": 0.0, "per_device_train_batch_size": 4, "logging_steps": 4}
    trainer = distil(tmp_path, table, eval_dataset=other, eval_strategy="steps", eval_steps=1, **settings)
    assert sum("eval_loss" in entry for entry in trainer.state.log_history) == 4
    terms = [term.item() for term in textbook_terms(small_student(), table)]
    assert logged(trainer) == [pytest.approx([weighted(terms), *terms], rel=1e-4)]


def test_a_second_training_starts_its_log_anew(table, tmp_path):
    # The first stops between two logs.
    settings = {"max_steps": 3, "logging_steps": 2, "per_device_train_batch_size": 4}
    trainer = distil(tmp_path, table, **settings)
    trainer.train()
    entries = logged(trainer)
    assert len(entries) == 1
    for loss, *terms in entries:
        assert loss == pytest.approx(weighted(terms), rel=1e-5)


def test_plain_training_logs_no_teachers(plain_table, tmp_path):
    trainer = distil(tmp_path, plain_table, small_student(teacher_names=()), ImageClassificationTrainer)
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert entries and not any("label_loss" in entry for entry in entries)


# Modes


@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_every_term_falls(mode, table, tmp_path):
    trainer = distil(
        tmp_path, table, distillation_mode=mode, optim="adamw_torch", learning_rate=1e-2, num_train_epochs=25,
        per_device_train_batch_size=8, logging_strategy="epoch", max_grad_norm=1.0,
    )  # fmt: skip
    first, *_, last = logged(trainer)
    assert all(after < 0.5 * before for before, after in zip(first, last))


def test_hard_mode_learns_the_teachers_choices(table, tmp_path):
    trainer = distil(tmp_path, table, learning_rate=0.0, distillation_mode="hard", per_device_train_batch_size=8)
    _, _, logits = tensors_of(table)
    with torch.no_grad():
        tokens = small_student()(tensors_of(table)[0]).teacher_token_logits
    expected = [torch.nn.functional.cross_entropy(tokens[:, i], logits[i].argmax(-1)).item() for i in range(2)]
    assert np.mean(logged(trainer, TERMS[2:]), axis=0) == pytest.approx(expected, rel=1e-4)


def test_label_smoothing_smooths_training_only(table, tmp_path):
    settings = {"label_smoothing_factor": 0.2, "learning_rate": 0.0, "per_device_train_batch_size": NUM_ROWS}
    trainer = distil(tmp_path, table, eval_dataset=table, **settings)
    smooth = [term.item() for term in textbook_terms(small_student(), table, smoothing=0.2)]
    plain = [term.item() for term in textbook_terms(small_student(), table)]
    assert logged(trainer) == [pytest.approx([weighted(smooth), *smooth], rel=1e-4)]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(weighted(plain), rel=1e-4)


@pytest.fixture
def state_of_its_own():
    """Accelerate's mixed precision belongs to the process; here it ends with the test."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_bf16_runs_the_student_in_bf16_and_keeps_its_weights(state_of_its_own, table, teachers, tmp_path):
    settings = {"per_device_train_batch_size": 8, "learning_rate": 0.1, "eval_dataset": table}
    full = distil(tmp_path, table, **settings)
    half = distil(tmp_path, table, bf16=True, **settings)
    online = distil(tmp_path, table, bf16=True, teachers=teachers, **settings)
    assert all(parameter.dtype == torch.float32 for parameter in half.model.parameters())
    for trainer in (half, online):
        # Close to float32, but not the same: else nothing ran in bf16.
        np.testing.assert_allclose(logged(trainer), logged(full), rtol=0.03)
        assert logged(trainer) != logged(full)
    assert half.evaluate()["eval_loss"] == pytest.approx(full.evaluate()["eval_loss"], rel=0.03)


def test_one_weight_and_one_temperature_serve_all_teachers(table, tmp_path):
    one = distil(tmp_path, table, teacher_weights=0.5, temperature=3.0)
    each = distil(tmp_path, table, teacher_weights=[0.5, 0.5], temperature=[3.0, 3.0])
    assert_same_weights(one.model, each.model, rtol=0, atol=0)


@pytest.mark.parametrize("names", [("inv", "conv"), ("inv",)])
def test_settings_follow_the_students_order_of_teachers(names, table, tmp_path):
    weights = [WEIGHTS[["conv", "inv"].index(name)] for name in names]
    temperatures = [TEMPERATURES[["conv", "inv"].index(name)] for name in names]
    student = small_student(teacher_names=names)
    trainer = distil(
        tmp_path, table, student, learning_rate=0.0, teacher_weights=weights, temperature=temperatures,
        per_device_train_batch_size=NUM_ROWS,
    )  # fmt: skip
    pixel_values, _, logits = tensors_of(table)
    with torch.no_grad():
        tokens = small_student(teacher_names=names)(pixel_values).teacher_token_logits
    for i, name in enumerate(names):
        student, teacher = (
            (x / temperatures[i]).log_softmax(-1) for x in (tokens[:, i], logits[["conv", "inv"].index(name)])
        )
        divergence = torch.nn.KLDivLoss(reduction="batchmean", log_target=True)(student, teacher).item()
        assert logged(trainer, [f"{name}_loss"]) == [[pytest.approx(temperatures[i] ** 2 * divergence, rel=1e-4)]]


# Resuming


@pytest.mark.parametrize(("accumulation", "bf16"), [(1, False), (2, False), (1, True)])
def test_a_resumed_run_ends_bit_identical(accumulation, bf16, table, tmp_path):
    # 14 rows: 4 steps an epoch, so step 6 is in the middle of the second. Dropout draws random numbers in every step.
    settings = {
        "optim": "adamw_torch", "learning_rate": 1e-2, "lr_scheduler_type": "cosine", "warmup_steps": 2,
        "weight_decay": 0.05, "num_train_epochs": 3, "per_device_train_batch_size": 4 // accumulation,
        "gradient_accumulation_steps": accumulation, "save_strategy": "steps", "save_steps": 6, "bf16": bf16,
    }  # fmt: skip
    rows, dropout = table.select(range(14)), {"hidden_dropout_prob": 0.2}
    whole = distil(tmp_path / "whole", rows, small_student(**dropout), **settings)
    assert whole.state.global_step == 12
    resumed = distil(tmp_path / "resumed", rows, small_student(seed=2, **dropout), train=False, **settings)
    torch.rand(100)  # a new process's random numbers have come to another place
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))

    assert_same_weights(resumed.model, whole.model, rtol=0, atol=0)
    first, second = (trainer.optimizer.state_dict()["state"] for trainer in (whole, resumed))
    assert first.keys() == second.keys() and first
    for number, state in first.items():
        assert all(torch.equal(tensor, second[number][key]) for key, tensor in state.items())
    assert logged(resumed) == logged(whole) and len(logged(resumed)) == 12
    # And it was resumed, not run again.
    untouched = distil(tmp_path / "other", rows, small_student(seed=2, **dropout), **settings)
    assert logged(untouched) != logged(whole)


# Evaluation


@pytest.mark.parametrize("batch_size", [16, 5])
def test_evaluation_with_and_without_columns(batch_size, plain_table, table, teachers, tmp_path):
    settings = {"per_device_eval_batch_size": batch_size, "learning_rate": 0.0}
    trainer = distil(tmp_path, table, eval_dataset={"with": table, "without": plain_table}, **settings)
    terms = [term.item() for term in textbook_terms(small_student(), table)]
    results = trainer.evaluate()
    assert results["eval_with_loss"] == pytest.approx(weighted(terms), rel=1e-4)
    assert results["eval_without_loss"] == pytest.approx(LABEL_WEIGHT * terms[0], rel=1e-4)
    assert results["eval_with_accuracy"] == results["eval_without_accuracy"]
    # One of two columns is not enough.
    partial = trainer.evaluate(table.remove_columns("inv_logits"))
    assert partial["eval_loss"] == pytest.approx(LABEL_WEIGHT * terms[0], rel=1e-4)
    online = distil(tmp_path, plain_table, eval_dataset=table, teachers=teachers, **settings)
    assert online.evaluate()["eval_loss"] == pytest.approx(LABEL_WEIGHT * terms[0], rel=1e-4)


def test_default_metrics_look_at_each_token(plain_table, table, tmp_path):
    trainer = distil(tmp_path, table, eval_dataset=plain_table, learning_rate=0.1, per_device_eval_batch_size=5)
    results = trainer.evaluate()
    pixel_values, labels, _ = tensors_of(plain_table)
    with torch.no_grad():
        outputs = trainer.model.eval()(pixel_values)
    tokens = outputs.teacher_token_logits
    expected = {"accuracy": outputs.logits, "class_token_accuracy": outputs.class_logits}
    expected |= {"conv_token_accuracy": tokens[:, 0], "inv_token_accuracy": tokens[:, 1]}
    for name, logits in expected.items():
        assert results[f"eval_{name}"] == pytest.approx((logits.argmax(-1) == labels).double().mean().item()), name


@pytest.mark.parametrize("trainer_class", [EnsembleDistillationTrainer, ImageClassificationTrainer])
def test_own_metrics_see_plain_logits(trainer_class, plain_table, table, tmp_path):
    seen = []

    def own_metrics(prediction):
        seen.append(prediction)
        return {"largest": float(prediction.predictions.max())}

    trainer = distil(
        tmp_path, table, trainer_class=trainer_class, eval_dataset=plain_table, compute_metrics=own_metrics,
        per_device_eval_batch_size=5,
    )  # fmt: skip
    results = trainer.evaluate()
    pixel_values, labels, _ = tensors_of(plain_table)
    with torch.no_grad():
        logits = trainer.model.eval()(pixel_values).logits.numpy()
    (prediction,) = seen
    assert isinstance(prediction.predictions, np.ndarray) and prediction.predictions.shape == (NUM_ROWS, len(CLASSES))
    np.testing.assert_allclose(prediction.predictions, logits, atol=1e-5)
    assert prediction.label_ids.tolist() == labels.tolist()
    assert results["eval_largest"] == pytest.approx(logits.max(), abs=1e-5) and "eval_accuracy" not in results


# Training on labels alone


@pytest.mark.parametrize("kind", ["ibresnet", "resnet", "vit"])
def test_any_classifier_learns_from_labels(kind, plain_table, tmp_path):
    torch.manual_seed(0)
    if kind == "ibresnet":
        model = small_teacher("involution")
    elif kind == "resnet":
        config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], **class_settings())
        model = ResNetForImageClassification(config)
    else:
        shape = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_attention_heads": 2}
        config = ViTConfig(num_hidden_layers=1, intermediate_size=32, **shape, **class_settings())
        model = ViTForImageClassification(config)
    trainer = distil(
        tmp_path, plain_table, model, ImageClassificationTrainer, eval_dataset=plain_table, optim="adamw_torch",
        learning_rate=1e-2, num_train_epochs=20, per_device_train_batch_size=8, max_grad_norm=1.0,
    )  # fmt: skip
    losses = logged(trainer, ["loss"])
    assert losses[-1][0] < 0.5 * losses[0][0]
    results = trainer.evaluate()
    assert results["eval_accuracy"] == 1.0 and results["eval_negative_log_likelihood"] < 0.5
    assert not any("token" in name for name in results)


def test_a_student_with_teacher_tokens_can_train_on_labels_alone(table, tmp_path):
    trainer = distil(tmp_path, table, trainer_class=ImageClassificationTrainer, per_device_train_batch_size=NUM_ROWS)
    expected = textbook_terms(small_student(), table)[0].item()
    assert logged(trainer, ["loss"]) == [[pytest.approx(expected, rel=1e-4)]]


def test_the_image_processor_is_saved_with_every_checkpoint(table, tmp_path):
    distil(tmp_path, table, per_device_train_batch_size=8, save_strategy="steps", save_steps=1)
    for step in (1, 2):
        processor = ViTImageProcessor.from_pretrained(tmp_path / f"checkpoint-{step}")
        assert processor.to_dict()["size"] == PROCESSOR.to_dict()["size"]
        IBViTForImageClassification.from_pretrained(tmp_path / f"checkpoint-{step}")


# As any other `Trainer`


@pytest.mark.parametrize("trainer_class", [EnsembleDistillationTrainer, ImageClassificationTrainer])
def test_tables_can_be_given_to_evaluate_and_predict_later(trainer_class, plain_table, tmp_path):
    trainer = trainer_class(model=small_student(), args=arguments(tmp_path), processing_class=PROCESSOR)
    pixel_values, labels, _ = tensors_of(plain_table)
    with torch.no_grad():
        logits = small_student().eval()(pixel_values).logits
    accuracy = (logits.argmax(-1) == labels).double().mean().item()
    assert trainer.evaluate(plain_table)["eval_accuracy"] == pytest.approx(accuracy)
    predicted = trainer.predict(plain_table)
    assert predicted.label_ids.tolist() == labels.tolist()


def test_the_model_can_be_built_by_the_trainer(table, tmp_path):
    # As a search over hyperparameters does.
    trainer = EnsembleDistillationTrainer(
        model_init=lambda: small_student(), args=arguments(tmp_path), train_dataset=table, processing_class=PROCESSOR
    )
    trainer.train()
    # One batch of all rows, whose order may differ.
    assert_same_weights(trainer.model, distil(tmp_path, table).model, rtol=1e-4, atol=1e-5)


def test_the_documented_example_runs(table, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"student": small_student(), "table": table, "validation": table, "image_processor": PROCESSOR}
    namespace |= {name: getattr(hf_ibdistill, name) for name in hf_ibdistill.__all__}
    for example in doctest.DocTestParser().get_examples(EnsembleDistillationTrainer.__doc__):
        exec(example.source, namespace)
    assert namespace["trainer"].state.global_step > 0


# Refused before the first step


class NoStep(TrainerCallback):
    def on_step_begin(self, *args, **kwargs):
        raise AssertionError("a step was begun on input that should have been refused")


def refuse(folder, table, message, student=None, error=ValueError, **settings):
    with pytest.raises(error, match=message):
        distil(folder, table, student, callbacks=[NoStep()], num_train_epochs=1, **settings)


def with_logits(table, name, logits):
    logits = [list(row) for row in logits]
    feature = List(Value("float32"), length=len(logits[0]))
    return table.remove_columns(name).add_column(name, logits, feature=feature)


@pytest.mark.parametrize("trainer_class", [EnsembleDistillationTrainer, ImageClassificationTrainer])
def test_no_image_processor(trainer_class, table, tmp_path):
    with pytest.raises(ValueError, match="needs the model's image processor: processing_class=image_processor"):
        trainer_class(model=small_student(), args=arguments(tmp_path), train_dataset=table)


@pytest.mark.parametrize("student", [{"teacher_names": ()}, None])
def test_no_teacher_tokens(student, table, tmp_path):
    model = small_teacher("convolution") if student is None else small_student(**student)
    refuse(
        tmp_path,
        table,
        "The student has no teacher tokens; build it with IBViTConfig.*ImageClassificationTrainer",
        model,
    )


@pytest.mark.parametrize("name", ["teacher_weights", "temperature"])
@pytest.mark.parametrize("values", [[1.0, 2.0, 3.0], [0.5] * 5])
def test_wrong_number_of_settings(name, values, table, tmp_path):
    message = rf"{name} is one number or one for each teacher \(conv, inv\); got \[{values[0]}, {values[1]}"
    refuse(tmp_path, table, message, **{name: values})


def test_arguments_without_distillation(table, tmp_path):
    settings = {"eval_strategy": "no", "use_cpu": True}
    for args in (TrainingArguments(str(tmp_path), **settings), ImageTrainingArguments(str(tmp_path), **settings)):
        with pytest.raises((TypeError, ValueError), match="DistillationArguments"):
            EnsembleDistillationTrainer(
                model=small_student(), args=args, train_dataset=table, processing_class=PROCESSOR
            )


@pytest.mark.parametrize("names", [("conv",), ("conv", "involution"), ("conv", "inv", "third"), ()])
def test_online_teachers_have_the_students_names(names, table, teachers, tmp_path):
    given = dict(zip(names, [*teachers.values(), teachers["conv"]]))
    message = rf"The student's teachers are \['conv', 'inv'\]; got teachers \[{', '.join(map(repr, sorted(names)))}\]"
    refuse(tmp_path, table, message, teachers=given)


def test_missing_column(table, plain_table, teachers, tmp_path):
    message = (
        r'teacher "third", but the table has no column "third_logits" \(logits columns: conv_logits, inv_logits\)'
    )
    refuse(tmp_path, table, message, small_student(teacher_names=("conv", "third")), teacher_weights=1.0)
    message = r'has no column "conv_logits" \(logits columns: none\).*record_teacher_logits, or pass teachers='
    refuse(tmp_path, plain_table, message)


def test_column_of_another_number_of_classes(table, tmp_path):
    wrong = with_logits(table, "inv_logits", np.zeros((NUM_ROWS, 7)))
    refuse(tmp_path, wrong, '"inv_logits" holds logits of 7 classes; logits of the student\'s 4 classes are needed')


@pytest.mark.parametrize("feature", [List(Value("float32")), Value("float32"), Value("string")])
def test_column_that_is_no_list_of_numbers(feature, plain_table, table, tmp_path):
    value = [0.0] * 4 if isinstance(feature, List) else 0.0 if feature.dtype == "float32" else "0"
    wrong = table.remove_columns("conv_logits").add_column("conv_logits", [value] * NUM_ROWS, feature=feature)
    refuse(tmp_path, wrong, '"conv_logits" holds not a list .*; logits of the student\'s 4 classes are needed')


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), None])
def test_logits_that_are_not_finite(bad, table, tmp_path):
    logits = np.array(table["inv_logits"]).tolist()
    logits[5][0] = logits[9][3] = bad
    wrong = with_logits(table, "inv_logits", logits)
    refuse(tmp_path, wrong, r'"inv_logits" has missing, NaN or infinite logits in 2 rows \(first \[5, 9\]\)')
    # Rows are those of the table as it was given.
    refuse(tmp_path, wrong.select([9, 0, 1, 5, 2]), r"in 2 rows \(first \[0, 3\]\)")
    assert distil(tmp_path, wrong.select([0, 1, 2, 3]), max_steps=1).state.global_step == 1


def test_rows_without_logits(table, tmp_path):
    logits = np.array(table["inv_logits"]).tolist()
    feature = List(Value("float32"), length=4)
    logits[7] = None
    wrong = table.remove_columns("inv_logits").add_column("inv_logits", logits, feature=feature)
    refuse(tmp_path, wrong, r'"inv_logits" has missing, NaN or infinite logits in 1 rows \(first \[7\]\)')


def test_rows_are_named_in_long_tables_too():
    logits = np.zeros((10_000, 2), dtype=np.float16)
    logits[[3, 4095, 4096, 9_999], 1] = np.nan
    table = Dataset.from_dict(
        {"conv_logits": list(logits)}, features=Features({"conv_logits": List(Value("float16"), length=2)})
    )
    with pytest.raises(ValueError, match=r"in 4 rows \(first \[3, 4095, 4096, 9999\]\)"):
        check_columns(table, ["conv"], ["cat", "dog"])
    with pytest.raises(ValueError, match=r"in 2 rows \(first \[0, 1\]\)"):
        check_columns(table.select([4096, 3, 5, 6]), ["conv"], ["cat", "dog"])


def recorded_by(table, teachers):
    """The table with the record that recording attaches, from and to the disk."""
    table = table.select(range(len(table)))
    attach_record(
        table, build_record([describe_teacher(one, LogitsEncoding()) for one in load_teachers(teachers)], {}, None)
    )
    return table


def test_the_teachers_other_classes_are_found_in_the_record(table, teachers, tmp_path):
    recorded_by(table, teachers).save_to_disk(tmp_path / "right")
    right = load_from_disk(tmp_path / "right")
    assert distil(tmp_path, right, max_steps=1).state.global_step == 1

    reordered = {**teachers, "inv": (small_teacher("involution", ["dog", "cat", "owl", "fox"]), PROCESSOR)}
    recorded_by(table, reordered).save_to_disk(tmp_path / "wrong")
    wrong = load_from_disk(tmp_path / "wrong")
    message = 'classes and those of the teacher "inv" differ: the same names in another order.*position'
    refuse(tmp_path, wrong, message)
    refuse(tmp_path, wrong.shuffle(seed=0).select(range(5)), message)
    # Two recordings joined: the second is looked at too.
    refuse(tmp_path, concatenate_datasets([right, wrong]), message)
    # A teacher that the student does not listen to does not matter.
    listener = small_student(teacher_names=("conv",))
    assert distil(tmp_path, wrong, listener, max_steps=1, teacher_weights=1.0, temperature=1.0).state.global_step == 1


def test_teachers_without_class_names_pass_by_their_number(table, teachers, tmp_path):
    unnamed = {**teachers, "inv": (small_teacher("involution", [f"LABEL_{i}" for i in range(4)]), PROCESSOR)}
    assert distil(tmp_path, recorded_by(table, unnamed), max_steps=1).state.global_step == 1


def test_online_teachers_of_other_classes(plain_table, teachers, tmp_path):
    other = {**teachers, "inv": (small_teacher("involution", ["cat", "dog", "owl", "cow"]), PROCESSOR)}
    refuse(
        tmp_path, plain_table, r'the teacher "inv" differ: \[\'fox\'\] only in the first, \[\'cow\'\]', teachers=other
    )
    other = {**teachers, "conv": (small_teacher("convolution", CLASSES[:3]), PROCESSOR)}
    refuse(tmp_path, plain_table, 'the teacher "conv" has 3 classes; the data set has 4', teachers=other)


@pytest.mark.parametrize("trainer_class", [EnsembleDistillationTrainer, ImageClassificationTrainer])
def test_a_student_of_other_classes(trainer_class, table, tmp_path):
    student = small_student(names=["cat", "dog", "owl", "cow"])
    refuse(
        tmp_path, table, r"classes and those of the model .* differ: \['fox'\]", student, trainer_class=trainer_class
    )
    student = small_student(names=["fox", "cat", "dog", "owl"])
    refuse(tmp_path, table, "the same names in another order", student, trainer_class=trainer_class)
    student = small_student(names=[*CLASSES, "cow"])
    refuse(tmp_path, table, "the model .* has 5 classes; the data set has 4", student, trainer_class=trainer_class)


def with_class_names(table, names):
    return table.cast_column("label", ClassLabel(names=names))


@pytest.mark.parametrize("trainer_class", [EnsembleDistillationTrainer, ImageClassificationTrainer])
def test_an_evaluation_set_of_other_classes(trainer_class, plain_table, table, tmp_path):
    other = with_class_names(plain_table, ["cat", "dog", "owl", "cow"])
    settings = {"trainer_class": trainer_class, "eval_strategy": "epoch"}
    refuse(tmp_path, table, r"beside the evaluation set\) differ: .*cow", eval_dataset=other, **settings)
    message = r"beside the night set\) differ: .*cow"
    refuse(tmp_path, table, message, eval_dataset={"day": plain_table, "night": other}, **settings)
    # Nor when it comes later.
    trainer = distil(tmp_path, table, trainer_class=trainer_class, max_steps=1)
    with pytest.raises(ValueError, match="differ: .*cow"):
        trainer.evaluate(other)


@pytest.mark.parametrize("trainer_class", [EnsembleDistillationTrainer, ImageClassificationTrainer])
def test_empty_tables(trainer_class, plain_table, table, tmp_path):
    empty, settings = plain_table.select([]), {"trainer_class": trainer_class, "eval_strategy": "epoch"}
    refuse(tmp_path, table.select([]), "The training set is empty", trainer_class=trainer_class)
    refuse(tmp_path, table, "The evaluation set is empty", eval_dataset=empty, **settings)
    sets = {"day": plain_table, "night": empty}
    refuse(tmp_path, table, "The night set is empty", eval_dataset=sets, **settings)


@pytest.mark.parametrize("trainer_class", [EnsembleDistillationTrainer, ImageClassificationTrainer])
def test_tables_that_are_no_tables(trainer_class, table, tmp_path):
    settings = {"trainer_class": trainer_class, "error": TypeError}
    for wrong, name in (
        (DatasetDict(train=table), "DatasetDict"),
        ([table[0]], "list"),
    ):
        refuse(tmp_path, wrong, f"The training set is a datasets.Dataset; got {name}", **settings)
    evaluated = {"eval_dataset": table.to_iterable_dataset(), "eval_strategy": "epoch"}
    refuse(tmp_path, table, "The evaluation set is a datasets.Dataset; got IterableDataset", **settings, **evaluated)


@pytest.mark.parametrize("trainer_class", [EnsembleDistillationTrainer, ImageClassificationTrainer])
def test_tables_with_a_transform(trainer_class, plain_table, table, tmp_path):
    def transform(rows):
        return rows

    message = r"has a transform of its own. Remove it \(dataset.reset_format\(\)\)"
    refuse(tmp_path, table.with_transform(transform), message, trainer_class=trainer_class)
    evaluated = {"eval_dataset": plain_table.with_transform(transform), "eval_strategy": "epoch"}
    refuse(tmp_path, table, message, trainer_class=trainer_class, **evaluated)


@pytest.mark.parametrize("trainer_class", [EnsembleDistillationTrainer, ImageClassificationTrainer])
def test_tables_without_the_columns(trainer_class, plain_table, table, tmp_path):
    settings = {"trainer_class": trainer_class}
    refuse(tmp_path, table.remove_columns("image"), "There is no image column; the columns are label", **settings)
    refuse(tmp_path, table.remove_columns("label"), "There is no label column; the columns are image", **settings)
    refuse(tmp_path, table, 'There is no column "photo"; the columns are image', image_column="photo", **settings)
    renamed = plain_table.rename_column("label", "animal")
    evaluated = {"eval_dataset": renamed, "eval_strategy": "epoch", "label_column": "label"}
    refuse(tmp_path, table, 'There is no column "label"; the columns are image, animal', **settings, **evaluated)
    numbers = table.cast_column("label", Value("int64"))
    refuse(tmp_path, numbers, '"label" is .*int64.*without class names', **settings)


def test_logits_columns_of_the_evaluation_set(table, tmp_path):
    # They enter its loss, so they are held to the same; and an epoch is a lot of time.
    wrong = with_logits(table, "inv_logits", np.zeros((NUM_ROWS, 7)))
    refuse(tmp_path, table, '"inv_logits" holds logits of 7 classes', eval_dataset=wrong, eval_strategy="epoch")
    logits = np.array(table["inv_logits"])
    logits[5, 0] = np.nan
    wrong = with_logits(table, "inv_logits", logits)
    refuse(tmp_path, table, r'"inv_logits" has .*first \[5\]', eval_dataset=wrong, eval_strategy="epoch")


# Several processes

LAUNCH = [
    sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
]  # fmt: skip
# Settings of a process of two; 8 rows a step in all.
SCENARIOS = {
    "plain": {"per_device_train_batch_size": 4},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "averaged by process": {"per_device_train_batch_size": 4, "average_tokens_across_devices": False},
    "hard": {"per_device_train_batch_size": 4, "distillation_mode": "hard", "label_smoothing_factor": 0.1},
    "online": {"per_device_train_batch_size": 4, "online": True},
}


def run_scenario(folder, output_dir, online=False, **settings):
    """Train from what is saved in the folder: 2 steps, then an evaluation."""
    table = load_from_disk(folder / "table")
    if online:
        names = ("conv", "inv")
        settings["teachers"] = {
            name: (IBResNetForImageClassification.from_pretrained(folder / name), PROCESSOR) for name in names
        }
    student = IBViTForImageClassification.from_pretrained(folder / "student")
    settings = {"learning_rate": 0.1, "eval_dataset": table, "per_device_eval_batch_size": 4, **settings}
    trainer = distil(output_dir, table, student, **settings)
    return trainer, trainer.evaluate()


@pytest.fixture(scope="module")
def two_processes(table, teachers, tmp_path_factory):
    """The folder in which two processes have run all scenarios."""
    folder = tmp_path_factory.mktemp("two_processes")
    table.save_to_disk(folder / "table")
    small_student().save_pretrained(folder / "student")
    for name, (model, _) in teachers.items():
        model.save_pretrained(folder / name)
    root = Path(hf_ibdistill.__file__).parents[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(root), environment.get("PYTHONPATH", "")])
    command = [*LAUNCH, __file__, str(folder)]
    completed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert completed.returncode == 0, completed.stderr[-4000:]
    return folder


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes_take_the_steps_of_one(name, two_processes, tmp_path):
    settings = {**SCENARIOS[name], "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    trainer, results = run_scenario(two_processes, tmp_path, **settings)
    distributed = json.loads((two_processes / name / "logs.json").read_text())
    assert distributed["processes"] == 2 and trainer.args.world_size == 1
    assert trainer.state.global_step == distributed["steps"] == 2
    model = IBViTForImageClassification.from_pretrained(two_processes / name)
    assert_same_weights(model, trainer.model, rtol=1e-4, atol=1e-5)
    start = IBViTForImageClassification.from_pretrained(two_processes / "student").state_dict()
    assert max((tensor - start[key]).abs().max() for key, tensor in model.state_dict().items()) > 0.01
    np.testing.assert_allclose(distributed["logged"], logged(trainer), rtol=1e-4)
    assert distributed["results"]["eval_loss"] == pytest.approx(results["eval_loss"], rel=1e-4)
    for metric in ("eval_accuracy", "eval_conv_token_accuracy"):
        assert distributed["results"][metric] == results[metric]


def main():
    folder = Path(sys.argv[1])
    for name, settings in SCENARIOS.items():
        trainer, results = run_scenario(folder, folder / name, **settings)
        if trainer.is_world_process_zero():
            trainer.accelerator.unwrap_model(trainer.model).save_pretrained(folder / name)
            logs = {"processes": trainer.args.world_size, "steps": trainer.state.global_step}
            logs |= {"logged": logged(trainer), "results": results}
            (folder / name / "logs.json").write_text(json.dumps(logs))


if __name__ == "__main__":
    main()


# torch.compile


@pytest.mark.parametrize("online", [False, True])
def test_compiled_training_equals_eager(online, table, teachers, tmp_path):
    # 30 rows in batches of 8: the last one is short, and evaluation has another size, mode and no gradient.
    settings = {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 5, "num_train_epochs": 2}
    settings |= {"eval_strategy": "epoch", "eval_dataset": table} | ({"teachers": teachers} if online else {})
    expected = distil(tmp_path / "a", table, **settings)
    torch.compiler.reset()
    # Tracing alone: what a backend generates is torch's. At the limit the model would silently run uncompiled.
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        compiled = distil(tmp_path / "b", table, torch_compile=True, torch_compile_backend="aot_eager", **settings)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    np.testing.assert_allclose(logged(compiled), logged(expected), rtol=1e-4)
    compiled.save_model(tmp_path / "saved")
    loaded = IBViTForImageClassification.from_pretrained(tmp_path / "saved")
    for name, value in expected.model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value, rtol=1e-4, atol=1e-5)
