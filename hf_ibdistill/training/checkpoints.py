"""Check a checkpoint before training resumes from it."""

import json
import logging
import os
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.trainer_utils import get_last_checkpoint, sort_checkpoints

from ..files import read_json


logger = logging.getLogger(__name__)

_NEEDED = ("trainer_state.json", "optimizer.pt", "scheduler.pt")


def checkpoint_to_resume(given: str | os.PathLike | bool | None, output_dir: str, model: nn.Module) -> str | None:
    """The checkpoint that `Trainer.train(resume_from_checkpoint=given)` resumes from, after a check.

    Args:
        given: a folder; `True` for the last whole checkpoint in `output_dir`; or `None` or `False` for none.
        output_dir: the folder of the run.
        model: the model to train.

    Raises:
        ValueError: the checkpoint, or with `True` every checkpoint, is not whole, or it belongs to another model.
    """
    if not given:
        return None
    if given is not True:
        check_checkpoint(given, model)
        return str(given)
    problem = f"{output_dir} has no checkpoint. Train without resume_from_checkpoint."
    folders = sort_checkpoints(output_dir) if os.path.isdir(output_dir) and get_last_checkpoint(output_dir) else []
    for folder in reversed(folders):
        if not (damage := _damage(Path(folder))):
            check_checkpoint(folder, model)
            return folder
        problem = f"{folder} is not a whole checkpoint, because {damage}."
        logger.warning("%s It is skipped.", problem)
    raise ValueError(f"resume_from_checkpoint=True: {problem}")


def checkpoints_to_resume(
    given: Sequence[str | os.PathLike] | bool | None, output_dirs: Sequence[str], models: Sequence[nn.Module]
) -> list[str | None]:
    """The checkpoints that several models resume from together, after a check. They are of the same step.

    Args:
        given: a folder for each model; `True` for the last step of which every folder in `output_dirs` has a whole
            checkpoint; or `None` or `False` for none.
        output_dirs: for each model, the folder of its run.
        models: the models to train.

    Raises:
        ValueError: as from [`checkpoint_to_resume`], or the checkpoints are of different steps.
    """
    if not given:
        return [None] * len(models)
    if given is True:
        found = [_whole_checkpoints(output_dir) for output_dir in output_dirs]
        common = set.intersection(*map(set, found))
        if not common:
            listed = [
                f"{output_dir} has {', '.join(map(str, sorted(one))) or 'none'}"
                for output_dir, one in zip(output_dirs, found)
            ]
            raise ValueError(
                f"resume_from_checkpoint=True: there is no step of which all have a whole checkpoint: {'; '.join(listed)}. "
                "Train without resume_from_checkpoint."
            )
        given = [one[max(common)] for one in found]
    given = [str(folder) for folder in ([given] if isinstance(given, (str, os.PathLike)) else given)]
    if len(set(given)) < len(given) or len(given) != len(models):
        raise ValueError(
            f"resume_from_checkpoint={given} has {len(set(given))} folders for {len(models)} models. Give True, or a folder "
            "for each."
        )
    for folder, model in zip(given, models):
        check_checkpoint(folder, model)
    steps = [_step(folder) for folder in given]
    if len(set(steps)) > 1:
        listed = ", ".join(f"{folder} of step {step}" for folder, step in zip(given, steps))
        raise ValueError(f"resume_from_checkpoint={listed}: the steps differ. Give checkpoints of the same step.")
    return given


def _whole_checkpoints(output_dir: str) -> dict[int, str]:
    """Step → folder."""
    folders = sort_checkpoints(output_dir) if os.path.isdir(output_dir) else []
    return {_step(folder): folder for folder in folders if not _damage(Path(folder))}


def _step(folder: str) -> int:
    return read_json(Path(folder) / "trainer_state.json")["global_step"]


def check_checkpoint(folder: str | os.PathLike, model: nn.Module) -> None:
    """Raise `ValueError` if a file of a checkpoint is missing or cut off, or if it belongs to another model. Checkpoints of
    FSDP and DeepSpeed, which have other files, pass."""
    folder = Path(folder)
    if damage := _damage(folder):
        raise ValueError(
            f"resume_from_checkpoint={folder} is not a whole checkpoint, because {damage}. Choose an earlier one, or True "
            "for the last whole one."
        )
    if differences := _differences(folder, model):
        more = f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise ValueError(
            f"resume_from_checkpoint={folder} belongs to another model: {'; '.join(differences[:3])}{more}. Resume with the "
            "settings that it began with, or choose another output_dir."
        )
    state = PartialState()
    random = f"rng_state_{state.process_index}.pth" if state.num_processes > 1 else "rng_state.pth"
    if not (folder / random).exists():
        advice = "Training resumes, but not exactly as it would have gone on."
        logger.warning("%s has no %s, the state of the random numbers. %s", folder, random, advice)


@contextmanager
def saved_names(model: nn.Module) -> Iterator[None]:
    """Let `model.load_state_dict` take weights under the names that `save_pretrained` writes.

    transformers 5 renames the weights of ViT, Swin and others as it saves them. Its `Trainer` would leave them out.
    """

    def rename(_, state_dict, *args):
        if isinstance(model, PreTrainedModel) and not state_dict.keys() <= model.state_dict().keys():
            loaded = type(model).from_pretrained(None, config=model.config, state_dict=dict(state_dict))
            state_dict.clear()
            state_dict.update(loaded.state_dict())

    hook = model.register_load_state_dict_pre_hook(rename)
    try:
        yield
    finally:
        hook.remove()


def _damage(folder: Path) -> str | None:
    """What keeps training from resuming at a checkpoint, or `None`."""
    if not folder.is_dir():
        return "there is no such folder"
    if any(path.is_dir() for path in folder.iterdir()):
        return None  # of FSDP, DeepSpeed or several adapters
    names = {path.name for path in folder.iterdir()}
    missing = [name for name in _NEEDED if name not in names]
    if not any(name.endswith((".safetensors", "model.bin")) for name in names):
        missing.append("model.safetensors")
    if missing:
        return f"it has no {', '.join(missing)}"
    for path in folder.glob("*.json"):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            return f"{path.name} is cut off"
        if path.name in ("config.json", "trainer_state.json") and not isinstance(content, dict):
            return f"{path.name} holds a {type(content).__name__}"
        if path.name == "trainer_state.json" and "global_step" not in content:
            return f"{path.name} has no global_step"
        # The index of weights in several files.
        if path.name.endswith(".index.json") and (absent := {*content["weight_map"].values()} - names):
            return f"it has no {', '.join(sorted(absent))}"
    for path in folder.glob("*.safetensors"):
        try:
            # It compares the length of the file with its header.
            safe_open(path, "pt")
        except SafetensorError:
            return f"{path.name} is cut off"
    for path in folder.glob("*.pt*"):
        if not zipfile.is_zipfile(path):
            return f"{path.name} is cut off"
    return None


def _differences(folder: Path, model: nn.Module) -> list[str]:
    """How the weights and classes of a checkpoint differ from those of the model."""
    lines = []
    config = getattr(model, "config", None)
    if config is not None and (folder / "config.json").exists():
        found = type(config).from_pretrained(folder)
        for name in ("teacher_names", "id2label"):
            ours, theirs = getattr(config, name, None), getattr(found, name, None)
            if ours != theirs:
                lines.append(f"{name} {theirs} instead of {ours}")
    files = list(folder.glob("model*.safetensors"))
    if lines or not files:
        return lines
    shapes = {}
    for path in files:
        with safe_open(path, "pt") as weights:
            shapes |= {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    # Tied weights are saved once.
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    state = model.state_dict()
    if isinstance(model, PreTrainedModel) and state.keys() - tied != shapes.keys() - tied:
        state = revert_weight_conversion(model, {name: tensor.to("meta") for name, tensor in state.items()})
    expected = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name in sorted({*shapes, *expected} - tied):
        if shapes.get(name) != expected.get(name):
            lines.append(f"{name} has the shape {shapes.get(name)} instead of {expected.get(name)}")
    return lines
