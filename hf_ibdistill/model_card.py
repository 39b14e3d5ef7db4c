"""Model cards, filled from measured results only."""

from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel

from .report import markdown_table


_TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"


def create_model_card(
    model: PreTrainedModel,
    *,
    title: str,
    data_name: str,
    split: str,
    metrics: Mapping[str, float],
    recipe: Mapping[str, object],
    teacher_metrics: Mapping[str, Mapping[str, float]] | None = None,
    online: bool = False,
    picture: str | None = None,
    notes: str = "",
) -> ModelCard:
    """A card for a student or a teacher, with its results as `model-index` metadata.

    Args:
        model: the model; its configuration tells its kind and its size.
        title: name of the model.
        data_name: the data set it was trained and evaluated on.
        split: the split that `metrics` were measured on.
        metrics: name → measured value, as `evaluate_model` returns them. What is not in it is not in the card.
        recipe: hyperparameters, name → value.
        teacher_metrics: for a student, teacher → its own metrics on the same split.
        online: the teachers ran in every step; otherwise their logits were stored.
        picture: file name of a picture beside the card.
        notes: a paragraph on this run.
    """
    results = [
        EvalResult(
            task_type="image-classification",
            task_name="Image Classification",
            dataset_type=data_name,
            dataset_name=data_name,
            dataset_split=split,
            metric_type=name,
            metric_name=name.replace("_", " "),
            metric_value=round(float(value), 6),
        )
        for name, value in metrics.items()
    ]
    data = ModelCardData(
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["hf_ibdistill", "knowledge-distillation", model.config.model_type],
        model_name=title,
        eval_results=results,
    )
    return ModelCard.from_template(
        data,
        template_path=str(_TEMPLATE),
        title=title,
        is_student=model.config.model_type == "ibvit" and bool(model.config.teacher_names),
        teacher_names=", ".join(getattr(model.config, "teacher_names", [])),
        online=online,
        num_parameters=f"{model.num_parameters():,}",
        num_classes=model.config.num_labels,
        data_name=data_name,
        split=split,
        metrics_table=markdown_table(["metric", split], [[name, f"{value:.4f}"] for name, value in metrics.items()]),
        teachers_table=markdown_table(
            ["teacher", f"accuracy ({split})"],
            [[name, f"{100 * values['accuracy']:.2f} %"] for name, values in teacher_metrics.items()],
        )
        if teacher_metrics
        else "",
        recipe_table=markdown_table(["setting", "value"], [[name, f"`{value}`"] for name, value in recipe.items()]),
        picture=picture,
        notes=notes,
    )
