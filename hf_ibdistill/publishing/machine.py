"""Describe the machine that figures were measured on."""

import os
import platform
from importlib.metadata import version
from pathlib import Path

import psutil
import torch


def describe_machine() -> dict:
    """The processor and its vector units, cores, memory, threads, and versions of the libraries that matter."""
    path = Path("/proc/cpuinfo")
    cpuinfo = path.read_text(encoding="utf-8") if path.exists() else ""
    models = [line.partition(":")[2].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    libraries = ("torch", "torchvision", "transformers", "datasets", "accelerate", "pyarrow", "numpy", "hf_ibdistill")
    return {
        "cpu": models[0] if models else platform.processor(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in libraries},
    }
