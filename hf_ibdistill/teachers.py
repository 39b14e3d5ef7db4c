"""Open and run a teacher: any image classifier of transformers, with its own image processor."""

import copy
import hashlib
import json
import logging
import os
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from types import MethodType

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    PreTrainedModel,
)

from .data.classes import check_class_names, config_class_names, normalize_names
from .logits.encoding import LogitsEncoding
from .passes import run_in_parts


logger = logging.getLogger(__name__)

_Path = str | os.PathLike
# Class of the dataset → the teacher's class or classes, by name or number.
ClassMapping = Mapping[str, str | int | Sequence[str | int]]
TeacherLike = PreTrainedModel | _Path | tuple[PreTrainedModel | _Path, BaseImageProcessor | _Path]


@dataclass
class Teacher:
    """An image classifier, its name, and the image processor that prepares its images.

    Attributes:
        name: the name of its logits column is `<name>_logits`.
        bf16: whether it runs under bf16 autocast.
        revision: its commit on the Hub; `None` for a folder or a model.
        classes: class of the dataset → the teacher's class or classes for it, by name or number; `None` for the same names.
    """

    name: str
    model: PreTrainedModel
    image_processor: BaseImageProcessor
    bf16: bool = False
    revision: str | None = None
    classes: ClassMapping | None = None
    # The names of the classes of `logits`, and for each the numbers of the teacher's classes.
    _matched: dict[str, list[int]] | None = None
    # Images of a forward pass, by the shape of an image.
    _sizes: dict[tuple[int, ...], int] = field(default_factory=dict)

    @property
    def class_names(self) -> list[str]:
        """The names of the classes, in the order of `logits`."""
        return config_class_names(self.model.config, self._title) if self._matched is None else list(self._matched)

    def match_classes(self, expected: Sequence[str]) -> None:
        """Make `logits` those of these classes, matched by name or by `classes`. Further classes are dropped. Of several
        classes for one, the logit is their log-sum-exp, so that probabilities add up.

        Raises:
            ValueError: the teacher lacks a class, or `classes` does not fit; the message names the difference.
        """
        names = normalize_names(config_class_names(self.model.config, self._title))
        wanted = normalize_names(expected)
        self._matched = None
        if self.classes is not None:
            unknown = [name for name in self.classes if name not in wanted]
            if unknown:
                raise ValueError(
                    f"The classes for {self._title} have {unknown[:10]}, which the dataset has not: {list(expected)[:10]}. Check "
                    "their spelling."
                )
            matched = {name: self._numbers_of(normal, names) for name, normal in zip(expected, wanted)}
            used = [number for numbers in matched.values() for number in numbers]
            if len(set(used)) < len(used):
                twice = sorted({names[number] for number in used if used.count(number) > 1})
                raise ValueError(f"The classes for {self._title} use {twice[:10]} twice. Give each class once.")
            self._matched = matched
            return
        if names != wanted and set(wanted) <= set(names) and len(set(names)) == len(names):
            self._matched = {name: [names.index(normal)] for name, normal in zip(expected, wanted)}
            dropped = len(names) - len(self._matched)
            logger.warning(
                'The teacher "%s" has the classes of the dataset %s. Its logits are matched by class name.',
                self.name,
                f"and {dropped} others, which are dropped" if dropped else "in another order",
            )
        check_class_names(self.class_names, expected, self._title)

    def _numbers_of(self, name, names) -> list[int]:
        """The numbers of the teacher's classes for a class of the dataset."""
        given = self.classes.get(name, name)
        numbers = []
        for one in given if isinstance(given, list) else [given]:
            is_number = isinstance(one, int)
            if (one not in range(len(names))) if is_number else (names.count(one) != 1):
                raise ValueError(
                    f'The class "{name}" of the dataset is {one!r} for {self._title}, which has no such class, or several. Its '
                    f"{len(names)} classes are {names[:5]}, …"
                )
            numbers.append(one if is_number else names.index(one))
        if not numbers:
            raise ValueError(f'The class "{name}" of the dataset has no class of {self._title}. Give at least one.')
        return numbers

    @property
    def _title(self) -> str:
        return f'the teacher "{self.name}"'

    def logits(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Run the teacher, without gradients.

        Args:
            pixel_values: (N, channels, H, W), prepared by the teacher's own image processor.

        Returns:
            (N, classes) in float32, in the order of `class_names`, on the device of the teacher.

        Raises:
            ValueError: the teacher fails on these images, or predicts another number of logits than it has classes.
            torch.OutOfMemoryError: the batch is too large for the device.
        """
        device, shape = self.model.device, tuple(pixel_values.shape)
        # Set in either case, because the autocast of a caller must not change what is recorded.
        with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.bf16):
            try:
                pixel_values = pixel_values.to(device, self.model.dtype)
                outputs = torch.cat(run_in_parts(self._run, self.model, pixel_values, self._sizes))
                found = tuple(outputs.shape)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever the code of any model raises
                raise ValueError(
                    f'The teacher "{self.name}" ({type(self.model).__name__}) fails on pixel values of shape {shape}: '
                    f"{type(error).__name__}: {error}. Check that its image processor belongs to it, and that it takes "
                    "RGB images."
                ) from error
        if found != (shape[0], self.model.config.num_labels):
            raise ValueError(
                f'The teacher "{self.name}" predicts logits of shape {found} for {shape[0]} images, but its configuration '
                f"has {self.model.config.num_labels} classes (id2label). Make the two fit."
            )
        if self._matched is None:
            return outputs.float()
        groups, outputs = list(self._matched.values()), outputs.float()
        if all(len(numbers) == 1 for numbers in groups):
            return outputs[:, [number for (number,) in groups]]
        return torch.stack([outputs[:, numbers].logsumexp(1) for numbers in groups], dim=1)

    def _run(self, pixel_values) -> torch.Tensor:
        outputs = self.model(pixel_values=pixel_values)
        # Models with their own code may return tuples. As in transformers, logits come first if there is no loss.
        if not isinstance(outputs, torch.Tensor):
            outputs = outputs[0] if isinstance(outputs, tuple) else outputs["logits"]
        return outputs

    def describe(self, encoding: LogitsEncoding, weights_sha256: str | None = None) -> dict:
        """The record that identifies the column of this teacher, as a dict for JSON.

        It holds source, hash of the weights, configuration, preprocessing, classes, precision, and the encoding of the
        logits. The hash is computed if it is not given.
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
            "weights_sha256": weights_sha256 or self.weights_sha256(),
            "config": settings,
            "image_processor": json.loads(self.image_processor.to_json_string()),
            "num_labels": len(self.class_names),
            "label_names": self.class_names,
            # Only if they are chosen, so that records of tables without it stay equal.
            **(
                {}
                if self.classes is None
                else {"classes": {name: self.classes.get(name, name) for name in normalize_names(self.class_names)}}
            ),
            "encoding": encoding.to_dict(),
            "bf16": self.bf16,
        }

    def weights_sha256(self) -> str:
        """A hash of every parameter and buffer: name, type, shape and content.

        Raises:
            ValueError: they are no plain tensors, as in some quantized models.
        """
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            try:
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
            except (AttributeError, RuntimeError, TypeError, NotImplementedError) as error:
                raise ValueError(
                    f'The teacher "{self.name}" has the weight {name} of type {type(tensor).__name__}, whose content cannot '
                    "be hashed for the provenance. Pass the model with its weights loaded, before it was quantized."
                ) from error
        return digest.hexdigest()


def require_model(model: object) -> None:
    """Refuse anything but a model of transformers, compiled or not.

    Raises:
        TypeError: it is another object.
        ValueError: its weights are on the meta device.
    """
    if not isinstance(getattr(model, "_orig_mod", model), PreTrainedModel):
        # The `repr` of a module lists all its layers.
        shown = f"{type(model).__name__}(…)" if isinstance(model, torch.nn.Module) else repr(model)
        raise TypeError(f"model={shown} is no model of transformers. Pass what from_pretrained returns.")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(f"The weights of {type(model).__name__} are on the meta device. Load them before it is used.")


def without_autocast(model: PreTrainedModel) -> PreTrainedModel:
    """The model without the autocast that a trainer in this process may have left around its `forward`.

    It is a shallow copy, so the model of the trainer stays as it is.
    """
    model = copy.copy(model)
    # accelerate's own way back, `extract_model_from_parallel(keep_fp32_wrapper=False)`, also takes off the decorators that the class has around `forward`.
    original = vars(model).pop("_original_forward", None)
    if original is not None:
        # A method of the model that this is a copy of.
        model.forward = MethodType(original.__func__, model) if isinstance(original, MethodType) else original
    return model


def available_device() -> torch.device:
    """The accelerator that is there, or the CPU."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


@contextmanager
def on_device(model: PreTrainedModel, device: torch.device) -> Iterator[PreTrainedModel]:
    """The model on a device for a while; then it is where it was."""
    before = model.device
    try:
        yield model.to(device)
    finally:
        model.to(before)


def load_teachers(
    teachers: Mapping[str, TeacherLike],
    *,
    bf16: bool = False,
    trust_remote_code: bool = False,
    classes: Mapping[str, ClassMapping] | None = None,
) -> list[Teacher]:
    """Open teachers by name, in evaluation mode.

    Args:
        teachers: name → Hub id, folder, model loaded by `from_pretrained`, or (model, image processor). Each of the two
            may be a Hub id or folder.
        bf16: run them under bf16 autocast.
        trust_remote_code: run the code that a Hub repository or folder contains.
        classes: teacher → class of the dataset → the teacher's class or classes for it, by name or number. Classes that are
            not given are matched by name, and so are those of other teachers.

    Raises:
        TypeError: `teachers` or `classes` is no mapping, or a class is neither a name nor a number.
        ValueError: no teacher, `classes` of another one, a name that cannot name a column, another kind of object, a model
            without an image processor, or a model with its own code without `trust_remote_code`.
        OSError: an id or folder that cannot be loaded.
        ImportError: a library that the model is built on, such as timm, is not installed.
    """
    if not isinstance(teachers, Mapping):
        raise TypeError(f"teachers={teachers!r} has no names. Pass name → model, Hub id or folder, as a dict.")
    if not teachers:
        raise ValueError("teachers={} is empty. Pass at least one teacher, as name → model, Hub id or folder.")
    classes = {} if classes is None else classes
    if not isinstance(classes, Mapping) or not all(isinstance(mapping, Mapping) for mapping in classes.values()):
        raise TypeError(f"classes={classes!r} does not map teacher → class of the dataset → class of the teacher.")
    others = [name for name in classes if name not in teachers]
    if others:
        raise ValueError(f"classes are given for {others}, but the teachers are {list(teachers)}. Use their names.")
    loaded = [_load_teacher(name, teacher, bf16, trust_remote_code) for name, teacher in teachers.items()]
    for teacher in loaded:
        if teacher.name in classes:
            teacher.classes = _plain_classes(classes[teacher.name], teacher.name)
    return loaded


def _plain_classes(mapping, teacher_name):
    """The mapping as JSON holds it, with names in which an accented letter is one sign."""

    def plain(value):
        if isinstance(value, str):
            return normalize_names([value])[0]
        if isinstance(value, Integral) and not isinstance(value, bool):
            return int(value)
        if not isinstance(value, Sequence):
            raise TypeError(
                f'The classes for the teacher "{teacher_name}" have {value!r}. Give the name or number of a class, or a list '
                "of these."
            )
        return [plain(one) for one in value]

    return {plain(name): plain(value) for name, value in mapping.items()}


def _load_teacher(name, teacher, bf16, trust_remote_code):
    # Two spellings of one letter would make two columns that look the same.
    if not isinstance(name, str) or not name.isidentifier() or not unicodedata.is_normalized("NFKC", name):
        raise ValueError(
            f'"{name}" cannot name a teacher, because the name becomes part of a column name. Use letters, digits and "_", '
            "and do not begin with a digit."
        )
    model, processor = teacher if isinstance(teacher, (tuple, list)) and len(teacher) == 2 else (teacher, None)
    revision, source = None, model
    if isinstance(model, _Path):
        revision = _resolve_revision(model)
        options = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
        model = load_classifier(model, f'The teacher "{name}"', **options)
    elif isinstance(model, torch.nn.Module):
        model = without_autocast(model)
        source = getattr(model, "name_or_path", "")
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f'The teacher "{name}" is a {type(model).__name__}, whose classes and image processor are unknown. Pass a Hub '
            "id, a folder, a model of transformers, or (model, image processor)."
        )
    if processor is None:
        processor = _load_processor(name, source, trust_remote_code, revision or "main")
    elif isinstance(processor, _Path):
        processor = _load_processor(name, processor, trust_remote_code, _resolve_revision(processor) or "main")
    elif not isinstance(processor, BaseImageProcessor):
        raise ValueError(
            f'The image processor of the teacher "{name}" is a {type(processor).__name__}, whose settings cannot be '
            "recorded. Pass one of transformers, such as ViTImageProcessor(size=…, image_mean=…, image_std=…)."
        )
    return Teacher(name, model.eval(), processor, bf16, revision)


def load_classifier(source: _Path, owner: str = "The model", **options) -> PreTrainedModel:
    """An image classifier of transformers, none of whose weights start at random.

    Args:
        source: folder or Hub id.
        owner: what an error calls it.
        options: of `from_pretrained`.

    Raises:
        ValueError: weights are missing, or the files are damaged.
        OSError: it cannot be found.
    """
    with explain_loading(owner, source):
        model, info = load_model(source, **options)
    missing = missing_weights(model, info)
    if missing:
        raise ValueError(
            f"{owner} has no {', '.join(missing[:4])}{' …' if missing[4:] else ''} in {source}. Give an image classifier "
            "with its head, trained on the classes of the dataset."
        )
    return model


def missing_weights(model: PreTrainedModel, info: Mapping) -> list[str]:
    """The parameters and statistics of a model that its checkpoint lacks, from what [`load_model`] reported."""
    weights = model.state_dict()
    # An older student without teachers was saved without an empty tensor, and older batch norms without their counts.
    return sorted(
        name
        for name in info["missing_keys"]
        if name in weights and weights[name].numel() and not name.endswith("num_batches_tracked")
    )


@contextmanager
def explain_loading(owner: str, source: _Path) -> Iterator[None]:
    """Name what cannot be loaded, and from where.

    Raises:
        ValueError, OSError: in place of whatever the code of any model raises, except `ImportError` and what a
            configuration refuses.
    """
    try:
        yield
    except (ImportError, StrictDataclassError):
        raise
    except OSError as error:
        raise OSError(f"{owner} cannot be loaded from {source}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{owner} cannot be loaded from {source}: {error}") from error
    except Exception as error:
        raise ValueError(
            f"{owner} cannot be loaded from {source}, because its files are damaged or do not fit each other "
            f"({type(error).__name__}). Copy or save it again."
        ) from error


def load_model(source: _Path, **options) -> tuple[PreTrainedModel, dict]:
    """An image classifier and what `from_pretrained` reports about its weights."""
    try:
        return AutoModelForImageClassification.from_pretrained(source, output_loading_info=True, **options)
    except TypeError:
        # timm 1.0.31 and later saves the number of classes among the arguments of the model, and the wrapper of
        # transformers then passes it twice.
        config = AutoConfig.from_pretrained(source, **options)
        if "num_classes" not in (getattr(config, "model_args", None) or {}):
            raise
        del config.model_args["num_classes"]
        options |= {"config": config, "output_loading_info": True}
        return AutoModelForImageClassification.from_pretrained(source, **options)


def _resolve_revision(source):
    """The commit that a Hub id points to now; `None` for a folder."""
    if Path(source).exists():
        return None
    try:
        return HfApi().resolve_revision(str(source)).resolved
    except Exception:  # the error of `from_pretrained` is clearer
        return None


def _load_processor(name, source, trust_remote_code, revision="main"):
    missing = (
        f'The teacher "{name}" has no image processor{f" in {source}" if source else ""}. Save one beside the model '
        "(image_processor.save_pretrained(folder)), or pass the teacher as (model, image_processor)."
    )
    if not source:
        raise ValueError(missing)
    try:
        with explain_loading(f'The image processor of the teacher "{name}"', source):
            return AutoImageProcessor.from_pretrained(
                str(source), revision=revision, trust_remote_code=trust_remote_code
            )
    except OSError as error:
        # timm needs no such file, so it is looked for only now.
        if not Path(source).is_dir() or any(Path(source).glob("*processor_config.json")):
            raise
        raise ValueError(missing) from error
