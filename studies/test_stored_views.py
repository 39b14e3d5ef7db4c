"""The study of stored views."""

import json

import pytest

from studies import stored_views


def test_methods_are_measured_and_a_finished_seed_is_not_run_again(tmp_path, capsys):
    few = ["--images_per_class", "3", "--num_views", "2", "--teacher_steps", "1", "--student_steps", "1"]
    flags = [*few, "--output_dir", str(tmp_path), "--seeds", "0"]
    stored_views.main(flags)
    accuracies = json.loads((tmp_path / "seed_0" / "accuracies.json").read_text())
    finished = {name: 0.01 * i for i, name in enumerate(accuracies)}
    (tmp_path / "seed_1").mkdir()
    (tmp_path / "seed_1" / "accuracies.json").write_text(json.dumps(finished))
    capsys.readouterr()
    stored_views.main([*flags, "1"])
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert "seeds 0 1" in header and len(rows) == 7
    for row, name in zip(rows, accuracies, strict=True):
        title, _, values = (cell.strip() for cell in row.split("|")[1:-1])
        expected = [100 * accuracies[name], 100 * finished[name]]
        assert title == name and [float(value) for value in values.split()] == pytest.approx(expected, abs=0.051)
