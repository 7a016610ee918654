"The site's sources hold every chapter in order, without directives; broken links are found."
import json
import re
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "site"))
import check_links  # noqa: E402
import stage  # noqa: E402

PLAN = "results/plans/sorting.yaml"
FILES = {"README.md", "nbs/02_losses.ipynb", "results/README.md", PLAN}


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    stage.stage(folder)
    return folder


def test_every_chapter_has_a_place(staged):
    parts = stage.reading_order((ROOT / stage.CHAPTERS).read_text())
    listed = [f"{page}.ipynb" for chapters in parts.values() for _, page in chapters]
    tracked = stage.tracked_files()
    chapters = {name for name in tracked if re.fullmatch(r"nbs/.*\.ipynb", name)}
    assert set(listed) == chapters - {stage.CHAPTERS} and len(listed) == len(set(listed))
    index = (staged / "index.md").read_text()
    assert len(parts) == 7 and all(f":caption: {part}\n" in index for part in parts)
    assert all((staged / name).exists() for name in chapters)


def test_no_directive_is_shown_and_nothing_else_is_lost(staged):
    for path in (staged / "nbs").rglob("*.ipynb"):
        was, now = (json.loads((folder / path.relative_to(staged)).read_text())["cells"]
                    for folder in (ROOT, staged))
        assert not any(re.search("(?m)^#\\|", cell["source"]) for cell in now)
        for cells in (was, now):
            cells[:] = [sum(len(cell.get("outputs", ())) for cell in cells),
                        sum(cell["cell_type"] == "markdown" for cell in cells)]
        assert was == now


def test_readme_becomes_the_front_page_and_another(staged):
    front, using = (staged / "index.md").read_text(), (staged / "using.md").read_text()
    readme = (ROOT / "README.md").read_text()
    first, _, rest = readme.partition("\n**Read on:**")
    shown = [line for line in first.splitlines() if line and not line.startswith(("[![", "!["))]
    put = [line for line in front.partition("**Read on:**")[0].splitlines() if line and line[:2] != "!["]
    assert sorted(shown) == sorted(put) and "mechanism_dark.png){.only-dark}" in front
    assert rest and "```python" in front and "## " not in front and "[![" not in front
    assert all(line in using for line in readme.splitlines() if line.startswith("## "))
    advised = stage.front_of("# A\n\nIt sorts.\n\n![](a.png)\n\n**Use it if** so.")
    assert advised == "# A\n\nIt sorts.\n\n**Use it if** so.\n\n![](a.png)"


@pytest.mark.parametrize("page, link, expected, reached", [
    ("nbs/00.ipynb", "02_losses.ipynb#a", "02_losses.ipynb#a", ["nbs/02_losses.ipynb"]),
    ("nbs/00.ipynb", "../README.md#two-commands", "../using.md#two-commands", []),
    ("README.md", "results/plans/", "results/plans/index.md", ["results/plans/index.md"]),
    ("README.md", PLAN, PLAN, [PLAN]),
    ("README.md", "https://arxiv.org/abs/2508.16544", "https://arxiv.org/abs/2508.16544", [])])
def test_links_are_rewritten(page, link, expected, reached):
    rewritten = stage.rewrite_links(f"see [it]({link}).", page, FILES)
    assert rewritten == (f"see [it]({expected}).", reached)


def test_links_that_lead_nowhere_are_found(tmp_path):
    (tmp_path / "nbs").mkdir()
    (tmp_path / "figure.png").touch()
    (tmp_path / "index.html").write_text(
        '<h1 id="top">x</h1> <a href="nbs/00.html#formula">1</a> <a href="#top">2</a> '
        '<a href="https://arxiv.org">3</a> <img src="figure.png">')
    (tmp_path / "nbs/00.html").write_text('<h2 id="formula">x</h2> <a href="../">1</a>')
    assert check_links.find_broken(tmp_path) == []
    (tmp_path / "nbs/01.html").write_text(
        '<a href="00.html#formulas">1</a> <a href="02.html">2</a> <a href="../../out.html">3</a> '
        '<img src="../no.png"> <script src="https://cdn.org/a.js"></script>')
    (tmp_path / "site.css").write_text("@font-face { src: url('https://fonts.org/a.woff') }")
    assert check_links.find_broken(tmp_path) == [
        "nbs/01.html: ../../out.html is not there", "nbs/01.html: ../no.png is not there",
        "nbs/01.html: 00.html#formulas has no such anchor", "nbs/01.html: 02.html is not there",
        "nbs/01.html: https://cdn.org/a.js is loaded from another host",
        "site.css: https://fonts.org/a.woff is loaded from another host"]
