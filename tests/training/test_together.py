"""Students that train together have the weights of students that train alone."""

import os
import shutil
import signal
import threading
from collections import Counter

import pytest
import torch
from distilling import PROCESSOR, arguments, plain_vit, small_images, small_student, small_teachers, with_columns
from transformers import PrinterCallback, TrainerCallback, ViTImageProcessor

from hf_ibdistill import (
    EnsembleDistillationTrainer,
    ImageClassificationTrainer,
    ViewRecipe,
    record_teacher_logits,
    train_together,
)
from hf_ibdistill import rows as rows_module


NUM_ROWS = 14  # 4 batches of 4, the last of which is short
LEARNING = {
    "optim": "adamw_torch", "learning_rate": 1e-2, "lr_scheduler_type": "cosine", "warmup_steps": 2, "weight_decay": 0.05,
    "num_train_epochs": 3, "per_device_train_batch_size": 4, "eval_strategy": "epoch", "teacher_weights": 1.0,
}  # fmt: skip
DROPOUT = {"hidden_dropout_prob": 0.2}
# Other sizes, seeds, temperatures, teachers, families and image processors.
STUDENTS = {
    "small": ({"seed": 0, "temperature": [2.0, 3.0]}, lambda: small_student(5, **DROPOUT), {}),
    "large": ({"seed": 1, "temperature": 1.0}, lambda: small_student(6, hidden_size=24, **DROPOUT), {}),
    "of_conv": (
        {"seed": 2, "temperature": 4.0, "label_smoothing_factor": 0.1},
        lambda: small_student(7, teacher_names=("conv",), num_hidden_layers=2, attention_probs_dropout_prob=0.1),
        {},
    ),
    "vit": (
        {"seed": 3, "temperature": 4.0, "learning_rate": 3e-3},
        plain_vit,
        {"processing_class": ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.3] * 3)},
    ),
}


@pytest.fixture(scope="module")
def images():
    return small_images(NUM_ROWS)


@pytest.fixture(scope="module")
def table(images):
    return with_columns(images, small_teachers())


@pytest.fixture(scope="module")
def views(images, tmp_path_factory):
    """A table of views with the largest logits, which are decoded for a temperature."""
    recipe = ViewRecipe(num_views=3, horizontal_flip=0.5, erasing=0.3)
    folder = tmp_path_factory.mktemp("recorded") / "table"
    return record_teacher_logits(images, small_teachers(), output_dir=folder, views=recipe, top_k=2)


def make(folder, table, name="small", callbacks=None, trainer_class=EnsembleDistillationTrainer, **settings):
    """The trainer of one of the students, as it is made before its training."""
    own, build, others = STUDENTS[name]
    settings = {**LEARNING, "data_seed": 11, **own, **settings}
    trainer = trainer_class(
        model=build(),
        args=arguments(folder / name, **settings),
        train_dataset=table,
        eval_dataset=small_images(6, seed=1),
        callbacks=callbacks,
        **{"processing_class": PROCESSOR, **others},
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def weights(trainer):
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def alone(folder, table, names=STUDENTS, **settings):
    trainers = {}
    for name in names:
        trainers[name] = make(folder / "alone", table, name, **settings)
        trainers[name].train()
    return trainers


def together(folder, table, names=STUDENTS, **settings):
    trainers = {name: make(folder / "together", table, name, **settings) for name in names}
    train_together(list(trainers.values()))
    return trainers


def history(trainer):
    """The log without times, and without the mean loss since training began or resumed."""
    left_out = ("runtime", "per_second", "train_loss")
    return [
        {key: value for key, value in entry.items() if not any(part in key for part in left_out)}
        for entry in trainer.state.log_history
    ]


def assert_identical(trainer, other):
    expected = weights(other)
    assert weights(trainer).keys() == expected.keys()
    for name, tensor in weights(trainer).items():
        assert torch.equal(tensor, expected[name]), name
    assert history(trainer) == history(other) and trainer.state.global_step > 0


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 3, "dataloader_num_workers": 1, "dataloader_persistent_workers": True},
        {"dataloader_drop_last": True, "num_train_epochs": 1.5},
        {"save_strategy": "epoch", "load_best_model_at_end": True, "metric_for_best_model": "eval_loss"},
        {"bf16": True, "num_train_epochs": 1, "eval_strategy": "no"},
        {"train_sampling_strategy": "sequential", "num_train_epochs": 1, "gradient_accumulation_steps": 2},
    ],
    ids=str,
)
def test_weights_are_those_of_separate_runs(settings, table, tmp_path):
    names = ["small", "vit"] if settings else list(STUDENTS)
    expected, found = alone(tmp_path, table, names, **settings), together(tmp_path, table, names, **settings)
    for name in names:
        assert_identical(found[name], expected[name])
    # The students learned different things, or the comparison could not fail.
    assert len({trainer.state.log_history[-1]["train_loss"] for trainer in found.values()}) == len(names)


@pytest.mark.parametrize("views_per_image", [1, 2])
def test_weights_on_views_are_those_of_separate_runs(views_per_image, views, tmp_path):
    settings = {"views_per_image": views_per_image, "num_train_epochs": 4}
    expected, found = alone(tmp_path, views, **settings), together(tmp_path, views, **settings)
    for name in STUDENTS:
        assert_identical(found[name], expected[name])


def test_a_student_without_teachers_trains_beside_one_with(table, tmp_path):
    kinds = {"small": EnsembleDistillationTrainer, "vit": ImageClassificationTrainer}
    found = [make(tmp_path / "together", table, name, trainer_class=kind) for name, kind in kinds.items()]
    train_together(found)
    for trainer, (name, kind) in zip(found, kinds.items()):
        other = make(tmp_path / "alone", table, name, trainer_class=kind)
        other.train()
        assert_identical(trainer, other)
    assert "label_loss" in found[0].state.log_history[0] and "label_loss" not in found[1].state.log_history[0]


def test_the_seed_orders_the_rows_without_a_data_seed(table, tmp_path):
    settings = {"seed": 3, "data_seed": None}
    expected = alone(tmp_path, table, ["small", "large"], **settings)
    found = together(tmp_path, table, ["small", "large"], **settings)
    for name in expected:
        assert_identical(found[name], expected[name])


def test_each_image_is_decoded_once_a_pass(views, tmp_path, monkeypatch):
    decoded, made = Counter(), Counter()
    decode, make_views = rows_module.decode_image, rows_module.make_views

    def count_images(cell, mode):
        decoded[cell["bytes"]] += 1
        return decode(cell, mode)

    def count_views(images, recipe, keys, numbers):
        made.update(zip(keys, numbers))
        return make_views(images, recipe, keys, numbers)

    monkeypatch.setattr(rows_module, "decode_image", count_images)
    monkeypatch.setattr(rows_module, "make_views", count_views)
    # Otherwise it would be once in all.
    monkeypatch.setattr("hf_ibdistill.images.cache.MAX_BYTES", 0)
    together(tmp_path, views, num_train_epochs=3, eval_strategy="no")
    # All three views, one in each epoch. At the first image of a table, each trainer looks for its size as well.
    cells = [cell["bytes"] for cell in views.with_format("arrow")[:]["image"].to_pylist()]
    assert [decoded[cell] for cell in cells] == [3 + len(STUDENTS)] + [3] * (NUM_ROWS - 1)
    assert set(made.values()) == {1} and len(made) == 3 * NUM_ROWS


def test_image_processors_with_the_same_settings_run_once(table, tmp_path, monkeypatch):
    batches = []
    preprocess = rows_module.pixel_values

    def count(images, processors):
        batches.append(len(processors))
        return preprocess(images, processors)

    monkeypatch.setattr(rows_module, "pixel_values", count)
    together(tmp_path, table, num_train_epochs=1, eval_strategy="no")
    assert batches == [2] * 4  # one for the three students with tokens, one for the ViT


def test_random_states_of_the_caller_stay(table, tmp_path):
    trainers = [make(tmp_path, table, name) for name in ("small", "large")]
    torch.manual_seed(17)
    expected = torch.rand(3)
    torch.manual_seed(17)
    train_together(trainers)
    assert torch.equal(torch.rand(3), expected)


def test_own_seconds_leave_out_the_others(table, tmp_path):
    trainers = [make(tmp_path, table, name) for name in ("small", "large", "vit")]
    outputs = train_together(trainers)
    metrics = [output.metrics for output in outputs]
    assert all(one["train_own_seconds"] > 0 for one in metrics)
    assert sum(one["train_own_seconds"] for one in metrics) < 1.5 * max(one["train_runtime"] for one in metrics) + 1
    assert [output.global_step for output in outputs] == [12, 12, 12]


# Resume


SAVING = {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "epoch"}


@pytest.mark.parametrize("step", [3, 9])
def test_a_resumed_run_ends_bit_identical(step, views, tmp_path):
    # 4 steps an epoch, so these steps are in the middle of one.
    names = ["small", "vit"]
    expected = alone(tmp_path, views, names, **SAVING)
    resumed = {name: make(tmp_path / "resumed", views, name, **SAVING) for name in names}
    saved = together(tmp_path, views, names, **SAVING)
    torch.rand(100)
    train_together(
        list(resumed.values()),
        resume_from_checkpoint=[f"{saved[name].args.output_dir}/checkpoint-{step}" for name in names],
    )
    for name in names:
        assert_identical(resumed[name], expected[name])
    assert resumed["small"].state.global_step == 12


class Failure(TrainerCallback):
    """Does something at a step."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.act(control)


def fail(control):
    raise RuntimeError("the disk is full")


def test_an_interrupted_run_resumes_at_the_last_common_step(table, tmp_path):
    names = ["small", "vit"]
    expected = alone(tmp_path, table, names, **SAVING)
    first = {"small": None, "vit": [Failure(6, fail)]}
    with pytest.raises(RuntimeError, match="the disk is full"):
        train_together([make(tmp_path, table, name, callbacks=first[name], **SAVING) for name in names])
    # The first student had saved step 6 already.
    assert sorted(path.name for path in (tmp_path / "small").glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]
    assert sorted(path.name for path in (tmp_path / "vit").glob("checkpoint-*")) == ["checkpoint-3"]
    resumed = {name: make(tmp_path, table, name, **SAVING) for name in names}
    train_together(list(resumed.values()), resume_from_checkpoint=True)
    for name in names:
        assert_identical(resumed[name], expected[name])


def test_checkpoints_of_different_steps_are_refused(table, tmp_path):
    names = ["small", "vit"]
    trainers = list(together(tmp_path, table, names, **SAVING).values())
    folders = [f"{trainer.args.output_dir}/checkpoint-{step}" for trainer, step in zip(trainers, (3, 6))]
    with pytest.raises(ValueError, match="resume_from_checkpoint=.*checkpoint-3 of step 3.*checkpoint-6 of step 6"):
        train_together(trainers, resume_from_checkpoint=folders)
    with pytest.raises(ValueError, match="1 folders for 2 models"):
        train_together(trainers, resume_from_checkpoint=folders[:1])
    for step in (3, 6):
        shutil.rmtree(tmp_path / "together" / "vit" / f"checkpoint-{step}")
    for step in (9, 12):
        (tmp_path / "together" / "small" / f"checkpoint-{step}" / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match="resume_from_checkpoint=True.*has 3, 6; .*has 9, 12"):
        train_together(trainers, resume_from_checkpoint=True)


# Ends


def threads():
    return {thread for thread in threading.enumerate() if thread.name in STUDENTS}


@pytest.mark.parametrize(("early", "step"), [("small", 2), ("small", 4), ("vit", 6)])
def test_one_that_stops_early_leaves_the_others_alone(early, step, views, tmp_path):
    def stop(control):
        control.should_training_stop = True

    names = ["small", "large", "vit"]

    callbacks = {early: [Failure(step, stop)]}
    found = [make(tmp_path / "together", views, name, callbacks=callbacks.get(name)) for name in names]
    train_together(found)
    assert [trainer.state.global_step for trainer in found] == [step if name == early else 12 for name in names]
    for trainer, name in zip(found, names):
        other = make(tmp_path / "alone", views, name, callbacks=callbacks.get(name))
        other.train()
        assert_identical(trainer, other)


@pytest.mark.parametrize("failing", ["small", "vit"])
def test_an_error_in_one_ends_all(failing, table, tmp_path):
    names = ["small", "large", "vit"]
    trainers = [
        make(tmp_path, table, name, callbacks=[Failure(5, fail)] if name == failing else None) for name in names
    ]
    with pytest.raises(RuntimeError, match="the disk is full"):
        train_together(trainers)
    assert not threads()
    assert all(trainer.state.global_step <= 5 for trainer in trainers)
    # One that was stopped can train alone.
    trainers[1].train()
    assert trainers[1].state.global_step == 12


def test_an_image_that_cannot_be_read_ends_all(table, tmp_path, monkeypatch):
    read, decode = [], rows_module.decode_image
    # Otherwise each image would be decoded once.
    monkeypatch.setattr("hf_ibdistill.images.cache.MAX_BYTES", 0)

    def fail_late(cell, mode):
        read.append(cell)
        if len(read) == 20:
            raise ValueError("cut off")
        return decode(cell, mode)

    trainers = [make(tmp_path, table, name, eval_strategy="no") for name in ("small", "vit")]
    monkeypatch.setattr(rows_module, "decode_image", fail_late)
    with pytest.raises(ValueError, match="Row [0-9]+: cut off"):
        train_together(trainers)
    assert not threads() and [trainer.state.global_step for trainer in trainers] == [4, 4]


def test_an_error_at_the_start_of_one_ends_all(table, tmp_path):
    class Start(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            raise OSError("no space")

    for failing in ("small", "vit"):
        trainers = [
            make(tmp_path, table, name, callbacks=[Start()] if name == failing else None) for name in ("small", "vit")
        ]
        with pytest.raises(OSError, match="no space"):
            train_together(trainers)
        assert not threads() and [trainer.shared_reading for trainer in trainers] == [None, None]


@pytest.fixture
def heeds_ctrl_c():
    """A shell starts what it runs in the background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("place", ["step", "evaluation"])
def test_ctrl_c_ends_all(place, heeds_ctrl_c, table, tmp_path):
    pressed = []

    class Press(TrainerCallback):
        def press(self):
            if not pressed:
                pressed.append(True)
                os.kill(os.getpid(), signal.SIGINT)

        def on_step_end(self, args, state, control, **kwargs):
            if place == "step" and state.global_step == 5:
                self.press()

        def on_prediction_step(self, args, state, control, **kwargs):
            if place == "evaluation":
                self.press()

    trainers = [make(tmp_path, table, "small"), make(tmp_path, table, "large", callbacks=[Press()])]
    with pytest.raises(KeyboardInterrupt):
        train_together(trainers)
    assert pressed and not threads()
    assert all(trainer.state.global_step <= 6 for trainer in trainers)


def test_an_epoch_that_ends_early_is_refused(table, tmp_path):
    def end_epoch(control):
        control.should_epoch_stop = True

    trainers = [make(tmp_path, table, "small"), make(tmp_path, table, "vit", callbacks=[Failure(2, end_epoch)])]
    with pytest.raises(ValueError, match="should_epoch_stop=True"):
        train_together(trainers)
    assert not threads()


# Refusals


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("per_device_train_batch_size", 2, "per_device_train_batch_size=4.*per_device_train_batch_size=2"),
        ("gradient_accumulation_steps", 2, "gradient_accumulation_steps=1.*gradient_accumulation_steps=2"),
        ("num_train_epochs", 2, "num_train_epochs=3.*num_train_epochs=2"),
        ("max_steps", 5, "max_steps=-1.*max_steps=5"),
        ("dataloader_drop_last", True, "dataloader_drop_last=False.*dataloader_drop_last=True"),
        ("data_seed", 12, "data_seed=11.*data_seed=12"),
        ("data_seed", None, "data_seed=11.*data_seed=1 "),
        ("views_per_image", 2, "views_per_image=1.*views_per_image=2"),
        ("auto_find_batch_size", True, "auto_find_batch_size=True"),
        ("report_to", "trackio", r"report_to=\['trackio'\]"),
        ("accelerator_config", {"use_seedable_sampler": False}, "use_seedable_sampler=False"),
    ],
)
def test_different_arguments_are_refused(name, value, expected, views, tmp_path, monkeypatch):
    trainers = [
        make(tmp_path, views, "small"),
        make(tmp_path, views, "large", **{name: value} if name != "report_to" else {}),
    ]
    if name == "report_to":  # without the tracker itself
        trainers[1].args.report_to = [value]
    with pytest.raises(ValueError, match=expected):
        train_together(trainers)
    assert all(trainer.state.global_step == 0 for trainer in trainers)


def test_different_images_are_refused(table, images, tmp_path):
    small = make(tmp_path, table, "small")
    reversed_rows = table.select(range(NUM_ROWS)[::-1])
    others = {
        "13 rows": table.select(range(13)),
        "14 rows": reversed_rows,
        # The same labels.
        r"14 rows\) have different": with_columns(small_images(NUM_ROWS, seed=0).map(_invert), small_teachers()),
    }
    for expected, other in others.items():
        with pytest.raises(ValueError, match=f"train_dataset.*{expected}"):
            train_together([small, make(tmp_path, other, "large")])
    # Another copy of the table has the same images.
    copy = with_columns(small_images(NUM_ROWS), small_teachers())
    train_together([small, make(tmp_path, copy, "large", num_train_epochs=3)])


def _invert(row):
    return {"image": row["image"].point(lambda value: 255 - value)}


def test_shared_models_and_folders_are_refused(table, tmp_path):
    small, large = make(tmp_path, table, "small"), make(tmp_path, table, "large")
    with pytest.raises(ValueError, match=f"model={tmp_path / 'small'}"):
        train_together([small, small])
    large.args.output_dir = small.args.output_dir
    with pytest.raises(ValueError, match=f"output_dir={tmp_path / 'small'}"):
        train_together([small, large])
    with pytest.raises(ValueError, match=r"trainers=\[\]"):
        train_together([])
    with pytest.raises(TypeError, match="trainers has a str"):
        train_together(["small"])


def test_several_processes_and_one_folder_of_events_are_refused(table, tmp_path, monkeypatch):
    trainer = make(tmp_path, table, "small")
    with monkeypatch.context() as patch:
        patch.setattr(type(trainer.args), "world_size", 2)
        with pytest.raises(ValueError, match="world_size=2"):
            train_together([trainer])
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "events")
    trainer.args.report_to = ["tensorboard"]
    with pytest.raises(ValueError, match="TENSORBOARD_LOGGING_DIR=events"):
        train_together([trainer])


def test_what_cannot_be_shared_is_refused(table, images, tmp_path):
    def trainer(**settings):
        return EnsembleDistillationTrainer(
            model=small_student(),
            args=arguments(tmp_path / "other", max_steps=2, **settings.pop("arguments", {})),
            processing_class=PROCESSOR,
            **{"train_dataset": table, **settings},
        )

    refused = {
        r"teachers=\{": trainer(teachers=small_teachers(), train_dataset=images),
        "stream": trainer(train_dataset=table.to_iterable_dataset()),
        "train_dataset=None": trainer(train_dataset=None),
        "data_collator=function": trainer(data_collator=lambda rows: {}),
    }
    for expected, other in refused.items():
        with pytest.raises(ValueError, match=expected):
            train_together([other])
