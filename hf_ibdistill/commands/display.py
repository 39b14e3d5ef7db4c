"""What a command shows: one progress display for each stage, and a table with the next command at the end."""

import dataclasses
import json
import logging
import os
import re
import shlex
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import datasets
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.utils import logging as transformers_logging

from ..files import is_address
from ..progress import Progress


# Messages of libraries that a user can do nothing about: warnings by their text, and log records by their logger and text.
_SILENCED_WARNINGS = [
    # Pillow, about a PNG or GIF file of such colors. Decoding takes its colors without the transparency, as of other files.
    "Palette images with Transparency expressed in bytes",
]
_SILENCED_RECORDS = {
    # On a machine with the CUDA toolkit but no GPU, when a model is compiled for the CPU. Nothing is missing.
    "torch.utils.cpp_extension": "No CUDA runtime is found",
}


@contextmanager
def displaying() -> Iterator[None]:
    """While a command runs: lines about progress are shown, and the bars and messages of libraries are not."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    levels = {"hf_ibdistill.progress": logging.INFO}
    if os.environ.get("LOCAL_RANK", "0") != "0":
        # Every process opens the same data and models. In recording, each has rows of its own.
        levels |= {"hf_ibdistill": logging.ERROR, "hf_ibdistill.recording": logging.WARNING}
    with ExitStack() as stack:
        stack.enter_context(_without_library_bars())
        # Otherwise a message would be written into a bar.
        stack.enter_context(logging_redirect_tqdm())
        stack.enter_context(warnings.catch_warnings())
        for text in _SILENCED_WARNINGS:
            warnings.filterwarnings("ignore", re.escape(text))
        for name, text in _SILENCED_RECORDS.items():
            silence = partial(_is_other_record, text)
            logging.getLogger(name).addFilter(silence)
            stack.callback(logging.getLogger(name).removeFilter, silence)
        for name, level in levels.items():
            stack.callback(logging.getLogger(name).setLevel, logging.getLogger(name).level)
            logging.getLogger(name).setLevel(level)
        yield


def _is_other_record(text, record):
    return not record.getMessage().startswith(text)


@contextmanager
def _without_library_bars():
    """Hide the bars of datasets, one for each step of opening a table, and of transformers, one for each file of weights.
    Those of downloads and uploads stay; they hide themselves where there is no terminal."""
    shows_datasets, shows_transfers = not datasets.are_progress_bars_disabled(), not are_progress_bars_disabled()
    shows_transformers = transformers_logging.is_progress_bar_enabled()
    if shows_datasets:
        datasets.disable_progress_bars()
    if shows_transformers:
        transformers_logging.disable_progress_bar()
        if shows_transfers:
            enable_progress_bars()
    try:
        yield
    finally:
        if shows_datasets:
            datasets.enable_progress_bars()
        if shows_transformers:
            transformers_logging.enable_progress_bar()


class _TrainingDisplay(TrainerCallback):
    """The progress of training, in place of transformers' bars and dictionaries."""

    def __init__(self, name: str):
        self.name, self.notes, self.progress = name, {}, None

    def on_train_begin(self, args, state, control, **kwargs):
        images = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        shown = {"is_shown": state.is_world_process_zero, "has_bar": not args.disable_tqdm}
        self.progress = Progress(self.name, state.max_steps, "steps", images_per_unit=images, **shown)
        self.progress.skip(state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.notes["loss"] = f"loss {logs['loss']:.3g}"

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if "eval_accuracy" in metrics:
            self.notes["accuracy"] = f"validation accuracy {100 * metrics['eval_accuracy']:.1f} %"

    def on_step_end(self, args, state, control, **kwargs):
        self.progress.update(state.global_step - self.progress.count, ", ".join(self.notes.values()))

    def on_train_end(self, args, state, control, **kwargs):
        self.progress.note = self.notes.get("accuracy", "")
        self.progress.finish()


@contextmanager
def training_display(trainer: Trainer, name: str, *others: Trainer) -> Iterator[None]:
    """Show the training of this trainer, and of others that train together with it, as one stage of this name."""
    display = _TrainingDisplay(name)
    for one in (trainer, *others):
        for callback in (ProgressCallback, PrinterCallback):
            one.remove_callback(callback)
    trainer.add_callback(display)
    try:
        yield
    finally:
        trainer.remove_callback(display)
        if display.progress is not None:
            display.progress.close()


def show_results(facts: Mapping, header: Sequence[str], rows: Sequence[Sequence], *following: Sequence[str]) -> None:
    """Print a table and commands that may follow on a terminal, and elsewhere the facts as JSON, which scripts read."""
    if sys.stdout.isatty():
        print(f"\n{text_table(header, rows)}")
        if following:
            print(f"\n{next_commands(*following)}")
    else:
        print(json.dumps(facts, indent=2))


def next_commands(*commands: Sequence[str]) -> str:
    """Commands, each the words after `hf-ibdistill`, as lines to copy."""
    return "\n".join(
        ["Next:", *(f"  hf-ibdistill {' '.join(shlex.quote(str(word)) for word in words)}" for words in commands)]
    )


def text_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table of aligned columns, numbers to the right."""
    cells = [[str(cell) for cell in line] for line in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in cells]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * len(widths) - 2), *lines[1:]])


def metric_rows(*columns: Mapping[str, float]) -> list[list[str]]:
    """A row for each metric, with a cell for each of these metrics of a split or model."""
    names = dict.fromkeys(name for metrics in columns for name in metrics)
    return [[name.replace("_", " "), *(metric_text(name, metrics.get(name)) for metrics in columns)] for name in names]


def metric_text(name: str, value: float | None) -> str:
    """A metric as it is shown: shares in percent."""
    if value is None:
        return "–"
    is_share = name.endswith(("accuracy", "agreement", "calibration_error", "memorization", "gain"))
    return f"{100 * value:.1f} %" if is_share else f"{value:.3f}"


def uses_of(folder: str) -> list[list[str]]:
    """Commands that use the model in a folder."""
    return [["predict", "--model", folder, "IMAGES"], ["push", "--folder", folder, "--repo_id", "USER/NAME"]]


def data_flags(data: object) -> list[str]:
    """The flags that open the same images again: the arguments that are not the defaults."""
    flags = []
    for field in dataclasses.fields(data):
        value = getattr(data, field.name)
        if value != field.default:
            values = value if isinstance(value, list) else [] if value is True else [value]
            flags += [f"--{field.name}", *map(str, values)]
    return flags


def teacher_flags(folder: str) -> list[str]:
    """The flags that record the teacher in a folder, under the name of the folder if it can be one."""
    name = re.sub(r"\W", "_", Path(folder).resolve().name)
    return ["--teachers", f"{name}={folder}"]


def beside(folder: str, name: str) -> str:
    """A folder of this name beside another, or beside the others if that is an address."""
    return str(Path("outputs" if is_address(folder) else Path(folder).parent) / name)
