"A grid in slices: what comes next, what fits, and cut into pieces it ends with the numbers of an uncut run."
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from sortkd import grids
from sortkd.grids import Deadline, Job, Speeds, describe_plan, main, make_grid, plan_table, priority, read_grid, read_state, run_slice
from sortkd.experiments import plan_experiment
from sortkd.pairs import PAIRS
from sortkd.records import append_record, compare_runs, describe_machine, read_records
from sortkd.runs import plan_run, run_experiment
from sortkd.models import create_model
from sortkd.results import PAPER_METHODS, paper_grid
from synthetic import synthetic_record
from sortkd.teachers import save_teacher
from sortkd.checkpoints import fingerprint

WORKFLOW = Path(__file__).parents[1] / "workflow"
SETTINGS = {
    "pairs": ["r56_r20"], "methods": ["kd", "kd+sort"], "seeds": 2, "preset": "quick", "cell": "command", "threads": 1, "cells_dir": "cells",
    "options": {"dataset": "digits", "epochs": 3, "train_size": 200, "test_size": 100, "device": "cpu", "precision": "float32", "cache": "off"},
}


def grid_in(folder, **changes):
    return make_grid({**SETTINGS, "results_dir": str(folder / "results"), "teachers_dir": str(folder / "teachers"), **changes})


def jobs_of(grid):
    teachers = {PAIRS[pair].teacher: Job(pair) for pair in reversed(grid.cells["pair"].unique())}
    return [*teachers.values(), *(Job(cell.pair, cell.method, cell.seed) for cell in grid.cells.itertuples())]


# The grid


def test_the_papers_grid_is_the_workflows():
    grid = read_grid(WORKFLOW / "paper.yaml")
    assert grid.cells.equals(paper_grid()) and grid.preset == "paper" and grid.options == {"cache": "full"}
    assert "make_grid(config)" in (WORKFLOW / "Snakefile").read_text()
    changed = read_grid(WORKFLOW / "paper.yaml", results_dir="elsewhere", options={"epochs": "2", "deterministic": "True"})
    assert changed.shared == {"preset": "paper", "teachers_dir": "teachers", "results_dir": "elsewhere", "cache": "full", "epochs": 2, "deterministic": True}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 1}, "a key of the grid is 'seed'.*Did you mean 'seeds'"),
        ({"pairs": ["r56_r2"]}, "a pair is 'r56_r2'.*r56_r20"),
        ({"pairs": []}, "pairs is"),
        ({"methods": ["kd+sorted"]}, "sort"),
        ({"seeds": 0}, "seeds is 0"),
        ({"seeds": "all"}, "seeds is 'all'"),
        ({"preset": "full"}, "preset is 'full'"),
        ({"options": {"epoch": 1}}, "an option is 'epoch'.*epochs"),
        ({"options": {"epochs": "many"}}, "option epochs is 'many'"),
        ({"options": {"deterministic": "perhaps"}}, "option deterministic is 'perhaps'"),
        ({"options": {"teacher": "x.pt"}}, "an option is 'teacher'"),
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
    for text, said in (("a: [", "is no YAML"), ("- 1", "give names with values"), ("pairs: paper", "does not say methods, seeds"), ("[" * 5000, "is no YAML")):
        (tmp_path / "grid.yaml").write_text(text)
        with pytest.raises(ValueError, match=said):
            read_grid(tmp_path / "grid.yaml")
    for arguments in (["--budget", "9" * 400 + "h"], ["--budget", "soon"], ["--budget", "0s"], ["--at-once", "many"], ["--at-once", "0"], ["--option", "epochs"]):
        assert main([str(WORKFLOW / "config.yaml"), *arguments]) == 1
        assert re.search(r"ValueError: (the budget|at_once|option)", capsys.readouterr().err)


# What comes next


def test_teachers_first_then_pairs_of_methods_seed_by_seed():
    grid = read_grid(WORKFLOW / "paper.yaml")
    jobs = jobs_of(grid)
    random.Random(0).shuffle(jobs)
    order = priority(jobs, grid)
    assert sorted(order) == sorted(jobs)
    teachers, cells = order[:6], order[6:]
    waiting = [sum(PAIRS[pair].teacher == job.teacher for pair in PAIRS) for job in teachers]
    assert not any(job.method for job in teachers) and waiting == sorted(waiting, reverse=True) and teachers[0].teacher == "resnet32x4"
    assert [job.seed for job in cells] == sorted(job.seed for job in cells)
    first = [(job.pair, job.method) for job in cells[: 4 * len(PAIRS)]]
    teachers = [PAIRS[pair].teacher for pair in PAIRS]
    beside = sorted(PAIRS, key=lambda pair: teachers.index(PAIRS[pair].teacher))  # pairs of one teacher, whose logits are computed once
    assert first == [(pair, method) for objective in ("kd", "dkd") for pair in beside for method in (objective, f"{objective}+sort")]
    # A teacher unlocks what is missing, not what the grid has.
    few = [job for job in jobs if job.teacher != "resnet32x4" or not job.method or job.method == "kd" and job.seed == 0 and job.pair == "r32x4_mv2"]
    assert priority(few, grid)[0].teacher == "wrn_40_2"


def test_pairs_are_planned_without_loading_the_data_again(tmp_path):
    shared = {"methods": "kd,dkd+sort,ctkd", "dataset": "digits", "preset": "quick", "results_dir": str(tmp_path), "device": "cpu"}
    first = plan_experiment(pair="r56_r20", **shared)
    for pair in ("r32x4_mv2", "wrn40_2_shuv1"):
        ours, theirs = grids._of_pair(first, pair), plan_experiment(pair=pair, **shared)
        for name in ("pair_name", "pair", "methods", "recipe", "preset", "precision"):
            assert getattr(ours, name) == getattr(theirs, name)
        assert ours.data.checksum == theirs.data.checksum


# What fits


def test_the_deadline_asks_whether_another_epoch_fits():
    now, ends = [100.0], SimpleNamespace(value=200.0)
    stop = Deadline(ends, clock=lambda: now[0])
    answers = []
    for time_after in (120, 140, 160, 177, 178):  # epochs of 20, 20, 20, 17 and 1 seconds
        now[0] = time_after
        answers.append(stop())
    assert answers == [False, False, False, False, False]
    now[0] = 190
    assert stop()  # 12 seconds and a tenth more than are left
    ends.value = 0.0
    now[0] = 190.1
    assert stop()


@pytest.fixture
def state(tmp_path):
    return read_state(grid_in(tmp_path, pairs="paper"))


def measured(seconds_per_million, pair="r56_r20", **changes):
    record = synthetic_record(pair, epochs=3, precision="float32", **changes)
    del record["synthetic"]
    record["machine"] = describe_machine("cpu")["machine"]
    record["data"] |= {"name": "digits", "train_images": 200}
    record["result"]["seconds"] = seconds_per_million * 600 / 1e6
    return record


def test_time_is_predicted_from_what_was_measured_here_and_never_invented(state):
    planned = state.planned
    unknown = Speeds(state).of("r56_r20")
    assert math.isnan(unknown[0]) and unknown[1] == "unknown"
    other = measured(7.0, preset="quick")
    append_record(planned.records_file, other | {"machine": {"processor": "another"}})
    append_record(planned.records_file, other | {"seed": 1, "precision": "bfloat16"})
    append_record(planned.records_file, other | {"seed": 2, "data": other["data"] | {"name": "cifar100"}})
    assert Speeds(state).of("r56_r20")[1] == "unknown"
    append_record(planned.records_file, measured(4000.0, preset="quick", seed=3))
    speeds = Speeds(state)
    assert speeds.of("r56_r20") == (pytest.approx(4000.0), "measured")
    seconds, how = speeds.of("r110_r32")
    work = {pair: 3 * speeds.forward(PAIRS[pair].student) + speeds.forward(PAIRS[pair].teacher) for pair in ("r56_r20", "r110_r32")}
    assert how == "scaled" and seconds == pytest.approx(4000.0 * work["r110_r32"] / work["r56_r20"])
    assert speeds.of("teacher resnet56")[0] == pytest.approx(4000.0 * 3 * speeds.forward("resnet56") / work["r56_r20"])
    speeds.note("r56_r20", images=200, seconds=0.5, set_up=2.0)
    assert speeds.of("r56_r20") == (2500.0, "measured") and speeds.set_up == 2.0
    append_record(planned.records_file, measured(9.0, pair="ours", preset="quick"))
    short = measured(9.0, preset="quick", seed=5)
    append_record(planned.records_file, short | {"recipe": short["recipe"] | {"epochs": 2}})
    append_record(planned.results_dir / "short.jsonl", measured(9.0, preset="short", seed=6))
    assert Speeds(state).measured == {"r56_r20": pytest.approx(4000.0)}, "only whole runs of this preset and these pairs"


def test_multiply_adds_are_counted():
    # resnet20 on CIFAR: 40.8 million in its convolutions and classifier (He et al. 2016: "FLOPs" 41 million).
    assert grids.multiply_adds("resnet20", 100, 32) == pytest.approx(40.8, abs=0.1)


def test_the_plan_says_what_is_missing_and_what_is_unknown(tmp_path):
    grid = grid_in(tmp_path, pairs=["r56_r20", "r110_r32"])
    state = read_state(grid)
    table = plan_table(state, Speeds(state))
    assert list(table.index) == ["teacher resnet56", "teacher resnet110", "r56_r20", "r110_r32"] and list(table["missing"]) == [1, 1, 4, 4]
    assert table["million_rows"]["r56_r20"] == pytest.approx(4 * 3 * 200 / 1e6) and table["hours"].isna().all()
    assert "10 of unknown cost" in describe_plan(state, Speeds(state))
    append_record(state.planned.records_file, measured(4000.0, preset="quick"))
    table = plan_table(state, Speeds(state))
    assert table["hours"]["r56_r20"] == pytest.approx(4 * 3 * 200 / 1e6 * 4000 / 3600) and list(table["how"]) == ["scaled", "scaled", "measured", "scaled"]
    assert not (tmp_path / "teachers").exists() and not (tmp_path / "results" / "runs").exists()


def test_what_cannot_reach_a_checkpoint_is_not_started(tmp_path, monkeypatch):
    state = read_state(grid_in(tmp_path))
    append_record(state.planned.records_file, measured(4e6, preset="quick"))  # an epoch of 200 images in 800 seconds, of the teacher's 400 in more
    monkeypatch.setattr(grids, "_Worker", lambda *_: pytest.fail("a job was started"))
    assert run_slice(state, 60, quiet=True).empty


def test_a_worker_that_dies_is_a_failed_job_and_the_rest_goes_on(tmp_path, monkeypatch):
    class Dead(grids._Worker):
        def start(self, job):
            self.process.kill()
            self.process.join()
            super().start(job)

    monkeypatch.setattr(grids, "_Worker", Dead)
    done = run_slice(read_state(grid_in(tmp_path)), at_once=1, quiet=True)
    assert list(done["outcome"]) == ["failed"] and done["job"][0] == "teacher resnet56"  # whose cells wait
    monkeypatch.undo()
    with grids.FileLock(tmp_path / "results" / "runs" / "grid.lock"), pytest.raises(ValueError, match="another process runs the grid"):
        run_slice(read_state(grid_in(tmp_path)), quiet=True)


def test_more_at_once_only_while_that_is_faster():
    images = {Job("r56_r20", "kd", seed): 1000 for seed in range(9)}

    def settle(speed):
        "`speed`: rows per second of one of n jobs."
        counter = grids._AtOnce("auto", SimpleNamespace(device="cuda", cache="full"))
        workers = []
        for _ in range(40):
            while len(workers) < counter.now:
                workers.append(SimpleNamespace(job=Job("r56_r20", "kd", len(workers)), rows=[]))
            for worker in workers[: counter.now]:
                worker.rows.append({"seconds": 1000 / speed(counter.now)})
            counter.adapt(workers[: counter.now], images)
        return counter.now

    assert settle(lambda n: 100.0) == 8
    assert settle(lambda n: 100.0 / n) == 1
    assert settle(lambda n: 100.0 * min(n, 3) / n) == 3
    assert grids._AtOnce("auto", SimpleNamespace(device="cuda", cache="auto")).most == 1
    assert grids._AtOnce("3", SimpleNamespace(device="cuda", cache="auto")).now == 3


# What a slice begins with


def test_a_teachers_logits_come_right_before_its_first_cell(tmp_path):
    state = read_state(grid_in(tmp_path, pairs="paper", seeds=1, options={**SETTINGS["options"], "cache": "full"}))
    for name in ("resnet56", "resnet32x4"):
        state.teachers[name] = SimpleNamespace()
    state.epochs = {job: epochs for job, epochs in state.epochs.items() if job.method or state.teachers[job.teacher] is None}
    order = grids._with_logits(state)
    logits = [job for job in order if not job.method and state.teachers[job.teacher]]
    assert [job.teacher for job in logits] == ["resnet56", "resnet32x4"] and [job for job in order if job not in logits] == priority(state.missing, state.grid)
    for job in logits:
        after = order[order.index(job) + 1]
        assert after.teacher == job.teacher and after.method, "not earlier than it is needed"
    state.planned = grids.replace(state.planned, cache="off")
    assert grids._with_logits(state) == priority(state.missing, state.grid)


def test_a_damaged_cache_counts_as_none(tmp_path):
    "The plan is made without opening it; the run that opens it says what is wrong."
    state = read_state(grid_in(tmp_path, options={**SETTINGS["options"], "cache": "full"}))
    speeds = Speeds(state)
    speeds.measured["teacher resnet56"] = 3.0
    needed = speeds.views_seconds(None, "resnet56")
    about = {"teacher_sha256": "", "images": len(state.planned.data.train_targets), "precision": state.planned.precision}
    for number, text in enumerate(["", "[]", "5", "{}", json.dumps(about)]):  # the last without its marks
        folder = state.planned.cache_dir / str(number)
        folder.mkdir(parents=True)
        (folder / "about.json").write_text(text)
    assert speeds.views_seconds(None, "resnet56") == needed > 0
    (folder / "computed.bin").write_bytes(b"\x01" * 10)
    assert speeds.views_seconds(None, "resnet56") == 0, "a whole one does count"


def test_cells_recorded_with_other_settings_are_named_and_do_not_count(tmp_path):
    grid = grid_in(tmp_path)
    experiment = plan_experiment(pair="r56_r20", methods="kd,kd+sort", seeds="0,1", skip_recorded=True, **grid.shared)
    save_teacher(tmp_path / "teachers" / "t.safetensors", create_model("resnet56", 10).state_dict(), {"architecture": "resnet56", "dataset": "digits", "complete": True, "epochs": 4})
    about = read_state(grid).teachers["resnet56"].as_record()
    changes = iter([{"device": "cuda", "precision": "bfloat16"}, {"teacher_logits": "cached"}, {"device": "cuda", "precision": "bfloat16"}, {}])
    for seed in experiment.seeds:
        for method in experiment.methods:
            run = plan_run(experiment, method, seed, "computed", about)
            record = {"run_id": f"{run.folder.name}-2026", **run.settings, "data": run.about_data, "about_teacher": about}
            change = next(changes)
            append_record(experiment.records_file, record | change | ({"run_id": f"another-{seed}-{method.name}"} if change else {}))
    state = read_state(grid)
    assert state.finished == {Job("r56_r20", "kd+sort", 1)} and state.others == {"device and precision": 2, "teacher_logits": 1}
    assert "1 of 4 cells are done (not counted: 2 with other device and precision, 1 with other teacher_logits)" in describe_plan(state, Speeds(state))
    save_teacher(tmp_path / "teachers" / "t.safetensors", create_model("resnet56", 10).state_dict(), {"architecture": "resnet56", "dataset": "digits", "complete": True, "epochs": 4})
    assert not read_state(grid).finished and "teacher.weights_sha256" in read_state(grid).others


def test_a_teacher_away_from_the_published_one_is_called_a_finding():
    job = Job("r56_r20")
    state = SimpleNamespace(planned=SimpleNamespace(data=SimpleNamespace(name="cifar100")), epochs={job: (0, 240)})
    assert grids._against_published(state, job, 73.34) == "+1.00 points from the published teacher"
    assert "-1.34 points from the published teacher: a finding" in grids._against_published(state, job, 71.0)
    state.epochs[job] = (0, 10)
    assert grids._against_published(state, job, 54.9) == ""


# The proof


def begin(folder, *arguments):
    "`sortkd-grid` in a process of its own; its grid is in `folder`."
    grid = {**SETTINGS, "results_dir": str(folder / "results"), "teachers_dir": str(folder / "teachers")}
    (folder / "grid.yaml").parent.mkdir(exist_ok=True)
    (folder / "grid.yaml").write_text(yaml.safe_dump(grid))
    command = [sys.executable, "-c", "import sys; from sortkd.grids import main; sys.exit(main())", folder / "grid.yaml", *arguments]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def records_in(folder):
    path = folder / "results" / "quick.jsonl"
    found = [(each["seed"], each["method"]["name"], each) for each in (read_records(path) if path.exists() else [])]
    assert len({cell[:2] for cell in found}) == len(found), "a cell was run twice"
    return {cell[:2]: cell[2] for cell in found}


def test_cut_into_slices_and_carried_the_numbers_are_those_of_an_uncut_run(tmp_path):
    whole = tmp_path / "whole"
    shared = {"results_dir": str(whole / "results"), "teachers_dir": str(whole / "teachers"), **SETTINGS["options"]}
    run_experiment(plan_experiment(pair="r56_r20", methods="kd,kd+sort", seeds="0,1", preset="quick", **shared), progress=False)
    expected = records_in(whole)

    cuts, taken = random.Random(time.time_ns()), []
    (tmp_path / "machine0" / "teachers").mkdir(parents=True)
    began = {}  # at other times in every test
    for number in range(30):
        folder = tmp_path / f"machine{number}"
        grid = grid_in(folder)
        if number:
            folder.mkdir()
            subprocess.run(["tar", "xf", tmp_path / f"machine{number - 1}.tar", "-C", folder], check=True)
            taken += [path.name for path in (folder / "results" / "runs").glob("*/checkpoint.pt")]
        if not (state := read_state(grid)).missing:
            break
        if number < 2:  # the first is asked to stop when a student has begun, the second killed
            start, process = time.monotonic(), begin(folder, "--at-once", "1")
            try:
                lines = iter(process.stdout.readline, "")
                assert any(re.search(r"kd\S* seed \d: epoch", line) for line in lines)
                begun = time.monotonic() - start  # on this machine, under its load
                process.send_signal(signal.SIGKILL if number else signal.SIGTERM)
                rest = process.communicate(timeout=120)[0]
            finally:
                process.kill()
            assert process.returncode == (-signal.SIGKILL if number else 128 + signal.SIGTERM), rest
            assert number or "stopped. What was saved is kept" in rest
        else:
            run_slice(state, begun * cuts.uniform(0.7, 1.5) * 1.1**number, at_once=cuts.choice([1, 2]), quiet=True)
        for checkpoint in (folder / "results" / "runs").glob("*/checkpoint.pt"):
            start_file = checkpoint.parents[1] / f"started-{fingerprint([checkpoint.parent.name])}"
            began.setdefault(checkpoint.parent.name, start_file.read_text())
        subprocess.run(["tar", "cf", tmp_path / f"machine{number}.tar", "-C", folder, "results", "teachers"], check=True)
    else:
        pytest.fail("no end after 30 slices")

    assert taken, "no run was cut"
    ours = records_in(folder)
    assert {f"{name}-{start}" for name, start in began.items()} <= {record["run_id"] for record in ours.values()}, "a start was lost"
    assert ours.keys() == expected.keys() and len(ours) == 4
    for cell, record in ours.items():
        assert compare_runs(expected[cell], record) == []
        assert record["about_teacher"]["weights_sha256"] == expected[cell]["about_teacher"]["weights_sha256"]
    assert run_slice(read_state(grid), quiet=True).empty
    assert "nothing is missing" in describe_plan(read_state(grid), Speeds(read_state(grid)))
