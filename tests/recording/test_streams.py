"""A recorded stream is the table that its rows would be, whatever it is read from, and wherever it is interrupted."""

import io
import multiprocessing
import os
import signal
import tarfile
import time

import numpy as np
import pytest
from comparing import same_bytes
from datasets import (
    ClassLabel,
    Features,
    Image,
    IterableDataset,
    IterableDatasetDict,
    Value,
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)
from datasets.distributed import split_dataset_by_node
from interrupting import before_each_batch, file_times
from launching import give_own_lock, prepare_process, start_launcher
from small import NAMES, image_bytes
from tqdm.std import tqdm

from hf_ibdistill import ViewRecipe, attach_teacher_logits, read_records, record_teacher_logits


NUM_ROWS = 50
VIEWS = ViewRecipe(num_views=2, horizontal_flip=0.5)
SETTINGS = {"views": VIEWS, "batch_size": 8, "shard_size": 12}
ROWS_PER_SHARD = 12
KEYS = ["row_key", "file_key"]


@pytest.fixture(scope="module")
def dataset(images):
    return images(NUM_ROWS)


@pytest.fixture(scope="module")
def mapped(dataset, loaded, tmp_path_factory):
    return record_teacher_logits(dataset, loaded, output_dir=tmp_path_factory.mktemp("mapped") / "t", **SETTINGS)


def parquet(dataset, folder):
    folder.mkdir()
    for number, rows in enumerate((range(30), range(30, NUM_ROWS))):
        dataset.select(rows).to_parquet(folder / f"{number}.parquet", batch_size=7)
    return load_dataset("parquet", data_files=str(folder / "*.parquet"), split="train", streaming=True)


def image_folder(dataset, folder):
    # Names in the order of the rows; a stream of files has no other columns, and labels by folder in another order.
    for number in range(len(dataset)):
        path = folder / "all" / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image_bytes(number))
    stream = load_dataset("imagefolder", data_dir=str(folder), split="train", streaming=True, drop_labels=True)
    return stream


def web_dataset(dataset, folder):
    folder.mkdir()
    with tarfile.open(folder / "0.tar", "w") as tar:
        for number, row in enumerate(dataset):
            for name, content in (("png", image_bytes(number)), ("cls", str(row["label"]).encode())):
                member = tarfile.TarInfo(f"{number:03d}.{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    stream = load_dataset("webdataset", data_files=str(folder / "*.tar"), split="train", streaming=True)
    return stream.cast_column("cls", ClassLabel(names=NAMES)).rename_columns({"png": "image", "cls": "label"})


def one_by_one(dataset):
    for number, row in enumerate(dataset.cast_column("image", Image(decode=False))):
        yield {**row, "note": f"row {number}"}


def generated(dataset, folder):
    return IterableDataset.from_generator(one_by_one, features=dataset.features, gen_kwargs={"dataset": dataset})


SOURCES = {
    "table": lambda dataset, folder: dataset.to_iterable_dataset(num_shards=3),
    "parquet": parquet,
    "images": image_folder,
    "tar": web_dataset,
    "generator": generated,
}


@pytest.fixture(params=SOURCES)
def stream(request, dataset, tmp_path):
    return SOURCES[request.param](dataset, tmp_path / "source")


def recorded_columns(table):
    return table.select_columns(["row_key", "file_key", "conv_logits", "inv_logits"])


def test_a_stream_is_recorded_as_its_rows_would_be(stream, mapped, loaded, tmp_path):
    table = record_teacher_logits(stream, loaded, output_dir=tmp_path / "t", **SETTINGS)
    assert same_bytes(recorded_columns(table), recorded_columns(mapped))
    assert [image.tobytes() for image in table["image"]] == [image.tobytes() for image in mapped["image"]]
    assert all(cell["bytes"] for cell in table.cast_column("image", Image(decode=False))["image"])
    for name in {"label", "note"} & {*table.column_names}:
        assert table[name] == mapped[name]
    (record,) = read_records(table)
    assert record["views"] == VIEWS.to_dict()


def test_an_interrupted_stream_continues_where_it_stopped(stream, mapped, loaded, tmp_path, monkeypatch):
    folder, batches = tmp_path / "t", []

    def stop_in_the_third_shard(size):
        batches.append(size)
        if len(batches) == 7:
            raise KeyboardInterrupt

    hook = before_each_batch(loaded, stop_in_the_third_shard)
    with pytest.raises(KeyboardInterrupt):
        record_teacher_logits(stream, loaded, output_dir=folder, **SETTINGS)
    hook.remove()
    kept = file_times(folder, "*.arrow")
    assert len(kept) == 2
    batches.clear()
    hook = before_each_batch(loaded, batches.append)
    table = record_teacher_logits(stream, loaded, output_dir=folder, **SETTINGS)
    hook.remove()
    assert sum(batches) == VIEWS.num_views * (NUM_ROWS - 2 * ROWS_PER_SHARD)
    assert kept.items() <= file_times(folder, "*.arrow").items()
    assert same_bytes(recorded_columns(table), recorded_columns(mapped))
    batches.clear()
    again = record_teacher_logits(stream, loaded, output_dir=folder, **SETTINGS)
    assert not batches and same_bytes(again, table)


def test_what_is_done_is_not_read_again(mapped, loaded, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_ibdistill.recording.batches._SAMPLE", 4)
    read = []

    def rows(shards):
        for shard in shards:
            for number in shard:
                read.append(number)
                yield {"image": {"bytes": image_bytes(number), "path": None}, "label": number % 3}

    features = Features({"image": Image(), "label": ClassLabel(names=NAMES)})
    shards = [list(range(start, start + 5)) for start in range(0, NUM_ROWS, 5)]
    stream = IterableDataset.from_generator(rows, features=features, gen_kwargs={"shards": shards})

    def stop(size):
        if len(read) > 44:
            raise KeyboardInterrupt

    hook = before_each_batch(loaded, stop)
    with pytest.raises(KeyboardInterrupt):
        record_teacher_logits(stream, loaded, output_dir=tmp_path / "t", **SETTINGS)
    hook.remove()
    done = len(file_times(tmp_path / "t", "*.arrow")) * ROWS_PER_SHARD
    assert done == 36
    read.clear()
    table = record_teacher_logits(stream, loaded, output_dir=tmp_path / "t", **SETTINGS)
    assert same_bytes(recorded_columns(table), recorded_columns(mapped))
    # The first rows show that it is the same dataset. Reading continues at most one part before the one that has row 36.
    assert {*read} <= {*range(10), *range(30, NUM_ROWS)}


def test_a_killed_process_loses_less_than_a_shard(dataset, mapped, loaded, tmp_path):
    folder, stream = tmp_path / "t", parquet(dataset, tmp_path / "source")

    def record_and_stop():
        give_own_lock(tqdm)
        sizes = []

        def stop(size):
            sizes.append(size)
            if len(sizes) == 8:
                (tmp_path / "stopped").touch()
                time.sleep(600)

        before_each_batch(loaded, stop)
        record_teacher_logits(stream, loaded, output_dir=folder, **SETTINGS)

    process = multiprocessing.get_context("fork").Process(target=record_and_stop)
    process.start()
    while process.is_alive() and not (tmp_path / "stopped").exists():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    kept = file_times(folder, "*.arrow")
    table = record_teacher_logits(stream, loaded, output_dir=folder, **SETTINGS)
    assert len(kept) == 2 and kept.items() <= file_times(folder, "*.arrow").items()
    assert same_bytes(recorded_columns(table), recorded_columns(mapped))


def test_shards_of_a_stream_grow_with_it(dataset, mapped, loaded, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_ibdistill.recording.recorder._SHARD_ROWS", 4)
    monkeypatch.setattr("hf_ibdistill.recording.recorder._GROWTH", 2)
    stream, sizes = dataset.to_iterable_dataset(), []

    def stop(size):
        sizes.append(size)
        if len(sizes) == 22:
            raise KeyboardInterrupt

    hook = before_each_batch(loaded, stop)
    with pytest.raises(KeyboardInterrupt):
        record_teacher_logits(stream, loaded, output_dir=tmp_path, views=VIEWS, batch_size=2)
    hook.remove()
    assert len(file_times(tmp_path, "*.arrow")) == 4
    table = record_teacher_logits(stream, loaded, output_dir=tmp_path, views=VIEWS, batch_size=2)
    firsts = [int(name[5:17]) for name in sorted(file_times(tmp_path, "*.arrow"))]
    assert firsts == [0, 4, 8, 12, 18, 27, 40]
    assert same_bytes(recorded_columns(table).select_columns(KEYS), recorded_columns(mapped).select_columns(KEYS))
    assert table["label"][:] == dataset["label"][:]
    for column in ("conv_logits", "inv_logits"):
        np.testing.assert_allclose(table[column][:], mapped[column][:], atol=1e-2)


@pytest.mark.parametrize("num_workers", [1, 3])
def test_threads_keep_the_order(num_workers, dataset, mapped, loaded, tmp_path):
    stream = dataset.to_iterable_dataset()
    table = record_teacher_logits(stream, loaded, output_dir=tmp_path, num_workers=num_workers, **SETTINGS)
    assert same_bytes(recorded_columns(table), recorded_columns(mapped))


def test_unreadable_images_of_a_stream_can_be_left_out(images, loaded, tmp_path, caplog):
    broken = images(NUM_ROWS, broken=[3, *range(12, 24), 49])
    expected = record_teacher_logits(broken, loaded, output_dir=tmp_path / "m", skip_unreadable=True, **SETTINGS)
    stream = broken.to_iterable_dataset()
    with pytest.raises(ValueError, match="Row 3: "):
        record_teacher_logits(stream, loaded, output_dir=tmp_path / "t", **SETTINGS)
    caplog.clear()
    table = record_teacher_logits(stream, loaded, output_dir=tmp_path / "s", skip_unreadable=True, **SETTINGS)
    assert len(table) == NUM_ROWS - 14 and same_bytes(table, expected)
    assert "14 rows were left out" in caplog.text


def test_splits_of_streams(dataset, mapped, loaded, tmp_path):
    splits = IterableDatasetDict(
        {"train": dataset.to_iterable_dataset(), "test": dataset.select(range(9)).to_iterable_dataset()}
    )
    tables = record_teacher_logits(splits, loaded, output_dir=tmp_path, **SETTINGS)
    assert same_bytes(recorded_columns(tables["train"]), recorded_columns(mapped))
    assert len(tables["test"]) == 9 and np.asarray(tables["test"]["conv_logits"]).shape == (9, 3)


def test_streams_that_cannot_be_recorded_are_refused(dataset, mapped, loaded, tmp_path):
    stream = dataset.to_iterable_dataset()
    wrong = dataset.cast_column("label", Value("int64")).map(
        lambda row: {"label": 7 if row["note"] == "row 21" else 1}
    )
    wrong = wrong.to_iterable_dataset().cast_column("label", ClassLabel(names=NAMES))
    for given, message in (
        (stream.shuffle(buffer_size=10), "is shuffled"),
        (mapped.to_iterable_dataset(), "holds logits already"),
        (IterableDataset.from_generator(one_by_one, gen_kwargs={"dataset": dataset}), "features=None"),
        (stream.take(0), "is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            record_teacher_logits(given, loaded, output_dir=tmp_path / "t", **SETTINGS)
        assert not (tmp_path / "t").exists()
    with pytest.raises(ValueError, match="Row 21: the label 7"):
        record_teacher_logits(wrong, loaded, output_dir=tmp_path / "t", **SETTINGS)


def test_another_stream_does_not_continue_a_recording(dataset, images, loaded, tmp_path):
    record_teacher_logits(dataset.to_iterable_dataset(), loaded, output_dir=tmp_path, **SETTINGS)
    other = dataset.select(range(1, NUM_ROWS)).to_iterable_dataset()
    with pytest.raises(ValueError, match="dataset: sha256"):
        record_teacher_logits(other, loaded, output_dir=tmp_path, **SETTINGS)


def record_in_part(stream, teachers, folder):
    """Run by each of two processes."""
    prepare_process()
    record_teacher_logits(stream, teachers, output_dir=folder / "t", **SETTINGS)


@pytest.mark.parametrize("num_shards", [4, 3])
def test_two_processes_share_a_stream(num_shards, dataset, mapped, loaded, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    # Of four files each process reads two; of three each reads every second row.
    stream = dataset.to_iterable_dataset(num_shards=num_shards)
    launcher = start_launcher(record_in_part, tmp_path, stream, loaded, tmp_path)
    launcher.join()
    assert launcher.exitcode == 0
    table = load_from_disk(tmp_path / "t")
    parts = [[*split_dataset_by_node(stream, rank, 2)] for rank in range(2)]
    assert table["note"][:] == [row["note"] for part in parts for row in part]
    order = [int(note.split()[1]) for note in table["note"]]
    assert sorted(order) == list(range(NUM_ROWS))
    assert same_bytes(recorded_columns(table), recorded_columns(mapped.select(order)))
    again = record_teacher_logits(stream, loaded, output_dir=tmp_path / "t", **SETTINGS)
    assert same_bytes(again, table)


def record_broken_images(stream, teachers, folder):
    prepare_process()
    record_teacher_logits(stream, teachers, output_dir=folder / "t", skip_unreadable=True, batch_size=4, shard_size=4)


def test_two_processes_count_the_rows_that_they_leave_out_from_the_first(images, loaded, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    broken = {2, 3, 9, 16}
    stream = images(20, broken=broken).to_iterable_dataset(num_shards=3)
    teachers = {"conv": loaded["conv"]}
    launcher = start_launcher(record_broken_images, tmp_path, stream, teachers, tmp_path)
    launcher.join()
    assert launcher.exitcode == 0
    # The parts of both processes, one after another.
    parts = [[*split_dataset_by_node(stream.decode(False), rank, 2)] for rank in range(2)]
    rows = [int(row["note"].split()[1]) for part in parts for row in part]
    (record,) = read_records(load_from_disk(tmp_path / "t"))
    assert [rows[number] for number in record["skipped_rows"]] == [row for row in rows if row in broken]
    assert [int(note.split()[1]) for note in load_from_disk(tmp_path / "t")["note"]] == [
        row for row in rows if row not in broken
    ]


# Without the images


def test_images_in_files_keep_their_paths(dataset, mapped, loaded, tmp_path):
    stream = image_folder(dataset, tmp_path / "source")
    table = record_teacher_logits(stream, loaded, output_dir=tmp_path / "t", with_images=False, **SETTINGS)
    cells = table.cast_column("image", Image(decode=False))["image"]
    assert {cell["bytes"] for cell in cells} == {None} and cells[7]["path"] == str(tmp_path / "source/all/007.png")
    assert same_bytes(recorded_columns(table), recorded_columns(mapped))
    assert [image.tobytes() for image in table["image"]] == [image.tobytes() for image in mapped["image"]]


@pytest.mark.parametrize("is_streamed", [False, True])
def test_other_images_are_left_out_and_joined_later(is_streamed, dataset, mapped, loaded, tmp_path, caplog):
    given = dataset.to_iterable_dataset() if is_streamed else dataset
    logits = record_teacher_logits(given, loaded, output_dir=tmp_path / "t", with_images=False, **SETTINGS)
    assert logits.column_names == [name for name in mapped.column_names if name != "image"]
    record_teacher_logits(given, loaded, output_dir=tmp_path / "t", **SETTINGS)
    assert "nothing to do. Its table has no columns ['image']" in caplog.text
    order = np.random.default_rng(0).permutation(NUM_ROWS)
    joined = attach_teacher_logits(dataset.select(order), logits)
    assert same_bytes(joined, mapped.select(order))


def test_large_images_stay_where_they_are(dataset, loaded, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("hf_ibdistill.recording.recorder._LARGE", 1000)
    table = record_teacher_logits(dataset, loaded, output_dir=tmp_path / "t", **SETTINGS)
    assert "image" not in table.column_names and "leaves them out; with_images=True" in caplog.text
    table = record_teacher_logits(dataset, loaded, output_dir=tmp_path / "u", with_images=True, **SETTINGS)
    assert "image" in table.column_names


def test_a_further_teacher_without_images_writes_its_columns_alone(dataset, mapped, loaded, tmp_path):
    settings = {**SETTINGS, "with_images": False}
    one = record_teacher_logits(dataset, {"conv": loaded["conv"]}, output_dir=tmp_path / "one", **settings)
    images = dataset.remove_columns(["label", "note"])
    two = record_teacher_logits(images, {"inv": loaded["inv"]}, output_dir=tmp_path / "two", **settings)
    assert two.column_names == ["row_key", "file_key", "inv_logits"]
    joined = concatenate_datasets([one, two.remove_columns(["row_key", "file_key"])], axis=1)
    assert same_bytes(recorded_columns(joined), recorded_columns(mapped))
