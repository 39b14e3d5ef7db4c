"""Measure image classifiers: metrics, predictions, attention.

The metrics are plain functions of arrays; `hf_ibdistill.metrics` offers them as `evaluate` modules.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import datasets
import numpy as np
import PIL.Image
import scipy.special
import torch
from accelerate import Accelerator
from transformers import BaseImageProcessor, EvalPrediction, PreTrainedModel

from .checks import check_numbers
from .data.classes import check_class_names, check_labels, class_names, config_class_names, labelled_rows
from .data.columns import LABEL, as_image_table, require_table
from .logits.encoding import column_name, describe_column
from .models.modeling_ibvit import IBViTForImageClassification, IBViTImageClassifierOutput
from .passes import run_in_parts
from .progress import Progress
from .rows import DistillationCollator, ImageRows
from .teachers import on_device, require_model, without_autocast


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities over the last axis, in float64."""
    return _on_cpu(logits).double().log_softmax(-1).numpy()


def log_mean_probability(logits: np.ndarray) -> np.ndarray:
    """(T, …, C), the logits of T models → (…, C), the logarithm of their mean probability, in float64."""
    return _on_cpu(logits).double().log_softmax(-1).logsumexp(0).sub(np.log(len(logits))).numpy()


def top_k_accuracy(logits: np.ndarray, labels: np.ndarray, k: int = 1) -> float:
    """Share of rows whose class is among the k largest logits. Among equal logits, the smaller class id comes first. NaN
    comes last.

    Args:
        logits: (N, C).
        labels: (N,) class ids.
        k: number of classes that count.
    """
    return float(_is_in_top_k(*_check(logits, labels), k).mean())


def negative_log_likelihood(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean of −log p(class) over rows, in nats.

    Args:
        logits: (N, C).
        labels: (N,) class ids.
    """
    return float(_surprise(*_check(logits, labels)).mean())


def expected_calibration_error(logits: np.ndarray, labels: np.ndarray, num_bins: int = 15) -> float:
    """Mean distance between confidence and accuracy over bins of equal width (arXiv 1706.04599, equation 3).

    Args:
        logits: (N, C).
        labels: (N,) class ids.
        num_bins: number of bins between 0 and 1.
    """
    gaps = _calibration_gaps(*_check(logits, labels), num_bins)
    return float(gaps.abs().sum() / len(logits))


def accuracy_interval(
    num_right: float | np.ndarray, num_rows: float | np.ndarray, confidence: float = 0.95
) -> np.ndarray:
    """The interval of Wilson (1927) of an accuracy.

    Args:
        num_right, num_rows: right rows and all rows; arrays (…) give an interval each.
        confidence: the probability that an interval contains the accuracy on all images of this kind.

    Returns:
        (2, …), the ends; NaN without rows.
    """
    z = scipy.special.ndtri((1 + confidence) / 2)
    num_rows = np.where(np.asarray(num_rows) > 0, num_rows, np.nan)
    share, total = np.asarray(num_right) / num_rows, num_rows + z**2
    middle = (num_rows * share + z**2 / 2) / total
    reach = z / total * np.sqrt(num_rows * share * (1 - share) + z**2 / 4)
    return np.stack([middle - reach, middle + reach])


def paired_difference(
    first: Sequence[float], second: Sequence[float], confidence: float = 0.95
) -> tuple[float, float, float]:
    """The mean of `first` − `second` over pairs, with its confidence interval by Student's t-distribution.

    Args:
        first, second: one value a pair (a seed, or a test image).
        confidence: the probability that the interval contains the true mean.

    Returns:
        Mean, lower end, upper end. The ends of a single pair are NaN.

    Raises:
        ValueError: `first` and `second` differ in length.
    """
    differences = np.array([a - b for a, b in zip(first, second, strict=True)])
    mean = float(differences.mean())
    if len(differences) < 2:
        return mean, float("nan"), float("nan")
    error = differences.std(ddof=1) / np.sqrt(len(differences))
    reach = float(error * scipy.special.stdtrit(len(differences) - 1, (1 + confidence) / 2))
    return mean, mean - reach, mean + reach


def _on_cpu(values: np.ndarray | torch.Tensor) -> torch.Tensor:
    # Not every accelerator has float64.
    return torch.as_tensor(values).cpu()


def _check(logits, labels) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as tensors; `ValueError` if a label is no class, as of a row without one."""
    logits, labels = _on_cpu(logits), _on_cpu(labels)
    wrong = int(((labels < 0) | (labels >= logits.shape[-1])).sum())
    if wrong:
        raise ValueError(
            f"labels: {wrong} of {len(labels)} are none of the {logits.shape[-1]} classes, as of rows without a label. Leave "
            "these rows out."
        )
    return logits, labels


def _is_in_top_k(logits: torch.Tensor, labels: torch.Tensor, k: int) -> torch.Tensor:
    """1 for each row whose class is among the k largest logits, else 0: (N,), float64."""
    own = logits.gather(1, labels[:, None])
    is_before = torch.arange(logits.shape[1], device=labels.device) < labels[:, None]
    # NaN is neither above nor equal to anything.
    beats = (logits > own) | ((logits == own) & is_before) | (own.isnan() & (~logits.isnan() | is_before))
    return (beats.sum(1) < k).double()


def _surprise(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """−log p(class) of each row: (N,), float64."""
    return -logits.double().log_softmax(-1).gather(1, labels[:, None])[:, 0]


def calibration_bins(confidence: np.ndarray | torch.Tensor, is_right: np.ndarray, num_bins: int = 15) -> torch.Tensor:
    """Sums over bins of confidence, of equal width between 0 and 1.

    Args:
        confidence: (N,), the probability of the predicted class.
        is_right: (N,), whether it is the label.
        num_bins: number of bins B.

    Returns:
        (3, B), float64: rows, their confidences, and right predictions.
    """
    confidence = torch.as_tensor(confidence).double()
    bins = ((confidence.nan_to_num() * num_bins).ceil().long() - 1).clamp(0, num_bins - 1)
    values = torch.stack([torch.ones_like(confidence), confidence, torch.as_tensor(is_right).to(confidence)])
    return values.new_zeros(3, num_bins).index_add_(1, bins, values)


def _calibration_gaps(logits: torch.Tensor, labels: torch.Tensor, num_bins: int) -> torch.Tensor:
    """For each bin of confidence, right predictions minus the sum of confidences: (num_bins,), float64."""
    confidence, predicted = logits.double().softmax(-1).max(1)
    _, confidences, right = calibration_bins(confidence, predicted == labels, num_bins)
    return right - confidences


class RunningMetrics:
    """[`classification_metrics`] of rows that arrive batch by batch, in memory that does not depend on their number.

    It is a `compute_metrics` for `Trainer` with `batch_eval_metrics=True`.
    """

    def __init__(self, teacher_names: Sequence[str] | None = None):
        self.teacher_names = teacher_names
        self.reset()

    def reset(self) -> None:
        """Forget all batches."""
        self._num_rows, self._sums = 0, {}

    def update(
        self,
        logits: np.ndarray | torch.Tensor,
        labels: np.ndarray | torch.Tensor,
        class_logits: np.ndarray | torch.Tensor | None = None,
        teacher_token_logits: np.ndarray | torch.Tensor | None = None,
        teacher_logits: np.ndarray | torch.Tensor | None = None,
    ) -> None:
        """Count a batch; arguments are those of [`classification_metrics`]. Every row needs a label."""
        logits, labels = _check(logits, labels)
        sums = {"accuracy": _is_in_top_k(logits, labels, 1)}
        if logits.shape[1] > 5:
            sums["top_5_accuracy"] = _is_in_top_k(logits, labels, 5)
        sums["negative_log_likelihood"] = _surprise(logits, labels)
        if teacher_token_logits is not None:
            sums["class_token_accuracy"] = _on_cpu(class_logits).argmax(-1) == labels
            tokens = _on_cpu(teacher_token_logits).argmax(-1)
            for i, name in enumerate(self._names(tokens.shape[1])):
                sums[f"{name}_token_accuracy"] = tokens[:, i] == labels
        if teacher_logits is not None:
            choices = _on_cpu(teacher_logits).argmax(-1)
            for i, name in enumerate(self._names(choices.shape[1])):
                sums[f"{name}_agreement"] = logits.argmax(-1) == choices[:, i]
        sums = {name: values.double().sum() for name, values in sums.items()}
        sums["expected_calibration_error"] = _calibration_gaps(logits, labels, 15)
        self._num_rows += len(labels)
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, 0) + value

    def _names(self, count):
        # The class token has that metric; only a student of old has a teacher of this name.
        return [i if name == "class" else name for i, name in enumerate(self.teacher_names or range(count))]

    def compute(self) -> dict[str, float]:
        """The metrics of all rows since the last `compute`."""
        metrics = {name: float(value.abs().sum()) / self._num_rows for name, value in self._sums.items()}
        self.reset()
        return metrics

    def __call__(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        outputs = prediction.predictions if isinstance(prediction.predictions, tuple) else (prediction.predictions,)
        # Other models may have further outputs of their own.
        self.update(outputs[0], prediction.label_ids, *(outputs[1:3] if self.teacher_names else ()))
        return self.compute() if compute_result else {}


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
    metrics = RunningMetrics(teacher_names)
    metrics.update(logits, labels, class_logits, teacher_token_logits, teacher_logits)
    return metrics.compute()


def predict(
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    dataset: datasets.Dataset,
    *,
    batch_size: int = 128,
    num_workers: int = 0,
    image_column: str | None = None,
    label_column: str | None = None,
    teacher_names: Sequence[str] | None = None,
) -> Mapping[str, np.ndarray]:
    """Run a classifier over a table.

    Args:
        model: any image classifier.
        image_processor: its image processor.
        dataset: a table with an image column.
        batch_size: images in a batch.
        num_workers: processes that decode images ahead of the model.
        image_column: the image column; found if not given.
        label_column: the label column; found if not given. A table without labels is predicted as well.
        teacher_names: teachers whose logits are returned if the table has them; by default those of the student's tokens.

    Returns:
        `logits` (N, C) and, if the table has them, `labels` (N,), −100 for a row without one, in the order of the rows.
        Students add `class_logits` (N, C) and `teacher_token_logits` (N, T, C). Columns of all these teachers add
        `teacher_logits` (N, T, C).

    Raises:
        TypeError: `model`, `image_processor` or `dataset` is of another kind.
        ValueError: the table is empty, a column cannot be found, an image cannot be decoded, or model and table differ in
            their classes.
    """
    results: dict[str, list[torch.Tensor]] = {}
    require_table(dataset, "dataset")
    dataset = as_image_table(dataset, image_column, label_column, needs_label=None)
    for batch in _predict(model, image_processor, dataset, batch_size, num_workers, teacher_names):
        for name, value in batch.items():
            results.setdefault(name, []).append(value)
    return {name: torch.cat(values).numpy() for name, values in results.items()}


def evaluate_model(
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    dataset: datasets.Dataset,
    *,
    batch_size: int = 128,
    num_workers: int = 0,
    image_column: str | None = None,
    label_column: str | None = None,
    teacher_names: Sequence[str] | None = None,
) -> dict[str, float]:
    """[`classification_metrics`] of what a classifier predicts for a table, in memory that does not depend on the number
    of rows. Arguments and errors are those of [`predict`]. Rows without a label are left out, with a warning; without any
    label it raises `ValueError`."""
    require_table(dataset, "dataset")
    dataset = labelled_rows(as_image_table(dataset, image_column, label_column), "dataset")
    metrics = RunningMetrics(teacher_names or getattr(getattr(model, "config", None), "teacher_names", None))
    for batch in _predict(model, image_processor, dataset, batch_size, num_workers, teacher_names):
        metrics.update(**batch)
    return metrics.compute()


def _predict(
    model, image_processor, dataset, batch_size, num_workers, teacher_names
) -> Iterator[dict[str, torch.Tensor]]:
    """The results of [`predict`] for a table that passed the door, batch by batch, on the CPU."""
    require_model(model)
    if not isinstance(image_processor, BaseImageProcessor):
        raise TypeError(f"image_processor={image_processor!r} is no image processor. Pass that of the model.")
    check_numbers(1, whole=True, batch_size=batch_size)
    if len(dataset) == 0:
        raise ValueError("The dataset is empty; it needs at least one row.")
    config, has_labels = model.config, LABEL in dataset.column_names
    if has_labels:
        check_class_names(config_class_names(config), class_names(dataset), "the model")
        check_labels(dataset, unlabelled=True)
    teacher_names = list(getattr(config, "teacher_names", []) if teacher_names is None else teacher_names)
    columns = [column_name(name) for name in teacher_names if column_name(name) in dataset.column_names]
    if len(columns) < len(teacher_names) or any(describe_column(dataset.features[c])[1] is not None for c in columns):
        # Logits of views belong to other images than those that are predicted here.
        columns = []
    loader = torch.utils.data.DataLoader(
        ImageRows(dataset, [LABEL] if has_labels else [], columns, config.num_labels),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=DistillationCollator(image_processor, teacher_names),
    )
    # Without `cpu`, processes that torchrun starts on a CPU would not share the rows.
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    # Only the loader is prepared, because preparing a model wraps its forward for good.
    loader, network = accelerator.prepare(loader), without_autocast(model)
    names = ("logits", "class_logits", "teacher_token_logits") if hasattr(config, "teacher_names") else ("logits",)
    progress = Progress("predict", len(dataset), is_shown=accelerator.is_local_main_process)
    sizes = {}

    def run(pixel_values) -> dict[str, torch.Tensor]:
        outputs = network(pixel_values=pixel_values)
        # Models with `return_dict=False` return tuples, in the order of the names.
        outputs = dict(zip(names, outputs)) if isinstance(outputs, tuple) else outputs
        return {name: outputs[name] for name in names if outputs.get(name) is not None}

    with on_device(network, accelerator.device), _evaluation_mode(network), progress:
        for batch in loader:
            parts = run_in_parts(run, network, batch["pixel_values"].to(network.dtype), sizes)
            found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            found |= {name: batch.get(name) for name in ("labels", "teacher_logits")}
            if not has_labels:
                del found["labels"]
            found = {name: value for name, value in found.items() if value is not None}
            gathered = accelerator.gather_for_metrics(found)
            progress.update(len(gathered["logits"]))
            yield {name: value.cpu() if name == "labels" else value.float().cpu() for name, value in gathered.items()}


@contextmanager
def _evaluation_mode(model):
    """Evaluation mode for a while; every module then is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield model.eval()
    finally:
        for module, is_training in modes.items():
            module.training = is_training


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
    pixel_values = image_processor(list(images), return_tensors="pt")["pixel_values"]
    return forward_with_attention(model, pixel_values)[1]


def forward_with_attention(
    model: IBViTForImageClassification, pixel_values: torch.Tensor
) -> tuple[IBViTImageClassifierOutput, dict[str, np.ndarray]]:
    """The outputs of a student and the maps of [`token_attention`], from one forward pass.

    Args:
        model: a student.
        pixel_values: (N, channels, height, width).
    """
    names, implementation = ["class token", *model.config.teacher_names], model.config._attn_implementation
    # Fused kernels do not return their attention.
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad(), _evaluation_mode(without_autocast(model)) as network:
            outputs = network(pixel_values.to(model.device, model.dtype), output_attentions=True, return_dict=True)
    finally:
        model.set_attn_implementation(implementation)
    attention = outputs.attentions[-1].float().mean(1)[:, : len(names), len(names) :]
    side = model.config.image_size // model.config.patch_size
    maps = attention.unflatten(2, (side, side)).cpu().numpy()
    return outputs, {name: maps[:, i] for i, name in enumerate(names)}
