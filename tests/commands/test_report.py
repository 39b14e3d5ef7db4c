"""`hf-ibdistill report`, on the runs that the other commands left."""

import shutil

import pytest
from running import run


def test_one_run_and_several(outputs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    student = shutil.copytree(outputs.student, tmp_path / "student")
    (student / "report.html").unlink()
    run("report", student)
    assert capsys.readouterr().out.strip() == str(student / "report.html")
    # Pictures of images that training left are in the page again.
    assert (student / "report.html").read_text().count("<img") == 5
    run("report", outputs.conv, student, outputs.inv)
    assert capsys.readouterr().out.strip() == "report.html"
    page = (tmp_path / "report.html").read_text()
    # No curves: nothing was evaluated during training.
    assert page.count("<img") == 2 and "--dataset DATASET" in page and str(tmp_path) not in page
    # The images, or the table that was recorded of them: the rows are the same.
    for dataset in (outputs.images, outputs.table):
        run("report", "--runs", outputs.conv, student, "--dataset", dataset, "--output_file", "out/both.html")
        assert (tmp_path / "out" / "both.html").read_text().count("<img") == 4


def test_mistakes_are_named(outputs, tmp_path):
    for arguments, message in (
        ([], "no run"),
        ([outputs.images], "images holds no results.json"),
        ([outputs.conv, outputs.conv], "given twice"),
        ([outputs.conv, "--dataset", "digits"], "dataset: runs=conv was measured on other rows"),
        ([outputs.conv, "--split", "test"], "unknown argument --split"),
    ):
        with pytest.raises(SystemExit, match=message):
            run("report", *arguments)
