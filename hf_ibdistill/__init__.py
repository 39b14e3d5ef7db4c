"""Teach a student the inductive biases of light convolution and involution teachers.

The teachers run over a dataset once; their logits become columns of a 🤗 datasets table; every later training run reads the
columns ("Distilling Inductive Bias: Knowledge Distillation Beyond Model Compression", arXiv 2310.00369).
"""

import importlib

from . import models  # noqa: F401 registers both model families with the Auto classes


__version__ = "0.2.0"

# Name → module. Loaded on first use, because the trainers alone take seconds to import.
_PUBLIC_NAMES = {
    "data.classes": ["class_config"],
    "data.loading": ["load_image_dataset"],
    "data.splits": ["select_per_class"],
    "demo": ["build_demo", "start_demo"],
    "evaluation": ["evaluate_model", "predict", "token_attention"],
    "export": ["export_onnx", "export_program", "quantize_onnx"],
    "images.decoding": ["scale_pixels"],
    "images.preprocessing": ["build_image_processor"],
    "images.views": ["ViewRecipe"],
    "logits.provenance": ["attach_record", "read_records", "stored_views"],
    "models.configuration_ibresnet": ["IBResNetConfig"],
    "models.configuration_ibvit": ["IBViTConfig"],
    "models.involution": ["involution2d"],
    "models.modeling_ibresnet": ["IBResNetForImageClassification"],
    "models.modeling_ibvit": ["IBViTModel", "IBViTForImageClassification"],
    "publishing.cards": ["create_model_card"],
    "publishing.hub": ["push_folder_to_hub", "push_logits_to_hub"],
    "publishing.results": ["evaluate_and_save"],
    "publishing.space": ["push_space_to_hub"],
    "publishing.tables": ["export_logits_table", "open_logits_table"],
    "recording.assessment": ["assess_table", "logits_metrics"],
    "recording.attaching": ["attach_teacher_logits"],
    "recording.recorder": ["record_teacher_logits"],
    "recording.verification": ["verify_rows", "verify_teacher_logits"],
    "rednet": ["convert_rednet_checkpoint"],
    "students": ["build_student", "load_image_processor", "load_student"],
    "teachers": ["Teacher", "load_teachers"],
    "training.arguments": ["DistillationArguments", "ImageTrainingArguments"],
    "training.finetuning": ["freeze_layers", "layer_decay_groups"],
    "training.losses": ["ensemble_distillation_loss"],
    "training.together": ["train_together"],
    "training.trainer": ["EnsembleDistillationTrainer", "ImageClassificationTrainer"],
}
_MODULE_OF = {name: module for module, names in _PUBLIC_NAMES.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted([*globals(), *__all__])
