"""A recorded table passes its check, and whatever was changed in it is found."""

import copy
import json
import shutil

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset, DatasetDict, DatasetInfo, Image, concatenate_datasets, load_from_disk
from running import run

from hf_ibdistill import (
    ViewRecipe,
    export_logits_table,
    open_logits_table,
    record_teacher_logits,
    verify_rows,
    verify_teacher_logits,
)
from hf_ibdistill.logits.encoding import decode, describe_column
from hf_ibdistill.recording import verification


NUM_ROWS = 20


@pytest.fixture(scope="module", params=["plain", "views", "top-k views"])
def folder(request, loaded, images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("verified") / "t"
    views = None if request.param == "plain" else ViewRecipe(num_views=3, horizontal_flip=0.5)
    top_k = 2 if request.param == "top-k views" else None
    record_teacher_logits(images(NUM_ROWS), loaded, output_dir=folder, views=views, top_k=top_k)
    return folder


@pytest.fixture
def table(folder):
    return load_from_disk(folder)


def with_column_of(table, name, other):
    """The table with one column of another table."""
    return concatenate_datasets([table.remove_columns(name), other.select_columns([name])], axis=1)


def with_logits(table, name, logits):
    """The table with other logits (rows, classes) or (rows, views, classes) in a column, encoded as it is."""
    encoded = describe_column(table.features[name])[0].encode(logits, views=logits.ndim == 3)
    return Dataset(
        table.data.table.set_column(table.column_names.index(name), name, encoded),
        info=DatasetInfo(features=table.features, description=table.info.description),
    )


def with_classes_exchanged(table, name):
    """The same numbers, each for the next class."""
    column, num_views = table.data.column(name), describe_column(table.features[name])[1]
    if num_views is None:
        return with_logits(table, name, np.roll(decode(column, 3), 1, axis=-1))
    views = [np.roll(decode(column, 3, view), 1, axis=-1) for view in range(num_views)]
    return with_logits(table, name, np.stack(views, axis=1))


def test_an_untouched_table_passes(table, teachers, loaded):
    found = verify_teacher_logits(table, teachers)
    assert found.problems == [] and found.num_rows == NUM_ROWS
    assert all(0 <= difference < 0.02 for difference in found.largest_differences.values())
    assert verify_teacher_logits(table, loaded, num_rows=7).num_rows == 7
    named = table.rename_columns({"image": "picture", "label": "animal"})
    assert verify_teacher_logits(named, loaded, image_column="picture") == found


def test_changed_logits_are_found(table, loaded):
    rolled = table.select(np.roll(np.arange(NUM_ROWS), 1))
    for tampered in (with_column_of(table, "conv_logits", rolled), with_classes_exchanged(table, "conv_logits")):
        found = verify_teacher_logits(tampered, loaded)
        (problem,) = found.problems
        assert problem.startswith('"conv_logits" differs from what the teacher predicts in')
        assert found.largest_differences["conv"] > 0.1 > found.largest_differences["inv"]


def test_classes_of_equal_logits_may_change_places_at_the_end_of_the_k(loaded, images, tmp_path):
    model, processor = copy.deepcopy(loaded["conv"][0]), loaded["conv"][1]
    linear = model.classifier
    with torch.no_grad():
        linear.weight[2], linear.bias[2] = linear.weight[1], linear.bias[1]
        linear.bias[0] += 5
    teacher = {"conv": (model, processor)}
    dense = record_teacher_logits(images(NUM_ROWS), teacher, output_dir=tmp_path / "d", dtype="float32")
    top_2 = record_teacher_logits(images(NUM_ROWS), teacher, output_dir=tmp_path / "k", top_k=2)
    logits = decode(dense.data.column("conv_logits"), 3)
    for second in (1, 2):
        favored = logits + 1e-3 * np.eye(3, dtype=np.float32)[second]
        table = with_logits(top_2, "conv_logits", favored)
        assert all(row["class_ids"] == [0, second] for row in table["conv_logits"])
        assert verify_teacher_logits(table, teacher).problems == []
    # Without its first class, the column is another one.
    other = with_logits(top_2, "conv_logits", logits - 20 * np.eye(3, dtype=np.float32)[0])
    assert len(verify_teacher_logits(other, teacher).problems) == 1


def test_other_images_are_found(table, loaded, images):
    moved = images(NUM_ROWS).select(np.roll(np.arange(NUM_ROWS), 1))
    problems = verify_teacher_logits(with_column_of(table, "image", moved), loaded).problems
    assert any("The images of 20 rows are not the ones that were recorded" in problem for problem in problems)


@pytest.mark.parametrize("names", [["cat", "dog", "eel"], ["cat", "dog", "eel", "fox"]], ids=["seed", "classes"])
def test_another_teacher_is_found(names, table, loaded, save_teacher, tmp_path):
    other = {**loaded, "conv": save_teacher(tmp_path / "other", seed=5, names=names)}
    found = verify_teacher_logits(table, other)
    assert any('"conv" is not the one that was recorded: weights_sha256' in problem for problem in found.problems)
    assert not any('"inv' in problem for problem in found.problems)
    assert found.largest_differences["conv"] > 0.1


def test_a_changed_file_is_found(folder, table, loaded, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "copy")
    data = copied / "data-000000000000.arrow"
    content = bytearray(data.read_bytes())
    content[content.rfind(table[NUM_ROWS - 1]["note"].encode())] ^= 1
    data.write_bytes(content)
    (problem,) = verify_teacher_logits(load_from_disk(copied), loaded).problems
    assert problem == "The file data-000000000000.arrow is not the one that recording wrote."


def test_what_cannot_be_verified_is_refused(table, loaded):
    with pytest.raises(ValueError, match='no column "x_logits", or no provenance of it; its columns are image'):
        verify_teacher_logits(table, {"x": loaded["conv"]})
    with pytest.raises(TypeError, match="^dataset .*train"):
        verify_teacher_logits(DatasetDict({"train": table}), loaded)
    table.info.description = ""
    with pytest.raises(ValueError, match='no column "conv_logits", or no provenance'):
        verify_teacher_logits(table, loaded)


# Every row


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_row_is_checked(table, num_workers, monkeypatch):
    monkeypatch.setattr(verification, "_BLOCK", 3)
    assert verify_rows(table, num_workers=num_workers) == []
    # Rows that no sample need find, in another order than that of the files.
    order = [*range(1, NUM_ROWS), 0]
    images = [row["bytes"] for row in table.cast_column("image", Image(decode=False))["image"]]
    images[4], images[11] = images[5], b"none"
    cells = pa.array([{"bytes": content, "path": None} for content in images], table.data.schema.field("image").type)
    shape = (NUM_ROWS, 3) if describe_column(table.features["inv_logits"])[1] is None else (NUM_ROWS, 3, 3)
    worse = with_logits(table, "inv_logits", np.zeros(shape))
    changed = worse.data.table.set_column(worse.column_names.index("image"), "image", cells)
    wrong = Dataset(changed, info=worse.info).select(order)
    assert verify_rows(wrong, num_workers=num_workers) == [
        f"The image is not the one that was recorded in 1 of {NUM_ROWS} rows (first [3]).",
        f"The image cannot be decoded in 1 of {NUM_ROWS} rows (first [10]).",
    ]
    missing = [None if row == 7 else value for row, value in enumerate(table["conv_logits"])]
    feature = table.features["conv_logits"]
    gone = table.remove_columns("conv_logits").add_column("conv_logits", missing, feature=feature)
    assert verify_rows(gone, num_workers=num_workers) == [
        f'"conv_logits" has no usable logits in 1 of {NUM_ROWS} rows (first [7]).'
    ]


def test_columns_that_the_provenance_does_not_describe(table):
    with pytest.raises(ValueError, match="logits of other, .* describes conv, inv"):
        verify_rows(table.rename_column("inv_logits", "other_logits"))
    with pytest.raises(ValueError, match="0 provenance records"):
        verify_rows(Dataset(table.data.table, info=DatasetInfo(features=table.features)))
    with pytest.raises(TypeError, match="dataset"):
        verify_rows(DatasetDict(train=table))


def test_every_row_of_an_exported_table_is_checked_as_it_streams(table, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(verification, "_BLOCK", 3)
    exported = export_logits_table(table, tmp_path / "p")
    assert verify_rows(open_logits_table(exported, streaming=True)) == []
    run("verify", "--table", exported, "--all")
    checks = [{"split": "train", "rows": len(table), "problems": 0}]
    assert json.loads(capsys.readouterr().out) == {"checks": checks, "problems": []}
    with pytest.raises(SystemExit, match="Give --teachers, --all, or both"):
        run("verify", "--table", exported)


def test_a_damaged_file_is_found_by_a_check_of_every_row(folder, tmp_path):
    copied = tmp_path / "t"
    shutil.copytree(folder, copied)
    file = next(copied.glob("data-*.arrow"))
    content = bytearray(file.read_bytes())
    content[-20] ^= 1
    file.write_bytes(content)
    with pytest.raises(SystemExit, match=f"train: The file {file.name} is not the one"):
        run("verify", "--table", copied, "--all")
