"""The trainers on real tables: what a step computes, what is logged, what is refused before the first step."""

import copy
import doctest
import re
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    DatasetInfo,
    Features,
    Image,
    List,
    Value,
    concatenate_datasets,
    load_from_disk,
)
from distilling import (
    CLASSES,
    LABEL_WEIGHT,
    NUM_ROWS,
    PROCESSOR,
    SGD,
    TEMPERATURES,
    TERMS,
    WEIGHTS,
    arguments,
    assert_same_weights,
    class_settings,
    distill,
    logged,
    small_images,
    small_student,
    small_teacher,
    small_teachers,
    with_columns,
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
from transformers import trainer as transformers_trainer
from transformers.trainer_utils import BestRun, HPSearchBackend

import hf_ibdistill
from hf_ibdistill import (
    DistillationArguments,
    EnsembleDistillationTrainer,
    IBViTForImageClassification,
    ImageClassificationTrainer,
    ImageTrainingArguments,
    ViewRecipe,
    load_teachers,
)
from hf_ibdistill.logits.encoding import LogitsEncoding
from hf_ibdistill.logits.provenance import attach_record, build_record, check_columns
from hf_ibdistill.rows import ImageRows
from hf_ibdistill.training import trainer as trainer_module


BOTH_TRAINERS = pytest.mark.parametrize("trainer_class", [EnsembleDistillationTrainer, ImageClassificationTrainer])


@pytest.fixture(scope="module")
def teachers():
    return small_teachers()


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
    trainer = distill(tmp_path, rows, per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation)
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
    whole = distill(tmp_path, rows, per_device_train_batch_size=8, **settings)
    parts = distill(
        tmp_path, rows, per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation, **settings
    )
    assert whole.state.global_step == parts.state.global_step == 4
    assert_same_weights(parts.model, whole.model, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(logged(parts), logged(whole), rtol=1e-4)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_labels_alone_accumulate_alike(smoothing, plain_table, tmp_path):
    rows, settings = plain_table.select(range(14)), {"label_smoothing_factor": smoothing, "learning_rate": 0.2}
    whole, parts = (
        distill(
            tmp_path, rows, small_student(teacher_names=()), ImageClassificationTrainer,
            per_device_train_batch_size=8 // steps, gradient_accumulation_steps=steps, **settings,
        )
        for steps in (1, 2)
    )  # fmt: skip
    assert_same_weights(parts.model, whole.model, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(logged(parts, ["loss"]), logged(whole, ["loss"]), rtol=1e-4)


def test_a_loss_that_is_nan_is_logged_as_it_is(table, tmp_path):
    student = small_student()
    with torch.no_grad():
        student.class_head.weight[0, 0] = torch.nan
    # transformers would log 0 by default.
    assert np.isnan(logged(distill(tmp_path, table, student), ["loss"])).all()


def test_stored_logits_and_online_teachers_take_the_same_steps(plain_table, table, teachers, tmp_path):
    weights_before = {name: copy.deepcopy(model.state_dict()) for name, (model, _) in teachers.items()}
    settings = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "learning_rate": 0.1}
    stored = distill(tmp_path, table, **settings)
    # In another order than the student's.
    online = distill(tmp_path, plain_table, teachers=dict(reversed(teachers.items())), **settings)
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
        ("class_token", {"label_weight": 0.0, "teacher_weights": [1.0, 0.0]}, "class and inv"),
        ("class_token", {"teacher_weights": 0.0}, "conv and inv"),
        ("mean_probabilities", {"label_weight": 0.01}, None),
    ],
)
def test_a_head_that_is_not_taught_is_warned_of(fusion, settings, untaught, table, tmp_path, caplog):
    distill(tmp_path, table, small_student(fusion=fusion), train=False, **settings)
    warning = [record.getMessage() for record in caplog.records if "fusion=" in record.getMessage()]
    if untaught is None:
        assert not warning
    else:
        (warning,) = warning
        assert f"fusion={fusion}" in warning and f" {untaught} token" in warning


def test_an_online_teacher_with_the_classes_in_another_order_is_put_right(plain_table, teachers, tmp_path, caplog):
    order = [1, 3, 0, 2]
    turned = copy.deepcopy(teachers["inv"][0])
    turned.config.id2label = {i: CLASSES[j] for i, j in enumerate(order)}
    for parameter in turned.classifier.parameters():
        parameter.data = parameter.data[order]
    expected = distill(tmp_path, plain_table, teachers=teachers, max_steps=3)
    found = distill(tmp_path, plain_table, teachers={**teachers, "inv": (turned, PROCESSOR)}, max_steps=3)
    assert_same_weights(found.model, expected.model, rtol=1e-4, atol=1e-6)
    assert any('"inv"' in message and "order" in message for message in caplog.messages)


def test_online_teachers_of_other_names_teach_by_a_mapping(plain_table, teachers, tmp_path):
    renamed = copy.deepcopy(teachers["inv"][0])
    renamed.config.id2label = {i: f"other {i}" for i in range(len(CLASSES))}
    renamed.config.label2id = {name: i for i, name in renamed.config.id2label.items()}
    expected = distill(tmp_path, plain_table, teachers=teachers, max_steps=3)
    online = {**teachers, "inv": (renamed, PROCESSOR)}
    mapping = {"inv": {name: f"other {i}" for i, name in enumerate(CLASSES)}}
    found = distill(tmp_path, plain_table, teachers=online, teacher_classes=mapping, max_steps=3)
    assert_same_weights(found.model, expected.model, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="no effect without teachers"):
        distill(tmp_path, plain_table, teacher_classes=mapping, train=False)


def test_online_teachers_see_the_images_through_their_own_processors(plain_table, teachers, tmp_path):
    other = ViTImageProcessor(size={"height": 12, "width": 12}, image_mean=[0.2] * 3)
    seen = []
    hook = teachers["inv"][0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["pixel_values"]), with_kwargs=True
    )
    online = {"conv": teachers["conv"], "inv": (teachers["inv"][0], other)}
    distill(tmp_path, plain_table, teachers=online, per_device_train_batch_size=NUM_ROWS)
    hook.remove()
    expected = other([image.convert("RGB") for image in plain_table["image"]], return_tensors="pt")["pixel_values"]
    # The first image runs once before, so that its outputs can be measured.
    first, seen = seen
    assert torch.equal(first, seen[:1])
    assert seen.shape == expected.shape
    # In the order of the sampler.
    distances = (seen[:, None] - expected[None]).abs().amax((2, 3, 4))
    assert sorted(distances.argmin(1).tolist()) == list(range(NUM_ROWS)) and distances.amin(1).max() == 0


def test_online_teachers_need_no_columns_and_ignore_those_that_are_there(table, teachers, tmp_path):
    zeros = table.map(lambda row: {"conv_logits": [0.0] * len(CLASSES)})
    settings = {"teachers": teachers, "per_device_train_batch_size": 8}
    assert_same_weights(
        distill(tmp_path, zeros, **settings).model, distill(tmp_path, table, **settings).model, rtol=0, atol=0
    )


# Rows and columns


class PairingTrainer(EnsembleDistillationTrainer):
    """Collects in each step the teacher logits of the batch, and what the teachers predict for the images of the batch."""

    reference_teachers = ()

    def compute_loss(self, model, inputs, **kwargs):
        with torch.no_grad():
            recomputed = [teacher(inputs["pixel_values"]).logits for teacher, _ in self.reference_teachers.values()]
        self.compared.append((inputs["teacher_logits"], torch.stack(recomputed, dim=1), inputs["labels"]))
        return super().compute_loss(model, inputs, **kwargs)


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
def test_logits_stay_with_their_images(arrange, table, teachers, tmp_path):
    # Columns that no model takes, between and after the ones that are needed.
    rows = table.select_columns(["inv_logits", "image", "conv_logits", "label"])
    rows = arrange(rows.add_column("note", [f"row {i}" for i in range(len(rows))]))
    trainer = distill(
        tmp_path, rows, trainer_class=PairingTrainer, train=False, per_device_train_batch_size=4, num_train_epochs=2
    )
    trainer.reference_teachers, trainer.compared = teachers, []
    trainer.train()

    stored, recomputed, labels = (torch.cat(tensors) for tensors in zip(*trainer.compared))
    assert stored.shape == recomputed.shape == (2 * len(rows), 2, len(CLASSES))
    torch.testing.assert_close(stored, recomputed, rtol=1e-4, atol=1e-4)
    assert sorted(labels.tolist()) == sorted(2 * [int(label) for label in rows.with_format(None)["label"]])


@pytest.mark.parametrize("remove", [True, False])
def test_columns_stay_whatever_the_arguments_would_remove(remove, table, tmp_path):
    args = arguments(tmp_path, remove_unused_columns=remove)
    trainer = EnsembleDistillationTrainer(small_student(), args, train_dataset=table, processing_class=PROCESSOR)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch.keys() == {"pixel_values", "labels", "teacher_logits"}


def test_float16_columns(plain_table, teachers, tmp_path):
    with_columns(plain_table, teachers, "float16").save_to_disk(tmp_path / "table")
    table = load_from_disk(tmp_path / "table")
    assert table.features["conv_logits"] == List(Value("float16"), length=len(CLASSES))
    trainer = distill(tmp_path, table, per_device_train_batch_size=NUM_ROWS)
    terms = [term.item() for term in textbook_terms(small_student(), table)]
    assert logged(trainer) == [pytest.approx([weighted(terms), *terms], rel=1e-4)]


def test_rows_differ_in_their_logits(table, teachers):
    # A guard of the test above: swapped rows or swapped teachers must show.
    flat = torch.tensor(np.concatenate([np.array(table[f"{name}_logits"]) for name in teachers]))
    distances = torch.cdist(flat, flat) + 10 * torch.eye(len(flat))
    assert distances.min() > 0.01


# Tables, given at first and later


def scores(results, prefix="eval_"):
    """The loss and the accuracies of an evaluation, without the times."""
    names = [name for name in results if name.startswith(prefix) and name.endswith(("loss", "accuracy"))]
    assert f"{prefix}loss" in names and f"{prefix}accuracy" in names
    return {name.removeprefix(prefix): results[name] for name in names}


def foreign(table):
    """The table with other column names, among which the right ones are found."""
    return table.rename_columns({"image": "picture", "label": "animal"})


def ambiguous(table):
    """The same with more candidates; other images and labels are in the further ones."""
    table = foreign(table)
    backward = table.select(range(len(table) - 1, -1, -1)).select_columns(["picture", "animal"])
    return concatenate_datasets([table, backward.rename_columns({"picture": "mask", "animal": "breed"})], axis=1)


@BOTH_TRAINERS
@pytest.mark.parametrize(
    "rename, columns",
    [
        (foreign, {}),
        (foreign, {"image_column": "picture", "label_column": "animal"}),
        (ambiguous, {"image_column": "picture", "label_column": "animal"}),
    ],
    ids=["found", "given", "given of several"],
)
def test_other_column_names_at_every_entrance(rename, columns, trainer_class, table, tmp_path):
    settings = {"trainer_class": trainer_class, "per_device_train_batch_size": 8, "learning_rate": 0.1}
    expected = distill(tmp_path, table, eval_dataset=table, **settings)
    part, renamed = table.select(range(6)), rename(table)
    some = renamed.select(range(6))
    found = distill(tmp_path, renamed, eval_dataset={"day": renamed, "night": some}, **settings, **columns)
    assert_same_weights(found.model, expected.model, rtol=0, atol=0)
    whole, of_part = scores(expected.evaluate()), scores(expected.evaluate(part))
    assert whole != of_part
    results = found.evaluate()
    assert scores(results, "eval_day_") == whole and scores(results, "eval_night_") == of_part
    assert scores(found.evaluate("night"), "eval_") == of_part
    assert scores(found.evaluate(some)) == of_part
    assert scores(found.evaluate({"dusk": some}), "eval_dusk_") == of_part
    predicted, by_name = found.predict(some), expected.predict(part)
    assert scores(predicted.metrics, "test_") == scores(by_name.metrics, "test_") == of_part
    np.testing.assert_array_equal(predicted.label_ids, part["label"])
    for first, second in zip(predicted.predictions, by_name.predictions):
        np.testing.assert_array_equal(first, second)
    # Assigned later.
    found.eval_dataset = some
    assert scores(found.evaluate()) == of_part
    found.eval_dataset = {"day": some}
    assert scores(found.evaluate(), "eval_day_") == of_part
    for trainer, later in ((expected, part), (found, some)):
        trainer.train_dataset = later
        trainer.train()
    assert_same_weights(found.model, expected.model, rtol=0, atol=0)


@BOTH_TRAINERS
def test_rows_are_made_once_for_each_table(trainer_class, plain_table, table, tmp_path, monkeypatch):
    made = []

    class CountedRows(ImageRows):
        def __init__(self, table, *args, **kwargs):
            made.append(table)
            super().__init__(table, *args, **kwargs)

    monkeypatch.setattr(trainer_module, "ImageRows", CountedRows)
    evaluated = {"day": plain_table, "night": table}
    settings = {"trainer_class": trainer_class, "eval_dataset": evaluated, "eval_strategy": "epoch"}
    trainer = distill(tmp_path, table, num_train_epochs=2, learning_rate=0.0, **settings)
    rows, others = trainer.train_dataset, trainer.eval_dataset
    assert isinstance(rows, CountedRows) and len(rows) == NUM_ROWS and rows.table is table
    assert {name: one.table for name, one in others.items()} == evaluated
    trainer.train()
    trainer.evaluate()
    trainer.evaluate("night")
    assert trainer.train_dataset is trainer.get_train_dataloader().dataset is rows
    for name, one in trainer.eval_dataset.items():
        assert one is others[name] and trainer.get_eval_dataloader(name).dataset is one
    assert len(made) == 3
    # A table that is given later: once for the trainer, however often it trains.
    trainer.train_dataset, trainer.eval_dataset = (
        plain_table if trainer_class is ImageClassificationTrainer else (table.select(range(8))),
        plain_table,
    )
    trainer.train()
    trainer.train()
    trainer.evaluate()
    assert len(made) == 5 and trainer.train_dataset.table is made[3] and trainer.eval_dataset.table is plain_table


@BOTH_TRAINERS
def test_a_trainer_may_be_built_without_tables(trainer_class, plain_table, table, tmp_path):
    trainer = trainer_class(model=small_student(), args=arguments(tmp_path), processing_class=PROCESSOR)
    pixel_values, labels, _ = tensors_of(plain_table)
    with torch.no_grad():
        logits = small_student().eval()(pixel_values).logits
    accuracy = (logits.argmax(-1) == labels).double().mean().item()
    assert trainer.evaluate(plain_table)["eval_accuracy"] == pytest.approx(accuracy)
    predicted = trainer.predict(plain_table)
    assert predicted.label_ids.tolist() == labels.tolist()
    np.testing.assert_allclose(predicted.predictions, logits, atol=1e-5)
    trainer.train_dataset = table
    trainer.train()
    assert_same_weights(
        trainer.model, distill(tmp_path, table, trainer_class=trainer_class).model, rtol=1e-5, atol=1e-6
    )


@BOTH_TRAINERS
def test_tables_given_later_are_checked(trainer_class, plain_table, table, tmp_path):
    other = with_class_names(plain_table, ["cat", "dog", "owl", "cow"])
    trainer = distill(tmp_path, table, trainer_class=trainer_class, train=False, callbacks=[NoStep()])
    for wrong, error, message in (
        (other, ValueError, r"\['cow'\].*\['fox'\]"),
        (plain_table.select([]), ValueError, "empty"),
        (DatasetDict(train=table), TypeError, "DatasetDict"),
        (table.remove_columns("label"), ValueError, "image, conv_logits, inv_logits"),
    ):
        trainer.train_dataset = wrong
        with pytest.raises(error, match=message):
            trainer.train()
        for evaluate in (trainer.get_eval_dataloader, trainer.predict):
            with pytest.raises(error, match=message):
                evaluate(wrong)
        trainer.eval_dataset = {"night": wrong}
        with pytest.raises(error, match=message):
            trainer.evaluate("night")


def test_rows_for_training_are_evaluated_as_the_images_are(plain_table, table, tmp_path):
    recipe = ViewRecipe(num_views=2, erasing=1.0)
    trainer = distill(tmp_path, table, views=recipe, eval_dataset=table, train=False)
    expected = scores(trainer.evaluate())
    assert scores(trainer.evaluate(trainer.train_dataset)) == expected
    assert scores(trainer.predict(trainer.train_dataset).metrics, "test_") == expected
    # The other way around: rows without logits are trained on with them, after a new check.
    other = distill(tmp_path, trainer.eval_dataset, views=recipe)
    trainer.train()
    assert_same_weights(other.model, trainer.model, rtol=0, atol=0)
    online = distill(tmp_path, plain_table, eval_dataset=plain_table, teachers=small_teachers(), train=False)
    with pytest.raises(ValueError, match='"conv_logits"'):
        distill(tmp_path, online.eval_dataset)


def test_a_table_replaces_another_of_other_views(table, tmp_path):
    def recorded(recipe):
        values = np.repeat(np.array(table["conv_logits"])[:, None], recipe.num_views, axis=1)
        feature = LogitsEncoding("float32").feature(len(CLASSES), recipe.num_views)
        views = table.select_columns(["image", "label"]).add_column("conv_logits", values.tolist(), feature=feature)
        attach_record(views, build_record([], {}, recipe))
        return views

    two, three = (recorded(ViewRecipe(num_views=number, seed=number)) for number in (2, 3))
    one_teacher = {"teacher_weights": 1.0, "temperature": 1.0}

    def trainer_of(table, **settings):
        return distill(tmp_path, table, small_student(teacher_names=("conv",)), train=False, **one_teacher, **settings)

    trainer = trainer_of(two)
    assert trainer.views == trainer.train_dataset.views == ViewRecipe(num_views=2, seed=2)
    trainer.train_dataset = three
    trainer.train()
    assert trainer.views == trainer.train_dataset.views == ViewRecipe(num_views=3, seed=3)
    expected = trainer_of(three)
    expected.train()
    assert_same_weights(trainer.model, expected.model, rtol=0, atol=0)
    trainer.train_dataset = table
    trainer.train()
    assert trainer.views is None and trainer.train_dataset.views is None
    # Views that were given stay a demand.
    trainer = trainer_of(two, views=ViewRecipe(num_views=2, seed=2))
    trainer.train_dataset = three
    with pytest.raises(ValueError, match="views=ViewRecipe.num_views=2.*num_views=3"):
        trainer.train()


def test_persistent_workers_do_not_mix_up_tables(table, tmp_path):
    # `Trainer` keeps the workers of an evaluation, and with them its table.
    settings = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "learning_rate": 0.0}
    trainer = distill(tmp_path, table, eval_dataset=table, train=False, **settings)
    parts = [table.select(range(4)), table.select(range(4, 8)), table.select(range(8, 11))]
    quiet = distill(tmp_path, table, eval_dataset=table, train=False)
    expected = [scores(quiet.evaluate(part)) for part in (table, *parts)]
    assert len({tuple(result.values()) for result in expected}) == 4
    assert scores(trainer.evaluate()) == expected[0]
    assert scores(trainer.evaluate(parts[0])) == expected[1]
    assert scores(trainer.evaluate(parts[1])) == expected[2]
    assert scores(trainer.evaluate()) == expected[0]
    trainer.eval_dataset = parts[2]
    assert scores(trainer.evaluate()) == expected[3]
    # Garbage collection would wait for each of them.
    for loader in trainer.accelerator._dataloaders:
        loader._iterator._shutdown_workers()


# Logs


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("log", [{"logging_steps": 1}, {"logging_steps": 2}, {"logging_strategy": "epoch"}])
def test_logged_terms_are_the_means_over_the_rows(log, accumulation, table, tmp_path):
    # Without learning every step sees the same student, so an epoch's means are known.
    trainer = distill(
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
    trainer = distill(
        tmp_path, table.select(range(num_rows)), per_device_train_batch_size=4, num_train_epochs=3,
        distillation_mode=mode, learning_rate=0.1, **log,
    )  # fmt: skip
    for loss, *terms in logged(trainer):
        assert loss == pytest.approx(weighted(terms), rel=1e-5)


def test_evaluation_between_steps_does_not_enter_the_training_log(table, tmp_path):
    other = table.filter(lambda row: row["label"] == 0)
    settings = {"learning_rate": 0.0, "per_device_train_batch_size": 4, "logging_steps": 4}
    trainer = distill(tmp_path, table, eval_dataset=other, eval_strategy="steps", eval_steps=1, **settings)
    assert sum("eval_loss" in entry for entry in trainer.state.log_history) == 4
    terms = [term.item() for term in textbook_terms(small_student(), table)]
    assert logged(trainer) == [pytest.approx([weighted(terms), *terms], rel=1e-4)]


def test_a_second_training_starts_a_new_log(table, tmp_path):
    # The first stops between two logs.
    settings = {"max_steps": 3, "logging_steps": 2, "per_device_train_batch_size": 4}
    trainer = distill(tmp_path, table, **settings)
    trainer.train()
    entries = logged(trainer)
    assert len(entries) == 1
    for loss, *terms in entries:
        assert loss == pytest.approx(weighted(terms), rel=1e-5)


def test_plain_training_logs_no_teachers(plain_table, tmp_path):
    trainer = distill(tmp_path, plain_table, small_student(teacher_names=()), ImageClassificationTrainer)
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert entries and not any("label_loss" in entry for entry in entries)


# Modes


@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_every_term_falls(mode, table, tmp_path):
    trainer = distill(
        tmp_path, table, distillation_mode=mode, optim="adamw_torch", learning_rate=1e-2, num_train_epochs=25,
        per_device_train_batch_size=8, logging_strategy="epoch", max_grad_norm=1.0,
    )  # fmt: skip
    first, *_, last = logged(trainer)
    assert all(after < 0.5 * before for before, after in zip(first, last))


def test_hard_mode_learns_the_teachers_choices(table, tmp_path):
    trainer = distill(tmp_path, table, learning_rate=0.0, distillation_mode="hard", per_device_train_batch_size=8)
    _, _, logits = tensors_of(table)
    with torch.no_grad():
        tokens = small_student()(tensors_of(table)[0]).teacher_token_logits
    expected = [torch.nn.functional.cross_entropy(tokens[:, i], logits[i].argmax(-1)).item() for i in range(2)]
    assert np.mean(logged(trainer, TERMS[2:]), axis=0) == pytest.approx(expected, rel=1e-4)


def test_label_smoothing_smooths_training_only(table, tmp_path):
    settings = {"label_smoothing_factor": 0.2, "learning_rate": 0.0, "per_device_train_batch_size": NUM_ROWS}
    trainer = distill(tmp_path, table, eval_dataset=table, **settings)
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
    full = distill(tmp_path, table, **settings)
    half = distill(tmp_path, table, bf16=True, **settings)
    online = distill(tmp_path, table, bf16=True, teachers=teachers, **settings)
    assert all(parameter.dtype == torch.float32 for parameter in half.model.parameters())
    for trainer in (half, online):
        # Close to float32, but not the same: else nothing ran in bf16.
        np.testing.assert_allclose(logged(trainer), logged(full), rtol=0.03)
        assert logged(trainer) != logged(full)
    assert half.evaluate()["eval_loss"] == pytest.approx(full.evaluate()["eval_loss"], rel=0.03)


def test_one_weight_and_one_temperature_serve_all_teachers(table, tmp_path):
    one = distill(tmp_path, table, teacher_weights=0.5, temperature=3.0)
    each = distill(tmp_path, table, teacher_weights=[0.5, 0.5], temperature=[3.0, 3.0])
    assert_same_weights(one.model, each.model, rtol=0, atol=0)


@pytest.mark.parametrize("names", [("inv", "conv"), ("inv",)])
def test_settings_follow_the_students_order_of_teachers(names, table, tmp_path):
    weights = [WEIGHTS[["conv", "inv"].index(name)] for name in names]
    temperatures = [TEMPERATURES[["conv", "inv"].index(name)] for name in names]
    student = small_student(teacher_names=names)
    trainer = distill(
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
    whole = distill(tmp_path / "whole", rows, small_student(**dropout), **settings)
    assert whole.state.global_step == 12
    resumed = distill(tmp_path / "resumed", rows, small_student(seed=2, **dropout), train=False, **settings)
    torch.rand(100)  # a new process's random numbers have come to another place
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))

    assert_same_weights(resumed.model, whole.model, rtol=0, atol=0)
    first, second = (trainer.optimizer.state_dict()["state"] for trainer in (whole, resumed))
    assert first.keys() == second.keys() and first
    for number, state in first.items():
        assert all(torch.equal(tensor, second[number][key]) for key, tensor in state.items())
    assert logged(resumed) == logged(whole) and len(logged(resumed)) == 12
    # And it was resumed, not run again.
    untouched = distill(tmp_path / "other", rows, small_student(seed=2, **dropout), **settings)
    assert logged(untouched) != logged(whole)


# Evaluation


@pytest.mark.parametrize("batch_size", [16, 5])
def test_evaluation_with_and_without_columns(batch_size, plain_table, table, teachers, tmp_path):
    settings = {"per_device_eval_batch_size": batch_size, "learning_rate": 0.0}
    trainer = distill(tmp_path, table, eval_dataset={"with": table, "without": plain_table}, **settings)
    terms = [term.item() for term in textbook_terms(small_student(), table)]
    results = trainer.evaluate()
    assert results["eval_with_loss"] == pytest.approx(weighted(terms), rel=1e-4)
    assert results["eval_without_loss"] == pytest.approx(LABEL_WEIGHT * terms[0], rel=1e-4)
    assert results["eval_with_accuracy"] == results["eval_without_accuracy"]
    # One of two columns is not enough.
    partial = trainer.evaluate(table.remove_columns("inv_logits"))
    assert partial["eval_loss"] == pytest.approx(LABEL_WEIGHT * terms[0], rel=1e-4)
    online = distill(tmp_path, plain_table, eval_dataset=table, teachers=teachers, **settings)
    assert online.evaluate()["eval_loss"] == pytest.approx(LABEL_WEIGHT * terms[0], rel=1e-4)


def test_default_metrics_look_at_each_token(plain_table, table, tmp_path):
    trainer = distill(tmp_path, table, eval_dataset=plain_table, learning_rate=0.1, per_device_eval_batch_size=5)
    results = trainer.evaluate()
    pixel_values, labels, _ = tensors_of(plain_table)
    with torch.no_grad():
        outputs = trainer.model.eval()(pixel_values)
    tokens = outputs.teacher_token_logits
    expected = {"accuracy": outputs.logits, "class_token_accuracy": outputs.class_logits}
    expected |= {"conv_token_accuracy": tokens[:, 0], "inv_token_accuracy": tokens[:, 1]}
    for name, logits in expected.items():
        assert results[f"eval_{name}"] == pytest.approx((logits.argmax(-1) == labels).double().mean().item()), name


@BOTH_TRAINERS
def test_own_metrics_see_plain_logits(trainer_class, plain_table, table, tmp_path):
    seen = []

    def own_metrics(prediction):
        seen.append(prediction)
        return {"largest": float(prediction.predictions.max())}

    trainer = distill(
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
    trainer = distill(
        tmp_path, plain_table, model, ImageClassificationTrainer, eval_dataset=plain_table, optim="adamw_torch",
        learning_rate=1e-2, num_train_epochs=20, per_device_train_batch_size=8, max_grad_norm=1.0,
    )  # fmt: skip
    losses = logged(trainer, ["loss"])
    assert losses[-1][0] < 0.5 * losses[0][0]
    results = trainer.evaluate()
    assert results["eval_accuracy"] == 1.0 and results["eval_negative_log_likelihood"] < 0.5
    assert not any("token" in name for name in results)


@pytest.mark.parametrize("fusion", ["mean_probabilities", "class_token"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_every_head_of_a_student_learns_from_labels_alone(smoothing, fusion, table, tmp_path):
    trainer = distill(
        tmp_path, table, small_student(fusion=fusion), trainer_class=ImageClassificationTrainer, eval_dataset=table,
        per_device_train_batch_size=NUM_ROWS, label_smoothing_factor=smoothing,
    )  # fmt: skip
    student = small_student()
    pixels, labels = PROCESSOR(list(table["image"]), return_tensors="pt")["pixel_values"], torch.tensor(table["label"])
    outputs = student(pixels)
    targets = (1 - smoothing) * torch.nn.functional.one_hot(labels, len(CLASSES)) + smoothing / len(CLASSES)
    heads = [outputs.class_logits, *outputs.teacher_token_logits.unbind(1)]
    expected = sum(-(targets * head.log_softmax(-1)).sum(-1).mean() for head in heads) / 3
    assert logged(trainer, ["loss"]) == [[pytest.approx(expected.item(), rel=1e-4)]]
    # The step that plain gradient descent takes on that loss.
    expected.backward()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter -= SGD["learning_rate"] * parameter.grad
    assert_same_weights(trainer.model, student, rtol=1e-4, atol=1e-5)
    # Evaluation measures the labels as they are.
    outputs = student(pixels, labels=labels)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(outputs.loss.item(), rel=1e-3)


def test_the_image_processor_is_saved_with_every_checkpoint(table, tmp_path):
    distill(tmp_path, table, per_device_train_batch_size=8, save_strategy="steps", save_steps=1)
    for step in (1, 2):
        processor = ViTImageProcessor.from_pretrained(tmp_path / f"checkpoint-{step}")
        assert processor.to_dict()["size"] == PROCESSOR.to_dict()["size"]
        IBViTForImageClassification.from_pretrained(tmp_path / f"checkpoint-{step}")


# As any other `Trainer`


@pytest.mark.parametrize("average", [True, False])
def test_data_parallel_takes_the_same_steps(average, table, tmp_path, monkeypatch):
    # Two devices in one process. Without a device, the model runs on the whole batch, which is what it gathers. With one, it
    # would go there alone.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    expected = distill(tmp_path, table, per_device_train_batch_size=8, num_train_epochs=2, learning_rate=0.1)
    settings = {"gradient_accumulation_steps": 2, "average_tokens_across_devices": average}
    args = arguments(tmp_path, per_device_train_batch_size=2, num_train_epochs=2, learning_rate=0.1, **settings)
    args._n_gpu = 2
    trainer = EnsembleDistillationTrainer(small_student(), args, train_dataset=table, processing_class=PROCESSOR)
    trainer.train()
    assert trainer.state.global_step == expected.state.global_step == 4
    assert_same_weights(trainer.model, expected.model, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(logged(trainer), logged(expected), rtol=1e-4)


def test_the_best_model_is_loaded_at_the_end(plain_table, table, tmp_path):
    # The rate is so high that the first steps are better than the last.
    trainer = distill(
        tmp_path, table, eval_dataset=plain_table, per_device_train_batch_size=8, num_train_epochs=3, learning_rate=2.0,
        eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True, metric_for_best_model="loss",
    )  # fmt: skip
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    best = int(np.argmin(losses))
    assert len(losses) == 3 and best < 2
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-6)
    saved = IBViTForImageClassification.from_pretrained(tmp_path / f"checkpoint-{2 * (best + 1)}")
    assert_same_weights(trainer.model, saved, rtol=0, atol=0)


class Search:
    """A search over given values, in the place of one that is installed."""

    trials, histories, default_hp_space = (), [], None

    def ensure_available(self):
        pass

    def run(self, trainer, num_trials, direction):
        objectives = []
        for trial in self.trials:
            trainer.train(trial=trial)
            self.histories.append(logged(trainer))
            objectives.append(trainer.compute_objective(trainer.evaluate()))
        best = int(np.argmin(objectives))
        return BestRun(str(best), objectives[best], self.trials[best])


def test_a_hyperparameter_search_equals_separate_trainings(table, tmp_path, monkeypatch):
    # Of the two largest logits: what the others add up to depends on the temperature.
    columns = {f"{name}_logits": np.array(table[f"{name}_logits"], np.float32) for name in ("conv", "inv")}
    encoding = LogitsEncoding("float32", top_k=2)
    features, data = table.select_columns(["image", "label"]).features, table.data.table.select(["image", "label"])
    for name, logits in columns.items():
        features[name] = encoding.feature(len(CLASSES), None)
        data = data.append_column(name, encoding.encode(logits))
    stored = Dataset(data, info=DatasetInfo(features=features))
    trials = [
        {"temperature": [6.0, 8.0], "learning_rate": 0.1},
        {"temperature": 2.0, "teacher_weights": 0.5, "learning_rate": 0.2, "per_device_train_batch_size": 4},
    ]
    monkeypatch.setattr(Search, "trials", trials)
    monkeypatch.setattr(Search, "histories", [])
    monkeypatch.setitem(transformers_trainer.ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.WANDB, Search)
    monkeypatch.setattr("transformers.integrations.hp_params", dict)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=SimpleNamespace(id="search")))

    def trainer_of(**settings):
        return EnsembleDistillationTrainer(
            model_init=lambda: small_student(), args=arguments(tmp_path, **settings), train_dataset=stored,
            eval_dataset=stored, processing_class=PROCESSOR,
        )  # fmt: skip

    trainer = trainer_of(per_device_train_batch_size=8)
    best = trainer.hyperparameter_search(backend="wandb", n_trials=2)
    objectives = []
    for trial, history in zip(trials, Search.histories, strict=True):
        expected = trainer_of(**{"per_device_train_batch_size": 8, **trial})
        expected.train()
        np.testing.assert_allclose(history, logged(expected), rtol=1e-6)
        objectives.append(trainer.compute_objective(expected.evaluate()))
    assert best.run_id == str(np.argmin(objectives)) and best.objective == pytest.approx(min(objectives))


def test_the_model_can_be_built_by_the_trainer(table, tmp_path):
    # As a search over hyperparameters does.
    trainer = EnsembleDistillationTrainer(
        model_init=lambda: small_student(), args=arguments(tmp_path), train_dataset=table, processing_class=PROCESSOR
    )
    trainer.train()
    # One batch of all rows, whose order may differ.
    assert_same_weights(trainer.model, distill(tmp_path, table).model, rtol=1e-4, atol=1e-5)


def test_the_documented_example_runs(table, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"student": small_student(), "table": table, "validation": table, "image_processor": PROCESSOR}
    namespace |= {name: getattr(hf_ibdistill, name) for name in hf_ibdistill.__all__}
    # As written, but for fewer epochs.
    namespace["DistillationArguments"] = partial(DistillationArguments, num_train_epochs=1)
    for example in doctest.DocTestParser().get_examples(EnsembleDistillationTrainer.__doc__):
        exec(example.source, namespace)
    assert namespace["trainer"].state.global_step > 0


# Refused before the first step


class NoStep(TrainerCallback):
    def on_step_begin(self, *args, **kwargs):
        raise AssertionError("a step was begun on input that should have been refused")


def refuse(folder, table, message, student=None, error=ValueError, **settings):
    with pytest.raises(error, match=message):
        distill(folder, table, student, callbacks=[NoStep()], num_train_epochs=1, **settings)


def with_logits(table, name, logits):
    logits = [list(row) for row in logits]
    feature = List(Value("float32"), length=len(logits[0]))
    return table.remove_columns(name).add_column(name, logits, feature=feature)


@BOTH_TRAINERS
def test_no_image_processor(trainer_class, table, tmp_path):
    with pytest.raises(ValueError, match="processing_class=None"):
        trainer_class(model=small_student(), args=arguments(tmp_path), train_dataset=table)


@pytest.mark.parametrize("student", [{"teacher_names": ()}, None])
def test_no_teachers(student, plain_table, tmp_path):
    model = small_teacher("convolution") if student is None else small_student(**student)
    refuse(tmp_path, plain_table, f"{type(model).__name__}.* no teachers.*ImageClassificationTrainer", model)


@pytest.mark.parametrize("name", ["teacher_weights", "temperature"])
@pytest.mark.parametrize("values", [[1.0, 2.0, 3.0], [0.5] * 5])
def test_wrong_number_of_settings(name, values, table, tmp_path):
    refuse(tmp_path, table, rf"{re.escape(f'{name}={values}')} .*{len(values)} .*conv, inv", **{name: values})


@BOTH_TRAINERS
@pytest.mark.parametrize(
    "settings",
    [
        {"label_names": ["labels", "kind"]},
        {"train_sampling_strategy": "group_by_length"},
        {"neftune_noise_alpha": 5.0},
    ],
    ids=str,
)
def test_arguments_that_have_no_effect_on_images(settings, trainer_class, table, tmp_path):
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=re.escape(f"{name}={value}")):
        distill(tmp_path, table, trainer_class=trainer_class, train=False, **settings)


def test_functions_that_have_no_effect(table, tmp_path):
    given = {"args": arguments(tmp_path), "train_dataset": table, "processing_class": PROCESSOR}
    with pytest.raises(ValueError, match="compute_loss_func"):
        EnsembleDistillationTrainer(small_student(), compute_loss_func=lambda *a, **k: 0, **given)
    with pytest.raises(ValueError, match="preprocess_logits_for_metrics"):
        EnsembleDistillationTrainer(
            small_student(), preprocess_logits_for_metrics=lambda logits, labels: logits, **given
        )


@BOTH_TRAINERS
def test_dropping_the_last_batch_never_drops_all_rows_or_rows_of_the_evaluation(trainer_class, table, tmp_path):
    few = distill(
        tmp_path, table.select(range(5)), trainer_class=trainer_class, per_device_train_batch_size=8, train=False,
        dataloader_drop_last=True,
    )  # fmt: skip
    with pytest.raises(ValueError, match="dataloader_drop_last=True.* 5 rows.* 8"):
        few.train()
    seen = []
    trainer = distill(
        tmp_path, table, trainer_class=trainer_class, per_device_train_batch_size=8, per_device_eval_batch_size=5,
        dataloader_drop_last=True, eval_dataset=table.select(range(7)), compute_metrics=lambda p: seen.append(p) or {},
    )  # fmt: skip
    trainer.evaluate()
    assert seen[-1].label_ids.tolist() == table["label"][:7]
    assert len(trainer.predict(table.select(range(6))).label_ids) == 6
    assert trainer.args.dataloader_drop_last


@BOTH_TRAINERS
@pytest.mark.parametrize(
    "settings",
    [
        {"batch_eval_metrics": True}, {"batch_eval_metrics": False}, {"include_for_metrics": ["inputs", "loss"]},
        {"eval_accumulation_steps": 1}, {"eval_do_concat_batches": False}, {"bf16_full_eval": True},
    ],
    ids=str,
)  # fmt: skip
def test_arguments_of_evaluation_leave_the_metrics_alone(settings, trainer_class, plain_table, table, tmp_path):
    given = {
        "trainer_class": trainer_class,
        "per_device_eval_batch_size": 5,
        "eval_dataset": plain_table,
        "train": False,
    }
    trainer = distill(tmp_path, table, **given, **settings)
    expected = hf_ibdistill.evaluate_model(small_student(), PROCESSOR, plain_table)
    found = trainer.evaluate()
    tolerance = {"abs": 0.13} if "bf16_full_eval" in settings else {"rel": 1e-5}
    assert {name: found[f"eval_{name}"] for name in expected} == pytest.approx(expected, **tolerance)


def test_the_best_model_by_a_metric_that_should_fall(plain_table, table, tmp_path):
    trainer = distill(
        tmp_path, table, eval_dataset=plain_table, per_device_train_batch_size=8, num_train_epochs=3, learning_rate=2.0,
        eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True,
        metric_for_best_model="negative_log_likelihood",
    )  # fmt: skip
    values = [e["eval_negative_log_likelihood"] for e in trainer.state.log_history if "eval_loss" in e]
    assert trainer.state.best_metric == min(values) < max(values)


@BOTH_TRAINERS
def test_arguments_serve_a_second_trainer(trainer_class, plain_table, table, tmp_path):
    args = arguments(tmp_path)
    first = {"args": args, "train_dataset": table, "eval_dataset": plain_table, "processing_class": PROCESSOR}
    trainer = trainer_class(small_student(), **first)
    before = args.to_dict()
    trainer.train()
    trainer.evaluate()
    assert args.to_dict() == before
    trainer_class(small_student(), compute_metrics=lambda prediction: {"rows": len(prediction.label_ids)}, **first)


@BOTH_TRAINERS
def test_a_compiled_student_is_measured_as_well(trainer_class, plain_table, table, tmp_path):
    student = torch.compile(small_student(), backend="eager")
    trainer = distill(tmp_path, table, student, trainer_class=trainer_class, eval_dataset=plain_table, train=False)
    expected = hf_ibdistill.evaluate_model(small_student(), PROCESSOR, plain_table)
    found = trainer.evaluate()
    assert found["eval_accuracy"] == expected["accuracy"] and found["eval_loss"] > 0


@BOTH_TRAINERS
def test_rows_of_no_class(trainer_class, table, tmp_path):
    labels = [4 if i in (3, 7) else value for i, value in enumerate(table["label"])]
    column = pa.array(labels, pa.int64())
    position = table.column_names.index("label")
    broken = Dataset(table.data.table.set_column(position, "label", column), info=table.info)
    message = r"2 rows have no label, or .*labels \[4\].*\[3, 7\]"
    with pytest.raises(ValueError, match="training set: " + message):
        distill(tmp_path, broken, trainer_class=trainer_class, train=False)
    with pytest.raises(ValueError, match=message):
        hf_ibdistill.evaluate_model(small_student(), PROCESSOR, broken)


def test_an_evaluation_set_that_does_not_exist(table, tmp_path):
    trainer = distill(tmp_path, table, eval_dataset={"day": table}, train=False)
    with pytest.raises(ValueError, match=r'eval_dataset="night".*\[\'day\'\]'):
        trainer.evaluate("night")


@pytest.mark.parametrize(("size", "is_reported"), [(5, True), (8, False), (15, True), (1, False)])
def test_a_last_batch_of_one_row_is_reported_for_batch_norm(size, is_reported, table, tmp_path, caplog):
    for model, has_batch_norm in ((small_teacher("convolution"), True), (small_student(), False)):
        caplog.clear()
        settings = {"trainer_class": ImageClassificationTrainer, "per_device_train_batch_size": size, "train": False}
        distill(tmp_path, table, model, **settings).get_train_dataloader()
        assert ("last batch of an epoch has one row" in caplog.text) == (is_reported and has_batch_norm)


@BOTH_TRAINERS
def test_objects_of_another_kind(trainer_class, table, tmp_path):
    given = {"args": arguments(tmp_path), "train_dataset": table, "processing_class": PROCESSOR}
    for change, message in (
        ({"model": torch.nn.Linear(2, 2)}, "model=Linear"),
        ({"model": "outputs/student"}, "model='outputs/student'"),
        ({"model": small_student(), "args": {}}, "args"),
        ({"model": small_student(), "processing_class": "outputs/student"}, "processing_class='outputs/student'"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            trainer_class(**{**given, **change})


def test_confidence_at_another_temperature_needs_every_logit(table, tmp_path):
    encoding, data = LogitsEncoding("float32", top_k=2), table.data.table.select(["image", "label"])
    features = table.select_columns(["image", "label"]).features
    for name in ("conv_logits", "inv_logits"):
        features[name] = encoding.feature(len(CLASSES), None)
        data = data.append_column(name, encoding.encode(np.array(table[name], np.float32)))
    stored = Dataset(data, info=DatasetInfo(features=features))
    distill(tmp_path, stored, confidence_weighting=True, temperature=1.0)
    with pytest.raises(ValueError, match="confidence_weighting=True.*conv_logits"):
        distill(tmp_path, stored, confidence_weighting=True, temperature=[1.0, 2.0], train=False)


@BOTH_TRAINERS
def test_an_interrupted_evaluation_leaves_no_rows_behind(trainer_class, plain_table, table, tmp_path):
    trainer = distill(
        tmp_path,
        table,
        trainer_class=trainer_class,
        per_device_eval_batch_size=4,
        eval_dataset=plain_table,
        train=False,
    )
    expected = trainer.evaluate()["eval_negative_log_likelihood"]
    broken = plain_table.cast_column("image", Image(decode=False))
    broken = broken.map(
        lambda row, i: {"image": {"bytes": b"" if i == 9 else row["image"]["bytes"]}}, with_indices=True
    )
    with pytest.raises(ValueError, match="Row 9"):
        trainer.evaluate(broken.cast_column("image", Image()))
    assert trainer.evaluate()["eval_negative_log_likelihood"] == expected


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
    refuse(tmp_path, table, re.escape(f"teachers={sorted(names)}") + r".*\['conv', 'inv'\]", teachers=given)


def test_missing_column(table, plain_table, teachers, tmp_path):
    message = 'training set.*"third".* no column "third_logits".*conv_logits, inv_logits'
    refuse(tmp_path, table, message, small_student(teacher_names=("conv", "third")), teacher_weights=1.0)
    refuse(tmp_path, plain_table, 'no column "conv_logits".*none.*record_teacher_logits.*teachers=')


def test_column_of_another_number_of_classes(table, tmp_path):
    wrong = with_logits(table, "inv_logits", np.zeros((NUM_ROWS, 7)))
    refuse(tmp_path, wrong, '"inv_logits".* 7 .* 4 classes')


@pytest.mark.parametrize("feature", [List(Value("float32")), Value("float32"), Value("string")])
def test_column_that_is_no_list_of_numbers(feature, plain_table, table, tmp_path):
    value = [0.0] * 4 if isinstance(feature, List) else 0.0 if feature.dtype == "float32" else "0"
    wrong = table.remove_columns("conv_logits").add_column("conv_logits", [value] * NUM_ROWS, feature=feature)
    refuse(tmp_path, wrong, '"conv_logits".* not a list .* 4 classes')


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), None])
def test_logits_that_are_not_finite(bad, table, tmp_path):
    logits = np.array(table["inv_logits"]).tolist()
    logits[5][0] = logits[9][3] = bad
    wrong = with_logits(table, "inv_logits", logits)
    refuse(tmp_path, wrong, r'"inv_logits" .*2 rows.*\[5, 9\]')
    # Rows are those of the table as it was given.
    refuse(tmp_path, wrong.select([9, 0, 1, 5, 2]), r"2 rows.*\[0, 3\]")
    assert distill(tmp_path, wrong.select([0, 1, 2, 3]), max_steps=1).state.global_step == 1


def test_rows_without_logits(table, tmp_path):
    logits = np.array(table["inv_logits"]).tolist()
    feature = List(Value("float32"), length=4)
    logits[7] = None
    wrong = table.remove_columns("inv_logits").add_column("inv_logits", logits, feature=feature)
    refuse(tmp_path, wrong, r'"inv_logits" .*1 rows.*\[7\]')


def test_rows_are_named_in_long_tables():
    logits = np.zeros((10_000, 2), dtype=np.float16)
    logits[[3, 4095, 4096, 9_999], 1] = np.nan
    table = Dataset.from_dict(
        {"conv_logits": list(logits)}, features=Features({"conv_logits": List(Value("float16"), length=2)})
    )
    with pytest.raises(ValueError, match=r"4 rows.*\[3, 4095, 4096, 9999\]"):
        check_columns(table, ["conv"], ["cat", "dog"])
    with pytest.raises(ValueError, match=r"2 rows.*\[0, 1\]"):
        check_columns(table.select([4096, 3, 5, 6]), ["conv"], ["cat", "dog"])


def recorded_by(table, teachers):
    """The table with the record that recording attaches, from and to the disk."""
    table = table.select(range(len(table)))
    attach_record(table, build_record([one.describe(LogitsEncoding()) for one in load_teachers(teachers)], {}, None))
    return table


def test_the_teachers_other_classes_are_found_in_the_record(table, teachers, tmp_path):
    recorded_by(table, teachers).save_to_disk(tmp_path / "right")
    right = load_from_disk(tmp_path / "right")
    assert distill(tmp_path, right, max_steps=1).state.global_step == 1

    reordered = {**teachers, "inv": (small_teacher("involution", ["dog", "cat", "owl", "fox"]), PROCESSOR)}
    recorded_by(table, reordered).save_to_disk(tmp_path / "wrong")
    wrong = load_from_disk(tmp_path / "wrong")
    message = 'teacher "inv".*another order.*dog.*cat'
    refuse(tmp_path, wrong, message)
    refuse(tmp_path, wrong.shuffle(seed=0).select(range(5)), message)
    # Two recordings joined: the second is checked as well.
    refuse(tmp_path, concatenate_datasets([right, wrong]), message)
    # A teacher that the student does not have does not matter.
    other = small_student(teacher_names=("conv",))
    assert distill(tmp_path, wrong, other, max_steps=1, teacher_weights=1.0, temperature=1.0).state.global_step == 1


def test_teachers_without_class_names_pass_by_their_number(table, teachers, tmp_path):
    unnamed = {**teachers, "inv": (small_teacher("involution", [f"LABEL_{i}" for i in range(4)]), PROCESSOR)}
    assert distill(tmp_path, recorded_by(table, unnamed), max_steps=1).state.global_step == 1


def test_online_teachers_of_other_classes(plain_table, teachers, tmp_path):
    other = {**teachers, "inv": (small_teacher("involution", ["cat", "dog", "owl", "cow"]), PROCESSOR)}
    refuse(tmp_path, plain_table, r"""teacher "inv".*\['fox'\].*\['cow'\]""", teachers=other)
    other = {**teachers, "conv": (small_teacher("convolution", CLASSES[:3]), PROCESSOR)}
    refuse(tmp_path, plain_table, 'teacher "conv".* 3 .* 4', teachers=other)


@BOTH_TRAINERS
def test_a_student_of_other_classes(trainer_class, table, tmp_path):
    student = small_student(names=["cat", "dog", "owl", "cow"])
    refuse(tmp_path, table, r"training set.*model.*\['fox'\].*\['cow'\]", student, trainer_class=trainer_class)
    student = small_student(names=["fox", "cat", "dog", "owl"])
    refuse(tmp_path, table, "training set.*model.*another order", student, trainer_class=trainer_class)
    student = small_student(names=[*CLASSES, "cow"])
    refuse(tmp_path, table, "training set.*model.* 5 .* 4", student, trainer_class=trainer_class)


def with_class_names(table, names):
    return table.cast_column("label", ClassLabel(names=names))


@BOTH_TRAINERS
def test_an_evaluation_set_of_other_classes(trainer_class, plain_table, table, tmp_path):
    other = with_class_names(plain_table, ["cat", "dog", "owl", "cow"])
    settings = {"trainer_class": trainer_class, "eval_strategy": "epoch"}
    refuse(tmp_path, table, "evaluation set: .*cow.*fox", eval_dataset=other, **settings)
    sets = {"day": plain_table, "night": other}
    refuse(tmp_path, table, 'evaluation set "night": .*cow.*fox', eval_dataset=sets, **settings)


@BOTH_TRAINERS
def test_a_damaged_table_is_refused_before_training(trainer_class, plain_table, teachers, tmp_path):
    recorded = hf_ibdistill.record_teacher_logits(plain_table, teachers, output_dir=tmp_path / "table")
    (path,) = (tmp_path / "table").glob("*.arrow")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    for given in ({}, {"eval_dataset": recorded}):
        with pytest.raises(ValueError, match=f"training set: .*damaged.*{path}"):
            distill(tmp_path, recorded, trainer_class=trainer_class, train=False, **given)


@BOTH_TRAINERS
def test_empty_tables(trainer_class, plain_table, table, tmp_path):
    empty, settings = plain_table.select([]), {"trainer_class": trainer_class, "eval_strategy": "epoch"}
    refuse(tmp_path, table.select([]), "training set is empty", trainer_class=trainer_class)
    refuse(tmp_path, table, "evaluation set is empty", eval_dataset=empty, **settings)
    sets = {"day": plain_table, "night": empty}
    refuse(tmp_path, table, 'evaluation set "night" is empty', eval_dataset=sets, **settings)


@BOTH_TRAINERS
def test_tables_that_are_no_tables(trainer_class, table, tmp_path):
    settings = {"trainer_class": trainer_class, "error": TypeError}
    for wrong, name in ((DatasetDict(train=table), "DatasetDict"), ([table[0]], "list")):
        refuse(tmp_path, wrong, f"training set .*{name}", **settings)
    evaluated = {"eval_dataset": table.to_iterable_dataset(), "eval_strategy": "epoch"}
    refuse(tmp_path, table, "evaluation set .*IterableDataset", **settings, **evaluated)


@BOTH_TRAINERS
def test_tables_with_a_transform(trainer_class, plain_table, table, tmp_path):
    def transform(rows):
        return rows

    refuse(tmp_path, table.with_transform(transform), "training set.*reset_format", trainer_class=trainer_class)
    evaluated = {"eval_dataset": plain_table.with_transform(transform), "eval_strategy": "epoch"}
    refuse(tmp_path, table, "evaluation set.*reset_format", trainer_class=trainer_class, **evaluated)


@BOTH_TRAINERS
def test_tables_without_the_columns(trainer_class, plain_table, table, tmp_path):
    settings = {"trainer_class": trainer_class}
    refuse(tmp_path, table.remove_columns("image"), "training set.* image column.* label, conv_logits", **settings)
    refuse(tmp_path, table.remove_columns("label"), "training set.* label column.* image, conv_logits", **settings)
    refuse(tmp_path, table, 'training set.*image_column="photo".* image, label', image_column="photo", **settings)
    renamed = plain_table.rename_column("label", "animal")
    evaluated = {"eval_dataset": renamed, "eval_strategy": "epoch", "label_column": "label"}
    refuse(tmp_path, table, 'evaluation set.*label_column="label".* image, animal', **settings, **evaluated)
    numbers = table.cast_column("label", Value("int64"))
    refuse(tmp_path, numbers, "training set.*int64.*class_encode_column", **settings)


def test_logits_columns_of_the_evaluation_set(table, tmp_path):
    # They are part of its loss, so they are checked likewise, before the first epoch.
    wrong = with_logits(table, "inv_logits", np.zeros((NUM_ROWS, 7)))
    refuse(tmp_path, table, 'evaluation set.*"inv_logits".* 7 .* 4 ', eval_dataset=wrong, eval_strategy="epoch")
    logits = np.array(table["inv_logits"])
    logits[5, 0] = np.nan
    wrong = with_logits(table, "inv_logits", logits)
    refuse(tmp_path, table, r'evaluation set.*"inv_logits".*\[5\]', eval_dataset=wrong, eval_strategy="epoch")


# torch.compile


def test_compiled_training_equals_eager(plain_table, table, teachers, tmp_path):
    # 14 rows in batches of 8: the last one is short, and evaluation has another size, mode and no gradient.
    settings = {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 5, "num_train_epochs": 2}
    settings |= {"eval_strategy": "epoch", "eval_dataset": table, "teachers": teachers}
    rows = plain_table.select(range(14))
    expected = distill(tmp_path / "eager", rows, **settings)
    torch.compiler.reset()
    # Tracing alone: what a backend generates is torch's. At the limit the model would silently run uncompiled.
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        compiled = distill(
            tmp_path / "compiled", rows, torch_compile=True, torch_compile_backend="aot_eager", **settings
        )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    np.testing.assert_allclose(logged(compiled), logged(expected), rtol=1e-4)
    compiled.save_model(tmp_path / "saved")
    loaded = IBViTForImageClassification.from_pretrained(tmp_path / "saved")
    assert_same_weights(loaded, expected.model, rtol=1e-4, atol=1e-5)
