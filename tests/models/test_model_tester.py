"""transformers' own tests of models, on both families.

They come with the source distribution of the installed version:
    pip download --no-binary transformers --no-deps transformers==VERSION && tar xf transformers-VERSION.tar.gz
    TRANSFORMERS_TESTS=transformers-VERSION/tests pytest -o addopts= tests/models/test_model_tester.py
"""

import importlib
import os
import sys
import unittest
from types import ModuleType

import pytest
from torch import nn

from hf_ibdistill import (
    IBResNetForImageClassification,
    IBViTForImageClassification,
    IBViTModel,
)


FOLDER = os.environ.get("TRANSFORMERS_TESTS")
if FOLDER is None:
    pytest.skip("set TRANSFORMERS_TESTS to the tests of transformers", allow_module_level=True)
pytest.importorskip("parameterized")


# A package of another name than that of our tests. Its distribution lacks two modules, which test export and text generation.
LACKING = {"exporters.test_export": "ExportTesterMixin", "generation.test_utils": "GenerationTesterMixin"}
for name in ("", ".exporters", ".generation", *(f".{module}" for module in LACKING)):
    sys.modules[f"transformers_tests{name}"] = module = ModuleType(f"transformers_tests{name}")
    module.__path__ = [FOLDER]
for name, mixin in LACKING.items():
    setattr(sys.modules[f"transformers_tests.{name}"], mixin, type(mixin, (), {}))
common = importlib.import_module("transformers_tests.test_modeling_common")


class Inputs:
    """A configuration and pixels, as the mixin asks for them."""

    is_training, batch_size, seq_length, num_hidden_layers, hidden_size, num_attention_heads = True, 3, 19, 2, 24, 3

    def __init__(self, config_class, shape):
        self.config_class, self.shape = config_class, shape

    def get_config(self):
        return self.config_class(num_labels=3, **self.shape)

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), {"pixel_values": common.floats_tensor([self.batch_size, 3, 16, 16])}


# They ask by name which models have labels, and which have no loss.
for mapping, model in (
    ("MODEL_MAPPING_NAMES", IBViTModel),
    ("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES", IBViTForImageClassification),
    ("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES", IBResNetForImageClassification),
):
    setattr(common, mapping, {**getattr(common, mapping), model.config_class.model_type: model.__name__})


class Common(common.ModelTesterMixin):
    test_resize_embeddings = False

    def setUp(self):
        self.model_tester = Inputs(self.all_model_classes[0].config_class, self.shape)

    def test_model_get_set_embeddings(self):
        # Images have no `nn.Embedding`. transformers' ViT has a test of its own as well.
        for model_class in self.all_model_classes:
            model, new = model_class(self.model_tester.get_config()), nn.Identity()
            assert isinstance(model.get_input_embeddings(), nn.Module) and model.get_output_embeddings() is None
            model.set_input_embeddings(new)
            assert model.get_input_embeddings() is new


class IBViTTest(Common, unittest.TestCase):
    all_model_classes = (IBViTModel, IBViTForImageClassification)
    shape = {"image_size": 16, "patch_size": 4, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    shape |= {"intermediate_size": 48, "patch_embedding": "bias_stems", "stem_channels": 16}

    # The default attention is "fastest", which chooses SDPA or eager.
    test_sdpa_can_dispatch_non_composite_models = None
    # It looks for heads among the direct children alone. A test of our own checks the new heads.
    test_can_load_ignoring_mismatched_shapes = None


class IBResNetTest(Common, unittest.TestCase):
    all_model_classes = (IBResNetForImageClassification,)
    has_attentions = False
    shape = {"stem": "plain", "embedding_size": 16, "hidden_sizes": (32, 48), "depths": (1, 1), "reduction": 2}
    shape |= {"downsample_strides": (1, 2), "spatial_operator": "involution", "kernel_size": 3}

    test_hidden_states_output = None  # It expects tokens; the hidden states are feature maps.
