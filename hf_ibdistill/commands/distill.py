"""Distill a student from recorded logits, or from teachers that run in every step.

hf-ibdistill distill --dataset outputs/table --output_dir outputs/student
hf-ibdistill distill --teachers conv=outputs/conv inv=outputs/inv --output_dir outputs/student
hf-ibdistill distill --without_teachers --output_dir outputs/plain_vit
hf-ibdistill distill --dataset my_images/ --logits outputs/logits --output_dir outputs/student
hf-ibdistill distill --student user/student --dataset outputs/table --output_dir outputs/student
hf-ibdistill distill --student_config mobilenet_v2 depth_multiplier=0.5 --image_size 64 \\
    --dataset outputs/table --output_dir outputs/mobilenet
hf-ibdistill distill --students '{name: small}' '{name: large, hidden_size: 192, seed: 1}' \\
    --dataset outputs/table --output_dir outputs/students

The third trains the same student on labels alone. The fourth reads logits that are stored without
their images. The next two teach any image classifier: a saved one, or one from nothing. The last
trains several students in one pass over the images.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml
from datasets import DatasetDict
from transformers import BaseImageProcessor, PreTrainedModel, set_seed
from transformers.hf_argparser import HfArg

from ..data.classes import class_config
from ..data.sources import public_name
from ..files import read_json
from ..images.preprocessing import build_image_processor
from ..logits.encoding import recorded_teachers
from ..logits.provenance import described_teachers, stored_views
from ..models.configuration_ibvit import IBViTConfig
from ..models.modeling_ibvit import IBViTForImageClassification
from ..publishing.results import evaluate_and_save
from ..publishing.tables import open_tables
from ..recording.attaching import attach_teacher_logits
from ..students import build_student, check_fit, default_patch_size, load_image_processor, load_student
from ..training.arguments import DistillationArguments
from ..training.together import train_together
from ..training.trainer import EnsembleDistillationTrainer, ImageClassificationTrainer
from .arguments import (
    CLASSES_HELP,
    MixedDataArguments,
    ViewArguments,
    check_output_dir,
    last_checkpoint,
    name_folders,
    parse,
    result_split,
    run,
    train_and_save,
)
from .display import metric_text, show_results, training_display, uses_of


@dataclass
class StudentArguments:
    _argument_group_name = "student"

    teacher_names: list[str] | None = HfArg(
        default=None, help="Teachers to learn from, in the order of their tokens; by default all recorded ones."
    )
    without_teachers: bool = HfArg(default=False, help="Train the same student on labels alone.")
    teachers: list[str] = HfArg(
        default_factory=list,
        help="NAME=FOLDER or NAME=HUB_ID of teachers to run in every step, instead of reading columns.",
    )
    teacher_classes: str | None = HfArg(default=None, help=f"For --teachers. {CLASSES_HELP}")
    logits: str | None = HfArg(
        default=None,
        help="Folder or Hub id of logits that were recorded for the images of --dataset and are stored without them.",
    )
    student: str | None = HfArg(
        default=None,
        aliases=["--model"],
        help="Start from this image classifier (folder or Hub id). A student, ViT or DeiT keeps its shape, and the tokens "
        "and heads of teachers with the same names.",
    )
    student_config: list[str] = HfArg(
        default_factory=list,
        help="Train this architecture from nothing: a model type of transformers or timm/NAME, and FIELD=VALUE of its "
        "configuration.",
    )
    students: list[str] = HfArg(
        default_factory=list,
        help="Train several in one pass: for each '{name: A, ARGUMENT: VALUE, …}'.",
    )
    image_size: int | None = HfArg(
        default=None,
        help="Side of the images in pixels; by default that of the model, or of the images up to 64, otherwise 224.",
    )
    patch_size: int | None = HfArg(
        default=None, help="Side of a patch; by default near 2 below 16 pixels, 4 up to 64, 16 above."
    )
    patch_embedding: str = HfArg(default="convolution", help="linear (ViT), convolution or bias_stems (Co-advise).")
    hidden_size: int = HfArg(default=96, help="Width.")
    num_hidden_layers: int = HfArg(default=4, help="Depth.")
    num_attention_heads: int = HfArg(default=4, help="Attention heads; they divide the width.")
    mlp_ratio: float = HfArg(default=2.0, help="Width of the feed-forward layers over the width.")
    drop_path_rate: float = HfArg(
        default=0.0, help="Stochastic depth: probability that a step drops a residual branch of the last layer."
    )
    fusion: str | None = HfArg(
        default=None,
        help="Fusion of the predictions of the tokens: mean_probabilities, mean_logits or class_token; by default that "
        "of the model, or the first.",
    )

    def __post_init__(self):
        if not 0 < self.mlp_ratio < math.inf:
            raise ValueError(f"mlp_ratio={self.mlp_ratio} must be above 0 and finite.")

    def names(self, train) -> list[str]:
        """The teachers to learn from; `ValueError` if there are none."""
        if self.without_teachers:
            return []
        names = self.teacher_names or list(name_folders(self.teachers)) or recorded_teachers(train)
        if not names:
            raise ValueError(
                "There is no teacher: the dataset has no logits columns. Record them, give --teachers, or train on labels "
                "alone with --without_teachers."
            )
        return names

    def build(self, train) -> tuple[PreTrainedModel, BaseImageProcessor]:
        """The student and its image processor; `ValueError` if there is no teacher."""
        names, classes = self.names(train), class_config(train)
        if self.student is not None:
            changes = {"image_size": self.image_size, "fusion": self.fusion}
            model = load_student(self.student, teacher_names=names, **changes, **classes)
            return model, load_image_processor(self.student, self.image_size)
        processor = build_image_processor(train, image_size=self.image_size)
        image_size = processor.size["height"]
        if self.student_config:
            architecture, *fields = self.student_config
            return build_student(architecture, image_size=image_size, **read_fields(fields), **classes), processor
        config = IBViTConfig(
            teacher_names=names,
            fusion=self.fusion or "mean_probabilities",
            patch_embedding=self.patch_embedding,
            image_size=image_size,
            patch_size=self.patch_size or default_patch_size(image_size),
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=round(self.hidden_size * self.mlp_ratio),
            drop_path_rate=self.drop_path_rate,
            **classes,
        )
        return IBViTForImageClassification(config), processor


KINDS = MixedDataArguments, ViewArguments, StudentArguments, DistillationArguments


def read_fields(pairs: list[str]) -> dict[str, object]:
    """`["depths=[2, 2]", …]` → field → value, read as YAML; `ValueError` if a pair has no "="."""
    fields = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(
                f"student_config={pair} is not of the form FIELD=VALUE. Write for example hidden_size=64."
            )
        try:
            fields[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"student_config={pair} has a value that cannot be read: {value}") from error
    return fields


def attach_splits(splits: DatasetDict, source: str) -> DatasetDict:
    """The splits with the logits that a table holds for them; `ValueError` if it holds none of the training split."""
    tables = open_tables(source)
    if "train" not in tables:
        raise ValueError(f"logits={source} has the splits {', '.join(tables)}, not train. Record the training split.")
    attached = {name: attach_teacher_logits(splits[name], tables[name]) for name in splits if name in tables}
    return DatasetDict({**splits, **attached})


def read_students(
    arguments: list[str], student: StudentArguments, args: DistillationArguments
) -> list[tuple[StudentArguments, DistillationArguments]]:
    """The arguments of each of `--students`: those of the command, with its own on top. Its folder is in `output_dir`, and
    the order of the images is the same for all.

    Raises:
        ValueError: a student has an argument that is unknown, malformed, without effect, or the same for all.
    """
    common = {field.name for kind in (MixedDataArguments, ViewArguments) for field in dataclasses.fields(kind)}
    common |= {"students", "output_dir", "logits", "teachers", "teacher_classes", "config"}
    data_seed = args.seed if args.data_seed is None else args.data_seed
    found = {}
    for number, text in enumerate(student.students):
        try:
            settings = yaml.safe_load(text)
        except yaml.YAMLError:
            settings = None
        if not isinstance(settings, Mapping):
            raise ValueError(f"students={text} is no mapping. Write for example {{name: small, hidden_size: 64}}.")
        name = str(settings.pop("name", f"student_{number}"))
        if name in found or name in ("", ".", "..") or Path(name).name != name:
            raise ValueError(f"students={text}: name={name} is given twice, or cannot be the name of a folder.")
        for key in settings:
            if key in common:
                raise ValueError(f"students={text}: {key} is the same for all students. Give it outside of students.")
        folder = ["--output_dir", str(Path(args.output_dir) / name), "--data_seed", str(data_seed)]
        try:
            *_, one, training = parse("distill", "", [*arguments, *folder, *as_flags(settings)], *KINDS)
        except ValueError as error:
            raise ValueError(f"students={text}: {error}") from error
        found[name] = one, training
    return list(found.values())


def as_flags(settings: Mapping[str, object]) -> list[str]:
    """Argument → value, as on the command line; `None` leaves an argument out."""
    flags = []
    for name, value in settings.items():
        if isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        elif value is not None:
            flags.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return flags


def build_trainer(
    splits: DatasetDict, views: ViewArguments, student: StudentArguments, args: DistillationArguments
) -> ImageClassificationTrainer:
    """The trainer of a student, with or without teachers."""
    set_seed(args.seed)
    names = student.names(splits["train"])
    model, processor = student.build(splits["train"])
    check_fit(model, processor)
    shared = {
        "train_dataset": splits["train"],
        "eval_dataset": splits["validation"],
        "processing_class": processor,
        # A student without teachers gets the views of the table as well, so that both can be compared.
        "views": views.recipe() or stored_views(splits["train"]),
    }
    if not names:
        return ImageClassificationTrainer(model, args, **shared)
    classes = None if student.teacher_classes is None else read_json(student.teacher_classes)
    given = {"teachers": name_folders(student.teachers) or None, "teacher_classes": classes}
    return EnsembleDistillationTrainer(model, args, teacher_names=names, **given, **shared)


def main(arguments):
    data, views, student, args = parse("distill", __doc__, arguments, *KINDS)
    each = read_students(arguments, student, args) if student.students else [(student, args)]
    splits = data.load()
    if student.logits is not None:
        splits = attach_splits(splits, student.logits)
    recorded = {f"the teacher {t['name']}": t["source"] for t in described_teachers(splits["train"])}
    for _, one in each:
        check_output_dir(one.output_dir, recorded)
    trainers = [build_trainer(splits, views, *one) for one in each]
    facts = {"title": "Distilled student", "data_name": data.dataset}
    if student.students:
        train_several(trainers, splits, [one.student for one, _ in each], **facts)
    else:
        train_and_save(trainers[0], splits, uses_of(args.output_dir), base_model=student.student, **facts)


def train_several(
    trainers: list[ImageClassificationTrainer], splits: DatasetDict, base_models: list[str | None], **facts: str
) -> None:
    """Train in one pass or resume, measure, save and publish each student, and show them in one table."""
    split, folders = result_split(splits), [trainer.args.output_dir for trainer in trainers]
    resumed = [last_checkpoint(trainer.args) for trainer in trainers]
    with training_display(trainers[0], f"train {len(trainers)} students", *trainers[1:]):
        outputs = train_together(trainers, resumed[0] if len({*resumed}) == 1 else resumed)
    shown, rows = {}, []
    for trainer, output, base_model in zip(trainers, outputs, base_models):
        name = Path(trainer.args.output_dir).name
        others = ", ".join(Path(folder).name for folder in folders if folder != trainer.args.output_dir)
        notes = f"It was trained in one pass over the images with {others}." if others else ""
        metrics = evaluate_and_save(trainer, splits[split], split, base_model=base_model, notes=notes, **facts)
        if trainer.args.push_to_hub:
            trainer.push_to_hub()
        parameters, seconds = trainer.model.num_parameters(), output.metrics["train_own_seconds"]
        shown[name] = {**metrics, "parameters": parameters, "train_own_seconds": seconds}
        rows.append([name, metric_text("accuracy", metrics["accuracy"]), f"{parameters:,}", f"{seconds:.1f}"])
    header = [f"{split} split of {public_name(facts['data_name'])}", "accuracy", "parameters", "own seconds"]
    show_results(shown, header, rows, ["report", *folders])


if __name__ == "__main__":
    run("distill", main)
