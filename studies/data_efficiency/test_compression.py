"""What a student costs beside its teachers."""

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Image
from PIL.Image import fromarray
from torch import nn
from transformers import ViTImageProcessor

from hf_ibdistill import (
    IBResNetConfig,
    IBResNetForImageClassification,
    IBViTConfig,
    IBViTForImageClassification,
    involution2d,
    predict,
)
from studies.data_efficiency import compression


class OneOfEach(nn.Module):
    """A convolution, an involution and a matrix product, on 8 × 6 pixels."""

    def __init__(self):
        super().__init__()
        self.convolution, self.linear = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Linear(4, 5, bias=False)

    def forward(self, pixel_values):
        features = self.convolution(pixel_values)
        features = involution2d(features, torch.randn(1, 2, 9, 8, 6))
        return self.linear(features.mean((2, 3)))


def test_operations_are_two_for_each_product():
    products = 8 * 6 * 4 * 3 * 9 + 8 * 6 * 4 * 9 + 4 * 5
    assert compression.count_operations(OneOfEach(), torch.randn(1, 3, 8, 6)) == 2 * products


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder, random = tmp_path_factory.mktemp("models"), np.random.default_rng(0)
    images = [fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(24)]
    rows = Dataset.from_dict({"image": images, "label": [i % 3 for i in range(24)]}).cast_column("image", Image())
    rows = rows.cast_column("label", ClassLabel(names=["a", "b", "c"]))
    torch.manual_seed(0)
    models = {
        name: IBResNetForImageClassification(IBResNetConfig.from_preset(preset, num_labels=3))
        for name, preset in (("conv", "convolution-small"), ("inv", "involution-small"))
    }
    shape = {"image_size": 16, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = IBViTConfig(**shape, intermediate_size=32, teacher_names=["conv", "inv"], num_labels=3)
    models["both_all"] = IBViTForImageClassification(config)
    processor, accuracies, probabilities = ViTImageProcessor(size={"height": 16, "width": 16}), {}, {}
    for name, model in models.items():
        for part in (model.eval(), processor):
            part.save_pretrained(folder / name)
        outputs = predict(model, processor, rows)
        probabilities[name] = torch.tensor(outputs["logits"]).softmax(-1).numpy()
        accuracies[name] = (outputs["logits"].argmax(-1) == outputs["labels"]).mean()
    mean = probabilities["conv"] + probabilities["inv"]
    accuracies["teachers"] = (mean.argmax(-1) == np.arange(24) % 3).mean()
    return compression.measure({name: folder / name for name in models}, rows, 2), accuracies, models


def test_every_model_is_measured(found):
    measured, accuracies, models = found
    for name, accuracy in accuracies.items():
        assert measured[name]["float32"]["accuracy"] == pytest.approx(accuracy, abs=1e-9)
        assert all(measured[name][kind]["milliseconds_of_32"] > 0 for kind in ("float32", "int8"))
    for name, model in models.items():
        assert measured[name]["parameters"] == sum(weights.numel() for weights in model.parameters())
        # Four bytes a weight, and the graph.
        assert measured[name]["float32"]["bytes"] > 4 * measured[name]["parameters"]
    assert measured["both_all"]["int8"]["bytes"] < measured["both_all"]["float32"]["bytes"]


def test_both_teachers_together_cost_what_they_cost_apart(found):
    measured, _, _ = found
    for key in ("parameters", "operations"):
        assert measured["teachers"][key] == measured["conv"][key] + measured["inv"][key]
    assert "both teachers together" in compression.table(measured)
