"""Commands started in new processes, as from a clone by torchrun or accelerate."""

import json

import numpy as np
import pytest
import yaml
from datasets import load_from_disk
from running import ENVIRONMENT, ROOT, run_process

from .conftest import QUICK


# `python scripts/NAME.py` looks for modules in scripts/ first, and evaluate.py would hide the library of that name. Here both
# are done as by Python, so that one start is enough. `accelerate launch --cpu --num_processes 2` would start one process only.
TWO_PROCESSES = """
import contextlib, runpy, sys

scripts, images, table, student, *teachers = sys.argv[1:]

def script(name, *arguments):
    sys.path.insert(0, scripts)
    sys.argv = [f"{scripts}/{name}.py", *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")

with contextlib.suppress(SystemExit):
    script("evaluate", "--help")
script("record", "--dataset", images, "--teachers", *teachers, "--output_dir", table)
sys.argv = ["distill", "--dataset", table, "--use_cpu", "--max_steps", "2", "--eval_strategy", "no", "--output_dir", student]
runpy.run_module("hf_ibdistill.commands.distill", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(autouse=True)
def no_accelerator(monkeypatch):
    monkeypatch.setitem(ENVIRONMENT, "CUDA_VISIBLE_DEVICES", "")


def test_two_processes_record_and_train(outputs, tmp_path):
    (tmp_path / "job.py").write_text(TWO_PROCESSES)
    folders = [tmp_path / "table", tmp_path / "student"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    job = [tmp_path / "job.py", ROOT / "scripts", outputs.images, *folders, *outputs.teachers]
    printed, errors = run_process(*launcher, *job, with_errors=True)
    assert "usage: hf-ibdistill evaluate" in printed and printed.count('"rows": 30') == 1
    # One process shows what both do, and neither shows a bar.
    assert errors.count("train student: 2 steps") == errors.count("record train: ") == 1 and "\r" not in errors
    alone, shared = load_from_disk(outputs.table), load_from_disk(tmp_path / "table")
    for split, table in alone.items():
        assert shared[split].column_names == table.column_names
        for name in ("conv_logits", "inv_logits"):
            # Batches of other sizes may round differently.
            np.testing.assert_allclose(shared[split][name][:], table[name][:], atol=2e-3)
    results = json.loads((tmp_path / "student" / "results.json").read_text())
    assert (results["recipe"]["processes"], results["recipe"]["steps"]) == (2, 2)
    assert results["metrics"].keys() == json.loads((outputs.student / "results.json").read_text())["metrics"].keys()


def test_accelerate_launches_a_command_with_a_file_of_arguments(outputs, tmp_path):
    arguments = {
        "dataset": str(outputs.table),
        "output_dir": str(tmp_path / "student"),
        "max_steps": 7,
        "temperature": 2,
    }
    (tmp_path / "distill.yaml").write_text(yaml.safe_dump(arguments))
    launcher = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "hf_ibdistill.commands.distill"]
    printed = run_process(*launcher, "--config", tmp_path / "distill.yaml", *QUICK)
    results = json.loads((tmp_path / "student" / "results.json").read_text())
    assert (results["recipe"]["steps"], results["recipe"]["temperature"]) == (1, [2.0])
    assert json.dumps(results["metrics"], indent=2) in printed
