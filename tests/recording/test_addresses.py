"""Recording to an address of fsspec: the table is that of a folder, and another machine continues it."""

import functools
import multiprocessing
import os
import re
import signal
import time
from pathlib import Path

import datasets
import pytest
from comparing import same_bytes
from datasets import DatasetDict, load_from_disk
from hub_server import READ_TOKEN, WRITE_TOKEN
from huggingface_hub import HfFileSystem, constants
from interrupting import before_each_batch
from launching import prepare_process, start_launcher

from hf_ibdistill import ViewRecipe, load_image_dataset, record_teacher_logits
from hf_ibdistill import mirror as mirror_module
from hf_ibdistill.commands.display import beside
from hf_ibdistill.mirror import Mirror
from hf_ibdistill.publishing.tables import open_tables


NUM_ROWS = 48
# Six shards of one batch each.
SETTINGS = {"views": ViewRecipe(num_views=2, horizontal_flip=0.5), "batch_size": 16, "shard_size": 8}
FILES = {"state.json", "dataset_info.json", "checksums.json"} | {
    f"data-{start:012d}.arrow" for start in range(0, NUM_ROWS, 8)
}


@pytest.fixture(scope="module")
def dataset(images):
    return images(NUM_ROWS)


@pytest.fixture(scope="module")
def finished(dataset, loaded, tmp_path_factory):
    return record_teacher_logits(dataset, loaded, output_dir=tmp_path_factory.mktemp("finished") / "t", **SETTINGS)


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """Makes this process one of a machine that has an empty cache; called again, of another machine."""

    def become(name):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / name)

    become("first machine")
    return become


@pytest.fixture
def author(own_hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
    HfFileSystem.clear_instance_cache()
    yield own_hub
    HfFileSystem.clear_instance_cache()


def names(folder):
    return {path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file()}


def test_the_table_at_an_address_is_that_of_a_folder(dataset, loaded, finished, machine, tmp_path):
    address = f"file://{tmp_path}/remote/t"
    table = record_teacher_logits(dataset, loaded, output_dir=address, **SETTINGS)
    assert same_bytes(table, finished)
    # Nothing that only the recording needed stays there.
    assert names(tmp_path / "remote/t") == FILES
    assert same_bytes(load_from_disk(address), finished)
    machine("second machine")
    opened = load_image_dataset(address, validation_fraction=0.25)
    assert sum(map(len, opened.values())) == NUM_ROWS
    assert names(Mirror(address).folder) == FILES


def test_commands_read_the_table_of_an_address(dataset, loaded, finished, tmp_path):
    address = f"file://{tmp_path}/remote"
    record_teacher_logits(dataset, loaded, output_dir=address, **SETTINGS)
    assert same_bytes(open_tables(address)["train"], finished)
    assert beside(address, "student") == str(Path("outputs", "student"))


def test_splits_are_folders_at_the_address(dataset, loaded, machine, tmp_path):
    address = f"file://{tmp_path}/remote"
    splits = DatasetDict(train=dataset.select(range(24)), test=dataset.select(range(24, 32)))
    recorded = record_teacher_logits(splits, loaded, output_dir=address, **SETTINGS)
    machine("second machine")
    opened = load_image_dataset(address)
    assert same_bytes(opened["test"], recorded["test"])
    assert same_bytes(load_from_disk(tmp_path / "remote")["train"], recorded["train"])


def record_until_killed(dataset, loaded, address):
    prepare_process()
    mirror_module._PAUSE = 0.05
    count = iter(range(100))

    def stop_in_the_fourth_shard(size):
        if next(count) == 3:
            time.sleep(600)

    before_each_batch(loaded, stop_in_the_fourth_shard)
    record_teacher_logits(dataset, loaded, output_dir=address, **SETTINGS)


@pytest.mark.parametrize("is_streamed", [False, True])
def test_another_machine_continues_what_a_killed_one_uploaded(
    is_streamed, dataset, loaded, finished, machine, tmp_path
):
    rows = dataset.to_iterable_dataset() if is_streamed else dataset
    address, remote = f"file://{tmp_path}/remote", tmp_path / "remote"
    process = multiprocessing.get_context("fork").Process(target=record_until_killed, args=(rows, loaded, address))
    process.start()
    uploaded = {f"data-{start:012d}.arrow" for start in (0, 8, 16)}
    while process.is_alive() and not uploaded | {f"{name}.json" for name in uploaded} <= names(remote):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL

    with pytest.raises(ValueError, match=f"{re.escape(address)} .*not finished"):
        load_image_dataset(address)
    machine("second machine")
    sizes = []
    hook = before_each_batch(loaded, sizes.append)
    table = record_teacher_logits(rows, loaded, output_dir=address, **SETTINGS)
    hook.remove()
    assert sizes == [16] * 3
    assert same_bytes(table, finished)
    assert names(remote) == FILES
    # The first machine is there again: what it holds of the recording is no longer of use.
    machine("first machine")
    sizes.clear()
    again = record_teacher_logits(rows, loaded, output_dir=address, **SETTINGS)
    assert same_bytes(again, finished) and not sizes
    assert names(remote) == FILES


def test_a_file_of_another_content_is_downloaded_again(dataset, loaded, finished, tmp_path):
    address = f"file://{tmp_path}/remote"
    record_teacher_logits(dataset, loaded, output_dir=address, **SETTINGS)
    # As another recording of the same size would leave it.
    path = Mirror(address).folder / "data-000000000008.arrow"
    content = bytearray(path.read_bytes())
    content[-600] ^= 1
    path.write_bytes(content)
    rows = load_image_dataset(address, validation_fraction=0.25)
    assert path.read_bytes() != content
    assert path.read_bytes() == (tmp_path / "remote" / path.name).read_bytes()
    assert sum(map(len, rows.values())) == NUM_ROWS


def record_as_one_of_two_machines(dataset, loaded, address, folder):
    index = int(os.environ["RANK"])
    os.environ["LOCAL_RANK"] = "0"
    prepare_process()
    datasets.config.HF_DATASETS_CACHE = folder / f"machine {index}"
    table = record_teacher_logits(dataset, loaded, output_dir=address, **SETTINGS)
    (folder / f"{index} holds {len(table)}").touch()


@pytest.mark.parametrize("is_streamed", [False, True])
def test_two_machines_without_a_common_disk_record_one_table(
    is_streamed, dataset, loaded, finished, tmp_path, monkeypatch
):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    # A stream is divided by its shards.
    rows = dataset.to_iterable_dataset(num_shards=2) if is_streamed else dataset
    address = f"file://{tmp_path}/remote"
    launcher = start_launcher(record_as_one_of_two_machines, tmp_path, rows, loaded, address, tmp_path)
    launcher.join()
    assert launcher.exitcode == 0
    assert {path.name for path in tmp_path.glob("* holds *")} == {f"{index} holds {NUM_ROWS}" for index in range(2)}
    table = load_from_disk(tmp_path / "remote")
    assert same_bytes(table, finished)
    assert {"state.json", "checksums.json", "dataset_info.json"} <= names(tmp_path / "remote")
    assert not [name for name in names(tmp_path / "remote") if name.startswith("recording") or ".arrow.json" in name]


def test_a_repository_of_the_hub(dataset, loaded, finished, author, machine, tmp_path):
    repo = author.create("alice/logits", "dataset")
    address = "hf://datasets/alice/logits/teachers"
    table = record_teacher_logits(dataset, loaded, output_dir=address, **SETTINGS)
    assert same_bytes(table, finished)
    assert set(author.files("alice/logits", "dataset")) == {f"teachers/{name}" for name in FILES}
    # The settings at the start, all shards at the end, the finished table: not one for each file.
    assert len(repo.commits) <= 5
    machine("second machine")
    opened = load_image_dataset(address, validation_fraction=0.25)
    assert sum(map(len, opened.values())) == NUM_ROWS


def test_a_repository_that_is_not_there_or_not_ones_own_is_refused_before_a_teacher_runs(
    dataset, loaded, author, monkeypatch
):
    sizes = []
    hook = before_each_batch(loaded, sizes.append)
    record = functools.partial(record_teacher_logits, dataset, loaded, **SETTINGS)
    with pytest.raises(ValueError, match="hf://datasets/alice/other .*cannot be opened"):
        record(output_dir="hf://datasets/alice/other")
    author.create("alice/logits", "dataset")
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    HfFileSystem.clear_instance_cache()
    with pytest.raises(Exception, match="write token"):
        record(output_dir="hf://datasets/alice/logits")
    hook.remove()
    assert not sizes


@pytest.mark.parametrize(
    "address, given",
    [("memory://nothing", "memory://nothing"), ("ftx://a", "ftx"), ("hf://datasets", "hf://datasets")],
)
def test_an_address_without_a_table(address, given):
    with pytest.raises((FileNotFoundError, ValueError), match=re.escape(given)):
        load_image_dataset(address)


def test_a_password_is_in_no_message():
    with pytest.raises(ValueError, match="s3x://bucket/t cannot be opened") as caught:
        Mirror("s3x://key:secret@bucket/t")
    assert "secret" not in str(caught.value)


def test_an_upload_that_fails_is_reported_and_tried_again(dataset, loaded, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(mirror_module, "_PAUSE", 0.01)
    address = f"file://{tmp_path}/remote"
    mirror, failures = Mirror(address), [OSError("the line is cut")]
    change = mirror._change
    monkeypatch.setattr(mirror, "_change", lambda *files: _raise(failures.pop()) if failures else change(*files))
    mirror.folder.mkdir(parents=True)
    (mirror.folder / "recording.json").write_text("{}")
    with mirror.uploading():
        while not names(tmp_path / "remote"):
            time.sleep(0.01)
    assert "the line is cut" in caplog.text and names(tmp_path / "remote") == {"recording.json"}


def _raise(error):
    raise error
