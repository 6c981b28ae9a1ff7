"""Configure Sphinx. `make docs` builds the site into `build/docs`, without a network."""

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
# `docs/experiments` is a link to `experiments/`: its records are pages, and find their plots in `results/`.
exclude_patterns = ["conf.py", "experiments/*.py", "experiments/results"]

html_theme = "furo"
html_math_renderer = "mathml"  # `setup` adds it.
html_title = "wnn_jax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
# A line may begin with a percent sign.
myst_disable_syntax = ["myst_line_comment"]

nb_execution_mode = "cache"
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_execution_timeout = 300
nb_output_stderr = "warn"
nb_merge_streams = True

# A name in single backticks is a link if the reference has it, and code if not. The reference must have every name that
# begins with `wnn_jax.`.
default_role = "py:obj"
nitpicky = True
nitpick_ignore_regex = [("py:obj", r"(?!wnn_jax\.).*"), ("py:(?!obj).*", ".*")]
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88
napoleon_use_ivar = True
# Under "Returns:", the text before a colon is not a type.
napoleon_use_rtype = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# Pages for links to files outside `docs/`, by paths without `.md` and `.py`.
PAGES = {
    "README": "index",
    "CONTRIBUTING": "contributing",
    "CHANGELOG": "changelog",
    "experiments": "results",
}


class LinkWithinSite(SphinxTransform):
    """Turn links to files outside `docs/` into links to pages, or into downloads if there is no page."""

    default_priority = 5

    def apply(self, **kwargs: Any) -> None:
        """Replace the links of one page."""
        page_file = self.env.doc2path(self.env.docname)
        attributes = {"refdoc": self.env.docname, "reftype": "myst", "refexplicit": True}
        for link in [
            *self.document.findall(addnodes.pending_xref),
            *self.document.findall(addnodes.download_reference),
        ]:
            if link.get("reftype") != "myst" or link["reftarget"] in self.env.found_docs:
                continue
            target, _, anchor = link["reftarget"].partition("#")
            # In an included file, links are relative to that file. MyST takes them as relative to the page.
            file_with_link = Path(link.source or page_file) if link["refdomain"] is None else page_file
            path = os.path.relpath(file_with_link.parent.resolve() / target, ROOT)
            name = path.removesuffix(".py").removesuffix(".md")
            page = PAGES.get(name, name.removeprefix("docs/"))
            if page in self.env.found_docs:
                where = {"refdomain": "doc", "reftarget": page, "reftargetid": anchor or None}
                link.replace_self(addnodes.pending_xref("", *link.children, **where, **attributes))
            elif file := next((file for file in (ROOT / path, ROOT / f"{path}.py") if file.is_file()), None):
                where = {"refdomain": None, "reftarget": os.path.relpath(file, page_file.parent.resolve())}
                link.replace_self(addnodes.download_reference("", *link.children, **where, **attributes))


def show_program(app: Sphinx, docname: str, source: list[str]) -> None:
    """Turn a recipe into a page with its docstring, which is Markdown, and its code."""
    if app.env.doc2path(docname).suffix != ".py":
        return
    docstring, code = source[0].removeprefix('"""').split('"""', 1)
    title = re.split("[:.,]", docstring)[0]
    source[0] = f"# {title}\n\n{docstring}\n```python\n{code.lstrip()}```\n"


def visit_math(translator: Any, node: nodes.math) -> None:
    """Write a formula as MathML, which browsers show without JavaScript."""
    translator.body.append(latex2mathml.converter.convert(node.astext()))
    raise nodes.SkipNode


def visit_math_block(translator: Any, node: nodes.math_block) -> None:
    """Write equations, separated by empty lines, as MathML."""
    for equation in node.astext().strip().split("\n\n"):
        mathml = latex2mathml.converter.convert(equation, display="block")
        translator.body.append(f'<div class="math">{mathml}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Register the parts above with Sphinx."""
    app.add_transform(LinkWithinSite)
    app.connect("source-read", show_program)
    app.add_html_math_renderer("mathml", inline_renderers=(visit_math, None), block_renderers=(visit_math_block, None))
