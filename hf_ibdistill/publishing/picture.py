"""The pictures that a run leaves, as PNG: learning curves, confused classes, calibration, examples, attention.

Each is as wide as a card. Lines have the colors of Okabe and Ito, which any color vision tells apart, and differ in markers and
dashes as well. A class whose name the font cannot draw has its number.
"""

import io
import unicodedata
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import matplotlib
import numpy as np
import PIL.Image
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.ticker import LogLocator, MaxNLocator

from ..evaluation import accuracy_interval, calibration_bins


COLORS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000")
_RIGHT, _WRONG = "#0072B2", "#D55E00"
_MARKERS, _DASHES = "osD^vPX*", ("-", "--", "-.", ":")
# A card is about 800 pixels wide; twice the pixels would be twice the bytes.
_WIDTH, _DPI = 8.0, 140
# Classes that a matrix has room for, and lines that a list has.
MATRIX_CLASSES, _LIST = 30, 20
_STYLE = {
    "font.size": 9,
    "axes.labelsize": 9,
    "axes.titlesize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.family": "DejaVu Sans",
    "figure.facecolor": "white",
}


class Example(NamedTuple):
    """An image with lines of text below it, each with whether it is right; `None` is neither."""

    image: PIL.Image.Image
    lines: Sequence[tuple[str, bool | None]]


def _figure(height: float) -> Figure:
    return Figure(figsize=(_WIDTH, height), layout="constrained")


def _png(figure: Figure) -> bytes:
    # `savefig` would draw twice, add transparency, and compress for as long as it draws.
    figure.set_dpi(_DPI)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    content = io.BytesIO()
    PIL.Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").save(content, "PNG", compress_level=3)
    return content.getvalue()


def _styled(draw):
    """Let a function that returns a figure return its PNG, in the style of this module."""

    def drawn(*args, **kwargs):
        with matplotlib.rc_context(_STYLE):
            figure = draw(*args, **kwargs)
            return None if figure is None else _png(figure)

    drawn.__name__, drawn.__doc__, drawn.__wrapped__ = draw.__name__, draw.__doc__, draw
    return drawn


@lru_cache
def _letters() -> frozenset[int]:
    return frozenset(get_font(findfont("DejaVu Sans")).get_charmap())


def in_font(name: str) -> bool:
    """Whether the font that matplotlib ships draws the name. It joins no letters, as Arabic needs, and writes no line from
    right to left."""
    return all(ord(c) in _letters() and unicodedata.bidirectional(c) not in ("R", "AL") for c in name)


def shorten(name: str, length: int = 22) -> str:
    """A name in one line of at most this many letters; its begin and its end stay."""
    name = " ".join(name.split())
    if len(name) <= length:
        return name
    end = (length - 1) // 2
    return f"{name[: length - 1 - end]}…{name[-end:]}"


def drawn_names(names: Sequence[str], length: int = 22) -> list[str]:
    """What a picture shows of the names of classes: the names, shortened, or numbers of those that the font cannot draw."""
    return [
        _plain(shorten(name, length)) if in_font(name) and name.strip() else f"#{i}" for i, name in enumerate(names)
    ]


def _plain(text: str) -> str:
    # Dollars would begin a formula.
    return text.replace("$", r"\$")


def _line_style(i: int) -> dict:
    return {"color": COLORS[i % len(COLORS)], "linestyle": _DASHES[i % len(_DASHES)]}


def _legend(figure: Figure, handles: Mapping[str, object]) -> None:
    # A label that begins with "_" would be left out.
    labels = [f" {_plain(shorten(name, 40))}" for name in handles]
    columns = min(len(labels), 2 if max(map(len, labels)) > 24 else 4)
    figure.legend(list(handles.values()), labels, loc="outside lower center", ncols=columns, frameon=False)


# Learning curves


def curve(history: Sequence[Mapping[str, object]], *names: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values, (P,) each, of the first of these names that a `log_history` has; empty if it has none."""
    for name in names:
        points = [(entry["step"], entry[name]) for entry in history if entry.get(name) is not None and "step" in entry]
        if points:
            steps, values = np.asarray(points, float).T
            return steps, values
    return np.empty(0), np.empty(0)


_ACCURACY, _LIKELIHOOD = ("eval_accuracy",), ("eval_negative_log_likelihood", "eval_loss")


@_styled
def plot_curves(histories: Mapping[str, Sequence[Mapping[str, object]]]) -> Figure | None:
    """Draw the accuracy and the loss on the validation split against steps. Of a single run, the training loss as well.

    Args:
        histories: run → `trainer.state.log_history`.

    Returns:
        A PNG; `None` if there is nothing to draw.
    """
    curves = {name: (curve(h, *_ACCURACY), curve(h, *_LIKELIHOOD)) for name, h in histories.items()}
    (only,) = histories if len(histories) == 1 else (None,)
    training = curve(histories[only], "loss") if only is not None else (np.empty(0), np.empty(0))
    if not len(training[0]) and not any(len(steps) for pair in curves.values() for steps, _ in pair):
        return None
    figure = _figure(3.1)
    accuracy, loss = figure.subplots(1, 2)
    handles = {}
    for i, (name, (accuracies, losses)) in enumerate(curves.items()):
        name = "validation" if name == only else name
        for axes, (steps, values), scale in ((accuracy, accuracies, 100), (loss, losses, 1)):
            if len(steps):
                handles[name] = _draw_curve(axes, steps, scale * values, i)
    if len(training[0]):
        handles["training loss"] = _draw_curve(loss, *training, 1)
    accuracy.set(xlabel="step", ylabel="validation accuracy (%)")
    loss.set(xlabel="step", ylabel="loss (nats)" if len(training[0]) else "validation −log p (nats)")
    for axes in (accuracy, loss):
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if not axes.lines:
            _say(axes, "no evaluation during training")
    if loss.lines and all((np.nan_to_num(line.get_ydata(), nan=1.0) > 0).all() for line in loss.lines):
        loss.set_yscale("log")
        loss.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        loss.yaxis.set_major_formatter("{x:g}")
        loss.yaxis.set_minor_formatter("")
    _legend(figure, handles)
    return figure


def _draw_curve(axes, steps, values, i):
    # A picture has no room for more points.
    every = -(-len(steps) // 1000)
    kept = np.arange(len(steps) - 1, -1, -every)[::-1]
    marker = _MARKERS[i % len(_MARKERS)] if len(kept) <= 30 else None
    (line,) = axes.plot(steps[kept], values[kept], marker=marker, markersize=4, linewidth=1.5, **_line_style(i))
    return line


def _say(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color="0.35")


# Classes


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """(C, C), the number of rows of each true (row) and predicted (column) class."""
    pairs = labels.astype(np.int64) * num_classes + predicted
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def confused_pairs(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> list[tuple[int, int, int]]:
    """(true class, predicted class, rows) of every confusion, the most frequent first; without a matrix, because that of many
    classes is large."""
    wrong = labels != predicted
    pairs, counts = np.unique(labels[wrong].astype(np.int64) * num_classes + predicted[wrong], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return [(*divmod(int(pairs[i]), num_classes), int(counts[i])) for i in order]


def class_accuracies(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """The accuracy, NaN without rows, and the number of rows of each class: (C,), (C,)."""
    rows = np.bincount(labels, minlength=num_classes)
    right = np.bincount(labels[labels == predicted], minlength=num_classes)
    return np.where(rows > 0, right / np.maximum(rows, 1), np.nan), rows


@_styled
def plot_classes(labels: np.ndarray, predicted: np.ndarray, class_names: Sequence[str]) -> Figure:
    """Draw the confusion matrix and the accuracy of each class. Of more than 30 classes, draw the most frequent confusions and
    the lowest accuracies.

    Args:
        labels, predicted: (N,), class ids.
        class_names: C names.
    """
    if len(class_names) > MATRIX_CLASSES:
        return _plot_many_classes(labels, predicted, class_names)
    count, names = len(class_names), drawn_names(class_names)
    matrix = confusion_matrix(labels, predicted, count)
    accuracies, rows = class_accuracies(labels, predicted, count)
    figure = _figure(1.9 + 0.24 * count if count < 6 else 1.4 + 0.27 * count)
    axes, bars = figure.subplots(1, 2, sharey=True, width_ratios=[2.6, 1])
    shares = matrix / np.maximum(rows, 1)[:, None]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    # A number takes milliseconds, and room.
    if count <= 15 and count * len(str(matrix.max())) <= 60:
        for i, j in zip(*matrix.nonzero()):
            color, size = "white" if shares[i, j] > 0.55 else "black", 8 if count <= 12 else 7
            axes.text(j, i, str(matrix[i, j]), ha="center", va="center", fontsize=size, color=color, in_layout=False)
    is_long = max(map(len, names)) * count > 60
    turned = {"rotation": 45 if count <= 12 else 90, "ha": "right" if count <= 12 else "center"} if is_long else {}
    axes.set_xticks(
        range(count), names, **(turned | {"rotation_mode": "anchor"} if count <= 12 and turned else turned)
    )
    axes.set_yticks(range(count), names)
    axes.set(xlabel="predicted class", ylabel="true class")
    axes.grid(False)
    axes.spines[:].set_visible(True)
    _draw_accuracies(bars, accuracies, rows)
    bars.tick_params(left=False)
    return figure


def _draw_accuracies(axes, accuracies, rows):
    """A bar for each class, from the top, with its number of rows."""
    places = np.arange(len(accuracies))
    axes.barh(places, 100 * np.nan_to_num(accuracies), color=COLORS[0], height=0.75)
    for place, accuracy, count in zip(places, accuracies, rows):
        is_inside = count > 0 and accuracy > 0.5
        style = {
            "color": "white" if is_inside else "black",
            "ha": "right" if is_inside else "left",
            "in_layout": False,
        }
        at = 100 * accuracy - 2 if is_inside else 100 * np.nan_to_num(accuracy) + 2
        axes.text(at, place, "no rows" if count == 0 else f"{100 * accuracy:.0f}", va="center", fontsize=8, **style)
    axes.set(xlabel="accuracy (%)", xlim=(0, 100), ylim=(len(accuracies) - 0.5, -0.5))
    axes.grid(axis="y", visible=False)


def _plot_many_classes(labels, predicted, class_names):
    names = drawn_names(class_names, 20)
    pairs = confused_pairs(labels, predicted, len(class_names))[:_LIST]
    accuracies, rows = class_accuracies(labels, predicted, len(class_names))
    lowest = np.argsort(accuracies, kind="stable")[: min(_LIST, int((rows > 0).sum()))]
    figure = _figure(0.8 + 0.2 * max(len(pairs), len(lowest)))
    axes, bars = figure.subplots(1, 2, width_ratios=[1.2, 1])
    axes.barh(range(len(pairs)), [count for *_, count in pairs], color=_WRONG, height=0.75)
    axes.set_yticks(range(len(pairs)), [f"{names[true]} → {names[taken]}" for true, taken, _ in pairs], fontsize=7)
    axes.set(xlabel="rows", title="most frequent confusions, true → predicted")
    axes.set_ylim(max(len(pairs), 1) - 0.5, -0.5)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.grid(axis="y", visible=False)
    if not pairs:
        _say(axes, "no row is wrong")
    _draw_accuracies(bars, accuracies[lowest], rows[lowest])
    bars.set_yticks(range(len(lowest)), [names[i] for i in lowest], fontsize=7)
    bars.set_title("classes of lowest accuracy")
    return figure


@_styled
def plot_class_differences(accuracies: Mapping[str, np.ndarray], class_names: Sequence[str]) -> Figure:
    """Draw how the accuracy of each class differs from that of the first run. Of more than 30 classes, draw those that differ
    most.

    Args:
        accuracies: run → (C,), NaN for a class without rows.
        class_names: C names.
    """
    (_, first), *others = accuracies.items()
    differences = 100 * (np.array([values for _, values in others]) - first)
    largest = np.nan_to_num(np.abs(differences)).max(axis=0)
    chosen = np.sort(np.argsort(-largest, kind="stable")[:MATRIX_CLASSES])
    names = drawn_names(class_names)
    figure = _figure(1.3 + 0.22 * len(chosen))
    axes, handles = figure.subplots(), {}
    places = np.arange(len(chosen))
    for i, ((name, _), values) in enumerate(zip(others, differences), 1):
        shift = 0.5 * (i - (len(others) + 1) / 2) / len(others)
        color, marker = COLORS[i % len(COLORS)], _MARKERS[i % len(_MARKERS)]
        axes.hlines(places + shift, 0, values[chosen], color=color, linewidth=1.5)
        (handles[name],) = axes.plot(values[chosen], places + shift, marker, color=color, markersize=5)
    axes.axvline(0, color="0.2", linewidth=1)
    axes.set_yticks(places, [names[i] for i in chosen])
    axes.set(xlabel=f"accuracy minus that of {_plain(shorten(next(iter(accuracies)), 40))} (points)")
    axes.set_ylim(len(chosen) - 0.5, -0.5)
    _legend(figure, handles)
    return figure


# Calibration


@_styled
def plot_calibration(runs: Mapping[str, tuple[np.ndarray, np.ndarray]], num_bins: int = 15) -> Figure:
    """Draw the accuracy against the confidence, in the bins of the expected calibration error, and how many rows have which
    confidence.

    Args:
        runs: run → confidence (N,), and whether the prediction is right (N,).
        num_bins: number of bins.
    """
    figure = _figure(3.3)
    axes, counts = figure.subplots(1, 2, width_ratios=[1.3, 1])
    (diagonal,) = axes.plot([0, 100], [0, 100], color="0.5", linewidth=1, linestyle=":")
    handles = {}
    for i, (name, (confidence, is_right)) in enumerate(runs.items()):
        rows, confidences, right = calibration_bins(confidence, is_right, num_bins).numpy()
        used = rows > 0
        error = np.abs(right - confidences).sum() / max(rows.sum(), 1)
        x, y = 100 * confidences[used] / rows[used], 100 * right[used] / rows[used]
        low, high = 100 * accuracy_interval(right[used], rows[used])
        style = _line_style(i)
        axes.vlines(x, low, high, color=style["color"], linewidth=1, alpha=0.6)
        (line,) = axes.plot(x, y, marker=_MARKERS[i % len(_MARKERS)], markersize=4, linewidth=1.5, **style)
        handles[f"{shorten(name, 26)}: ECE {error:.3f}"] = line
        counts.stairs(100 * rows / max(rows.sum(), 1), np.linspace(0, 100, num_bins + 1), linewidth=1.5, **style)
    axes.set(xlabel="confidence (%)", ylabel="accuracy (%)", xlim=(0, 101), ylim=(0, 101))
    counts.set(xlabel="confidence (%)", ylabel="rows (%)", xlim=(0, 101))
    counts.set_ylim(bottom=0)
    _legend(figure, {**handles, "confidence = accuracy": diagonal})
    return figure


# Images


# The square of an image in inches and, without its margin, in pixels; and the letters of a line below it.
_CELL = _WIDTH / 6
_SIDE = round(0.92 * _CELL * _DPI)
LETTERS = 24


def _fit(image: PIL.Image.Image) -> np.ndarray:
    """The image in the middle of a square, enlarged or reduced to what the picture shows."""
    side, image = _SIDE, image.convert("RGB")
    scale = side / max(image.size)
    size = tuple(max(1, round(scale * length)) for length in image.size)
    image = image.resize(size, PIL.Image.Resampling.NEAREST if scale > 1 else PIL.Image.Resampling.LANCZOS)
    square = PIL.Image.new("RGB", (side, side), "white")
    square.paste(image, ((side - size[0]) // 2, (side - size[1]) // 2))
    return np.asarray(square)


def _grid(rows: Sequence[tuple[str, Sequence[tuple[np.ndarray, Sequence[tuple[str, bool | None]]]]]]) -> Figure:
    """Rows of up to 6 squares, each with a title above and lines of text below. One axes, because each takes a tenth of a
    second."""
    line, title = 0.15, 0.27
    heights = [
        (title if name else 0) + _CELL + line * max(len(lines) for _, lines in cells) + 0.06 for name, cells in rows
    ]
    figure = Figure(figsize=(_WIDTH, sum(heights)))
    axes = figure.add_axes((0, 0, 1, 1))
    top = sum(heights)
    for (name, cells), height in zip(rows, heights):
        y = top - (title if name else 0)
        if name:
            axes.text(0.05, y + 0.06, _plain(name), fontsize=9, weight="bold", va="bottom")
        for i, (pixels, lines) in enumerate(cells):
            left, margin = i * _CELL, 0.04 * _CELL
            extent = (left + margin, left + _CELL - margin, y - _CELL + margin, y - margin)
            axes.imshow(pixels, extent=extent, interpolation="antialiased")
            for j, (text, is_right) in enumerate(lines):
                color = {None: "black", True: _RIGHT, False: _WRONG}[is_right]
                place = (left + margin, y - _CELL - line * j)
                axes.text(*place, _plain(shorten(text, LETTERS)), fontsize=6.8, color=color, va="top")
        top -= height
    axes.set(xlim=(0, _WIDTH), ylim=(0, sum(heights)), aspect="auto")
    axes.axis("off")
    return figure


@_styled
def plot_examples(groups: Mapping[str, Sequence[Example]]) -> Figure:
    """Draw images with lines of text.

    Args:
        groups: title → up to 6 examples, a row of the picture.
    """
    return _grid([(title, [(_fit(image), lines) for image, lines in group]) for title, group in groups.items()])


@_styled
def plot_attention(examples: Sequence[Example], maps: Mapping[str, np.ndarray]) -> Figure:
    """Draw the attention of each token on top of the images, a row for each token. Each map has its own scale.

    Args:
        examples: up to 6 examples.
        maps: token → (N, height, width), its attention to the patches.
    """
    images, colors = [_fit(image) for image, _ in examples], matplotlib.colormaps["cividis"]
    rows = [("image", [(pixels, lines[:1]) for pixels, (_, lines) in zip(images, examples)])]
    for token, attention in maps.items():
        cells = []
        for pixels, (image, _), values in zip(images, examples, attention):
            values = (values - values.min()) / max(float(np.ptp(values)), 1e-12)
            shown = PIL.Image.fromarray((255 * colors(values)[..., :3]).round().astype(np.uint8))
            # Smoothly to the size in the picture, which `_fit` then keeps.
            scale = _SIDE / max(image.size)
            size = [max(1, round(scale * length)) for length in image.size]
            shown = _fit(shown.resize(size, PIL.Image.Resampling.BILINEAR))
            gray = np.repeat(pixels.mean(-1, keepdims=True), 3, axis=-1)
            cells.append(((0.4 * gray + 0.6 * shown).round().astype(np.uint8), []))
        rows.append((token, cells))
    return _grid(rows)
