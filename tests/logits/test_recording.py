import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
import tqdm.std
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import DatasetDict, Image, List, Value, load_dataset, load_from_disk
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
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
from hf_ibdistill.images import decode_image
from hf_ibdistill.logits.encoding import decode
from hf_ibdistill.logits.provenance import read_records, stored_views
from hf_ibdistill.logits.views import make_view, row_key


NAMES = ["cat", "dog", "eel"]


def logits_by_hand(folder, dataset):
    """One image at a time, through the folder's own image processor."""
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    rows = []
    for row in dataset.cast_column("image", Image(decode=False)):
        inputs = processor(decode_image(row["image"]), return_tensors="pt")
        with torch.no_grad():
            rows.append(model(**inputs).logits[0].numpy())
    return np.stack(rows)


def columns(table, names=("conv_logits", "inv_logits")):
    return {name: np.asarray(table.with_format("numpy")[name]) for name in names}


@pytest.fixture(scope="module")
def recorded(teachers, tmp_path_factory, images):
    folder = tmp_path_factory.mktemp("recorded") / "table"
    record_teacher_logits(images(), teachers, output_dir=folder, batch_size=8, shard_size=16)
    return folder


def test_the_columns_are_what_each_teacher_says_alone(recorded, teachers, images):
    table = load_from_disk(recorded)
    for name, values in columns(table).items():
        expected = logits_by_hand(teachers[name.removesuffix("_logits")], images())
        assert table.features[name] == List(Value("float16"), length=3)
        # Batches may round differently from single images before the cast to float16.
        np.testing.assert_allclose(values, expected, rtol=2e-3, atol=2e-3)


def test_the_input_columns_are_kept(recorded, images):
    table, original = load_from_disk(recorded), images()
    assert table.column_names == ["image", "label", "note", "row_key", "conv_logits", "inv_logits"]
    assert table.features["label"].names == NAMES
    assert table["note"][:] == original["note"][:]
    assert all(np.array_equal(a, b) for a, b in zip(table["image"], original["image"]))


def test_the_folder_holds_the_finished_table_alone(recorded):
    names = {path.name for path in recorded.iterdir()}
    assert {"state.json", "dataset_info.json"} <= names
    assert not any("shard" in name or "partial" in name or name == "recording.json" for name in names)


def test_provenance_tells_who_made_the_columns(recorded, teachers):
    (record,) = read_records(load_from_disk(recorded))
    assert [teacher["name"] for teacher in record["teachers"]] == ["conv", "inv"]
    assert record["teachers"][0]["source"] == teachers["conv"]
    assert record["teachers"][1]["image_processor"]["size"] == {"height": 12, "width": 12}
    assert record["teachers"][1]["label_names"] == NAMES
    assert record["dataset"]["num_rows"] == 50


def test_logits_stay_with_their_rows(recorded, teachers):
    table = load_from_disk(recorded)
    whole = dict(zip(table["note"], columns(table)["conv_logits"].tolist()))
    mixed = table.shuffle(seed=1).select(range(5, 45)).filter(lambda row: row["label"] != 1)
    for note, row in zip(mixed["note"], columns(mixed)["conv_logits"].tolist()):
        assert row == whole[note]


def test_recording_a_shuffled_selection_equals_selecting_the_recorded(recorded, teachers, tmp_path, images):
    order = np.random.default_rng(0).permutation(50)[:21]
    table = record_teacher_logits(images().select(order), teachers, output_dir=tmp_path / "t", dtype="float32")
    whole = load_from_disk(recorded).select(order)
    for name, values in columns(table).items():
        np.testing.assert_allclose(values, columns(whole)[name], rtol=2e-3, atol=2e-3)


def test_float32(teachers, tmp_path, images):
    table = record_teacher_logits(images(9), teachers, output_dir=tmp_path / "t", dtype="float32")
    assert table.features["conv_logits"] == List(Value("float32"), length=3)
    values = columns(table)["conv_logits"]
    np.testing.assert_allclose(values, logits_by_hand(teachers["conv"], images(9)), rtol=1e-5, atol=1e-5)


def test_bf16_rounds_and_is_part_of_the_provenance(teachers, tmp_path, images):
    exact = record_teacher_logits(images(30), teachers, output_dir=tmp_path / "exact", dtype="float32")
    rounded = record_teacher_logits(images(30), teachers, output_dir=tmp_path / "t", dtype="float32", bf16=True)
    for name, values in columns(rounded).items():
        whole = columns(exact)[name]
        assert not np.array_equal(values, whole)
        assert np.abs(values - whole).max() < 0.05 * np.abs(whole).max()
    assert [teacher["bf16"] for teacher in read_records(rounded)[0]["teachers"]] == [True, True]
    assert verify_teacher_logits(rounded, teachers).problems == []
    with pytest.raises(ValueError, match='teacher "conv": bf16 True instead of False'):
        record_teacher_logits(images(30), teachers, output_dir=tmp_path / "t", dtype="float32")


def test_what_the_caller_computes_in_does_not_change_what_is_recorded(teachers, tmp_path, images):
    # Accelerate's mixed precision is one setting of the whole process, and a trainer before may have made it.
    expected = columns(record_teacher_logits(images(9), teachers, output_dir=tmp_path / "a", dtype="float32"))
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        Accelerator(mixed_precision="bf16", cpu=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = columns(record_teacher_logits(images(9), teachers, output_dir=tmp_path / "b", dtype="float32"))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])


def test_a_teacher_that_was_just_trained_in_bf16_is_recorded_in_float32(teachers, tmp_path, images):
    model = IBResNetForImageClassification.from_pretrained(teachers["conv"])
    processor = ViTImageProcessor.from_pretrained(teachers["conv"])
    settings = {"max_steps": 2, "eval_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    arguments = ImageTrainingArguments(str(tmp_path / "run"), bf16=True, **settings)
    trainer = ImageClassificationTrainer(model, arguments, train_dataset=images(16), processing_class=processor)
    trainer.train()
    table = record_teacher_logits(
        images(9), {"conv": (trainer.model, processor)}, output_dir=tmp_path / "a", dtype="float32"
    )
    model.save_pretrained(tmp_path / "conv")
    processor.save_pretrained(tmp_path / "conv")
    expected = record_teacher_logits(
        images(9), {"conv": tmp_path / "conv"}, output_dir=tmp_path / "b", dtype="float32"
    )
    np.testing.assert_array_equal(
        table.with_format("numpy")["conv_logits"][:], expected.with_format("numpy")["conv_logits"][:]
    )


class SmallMemory(IBResNetForImageClassification):
    """Has room for three images."""

    def forward(self, pixel_values, **kwargs):
        if len(pixel_values) > 3:
            raise torch.OutOfMemoryError("no room")
        return super().forward(pixel_values, **kwargs)


def test_a_batch_that_does_not_fit_into_memory_is_halved(teachers, tmp_path, images):
    processor = ViTImageProcessor.from_pretrained(teachers["conv"])
    model = SmallMemory.from_pretrained(teachers["conv"])
    table = record_teacher_logits(images(20), {"conv": (model, processor)}, output_dir=tmp_path / "t", dtype="float32")
    np.testing.assert_allclose(
        columns(table, ["conv_logits"])["conv_logits"],
        logits_by_hand(teachers["conv"], images(20)),
        rtol=1e-5,
        atol=1e-5,
    )


def test_every_split_is_recorded(teachers, tmp_path, images):
    splits = DatasetDict({"train": images(20), "test": images(7)})
    tables = record_teacher_logits(splits, teachers, output_dir=tmp_path / "t")
    loaded = load_from_disk(tmp_path / "t")
    assert {name: len(split) for name, split in loaded.items()} == {"train": 20, "test": 7}
    assert columns(loaded["test"])["inv_logits"].tolist() == columns(tables["test"])["inv_logits"].tolist()


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


def test_a_teacher_of_another_library_family(tmp_path, images):
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", id2label=dict(enumerate(NAMES))
    )
    ResNetForImageClassification(config).save_pretrained(tmp_path / "resnet")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "resnet")
    table = record_teacher_logits(images(10), {"resnet": tmp_path / "resnet"}, output_dir=tmp_path / "t")
    np.testing.assert_allclose(
        columns(table, ["resnet_logits"])["resnet_logits"],
        logits_by_hand(tmp_path / "resnet", images(10)),
        rtol=2e-3,
        atol=2e-3,
    )


def test_calling_again_returns_the_finished_table_untouched(recorded, teachers, images):
    before = {path.name: path.stat().st_mtime_ns for path in recorded.iterdir()}
    again = record_teacher_logits(images(), teachers, output_dir=recorded, batch_size=8, shard_size=16)
    assert len(again) == 50
    assert {path.name: path.stat().st_mtime_ns for path in recorded.iterdir()} == before


def test_another_data_set_or_teacher_is_refused_in_a_finished_folder(
    recorded, teachers, tmp_path, images, save_teacher
):
    with pytest.raises(
        ValueError, match="holds a finished recording that differs: dataset: num_rows 50 instead of 30"
    ):
        record_teacher_logits(images(30), teachers, output_dir=recorded)
    changed = {**teachers, "inv": save_teacher(tmp_path / "other", "involution-small", seed=7, size=12)}
    with pytest.raises(ValueError, match='teacher "inv": weights_sha256 .* instead of'):
        record_teacher_logits(images(), changed, output_dir=recorded)


def test_a_folder_with_something_else_is_refused(teachers, tmp_path, images):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something else than a recording; choose an empty folder"):
        record_teacher_logits(images(5), teachers, output_dir=tmp_path)
    images(5).save_to_disk(tmp_path / "table")
    with pytest.raises(ValueError, match="holds another table; choose an empty folder"):
        record_teacher_logits(images(5), teachers, output_dir=tmp_path / "table")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_wrong_input_is_refused_before_anything_is_written(teachers, tmp_path, images, save_teacher):
    target = tmp_path / "t"
    with pytest.raises(ValueError, match="The data set is empty"):
        record_teacher_logits(images(5).select([]), teachers, output_dir=target)
    with pytest.raises(ValueError, match=r"has logits columns \(conv_logits\) and 0 provenance records"):
        record_teacher_logits(images(5).rename_column("note", "conv_logits"), teachers, output_dir=target)
    with pytest.raises(ValueError, match="There is no image column; the columns are label, note"):
        record_teacher_logits(images(5).remove_columns("image"), teachers, output_dir=target)
    with pytest.raises(ValueError, match="There is no label column; the columns are image, note"):
        record_teacher_logits(images(5).remove_columns("label"), teachers, output_dir=target)
    with pytest.raises(ValueError, match="float16 or float32"):
        record_teacher_logits(images(5), teachers, output_dir=target, dtype="int8")
    other = save_teacher(tmp_path / "other", names=["dog", "cat", "fox"])
    with pytest.raises(
        ValueError, match=r'the teacher "other" differ: \[\'eel\'\] only in the first, \[\'fox\'\] only'
    ):
        record_teacher_logits(images(5), {"other": other}, output_dir=target)
    two = save_teacher(tmp_path / "two", names=["dog", "cat"])
    with pytest.raises(ValueError, match='the teacher "two" has 2 classes; the data set has 3'):
        record_teacher_logits(images(5), {"two": two}, output_dir=target)
    assert not target.exists()


def test_a_teacher_with_the_classes_in_another_order_is_put_right_and_said_so(tmp_path, images, save_teacher, caplog):
    order, names = [2, 0, 1], ["eel", "cat", "dog"]
    straight = save_teacher(tmp_path / "straight")
    model = AutoModelForImageClassification.from_pretrained(straight)
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: i for i, name in enumerate(names)}
    for parameter in model.classifier.parameters():
        parameter.data = parameter.data[order]
    turned = (model, AutoImageProcessor.from_pretrained(straight))
    table = record_teacher_logits(images(20), {"straight": straight, "turned": turned}, output_dir=tmp_path / "t")
    assert 'The teacher "turned" has the data set\'s classes in another order' in caplog.text
    assert '"straight"' not in caplog.text
    assert table["turned_logits"][:] == table["straight_logits"][:]
    recorded = {teacher["name"]: teacher["label_names"] for teacher in read_records(table)[0]["teachers"]}
    assert recorded["turned"] == recorded["straight"] == table.features["label"].names
    assert verify_teacher_logits(table, {"turned": turned}).problems == []


def test_an_unreadable_image_names_its_row_and_keeps_what_is_recorded(teachers, tmp_path, images):
    with pytest.raises(ValueError, match="Row 41: The image cannot be decoded"):
        record_teacher_logits(images(broken=[41]), teachers, output_dir=tmp_path, batch_size=8, shard_size=16)
    assert sorted(path.name for path in (tmp_path / "shards").glob("*.arrow")) == [
        "000000000000-000000000016.arrow",
        "000000000016-000000000032.arrow",
    ]


# A whole batch, and a whole shard, may be unreadable too.
@pytest.mark.parametrize("broken", [[41], [0, 3, 49], list(range(8, 16)), list(range(16, 32))])
def test_unreadable_images_can_be_left_out(broken, teachers, recorded, tmp_path, caplog, images):
    table = record_teacher_logits(
        images(broken=broken), teachers, output_dir=tmp_path, batch_size=8, shard_size=16, skip_unreadable=True
    )
    kept = [row for row in range(50) if row not in broken]
    assert table["note"][:] == [f"row {row}" for row in kept]
    assert f"{len(broken)} rows were left out, their images cannot be decoded: {broken}" in caplog.text
    whole = columns(load_from_disk(recorded))
    for name, values in columns(table).items():
        np.testing.assert_allclose(values, whole[name][kept], rtol=2e-3, atol=2e-3)


def test_a_logit_that_is_not_finite_names_teacher_and_row(teachers, tmp_path, images):
    model = IBResNetForImageClassification.from_pretrained(teachers["conv"]).eval()
    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    forward, calls = model.forward, []

    def fail_in_the_second_batch(**inputs):
        outputs = forward(**inputs)
        calls.append(len(outputs.logits))
        if len(calls) == 2:
            outputs.logits[3] = float("nan")
        return outputs

    model.forward = fail_in_the_second_batch
    with pytest.raises(ValueError, match=r'"conv" gave NaN or infinite logits for row 11 .*: check the teacher'):
        record_teacher_logits(images(), {"conv": (model, processor)}, output_dir=tmp_path, batch_size=8, shard_size=8)
    assert [path.name for path in (tmp_path / "shards").glob("*.arrow")] == ["000000000000-000000000008.arrow"]


def run_script(arguments, **kwargs):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    return subprocess.Popen(
        arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs
    )


SCRIPT = """
import sys, torch
from accelerate import PartialState
from datasets import load_from_disk
from hf_ibdistill import record_teacher_logits
torch.set_num_threads(1)
data, output, *teachers = sys.argv[1:]
table = record_teacher_logits(
    load_from_disk(data), dict(pair.split("=") for pair in teachers), output_dir=output, batch_size=8, shard_size=8
)
state = PartialState()
print(f'process {state.process_index} of {state.num_processes}: {len(table)}')
"""


@pytest.fixture
def script(tmp_path, teachers, images):
    (tmp_path / "record.py").write_text(SCRIPT)
    images(200).save_to_disk(tmp_path / "images")
    pairs = [f"{name}={folder}" for name, folder in teachers.items()]
    return lambda output: [str(tmp_path / "record.py"), str(tmp_path / "images"), str(tmp_path / output), *pairs]


def test_two_processes_record_the_same_table_as_one(script, tmp_path):
    one = run_script([sys.executable, *script("one")])
    assert one.communicate()[1] is not None and one.returncode == 0
    # `accelerate launch --cpu --num_processes 2` starts one process only, so the launcher beneath it.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    two = run_script([*launch, *script("two")])
    printed, errors = two.communicate()
    assert two.returncode == 0, errors[-2000:]
    assert "process 0 of 2: 200" in printed and "process 1 of 2: 200" in printed
    first, second = columns(load_from_disk(tmp_path / "one")), columns(load_from_disk(tmp_path / "two"))
    assert all(first[name].tobytes() == second[name].tobytes() for name in first)


def bytes_of(table):
    return {name: table.with_format("arrow")[:][name].combine_chunks() for name in table.column_names}


def same_bytes(first, second):
    first, second = bytes_of(first), bytes_of(second)
    return first.keys() == second.keys() and all(first[name].equals(second[name]) for name in first)


def test_an_interrupted_recording_is_not_continued_with_something_else(teachers, tmp_path, images, save_teacher):
    with pytest.raises(ValueError, match="Row 41"):
        record_teacher_logits(images(broken=[41]), teachers, output_dir=tmp_path, batch_size=8, shard_size=16)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.arrow")}
    for changes, message in (
        ({"batch_size": 4}, "batch_size 8 instead of 4"),
        ({"shard_size": 8}, "shard_size 16 instead of 8"),
        ({"views": ViewRecipe(num_views=2)}, "views: num_views None instead of 2"),
        ({"dtype": "float32"}, 'teacher "conv": encoding'),
    ):
        arguments = {"batch_size": 8, "shard_size": 16, **changes}
        with pytest.raises(ValueError, match=f"holds an interrupted recording that differs: .*{message}"):
            record_teacher_logits(images(broken=[41]), teachers, output_dir=tmp_path, **arguments)
    changed = {**teachers, "conv": save_teacher(tmp_path.parent / "changed", seed=9)}
    with pytest.raises(ValueError, match='teacher "conv": weights_sha256'):
        record_teacher_logits(images(broken=[41]), changed, output_dir=tmp_path, batch_size=8, shard_size=16)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.arrow")} == before


def test_a_damaged_shard_is_recorded_again(teachers, tmp_path, images):
    # Row 171 is not in the sample of images by which a recording knows its data set.
    arguments = {"teachers": teachers, "output_dir": tmp_path / "t", "shard_size": 64}
    with pytest.raises(ValueError, match="Row 171"):
        record_teacher_logits(images(200, broken=[171]), **arguments)
    damaged = tmp_path / "t" / "shards" / "000000000000-000000000064.arrow"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 255
    damaged.write_bytes(content)
    continued = record_teacher_logits(images(200), **arguments)
    assert same_bytes(continued, record_teacher_logits(images(200), teachers, output_dir=tmp_path / "whole"))


@pytest.mark.parametrize("finished", [False, True])
def test_what_a_killed_process_left_is_removed(finished, teachers, tmp_path, images):
    # Killed while it began the recording, or after the table was whole but before it was cleaned up.
    folder = tmp_path / "t"
    if finished:
        record_teacher_logits(images(9), teachers, output_dir=folder)
        (folder / "shards").mkdir()
        (folder / "shards" / "000000000000-000000000009.arrow").write_bytes(b"")
        (folder / "recording.json").write_text("{}")
    else:
        folder.mkdir()
    (folder / "recording.json.123.partial").write_text("{")
    table = record_teacher_logits(images(9), teachers, output_dir=folder)
    names = {path.name for path in folder.iterdir()}
    assert names == {"data-00000-of-00001.arrow", "dataset_info.json", "state.json", "checksums.json"}
    assert len(table) == 9


def give_own_lock(progress_bars):
    """Progress bars share a lock among processes, and a killed one never gives it back."""
    progress_bars.set_lock(threading.RLock())
    for kind in progress_bars.__subclasses__():
        give_own_lock(kind)


def test_killed_at_any_instant_it_continues_to_the_same_table(teachers, tmp_path, images):
    dataset = images(300)
    recipe = ViewRecipe(num_views=2, horizontal_flip=0.5)

    def record(folder):
        return record_teacher_logits(dataset, teachers, output_dir=folder, views=recipe, batch_size=16, shard_size=16)

    def record_in_a_child():
        give_own_lock(tqdm.std.tqdm)
        record(tmp_path / "killed")

    started = time.monotonic()
    whole = record(tmp_path / "whole")
    duration = time.monotonic() - started
    random = np.random.default_rng(0)
    processes = multiprocessing.get_context("fork")
    kills = 0
    for _ in range(200):
        if kills == 20:
            break
        process = processes.Process(target=record_in_a_child)
        process.start()
        # Short times, so that there is something left to do for twenty of them.
        process.join(timeout=random.uniform(0, duration / 8))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
        if process.exitcode == 0:
            shutil.rmtree(tmp_path / "killed")
    assert kills == 20
    assert same_bytes(record(tmp_path / "killed"), whole)
    assert not list(tmp_path.rglob("*.partial")) and not (tmp_path / "killed" / "shards").exists()


def test_a_killed_process_of_two_leaves_its_shards_to_the_next_start(script, tmp_path, teachers):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    started = run_script([sys.executable, *launcher, *script("killed")])
    shards = tmp_path / "killed" / "shards"
    deadline = time.monotonic() + 120
    while len(list(shards.glob("*.sha256"))) < 3 and time.monotonic() < deadline and started.poll() is None:
        time.sleep(0.005)
    workers = subprocess.run(["pgrep", "-P", str(started.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    started.communicate()
    assert started.returncode != 0
    finished = {path.name: path.stat().st_mtime_ns for path in shards.glob("*.arrow")}
    assert 3 <= len(finished) < 25
    dataset = load_from_disk(tmp_path / "images")
    continued = record_teacher_logits(dataset, teachers, output_dir=tmp_path / "killed", batch_size=8, shard_size=8)
    whole = record_teacher_logits(dataset, teachers, output_dir=tmp_path / "whole", batch_size=8, shard_size=8)
    assert same_bytes(continued, whole)


def views_by_hand(folder, dataset, recipe):
    """(rows, views, classes), one view at a time."""
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    rows = []
    for row in dataset.cast_column("image", Image(decode=False)):
        image = decode_image(row["image"])
        views = [make_view(image, recipe, row_key(image), view) for view in range(recipe.num_views)]
        with torch.no_grad():
            rows.append([model(**processor(view, return_tensors="pt")).logits[0].numpy() for view in views])
    return np.array(rows)


def test_views_are_what_the_teachers_say_of_each_view(teachers, tmp_path, images):
    recipe = ViewRecipe(num_views=3, horizontal_flip=0.5, erasing=0.5)
    table = record_teacher_logits(images(10), teachers, output_dir=tmp_path / "t", views=recipe, batch_size=7)
    assert stored_views(table) == recipe
    for name, values in columns(table).items():
        expected = views_by_hand(teachers[name.removesuffix("_logits")], images(10), recipe)
        np.testing.assert_allclose(values, expected, rtol=2e-3, atol=2e-3)
    assert table["row_key"][:] == [row_key(image.convert("RGB")) for image in images(10)["image"]]


def test_workers_and_batch_size_do_not_change_the_views(teachers, tmp_path, images):
    recipe = ViewRecipe(num_views=3, horizontal_flip=0.5)
    tables = [
        record_teacher_logits(
            images(20), teachers, output_dir=tmp_path / str(i), views=recipe, dtype="float32", **settings
        )
        for i, settings in enumerate([{}, {"num_workers": 2}, {"batch_size": 1}])
    ]
    assert same_bytes(tables[0], tables[1])
    for name, values in columns(tables[2]).items():
        np.testing.assert_allclose(values, columns(tables[0])[name], rtol=1e-4, atol=1e-4)


def test_top_k_columns_hold_the_largest_of_the_dense_ones(teachers, tmp_path, images):
    recipe = ViewRecipe(num_views=2)
    dense = record_teacher_logits(images(9), teachers, output_dir=tmp_path / "d", views=recipe, dtype="float32")
    top_k = record_teacher_logits(
        images(9), teachers, output_dir=tmp_path / "k", views=recipe, dtype="float32", top_k=2
    )
    for name in ("conv_logits", "inv_logits"):
        for view in range(2):
            whole, read = (decode(t.with_format("arrow")[:][name], 3, view) for t in (dense, top_k))
            # With two of three classes stored, the third is the rest: nothing is lost.
            difference = whole - whole.max(-1, keepdims=True) - read
            np.testing.assert_allclose(difference, 0, atol=1e-4)
    with pytest.raises(ValueError, match=r"top_k must be smaller than the number of classes \(3\); got 3"):
        record_teacher_logits(images(9), teachers, output_dir=tmp_path / "x", top_k=3)
    assert not (tmp_path / "x").exists()


def test_only_the_training_split_gets_views(teachers, tmp_path, images):
    splits = DatasetDict({"train": images(6), "test": images(4)})
    tables = record_teacher_logits(splits, teachers, output_dir=tmp_path / "t", views=ViewRecipe(num_views=2))
    assert stored_views(tables["train"]).num_views == 2
    assert stored_views(tables["test"]) is None


@pytest.mark.parametrize("views", [None, ViewRecipe(num_views=2)])
def test_adding_a_teacher_records_it_alone(views, teachers, tmp_path, images):
    conv, inv = ({name: folder} for name, folder in teachers.items())
    first = record_teacher_logits(images(20), conv, output_dir=tmp_path / "first", views=views)
    # Without its own folder the first teacher cannot have run again.
    moved = first.map(lambda row: row, load_from_cache_file=False)
    both = record_teacher_logits(moved, inv, output_dir=tmp_path / "both", views=views)
    assert [teacher["name"] for teacher in read_records(both)[0]["teachers"]] == ["conv", "inv"]
    whole = record_teacher_logits(images(20), teachers, output_dir=tmp_path / "whole", views=views)
    assert same_bytes(both, whole)


@pytest.mark.parametrize("top_k", [None, 2])
def test_more_views_are_added_to_the_recorded_ones(top_k, teachers, tmp_path, images):
    two, five = ViewRecipe(num_views=2), ViewRecipe(num_views=5)
    record = {"top_k": top_k, "batch_size": 1}
    first = record_teacher_logits(images(8), teachers, output_dir=tmp_path / "2", views=two, **record)
    more = record_teacher_logits(first, teachers, output_dir=tmp_path / "5", views=five, **record)
    assert stored_views(more) == five
    for name in ("conv_logits", "inv_logits"):
        old, new = (t.with_format("arrow")[:][name].combine_chunks() for t in (first, more))
        for view in range(2):
            assert np.array_equal(decode(old, 3, view), decode(new, 3, view))
    whole = record_teacher_logits(images(8), teachers, output_dir=tmp_path / "whole", views=five, **record)
    for view in range(5):
        for name in ("conv_logits", "inv_logits"):
            values = [decode(t.with_format("arrow")[:][name], 3, view) for t in (more, whole)]
            np.testing.assert_allclose(*values, rtol=2e-3, atol=2e-3)


def test_what_cannot_be_added_is_refused(teachers, tmp_path, images, save_teacher):
    recipe = ViewRecipe(num_views=2)
    table = record_teacher_logits(images(8), teachers, output_dir=tmp_path / "t", views=recipe)
    inv = {"inv": teachers["inv"]}
    for arguments, message in (
        (
            {"teachers": inv, "views": recipe},
            'already has the column "inv_logits" with 2 views; leave this teacher out',
        ),
        ({"teachers": inv, "views": ViewRecipe(num_views=3)}, r"\['conv'\] have 2 views in this table"),
        ({"teachers": teachers, "views": ViewRecipe(num_views=3, seed=1)}, "holds logits of other views"),
        ({"teachers": inv, "views": None}, "holds logits of other views"),
    ):
        with pytest.raises(ValueError, match=message):
            record_teacher_logits(table, output_dir=tmp_path / "x", **arguments)
    other = {"inv": save_teacher(tmp_path / "other", "involution-small", seed=7, size=12)}
    with pytest.raises(
        ValueError, match=r'already has a column "inv_logits" by another teacher \(weights_sha256 differ'
    ):
        record_teacher_logits(table, other, output_dir=tmp_path / "x", views=ViewRecipe(num_views=3))
    assert not (tmp_path / "x").exists()


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("mounting a small disk needs to be allowed")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_loses_nothing(small_disk, teachers, tmp_path, images):
    target, filler = small_disk / "t", small_disk / "filler"
    filler.write_bytes(bytes(140_000))
    arguments = {"views": ViewRecipe(num_views=40), "batch_size": 80, "shard_size": 8}
    with pytest.raises(OSError, match="is full. What is recorded is kept: free space and call again"):
        record_teacher_logits(images(150), teachers, output_dir=target, **arguments)
    kept = {path.name: path.stat().st_mtime_ns for path in (target / "shards").glob("*.arrow")}
    assert kept and not list(target.rglob("*.partial"))
    filler.unlink()
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    continued = record_teacher_logits(images(150), teachers, output_dir=target, **arguments)
    whole = record_teacher_logits(images(150), teachers, output_dir=tmp_path / "whole", **arguments)
    assert same_bytes(continued, whole)
