"""Train a light teacher on labelled images, or make a teacher of any pretrained model.

hf-ibdistill train-teacher --preset convolution-small --output_dir outputs/conv
hf-ibdistill train-teacher --preset involution-small --dataset my_images/ --output_dir outputs/inv
hf-ibdistill train-teacher --model facebook/dinov2-small --linear_probe --dataset my_images/ \\
    --output_dir outputs/dino

The last trains a new head on a frozen backbone. Without --linear_probe, the whole model learns.
"""

from dataclasses import dataclass

from transformers import set_seed
from transformers.hf_argparser import HfArg

from ..data.classes import class_config
from ..images.preprocessing import build_image_processor
from ..models.configuration_ibresnet import IBResNetConfig
from ..models.modeling_ibresnet import IBResNetForImageClassification
from ..students import check_fit, load_image_processor, load_with_classes
from .arguments import DataArguments, ViewArguments, parse, run
from .display import beside, data_flags, teacher_flags
from .finetune import FineTuningArguments, fine_tune


@dataclass
class TeacherArguments:
    _argument_group_name = "teacher"

    preset: str | None = HfArg(
        default=None,
        help="Shape: convolution-small, involution-small, resnet26 … resnet152, rednet26 … rednet152; by default "
        "convolution-small.",
    )
    model: str | None = HfArg(
        default=None, help="Start from this pretrained model (folder or Hub id), with or without a head."
    )
    image_size: int | None = HfArg(
        default=None,
        help="Side of the images in pixels; by default that of the model, or of the images up to 64, otherwise 224.",
    )


@dataclass(repr=False)
class TeacherTrainingArguments(FineTuningArguments):
    learning_rate: float | None = HfArg(
        default=None,
        help="Peak learning rate; by default 1e-2 for a preset, 1e-3 for a linear probe, 2e-4 to fine-tune a model.",
    )


def main(arguments):
    data, views, teacher, args = parse(
        "train-teacher", __doc__, arguments, DataArguments, ViewArguments, TeacherArguments, TeacherTrainingArguments
    )
    if teacher.preset is not None and teacher.model is not None:
        raise ValueError(f"preset={teacher.preset} and model={teacher.model} are both given. Leave one out.")
    splits = data.load()
    set_seed(args.seed)
    classes = class_config(splits["train"])
    if args.learning_rate is None:
        args.learning_rate = 1e-2 if teacher.model is None else 1e-3 if args.linear_probe else 2e-4
    if teacher.model is None:
        title = teacher.preset or "convolution-small"
        model = IBResNetForImageClassification(IBResNetConfig.from_preset(title, **classes))
        processor = build_image_processor(splits["train"], image_size=teacher.image_size)
    else:
        title = "Fine-tuned teacher"
        model = load_with_classes(teacher.model, "The teacher", **classes)
        processor = load_image_processor(teacher.model, teacher.image_size)
        check_fit(model, processor)
    facts = {"title": title, "data_name": data.dataset, "base_model": teacher.model}
    record = ["record", *data_flags(data), *teacher_flags(args.output_dir)]
    record += ["--output_dir", beside(args.output_dir, "table")]
    fine_tune(model, processor, args, splits, views.recipe(), [record], **facts)


if __name__ == "__main__":
    run("train-teacher", main)
