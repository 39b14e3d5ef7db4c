import json
import os
from importlib.metadata import version

import torch

from hf_ibdistill.publishing.machine import describe_machine


def test_the_machine_is_described_in_json():
    machine = json.loads(json.dumps(describe_machine()))
    assert machine["cores"] == os.cpu_count() and machine["memory_gb"] > 0
    assert len(machine.get("accelerators", [])) == torch.accelerator.device_count()
    assert machine["versions"]["transformers"] == version("transformers")
