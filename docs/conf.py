"""The site: `make docs`. Builds without a network; warnings are errors."""

import re
import shutil
from importlib.metadata import version as version_of
from importlib.util import find_spec
from pathlib import Path

import nbformat

from kmex_utils.paper.process import without_bars

HERE = Path(__file__).parent
REPOSITORY = HERE.parent
RUNS = REPOSITORY / "runs"  # what `make reproduce` and the targets `extras` and `scaling` leave
EXECUTED = [RUNS / folder / "notebooks" for folder in ("mnist-mini", "mnist-mini/seed-0", "report-quick", "scaling")]

project = "Post-hoc self-explanation of CNNs"
author = "The kmex-companion authors"
copyright = "the kmex-companion authors, MIT licence"
version = release = version_of("kmex-utils")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]

myst_enable_extensions = ["attrs_inline", "colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # but where a page asks for it: those that read their numbers from CSV files
nb_eval_name_regex = ".+"
nb_execution_raise_on_error = True
nb_execution_timeout = 120
nb_render_markdown_format = "myst"
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
napoleon_google_docstring = False
viewcode_follow_imported_members = False

html_theme = "sphinx_book_theme"
html_title = project
# MathJax is a file of the site, from a package that carries it; this one of its files needs no fonts beside it
MATHJAX = Path(find_spec("sphinx-mathjax-offline").origin).parent / "static" / "mathjax" / "tex-svg.js"
mathjax_path = MATHJAX.name
html_static_path = ["_static", str(MATHJAX)]
html_css_files = ["site.css"]
html_last_updated_fmt = ""
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "show_toc_level": 2,
    "home_page_in_toc": True,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "search_bar_text": "Search",
    "navbar_persistent": [],  # the search field is in the sidebar already
}


def notebooks(app: object) -> None:
    """Lay the notebooks beside the pages: executed where they have been, of the first seed, else as they are."""
    folder = HERE / "notebooks"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for source in sorted((REPOSITORY / "notebooks").glob("*.ipynb")):
        made = [folder / source.name for folder in EXECUTED]
        notebook = nbformat.read(next((file for file in made if file.exists()), source), 4)
        without_bars(notebook)
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = links(cell.source, "../")
        nbformat.write(notebook, folder / source.name)


def links(text: str, top: str) -> str:
    """Links to files of the repository: a page of the site, whose ``top`` lies there, where it has one."""
    text = re.sub(r"\[([^\]]*)\]\(\.\./(kmex_utils/[\w/]+)\.py\)", rf"<a href='{top}_modules/\2.html'>\1</a>", text)
    report = r"\]\(\.\./figures/(?:(\w+)/)?report/report\.md\)"
    text = re.sub(report, lambda of: f"]({top}report-{of[1] or 'scratch'}.md)", text)
    text = re.sub(r"\]\(\.\./figures/[\w/]+/table\d\.md\)", f"]({top}results.md)", text)
    text = re.sub(r"\]\(\.\./docs/([\w-]+\.md)\)", rf"]({top}\1)", text)
    return re.sub(r"\]\(\.\./(?=figures/|config/|data/|benchmarks/)", f"]({top}../", text)


def page(app: object, name: str, source: list[str]) -> None:
    """A page's links work where its Markdown is read, too; here notebooks and the package's files are pages."""
    if not name.startswith("notebooks/"):
        source[0] = links(source[0].replace("](../notebooks/", "](notebooks/"), "")


def setup(app: object) -> None:
    """What Sphinx calls first."""
    app.connect("builder-inited", notebooks)
    app.connect("source-read", page)
