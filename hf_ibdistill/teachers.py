"""Open a teacher, whatever form it comes in: any image classifier of transformers, with its own image processor."""

import copy
import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import extract_model_from_parallel
from huggingface_hub import HfApi
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    PreTrainedModel,
)

from .data import check_class_names, config_class_names


logger = logging.getLogger(__name__)

TeacherLike = PreTrainedModel | tuple[PreTrainedModel, BaseImageProcessor] | str | os.PathLike


@dataclass
class Teacher:
    """An image classifier with the name that its logits go by and the image processor that prepares its images. With
    `bf16` it runs under bf16 autocast. `revision` is its commit on the Hub."""

    name: str
    model: PreTrainedModel
    image_processor: BaseImageProcessor
    bf16: bool = False
    revision: str | None = None
    _class_order: list[int] | None = None

    @property
    def class_names(self) -> list[str]:
        """The names of the classes, in the order of `logits`."""
        names = config_class_names(self.model.config)
        return names if self._class_order is None else [names[i] for i in self._class_order]

    def match_classes(self, expected: Sequence[str]) -> None:
        """Give `logits` the order of these classes, by their names.

        Raises:
            ValueError: the teacher has other classes; the message says which differ.
        """
        names = config_class_names(self.model.config)
        if names != list(expected) and sorted(names) == sorted(expected) and len(set(names)) == len(names):
            self._class_order = [names.index(name) for name in expected]
            logger.warning(
                "The teacher \"%s\" has the data set's classes in another order; its logits are put into the data set's by "
                "the classes' names.",
                self.name,
            )
        check_class_names(self.class_names, expected, f'the teacher "{self.name}"')

    def logits(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(N, channels, H, W) of this teacher's own image processor → (N, classes) in float32, in the order of `class_names`,
        without gradients."""
        device = self.model.device.type
        # Said in either case: a caller's own autocast must not decide what is recorded.
        with torch.no_grad(), torch.autocast(device, dtype=torch.bfloat16, enabled=self.bf16):
            outputs = self.model(pixel_values=pixel_values.to(self.model.dtype))
        # Tuples come from models with code of their own; as in transformers, logits are first where no loss is.
        logits = (outputs[0] if isinstance(outputs, tuple) else outputs.logits).float()
        return logits if self._class_order is None else logits[:, self._class_order]

    def weights_sha256(self) -> str:
        """A hash of every parameter and buffer: name, type, shape and content."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()


def without_autocast(model: PreTrainedModel) -> PreTrainedModel:
    """The model without the autocast, or the DDP, that a trainer in this process may have left around it; a shallow copy,
    so that the trainer can go on with its own."""
    return extract_model_from_parallel(copy.copy(model), keep_fp32_wrapper=False)


def load_teachers(
    teachers: Mapping[str, TeacherLike], *, bf16: bool = False, trust_remote_code: bool = False
) -> list[Teacher]:
    """Open teachers by name, in evaluation mode.

    Args:
        teachers: name → Hub id, folder, model loaded by `from_pretrained`, or (model, image processor).
        bf16: run them under bf16 autocast.
        trust_remote_code: run the code of a Hub repository, or folder, that brings its own.

    Raises:
        ValueError: no teacher, a name that cannot name a column, a model without an image processor, or one with code of
            its own without `trust_remote_code`.
        OSError: an id or folder that cannot be loaded.
        ImportError: a library that the model is built on, such as timm, is not installed.
    """
    if not teachers:
        raise ValueError("There is no teacher; give at least one as name → model, Hub id or folder.")
    return [_load_teacher(name, teacher, bf16, trust_remote_code) for name, teacher in teachers.items()]


def _load_teacher(name, teacher, bf16, trust_remote_code):
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f'A teacher\'s name becomes a column name: letters, digits and "_" only; got "{name}".')
    revision = None
    if isinstance(teacher, tuple):
        model, processor = teacher
    elif isinstance(teacher, (str, os.PathLike)):
        revision = _resolve_revision(teacher)
        model = _load_model(teacher, revision=revision or "main", trust_remote_code=trust_remote_code)
        processor = _load_processor(name, str(teacher), trust_remote_code, revision or "main")
    elif not isinstance(teacher, PreTrainedModel):
        raise ValueError(
            f'The teacher "{name}" is a Hub id, a folder, a model or (model, image processor); got {teacher!r}.'
        )
    else:
        model = teacher
        processor = _load_processor(name, model.name_or_path, trust_remote_code)
    return Teacher(name, without_autocast(model).eval(), processor, bf16, revision)


def _load_model(source, **options):
    try:
        return AutoModelForImageClassification.from_pretrained(source, **options)
    except TypeError:
        # timm since 1.0.31 saves the number of classes among the model's arguments too; transformers' wrapper then gives
        # it twice.
        config = AutoConfig.from_pretrained(source, **options)
        if "num_classes" not in (getattr(config, "model_args", None) or {}):
            raise
        del config.model_args["num_classes"]
        return AutoModelForImageClassification.from_pretrained(source, config=config, **options)


def _resolve_revision(source):
    """The commit that a Hub id stands for now; `None` of a folder."""
    if Path(source).exists():
        return None
    try:
        return HfApi().resolve_revision(str(source)).resolved
    except (OSError, ValueError):  # `from_pretrained` says better what is wrong with it
        return None


def _load_processor(name, source, trust_remote_code, revision="main"):
    missing = (
        f'The teacher "{name}" has no image processor{f" in {source}" if source else ""}. Save one beside the model '
        "(image_processor.save_pretrained(folder)), or give the teacher as (model, image_processor)."
    )
    if not source:
        raise ValueError(missing)
    try:
        return AutoImageProcessor.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    except OSError as error:
        raise ValueError(missing) from error
