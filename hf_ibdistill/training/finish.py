"""What a finished training run leaves behind: model, image processor, measured results, arguments and a card."""

import json
from collections.abc import Mapping
from pathlib import Path

from datasets import Dataset
from transformers import Trainer

from ..data import public_name
from ..evaluation import classification_metrics, predict
from ..logits.provenance import read_records
from ..model_card import create_model_card
from ..report import describe_machine


RESULTS = "results.json"
_RECIPE = (
    "learning_rate", "weight_decay", "lr_scheduler_type", "warmup_steps", "per_device_train_batch_size",
    "gradient_accumulation_steps", "label_smoothing_factor", "max_grad_norm", "optim", "adam_beta1", "adam_beta2",
    "adam_epsilon", "bf16", "fp16", "seed", "layer_decay", "freeze_layers", "linear_probe",
    "distillation_mode", "temperature", "teacher_weights", "label_weight", "standardize_logits",
    "confidence_weighting",
)  # fmt: skip
# What a configuration tells beside the model's shape.
_NO_SHAPE = {"id2label", "label2id", "auto_map", "architectures", "transformers_version", "dtype", "problem_type"}


def evaluate_and_save(
    trainer: Trainer,
    dataset: Dataset,
    split: str,
    *,
    title: str,
    data_name: str,
    teacher_metrics: Mapping[str, Mapping[str, float]] | None = None,
    picture: str | None = None,
    base_model: str | None = None,
    notes: str = "",
) -> dict[str, float]:
    """Measure the trained model on a split and save it with a card to `trainer.args.output_dir`.

    The folder holds the model (safetensors) and its image processor, for `from_pretrained` and `pipeline`;
    `results.json`: metrics, data, recipe and learning curve; and `README.md`, the model card, whose figures are those of
    `results.json`.

    Args:
        trainer: a trainer of this package after `train()`.
        dataset: the rows to measure on.
        split: their split's name, for the card.
        title: name of the model.
        data_name: name of the data set.
        teacher_metrics: for a student, teacher → its metrics on the same split; by default of the logits that `dataset`
            has of the images as they are.
        picture: file name, in the same folder, of a picture for the card.
        base_model: Hub id or folder of the model that this one started as, for the card.
        notes: a paragraph for the card.

    Returns:
        The metrics.
    """
    args = trainer.args
    # As `from_pretrained` will give it back.
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    outputs = predict(
        model,
        trainer.processing_class,
        dataset,
        batch_size=args.per_device_eval_batch_size,
        image_column=trainer.image_column,
        label_column=trainer.label_column,
    )
    teacher_names = getattr(model.config, "teacher_names", None)
    metrics = classification_metrics(**outputs, teacher_names=teacher_names)
    if teacher_metrics is None and "teacher_logits" in outputs:
        # Recorded of these rows, so the teachers are measured too.
        recorded = dict(zip(teacher_names, outputs["teacher_logits"].swapaxes(0, 1)))
        teacher_metrics = {
            name: classification_metrics(logits, outputs["labels"]) for name, logits in recorded.items()
        }
    if trainer.is_world_process_zero():
        # Not `trainer.save_model`, which adds the arguments as a pickle.
        model.save_pretrained(args.output_dir)
        trainer.processing_class.save_pretrained(args.output_dir)
        values = {name: value for name, value in args.to_dict().items() if name in _RECIPE}
        recipe = {
            "training images": len(trainer.train_dataset),
            "steps": trainer.state.global_step,
            "epochs": round(trainer.state.epoch, 2),
            "processes": args.world_size,
            **values,
            "views": None if trainer.views is None else trainer.views.to_dict(),
            "model": {name: value for name, value in model.config.to_diff_dict().items() if name not in _NO_SHAPE},
        }
        results = {
            "title": title,
            "data": public_name(data_name),
            "split": split,
            "metrics": metrics,
            "recipe": recipe,
            "log_history": trainer.state.log_history,
            "train_seconds": next(
                (e["train_runtime"] for e in trainer.state.log_history if "train_runtime" in e), None
            ),
            "machine": describe_machine(),
        }
        folder = Path(args.output_dir)
        (folder / RESULTS).write_text(json.dumps(results, indent=2))
        card = create_model_card(
            model,
            title=title,
            data_name=data_name,
            split=split,
            metrics=metrics,
            recipe=recipe,
            teacher_metrics=teacher_metrics,
            teacher_sources=_teacher_sources(trainer),
            online=bool(trainer.teachers) if hasattr(trainer, "teachers") else None,
            picture=picture,
            base_model=base_model,
            machine=results["machine"],
            train_seconds=results["train_seconds"],
            repo_id=args.hub_model_id,
            notes=notes,
        )
        card.save(folder / "README.md")
    trainer.accelerator.wait_for_everyone()
    return metrics


def _teacher_sources(trainer) -> dict[str, str]:
    """Teacher → where it came from, of the recorded or the online ones, where that is known."""
    sources = {teacher.name: teacher.model.config.name_or_path for teacher in getattr(trainer, "teachers", [])}
    for record in read_records(trainer.train_dataset):
        sources |= {teacher["name"]: teacher["source"] for teacher in record["teachers"]}
    return {name: source for name, source in sources.items() if source}
