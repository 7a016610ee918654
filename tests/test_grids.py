"A grid in slices: what comes next, what fits, and the numbers of an uncut run after cuts."
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from synthetic import synthetic_record

from sortkd.experiment.grid import make_grid, paper_grid
from sortkd.experiment import slices
from sortkd.experiment.pairs import PAIRS
from sortkd.experiment.storage import append_record, read_records
from sortkd.experiment.record import compare_runs
from sortkd.experiment.provenance import describe_machine
from sortkd.experiment.one_run import prepare_run
from sortkd.experiment.run import run_experiment
from sortkd.experiment.setup import prepare_experiment
from sortkd.experiment.slices import (
    describe_forecast, forecast, in_order, main, read_state, run_slice, speed_of, work_of,
)
from sortkd.train.checkpoints import Stopped
from sortkd.train.networks import create_model
from sortkd.train.teachers import load_teacher, save_teacher

PAIR = "resnet20:resnet8"
SETTINGS = {
    "pairs": [PAIR], "methods": ["kd", "kd+sort"], "seeds": 2, "preset": "quick",
    "options": {"dataset": "digits", "epochs": 3, "train_size": 200, "test_size": 100,
                "device": "cpu", "precision": "float32", "cache": "off"},
}


def places_in(folder):
    return {f"{name}_dir": str(folder / name) for name in ("results", "teachers")}


def grid_in(folder, **changes):
    return make_grid({**SETTINGS, **places_in(folder), **changes})


# The grid


@pytest.mark.parametrize(("change", "said"), [
    ({"seed": 1}, "a key of the grid is 'seed'.*Did you mean 'seeds'"),
    ({"pairs": ["r56_r2"]}, "pair is 'r56_r2'.*r56_r20"), ({"pairs": []}, "pairs is"),
    ({"methods": ["kd+sorted"]}, "sort"), ({"methods": None}, "methods is 'None'"),
    ({"methods": ["kd", "kd"]}, "methods is"), ({"seeds": 0}, "seeds is 0"),
    ({"seeds": "all"}, "seeds is 'all'"), ({"seeds": 1.5}, "seeds is 1.5"),
    ({"preset": "full"}, "preset is 'full'"), ({"options": 5}, "options is 5"),
    ({"options": {"epoch": 1}}, "an option is 'epoch'.*epochs"),
    ({"options": {"teachers_dir": "x"}}, "an option is 'teachers_dir'"),
    ({"results_dir": None}, "results_dir is None"), ({"teachers_dir": ["a"]}, "teachers_dir is"),
])
def test_mistakes_in_a_grid_are_named(change, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        grid_in(tmp_path, **change)


@pytest.mark.parametrize("text", [
    "a: [", "- 1", "5", "", "[" * 5000, "pairs: paper", "? [a]\n: b", "--- a\n--- b",
    "!!python/object/apply:os.system [touch planted]", "a: &a [x]\nb: *a",
    "pairs: [r56_r20]\nmethods: [kd]\nseeds: 1\npreset: quick\noptions: {epochs: many}",
])
def test_files_that_are_no_grid(text, tmp_path, monkeypatch, capsys):
    "One line that says so, and nothing written."
    monkeypatch.chdir(tmp_path)
    Path("grid.yaml").write_text(text)
    assert main(["grid.yaml"]) == 1 and main(["absent.yaml"]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert re.search("is not a YAML file|does not say methods, seeds|epochs is 'many'", first)
    assert "no such file" in second and os.listdir() == ["grid.yaml"]
    for budget, said in ("soon", "invalid"), ("25", "such as 25m"), ("0s", "such as 25m"):
        with pytest.raises(SystemExit):
            main(["grid.yaml", f"--budget={budget}"])
        assert said in capsys.readouterr().err


# What comes next


def test_methods_that_are_compared_come_seed_by_seed():
    cells = in_order(paper_grid())
    assert len(cells) == 240 and cells["seed"].is_monotonic_increasing
    teachers = [pair.teacher for pair in PAIRS.values()]
    beside = sorted(PAIRS, key=lambda pair: teachers.index(PAIRS[pair].teacher))
    assert list(cells[["pair", "method"]].head(48).itertuples(index=False, name=None)) == [
        (pair, method) for objective in ("kd", "dkd") for pair in beside
        for method in (objective, f"{objective}+sort")]


def test_a_teacher_is_made_right_before_its_first_cell(tmp_path):
    pairs = [PAIR, "resnet8:resnet8", "resnet20:resnet20"]
    jobs = read_state(grid_in(tmp_path, pairs=pairs, seeds=1)).jobs
    assert [*jobs["kind"].drop_duplicates()] == [
        "teacher resnet20", PAIR, "resnet20:resnet20", "teacher resnet8", "resnet8:resnet8"]
    alone = read_state(grid_in(tmp_path, methods=["ce"])).jobs
    assert [*alone["method"]] == ["ce", "ce"], "cross-entropy needs no teacher"
    assert not (tmp_path / "teachers").exists() and not (tmp_path / "results" / "runs").exists()


# What exists, and what it costs


def keep_teacher(folder):
    about = {"architecture": "resnet20", "dataset": "digits", "complete": True, "epochs": 4}
    weights = create_model("resnet20", 10).state_dict()
    save_teacher(folder / "teachers" / "t.safetensors", weights, about)


@pytest.fixture
def taught(tmp_path):
    "A grid whose teacher exists, and a function that gives the folder and a record of a cell."
    keep_teacher(tmp_path)
    grid = grid_in(tmp_path)
    experiment = read_state(grid).experiment
    teacher = load_teacher(tmp_path / "teachers" / "t.safetensors", "resnet20", 10)
    about = teacher.as_record() | {"top1": 50.0}

    def cell(method, seed, seconds=0.8, **changes):
        chosen = next(each for each in experiment.methods if each.name == method)
        run = prepare_run(experiment, chosen, seed, "computed", about)
        record = synthetic_record(method=method, seed=seed, preset="quick") | run.facts | {
            "run_id": f"{run.folder.name}-2026", "data": run.facts["data"], "about_teacher": about,
            **describe_machine("cpu")}
        record["curve"]["seconds"] = [9.0, 9.0, seconds]
        return run.folder, record | changes

    return grid, experiment.records_file, cell


def test_speed_is_measured_here_else_scaled_and_never_invented(taught):
    grid, path, cell = taught
    assert math.isnan(speed_of(PAIR, read_state(grid)))
    machine = describe_machine("cpu")["machine"]
    append_record(path, cell("kd", 0, machine={**machine, "processor": "another"})[1])
    state = read_state(grid)
    assert state.jobs["finished"].sum() == 2 and state.measured == {}, "the teacher and a cell"
    append_record(path, cell("kd+sort", 0)[1])  # the last epoch: 200 rows in 0.8 seconds
    state = read_state(grid)
    assert speed_of(PAIR, state) == pytest.approx(4000.0)
    for kind in ("r110_r32", "teacher resnet20"):
        ratio = work_of(kind, state.experiment) / work_of(PAIR, state.experiment)
        assert speed_of(kind, state) == pytest.approx(4000.0 * ratio)


def test_work_is_counted_in_multiply_adds(tmp_path):
    experiment = read_state(grid_in(tmp_path)).experiment
    student, teacher = (slices.multiply_adds(name, 10, 16) for name in ("resnet8", "resnet20"))
    assert work_of("teacher resnet20", experiment) == 3 * teacher
    assert work_of(PAIR, experiment) == 3 * student + teacher
    assert work_of(PAIR, replace(experiment, cache="full")) == 3 * student


def test_the_forecast_counts_what_is_missing(tmp_path):
    state = read_state(grid_in(tmp_path, pairs=[PAIR, "r110_r32"]))
    table, rows = forecast(state), 4 * 3 * 200 / 1e6
    assert table["jobs"].to_dict() == {
        "teacher resnet20": 1, PAIR: 4, "teacher resnet110": 1, "r110_r32": 4}
    assert table["million_rows"][PAIR] == pytest.approx(rows) and table["hours"].isna().all()
    assert "10 jobs are missing: 0.0 hours without those of unknown" in describe_forecast(state)
    state.measured[PAIR] = 4000.0
    table = forecast(state)
    assert table["hours"][PAIR] == pytest.approx(rows * 4000 / 3600)
    assert [*table["measured"][[PAIR, "r110_r32"]]] == [True, False]
    assert "unknown" not in describe_forecast(state)


def test_epochs_that_are_trained_do_not_cost_again(taught):
    grid, _, cell = taught
    folder, _ = cell("kd", 1)
    folder.mkdir(parents=True)
    torch.save({"curve": [{"seconds": 9.0}, {"seconds": 0.5}]}, folder / "checkpoint.pt")
    state = read_state(grid)
    assert state.jobs["trained"][[f"{PAIR} kd seed {seed}" for seed in (0, 1)]].tolist() == [0, 2]
    assert forecast(state)["million_rows"][PAIR] == pytest.approx((3 + 3 + 3 + 1) * 200 / 1e6)
    (folder / "checkpoint.pt").write_bytes(b"half")
    with pytest.raises(ValueError, match="is not a checkpoint.*delete it"):
        read_state(grid)


def test_cells_recorded_with_other_settings_do_not_count(taught, tmp_path):
    grid, path, cell = taught
    append_record(path, cell("kd", 0, run_id="another-0", device="cuda", precision="bfloat16")[1])
    append_record(path, cell("kd+sort", 0, run_id="another-1", teacher_logits="cached")[1])
    append_record(path, cell("kd+sort", 1)[1])
    append_record(path, {"method": 5})
    with pytest.warns(match="was left out"):
        state = read_state(grid)
    finished = state.jobs.index[state.jobs["finished"]]
    assert [*finished] == ["teacher resnet20", f"{PAIR} kd+sort seed 1"]
    keep_teacher(tmp_path)  # one with other weights
    with pytest.warns(match="was left out"):
        assert read_state(grid).jobs["finished"].sum() == 1


# A slice


def test_what_cannot_reach_a_checkpoint_is_not_started(tmp_path, monkeypatch):
    state = read_state(grid_in(tmp_path))
    state.measured["teacher resnet20"] = 4e6  # an epoch of its 400 images in 1,600 seconds
    monkeypatch.setattr(slices, "run_experiment", lambda *_, **__: pytest.fail("a job was started"))
    assert run_slice(state, 1000, progress=False).empty


def test_a_slice_ends_in_time(tmp_path, monkeypatch):
    state = read_state(grid_in(tmp_path))
    monkeypatch.setattr(slices, "run_experiment", lambda *_, **__: time.sleep(60))
    start = time.monotonic()
    assert run_slice(state, 3, progress=False).empty
    assert 2.5 < time.monotonic() - start < 10 and signal.getitimer(signal.ITIMER_REAL)[0] == 0


def failing(monkeypatch, error):
    "The experiments that `run_experiment` is called with; it raises `error`."
    asked = []

    def fail(experiment, *_, students):
        asked.append((experiment.workers, experiment.seeds, len(experiment.methods), students))
        raise error

    monkeypatch.setattr(slices, "run_experiment", fail)
    return asked


def test_a_job_that_fails_does_not_end_the_slice(taught, monkeypatch):
    asked = failing(monkeypatch, FloatingPointError("the loss is nan"))
    done = run_slice(read_state(taught[0]), at_once=1, progress=False)
    assert len(done) == 4 and set(done["error"]) == {"FloatingPointError: the loss is nan"}
    assert asked == [(1, (0,), 1, 1)] * 2 + [(1, (1,), 1, 1)] * 2
    del asked[:]
    assert len(run_slice(read_state(taught[0]), at_once=2, progress=False)) == 4
    assert asked == [(2, (0,), 2, 2), (2, (1,), 2, 2)], "cells of a pair, side by side"


def test_on_a_gpu_cells_are_trained_together(taught, monkeypatch):
    asked = failing(monkeypatch, Stopped)
    monkeypatch.setattr(slices, "describe_machine", lambda device: describe_machine("cpu"))
    methods = ["kd", "kd+sort", "dkd", "dkd+sort", "nkd"]
    state = read_state(replace(taught[0], cells=paper_grid([PAIR], methods, range(2))))
    state.experiments = {PAIR: replace(state.experiment, device="cuda")}
    run_slice(state, at_once=4, progress=False)
    assert asked == [(1, (0,), 4, 4), (1, (0, 1), 4, 4), (1, (1,), 1, 4)]


def test_a_failed_teacher_is_made_once_and_its_cells_wait(tmp_path, monkeypatch):
    asked = failing(monkeypatch, ValueError("broken"))
    done = run_slice(read_state(grid_in(tmp_path)), progress=False)
    assert done["error"].to_dict() == {"teacher resnet20": "ValueError: broken"}
    assert [seeds for _, seeds, *_ in asked] == [()]


# Cut into pieces


def records_in(folder):
    path = folder / "results" / "quick.jsonl"
    records = read_records(path) if path.exists() else []
    cells = {(each["seed"], each["method"]["name"]): each for each in records}
    assert len(cells) == len(records), "a cell was run twice"
    return cells


@pytest.fixture(scope="module")
def uncut(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uncut")
    experiment = prepare_experiment(pair=PAIR, methods="kd,kd+sort", seeds="0", preset="quick",
                                 **places_in(folder), **SETTINGS["options"])
    run_experiment(experiment, progress=False)
    return records_in(folder)


def assert_same(ours, uncut):
    assert ours.keys() == uncut.keys()
    for cell, record in ours.items():
        assert compare_runs(uncut[cell], record) == []
        teachers = [each["about_teacher"]["weights_sha256"] for each in (record, uncut[cell])]
        assert teachers[0] == teachers[1]


def test_cut_after_every_epoch_and_moved_the_numbers_are_those_of_an_uncut_run(
    uncut, tmp_path, monkeypatch
):
    monkeypatch.setattr(slices, "Deadline", lambda end: lambda: True)  # one epoch of each job
    folder, began, finished = tmp_path / "machine0", {}, []
    folder.mkdir()
    for number in range(1, 8):
        done = run_slice(read_state(grid_in(folder, seeds=1)), at_once=1, progress=False)
        finished.append([*done["finished"]])
        for checkpoint in (folder / "results" / "runs").glob("*/checkpoint.pt"):
            run = checkpoint.parent
            began.setdefault(run.name, (run / "started").read_text())
        archive, following = tmp_path / "all.tar", tmp_path / f"machine{number}"
        following.mkdir()
        subprocess.run(["tar", "cf", archive, "-C", folder, "results", "teachers"], check=True)
        subprocess.run(["tar", "xf", archive, "-C", following], check=True)
        folder = following
    assert finished == [*[[False]] * 3, [True, False, False], [False] * 2, [True] * 2, []]
    assert_same(records_in(folder), uncut)
    starts = {f"{name}-{start}" for name, start in began.items()}
    assert starts == {record["run_id"] for record in records_in(folder).values()}
    assert "nothing is missing" in describe_forecast(read_state(grid_in(folder, seeds=1)))


@pytest.mark.slow
def test_killed_in_the_middle_nothing_is_lost(uncut, tmp_path):
    runs, grid = tmp_path / "results" / "runs", grid_in(tmp_path, seeds=1)
    settings = {**SETTINGS, "seeds": 1, **places_in(tmp_path)}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(settings))
    program = "import sys; from sortkd.experiment.slices import main; sys.exit(main())"
    command = [sys.executable, "-c", program, tmp_path / "grid.yaml", "--at-once", "1"]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline, session = time.monotonic() + 120, "resnet20-resnet8-kd*/sessions.jsonl"
    while process.poll() is None and not list(runs.glob(session)) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    said = process.communicate(timeout=60)[0]
    assert process.returncode == -signal.SIGKILL and "teacher resnet20" in said, said
    assert len(read_state(grid).missing) == 2
    run_slice(read_state(grid), at_once=1, progress=False)
    assert_same(records_in(tmp_path), uncut)


@pytest.mark.slow
def test_two_at_once_within_a_budget(uncut, tmp_path):
    grid = grid_in(tmp_path, seeds=1)
    for seconds in (30, 600):
        start = time.monotonic()
        run_slice(read_state(grid), seconds, at_once=2, progress=False)
        assert time.monotonic() - start < seconds + 30
    assert_same(records_in(tmp_path), uncut)
