"""Train a light teacher on labelled images.

hf-ibdistill train-teacher --preset convolution-small --output_dir outputs/conv
hf-ibdistill train-teacher --preset involution-small --dataset my_images/ --output_dir outputs/inv
"""

from dataclasses import dataclass, field

from transformers import set_seed

from ..data.classes import class_config
from ..images.preprocessing import build_image_processor
from ..models.configuration_ibresnet import IBResNetConfig
from ..models.modeling_ibresnet import IBResNetForImageClassification
from ..publishing.results import evaluate_and_save
from ..training.arguments import ImageTrainingArguments
from ..training.trainer import ImageClassificationTrainer
from .arguments import DataArguments, ViewArguments, last_checkpoint, parse, result_split, run


@dataclass
class TeacherArguments:
    _argument_group_name = "teacher"

    preset: str = field(
        default="convolution-small",
        metadata={"help": "Shape: convolution-small, involution-small, resnet26 … resnet152, rednet26 … rednet152."},
    )
    image_size: int | None = field(
        default=None,
        metadata={"help": "Side of the images in pixels; by default that of the dataset up to 64, otherwise 224."},
    )


@dataclass(repr=False)
class TeacherTrainingArguments(ImageTrainingArguments):
    learning_rate: float = field(
        default=1e-2, metadata={"help": "Peak learning rate; batch norm allows a higher one than that of a student."}
    )


def main(arguments):
    data, views, teacher, args = parse(
        "train-teacher", __doc__, arguments, DataArguments, ViewArguments, TeacherArguments, TeacherTrainingArguments
    )
    splits = data.load()
    set_seed(args.seed)
    config = IBResNetConfig.from_preset(teacher.preset, **class_config(splits["train"]))
    trainer = ImageClassificationTrainer(
        IBResNetForImageClassification(config),
        args,
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        processing_class=build_image_processor(splits["train"], image_size=teacher.image_size),
        views=views.recipe(),
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(args))
    split = result_split(splits)
    evaluate_and_save(trainer, splits[split], split, title=teacher.preset, data_name=data.dataset)
    if args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    run("train-teacher", main)
