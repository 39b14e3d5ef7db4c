"""Fine-tune a student or any image classifier on other images and labels, without teachers.

hf-ibdistill finetune --model outputs/student --dataset my_images/ --output_dir outputs/tuned
hf-ibdistill finetune --model outputs/student --linear_probe --output_dir outputs/probe
hf-ibdistill finetune --model outputs/student --layer_decay 0.75 --freeze_layers 2 \\
    --output_dir outputs/tuned

The second trains the heads alone. The third freezes two layers, and changes earlier layers less
than later ones.
"""

from dataclasses import dataclass

from transformers import Trainer, set_seed
from transformers.hf_argparser import HfArg

from ..checks import check_numbers
from ..data.classes import class_config
from ..students import check_fit, load_image_processor, load_student
from ..training.arguments import ImageTrainingArguments
from ..training.finetuning import check_layer_decay, freeze_backbone, freeze_layers, layer_decay_groups
from ..training.trainer import ImageClassificationTrainer
from .arguments import DataArguments, ViewArguments, parse, run, train_and_save
from .display import uses_of


@dataclass
class StartArguments:
    _argument_group_name = "student"

    model: str = HfArg(help="Start from this image classifier (folder or Hub id); a ViT or DeiT becomes a student.")
    image_size: int | None = HfArg(
        default=None, help="Side of the images in pixels, a multiple of the patch size; by default that of the model."
    )
    fusion: str | None = HfArg(
        default=None,
        help="Fusion of the predictions of the tokens: mean_probabilities, mean_logits or class_token; by default that "
        "of the model. Every head learns the labels.",
    )


@dataclass(repr=False)
class FineTuningArguments(ImageTrainingArguments):
    learning_rate: float = HfArg(
        default=1e-3,
        help="Peak learning rate: 2e-3 for a small student, 1e-2 for a linear probe, less for a large ViT.",
    )
    layer_decay: float = HfArg(
        default=1.0,
        help="Learning rate of a layer over that of the next one; below 1, for example 0.75, the first layers "
        "change least.",
    )
    freeze_layers: int = HfArg(default=0, help="Freeze the embeddings and this many layers; 0 freezes nothing.")
    linear_probe: bool = HfArg(default=False, help="Freeze everything but the heads.")

    def __post_init__(self):
        super().__post_init__()
        check_numbers(0, whole=True, freeze_layers=self.freeze_layers)
        check_layer_decay(self.layer_decay)

    def freeze(self, model) -> None:
        """Freeze what the arguments ask for."""
        if self.freeze_layers:
            freeze_layers(model, self.freeze_layers)
        if self.linear_probe:
            freeze_backbone(model)

    def optimizer(self, model) -> tuple | None:
        """Class and settings of the optimizer for `Trainer`, if layers have rates of their own."""
        if self.layer_decay == 1:
            return None
        optimizer_class, settings = Trainer.get_optimizer_cls_and_kwargs(self, model)
        groups = layer_decay_groups(model, self.learning_rate, self.layer_decay, self.weight_decay)
        return optimizer_class, {**settings, "params": groups}


def fine_tune(model, processor, args: FineTuningArguments, splits, views, following, **facts) -> None:
    """Freeze and train a classifier, measure and save it; `following` and `facts` are those of [`train_and_save`]."""
    args.freeze(model)
    trainer = ImageClassificationTrainer(
        model,
        args,
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        processing_class=processor,
        views=views,
        optimizer_cls_and_kwargs=args.optimizer(model),
    )
    train_and_save(trainer, splits, following, **facts)


def main(arguments):
    data, views, start, args = parse(
        "finetune", __doc__, arguments, DataArguments, ViewArguments, StartArguments, FineTuningArguments
    )
    splits = data.load()
    set_seed(args.seed)
    classes = class_config(splits["train"])
    model = load_student(start.model, image_size=start.image_size, fusion=start.fusion, **classes)
    processor = load_image_processor(start.model, start.image_size)
    check_fit(model, processor)
    facts = {"data_name": data.dataset, "base_model": start.model, "notes": "Every head learned the labels."}
    facts["title"] = "Fine-tuned student"
    fine_tune(model, processor, args, splits, views.recipe(), uses_of(args.output_dir), **facts)


if __name__ == "__main__":
    run("finetune", main)
