"""Teach a vision transformer the inductive biases of light convolution and involution teachers.

The teachers run over the data set once; their logits become columns of a 🤗 datasets table; every later training run
reads the columns ("Distilling Inductive Bias: Knowledge Distillation Beyond Model Compression", arXiv 2310.00369).
"""

import importlib

from .auto import register_auto_classes


__version__ = "0.1.0"

_PUBLIC_NAMES = {
    "models.configuration_ibresnet": ["IBResNetConfig"],
    "models.modeling_ibresnet": ["IBResNetForImageClassification"],
    "models.configuration_ibvit": ["IBViTConfig"],
    "models.modeling_ibvit": ["IBViTModel", "IBViTForImageClassification"],
    "models.involution": ["involution2d"],
    "images": ["build_image_processor"],
    "data": ["class_config", "load_image_dataset", "select_per_class"],
    "teachers": ["Teacher", "load_teachers"],
    "logits.views": ["ViewRecipe"],
    "logits.recording": ["record_teacher_logits"],
    "logits.provenance": ["attach_record", "read_records", "stored_views"],
    "logits.attaching": ["attach_teacher_logits"],
    "logits.publishing": ["export_logits_table", "open_logits_table"],
    "hub": ["push_folder_to_hub", "push_logits_to_hub"],
    "logits.verification": ["verify_teacher_logits"],
    "training.losses": ["ensemble_distillation_loss"],
    "training.arguments": ["DistillationArguments", "ImageTrainingArguments"],
    "training.trainer": ["EnsembleDistillationTrainer", "ImageClassificationTrainer"],
    "training.finetuning": ["all_heads_loss", "freeze_layers", "layer_decay_groups", "load_student"],
    "evaluation": ["evaluate_model", "logits_metrics", "predict", "token_attention"],
    "export": ["export_onnx", "export_program", "quantize_onnx"],
    "model_card": ["create_model_card"],
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


register_auto_classes()
