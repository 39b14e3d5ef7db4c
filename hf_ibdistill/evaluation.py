"""Measure image classifiers: metrics, predictions, attention.

The metrics are plain functions of arrays. `TopKAccuracy`, `NegativeLogLikelihood` and `ExpectedCalibrationError` offer them
as `evaluate` modules, for example for `evaluate.combine`.
"""

from collections.abc import Mapping, Sequence

import datasets
import evaluate
import numpy as np
import PIL.Image
import torch
from accelerate import Accelerator
from tqdm.auto import tqdm
from transformers import BaseImageProcessor, EvalPrediction, PreTrainedModel

from .data.classes import check_class_names, class_names, config_class_names
from .data.columns import LABEL, as_image_table, require_table
from .logits.encoding import column_name, describe_column
from .models.modeling_ibvit import IBViTForImageClassification
from .rows import DistillationCollator, ImageRows
from .teachers import without_autocast


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities over the last axis, in float64."""
    return torch.tensor(logits, dtype=torch.float64).log_softmax(-1).numpy()


def top_k_accuracy(logits: np.ndarray, labels: np.ndarray, k: int = 1) -> float:
    """Share of rows whose class is among the k largest logits. Among equal logits, the smaller class id comes first. NaN
    comes last.

    Args:
        logits: (N, C).
        labels: (N,) class ids.
        k: number of classes that count.
    """
    logits, labels = np.asarray(logits), np.asarray(labels)[:, None]
    own = np.take_along_axis(logits, labels, axis=1)
    is_before = np.arange(logits.shape[1]) < labels
    beats = (logits > own) | ((logits == own) & is_before)
    # NaN is neither above nor equal to anything.
    beats |= np.isnan(own) & (~np.isnan(logits) | is_before)
    return float((beats.sum(axis=1) < k).mean())


def negative_log_likelihood(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean of −log p(class) over rows, in nats.

    Args:
        logits: (N, C).
        labels: (N,) class ids.
    """
    return float(-np.take_along_axis(log_softmax(logits), np.asarray(labels)[:, None], axis=1).mean())


def expected_calibration_error(logits: np.ndarray, labels: np.ndarray, num_bins: int = 15) -> float:
    """Mean distance between confidence and accuracy over bins of equal width (arXiv 1706.04599, equation 3).

    Args:
        logits: (N, C).
        labels: (N,) class ids.
        num_bins: number of bins between 0 and 1.
    """
    probabilities = np.exp(log_softmax(logits))
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == np.asarray(labels)
    bins = np.clip(np.ceil(np.nan_to_num(confidence) * num_bins).astype(int) - 1, 0, num_bins - 1)
    gaps = np.bincount(bins, weights=correct - confidence, minlength=num_bins)
    return float(np.abs(gaps).sum() / len(correct))


class _LogitsMetric(evaluate.Metric):
    """A metric of logits (rows of C numbers) against class ids."""

    def _info(self):
        features = {"predictions": datasets.List(datasets.Value("float32")), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description=self.__doc__, citation="", inputs_description="", features=datasets.Features(features)
        )


class TopKAccuracy(_LogitsMetric):
    """[`top_k_accuracy`] as an `evaluate` module."""

    def _compute(self, predictions, references, k=1):
        return {"accuracy" if k == 1 else f"top_{k}_accuracy": top_k_accuracy(predictions, references, k)}


class NegativeLogLikelihood(_LogitsMetric):
    """[`negative_log_likelihood`] as an `evaluate` module."""

    def _compute(self, predictions, references):
        return {"negative_log_likelihood": negative_log_likelihood(predictions, references)}


class ExpectedCalibrationError(_LogitsMetric):
    """[`expected_calibration_error`] as an `evaluate` module."""

    def _compute(self, predictions, references, num_bins=15):
        return {"expected_calibration_error": expected_calibration_error(predictions, references, num_bins)}


def classification_metrics(
    logits: np.ndarray,
    labels: np.ndarray,
    class_logits: np.ndarray | None = None,
    teacher_token_logits: np.ndarray | None = None,
    teacher_logits: np.ndarray | None = None,
    teacher_names: Sequence[str] | None = None,
) -> dict[str, float]:
    """Metrics of one split.

    Args:
        logits: (N, C), the prediction.
        labels: (N,), class ids.
        class_logits: (N, C), the student's class head.
        teacher_token_logits: (N, T, C), the student's teacher heads.
        teacher_logits: (N, T, C), the logits of the teachers.
        teacher_names: T names, for the names of the metrics; numbers if not given.

    Returns:
        `accuracy`, `top_5_accuracy` (with more than 5 classes), `negative_log_likelihood` (nats),
        `expected_calibration_error`; for students `class_token_accuracy` and `<teacher>_token_accuracy`; with teacher
        logits `<teacher>_agreement`, the share of rows in which student and teacher choose the same class. All but the
        log-likelihood lie between 0 and 1.
    """
    metrics = {"accuracy": top_k_accuracy(logits, labels)}
    if logits.shape[1] > 5:
        metrics["top_5_accuracy"] = top_k_accuracy(logits, labels, k=5)
    metrics["negative_log_likelihood"] = negative_log_likelihood(logits, labels)
    metrics["expected_calibration_error"] = expected_calibration_error(logits, labels)
    if teacher_token_logits is not None:
        metrics["class_token_accuracy"] = float((class_logits.argmax(-1) == labels).mean())
        names = teacher_names or range(teacher_token_logits.shape[1])
        for i, name in enumerate(names):
            metrics[f"{name}_token_accuracy"] = float((teacher_token_logits[:, i].argmax(-1) == labels).mean())
            if teacher_logits is not None:
                same = logits.argmax(-1) == teacher_logits[:, i].argmax(-1)
                metrics[f"{name}_agreement"] = float(same.mean())
    return metrics


def compute_metrics(prediction: EvalPrediction, teacher_names: Sequence[str] | None = None) -> dict[str, float]:
    """`Trainer`'s `compute_metrics`, for any image classifier and for students."""
    outputs = prediction.predictions if isinstance(prediction.predictions, tuple) else (prediction.predictions,)
    return classification_metrics(outputs[0], prediction.label_ids, *outputs[1:3], teacher_names=teacher_names)


def predict(
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    dataset: datasets.Dataset,
    *,
    batch_size: int = 128,
    num_workers: int = 0,
    image_column: str | None = None,
    label_column: str | None = None,
) -> Mapping[str, np.ndarray]:
    """Run a classifier over a table.

    Args:
        model: any image classifier.
        image_processor: its image processor.
        dataset: a table with an image and a `ClassLabel` column.
        batch_size: images in a forward pass.
        num_workers: processes that decode images ahead of the model.
        image_column: the image column; found if not given.
        label_column: the label column; found if not given.

    Returns:
        `logits` (N, C) and `labels` (N,), in the order of the rows. Students add `class_logits` (N, C) and
        `teacher_token_logits` (N, T, C). Columns of all teachers of the student add `teacher_logits` (N, T, C).

    Raises:
        TypeError: `dataset` is not one table.
        ValueError: the table is empty, a column cannot be found, an image cannot be decoded, or model and table differ in
            their classes.
    """
    require_table(dataset, "dataset")
    if len(dataset) == 0:
        raise ValueError("The dataset is empty; it needs at least one row.")
    dataset, config = as_image_table(dataset, image_column, label_column), model.config
    check_class_names(config_class_names(config), class_names(dataset), "the model")
    teacher_names = getattr(config, "teacher_names", [])
    columns = [column_name(name) for name in teacher_names if column_name(name) in dataset.column_names]
    if len(columns) < len(teacher_names) or any(describe_column(dataset.features[c])[1] is not None for c in columns):
        # Logits of views belong to other images than those that are predicted here.
        columns = []
    rows = ImageRows(dataset, [LABEL], columns, config.num_labels)
    loader = torch.utils.data.DataLoader(
        rows,
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=DistillationCollator(image_processor, teacher_names),
    )
    # Without `cpu`, processes that torchrun starts on a CPU would not share the rows.
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    # Only the loader is prepared, because preparing a model wraps its forward for good.
    model, loader = without_autocast(model).eval().to(accelerator.device), accelerator.prepare(loader)
    results: dict[str, list[torch.Tensor]] = {}
    for batch in tqdm(loader, desc="Predicting", disable=not accelerator.is_local_main_process):
        with torch.no_grad():
            outputs = model(pixel_values=batch["pixel_values"].to(model.dtype))
        found = {name: outputs.get(name) for name in ("logits", "class_logits", "teacher_token_logits")}
        found |= {name: batch.get(name) for name in ("labels", "teacher_logits")}
        found = {name: value for name, value in found.items() if value is not None}
        for name, value in accelerator.gather_for_metrics(found).items():
            results.setdefault(name, []).append(value.float().cpu() if name != "labels" else value.cpu())
    return {name: torch.cat(values).numpy() for name, values in results.items()}


def evaluate_model(
    model: PreTrainedModel, image_processor: BaseImageProcessor, dataset: datasets.Dataset, **kwargs
) -> dict[str, float]:
    """[`predict`], then [`classification_metrics`]; arguments and errors are those of `predict`."""
    outputs = predict(model, image_processor, dataset, **kwargs)
    return classification_metrics(**outputs, teacher_names=getattr(model.config, "teacher_names", None))


def token_attention(
    model: IBViTForImageClassification,
    image_processor: BaseImageProcessor,
    images: Sequence[PIL.Image.Image],
) -> dict[str, np.ndarray]:
    """The attention of each token to the patches in the last layer, mean over the heads.

    Args:
        model: a student.
        image_processor: its image processor.
        images: N images.

    Returns:
        Token ("class token", then the names of the teachers) → (N, height / patch, width / patch), float32. A map sums to
        the share of its attention that the token gives to patches, not to other tokens.
    """
    pixel_values = image_processor(list(images), return_tensors="pt")["pixel_values"].to(model.device, model.dtype)
    names, implementation = ["class token", *model.config.teacher_names], model.config._attn_implementation
    # Fused kernels do not return their attention.
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            attentions = without_autocast(model).eval()(pixel_values, output_attentions=True).attentions
    finally:
        model.set_attn_implementation(implementation)
    attention = attentions[-1].float().mean(1)[:, : len(names), len(names) :]
    side = model.config.image_size // model.config.patch_size
    maps = attention.unflatten(2, (side, side)).cpu().numpy()
    return {name: maps[:, i] for i, name in enumerate(names)}
