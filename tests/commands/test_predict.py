"""`hf-ibdistill predict`: the classes of files, as transformers' pipeline predicts them."""

import csv
import json
import shutil
from collections import Counter

import pytest
from running import run
from small import image_bytes
from transformers import pipeline


@pytest.fixture
def photos(tmp_path):
    for number, name in enumerate(("b.png", "a.png", "deep/er/c.png")):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image_bytes(number))
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    return tmp_path / "photos"


def read(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_files_and_folders_are_predicted_as_by_a_pipeline(outputs, photos, tmp_path, capsys):
    extra = tmp_path / "extra.png"
    extra.write_bytes(image_bytes(9))
    flags = ["--model", outputs.student, "--top_k", "3", "--batch_size", "2", "--csv", tmp_path / "labels.csv"]
    run("predict", *flags, photos, extra)
    rows = read(tmp_path / "labels.csv")
    assert [row["file"] for row in rows] == [str(photos / name) for name in ("a.png", "b.png", "deep/er/c.png")] + [
        str(extra)
    ]
    classify = pipeline("image-classification", str(outputs.student))
    for row in rows:
        expected = classify(row["file"], top_k=3)
        assert [row[name] for name in ("class", "class_2", "class_3")] == [found["label"] for found in expected]
        probabilities = [float(row[name]) for name in ("probability", "probability_2", "probability_3")]
        assert probabilities == pytest.approx([found["score"] for found in expected], abs=1e-3)
    # A file takes the place of a line for each image.
    report = json.loads(capsys.readouterr().out)
    assert report["images"] == 4 and report["classes"] == Counter(row["class"] for row in rows)
    run("predict", "--model", outputs.student, "--top_k", "3", photos, extra)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 4 and printed[0].startswith(f"{photos / 'a.png'}: {rows[0]['class']} ")
    # The order of flags and files does not matter.
    run("predict", extra, "--model", outputs.student)
    assert capsys.readouterr().out == f"{printed[3].partition(',')[0]}\n"
    run("predict", "--model", outputs.student, "--images", extra)
    assert capsys.readouterr().out == f"{printed[3].partition(',')[0]}\n"


def test_files_that_cannot_be_read_are_named(outputs, photos, caplog, capsys):
    (photos / "b.png").write_bytes(b"damaged")
    run("predict", "--model", outputs.conv, photos)
    assert len(capsys.readouterr().out.splitlines()) == 2 and str(photos / "b.png") in caplog.text


def test_a_model_that_returns_tuples(outputs, photos, tmp_path, capsys):
    run("predict", "--model", outputs.student, photos)
    expected = capsys.readouterr().out
    folder = shutil.copytree(outputs.student, tmp_path / "tuples")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "return_dict": False}))
    run("predict", "--model", folder, photos)
    assert capsys.readouterr().out == expected


def test_mistakes_are_named(outputs, photos, tmp_path):
    (tmp_path / "empty").mkdir()
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(b"damaged")
    for arguments, message in (
        ([], "nothing to predict"),
        ([tmp_path / "gone.png"], "gone.png does not exist"),
        ([tmp_path / "empty"], "empty holds no image"),
        ([damaged], "None of 1 files can be read"),
        ([photos, "--top_k", "4"], "top_k=4"),
        ([photos, "--images", photos], "unknown argument"),
        ([photos, "--topk", "2"], "unknown argument --topk; the nearest is --top_k"),
    ):
        with pytest.raises(SystemExit, match=message):
            run("predict", "--model", outputs.conv, *arguments)
