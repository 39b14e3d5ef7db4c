"""Two processes take the steps of one and leave its metrics.

Run as a script, this file starts both processes.
"""

import json
import os
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, load_from_disk
from distilling import (
    PROCESSOR,
    assert_same_weights,
    distill,
    logged,
    plain_vit,
    small_images,
    small_student,
    small_teachers,
    with_columns,
)
from running import ENVIRONMENT, ROOT, run_process
from torch.multiprocessing import start_processes
from transformers import AutoModelForImageClassification

from hf_ibdistill import (
    IBResNetForImageClassification,
    IBViTForImageClassification,
    ViewRecipe,
    evaluate_and_save,
    evaluate_model,
)


# Settings of one process of two; both together have 8 rows a step.
SCENARIOS = {
    "plain": {"per_device_train_batch_size": 4},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "averaged by process": {"per_device_train_batch_size": 4, "average_tokens_across_devices": False},
    "hard": {"per_device_train_batch_size": 4, "distillation_mode": "hard", "label_smoothing_factor": 0.1},
    "online": {"per_device_train_batch_size": 4, "online": True},
    # Batches without any label among them.
    "few labels": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "hidden": 11},
    "few labels, no tokens": {"per_device_train_batch_size": 4, "hidden": 11, "unlabelled_target": "teachers",
                              "student": "plain student"},
    "several views": {"per_device_train_batch_size": 4, "views_per_image": 2, "views": ViewRecipe(4, horizontal_flip=0.5)},
}  # fmt: skip


def run_scenario(folder, output_dir, online=False, hidden=0, student="student", **settings):
    """Train from what is saved in the folder: 2 steps, then an evaluation. The labels of the first rows may be hidden."""
    table = load_from_disk(folder / "table")
    train = Dataset.from_dict(
        {**table[:], "label": [None] * hidden + table["label"][hidden:]}, features=table.features
    )
    if online:
        settings["teachers"] = {
            name: (IBResNetForImageClassification.from_pretrained(folder / name), PROCESSOR)
            for name in ("conv", "inv")
        }
    model = AutoModelForImageClassification.from_pretrained(folder / student)
    settings = {"learning_rate": 0.1, "eval_dataset": table, "per_device_eval_batch_size": 4, **settings}
    trainer = distill(output_dir, train, model, **settings)
    return trainer, trainer.evaluate()


def save_inputs(folder):
    teachers = small_teachers()
    with_columns(small_images(), teachers).save_to_disk(folder / "table")
    # 13 rows, which neither batches of 4 nor two processes divide, under other names.
    test = with_columns(small_images(13, seed=1), teachers)
    test.rename_columns({"image": "picture", "label": "animal"}).save_to_disk(folder / "test")
    small_student().save_pretrained(folder / "student")
    plain_vit().save_pretrained(folder / "plain student")
    for name, (model, _) in teachers.items():
        model.save_pretrained(folder / name)


def test_two_processes_take_the_steps_of_one_and_leave_its_metrics(tmp_path, monkeypatch):
    save_inputs(tmp_path)
    monkeypatch.setitem(ENVIRONMENT, "PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
    run_process(__file__, tmp_path)
    for name, settings in SCENARIOS.items():
        start = AutoModelForImageClassification.from_pretrained(
            tmp_path / settings.get("student", "student")
        ).state_dict()
        settings = {**settings, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
        trainer, results = run_scenario(tmp_path, tmp_path / "one", **settings)
        distributed = json.loads((tmp_path / name / "logs.json").read_text())
        assert distributed["processes"] == 2 and trainer.args.world_size == 1
        assert trainer.state.global_step == distributed["steps"] == 2
        model = AutoModelForImageClassification.from_pretrained(tmp_path / name)
        assert_same_weights(model, trainer.model, rtol=1e-4, atol=1e-5)
        assert max((tensor - start[key]).abs().max() for key, tensor in model.state_dict().items()) > 0.01, name
        np.testing.assert_allclose(distributed["logged"], logged(trainer), rtol=1e-4, err_msg=name)
        assert distributed["results"]["eval_loss"] == pytest.approx(results["eval_loss"], rel=1e-4), name
        assert distributed["results"].keys() == results.keys()
        for metric in [metric for metric in results if metric.endswith("accuracy")]:
            assert distributed["results"][metric] == results[metric], name

    # What `evaluate_and_save` left.
    saved = tmp_path / "saved"
    results = json.loads((saved / "results.json").read_text())
    assert results["recipe"]["processes"] == 2 and results["recipe"]["steps"] == 2
    model = IBViTForImageClassification.from_pretrained(saved)
    assert_same_weights(model, IBViTForImageClassification.from_pretrained(tmp_path / "plain"), rtol=0, atol=0)
    expected = evaluate_model(model, PROCESSOR, load_from_disk(tmp_path / "test"), batch_size=4)
    # No row is counted twice, though each process needs as many batches as the other.
    assert results["metrics"] == pytest.approx(expected, rel=1e-5)
    for rank in (0, 1):
        assert json.loads((tmp_path / f"returned-{rank}.json").read_text()) == results["metrics"]
    assert (saved / "README.md").exists()
    assert not [path for path in saved.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")]


def work(rank, folder, port):
    """One of the two processes, with the environment that a launcher sets."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    for name, settings in SCENARIOS.items():
        output_dir = folder / ("saved" if name == "plain" else name)
        trainer, results = run_scenario(folder, output_dir, **settings)
        if trainer.is_world_process_zero():
            trainer.accelerator.unwrap_model(trainer.model).save_pretrained(folder / name)
            logs = {"processes": trainer.args.world_size, "steps": trainer.state.global_step}
            logs |= {"logged": logged(trainer), "results": results}
            (folder / name / "logs.json").write_text(json.dumps(logs))
        if name == "plain":
            test = load_from_disk(folder / "test")
            metrics = evaluate_and_save(trainer, test, "test", title="A student", data_name="animals")
            (folder / f"returned-{trainer.args.process_index}.json").write_text(json.dumps(metrics))


if __name__ == "__main__":
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    # Forks of this process need not import the libraries, which takes longer than the steps.
    start_processes(work, (Path(sys.argv[1]), port), nprocs=2, start_method="fork")
