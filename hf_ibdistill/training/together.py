"""Train several models from one reading of the images."""

import itertools
import os
import queue
import random
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import DistributedType
from transformers import TrainerCallback, set_seed
from transformers.trainer_utils import TrainOutput

from ..data.classes import label_ids
from ..data.columns import IMAGE, LABEL
from ..logits.encoding import ROW_KEY
from ..rows import DistillationCollator, ImageRows, SharedCollator
from .checkpoints import checkpoints_to_resume
from .trainer import ImageClassificationTrainer


# What decides which images are in a batch, and how many batches there are; and what accelerate keeps once a process.
_SAME = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps", "views_per_image",
    "dataloader_drop_last", "train_sampling_strategy", "ignore_data_skip", "use_cpu", "bf16", "fp16",
)  # fmt: skip


def train_together(
    trainers: Sequence[ImageClassificationTrainer],
    resume_from_checkpoint: bool | Sequence[str | os.PathLike] | None = None,
) -> list[TrainOutput]:
    """Train several models from one reading of the table: an image is decoded once for all, and so is each of its views.

    On a CPU, the weights are bit-identical to those of `trainer.train()` for each trainer alone, if it is called right
    after the trainer was made. Models, seeds, learning rates, temperatures, teachers and image processors may differ. Each
    trainer evaluates for itself, and saves to an `output_dir` of its own.

    The trainers take turns, batch by batch, each in a thread of its own, and each with random states of its own. So one
    that a callback stops early does not disturb the others. An error in one ends all.

    Args:
        trainers: any trainers of this package, on the same table and views. Their seeds may differ, but not the order of
            the images: give the same `data_seed`.
        resume_from_checkpoint: `True` for the last step of which every `output_dir` has a whole checkpoint, or the folder
            of a checkpoint for each trainer, of the same step.

    Returns:
        For each trainer, what `train()` returns. `train_own_seconds` among its metrics is the time of its turns, without
        the reading of batches and without the others; `train_runtime` is the time of all.

    Raises:
        TypeError: a trainer is none of this package.
        ValueError: before the first step, if an argument differs that must not, two trainers share a model or a folder,
            checkpoints are of different steps, or there are streams, online teachers, several processes, collators of
            one's own, or reports to trackers that hold one run a process. Later, if a callback ends an epoch early.

    Example:

    ```python
    >>> trainers = [
    ...     EnsembleDistillationTrainer(
    ...         student, DistillationArguments(f"student_{seed}", seed=seed, data_seed=0), train_dataset=table,
    ...         eval_dataset=validation, processing_class=image_processor,
    ...     )
    ...     for seed, student in enumerate(students)
    ... ]
    >>> outputs = train_together(trainers)
    ```
    """
    trainers = list(trainers)
    _check(trainers)
    models = [trainer.model for trainer in trainers]
    folders = checkpoints_to_resume(resume_from_checkpoint, [t.args.output_dir for t in trainers], models)
    collator = SharedCollator([t.train_dataset for t in trainers], [t.processing_class for t in trainers])
    device = trainers[0].args.device
    before = _random_states(device)
    runs = [_Run(trainer, place, collator, folder) for place, (trainer, folder) in enumerate(zip(trainers, folders))]
    try:
        for run in runs:
            set_seed(run.trainer.args.seed)
            run.random_states = _random_states(device)
            run.turn()
        for shared in _read(runs):
            for run in runs:
                if not run.has_ended:
                    run.turn([collator.batch_of(run.place, batch) for batch in shared])
        return [run.output for run in runs]
    finally:
        for run in runs:
            run.end()
        _set_random_states(before, device)


def _read(runs: Sequence["_Run"]) -> Iterator[list[dict]]:
    """The batches that the runs that have not ended ask for."""
    source = None
    while asking := [run for run in runs if not run.has_ended]:
        first = asking[0]
        for run in asking:
            if (run.begins_epoch, run.num_batches) != (first.begins_epoch, first.num_batches):
                raise ValueError(
                    f"A callback of {first.name} or {run.name} ended its epoch early (should_epoch_stop=True), so they need "
                    "different batches. Train them one after another."
                )
        if first.begins_epoch:
            # Even if the trainer that it belongs to ends in this epoch.
            source = first.iterator
        yield list(itertools.islice(source, first.num_batches))


class _Stop(BaseException):
    """Ends the training of a run, because another one failed."""


class _StopCallback(TrainerCallback):
    """Ends a run that is stopped, such as by Ctrl+C, at its next batch."""

    def __init__(self, run: "_Run"):
        self.run = run

    def on_step_end(self, args, state, control, **kwargs):
        if self.run.is_stopped:
            raise _Stop

    on_substep_end = on_prediction_step = on_step_end


class _Run:
    """The training of one trainer, in a thread that goes on in its turns alone. A turn ends where the trainer asks for
    batches, or ends."""

    def __init__(self, trainer, place: int, collator: SharedCollator, checkpoint: str | None):
        self.trainer, self.place, self.collator, self.checkpoint = trainer, place, collator, checkpoint
        self.name = Path(trainer.args.output_dir).name
        self.random_states = self.output = self.error = self.iterator = None
        self.begins_epoch, self.num_batches, self.seconds = True, 0, 0.0
        self.has_ended = self.is_stopped = False
        self._given, self._asks = queue.SimpleQueue(), queue.SimpleQueue()
        self._callback = _StopCallback(self)
        # Not waited for if Ctrl+C is pressed twice.
        self._thread = threading.Thread(target=self._train, name=self.name, daemon=True)
        trainer.shared_reading = self
        trainer.add_callback(self._callback)

    def turn(self, batches: list[dict] | None = None) -> None:
        """Go on with these batches; the first turn has none."""
        device, start = self.trainer.args.device, time.perf_counter()
        _set_random_states(self.random_states, device)
        if batches is None:
            self._thread.start()
        else:
            self._given.put(batches)
        self.has_ended = self._asks.get()
        self.random_states = _random_states(device)
        self.seconds += time.perf_counter() - start
        if self.error is not None:
            raise self.error
        if self.output is not None:
            self.output.metrics["train_own_seconds"] = round(self.seconds, 4)

    def _train(self):
        try:
            self.output = self.trainer.train(resume_from_checkpoint=self.checkpoint)
        except BaseException as error:  # raised again by `turn`
            self.error = error
        finally:
            self._asks.put(True)

    def next_batches(self, iterator: Iterator, num_batches: int) -> list[dict]:
        """For the trainer, in its thread: the next batches of this epoch."""
        self.begins_epoch, self.iterator, self.num_batches = iterator is not self.iterator, iterator, num_batches
        self._asks.put(False)
        batches = self._given.get()
        if self.is_stopped:
            raise _Stop
        return batches

    def end(self) -> None:
        """Stop the run if it has not ended, and wait for it."""
        self.is_stopped = True
        if self._thread.is_alive():
            self._given.put([])
            self._thread.join()
        self.trainer.shared_reading = None
        self.trainer.remove_callback(self._callback)


def _random_states(device: torch.device) -> tuple:
    """Of python, numpy and torch."""
    on_device = None
    if device.type != "cpu":
        module = torch.get_device_module(device)
        on_device = getattr(module, "get_rng_state_all", module.get_rng_state)()
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), on_device


def _set_random_states(states: tuple, device: torch.device) -> None:
    of_python, of_numpy, of_torch, on_device = states
    random.setstate(of_python)
    np.random.set_state(of_numpy)
    torch.set_rng_state(of_torch)
    if device.type != "cpu":
        module = torch.get_device_module(device)
        getattr(module, "set_rng_state_all", module.set_rng_state)(on_device)


def _check(trainers: Sequence[ImageClassificationTrainer]) -> None:
    if not trainers:
        raise ValueError("trainers=[] has no trainer. Give at least one.")
    for trainer in trainers:
        if not isinstance(trainer, ImageClassificationTrainer):
            raise TypeError(
                f"trainers has a {type(trainer).__name__}. Give trainers of this package, such as "
                "EnsembleDistillationTrainer."
            )
        _refuse_unsupported(trainer)
    _refuse_shared(trainers)
    first = trainers[0]
    for other in trainers[1:]:
        for name in _SAME:
            _refuse_difference(name, first, other, *(getattr(t.args, name, None) for t in (first, other)))
        seeds = [t.args.seed if t.args.data_seed is None else t.args.data_seed for t in (first, other)]
        if seeds[0] != seeds[1]:
            raise ValueError(
                f"data_seed={seeds[0]} of {_name(first)} differs from data_seed={seeds[1]} of {_name(other)}; without one, "
                "it is the seed. The order of the images is the same for all. Give all the same data_seed."
            )
        rows, others = first.train_dataset, other.train_dataset
        _refuse_difference("views", first, other, rows.views, others.views)
        if not _same_images(rows, others):
            raise ValueError(
                f"train_dataset of {_name(first)} ({len(rows)} rows) and of {_name(other)} ({len(others)} rows) have different "
                "images, labels or orders of rows. Give all the same table."
            )


def _name(trainer) -> str:
    return trainer.args.output_dir


def _refuse_difference(name, first, other, value, another):
    if value != another:
        raise ValueError(
            f"{name}={value} of {_name(first)} differs from {name}={another} of {_name(other)}. All take the same batches: "
            f"give all the same {name}."
        )


def _refuse_shared(trainers):
    places = {
        "model": [id(trainer.model) for trainer in trainers],
        "output_dir": [str(Path(trainer.args.output_dir).resolve()) for trainer in trainers],
        "hub_model_id": [t.args.hub_model_id or str(Path(t.args.output_dir).resolve()) for t in trainers],
    }
    for name, values in places.items():
        for place, value in enumerate(values):
            if value in values[:place]:
                shown = f"{name}={_name(trainers[place])}" if name != "hub_model_id" else f"{name}={value}"
                raise ValueError(f"{shown}: two of the trainers have the same {name}. Give each its own.")


def _refuse_unsupported(trainer):
    args = trainer.args
    trackers = [name for name in args.report_to if name != "tensorboard"]
    events, distributed = os.environ.get("TENSORBOARD_LOGGING_DIR"), trainer.accelerator.distributed_type
    if trainer.train_dataset is not None:
        trainer._wrap_train_dataset()
    refused = {
        "train_dataset=None: there is nothing to read": trainer.train_dataset is None,
        "train_dataset is a stream, and only rows of a table can be shared": (
            trainer.train_dataset is not None and not isinstance(trainer.train_dataset, ImageRows)
        ),
        "teachers={…}: online teachers would run for each student": bool(getattr(trainer, "teachers", None)),
        f"world_size={args.world_size}, distributed_type={distributed.value}: students share a reading in one process": (
            args.world_size > 1 or distributed != DistributedType.NO
        ),
        f"data_collator={type(trainer.data_collator).__name__}: batches are made once for all": (
            type(trainer.data_collator) is not DistillationCollator
        ),
        "auto_find_batch_size=True: all take batches of the same size": args.auto_find_batch_size,
        "accelerator_config.use_seedable_sampler=False: the order of the images would not depend on data_seed": (
            not args.accelerator_config.use_seedable_sampler
        ),
        f"report_to={trackers}: this tracker holds one run a process. Use tensorboard": bool(trackers),
        f"TENSORBOARD_LOGGING_DIR={events} is one folder for all": bool(args.report_to and events),
    }
    for reason, is_refused in refused.items():
        if is_refused:
            raise ValueError(f"{_name(trainer)}: {reason}. Change it, or train the students one after another.")


def _same_images(rows: ImageRows, others: ImageRows) -> bool:
    """Whether they have the same labels and keys, and the same images in a sample of the rows."""
    table, other = rows.table, others.table
    if table is other:
        return True
    if len(table) != len(other) or (LABEL in table.column_names) != (LABEL in other.column_names):
        return False
    if LABEL in table.column_names and not np.array_equal(label_ids(table), label_ids(other)):
        return False
    columns = [IMAGE, *({ROW_KEY} & set(table.column_names) & set(other.column_names))]
    sample = np.unique(np.linspace(0, len(table) - 1, 16).astype(int))
    samples = [t.select_columns(columns).with_format("arrow")[sample] for t in (table, other)]
    return samples[0].to_pylist() == samples[1].to_pylist()
