"""The pictures of the study."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import PIL.Image
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator


# Those of Okabe and Ito, which color-blind readers can tell apart. There are too few for many lines.
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "black")
_MORE_COLORS = (*(f"C{i}" for i in range(10)), "black", "gold")
# In print and among many lines, colors alone are not enough.
_MARKERS = "os^Dv<>PXphd"


def plot_accuracy(
    path: str | Path,
    panels: Mapping[str, Mapping[str, Mapping[float, Sequence[float]]]],
    xlabel: str,
    highlight: str | None = None,
) -> None:
    """Draw accuracy against a quantity on a logarithmic axis: one line a method, with the standard deviation over seeds.
    Points of several methods at one quantity stand side by side. Two panels make a row.

    Args:
        path: the PNG file to write.
        panels: title → method → quantity → accuracies (0 … 1), one a seed. A method keeps its color in all panels, also
            if it has no quantities in some.
        xlabel: the quantity and its unit.
        highlight: a method to draw with a thicker line.
    """
    _plot_lines(path, panels, xlabel, highlight, panels_a_row=2, panel_size=(6.5, 4.8))


def plot_shifts(
    path: str | Path,
    panels: Mapping[str, Mapping[str, Mapping[float, Sequence[float]]]],
    highlight: str | None = None,
) -> None:
    """Draw accuracy against the strength of a change of the images, in the way of [`plot_accuracy`]. Four panels make a row, and
    all have one scale, so that a change that costs more is steeper.

    Args:
        path: the PNG file to write.
        panels: kind of change → method → strength → accuracies (0 … 1), one a seed. Strength 0 is no change.
        highlight: a method to draw with a thicker line.
    """
    xlabel = "strength (0: unchanged)"
    _plot_lines(path, panels, xlabel, highlight, panels_a_row=4, panel_size=(3.3, 3.3), is_linear=True)


def _plot_lines(path, panels, xlabel, highlight, panels_a_row, panel_size, is_linear=False):
    methods = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    colors = _COLORS if len(methods) <= len(_COLORS) else _MORE_COLORS
    rows, panels_a_row = -(-len(panels) // panels_a_row), min(panels_a_row, len(panels))
    width = panel_size[0] * panels_a_row
    columns = max(2, int(width / 3.2))
    height = panel_size[1] * rows + 0.22 * -(-len(methods) // columns)
    figure = Figure(figsize=(width, height), layout="constrained")
    every_axes = figure.subplots(rows, panels_a_row, squeeze=False, sharey=is_linear).flat
    for axes in every_axes[len(panels) :]:
        axes.remove()
    to_axis, from_axis = (np.float64, np.float64) if is_linear else (np.log, np.exp)
    drawn = {}
    for axes, (title, lines) in zip(every_axes, panels.items()):
        found = sorted({place for points in lines.values() for place in points})
        sharing = {place: [name for name in methods if place in lines.get(name, {})] for place in found}
        # A small part of the axis.
        step = (to_axis(found[-1]) - to_axis(found[0])) / 150 or 0.01
        for i, name in enumerate(methods):
            places = sorted(lines.get(name, {}))
            if not places:
                continue
            values = [100 * np.asarray(lines[name][place]) for place in places]
            spreads = [value.std(ddof=1) if len(value) > 1 else 0.0 for value in values]
            sides = [sharing[place].index(name) - (len(sharing[place]) - 1) / 2 for place in places]
            places = [from_axis(to_axis(place) + step * side) for place, side in zip(places, sides)]
            style = {"color": colors[i % len(colors)], "linestyle": "-" if i < len(colors) else "--"}
            style["zorder"] = 3 if name == highlight else 2
            style |= {"linewidth": 3 if name == highlight else 1.2, "capsize": 3}
            style |= {"marker": _MARKERS[i % len(_MARKERS)], "markersize": 6 if name == highlight else 4}
            drawn[name] = axes.errorbar(places, [value.mean() for value in values], spreads, **style)
        axes.set(xscale="linear" if is_linear else "log", xlabel=xlabel, ylabel="test accuracy (%)", title=title)
        are_few = is_linear or max(map(len, sharing.values())) > 1
        axes.xaxis.set_major_locator(FixedLocator(found) if are_few else LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.xaxis.set_minor_formatter("")
        axes.grid(alpha=0.3, which="both")
        if is_linear:
            axes.label_outer(remove_inner_ticks=False)
    names = [name for name in methods if name in drawn]
    figure.legend([drawn[name] for name in names], names, loc="outside lower center", ncols=columns, fontsize=8)
    figure.savefig(path, dpi=110)


def plot_attention(
    path: str | Path,
    images: Sequence[PIL.Image.Image],
    captions: Sequence[str],
    maps: Mapping[str, np.ndarray],
) -> None:
    """Draw the attention of each token: one row of images, below it one row for each token. Each map has its own scale.

    Args:
        path: the PNG file to write.
        images: N images.
        captions: N captions.
        maps: token → (N, height, width), its attention to the patches.
    """
    figure = Figure(figsize=(1.5 * len(images), 1.5 * (1 + len(maps))), layout="constrained")
    grid = figure.subplots(1 + len(maps), len(images), squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
    for i, image in enumerate(images):
        pixels = np.asarray(image.convert("RGB"))
        grid[0, i].imshow(pixels)
        grid[0, i].set_title(captions[i], fontsize=8)
        for axes, attention in zip(grid[1:, i], maps.values()):
            axes.imshow(pixels.mean(-1), cmap="gray", extent=(0, 1, 0, 1))
            axes.imshow(attention[i], cmap="inferno", alpha=0.7, extent=(0, 1, 0, 1), interpolation="bilinear")
    for axes, name in zip(grid[:, 0], ["image", *maps]):
        axes.set_ylabel(name, fontsize=9)
    figure.savefig(path, dpi=110)


def plot_corrections(
    path: str | Path,
    labels: np.ndarray,
    before: Sequence[np.ndarray],
    after: Sequence[np.ndarray],
    names: Sequence[str],
) -> None:
    """Draw how confusions change from one method to another.

    Each true (row) and predicted (column) class has the change of the number of images, mean over seeds. Blue is better:
    fewer confusions off the diagonal, more right ones on it.

    Args:
        path: the PNG file to write.
        labels: (N,) class ids.
        before, after: predicted class ids (N,), one array a seed.
        names: C class names.
    """

    def confusion(predictions):
        return np.bincount(labels * len(names) + predictions, minlength=len(names) ** 2).reshape(len(names), -1)

    change = np.mean([confusion(p) for p in after], axis=0) - np.mean([confusion(p) for p in before], axis=0)
    gain = np.where(np.eye(len(names), dtype=bool), change, -change)
    figure = Figure(figsize=(7.5, 6.5), layout="constrained")
    axes = figure.subplots()
    limit = max(1.0, np.abs(gain).max())
    axes.imshow(gain, cmap="RdBu", vmin=-limit, vmax=limit)
    for (i, j), value in np.ndenumerate(change):
        if abs(value) >= 1:
            color = "white" if abs(value) > 0.6 * limit else "black"
            axes.text(j, i, f"{value:+.0f}", ha="center", va="center", fontsize=8, color=color)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="predicted", ylabel="true")
    figure.savefig(path, dpi=110)
