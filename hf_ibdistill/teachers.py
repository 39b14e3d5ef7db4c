"""Open and run a teacher: any image classifier of transformers, with its own image processor."""

import copy
import hashlib
import json
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

from .data.classes import check_class_names, config_class_names
from .logits.encoding import LogitsEncoding


logger = logging.getLogger(__name__)

TeacherLike = PreTrainedModel | tuple[PreTrainedModel, BaseImageProcessor] | str | os.PathLike


@dataclass
class Teacher:
    """An image classifier, its name, and the image processor that prepares its images.

    Attributes:
        name: the name of its logits column is `<name>_logits`.
        bf16: whether it runs under bf16 autocast.
        revision: its commit on the Hub; `None` for a folder or a model.
    """

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
        """Put `logits` into the order of these classes, matched by name.

        Raises:
            ValueError: the teacher has other classes; the message names the difference.
        """
        names = config_class_names(self.model.config)
        if names != list(expected) and sorted(names) == sorted(expected) and len(set(names)) == len(names):
            self._class_order = [names.index(name) for name in expected]
            logger.warning(
                'The teacher "%s" has the classes of the dataset in another order. Its logits are reordered by class name.',
                self.name,
            )
        check_class_names(self.class_names, expected, f'the teacher "{self.name}"')

    def logits(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Run the teacher, without gradients.

        Args:
            pixel_values: (N, channels, H, W), prepared by the teacher's own image processor.

        Returns:
            (N, classes) in float32, in the order of `class_names`.
        """
        device = self.model.device.type
        # Set in either case, because the autocast of a caller must not change what is recorded.
        with torch.no_grad(), torch.autocast(device, dtype=torch.bfloat16, enabled=self.bf16):
            outputs = self.model(pixel_values=pixel_values.to(self.model.dtype))
        # Models with their own code may return tuples. As in transformers, logits come first if there is no loss.
        logits = (outputs[0] if isinstance(outputs, tuple) else outputs.logits).float()
        return logits if self._class_order is None else logits[:, self._class_order]

    def describe(self, encoding: LogitsEncoding) -> dict:
        """The record that identifies the column of this teacher, as a dict for JSON.

        It holds source, hash of the weights, configuration, preprocessing, classes, precision, and the encoding of the
        logits.
        """
        config = self.model.config
        settings = json.loads(config.to_json_string(use_diff=True))
        # With many classes these would be most of the record, which has the names already. timm uses `label_names`.
        names = ("id2label", "label2id", "label_names")
        settings = {key: value for key, value in settings.items() if key not in names}
        return {
            "name": self.name,
            "source": config.name_or_path or None,
            "revision": self.revision,
            "weights_sha256": self.weights_sha256(),
            "config": settings,
            "image_processor": json.loads(self.image_processor.to_json_string()),
            "num_labels": config.num_labels,
            "label_names": self.class_names,
            "encoding": encoding.to_dict(),
            "bf16": self.bf16,
        }

    def weights_sha256(self) -> str:
        """A hash of every parameter and buffer: name, type, shape and content."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()


def without_autocast(model: PreTrainedModel) -> PreTrainedModel:
    """The model without the autocast or the DDP wrapper that a trainer in this process may have left around it.

    It is a shallow copy, so the model of the trainer stays as it is.
    """
    return extract_model_from_parallel(copy.copy(model), keep_fp32_wrapper=False)


def load_teachers(
    teachers: Mapping[str, TeacherLike], *, bf16: bool = False, trust_remote_code: bool = False
) -> list[Teacher]:
    """Open teachers by name, in evaluation mode.

    Args:
        teachers: name → Hub id, folder, model loaded by `from_pretrained`, or (model, image processor).
        bf16: run them under bf16 autocast.
        trust_remote_code: run the code that a Hub repository or folder contains.

    Raises:
        ValueError: no teacher, a name that cannot name a column, a model without an image processor, or a model with its
            own code without `trust_remote_code`.
        OSError: an id or folder that cannot be loaded.
        ImportError: a library that the model is built on, such as timm, is not installed.
    """
    if not teachers:
        raise ValueError("teachers={} is empty. Pass at least one teacher, as name → model, Hub id or folder.")
    return [_load_teacher(name, teacher, bf16, trust_remote_code) for name, teacher in teachers.items()]


def _load_teacher(name, teacher, bf16, trust_remote_code):
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(
            f'"{name}" cannot name a teacher, because the name becomes part of a column name. Use letters, digits and "_", '
            "and do not begin with a digit."
        )
    revision = None
    if isinstance(teacher, tuple):
        model, processor = teacher
    elif isinstance(teacher, (str, os.PathLike)):
        revision = _resolve_revision(teacher)
        model = _load_model(teacher, revision=revision or "main", trust_remote_code=trust_remote_code)
        processor = _load_processor(name, str(teacher), trust_remote_code, revision or "main")
    elif not isinstance(teacher, PreTrainedModel):
        raise ValueError(
            f'The teacher "{name}" is {teacher!r}. Pass a Hub id, a folder, a model, or (model, image processor).'
        )
    else:
        model = teacher
        processor = _load_processor(name, model.name_or_path, trust_remote_code)
    return Teacher(name, without_autocast(model).eval(), processor, bf16, revision)


def _load_model(source, **options):
    try:
        return AutoModelForImageClassification.from_pretrained(source, **options)
    except TypeError:
        # timm 1.0.31 and later saves the number of classes among the arguments of the model, and the wrapper of
        # transformers then passes it twice.
        config = AutoConfig.from_pretrained(source, **options)
        if "num_classes" not in (getattr(config, "model_args", None) or {}):
            raise
        del config.model_args["num_classes"]
        return AutoModelForImageClassification.from_pretrained(source, config=config, **options)


def _resolve_revision(source):
    """The commit that a Hub id points to now; `None` for a folder."""
    if Path(source).exists():
        return None
    try:
        return HfApi().resolve_revision(str(source)).resolved
    except (OSError, ValueError):  # the error of `from_pretrained` is clearer
        return None


def _load_processor(name, source, trust_remote_code, revision="main"):
    missing = (
        f'The teacher "{name}" has no image processor{f" in {source}" if source else ""}. Save one beside the model '
        "(image_processor.save_pretrained(folder)), or pass the teacher as (model, image_processor)."
    )
    if not source:
        raise ValueError(missing)
    try:
        return AutoImageProcessor.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    except OSError as error:
        raise ValueError(missing) from error
