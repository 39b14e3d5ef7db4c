"""What `import hf_ibdistill` costs, and that transformers' Auto classes know both model families afterwards, whatever
was imported first. Import order can only be tested in a process that has imported nothing yet."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessor, pipeline

import hf_ibdistill
from hf_ibdistill import IBResNetConfig, IBResNetForImageClassification, IBViTConfig, IBViTForImageClassification


FAMILIES = ["ibresnet", "ibvit"]
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
    """A saved model of each family, the pixels it was shown and the logits it gave."""
    torch.manual_seed(0)
    folders = {}
    for family in FAMILIES:
        folders[family] = tmp_path_factory.mktemp(family)
        model, pixel_values = small_model(family), torch.randn(2, 3, 16, 16)
        model.save_pretrained(folders[family])
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as in the other process: the number of threads may change the order of a sum
        with torch.no_grad():
            torch.save((pixel_values, model(pixel_values).logits), folders[family] / "prediction.pt")
        torch.set_num_threads(threads)
        # No "image_processor_type": the class then follows from the configuration's.
        (folders[family] / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 16, "width": 16}}))
    return folders


def run_in_new_process(code, *arguments):
    root = Path(hf_ibdistill.__file__).parents[1]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(root), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", code, *map(str, arguments)]
    completed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert completed.returncode == 0, completed.stderr[-4000:]
    return completed.stdout


def test_importing_the_package_imports_neither_torch_nor_the_models():
    code = """
import sys
import hf_ibdistill
dir(hf_ibdistill), hf_ibdistill.__all__, hf_ibdistill.__version__
print([name for name in ("torch", "transformers.models.auto", "hf_ibdistill.models") if name in sys.modules])
"""
    assert run_in_new_process(code).strip() == "[]"


CHECK = """
import sys, torch
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification
for folder in sys.argv[1:]:
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForImageClassification.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder)
    pixel_values, expected = torch.load(folder + "/prediction.pt")
    with torch.no_grad():
        exact = torch.equal(model(pixel_values).logits, expected)
    print(type(config).__name__, type(model).__name__, type(processor).__name__, exact)
print(type(AutoModel.from_config(config)).__name__)
"""
EXPECTED = """\
IBResNetConfig IBResNetForImageClassification ViTImageProcessor True
IBViTConfig IBViTForImageClassification ViTImageProcessor True
IBViTModel
"""


@pytest.mark.parametrize(
    "imports",
    [
        pytest.param("import hf_ibdistill", id="package first"),
        pytest.param(
            "from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification\n"
            "import hf_ibdistill",
            id="Auto classes first",
        ),
        pytest.param("from transformers import AutoConfig\nimport hf_ibdistill", id="AutoConfig first"),
        pytest.param("from hf_ibdistill import IBViTForImageClassification", id="model class first"),
        pytest.param("from hf_ibdistill import IBResNetConfig", id="configuration class first"),
        pytest.param("from transformers import Trainer\nimport hf_ibdistill", id="Trainer first"),
        # Every model of transformers imports the Auto classes while it is half loaded itself, and ours need some of them.
        pytest.param("import hf_ibdistill\nfrom transformers import ViTForImageClassification", id="then ViT"),
        pytest.param("import hf_ibdistill\nfrom transformers import DeiTForImageClassification", id="then DeiT"),
        pytest.param("import hf_ibdistill\nfrom transformers import ResNetModel, Trainer", id="then another model"),
        pytest.param(
            # Asking where a module lives is not importing it; linters, bundlers and is_available checks do it.
            "import importlib.util, hf_ibdistill\n"
            "importlib.util.find_spec('transformers.models.auto.modeling_auto')\n"
            "importlib.util.find_spec('hf_ibdistill.models.modeling_ibvit')",
            id="modules looked up first",
        ),
        pytest.param("import importlib, hf_ibdistill\nimportlib.reload(hf_ibdistill)", id="reloaded"),
    ],
)
def test_auto_classes_load_both_families_bit_exactly(imports, folders):
    assert run_in_new_process(f"{imports}\n{CHECK}", *(folders[family] for family in FAMILIES)) == EXPECTED


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
    # Renaming or dropping one breaks other people's code.
    contract = {"IBResNetConfig", "IBResNetForImageClassification", "involution2d"}
    contract |= {"IBViTConfig", "IBViTModel", "IBViTForImageClassification"}
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
