"""Lay out the sources of the site for Sphinx: the chapters as they are committed, every text that they link to, and an API reference.

`python site/stage.py FOLDER`. Nothing is executed and nothing is listed here: the order of the chapters is that of
nbs/index.ipynb, the texts are those that can be reached by links from README.md and the chapters, and the modules are those
that the chapters export.
"""

import ast
import json
import posixpath
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = "nbs/index.ipynb"
LONG = 30  # lines, from which a cell that is not part of the package is folded

_LINK = re.compile(r"\]\((?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?\)")
_IMAGE = re.compile(r"!\[([^]]*)\]\(([^)\s]+)\.png\)")
_BADGE = re.compile(r"^\[!\[.*\n", re.MULTILINE)  # an image from another host
_DIRECTIVE = re.compile(r"^#\| *(\w+):? *(.*)\n?", re.MULTILINE)


def tracked_files() -> set[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return {name for name in listed.split("\0") if (ROOT / name).is_file()}


def rewrite_links(text: str, page: str, files: set[str]) -> tuple[str, list[str]]:
    "The text of `page` with links as the site needs them, and the files that it links to."
    reached = []

    def rewrite(match: re.Match) -> str:
        address, anchor = match[1], match[2] or ""
        target = posixpath.normpath(posixpath.join(posixpath.dirname(page), address))
        if target == "README.md":  # it becomes two pages
            address = posixpath.relpath("using.md" if anchor else "index.md", posixpath.dirname(page) or ".")
        elif target in files:
            reached.append(target)
        elif any(name.startswith(target + "/") for name in files):
            reached.append(target + "/index.md")
            address = address.rstrip("/") + "/index.md"
        return f"]({address}{anchor})"

    def also_dark(match: re.Match) -> str:  # Furo shows the one that fits
        alt, address = match.groups()
        dark = posixpath.normpath(posixpath.join(posixpath.dirname(page), f"{address}_dark.png"))
        return f"{match[0]}{{.only-light}}![{alt}]({address}_dark.png){{.only-dark}}" if dark in files else match[0]

    return _LINK.sub(rewrite, _IMAGE.sub(also_dark, _BADGE.sub("", text))), reached


def front_of(readme: str) -> str:
    "README's first screen with its advice, the paragraph with *Use it if*, before its picture."
    title, what, *rest = readme.split("\n\n")
    return "\n\n".join([title, what, *sorted(rest, key=lambda each: "Use it if" not in each)])


def cell_label(source: str) -> str:
    "What a folded cell holds."
    try:
        statements = ast.parse(source).body
    except SyntaxError:  # a magic
        return "Code"
    imports = [each for each in statements if isinstance(each, (ast.Import, ast.ImportFrom))]
    names = [each.name for each in statements if isinstance(each, (ast.FunctionDef, ast.ClassDef))]
    if not names:
        return "Imports" if imports else "Code"
    return f"Code: {'imports, ' if imports else ''}{', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"


def prepare_cell(cell: dict, page: str, files: set[str]) -> tuple[dict | None, list[str]]:
    "The cell as the site shows it (None: not at all), and the files that it links to."
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        source, reached = rewrite_links(source, page, files)
        return cell | {"source": source}, reached
    directives = dict(_DIRECTIVE.findall(source))
    source = _DIRECTIVE.sub("", source).strip("\n")
    if not source or "hide" in directives:
        return None, []
    metadata = dict(cell["metadata"])
    tags = [*metadata.get("tags", []), *(["export"] if "export" in directives else [])]
    if directives.get("echo") == "false":
        tags.append("remove-input")
    elif metadata.get("jupyter", {}).get("source_hidden") or ("export" not in directives and source.count("\n") >= LONG):
        tags.append("hide-input")
        label = "Parameters" if "parameters" in tags else cell_label(source)
        metadata["mystnb"] = {"code_prompt_show": label, "code_prompt_hide": label}
    return cell | {"source": source, "metadata": metadata | {"tags": tags}}, []


def prepare_notebook(text: str, page: str, files: set[str]) -> tuple[str, list[str]]:
    "The notebook as the site shows it, and the files that it links to."
    notebook = json.loads(text)
    prepared = [prepare_cell(cell, page, files) for cell in notebook["cells"]]
    notebook["cells"] = [cell for cell, _ in prepared if cell is not None]
    return json.dumps(notebook), [name for _, reached in prepared for name in reached]


def reading_order(text: str) -> dict[str, list[tuple[str, str]]]:
    "The chapters of each part, as (title, page), from the text of nbs/index.ipynb."
    parts: dict[str, list[tuple[str, str]]] = {}
    for cell in json.loads(text)["cells"]:
        for line in "".join(cell["source"]).splitlines() if cell["cell_type"] == "markdown" else ():
            if part := re.match(r"\*\*(.+?)\*\*", line):
                chapters = parts.setdefault(part[1], [])
            for title, name in re.findall(r"\[([^]]+)\]\(([\w/]+)\.ipynb\)", line):
                chapters.append((title[0].upper() + title[1:], f"nbs/{name}"))
    return parts


def exported_modules(notebooks: dict[str, str]) -> dict[str, str]:
    "The page of the chapter that exports each module."
    found = ((re.search(r"#\| default_exp ([\w.]+)", text), page) for page, text in notebooks.items())
    return {module[1]: page for module, page in found if module and module[1] != "__init__"}


def toctree(entries: list[str], *options: str) -> str:
    return "\n".join(["```{toctree}", *options, "", *entries, "```", ""])


def write_api(write, parts: dict, modules: dict[str, str]) -> None:
    "A page for each module, and one that lists them by part."
    init = ast.parse((ROOT / "sortkd/__init__.py").read_text(encoding="utf-8"))
    public = [f"~sortkd.{each.module}.{name.name}" for each in init.body if isinstance(each, ast.ImportFrom) for name in each.names]
    lines = [
        "# API reference", "", "`import sortkd` needs PyTorch alone, and brings:", "",
        "```{eval-rst}", ".. autosummary::", "   :nosignatures:", "", *(f"   {name}" for name in public), "```", "",
    ]
    ordered = []
    for part, chapters in parts.items():
        rows = []
        for title, page in chapters:
            for module in (name for name, its in modules.items() if its == f"{page}.ipynb"):
                docstring = ast.get_docstring(ast.parse((ROOT / f"sortkd/{module.replace('.', '/')}.py").read_text(encoding="utf-8")))
                rows.append(f"| [`sortkd.{module}`]({module}.md) | {docstring} | [{title}](../{page}.ipynb) |")
                write(
                    f"api/{module}.md",
                    f"# sortkd.{module}\n\nThe code, with its reasons and tests: [{title}](../{page}.ipynb).\n\n"
                    f"```{{eval-rst}}\n.. automodule:: sortkd.{module}\n```\n",
                )
                ordered.append(module)
        if rows:
            lines += [f"## {part}", "", "| module | | chapter |", "|---|---|---|", *rows, ""]
    write("api/index.md", "\n".join(lines) + "\n" + toctree(ordered, ":hidden:"))


def stage(folder: Path) -> None:
    files = tracked_files()
    notebooks = {name: (ROOT / name).read_text(encoding="utf-8") for name in sorted(files) if re.fullmatch(r"nbs/[\w/]+\.ipynb", name)}
    parts = reading_order(notebooks[CHAPTERS])
    others, waiting, seen = [], list(notebooks), set()

    def write(name: str, text: str) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    readme, reached = rewrite_links((ROOT / "README.md").read_text(encoding="utf-8"), "README.md", files)
    waiting += reached
    while waiting:
        name = waiting.pop(0)
        if name in seen:
            continue
        seen.add(name)
        reached = []
        if name in notebooks:
            text, reached = prepare_notebook(notebooks[name], name, files)
            write(name, text)
        elif name not in files:  # the index of a folder that is linked to: its files, shown
            inside = sorted(each for each in files if posixpath.dirname(each) == posixpath.dirname(name))
            shown = "".join(f"## {Path(each).name}\n\n```{{literalinclude}} /{each}\n```\n\n" for each in inside)
            write(name, f"---\norphan: true\n---\n# {posixpath.dirname(name)}\n\n{shown}")
            reached = inside
        elif name.endswith(".md"):
            text, reached = rewrite_links((ROOT / name).read_text(encoding="utf-8"), name, files)
            if text.startswith("# "):
                others.append(name)
            else:  # a table, or a caption: a page that others link to, beside its figure
                figure = name.removesuffix("md") + "png"
                text = f"---\norphan: true\n---\n# {Path(name).stem}\n\n" + (f"![](/{figure})\n\n" if figure in files else "") + text
                reached += [figure] if figure in files else []
            write(name, text)
        else:  # a figure, or a download
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
        waiting += reached

    write_api(write, parts, exported_modules(notebooks))
    start, rest = re.split(r"(?m)^(?=## )", readme, maxsplit=1)
    write("using.md", f"# Installing and using sortkd\n\n{rest}")
    front = (ROOT / "site/front.md").read_text(encoding="utf-8").format(
        readme=front_of(start.split("**Read on:**")[0]),  # which leads here
        parts=toctree(["Installing and using <using>", "All chapters <nbs/index>", "api/index"], ":hidden:")
        + "".join(toctree([f"{title} <{page}>" for title, page in chapters], ":hidden:", f":caption: {part}") for part, chapters in parts.items())
        + toctree(others, ":hidden:", ":caption: Beside the chapters"),
    )
    write("index.md", front)


if __name__ == "__main__":
    stage(Path(sys.argv[1]))
