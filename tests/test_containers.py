"""Every public function that takes a table, given each thing that people hold a table in: the result of the table itself, or
an error that names the argument and what it is."""

import itertools

import pytest
import torch
from datasets import DatasetDict, IterableDatasetDict
from small import make_images

from hf_ibdistill import (
    DistillationArguments,
    EnsembleDistillationTrainer,
    IBViTConfig,
    IBViTForImageClassification,
    ImageClassificationTrainer,
    ImageTrainingArguments,
    assess_table,
    attach_record,
    attach_teacher_logits,
    build_image_processor,
    class_config,
    evaluate_model,
    export_logits_table,
    load_image_dataset,
    load_teachers,
    logits_metrics,
    predict,
    push_logits_to_hub,
    read_records,
    record_teacher_logits,
    select_per_class,
    stored_views,
    verify_teacher_logits,
)


class Rows(torch.utils.data.Dataset):
    """A dataset of torch alone."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return make_images(3)[index]


def transformed(table):
    return table.with_transform(lambda rows: rows)


SPLITS = {
    "a dict": lambda table: {"train": table},
    "a DatasetDict": lambda table: DatasetDict(train=table),
    "streams": lambda table: IterableDatasetDict(train=table.to_iterable_dataset()),
    "no splits": lambda table: {},
}
OTHERS = {
    "a list": lambda table: [table[0]],
    "torch": lambda table: Rows(),
    "none": lambda table: None,
    "a text": lambda table: "train",
}
STREAM = {"a stream": lambda table: table.to_iterable_dataset()}
TRANSFORM = {"a transform": transformed}
FORMATS = {
    str(kind): lambda table, kind=kind: table.with_format(kind) for kind in ("torch", "numpy", "pandas", "arrow")
} | {"hidden columns": lambda table: table.with_format(None, columns=table.column_names[-1:])}


@pytest.fixture(scope="module")
def given(teachers, tmp_path_factory):
    """Two tables, a teacher and its image processor, a student, and empty folders."""
    (teacher,) = load_teachers({"conv": teachers["conv"]})
    conv = {"conv": (teacher.model, teacher.image_processor)}
    folders = (tmp_path_factory.mktemp("folder") for _ in itertools.count())
    images = make_images(6)
    recorded = record_teacher_logits(images, conv, output_dir=next(folders) / "t")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = IBViTConfig(teacher_names=["conv"], image_size=8, patch_size=4, **sizes, **class_config(images))
    return {
        "images": images,
        "recorded": recorded,
        "conv": conv,
        "model": teacher.model,
        "processor": teacher.image_processor,
        "student": IBViTForImageClassification(config),
        "folders": folders,
    }


def trainer(kind, arguments, model, given, **tables):
    settings = {"use_cpu": True, "eval_strategy": "no", "report_to": [], "max_steps": 1}
    args = arguments(next(given["folders"]), **settings)
    return kind(given[model], args, processing_class=given["processor"], **tables)


DISTILL = (EnsembleDistillationTrainer, DistillationArguments, "student")
# Name → the table that it is called on, the call, and what it returns.
CALLS = {
    "build_image_processor": ("images", lambda t, g: build_image_processor(t).to_dict()),
    "select_per_class": ("images", lambda t, g: select_per_class(t, 1)["note"][:]),
    "predict": ("images", lambda t, g: predict(g["model"], g["processor"], t)["logits"].tolist()),
    "evaluate_model": ("images", lambda t, g: evaluate_model(g["model"], g["processor"], t)),
    "attach_teacher_logits": (
        "images",
        lambda t, g: attach_teacher_logits(t, g["recorded"].remove_columns(["image", "label", "note"]))["note"][:],
    ),
    "attach_teacher_logits, logits_table": (
        "recorded",
        lambda t, g: attach_teacher_logits(g["images"], t)["conv_logits"][:],
    ),
    "assess_table": ("recorded", lambda t, g: assess_table({"train": t})),
    "logits_metrics": ("recorded", lambda t, g: logits_metrics(t)),
    "verify_teacher_logits": ("recorded", lambda t, g: verify_teacher_logits(t, g["conv"]).problems),
    "export_logits_table": ("recorded", lambda t, g: export_logits_table(t, next(g["folders"])).is_dir()),
    "class_config": ("images", lambda t, g: class_config(t)),
    "read_records": ("recorded", lambda t, g: read_records(t)),
    "stored_views": ("recorded", lambda t, g: stored_views(t)),
    "attach_record": ("images", lambda t, g: attach_record(t, read_records(g["recorded"])[0])),
    "train_dataset": ("recorded", lambda t, g: bool(trainer(*DISTILL, g, train_dataset=t))),
    "train_dataset without teachers": (
        "images",
        lambda t, g: bool(trainer(ImageClassificationTrainer, ImageTrainingArguments, "model", g, train_dataset=t)),
    ),
    "predict of a trainer": (
        "images",
        lambda t, g: trainer(*DISTILL, g, train_dataset=g["recorded"]).predict(t).predictions[0].shape,
    ),
    "record_teacher_logits": (
        "images",
        lambda t, g: record_teacher_logits(t, g["conv"], output_dir=next(g["folders"]) / "t")["conv_logits"][:],
    ),
}
TAKES_STREAMS = {"class_config", "read_records", "stored_views", "attach_record", "train_dataset"}
TAKES_STREAMS |= {"train_dataset without teachers", "record_teacher_logits"}


@pytest.mark.parametrize("call", CALLS)
def test_containers_work_or_are_named(call, given):
    name, run = CALLS[call]
    table = given[name]
    expected = run(table, given)
    for container in FORMATS:
        assert run(FORMATS[container](table), given) == expected, container
    refused = {**SPLITS, **OTHERS} if call != "record_teacher_logits" else OTHERS
    if call in TAKES_STREAMS:
        run(table.to_iterable_dataset(), given)
    else:
        refused |= STREAM
    if "train_dataset" in call:
        del refused["none"]  # a trainer may only evaluate
    for container, make in refused.items():
        wrong = make(table)
        with pytest.raises(TypeError) as error:
            run(wrong, given)
        assert type(wrong).__name__ in str(error.value) and "datasets.Dataset" in str(error.value), container


@pytest.mark.parametrize("call", [call for call in CALLS if CALLS[call][0] == "images" and "record" not in call])
def test_a_transform_is_named(call, given):
    with pytest.raises(ValueError, match=r"transform.*reset_format"):
        CALLS[call][1](transformed(given["images"]), given)


@pytest.mark.parametrize("kind", ["a dict", "a DatasetDict", "streams"])
def test_splits_are_recorded_each(kind, given, tmp_path):
    tables = record_teacher_logits(SPLITS[kind](given["images"]), given["conv"], output_dir=tmp_path / "t")
    assert tables["train"]["conv_logits"][:] == given["recorded"]["conv_logits"][:]
    with pytest.raises(ValueError, match="no splits"):
        record_teacher_logits({}, given["conv"], output_dir=tmp_path / "u")


def test_publishing_and_opening_refuse_other_things(given):
    for make in {**SPLITS, **OTHERS, **STREAM}.values():
        with pytest.raises(TypeError, match=r"table is .*datasets\.Dataset"):
            push_logits_to_hub(make(given["recorded"]), "user/name")
    for make in (*SPLITS.values(), *STREAM.values(), OTHERS["a list"], OTHERS["none"]):
        with pytest.raises(TypeError, match="source is a.* Hub id"):
            load_image_dataset(make(given["images"]))
