"""The folder of a recording: whatever interrupts it, finished shards are kept and the table becomes the same."""

import dataclasses
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL.ImageOps
import pyarrow as pa
import pytest
import tqdm.std
from accelerate.state import PartialState
from comparing import same_bytes
from datasets import Dataset, DatasetDict, Image, concatenate_datasets, load_from_disk
from interrupting import before_each_batch, file_times
from launching import give_own_lock, prepare_process, start_launcher

from hf_ibdistill import ViewRecipe, logits_metrics, record_teacher_logits
from hf_ibdistill.logits.provenance import read_records
from hf_ibdistill.recording import recorder


NUM_ROWS = 96
# Twelve shards of one batch each.
SETTINGS = {"views": ViewRecipe(num_views=2, horizontal_flip=0.5), "batch_size": 16, "shard_size": 8}
SHARDS = [f"data-{start:012d}.arrow" for start in range(0, NUM_ROWS, 8)]
# This row is not in the sample of images by which a recording identifies its dataset.
UNSAMPLED = 41


@pytest.fixture(scope="module")
def dataset(images):
    return images(NUM_ROWS)


@pytest.fixture(scope="module")
def finished(dataset, loaded, tmp_path_factory):
    """The folder of a recording that nothing interrupted."""
    folder = tmp_path_factory.mktemp("finished") / "t"
    record_teacher_logits(dataset, loaded, output_dir=folder, **SETTINGS)
    return folder


@pytest.fixture
def batches(loaded):
    """The sizes of the batches that the first teacher runs on."""
    sizes = []
    hook = before_each_batch(loaded, sizes.append)
    yield sizes
    hook.remove()


# A finished recording


def test_the_folder_holds_the_finished_table_alone(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {*SHARDS, "dataset_info.json", "state.json", "checksums.json"}


def test_calling_again_returns_the_finished_table_untouched(finished, dataset, loaded, batches):
    before = file_times(finished)
    again = record_teacher_logits(dataset, loaded, output_dir=finished, **SETTINGS)
    assert len(again) == NUM_ROWS and batches == []
    assert file_times(finished) == before


def test_columns_that_a_finished_table_lacks_are_named(finished, dataset, loaded, caplog):
    wider = dataset.add_column("kind", ["x"] * len(dataset))
    table = record_teacher_logits(wider, loaded, output_dir=finished, **SETTINGS)
    assert "kind" not in table.column_names and "has no columns ['kind']" in caplog.text


def test_a_finished_folder_is_not_mixed_with_something_else(finished, dataset, loaded, save_teacher, tmp_path):
    before = file_times(finished)
    other = {**loaded, "inv": save_teacher(tmp_path / "other", "involution-small", seed=7, size=12)}
    for given, teachers, message in (
        (dataset.select(range(30)), loaded, "differs: dataset: num_rows 96 instead of 30"),
        (dataset, other, 'teacher "inv": weights_sha256 .* instead of'),
        (DatasetDict({"train": dataset, "test": dataset}), loaded, "holds a recording of one table"),
    ):
        with pytest.raises(ValueError, match=message):
            record_teacher_logits(given, teachers, output_dir=finished, **SETTINGS)
    assert file_times(finished) == before


def test_a_folder_with_something_else_is_refused(dataset, loaded, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no recording"):
        record_teacher_logits(dataset, loaded, output_dir=tmp_path)
    dataset.save_to_disk(tmp_path / "table")
    with pytest.raises(ValueError, match="holds another table"):
        record_teacher_logits(dataset, loaded, output_dir=tmp_path / "table")
    assert (tmp_path / "notes.txt").read_text() == "mine" and len(load_from_disk(tmp_path / "table")) == NUM_ROWS


# An interrupted recording


def test_an_interrupted_recording_continues_with_the_same_settings_only(
    finished, dataset, images, loaded, batches, save_teacher, tmp_path
):
    folder, broken = tmp_path / "t", images(NUM_ROWS, broken=[UNSAMPLED])
    with pytest.raises(ValueError, match=f"Row {UNSAMPLED}: "):
        record_teacher_logits(broken, loaded, output_dir=folder, **SETTINGS)
    before = file_times(folder, "data-*")
    assert sorted(before) == sorted([*SHARDS[:5], *(f"{name}.json" for name in SHARDS[:5])])

    changed = {**loaded, "conv": save_teacher(tmp_path / "changed", seed=9)}
    for changes, message in (
        ({"batch_size": 4}, "batch_size 16 instead of 4"),
        ({"shard_size": 16}, "shard_size 8 instead of 16"),
        ({"views": None}, "views: .*num_views 2 instead of None"),
        ({"dtype": "float32"}, 'teacher "conv": encoding'),
        ({"teachers": changed}, 'teacher "conv": weights_sha256'),
    ):
        arguments = {"teachers": loaded, **SETTINGS, **changes}
        with pytest.raises(ValueError, match=f"holds an interrupted recording that differs: .*{message}"):
            record_teacher_logits(broken, output_dir=folder, **arguments)
    with pytest.raises(ValueError, match="holds a recording of one table"):
        record_teacher_logits(DatasetDict({"train": broken}), loaded, output_dir=folder, **SETTINGS)
    assert file_times(folder, "data-*") == before

    # A damaged shard is recorded again, with the seven that are missing.
    flip(folder / SHARDS[2])
    batches.clear()
    continued = record_teacher_logits(dataset, loaded, output_dir=folder, **SETTINGS)
    assert batches == [16] * 8
    assert same_bytes(continued, load_from_disk(finished))


@pytest.mark.parametrize("is_finished", [False, True])
def test_what_a_killed_process_left_is_removed(is_finished, finished, dataset, loaded, tmp_path):
    # Killed when it began the recording, or when the table was whole but the notes of its shards were not removed yet.
    folder = tmp_path / "t"
    if is_finished:
        shutil.copytree(finished, folder)
        (folder / f"{SHARDS[0]}.json").write_text("{}")
        (folder / "recording.json").write_text("{}")
    else:
        folder.mkdir()
    (folder / "recording.json.123.partial").write_text("{")
    table = record_teacher_logits(dataset, loaded, output_dir=folder, **SETTINGS)
    assert same_bytes(table, load_from_disk(finished))
    assert file_times(folder).keys() == file_times(finished).keys()


def flip(path, position=None):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if position is None else position] ^= 255
    path.write_bytes(content)


def test_a_shard_that_is_damaged_before_the_table_is_finished_is_recorded_again(
    finished, dataset, loaded, batches, tmp_path, monkeypatch
):
    folder, finish = tmp_path / "t", recorder.finish

    def damage_then_finish(folder, info, split, record, shards):
        flip(shards[3])
        shards[7].write_bytes(shards[7].read_bytes()[:-1])
        finish(folder, info, split, record, shards)

    monkeypatch.setattr(recorder, "finish", damage_then_finish)
    with pytest.raises(OSError, match="2 of 12 shards are damaged.*data-000000000024.arrow, .*Call again"):
        record_teacher_logits(dataset, loaded, output_dir=folder, **SETTINGS)
    assert not (folder / "state.json").exists()
    monkeypatch.undo()
    before = file_times(folder, "*.arrow")
    batches.clear()
    table = record_teacher_logits(dataset, loaded, output_dir=folder, **SETTINGS)
    # Not the ten whole ones.
    assert len(before) == 12 and batches.count(16) == 2
    assert same_bytes(table, load_from_disk(finished))


@pytest.mark.parametrize("name", ["state.json", "dataset_info.json", "data-000000000024.arrow"])
def test_a_finished_folder_that_is_not_whole_is_named(name, finished, dataset, loaded, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "t")
    for content in ((folder / name).read_bytes()[:30], None):
        (folder / name).unlink()
        if content is None and name == "state.json":
            continue  # It marks the table as finished.
        if content is not None:
            (folder / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{folder} cannot be opened as a saved table"):
            record_teacher_logits(dataset, loaded, output_dir=folder, **SETTINGS)


def test_a_damaged_table_takes_no_more_teachers_or_views(finished, dataset, loaded, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "t")
    flip(folder / "data-000000000024.arrow")
    table = load_from_disk(folder)
    for given, changes in (
        (table.remove_columns("inv_logits"), {"teachers": {"inv": loaded["inv"]}}),
        (table, {"teachers": loaded, "views": dataclasses.replace(SETTINGS["views"], num_views=3)}),
    ):
        with pytest.raises(ValueError, match="data-000000000024.arrow.*Restore"):
            record_teacher_logits(given, output_dir=tmp_path / "more", **{**SETTINGS, **changes})
    assert not (tmp_path / "more").exists()


def test_recording_keeps_the_description_of_the_images(dataset, loaded, tmp_path):
    described = dataset.select(range(16))
    described.info.description = "Pictures of {cats}."
    table = record_teacher_logits(described, {"conv": loaded["conv"]}, output_dir=tmp_path / "t")
    assert table.info.description.startswith("Pictures of {cats}.\n\n") and len(read_records(table)) == 1
    assert described.info.description == "Pictures of {cats}."


# Two recorders


def test_a_second_recorder_is_refused_and_a_killed_one_is_taken_over(
    finished, dataset, loaded, batches, tmp_path, caplog
):
    folder = tmp_path / "t"

    def record_and_stop():
        give_own_lock(tqdm.std.tqdm)
        sizes = []

        def stop_in_the_third_shard(size):
            sizes.append(size)
            if sizes.count(16) == 3:
                (tmp_path / "stopped").touch()
                time.sleep(600)

        before_each_batch(loaded, stop_in_the_third_shard)
        record_teacher_logits(dataset, loaded, output_dir=folder, **SETTINGS)

    process = multiprocessing.get_context("fork").Process(target=record_and_stop)
    process.start()
    try:
        while process.is_alive() and not (tmp_path / "stopped").exists():
            time.sleep(0.01)
        before = file_times(folder, "data-*")
        batches.clear()
        with pytest.raises(ValueError, match=f"{folder} is being recorded by process {process.pid} on .* since 20"):
            record_teacher_logits(dataset, loaded, output_dir=folder, **SETTINGS)
        assert 16 not in batches and file_times(folder, "data-*") == before
        # Another folder is free.
        record_teacher_logits(dataset.select(range(8)), loaded, output_dir=tmp_path / "other")
    finally:
        process.kill()
        process.join()
    batches.clear()
    table = record_teacher_logits(dataset, loaded, output_dir=folder, **SETTINGS)
    assert f"process {process.pid} on" in caplog.text and "stopped before it had finished" in caplog.text
    assert batches.count(16) == 10
    assert same_bytes(table, load_from_disk(finished))
    assert file_times(folder).keys() == file_times(finished).keys()


# Killed processes


def test_killed_at_any_instant_it_continues_to_the_same_table(finished, dataset, loaded, tmp_path):
    folder = tmp_path / "killed"

    def record_in_a_child():
        give_own_lock(tqdm.std.tqdm)
        record_teacher_logits(dataset, loaded, output_dir=folder, **SETTINGS)

    started = time.monotonic()
    record_teacher_logits(dataset, loaded, output_dir=tmp_path / "timed", **SETTINGS)
    duration = time.monotonic() - started
    random = np.random.default_rng(0)
    processes = multiprocessing.get_context("fork")
    kills = 0
    for _ in range(200):
        if kills == 20:
            break
        process = processes.Process(target=record_in_a_child)
        process.start()
        # Short times, so that something is left to do for many kills.
        process.join(timeout=random.uniform(0, duration / 4))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
        if process.exitcode == 0:
            shutil.rmtree(folder)
    assert kills == 20
    table = record_teacher_logits(dataset, loaded, output_dir=folder, **SETTINGS)
    assert same_bytes(table, load_from_disk(finished))
    assert file_times(folder).keys() == file_times(finished).keys()


def record_twice(dataset, teachers, folder):
    """Run by each of two processes: record a whole table, then one during which the second process stops forever."""
    prepare_process()
    sizes = []

    def stop_in_the_third_shard(size):
        sizes.append(size)
        if os.environ["RANK"] == "1" and len(sizes) == 6 + 3:
            (folder / "stopped").touch()
            time.sleep(600)

    before_each_batch(teachers, stop_in_the_third_shard)
    table = record_teacher_logits(dataset, teachers, output_dir=folder / "whole", **SETTINGS)
    state = PartialState()
    report = {"pid": os.getpid(), "rows": len(table), "batches": sizes}
    (folder / f"{state.process_index} of {state.num_processes}").write_text(json.dumps(report))
    record_teacher_logits(dataset, teachers, output_dir=folder / "killed", **SETTINGS)


def test_two_processes_record_the_table_of_one_and_a_killed_one_leaves_its_shards(
    finished, dataset, loaded, batches, tmp_path, monkeypatch
):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    launcher = start_launcher(record_twice, tmp_path, dataset, loaded, tmp_path)
    try:
        while launcher.is_alive() and not (tmp_path / "stopped").exists():
            time.sleep(0.01)
        reports = [json.loads((tmp_path / f"{index} of 2").read_text()) for index in range(2)]
        os.kill(reports[1]["pid"], signal.SIGKILL)
        launcher.join()
    finally:
        launcher.terminate()
    assert launcher.exitcode == 1

    whole = load_from_disk(finished)
    assert [report["rows"] for report in reports] == [NUM_ROWS] * 2
    # Each recorded half of the shards.
    assert [report["batches"] for report in reports] == [[16] * 6] * 2
    assert same_bytes(load_from_disk(tmp_path / "whole"), whole)

    kept = file_times(tmp_path / "killed", "*.arrow")
    assert 2 <= len(kept) <= 6 + 2
    batches.clear()
    continued = record_teacher_logits(dataset, loaded, output_dir=tmp_path / "killed", **SETTINGS)
    assert batches == [16] * (12 - len(kept))
    assert same_bytes(continued, whole)


# A full disk


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("mounting a small disk needs to be allowed")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_loses_nothing(small_disk, finished, dataset, loaded, batches):
    folder, kept = small_disk / "t", {}
    # The manifest and each shard take two pages: room for five of twelve shards, then for all but not for the table.
    for size in ("48k", "112k"):
        subprocess.run(["mount", "-o", f"remount,size={size}", str(small_disk)], check=True)
        with pytest.raises(OSError, match=f"{folder} is full"):
            record_teacher_logits(dataset, loaded, output_dir=folder, **SETTINGS)
        shards = file_times(folder, "*.arrow")
        assert kept.items() < shards.items() and not list(folder.rglob("*.partial"))
        kept = shards
    assert len(kept) == 12 and not (folder / "state.json").exists()
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    batches.clear()
    table = record_teacher_logits(dataset, loaded, output_dir=folder, **SETTINGS)
    assert batches == [] and same_bytes(table, load_from_disk(finished))


def invert(dataset, rows):
    """The dataset with other images in these rows."""

    def other(row, number):
        return {"image": PIL.ImageOps.invert(row["image"].convert("L"))} if number in rows else row

    return dataset.map(other, with_indices=True)


@pytest.fixture(scope="module")
def stopped(images, loaded, tmp_path_factory):
    """The folder of a recording that stopped after five of its shards."""
    folder = tmp_path_factory.mktemp("stopped") / "t"
    with pytest.raises(ValueError, match=f"Row {UNSAMPLED}: "):
        record_teacher_logits(images(NUM_ROWS, broken=[UNSAMPLED]), loaded, output_dir=folder, **SETTINGS)
    return folder


@pytest.fixture
def interrupted(stopped, tmp_path):
    return Path(shutil.copytree(stopped, tmp_path / "interrupted"))


def shards_of(folder):
    return sorted(folder.glob("*.arrow"))


def test_a_recording_that_an_earlier_version_began_is_continued(finished, dataset, interrupted, loaded, batches):
    # It wrote the logits to shards and added the images at the end.
    (interrupted / "shards").mkdir()
    for number, path in enumerate(shards_of(interrupted)):
        rows = range(8 * number, 8 * number + 8)
        logits = Dataset.from_file(str(path)).select_columns(["row_key", "file_key", "conv_logits", "inv_logits"])
        old = concatenate_datasets([Dataset.from_dict({"__row__": list(rows)}), logits], axis=1)
        old_path = interrupted / "shards" / f"{rows.start:012d}-{rows.stop:012d}.arrow"
        with pa.OSFile(str(old_path), "wb") as file, pa.ipc.new_stream(file, old.data.schema) as writer:
            writer.write_table(old.data.table)
        if number != 2:
            Path(f"{old_path}.sha256").write_text(hashlib.sha256(old_path.read_bytes()).hexdigest())
        path.unlink()
        Path(f"{path}.json").unlink()
    table = record_teacher_logits(dataset, loaded, output_dir=interrupted, **SETTINGS)
    # Those that are missing, and the one without a checksum.
    assert batches == [16] * 8
    assert same_bytes(table, load_from_disk(finished))
    assert file_times(interrupted).keys() == file_times(finished).keys()


def test_images_that_changed_meanwhile_get_no_old_logits(finished, dataset, interrupted, loaded):
    folder, shards = interrupted, shards_of(interrupted)
    # Neither is in the sample by which a recording identifies its dataset.
    unsampled = [row for row in range(40) if row not in np.linspace(0, NUM_ROWS - 1, 64).astype(int)][:2]
    with pytest.raises(ValueError, match=re.escape(f"2 rows (first {unsampled})")):
        record_teacher_logits(invert(dataset, unsampled), loaded, output_dir=folder, **SETTINGS)
    assert shards_of(folder) == shards
    assert same_bytes(record_teacher_logits(dataset, loaded, output_dir=folder, **SETTINGS), load_from_disk(finished))
    with pytest.raises(ValueError, match=re.escape(f"1 rows (first [{UNSAMPLED}])")):
        record_teacher_logits(invert(dataset, [UNSAMPLED]), loaded, output_dir=finished, **SETTINGS)


def test_a_finished_table_without_some_rows_is_compared_row_by_row(images, loaded, tmp_path):
    settings = {**SETTINGS, "skip_unreadable": True, "output_dir": tmp_path / "t"}
    broken = images(NUM_ROWS, broken=[3])
    table = record_teacher_logits(broken, loaded, **settings)
    assert same_bytes(record_teacher_logits(broken, loaded, **settings), table)
    with pytest.raises(ValueError, match=re.escape(f"1 rows (first [{UNSAMPLED}])")):
        changed = broken.cast_column("image", Image(decode=False)).to_list()
        changed[UNSAMPLED]["image"] = changed[0]["image"]
        record_teacher_logits(Dataset.from_list(changed, features=broken.features), loaded, **settings)


def test_a_recorded_table_with_another_image_takes_no_more_teachers(dataset, loaded, tmp_path):
    one = {"conv": loaded["conv"]}
    table = invert(record_teacher_logits(dataset, one, output_dir=tmp_path / "t"), [UNSAMPLED])
    with pytest.raises(ValueError, match=re.escape(f"1 rows (first [{UNSAMPLED}])")):
        record_teacher_logits(table, {"inv": loaded["inv"]}, output_dir=tmp_path / "more")


def test_rows_without_logits_take_no_more(dataset, loaded, tmp_path):
    table = record_teacher_logits(dataset.select(range(20)), loaded, output_dir=tmp_path / "t", **SETTINGS)
    joined = concatenate_datasets([dataset.select(range(20, 22)), table])
    views = ViewRecipe(num_views=3, horizontal_flip=0.5)
    with pytest.raises(ValueError, match=r'_logits" .*2 rows \(first \[0, 1\]\)'):
        record_teacher_logits(joined, loaded, output_dir=tmp_path / "more", views=views)
    with pytest.raises(ValueError, match=r"Row [01]: .*_logits"):
        logits_metrics(joined)
    keyless = table.map(lambda row, number: {"row_key": row["row_key"] if number else None}, with_indices=True)
    with pytest.raises(ValueError, match=r'"row_key" .*1 rows \(first \[0\]\)'):
        record_teacher_logits(keyless, loaded, output_dir=tmp_path / "more", views=views)


@pytest.mark.parametrize("damage", ["other rows", "checksum", "holder"])
def test_damage_of_an_interrupted_recording_is_recorded_again(damage, finished, dataset, interrupted, loaded):
    folder, (first, second, *_) = interrupted, shards_of(interrupted)
    if damage == "other rows":
        for suffix in ("", ".json"):
            shutil.copy(f"{second}{suffix}", f"{first}{suffix}")
    elif damage == "checksum":
        Path(f"{first}.json").write_bytes(b"\xff")
    else:
        (folder / "recording.holder").write_bytes(b"\xff")
    table = record_teacher_logits(dataset, loaded, output_dir=folder, **SETTINGS)
    assert same_bytes(table, load_from_disk(finished))


def test_damage_that_cannot_be_recorded_again_is_named(dataset, interrupted, loaded):
    folder, (shard, *_) = interrupted, shards_of(interrupted)
    manifest = folder / "recording.json"
    whole = manifest.read_text()
    for content in ("", whole[:99], "{}", "[]", "null", '{"record": {}}', "[" * 10_000):
        manifest.write_text(content)
        with pytest.raises(ValueError, match=re.escape(str(manifest))):
            record_teacher_logits(dataset, loaded, output_dir=folder, **SETTINGS)
    manifest.write_text(whole)
    for path in (folder / "recording.lock", shard):
        path.unlink()
        path.mkdir()
        with pytest.raises(ValueError, match=re.escape(f"{path} is a folder")):
            record_teacher_logits(dataset, loaded, output_dir=folder, **SETTINGS)
        path.rmdir()


MEMORY_OF_A_SHARD = """
import re
import sys
from pathlib import Path
import pyarrow as pa
import torch
from datasets import Features
from hf_ibdistill.logits.encoding import LogitsEncoding
from hf_ibdistill.recording.shards import write_shard

def megabytes():
    return int(re.search("RssAnon:(.*)kB", Path("/proc/self/status").read_text())[1]) / 1024

encoding, peak = LogitsEncoding(top_k=10), 0

def tables():
    global peak
    for number in range(150):
        table = pa.table({"conv_logits": encoding.encode(torch.randn(32, 10, 1000), views=True)})
        peak = max(peak, megabytes())
        yield table

features = Features({"conv_logits": encoding.feature(1000, 10)})
path = Path(sys.argv[1], "data-000000000000.arrow")
write_shard(path, features, [next(tables())], {})
before = peak
write_shard(path, features, tables(), {})
print(peak - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Reads the memory of a process as Linux shows it.")
def test_a_shard_holds_the_encoded_logits_alone(tmp_path):
    # 4,800 rows of 410 bytes, not of 40 kB, in a process that has done nothing else.
    run = subprocess.run(
        [sys.executable, "-c", MEMORY_OF_A_SHARD, tmp_path], capture_output=True, text=True, check=True
    )
    assert float(run.stdout) < 40
