"""Metrics of image classifiers, through `evaluate`, from modules that the package carries."""

from collections.abc import Mapping, Sequence
from itertools import combinations

import datasets
import evaluate
import numpy as np
import PIL.Image
import scipy.special
import torch
from accelerate import Accelerator
from tqdm.auto import tqdm
from transformers import BaseImageProcessor, EvalPrediction, PreTrainedModel

from .data import check_class_names, class_names, config_class_names, find_columns
from .images import ImageRows
from .logits.encoding import StoredLogits, column_name, describe_column, recorded_teachers
from .models.modeling_ibvit import IBViTForImageClassification
from .teachers import without_autocast
from .training.collator import DistillationCollator


def _log_softmax(logits):
    return torch.tensor(logits, dtype=torch.float64).log_softmax(-1).numpy()


class _LogitsMetric(evaluate.Metric):
    """A metric of logits (rows of numbers, one a class) against class ids."""

    def _info(self):
        features = {"predictions": datasets.List(datasets.Value("float32")), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description=self.__doc__, citation="", inputs_description="", features=datasets.Features(features)
        )


class TopKAccuracy(_LogitsMetric):
    """Share of rows whose class is among the k largest logits."""

    def _compute(self, predictions, references, k=1):
        logits, labels = np.asarray(predictions), np.asarray(references)
        largest = np.argsort(-logits, axis=1, kind="stable")[:, :k]
        right = (largest == labels[:, None]).any(axis=1)
        return {"accuracy" if k == 1 else f"top_{k}_accuracy": float(right.mean())}


class NegativeLogLikelihood(_LogitsMetric):
    """Mean of −log p(class), in nats."""

    def _compute(self, predictions, references):
        log_probabilities = _log_softmax(predictions)
        picked = np.take_along_axis(log_probabilities, np.asarray(references)[:, None], axis=1)
        return {"negative_log_likelihood": float(-picked.mean())}


class ExpectedCalibrationError(_LogitsMetric):
    """Mean distance between confidence and accuracy over bins of equal width (arXiv 1706.04599, equation 3)."""

    def _compute(self, predictions, references, num_bins=15):
        probabilities = np.exp(_log_softmax(predictions))
        confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == np.asarray(references)
        bins = np.clip(np.ceil(np.nan_to_num(confidence) * num_bins).astype(int) - 1, 0, num_bins - 1)
        gaps = np.bincount(bins, weights=correct - confidence, minlength=num_bins)
        return {"expected_calibration_error": float(np.abs(gaps).sum() / len(correct))}


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
        teacher_logits: (N, T, C), the teachers' own.
        teacher_names: T names, for the names of the metrics; numbers when not given.

    Returns:
        `accuracy`, `top_5_accuracy` (with more than 5 classes), `negative_log_likelihood` (nats),
        `expected_calibration_error`; for students `class_token_accuracy` and `<teacher>_token_accuracy`; with teacher
        logits `<teacher>_agreement`, the share of rows in which student and teacher choose the same class. All but the
        log-likelihood lie between 0 and 1.
    """
    accuracy = TopKAccuracy(keep_in_memory=True)
    metrics = accuracy.compute(predictions=logits, references=labels, k=1)
    if logits.shape[1] > 5:
        metrics |= accuracy.compute(predictions=logits, references=labels, k=5)
    metrics |= NegativeLogLikelihood(keep_in_memory=True).compute(predictions=logits, references=labels)
    metrics |= ExpectedCalibrationError(keep_in_memory=True).compute(predictions=logits, references=labels)
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

    Returns:
        `logits` (N, C) and `labels` (N,); for students also `class_logits` (N, C) and `teacher_token_logits` (N, T, C),
        and, where the table has all of the student's columns, `teacher_logits` (N, T, C). In the order of the rows.

    Raises:
        ValueError: the table is empty, or model and table differ in their classes.
    """
    if len(dataset) == 0:
        raise ValueError("The data set is empty; there is nothing to predict.")
    image_column, label_column = find_columns(dataset, image_column, label_column)
    config = model.config
    check_class_names(config_class_names(config), class_names(dataset, label_column), "the model")
    teacher_names = getattr(config, "teacher_names", [])
    columns = [column_name(name) for name in teacher_names if column_name(name) in dataset.column_names]
    if len(columns) < len(teacher_names) or any(describe_column(dataset.features[c])[1] is not None for c in columns):
        # Views' logits are about other images than the ones that are predicted here.
        columns = []
    rows = ImageRows(dataset, image_column, [label_column], columns, config.num_labels)
    loader = torch.utils.data.DataLoader(
        rows,
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=DistillationCollator(image_processor, image_column, label_column, teacher_names),
    )
    accelerator = Accelerator()
    # The loader alone: preparing a model wraps its forward for good.
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
    """[`predict`], then [`classification_metrics`]; arguments and errors are `predict`'s."""
    outputs = predict(model, image_processor, dataset, **kwargs)
    return classification_metrics(**outputs, teacher_names=getattr(model.config, "teacher_names", None))


def logits_metrics(
    dataset: datasets.Dataset,
    *,
    temperature: float = 4.0,
    num_rows: int = 1000,
    seed: int = 0,
    label_column: str | None = None,
) -> dict[str, float]:
    """What a table's recorded logits can teach at a distillation temperature, and whether views and further teachers add
    to it.

    Args:
        dataset: a recorded table.
        temperature: its softmax is what the student is taught.
        num_rows: rows in the random sample that is looked at, with all their views.
        seed: seed of the sample.
        label_column: the label column; found when not given.

    Returns:
        For each teacher `<teacher>_accuracy`; `<teacher>_entropy`, at most log(C), where even the smallest difference between
        classes is lost; with views `<teacher>_view_divergence`, how much its word depends on the view: near 0, one view of each
        image would teach as much. For each two teachers `<one>_<other>_agreement`, the share of views to which they give the
        same class, and `<one>_<other>_divergence`: near 0, one of them would teach as much. Means over rows and views; entropies
        and Jensen–Shannon divergences (Lin 1991, equation 5.1) in nats.

    Raises:
        ValueError: the table is empty, or holds no logits or no labels.
    """
    names = recorded_teachers(dataset)
    if len(dataset) == 0 or not names:
        raise ValueError(
            f"There are no logits in these {len(dataset)} rows of {', '.join(dataset.column_names)}; record_teacher_logits "
            "makes such a table."
        )
    label_column = find_columns(dataset, label_column=label_column)[1]
    num_classes = len(class_names(dataset, label_column))
    sample = np.random.default_rng(seed).choice(len(dataset), size=min(num_rows, len(dataset)), replace=False)
    labels = np.asarray(dataset.select_columns([label_column])[sample][label_column])
    probabilities, metrics = {}, {}
    for name in names:
        column = column_name(name)
        num_views = describe_column(dataset.features[column])[1]
        stored = StoredLogits(dataset, column)
        views = [None] if num_views is None else range(num_views)
        logits = np.stack([stored.read(sample, num_classes, view, temperature) for view in views])
        values = probabilities[name] = np.exp(_log_softmax(logits.astype(np.float32) / temperature))
        metrics[f"{name}_accuracy"] = float((values.argmax(-1) == labels).mean())
        metrics[f"{name}_entropy"] = float(_entropy(values).mean())
        if num_views is not None:
            metrics[f"{name}_view_divergence"] = _divergence(values)
    for first, second in combinations(probabilities, 2):
        pair = np.stack([probabilities[first], probabilities[second]])
        metrics[f"{first}_{second}_agreement"] = float((pair[0].argmax(-1) == pair[1].argmax(-1)).mean())
        metrics[f"{first}_{second}_divergence"] = _divergence(pair)
    return metrics


def _entropy(probabilities):
    return -scipy.special.xlogy(probabilities, probabilities).sum(-1)


def _divergence(distributions):
    """Jensen–Shannon divergence of the distributions along the first axis, mean over the others."""
    return float((_entropy(distributions.mean(0)) - _entropy(distributions).mean(0)).mean())


def token_attention(
    model: IBViTForImageClassification,
    image_processor: BaseImageProcessor,
    images: Sequence[PIL.Image.Image],
) -> dict[str, np.ndarray]:
    """Where each token looks: its attention to the patches in the last layer, mean over the heads.

    Args:
        model: a student.
        image_processor: its image processor.
        images: N images.

    Returns:
        Token ("class token", then the teachers' names) → (N, height / patch, width / patch), float32; each sums to the share of
        its attention that the token gives to patches, not to other tokens.
    """
    pixel_values = image_processor(list(images), return_tensors="pt")["pixel_values"].to(model.device, model.dtype)
    names, implementation = ["class token", *model.config.teacher_names], model.config._attn_implementation
    # Fused kernels keep their attention to themselves.
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
