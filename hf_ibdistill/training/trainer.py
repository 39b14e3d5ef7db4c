"""The trainers: one for any classifier on labels alone, one for a student on stored logits or online teachers."""

import itertools
import logging
from collections.abc import Mapping, Sequence
from contextlib import contextmanager

import torch
from accelerate.state import GradientState
from datasets import Dataset, IterableDataset
from transformers import BaseImageProcessor, PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..data.classes import check_class_names, check_labels, class_names, config_class_names, labelled_rows
from ..data.columns import LABEL, as_image_table, require_table
from ..evaluation import RunningMetrics
from ..images.views import ViewRecipe
from ..logits.encoding import check_teacher_names, column_name, describe_column, recorded_teachers
from ..logits.provenance import check_columns, check_files, stored_views
from ..processes import once_a_machine
from ..rows import DistillationCollator, ImageRows, SeveralViews, StreamedImageRows
from ..teachers import ClassMapping, TeacherLike, load_teachers, require_model
from .arguments import DistillationArguments, ImageTrainingArguments
from .checkpoints import checkpoint_to_resume, saved_names
from .losses import ensemble_distillation_loss
from .publishing import PublishingTrainer


logger = logging.getLogger(__name__)


_BATCH_NORMS = torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.SyncBatchNorm


class _StartEpoch(TrainerCallback, ExportableState):
    """Switches the training rows to the views of the epoch, even if training resumes in the middle of it.

    A stream has no length, so its epochs are its passes. A checkpoint holds the number of the pass and its first step.
    """

    def __init__(self):
        self.passes, self.first_step, self.has_ended, self.step_before = 0, 0, False, 0

    def state(self) -> dict:
        return {"args": {}, "attributes": {"passes": self.passes, "first_step": self.first_step}}

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        self.passes, self.first_step = 0, 0
        if isinstance(_rows_of(train_dataloader), StreamedImageRows) and state.global_step > 0:
            saved = state.stateful_callbacks.get(type(self).__name__)
            if saved is None:
                logger.warning(
                    "The checkpoint does not hold its place in the stream. Training goes on at the first row."
                )
                self.first_step = state.global_step
            else:
                self.passes, self.first_step = (saved["attributes"][name] for name in ("passes", "first_step"))
            train_dataloader.skip_batches = (state.global_step - self.first_step) * args.gradient_accumulation_steps

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        self.has_ended, self.step_before = False, state.global_step
        rows = _rows_of(train_dataloader)
        # `state.epoch` is a sum of fractions that may end just below the whole number.
        is_streamed = isinstance(rows, StreamedImageRows)
        rows.start_epoch(self.passes if is_streamed else int((state.epoch or 0) + 1e-6))

    def on_step_end(self, args, state, control, **kwargs):
        if GradientState().end_of_dataloader:
            self._end_pass(state)

    def on_epoch_end(self, args, state, control, train_dataloader=None, **kwargs):
        if not isinstance(_rows_of(train_dataloader), StreamedImageRows):
            return
        if state.global_step == self.step_before:
            if not train_dataloader.skip_batches:
                raise ValueError(
                    f"The stream has fewer rows than one step takes: {args.gradient_accumulation_steps} batches of "
                    f"{args.train_batch_size} on each of {args.world_size} processes. Take smaller steps, or more rows."
                )
            # Training resumed at the end of a pass. `Trainer` takes that for an empty stream.
            control.should_training_stop = False
        train_dataloader.skip_batches = 0
        if not self.has_ended and not control.should_training_stop:
            self._end_pass(state)

    def _end_pass(self, state):
        self.passes, self.first_step, self.has_ended = self.passes + 1, state.global_step, True


def _rows_of(loader) -> ImageRows | StreamedImageRows:
    rows = loader.dataset
    while not isinstance(rows, (ImageRows, StreamedImageRows)):
        rows = rows.dataset  # accelerate shares a stream among processes by a dataset around it
    return rows


class ImageClassificationTrainer(PublishingTrainer):
    """transformers' `Trainer` on tables of images: decodes, preprocesses and batches rows, and measures accuracy.

    Trains teachers, and students without teachers, by plain cross-entropy. Rows without a label (null or −1) are left out,
    with a warning.

    Args:
        model: any image classifier.
        args: training arguments. `remove_unused_columns` has no effect and is set to `False`. Without a `compute_metrics`,
            metrics are counted batch by batch (`batch_eval_metrics`). Evaluation never drops the last batch.
        train_dataset: a table with an image and a `ClassLabel` column. It may be a stream (an `IterableDataset`), which
            `shuffle_buffer_size` of the arguments shuffles.
        eval_dataset: such a table, or name → table.
        processing_class: the image processor of the model, saved with every checkpoint.
        image_column: the image column of the tables; found if not given.
        label_column: the label column of the tables; found if not given.
        views: train on these views of the images, view number `epoch` of each. Evaluation uses the images as they are.
        kwargs: as for `Trainer`.

    The attributes `train_dataset` and `eval_dataset` hold [`ImageRows`], made once; `train_dataset.table` is the table.
    A table that is assigned to them later is checked and wrapped before its first use. A table for `evaluate` or
    `predict` is wrapped for that call.

    Raises:
        TypeError: a table is not a `datasets.Dataset`.
        ValueError: before the first step, if columns cannot be found, a table is empty, model and table differ in their
            classes, or an argument has no effect on images.
    """

    default_arguments = ImageTrainingArguments
    _learns_from_unlabelled = False
    # Set by `train_together` while several trainers share one reading of the images.
    shared_reading = None

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: TrainingArguments | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: BaseImageProcessor | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        views: ViewRecipe | None = None,
        **kwargs,
    ):
        if not isinstance(processing_class, BaseImageProcessor):
            raise ValueError(
                f"processing_class={processing_class!r}, but the trainer needs the image processor of the model. Pass "
                "processing_class=image_processor."
            )
        if model is not None:
            require_model(model)
        if args is not None and not isinstance(args, TrainingArguments):
            raise TypeError(f"args={args!r} are no TrainingArguments. Pass args={self.default_arguments.__name__}(…).")
        if args is None:
            args = self.default_arguments("trainer_output", eval_strategy="no" if eval_dataset is None else "epoch")
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        # Rows hold what the collator needs and nothing else; `Trainer` would remove it, because no model takes it.
        self.args.remove_unused_columns = False
        self.image_column, self.label_column = image_column, label_column
        self.views = self._given_views = views
        self._wrapped: dict[str, tuple[ImageRows | StreamedImageRows, tuple]] = {}
        self.add_callback(_StartEpoch())
        self._refuse_arguments_without_effect()
        # `Trainer` looks for them in the signature, which a compiled model does not have.
        self.label_names = ["labels"]
        if self.compute_metrics is None:
            self.compute_metrics = RunningMetrics(getattr(self.model.config, "teacher_names", None))
        if self._is_student:
            # It would smooth the fused prediction; `compute_loss` smooths each head.
            self.label_smoother = None
        self._prepare()
        if kwargs.get("data_collator") is None:
            self.data_collator = self._build_collator()
        self._wrap_train_dataset()
        self._wrap_eval_dataset()

    def _prepare(self) -> None:
        """Check what the constructor was given, before any table is read."""

    def _refuse_arguments_without_effect(self) -> None:
        args = self.args
        refused = {
            f"label_names={args.label_names}: a batch has its labels under the name labels": (
                args.label_names not in (None, ["labels"])
            ),
            f"train_sampling_strategy={args.train_sampling_strategy}: images have no length": (
                "length" in args.train_sampling_strategy
            ),
            f"neftune_noise_alpha={args.neftune_noise_alpha}: it is noise for embeddings of words": (
                args.neftune_noise_alpha is not None
            ),
            f"problem_type={self.model.config.problem_type}: a row has one class": (
                self.model.config.problem_type not in (None, "single_label_classification")
            ),
            "preprocess_logits_for_metrics without compute_metrics: the metrics of this trainer need the logits": (
                self.preprocess_logits_for_metrics is not None and self.compute_metrics is None
            ),
        }
        for reason, is_refused in refused.items():
            if is_refused:
                raise ValueError(f"{reason}. Leave it out.")

    @property
    def _measures_tokens(self) -> bool:
        return isinstance(self.compute_metrics, RunningMetrics)

    @property
    def _is_student(self) -> bool:
        return bool(getattr(self.model.config, "teacher_names", None))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        checkpoint = checkpoint_to_resume(resume_from_checkpoint, self.args.output_dir, self.model)
        self._wrap_train_dataset()
        # `_StartEpoch` finds the place in a stream; `Trainer` would count the batches of all passes.
        ignores = self.args.ignore_data_skip or isinstance(self.train_dataset, StreamedImageRows)
        with self._arguments(ignore_data_skip=ignores):
            return super().train(checkpoint, *args, **kwargs)

    @contextmanager
    def _arguments(self, **changes):
        """Other arguments for a while, because the user's may serve another trainer."""
        given = {name: getattr(self.args, name) for name in changes}
        vars(self.args).update(changes)
        try:
            yield
        finally:
            vars(self.args).update(given)

    # `Trainer` offers no other place where it reads weights back.
    def _load_from_checkpoint(self, *args, **kwargs):
        with saved_names(self.model):
            super()._load_from_checkpoint(*args, **kwargs)

    def _load_best_model(self):
        with saved_names(self.model):
            super()._load_best_model()

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        if self.shared_reading is not None:
            epoch_iterator = iter(self.shared_reading.next_batches(epoch_iterator, num_batches))
        if self._counts_rows:
            batches, num_items = list(itertools.islice(epoch_iterator, num_batches)), None
        else:
            batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if 0 < len(batches) < num_batches and isinstance(self.train_dataset, StreamedImageRows):
            # `Trainer` would add their gradient to the next step.
            if (self.state.epoch or 0) < 1:
                logger.warning(
                    "The last %d batches of a pass do not fill a step of gradient_accumulation_steps=%d and are left out.",
                    len(batches),
                    num_batches,
                )
            return [], None
        if self._counts_rows and batches and "labels" in batches[0]:
            num_items = torch.tensor(sum(len(batch["labels"]) for batch in batches), device=device)
            if self.args.average_tokens_across_devices and self.args.world_size > 1:
                num_items = self.accelerator.gather(num_items).sum()
        self.loss_is_scaled_for_ga = num_items is not None
        return batches, num_items

    @property
    def _counts_rows(self) -> bool:
        """Whether `compute_loss` gets the number of rows in the accumulated batch, not the number that `Trainer` counts for
        models that divide by it themselves."""
        return not self.model_accepts_loss_kwargs and self.compute_loss_func is None

    def _share(self, labels, num_items_in_batch) -> torch.Tensor | float:
        """The weight of the mean over these rows in the accumulated batch of all processes."""
        share = len(labels) / num_items_in_batch
        # DDP averages gradients, and `Trainer` the reported loss.
        return share * self.accelerator.num_processes if self.args.average_tokens_across_devices else share

    def evaluation_loop(self, *args, **kwargs):
        with self._arguments(batch_eval_metrics=self.args.batch_eval_metrics or self._measures_tokens):
            return super().evaluation_loop(*args, **kwargs)

    def predict(self, *args, **kwargs):
        """As `Trainer.predict`, with the fused logits (N, C) of a student as `predictions`."""
        output = super().predict(*args, **kwargs)
        is_tuple = self._is_student and isinstance(output.predictions, tuple)
        return output._replace(predictions=output.predictions[0]) if is_tuple else output

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self._is_student and self.compute_loss_func is None and model.training:
            inputs = {**inputs, "label_smoothing": self.args.label_smoothing_factor}
        if not (self._counts_rows and model.training and num_items_in_batch is not None):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"]
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        loss = loss * self._share(labels, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _build_collator(self) -> DistillationCollator:
        return DistillationCollator(self.processing_class)

    @property
    def _class_names(self) -> list[str]:
        return config_class_names(self.model.config)

    def get_train_dataloader(self):
        self._wrap_train_dataset()
        loader = super().get_train_dataloader()
        if not isinstance(self.train_dataset, StreamedImageRows) and len(loader) == 0:
            raise ValueError(
                f"dataloader_drop_last=True leaves no batch: the training set has {len(self.train_dataset)} rows, a step takes "
                f"{self.args.train_batch_size * self.args.world_size}. Set it to False, or take smaller batches."
            )
        if self._last_batch_has_one_row() and any(isinstance(m, _BATCH_NORMS) for m in self.model.modules()):
            logger.warning(
                "The last batch of an epoch has one row, which batch norm may not be able to normalize. Set "
                "dataloader_drop_last=True, or take another batch size than %d.",
                self.args.train_batch_size,
            )
        if self.shared_reading is not None:
            getattr(loader, "base_dataloader", loader).collate_fn = self.shared_reading.collator
        return self._with_own_generator(loader)

    # `Trainer` offers no other place to choose the order of the rows.
    def _get_train_sampler(self, train_dataset=None):
        rows = self.train_dataset if train_dataset is None else train_dataset
        if self._views_per_image == 1 or not isinstance(rows, ImageRows):
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return SeveralViews(rows, None if self.args.train_sampling_strategy == "sequential" else seed)

    @property
    def _views_per_image(self) -> int:
        return getattr(self.args, "views_per_image", 1)

    def _last_batch_has_one_row(self) -> bool:
        is_streamed = isinstance(self.train_dataset, StreamedImageRows)
        if is_streamed or self.args.dataloader_drop_last or self._views_per_image > 1:
            return False
        return self.args.train_batch_size > 1 and len(self.train_dataset) % self.args.train_batch_size == 1

    def _with_own_generator(self, loader):
        # Otherwise loaders would draw seeds from the generator that dropout uses, and more of them after resuming.
        getattr(loader, "base_dataloader", loader).generator = torch.Generator().manual_seed(self.args.seed)
        return loader

    def get_eval_dataloader(self, eval_dataset=None):
        with self._all_rows():
            if eval_dataset is None or isinstance(eval_dataset, str) or eval_dataset is self.eval_dataset:
                self._wrap_eval_dataset()
                name = eval_dataset if isinstance(eval_dataset, str) else None
                known = list(self.eval_dataset) if isinstance(self.eval_dataset, dict) else []
                if name is not None and name not in known:
                    raise ValueError(
                        f'eval_dataset="{name}" is none of the evaluation sets {known}. Pass one, or a table.'
                    )
                return self._with_own_generator(super().get_eval_dataloader(name))
            # Not `Trainer.get_eval_dataloader`: with persistent workers it returns the loader of the table before.
            loader = super().get_test_dataloader(self._rows(eval_dataset, "evaluation set"))
            return self._with_own_generator(loader)

    def get_test_dataloader(self, test_dataset):
        with self._all_rows():
            return self._with_own_generator(super().get_test_dataloader(self._rows(test_dataset, "test set")))

    @contextmanager
    def _all_rows(self):
        """While a loader for evaluation is made: it has every row, and metrics begin at the first."""
        if self._measures_tokens:
            self.compute_metrics.reset()
        with self._arguments(dataloader_drop_last=False):
            yield

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        if ignore_keys is None and self._measures_tokens:
            # Our own metrics need each token; those of a user get the fused prediction alone.
            ignore_keys = ["hidden_states", "attentions"]
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def _wrap_train_dataset(self) -> None:
        if self.train_dataset is not None:
            self.train_dataset = self._wrap(self.train_dataset, "training set", is_training=True)

    def _wrap_eval_dataset(self) -> None:
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = {
                name: self._wrap(table, f'evaluation set "{name}"') for name, table in self.eval_dataset.items()
            }
        elif self.eval_dataset is not None:
            self.eval_dataset = self._wrap(self.eval_dataset, "evaluation set")

    def _wrap(self, table, what: str, is_training: bool = False) -> ImageRows | StreamedImageRows:
        """The rows of a table that the trainer keeps; made once for each table."""
        rows, settings = self._wrapped.get(what, (None, None))
        # A hyperparameter search may change the temperatures, at which rows decode top-k logits.
        if table is not rows or settings != (self._temperatures, self._views_per_image):
            rows = self._rows(table, what, is_training)
            self._wrapped[what] = rows, (self._temperatures, self._views_per_image)
            # `Trainer` keeps loaders with persistent workers, which would go on with the rows before.
            getattr(self, "_eval_dataloaders", {}).clear()
        return rows

    def _rows(
        self, table: Dataset | IterableDataset | ImageRows | StreamedImageRows, what: str, is_training: bool = False
    ) -> ImageRows | StreamedImageRows:
        """Check a table and make its rows."""
        columns = self.image_column, self.label_column
        if isinstance(table, (ImageRows, StreamedImageRows)):
            # Rows for training have other views and logits than rows for evaluation. Their table has passed the door.
            table, columns = table.table, (None, None)
        require_table(table, f"The {what}", streams=is_training)
        is_streamed = isinstance(table, IterableDataset)
        if not is_streamed and len(table) == 0:
            raise ValueError(f"The {what} is empty; it needs at least one row.")
        takes_unlabelled = is_training and self._learns_from_unlabelled
        try:
            once_a_machine(lambda: check_files(table, quickly=True))
            # With a weight of the labels, a column that is not found is a mistake.
            needs_label = not takes_unlabelled or self.args.label_weight > 0
            table = as_image_table(table, *columns, needs_label=needs_label)
            has_labels = LABEL in table.column_names
            if has_labels:
                check_class_names(self._class_names, class_names(table), "the model")
            if has_labels and not is_streamed:
                # A row that is left out of a test set would shift the predictions of all rows after it.
                if takes_unlabelled or what == "test set":
                    # Their number, because the labels would be sent to every process.
                    once_a_machine(lambda: len(check_labels(table, unlabelled=takes_unlabelled)))
                else:
                    table = labelled_rows(table, f"The {what}")
            logits = self._logits_columns(table, is_training)
        except ValueError as error:
            raise ValueError(f"The {what}: {error}") from error
        views = self.views if is_training else None
        given = (table, [LABEL] if has_labels else [], logits, self.model.config.num_labels, views)
        given += (self._temperatures, self._views_per_image if is_training else 1)
        if not is_streamed:
            # A test set is read once.
            return ImageRows(*given, keeps_images=what != "test set")
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        buffer_size = getattr(self.args, "shuffle_buffer_size", 0)
        return StreamedImageRows(
            *given,
            buffer_size=buffer_size,
            seed=seed,
            labelled_only=not takes_unlabelled,
        )

    _temperatures = None

    def _logits_columns(self, table: Dataset | IterableDataset, is_training: bool) -> list[str]:
        """The logits columns to read from the table, after they were checked."""
        return []


class EnsembleDistillationTrainer(ImageClassificationTrainer):
    """Distills teachers into a student by [`ensemble_distillation_loss`].

    An `IBViTForImageClassification` has a token for each teacher. The prediction of any other image classifier answers the
    labels and every teacher. Rows without a label (null or −1) learn from the teachers alone; see
    `unlabelled_target`. With `label_weight=0`, a table needs no label column.

    The teachers' logits come from the columns that `record_teacher_logits` wrote. With `teachers`, they come from running
    the teachers in every step. Each term of the loss is logged under its own name: `label_loss` and `<teacher>_loss`.

    A table that was recorded on views is trained on view by view, one each epoch, with the logits of that view. A table
    of logits of the images as they are can be trained on `views`; every view then has the logits of its image.
    Evaluation needs no logits columns. Without them, its loss is the term of the labels alone.

    Args:
        model: the student, any image classifier.
        args: [`DistillationArguments`].
        teacher_names: the teachers to learn from. By default those of the student's tokens; for a student without tokens
            those of `teachers`, or all that the training set has logits of.
        teachers: name → Hub id, folder, model loaded by `from_pretrained`, or (model, image processor), for online
            distillation, on `views` if given. `None` reads the columns.
        teacher_classes: for `teachers`, as in [`record_teacher_logits`].
        kwargs: as for [`ImageClassificationTrainer`].

    Raises:
        TypeError: `args` are not [`DistillationArguments`], or a table is not a `datasets.Dataset`.
        ValueError: before the first step, if there are no teachers, they are not those of the tokens, a logits column is
            missing or does not fit, there is not one weight or temperature for each teacher, or teachers, student and data
            differ in their classes.

    Example:

    ```python
    >>> trainer = EnsembleDistillationTrainer(
    ...     model=student, args=DistillationArguments("student", temperature=4.0), train_dataset=table,
    ...     eval_dataset=validation, processing_class=image_processor,
    ... )
    >>> output = trainer.train()
    ```
    """

    default_arguments = DistillationArguments
    _learns_from_unlabelled = True
    _counts_rows = True

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: DistillationArguments | None = None,
        *,
        teachers: Mapping[str, TeacherLike] | None = None,
        teacher_names: Sequence[str] | None = None,
        teacher_classes: Mapping[str, ClassMapping] | None = None,
        **kwargs,
    ):
        if teacher_classes is not None and teachers is None:
            raise ValueError(
                f"teacher_classes={teacher_classes!r} has no effect without teachers={{…}}: recorded logits are those of the "
                "dataset's classes. Leave it out, or give it to record_teacher_logits."
            )
        if args is not None and not isinstance(args, DistillationArguments):
            raise TypeError(
                f"args is {type(args).__name__}, but the loss needs its weights. Pass args=DistillationArguments(…)."
            )
        self._given_teachers, self._given_names, self._teacher_classes = teachers, teacher_names, teacher_classes
        super().__init__(model=model, args=args, **kwargs)

    def _prepare(self) -> None:
        self.teacher_names = self._find_teacher_names()
        if self.compute_loss_func is not None:
            raise ValueError(
                f"compute_loss_func={self.compute_loss_func} has no effect on the distillation loss. Leave it out, or "
                "override compute_loss."
            )
        check_teacher_names(self.teacher_names)
        if self._is_student:
            self._warn_of_untaught_heads()
        teachers, self.teachers = self._given_teachers, []
        if teachers is not None:
            if set(teachers) != set(self.teacher_names):
                raise ValueError(
                    f"teachers={sorted(teachers)} differ from the teachers of the student, {self.teacher_names}. Give "
                    "the same names."
                )
            named = {name: teachers[name] for name in self.teacher_names}
            self.teachers = load_teachers(named, bf16=self.args.bf16, classes=self._teacher_classes)
        for teacher in self.teachers:
            teacher.match_classes(self._class_names)
            teacher.model.to(self.args.device)
        self._loss_terms = torch.zeros(2 + len(self.teacher_names))

    def _find_teacher_names(self) -> list[str]:
        tokens, given = list(getattr(self.model.config, "teacher_names", [])), self._given_names
        if isinstance(given, str):
            raise TypeError(f'teacher_names="{given}" is a text. Pass a list: ["{given}"].')
        if tokens:
            if given is not None and list(given) != tokens:
                raise ValueError(
                    f"teacher_names={list(given)} are not the teachers of the student's tokens, {tokens}. Leave teacher_names "
                    "out, or start the student with load_student(…, teacher_names=…)."
                )
            return tokens
        table = getattr(self.train_dataset, "table", self.train_dataset)
        if given is None and self._given_teachers is None and isinstance(table, (Dataset, IterableDataset)):
            given = recorded_teachers(table)
        names = list(self._given_teachers or ()) if given is None else list(given)
        if not names:
            raise ValueError(
                f"The student ({type(self.model).__name__}) has no teachers: the training set has no logits columns. Record "
                "them, pass teachers={…}, or train on labels alone with ImageClassificationTrainer."
            )
        return names

    def _warn_of_untaught_heads(self) -> None:
        weights = {"class": self.args.label_weight, **dict(zip(self.teacher_names, self._teacher_weights))}
        untaught = [name for name, weight in weights.items() if weight == 0]
        if untaught:
            logger.warning(
                "A weight of 0 leaves the head of the %s token untrained (fusion=%s). Give it a small weight, such as 0.1.",
                " and ".join(untaught),
                self.model.config.fusion,
            )

    @property
    def _teacher_weights(self) -> list[float]:
        return self.args.for_each_teacher("teacher_weights", self.teacher_names)

    @property
    def _temperatures(self) -> list[float]:
        return self.args.for_each_teacher("temperature", self.teacher_names)

    def _build_collator(self) -> DistillationCollator:
        processors = {teacher.name: teacher.image_processor for teacher in self.teachers}
        names = [] if self.teachers else self.teacher_names
        return DistillationCollator(self.processing_class, teacher_names=names, teacher_image_processors=processors)

    def _logits_columns(self, table: Dataset | IterableDataset, is_training: bool) -> list[str]:
        columns = [column_name(name) for name in self.teacher_names]
        if self.teachers:
            return []
        # Evaluation uses the images as they are, and logits of views belong to other images.
        if not is_training and not (set(columns) <= set(table.column_names) and stored_views(table) is None):
            return []
        once_a_machine(lambda: check_columns(table, self.teacher_names, self._class_names))
        # Top-k logits are decoded for one temperature, and p(y) is needed at 1.
        target = self.args.unlabelled_target
        is_softened = any(temperature != 1 for temperature in self._temperatures)
        for name, is_set in {
            "standardize_logits=True": self.args.standardize_logits,
            "confidence_weighting=True": self.args.confidence_weighting and is_softened,
            f'unlabelled_target="{target}"': target != "none" and is_softened,
        }.items():
            for column in columns if is_set else []:
                if describe_column(table.features[column])[0].top_k is not None:
                    raise ValueError(
                        f'{name} needs every logit, but the column "{column}" holds the largest only. Record dense logits '
                        "(top_k=None), or leave it out."
                    )
        if is_training:
            recorded = stored_views(table)
            if recorded is not None and self._given_views not in (None, recorded):
                raise ValueError(
                    f"views={self._given_views} differ from the views of the recorded logits, {recorded}. Leave `views` "
                    "out to train on the recorded views, or record the logits of yours."
                )
            # Logits of the images as they are may teach views of them: the "fixed teacher" of arXiv 2106.05237.
            self.views = recorded or self._given_views
        return columns

    def train(self, *args, **kwargs):
        self._loss_terms.zero_()
        return super().train(*args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The mean over the rows of the batch; in training times their share of the accumulated batch of all processes, so
        that the losses of these batches add up to the mean over all rows."""
        labels, teacher_logits = inputs["labels"], inputs.get("teacher_logits")
        if self.teachers and model.training:
            images = inputs["teacher_pixel_values"]
            teacher_logits = torch.stack([t.logits(images[t.name]) for t in self.teachers], dim=1)
        if self._is_student:
            # With the labels, because the student would warn that it gets none.
            outputs = model(pixel_values=inputs["pixel_values"], labels=labels, return_dict=True)
            class_logits, teacher_token_logits = outputs.class_logits, outputs.teacher_token_logits
        else:
            outputs = model(pixel_values=inputs["pixel_values"])
            class_logits = outputs[0] if isinstance(outputs, tuple) else outputs["logits"]
            teacher_token_logits = class_logits[:, None].expand(-1, len(self.teacher_names), -1)
        if teacher_logits is None:
            teacher_token_logits = teacher_logits = teacher_token_logits[:, :0]
        num_teachers = teacher_logits.shape[1]
        losses = ensemble_distillation_loss(
            class_logits,
            teacher_token_logits,
            labels,
            teacher_logits,
            weights=self._teacher_weights[:num_teachers],
            temperature=self._temperatures[:num_teachers],
            label_weight=self.args.label_weight,
            mode=self.args.distillation_mode,
            label_smoothing=self.args.label_smoothing_factor if model.training else 0.0,
            standardize_logits=self.args.standardize_logits,
            confidence_weighting=self.args.confidence_weighting,
            unlabelled_target=self.args.unlabelled_target,
            min_confidence=self.args.min_confidence,
        )
        loss = losses.loss
        if model.training:
            share = 1.0 if num_items_in_batch is None else self._share(labels, num_items_in_batch)
            terms = torch.cat((losses.label_loss.detach()[None], losses.teacher_losses.detach()))
            self._loss_terms = self._loss_terms.to(terms.device) + share * torch.cat((terms.new_ones(1), terms))
            loss = loss * share
        return (loss, outputs) if return_outputs else loss

    def log(self, logs, start_time=None):
        if "loss" in logs:
            steps, *terms = self.accelerator.reduce(self._loss_terms, reduction="sum").tolist()
            names = ["label_loss", *(f"{name}_loss" for name in self.teacher_names)]
            logs.update({name: term / steps for name, term in zip(names, terms) if steps})
            self._loss_terms.zero_()
        super().log(logs, start_time)
