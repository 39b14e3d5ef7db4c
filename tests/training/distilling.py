"""Tables, teachers and students of a few parameters, and a training run on them."""

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from hf_ibdistill import (
    DistillationArguments,
    EnsembleDistillationTrainer,
    IBResNetConfig,
    IBResNetForImageClassification,
    IBViTConfig,
    IBViTForImageClassification,
)


CLASSES = ["cat", "dog", "owl", "fox"]
NUM_ROWS = 16
PROCESSOR = ViTImageProcessor(size={"height": 8, "width": 8})
TERMS = ["loss", "label_loss", "conv_loss", "inv_loss"]
# Each number differs from its neighbors and from 1, so that a swapped or forgotten one shows.
WEIGHTS, TEMPERATURES, LABEL_WEIGHT = [0.5, 2.0], [2.0, 3.0], 0.7
SGD = {
    "optim": "sgd", "learning_rate": 0.5, "lr_scheduler_type": "constant", "warmup_steps": 0, "weight_decay": 0.0,
    "max_grad_norm": 0.0,
}  # fmt: skip
# Compared with float32 formulas, on machines with and without bf16 units.
QUIET = {
    "use_cpu": True, "bf16": False, "disable_tqdm": True, "eval_strategy": "no", "logging_strategy": "steps",
    "logging_steps": 1,
}  # fmt: skip
LOSS = {"teacher_weights": WEIGHTS, "temperature": TEMPERATURES, "label_weight": LABEL_WEIGHT}


def class_settings(names=CLASSES):
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def small_teacher(operator, names=CLASSES):
    shape = {"embedding_size": 16, "hidden_sizes": (16,), "depths": (1,), "downsample_strides": (1,), "reduction": 1}
    config = IBResNetConfig(spatial_operator=operator, stem="plain", kernel_size=3, **shape, **class_settings(names))
    model = IBResNetForImageClassification(config).eval()
    # A new head would give all images almost the same logits.
    torch.nn.init.normal_(model.classifier.weight, std=2.0)
    return model


def small_teachers():
    torch.manual_seed(0)
    return {"conv": (small_teacher("convolution"), PROCESSOR), "inv": (small_teacher("involution"), PROCESSOR)}


def small_student(seed=1, names=CLASSES, **overrides):
    torch.manual_seed(seed)
    shape = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    settings = {**shape, "intermediate_size": 32, "initializer_range": 0.2, **class_settings(names), **overrides}
    return IBViTForImageClassification(IBViTConfig(**settings))


def plain_vit(kind=ViTForImageClassification):
    torch.manual_seed(3)
    shape = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    return kind(ViTConfig(**shape, intermediate_size=32, initializer_range=0.2, **class_settings()))


def small_images(num_rows=NUM_ROWS, seed=0):
    """Noise around a color that depends on the class."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(num_rows) % len(CLASSES))
    colors = np.array([(220, 30, 30), (30, 220, 30), (30, 30, 220), (220, 220, 30)])[labels]
    pixels = (
        colors[:, None, None] + rng.integers(-30, 31, (num_rows, 8, 8, 3)) + rng.integers(-30, 31, (num_rows, 1, 1, 3))
    )
    return Dataset.from_dict(
        {"image": list(pixels.clip(0, 255).astype(np.uint8)), "label": labels},
        features=Features({"image": Image(), "label": ClassLabel(names=CLASSES)}),
    )


def with_columns(table, teachers, dtype="float32"):
    """The table with a column for each teacher, of the logits that the models themselves return."""
    pixel_values = PROCESSOR(list(table["image"]), return_tensors="pt")["pixel_values"]
    for name, (model, _) in teachers.items():
        with torch.no_grad():
            logits = model(pixel_values).logits.numpy()
        feature = List(Value(dtype), length=logits.shape[-1])
        table = table.add_column(f"{name}_logits", list(logits.astype(dtype)), feature=feature)
    return table


def arguments(folder, **overrides):
    return DistillationArguments(str(folder), **{**SGD, **QUIET, **LOSS, "num_train_epochs": 1, **overrides})


def distill(folder, table, student=None, trainer_class=EnsembleDistillationTrainer, train=True, **settings):
    """A trainer after its training. `settings` are its own, or those of the arguments."""
    names = ("teachers", "teacher_classes", "eval_dataset", "compute_metrics", "callbacks", "image_column",
             "label_column", "views")  # fmt: skip
    own = {name: settings.pop(name) for name in names if name in settings}
    trainer = trainer_class(
        model=small_student() if student is None else student,
        args=arguments(folder, **settings),
        train_dataset=table,
        processing_class=PROCESSOR,
        **own,
    )
    if train:
        trainer.train()
    return trainer


def logged(trainer, names=TERMS):
    """The entries of the training log, as rows of numbers."""
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert entries, "nothing was logged"
    return [[entry[name] for name in names] for entry in entries]


def assert_same_weights(model, other, **tolerance):
    expected = other.state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")
