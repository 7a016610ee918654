"""Build the page to look instead of read: python site/explorer/build.py OUTDIR

The folder works from a disk: no server, no network. The browser repairs logits by itself (mechanism.js); means, intervals and
verdicts are computed here, by sortkd.
"""

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
from plotly.offline import get_plotlyjs

from sortkd.evidence.preregistration import Plan, mark_planned, planned_effects, read_plans
from sortkd.evidence.results import load_results, select
from sortkd.evidence.statistics import compare, t_half_width, verdicts
from sortkd.evidence.tables import method_title

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "results"
PAGE = ("index.html", "style.css", "mechanism.js", "page.js")
EFFECT = ["comparison", "methods", "seeds", "mean", "low", "high", "level", "verdict", "smallest_effect", "differences", "plan", "planned", "reason"]


def records_of(frame: pd.DataFrame) -> list[dict]:
    "Rows as JSON has them: NaN is null."
    return json.loads(frame.to_json(orient="records", double_precision=15))


def line_of(method: str, runs: pd.DataFrame) -> dict:
    "The curves of a method's runs; their mean, and half its 95 % t interval, over those that did not diverge."
    whole = np.array([curve["test_top1"] for curve in runs.loc[~runs["diverged"], "curve"]])
    half = t_half_width(whole.std(0, ddof=1), len(whole)) if len(whole) > 1 else np.zeros(0)
    shown = runs[["seed", "last_top1", "best_top1", "plan", "diverged"]].assign(top1=[curve["test_top1"] for curve in runs["curve"]])
    return {"method": method, "mean": whole.mean(0).tolist() if len(whole) else [], "half": half.tolist(), "count": len(whole),
            "runs": records_of(shown.sort_values("seed"))}


def effects_of(runs: pd.DataFrame, planned: pd.DataFrame) -> pd.DataFrame:
    "The planned effects, then those between any other two methods: repaired minus plain, with a `reason` where they share no table."
    parts, known = [], {frozenset(each.split(" minus ")) for each in planned["comparison"]}
    for plain, repaired in combinations(sorted(runs["method"].unique(), key=lambda name: ("+" in name, name != "ce", name)), 2):
        if {plain, repaired} not in known:
            try:
                parts.append(compare(select(runs, method=[plain, repaired]), repaired, plain))
            except ValueError as error:
                parts.append(pd.DataFrame([{"comparison": f"{repaired} minus {plain}", "reason": str(error)}]))
    others = verdicts(pd.concat([compare(runs[:0], "", ""), *parts])).assign(smallest_effect=0.5, level=0.95, plan="")
    effects = pd.concat([planned, others], ignore_index=True)
    return effects.assign(methods=[sorted(each.split(" minus ")) for each in effects["comparison"]]).reindex(columns=EFFECT)


def settings(runs: pd.DataFrame, planned: pd.DataFrame) -> Iterator[dict]:
    "What can share a plot: the runs with one teacher, and those without any, on the same data for as long."
    for (teacher, data, length), group in runs.groupby(["student", "data_title", "length"], sort=False):
        for file in [name for name in group["teacher_file"].unique() if name] or [""]:
            own = group[group["teacher_file"].isin([file, ""])]
            yield {"teacher": f"{Path(file).stem or 'none'} → {teacher}", "data": data, "epochs": length,
                   "lines": [line_of(method, part) for method, part in own.groupby("method")],
                   "effects": records_of(effects_of(own, planned[planned["plan"].isin(own["plan"])]))}


def results_data(runs: pd.DataFrame, plans: Sequence[Plan]) -> dict:
    "What the page shows of `load_results`; nothing of a plan whose look has not been reached."
    planned, waiting = [compare(runs[:0], "", "").assign(plan="")], []
    for plan in plans:
        effects = planned_effects(plan, plans, runs)
        planned.append(effects.assign(smallest_effect=plan.smallest_effect, level=1 - plan.level))
        if plan.all_comparisons and not len(effects):
            waiting.append(plan.name)
    runs = mark_planned(runs, plans)
    runs = runs[~runs["plan"].isin(waiting)]
    epochs = runs["recipe"].map(lambda recipe: json.loads(recipe)["epochs"])
    images = runs["train_images"].map("{:,}".format)
    runs = runs.assign(length=runs["preset"] + ": " + epochs.astype(str) + " epochs", data_title=images + " images of " + runs["data"])
    found = settings(runs, pd.concat(planned, ignore_index=True))
    return {"settings": sorted(found, key=lambda setting: setting["teacher"]), "waiting": waiting,
            "titles": {name: method_title(name) for name in runs["method"].unique()}}


def build(out: Path, results: Path = RESULTS) -> None:
    "Write the page into the folder `out`."
    out.mkdir(parents=True, exist_ok=True)
    runs, _ = load_results(results)
    data = json.loads((HERE / "examples.json").read_text()) | results_data(runs, read_plans(results / "plans"))
    (out / "data.js").write_text(f"const DATA = {json.dumps(data, ensure_ascii=False)};\n", encoding="utf-8")
    (out / "plotly.min.js").write_text(get_plotlyjs(), encoding="utf-8")
    for name in PAGE:
        shutil.copyfile(HERE / name, out / name)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__.splitlines()[0])
    build(Path(sys.argv[1]))
    print(f"open {Path(sys.argv[1]) / 'index.html'}")
