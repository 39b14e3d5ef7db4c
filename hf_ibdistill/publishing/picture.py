"""The picture that a run leaves: learning curves, and images with the prediction of each token."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import PIL.Image
from matplotlib.figure import Figure


def plot_run(
    path: str | Path,
    histories: Mapping[str, Sequence[Mapping[str, float]]],
    images: Sequence[PIL.Image.Image],
    true_names: Sequence[str],
    predictions: Mapping[str, Sequence[str]],
) -> None:
    """Draw the learning curves of some runs, and some images with the prediction of each token.

    Args:
        path: the PNG file to write.
        histories: run → `trainer.state.log_history`, with evaluations in it.
        images: images to show.
        true_names: each image's class.
        predictions: token → its predicted class for each image.
    """
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
