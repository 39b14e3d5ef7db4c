"""Start a student: from any checkpoint, for other teachers, images and classes, or from nothing."""

import copy
import itertools
import logging
import math
import os

import torch
from huggingface_hub.errors import StrictDataclassError
from PIL.Image import new as new_image
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
)

from .data.classes import config_class_names
from .images.preprocessing import pixel_values
from .models.configuration_ibvit import IBViTConfig
from .models.conversion_vit import interpolate_positions
from .models.modeling_ibvit import IBViTForImageClassification
from .teachers import explain_loading, load_model, missing_weights


logger = logging.getLogger(__name__)


def load_student(
    name_or_path: str | os.PathLike, teacher_names: list[str] | tuple[str, ...] | None = None, **kwargs
) -> PreTrainedModel:
    """A student from a checkpoint, for other teachers, classes or another image size, in evaluation mode and float32.

    A student, ViT or DeiT becomes an [`IBViTForImageClassification`]. The token, position, head and (in `"bias_stems"`)
    stem of a teacher belong to its name. They are kept if the name stays and left out if it goes. A new name gets copies
    of the token, position and head of the class token, and the default stem. If the names of the classes differ, all heads
    start from nothing, with a warning of transformers. Position embeddings of the patches are interpolated (bicubic).

    A model of any other family stays what it is, and its prediction answers every teacher. If its classes
    differ, or it has no head, its head starts from nothing, with a warning.

    Args:
        name_or_path: folder or Hub id of a saved student, of a ViT or DeiT checkpoint (see
            [`IBViTForImageClassification.from_vit`]; the distillation token of a DeiT becomes the first teacher's), or of
            any model that `AutoModelForImageClassification` loads, with or without a head.
        teacher_names: as in [`IBViTConfig`]. `None` keeps the model's own, which suits fine-tuning without teachers,
            because the other tokens attend to them. Without effect on other families, which have no tokens.
        kwargs: fields of the configuration to change, such as those of [`class_config`], and for an IBViT `image_size` and
            `fusion`. `None` keeps the field of the checkpoint. `image_size` has no effect on other families.

    Raises:
        TypeError: `name_or_path` is no path, or a field does not exist.
        ValueError: the checkpoint is of another type, or its files are damaged.
        StrictDataclassClassValidationError: as from [`IBViTConfig`].
        RuntimeError: the weights do not fit a given field, such as `patch_size`.
        OSError: there is no such checkpoint.

    Example:

    ```python
    >>> model = load_student("user/student", image_size=32, **class_config(images))
    >>> model = load_student("facebook/deit-tiny-patch16-224", teacher_names=("conv", "inv"), **class_config(images))
    >>> model = load_student("google/mobilenet_v2_1.0_224", **class_config(images))
    ```
    """
    _require_path(name_or_path)
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    with explain_loading("The student", name_or_path):
        model_type = PreTrainedConfig.get_config_dict(name_or_path)[0].get("model_type")
    if model_type not in (IBViTConfig.model_type, "vit", "deit"):
        # Most take images of any size; `check_fit` finds the others.
        kwargs.pop("image_size", None)
        return load_with_classes(name_or_path, "The student", **kwargs)
    with explain_loading("The student", name_or_path):
        if model_type == IBViTConfig.model_type:
            model = IBViTForImageClassification.from_pretrained(name_or_path, dtype=torch.float32)
        else:
            # Unless it has another name, `from_vit` would keep a distillation token that is not wanted.
            names = () if teacher_names is None else teacher_names or ("left_out",)
            model = IBViTForImageClassification.from_vit(name_or_path, teacher_names=names, dtype=torch.float32)
    old, weights = model.config, model.state_dict()
    fields = old.to_dict()
    if teacher_names is not None:
        fields["teacher_names"] = teacher_names
        fields["teacher_spatial_operators"] = None
        if old.patch_embedding == "bias_stems":
            stems = dict(zip(old.teacher_names, old.teacher_token_stems))
            alternating = itertools.cycle(("convolution", "involution"))
            fields["teacher_spatial_operators"] = [stems.get(n, stem) for n, stem in zip(teacher_names, alternating)]
    config, unknown = IBViTConfig.from_dict(fields, return_unused_kwargs=True, **kwargs)
    _refuse_unknown(unknown, config)
    config.validate()
    weights = _match_teachers(weights, old.teacher_names, config.teacher_names)
    if config_class_names(config) != config_class_names(old):
        heads = ("class_head.", "teacher_heads.")
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith(heads)}
    if config.image_size != old.image_size:
        name, side = "ibvit.embeddings.position_embeddings", config.image_size // old.patch_size
        weights[name] = interpolate_positions(weights[name], old.image_size // old.patch_size, (side, side))
    model = IBViTForImageClassification.from_pretrained(None, config=config, state_dict=weights, dtype=torch.float32)
    model.config.name_or_path = model.name_or_path = str(name_or_path)
    return model


def load_with_classes(name_or_path: str | os.PathLike, owner: str = "The model", **kwargs: object) -> PreTrainedModel:
    """Any image classifier from a checkpoint, in evaluation mode and float32. If the names of its classes differ from those
    given, or it has no head, its head starts from nothing, with a warning.

    Args:
        name_or_path: folder or Hub id of a model that `AutoModelForImageClassification` loads.
        owner: what an error calls it.
        kwargs: fields of its configuration to change, such as those of [`class_config`].

    Raises:
        TypeError: `name_or_path` is no path, or a field does not exist.
        ValueError: the files are damaged, or no weights but those of the head fit the model.
        OSError: there is no such checkpoint.
    """
    _require_path(name_or_path)
    with explain_loading(owner, name_or_path):
        model, info = load_model(name_or_path, dtype=torch.float32)
    config = copy.deepcopy(model.config)
    classes = {"num_labels", "id2label", "label2id"}
    _refuse_unknown({name: value for name, value in kwargs.items() if name not in {*vars(config), *classes}}, config)
    for name, value in kwargs.items():
        setattr(config, name, value)
    heads = head_parameters(model)
    missing = set(missing_weights(model, info))
    if missing - heads:
        raise ValueError(
            f"{owner} in {name_or_path} has no weights for {', '.join(sorted(missing - heads)[:4])}. Give a trained model."
        )
    changes = {name: value for name, value in kwargs.items() if name not in classes}
    has_same_classes = config_class_names(config) == config_class_names(model.config)
    if has_same_classes and not missing and not changes:
        return model
    weights = model.state_dict()
    if missing or not has_same_classes:
        logger.warning("%s gets a new head for %d classes; train it.", owner, config.num_labels)
        weights = {name: tensor for name, tensor in weights.items() if name not in heads}
        # A head for several labels an image becomes one for one.
        config.problem_type = None
    new = type(model)(config)
    try:
        unfilled = set(new.load_state_dict(weights, strict=False).missing_keys) - heads
    except RuntimeError as error:  # weights of another shape
        raise ValueError(f"{owner} in {name_or_path} does not fit {changes}: {error}") from error
    if unfilled:
        raise ValueError(
            f"{owner} in {name_or_path} has no weights for {', '.join(sorted(unfilled)[:4])} with {changes}. Leave out what "
            "changes the shape of the model."
        )
    new.config.name_or_path = new.name_or_path = str(name_or_path)
    return new.eval()


def build_student(architecture: str, image_size: int | None = None, **fields: object) -> PreTrainedModel:
    """An untrained classifier of any architecture of transformers, or of timm.

    Args:
        architecture: a model type of transformers, such as `"mobilenet_v2"`, `"resnet"` or `"convnext"`; or
            `"timm/"` with a name of timm, such as `"timm/mobilenetv3_small_100"`.
        image_size: side of its images in pixels, for configurations with such a field, or with one in `vision_config`.
        fields: of its configuration, such as `hidden_sizes` and those of [`class_config`]. For timm those of
            [`class_config`], and arguments of `timm.create_model`.

    Raises:
        TypeError: a field does not exist.
        ValueError: there is no image classifier of this architecture, or its fields do not fit each other.
    """
    kind, _, name = architecture.rpartition("/")
    classes = {key: fields.pop(key) for key in ("num_labels", "id2label", "label2id") if key in fields}
    if kind not in ("", "timm"):
        raise ValueError(
            f'architecture="{architecture}" is neither a model type nor timm/NAME. Load a checkpoint with load_student.'
        )
    try:
        if kind == "timm":
            config = TimmWrapperConfig(architecture=name, model_args=fields or None, **classes)
            return TimmWrapperForImageClassification(config)
        defaults = AutoConfig.for_model(name)
    except ImportError:
        raise
    except Exception as error:  # whatever timm and transformers raise for a name that they do not have
        raise ValueError(f'architecture="{architecture}" cannot be built: {error}') from error
    found = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING.get(type(defaults), None)
    if found is None:
        raise ValueError(
            f'architecture="{architecture}" has no image classifier in transformers. Choose another, or timm/NAME.'
        )
    _refuse_unknown({key: value for key, value in fields.items() if not hasattr(defaults, key)}, defaults)
    if image_size is not None and hasattr(defaults, "image_size"):
        fields.setdefault("image_size", image_size)
    elif image_size is not None and hasattr(defaults, "vision_config"):
        fields["vision_config"] = {"image_size": image_size, **fields.get("vision_config", {})}
    try:
        # Some families have several classes; the first is the plain one.
        model_class = found[0] if isinstance(found, (tuple, list)) else found
        return model_class(AutoConfig.for_model(name, **fields, **classes))
    except StrictDataclassError:
        raise
    except Exception as error:  # whatever the code of any model raises
        raise ValueError(f'architecture="{architecture}" cannot be built with {fields}: {error}') from error


def head_parameters(model: PreTrainedModel) -> set[str]:
    """The names of the parameters of a classifier whose shape depends on the number of its classes.

    Raises:
        ValueError: there are none.
    """
    model = getattr(model, "_orig_mod", model)
    config = copy.deepcopy(model.config)
    config.num_labels = model.config.num_labels + 1
    with torch.device("meta"):
        other = type(model)(config)
    shapes = {name: parameter.shape for name, parameter in other.named_parameters()}
    # Parameters of adapters are in this model alone.
    heads = {name for name, own in model.named_parameters() if shapes.get(name, own.shape) != own.shape}
    if not heads:
        raise ValueError(
            f"{type(model).__name__} has no head whose shape depends on the number of classes. Give an image classifier."
        )
    return heads


def _require_path(name_or_path):
    if not isinstance(name_or_path, (str, os.PathLike)):
        raise TypeError(f"name_or_path is a {type(name_or_path).__name__}. Pass the folder or Hub id of a checkpoint.")


def _refuse_unknown(fields, config):
    if fields:
        name, value = next(iter(fields.items()))
        raise TypeError(f"{name}={value!r} is no field of {type(config).__name__}. Check its spelling.")


def _match_teachers(weights: dict[str, torch.Tensor], old: list[str], new: list[str]) -> dict[str, torch.Tensor]:
    """The weights of a student for other teachers, by their names; see [`load_student`]."""
    # For each new token, the old one that it starts as; the class token is number 0.
    starts = [0, *(1 + old.index(name) if name in old else 0 for name in new)]
    embeddings = "ibvit.embeddings"
    kinds = ("class_token", "teacher_tokens") if old else ("class_token",)
    tokens = torch.cat([weights[f"{embeddings}.{kind}"] for kind in kinds], dim=1)
    positions = weights[f"{embeddings}.position_embeddings"]
    matched = {name: tensor for name, tensor in weights.items() if not name.startswith("teacher_heads.")}
    matched.pop(f"{embeddings}.teacher_tokens", None)
    if new:
        matched[f"{embeddings}.teacher_tokens"] = tokens[:, starts[1:]]
    matched[f"{embeddings}.position_embeddings"] = torch.cat(
        (positions[:, starts], positions[:, 1 + len(old) :]), dim=1
    )
    heads = ["class_head", *(f"teacher_heads.{i}" for i in range(len(old)))]
    for i, start in enumerate(starts[1:]):
        for part in ("weight", "bias"):
            matched[f"teacher_heads.{i}.{part}"] = weights[f"{heads[start]}.{part}"].clone()
    return matched


def load_image_processor(name_or_path: str | os.PathLike, image_size: int | None = None) -> BaseImageProcessor:
    """The image processor of a checkpoint.

    Args:
        name_or_path: folder or Hub id of the checkpoint.
        image_size: side of its images in pixels, as in [`load_student`]. `None` keeps the size of the checkpoint.

    Raises:
        OSError: there is no such image processor.
    """
    processor = AutoImageProcessor.from_pretrained(name_or_path)
    if image_size is None:
        return processor
    # The processor of a DeiT cuts the middle out of a larger image.
    side = {"height": image_size, "width": image_size}
    sizes = {"size": side, "crop_size": side}
    if getattr(processor, "crop_pct", None) and not getattr(processor, "do_center_crop", None):
        # That of a ConvNeXt cuts out a square itself, and takes no other size.
        sizes = {"size": {"shortest_edge": image_size}}
    return AutoImageProcessor.from_pretrained(name_or_path, **sizes)


def check_fit(model: PreTrainedModel, image_processor: BaseImageProcessor) -> None:
    """Run a classifier on one gray image, before time is spent.

    Raises:
        ValueError: the model fails on what its image processor makes.
    """
    pixels = pixel_values([new_image("RGB", (64, 64))], {"model": image_processor})["model"]
    was_training = model.training
    try:
        with torch.no_grad():
            model.eval()(pixel_values=pixels.to(model.device, model.dtype))
    except Exception as error:  # whatever the code of any model raises
        raise ValueError(
            f"{type(model).__name__} fails on images of shape {tuple(pixels.shape[1:])}: {error}. Set image_size to a size "
            "that it takes."
        ) from error
    finally:
        model.train(was_training)


def default_patch_size(image_size: int) -> int:
    """Side of a patch in pixels: the divisor of the image's side that is nearest to 2 (below 16 pixels), 4 (up to 64) or
    16, by ratio."""
    target = 2 if image_size < 16 else 4 if image_size <= 64 else 16
    divisors = [side for side in range(1, image_size + 1) if image_size % side == 0]
    return min(divisors, key=lambda side: abs(math.log(side / target)))
