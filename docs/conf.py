"""Sphinx configuration of the site: `make docs`, or `sphinx-build -W docs build/site`.

Pages are the Markdown files of this folder. Three small extensions in `_ext` do what no
package does: pages that lie outside docs/ (`outside`), docstrings that are plain text
(`docstrings`), and the claims of the five articles (`claims`).
"""

import os
import sys
from pathlib import Path

import normkit

sys.path.insert(0, str(Path(__file__).parent / "_ext"))
# The commands of the tutorials are those of this environment, and print plain text.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
os.environ |= {"NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "80", "OMP_NUM_THREADS": "1"}

project = "normkit"
author = "the normkit authors"
release = version = normkit.__version__
project_copyright = author

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "myst_nb",
    "claims",
    "docstrings",
    "outside",
    "sliders",
]
exclude_patterns = ["_ext", "_build", "**/README.txt"]
# Nothing on the site is fetched from a network, now or when it is read.
intersphinx_mapping: dict[str, tuple[str, None]] = {}

# Pages that are written for a repository's own viewer, without a list of those below.
pages_below = {
    "claims/README": ["S*", "corrections", "reproduce"],
    "benchmarks/index": ["gpu"],
    "integrations/README": ["*"],
}

# -- Markdown and the tutorials ------------------------------------------------------
myst_enable_extensions = ["attrs_block", "attrs_inline", "colon_fence", "deflist"]
myst_heading_anchors = 3
# Every build runs every tutorial: a cache would be keyed by the tutorials' own lines
# and show what an older library printed.
nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_timeout = 120
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_merge_streams = True

# -- The reference -------------------------------------------------------------------
autodoc_default_options = {"show-inheritance": True}
autodoc_member_order = "bysource"
# The programs that integrations are for; none is needed to read their pages.
autodoc_mock_imports = ["lightning", "mlflow", "transformers", "ultralytics", "wandb"]
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
# Arguments on lines of their own: a signature then fits a telephone.
maximum_signature_line_length = 44
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_custom_sections = ["Numerics"]
default_role = "code"

# -- Pages ---------------------------------------------------------------------------
html_theme = "furo"
html_title = "normkit"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_copyright = False
html_copy_source = False
# A summary is fetched, which a browser forbids on pages that are opened as files.
html_show_search_summary = False
html_theme_options = {
    "light_css_variables": {
        "color-brand-primary": "#1d5fa8",
        "color-brand-content": "#1d5fa8",
    },
    "dark_css_variables": {
        "color-brand-primary": "#84bbf2",
        "color-brand-content": "#84bbf2",
    },
}
# Every colour has a contrast of 4.5 and more.
pygments_style = "a11y-high-contrast-light"
pygments_dark_style = "a11y-high-contrast-dark"
