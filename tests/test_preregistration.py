"Plans are read, matched with their runs, and were committed before these."
import dataclasses
import functools
import hashlib
import math
import os
import subprocess
from datetime import datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from msgspec.structs import replace
from scipy.stats import ttest_1samp

from sortkd.evidence.answers import compare_plans, effects_on_images, find_answers, give_advice
from sortkd.evidence.preregistration import (Look, describe_looks, describe_plans, mark_planned,
                                             planned_cells, planned_effects, read_plan, read_plans)
from sortkd.evidence.results import load_results

ROOT = Path(__file__).parents[1]
HISTORY = Path(os.environ.get("SORTKD_HISTORY", ROOT))  # a checkout with history, if this has none
FIRST_SCREEN = (ROOT / "results" / "tables" / "first_screen.md").read_text()
READMES = {name: (ROOT / name).read_text() for name in ("README.md", "results/README.md")}
PLANS = read_plans(ROOT / "results" / "plans")
NAMED = {plan.name: plan for plan in PLANS}
SORTING, BASELINE = NAMED["sorting"], NAMED["baseline"]


@functools.cache
def recorded():
    return load_results(ROOT / "results")[0]


def git(*arguments, folder=HISTORY, check=True, **options):
    command = ["git", "-C", folder, "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    return subprocess.run(command, check=check, capture_output=True, **options).stdout


def start_of(run):
    return datetime.strptime(run.started, "%Y-%m-%dT%H-%M-%S.%f%z")


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
def test_a_plan_was_committed_before_its_first_run_and_kept(plan):
    marked, file = mark_planned(recorded(), [plan]), f"results/plans/{plan.name}.yaml"
    began = min(map(start_of, marked[marked.plan == plan.name].itertuples()), default=None)
    if began is None:
        pytest.skip("none of its runs exists")
    history = git("log", "--diff-filter=A", "--format=%cI %P", "--", file, check=False, text=True)
    date, *parents = history.partition("\n")[0].split() or [""]
    if not parents:  # a first commit imports a history
        pytest.skip(f"{HISTORY} does not have the history of the plan")
    assert datetime.fromisoformat(date) < began
    # It says what it said when the first run began, but for more seeds if a blind look allows them.
    before = f"--before={began.isoformat()}"
    commit = git("log", "-1", "--format=%H", before, "--", file, text=True).strip()
    then = yaml.safe_load(git("show", f"{commit}:{file}"))
    now = yaml.safe_load((ROOT / file).read_text())
    if any("seeds" in look.may for look in plan.looks) and now["seeds"] >= then["seeds"]:
        then["seeds"] = now["seeds"]
    assert then == now


def test_records_name_a_version_of_their_plan_that_was_committed_before_they_began():
    runs = recorded()
    said = runs[runs["plan_sha256"] != ""]
    history = git("log", "--format=%H %cI", "--", "results/plans", check=False, text=True)
    if len(said) == 0 or history.count("\n") < 2:
        pytest.skip("no record names its plan, or there is no history")
    versions = {}
    for commit, date in map(str.split, history.splitlines()):
        for plan in PLANS:
            content = git("show", f"{commit}:results/plans/{plan.name}.yaml", check=False)
            versions[hashlib.sha256(content).hexdigest()] = datetime.fromisoformat(date)
    assert all(versions[run.plan_sha256] < start_of(run) for run in said.itertuples())


def runs_of(plan, gain=1.0, noise=0.3, **changes):
    "Runs of all cells of a plan; KD gains 5 points, and sorting `gain` more, on other images."
    cells = plan.grid.cells.assign(
        preset=plan.grid.preset, epochs=plan.grid.options.get("epochs", 240))
    sorts, alone = cells.method == "kd+sort", cells.method == "ce"
    top1 = 60 + np.random.default_rng(0).normal(0, noise, len(cells)) + gain * sorts - 5 * alone
    same = dict.fromkeys(["teacher", "student", "recipe", "data_checksum", "precision", "synthetic",
                          "method_settings", "lr"], "same")
    return cells.assign(
        teacher_file=Path(plan.grid.options.get("teacher", "")).name, plan_sha256="",
        teacher_sha256=np.where(alone, "", plan.teacher_sha256 or ""), objective=cells.method.str.split("+").str[0],
        repair=sorts.map({True: "sort", False: "none"}), last_top1=top1, unseen_top1=top1,
        correct=[np.arange(500) < 5 * each for each in top1], wrong_share=np.where(alone, None, 0.3),
        run_id=[f"{plan.name}{number}" for number in range(len(cells))],
        started="2026-11-26T01-02-03.000004Z", **plan.same, **same, **{"device": "cpu", **changes})


def test_a_comparison_with_the_runs_of_another_plan():
    runs = pd.concat([runs_of(SORTING), runs_of(BASELINE)], ignore_index=True)
    effects = planned_effects(SORTING, PLANS, runs)
    assert effects.seeds.tolist() == [15, 6] == effects.planned.tolist()
    assert [*effects.verdict] == ["gain", "gain"] and [*effects.p_holm.notna()] == [False, True]
    assert planned_effects(BASELINE, PLANS, runs).empty


def test_the_machine_does_not_count():
    runs = pd.concat([runs_of(SORTING), runs_of(BASELINE)], ignore_index=True)
    on_cpu = (runs.method == "ce") | (runs.seed > 12)
    other = runs.assign(device=np.where(on_cpu, "cpu", "cuda"))
    by_seed = other.assign(precision=np.where(runs.seed > 12, "float32", "bfloat16"))
    effects = [planned_effects(SORTING, PLANS, each) for each in (by_seed, other, runs)]
    pd.testing.assert_frame_equal(*effects[:2])
    pd.testing.assert_frame_equal(*effects[1:])
    assert (mark_planned(other, PLANS)["plan"] != "").all()
    assert describe_plans(PLANS, other).set_index("plan").exist["baseline"] == 6
    for within_a_seed in (other.device, runs.method):
        with pytest.raises(ValueError, match="precision"):
            planned_effects(SORTING, PLANS, other.assign(precision=within_a_seed))


def test_an_effect_is_shown_when_its_look_is_reached():
    runs = runs_of(SORTING)  # a blind look after 5 seeds, the effect after 15
    for seeds in (0, 1, 4, 5, 14):
        some = runs[runs.seed < seeds]
        assert planned_effects(SORTING, PLANS, some).empty
        line = describe_looks(SORTING, PLANS, some)[0]
        assert line.startswith(f"kd+sort minus kd: {seeds} of 15 seeds, to be looked at after 15")
        assert ("standard deviation of the first 5 differences" in line) == (seeds >= 5)
    # Another look at the effect after 10 seeds: until 15 exist, the effect is that of the ten.
    twice = replace(SORTING, looks=[Look(10, "the effect"), Look(15, "the effect")])
    ten, twelve, all_seeds = (planned_effects(twice, PLANS, runs[runs.seed < seeds])
                              for seeds in (10, 12, 15))
    assert ten.seeds[0] == 10 and ten.equals(twelve) and all_seeds.seeds[0] == 15
    line = describe_looks(twice, PLANS, runs[runs.seed < 12])[0]
    assert "12 of 15 seeds, looked at after 10, to be looked at after 15" in line


def test_runs_are_matched_with_the_cells_that_planned_them():
    runs = runs_of(SORTING)
    assert (mark_planned(runs, PLANS)["plan"] == "sorting").all()
    assert planned_cells(SORTING, runs).run_id.notna().all()
    changes = '{"lr": 0.1}'
    for other in ({"epochs": 5}, {"teacher_sha256": "another's"}, {"preset": "short"},
                  {"pair": "r56_r20"}, {"train_images": 20_000}, {"data": "cifar10"},
                  {"recipe_changes": changes}):
        assert (mark_planned(runs.assign(**other), [SORTING])["plan"] == "").all()
    grid = dataclasses.replace(SORTING.grid, options=SORTING.grid.options | {"recipe": "lr=0.1"})
    faster = replace(SORTING, grid=grid)
    assert (mark_planned(runs.assign(recipe_changes=changes), [faster])["plan"] == "sorting").all()
    assert (mark_planned(runs, [faster])["plan"] == "").all()
    effect, = planned_effects(SORTING, PLANS, runs).itertuples()
    assert effect.comparison == "kd+sort minus kd" and effect.seeds == effect.planned == 15
    assert math.isnan(effect.p_holm) and 0 < effect.images_low < effect.mean < effect.images_high
    assert planned_effects(SORTING, PLANS, runs.assign(correct=None)).images_low.isna().all()
    table = describe_plans([SORTING], runs[runs.seed < 3])
    assert table.methods.tolist() == ["kd, kd+sort", ""] and table.planned.tolist() == [30, 0]
    assert table.exist.tolist() == [6, 0] and table["name it"].tolist() == [0, 0]


WAITING = ["unseen", "few_labels", "few_labels_weak", "noise40"]


def answers_of(*runs):
    plans = [NAMED[name] for name in WAITING]
    return find_answers(plans, mark_planned(pd.concat(runs, ignore_index=True), plans))


@pytest.mark.parametrize("name", WAITING)
def test_a_setting_joins_when_its_look_is_reached_and_not_before(name):
    runs, planned = runs_of(NAMED[name]), NAMED[name].grid.cells["seed"].nunique()
    assert answers_of(runs[runs.seed < planned - 1]).empty
    (row,) = answers_of(runs).to_dict("records")
    assert row["seeds"] == row["seeds_kd"] == planned and row["verdict_kd"] == "gain"
    assert row["noise"] == (0.4 if name == "noise40" else 0) and "wrong on 30 %" in row["setting"]


@pytest.mark.parametrize(("gain", "noise", "gains", "loses"), [
    (3, 0.3, "unseen", "none"), (-3, 0.3, "none", "unseen"), (0, 0.1, "none", "none"),
    (0.5, 9, "none", "none")])
def test_advice_says_what_the_verdicts_say(gain, noise, gains, loses):
    answers = answers_of(runs_of(NAMED["unseen"], gain, noise))
    advice, (row,) = give_advice(answers, ["other pairs"]), answers.to_dict("records")
    assert f"1 planned settings, sorting gains in {gains} and loses in {loses}" in advice
    assert (f"{row['mean']:+.2f} (".replace("-", "−") in advice) == (row["verdict_kd"] == "gain") == (noise < 9)
    assert f"{row['high']:+.2f}".replace("-", "−") in advice and "Not shown: other pairs" in advice


@pytest.mark.parametrize(("gain", "answer"), [(3, "growing"), (-1, "shrinking"), (1, "inconclusive")])
def test_a_question_over_two_plans_waits_for_both(gain, answer):
    less, more = runs_of(NAMED["few_labels"], noise=0.6), runs_of(NAMED["few_labels_weak"], gain)
    more = more[more.method != "ce"]  # those of `less`
    assert compare_plans(answers_of(less, more[more.seed < 15])).empty
    found = compare_plans(answers_of(less, more))
    effects = [runs.pivot(index="seed", columns="method", values="last_top1") for runs in (more, less)]
    test = ttest_1samp(np.subtract(*(each["kd+sort"] - each["kd"] for each in effects)), 0)
    assert [*found[["low", "high"]].iloc[0]] == pytest.approx([*test.confidence_interval()])
    assert found.answer.tolist() == [answer]
    noisy = compare_plans(answers_of(less, runs_of(NAMED["noise40"], -9)), "noise40")
    assert noisy.answer.tolist() == ["shrinking"] and noisy.seeds.tolist() == [8]


def test_an_effect_is_told_apart_by_what_the_teacher_gets_right():
    runs, right = runs_of(NAMED["few_steps"], noise=0), np.arange(500) < 300
    effects = effects_on_images(runs, right).set_index("images")["mean"]  # image 300 to 305 gained
    assert effects.tolist() == pytest.approx([0, 2.5, 2.5])


def test_what_readers_see_is_what_the_records_say():
    answers = find_answers(PLANS, mark_planned(recorded(), PLANS))
    *_, advice = [line for line in FIRST_SCREEN.splitlines() if line.startswith("Use it if")]
    assert advice.startswith(give_advice(answers, [""]).removesuffix("."))
    rows = [line for line in FIRST_SCREEN.splitlines() if line.startswith("| ")][2:]
    assert len(rows) == len(answers) + 1 and advice in READMES["results/README.md"]
    for row, answer in zip(rows, answers.itertuples()):
        assert f"{answer.name}: {answer.setting} |" in row and f"{answer.verdict} (±" in row
    for name, text in READMES.items():
        for row in rows:
            assert row in text or row.split("|")[1] not in text, f"{name}: copy {row}"


def test_nothing_is_chosen_in_silence():
    runs = runs_of(SORTING)
    with pytest.raises(ValueError, match="sorting have several runs: sorting0, x"):
        planned_cells(SORTING, pd.concat([runs, runs[:1].assign(run_id="x")]))
    unknown = replace(SORTING, teacher_sha256=None)  # without its file, the name must do
    assert planned_cells(unknown, runs).run_id.notna().all()
    with pytest.raises(ValueError, match="2 different values of teacher_sha256"):
        mixed = runs.assign(teacher_sha256=np.where(runs.seed < 3, "a", "b"))
        planned_effects(replace(unknown, beside=[], comparisons=[]), PLANS, mixed)


@pytest.mark.parametrize(("change", "said"), [
    ({"plan": None}, "the section plan"), ({"plan": {"question": "?"}}, "the section plan"),
    ({"primary": "kd+sort minus dkd", "beside": []}, "a method in .* is 'dkd'"),
    ({"comparisons": ["kd"]}, "a comparison is 'kd'"), ({"methods": ["kdd"]}, "kdd"),
    ({"beside": "baseline"}, r"Expected `array`.*\$.beside"), ({"outcome": "top1"}, "'top1'.*outcome"),
    ({"smallest_effect": "large"}, "smallest_effect"), ({"looks": [{"when": 5}]}, r"looks\[0\]"),
    ({"looks": [{"after": 1, "at": "all"}]}, ">= 2.*after"),
    ({"looks": [{"after": 5, "at": "all", "mya": "seeds"}]}, "unknown field `mya`"),
    ({"options": {}}, "does not name its teacher")])
def test_what_a_plan_lacks_is_named(change, said, tmp_path):
    settings = yaml.safe_load((ROOT / "results" / "plans" / "sorting.yaml").read_text())
    for name, value in change.items():
        (settings["plan"] if name in settings["plan"] else settings)[name] = value
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(ValueError, match=said):
        read_plan(tmp_path / "plan.yaml")
