"""Training arguments: defaults for small images, and the settings of distillation."""

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import TrainingArguments
from transformers.hf_argparser import HfArg
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.utils import is_torch_bf16_gpu_available

from ..checks import check_numbers
from ..rows import default_num_workers
from .losses import MODES, UNLABELLED_TARGETS


def has_bf16_units(use_cpu: bool) -> bool:
    """Whether the device that training will run on multiplies bf16 faster than float32."""
    if use_cpu:
        # Older releases of torch do not have this function.
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()
        return any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return is_torch_bf16_gpu_available()


def _default(value, help):
    return HfArg(default=value, help=help)


@dataclass(repr=False)  # transformers' own hides tokens
class ImageTrainingArguments(TrainingArguments):
    """[`~transformers.TrainingArguments`] with defaults for training a small image classifier from nothing. The defaults
    of transformers suit the fine-tuning of a language model."""

    _argument_group_name = "training"

    learning_rate: float = _default(2e-3, "Peak learning rate; half of it or less for fine-tuning.")
    weight_decay: float = _default(0.05, "Weight decay of AdamW; biases and layer norms have none.")
    lr_scheduler_type: str = _default("cosine", "Shape of the learning rate after the warm-up.")
    warmup_steps: float = _default(0.1, "Steps of linear warm-up; below 1, a share of all steps.")
    num_train_epochs: float = _default(30.0, "Passes over the training images.")
    per_device_train_batch_size: int = _default(64, "Images per step and process.")
    per_device_eval_batch_size: int = _default(256, "Images per evaluation step and process.")
    eval_strategy: str = _default("epoch", 'When to evaluate on the validation split: "epoch", "steps" or "no".')
    save_strategy: str = _default("no", 'When to save a checkpoint to resume from: "epoch", "steps" or "no".')
    logging_strategy: str = _default("epoch", 'When to log the loss: "epoch", "steps" or "no".')
    views_per_image: int = _default(1, "Views of an image in a batch. More save decoding.")
    # A look at every loss would also make each step wait for the device.
    logging_nan_inf_filter: bool = _default(False, "Leave a NaN or infinite loss out of the log.")
    shuffle_buffer_size: int = _default(
        0, "Rows of a stream that are held and drawn from at random; 0 keeps the order of the stream."
    )
    dataloader_num_workers: int | None = HfArg(
        default=None,
        help="Processes that decode images ahead of the model; by default none on a CPU, up to 8 on an accelerator.",
    )
    dataloader_persistent_workers: bool | None = HfArg(
        default=None, help="Keep these processes from epoch to epoch; by default yes, if there are any."
    )
    bf16: bool | None = HfArg(
        default=None,
        help="Run the model under bf16 autocast; weights, loss and optimizer stay in float32. By default on "
        "hardware with bf16 units.",
    )

    def __post_init__(self):
        if not torch.accelerator.is_available():
            # transformers refuses bf16 on a CPU unless this is set.
            self.use_cpu = True
            # There is no device to copy to, and the data loader would warn at every start.
            self.dataloader_pin_memory = False
        if self.dataloader_num_workers is None:
            self.dataloader_num_workers = default_num_workers(self.use_cpu)
        if self.dataloader_persistent_workers is None:
            self.dataloader_persistent_workers = self.dataloader_num_workers > 0
        if self.bf16 is None:
            self.bf16 = not self.fp16 and has_bf16_units(self.use_cpu)
        best = self.metric_for_best_model or ""
        if self.greater_is_better is None and best.endswith(("negative_log_likelihood", "calibration_error")):
            # transformers takes every metric without "loss" for one that should grow.
            self.greater_is_better = False
        batches = ("gradient_accumulation_steps", "per_device_train_batch_size", "per_device_eval_batch_size")
        check_numbers(1, whole=True, **{name: getattr(self, name) for name in batches})
        check_numbers(1, whole=True, views_per_image=self.views_per_image)
        if self.per_device_train_batch_size % self.views_per_image:
            raise ValueError(
                f"views_per_image={self.views_per_image} does not divide "
                f"per_device_train_batch_size={self.per_device_train_batch_size}, so batches would end within an image."
            )
        check_numbers(0, 1, label_smoothing_factor=self.label_smoothing_factor)
        check_numbers(0, weight_decay=self.weight_decay, max_grad_norm=self.max_grad_norm or 0)
        if not self.save_steps > 0:
            raise ValueError(
                f'save_steps={self.save_steps} must be above 0. Set save_strategy="no" to save no checkpoint.'
            )
        if self.max_steps <= 0 and not 0 < self.num_train_epochs < math.inf:
            raise ValueError(
                f"num_train_epochs={self.num_train_epochs} with max_steps={self.max_steps} trains nothing. Set one of them "
                "above 0."
            )
        super().__post_init__()
        known = inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[self.lr_scheduler_type]).parameters
        unknown = sorted(set(self.lr_scheduler_kwargs or ()) - set(known))
        if unknown and "kwargs" not in known:
            raise ValueError(
                f"lr_scheduler_kwargs={self.lr_scheduler_kwargs} has {unknown[0]}, which "
                f'lr_scheduler_type="{self.lr_scheduler_type.value}" does not take.'
            )


class _Numbers(list):
    """A list of numbers that one number makes, because a hyperparameter search converts its value to the type that it
    finds."""

    def __init__(self, values):
        super().__init__(float(value) for value in ([values] if isinstance(values, (int, float, str)) else values))


@dataclass(repr=False)  # transformers' own hides tokens
class DistillationArguments(ImageTrainingArguments):
    """[`ImageTrainingArguments`] for twice the epochs, with the weights, temperatures and mode of
    [`ensemble_distillation_loss`].

    Raises:
        ValueError: a weight is below 0, a temperature is not above 0, the mode is unknown, or `standardize_logits` is set
            in hard mode.
    """

    num_train_epochs: float = _default(
        60.0, "Passes over the training images. A student learns for longer with teachers than without."
    )
    distillation_mode: str = _default(
        "soft",
        '"soft": a teacher token matches the distribution of its teacher; "hard": only its first choice (DeiT).',
    )
    temperature: list[float] = HfArg(
        default_factory=lambda: [4.0],
        help="Softens the teachers' distributions: one number for all, or one for each teacher (default: 4).",
    )
    teacher_weights: list[float] = HfArg(
        default_factory=lambda: [1.0],
        help="Weight of the teachers' terms in the loss: one number, or one for each teacher (default: 1).",
    )
    label_weight: float = _default(1.0, "Weight of the cross-entropy of the labels in the loss; 0 ignores the labels.")
    standardize_logits: bool = _default(
        False,
        "Match standardized logits (arXiv 2403.01427): the order and distances of classes, not the confidence. Needs dense "
        "logits.",
    )
    confidence_weighting: bool = _default(
        False, "In each row, weight teachers by the probability that they give to its label."
    )
    unlabelled_target: str = _default(
        "none",
        'What teaches the class token on images without a label: "none", "teachers" (their mean distribution) or '
        '"pseudo_labels" (their first choice).',
    )
    min_confidence: float = _default(
        0.95, 'Smallest mean probability of the teachers\' first choice, for unlabelled_target "pseudo_labels".'
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("temperature", "teacher_weights"):
            value = getattr(self, name)
            try:
                setattr(self, name, _Numbers(value))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{name}={value!r} is neither a number nor a list of numbers.") from error
        check_numbers(0, label_weight=self.label_weight)
        check_numbers(0, 1, min_confidence=self.min_confidence)
        if self.unlabelled_target not in UNLABELLED_TARGETS:
            raise ValueError(
                f'unlabelled_target="{self.unlabelled_target}" is unknown. Choose {", ".join(UNLABELLED_TARGETS)}.'
            )
        if self.unlabelled_target != "none" and self.label_weight == 0:
            raise ValueError(
                f'unlabelled_target="{self.unlabelled_target}" has no effect with label_weight=0, which weights it. Leave one '
                "of them out."
            )
        if self.distillation_mode not in MODES:
            raise ValueError(f'distillation_mode="{self.distillation_mode}" is unknown. Choose "soft" or "hard".')
        if self.distillation_mode == "hard" and self.standardize_logits:
            raise ValueError(
                'standardize_logits=True has no effect with distillation_mode="hard", which uses first choices alone. Leave '
                "one of them out."
            )
        self.for_each_teacher("temperature")
        self.for_each_teacher("teacher_weights")

    def for_each_teacher(self, name: str, teacher_names: Sequence[str] | None = None) -> list[float]:
        """The numbers of `temperature` or `teacher_weights`, one for each teacher.

        Args:
            name: which of the two.
            teacher_names: the teachers of the student; `None` if they are not known yet.

        Raises:
            ValueError: a number is out of range, or there is neither one for all teachers nor one for each.
        """
        values = _Numbers(getattr(self, name))
        count = len(values) if teacher_names is None else len(teacher_names)
        if len(values) not in (1, count) or not values:
            teachers = ", ".join(teacher_names or ["the teachers"])
            raise ValueError(
                f"{name}={values} has {len(values)} numbers. Give one for all, or one for each of {teachers}."
            )
        # Not `any(… <= 0)`: NaN compares false with everything.
        if name == "temperature" and not all(0 < value < math.inf for value in values):
            raise ValueError(f"temperature={values} must be above 0 and finite.")
        if not all(0 <= value < math.inf for value in [*values, self.label_weight]):
            raise ValueError(f"{name}={values} and label_weight={self.label_weight} must be at least 0 and finite.")
        return values * count if len(values) == 1 else values
