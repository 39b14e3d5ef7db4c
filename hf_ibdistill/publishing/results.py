"""Save the results of a training run: model, image processor, `results.json` and a card made of it."""

import json
import logging
import os
from collections.abc import Mapping, Sized
from functools import partial
from pathlib import Path

from datasets import Dataset
from transformers import Trainer

from ..data.classes import label_ids, labelled_rows
from ..data.columns import as_image_table, require_table
from ..data.sources import public_name
from ..evaluation import classification_metrics, log_mean_probability, predict
from ..files import write_text, write_whole
from ..logits.provenance import read_records
from .cards import create_model_card, teacher_source
from .machine import describe_machine
from .predictions import PREDICTIONS, Predictions
from .report import (
    KINDS,
    PICTURES,
    REPORT,
    RESULTS,
    Picture,
    Run,
    check_same_rows,
    draw_facts,
    draw_images,
    read_runs,
    write_report,
)


logger = logging.getLogger(__name__)

_RECIPE = (
    "learning_rate", "weight_decay", "lr_scheduler_type", "warmup_steps", "per_device_train_batch_size",
    "gradient_accumulation_steps", "label_smoothing_factor", "max_grad_norm", "optim", "adam_beta1", "adam_beta2",
    "adam_epsilon", "bf16", "fp16", "seed", "layer_decay", "freeze_layers", "linear_probe",
    "distillation_mode", "temperature", "teacher_weights", "label_weight", "standardize_logits",
    "confidence_weighting", "unlabelled_target", "min_confidence", "views_per_image",
)  # fmt: skip
# Fields of a configuration that do not describe the shape of the model.
_NO_SHAPE = {"id2label", "label2id", "auto_map", "architectures", "transformers_version", "dtype", "problem_type"}


def evaluate_and_save(
    trainer: Trainer,
    dataset: Dataset,
    split: str,
    *,
    title: str,
    data_name: str,
    teacher_metrics: Mapping[str, Mapping[str, float]] | None = None,
    baseline: str | os.PathLike | None = None,
    base_model: str | None = None,
    notes: str = "",
) -> dict[str, float]:
    """Measure the trained model on a split and save it with a card to `trainer.args.output_dir`.

    The folder holds the model (safetensors) and its image processor, for `from_pretrained` and `pipeline`;
    `results.json`, the one record of facts: metrics, data, teachers, recipe, learning curve and machine; `README.md`, the
    card that [`create_model_card`] makes of it; the predictions for each row; and pictures of all this, in the card and in
    `report.html`. If the pictures cannot be drawn, a warning says why, and the run has none.

    Args:
        trainer: a trainer of this package after `train()`.
        dataset: the rows to measure on, a table with the same column names as those of the trainer.
        split: the name of their split, for the card.
        title: name of the model.
        data_name: name of the dataset.
        teacher_metrics: for a student, teacher → its metrics on the same split. `None` measures the teachers by the logits
            of un-augmented images that `dataset` holds, if it holds them.
        baseline: folder of a run on the same rows, such as one without teachers. The pictures show the images that gain
            most over it, instead of the most confident mistakes.
        base_model: Hub id or folder of the checkpoint that this model started as, for the card.
        notes: a paragraph for the card.

    Returns:
        The metrics, as [`classification_metrics`] names them.

    Raises:
        TypeError, ValueError: as from [`predict`]. The model is saved all the same.
    """
    args = trainer.args
    folder = Path(args.output_dir)
    # As `from_pretrained` will load it.
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    if trainer.is_world_process_zero():
        # Before anything that may fail. Not `trainer.save_model`, which adds the arguments as a pickle.
        model.save_pretrained(folder)
        trainer.processing_class.save_pretrained(folder)
    require_table(dataset, "dataset")
    columns = getattr(trainer, "image_column", None), getattr(trainer, "label_column", None)
    dataset = labelled_rows(as_image_table(dataset, *columns), f"The {split} split")
    teacher_names = getattr(trainer, "teacher_names", getattr(model.config, "teacher_names", None))
    batch_size = args.per_device_eval_batch_size
    outputs = predict(model, trainer.processing_class, dataset, batch_size=batch_size, teacher_names=teacher_names)
    metrics = classification_metrics(**outputs, teacher_names=teacher_names)
    if teacher_metrics is None and "teacher_logits" in outputs:
        # These logits belong to the images as they are, so they measure the teachers.
        teacher_metrics = {
            name: classification_metrics(logits, outputs["labels"])
            for name, logits in zip(teacher_names, outputs["teacher_logits"].swapaxes(0, 1))
        }
    if trainer.is_world_process_zero():
        history = trainer.state.log_history
        seconds = next((entry["train_runtime"] for entry in history if "train_runtime" in entry), None)
        results = {
            "title": title,
            "data": public_name(data_name),
            "split": split,
            "metrics": metrics,
            "teachers": _describe_teachers(trainer, teacher_metrics or {}),
            "ensemble": _measure_ensemble(outputs),
            "online": bool(trainer.teachers) if hasattr(trainer, "teachers") else None,
            "base_model": base_model and public_name(base_model),
            "notes": notes,
            "parameters": model.num_parameters(),
            "recipe": _describe_recipe(trainer, model),
            "log_history": history,
            "train_seconds": seconds,
            "machine": describe_machine(),
        }
        tokens = getattr(model.config, "teacher_names", None)
        run = Run(folder.resolve().name, results, Predictions.of_outputs(outputs, dataset, tokens))
        run.predictions.save(folder / PREDICTIONS)
        pictures = _draw(run, folder, dataset, model, trainer.processing_class, baseline)
        results["pictures"] = {f"{PICTURES}/{name}.png": picture.alt for name, picture in pictures.items()}
        write_text(folder / RESULTS, json.dumps(results, indent=2))
        create_model_card(model, results, repo_id=args.hub_model_id).save(folder / "README.md")
    trainer.accelerator.wait_for_everyone()
    return metrics


def _draw(run, folder, dataset, model, image_processor, baseline) -> dict[str, Picture]:
    """Draw the pictures of a run and write them and the report; {} with a warning if that fails."""
    # Those of an earlier run in this folder.
    for path in (*(folder / PICTURES / f"{name}.png" for name in KINDS), folder / REPORT):
        path.unlink(missing_ok=True)
    try:
        if baseline is not None:
            (baseline,) = read_runs([baseline])
            check_same_rows([baseline, run])
        pictures = draw_facts(run)
        run.images = draw_images(run, dataset, model, image_processor, baseline)
        write_report(folder / REPORT, run, pictures)
        pictures |= run.images
        for name, picture in pictures.items():
            write_whole(folder / PICTURES / f"{name}.png", partial(_write_bytes, picture.png))
    # No picture is worth a trained model and its card, and the other processes wait for this one.
    except Exception as error:
        logger.warning("%s has no pictures: %s. Run `hf-ibdistill report` on it to try again.", folder, error)
        return {}
    return pictures


def _write_bytes(content, path):
    path.write_bytes(content)


def _measure_ensemble(outputs) -> dict[str, float] | None:
    """Metrics of the mean probability of the teachers; `None` without their logits of the images as they are."""
    if "teacher_logits" not in outputs:
        return None
    logits = log_mean_probability(outputs["teacher_logits"].swapaxes(0, 1))
    return classification_metrics(logits, outputs["labels"])


def _describe_recipe(trainer, model) -> dict:
    args, rows, views = trainer.args, trainer.train_dataset, getattr(trainer, "views", None)
    return {
        # A stream has no length.
        "training images": len(rows) if isinstance(rows, Sized) else "streamed" if rows is not None else None,
        "training images without label": _count_unlabelled(rows),
        "steps": trainer.state.global_step,
        "epochs": round(trainer.state.epoch or 0, 2),
        "processes": args.world_size,
        **{name: value for name, value in args.to_dict().items() if name in _RECIPE},
        "views": views and views.to_dict(),
        "model": {name: value for name, value in model.config.to_diff_dict().items() if name not in _NO_SHAPE},
    }


def _count_unlabelled(rows) -> int | None:
    table = getattr(rows, "table", None)
    return int((label_ids(table) == -1).sum()) or None if isinstance(table, Dataset) else None


def _describe_teachers(trainer, metrics) -> dict[str, dict]:
    """Teacher of the student → its source and metrics; `None` and {} if they are not known."""
    table = getattr(trainer.train_dataset, "table", None)
    described = [
        teacher for record in ([] if table is None else read_records(table)) for teacher in record["teachers"]
    ]
    # The last, because the table may hold logits of other teachers of the same name.
    described += [
        {"name": teacher.name, "source": teacher.model.config.name_or_path, "revision": teacher.revision}
        for teacher in getattr(trainer, "teachers", [])
    ]
    sources = {teacher["name"]: teacher_source(teacher) for teacher in described}
    names = dict.fromkeys([*getattr(trainer, "teacher_names", []), *metrics])
    return {name: {"source": sources.get(name) or None, "metrics": dict(metrics.get(name, {}))} for name in names}
