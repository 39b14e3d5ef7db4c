"""The trainers: one for any classifier on labels alone, one for a student on stored logits or online teachers."""

import logging
from collections.abc import Mapping
from functools import partial

import torch
from datasets import Dataset, IterableDataset
from transformers import BaseImageProcessor, PreTrainedModel, TrainerCallback, TrainingArguments

from ..data import check_class_names, class_names, config_class_names, find_columns
from ..evaluation import compute_metrics
from ..images import ImageRows, StreamedImageRows
from ..logits.encoding import ROW_KEY, column_name, describe_column
from ..logits.provenance import check_columns, stored_views
from ..logits.views import ViewRecipe
from ..teachers import TeacherLike, load_teachers
from .arguments import DistillationArguments, ImageTrainingArguments
from .collator import DistillationCollator
from .losses import ensemble_distillation_loss
from .publishing import PublishingTrainer


logger = logging.getLogger(__name__)


class _StartEpoch(TrainerCallback):
    """Turns the training rows to the views of the epoch, also of one that is resumed in the middle."""

    def __init__(self, trainer):
        self.trainer, self.passes = trainer, 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.passes = 0

    def on_epoch_begin(self, args, state, control, **kwargs):
        rows = self.trainer.training_rows
        # Nobody knows the length of a stream, so its epochs are the passes since training began or was resumed. Of a
        # table `state.epoch` tells, a sum of fractions that may end just below the whole number.
        is_streamed = isinstance(rows, StreamedImageRows)
        rows.start_epoch(self.passes if is_streamed else int((state.epoch or 0) + 1e-6))
        self.passes += 1


class ImageClassificationTrainer(PublishingTrainer):
    """transformers' `Trainer` on tables of images: decodes, preprocesses and batches rows, and measures accuracy.

    Trains teachers, and students without teachers, by plain cross-entropy.

    Args:
        model: any image classifier.
        args: training arguments.
        train_dataset, eval_dataset: tables with an image and a `ClassLabel` column, found unless named. The first may be
            streamed (an `IterableDataset`); shuffle it yourself (`dataset.shuffle(buffer_size=…)`).
        processing_class: the model's image processor, saved with every checkpoint.
        image_column, label_column: columns of the tables.
        views: train on these views of the images, number `epoch` of each; evaluation sees the images as they are.
        kwargs: as for `Trainer`.

    Raises:
        TypeError: a table is not a `datasets.Dataset`.
        ValueError: before the first step: columns cannot be found, a table is empty, or model and table differ in their
            classes.
    """

    default_arguments = ImageTrainingArguments

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
        if processing_class is None:
            raise ValueError("The trainer needs the model's image processor: processing_class=image_processor.")
        tables = {"Training": train_dataset}
        tables |= eval_dataset if isinstance(eval_dataset, dict) else {"Evaluation": eval_dataset}
        tables = {name: table for name, table in tables.items() if table is not None}
        for name, table in tables.items():
            if not isinstance(table, (Dataset, IterableDataset) if name == "Training" else Dataset):
                raise TypeError(f"The {name.lower()} set is a datasets.Dataset; got {type(table).__name__}.")
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
        self.image_column, self.label_column, self.views = image_column, label_column, views
        self._checked_tables = set()
        self.add_callback(_StartEpoch(self))
        self._measures_tokens = self.compute_metrics is None
        if self._measures_tokens:
            teacher_names = getattr(self.model.config, "teacher_names", None)
            self.compute_metrics = partial(compute_metrics, teacher_names=teacher_names)
        self._prepare()
        if kwargs.get("data_collator") is None:
            self.data_collator = self._build_collator()
        for name, table in tables.items():
            rows = self._remove_unused_columns(table, name)
            if isinstance(rows, StreamedImageRows):
                self.train_dataset = rows

    def _prepare(self) -> None:
        """Check what the constructor was given, before any table is looked at."""

    def _build_collator(self) -> DistillationCollator:
        return DistillationCollator(self.processing_class)

    @property
    def _label_names(self) -> list[str]:
        return config_class_names(self.model.config)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        if ignore_keys is None and self._measures_tokens:
            # Our own metrics also look at each token; anybody else's see the fused prediction alone.
            ignore_keys = ["hidden_states", "attentions"]
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    # The hook by which `Trainer` prepares a streamed table's rows; ours have no unused columns.
    def _get_collator_with_removed_columns(self, data_collator, description=None):
        return data_collator

    # The hook by which `Trainer` prepares every other table for its data loader, with one of the words below.
    def _remove_unused_columns(
        self, dataset: Dataset | IterableDataset, description: str | None = None
    ) -> ImageRows | StreamedImageRows:
        is_training = description == "Training"
        is_streamed = isinstance(dataset, IterableDataset)
        what = f"{(description or 'given').lower()} set"
        if is_streamed and dataset.features is None:
            raise ValueError(f"The {what} does not know its columns' types; open it with features=….")
        if not is_streamed and len(dataset) == 0:
            raise ValueError(f"The {what} is empty; it needs at least one row.")
        image, label = find_columns(dataset, self.image_column, self.label_column)
        logits = self._logits_columns(dataset, is_training)
        table = (is_training, id(dataset) if is_streamed else dataset._fingerprint)
        if table not in self._checked_tables:
            check_class_names(self._label_names, class_names(dataset, label), f"the model (beside the {what})")
            self._check_logits(dataset, is_training, logits)
            self._checked_tables.add(table)
        views = self.views if is_training else None
        key = [ROW_KEY] if ROW_KEY in dataset.column_names else []
        dataset = dataset.select_columns([image, label, *key, *logits])
        dataset = dataset.rename_columns({old: new for old, new in ((image, "image"), (label, "label")) if old != new})
        kind = StreamedImageRows if is_streamed else ImageRows
        num_classes, temperatures = self.model.config.num_labels, self._temperatures
        rows = kind(dataset, "image", ["label"], logits, num_classes, views, temperatures=temperatures)
        if is_training:
            self.training_rows = rows
        return rows

    _temperatures = None

    def _logits_columns(self, dataset: Dataset, is_training: bool) -> list[str]:
        return []

    def _check_logits(self, dataset: Dataset, is_training: bool, columns: list[str]) -> None:
        pass


class EnsembleDistillationTrainer(ImageClassificationTrainer):
    """Distils teachers into an `IBViTForImageClassification` by [`ensemble_distillation_loss`].

    The teachers' logits come from the columns that `record_teacher_logits` wrote, or, with `teachers`, from running them
    in every step. A table of views is trained on view by view, epoch by epoch, as its teachers saw them; a table of
    un-augmented images on `views` if given, whose logits are then those of the image as it is. Each term of
    the loss is logged by its own name: `label_loss` and `<teacher>_loss`. Evaluation needs no logits columns: without
    them its loss is the labels' term alone.

    Args:
        model: the student; `model.config.teacher_names` names the teachers.
        args: [`DistillationArguments`].
        train_dataset, eval_dataset: tables with an image and a `ClassLabel` column, found unless named.
        processing_class: the student's image processor.
        teachers: name → Hub id, folder, model loaded by `from_pretrained`, or (model, image processor), for online
            distillation, on `views` if given. `None` reads the columns.
        kwargs: as for [`ImageClassificationTrainer`].

    Raises:
        TypeError: other arguments than [`DistillationArguments`], or a table that is not a `datasets.Dataset`.
        ValueError: before the first step: the student has no teachers, a logits column is missing or does not fit, weights
            or temperatures are not one for each teacher, or teachers, student and data differ in their classes.

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
    # `compute_loss` divides by the number of rows in the whole accumulated batch.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: DistillationArguments | None = None,
        *,
        teachers: Mapping[str, TeacherLike] | None = None,
        **kwargs,
    ):
        if args is not None and not isinstance(args, DistillationArguments):
            raise TypeError(
                f"args is DistillationArguments, which hold the loss's weights; got {type(args).__name__}."
            )
        self._given_teachers = teachers
        super().__init__(model=model, args=args, **kwargs)

    def _prepare(self) -> None:
        self.teacher_names = list(getattr(self.model.config, "teacher_names", []))
        if not self.teacher_names:
            raise ValueError(
                "The student has no teacher tokens; build it with IBViTConfig(teacher_names=(...)), or train it without "
                "teachers with ImageClassificationTrainer."
            )
        for name in ("teacher_weights", "temperature"):
            if len(getattr(self.args, name)) not in (1, len(self.teacher_names)):
                raise ValueError(
                    f"{name} is one number or one for each teacher ({', '.join(self.teacher_names)}); got "
                    f"{getattr(self.args, name)}."
                )
        self._warn_of_untaught_heads()
        teachers, self.teachers = self._given_teachers, []
        if teachers is not None:
            if set(teachers) != set(self.teacher_names):
                raise ValueError(
                    f"The student's teachers are {self.teacher_names}; got teachers {sorted(teachers)}. The names must "
                    "be the same."
                )
            named = {name: teachers[name] for name in self.teacher_names}
            self.teachers = load_teachers(named, bf16=self.args.bf16)
        for teacher in self.teachers:
            teacher.match_classes(self._label_names)
            teacher.model.to(self.args.device)
        self._loss_terms = torch.zeros(2 + len(self.teacher_names))

    def _warn_of_untaught_heads(self) -> None:
        teacher_weights = dict(zip(self.teacher_names, self._for_each_teacher(self.args.teacher_weights)))
        fusion = self.model.config.fusion
        counted = {"class": self.args.label_weight, **(teacher_weights if fusion != "class_token" else {})}
        untaught = [name for name, weight in counted.items() if weight == 0]
        if untaught:
            logger.warning(
                'The fusion "%s" counts the head of the %s token, which a weight of 0 leaves as it started. Give it a small '
                "weight, such as 0.1.",
                fusion,
                " and ".join(untaught),
            )

    def _for_each_teacher(self, values: list[float]) -> list[float]:
        return values * len(self.teacher_names) if len(values) == 1 else values

    @property
    def _temperatures(self) -> list[float]:
        return self._for_each_teacher(self.args.temperature)

    def _build_collator(self) -> DistillationCollator:
        processors = {teacher.name: teacher.image_processor for teacher in self.teachers}
        names = [] if self.teachers else self.teacher_names
        return DistillationCollator(self.processing_class, teacher_names=names, teacher_image_processors=processors)

    def _logits_columns(self, dataset: Dataset, is_training: bool) -> list[str]:
        columns = [column_name(name) for name in self.teacher_names]
        if self.teachers:
            return []
        if is_training:
            return columns
        # Evaluation sees images as they are, of which logits of views say nothing.
        is_recorded = set(columns) <= set(dataset.column_names) and stored_views(dataset) is None
        return columns if is_recorded else []

    def _check_logits(self, dataset: Dataset, is_training: bool, columns: list[str]) -> None:
        if not columns:
            return
        check_columns(dataset, self.teacher_names, self._label_names)
        for column in columns if self.args.standardize_logits else []:
            if describe_column(dataset.features[column])[0].top_k is not None:
                raise ValueError(
                    f'standardize_logits needs every logit, and the column "{column}" holds the largest only. Record dense '
                    "logits (top_k=None), or leave standardize_logits off."
                )
        if is_training:
            recorded = stored_views(dataset)
            if recorded is not None and self.views not in (None, recorded):
                raise ValueError(
                    f"The table holds logits of other views: {recorded} instead of {self.views}. Leave `views` out to "
                    "train on the recorded ones, or record these."
                )
            # Logits of the images as they are may teach views of them: the "fixed teacher" of arXiv 2106.05237.
            self.views = recorded or self.views

    def train(self, *args, **kwargs):
        self._loss_terms.zero_()
        return super().train(*args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The mean over the rows of the batch, scaled so that the steps of an accumulated batch, over all processes, add
        up to the mean over all its rows."""
        labels = inputs["labels"]
        outputs = model(pixel_values=inputs["pixel_values"])
        teacher_logits = inputs.get("teacher_logits")
        if self.teachers and model.training:
            images = inputs["teacher_pixel_values"]
            teacher_logits = torch.stack([t.logits(images[t.name]) for t in self.teachers], dim=1)
        teacher_token_logits = outputs.teacher_token_logits
        if teacher_logits is None:
            teacher_token_logits = teacher_logits = teacher_token_logits[:, :0]
        num_teachers = teacher_logits.shape[1]
        losses = ensemble_distillation_loss(
            outputs.class_logits,
            teacher_token_logits,
            labels,
            teacher_logits,
            weights=self._for_each_teacher(self.args.teacher_weights)[:num_teachers],
            temperature=self._temperatures[:num_teachers],
            label_weight=self.args.label_weight,
            mode=self.args.distillation_mode,
            label_smoothing=self.args.label_smoothing_factor if model.training else 0.0,
            standardize_logits=self.args.standardize_logits,
            confidence_weighting=self.args.confidence_weighting,
        )
        share = 1.0 if num_items_in_batch is None else len(labels) / num_items_in_batch
        if model.training:
            terms = torch.cat((losses.label_loss.detach()[None], losses.teacher_losses.detach()))
            self._loss_terms = self._loss_terms.to(terms.device) + share * torch.cat((terms.new_ones(1), terms))
        loss = losses.loss * share
        if self.args.average_tokens_across_devices:
            # The share is of all processes' rows; DDP averages their gradients, and the reported loss likewise.
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def log(self, logs, start_time=None):
        if "loss" in logs:
            steps, *terms = self.accelerator.reduce(self._loss_terms, reduction="sum").tolist()
            names = ["label_loss", *(f"{name}_loss" for name in self.teacher_names)]
            logs.update({name: term / steps for name, term in zip(names, terms) if steps})
            self._loss_terms.zero_()
        super().log(logs, start_time)
