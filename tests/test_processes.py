"""What one process can do for all is done once, and its error reaches all of them."""

import multiprocessing
import os
import platform
import resource
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from datasets import ClassLabel, Value
from launching import prepare_process, start_launcher
from small import NAMES, make_images, make_student
from transformers import AutoImageProcessor, AutoModelForImageClassification

import hf_ibdistill.recording.recorder
import hf_ibdistill.training.trainer
from hf_ibdistill import DistillationArguments, EnsembleDistillationTrainer, record_teacher_logits
from hf_ibdistill.processes import keep_freed_memory, once_a_machine
from hf_ibdistill.teachers import Teacher


# (where it is looked up, name)
ONCE = {
    "record": [
        (Teacher, "weights_sha256"),
        (hf_ibdistill.recording.recorder, "check_labels"),
        (hf_ibdistill.recording.recorder, "sample_images"),
        (hf_ibdistill.recording.recorder, "label_ids"),
        (hf_ibdistill.recording.recorder, "check_files"),
        (hf_ibdistill.recording.recorder, "check_complete"),
    ],
    "train": [
        (hf_ibdistill.training.trainer, "check_files"),
        (hf_ibdistill.training.trainer, "check_labels"),
        (hf_ibdistill.training.trainer, "check_columns"),
    ],
}


def count_calls(monkeypatch, stage, log):
    """Each call, in any process, adds a line with its name and the number of its process."""

    def counted(name, call):
        def run(*arguments, **keywords):
            with open(log, "a") as file:
                file.write(f"{name} {os.environ.get('RANK')}\n")
            return call(*arguments, **keywords)

        return run

    for owner, name in ONCE[stage]:
        monkeypatch.setattr(owner, name, counted(name, getattr(owner, name)))


def record_two_teachers(images, teachers, folder):
    prepare_process()
    for number, (name, teacher) in enumerate(teachers.items()):
        images = record_teacher_logits(
            images, {name: teacher}, output_dir=folder / str(number), shard_size=4, batch_size=4
        )
    assert PartialState().num_processes == int(os.environ["WORLD_SIZE"])


def train_two_steps(table, student, folder):
    prepare_process()
    arguments = DistillationArguments(
        str(folder),
        max_steps=2,
        use_cpu=True,
        bf16=False,
        eval_strategy="no",
        per_device_train_batch_size=2,
        report_to=[],
    )
    model, processor = (
        kind.from_pretrained(student) for kind in (AutoModelForImageClassification, AutoImageProcessor)
    )
    trainer = EnsembleDistillationTrainer(model, arguments, train_dataset=table, processing_class=processor)
    assert trainer.args.world_size == 2 and trainer.train().global_step == 2


def test_two_processes_do_once_what_one_can_do_for_all(teachers, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    log, folder = tmp_path / "log", tmp_path / "tables"
    with monkeypatch.context() as patched:
        count_calls(patched, "record", log)
        launcher = start_launcher(record_two_teachers, tmp_path, make_images(20), teachers, folder)
        launcher.join()
    assert launcher.exitcode == 0
    calls = log.read_text().splitlines()
    # The second recording adds a teacher to a table that has one.
    twice = {"weights_sha256", "check_labels", "sample_images", "label_ids"}
    assert sorted(calls) == sorted([f"{name} 0" for name in twice] * 2 + ["check_files 0", "check_complete 0"])

    log.unlink()
    student = make_student(tmp_path / "student")
    table = hf_ibdistill.recording.recorder.open_saved(folder / "1")
    with monkeypatch.context() as patched:
        count_calls(patched, "train", log)
        launcher = start_launcher(train_two_steps, tmp_path, table, student, tmp_path / "trained")
        launcher.join()
    assert launcher.exitcode == 0
    assert sorted(log.read_text().splitlines()) == ["check_columns 0", "check_files 0", "check_labels 0"]


def record_wrong_labels(images, teachers, folder):
    prepare_process()
    with pytest.raises(ValueError, match="labels \\[7\\]"):
        record_teacher_logits(images, teachers, output_dir=folder / "t")
    (folder / os.environ["RANK"]).touch()
    assert once_a_machine(lambda: os.environ["RANK"]) == "0"


def test_an_error_of_one_process_is_raised_in_all(teachers, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    images = make_images(6).cast_column("label", Value("int64")).map(lambda row: {"label": 7})
    wrong = (
        images.with_format("arrow")
        .cast_column("label", ClassLabel(num_classes=8))
        .cast_column("label", ClassLabel(names=NAMES))
    )
    launcher = start_launcher(record_wrong_labels, tmp_path, wrong, teachers, tmp_path)
    launcher.join()
    assert launcher.exitcode == 0
    assert [Path(tmp_path / rank).exists() for rank in ("0", "1")] == [True, True]
    assert not (tmp_path / "t").exists()


def test_one_process_calls_the_function_itself():
    with pytest.raises(KeyError, match="missing"):
        once_a_machine(lambda: {}["missing"])
    assert once_a_machine(lambda: 3) == 3


def count_page_faults(is_kept: bool, queue) -> None:
    is_set = is_kept and keep_freed_memory()
    # 64 MB, which glibc takes from the system and gives back by default. Small objects land in the first freed pieces, so the heap
    # grows a few times before a piece fits again.
    for _ in range(30):
        torch.ones(1 << 24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(1 << 24)
    queue.put((is_set, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_used_again(monkeypatch):
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    context = multiprocessing.get_context("spawn")
    found = {}
    for is_kept in (False, True):
        queue = context.Queue()
        process = context.Process(target=count_page_faults, args=(is_kept, queue))
        process.start()
        found[is_kept] = queue.get(timeout=120)
        process.join()
    assert found[True][0] and found[True][1] * 10 < found[False][1]


def test_a_variable_of_the_user_says_what_is_kept(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000")
    assert not keep_freed_memory()
