"""Build the page to look instead of read: python site/explorer/build.py OUTDIR

The folder works from a disk: no server, no network. The browser repairs logits by itself (mechanism.js); effects, intervals and
verdicts are computed here, by sortkd.
"""

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path

import pandas as pd
from plotly.offline import get_plotlyjs

from sortkd.evidence.preregistration import Plan, describe_looks, describe_plans, mark_planned, planned_cells, planned_effects, read_plans
from sortkd.evidence.results import load_results, select
from sortkd.evidence.statistics import compare, verdicts
from sortkd.evidence.tables import method_title

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "results"
PAGE = ("index.html", "style.css", "mechanism.js", "page.js")
RUN = ["run_id", "pair_title", "length", "method", "seed", "last_top1", "best_top1", "teacher_file", "plan", "file", "diverged"]
EFFECT = ["pair_title", "length", "teacher_file", "comparison", "methods", "seeds", "mean", "low", "high", "level", "verdict",
          "smallest_effect", "differences", "plan", "planned", "reason"]


def records_of(frame: pd.DataFrame, columns: Sequence[str]) -> list[dict]:
    "Rows as JSON has them: NaN is null."
    return json.loads(frame.reindex(columns=columns).to_json(orient="records", double_precision=15))


def comparable(runs: pd.DataFrame) -> Iterator[pd.DataFrame]:
    "The runs that may share a table, for each teacher; a method without a teacher goes with any."
    same = ["pair", "preset", "recipe", "data_checksum", "train_images", "test_images", "precision", "device"]
    for _, group in runs.groupby(same, sort=False):
        for teacher in [file for file in group["teacher_file"].unique() if file] or [""]:
            yield group[group["teacher_file"].isin([teacher, ""])]


def length(preset: str, epochs: int, images: int) -> str:
    return f"{preset}: {epochs} epochs of {images:,} images"


def planned_comparisons(runs: pd.DataFrame, plans: Sequence[Plan]) -> pd.DataFrame:
    "The effects that plans ask for; before its look is reached, one has a `reason` in place of numbers."
    parts = []
    for plan in plans:
        cells = planned_cells(plan, runs)
        effects = planned_effects(plan, plans, runs)
        waiting = [{"pair": pair, "comparison": comparison, "reason": f"Planned ({plan.name}): {line}."}
                   for comparison, line in zip(plan.all_comparisons, describe_looks(plan, plans, runs)) if comparison not in set(effects["comparison"])
                   for pair in cells["pair"].unique()]
        known = {"length": length(plan.grid.preset, cells["epochs"].iloc[0], plan.same["train_images"]), "plan": plan.name,
                 "teacher_file": Path(plan.grid.options.get("teacher", "")).name, "smallest_effect": plan.smallest_effect, "level": 1 - plan.level}
        parts += [part.assign(**known) for part in (effects, pd.DataFrame(waiting)) if len(part)]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=EFFECT)


def other_comparisons(runs: pd.DataFrame, planned: set[str]) -> pd.DataFrame:
    "The effects between any two methods that share a seed, as a plan has it or repaired minus plain; with a `reason` where they share no table."
    parts = [compare(runs, "", "")]
    for group in comparable(runs):
        known = {"length": group["length"].iloc[0], "teacher_file": max(group["teacher_file"]), "smallest_effect": 0.5, "level": 0.95, "plan": ""}
        for plain, repaired in combinations(sorted(group["method"].unique(), key=lambda name: ("+" in name, name)), 2):
            if f"{plain} minus {repaired}" in planned:
                plain, repaired = repaired, plain
            try:
                effects = compare(select(group, method=[plain, repaired]), repaired, plain)
            except ValueError as error:
                effects = pd.DataFrame([{"comparison": f"{repaired} minus {plain}", "pair": group["pair"].iloc[0], "reason": str(error)}])
            parts.append(effects.assign(**known))
    return verdicts(pd.concat([part for part in parts if len(part)] or parts, ignore_index=True))


def results_data(runs: pd.DataFrame, left_out: pd.DataFrame, plans: Sequence[Plan]) -> dict:
    "What the page shows of `load_results`."
    lengths = [length(run.preset, json.loads(run.recipe)["epochs"], run.train_images) for run in runs.itertuples()]
    runs = mark_planned(runs, plans).assign(length=lengths, pair_title=runs["teacher"] + " → " + runs["student"])
    planned = planned_comparisons(runs, plans)
    effects = pd.concat([planned, other_comparisons(runs, {*planned["comparison"]})], ignore_index=True)
    effects["pair_title"] = effects["pair"].map(dict(zip(runs["pair"], runs["pair_title"])))
    effects["methods"] = [sorted(each.split(" minus ")) for each in effects["comparison"]]
    again = effects.assign(methods=effects["methods"].map(str)).duplicated(["pair", "length", "teacher_file", "methods"])  # planned ones come first
    curves = [{name: run[name] for name in ("epoch", "test_top1")} for run in runs["curve"]]
    return {
        "runs": [run | {"curve": curve} for run, curve in zip(records_of(runs, RUN), curves)],
        "effects": records_of(effects[~again], EFFECT),
        "titles": {name: method_title(name) for name in sorted({*runs["method"], *effects["methods"].explode().dropna()})},
        "plans": records_of(describe_plans(plans, runs), ["plan", "methods", "planned", "exist"]) if plans else [],
        "questions": {plan.name: plan.question for plan in plans},
        "left_out": records_of(left_out, ["file", "line", "reason"]),
    }


def build(out: Path, results: Path = RESULTS) -> None:
    "Write the page into the folder `out`."
    out.mkdir(parents=True, exist_ok=True)
    data = json.loads((HERE / "examples.json").read_text()) | results_data(*load_results(results), read_plans(results / "plans"))
    (out / "data.js").write_text(f"const DATA = {json.dumps(data, ensure_ascii=False)};\n", encoding="utf-8")
    (out / "plotly.min.js").write_text(get_plotlyjs(), encoding="utf-8")
    for name in PAGE:
        shutil.copyfile(HERE / name, out / name)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__.splitlines()[0])
    build(Path(sys.argv[1]))
    print(f"open {Path(sys.argv[1]) / 'index.html'}")
