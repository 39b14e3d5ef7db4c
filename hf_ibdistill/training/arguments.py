"""The arguments of distillation, beside transformers' own."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from .losses import MODES


@dataclass
class DistillationArguments(TrainingArguments):
    """[`~transformers.TrainingArguments`] with the ensemble distillation loss's.

    Raises:
        ValueError: a weight below 0, a temperature not above 0, or an unknown mode.
    """

    distillation_mode: str = field(
        default="soft",
        metadata={
            "help": '"soft" lets a teacher token match the teacher\'s whole distribution, "hard" only its first choice '
            "(DeiT). Soft carries more; try hard when teachers are badly calibrated."
        },
    )
    temperature: list[float] = field(
        default_factory=lambda: [4.0],
        metadata={
            "help": "Softens the teachers' distributions: one number for all, or one for each teacher. Higher shows more "
            "of what a teacher thinks of the classes that it does not choose."
        },
    )
    teacher_weights: list[float] = field(
        default_factory=lambda: [1.0],
        metadata={"help": "Weight of the teachers' terms in the loss: one number for all, or one for each teacher."},
    )
    label_weight: float = field(
        default=1.0, metadata={"help": "Weight of the labels' cross-entropy in the loss. 0 ignores the labels."}
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("temperature", "teacher_weights"):
            value = getattr(self, name)
            setattr(self, name, [float(value)] if isinstance(value, (int, float)) else [float(v) for v in value])
        if self.distillation_mode not in MODES:
            raise ValueError(f'distillation_mode is "soft" or "hard"; got "{self.distillation_mode}".')
        if min(self.temperature) <= 0:
            raise ValueError(f"A temperature is above 0; got {self.temperature}.")
        if min(*self.teacher_weights, self.label_weight) < 0:
            raise ValueError(
                f"A weight is at least 0; got teacher_weights={self.teacher_weights}, label_weight={self.label_weight}."
            )
