"""Fine-tune a saved student, or a trained ViT or DeiT, on other images and labels, without teachers.

    python scripts/finetune_student.py --model outputs/student --dataset my_images/ --output_dir outputs/tuned
    python scripts/finetune_student.py --model user/student --linear_probe --learning_rate 1e-2 --output_dir outputs/probe
    python scripts/finetune_student.py --model user/student --layer_decay 0.75 --freeze_layers 2 --output_dir outputs/tuned

The second trains the heads alone; the third keeps the first layers and changes the others the less the earlier they are.
"""

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from arguments import DataArguments, ViewArguments, load_start, parse_arguments, result_split, run
from transformers import Trainer, set_seed

from hf_ibdistill import (
    ImageClassificationTrainer,
    ImageTrainingArguments,
    all_heads_loss,
    class_config,
    freeze_layers,
    layer_decay_groups,
)
from hf_ibdistill.training.finish import RESULTS, evaluate_and_save


@dataclass
class StartArguments:
    model: str = field(metadata={"help": "Start from this student, ViT or DeiT (folder or Hub id)."})
    image_size: int | None = field(
        default=None,
        metadata={"help": "Side of the images in pixels, a multiple of the patches'; by default the model's own."},
    )
    fusion: str | None = field(
        default=None,
        metadata={
            "help": "How the tokens' predictions are fused: mean_probabilities, mean_logits or class_token; by default "
            "as in the model. Every token's head learns the labels."
        },
    )


@dataclass(repr=False)
class FineTuningArguments(ImageTrainingArguments):
    learning_rate: float = field(
        default=1e-3,
        metadata={
            "help": "Peak learning rate. A small student stands 2e-3 and a linear probe 1e-2; a large ViT wants less. "
            "(default: 0.001)"
        },
    )
    layer_decay: float = field(
        default=1.0,
        metadata={
            "help": "Learning rate of a layer over that of the next one. Below 1, for example 0.75, the first layers "
            "change less than the last. (default: 1.0)"
        },
    )
    freeze_layers: int = field(
        default=0, metadata={"help": "Freeze the embeddings and this many layers; 0 freezes nothing. (default: 0)"}
    )
    linear_probe: bool = field(default=False, metadata={"help": "Freeze everything but the heads. (default: False)"})

    def freeze(self, model) -> None:
        if self.linear_probe and self.freeze_layers:
            raise ValueError("linear_probe freezes every layer; leave out freeze_layers, or linear_probe.")
        freeze_layers(model, self.freeze_layers)
        if self.linear_probe:
            model.base_model.requires_grad_(False)

    def optimizer(self, model) -> tuple | None:
        if self.layer_decay == 1:
            return None
        optimizer_class, settings = Trainer.get_optimizer_cls_and_kwargs(self, model)
        groups = layer_decay_groups(model, self.learning_rate, self.layer_decay, self.weight_decay)
        return optimizer_class, {**settings, "params": groups}


def main():
    data, views, start, args = parse_arguments(DataArguments, ViewArguments, StartArguments, FineTuningArguments)
    splits = data.load()
    set_seed(args.seed)
    classes = class_config(splits["train"], data.label_column)
    model, processor = load_start(start.model, start.image_size, start.fusion, **classes)
    args.freeze(model)
    trainer = ImageClassificationTrainer(
        model,
        args,
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        processing_class=processor,
        image_column=data.image_column,
        label_column=data.label_column,
        views=views.recipe(),
        compute_loss_func=partial(all_heads_loss, label_smoothing=args.label_smoothing_factor),
        optimizer_cls_and_kwargs=args.optimizer(model),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    split = result_split(splits)
    evaluate_and_save(
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
        print(json.dumps(json.loads((Path(args.output_dir) / RESULTS).read_text())["metrics"], indent=2))


if __name__ == "__main__":
    run(main)
