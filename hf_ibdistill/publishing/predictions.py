"""What a model predicted for each row of a split: small enough to keep, enough to draw it and to compare two runs."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..data.classes import class_names, label_ids
from ..data.columns import IMAGE
from ..evaluation import log_softmax
from ..files import write_whole
from ..images.views import row_key
from ..rows import ImageRows


PREDICTIONS = "predictions.safetensors"
_FORMAT = "hf_ibdistill/1"
# Images whose pixels identify the rows of a split.
_SAMPLE = 32


class Rows(NamedTuple):
    """What identifies the rows of a split: their labels (N,), the names of the classes, and a digest of the pixels of some
    images. Not the name of the data, because a recorded table and its images hold the same rows."""

    labels: np.ndarray
    class_names: list[str]
    images: str

    @classmethod
    def of(cls, dataset: Dataset) -> "Rows":
        """The rows of a table that passed the door."""
        sample = np.unique(np.linspace(0, len(dataset) - 1, _SAMPLE).round().astype(int)).tolist()
        # The encoding of an image does not matter.
        keys = [row_key(row[IMAGE]) for row in ImageRows(dataset).read(sample)]
        digest = hashlib.sha256(json.dumps(keys).encode()).hexdigest()[:16]
        return cls(label_ids(dataset), list(class_names(dataset)), digest)

    def difference(self, other: "Rows") -> str | None:
        """How other rows differ from these; `None` if they are the same."""
        if self.class_names != other.class_names:
            return f"{_some(self.class_names)} and {_some(other.class_names)}"
        if len(self.labels) != len(other.labels):
            return f"{len(self.labels):,} and {len(other.labels):,} rows"
        changed = int((self.labels != other.labels).sum())
        if changed:
            return f"the labels of {changed:,} of {len(self.labels):,} rows differ"
        return None if self.images == other.images else "the images differ"


def _some(names):
    return f"{len(names):,} classes ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"


@dataclass
class Predictions:
    """The predictions for N rows with a label, in their order.

    Args:
        rows: the rows.
        predicted: (N,), the most probable class.
        confidence: (N,), its probability, float32.
        log_probability: (N,), that of the label, as a logarithm (nats), float32.
        tokens: for a student with tokens, token → its most probable class, (N,).
    """

    rows: Rows
    predicted: np.ndarray
    confidence: np.ndarray
    log_probability: np.ndarray
    tokens: dict[str, np.ndarray]

    @property
    def is_right(self) -> np.ndarray:
        """(N,), whether the prediction is the label."""
        return self.predicted == self.rows.labels

    @classmethod
    def of_outputs(
        cls, outputs: Mapping[str, np.ndarray], dataset: Dataset, teacher_names: Sequence[str] | None = None
    ) -> "Predictions":
        """From what [`predict`] returned for this table, in which every row has a label. `teacher_names` are those of the
        student's tokens."""
        log_probabilities, predicted = log_softmax(outputs["logits"]), _most_probable(outputs["logits"])
        numbers, tokens = np.arange(len(predicted)), {}
        if teacher_names and "teacher_token_logits" in outputs:
            heads = dict(zip(teacher_names, outputs["teacher_token_logits"].swapaxes(0, 1)))
            tokens = {"class token": outputs["class_logits"], **heads}
        return cls(
            rows=Rows.of(dataset),
            predicted=predicted,
            confidence=np.exp(log_probabilities[numbers, predicted]).astype(np.float32),
            log_probability=log_probabilities[numbers, outputs["labels"]].astype(np.float32),
            tokens={name: _most_probable(logits) for name, logits in tokens.items()},
        )

    def save(self, path: str | os.PathLike) -> None:
        """Write a safetensors file. With up to 256 classes, a row takes 10 bytes and 1 for each token; with up to 65,536
        classes, 12 and 2."""
        small = np.min_scalar_type(len(self.rows.class_names) - 1)
        # safetensors has no other unsigned integers.
        small = small if small.itemsize <= 2 else np.dtype(np.int32)
        arrays = {name: getattr(self, name).astype(np.float32) for name in ("confidence", "log_probability")}
        arrays |= {"labels": self.rows.labels.astype(small), "predicted": self.predicted.astype(small)}
        if self.tokens:
            arrays["tokens"] = np.stack(list(self.tokens.values()), axis=1).astype(small)
        facts = {"tokens": list(self.tokens), "class_names": self.rows.class_names}
        metadata = {"format": _FORMAT, "images": self.rows.images, **{k: json.dumps(v) for k, v in facts.items()}}
        write_whole(path, lambda temporary: save_file(arrays, temporary, metadata))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Predictions":
        """Read the file that [`save`] wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged.
        """
        if not Path(path).exists():
            raise FileNotFoundError(f"{path} does not exist.")
        try:
            with safe_open(path, "numpy") as file:
                metadata = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 it is no dict
            names, classes = (json.loads(metadata[key]) for key in ("tokens", "class_names"))
            classified = {name: arrays[name].astype(np.int64) for name in ("labels", "predicted")}
            tokens = list(arrays["tokens"].T.astype(np.int64)) if names else []
            if {len(values) for values in arrays.values()} != {len(classified["labels"])}:
                raise ValueError("its columns differ in length")
            for values in (*classified.values(), *tokens):
                if ((values < 0) | (values >= len(classes))).any():
                    raise ValueError("it has a class without a name")
            return cls(
                rows=Rows(classified["labels"], classes, metadata["images"]),
                predicted=classified["predicted"],
                confidence=arrays["confidence"],
                log_probability=arrays["log_probability"],
                tokens=dict(zip(names, tokens, strict=True)),
            )
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {error}. Delete it, or train again.") from error


def _most_probable(logits: np.ndarray) -> np.ndarray:
    """The first of the largest logits; NaN comes last, as in the metrics."""
    return np.where(np.isnan(logits), -np.inf, logits).argmax(-1)
