"""The documentation is complete, and the strict build of its site finds what is wrong. `make docs` builds the whole site."""

import dataclasses
import importlib
import inspect
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import hf_ibdistill
import hf_ibdistill.data
import hf_ibdistill.images
from hf_ibdistill.commands import COMMANDS
from hf_ibdistill.images.views import CROPS, ViewRecipe
from hf_ibdistill.training.arguments import DistillationArguments, ImageTrainingArguments
from hf_ibdistill.training.losses import MODES, UNLABELLED_TARGETS


ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))


def read(name):
    return (DOCS / name).read_text(encoding="utf-8")


def public_objects():
    """Name in the API reference → object. A subpackage's name that the package has as well is listed once."""
    names = list(hf_ibdistill.__all__)
    for package in ("data", "images"):
        module = getattr(hf_ibdistill, package)
        names += [f"{package}.{name}" for name in module.__all__ if name not in hf_ibdistill.__all__]
    return {name: named(name) for name in names}


def named(name):
    module, _, attribute = f"hf_ibdistill.{name}".rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def test_the_api_reference_has_every_public_name_once():
    pattern = r"^\.\. auto(function|class):: hf_ibdistill\.([\w.]+)(?:\(.*\))?$"
    listed = [match for page in DOCS.glob("api/*.md") for match in re.findall(pattern, page.read_text("utf-8"), re.M)]
    names = [name for _, name in listed]
    assert len(set(names)) == len(names) and set(public_objects()) <= set(names)
    for kind, name in listed:
        assert inspect.isclass(named(name)) == (kind == "class"), name


def test_every_public_name_has_a_docstring():
    for name, value in public_objects().items():
        assert vars(value).get("__doc__") if inspect.isclass(value) else inspect.getdoc(value), name
        for key, member in vars(value).items() if inspect.isclass(value) else ():
            # What overrides a method of transformers is documented there.
            if (
                callable(member)
                and not key.startswith("_")
                and not any(hasattr(base, key) for base in value.__bases__)
            ):
                assert inspect.getdoc(member), f"{name}.{key}"


@pytest.mark.parametrize("arguments", [DistillationArguments, ImageTrainingArguments])
def test_every_training_argument_has_a_help(arguments):
    for field in dataclasses.fields(arguments):
        assert field.name not in arguments.__annotations__ or field.metadata["help"], field.name


def test_every_page_is_in_the_table_of_contents_once():
    blocks = re.findall(r"^```\{toctree\}\n(.*?)^```$", read("index.md"), re.MULTILINE | re.DOTALL)
    entries = [line for block in blocks for line in block.splitlines() if line and not line.startswith(":")]
    pages = [page.relative_to(DOCS).with_suffix("").as_posix() for page in PAGES]
    assert sorted([*entries, "index"]) == sorted(pages)


def test_every_picture_is_there_and_has_alternative_text():
    pictures = [
        (page, *found)
        for page in [ROOT / "README.md", *PAGES]
        for found in re.findall(r"!\[(.*?)\]\((.+?)\)", page.read_text("utf-8"))
    ]
    assert pictures
    for page, text, target in pictures:
        assert len(text) > 10 and (page.parent / target).is_file(), f"{page.name}: {target}"


def test_the_tables_are_complete():
    commands = re.findall(r"^\| \[([\w-]+)\]\(#\1\) \|", read("commands.md"), re.MULTILINE)
    assert commands == list(COMMANDS)

    losses = read("losses.md")
    own = [
        field.name
        for field in dataclasses.fields(DistillationArguments)
        if field.name in DistillationArguments.__annotations__
    ]
    for name in {*own, "label_smoothing_factor"} - {"num_train_epochs"}:
        assert f"`{name}" in losses, name
    for argument, values in {"distillation_mode": MODES, "unlabelled_target": UNLABELLED_TARGETS}.items():
        assert re.findall(rf'^\|.*\| `{argument}="(\w+)"`.*\$', losses, re.MULTILINE) == list(values)

    views = read("views.md")
    for field in dataclasses.fields(ViewRecipe):
        assert f"`{field.name}" in views, field.name
    assert set(re.findall(r'`crop="(\w+)"`', views)) == set(CROPS)


def test_docstrings_become_restructured_text():
    convert = runpy.run_path(str(DOCS / "conf.py"))["convert_docstring"]
    lines = [
        "See [`record_teacher_logits`], [`make_view`] and [`~transformers.Trainer`] of `a_`.", "", "    L = λ_0 · `x`", "",
        "Args:", "    crop: one of", '        - `"pad"`: shift;', "          more;", '        - `"none"`.', "",
        "Example:", "", "```python", ">>> `a`", "```",
    ]  # fmt: skip
    convert(None, "function", "name", None, None, lines)
    assert lines == [
        "See :py:obj:`~hf_ibdistill.record_teacher_logits`, :py:obj:`~.make_view` and ``Trainer`` of ``a_``.", "", "::", "",
        "    L = λ_0 · `x`", "",
        "Args:", "    crop: one of", "", '        - ``"pad"``: shift;', "          more;", '        - ``"none"``.', "",
        "Example:", "", ".. code-block:: pycon", "", "    >>> `a`", "",
    ]  # fmt: skip


def test_the_strict_build_finds_what_is_wrong(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "index.md").write_text(
        "# First\n\n[a](good.md#a-part) [b](absent.md) [c](good.md#no-part) [d](../absent.csv)\n\n"
        "```{toctree}\ngood\n```\n\n```{eval-rst}\n:py:obj:`hf_ibdistill.no_name` :py:obj:`~.involution2d`\n```\n",
        encoding="utf-8",
    )
    (source / "good.md").write_text(
        "# Good\n\n## A part\n\n$\\lambda$ [e](index.md)\n\n```{eval-rst}\n"
        ".. autofunction:: hf_ibdistill.involution2d\n```\n",
        encoding="utf-8",
    )
    (source / "alone.md").write_text("# In no table of contents\n", encoding="utf-8")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", "-c", DOCS, source, tmp_path / "site"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    found = [line for line in done.stderr.splitlines() if "WARNING" in line]
    for mistake in ("absent.md", "no-part", "absent.csv", "hf_ibdistill.no_name", "alone.md"):
        assert len([line for line in found if mistake in line]) == 1, (mistake, found)
    assert len(found) == 5, found
    html = (tmp_path / "site" / "good.html").read_text(encoding="utf-8")
    assert "<math" in html and "hf_ibdistill.involution2d" in html and 'src="http' not in html


@pytest.mark.parametrize("seconds, code, status", [("0", "1", 1), ("1000", "1", 0), ("1000", "1 / 0", 1)])
def test_a_page_is_run_within_its_time(seconds, code, status, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"```python\nvalue = {code}\n```\n\n```python\nprint(value)\n```\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, DOCS / "check.py", "--seconds", seconds, page], capture_output=True, text=True
    )
    assert done.returncode == status and "2 blocks" in done.stdout
    assert ("more than the 0 s" in done.stdout) == (seconds == "0") and ("ZeroDivisionError" in done.stdout) == (
        "/" in code
    )
