"""The site: `make docs` builds it with Sphinx, without a network, into `build/docs`."""

import os
import re
from pathlib import Path
from typing import Any

import latex2mathml.converter
from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

import wnn_jax

ROOT = Path(__file__).resolve().parent.parent

project = "wnn_jax"
author = copyright = "The wnn_jax authors"
version = release = wnn_jax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb", ".py": "myst-nb"}
exclude_patterns = ["conf.py"]

html_theme = "furo"
html_math_renderer = "mathml"  # Of `setup`, below.
html_title = "wnn_jax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
# A line of a text may begin with a percentage.
myst_disable_syntax = ["myst_line_comment"]

nb_execution_mode = "cache"
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_execution_timeout = 300
nb_output_stderr = "warn"
nb_merge_streams = True

# A name in single backticks is a link where it names something in this reference, which it must if it begins with
# `wnn_jax.`, and code elsewhere.
default_role = "py:obj"
nitpicky = True
nitpick_ignore_regex = [("py:obj", r"(?!wnn_jax\.).*"), ("py:(?!obj).*", ".*")]
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88
napoleon_use_ivar = True
# What stands before a colon under "Returns:" is part of a sentence, and no type.
napoleon_use_rtype = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# Where this site shows what a link in the repository leads to, by paths without `.md` and `.py`.
PAGES = {
    "README": "index",
    "CONTRIBUTING": "contributing",
    "CHANGELOG": "changelog",
    "experiments": "records",
    "experiments/results/forecasts/forecast-errors.png": "records/forecasts",
    **{f"experiments/{path.stem}": f"records/{path.stem}" for path in ROOT.glob("docs/records/*.md")},
}


class LinkWithinSite(SphinxTransform):
    """Leads links to files outside `docs/`, and those of files that a page includes, to pages, or else to downloads."""

    default_priority = 5

    def apply(self, **kwargs: Any) -> None:
        """Replaces the links of one page."""
        page_file = self.env.doc2path(self.env.docname)
        attributes = {"refdoc": self.env.docname, "reftype": "myst", "refexplicit": True}
        for link in [
            *self.document.findall(addnodes.pending_xref),
            *self.document.findall(addnodes.download_reference),
        ]:
            if link.get("reftype") != "myst" or link["reftarget"] in self.env.found_docs:
                continue
            target, _, anchor = link["reftarget"].partition("#")
            # MyST looks beside the page for what an included file has beside itself.
            folder = Path(link.source or page_file).parent if link["refdomain"] is None else page_file.parent
            path = os.path.relpath(folder / target, ROOT)
            name = path.removesuffix(".py").removesuffix(".md")
            page = PAGES.get(name, name.removeprefix("docs/"))
            if page in self.env.found_docs:
                where = {"refdomain": "doc", "reftarget": page, "reftargetid": anchor or None}
                link.replace_self(addnodes.pending_xref("", *link.children, **where, **attributes))
            elif file := next((file for file in (ROOT / path, ROOT / f"{path}.py") if file.is_file()), None):
                where = {"refdomain": None, "reftarget": os.path.relpath(file, page_file.parent)}
                link.replace_self(addnodes.download_reference("", *link.children, **where, **attributes))


def show_program(app: Sphinx, docname: str, source: list[str]) -> None:
    """Makes a page of a recipe: its docstring, which is Markdown, and its code."""
    if app.env.doc2path(docname).suffix != ".py":
        return
    docstring, code = source[0].removeprefix('"""').split('"""', 1)
    title = re.split("[:.,]", docstring)[0]
    source[0] = f"# {title}\n\n{docstring}\n```python\n{code.lstrip()}```\n"


def visit_math(translator: Any, node: nodes.math) -> None:
    """Writes a formula as MathML, which browsers show without any program."""
    translator.body.append(latex2mathml.converter.convert(node.astext()))
    raise nodes.SkipNode


def visit_math_block(translator: Any, node: nodes.math_block) -> None:
    """Writes equations as MathML, with an empty line between any two."""
    for equation in node.astext().strip().split("\n\n"):
        mathml = latex2mathml.converter.convert(equation, display="block")
        translator.body.append(f'<div class="math">{mathml}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.add_transform(LinkWithinSite)
    app.connect("source-read", show_program)
    app.add_html_math_renderer("mathml", inline_renderers=(visit_math, None), block_renderers=(visit_math_block, None))
