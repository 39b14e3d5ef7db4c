"""The metrics of a model as `evaluate` modules, for example for `evaluate.combine`.

A module of its own, because importing `evaluate` would take a twelfth of the start of every command.
"""

import datasets
import evaluate

from .evaluation import expected_calibration_error, negative_log_likelihood, top_k_accuracy


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
