"""Cards of models and of recorded tables, filled from measured results and provenance only."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from datasets import Dataset, Image
from huggingface_hub import DatasetCard, DatasetCardData, EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel

from ..data.columns import label_candidates
from ..data.sources import last_part, public_name
from ..logits.encoding import column_name, recorded_teachers
from ..logits.provenance import only_record
from ..recording.assessment import logits_metrics


# Stands for the name of the repository until there is one.
UNPUBLISHED = "path/to/this/folder"
TEMPLATES = Path(__file__).parent / "templates"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def mean_and_spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation over runs, in percent."""
    spread = f" ± {100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{100 * np.mean(values):.1f}{spread}"


def create_model_card(
    model: PreTrainedModel, results: Mapping[str, object], *, repo_id: str | None = None
) -> ModelCard:
    """A card for a student or a teacher, with its results as `model-index` metadata. Facts that are not given are left out.

    Args:
        model: the model; its configuration gives its kind and size.
        results: the facts of the run, the content of `results.json` in the folder of a trained model. Only `title` is
            required:
            - `title`: name of the model;
            - `data`, `split`: dataset and split that `metrics` were measured on;
            - `metrics`: name → measured value, as `evaluate_model` returns them;
            - `recipe`: hyperparameters, name → value;
            - `teachers`: for a student, name → `{"source": Hub id or name of a folder, "metrics": …}`, both optional;
            - `ensemble`: metrics of the mean probability of the teachers;
            - `online`: whether the teachers ran in every step; `None` if there were none;
            - `base_model`: Hub id, or name of the folder, of the checkpoint that this model started as;
            - `pictures`: file name of a picture beside the card → what it shows;
            - `machine`, `train_seconds`: what it was trained on, and for how long;
            - `notes`: a paragraph on this run.
        repo_id: the repository, for the example; by default a placeholder that [`push_folder_to_hub`] replaces.
    """
    metrics, split = results.get("metrics") or {}, results.get("split")
    base_model, data_name = (results.get(key) and public_name(results[key]) for key in ("base_model", "data"))
    online, teachers = results.get("online"), results.get("teachers") or {}
    task = {"task_type": "image-classification", "task_name": "Image Classification"}
    task |= {"dataset_type": data_name, "dataset_name": data_name, "dataset_split": split}
    measured = [
        EvalResult(metric_type=name, metric_name=name.replace("_", " "), metric_value=round(float(value), 6), **task)
        for name, value in (metrics.items() if data_name else ())
    ]
    data = ModelCardData(
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["hf_ibdistill", "knowledge-distillation", model.config.model_type],
        datasets=[data_name] if _is_hub_id(data_name) else None,
        base_model=base_model if _is_hub_id(base_model) else None,
        model_name=results["title"] if measured else None,
        eval_results=measured or None,
    )
    tokens, seconds = getattr(model.config, "teacher_names", []), results.get("train_seconds")
    names = tokens or list(teachers)
    hardware = {} if seconds is None else {"training": f"{seconds:.1f} s"}
    hardware |= {name: in_a_line(value) for name, value in (results.get("machine") or {}).items()}
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATES / "model_card.md"),
        title=results["title"],
        is_taught=bool(names) and (base_model is None or online is not None),
        base_model=_link(base_model),
        teacher_names=", ".join(names),
        online=online,
        has_tokens=bool(tokens),
        fuses=getattr(model.config, "fusion", None) != "class_token",
        is_involution=getattr(model.config, "spatial_operator", None) == "involution",
        num_parameters=f"{model.num_parameters():,}",
        num_classes=model.config.num_labels,
        data_name=data_name,
        split=split,
        repo_id=repo_id or UNPUBLISHED,
        has_own_code=not type(model).__module__.startswith("transformers."),
        metrics_table=_table(["metric", split or "value"], {name: f"{value:.4f}" for name, value in metrics.items()}),
        teachers_table=_teachers_table(
            {name: teachers[name] for name in names if name in teachers}, results.get("ensemble"), split
        ),
        recipe_table=_settings_table(results.get("recipe")),
        machine_table=_table(["", ""], hardware),
        pictures=_pictures(results),
        notes=results.get("notes", ""),
    )


def _table(header, rows):
    return markdown_table(header, list(rows.items())) if rows else ""


def _pictures(results):
    """(Markdown text, file) of each picture."""
    # Version 0.1.0 had one.
    old = {results["picture"]: "Learning curves and predictions"} if results.get("picture") else {}
    return [
        (re.sub(r"([\\\[\]<>`*_])", r"\\\1", " ".join(alt.split())), file)
        for file, alt in {**old, **(results.get("pictures") or {})}.items()
    ]


def _settings_table(settings):
    return _table(["setting", "value"], {name: f"`{value}`" for name, value in (settings or {}).items()})


def in_a_line(value):
    """A mapping, such as the versions of libraries, in one line."""
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else value


def _teachers_table(teachers, ensemble, split):
    if ensemble and len(teachers) > 1:
        teachers = {**teachers, "mean probability": {"metrics": ensemble}}
    sources = {name: _link(teacher["source"]) for name, teacher in teachers.items() if teacher.get("source")}
    metrics = {name: teacher["metrics"] for name, teacher in teachers.items() if teacher.get("metrics")}
    accuracies = {name: f"{100 * measured['accuracy']:.2f} %" for name, measured in metrics.items()}
    columns = {"from": sources, f"accuracy ({split or 'same data'})": accuracies}
    columns = {title: cells for title, cells in columns.items() if cells}
    rows = [[name, *(cells.get(name, "") for cells in columns.values())] for name in teachers]
    return markdown_table(["teacher", *columns], rows) if columns else ""


def _link(source):
    """The origin of a model: a link to the Hub, or only the name of the folder, because its path describes a machine."""
    name = public_name(source) if source else ""
    return f"[{name}](https://huggingface.co/{name})" if _is_hub_id(name) else name


def _is_hub_id(name):
    """Whether a public name is a "user/name" of the Hub."""
    return bool(name) and re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None


def teacher_source(teacher: Mapping[str, object]) -> str | None:
    """What a card may show of the source of a described teacher. Only one that was loaded from the Hub has a revision; the
    relative path of a folder looks like a Hub id."""
    source = teacher["source"]
    return last_part(source) if source and not teacher.get("revision") else source


def create_logits_card(table: Dataset, *, repo_id: str | None = None) -> DatasetCard:
    """A card for a recorded table: its teachers, views, encoding and data, from its provenance, and what its logits can
    teach ([`logits_metrics`]).

    Args:
        table: what [`record_teacher_logits`] returned, with or without its images, and one provenance record.
        repo_id: as for [`create_model_card`].

    Raises:
        ValueError: the table has no logits, or not exactly one provenance record.
    """
    record = only_record(table)
    if not recorded_teachers(table):
        raise ValueError(
            f"The table has no logits; its columns are {', '.join(table.column_names)}. record_teacher_logits adds them."
        )
    has_images = any(isinstance(feature, Image) for feature in table.features.values())
    teachers = [teacher for teacher in record["teachers"] if teacher["name"] in recorded_teachers(table)]
    names = [teacher["name"] for teacher in teachers]
    source, views = record["dataset"], record["views"]
    data = DatasetCardData(
        # The publisher of logits cannot license the images of others.
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
        if encoding["dtype"] == "packed":
            kept = f"{top_k} classes of each image at eight levels and the log-sum-exp of the rest"
        origin = _link(teacher_source(teacher))
        origin += f" @ {teacher['revision'][:12]}" if teacher.get("revision") else ""
        rows.append([f"`{column_name(teacher['name'])}`", teacher["config"].get("model_type", ""), origin,
                     f"{kept}, {encoding['dtype']}", f"`{teacher['weights_sha256'][:16]}`"])  # fmt: skip
    measured = {name: f"{value:.4f}" for name, value in logits_metrics(table).items()}
    label_names = teachers[0]["label_names"]
    others = f" and {len(label_names) - 20} more" if len(label_names) > 20 else ""
    known = {name: value for name, value in source.items() if value not in (None, "None")}
    return DatasetCard.from_template(
        data,
        template_path=str(TEMPLATES / "logits_card.md"),
        title=data.pretty_name,
        teacher_names=", ".join(names),
        num_rows=f"{len(table):,}",
        about="as they are" if views is None else f"{views['num_views']} augmented views of each",
        has_images=has_images,
        has_labels=bool(label_candidates(table.features)),
        repo_id=repo_id or UNPUBLISHED,
        teachers_table=markdown_table(["column", "model", "from", "logits", "sha256 of the weights"], rows),
        label_names=", ".join(label_names[:20]) + others,
        metrics_table=_table(["of at most 1,000 rows", "mean"], measured),
        views_table=_settings_table(views),
        data_table=_table(["", ""], {**known, "versions": in_a_line(record["versions"])}),
    )
