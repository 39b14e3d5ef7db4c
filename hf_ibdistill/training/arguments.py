"""Training arguments: defaults that suit small images, and distillation's own."""

from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available

from ..images import default_num_workers
from .losses import MODES


def has_bf16_units(use_cpu: bool) -> bool:
    """Whether the device that training will run on multiplies bf16 faster than float32."""
    if use_cpu:
        # Older releases of torch do not say.
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()
        return any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return is_torch_bf16_gpu_available()


def _default(value, help):
    return field(default=value, metadata={"help": f"{help} (default: {value})"})


@dataclass(repr=False)  # transformers' own hides tokens
class ImageTrainingArguments(TrainingArguments):
    """[`~transformers.TrainingArguments`] with defaults for training a small image classifier from nothing, where
    transformers' own suit the fine-tuning of a language model."""

    learning_rate: float = _default(
        2e-3, "Peak learning rate. Fine-tuning a whole trained model wants half of it or less."
    )
    weight_decay: float = _default(0.05, "AdamW's weight decay; biases and layer norms have none.")
    lr_scheduler_type: str = _default("cosine", "Shape of the learning rate after the warm-up.")
    warmup_steps: float = _default(0.1, "Steps of linear warm-up; below 1, their share of all steps.")
    num_train_epochs: float = _default(30.0, "Passes over the training images.")
    per_device_train_batch_size: int = _default(64, "Images a step and process.")
    per_device_eval_batch_size: int = _default(256, "Images an evaluation step and process.")
    eval_strategy: str = _default("epoch", 'When to evaluate on the validation split: "epoch", "steps" or "no".')
    save_strategy: str = _default("no", 'When to save a checkpoint to resume from: "epoch", "steps" or "no".')
    logging_strategy: str = _default("epoch", 'When to log the loss: "epoch", "steps" or "no".')
    dataloader_num_workers: int | None = field(
        default=None,
        metadata={
            "help": "Processes that decode images ahead of the model. (default: where it runs on an accelerator up to 8 of "
            "the free processors, on a CPU none)"
        },
    )
    dataloader_persistent_workers: bool | None = field(
        default=None,
        metadata={"help": "Keep these processes from epoch to epoch. (default: where there are some, yes)"},
    )
    bf16: bool | None = field(
        default=None,
        metadata={
            "help": "Run the model under bf16 autocast; its weights, the loss and the optimizer stay in float32. "
            "(default: where the hardware multiplies bf16 faster than float32)"
        },
    )

    def __post_init__(self):
        if not torch.accelerator.is_available():
            # transformers wants to be told so before it grants bf16.
            self.use_cpu = True
            # There is no device to copy to, and the data loader would warn at every start.
            self.dataloader_pin_memory = False
        if self.dataloader_num_workers is None:
            self.dataloader_num_workers = default_num_workers(self.use_cpu)
        if self.dataloader_persistent_workers is None:
            self.dataloader_persistent_workers = self.dataloader_num_workers > 0
        if self.bf16 is None:
            self.bf16 = not self.fp16 and has_bf16_units(self.use_cpu)
        super().__post_init__()


@dataclass(repr=False)  # transformers' own hides tokens
class DistillationArguments(ImageTrainingArguments):
    """[`ImageTrainingArguments`] for twice the epochs, with the ensemble distillation loss's weights, temperatures and mode.

    Raises:
        ValueError: a weight below 0, a temperature not above 0, an unknown mode, or standardised logits in hard mode.
    """

    num_train_epochs: float = _default(
        60.0, "Passes over the training images. Taught students go on learning after their teachers' are over."
    )
    distillation_mode: str = _default(
        "soft",
        '"soft" lets a teacher token match the teacher\'s whole distribution, "hard" only its first choice (DeiT). Soft '
        "carries more; try hard when teachers are badly calibrated.",
    )
    temperature: list[float] = field(
        default_factory=lambda: [4.0],
        metadata={
            "help": "Softens the teachers' distributions: one number for all, or one for each teacher. Higher shows more "
            "of what a teacher thinks of the classes that it does not choose. (default: 4)"
        },
    )
    teacher_weights: list[float] = field(
        default_factory=lambda: [1.0],
        metadata={
            "help": "Weight of the teachers' terms in the loss: one number for all, or one for each teacher. (default: 1)"
        },
    )
    label_weight: float = _default(1.0, "Weight of the labels' cross-entropy in the loss; 0 ignores the labels.")
    standardize_logits: bool = _default(
        False,
        "Match standardised logits (arXiv 2403.01427): what a teacher prefers, not how sure it is. Needs dense logits.",
    )
    confidence_weighting: bool = _default(
        False, "In each row, weigh teachers by the probability that they give its label. For unequal teachers."
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("temperature", "teacher_weights"):
            value = getattr(self, name)
            setattr(self, name, [float(value)] if isinstance(value, (int, float)) else [float(v) for v in value])
            if not getattr(self, name):
                raise ValueError(f"{name} is one number, or one for each teacher; got none.")
        if self.distillation_mode not in MODES:
            raise ValueError(f'distillation_mode is "soft" or "hard"; got "{self.distillation_mode}".')
        if self.distillation_mode == "hard" and self.standardize_logits:
            raise ValueError('standardize_logits does nothing in the "hard" mode, which looks at first choices alone.')
        # Not `any(… <= 0)`: NaN compares false with everything.
        if not all(value > 0 for value in self.temperature):
            raise ValueError(f"A temperature is above 0; got {self.temperature}.")
        if not all(value >= 0 for value in [*self.teacher_weights, self.label_weight]):
            raise ValueError(
                f"A weight is at least 0; got teacher_weights={self.teacher_weights}, label_weight={self.label_weight}."
            )
