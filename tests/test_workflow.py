"A grid that is killed ends with one record of every cell; the paper's grid and profiles are whole."
import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import nbformat
import psutil
import pytest
import yaml

from sortkd.experiment.grid import paper_grid
from sortkd.experiment.pairs import PAIRS
from sortkd.experiment.storage import read_records

pytest.importorskip("snakemake")
WORKFLOW = Path(__file__).parents[1] / "workflow"
OPTIONS = {"dataset": "digits", "epochs": 3, "train_size": 400, "test_size": 100, "device": "cpu"}
SMALL = OPTIONS | {"epochs": 1, "train_size": 50}
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def command(folder, *arguments, **config):
    values = {"options": OPTIONS, "cell": "command", **config}
    settings = [f"{name}={json.dumps(value)}" for name, value in values.items()]
    return [sys.executable, "-m", "snakemake", "--snakefile", WORKFLOW / "Snakefile",
            "--directory", folder, "--cores", "2", *arguments, "--config", *settings]


def snakemake(folder, *arguments, **config):
    return subprocess.run(command(folder, *arguments, **config), env=ENVIRONMENT, text=True,
                          timeout=300, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def planned(said):
    "The number of jobs of each rule that Snakemake says it will run."
    jobs = said.partition("Job stats:")[2].partition("\n\n")[0]
    return {name: int(count) for name, count in re.findall(r"^(\w+) +(\d+)$", jobs, re.MULTILINE)}


def wait_for(condition, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def lives_in(folder):
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.cwd() == str(folder):
                return True
        except psutil.Error:
            pass
    return False


def records_of(folder):
    path = folder / "results" / "quick.jsonl"
    records = read_records(path) if path.exists() else []
    return {(each["pair"], each["seed"], each["method"]["name"]): each for each in records}


def table_of(folder):
    with open(folder / "results" / "cells" / "quick" / "grid.csv", newline="") as file:
        return list(csv.DictReader(file))


def output_of(folder, pair, seed, method):
    return folder / "results" / "cells" / "quick" / pair / method / f"seed{seed}.txt"


def outputs_of(folder):
    cells = folder / "results" / "cells"
    return {path: path.stat().st_mtime_ns for path in cells.rglob("seed[0-9].txt")}


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    "The quick grid, killed when at least one cell is finished and one is being trained."
    folder = tmp_path_factory.mktemp("grid").resolve()
    runs = folder / "results" / "runs"
    with open(folder / "said", "w+") as said:
        process = subprocess.Popen(command(folder), env=ENVIRONMENT, start_new_session=True,
                                   stdout=said, stderr=said)
        try:
            wait_for(lambda: process.poll() is not None
                     or outputs_of(folder) and list(runs.glob("*/started")))
            assert process.poll() is None, (folder / "said").read_text()[-3000:]
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    wait_for(lambda: not lives_in(folder))
    return folder


@pytest.fixture(scope="module")
def resumed(killed):
    "The same grid, run again, with what was there before: records, outputs, starts and a lost output."
    records, outputs = records_of(killed), outputs_of(killed)
    runs = killed / "results" / "runs"
    starts = {path.read_text() for path in runs.glob("*/started")}
    assert records and starts and len(records) < 4
    refused = snakemake(killed)
    assert refused.returncode != 0 and "lock" in refused.stdout.lower()
    assert records_of(killed) == records and outputs_of(killed) == outputs
    assert snakemake(killed, "--unlock").returncode == 0
    lost = output_of(killed, *next(iter(records)))  # as if killed between record and output
    lost.unlink(missing_ok=True)
    outputs.pop(lost, None)
    again = snakemake(killed, "--rerun-incomplete")
    assert again.returncode == 0, again.stdout[-3000:]
    return killed, records, outputs, starts, lost


@pytest.mark.slow
def test_a_killed_grid_continues(resumed):
    folder, records, outputs, starts, lost = resumed
    lines, now = read_records(folder / "results" / "quick.jsonl"), records_of(folder)
    assert len(lines) == 4 and now.keys() == {
        ("r56_r20", seed, method) for seed in (0, 1) for method in ("kd", "kd+sort")}
    rows = table_of(folder)
    assert len(rows) == 4 and {row["run_id"] for row in rows} == {line["run_id"] for line in lines}
    assert len({line["about_teacher"]["weights_sha256"] for line in lines}) == 1
    assert len(list((folder / "teachers").rglob("*.safetensors"))) == 1
    assert not list((folder / "results").rglob("*.running.*"))
    assert all(now[cell] == record for cell, record in records.items())
    assert lost.exists() and outputs.items() <= outputs_of(folder).items()
    assert starts <= {record["started"] for record in lines}, "what was running was started anew"


@pytest.mark.slow
def test_a_cell_may_be_a_notebook(resumed):
    folder, *_ = resumed
    before = read_records(folder / "results" / "quick.jsonl")
    target = "results/cells/quick/r56_r20/kd+sort/seed7.ipynb"
    done = snakemake(folder, target, cell="notebook")
    assert done.returncode == 0, done.stdout[-3000:]
    *same, new = read_records(folder / "results" / "quick.jsonl")
    assert same == before and (new["method"]["name"], new["seed"]) == ("kd+sort", 7)
    outputs = [output for cell in nbformat.read(folder / target, 4).cells
               for output in cell.get("outputs", [])]
    assert any("1 record appended" in "".join(output.get("text", "")) for output in outputs)


@pytest.mark.slow
def test_the_check_names_a_missing_and_a_second_record(resumed):
    folder, *_ = resumed
    path = folder / "results" / "quick.jsonl"
    lines = {cell: json.dumps(record) for cell, record in records_of(folder).items()}
    kept = path.read_text()
    del lines["r56_r20", 1, "kd"]
    second = lines["r56_r20", 0, "kd+sort"].replace('run_id": "', 'run_id": "again-')
    path.write_text("".join(f"{line}\n" for line in [*lines.values(), second]))
    table = folder / "results" / "cells" / "quick" / "grid.csv"
    table.unlink()
    try:
        done = snakemake(folder)
    finally:
        path.write_text(kept)
    assert done.returncode != 0 and not table.exists()
    assert planned(done.stdout) == {"grid": 1, "total": 1}, "the cells themselves were finished"
    assert "r56_r20, kd, seed 1: no record" in done.stdout
    assert re.search(r"r56_r20, kd\+sort, seed 0: r56_r20\S+, again-r56_r20", done.stdout)


@pytest.mark.slow
def test_a_grid_of_one_cell(tmp_path):
    "Of two networks that are not a pair of the papers, with a number of one's own."
    cell = "resnet20:resnet8", 0, "kd(temperature=2)+sort"
    done = snakemake(tmp_path, pairs=[cell[0]], methods=[cell[2]], seeds=1, options=SMALL)
    jobs = {"cell": 1, "teacher": 1, "grid": 1, "total": 3}
    assert done.returncode == 0 and planned(done.stdout) == jobs, done.stdout[-3000:]
    (found, record), = records_of(tmp_path).items()
    assert found == cell and output_of(tmp_path, *cell).exists()
    assert [row["run_id"] for row in table_of(tmp_path)] == [record["run_id"]]


INSTALLED = [name for name in ("slurm", "kubernetes")
             if find_spec(f"snakemake_executor_plugin_{name}")]


@pytest.mark.parametrize("profile", [
    *(INSTALLED[:1] or [None]),
    *(pytest.param(each, marks=pytest.mark.slow) for each in INSTALLED[1:])])
def test_papers_grid(profile, tmp_path):
    "As many cells as the paper's table needs, each named, and each teacher once."
    given = ["--workflow-profile", WORKFLOW / "profiles" / profile] if profile else []
    done = snakemake(tmp_path, "--dry-run", "--configfile", WORKFLOW / "paper.yaml", *given,
                     options={}, cell="notebook")
    assert done.returncode == 0, done.stdout[-3000:]
    cells, teachers = paper_grid(), len({pair.teacher for pair in PAIRS.values()})
    assert planned(done.stdout) == {"cell": len(cells), "teacher": teachers, "grid": 1,
                                    "total": len(cells) + teachers + 1}
    assert set(re.findall(r"Job \d+: (\w+), ([\w+]+), seed (\d+)", done.stdout)) == {
        (cell.pair, cell.method, str(cell.seed)) for cell in cells.itertuples()}


@pytest.mark.parametrize("profile", ["slurm", "kubernetes"])
def test_profiles_name_options_that_exist(profile):
    from snakemake.cli import get_argument_parser
    settings = yaml.safe_load((WORKFLOW / "profiles" / profile / "config.yaml").read_text())
    actions = get_argument_parser()._actions
    known = {option.lstrip("-") for action in actions for option in action.option_strings}
    of_plugin = {name for name in settings if name.startswith(f"{profile}-")}
    assert settings["executor"] == profile and settings.keys() - of_plugin <= known
    gpus = {rule: resources["gpu"] for rule, resources in settings["set-resources"].items()}
    assert gpus == {"teacher": 1, "cell": 1}


def test_a_mistake_is_named_before_anything_runs(tmp_path):
    done = snakemake(tmp_path, options={"epoch": 1})
    assert done.returncode != 0 and "an option is 'epoch'" in done.stdout
    assert not (tmp_path / "results").exists()
