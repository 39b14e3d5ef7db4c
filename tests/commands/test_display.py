"""What commands show while they train and at their end, and what they log for others to show."""

import json
import logging
import re
import shlex
import sys
import warnings

import datasets
import PIL.Image
import pytest
from running import run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers.utils import logging as transformers_logging

from hf_ibdistill import progress
from hf_ibdistill.commands.arguments import MixedDataArguments
from hf_ibdistill.commands.display import data_flags, displaying, teacher_flags, text_table

from .conftest import QUICK


STEPS = ["--max_steps", "4", "--per_device_train_batch_size", "5", "--gradient_accumulation_steps", "2"]
STEPS += ["--eval_strategy", "steps", "--eval_steps", "2", "--logging_strategy", "steps", "--logging_steps", "2"]


def history_in(folder):
    return json.loads((folder / "results.json").read_text())["log_history"]


@pytest.mark.parametrize("flags", [[], ["--disable_tqdm"]])
def test_training_is_one_stage_with_speed_and_accuracy(flags, outputs, tmp_path, caplog, capsys, monkeypatch):
    # A line at each step instead of each minute.
    monkeypatch.setattr(progress, "_LINE_INTERVAL", 0)
    run("distill", "--dataset", outputs.table, *STEPS, *flags, "--output_dir", tmp_path / "mine")
    lines = [line for line in caplog.messages if line.startswith("train mine: ")]
    history = history_in(tmp_path / "mine")
    (first, _), (last, entry) = ((f"{100 * e['eval_accuracy']:.1f} %", e) for e in history if "eval_accuracy" in e)
    speeds = [float(re.search(r"([\d.,]+) images/s", line)[1].replace(",", "")) for line in lines]
    assert entry["step"] == 4 and len(lines) == 5
    assert [line.split(",")[0] for line in lines] == [f"train mine: {n}" for n in
        ("1/4 steps", "2/4 steps", "3/4 steps", "4/4 steps", "4 steps")]  # fmt: skip
    assert "accuracy" not in lines[0] and lines[0].count("left") == 1
    loss = next(e["loss"] for e in history if "loss" in e)
    assert lines[2].endswith(f"left, loss {loss:.3g}, validation accuracy {first}")
    assert lines[4].endswith(f"images/s, validation accuracy {last}")
    # Ten images a step. transformers measures the same training.
    (trained,) = (e for e in history if "train_samples_per_second" in e)
    assert speeds[4] == pytest.approx(trained["train_samples_per_second"], rel=0.2)
    printed, errors = capsys.readouterr()
    # A script reads what is printed.
    assert json.loads(printed) == json.loads((tmp_path / "mine" / "results.json").read_text())["metrics"]
    assert "\r" not in errors and "{" not in errors


def test_a_terminal_gets_a_table_and_the_next_command(outputs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    given = ["--dataset", outputs.images, *QUICK]
    run("train-teacher", *given, "--preset", "convolution-small", "--output_dir", tmp_path / "a-b")
    assert next_of(capsys, tmp_path / "a-b") == ["record", "--dataset", str(outputs.images), "--teachers",
        f"a_b={tmp_path / 'a-b'}", "--output_dir", str(tmp_path / "table")]  # fmt: skip
    # The next command of each command works.
    run("record", "--dataset", outputs.images, "--teachers", *outputs.teachers, "--output_dir", tmp_path / "table")
    following = next_of(capsys, tmp_path / "table")
    run(*following, *QUICK)
    assert following[1:3] == ["--dataset", str(tmp_path / "table")]
    shown = capsys.readouterr().out
    results = json.loads((tmp_path / "student" / "results.json").read_text())
    for name, teacher in results["teachers"].items():
        assert f"accuracy of teacher {name}" in shown and f"{100 * teacher['metrics']['accuracy']:.1f} %\n" in shown
    assert re.search(rf"^accuracy +{100 * results['metrics']['accuracy']:.1f} %$", shown, re.MULTILINE)
    assert f"\n  hf-ibdistill predict --model {tmp_path / 'student'} IMAGES\n" in shown
    run("verify", "--table", tmp_path / "table", "--all")
    assert next_of(capsys, "0 problems") == following
    run("evaluate", "--model", tmp_path / "student", "--dataset", outputs.table)
    assert next_of(capsys, results["split"])[0] == "predict"
    # Logits without images are joined to the same images.
    logits = ["--with_images", "false", "--output_dir", tmp_path / "logits"]
    run("record", "--dataset", outputs.images, "--images_per_class", "2", "--teachers", *outputs.teachers, *logits)
    following = next_of(capsys, tmp_path / "logits")
    assert following[1:-2] == ["--dataset", str(outputs.images), "--images_per_class", "2", "--logits",
        str(tmp_path / "logits")]  # fmt: skip
    run(*following[:-1], tmp_path / "joined", *QUICK)


def next_of(capsys, shown):
    """The words of the first command that a terminal is shown, below a table with this text."""
    table, _, following = capsys.readouterr().out.partition("\nNext:\n")
    assert str(shown) in table and "\n-----" in table
    name, *words = shlex.split(following.splitlines()[0])
    assert name == "hf-ibdistill"
    return words


def test_tensorboard_gets_every_value_of_the_log(outputs, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    student = tmp_path / "student"
    run("distill", "--dataset", outputs.table, *STEPS, "--report_to", "tensorboard", "--output_dir", student)
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    logged = {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    history = history_in(student)
    for name in ("loss", "label_loss", "conv_loss", "inv_loss", "learning_rate"):
        expected = {e["step"]: pytest.approx(e[name], rel=1e-6) for e in history if name in e}
        assert expected.keys() == {2, 4} and logged[f"train/{name}"] == expected, name
    for name in ("accuracy", "loss", "inv_token_accuracy"):
        expected = {e["step"]: pytest.approx(e[f"eval_{name}"], rel=1e-6) for e in history if f"eval_{name}" in e}
        assert expected.keys() == {2, 4} and logged[f"eval/{name}"] == expected, name


def test_bars_of_libraries_are_hidden_while_a_command_runs(capsys, tmp_path):
    table = datasets.Dataset.from_dict({"a": range(10)})
    before = datasets.are_progress_bars_disabled(), transformers_logging.is_progress_bar_enabled()
    assert before == (False, True)
    with pytest.raises(RuntimeError), displaying():
        table.save_to_disk(tmp_path / "a")
        assert not transformers_logging.is_progress_bar_enabled() and capsys.readouterr().err == ""
        raise RuntimeError
    assert (datasets.are_progress_bars_disabled(), transformers_logging.is_progress_bar_enabled()) == before
    assert logging.getLogger("hf_ibdistill.progress").level == logging.NOTSET
    table.save_to_disk(tmp_path / "b")
    assert "10/10" in capsys.readouterr().err


def test_silenced_messages_are_those_of_the_libraries_and_no_others(outputs, tmp_path, recwarn, caplog):
    image = PIL.Image.effect_noise((8, 8), 50).quantize(4)
    image.info["transparency"] = bytes([0, 128, 255, 255])
    image.save(tmp_path / "palette.png")
    with PIL.Image.open(tmp_path / "palette.png") as saved, pytest.warns(UserWarning, match="Palette images"):
        saved.convert("RGB")
    recwarn.clear()
    run("predict", "--model", outputs.student, tmp_path / "palette.png")
    assert not recwarn.list
    with displaying():
        warnings.warn("Palette images are new", stacklevel=1)
        for text in ("No CUDA runtime is found, using CUDA_HOME='/usr'", "CUDA_HOME is not set"):
            logging.getLogger("torch.utils.cpp_extension").warning(text)
    logging.getLogger("torch.utils.cpp_extension").warning("No CUDA runtime is found, but no command runs")
    assert [str(warning.message) for warning in recwarn] == ["Palette images are new"]
    assert caplog.messages == ["CUDA_HOME is not set", "No CUDA runtime is found, but no command runs"]


def test_the_other_processes_of_a_machine_repeat_no_warning(monkeypatch, capsys):
    for rank, is_shown in (("0", True), ("1", False)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with displaying():
            logging.getLogger("hf_ibdistill.data.splits").warning("no validation split")
            logging.getLogger("hf_ibdistill.recording.recorder").warning("row 3 of %s", rank)
        errors = capsys.readouterr().err
        assert ("no validation split" in errors) == is_shown and f"row 3 of {rank}" in errors


def test_flags_open_the_same_images():
    assert data_flags(MixedDataArguments()) == []
    data = MixedDataArguments("my images", images_per_class=3, keep_rest=True, pixel_range=[0.0, 2.5])
    assert data_flags(data) == ["--dataset", "my images", "--images_per_class", "3", "--pixel_range", "0.0", "2.5",
        "--keep_rest"]  # fmt: skip
    assert teacher_flags("outputs/my-conv.1/") == ["--teachers", "my_conv_1=outputs/my-conv.1/"]


def test_columns_are_aligned():
    assert text_table(["split", "images"], [["train", "1,293"], ["validation", 7]]).splitlines() == [
        "split       images",
        "------------------",
        "train        1,293",
        "validation       7",
    ]
