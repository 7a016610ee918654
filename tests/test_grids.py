"A grid in slices: what comes next, what fits, and cut into pieces it ends with the numbers of an uncut run."
import math
import os
import random
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

from sortkd.experiment import grid as grids
from sortkd.experiment.setup import prepare_experiment
from sortkd.experiment.grid import Deadline, Job, Left, describe_plan, main, make_grid, plan_table, priority, read_grid, read_state, run_slice, speed_of, work_of
from sortkd.train.networks import create_model
from sortkd.experiment.pairs import PAIRS
from sortkd.experiment.storage import append_record, read_records
from sortkd.experiment.record import compare_runs
from sortkd.experiment.provenance import describe_machine
from sortkd.experiment.grid import paper_grid
from sortkd.experiment.one_run import prepare_run
from sortkd.experiment.run import run_experiment
from sortkd.train.teachers import save_teacher
from sortkd.train.checkpoints import Stopped

WORKFLOW = Path(__file__).parents[1] / "workflow"
SETTINGS = {
    "pairs": ["resnet20:resnet8"], "methods": ["kd", "kd+sort"], "seeds": 2, "preset": "quick", "cell": "command", "threads": 1, "cells_dir": "cells",
    "options": {"dataset": "digits", "epochs": 3, "train_size": 200, "test_size": 100, "device": "cpu", "precision": "float32", "cache": "off"},
}


def grid_in(folder, **changes):
    return make_grid({**SETTINGS, "results_dir": str(folder / "results"), "teachers_dir": str(folder / "teachers"), **changes})


# The grid


def test_the_papers_grid_is_the_workflows():
    grid = read_grid(WORKFLOW / "paper.yaml")
    assert grid.cells.equals(paper_grid()) and grid.preset == "paper" and grid.options == {"cache": "full"}
    assert "make_grid(config, NAMED)" in (WORKFLOW / "Snakefile").read_text()
    changed = read_grid(WORKFLOW / "paper.yaml", results_dir="elsewhere", options={"epochs": "2", "deterministic": "True"})
    assert changed.shared == {"preset": "paper", "teachers_dir": "teachers", "results_dir": "elsewhere", "cache": "full", "epochs": 2, "deterministic": True}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 1}, "a key of the grid is 'seed'.*Did you mean 'seeds'"),
        ({"pairs": ["r56_r2"]}, "pair is 'r56_r2'.*r56_r20"),
        ({"pairs": []}, "pairs is"),
        ({"methods": ["kd+sorted"]}, "sort"),
        ({"seeds": 0}, "seeds is 0"),
        ({"seeds": "all"}, "seeds is 'all'"),
        ({"preset": "full"}, "preset is 'full'"),
        ({"options": {"epoch": 1}}, "an option is 'epoch'.*epochs"),
        ({"options": {"epochs": "many"}}, "option epochs is 'many'"),
        ({"options": {"deterministic": "perhaps"}}, "option deterministic is 'perhaps'"),
        ({"options": {"teachers_dir": "x"}}, "an option is 'teachers_dir'"),
        ({"options": 5}, "options is 5"),
        ({"results_dir": None}, "results_dir is None"),
        ({"cells_dir": ["a"]}, "cells_dir is"),
    ],
)
def test_mistakes_in_a_grid_are_named(change, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        grid_in(tmp_path, **change)


def test_files_that_are_no_grid(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="there is no grid"):
        read_grid(tmp_path / "none.yaml")
    for text, said in (("a: [", "is not a YAML"), ("- 1", "give names with values"), ("pairs: paper", "does not say methods, seeds"), ("[" * 5000, "is not a YAML")):
        (tmp_path / "grid.yaml").write_text(text)
        with pytest.raises(ValueError, match=said):
            read_grid(tmp_path / "grid.yaml")
    for arguments in (["--budget", "9" * 400 + "h"], ["--budget", "soon"], ["--budget", "0s"], ["--at-once", "many"], ["--at-once", "0"], ["--option", "epochs"]):
        assert main([str(WORKFLOW / "config.yaml"), *arguments]) == 1
        assert re.search(r"ValueError: (the budget|at_once|option)", capsys.readouterr().err)


# What comes next


def test_pairs_of_methods_seed_by_seed_and_teachers_when_they_are_needed():
    grid = read_grid(WORKFLOW / "paper.yaml")
    makers = {PAIRS[pair].teacher: Job(pair) for pair in reversed(PAIRS)}.values()
    jobs = [*makers, *(Job(cell.pair, cell.method, cell.seed) for cell in grid.cells.itertuples())]
    random.Random(0).shuffle(jobs)
    order = priority(jobs, grid)
    assert sorted(order) == sorted(jobs)
    cells = [job for job in order if job.method]
    assert [job.seed for job in cells] == sorted(job.seed for job in cells)
    first = [(job.pair, job.method) for job in cells[: 4 * len(PAIRS)]]
    teachers = [PAIRS[pair].teacher for pair in PAIRS]
    beside = sorted(PAIRS, key=lambda pair: teachers.index(PAIRS[pair].teacher))  # pairs of one teacher
    assert first == [(pair, method) for objective in ("kd", "dkd") for pair in beside for method in (objective, f"{objective}+sort")]
    for job in makers:
        after = order[order.index(job) + 1]
        assert after.teacher == job.teacher and after == next(each for each in cells if each.teacher == job.teacher)
    assert priority([Job("r56_r20")], grid) == [Job("r56_r20")]


# What exists, and what it costs


@pytest.fixture
def taught(tmp_path, monkeypatch):
    "A grid whose teacher exists, and a function that gives the folder and the record of its cells."
    save_teacher(tmp_path / "teachers" / "t.safetensors", create_model("resnet20", 10).state_dict(), {"architecture": "resnet20", "dataset": "digits", "complete": True, "epochs": 4})
    grid = grid_in(tmp_path)
    monkeypatch.setattr(grids, "whole", list)  # these records are of runs that have not been made
    state = read_state(grid)
    about, experiment = state.teachers["resnet20"].as_record(), state.experiments["resnet20:resnet8"]

    def cell(method, seed, **changes):
        run = prepare_run(experiment, next(each for each in experiment.methods if each.name == method), seed, "computed", about)
        record = {"run_id": f"{run.folder.name}-2026", **run.facts, "data": run.facts["data"], "about_teacher": about, **describe_machine("cpu"), "result": {"seconds": 2.4}}
        return run.folder, record | changes

    return grid, experiment.records_file, cell


def test_speed_is_measured_here_else_scaled_and_never_invented(taught):
    grid, path, cell = taught
    assert read_state(grid).measured == {} and math.isnan(speed_of("resnet20:resnet8", read_state(grid))[0]) and speed_of("resnet20:resnet8", read_state(grid))[1] == "unknown"
    append_record(path, cell("kd", 0, machine={"processor": "another"})[1])
    append_record(path, cell("kd", 1, result=5)[1])
    state = read_state(grid)
    assert state.finished == 2 and state.measured == {}
    append_record(path, cell("kd+sort", 0)[1])  # 600 rows in 2.4 seconds
    state = read_state(grid)
    assert speed_of("resnet20:resnet8", state) == (pytest.approx(4000.0), "measured")
    for kind in ("r110_r32", "teacher resnet20"):
        assert speed_of(kind, state) == (pytest.approx(4000.0 * work_of(kind, state.planned) / work_of("resnet20:resnet8", state.planned)), "scaled")


def test_work_is_counted_in_multiply_adds(tmp_path):
    # resnet20 on CIFAR: 40.8 million in its convolutions and classifier (He et al. 2016: "FLOPs" 41 million).
    assert grids.multiply_adds("resnet20", 100, 32) == pytest.approx(40.8, abs=0.1)
    planned = read_state(grid_in(tmp_path)).planned
    student, teacher = (grids.multiply_adds(name, 10, planned.data.image_size) for name in ("resnet8", "resnet20"))
    assert work_of("resnet20:resnet8", planned) == 3 * student + teacher and work_of("teacher resnet20", planned) == 3 * teacher
    assert work_of("resnet20:resnet8", grids.replace(planned, cache="full")) == 3 * student


def test_the_plan_counts_what_is_missing(tmp_path):
    state = read_state(grid_in(tmp_path, pairs=["resnet20:resnet8", "r110_r32"]))
    table = plan_table(state)
    assert set(table.index) == {"teacher resnet20", "teacher resnet110", "resnet20:resnet8", "r110_r32"} and list(table["missing"][["resnet20:resnet8", "teacher resnet20"]]) == [4, 1]
    assert table["million_rows"]["resnet20:resnet8"] == pytest.approx(4 * 3 * 200 / 1e6) and table["hours"].isna().all()
    assert "0 of 8 cells are done, 0 of 2 teachers exist" in describe_plan(state) and "without 10 jobs of unknown cost" in describe_plan(state)
    state.measured["resnet20:resnet8"] = 4000.0
    table = plan_table(state)
    assert table["hours"]["resnet20:resnet8"] == pytest.approx(4 * 3 * 200 / 1e6 * 4000 / 3600) and list(table["how"][["resnet20:resnet8", "r110_r32"]]) == ["measured", "scaled"]
    assert "≈" in describe_plan(state) and "unknown" not in describe_plan(state)
    alone = read_state(grid_in(tmp_path, methods=["ce"]))
    assert alone.teachers == {} and {job.method for job in alone.missing} == {"ce"}, "cross-entropy needs no teacher"
    assert not (tmp_path / "teachers").exists() and not (tmp_path / "results" / "runs").exists()


def test_epochs_that_are_trained_are_not_planned_again(taught):
    grid, _, cell = taught
    folder, about = cell("kd", 1)
    folder.mkdir(parents=True)
    torch.save({"curve": [{"seconds": 9.0}, {"seconds": 0.5}]}, folder / "checkpoint.pt")
    append_record(folder / "sessions.jsonl", {"first_epoch": 1, "machine": about["machine"]})
    state = read_state(grid)
    assert state.missing[Job("resnet20:resnet8", "kd", 1)] == Left(2, 3, 200) and state.missing[Job("resnet20:resnet8", "kd", 0)] == Left(0, 3, 200)
    row = plan_table(state).loc["resnet20:resnet8"]
    assert row["million_rows"] == pytest.approx((3 + 3 + 3 + 1) * 200 / 1e6) and (row["missing"], row["begun"], row["how"]) == (4, 1, "measured")
    assert state.measured == {"resnet20:resnet8": pytest.approx(2500.0)}
    append_record(folder / "sessions.jsonl", {"first_epoch": 2, "machine": {"processor": "another"}})
    assert read_state(grid).measured == {}
    (folder / "checkpoint.pt").write_bytes(b"half")
    with pytest.raises(ValueError, match="is not a checkpoint.*delete it"):
        read_state(grid)


def test_cells_recorded_with_other_settings_are_named_and_do_not_count(taught, tmp_path):
    grid, path, cell = taught
    for method, seed, changes in (("kd", 0, {"device": "cuda", "precision": "bfloat16"}), ("kd+sort", 0, {"teacher_logits": "cached"}), ("kd", 1, {"device": "cuda", "precision": "bfloat16"})):
        append_record(path, cell(method, seed, run_id=f"another-{seed}-{method}", **changes)[1])
    append_record(path, cell("kd+sort", 1)[1])
    append_record(path, {"method": 5})
    state = read_state(grid)
    assert Job("resnet20:resnet8", "kd+sort", 1) not in state.missing and state.finished == 1 and state.others == {"device and precision": 2, "teacher_logits": 1}
    assert "1 of 4 cells are done (not counted: 2 with other device and precision, 1 with other teacher_logits)" in describe_plan(state)
    save_teacher(tmp_path / "teachers" / "t.safetensors", create_model("resnet20", 10).state_dict(), {"architecture": "resnet20", "dataset": "digits", "complete": True, "epochs": 4})
    assert not read_state(grid).finished and "teacher.weights_sha256" in read_state(grid).others


# A slice


def test_the_deadline_asks_whether_another_epoch_fits():
    now = [100.0]
    stop = Deadline(200.0, clock=lambda: now[0])
    answers = []
    for now[0] in (120, 140, 160, 177, 178, 190):  # epochs of 20, 20, 20, 17, 1 and 12 seconds
        answers.append(stop())
    assert answers == [False] * 5 + [True]


def test_what_cannot_reach_a_checkpoint_is_not_started(tmp_path, monkeypatch):
    state = read_state(grid_in(tmp_path))
    state.measured["teacher resnet20"] = 4e6  # an epoch of its 400 images in 1,600 seconds
    monkeypatch.setattr(grids, "run_experiment", lambda *_, **__: pytest.fail("a job was started"))
    assert run_slice(state, 1000, progress=False).empty


def test_a_slice_ends_in_time(tmp_path, monkeypatch):
    state = read_state(grid_in(tmp_path))
    monkeypatch.setattr(grids, "run_experiment", lambda *_, **__: time.sleep(60))
    start = time.monotonic()
    assert run_slice(state, 3, progress=False).empty
    assert 2.5 < time.monotonic() - start < 10 and signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_a_job_that_fails_does_not_end_the_slice(taught, monkeypatch):
    asked = []

    def fail(experiment, *_, **__):
        asked.append([method.name for method in experiment.methods])
        raise FloatingPointError("the loss is nan")

    monkeypatch.setattr(grids, "run_experiment", fail)
    grid, *_ = taught
    done = run_slice(read_state(grid), at_once=1, progress=False)
    assert len(done) == 4 and set(done["outcome"]) == {"FloatingPointError: the loss is nan"} and asked == [["kd"], ["kd+sort"]] * 2
    del asked[:]
    assert len(run_slice(read_state(grid), at_once=2, progress=False)) == 4 and asked == [["kd", "kd+sort"]] * 2, "cells of a pair, side by side"


def test_on_a_gpu_cells_are_taught_together(taught, monkeypatch):
    asked = []

    def note(experiment, *_, students):
        asked.append((experiment.workers, experiment.seeds, len(experiment.methods), students))
        raise Stopped

    monkeypatch.setattr(grids, "run_experiment", note)
    monkeypatch.setattr(grids, "describe_machine", lambda device: describe_machine("cpu"))
    grid, *_ = taught
    cells = paper_grid(["resnet20:resnet8"], ["kd", "kd+sort", "dkd", "dkd+sort", "nkd"], range(2))
    state = read_state(replace(grid, cells=cells))
    state.experiments = {pair: replace(each, device="cuda") for pair, each in state.experiments.items()}
    run_slice(state, at_once=4, progress=False)
    assert asked == [(1, (0,), 4, 4), (1, (0, 1), 4, 4), (1, (1,), 1, 4)]


def test_a_failed_teacher_is_made_once_and_its_cells_wait(tmp_path, monkeypatch):
    def fail(experiment, *_, **__):
        raise ValueError(f"seeds {experiment.seeds}")

    monkeypatch.setattr(grids, "run_experiment", fail)
    done = run_slice(read_state(grid_in(tmp_path)), progress=False)
    assert list(done["job"]) == ["teacher resnet20"] and list(done["outcome"]) == ["ValueError: seeds ()"]


# Cut into pieces


def records_in(folder):
    path = folder / "results" / "quick.jsonl"
    found = [(each["seed"], each["method"]["name"], each) for each in (read_records(path) if path.exists() else [])]
    assert len({cell[:2] for cell in found}) == len(found), "a cell was run twice"
    return {cell[:2]: cell[2] for cell in found}


@pytest.fixture(scope="module")
def uncut(tmp_path_factory):
    folder, threads = tmp_path_factory.mktemp("uncut"), torch.get_num_threads()
    shared = {"results_dir": str(folder / "results"), "teachers_dir": str(folder / "teachers"), **SETTINGS["options"]}
    torch.set_num_threads(1)
    run_experiment(prepare_experiment(pair="resnet20:resnet8", methods="kd,kd+sort", seeds="0", preset="quick", **shared), progress=False)
    torch.set_num_threads(threads)
    return records_in(folder)


def assert_same(ours, uncut):
    assert ours.keys() == uncut.keys()
    for cell, record in ours.items():
        assert compare_runs(uncut[cell], record) == []
        assert record["about_teacher"]["weights_sha256"] == uncut[cell]["about_teacher"]["weights_sha256"]


def test_cut_after_every_epoch_and_moved_the_numbers_are_those_of_an_uncut_run(uncut, tmp_path, monkeypatch):
    monkeypatch.setattr(grids, "Deadline", lambda end: lambda: True)  # one epoch of each job in a slice
    folder, began, outcomes = tmp_path / "machine0", {}, []
    folder.mkdir()
    for number in range(1, 8):
        outcomes.append(list(run_slice(read_state(grid_in(folder, seeds=1)), at_once=1, progress=False)["outcome"]))
        for checkpoint in (folder / "results" / "runs").glob("*/checkpoint.pt"):
            began.setdefault(checkpoint.parent.name, (checkpoint.parent / "started").read_text())
        (tmp_path / f"machine{number}").mkdir()
        subprocess.run(["tar", "cf", tmp_path / "all.tar", "-C", folder, "results", "teachers"], check=True)
        folder = tmp_path / f"machine{number}"
        subprocess.run(["tar", "xf", tmp_path / "all.tar", "-C", folder], check=True)
    assert outcomes == [["saved"]] * 3 + [["finished", "saved", "saved"], ["saved"] * 2, ["finished"] * 2, []]
    assert_same(records_in(folder), uncut)
    assert {f"{name}-{start}" for name, start in began.items()} == {record["run_id"] for record in records_in(folder).values()}, "a start was lost"
    assert "nothing is missing" in describe_plan(read_state(grid_in(folder, seeds=1)))


@pytest.mark.slow
def test_killed_in_the_middle_nothing_is_lost(uncut, tmp_path):
    runs, grid = tmp_path / "results" / "runs", grid_in(tmp_path, seeds=1)
    about = {**SETTINGS, "seeds": 1, "results_dir": str(tmp_path / "results"), "teachers_dir": str(tmp_path / "teachers")}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(about))
    command = [sys.executable, "-c", "import sys; from sortkd.experiment.grid import main; sys.exit(main())", tmp_path / "grid.yaml", "--at-once", "1"]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 120
    while process.poll() is None and not list(runs.glob("resnet20-resnet8-kd*/sessions.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    said = process.communicate(timeout=60)[0]
    assert process.returncode == -signal.SIGKILL and "teacher resnet20: finished" in said, said
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
