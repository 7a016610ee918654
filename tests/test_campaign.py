"A grid in slices: what comes next, what fits, what is carried; and cut into pieces it ends with the numbers of an uncut run."
import hashlib
import io
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from sortkd import campaign
from sortkd.campaign import Deadline, Job, Speeds, describe_plan, look, main, make_grid, pack, plan_table, priority, read_grid, run_slice, unpack
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
    first = plan_experiment("r56_r20", **shared)
    for pair in ("r32x4_mv2", "wrn40_2_shuv1"):
        ours, theirs = campaign._of_pair(first, pair), plan_experiment(pair, **shared)
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
def planned(tmp_path):
    return look(grid_in(tmp_path, pairs="paper")).planned


def measured(seconds_per_million, pair="r56_r20", **changes):
    record = synthetic_record(pair, epochs=3, precision="float32", **changes)
    del record["synthetic"]
    record["machine"] = describe_machine("cpu")["machine"]
    record["data"] |= {"name": "digits"}
    record["result"]["seconds"] = seconds_per_million * 3000 / 1e6
    return record


def test_time_is_predicted_from_what_was_measured_here_and_never_invented(planned):
    unknown = Speeds(planned).of("r56_r20")
    assert math.isnan(unknown[0]) and unknown[1] == "unknown"
    other = measured(7.0, preset="quick")
    append_record(planned.records_file, other | {"machine": {"processor": "another"}})
    append_record(planned.records_file, other | {"seed": 1, "precision": "bfloat16"})
    append_record(planned.records_file, other | {"seed": 2, "data": other["data"] | {"name": "cifar100"}})
    assert Speeds(planned).of("r56_r20")[1] == "unknown"
    append_record(planned.records_file, measured(4000.0, preset="quick", seed=3))
    speeds = Speeds(planned)
    assert speeds.of("r56_r20") == (pytest.approx(4000.0), "measured")
    seconds, how = speeds.of("r110_r32")
    work = {pair: 3 * speeds.forward(PAIRS[pair].student) + speeds.forward(PAIRS[pair].teacher) for pair in ("r56_r20", "r110_r32")}
    assert how == "scaled" and seconds == pytest.approx(4000.0 * work["r110_r32"] / work["r56_r20"])
    assert speeds.of("teacher resnet56")[0] == pytest.approx(4000.0 * 3 * speeds.forward("resnet56") / work["r56_r20"])
    speeds.note("r56_r20", images=200, seconds=0.5, set_up=2.0, at_once=4)
    later = Speeds(planned)
    assert later.of("r56_r20") == (2500.0, "measured") and (later.set_up, later.at_once) == (2.0, 4)
    append_record(planned.records_file, measured(9.0, pair="ours", preset="quick"))
    for note in ({}, {"kind": "r56_r20"}, {"kind": "r110_r32", "seconds_per_million": "fast", "set_up": 1, "at_once": 1}, {"kind": "ours", "seconds_per_million": 1, "set_up": 1, "at_once": 1}):
        append_record(planned.results_dir / "runs" / "epochs.jsonl", {**speeds.here, **note})
    assert Speeds(planned).measured == later.measured, "what is of another version, or no pair of ours, predicts nothing"


def test_multiply_adds_are_counted():
    # resnet20 on CIFAR: 40.8 million in its convolutions and classifier (He et al. 2016: "FLOPs" 41 million).
    assert campaign.multiply_adds("resnet20", 100, 32) == pytest.approx(40.8, abs=0.1)


def test_the_plan_says_what_is_missing_and_what_is_unknown(tmp_path):
    grid = grid_in(tmp_path, pairs=["r56_r20", "r110_r32"])
    state = look(grid)
    table = plan_table(state, Speeds(state.planned))
    assert list(table.index) == ["teacher resnet56", "teacher resnet110", "r56_r20", "r110_r32"] and list(table["missing"]) == [1, 1, 4, 4]
    assert table["million_rows"]["r56_r20"] == pytest.approx(4 * 3 * 200 / 1e6) and table["hours"].isna().all()
    assert "10 of unknown cost" in describe_plan(state, Speeds(state.planned))
    append_record(state.planned.records_file, measured(4000.0, preset="quick"))
    table = plan_table(state, Speeds(state.planned))
    assert table["hours"]["r56_r20"] == pytest.approx(4 * 3 * 200 / 1e6 * 4000 / 3600) and list(table["how"]) == ["scaled", "scaled", "measured", "scaled"]
    assert not (tmp_path / "teachers").exists() and not (tmp_path / "results" / "runs").exists()
    speeds = Speeds(state.planned)
    speeds.note("r56_r20", images=200, seconds=1800.0, set_up=2.0, at_once=3)  # 6 hours for each of its four runs' twelve epochs
    hours = plan_table(state, speeds)["hours"].sum()
    assert f"Measured with 3 jobs at once; so many share it in about {hours / 3:,.1f} hours" in describe_plan(state, speeds) and hours > 6


def test_what_cannot_reach_a_checkpoint_is_not_started(tmp_path, monkeypatch):
    state = look(grid_in(tmp_path))
    append_record(state.planned.records_file, measured(4e6, preset="quick"))  # an epoch of 200 images in 800 seconds, of the teacher's 400 in more
    monkeypatch.setattr(campaign, "_Worker", lambda *_: pytest.fail("a job was started"))
    assert run_slice(state, 60, quiet=True).empty


def test_a_worker_that_dies_is_a_failed_job_and_the_rest_goes_on(tmp_path, monkeypatch):
    class Dead(campaign._Worker):
        def start(self, job):
            self.process.kill()
            self.process.join()
            super().start(job)

    monkeypatch.setattr(campaign, "_Worker", Dead)
    done = run_slice(look(grid_in(tmp_path)), at_once=1, quiet=True)
    assert list(done["outcome"]) == ["failed"] and done["job"][0] == "teacher resnet56"  # whose cells wait
    monkeypatch.undo()
    with campaign.FileLock(tmp_path / "results" / "runs" / "campaign.lock"), pytest.raises(ValueError, match="another process is at the grid"):
        run_slice(look(grid_in(tmp_path)), quiet=True)


def test_more_at_once_only_while_that_is_faster():
    images = {Job("r56_r20", "kd", seed): 1000 for seed in range(9)}

    def settle(speed):
        "`speed`: rows per second of one of n jobs."
        counter = campaign._AtOnce("auto", SimpleNamespace(device="cuda", cache="full"))
        workers = []
        for _ in range(40):
            while len(workers) < counter.now:
                workers.append(SimpleNamespace(job=Job("r56_r20", "kd", len(workers)), rows=[]))
            for worker in workers[: counter.now]:
                worker.rows.append({"seconds": 1000 / speed(counter.now)})
            counter.look(workers[: counter.now], images)
        return counter.now

    assert settle(lambda n: 100.0) == 8
    assert settle(lambda n: 100.0 / n) == 1
    assert settle(lambda n: 100.0 * min(n, 3) / n) == 3
    assert campaign._AtOnce("auto", SimpleNamespace(device="cuda", cache="auto")).most == 1
    assert campaign._AtOnce("3", SimpleNamespace(device="cuda", cache="auto")).now == 3


# What is carried


def parcel(folder, members, preset="quick", manifest=None):
    "A parcel with any members, and true checksums."
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / "part-0000.tar", "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
            else:
                member.type, member.linkname = content
                archive.addfile(member)
    checksum = hashlib.sha256((folder / "part-0000.tar").read_bytes()).hexdigest()
    about = {"format": 1, "preset": preset, "parts": [{"name": "part-0000.tar", "sha256": checksum}]} | (manifest or {})
    (folder / "manifest.json").write_text(json.dumps(about))
    return folder


RECORD = json.dumps({"run_id": "one"}).encode() + b"\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("../evil", b"x"),
        ("results/../../evil", b"x"),
        ("/tmp/evil", b"x"),
        ("results/runs/../../evil/checkpoint.pt", b"x"),
        ("results/runs/.hidden/checkpoint.pt", b"x"),
        ("results/other.txt", b"x"),
        ("teachers/local/t.pkl", b"x"),
        ("results/runs/x/started", (tarfile.SYMTYPE, "/etc/passwd")),
        ("results/runs/x/checkpoint.pt", (tarfile.LNKTYPE, "results/quick.jsonl")),
        ("results/runs/x", (tarfile.SYMTYPE, "/tmp")),
        ("results/runs/x/started", (tarfile.FIFOTYPE, "")),
    ],
)
def test_nothing_is_taken_from_a_parcel_with_what_no_campaign_writes(name, content, tmp_path):
    folder = parcel(tmp_path / "parcel", [("results/quick.jsonl", RECORD), (name, content)])
    with pytest.raises(ValueError, match="no campaign writes"):
        unpack(grid_in(tmp_path / "here"), folder)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.parent != folder]
    assert not Path("/tmp/evil").exists()


def test_nothing_is_written_through_a_link(tmp_path):
    (tmp_path / "here" / "results" / "runs").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "here" / "results" / "runs" / "x").symlink_to(tmp_path / "other")
    folder = parcel(tmp_path / "parcel", [("results/runs/x/checkpoint.pt", b"x")])
    with pytest.raises(ValueError, match="is a link to"):
        unpack(grid_in(tmp_path / "here"), folder)
    assert not any((tmp_path / "other").iterdir())


def test_a_damaged_or_incomplete_parcel_is_refused(tmp_path):
    grid, folder = grid_in(tmp_path / "here"), tmp_path / "parcel"
    with pytest.raises(FileNotFoundError, match="there is no .*manifest.json"):
        unpack(grid, folder)
    with pytest.raises(ValueError, match="preset 'paper'"):
        unpack(grid, parcel(folder, [("results/quick.jsonl", RECORD)], preset="paper"))
    with pytest.raises(ValueError, match="manifest.json is damaged"):
        unpack(grid, parcel(folder, [], manifest={"parts": 3}))
    parcel(folder, [("results/quick.jsonl", RECORD)])
    with open(folder / "part-0000.tar", "r+b") as file:
        file.seek(600)
        file.write(b"?")
    with pytest.raises(ValueError, match="part-0000.tar is damaged"):
        unpack(grid, folder)
    (folder / "part-0000.tar").unlink()
    with pytest.raises(ValueError, match="part-0000.tar is missing"):
        unpack(grid, folder)
    assert not (tmp_path / "here" / "results" / "quick.jsonl").exists()


def a_state(folder, epochs, run="r56_r20-kd-seed0-abc"):
    "Folders as a campaign leaves them, with a checkpoint of several parts."
    grid = grid_in(folder)
    runs = folder / "results" / "runs"
    (runs / run).mkdir(parents=True)
    torch.save({"curve": [{}] * epochs, "model": {"w": torch.arange(400_000.0)}}, runs / run / "checkpoint.pt")
    start = runs / f"started-{fingerprint([run])}"  # as run_experiment calls it, which the proof below shows
    start.write_text(f"2026-01-0{epochs}T00-00-00.000000Z")
    append_record(folder / "results" / "quick.jsonl", {"run_id": f"run {epochs}"})
    save_teacher(folder / "teachers" / "local" / "resnet56-digits-1.safetensors", {"w": torch.zeros(2)}, {"architecture": "resnet56"})
    return grid, runs / run


def test_what_is_packed_comes_back_and_the_further_checkpoint_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(campaign, "PART_BYTES", 500_000)
    (early, _), (late, run) = a_state(tmp_path / "early", 2), a_state(tmp_path / "late", 3)
    pack(early, tmp_path / "parcel-early")
    packed = pack(late, tmp_path / "parcel-late")
    parts = sorted((tmp_path / "parcel-late").glob("part-*"))
    assert len(parts) == 4 and max(path.stat().st_size for path in parts) <= 500_000
    fresh = grid_in(tmp_path / "fresh")
    assert unpack(fresh, tmp_path / "parcel-early") and len(unpack(fresh, tmp_path / "parcel-late")) == 2
    there = tmp_path / "fresh" / "results" / "runs" / run.name
    start = f"started-{fingerprint([run.name])}"
    assert (there / "checkpoint.pt").read_bytes() == (run / "checkpoint.pt").read_bytes()
    assert (there.parent / start).read_bytes() == (run.parent / start).read_bytes()
    assert [each["run_id"] for each in read_records(tmp_path / "fresh" / "results" / "quick.jsonl")] == ["run 2", "run 3"]
    assert unpack(fresh, tmp_path / "parcel-early") == [] == unpack(fresh, tmp_path / "parcel-late")
    assert (there.parent / start).read_text().startswith("2026-01-03") and set(packed["name"]) >= {"results/quick.jsonl", "teachers/local/resnet56-digits-1.safetensors"}
    pack(late, tmp_path / "parcel-late")  # replaces its own
    other = tmp_path / "fresh" / "teachers" / "local" / "resnet56-digits-1.safetensors"
    save_teacher(other, {"w": torch.ones(2)}, {"architecture": "resnet56"})
    with pytest.raises(ValueError, match="other content"):
        unpack(fresh, tmp_path / "parcel-late")
    with pytest.raises(ValueError, match="other files than a parcel"):
        pack(late, tmp_path / "fresh")
    assert not list(tmp_path.rglob(".unpacked*")) and not list(tmp_path.glob(".parcel*"))


def test_what_was_finished_elsewhere_is_not_carried_on(tmp_path):
    "A parcel brought records of runs, and a teacher, whose checkpoints are still here."
    grid, run = a_state(tmp_path / "here", 2)
    training = {"recipe": {"epochs": 4}, "epochs": 4, "train_images": 400, "data_checksum": "0", "seed": 0}
    left = run.parent / f"teacher-resnet56-{fingerprint('resnet56', training)}.pt"
    for path in (left, run.parent / "teacher-resnet110-0.pt"):
        torch.save({"curve": [{}]}, path)
    names = set(pack(grid, tmp_path / "parcel")["name"])
    assert {f"results/runs/{run.name}/checkpoint.pt", f"results/runs/{left.name}", "results/runs/teacher-resnet110-0.pt"} <= names
    append_record(tmp_path / "here" / "results" / "quick.jsonl", {"run_id": f"{run.name}-2026-01-04T00-00-00.000000Z"})
    save_teacher(tmp_path / "here" / "teachers" / "local" / "made.safetensors", {"w": torch.zeros(2)}, {"architecture": "resnet56", **training})
    now = set(pack(grid, tmp_path / "parcel")["name"])
    kinds = (f"results/runs/{run.name}/checkpoint.pt", f"results/runs/started-{fingerprint([run.name])}", f"results/runs/{left.name}")
    assert names - now == {*kinds} and now - names == {"teachers/local/made.safetensors"}
    assert left.exists() and (run / "checkpoint.pt").exists(), "packing removes nothing"


def test_every_teacher_in_use_is_carried_and_no_other(tmp_path):
    grid, _ = a_state(tmp_path / "here", 2)
    teachers = tmp_path / "here" / "teachers"
    for name in ("resnet56", "vgg13"):
        save_teacher(teachers / f"{name}-given.safetensors", {"w": torch.zeros(2)}, {"architecture": name})
        fetched = teachers / "cifar_teachers" / f"{name}_vanilla" / "ckpt_epoch_240.pth"
        fetched.parent.mkdir(parents=True)
        torch.save({"model": {"w": torch.zeros(2)}}, fetched)
    packed = pack(grid, tmp_path / "parcel")["name"]
    expected = {"resnet56-given.safetensors", "local/resnet56-digits-1.safetensors", "cifar_teachers/resnet56_vanilla/ckpt_epoch_240.pth"}
    assert {name for name in packed if name.startswith("teachers")} == {f"teachers/{name}" for name in expected}
    fresh = grid_in(tmp_path / "fresh")
    unpack(fresh, tmp_path / "parcel")
    for name in expected:
        assert (tmp_path / "fresh" / "teachers" / name).read_bytes() == (teachers / name).read_bytes()


def test_folders_may_have_any_names(tmp_path):
    "In a results folder that is itself called runs, too."
    grid, run = a_state(tmp_path / "here", 2)
    append_record(run.parent / "epochs.jsonl", {"kind": "r56_r20"})
    packed = pack(grid, tmp_path / "parcel")
    fresh = grid_in(tmp_path, results_dir=str(tmp_path / "runs"))
    unpack(fresh, tmp_path / "parcel")
    for name in packed["name"]:
        assert ((tmp_path / "runs" / name.removeprefix("results/")) if name.startswith("results") else tmp_path / name).is_file(), name


# What a slice begins with


def test_a_teachers_logits_come_right_before_its_first_cell(tmp_path):
    state = look(grid_in(tmp_path, pairs="paper", seeds=1, options={**SETTINGS["options"], "cache": "full"}))
    for name in ("resnet56", "resnet32x4"):
        state.teachers[name] = SimpleNamespace()
    state.epochs = {job: epochs for job, epochs in state.epochs.items() if job.method or state.teachers[job.teacher] is None}
    order = campaign._with_logits(state)
    logits = [job for job in order if not job.method and state.teachers[job.teacher]]
    assert [job.teacher for job in logits] == ["resnet56", "resnet32x4"] and [job for job in order if job not in logits] == priority(state.missing, state.grid)
    for job in logits:
        after = order[order.index(job) + 1]
        assert after.teacher == job.teacher and after.method, "not earlier than it is needed"
    state.planned = campaign.replace(state.planned, cache="off")
    assert campaign._with_logits(state) == priority(state.missing, state.grid)


def test_a_damaged_cache_counts_as_none(tmp_path):
    "The plan is made without opening it; the run that opens it says what is wrong."
    state = look(grid_in(tmp_path, options={**SETTINGS["options"], "cache": "full"}))
    speeds = Speeds(state.planned)
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
    experiment = plan_experiment("r56_r20", "kd,kd+sort", "0,1", skip_recorded=True, **grid.shared)
    save_teacher(tmp_path / "teachers" / "t.safetensors", create_model("resnet56", 10).state_dict(), {"architecture": "resnet56", "dataset": "digits", "complete": True, "epochs": 4})
    about = look(grid).teachers["resnet56"].as_record()
    changes = iter([{"device": "cuda", "precision": "bfloat16"}, {"teacher_logits": "cached"}, {"device": "cuda", "precision": "bfloat16"}, {}])
    for seed in experiment.seeds:
        for method in experiment.methods:
            run = plan_run(experiment, method, seed, "computed", about)
            record = {"run_id": f"{run.folder.name}-2026", **run.settings, "data": run.about_data, "about_teacher": about}
            change = next(changes)
            append_record(experiment.records_file, record | change | ({"run_id": f"another-{seed}-{method.name}"} if change else {}))
    state = look(grid)
    assert state.finished == {Job("r56_r20", "kd+sort", 1)} and state.others == {"device and precision": 2, "teacher_logits": 1}
    assert "1 of 4 cells are done (not counted: 2 with other device and precision, 1 with other teacher_logits)" in describe_plan(state, Speeds(state.planned))
    save_teacher(tmp_path / "teachers" / "t.safetensors", create_model("resnet56", 10).state_dict(), {"architecture": "resnet56", "dataset": "digits", "complete": True, "epochs": 4})
    assert not look(grid).finished and "teacher.weights_sha256" in look(grid).others


def test_a_teacher_away_from_the_published_one_is_called_a_finding():
    job = Job("r56_r20")
    state = SimpleNamespace(planned=SimpleNamespace(data=SimpleNamespace(name="cifar100")), epochs={job: (0, 240)})
    assert campaign._against_published(state, job, 73.34) == "+1.00 points from the published teacher"
    assert "-1.34 points from the published teacher: a finding" in campaign._against_published(state, job, 71.0)
    state.epochs[job] = (0, 10)
    assert campaign._against_published(state, job, 54.9) == ""


# The proof


def begin(folder, *arguments):
    "`sortkd-grid` in a process of its own; its grid is in `folder`."
    grid = {**SETTINGS, "results_dir": str(folder / "results"), "teachers_dir": str(folder / "teachers")}
    (folder / "grid.yaml").parent.mkdir(exist_ok=True)
    (folder / "grid.yaml").write_text(yaml.safe_dump(grid))
    command = [sys.executable, "-c", "import sys; from sortkd.campaign import main; sys.exit(main())", folder / "grid.yaml", *arguments]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def records_in(folder):
    path = folder / "results" / "quick.jsonl"
    found = [(each["seed"], each["method"]["name"], each) for each in (read_records(path) if path.exists() else [])]
    assert len({cell[:2] for cell in found}) == len(found), "a cell was run twice"
    return {cell[:2]: cell[2] for cell in found}


def test_cut_into_slices_and_carried_the_numbers_are_those_of_an_uncut_run(tmp_path):
    whole = tmp_path / "whole"
    shared = {"results_dir": str(whole / "results"), "teachers_dir": str(whole / "teachers"), **SETTINGS["options"]}
    run_experiment(plan_experiment("r56_r20", "kd,kd+sort", "0,1", "quick", **shared), progress=False)
    expected = records_in(whole)

    cuts, taken = random.Random(time.time_ns()), []
    began = {}  # at other times in every test
    for number in range(30):
        folder = tmp_path / f"machine{number}"
        grid = grid_in(folder)
        if number:
            taken += unpack(grid, tmp_path / f"parcel{number - 1}")
        if not (state := look(grid)).missing:
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
            began.setdefault(checkpoint.parent.name, campaign._beside(checkpoint)[0].read_text())
        pack(grid, tmp_path / f"parcel{number}")
    else:
        pytest.fail("no end after 30 slices")

    assert any(name.endswith("checkpoint.pt") for name in taken), "no run was cut"
    ours = records_in(folder)
    assert {f"{name}-{start}" for name, start in began.items()} <= {record["run_id"] for record in ours.values()}, "a start was lost"
    assert ours.keys() == expected.keys() and len(ours) == 4
    for cell, record in ours.items():
        assert compare_runs(expected[cell], record) == []
        assert record["about_teacher"]["weights_sha256"] == expected[cell]["about_teacher"]["weights_sha256"]
    assert run_slice(look(grid), quiet=True).empty
    assert "nothing is missing" in describe_plan(look(grid), Speeds(state.planned))
