"""Fine-tune a student, ViT or DeiT on other images and labels, without teachers.

hf-ibdistill finetune --model outputs/student --dataset my_images/ --output_dir outputs/tuned
hf-ibdistill finetune --model outputs/student --linear_probe --output_dir outputs/probe
hf-ibdistill finetune --model outputs/student --layer_decay 0.75 --freeze_layers 2 \\
    --output_dir outputs/tuned

The second trains the heads alone. The third freezes two layers, and changes earlier layers less
than later ones.
"""

import json
from dataclasses import dataclass, field

from transformers import Trainer, set_seed

from ..data.classes import class_config
from ..publishing.results import evaluate_and_save
from ..students import load_image_processor, load_student
from ..training.arguments import ImageTrainingArguments
from ..training.finetuning import freeze_layers, layer_decay_groups
from ..training.trainer import ImageClassificationTrainer
from .arguments import DataArguments, ViewArguments, last_checkpoint, parse, result_split, run


@dataclass
class StartArguments:
    _argument_group_name = "student"

    model: str = field(metadata={"help": "Start from this student, ViT or DeiT (folder or Hub id)."})
    image_size: int | None = field(
        default=None,
        metadata={"help": "Side of the images in pixels, a multiple of the patch size; by default that of the model."},
    )
    fusion: str | None = field(
        default=None,
        metadata={
            "help": "Fusion of the predictions of the tokens: mean_probabilities, mean_logits or class_token; by default that "
            "of the model. Every head learns the labels."
        },
    )


@dataclass(repr=False)
class FineTuningArguments(ImageTrainingArguments):
    learning_rate: float = field(
        default=1e-3,
        metadata={
            "help": "Peak learning rate: 2e-3 for a small student, 1e-2 for a linear probe, less for a large ViT."
        },
    )
    layer_decay: float = field(
        default=1.0,
        metadata={
            "help": "Learning rate of a layer over that of the next one; below 1, for example 0.75, the first layers "
            "change least."
        },
    )
    freeze_layers: int = field(
        default=0, metadata={"help": "Freeze the embeddings and this many layers; 0 freezes nothing."}
    )
    linear_probe: bool = field(default=False, metadata={"help": "Freeze everything but the heads."})

    def freeze(self, model) -> None:
        freeze_layers(model, self.freeze_layers)
        if self.linear_probe:
            model.base_model.requires_grad_(False)

    def optimizer(self, model) -> tuple | None:
        if self.layer_decay == 1:
            return None
        optimizer_class, settings = Trainer.get_optimizer_cls_and_kwargs(self, model)
        groups = layer_decay_groups(model, self.learning_rate, self.layer_decay, self.weight_decay)
        return optimizer_class, {**settings, "params": groups}


def main(arguments):
    data, views, start, args = parse(
        "finetune", __doc__, arguments, DataArguments, ViewArguments, StartArguments, FineTuningArguments
    )
    splits = data.load()
    set_seed(args.seed)
    changes = {"image_size": start.image_size, "fusion": start.fusion}
    model = load_student(start.model, **changes, **class_config(splits["train"]))
    args.freeze(model)
    trainer = ImageClassificationTrainer(
        model,
        args,
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        processing_class=load_image_processor(start.model, start.image_size),
        views=views.recipe(),
        optimizer_cls_and_kwargs=args.optimizer(model),
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(args))
    split = result_split(splits)
    metrics = evaluate_and_save(
        trainer,
        splits[split],
        split,
        title="Fine-tuned student",
        data_name=data.dataset,
        base_model=start.model,
        notes="Every head learned the labels.",
    )
    if args.push_to_hub:
        trainer.push_to_hub()
    if trainer.is_world_process_zero():
        print(json.dumps(metrics, indent=2))


if __name__ == "__main__":
    run("finetune", main)
