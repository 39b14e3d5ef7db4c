"""Distil a student from recorded logits, or from teachers that run in every step.

    python scripts/distill_student.py --dataset outputs/table --output_dir outputs/student
    python scripts/distill_student.py --teachers conv=outputs/conv inv=outputs/inv --output_dir outputs/student
    python scripts/distill_student.py --without_teachers --output_dir outputs/plain_vit
    python scripts/distill_student.py --model user/student --dataset outputs/table --output_dir outputs/student

The third trains the same student on labels alone; the last starts from a saved student, or a trained ViT or DeiT.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from arguments import (
    DataArguments,
    ViewArguments,
    default_patch_size,
    load_start,
    name_folders,
    parse_arguments,
    result_split,
    run,
)
from transformers import set_seed

from hf_ibdistill import (
    DistillationArguments,
    EnsembleDistillationTrainer,
    IBViTConfig,
    IBViTForImageClassification,
    ImageClassificationTrainer,
    build_image_processor,
    class_config,
)
from hf_ibdistill.logits.encoding import recorded_teachers
from hf_ibdistill.logits.provenance import stored_views
from hf_ibdistill.training.finish import RESULTS, evaluate_and_save


@dataclass
class StudentArguments:
    teacher_names: list[str] | None = field(
        default=None,
        metadata={
            "help": "Teachers to learn from, in the order of their tokens; by default all whose logits are recorded."
        },
    )
    without_teachers: bool = field(default=False, metadata={"help": "Train the same student on labels alone."})
    teachers: list[str] = field(
        default_factory=list,
        metadata={"help": "NAME=FOLDER or NAME=HUB_ID for each teacher: run them while training, read no columns."},
    )
    model: str | None = field(
        default=None,
        metadata={
            "help": "Start from this student, ViT or DeiT (folder or Hub id) instead of from nothing. Its shape is its own, "
            "but for image_size; tokens and heads stay with their teachers' names."
        },
    )
    image_size: int | None = field(
        default=None,
        metadata={
            "help": "Side of the images in pixels; by default their own up to 64, else 224, or as in the model to start from."
        },
    )
    patch_size: int | None = field(
        default=None, metadata={"help": "Side of a patch; by default 2 below 16 pixels, 4 up to 64, 16 above."}
    )
    patch_embedding: str = field(
        default="convolution", metadata={"help": "linear (ViT's own), convolution or bias_stems (Co-advise's)."}
    )
    hidden_size: int = field(default=96, metadata={"help": "Width."})
    num_hidden_layers: int = field(default=4, metadata={"help": "Depth."})
    num_attention_heads: int = field(default=4, metadata={"help": "Attention heads; they divide the width."})
    mlp_ratio: float = field(default=2.0, metadata={"help": "Width of the feed-forward layers over the width."})
    fusion: str | None = field(
        default=None,
        metadata={
            "help": "How the tokens' predictions are fused: mean_probabilities, mean_logits or class_token; by default the "
            "first, or as in the model to start from."
        },
    )

    def build(self, splits, data) -> tuple[IBViTForImageClassification, object]:
        names = [] if self.without_teachers else self.teacher_names
        if names is None:
            names = list(name_folders(self.teachers)) or recorded_teachers(splits["train"])
        classes = class_config(splits["train"], data.label_column)
        if self.model is not None:
            return load_start(self.model, self.image_size, self.fusion, teacher_names=names, **classes)
        processor = build_image_processor(splits["train"], data.image_column, self.image_size)
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


def main():
    data, views, student, args = parse_arguments(DataArguments, ViewArguments, StudentArguments, DistillationArguments)
    splits = data.load()
    set_seed(args.seed)
    model, processor = student.build(splits, data)
    shared = {
        "train_dataset": splits["train"],
        "eval_dataset": splits["validation"],
        "processing_class": processor,
        "image_column": data.image_column,
        "label_column": data.label_column,
        # A table of views says itself which they are; a student without teachers then sees the same ones.
        "views": views.recipe() or stored_views(splits["train"]),
    }
    if model.config.teacher_names:
        teachers = name_folders(student.teachers) or None
        trainer = EnsembleDistillationTrainer(model, args, teachers=teachers, **shared)
    else:
        trainer = ImageClassificationTrainer(model, args, **shared)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    split = result_split(splits)
    evaluate_and_save(
        trainer, splits[split], split, title="Distilled student", data_name=data.dataset, base_model=student.model
    )
    if args.push_to_hub:
        trainer.push_to_hub()
    if trainer.is_world_process_zero():
        print(json.dumps(json.loads((Path(args.output_dir) / RESULTS).read_text())["metrics"], indent=2))


if __name__ == "__main__":
    run(main)
