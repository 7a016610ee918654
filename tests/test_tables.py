"What tables and figures hold, and that names in them are text."
import json
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from synthetic import synthetic_record, synthetic_records, write_lines

from sortkd.evidence.plots import summarize
from sortkd.evidence.statistics import paired_effects
from sortkd.evidence.tables import comparison_table, effect_table, read_reported, write_table
from sortkd.experiment.pairs import PAIRS
from sortkd.fronts.table import table_command

NOTEBOOKS = Path(__file__).parents[1] / "nbs"
REPORTED = read_reported(NOTEBOOKS / "assets" / "reported.csv")
HOSTILE = (r"\input{/etc/passwd}%&#$_^~ | `code` **b** <img src=x onerror=alert(1)> "
           "[click](http://x) ![p](http://x) &lt; {x}\n\n# head\x1b")
OURS = ("begin end centering caption label toprule midrule bottomrule cline multirow footnotesize "
        "textbackslash textasciitilde textasciicircum")


@pytest.mark.parametrize("indexed", [True, False])
def test_names_are_text_in_every_form_of_a_table(tmp_path, indexed):
    mistune = pytest.importorskip("mistune")
    table = pd.DataFrame({HOSTILE: [HOSTILE, "70.66"], "plain": ["1", "2"]})
    if indexed:
        names = [HOSTILE, "method"]
        table.index = pd.MultiIndex.from_tuples([(HOSTILE, "a"), (HOSTILE, HOSTILE)], names=names)
    write_table(table, "names", HOSTILE, [HOSTILE, "1. " + HOSTILE], tmp_path)
    text, latex = ((tmp_path / f"names.{suffix}").read_text() for suffix in ("md", "tex"))
    nodes = mistune.create_markdown(renderer="ast", plugins=["table"])(text)
    shown = [node["type"] for node in nodes if node["type"] != "blank_line"]
    assert shown == ["paragraph", "table", "paragraph", "paragraph"]
    kinds = Counter(re.findall(r"'type': '(\w+)'", str(nodes)))
    assert not kinds.keys() & {"link", "image", "inline_html", "block_html", "codespan", "emphasis"}
    assert kinds["strong"] == 1, "the caption"
    assert set(re.findall(r"\\([a-zA-Z]+)", latex)) <= set(OURS.split()), "no command but ours"
    assert "\x1b" not in latex + text


@pytest.mark.parametrize("name", ["../names", "", "x}"])
def test_a_table_has_a_name_and_rows(tmp_path, name):
    with pytest.raises(ValueError, match="a table is called"):
        write_table(pd.DataFrame({"a": ["1"]}), name, "Names", [], tmp_path)
    for nothing in (pd.DataFrame(columns=["a"]), pd.DataFrame(index=["a row"])):
        with pytest.raises(ValueError, match="the table nothing has no rows"):
            write_table(nothing, "nothing", "Nothing", [], tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_table_holds_means_spreads_and_differences():
    runs = pd.DataFrame({"teacher": "vgg13", "student": "vgg8", "method": ["kd", "kd", "kd+sort"],
                         "last_top1": [70.0, 71.0, 72.0], "best_top1": [70.5, 72.5, 73.0],
                         "precision": ["float32", "float32", "bfloat16"]})
    reported = pd.DataFrame({"teacher": "vgg13", "student": "vgg8", "method": ["kd", "dkd"],
                             "top1": [72.98, 74.68], "top1_last": [math.nan, 74.1]})
    pairs = [("vgg13", "vgg8")]
    table = comparison_table(runs, reported, pairs, methods=("kd", "dkd"))
    assert table["vgg13 → vgg8"].to_dict() == {
        ("KD", "reported, best"): "72.98", ("KD", "ours, last"): "70.50 ± 0.71 (2)",
        ("KD", "ours, best"): "71.50 ± 1.41 (2)", ("KD", "difference, best"): "−1.48",
        ("DKD", "reported, best"): "74.68 (last 74.10)",
        ("KD + sort", "ours, last"): "72.00 (1, bfloat16)",
        ("KD + sort", "ours, best"): "73.00 (1, bfloat16)"}
    table = comparison_table(runs.iloc[:0], reported, pairs)
    assert table.index.tolist() == [("KD", "reported, best"), ("DKD", "reported, best")]


def test_effects_are_listed():
    about = {"student": "s", "objective": "kd"}
    frame = pd.DataFrame([
        {"pair": pair, "teacher": f"t{pair}", "method": method, "seed": seed, "last_top1": gain}
        for pair in range(3) for method, gains in (("kd", (0, 0)), ("kd+sort", (0.1 * pair, 0.2)))
        for seed, gain in enumerate(gains)
    ]).assign(**about)
    effects = paired_effects(frame)
    table = effect_table(effects)
    assert table.loc[("t0 → s", "KD + sort − KD")].to_dict() == {
        "seeds": "2", "effect": "+0.10", "95 % interval": "−1.17 to +1.37",
        "verdict": "inconclusive", "better": "75%"}
    planned = effect_table(
        effects.assign(planned=6, images_low=-0.1, images_high=0.4, smallest_effect=0.5))
    row = planned.loc[("t2 → s", "KD + sort − KD")]
    assert (row["seeds"], row["p"]) == ("2 of 6", "< 0.001")
    assert row["over seeds and images"] == "−0.10 to +0.40"
    assert effect_table(effects.iloc[:0]).empty


def test_a_summary_holds_means_and_spreads():
    records = [synthetic_record(method="kd+sort", seed=seed, last_top1=top1, best_above_last=above)
               for seed, top1, above in ((0, 70, 1), (1, 72, 3))]
    assert summarize(records).to_dict("index") == {"kd+sort": {
        "seeds": 2, "top-1 last (%)": "71.00 ± 1.41", "top-1 best (%)": "73.00 ± 2.83",
        "time (s)": "3600", "teacher wrong": "10.0%", "changed": "10.0%"}}
    published = [synthetic_record(method=name, preset="paper") for name in ("kd", "mlkd")]
    assert len(summarize(published)) == 2, "each at its published length"


def test_reported_numbers_have_sources_and_the_slip_is_corrected():
    key = ["dataset", "method", "teacher", "student"]
    assert len(REPORTED) == 138 and REPORTED[["source", "paper"]].notna().all(axis=None)
    assert not REPORTED.duplicated(key).any()
    top1 = REPORTED.set_index(key).top1
    assert top1["cifar100", "kd", "resnet32x4", "ShuffleV2"] == 74.45
    assert top1["cifar100", "dkd", "resnet32x4", "ShuffleV2"] == 77.07
    assert ("cifar100", "kd", "resnet32x4", "MobileNetV2") not in top1.index
    assert top1["imagenet", "dist", "ResNet50", "MobileNetV1"] == 73.24
    logs = REPORTED.dropna(subset="top1_last")
    assert (logs.top1 >= logs.top1_last).all() and set(logs.arxiv) == {"2403.01427"}
    ours = REPORTED[REPORTED.method.isin(["kd", "dkd"]) & (REPORTED.dataset == "cifar100")]
    known = Counter(ours.set_index(["teacher", "student"]).index)
    pairs = {(pair.teacher, pair.student) for name, pair in PAIRS.items() if name != "r32x4_mv2"}
    assert known == dict.fromkeys(pairs, 2)


def test_the_command_writes_tables_of_any_records(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # outside of a clone
    records = Path("results")
    for name, seeds in (("short", (0, 1, 2)), ("quick", (0,))):
        write_lines(records / f"{name}.jsonl", [
            synthetic_record("r56_r20", way, seed, 60 + 3 * number + seed, preset=name, synthetic=False)
            for number, way in enumerate(("kd", "kd+sort")) for seed in seeds])
    every, written = [str(records / f"{name}.jsonl") for name in ("short", "quick")], []
    for _ in range(2):
        assert table_command(every) == 0
        written.append({path.name: path.read_bytes() for path in Path("tables").iterdir()})
    names = {f"{name}.{form}" for name in ("accuracies", "effects") for form in ("md", "tex")}
    assert written[0] == written[1] and written[0].keys() == names | {"curves.pdf"}
    effects = written[0]["effects.md"].decode()
    assert "KD + sort − KD | 3 | +3.00 | +3.00 to +3.00 | gain" in effects
    assert effects.count("QUICK: no evidence") == 1 and "| 1 | +3.00 | – | inconclusive" in effects
    assert table_command(["results", "--output", "other"]) == 0  # a folder, without quick runs
    assert "quick runs are no evidence" in capsys.readouterr().out
    assert "QUICK" not in (tmp_path / "other" / "accuracies.md").read_text()
    with pytest.raises(SystemExit):
        table_command(["--out", "x", *every])


def test_the_command_shows_no_effect_before_its_look(tmp_path, capsys):
    results = NOTEBOOKS.parent / "results"
    early = [line for line in (results / "paper.jsonl").read_text().splitlines(keepends=True)
             if "half-60epochs" in line and json.loads(line)["seed"] < 3]
    write_lines(tmp_path / "results" / "paper.jsonl", [], *early)
    (tmp_path / "results" / "plans").mkdir()
    (tmp_path / "results" / "plans" / "unseen.yaml").write_text(
        (results / "plans" / "unseen.yaml").read_text())
    assert len(early) == 6 and table_command([str(tmp_path / "results"), "--output", str(tmp_path / "t")])
    said = capsys.readouterr()
    assert "until their planned look: unseen" in said.out and "no run can be shown" in said.err
    assert not (tmp_path / "t").exists()


def run_notebook(name, folder, **parameters):
    import papermill
    folders = {"results_dir": str(folder / "results"), "output_dir": str(folder / name)}
    notebook = papermill.execute_notebook(
        NOTEBOOKS / f"{name}.ipynb", folder / f"{name}.ipynb",
        folders | {"synthetic": True} | parameters, progress_bar=False, cwd=NOTEBOOKS.parent)
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", ()))
    text = "".join(str(output.get("text", "")) for output in outputs)
    return text, {path.name: path.read_bytes() for path in sorted((folder / name).iterdir())}


@pytest.fixture(scope="module")
def synthetic_folder(tmp_path_factory):
    folder, generator = tmp_path_factory.mktemp("evidence"), np.random.default_rng(1)
    results, measured = folder / "results", folder / "results" / "measurements" / "benchmarks.jsonl"
    short = synthetic_records({"r56_r20": 0.3}, generator, preset="short", epochs=6, seeds=3)
    write_lines(results / "short.jsonl", short)
    effects = {"r56_r20": 0.3, "r32x4_shuv2": 0.1}
    paper = synthetic_records(effects, generator, preset="paper", seeds=3)
    write_lines(results / "paper.jsonl", paper, json.dumps(paper[0])[:300])
    rows = [
        {"what": "sorting", "setting": "(64, 100)",
         "ms": {"two full sorts": [3.0, 2.9, 3.2], "sort_logits": [1.0, 0.9, 1.1]}},
        {"what": "epoch", "setting": "resnet56 to resnet20, batch 64",
         "ms": {"usual, float32": [9.0, 8.0, 9.5], "ours, float32": [3.0, 2.0, 4.0]}}]
    machines = [{"processor": "a processor"}, {"processor": "a processor", "gpu": "a GPU"}]
    speed = {"benchmark": "speed", "protocol": 2, "rows": rows}
    measurements = [speed | {"machine": each} for each in machines]
    write_lines(measured, [*measurements, {"benchmark": "accuracy"}])
    return folder


def test_tables_are_made_from_records(synthetic_folder):
    text, first = run_notebook("paper_tables", synthetic_folder)
    assert "24 of the published recipe, 12 short ones, 0 others; 1 lines left out" in text
    assert "no table, since it has no row" in text
    assert {Path(name).stem for name in first} == set(  # no planned effect can be shown
        "plans dose same_architecture different_architecture imagenet short_runs short_effect power "
        "left_out".split())
    assert {Path(name).suffix for name in first} == {".md", ".tex"}
    assert all("SYNTHETIC RECORDS" in content.decode() for content in first.values())
    different = first["different_architecture.md"].decode()
    assert "the heading is a slip" in different and "12 of the 120 runs" in different


@pytest.mark.slow
def test_figures_regenerate_to_the_pixel_and_none_is_lost(synthetic_folder, monkeypatch):
    monkeypatch.setenv("SORTKD_DATA", str(synthetic_folder / "no data"))
    kept = synthetic_folder / "paper_figures" / "mistakes.png"
    kept.parent.mkdir()
    kept.write_bytes(b"as committed")
    text, first = run_notebook("paper_figures", synthetic_folder)
    assert "mistakes is left as it is: it needs CIFAR-100" in text
    assert first["mistakes.png"] == b"as committed"
    drawn = ("diagram", "curves_short", "curves_r56_r20", "curves_r32x4_shuv2", "effect_short",
             "repairs", "speed")
    files = {f"{name}.{suffix}" for name in drawn for suffix in ("png", "pdf", "md")}
    assert set(first) == files | {"mistakes.png"}
    pdfs = b"".join(content for name, content in first.items() if name.endswith("pdf"))
    assert b"CreationDate" not in pdfs and b"/Subtype /Type3" not in pdfs
    assert run_notebook("paper_figures", synthetic_folder)[1] == first


@pytest.mark.slow
def test_notebooks_run_where_nothing_is_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("SORTKD_DATA", str(tmp_path / "no data"))
    (tmp_path / "results").mkdir()
    text, tables = run_notebook("paper_tables", tmp_path, synthetic=False)
    assert "the folder holds no file of records" in tables["left_out.md"].decode()
    assert "short_runs.md" not in tables
    written = [content.decode() for name, content in tables.items() if name.endswith("md")]
    assert all(content.count("\n| ") > 2 for content in written)
    text, figures = run_notebook("paper_figures", tmp_path, synthetic=False)
    assert "answer is not drawn" in text
    assert {Path(name).stem for name in figures} == {"diagram", "repairs"}
