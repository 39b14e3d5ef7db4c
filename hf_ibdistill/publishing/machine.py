"""Describe the machine that figures were measured on."""

import os
import platform
from importlib.metadata import version
from pathlib import Path

import psutil
import torch


def describe_machine() -> dict:
    """The processor and its vector units, accelerators, cores, memory, threads, and versions of the libraries that
    matter."""
    path = Path("/proc/cpuinfo")
    cpuinfo = path.read_text(encoding="utf-8") if path.exists() else ""
    models = [line.partition(":")[2].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    libraries = ("torch", "torchvision", "transformers", "datasets", "accelerate", "pyarrow", "numpy", "hf_ibdistill")
    return {
        "cpu": models[0] if models else platform.processor(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        **_accelerators(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in libraries},
    }


def _accelerators() -> dict[str, list[str]]:
    if not torch.accelerator.is_available():
        return {}
    device = torch.accelerator.current_accelerator()
    # Not every kind of device has names.
    name = getattr(torch.get_device_module(device), "get_device_name", lambda index: device.type)
    return {"accelerators": [name(index) for index in range(torch.accelerator.device_count())]}
