"""The ensemble distillation loss: pure functions of logits."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F


MODES = ("soft", "hard")
UNLABELLED_TARGETS = ("none", "teachers", "pseudo_labels")


class EnsembleDistillationLoss(NamedTuple):
    """`loss` and `label_loss`, that of the class token, are scalars; `teacher_losses` is (T,). Both are before the weights."""

    loss: torch.Tensor
    label_loss: torch.Tensor
    teacher_losses: torch.Tensor


def ensemble_distillation_loss(
    class_logits: torch.Tensor,
    teacher_token_logits: torch.Tensor,
    labels: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    weights: Sequence[float],
    temperature: float | Sequence[float] = 1.0,
    label_weight: float = 1.0,
    mode: str = "soft",
    label_smoothing: float = 0.0,
    standardize_logits: bool = False,
    confidence_weighting: bool = False,
    unlabelled_target: str = "none",
    min_confidence: float = 0.95,
) -> EnsembleDistillationLoss:
    r"""The labels' loss of the class token plus the loss of each teacher token against its teacher (arXiv 2310.00369;
    arXiv 2106.12378, equation 3).

    For a row with label y, class-token logits z, teacher tokens' logits s_i, teachers' logits t_i, temperatures τ_i and
    weights λ_0 (labels) and λ_i (teachers), the `"soft"` loss is

        L = λ_0 · CE(z, y) + Σ_i λ_i · τ_i² · KL( softmax(t_i/τ_i) ‖ softmax(s_i/τ_i) )

    averaged over rows, with or without a label. For a row without a label, `unlabelled_target` replaces CE(z, y) by

        "none"           0
        "teachers"       KL( p ‖ softmax(z) )
        "pseudo_labels"  CE(z, argmax p) if max p ≥ min_confidence, otherwise 0

    with the mean p = Σ_i softmax(t_i) / T of the teachers. For a student without teacher tokens, pass s_i = z.

    All weights and temperatures 1 is Co-advise's loss. `"hard"` replaces τ_i²·KL by
    CE(s_i, argmax t_i); with one teacher and λ = ½, ½ it is DeiT's hard distillation (arXiv 2012.12877, equation 3).
    Everything is computed in float32.

    Args:
        class_logits: (N, C), from the class token.
        teacher_token_logits: (N, T, C), from the teacher tokens.
        labels: (N,), class ids; −1 or −100 for a row without a label.
        teacher_logits: (N, T, C), from the teachers, in the same order. No gradient flows into them.
        weights: T numbers λ_i.
        temperature: one number τ for all teachers, or T numbers.
        label_weight: λ_0.
        mode: `"soft"` or `"hard"`.
        label_smoothing: share of the weight of a label that is spread over all classes.
        standardize_logits: shift and scale the logits of each teacher and teacher token to mean 0 and deviation 1 over the
            classes before the temperature divides them (arXiv 2403.01427). A token then need not match the confidence of
            its teacher. For `"soft"`.
        confidence_weighting: in each row, weight the teachers by the probabilities p_i(y) that they give to its label:
            λ_i is multiplied by T · p_i(y) / Σ_j p_j(y), at temperature 1 (after CA-MKD, arXiv 2201.00007). Rows without a
            label keep λ_i.
        unlabelled_target: what teaches the class token on rows without a label: `"none"`, `"teachers"` or
            `"pseudo_labels"`.
        min_confidence: of `"pseudo_labels"`.

    Raises:
        ValueError: the shapes, the number of weights or temperatures, the mode or the target do not fit.

    Example:

    ```python
    >>> import torch
    >>> from hf_ibdistill import ensemble_distillation_loss

    >>> z, s, t = torch.randn(8, 10), torch.randn(8, 2, 10), torch.randn(8, 2, 10)
    >>> y = torch.randint(10, (8,))
    >>> loss, label_loss, teacher_losses = ensemble_distillation_loss(z, s, y, t, weights=[0.5, 0.5], temperature=2.0)
    ```
    """
    num_teachers = teacher_logits.shape[1] if teacher_logits.dim() == 3 else None
    if num_teachers is None or teacher_token_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"teacher_token_logits {tuple(teacher_token_logits.shape)} and teacher_logits {tuple(teacher_logits.shape)} "
            "must have the same shape (N, T, C)."
        )
    if (
        class_logits.shape != (teacher_logits.shape[0], teacher_logits.shape[2])
        or labels.shape != class_logits.shape[:1]
    ):
        raise ValueError(
            f"class_logits {tuple(class_logits.shape)} and labels {tuple(labels.shape)} do not fit teacher_logits "
            f"{tuple(teacher_logits.shape)}. They must be (N, C) and (N,)."
        )
    weights = torch.as_tensor(list(weights), dtype=torch.float32, device=class_logits.device)
    temperatures = torch.as_tensor(temperature, dtype=torch.float32, device=class_logits.device)
    if len(weights) != num_teachers or temperatures.shape not in ((), (num_teachers,)):
        raise ValueError(
            f"{len(weights)} weights and {temperatures.numel()} temperatures do not fit {num_teachers} teachers. Give one "
            "weight for each teacher, and one temperature for all or a list of one for each."
        )
    if mode not in MODES:
        raise ValueError(f'mode="{mode}" is unknown. Choose "soft" or "hard".')

    if unlabelled_target not in UNLABELLED_TARGETS:
        raise ValueError(
            f'unlabelled_target="{unlabelled_target}" is unknown. Choose {", ".join(UNLABELLED_TARGETS)}.'
        )

    classes, students, teachers = class_logits.float(), teacher_token_logits.float(), teacher_logits.detach().float()
    labels = labels.masked_fill(labels == -1, -100)
    label_losses = F.cross_entropy(classes, labels, reduction="none", label_smoothing=label_smoothing)
    is_unlabelled = labels == -100
    if unlabelled_target != "none" and num_teachers:
        mean_teacher = teachers.softmax(-1).mean(1).to(classes.device)
        if unlabelled_target == "teachers":
            targets = F.kl_div(classes.log_softmax(-1), mean_teacher, reduction="none").sum(-1)
        else:
            confidence, choice = mean_teacher.max(-1)
            targets = F.cross_entropy(classes, choice, reduction="none") * (confidence >= min_confidence)
        label_losses = torch.where(is_unlabelled, targets, label_losses)
    label_loss = label_losses.mean()
    if mode == "hard":
        losses = F.cross_entropy(students.transpose(1, 2), teachers.argmax(-1).to(labels.device), reduction="none")
    else:
        scales = temperatures.expand(num_teachers)[:, None]
        softened = [_standardize(logits) if standardize_logits else logits for logits in (students, teachers)]
        log_students, log_teachers = ((logits / scales).log_softmax(-1) for logits in softened)
        divergences = F.kl_div(log_students, log_teachers, reduction="none", log_target=True).sum(-1)
        losses = scales[:, 0] ** 2 * divergences
    if confidence_weighting:
        known = labels.clamp(min=0)[:, None, None].expand(-1, num_teachers, 1)
        shares = num_teachers * teachers.log_softmax(-1).gather(-1, known)[..., 0].softmax(-1)
        losses = losses * shares.masked_fill(is_unlabelled[:, None], 1.0)
    teacher_losses = losses.mean(0)
    return EnsembleDistillationLoss(
        label_weight * label_loss + (weights * teacher_losses).sum(), label_loss, teacher_losses
    )


def _standardize(logits):
    return F.layer_norm(logits, logits.shape[-1:])
