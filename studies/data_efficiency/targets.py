"""What may teach the class token on images without a label, besides the targets of the package."""

import torch
from torch.nn import functional as F

from hf_ibdistill import EnsembleDistillationTrainer


def consistency_loss(
    class_logits: torch.Tensor, fused_logits: torch.Tensor, labels: torch.Tensor, min_confidence: float = 0.0
) -> torch.Tensor:
    """KL of the class token's prediction to the student's own prediction for the other view of the same image, mean over all
    rows, of which only those without a label count.

    Args:
        class_logits: (N, C), from the class token. Rows 2i and 2i + 1 are two views of one image.
        fused_logits: (N, C), from all tokens. No gradient flows into them.
        labels: (N,), class ids; negative for a row without a label.
        min_confidence: the other view teaches if its largest probability is at least this.
    """
    predictions = fused_logits.detach().float().softmax(-1)
    targets = predictions.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    losses = F.kl_div(class_logits.float().log_softmax(-1), targets, reduction="none").sum(-1)
    return (losses * ((labels < 0) & (targets.amax(-1) >= min_confidence))).mean()


class ConsistencyTrainer(EnsembleDistillationTrainer):
    """Adds [`consistency_loss`] to the loss of a student with teacher tokens, with weight 1.

    Args:
        min_target_confidence: its `min_confidence`.
        args, kwargs: as for `EnsembleDistillationTrainer`. `views_per_image` must be 2, on one process without accumulation.

    Raises:
        ValueError: batches do not consist of pairs of views.
    """

    def __init__(self, *args, min_target_confidence: float, **kwargs):
        super().__init__(*args, **kwargs)
        self.min_target_confidence = min_target_confidence
        if self.args.views_per_image != 2 or self.args.train_batch_size % 2:
            raise ValueError(
                f"views_per_image={self.args.views_per_image} with batches of {self.args.train_batch_size} rows are no pairs "
                "of views. Set views_per_image=2, and an even batch size."
            )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            loss = loss + consistency_loss(
                outputs.class_logits, outputs.logits, inputs["labels"], self.min_target_confidence
            )
        return (loss, outputs) if return_outputs else loss
