"""Provenance: it stays with a table, names what differs, and columns are checked against it."""

import copy
import io
import json
from functools import cache

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value, concatenate_datasets, load_from_disk
from transformers import ViTImageProcessor

from hf_ibdistill import IBResNetConfig, IBResNetForImageClassification, ViewRecipe
from hf_ibdistill.files import checksums, sha256
from hf_ibdistill.images.decoding import file_key
from hf_ibdistill.images.views import row_key
from hf_ibdistill.logits import provenance
from hf_ibdistill.logits.encoding import LogitsEncoding
from hf_ibdistill.logits.provenance import (
    CHECKSUMS,
    attach_record,
    build_record,
    check_columns,
    check_files,
    check_images,
    damaged_files,
    read_records,
    record_differences,
    stored_views,
)
from hf_ibdistill.teachers import Teacher


NAMES = ["cat", "dog", "eel"]


def teacher(name="conv", seed=0, size=8, names=NAMES):
    torch.manual_seed(seed)
    config = IBResNetConfig.from_preset(
        "convolution-small", depths=(1, 1, 1), hidden_sizes=(16, 16, 16), num_labels=3, id2label=dict(enumerate(names))
    )
    processor = ViTImageProcessor(size={"height": size, "width": size})
    return Teacher(name, IBResNetForImageClassification(config).eval(), processor)


same_teacher = cache(teacher)


def record(*teachers, dataset=None, views=None, dtype="float16"):
    described = [one.describe(LogitsEncoding(dtype)) for one in teachers or [same_teacher()]]
    return build_record(described, dataset or {"num_rows": 6}, views)


def table(logits=None, encoding=None, num_views=None):
    encoding = encoding or LogitsEncoding()
    feature = encoding.feature(3, num_views)
    features = Features({"label": ClassLabel(names=NAMES), "x": Value("int64"), "conv_logits": feature})
    logits = np.zeros((6, 3) if num_views is None else (6, num_views, 3), np.float32) if logits is None else logits
    columns = {"label": [0, 1, 2] * 2, "x": range(6)}
    if np.isfinite(logits).all():
        columns["conv_logits"] = encoding.encode(logits, views=num_views is not None).to_pylist()
    else:
        columns["conv_logits"] = logits.tolist()
    return Dataset.from_dict(columns, features=features)


def test_the_record_stays_with_the_table(tmp_path):
    ours, dataset = record(), table()
    attach_record(dataset, ours)
    dataset.shuffle(seed=0).select(range(4)).filter(lambda row: row["x"] > -1).save_to_disk(tmp_path / "t")
    assert read_records(load_from_disk(tmp_path / "t")) == [json.loads(json.dumps(ours))]


def test_concatenated_tables_have_both_records():
    first, second = table(), table()
    attach_record(first, record(teacher(seed=0)))
    attach_record(second, record(teacher(seed=1)))
    records = read_records(concatenate_datasets([first, second]))
    assert len({r["teachers"][0]["weights_sha256"] for r in records}) == 2
    same = concatenate_datasets([first.select(range(3)), first.select(range(3, 6))])
    assert len(read_records(same)) == 1


TEXTS = [
    "A set of pets.",
    '{"format": "else", "more": {"x": [1, {}]}}',
    '{"broken',
    "Braces { and } } { and {}.",
    "größe 🐈",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_description_and_the_records_keep_each_other(text, tmp_path):
    """Whatever the images are described as, before and after joining, saving and recording again."""
    first, second, third = table(), table(), table()
    ours, others = (json.loads(json.dumps(record(teacher(seed=seed)))) for seed in (0, 1))
    for dataset, own in ((first, text), (second, "Another set."), (third, text)):
        dataset.info.description = own
    attach_record(first, ours)
    attach_record(second, others)
    assert read_records(first) == [ours] and first.info.description.startswith(text + "\n\n{")
    changed = first.select([1]).cast_column("x", Value("int32")).map(lambda row: row).rename_column("x", "y")
    assert read_records(changed) == [ours]
    for joined, expected in (
        ([first, second], [ours, others]),
        ([third, first], [ours]),
        ([first, third], [ours]),
        ([first, third, second], [ours, others]),
    ):
        joined = concatenate_datasets(joined)
        assert read_records(joined) == expected
        joined.shuffle(seed=0).save_to_disk(tmp_path / str(len(list(tmp_path.iterdir()))))
    for folder in sorted(tmp_path.iterdir()):
        assert ours in read_records(load_from_disk(folder)) and text in load_from_disk(folder).info.description
    # A new record replaces the old one, and the text stays once.
    attach_record(first, others)
    assert read_records(first) == [others] and first.info.description.count(text) == 1


def test_the_same_recording_under_two_descriptions_is_one():
    first, second = table(), table()
    first.info.description, second.info.description = "One half.", "The other half."
    ours = record()
    for half in (first, second):
        attach_record(half, ours)
    joined = concatenate_datasets([first, second])
    assert len(read_records(joined)) == 1
    assert "One half." in joined.info.description and "The other half." in joined.info.description


@pytest.mark.parametrize("description", ["", *TEXTS])
def test_a_table_without_record_has_none(description):
    dataset = table()
    dataset.info.description = description
    assert read_records(dataset) == []


def test_equal_teachers_do_not_differ_and_library_versions_may():
    ours, other = record(teacher()), record(teacher())
    other["versions"]["torch"] = "0.0"
    assert record_differences(ours, other) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: record(teacher(seed=1)), 'teacher "conv": weights_sha256'),
        (lambda: record(teacher(size=9)), 'teacher "conv": image_processor'),
        (lambda: record(teacher(names=["dog", "cat", "eel"])), 'teacher "conv": label_names'),
        (lambda: record(teacher("inv")), r"teachers: ['inv'] instead of ['conv']"),
        (lambda: record(dataset={"num_rows": 7}), "dataset: num_rows 7 instead of 6"),
        (lambda: record(dtype="float32"), 'teacher "conv": encoding'),
        (lambda: record(views=ViewRecipe(num_views=4)), "views: num_views 4 instead of None"),
    ],
)
def test_what_differs_is_named(change, message):
    differences = record_differences(record(), change())
    assert any(message in line for line in differences), differences


def test_check_columns_passes_what_fits():
    check_columns(table(), ["conv"], NAMES)


def test_check_columns_names_what_is_missing():
    with pytest.raises(ValueError, match='"inv".* "inv_logits".*conv_logits'):
        check_columns(table(), ["conv", "inv"], NAMES)
    with pytest.raises(ValueError, match='"conv_logits" .* 3 classes; .* 4 classes'):
        check_columns(table(), ["conv"], [*NAMES, "fox"])


def test_check_columns_reads_the_teachers_classes():
    dataset = table()
    attach_record(dataset, record(teacher(names=["dog", "cat", "eel"])))
    with pytest.raises(ValueError, match='the teacher "conv" .*order'):
        check_columns(dataset, ["conv"], NAMES)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_check_columns_names_rows_that_are_not_finite(value):
    logits = np.zeros((6, 3), np.float32)
    logits[4, 1] = value
    with pytest.raises(ValueError, match=r'"conv_logits" .* in 1 rows .*\[4\]'):
        check_columns(table(logits), ["conv"], NAMES)
    # A selection without the row is fine: only rows that will be trained on count.
    check_columns(table(logits).select([0, 1, 2, 3, 5]), ["conv"], NAMES)


def test_describing_does_not_change_the_teacher():
    one = teacher()
    before = copy.deepcopy(one.model.state_dict())
    record(one)
    assert all(torch.equal(before[name], value) for name, value in one.model.state_dict().items())


def test_class_names_are_in_the_record_once():
    one = teacher()
    one.model.config.label_names = NAMES  # as in timm's configurations
    described = one.describe(LogitsEncoding())
    assert described["label_names"] == NAMES and json.dumps(described).count("eel") == 1
    assert described["config"]["model_type"] == "ibresnet"


def test_views_are_read_from_the_record_and_checked_against_the_columns():
    recipe, dataset = ViewRecipe(num_views=2, seed=3), table(num_views=2)
    with pytest.raises(ValueError, match='"conv_logits" holds 2 views .* none'):
        stored_views(dataset)
    attach_record(dataset, record(views=recipe))
    assert stored_views(dataset) == recipe
    check_columns(dataset, ["conv"], NAMES)
    attach_record(dataset, record(views=ViewRecipe(num_views=3)))
    with pytest.raises(ValueError, match='"conv_logits" holds 2 views .* has 3'):
        check_columns(dataset, ["conv"], NAMES)
    assert stored_views(table()) is None


def test_tables_of_different_views_are_not_trained_on_together():
    first, second = table(num_views=2), table(num_views=2)
    attach_record(first, record(views=ViewRecipe(num_views=2)))
    attach_record(second, record(views=ViewRecipe(num_views=2, seed=1)))
    with pytest.raises(ValueError, match="different views: .*'seed': 0.*'seed': 1"):
        stored_views(concatenate_datasets([first, second]))


def test_top_k_columns_are_checked():
    encoding = LogitsEncoding(top_k=2)
    check_columns(table(encoding=encoding), ["conv"], NAMES)
    logits = np.array([[0, 1, 2]] * 6, np.float32)
    with pytest.raises(ValueError, match='"conv_logits" names class 2; .* 2 classes'):
        check_columns(table(logits, encoding), ["conv"], NAMES[:2])


def test_a_check_before_training_does_not_grow_with_the_table(monkeypatch):
    """Of a long table, what fits into the time; none here, so one block."""
    monkeypatch.setattr(provenance, "_SECONDS", -1.0)
    read, describe = [], Dataset.__getitem__
    monkeypatch.setattr(Dataset, "__getitem__", lambda self, key: read.append(key) or describe(self, key))
    for num_rows in (1_000, 20_000):
        logits = np.zeros((num_rows, 3), np.float16)
        long = Dataset.from_dict(
            {"conv_logits": list(logits)}, features=Features({"conv_logits": LogitsEncoding().feature(3, None)})
        )
        read.clear()
        check_columns(long, ["conv"], NAMES)
        assert len(read) == 1 and len(range(*read[0].indices(num_rows))) <= 256
    logits[:] = np.nan
    bad = Dataset.from_dict({"conv_logits": list(logits)}, features=long.features)
    with pytest.raises(ValueError, match=r"rows of a sample of (256|32) \(first"):
        check_columns(bad, ["conv"], NAMES)


def test_a_check_before_training_does_not_grow_with_views_and_classes(monkeypatch):
    monkeypatch.setattr(provenance, "_SECONDS", -1.0)
    monkeypatch.setattr(provenance, "_BLOCK_VALUES", 120)
    counted, check = [], provenance.unusable_rows
    monkeypatch.setattr(
        provenance, "unusable_rows", lambda values, *of: counted.append(len(values)) or check(values, *of)
    )
    for num_views, expected in ((1, 40), (4, 10), (40, 1), (50, 1)):
        viewed = concatenate_datasets([table(num_views=num_views)] * 20)
        attach_record(viewed, record(views=ViewRecipe(num_views=num_views)))
        check_columns(viewed, ["conv"], NAMES)
        assert counted.pop() == expected and not counted


def test_a_column_of_something_else_is_named():
    with pytest.raises(ValueError, match='"x_logits" .*fixed number of logits but Value'):
        check_columns(table().rename_column("x", "x_logits"), ["x"], NAMES)


# Files


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A table in three files with checksums of parts of 64 bytes, of which a quick check reads two."""
    monkeypatch.setattr("hf_ibdistill.files.PART", 64)
    monkeypatch.setattr(provenance, "PART", 64)
    monkeypatch.setattr(provenance, "_QUICK_PARTS", 2)
    table().save_to_disk(tmp_path / "t", num_shards=3)
    files = sorted((tmp_path / "t").glob("*.arrow"))
    (tmp_path / "t" / CHECKSUMS).write_text(json.dumps({path.name: checksums(path) for path in files}))
    return tmp_path / "t"


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_every_damage_is_found_in_every_table_that_reads_the_file(saved):
    whole = load_from_disk(saved)
    assert damaged_files(whole) == damaged_files(whole, quickly=True) == []
    path = sorted(saved.glob("*.arrow"))[1]
    content = path.read_bytes()
    for position in (0, 63, 64, len(content) // 2, len(content) - 1):
        flip(path, position)
        for made in (whole, whole.select([5, 2]), whole.shuffle(seed=0), concatenate_datasets([table(), whole])):
            assert damaged_files(made) == [path]
        with pytest.raises(ValueError, match=f"1 files .*{path}"):
            check_files(whole)
        path.write_bytes(content)
    # Rows of another file are whole.
    flip(path, 100)
    assert damaged_files(whole.select([0, 1])) == []
    path.unlink()
    assert damaged_files(whole, quickly=True) == [path]


def test_a_quick_check_reads_a_part_of_bounded_size_and_all_sizes(saved, monkeypatch):
    whole, read = load_from_disk(saved), []
    monkeypatch.setattr(provenance, "sha256", lambda *args: read.append(args) or sha256(*args))
    state = np.random.get_state()[1].tolist()
    for _ in range(3):
        read.clear()
        check_files(whole, quickly=True)
        assert len(read) == 2
    assert np.random.get_state()[1].tolist() == state
    path = sorted(saved.glob("*.arrow"))[2]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"damaged.*{path}"):
        check_files(whole, quickly=True)


def test_checksums_of_version_0_1_0_and_none_and_half_of_them(saved):
    whole, path = load_from_disk(saved), sorted(saved.glob("*.arrow"))[0]
    sums = {file.name: sha256(file) for file in saved.glob("*.arrow")}
    (saved / CHECKSUMS).write_text(json.dumps(sums))
    assert damaged_files(whole) == []
    flip(path, 70)
    assert damaged_files(whole) == [path]
    path.unlink()
    assert damaged_files(whole) == damaged_files(whole, quickly=True) == [path]
    (saved / CHECKSUMS).write_text(json.dumps(sums)[:20])
    assert damaged_files(whole) == [saved / CHECKSUMS]
    (saved / CHECKSUMS).unlink()
    assert damaged_files(whole) == damaged_files(table()) == []


@pytest.mark.parametrize(
    "damaged",
    [
        '{"format": "hf_ibdistill/1"}',
        '{"format": "hf_ibdistill/1", "teachers": [], "dataset": {}}',
        '{"format": "hf_ibdistill/1", "teachers": 3, "dataset": {}, "views": null}',
        '{"format": "hf_ibdistill/1", "teachers": [{"name": "conv"}], "dataset": {}, "views": null}',
        '{"format": "hf_ibdistill/1", "teachers": [], "dataset": {}, "views": {"sides": 3}}',
    ],
)
def test_a_record_without_all_parts_is_refused(damaged):
    dataset = table()
    dataset.info.description = damaged
    with pytest.raises(ValueError, match="description"):
        read_records(dataset)


def test_a_deep_description_is_text():
    dataset = table()
    dataset.info.description = '{"a":' * 5000
    assert read_records(dataset) == []
    ours = json.loads(json.dumps(record()))
    attach_record(dataset, ours)
    assert read_records(dataset) == [ours] and dataset.info.description.startswith('{"a":{"a":')


@pytest.mark.parametrize("content", ["[]", "null", "{", '{"a.arrow": {}}', '{"a.arrow": []}', "\xff"])
def test_damaged_checksums_are_damage(content, tmp_path):
    table().save_to_disk(tmp_path)
    (file,) = tmp_path.glob("*.arrow")
    content = content.replace("a.arrow", file.name)
    (tmp_path / CHECKSUMS).write_bytes(content.encode("latin-1"))
    assert damaged_files(load_from_disk(tmp_path))


def test_two_teachers_of_one_name_are_not_mixed():
    first, second = table(), table()
    attach_record(first, record(same_teacher()))
    attach_record(second, record(teacher(seed=1), dataset={"num_rows": 7}))
    with pytest.raises(ValueError, match='"conv" .*weights_sha256'):
        check_columns(concatenate_datasets([first, second]), ["conv"], NAMES)
    attach_record(second, record(same_teacher(), dataset={"num_rows": 7}))
    check_columns(concatenate_datasets([first, second]), ["conv"], NAMES)


def png(level):
    image = PIL.Image.new("RGB", (4, 4), (level, level, level))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=level % 2)
    return {"bytes": buffer.getvalue(), "path": None}, row_key(image)


def test_images_are_compared_by_file_and_then_by_pixels():
    cells, keys = zip(*map(png, range(40)))
    files = list(map(file_key, cells))

    def check(cells, rows=None, changed_keys=keys, changed_files=files, **given):
        columns = {"image": list(cells), "row_key": list(changed_keys), "file_key": list(changed_files)}
        integers = {"row_key": Value("int64"), "file_key": Value("int64")}
        check_images(Dataset.from_dict(columns, features=Features({"image": Image(), **integers})), rows, **given)

    others = [cells[0] if row in (6, 39) else cell for row, cell in enumerate(cells)]
    check(cells)
    check(cells, range(40))
    # Another decoder, or another file of the same pixels.
    check(cells, range(40), changed_keys=[0] * 40)
    check(cells, range(40), changed_files=[0] * 40)
    with pytest.raises(ValueError, match=r"2 rows \(first \[6, 39\]\)"):
        check(others, range(40))
    with pytest.raises(ValueError, match=r"1 rows \(first \[39\]\)"):
        check(others)
    # The keys of a shard, of which an early version wrote none of files.
    with pytest.raises(ValueError, match=r"1 rows \(first \[6\]\)"):
        check(others, [5, 6], keys={"row_key": keys[5:7], "file_key": [None, None]})
    check(others, [4, 5], keys={"row_key": keys[4:6], "file_key": [files[4], None]})
    # Whoever reads the row reports it.
    check([{"bytes": b"", "path": None}, *cells[1:]])


@pytest.mark.parametrize("dtype", ["string", "float64", "uint64"])
def test_keys_of_another_type_are_refused(dtype):
    dataset = table().add_column("row_key", np.arange(6))
    check_columns(dataset, ["conv"], NAMES)
    with pytest.raises(ValueError, match=f'"row_key" .*{dtype}'):
        check_columns(dataset.cast_column("row_key", Value(dtype)), ["conv"], NAMES)
