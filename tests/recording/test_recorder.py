"""The recorded table: its logits against the teachers called by hand, its columns, and what is refused."""

import copy
import pickle
import re
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import scipy.special
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from comparing import columns, logits_by_hand, same_bytes
from datasets import Dataset, DatasetDict, List, Value, concatenate_datasets, load_dataset, load_from_disk
from small import NAMES
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from hf_ibdistill import (
    IBResNetForImageClassification,
    ImageClassificationTrainer,
    ImageTrainingArguments,
    ViewRecipe,
    record_teacher_logits,
    verify_teacher_logits,
)
from hf_ibdistill.images.views import row_key
from hf_ibdistill.logits.encoding import StoredLogits, decode
from hf_ibdistill.logits.provenance import read_records, stored_views
from hf_ibdistill.recording.batches import EncodedRows, Preparation


FIVE_VIEWS = ViewRecipe(num_views=5, horizontal_flip=0.5, erasing=0.5)


@pytest.fixture(scope="module")
def recorded(teachers, tmp_path_factory, images):
    """A recorded table, whose shards are smaller than it and no multiple of the batch."""
    folder = tmp_path_factory.mktemp("recorded") / "table"
    return record_teacher_logits(images(), teachers, output_dir=folder, batch_size=8, shard_size=16)


@pytest.fixture(scope="module")
def exact(loaded, tmp_path_factory, images):
    folder = tmp_path_factory.mktemp("exact") / "table"
    return record_teacher_logits(images(20), loaded, output_dir=folder, dtype="float32")


@pytest.fixture(scope="module")
def viewed(loaded, tmp_path_factory, images):
    """A table of views, recorded row by row, so that other tables can have the same batches."""
    folder = tmp_path_factory.mktemp("viewed") / "table"
    return record_teacher_logits(images(8), loaded, output_dir=folder, views=FIVE_VIEWS, batch_size=1)


def test_reading_more_images_copies_no_more_class_names(images, loaded, feature_copies, tmp_path):
    counts = []
    for number in (33, 40, 60):  # more than verification reads
        table = images(number)
        feature_copies.clear()
        recorded = record_teacher_logits(table, loaded, output_dir=tmp_path / str(number), batch_size=4)
        verify_teacher_logits(recorded, loaded)
        counts.append(len(feature_copies))
    # The first use of a library in a process may copy some more.
    assert counts[1] == counts[2], counts


def test_the_columns_are_what_each_teacher_predicts_alone(recorded, teachers, images):
    for name, values in columns(recorded).items():
        expected = logits_by_hand(teachers[name.removesuffix("_logits")], images())
        assert recorded.features[name] == List(Value("float16"), length=3)
        # Batches may round differently from single images before the cast to float16.
        np.testing.assert_allclose(values, expected, rtol=2e-3, atol=2e-3)


def test_the_input_columns_are_kept(recorded, images):
    original = images()
    assert recorded.column_names == ["image", "label", "note", "row_key", "file_key", "conv_logits", "inv_logits"]
    assert recorded.features["label"].names == NAMES
    for name in ("label", "note"):
        assert recorded[name][:] == original[name][:]
    assert all(np.array_equal(a, b) for a, b in zip(recorded["image"], original["image"]))
    assert recorded["row_key"][:] == [row_key(image.convert("RGB")) for image in original["image"]]


def test_columns_of_any_name_become_image_and_label(recorded, loaded, tmp_path, images):
    renamed = images().rename_columns({"image": "picture", "label": "animal", "note": "label"})
    with pytest.raises(ValueError, match='"animal" would be named "label"'):
        record_teacher_logits(renamed, loaded, output_dir=tmp_path, image_column="picture", label_column="animal")
    # With a second image column, the first must be given.
    thumbnails = images().select_columns(["image"]).rename_column("image", "thumbnail")
    renamed = concatenate_datasets([renamed.rename_column("label", "note"), thumbnails], axis=1)
    splits = DatasetDict({"train": renamed, "test": renamed.select(range(8))})
    settings = {"image_column": "picture", "label_column": "animal", "batch_size": 8, "shard_size": 16}
    tables = record_teacher_logits(splits, loaded, output_dir=tmp_path, **settings)
    for name, table in tables.items():
        assert table.column_names == [
            "image",
            "label",
            "note",
            "thumbnail",
            "row_key",
            "file_key",
            "conv_logits",
            "inv_logits",
        ]
        expected = recorded if name == "train" else recorded.select(range(8))
        assert same_bytes(table.remove_columns("thumbnail"), expected)


def test_the_provenance_describes_the_teachers_and_the_dataset(recorded, teachers):
    (record,) = read_records(recorded)
    assert [teacher["name"] for teacher in record["teachers"]] == ["conv", "inv"]
    assert record["teachers"][0]["source"] == teachers["conv"]
    assert record["teachers"][1]["image_processor"]["size"] == {"height": 12, "width": 12}
    assert record["teachers"][1]["label_names"] == NAMES
    assert record["dataset"]["num_rows"] == 50


def test_logits_stay_with_their_rows(recorded):
    whole = dict(zip(recorded["note"], columns(recorded)["conv_logits"].tolist()))
    mixed = recorded.shuffle(seed=1).select(range(5, 45)).filter(lambda row: row["label"] != 1)
    for note, row in zip(mixed["note"], columns(mixed)["conv_logits"].tolist()):
        assert row == whole[note]


def test_recording_a_shuffled_selection_equals_selecting_the_recorded(recorded, loaded, tmp_path, images):
    order = np.random.default_rng(0).permutation(50)[:21]
    table = record_teacher_logits(images().select(order), loaded, output_dir=tmp_path / "t", dtype="float32")
    whole = recorded.select(order)
    for name, values in columns(table).items():
        np.testing.assert_allclose(values, columns(whole)[name], rtol=2e-3, atol=2e-3)


def test_float32(exact, teachers, images):
    assert exact.features["conv_logits"] == List(Value("float32"), length=3)
    values = columns(exact)["conv_logits"]
    np.testing.assert_allclose(values, logits_by_hand(teachers["conv"], images(20)), rtol=1e-5, atol=1e-5)


def test_bf16_rounds_and_is_part_of_the_provenance(exact, loaded, tmp_path, images):
    rounded = record_teacher_logits(images(20), loaded, output_dir=tmp_path / "t", dtype="float32", bf16=True)
    for name, values in columns(rounded).items():
        whole = columns(exact)[name]
        assert not np.array_equal(values, whole)
        assert np.abs(values - whole).max() < 0.05 * np.abs(whole).max()
    assert [teacher["bf16"] for teacher in read_records(rounded)[0]["teachers"]] == [True, True]
    assert verify_teacher_logits(rounded, loaded).problems == []
    with pytest.raises(ValueError, match='teacher "conv": bf16 True instead of False'):
        record_teacher_logits(images(20), loaded, output_dir=tmp_path / "t", dtype="float32")


def test_the_autocast_of_the_caller_does_not_change_what_is_recorded(exact, loaded, tmp_path, images):
    # The mixed precision of Accelerate is one setting of the whole process, which an earlier trainer may have set.
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        Accelerator(mixed_precision="bf16", cpu=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            table = record_teacher_logits(images(20), loaded, output_dir=tmp_path / "t", dtype="float32")
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert same_bytes(table, exact)


def test_a_teacher_that_was_just_trained_in_bf16_is_recorded_in_float32(teachers, tmp_path, images):
    model = IBResNetForImageClassification.from_pretrained(teachers["conv"])
    processor = ViTImageProcessor.from_pretrained(teachers["conv"])
    settings = {"max_steps": 2, "eval_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    arguments = ImageTrainingArguments(str(tmp_path / "run"), bf16=True, **settings)
    trainer = ImageClassificationTrainer(model, arguments, train_dataset=images(16), processing_class=processor)
    trainer.train()
    trained = {"conv": (trainer.model, processor)}
    table = record_teacher_logits(images(9), trained, output_dir=tmp_path / "a", dtype="float32")
    model.save_pretrained(tmp_path / "conv")
    processor.save_pretrained(tmp_path / "conv")
    saved = {"conv": tmp_path / "conv"}
    assert same_bytes(table, record_teacher_logits(images(9), saved, output_dir=tmp_path / "b", dtype="float32"))


class SmallMemory(IBResNetForImageClassification):
    """Has room for three images."""

    def forward(self, pixel_values, **kwargs):
        if len(pixel_values) > 3:
            raise torch.OutOfMemoryError("no room")
        return super().forward(pixel_values, **kwargs)


def test_a_batch_that_does_not_fit_into_memory_is_halved(exact, teachers, tmp_path, images):
    processor = ViTImageProcessor.from_pretrained(teachers["conv"])
    model = SmallMemory.from_pretrained(teachers["conv"])
    table = record_teacher_logits(images(20), {"conv": (model, processor)}, output_dir=tmp_path / "t", dtype="float32")
    found, expected = (columns(t, ["conv_logits"])["conv_logits"] for t in (table, exact))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_every_split_is_recorded_but_only_the_training_split_in_views(viewed, teachers, tmp_path, images):
    splits = DatasetDict({"train": images(8), "test": images(7)})
    tables = record_teacher_logits(splits, teachers, output_dir=tmp_path / "t", views=FIVE_VIEWS, batch_size=1)
    loaded = load_from_disk(tmp_path / "t")
    for found in (tables, loaded):
        assert same_bytes(found["train"], viewed) and stored_views(found["train"]) == FIVE_VIEWS
        assert stored_views(found["test"]) is None
        assert found["test"].features["conv_logits"] == List(Value("float16"), length=3)
        expected = logits_by_hand(teachers["inv"], images(7))
        np.testing.assert_allclose(columns(found["test"])["inv_logits"], expected, rtol=2e-3, atol=2e-3)


def test_images_in_files_become_part_of_the_table(teachers, tmp_path, images):
    for row in range(6):
        folder = tmp_path / "images" / NAMES[row % 3]
        folder.mkdir(parents=True, exist_ok=True)
        images(6)[row]["image"].save(folder / f"{row}.png")
    dataset = load_dataset(str(tmp_path / "images"), split="train", cache_dir=str(tmp_path / "cache"))
    expected = [np.asarray(image) for image in dataset["image"]]
    record_teacher_logits(dataset, teachers, output_dir=tmp_path / "t")
    for path in (tmp_path / "images").rglob("*.png"):
        path.unlink()
    for image, other in zip(load_from_disk(tmp_path / "t")["image"], expected):
        assert np.array_equal(np.asarray(image), other)


# Bad input


def test_wrong_input_is_refused_before_anything_is_written(loaded, tmp_path, images, save_teacher):
    fox = save_teacher(tmp_path / "fox", names=["dog", "cat", "fox"])
    two = save_teacher(tmp_path / "two", names=["dog", "cat"])
    number = images(5).add_column("row_key", list("abcde"))
    splits = DatasetDict({"train": images(5), "test": images(5).select([])})
    for dataset, changes, kind, message in (
        (images(5).select([]), {}, ValueError, "dataset is empty"),
        (splits, {}, ValueError, '"test" is empty'),
        ([images(5)], {}, TypeError, "dataset is a list"),
        (images(5).rename_column("note", "conv_logits"), {}, ValueError, r"0 provenance records .*\(conv_logits\)"),
        (number, {}, ValueError, '"row_key" would be overwritten'),
        (images(5).add_column("file_key", range(5)), {}, ValueError, '"file_key" would be overwritten'),
        (images(5), {"output_dir": None}, ValueError, "output_dir=None"),
        (images(5), {"output_dir": ""}, ValueError, "output_dir=''"),
        (images(5).remove_columns("image"), {}, ValueError, "no image column; the columns are label, note"),
        (images(5), {"label_column": "kind"}, ValueError, 'label_column="kind"'),
        (images(5), {"teacher_classes": {"third": {}}}, ValueError, r"\['third'\]"),
        (images(5), {"teacher_classes": {"conv": {"dog": "fox"}}}, ValueError, "\"dog\".*'fox'"),
        (images(5), {"image_column": "photo"}, ValueError, 'image_column="photo"'),
        (images(5), {"dtype": "int8"}, ValueError, 'dtype="int8"'),
        (images(5), {"batch_size": 0}, ValueError, "batch_size=0"),
        (images(5), {"shard_size": -1}, ValueError, "shard_size=-1"),
        (images(5), {"top_k": 3}, ValueError, r"top_k=3 .*\(3\)"),
        (images(5), {"teachers": {"fox": fox}}, ValueError, r'"fox".*\[\'eel\'\] only .*, \[\'fox\'\] only'),
        (images(5), {"teachers": {"two": two}}, ValueError, 'the teacher "two" has 2 classes; .* 3'),
    ):
        with pytest.raises(kind, match=message):
            record_teacher_logits(dataset, **{"teachers": loaded, "output_dir": tmp_path / "t", **changes})
        assert not (tmp_path / "t").exists()


def test_rows_without_a_label_are_recorded_like_any_other(recorded_rows, teachers, tmp_path, images):
    labels = [None if row in (0, 3) else label for row, label in enumerate(images(7)["label"])]
    mixed = Dataset.from_dict({**images(7)[:], "label": labels}, features=images(7).features)
    for name, dataset in (("mixed", mixed), ("none", images(7).remove_columns("label"))):
        table = record_teacher_logits(dataset, teachers, output_dir=tmp_path / name)
        for column in ("conv_logits", "inv_logits", "row_key"):
            assert table[column][:] == recorded_rows[column][:]
        assert table.column_names[:2] == dataset.column_names[:2]
        found = verify_teacher_logits(table, teachers)
        assert not found.problems
        # Called again, it is finished.
        assert (
            record_teacher_logits(dataset, teachers, output_dir=tmp_path / name)["row_key"][:] == table["row_key"][:]
        )
    assert load_from_disk(tmp_path / "mixed")["label"][:] == labels
    unnamed = images(7).remove_columns("label")
    splits = record_teacher_logits(
        DatasetDict(train=unnamed, test=images(7)), teachers, output_dir=tmp_path / "splits"
    )
    assert splits["train"]["conv_logits"][:] == recorded_rows["conv_logits"][:] == splits["test"]["conv_logits"][:]
    assert "label" not in splits["train"].column_names and splits["test"]["label"][:] == images(7)["label"][:]


@pytest.fixture
def recorded_rows(teachers, tmp_path, images):
    return record_teacher_logits(images(7), teachers, output_dir=tmp_path / "labelled")


def softmax_of(logits):
    exponentials = np.exp(np.float64(logits))
    return exponentials / exponentials.sum(-1, keepdims=True)


def test_further_classes_of_a_teacher_are_dropped(tmp_path, images, save_teacher, caplog):
    names = ["ant", "eel", "cat", "bee", "dog"]
    wide = save_teacher(tmp_path / "wide", names=names)
    table = record_teacher_logits(images(6), {"wide": wide}, output_dir=tmp_path / "t", dtype="float32")
    order = [names.index(name) for name in images(6).features["label"].names]
    np.testing.assert_allclose(table["wide_logits"][:], logits_by_hand(wide, images(6))[:, order], rtol=1e-5)
    (warning,) = [message for message in caplog.messages if "wide" in message]
    assert "2 others, which are dropped" in warning
    assert not verify_teacher_logits(table, {"wide": wide}).problems


def test_classes_are_matched_by_a_mapping(tmp_path, images, save_teacher):
    names = ["ant", "sea snake", "tabby", "bee", "Persian cat", "dog"]
    wide = save_teacher(tmp_path / "wide", names=names)
    classes = {"wide": {"cat": ["tabby", 4], "eel": "sea snake"}}
    arguments = {"output_dir": tmp_path / "t", "dtype": "float32", "teacher_classes": classes}
    table = record_teacher_logits(images(6), {"wide": wide}, **arguments)
    # Of the classes that are used, the probabilities of both cats add up.
    chosen = softmax_of(logits_by_hand(wide, images(6))[:, [1, 2, 4, 5]])
    sums = {"eel": chosen[:, 0], "cat": chosen[:, 1] + chosen[:, 2], "dog": chosen[:, 3]}
    expected = np.stack([sums[name] for name in images(6).features["label"].names], axis=1)
    np.testing.assert_allclose(softmax_of(table["wide_logits"][:]), expected, rtol=1e-4)
    assert not verify_teacher_logits(table, {"wide": wide}).problems
    (teacher,) = read_records(table)[0]["teachers"]
    assert teacher["classes"] == {"cat": ["tabby", 4], "eel": "sea snake", "dog": "dog"}
    # Another mapping is another teacher.
    classes["wide"]["cat"] = "tabby"
    with pytest.raises(ValueError, match="classes"):
        record_teacher_logits(images(6), {"wide": wide}, **arguments)


def test_a_teacher_with_the_classes_in_another_order_is_reordered_with_a_warning(
    tmp_path, images, save_teacher, caplog
):
    order, names = [2, 0, 1], ["eel", "cat", "dog"]
    straight = save_teacher(tmp_path / "straight")
    model = AutoModelForImageClassification.from_pretrained(straight)
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: i for i, name in enumerate(names)}
    for parameter in model.classifier.parameters():
        parameter.data = parameter.data[order]
    turned = (model, AutoImageProcessor.from_pretrained(straight))
    table = record_teacher_logits(images(20), {"straight": straight, "turned": turned}, output_dir=tmp_path / "t")
    (warning,) = [message for message in caplog.messages if "another order" in message]
    assert '"turned"' in warning
    assert table["turned_logits"][:] == table["straight_logits"][:]
    label_names = {teacher["name"]: teacher["label_names"] for teacher in read_records(table)[0]["teachers"]}
    assert label_names["turned"] == label_names["straight"] == table.features["label"].names
    assert verify_teacher_logits(table, {"turned": turned}).problems == []


# The longer list has a whole batch and a whole shard, the first row and the last.
@pytest.mark.parametrize("broken", [[41], [0, 3, *range(8, 32), 49]], ids=["one", "many"])
def test_unreadable_images_can_be_left_out(broken, loaded, recorded, tmp_path, caplog, images):
    settings = {"batch_size": 8, "shard_size": 16, "skip_unreadable": True}
    table = record_teacher_logits(images(broken=broken), loaded, output_dir=tmp_path, **settings)
    kept = [row for row in range(50) if row not in broken]
    assert table["note"][:] == [f"row {row}" for row in kept]
    assert f"{len(broken)} rows were left out" in caplog.text and str(broken) in caplog.text
    for name, values in columns(table).items():
        np.testing.assert_allclose(values, columns(recorded)[name][kept], rtol=2e-3, atol=2e-3)


def test_the_error_about_a_logit_that_is_not_finite_names_teacher_and_row(teachers, tmp_path, images):
    model = IBResNetForImageClassification.from_pretrained(teachers["conv"]).eval()
    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    forward, calls = model.forward, []

    def fail_in_the_second_batch(**inputs):
        outputs = forward(**inputs)
        calls.append(len(outputs.logits))
        if len(calls) == 3:  # after one image that is tried first, and a batch
            outputs.logits[3] = float("nan")
        return outputs

    model.forward = fail_in_the_second_batch
    with pytest.raises(ValueError, match=r'"conv" .* NaN or infinite logits for row 11 .*\. Check the teacher'):
        record_teacher_logits(images(), {"conv": (model, processor)}, output_dir=tmp_path, batch_size=8, shard_size=8)
    assert [path.name for path in tmp_path.glob("*.arrow")] == ["data-000000000000.arrow"]


@pytest.mark.parametrize("top_k", [None, 2])
def test_a_teacher_that_explodes_on_an_image_is_reported_and_recorded(top_k, teachers, tmp_path, images, caplog):
    model = IBResNetForImageClassification.from_pretrained(teachers["conv"]).eval()
    with torch.no_grad():
        # As of an involution teacher on an image unlike all that it was trained on.
        model.classifier.weight *= 1e7
    for part in (model, ViTImageProcessor(size={"height": 8, "width": 8})):
        part.save_pretrained(tmp_path / "teacher")
    given = {"conv": tmp_path / "teacher"}
    table = record_teacher_logits(images(20), given, output_dir=tmp_path / "t", top_k=top_k, batch_size=8)
    (warning,) = [message for message in caplog.messages if "unstable" in message]
    assert re.search(r'"conv" predicts logits of up to [1-9].*e\+0\d for row \d', warning)
    expected = logits_by_hand(tmp_path / "teacher", images(20))
    stored = StoredLogits(table, "conv_logits").read(range(20), 3)
    probabilities = [scipy.special.softmax(values.astype(np.float64), axis=-1) for values in (stored, expected)]
    np.testing.assert_allclose(*probabilities, atol=1e-6)
    assert verify_teacher_logits(table, given).problems == []


# Views and top-k


def test_views_are_what_the_teachers_predict_for_each_view(viewed, teachers, images):
    assert stored_views(viewed) == FIVE_VIEWS
    for name, values in columns(viewed).items():
        expected = logits_by_hand(teachers[name.removesuffix("_logits")], images(8), FIVE_VIEWS)
        np.testing.assert_allclose(values, expected, rtol=2e-3, atol=2e-3)


def test_workers_and_batch_size_do_not_change_the_views(viewed, loaded, tmp_path, images):
    settings = {"views": FIVE_VIEWS}
    workers = record_teacher_logits(
        images(8), loaded, output_dir=tmp_path / "w", batch_size=1, num_workers=2, **settings
    )
    assert same_bytes(workers, viewed)
    # Batches of three rows, and a smaller one.
    batches = record_teacher_logits(images(8), loaded, output_dir=tmp_path / "b", batch_size=16, **settings)
    for name, values in columns(batches).items():
        np.testing.assert_allclose(values, columns(viewed)[name], rtol=2e-3, atol=2e-3)


def test_top_k_columns_hold_the_largest_of_the_dense_ones(loaded, tmp_path, images):
    dense, top_k = (
        record_teacher_logits(
            images(9), loaded, output_dir=tmp_path / str(k), views=ViewRecipe(2), dtype="float32", top_k=k
        )
        for k in (None, 2)
    )
    for name in ("conv_logits", "inv_logits"):
        for view in range(2):
            whole, read = (decode(t.with_format("arrow")[:][name], 3, view) for t in (dense, top_k))
            # Two of three classes are stored and the third is the rest, so nothing is lost.
            difference = whole - whole.max(-1, keepdims=True) - read
            np.testing.assert_allclose(difference, 0, atol=1e-4)


# More loaded and more views


@pytest.mark.parametrize("views", [None, FIVE_VIEWS], ids=["plain", "views"])
def test_adding_a_teacher_records_it_alone(views, recorded, viewed, loaded, tmp_path, images):
    whole = recorded if views is None else viewed
    settings = {"batch_size": 8, "shard_size": 16} if views is None else {"batch_size": 1, "views": views}
    conv, inv = ({name: folder} for name, folder in loaded.items())
    first = record_teacher_logits(images(len(whole)), conv, output_dir=tmp_path / "first", **settings)
    # Only the second teacher is given, so the first cannot have run again.
    moved = first.map(lambda row: row, load_from_cache_file=False)
    both = record_teacher_logits(moved, inv, output_dir=tmp_path / "both", **settings)
    assert [teacher["name"] for teacher in read_records(both)[0]["teachers"]] == ["conv", "inv"]
    assert same_bytes(both, whole)


@pytest.mark.parametrize("top_k", [None, 2], ids=["dense", "top-k"])
def test_more_views_are_added_to_the_recorded_ones(top_k, viewed, loaded, tmp_path, images):
    settings = {"top_k": top_k, "batch_size": 1}
    two = ViewRecipe(num_views=2, horizontal_flip=0.5, erasing=0.5)
    first = record_teacher_logits(images(8), loaded, output_dir=tmp_path / "2", views=two, **settings)
    more = record_teacher_logits(first, loaded, output_dir=tmp_path / "5", views=FIVE_VIEWS, **settings)
    assert stored_views(more) == FIVE_VIEWS
    for name in ("conv_logits", "inv_logits"):
        old, new, whole = (t.with_format("arrow")[:][name].combine_chunks() for t in (first, more, viewed))
        for view in range(2):
            assert np.array_equal(decode(old, 3, view), decode(new, 3, view))
        for view in range(5):
            found, expected = decode(new, 3, view), decode(whole, 3, view).astype(np.float32)
            if top_k is not None:
                expected -= expected.max(-1, keepdims=True)
            np.testing.assert_allclose(found, expected, rtol=5e-3, atol=5e-3)


def test_what_cannot_be_added_is_refused(viewed, loaded, tmp_path, save_teacher):
    inv, six = {"inv": loaded["inv"]}, ViewRecipe(num_views=6, horizontal_flip=0.5, erasing=0.5)
    other = {"inv": save_teacher(tmp_path / "other", "involution-small", seed=7, size=12)}
    for given, views, message in (
        (inv, FIVE_VIEWS, 'already has the column "inv_logits" with 5 views'),
        (inv, six, r"num_views=6, but \['conv'\] have 5 views"),
        (loaded, ViewRecipe(num_views=6, seed=1), "holds logits of other views"),
        (inv, None, "holds logits of other views"),
        (other, six, r'"inv_logits" of another teacher \(weights_sha256 differ'),
    ):
        with pytest.raises(ValueError, match=message):
            record_teacher_logits(viewed, given, output_dir=tmp_path / "x", views=views)
    assert not (tmp_path / "x").exists()


# Before the first shard


@pytest.mark.parametrize("name", ["label", "class", "view", "train", "eval", "test", "Label", "eval_conv"])
def test_names_of_other_metrics_are_refused(name, loaded, tmp_path, images):
    with pytest.raises(ValueError, match=f'"{name}" cannot name a teacher'):
        record_teacher_logits(images(3), {name: loaded["conv"]}, output_dir=tmp_path / "t")
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("views", [None, FIVE_VIEWS], ids=["plain", "views"])
@pytest.mark.parametrize("fault", ["head", "channels", "processor"])
def test_a_teacher_that_does_not_fit_is_refused_before_anything_is_written(fault, views, loaded, tmp_path, images):
    model, processor = copy.deepcopy(loaded["conv"][0]), loaded["conv"][1]
    if fault == "head":
        model.classifier = torch.nn.Linear(model.classifier.in_features, 5)
    if fault == "channels":
        model = ViTForImageClassification(
            ViTConfig(
                image_size=8, patch_size=4, num_channels=1, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                intermediate_size=8, id2label=dict(enumerate(NAMES)),
            )
        )  # fmt: skip
    if fault == "processor":
        processor = ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.5, 0.5])
    pair = {"inv": loaded["inv"], "odd": (model, processor)}
    with pytest.raises(ValueError, match='teacher "odd"'):
        record_teacher_logits(images(4), pair, output_dir=tmp_path / "t", views=views, top_k=2)
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("skip_unreadable", [False, True])
def test_images_of_which_none_can_be_read_are_refused(skip_unreadable, loaded, tmp_path, images):
    broken = images(6, broken=range(6))
    for dataset, what in ((broken, "dataset"), (DatasetDict(train=images(3), test=broken), 'split "test"')):
        with pytest.raises(ValueError, match=f"None of 6 .*{what} .*decoded.*Row 0"):
            record_teacher_logits(dataset, loaded, output_dir=tmp_path / "t", skip_unreadable=skip_unreadable)
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(
    "settings",
    [{"batch_size": "8"}, {"shard_size": 1.5}, {"num_workers": -1}, {"top_k": True}, {"views": {"num_views": 2}}],
)
def test_arguments_of_other_types_are_named(settings, loaded, tmp_path, images):
    ((name, value),) = settings.items()
    with pytest.raises((ValueError, TypeError), match=re.escape(f"{name}={value!r}")):
        record_teacher_logits(images(4), loaded, output_dir=tmp_path / "t", **settings)


def test_more_views_leave_the_other_splits_as_they_are(loaded, tmp_path, images):
    splits = DatasetDict(train=images(6), test=images(4))
    two = ViewRecipe(num_views=2, horizontal_flip=0.5, erasing=0.5)
    first = record_teacher_logits(splits, loaded, output_dir=tmp_path / "2", views=two, batch_size=1)
    more = record_teacher_logits(first, loaded, output_dir=tmp_path / "5", views=FIVE_VIEWS, batch_size=1)
    whole = record_teacher_logits(splits, loaded, output_dir=tmp_path / "w", views=FIVE_VIEWS, batch_size=1)
    assert stored_views(more["train"]) == FIVE_VIEWS and stored_views(more["test"]) is None
    for name in splits:
        for teacher, values in columns(more[name]).items():
            np.testing.assert_allclose(values, columns(whole[name])[teacher], rtol=5e-3, atol=5e-3)
    assert read_records(more["test"])[0]["teachers"] == read_records(first["test"])[0]["teachers"]
    with pytest.raises(ValueError, match="already has the column"):
        record_teacher_logits(first, loaded, output_dir=tmp_path / "x", views=two)
    other = {**loaded, "inv": loaded["conv"]}
    with pytest.raises(ValueError, match='"inv_logits" of another teacher'):
        record_teacher_logits(DatasetDict(train=splits["train"], test=first["test"]), other, output_dir=tmp_path / "y")


def test_what_workers_get_can_be_sent_to_a_new_process(loaded, images):
    # Under spawn and forkserver a worker starts from a pickle, not from a copy of this process.
    processors = {name: processor for name, (_, processor) in loaded.items()}
    prepare = Preparation(processors, FIVE_VIEWS, range(1, 3), None, False, embeds_files=True, keeps_keys=False)
    rows = EncodedRows(images(4))
    expected = prepare(rows.__getitems__(range(1, 3)))
    rows, prepare = pickle.loads(pickle.dumps((rows, prepare)))
    found = prepare(rows.__getitems__(range(1, 3)))
    assert [*found.numbers] == [1, 2] and found.rows.equals(expected.rows)
    assert all(torch.equal(found.inputs[name], expected.inputs[name]) for name in processors)


def test_a_worker_sends_its_rows_and_not_those_beside_them(viewed, loaded):
    # Each row has views and logits; all 4,000 are in one record batch.
    table = Dataset(pa.concat_tables([viewed.data.table] * 500).combine_chunks(), info=viewed.info)
    processors = {name: processor for name, (_, processor) in loaded.items()}
    prepare = Preparation(processors, FIVE_VIEWS, range(5, 6), None, False, embeds_files=False, keeps_keys=True)
    rows = EncodedRows(table)
    batch = prepare(rows.__getitems__(range(1001, 1004)))
    sent = pickle.dumps(batch)
    size = sum(tensor.nbytes for tensor in batch.inputs.values()) + batch.rows.nbytes
    assert len(sent) < 2 * size + 20_000 < table.data.nbytes / 10
    received = pickle.loads(sent)
    assert received.rows.equals(batch.rows)
    for column in ("row_key", "conv_logits", "inv_logits"):
        expected = viewed.with_format("arrow")[:][column].to_pylist()
        assert received.rows[column].to_pylist() == [expected[row % 8] for row in range(1001, 1004)]


def test_workers_add_views_to_those_that_were_recorded(loaded, viewed, tmp_path, images):
    two = record_teacher_logits(images(8), loaded, output_dir=tmp_path / "two", views=replace(FIVE_VIEWS, num_views=2))
    more = record_teacher_logits(
        two, loaded, output_dir=tmp_path / "five", views=FIVE_VIEWS, batch_size=6, num_workers=2
    )
    for name, values in columns(more).items():
        np.testing.assert_allclose(values, columns(viewed)[name], rtol=2e-3, atol=2e-3)
