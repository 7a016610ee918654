"A grid in slices: what is missing, what it costs, and the numbers of an uncut run after cuts."
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, needs_cifar100
from synthetic import synthetic_record

from sortkd.experiment import slices
from sortkd.experiment.grid import make_grid
from sortkd.experiment.one_run import prepare_run
from sortkd.experiment.provenance import describe_machine
from sortkd.experiment.record import compare_runs
from sortkd.experiment.run import run_experiment
from sortkd.experiment.setup import prepare_experiment
from sortkd.experiment.slices import (
    describe_state, experiments_of, forecast, main, read_state, run_slice)
from sortkd.experiment.storage import append_record, read_records
from sortkd.experiment.teacher import existing_teacher
from sortkd.train.networks import create_model
from sortkd.train.teachers import save_teacher

PAIR = "resnet20:resnet8"
SETTINGS = {"pairs": [PAIR], "methods": ["kd", "kd+sort"], "seeds": 2, "preset": "quick",
            "options": {"dataset": "digits", "epochs": 3, "train_size": 200, "test_size": 100,
                        "device": "cpu", "precision": "float32", "cache": "off"}}


def places_in(folder):
    return {f"{name}_dir": str(folder / name) for name in ("results", "teachers")}


def grid_in(folder, **changes):
    return make_grid({**SETTINGS, **places_in(folder), **changes})


@pytest.mark.parametrize(("change", "said"), [
    ({"seed": 1}, "a key of the grid is 'seed'.*Did you mean 'seeds'"),
    ({"pairs": ["r56_r2"]}, "pair is 'r56_r2'.*r56_r20"), ({"methods": ["kd+sorted"]}, "sort"),
    ({"methods": ["kd", "kd"]}, "methods is"), ({"seeds": 0}, "seeds is 0"),
    ({"seeds": "all"}, "seeds is 'all'"), ({"preset": "full"}, "preset is 'full'"),
    ({"options": 5}, "options is 5"), ({"options": {"epoch": 1}}, "an option is 'epoch'.*epochs"),
    ({"options": {"teachers_dir": "x"}}, "an option is 'teachers_dir'")])
def test_mistakes_in_a_grid_are_named(change, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        grid_in(tmp_path, **change)


@pytest.mark.parametrize("text", [
    "a: [", "- 1", "pairs: paper", "!!python/object/apply:os.system [touch planted]",
    "pairs: [r56_r20]\nmethods: [kd]\nseeds: 1\npreset: quick\noptions: {epochs: many}"])
def test_files_that_are_no_grid(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("grid.yaml").write_text(text)
    assert main(["grid.yaml"]) == 1 and main(["absent.yaml"]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert re.search("YAML file|give names|does not say methods, seeds|epochs is 'many'", first)
    assert "No such file" in second and os.listdir() == ["grid.yaml"]
    with pytest.raises(SystemExit):
        main(["grid.yaml", "--budget=25"])  # nanoseconds
    assert "such as 25m" in capsys.readouterr().err


def state_of(grid):
    return read_state(experiments_of(grid), grid.cells)


def keep_teacher(folder):
    about = {"architecture": "resnet20", "dataset": "digits", "complete": True, "epochs": 4}
    weights = create_model("resnet20", 10).state_dict()
    save_teacher(folder / "teachers" / "t.safetensors", weights, about)


@pytest.fixture
def taught(tmp_path):
    "A grid whose teacher exists, and a function that gives a record of a cell."
    keep_teacher(tmp_path)
    grid = grid_in(tmp_path)
    experiment = experiments_of(grid)[PAIR]
    about = existing_teacher(experiment).as_record() | {"top1": 50.0}

    def cell(method, seed, **changes):
        chosen = next(each for each in experiment.methods if each.name == method)
        run = prepare_run(experiment, chosen, seed, "computed", about)
        record = synthetic_record(method=method, seed=seed, preset="quick") | run.facts | {
            "run_id": f"{run.folder.name}-2026", **describe_machine("cpu")}
        record["curve"]["seconds"] = [9.0, 9.0, 0.8]
        return record | changes

    return grid, experiment.records_file, cell


def test_cells_come_seed_by_seed_and_nothing_is_written(tmp_path):
    state = state_of(grid_in(tmp_path, pairs=[PAIR, "resnet8:resnet8"], methods=["kd", "ce"]))
    assert [*state[["seed", "pair", "method"]].itertuples(index=False, name=None)] == [
        (seed, pair, method) for seed in (0, 1) for pair in (PAIR, "resnet8:resnet8")
        for method in ("kd", "ce")]
    assert not state["finished"].any() and not os.listdir(tmp_path)
    assert "8 of 8 cells are missing" in describe_state(state)
    assert forecast(state)["hours"].isna().all() and "unknown" in describe_state(state, False)


def test_hours_are_measured_here_and_never_invented(taught):
    grid, path, cell = taught
    machine = describe_machine("cpu")["machine"]
    append_record(path, cell("kd", 0, machine={**machine, "processor": "another"}))
    state = state_of(grid)
    assert state["finished"].sum() == 1 and forecast(state)["hours"].isna().all()
    append_record(path, cell("kd+sort", 0))  # its last epoch took 0.8 seconds
    table = forecast(state_of(grid)).loc[PAIR]
    assert table["cells"].tolist() == [2, 2] and table["finished"].tolist() == [1, 1]
    assert table["hours"].tolist() == pytest.approx([3 * 0.8 / 3600] * 2)


def test_cells_recorded_with_other_settings_do_not_count(taught, tmp_path):
    grid, path, cell = taught
    append_record(path, cell("kd", 0, run_id="another-0", device="cuda", precision="bfloat16"))
    append_record(path, cell("kd+sort", 0, run_id="another-1", teacher_logits="cached"))
    append_record(path, cell("kd+sort", 1))
    append_record(path, {"method": 5})
    with pytest.warns(match="was left out"):
        assert state_of(grid)["finished"].tolist() == [False, False, False, True]
    keep_teacher(tmp_path)  # one with other weights
    with pytest.warns(match="was left out"):
        assert not state_of(grid)["finished"].any()


def test_a_slice_ends_in_time(tmp_path, monkeypatch):
    grid = grid_in(tmp_path)
    experiments = experiments_of(grid)
    monkeypatch.setattr(slices, "run_experiment", lambda *_: time.sleep(60))
    start = time.monotonic()
    assert not run_slice(experiments, grid.cells, 1, progress=False)
    assert 0.8 < time.monotonic() - start < 10 and signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_cells_of_a_pair_train_together_and_an_error_ends_no_slice(taught, monkeypatch, capsys):
    asked, grid = [], taught[0]

    def fail(experiment, progress):
        asked.append((experiment.seeds, [each.name for each in experiment.methods]))
        raise FloatingPointError("the loss is nan")

    monkeypatch.setattr(slices, "run_experiment", fail)
    experiments = experiments_of(grid)
    for at_once, seeds in ((2, [(0,), (1,)]), (8, [(0, 1)])):
        asked.clear()
        monkeypatch.setattr(slices, "STUDENTS_AT_ONCE", at_once)
        errors = run_slice(experiments, grid.cells, progress=False)
        assert errors == [f"{PAIR}: FloatingPointError: the loss is nan"] * len(seeds)
        assert capsys.readouterr().err.splitlines() == errors
        assert asked == [(each, ["kd", "kd+sort"]) for each in seeds]


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


def test_cut_after_every_epoch_and_moved_the_numbers_stay(uncut, tmp_path, monkeypatch):
    def one_epoch(experiment, progress):
        def cut(row):
            raise slices._TimeIsUp
        return run_experiment(experiment, progress, callbacks=[cut])

    monkeypatch.setattr(slices, "run_experiment", one_epoch)
    folder, began, number = tmp_path / "machine0", {}, 0
    folder.mkdir()
    while len(records_in(folder)) < 2 and number < 20:
        number += 1
        grid = grid_in(folder, seeds=1)
        run_slice(experiments_of(grid), grid.cells, progress=False)
        for checkpoint in (folder / "results" / "runs").glob("*/checkpoint.pt"):
            run = checkpoint.parent
            began.setdefault(run.name, (run / "started").read_text())
        archive, following = tmp_path / "all.tar", tmp_path / f"machine{number}"
        following.mkdir()
        subprocess.run(["tar", "cf", archive, "-C", folder, "results", "teachers"], check=True)
        subprocess.run(["tar", "xf", archive, "-C", following], check=True)
        folder = following
    assert number == 8  # four cuts of the teacher, three of the students, and the end
    assert_same(records_in(folder), uncut)
    starts = {f"{name}-{start}" for name, start in began.items()}
    assert starts == {record["run_id"] for record in records_in(folder).values()}
    assert "0 of 2 cells are missing" in describe_state(state_of(grid_in(folder, seeds=1)))


@needs_cifar100
def test_a_plan_shows_no_result_before_its_look(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert main(["results/plans/few_steps.yaml", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "0 of 180 cells are missing" in shown and "SD" not in shown


@pytest.mark.slow
def test_killed_in_the_middle_nothing_is_lost(uncut, tmp_path):
    runs, grid = tmp_path / "results" / "runs", grid_in(tmp_path, seeds=1)
    (tmp_path / "grid.yaml").write_text(
        yaml.safe_dump({**SETTINGS, "seeds": 1, **places_in(tmp_path)}))
    program = "import sys; from sortkd.experiment.slices import main; sys.exit(main())"
    command = [sys.executable, "-c", program, tmp_path / "grid.yaml"]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline, session = time.monotonic() + 120, "resnet20-resnet8-kd*/sessions.jsonl"
    while process.poll() is None and not list(runs.glob(session)) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    said = process.communicate(timeout=60)[0]
    assert process.returncode == -signal.SIGKILL and "teacher resnet20" in said, said
    assert main([str(tmp_path / "grid.yaml"), "--quiet", "--budget=10m"]) == 0
    assert state_of(grid)["finished"].all()
    assert_same(records_in(tmp_path), uncut)
