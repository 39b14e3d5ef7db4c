"""Distill a student from recorded logits, or from teachers that run in every step.

hf-ibdistill distill --dataset outputs/table --output_dir outputs/student
hf-ibdistill distill --teachers conv=outputs/conv inv=outputs/inv --output_dir outputs/student
hf-ibdistill distill --without_teachers --output_dir outputs/plain_vit
hf-ibdistill distill --model user/student --dataset outputs/table --output_dir outputs/student

The third trains the same student on labels alone. The last starts from a saved student, ViT or
DeiT.
"""

import json
import math
from dataclasses import dataclass, field

from transformers import set_seed

from ..data.classes import class_config
from ..images.preprocessing import build_image_processor
from ..logits.encoding import recorded_teachers
from ..logits.provenance import read_records, stored_views
from ..models.configuration_ibvit import IBViTConfig
from ..models.modeling_ibvit import IBViTForImageClassification
from ..publishing.results import evaluate_and_save
from ..students import default_patch_size, load_image_processor, load_student
from ..training.arguments import DistillationArguments
from ..training.trainer import EnsembleDistillationTrainer, ImageClassificationTrainer
from .arguments import (
    DataArguments,
    ViewArguments,
    check_output_dir,
    last_checkpoint,
    name_folders,
    parse,
    result_split,
    run,
)


@dataclass
class StudentArguments:
    _argument_group_name = "student"

    teacher_names: list[str] | None = field(
        default=None,
        metadata={"help": "Teachers to learn from, in the order of their tokens; by default all recorded ones."},
    )
    without_teachers: bool = field(default=False, metadata={"help": "Train the same student on labels alone."})
    teachers: list[str] = field(
        default_factory=list,
        metadata={"help": "NAME=FOLDER or NAME=HUB_ID of teachers to run in every step, instead of reading columns."},
    )
    model: str | None = field(
        default=None,
        metadata={
            "help": "Start from this student, ViT or DeiT (folder or Hub id). Its shape stays, and so do the tokens and heads of "
            "teachers with the same names."
        },
    )
    image_size: int | None = field(
        default=None,
        metadata={
            "help": "Side of the images in pixels; by default that of the model, or of the images up to 64, otherwise 224."
        },
    )
    patch_size: int | None = field(
        default=None, metadata={"help": "Side of a patch; by default near 2 below 16 pixels, 4 up to 64, 16 above."}
    )
    patch_embedding: str = field(
        default="convolution", metadata={"help": "linear (ViT), convolution or bias_stems (Co-advise)."}
    )
    hidden_size: int = field(default=96, metadata={"help": "Width."})
    num_hidden_layers: int = field(default=4, metadata={"help": "Depth."})
    num_attention_heads: int = field(default=4, metadata={"help": "Attention heads; they divide the width."})
    mlp_ratio: float = field(default=2.0, metadata={"help": "Width of the feed-forward layers over the width."})
    fusion: str | None = field(
        default=None,
        metadata={
            "help": "Fusion of the predictions of the tokens: mean_probabilities, mean_logits or class_token; by default that "
            "of the model, or the first."
        },
    )

    def __post_init__(self):
        if not 0 < self.mlp_ratio < math.inf:
            raise ValueError(f"mlp_ratio={self.mlp_ratio} must be above 0 and finite.")

    def build(self, train) -> tuple[IBViTForImageClassification, object]:
        """The student and its image processor.

        Raises:
            ValueError: there is no teacher.
        """
        names = self.teacher_names or list(name_folders(self.teachers)) or recorded_teachers(train)
        if self.without_teachers:
            names = []
        elif not names:
            raise ValueError(
                "There is no teacher: the dataset has no logits columns. Record them, give --teachers, or train on labels "
                "alone with --without_teachers."
            )
        classes = class_config(train)
        if self.model is not None:
            changes = {"image_size": self.image_size, "fusion": self.fusion}
            model = load_student(self.model, teacher_names=names, **changes, **classes)
            return model, load_image_processor(self.model, self.image_size)
        processor = build_image_processor(train, image_size=self.image_size)
        image_size = processor.size["height"]
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
            **classes,
        )
        return IBViTForImageClassification(config), processor


def main(arguments):
    data, views, student, args = parse(
        "distill", __doc__, arguments, DataArguments, ViewArguments, StudentArguments, DistillationArguments
    )
    splits = data.load()
    recorded = [teacher for record in read_records(splits["train"]) for teacher in record["teachers"]]
    check_output_dir(args.output_dir, {f"the teacher {teacher['name']}": teacher["source"] for teacher in recorded})
    set_seed(args.seed)
    model, processor = student.build(splits["train"])
    shared = {
        "train_dataset": splits["train"],
        "eval_dataset": splits["validation"],
        "processing_class": processor,
        # A student without teachers gets the views of the table as well, so that both can be compared.
        "views": views.recipe() or stored_views(splits["train"]),
    }
    if model.config.teacher_names:
        teachers = name_folders(student.teachers) or None
        trainer = EnsembleDistillationTrainer(model, args, teachers=teachers, **shared)
    else:
        trainer = ImageClassificationTrainer(model, args, **shared)
    trainer.train(resume_from_checkpoint=last_checkpoint(args))
    split = result_split(splits)
    metrics = evaluate_and_save(
        trainer, splits[split], split, title="Distilled student", data_name=data.dataset, base_model=student.model
    )
    if args.push_to_hub:
        trainer.push_to_hub()
    if trainer.is_world_process_zero():
        print(json.dumps(metrics, indent=2))


if __name__ == "__main__":
    run("distill", main)
