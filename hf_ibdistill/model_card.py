"""Cards of models and of recorded logits, filled from measured results and provenance only."""

import re
from collections.abc import Mapping
from pathlib import Path

from datasets import Dataset, Image
from huggingface_hub import DatasetCard, DatasetCardData, EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel

from .data import public_name
from .logits.encoding import column_name, recorded_teachers
from .logits.provenance import read_records
from .report import markdown_table


# In the place of a repository's name, until it has one.
UNPUBLISHED = "path/to/this/folder"
_TEMPLATES = Path(__file__).parent / "templates"


def create_model_card(
    model: PreTrainedModel,
    *,
    title: str,
    data_name: str | None = None,
    split: str | None = None,
    metrics: Mapping[str, float] | None = None,
    recipe: Mapping[str, object] | None = None,
    teacher_metrics: Mapping[str, Mapping[str, float]] | None = None,
    teacher_sources: Mapping[str, str] | None = None,
    online: bool | None = None,
    picture: str | None = None,
    base_model: str | None = None,
    machine: Mapping[str, object] | None = None,
    train_seconds: float | None = None,
    repo_id: str | None = None,
    notes: str = "",
) -> ModelCard:
    """A card for a student or a teacher, with its results as `model-index` metadata. What is not given is not in it.

    Args:
        model: the model; its configuration tells its kind and its size.
        title: name of the model.
        data_name: the data set it was trained and evaluated on; of a folder, the card tells the last part of its path.
        split: the split that `metrics` were measured on.
        metrics: name → measured value, as `evaluate_model` returns them. Metadata of them need a `data_name`.
        recipe: hyperparameters, name → value.
        teacher_metrics: for a student, teacher → its own metrics on the same split.
        teacher_sources: for a student, teacher → its Hub id or folder.
        online: the student's teachers ran in every step; otherwise their logits were stored or, where it is not given and
            `base_model` is, there were none.
        picture: file name of a picture beside the card.
        base_model: Hub id or folder of the model that this one started as.
        machine: what it was trained on, as `describe_machine` tells.
        train_seconds: how long training took.
        repo_id: where it will be published, for the example.
        notes: a paragraph on this run.
    """
    data_name = data_name and public_name(data_name)
    has_results = bool(metrics and data_name)
    data = ModelCardData(
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["hf_ibdistill", "knowledge-distillation", model.config.model_type],
        datasets=[data_name] if _is_hub_id(data_name) else None,
        base_model=base_model if _is_hub_id(base_model) else None,
        model_name=title if has_results else None,
        eval_results=[
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
        if has_results
        else None,
    )
    names = getattr(model.config, "teacher_names", [])
    figures = {name: f"{value:.4f}" for name, value in (metrics or {}).items()}
    hardware = {} if train_seconds is None else {"training": f"{train_seconds:.1f} s"}
    hardware |= {name: _in_words(value) for name, value in (machine or {}).items()}
    return ModelCard.from_template(
        data,
        template_path=str(_TEMPLATES / "model_card.md"),
        title=title,
        is_taught=bool(names) and (base_model is None or online is not None),
        base_model=_link(base_model),
        teacher_names=", ".join(names),
        online=online,
        fuses=getattr(model.config, "fusion", None) != "class_token",
        is_involution=getattr(model.config, "spatial_operator", None) == "involution",
        num_parameters=f"{model.num_parameters():,}",
        num_classes=model.config.num_labels,
        data_name=data_name,
        split=split,
        repo_id=repo_id or UNPUBLISHED,
        has_own_code=not type(model).__module__.startswith("transformers."),
        metrics_table=_table(["metric", split or "value"], figures),
        teachers_table=_teachers_table(names, teacher_metrics or {}, teacher_sources or {}, split),
        recipe_table=_table(["setting", "value"], {name: f"`{value}`" for name, value in (recipe or {}).items()}),
        machine_table=_table(["", ""], hardware),
        picture=picture,
        notes=notes,
    )


def _table(header, rows):
    return markdown_table(header, list(rows.items())) if rows else ""


def _in_words(value):
    """Versions of libraries in a line."""
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else value


def _teachers_table(names, metrics, sources, split):
    columns = {"teacher": {name: name for name in names if name in metrics or name in sources}}
    if sources:
        columns["from"] = {name: _link(source) for name, source in sources.items()}
    if metrics:
        accuracies = {name: f"{100 * values['accuracy']:.2f} %" for name, values in metrics.items()}
        columns[f"accuracy ({split or 'same data'})"] = accuracies
    rows = [[column.get(name, "") for column in columns.values()] for name in columns["teacher"]]
    return markdown_table(list(columns), rows) if rows else ""


def _link(source):
    """A model's origin: a link for what is on the Hub, else the folder's own name, since its path tells about a machine
    and nothing about the model."""
    if not source:
        return ""
    return f"[{source}](https://huggingface.co/{source})" if _is_hub_id(source) else public_name(source)


def _is_hub_id(name):
    """Whether this is a "user/name" of the Hub and no folder."""
    return bool(name) and re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()


def create_logits_card(table: Dataset, *, repo_id: str | None = None) -> DatasetCard:
    """A card for a recorded table: its teachers, views, encoding and data, from its provenance.

    Args:
        table: what [`record_teacher_logits`] returned, with or without its images, and one provenance record.
        repo_id: where it will be, for the example.

    Raises:
        ValueError: the table has no logits.
    """
    (record,) = read_records(table)
    if not recorded_teachers(table):
        raise ValueError(
            f"The table has no logits; its columns are {', '.join(table.column_names)}. record_teacher_logits adds them."
        )
    has_images = any(isinstance(feature, Image) for feature in table.features.values())
    teachers = [teacher for teacher in record["teachers"] if teacher["name"] in recorded_teachers(table)]
    names = [teacher["name"] for teacher in teachers]
    source, views = record["dataset"], record["views"]
    data = DatasetCardData(
        # Other people's images have a licence of their own.
        license=None if has_images else "apache-2.0",
        task_categories=["image-classification"],
        tags=["hf_ibdistill", "knowledge-distillation", "logits"],
        pretty_name=f"Logits of {', '.join(names)}",
    )
    rows = []
    for teacher in teachers:
        encoding = teacher["encoding"]
        top_k = encoding["top_k"]
        kept = "all" if top_k is None else f"the {top_k} largest and the log-sum-exp of the rest"
        origin = _link(teacher["source"]) + (f" @ {teacher['revision'][:12]}" if teacher["revision"] else "")
        rows.append([f"`{column_name(teacher['name'])}`", teacher["config"].get("model_type", ""), origin,
                     f"{kept}, {encoding['dtype']}", f"`{teacher['weights_sha256'][:16]}`"])  # fmt: skip
    label_names = teachers[0]["label_names"]
    others = f" and {len(label_names) - 20} more" if len(label_names) > 20 else ""
    known = {name: value for name, value in source.items() if value not in (None, "None")}
    return DatasetCard.from_template(
        data,
        template_path=str(_TEMPLATES / "logits_card.md"),
        title=data.pretty_name,
        teacher_names=", ".join(names),
        num_rows=f"{len(table):,}",
        about="as they are" if views is None else f"{views['num_views']} augmented views of each",
        has_images=has_images,
        repo_id=repo_id or UNPUBLISHED,
        teachers_table=markdown_table(["column", "model", "from", "logits", "sha256 of the weights"], rows),
        label_names=", ".join(label_names[:20]) + others,
        views_table=_table(["setting", "value"], {name: f"`{value}`" for name, value in (views or {}).items()}),
        data_table=_table(["", ""], {**known, "versions": _in_words(record["versions"])}),
    )
