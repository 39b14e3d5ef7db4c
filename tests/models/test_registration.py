"""`import hf_ibdistill` registers both model families with the Auto classes, and changes nothing for other models. Import
orders can only be tested in processes that have imported nothing yet."""

import importlib
import json

import numpy as np
import pytest
import torch
from PIL import Image
from running import run_process
from transformers import AutoImageProcessor, ViTImageProcessor, ViTImageProcessorPil, pipeline

import hf_ibdistill
from hf_ibdistill import IBResNetConfig, IBResNetForImageClassification, IBViTConfig, IBViTForImageClassification


FAMILIES = ["ibresnet", "ibvit"]
OTHERS = {
    "vit": "ViTImageProcessor",
    "deit": "DeiTImageProcessor",
    "convnext": "ConvNextImageProcessor",
    "resnet": "ConvNextImageProcessor",
}
LABELS = {0: "cat", 1: "dog", 2: "owl"}


def small_model(family):
    labels = {"id2label": LABELS, "label2id": {name: i for i, name in LABELS.items()}}
    if family == "ibresnet":
        shape = {"embedding_size": 16, "hidden_sizes": (32, 48), "depths": (1, 1), "downsample_strides": (1, 2)}
        config = IBResNetConfig(spatial_operator="involution", stem="plain", reduction=2, **shape, **labels)
        return IBResNetForImageClassification(config).eval()
    shape = {"image_size": 16, "patch_size": 4, "hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 2}
    config = IBViTConfig(patch_embedding="bias_stems", stem_channels=16, intermediate_size=48, **shape, **labels)
    return IBViTForImageClassification(config).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A saved model of each family, with an image, pixels and the logits of the pixels."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("families")
    for family in FAMILIES:
        model, pixel_values = small_model(family), torch.randn(2, 3, 16, 16)
        model.save_pretrained(root / family)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as in the other process: the number of threads may change the order of a sum
        with torch.no_grad():
            torch.save((pixel_values, model(pixel_values).logits), root / family / "prediction.pt")
        torch.set_num_threads(threads)
        # No "image_processor_type": the class then follows from that of the configuration.
        (root / family / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 16, "width": 16}}))
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24), dtype=np.uint8)
    Image.fromarray(pixels).save(root / "gray.png")
    return root


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Folders of model types that are not ours, with every way of naming an image processor."""
    root = tmp_path_factory.mktemp("others")
    for model_type, processor in OTHERS.items():
        ways = {
            "none": {},
            "current": {"image_processor_type": processor},
            "fast": {"image_processor_type": f"{processor}Fast"},
            "pil": {"image_processor_type": f"{processor}Pil"},
            "old": {"feature_extractor_type": processor.replace("ImageProcessor", "FeatureExtractor")},
        }
        for way, content in ways.items():
            folder = root / f"{model_type} {way}"
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
            (folder / "preprocessor_config.json").write_text(json.dumps(content))
    return root


LOADING = """
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline


def load(root):
    "What the Auto classes load, and whether it predicts the same bits."
    root = Path(root)
    for family in ("ibresnet", "ibvit"):
        folder = str(root / family)
        config = AutoConfig.from_pretrained(folder)
        model = AutoModelForImageClassification.from_pretrained(folder)
        processor = AutoImageProcessor.from_pretrained(folder)
        pixel_values, expected = torch.load(folder + "/prediction.pt")
        with torch.no_grad():
            exact = torch.equal(model(pixel_values).logits, expected)
        (best, *_) = pipeline("image-classification", model=folder, device="cpu")(str(root / "gray.png"))
        print(type(config).__name__, type(model).__name__, type(processor).__name__, exact, best["label"])
    print(type(AutoModel.from_config(config)).__name__)
"""


def expected_loads(folders):
    """What `load` prints, with the predictions of this process."""
    lines = []
    for family, names in zip(
        FAMILIES, ("IBResNetConfig IBResNetForImageClassification", "IBViTConfig IBViTForImageClassification")
    ):
        classify = pipeline("image-classification", model=str(folders / family), device="cpu")
        lines.append(f"{names} ViTImageProcessor True {classify(str(folders / 'gray.png'))[0]['label']}")
    return [*lines, "IBViTModel"]


# Every model of transformers imports the Auto classes while it is half loaded itself, and ours need some of them. Reloading
# registers everything a second time.
PACKAGE_FIRST = """
import importlib

import hf_ibdistill
from transformers import DeiTForImageClassification, ResNetModel, Trainer, ViTForImageClassification

importlib.reload(hf_ibdistill.models)
importlib.reload(hf_ibdistill)
load(sys.argv[1])
"""


def test_auto_classes_load_both_families_if_the_package_comes_first(folders):
    code = LOADING.replace("\nfrom transformers", "\nimport hf_ibdistill\nfrom transformers", 1) + PACKAGE_FIRST
    assert run_process("-c", code, folders).splitlines() == expected_loads(folders)


CHOICES = """
import json

from transformers import AutoModelForImageClassification, Trainer
from transformers.models.auto import image_processing_auto, modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

BACKENDS = (None, "torchvision", "pil")


def name_of(value):
    return value if value is None or isinstance(value, str) else f"{value.__module__}.{value.__qualname__}"


def choices(root):
    "The classes that the Auto classes choose for the model types of transformers."
    found = {}
    for folder in sorted(Path(root).iterdir()):
        for backend in BACKENDS:
            processor = AutoImageProcessor.from_pretrained(folder, backend=backend)
            found[f"{folder.name}, {backend}"] = name_of(type(processor))
    for model_type, classes in image_processing_auto.IMAGE_PROCESSOR_MAPPING_NAMES.items():
        config = CONFIG_MAPPING[model_type]
        for mapping in ("MODEL_MAPPING", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING"):
            # The names alone, because importing all models takes minutes. A registered class would come first.
            name = getattr(modeling_auto, f"{mapping}_NAMES").get(model_type)
            found[f"{model_type}, {mapping}"] = name_of(getattr(modeling_auto, mapping)._extra_content.get(config, str(name)))
        found[f"{model_type}, configuration"] = name_of(config)
        for backend, value in image_processing_auto.IMAGE_PROCESSOR_MAPPING[config].items():
            found[f"{model_type}, {backend}"] = name_of(value)
        for name in classes.values():
            for backend in BACKENDS:
                resolved = image_processing_auto._resolve_backend(backend, None, name)
                found[f"{name}, {backend}"] = name_of(image_processing_auto._load_backend_class(name, resolved))
    for model_type in ("vit", "deit", "convnext", "resnet"):
        for auto in (AutoModel, AutoModelForImageClassification):
            with torch.device("meta"):
                model = auto.from_config(CONFIG_MAPPING[model_type](architectures=[]))
            found[f"{model_type}, {auto.__name__}"] = name_of(type(model))
    return found


before = choices(sys.argv[2])
import hf_ibdistill
after = choices(sys.argv[2])
print(json.dumps([before, after]))
load(sys.argv[1])
"""


def test_other_models_get_the_same_classes_with_and_without_the_package(folders, others):
    # In this process the Auto classes come before the package.
    printed, *loads = run_process("-c", LOADING + CHOICES, folders, others).splitlines()
    before, after = json.loads(printed)
    assert loads == expected_loads(folders)
    assert {key: (before[key], after[key]) for key in before if before[key] != after[key]} == {}
    assert before.keys() == after.keys()
    # The comparison is of something.
    assert len(before) > 1000 and before["vit pil, pil"].endswith(".ViTImageProcessorPil")
    assert before["resnet none, torchvision"].endswith(".ConvNextImageProcessor")
    assert before["vit, AutoModelForImageClassification"].endswith(".ViTForImageClassification")


@pytest.mark.parametrize("backend", [None, "torchvision", "pil"])
@pytest.mark.parametrize("family", FAMILIES)
def test_both_backends_give_our_families_a_vit_processor(family, backend, folders, tmp_path):
    expected = ViTImageProcessorPil if backend == "pil" else ViTImageProcessor
    unnamed = AutoImageProcessor.from_pretrained(folders / family, backend=backend)
    assert type(unnamed) is expected and unnamed.size["height"] == 16
    # A processor of either backend is saved under a name, and loads in both.
    for saved in (ViTImageProcessor, ViTImageProcessorPil):
        small_model(family).config.save_pretrained(tmp_path)
        saved(size={"height": 12, "width": 12}).save_pretrained(tmp_path)
        named = AutoImageProcessor.from_pretrained(tmp_path, backend=backend)
        assert type(named) is expected and named.size["height"] == 12


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("family", FAMILIES)
def test_pipeline_runs_on_a_saved_folder(family, mode, tmp_path):
    model, processor = small_model(family), ViTImageProcessor(size={"height": 16, "width": 16})
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    shape = (20, 24, 3) if mode == "RGB" else (20, 24)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    assert image.mode == mode
    image.save(tmp_path / "image.png")

    predictions = pipeline("image-classification", model=str(tmp_path), device="cpu")(str(tmp_path / "image.png"))

    pixel_values = processor(image.convert("RGB"), return_tensors="pt").pixel_values
    with torch.no_grad():
        probabilities = model(pixel_values).logits.softmax(-1)[0]
    scores = {prediction["label"]: prediction["score"] for prediction in predictions}
    assert scores.keys() == set(LABELS.values())
    for i, label in LABELS.items():
        assert scores[label] == pytest.approx(probabilities[i].item(), abs=1e-5)


@pytest.mark.parametrize("name", hf_ibdistill.__all__)
def test_every_public_name_can_be_imported(name):
    value = getattr(importlib.import_module("hf_ibdistill"), name)
    assert value.__name__ == name and value.__module__.startswith("hf_ibdistill.")
    assert value.__doc__, "public names are documented"


def test_public_names():
    # Renaming or dropping one breaks the code of users.
    contract = {"IBResNetConfig", "IBResNetForImageClassification", "involution2d"}
    contract |= {"IBViTConfig", "IBViTModel", "IBViTForImageClassification", "load_student", "record_teacher_logits"}
    contract |= {"DistillationArguments", "EnsembleDistillationTrainer", "ViewRecipe"}
    assert contract <= set(hf_ibdistill.__all__)
    assert set(hf_ibdistill.__all__) | {"__version__"} <= set(dir(hf_ibdistill))
    namespace = {}
    exec("from hf_ibdistill import *", namespace)
    assert set(hf_ibdistill.__all__) <= namespace.keys()


def test_unknown_names_are_named():
    with pytest.raises(AttributeError, match="module 'hf_ibdistill' has no attribute 'IBTransformer'"):
        hf_ibdistill.IBTransformer  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'IBTransformer' from 'hf_ibdistill'"):
        exec("from hf_ibdistill import IBTransformer")
