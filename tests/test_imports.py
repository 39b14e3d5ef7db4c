"""Data flows in one direction: a module imports from its own stage or earlier ones. Read from the source, so that imports
inside functions count as well."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_imports

import hf_ibdistill


PACKAGE = Path(hf_ibdistill.__file__).parent
STAGES = [
    "checks",
    "files",
    "processes",
    "mirror",
    "progress",
    "models",
    "data.columns",
    "images",
    "data",
    "logits",
    "rows",
    "passes",
    "teachers",
    "students",
    "rednet",
    "evaluation",
    "metrics",
    "recording",
    "publishing",
    "training",
    "export",
    "demo",
    "commands",
]
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip("."): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imports(source, module, is_package, modules=MODULES):
    """The modules of the package that a source imports, and the names of all other libraries."""
    own, foreign = set(), set()
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = ["hf_ibdistill", *filter(None, package[: len(package) + 1 - node.level])] if node.level else []
            base = ".".join([*start, *filter(None, [node.module])])
            # A name may be a module of the package, and otherwise is something in the base.
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] != "hf_ibdistill":
                foreign.add(parts[0])
                continue
            while ".".join(parts[1:]) not in modules:
                parts.pop()
            own.add(".".join(parts[1:]))
    return own, foreign


def of_package(module):
    path = MODULES[module]
    return imports(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")


def stage(module):
    return STAGES.index(module if module in STAGES else module.split(".")[0])


def test_relative_absolute_and_hidden_imports_are_read():
    modules = {"": None, "data": None, "data.columns": None, "rows": None, "models": None}
    source = """
from .columns import IMAGE
from .. import rows
def late():
    import hf_ibdistill.models
    from hf_ibdistill.rows import ImageRows
    import numpy.linalg, torch as t
"""
    found = imports(source, "data.classes", False, modules)
    assert found == ({"data.columns", "rows", "models"}, {"numpy", "torch"})
    assert imports("from . import columns", "data", True, modules)[0] == {"data.columns"}
    assert imports("from . import models", "", True, modules)[0] == {"models"}
    assert imports("from hf_ibdistill import involution2d", "rows", False, modules)[0] == {""}


def test_every_module_has_a_stage():
    assert {module.split(".")[0] for module in MODULES} - {""} == {name.split(".")[0] for name in STAGES}


@pytest.mark.parametrize("module", [module for module in MODULES if module])
def test_a_module_imports_from_its_own_stage_or_earlier_ones(module):
    own, _ = of_package(module)
    # The root imports the models, and offers all stages.
    assert "" not in own
    assert {name for name in own if stage(name) > stage(module)} == set()


def test_no_modules_import_each_other():
    # Raises an error that names a cycle.
    order = list(TopologicalSorter({module: of_package(module)[0] for module in MODULES}).static_order())
    assert set(order) == set(MODULES)


def test_the_models_ship_as_remote_code():
    for module in MODULES:
        if module.split(".")[0] == "models":
            own, foreign = of_package(module)
            assert {name.split(".")[0] for name in own} <= {"models"}, module
            # `huggingface_hub` is a part of transformers. Triton may be missing.
            libraries = {"torch", "transformers", "huggingface_hub", "triton"}
            assert foreign - set(sys.stdlib_module_names) <= libraries, module
            assert "triton" not in get_imports(MODULES[module]), module


def test_the_root_imports_the_models_alone():
    assert of_package("") == ({"models"}, {"importlib"})
