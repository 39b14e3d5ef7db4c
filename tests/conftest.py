"""Fixtures that every test may use: images and teachers small enough to be recorded in a test."""

import gc

import pytest
import torch
from datasets import Features
from hub_server import run_hub  # noqa: F401  the fixture `hub`
from huggingface_hub import constants
from small import make_images, make_teacher


@pytest.fixture(autouse=True)
def seed():
    """The same random numbers in every run."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Starting several threads costs more than tensors of test size take. Another number of threads rounds differently."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def freeze_imported_objects():
    """`Trainer.train` collects garbage. Most of a short training would go into checking the objects of imported modules."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def own_hub(hub, monkeypatch):
    """`hub` as the Hub of this process, not only of those that a test starts."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    template = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    return hub


@pytest.fixture
def feature_copies(monkeypatch):
    """How often `datasets` copies or writes out the features of a table, with the names of all classes."""
    copies, copy, schema = [], Features.copy, Features.arrow_schema.fget
    monkeypatch.setattr(Features, "copy", lambda self: copies.append(self) or copy(self))
    monkeypatch.setattr(Features, "arrow_schema", property(lambda self: copies.append(self) or schema(self)))
    return copies


@pytest.fixture(scope="session")
def images():
    return make_images


@pytest.fixture(scope="session")
def save_teacher():
    return make_teacher


@pytest.fixture(scope="session")
def teachers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers")
    return {
        "conv": make_teacher(folder / "conv"),
        # Sees the images at another size: every teacher has its own image processor.
        "inv": make_teacher(folder / "inv", "involution-small", seed=1, size=12),
    }
