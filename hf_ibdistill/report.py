"""Tables and plots of measured results."""

import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import PIL.Image
import torch


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def mean_and_spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation over runs, in percent."""
    spread = f" ± {100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{100 * np.mean(values):.1f}{spread}"


def describe_machine() -> dict:
    """What figures were measured on: processor, cores, memory, threads, and versions of the libraries that matter."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = [line.partition(":")[2].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    libraries = ("torch", "torchvision", "transformers", "datasets", "accelerate", "pyarrow", "numpy", "hf_ibdistill")
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in libraries},
    }


def plot_run(
    path: str | Path,
    histories: Mapping[str, Sequence[Mapping[str, float]]],
    images: Sequence[PIL.Image.Image],
    true_names: Sequence[str],
    predictions: Mapping[str, Sequence[str]],
) -> None:
    """Draw the learning curves of some runs, and some images with what each token says of them.

    Args:
        path: the PNG file to write.
        histories: run → `trainer.state.log_history`, with evaluations in it.
        images: images to show.
        true_names: each image's class.
        predictions: token → its predicted class for each image.
    """
    # Not pyplot, which keeps figures and may want a display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6.5), layout="constrained")
    curves, gallery = figure.subfigures(2, 1, height_ratios=[3, 2])
    accuracy, loss = curves.subplots(1, 2)
    for name, history in histories.items():
        points = [entry for entry in history if "eval_accuracy" in entry]
        steps = [entry["step"] for entry in points]
        accuracy.plot(steps, [100 * entry["eval_accuracy"] for entry in points], label=name)
        loss.plot(steps, [entry["eval_negative_log_likelihood"] for entry in points], label=name)
    accuracy.set(xlabel="step", ylabel="validation accuracy (%)")
    loss.set(xlabel="step", ylabel="validation −log p (nats)", yscale="log")
    for axes in (accuracy, loss):
        axes.grid(alpha=0.3)
        axes.legend()
    for i, axes in enumerate(np.atleast_1d(gallery.subplots(1, len(images)))):
        axes.imshow(np.asarray(images[i]))
        axes.set(xticks=[], yticks=[])
        axes.set_title(f"true: {true_names[i]}", fontsize=9)
        lines = [f"{token}: {names[i]}" for token, names in predictions.items()]
        right = all(names[i] == true_names[i] for names in predictions.values())
        axes.set_xlabel("\n".join(lines), fontsize=8, color="black" if right else "crimson")
    figure.savefig(path, dpi=110)
