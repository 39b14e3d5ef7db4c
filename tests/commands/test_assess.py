"""`hf-ibdistill assess`, on the table that the other commands left."""

import json

import pytest
from datasets import DatasetDict, load_from_disk
from running import run, run_on_terminal

from hf_ibdistill import assess_table


def test_figures_are_written_as_json(outputs, capsys, caplog):
    capsys.readouterr()
    run("assess", "--table", outputs.table, "--num_rows", "20", "--seed", "3", "--temperature", "2")
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {"rows", "metrics", "memorization", "ensemble_gain", "missing", "advice"}
    assert found["rows"] == {"labelled": 30, "unlabelled": 0, "validation": 12}
    expected = assess_table(dict(load_from_disk(outputs.table)), num_rows=20, seed=3, temperature=2.0)
    assert found.pop("advice") == [] and "without advice" in caplog.text
    assert found == expected


def test_a_terminal_has_a_table(outputs):
    _, lines = run_on_terminal(["-m", "hf_ibdistill.commands.assess", "--table", outputs.table], columns=200)
    metrics = assess_table(dict(load_from_disk(outputs.table)))["metrics"]
    labelled, validation = (f"{100 * metrics[group]['inv_accuracy']:.1f}" for group in ("labelled", "validation"))
    words = [line.split() for line in lines]
    assert ["inv", "accuracy", labelled, "%", validation, "%"] in words and ["images", "30", "12"] in words
    assert ["hf-ibdistill", "distill", "--dataset", str(outputs.table)] in [line[:4] for line in words]


def test_what_is_missing_is_reported_and_what_is_wrong_is_refused(outputs, tmp_path, capsys, caplog):
    tables = load_from_disk(outputs.table)
    tables["train"].save_to_disk(tmp_path / "train")
    capsys.readouterr()
    run("assess", "--table", tmp_path / "train")
    found = json.loads(capsys.readouterr().out)
    assert "validation" not in found["metrics"] and found["memorization"] == {} and found["ensemble_gain"] is None
    (sentence,) = found["missing"]
    assert "no validation split" in sentence and f"table={tmp_path / 'train'}: {sentence}" in caplog.text
    DatasetDict({"test": tables["test"]}).save_to_disk(tmp_path / "test")
    for arguments, message in (
        (["--table", outputs.images], r'tables\["train"\] has 30 rows of image, label, note'),
        (["--table", tmp_path / "test"], "tables has the splits test"),
        (["--table", tmp_path / "nothing"], "nothing"),
        (["--table", outputs.table, "--num_rows", "0"], "num_rows=0"),
        (["--table", outputs.table, "--temperature", "0"], "temperature=0"),
        (["--table", outputs.table, "--label_column", "kind"], 'label_column="kind"'),
    ):
        with pytest.raises(SystemExit, match=message):
            run("assess", *arguments)
