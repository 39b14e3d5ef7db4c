"""Sphinx settings of the documentation site: `make docs` builds it from the pages in this folder.

The pages are the Markdown files as they are on GitHub. Nothing in the site needs the network: formulas become MathML, and
links to files that are not pages become their names.
"""

import builtins
import dataclasses
import re
import sys
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx import addnodes


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import hf_ibdistill  # noqa: E402


project = "hf_ibdistill"
author = "the authors of hf_ibdistill"
version = release = hf_ibdistill.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]

html_theme = "furo"
html_title = f"hf_ibdistill {version}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_favicon = "static/icon.svg"
html_math_renderer = "mathml"
html_copy_source = False
html_show_sphinx = html_show_copyright = False
pygments_style = "friendly"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_numpy_docstring = False

# Every reference into this package must resolve. Other libraries have no inventory here, because a build is offline.
nitpicky = True
OTHER_LIBRARIES = "accelerate|collections|datasets|gradio|numpy|os|pathlib|PIL|torch|transformers|typing"
nitpick_ignore_regex = [
    (r"py:.*", rf"({OTHER_LIBRARIES})(\..*)?"),
    (r"py:.*", rf"({'|'.join(dir(builtins))})"),
    (r"py:exc", r"StrictDataclassClassValidationError"),  # of huggingface_hub
]

# Files outside this folder that are pages of the site.
PAGES = {"README.md": "index", "CONTRIBUTING.md": "contributing", "CHANGELOG.md": "changelog"}


def resolve_links_to_files(app, document):
    """Links to files of the repository lead to a page of the site, or become the name of the file."""
    page = app.env.docname
    for node in list(
        document.findall(lambda node: isinstance(node, addnodes.pending_xref | addnodes.download_reference))
    ):
        target = node["reftarget"].partition("#")[0]
        if node["reftype"] != "myst" or not target or target in app.env.found_docs:
            continue
        if node.get("refdomain") == "doc":
            target += ".md"  # outside of this folder
        # The pages that include a file of the root have its links.
        folders = [Path(app.srcdir, page).parent, ROOT]
        path = next((path for folder in folders if (path := (folder / target).resolve()).exists()), None)
        if path is None or not path.is_relative_to(ROOT):
            continue  # MyST reports it
        name = path.relative_to(ROOT).as_posix()
        if name in PAGES or path.is_relative_to(app.srcdir):
            to = {"refdomain": "doc", "reftarget": PAGES.get(name) or app.env.path2doc(path), "reftargetid": None}
            node.replace_self(addnodes.pending_xref("", *node.children, **{**node.attributes, **to}))
        else:
            node.replace_self([*node.children, nodes.Text(" ("), nodes.literal("", name), nodes.Text(")")])


# Docstrings are Markdown, with references such as [`record_teacher_logits`], as Hugging Face writes them.
CODE = re.compile(r"\[`(~?[\w.]+)`\]|(?<!`)`([^`]+)`(?!`)")
SECTION = re.compile(r"(Args|Returns|Raises|Example|Attributes|Yields):$")


def convert_docstring(app, what, name, obj, options, lines):
    """Markdown → reStructuredText, in place, before napoleon reads the sections."""
    converted, fence, in_section = [], False, False
    for line in [*lines, *argument_fields(obj)]:
        if line.strip().startswith("```"):
            fence = not fence
            converted += [".. code-block:: pycon", ""] if fence else [""]
            continue
        if fence:
            converted.append(f"    {line}")
            continue
        in_section = in_section or SECTION.match(line) is not None
        previous = converted[-1] if converted else ""
        starts_list = line.lstrip().startswith("- ") and previous.strip() and not previous.lstrip().startswith("- ")
        if starts_list and indentation(line) >= indentation(previous):
            converted.append("")
        if not in_section and line.startswith("    ") and not previous:
            converted += ["::", ""]  # an indented block of Markdown is code
        literal = not in_section and line.startswith("    ")
        converted.append(line if literal else CODE.sub(code, line))
    lines[:] = converted


def indentation(line):
    return len(line) - len(line.lstrip())


def code(match):
    name, text = match.groups()
    if text:
        return f"``{text}``"
    name = name.lstrip("~")
    if name.partition(".")[0] in OTHER_LIBRARIES.split("|"):
        return f"``{name.rpartition('.')[2]}``"
    # With a dot, Sphinx finds a name in any module.
    return f":py:obj:`~{'hf_ibdistill' if name in hf_ibdistill.__all__ else ''}.{name}`"


def argument_fields(obj):
    """A section of the fields of training arguments. Their help is in the fields, from which the commands make flags."""
    if not dataclasses.is_dataclass(obj) or not isinstance(obj, type):
        return []
    own = [
        field for field in dataclasses.fields(obj) if field.name in obj.__annotations__ and "help" in field.metadata
    ]
    return ["", "Args:", *(f"    {field.name}: {field.metadata['help']}" for field in own)] if own else []


def visit_math(self, node):
    self.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def visit_math_block(self, node):
    self.body.append(f'<div class="formula">{tex2mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


def setup(app):
    app.connect("doctree-read", resolve_links_to_files)
    app.connect("autodoc-process-docstring", convert_docstring, priority=400)
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
