"Sphinx's configuration of the site; .ci/site builds it from what stage.py lays out."

import configparser
import dataclasses
import re
from pathlib import Path

_here = Path(__file__).parent
_settings = configparser.ConfigParser(delimiters=["="], interpolation=None)
_settings.read(_here.parent / "settings.ini", encoding="utf-8")
_settings = _settings["DEFAULT"]

project = _settings["lib_name"]
author = _settings["author"]
copyright = _settings["copyright"]
release = version = _settings["version"]

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.mathjax", "sphinx-mathjax-offline"]
templates_path = [str(_here / "templates")]

nb_execution_mode = "off"  # the outputs are those that were committed
nb_merge_streams = True
nb_render_markdown_format = "myst"  # outputs, too, have tables and formulas
myst_enable_extensions = ["dollarmath", "amsmath", "attrs_inline"]
myst_heading_anchors = 4  # as GitHub makes them

# Docstrings mark names and code with single backquotes; a name that the package has becomes a link.
default_role = "py:obj"
autodoc_default_options = {"members": True, "member-order": "bysource", "ignore-module-all": True}
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_mock_imports = ["huggingface_hub"]  # an extra of its own, which sortkd.fronts.hub alone needs
autodoc_inherit_docstrings = False  # those of PyTorch are in another format
autosummary_generate = False
add_module_names = False
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = "sortkd"
html_static_path = [str(_here / "static")]
html_css_files = ["site.css"]
html_copy_source = False
html_sidebars = {
    "**": [
        "sidebar/brand.html", "sidebar/search.html", "sidebar/scroll-start.html", "sidebar/explorer.html", "sidebar/navigation.html",
        "sidebar/scroll-end.html",
    ]
}
pygments_dark_style = "monokai"


def separate_statements(app, what, name, thing, options, lines):
    "Give what a docstring says of a parameter, the result, errors and the source a paragraph each; add the help of dataclass fields."
    for place in reversed(range(1, len(lines))):
        if lines[place - 1].endswith(".") and re.match(r"(`[\w, `*]+`: |Returns? |Raises |`?\w+Error|Sources?: )", lines[place]):
            lines.insert(place, "")
    if what == "class" and dataclasses.is_dataclass(thing):
        for field in dataclasses.fields(thing):
            if text := field.metadata.get("help"):
                lines += ["", f"`{field.name}`: {text}. {field.metadata['more']}"]


def link_by_last_name(app, environment, node, content):
    "`sort_logits` alone names the one function or class of that name, in whatever module it is."
    if node.get("refdomain") == "py" and node.get("reftype") == "obj":
        python = environment.get_domain("py")
        found = [name for name, entry in python.objects.items() if name.endswith("." + node["reftarget"]) and entry.objtype in ("function", "class")]
        if len(found) == 1:
            return python.resolve_xref(environment, node["refdoc"], app.builder, "obj", found[0], node, content)


def setup(app):
    app.connect("autodoc-process-docstring", separate_statements)
    app.connect("missing-reference", link_by_last_name)
