"""The arguments that commands share, and how they are read: flags, or `--config file.yaml` with flags on top."""

import argparse
import dataclasses
import difflib
import inspect
import json
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import yaml
from datasets import Dataset, DatasetDict
from huggingface_hub.errors import StrictDataclassError
from transformers import HfArgumentParser, Trainer, TrainingArguments
from transformers.hf_argparser import HfArg, string_to_bool

from ..checks import check_numbers
from ..data.loading import load_image_dataset
from ..data.sources import public_name
from ..data.splits import select_per_class
from ..data.unlabelled import add_unlabelled
from ..files import read_json
from ..images.decoding import scale_pixels
from ..images.views import ViewRecipe
from ..processes import keep_freed_memory
from ..progress import Progress
from ..publishing.results import RESULTS, evaluate_and_save
from ..training.arguments import ImageTrainingArguments
from .display import displaying, metric_rows, metric_text, show_results, training_display


# Seconds from which on opening the data is a stage of its own.
_NOTICED = 2


@dataclass
class DataArguments:
    _argument_group_name = "data"

    dataset: str = HfArg(
        default="digits",
        help='The images: "digits" (8×8, bundled), a folder of class folders, a save_to_disk folder, a Parquet file '
        "or folder, a folder of IDX files, or a Hub id.",
    )
    image_column: str | None = HfArg(default=None, help="Image column; found if not given.")
    label_column: str | None = HfArg(default=None, help="Label column; found if not given.")
    validation_fraction: float = HfArg(
        default=0.1, help="Share of the training images to hold out if there is no validation split."
    )
    images_per_class: int | None = HfArg(
        default=None, help="Train on a random subset with this many images of each class."
    )
    split_seed: int = HfArg(default=0, help="Seed of the validation split and of the subset.")
    pixel_range: list[float] | None = HfArg(
        default=None,
        help="Levels of black and white in gray images of 16 or 32 bits, signed or float.",
    )

    # Arguments of some commands.
    unlabelled = None
    keep_rest = False

    def load(self, skip_unreadable: bool = False) -> DatasetDict:
        """The splits, with the columns "image" and "label"; `skip_unreadable` as in [`add_unlabelled`]."""
        with Progress("open the images") as progress:
            splits = self._open(skip_unreadable)
            progress.update(sum(map(len, splits.values())))
            if progress.seconds >= _NOTICED:
                progress.finish()
        return splits

    def _open(self, skip_unreadable):
        if self.pixel_range is not None and len(self.pixel_range) != 2:
            raise ValueError(f"pixel_range={self.pixel_range} is not two numbers. Give the levels of black and white.")
        splits = load_image_dataset(
            self.dataset,
            image_column=self.image_column,
            label_column=self.label_column,
            validation_fraction=self.validation_fraction,
            seed=self.split_seed,
        )
        if self.images_per_class is not None:
            splits["train"] = select_per_class(
                splits["train"], self.images_per_class, seed=self.split_seed, keep_rest=self.keep_rest
            )
        prepare = None
        if self.pixel_range is not None:
            low, high = self.pixel_range
            prepare = partial(scale_pixels, minimum=low, maximum=high)
            splits = prepare(splits)
        # After the selection, which is one of labelled images.
        if not self.unlabelled:
            return splits
        return add_unlabelled(splits, self.unlabelled, self.image_column, prepare, skip_unreadable=skip_unreadable)


@dataclass
class UnlabelledDataArguments(DataArguments):
    """For commands that use further images."""

    unlabelled: str | None = HfArg(
        default=None, help="Further training images, without labels: a folder of images, or a source as for --dataset."
    )


@dataclass
class MixedDataArguments(UnlabelledDataArguments):
    """For commands that may hide labels as well."""

    keep_rest: bool = HfArg(default=False, help="With --images_per_class, keep the other images without their labels.")


@dataclass
class ViewArguments:
    _argument_group_name = "views"

    num_views: int = HfArg(default=0, help="Augmented views of each image; 0 takes the images as they are.")
    crop: str = HfArg(default="pad", help="pad (shift), resized (cut out and resize) or none.")
    padding: float = HfArg(default=0.125, help="For pad, the largest shift, as a share of the side.")
    min_scale: float = HfArg(default=0.5, help="For resized, the smallest share of the area.")
    horizontal_flip: float = HfArg(default=0.0, help="Probability of a mirrored view.")
    photometric_ops: int = HfArg(default=0, help="Color operations on each view.")
    geometric_ops: int = HfArg(default=0, help="Shears, shifts and rotations of each view.")
    magnitude: float = HfArg(default=5.0, help="Strength of the color and the geometric operations, 0 to 10.")
    erasing: float = HfArg(default=0.0, help="Probability of a gray rectangle in a view.")
    view_size: int | None = HfArg(default=None, help="Side of a view; that of the image if not given.")
    view_seed: int = HfArg(default=0, help="Another seed makes other views.")

    def recipe(self) -> ViewRecipe | None:
        """The view recipe; `None` without views."""
        if self.num_views == 0:
            return None
        names = {field.name for field in dataclasses.fields(ViewRecipe)}
        same = {name: value for name, value in vars(self).items() if name in names}
        return ViewRecipe(image_size=self.view_size, scale=(self.min_scale, 1.0), seed=self.view_seed, **same)


# The arguments of transformers that its users set most often. `--help` shows these, `--help_all` shows all.
_COMMON_TRAINING_ARGUMENTS = {
    "output_dir": "Folder of checkpoints, and of the trained model.",
    "max_steps": "Training steps; above 0 they replace the epochs.",
    "gradient_accumulation_steps": "Batches that make one step.",
    "label_smoothing_factor": "Share of the weight of a label that is spread over all classes.",
    "seed": "Seed of the first weights and of the order of the images.",
    "eval_steps": 'Steps between evaluations, for eval_strategy "steps".',
    "save_steps": 'Steps between checkpoints, for save_strategy "steps".',
    "load_best_model_at_end": "End with the best checkpoint on the validation split instead of the last.",
    "resume_from_checkpoint": "Folder of a checkpoint to resume from, or true for the last in output_dir.",
    "report_to": "Where to log: trackio, tensorboard, wandb, …, or none.",
    "push_to_hub": "Publish the model at the end.",
    "hub_model_id": "Repository to publish to; by default the name of output_dir.",
}

CLASSES_HELP = (
    "JSON file: teacher → class of the dataset → the teacher's class or list of classes for it, if names differ."
)
_TEACHING = ("teachers", "logits", "teacher_names", "teacher_classes", "temperature", "teacher_weights", "label_weight",
             "distillation_mode", "standardize_logits", "confidence_weighting", "unlabelled_target", "min_confidence",
             "unlabelled", "keep_rest", "fusion")  # fmt: skip
_SHAPE = ("patch_size", "patch_embedding", "hidden_size", "num_hidden_layers", "num_attention_heads", "mlp_ratio",
          "drop_path_rate")  # fmt: skip
_VIEWS = tuple(field.name for field in dataclasses.fields(ViewArguments) if field.name != "num_views")
# Arguments, whether such a value of each leaves others without effect, and these others.
_WITHOUT_EFFECT = [
    (("student",), bool, ("student_config", *_SHAPE)),
    (("student_config",), bool, ("fusion", *_SHAPE)),
    (("model",), lambda value: not value, ("linear_probe", "layer_decay", "freeze_layers")),
    (("teachers",), lambda value: not value, ("teacher_classes",)),
    (("teachers",), bool, ("logits",)),
    (("streaming",), bool, ("validation_fraction", "split_seed")),
    (("images_per_class",), lambda value: not value, ("keep_rest",)),
    (("space",), lambda value: not value, ("teachers",)),
    (("space",), bool, ("with_images", "split", "revision", "create_pr")),
    (("unlabelled_target",), lambda value: value != "pseudo_labels", ("min_confidence",)),
    (("without_teachers",), bool, _TEACHING),
    (("linear_probe",), bool, ("layer_decay", "freeze_layers")),
    (("num_views",), lambda value: value == 0, _VIEWS),
    (("crop",), lambda value: value != "pad", ("padding",)),
    (("crop",), lambda value: value != "resized", ("min_scale",)),
    (("photometric_ops", "geometric_ops"), lambda value: value == 0, ("magnitude",)),
    *(
        ((f"{kind}_strategy",), lambda value: value != "steps", (f"{kind}_steps",))
        for kind in ("save", "eval", "logging")
    ),
]


# What a command reads, which must not be the folder that it writes.
_READ = ("model", "student", "dataset", "logits", "unlabelled")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """One spelling of each argument, and each default once."""

    def _format_action_invocation(self, action):
        if not action.option_strings or action.nargs == 0:
            return ", ".join(action.option_strings)
        name = action.option_strings[0]
        if action.type is string_to_bool:
            # Without a value it is true, so only one that is not false already needs a value.
            return name if action.default is False else f"{name} [true|false]"
        value = action.metavar or {int: "N", float: "X"}.get(action.type, "VALUE")
        return f"{name} {value} …" if action.nargs == "+" else f"{name} {value}"

    def _get_help_string(self, action):
        is_plain = action.default is False or action.default in (None, argparse.SUPPRESS, "", [])
        return action.help if is_plain or "default" in action.help else f"{action.help} (default: %(default)s)"


class _Parser(HfArgumentParser):
    """A parser that raises `ValueError` instead of printing its usage."""

    def error(self, message: str):
        raise ValueError(f"{message}. Run {self.prog} --help for the arguments.")

    def reject(self, name: str, known: Sequence[str], place: str = "") -> None:
        """Raise an error about an argument that does not exist."""
        similar = difflib.get_close_matches(name, known, n=1)
        self.error(f"{place}unknown argument {name}{f'; the nearest is {similar[0]}' if similar else ''}")


def parse(command: str, description: str, arguments: Sequence[str], *types: type, bare: str | None = None) -> tuple:
    """Read the arguments of a command, its command line after the name, into an instance of each dataclass. Values without a
    flag are those of the argument `bare`.

    The entries of a file given by `--config` become flags in front of those of the command line, which therefore win.

    Raises:
        ValueError: an argument is unknown, missing, malformed, given twice or without effect, the file cannot be read, or
            `output_dir` is a folder that the command reads.
        SystemExit: help was asked for.
    """
    arguments = list(arguments)
    width = min(120, shutil.get_terminal_size().columns)
    parser = _Parser(
        types,
        prog=f"hf-ibdistill {command}",
        description=description,
        formatter_class=lambda prog: _HelpFormatter(prog, max_help_position=34, width=width),
        allow_abbrev=False,
        usage="%(prog)s [--config FILE] [--ARGUMENT VALUE …]",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON file of arguments; flags on top of it win.")
    parser.add_argument("--traceback", action="store_true", help="Show where an error comes from.")
    if any(issubclass(kind, TrainingArguments) for kind in types):
        parser.add_argument("--help_all", action="help", help="Show every argument of the Trainer of transformers.")
        _arrange_help(parser, types, command, hides_rare="--help_all" not in arguments)
    for action in parser._actions:
        if action.type is string_to_bool:
            # transformers lets only some booleans go without a value.
            action.nargs, action.const = "?", True
    known = parser._option_string_actions
    # Looked for first: the parser would complain about a required argument whose name was misspelled.
    unknown = [name for flag in arguments if flag.startswith("--") and (name := flag.partition("=")[0]) not in known]
    flags = [] if unknown else _read_config(parser, arguments) + arguments
    unknown = unknown or parser.parse_known_args(flags)[1]
    is_given = any(flag.partition("=")[0] == f"--{bare}" for flag in flags)
    if unknown and bare is not None and not is_given and not any(value.startswith("-") for value in unknown):
        flags, unknown = [*_without(flags, unknown), f"--{bare}", *unknown], []
    if unknown:
        parser.reject(unknown[0], [name for name in known if "-" not in name[2:]])
    try:
        *parsed, _ = parser.parse_args_into_dataclasses(flags, look_for_args_file=False)
    except TypeError as error:  # of the settings that are mappings
        parser.error(str(error))
    given = {known[name].dest for flag in flags if (name := flag.partition("=")[0]) in known}
    values = {name: value for part in parsed for name, value in vars(part).items()}
    for causes, is_cause, names in _WITHOUT_EFFECT:
        if not all(cause in values and is_cause(values[cause]) for cause in causes):
            continue
        for name in names:
            # A flag without effect may be false.
            if name in given and values[name] is not False:
                shown = " and ".join(f"{cause}={getattr(values[cause], 'value', values[cause])}" for cause in causes)
                others = " or ".join(f"--{cause}" for cause in causes)
                raise ValueError(
                    f"{name}={values[name]} has no effect with {shown}. Leave out --{name}, or change {others}."
                )
    if values.get("image_size") is not None:
        check_numbers(2, whole=True, image_size=values["image_size"])
    if command != "export" and values.get("output_dir"):  # export adds files to the folder of the model
        sources = {f"teachers={name}": folder for name, folder in name_folders(values.get("teachers") or ()).items()}
        check_output_dir(values["output_dir"], sources | {name: values.get(name) for name in _READ})
    return tuple(parsed)


def check_output_dir(output_dir: str, sources: Mapping[str, str | None]) -> None:
    """Raise `ValueError` if `output_dir` is a folder that the command reads; `sources` maps what it is to its folder or
    Hub id."""
    for name, folder in sources.items():
        if folder and Path(folder).resolve() == Path(output_dir).resolve():
            raise ValueError(f"output_dir={output_dir} is the folder of {name}. Choose another folder.")


def _arrange_help(parser, types, command, hides_rare):
    """Hide what is rarely needed, and give the arguments of this command alone a group of their own."""
    (kind,) = (kind for kind in types if issubclass(kind, TrainingArguments))
    classes = [base for base in kind.__mro__ if base.__module__.startswith("hf_ibdistill")]
    ours = {name for base in classes for name in inspect.get_annotations(base)}
    inherited = _field_names(TrainingArguments) - ours | {"dataloader_persistent_workers"}
    added = _field_names(kind) - _field_names(ImageTrainingArguments)
    others, group = list(parser._action_groups), parser.add_argument_group(command)
    for action in parser._actions:
        if action.dest in inherited:
            action.help = _COMMON_TRAINING_ARGUMENTS.get(action.dest, argparse.SUPPRESS if hides_rare else action.help)
        if action.dest == "output_dir":
            # transformers falls back on one folder for all models.
            action.required = True
        if action.dest in added:
            for other in others:
                other._group_actions = [kept for kept in other._group_actions if kept is not action]
            group._group_actions.append(action)


def _field_names(*kinds) -> set[str]:
    return {field.name for kind in kinds for field in dataclasses.fields(kind) if field.init}


def _without(flags, values):
    """The flags without these values, each of which argparse found once."""
    flags = list(flags)
    for value in reversed(values):
        del flags[len(flags) - 1 - flags[::-1].index(value)]
    return flags


def _read_config(parser, arguments) -> list[str]:
    """The entries of the file that `--config` names, as flags."""
    finder = _Parser(prog=parser.prog, add_help=False, allow_abbrev=False)
    finder.add_argument("--config", action="append", default=[])
    paths = finder.parse_known_args(arguments)[0].config
    if not paths:
        return []
    if len(paths) > 1:
        parser.error("--config is given twice; put all arguments into one file")
    (path,) = paths
    try:
        # Every JSON file is YAML.
        loader = _YamlLoader(Path(path).read_text(encoding="utf-8-sig"))
        root = loader.get_single_node() or yaml.MappingNode("", [])
        if isinstance(root, yaml.MappingNode):
            loader.flatten_mapping(root)
            entries = [(str(name.value), _as_text(loader, value)) for name, value in root.value]
    except (OSError, TypeError, ValueError, yaml.YAMLError) as error:
        parser.error(f"--config {path} cannot be read: {error}")
    if not isinstance(root, yaml.MappingNode):
        kind = "list" if isinstance(root, yaml.SequenceNode) else "str"
        parser.error(f"--config {path} holds a {kind}; it must map arguments to values")
    known, flags = _field_names(*parser.dataclass_types), []
    for name, value in entries:
        if name not in known:
            parser.reject(name, known, f"--config {path}: ")
        if isinstance(value, list):
            if not value or not all(isinstance(item, str) for item in value):
                parser.error(f"--config {path}: {name} needs a value, or a list of plain values")
            flags += [f"--{name}", *value]
        elif value is not None:
            flags.append(f"--{name}={value}")
    return flags


class _YamlLoader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-3 as a text, and takes the last of two equal keys."""

    def flatten_mapping(self, node):
        names = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ValueError(f"{twice[0]} is given twice; leave one out")
        super().flatten_mapping(node)


_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _as_text(loader, node) -> str | list | None:
    """A value as it is written, because a flag is a text as well. Only the values of a mapping have types."""
    if isinstance(node, yaml.SequenceNode):
        return [_as_text(loader, item) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        return json.dumps(loader.construct_document(node), default=str)
    return None if node.tag == "tag:yaml.org,2002:null" else node.value


def last_checkpoint(args: TrainingArguments) -> str | bool | None:
    """What `Trainer.train` resumes from: a folder, `True` for the last checkpoint in `output_dir`, or `None`."""
    words = {"true": True, "yes": True, "false": None, "no": None}
    return words.get(str(args.resume_from_checkpoint).lower(), args.resume_from_checkpoint)


def name_folders(pairs: Sequence[str]) -> dict[str, str]:
    """`["conv=outputs/conv", …]` → name → folder or Hub id; `ValueError` if a pair has no "=", or a name is given twice."""
    named = {}
    for pair in pairs:
        name, _, folder = pair.partition("=")
        if not folder:
            raise ValueError(
                f"teachers={pair} is not of the form NAME=FOLDER or NAME=HUB_ID. Write for example conv=outputs/conv."
            )
        if name in named:
            raise ValueError(f'Two teachers have the name "{name}": {named[name]} and {folder}. Rename one of them.')
        named[name] = folder
    return named


def result_split(splits: DatasetDict) -> str:
    """The split that final results are measured on."""
    return "test" if "test" in splits else "validation"


def choose_split(splits: DatasetDict, split: str) -> Dataset:
    """The rows of a split; `ValueError` if it does not exist."""
    if split not in splits:
        raise ValueError(f"split={split} does not exist. Choose one of {', '.join(splits)}.")
    return splits[split]


def train_and_save(trainer: Trainer, splits: DatasetDict, following: Sequence[Sequence[str]], **facts: object) -> None:
    """Train or resume, measure and save with these facts for [`evaluate_and_save`], publish if the arguments ask for it, and
    show the metrics and the commands that may follow."""
    folder, split = Path(trainer.args.output_dir), result_split(splits)
    with training_display(trainer, f"train {folder.resolve().name}"):
        trainer.train(resume_from_checkpoint=last_checkpoint(trainer.args))
    metrics = evaluate_and_save(trainer, splits[split], split, **facts)
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    if not trainer.is_world_process_zero():
        return
    results = read_json(folder / RESULTS)
    measured = {f"accuracy of teacher {name}": one["metrics"] for name, one in results["teachers"].items()}
    if len(measured) > 1:
        measured["accuracy of their mean"] = results["ensemble"]
    rows = [[name, metric_text("accuracy", one["accuracy"])] for name, one in measured.items() if one]
    header = [f"{split} split of {public_name(facts['data_name'])}", folder]
    show_results(metrics, header, [*rows, *metric_rows(metrics)], *following)


# A training step allocates the same tensors as the step before.
TRAINING_COMMANDS = ("quickstart", "train-teacher", "distill", "finetune")


def run(command: str, main: Callable[[Sequence[str]], None], arguments: Sequence[str] | None = None) -> None:
    """Run a command on its arguments, by default those of this process. A mistake in its input ends in one sentence, or with
    `--traceback` in a traceback."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if command in TRAINING_COMMANDS:
        keep_freed_memory()
    try:
        with displaying():
            main(arguments)
    except (TypeError, ValueError, OSError, ImportError, StrictDataclassError) as error:
        if "--traceback" in arguments:
            raise
        sys.exit(f"hf-ibdistill {command}: {' '.join(str(error).split())}")
