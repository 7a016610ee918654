"A grid that is killed in the middle ends with one record of every cell; the paper's grid and the profiles are whole."
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

from sortkd.experiment.pairs import PAIRS
from sortkd.experiment.storage import read_records
from sortkd.experiment.grid import paper_grid

pytest.importorskip("snakemake")
ROOT = Path(__file__).parents[1]
WORKFLOW = ROOT / "workflow"
OPTIONS = {"dataset": "digits", "epochs": 3, "train_size": 400, "test_size": 100, "device": "cpu"}


def command(folder, *arguments, **config):
    settings = [f"{name}={json.dumps(value)}" for name, value in {"options": OPTIONS, **config}.items()]
    return [sys.executable, "-m", "snakemake", "--snakefile", WORKFLOW / "Snakefile", "--directory", folder, *arguments, "--config", *settings]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def snakemake(folder, *arguments, **config):
    return subprocess.run(command(folder, *arguments, **config), env=environment(), text=True, timeout=300, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def planned(said):
    "The number of jobs of each rule that Snakemake says it will run."
    return {name: int(count) for name, count in re.findall(r"^(\w+) +(\d+)$", said.partition("Job stats:")[2].partition("\n\n")[0], re.MULTILINE)}


def wait_for(condition, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def lives_in(folder):
    "Whether a process that works in `folder` is left."
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.cwd() == str(folder):
                return True
        except psutil.Error:
            pass
    return False


def records_of(folder):
    path = folder / "results" / "quick.jsonl"
    return {(each["pair"], each["seed"], each["method"]["name"]): each for each in read_records(path)} if path.exists() else {}


def outputs_of(folder):
    "When each output was last written."
    return {path: path.stat().st_mtime_ns for path in (folder / "results" / "cells").rglob("seed[0-9].txt")}


def output_of(folder, pair, seed, method):
    return folder / "results" / "cells" / "quick" / pair / method / f"seed{seed}.txt"


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    "The quick grid, killed with all its processes when one cell at least is done and one is being trained."
    folder = tmp_path_factory.mktemp("grid").resolve()
    runs = folder / "results" / "runs"
    with open(folder / "said", "w+") as said:
        process = subprocess.Popen(command(folder, "--cores", "2", cell="command"), env=environment(), start_new_session=True, stdout=said, stderr=said)
        try:
            wait_for(lambda: process.poll() is not None or outputs_of(folder) and list(runs.glob("started-*")))
            assert process.poll() is None, (folder / "said").read_text()[-3000:]  # it ended before it could be killed
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    wait_for(lambda: not lives_in(folder))
    return folder


@pytest.fixture(scope="module")
def resumed(killed):
    """The same grid, started again; before, one finished cell loses its output, as if the kill had come between its
    record and its output. Returns the folder and what was there: records, outputs, starts, the cell without output.
    """
    records, outputs = records_of(killed), outputs_of(killed)
    starts = {path.read_text() for path in (killed / "results" / "runs").glob("started-*")}
    assert records and starts and len(records) < 4
    refused = snakemake(killed, "--cores", "2", cell="command")
    assert refused.returncode != 0 and "lock" in refused.stdout.lower()
    assert records_of(killed) == records and outputs_of(killed) == outputs
    assert snakemake(killed, "--unlock", cell="command").returncode == 0
    lost = next(iter(records))
    output_of(killed, *lost).unlink(missing_ok=True)
    outputs.pop(output_of(killed, *lost), None)
    again = snakemake(killed, "--cores", "2", "--rerun-incomplete", cell="command")
    assert again.returncode == 0, again.stdout[-3000:]
    return killed, records, outputs, starts, lost


@pytest.mark.slow
def test_every_cell_has_exactly_one_record(resumed):
    folder, *_ = resumed
    lines = read_records(folder / "results" / "quick.jsonl")
    cells = {(pair, seed, method) for pair in ["r56_r20"] for seed in (0, 1) for method in ("kd", "kd+sort")}
    assert len(lines) == 4 and records_of(folder).keys() == cells
    with open(folder / "results" / "cells" / "quick" / "grid.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["run_id"] for row in rows} == {line["run_id"] for line in lines} and len(rows) == 4
    assert len({line["about_teacher"]["weights_sha256"] for line in lines}) == 1
    assert len(list((folder / "teachers").rglob("*.safetensors"))) == 1
    assert not list((folder / "results").rglob("*.running.*"))


@pytest.mark.slow
def test_what_was_done_before_the_kill_is_untouched(resumed):
    folder, records, outputs, _, lost = resumed
    now = records_of(folder)
    assert all(now[cell] == record for cell, record in records.items())
    assert output_of(folder, *lost).exists()
    assert outputs.items() <= outputs_of(folder).items()


@pytest.mark.slow
def test_what_was_running_went_on(resumed):
    folder, _, _, starts, _ = resumed
    assert starts <= {record["started"] for record in records_of(folder).values()}


@pytest.mark.slow
def test_a_cell_may_be_a_notebook(resumed):
    folder, *_ = resumed
    before = read_records(folder / "results" / "quick.jsonl")
    target = "results/cells/quick/r56_r20/kd+sort/seed7.ipynb"
    done = snakemake(folder, "--cores", "1", target, cell="notebook")
    assert done.returncode == 0, done.stdout[-3000:]
    *same, new = read_records(folder / "results" / "quick.jsonl")
    assert same == before and (new["method"]["name"], new["seed"], new["recipe"]["epochs"]) == ("kd+sort", 7, 3)
    cells = nbformat.read(folder / target, 4).cells
    assert any("1 record appended" in "".join(output.get("text", "")) for cell in cells for output in cell.get("outputs", []))


@pytest.mark.slow
def test_the_check_names_a_missing_and_a_second_record(resumed):
    folder, *_ = resumed
    path = folder / "results" / "quick.jsonl"
    lines = {cell: json.dumps(record) for cell, record in records_of(folder).items()}
    kept = path.read_text()
    missing = lines.pop(("r56_r20", 1, "kd"))
    path.write_text("".join(f"{line}\n" for line in lines.values()) + lines["r56_r20", 0, "kd+sort"].replace("run_id\": \"", "run_id\": \"again-") + "\n")
    (folder / "results" / "cells" / "quick" / "grid.csv").unlink()
    try:
        done = snakemake(folder, "--cores", "1", cell="command")
    finally:
        path.write_text(kept)
    assert missing and done.returncode != 0
    assert planned(done.stdout) == {"grid": 1, "total": 1}, "the cells themselves were done"
    assert "r56_r20, kd, seed 1: no record" in done.stdout
    assert re.search(r"r56_r20, kd\+sort, seed 0: r56_r20\S+, again-r56_r20", done.stdout)
    assert "seed 0: no record" not in done.stdout and not (folder / "results" / "cells" / "quick" / "grid.csv").exists()


@pytest.mark.slow
def test_a_grid_of_one_cell(tmp_path):
    "Of two networks that are no pair of the papers, with a number of one's own."
    pair, method = "resnet20:resnet8", "kd(temperature=2)+sort"
    done = snakemake(tmp_path, "--cores", "1", cell="command", pairs=[pair], methods=[method], seeds=1, options=OPTIONS | {"epochs": 1, "train_size": 50})
    assert done.returncode == 0 and planned(done.stdout) == {"cell": 1, "grid": 1, "teacher": 1, "total": 3}, done.stdout[-3000:]
    assert list(records_of(tmp_path)) == [(pair, 0, method)] and output_of(tmp_path, pair, 0, method).exists()
    with open(tmp_path / "results" / "cells" / "quick" / "grid.csv", newline="") as file:
        assert [row["run_id"] for row in csv.DictReader(file)] == [record["run_id"] for record in records_of(tmp_path).values()]
    assert not list(tmp_path.rglob("*.running.*"))


@pytest.mark.slow
def test_a_grid_without_a_teacher(tmp_path):
    done = snakemake(tmp_path, "--cores", "1", cell="command", methods=["ce"], seeds=1, options=OPTIONS | {"epochs": 1, "train_size": 50})
    assert done.returncode == 0 and planned(done.stdout) == {"cell": 1, "grid": 1, "total": 2}, done.stdout[-3000:]
    record, = records_of(tmp_path).values()
    assert record["about_teacher"] is None and not (tmp_path / "teachers").exists()


INSTALLED = [name for name in ("slurm", "kubernetes") if find_spec(f"snakemake_executor_plugin_{name}")]


@pytest.mark.parametrize("profile", [*(INSTALLED[:1] or [None]), *(pytest.param(each, marks=pytest.mark.slow) for each in INSTALLED[1:])])
def test_papers_grid(profile, tmp_path):
    "As many cells as the paper's table needs, and each teacher once, each on one GPU; with every profile that can be used here."
    arguments = ["--workflow-profile", WORKFLOW / "profiles" / profile] if profile else []
    done = snakemake(tmp_path, "--dry-run", "--cores", "2", "--configfile", WORKFLOW / "paper.yaml", *arguments, options={})
    assert done.returncode == 0, done.stdout[-3000:]
    said, counts = done.stdout, planned(done.stdout)
    teachers = {pair.teacher for pair in PAIRS.values()}
    assert counts == {"cell": len(paper_grid()), "teacher": len(teachers), "grid": 1, "total": len(paper_grid()) + len(teachers) + 1}
    outputs = set(re.findall(r"output: \S*cells/paper/(\w+)/([\w+]+)/seed(\d+)\.\w+", said))
    assert outputs == {(cell.pair, cell.method, str(cell.seed)) for cell in paper_grid().itertuples()}
    assert len(re.findall(r"resources:.*\bgpu=1\b", said)) == len(paper_grid()) + len(teachers)


@pytest.mark.parametrize("profile", ["slurm", "kubernetes"])
def test_profiles_name_options_that_exist(profile):
    from snakemake.cli import get_argument_parser

    settings = yaml.safe_load((WORKFLOW / "profiles" / profile / "config.yaml").read_text())
    known = {option.lstrip("-") for action in get_argument_parser()._actions for option in action.option_strings}
    of_plugin = {name for name in settings if name.startswith(f"{profile}-")}
    assert settings["executor"] == profile and settings.keys() - of_plugin <= known
    assert {rule: resources["gpu"] for rule, resources in settings["set-resources"].items()} == {"teacher": 1, "cell": 1}


def test_a_mistake_is_named_before_anything_runs(tmp_path):
    done = snakemake(tmp_path, "--cores", "1", options={"epoch": 1})
    assert done.returncode != 0 and "an option is 'epoch'" in done.stdout and "epochs" in done.stdout
    assert not (tmp_path / "results").exists()
