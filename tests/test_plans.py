"Plans are read, matched with their runs, and were committed before these."

import functools
import hashlib
import math
import os
import subprocess
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from sortkd.evidence.preregistration import Look, committed, describe_looks, describe_plans, first_start, mark_planned, planned_cells, planned_effects, read_plan, read_plans
from sortkd.evidence.results import load_results

ROOT = Path(__file__).parents[1]
HISTORY = Path(os.environ.get("SORTKD_HISTORY", ROOT))  # a checkout with its history, where the tests run in a copy without
PLANS = read_plans(ROOT / "results" / "plans")


@functools.cache
def recorded():
    return load_results(ROOT / "results")[0]


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
def test_a_plan_was_committed_before_its_first_run_and_kept(plan):
    runs = recorded()
    began = first_start(plan, runs)
    if began is None:
        pytest.skip("none of its runs exists")
    date = committed(HISTORY / "results" / "plans" / f"{plan.name}.yaml")
    if date is None:
        pytest.skip(f"{HISTORY} does not have the history of the plan")
    assert date < began
    # What it said when the first run began is what it says today, but for more seeds where a blind look allows them.
    file = f"results/plans/{plan.name}.yaml"
    commit = subprocess.run(["git", "-C", HISTORY, "log", "-1", "--format=%H", f"--before={began.isoformat()}", "--", file],
                            check=True, capture_output=True, text=True).stdout.strip()
    then, now = (yaml.safe_load(text) for text in (
        subprocess.run(["git", "-C", HISTORY, "show", f"{commit}:{file}"], check=True, capture_output=True, text=True).stdout,
        (ROOT / file).read_text()))
    more_seeds = any("seeds" in look.may for look in plan.looks)
    assert then | ({"seeds": now["seeds"]} if more_seeds and now["seeds"] >= then["seeds"] else {}) == now


def test_the_date_is_that_of_the_first_commit(tmp_path):
    def git(*arguments, date="2026-01-01T00:00:00+00:00"):
        subprocess.run(["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *arguments], check=True,
                       capture_output=True, env=os.environ | {"GIT_COMMITTER_DATE": date})

    git("init", "-q")
    (tmp_path / "root.yaml").write_text("imported: true\n")
    git("add", "."), git("commit", "-qm", "all that there was")
    file = tmp_path / "plan.yaml"
    for day, text in (("02", "seeds: 15\n"), ("03", "seeds: 24\n")):
        file.write_text(text)
        git("add", "."), git("commit", "-qm", text, date=f"2026-01-{day}T00:00:00+00:00")
    assert committed(file).day == 2
    assert committed(tmp_path / "root.yaml") is None and committed(tmp_path / "nothing.yaml") is None


def runs_of(plan, **changes):
    cells = plan.grid.cells.assign(preset=plan.grid.preset, epochs=plan.grid.options.get("epochs", 240))
    teacher = Path(plan.grid.options.get("teacher", "")).name
    return cells.assign(teacher_file=teacher, teacher_sha256=plan.teacher_sha256 or "", code_sha256="", plan_sha256="", objective=cells.method.str.split("+").str[0], run_id=[str(n) for n in range(len(cells))],
                        started="2026-11-26T01-02-03.000004Z", data="cifar100", train_images=50_000, test_images=10_000, recipe_changes="{}", **{"device": "cpu", **changes})


def measured(runs):
    "Runs with the columns that a table needs; sorting gains a point."
    noise = np.random.default_rng(0).normal(0, 0.3, len(runs))
    return runs.assign(last_top1=60 + noise + (runs.method == "kd+sort"), repair=runs.method.str.contains("sort").map({True: "sort", False: "none"}),
                       correct=[np.arange(500) < 5 * top1 for top1 in 60 + noise + (runs.method == "kd+sort")],
                       **dict.fromkeys(["teacher", "student", "recipe", "data_checksum", "precision", "device", "synthetic",
                                        "method_settings", "lr"], "same"))


def test_a_comparison_with_the_runs_of_another_plan():
    sorting, baseline = (next(each for each in PLANS if each.name == name) for name in ("sorting", "baseline"))
    runs = measured(pd.concat([runs_of(sorting), runs_of(baseline).assign(run_id=[f"ce{n}" for n in range(6)])], ignore_index=True))
    runs.loc[runs.method == "ce", "last_top1"] -= 5
    effects = planned_effects(sorting, PLANS, runs).set_index("comparison")
    assert effects.seeds.tolist() == [15, 6] and effects.verdict.tolist() == ["gain", "gain"]
    assert effects.planned.tolist() == [15, 6] and effects.p_holm.notna().tolist() == [False, True]
    assert planned_effects(baseline, PLANS, runs).empty


def test_the_machine_does_not_count():
    sorting, baseline = (next(each for each in PLANS if each.name == name) for name in ("sorting", "baseline"))
    runs = measured(pd.concat([runs_of(sorting), runs_of(baseline).assign(run_id=[f"ce{n}" for n in range(6)])], ignore_index=True))
    other = runs.assign(device=np.where((runs.method == "ce") | (runs.seed > 12), "cpu", "cuda"))
    pd.testing.assert_frame_equal(planned_effects(sorting, PLANS, other), planned_effects(sorting, PLANS, runs))
    assert (mark_planned(other, PLANS)["plan"] != "").all() and describe_plans(PLANS, other).set_index("plan").exist["baseline"] == 6
    earlier = other.assign(started=np.where(other.device == "cpu", "2026-11-26T00-00-00.000000Z", other.started))
    assert first_start(sorting, earlier) < first_start(sorting, runs)
    with pytest.raises(ValueError, match="precision"):
        planned_effects(sorting, PLANS, other.assign(precision=other.device))


def test_an_effect_is_shown_when_its_look_is_reached():
    sorting = next(each for each in PLANS if each.name == "sorting")  # a blind look after 5 seeds, the effect after 15
    runs = measured(runs_of(sorting))
    for seeds in (0, 1, 4, 5, 14):
        some = runs[runs.seed < seeds]
        assert planned_effects(sorting, PLANS, some).empty
        line = describe_looks(sorting, PLANS, some)[0]
        assert line.startswith(f"kd+sort minus kd: {seeds} of 15 seeds, to be looked at after 15")
        assert ("standard deviation of the first 5 differences" in line) == (seeds >= 5)
    # Another look at the effect after 10 seeds: until 15 are there, their effect is the one of the ten.
    twice = replace(sorting, looks=(Look(10, "the effect"), Look(15, "the effect")))
    ten, twelve = (planned_effects(twice, PLANS, runs[runs.seed < seeds]) for seeds in (10, 12))
    assert ten.seeds[0] == twelve.seeds[0] == 10 and ten.equals(twelve) and planned_effects(twice, PLANS, runs).seeds[0] == 15
    assert "12 of 15 seeds, looked at after 10, to be looked at after 15" in describe_looks(twice, PLANS, runs[runs.seed < 12])[0]


def test_runs_are_matched_with_the_cells_that_planned_them():
    plan = next(each for each in PLANS if each.name == "sorting")
    runs = runs_of(plan)
    assert (mark_planned(runs, PLANS)["plan"] == "sorting").all() and planned_cells(plan, runs).run_id.notna().all()
    assert first_start(plan, runs).microsecond == 4
    for other in ({"epochs": 5}, {"teacher_sha256": "another's"}, {"preset": "short"}, {"pair": "r56_r20"}, {"train_images": 20_000}, {"data": "cifar10"},
                  {"recipe_changes": '{"lr": 0.1}'}):
        assert (mark_planned(runs.assign(**other), [plan])["plan"] == "").all()
    faster = replace(plan, grid=replace(plan.grid, options=plan.grid.options | {"recipe": "lr=0.1"}))
    assert (mark_planned(runs.assign(recipe_changes='{"lr": 0.1}'), [faster])["plan"] == "sorting").all() and (mark_planned(runs, [faster])["plan"] == "").all()
    effects = planned_effects(plan, PLANS, measured(runs))
    assert effects.comparison.tolist() == ["kd+sort minus kd"] and effects.seeds[0] == effects.planned[0] == 15 and math.isnan(effects.p_holm[0])
    assert 0 < effects.images_low[0] < effects["mean"][0] < effects.images_high[0]
    assert planned_effects(plan, PLANS, measured(runs).assign(correct=None)).images_low.isna().all()
    table = describe_plans([plan], runs[runs.seed < 3])
    assert table.methods.tolist() == ["kd, kd+sort", ""] and table.planned.tolist() == [30, 0] and table.exist.tolist() == [6, 0] and table["name it"].tolist() == [0, 0]


def test_nothing_is_chosen_in_silence():
    plan = next(each for each in PLANS if each.name == "sorting")
    runs = runs_of(plan)
    with pytest.raises(ValueError, match="sorting has 2 runs: 0, x"):
        planned_cells(plan, pd.concat([runs, runs[:1].assign(run_id="x")]))
    unknown = replace(plan, teacher_sha256=None)  # its file is not there, so that the name must do
    assert planned_cells(unknown, runs).run_id.notna().all()
    with pytest.raises(ValueError, match="one name and 2 different weights"):
        planned_cells(unknown, runs.assign(teacher_sha256=np.where(runs.seed < 3, "a", "b")))


def test_records_name_a_version_of_their_plan_that_was_committed_before_they_began():
    runs = recorded()
    said = runs[runs["plan_sha256"] != ""]
    history = subprocess.run(["git", "-C", HISTORY, "log", "--format=%H %cI", "--", "results/plans"], capture_output=True, text=True).stdout.split("\n")
    if len(said) == 0 or len(history) < 3:
        pytest.skip("no record names its plan, or there is no history")
    versions = {}
    for commit, date in (line.split() for line in history if line):
        for plan in PLANS:
            shown = subprocess.run(["git", "-C", HISTORY, "show", f"{commit}:results/plans/{plan.name}.yaml"], capture_output=True)
            versions[hashlib.sha256(shown.stdout).hexdigest()] = datetime.fromisoformat(date)  # the first comes last
    for run in said.itertuples():
        assert versions[run.plan_sha256] < datetime.strptime(run.started, "%Y-%m-%dT%H-%M-%S.%f%z")


@pytest.mark.parametrize(("change", "said"), [
    ({"plan": None}, "the section plan"), ({"plan": {"question": "?"}}, "the section plan"),
    ({"primary": "kd+sort minus dkd", "beside": []}, "a method in 'kd\\+sort minus dkd' is 'dkd'"), ({"comparisons": ["kd"]}, "a comparison is 'kd'"),
    ({"beside": "baseline"}, "beside of .* is 'baseline'"), ({"outcome": "top1"}, "outcome is 'top1'"),
    ({"smallest_effect": "large"}, "smallest_effect"), ({"looks": [{"after": 1, "at": "all"}]}, "after is 1"),
    ({"looks": [{"when": 5}]}, "a look of"), ({"options": {}}, "does not name its teacher"), ({"methods": ["kdd"]}, "kdd"),
])
def test_what_a_plan_lacks_is_named(change, said, tmp_path):
    settings = yaml.safe_load((ROOT / "results" / "plans" / "sorting.yaml").read_text())
    for name, value in change.items():
        (settings["plan"] if name in settings["plan"] else settings)[name] = value
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(ValueError, match=said):
        read_plan(tmp_path / "plan.yaml")
