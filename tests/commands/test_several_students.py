"""`distill --students`: each student is that of a separate command."""

import json

import pytest
import yaml
from running import run

from .conftest import QUICK


SMALL, LARGE = (
    {"name": "small", "hidden_size": 32, "temperature": [2, 4]},
    {"name": "large", "hidden_size": 64, "seed": 3},
)
STEPS = ["--max_steps", "3", "--eval_strategy", "no", "--disable_tqdm"]


def separately(outputs, folder, *flags):
    run("distill", "--dataset", outputs.table, *STEPS, *flags, "--output_dir", folder)
    return (folder / "model.safetensors").read_bytes()


def test_students_are_those_of_separate_commands(outputs, tmp_path, capsys):
    shared = ["--dataset", outputs.table, *STEPS, "--save_strategy", "steps", "--save_steps", "2"]
    vit = {"student_config": ["vit", "patch_size=4", "hidden_size=24", "num_hidden_layers=1"], "learning_rate": 1e-3}
    vit["student_config"] += ["num_attention_heads=2", "intermediate_size=48"]
    students = [yaml.safe_dump(one, default_flow_style=True, width=1000).strip() for one in (SMALL, LARGE, vit)]
    run("distill", *shared, "--students", *students, "--output_dir", tmp_path / "several")
    shown = json.loads(capsys.readouterr().out)
    assert list(shown) == ["small", "large", "student_2"]
    for name, facts in shown.items():
        results = json.loads((tmp_path / "several" / name / "results.json").read_text())
        assert results["metrics"]["accuracy"] == facts["accuracy"] and results["parameters"] == facts["parameters"]
        assert facts["train_own_seconds"] > 0 and "in one pass" in results["notes"]
    flags = {
        "small": ["--hidden_size", "32", "--temperature", "2", "4"],
        "large": ["--hidden_size", "64", "--seed", "3", "--data_seed", "42"],  # 42 is the seed of transformers
        "student_2": ["--student_config", *vit["student_config"], "--learning_rate", "1e-3"],
    }
    for name, own in flags.items():
        found = (tmp_path / "several" / name / "model.safetensors").read_bytes()
        assert found == separately(outputs, tmp_path / name, *own), name
    # Resumed from step 2.
    before = (tmp_path / "several" / "large" / "model.safetensors").read_bytes()
    for name in shown:
        (tmp_path / "several" / name / "model.safetensors").unlink()
        for path in (tmp_path / "several" / name / "checkpoint-3").iterdir():
            path.unlink()
    run("distill", *shared, "--resume_from_checkpoint", "true", "--students", *students, "--output_dir", tmp_path / "several")  # fmt: skip
    assert (tmp_path / "several" / "large" / "model.safetensors").read_bytes() == before


def test_a_file_lists_students(outputs, tmp_path, capsys):
    settings = {
        "dataset": str(outputs.table), "max_steps": 1, "eval_strategy": "no", "output_dir": str(tmp_path / "several"),
        "students": [{**SMALL, "teacher_names": ["inv"], "temperature": 2.5}, {"student": str(outputs.student)}],
    }  # fmt: skip
    (tmp_path / "students.yaml").write_text(yaml.safe_dump(settings))
    run("distill", "--config", tmp_path / "students.yaml", "--disable_tqdm")
    assert list(json.loads(capsys.readouterr().out)) == ["small", "student_1"]
    recipe = json.loads((tmp_path / "several" / "small" / "results.json").read_text())["recipe"]
    assert recipe["temperature"] == [2.5] and recipe["model"]["teacher_names"] == ["inv"]
    base = json.loads((tmp_path / "several" / "student_1" / "results.json").read_text())["base_model"]
    assert base == outputs.student.name


@pytest.mark.parametrize(
    ("students", "expected"),
    [
        (["small"], "students=small is no mapping"),
        (["{a: ["], r"students=\{a: \[ is no mapping"),
        (["{name: a}", "{name: a}"], "name=a is given twice"),
        (["{name: ../a}"], r"name=\.\./a "),
        (["{dataset: digits}"], "dataset is the same for all"),
        (["{num_views: 3}"], "num_views is the same for all"),
        (["{config: x.yaml}"], "config is the same for all"),
        (["{output_dir: x}"], "output_dir is the same for all"),
        (["{hidden_sice: 3}"], "students=.*--hidden_sice; the nearest is --hidden_size"),
        (["{hidden_size: many}"], "students=.*many"),
        (["{student: x, hidden_size: 3}"], "students=.*hidden_size=3 has no effect with student=x"),
        (["{name: a}", "{name: b, per_device_train_batch_size: 8}"], "per_device_train_batch_size=64.*=8"),
        (["{name: a}", "{name: b, max_steps: 2}"], "max_steps=1.*max_steps=2"),
    ],
)
def test_what_differs_is_checked(students, expected, outputs, tmp_path):
    flags = ["--dataset", outputs.table, *QUICK, "--output_dir", tmp_path / "several"]
    with pytest.raises(SystemExit, match=expected):
        run("distill", *flags, "--students", *students)
    assert not list(tmp_path.rglob("*.safetensors"))
