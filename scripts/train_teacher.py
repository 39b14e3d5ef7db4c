"""Train a light teacher on labelled images.

python scripts/train_teacher.py --preset convolution-small --output_dir outputs/conv
python scripts/train_teacher.py --preset involution-small --dataset my_images/ --output_dir outputs/inv
"""

from dataclasses import dataclass, field

from arguments import DataArguments, ViewArguments, parse_arguments, result_split, run
from transformers import set_seed

from hf_ibdistill import (
    IBResNetConfig,
    IBResNetForImageClassification,
    ImageClassificationTrainer,
    ImageTrainingArguments,
    build_image_processor,
    class_config,
)
from hf_ibdistill.training.finish import evaluate_and_save


@dataclass
class TeacherArguments:
    preset: str = field(
        default="convolution-small",
        metadata={"help": "Shape: convolution-small, involution-small, resnet26 … resnet152, rednet26 … rednet152."},
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Side of the images in pixels; by default their own up to 64, else 224."}
    )


@dataclass(repr=False)
class TeacherTrainingArguments(ImageTrainingArguments):
    learning_rate: float = field(
        default=1e-2,
        metadata={"help": "Peak learning rate; batch norm stands a higher one than a student. (default: 0.01)"},
    )


def main():
    data, views, teacher, args = parse_arguments(
        DataArguments, ViewArguments, TeacherArguments, TeacherTrainingArguments
    )
    splits = data.load()
    set_seed(args.seed)
    config = IBResNetConfig.from_preset(teacher.preset, **class_config(splits["train"], data.label_column))
    trainer = ImageClassificationTrainer(
        IBResNetForImageClassification(config),
        args,
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        processing_class=build_image_processor(splits["train"], data.image_column, teacher.image_size),
        image_column=data.image_column,
        label_column=data.label_column,
        views=views.recipe(),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    split = result_split(splits)
    evaluate_and_save(trainer, splits[split], split, title=teacher.preset, data_name=data.dataset)
    if args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    run(main)
