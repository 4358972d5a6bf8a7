"""How `make docs` builds the site: furo, MyST, and an API reference from the docstrings. Nothing here needs the network."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sphinx.util.nodes import make_refnode

import ratethrottle  # noqa: F401  # before autodoc, which would take the stubs for the compiled modules otherwise

if TYPE_CHECKING:
    from docutils.nodes import Element, TextElement
    from sphinx.addnodes import pending_xref
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

ABOUT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]

project = ABOUT["name"]
author = ABOUT["authors"][0]["name"]
version = release = ABOUT["version"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinxcontrib.mermaid"]
html_theme = "furo"
html_title = project
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False

myst_heading_anchors = 3
myst_fence_as_directive = ["mermaid"]  # as GitHub writes them
# The docstrings write code in single backticks.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
add_module_names = False
python_use_unqualified_type_names = True
# Python's own types and redis-py's: their inventories would come from the network.
nitpick_ignore_regex = [
    ("py:.*", r"(?!ratethrottle\b).*"),
    ("py:class", r"ratethrottle\.storage\.Storage|ratethrottle\.waiting\.guard\.Function"),
]

# The reference page links to pages by the names that they have elsewhere. Its text stays as it is.
RENAMED = {"user_guide/storage": "storage", "ddos_protection": "distributed-notes", "analytics": "operations"}


def resolve(app: Sphinx, env: BuildEnvironment, node: pending_xref, shown: TextElement) -> Element | None:
    """Find what the reference page and the annotations call by another name than the site does."""
    if node.get("reftype") == "doc" and node["reftarget"].removeprefix("../") in RENAMED:
        page = RENAMED[node["reftarget"].removeprefix("../")]
        text = env.titles[page].deepcopy()
        shown.children.clear()
        shown += text.children
        return make_refnode(app.builder, node["refdoc"], page, "", shown)
    if node.get("refdomain") == "py" and node["reftarget"].startswith("ratethrottle."):
        # A public class is defined in a module that isn't: `ratethrottle._engine.decision.Decision` is `ratethrottle.Decision`.
        for room in ("ratethrottle.", "ratethrottle.testing."):
            public = room + node["reftarget"].rpartition(".")[2]
            found = env.domains.python_domain.objects.get(public)
            if found is not None and public != node["reftarget"]:
                return make_refnode(app.builder, node["refdoc"], found.docname, found.node_id, shown)
    return None


def docstring(_app: Sphinx, _what: str, _name: str, _object: object, _options: Any, lines: list[str]) -> None:
    """Turn the Markdown of docstrings, tables and indented blocks, into what autodoc reads."""
    made: list[str] = []
    for i, line in enumerate(lines):
        if line.startswith("|") and not re.fullmatch(r"[|\s-]+", line):
            if i == 0 or not lines[i - 1].startswith("|"):
                made += [".. list-table::", "   :header-rows: 1", ""]
            for j, cell in enumerate(line.strip("|").split("|")):
                made.append(f"   {'* -' if j == 0 else '  -'} {cell.strip()}".rstrip())
        elif line.startswith("|"):
            continue
        else:
            if line.startswith("    ") and i and not lines[i - 1].strip():
                made += ["::", ""]
            made.append(line)
    lines[:] = made


def setup(app: Sphinx) -> dict[str, bool]:
    """Take part in the build."""
    app.connect("missing-reference", resolve)
    app.connect("autodoc-process-docstring", docstring)
    return {"parallel_read_safe": True}
