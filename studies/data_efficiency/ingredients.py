"""Ingredients of strong recipes, for students without teachers or with online teachers: mixed images, RandAugment and
averaged weights."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torchvision.transforms import InterpolationMode, v2
from transformers import TrainerCallback

from hf_ibdistill import EnsembleDistillationTrainer, ImageClassificationTrainer, ensemble_distillation_loss
from hf_ibdistill.data.columns import IMAGE


# Of the Beta(α, α) distribution of the share: mixup (arXiv 1710.09412) as in DeiT, CutMix (arXiv 1905.04899).
ALPHAS = {"mixup": 0.8, "cutmix": 1.0}


def draw_mixture(kind: str, height: int, width: int, random: np.random.Generator) -> tuple[float, tuple | None]:
    """The share of an image in its mixture, and for `"cutmix"` the box of the other image: top, left, bottom, right.

    Args:
        kind: `"mixup"` or `"cutmix"`.
        height, width: of the image, in pixels.
        random: what the numbers are drawn from.
    """
    share = random.beta(ALPHAS[kind], ALPHAS[kind])
    if kind == "mixup":
        return share, None
    side, row, column = math.sqrt(1 - share), random.integers(height), random.integers(width)
    half_height, half_width = int(side * height) // 2, int(side * width) // 2
    top, bottom = max(row - half_height, 0), min(row + half_height, height)
    left, right = max(column - half_width, 0), min(column + half_width, width)
    # The border may have cut the box.
    share = 1 - (bottom - top) * (right - left) / (height * width)
    return share, (top / height, left / width, bottom / height, right / width)


def mix(images: torch.Tensor, share: float, box: tuple | None) -> torch.Tensor:
    """Images (N, channels, H, W), each mixed with that at the mirrored place of the batch.

    Args:
        images: in random order; those of a teacher may be larger than the student's.
        share: of the image itself, without a box.
        box: top, left, bottom and right of what the other image replaces, as shares of height and width.
    """
    others = images.flip(0)
    if box is None:
        return others.lerp(images, share)
    height, width = images.shape[-2:]
    top, left, bottom, right = (round(edge * size) for edge, size in zip(box, (height, width) * 2))
    mixed = images.clone()
    mixed[..., top:bottom, left:right] = others[..., top:bottom, left:right]
    return mixed


class _MixesImages:
    """A trainer on mixed images, with λ · CE(z, y) + (1 − λ) · CE(z, y of the other image) as its labels' term. Online
    teachers see the same mixed images.

    Args:
        mixing: `"mixup"` or `"cutmix"`. Each batch draws its own λ.
        args, kwargs: as for the trainer.

    Raises:
        ValueError: steps are accumulated or shared by processes, logits are stored, or the loss uses labels elsewhere.
    """

    def __init__(self, *args, mixing: str, **kwargs):
        super().__init__(*args, **kwargs)
        # On the CPU, so that no step waits for the device.
        self._mixing, self._random = mixing, np.random.default_rng(self.args.seed)
        accumulated, processes = self.args.gradient_accumulation_steps, self.args.world_size
        refused = {
            f"gradient_accumulation_steps={accumulated}": accumulated > 1,
            f"world_size={processes}": processes > 1,
        }
        if isinstance(self, EnsembleDistillationTrainer):
            refused["teachers=None"] = not self.teachers
            refused["confidence_weighting=True"] = self.args.confidence_weighting
            refused[f"unlabelled_target={self.args.unlabelled_target}"] = self.args.unlabelled_target != "none"
        else:
            # Their heads would learn the labels of unmixed images.
            refused[f"teacher_names={getattr(self.model.config, 'teacher_names', ())}"] = self._is_student
        for argument, is_refused in refused.items():
            if is_refused:
                raise ValueError(f"{argument} does not fit mixing={mixing}. Leave one of them out.")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels, (height, width) = inputs["labels"], inputs["pixel_values"].shape[-2:]
        share, box = draw_mixture(self._mixing, height, width, self._random)
        inputs = {**inputs, "pixel_values": mix(inputs["pixel_values"], share, box)}
        if "teacher_pixel_values" in inputs:
            images = inputs["teacher_pixel_values"].items()
            inputs["teacher_pixel_values"] = {name: mix(tensor, share, box) for name, tensor in images}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        # The loss has the images' own labels so far.
        own, other = (self._label_loss(outputs, given) for given in (labels, labels.flip(0)))
        change = (1 - share) * (other - own)
        if isinstance(self, EnsembleDistillationTrainer):
            self._loss_terms[1] += change.detach()
            loss = loss + self.args.label_weight * change
        else:
            loss = loss + change
        return (loss, outputs) if return_outputs else loss

    def _label_loss(self, outputs, labels) -> torch.Tensor:
        logits = outputs.get("class_logits", outputs["logits"])
        none = logits[:, None][:, :0]
        smoothing = self.args.label_smoothing_factor
        return ensemble_distillation_loss(logits, none, labels, none, weights=[], label_smoothing=smoothing).label_loss


class MixedClassificationTrainer(_MixesImages, ImageClassificationTrainer):
    __doc__ = _MixesImages.__doc__


class MixedDistillationTrainer(_MixesImages, EnsembleDistillationTrainer):
    __doc__ = _MixesImages.__doc__


class RandAugmentCollator:
    """RandAugment (arXiv 1909.13719: two operations, shears, shifts and rotations among them), then another collator, so
    that student and teachers get the same image. It draws from the random numbers of its process.

    Args:
        collator: what makes a batch of rows.
        magnitude: 0 to 30.
    """

    def __init__(self, collator: Callable[[Sequence[dict]], dict], magnitude: int):
        self.collator = collator
        self.augment = v2.RandAugment(magnitude=magnitude, interpolation=InterpolationMode.BILINEAR)

    def __call__(self, rows: Sequence[dict]) -> dict:
        return self.collator([{**row, IMAGE: self.augment(row[IMAGE])} for row in rows])


class AveragedWeights(TrainerCallback):
    """Keeps an exponential moving average of the weights, and puts it into the model when training ends.

    Args:
        decay: the share of the average that a step keeps. In step t, it is at most (1 + t) / (10 + t).
    """

    def __init__(self, decay: float):
        self.decay = decay

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        # They share the memory of the weights. The counts of batch norms are whole numbers, which have no average.
        self.weights = [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]
        self.averages = [tensor.clone() for tensor in self.weights]

    def on_step_end(self, args, state, control, **kwargs):
        decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        get_ema_multi_avg_fn(decay)(self.averages, self.weights, None)

    def on_train_end(self, args, state, control, **kwargs):
        for weight, average in zip(self.weights, self.averages):
            weight.copy_(average)
