"Planted files, links and commands do no harm; and files stay whole, whoever else writes them."
import ast
import functools
import io
import json
import os
import pickle
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, at_once, raises

import sortkd.experiment.plugins
from sortkd.evidence.preregistration import read_plan
from sortkd.experiment.slices import main
from sortkd.experiment.storage import append_record, read_correct, save_correct
from sortkd.experiment.run import run_experiment
from sortkd.experiment.setup import prepare_experiment
from sortkd.fronts.commands import evaluate_command, run
from sortkd.methods import REPAIRS
from sortkd.train.images import load_digits
from sortkd.train.networks import create_model
from sortkd.train.teachers import fetch_published, get_teacher, read_checkpoint, save_teacher
from sortkd.utils.files import save_atomically

SMALL = {"pair": "resnet8:resnet8", "preset": "quick", "dataset": "digits", "methods": "kd+sort",
         "epochs": 2, "train_size": 200, "test_size": 100, "device": "cpu"}


class CreatesFile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


def save_plain(content, path):
    path.write_bytes(pickle.dumps(content, protocol=2))


WAYS = [torch.save, functools.partial(torch.save, _use_new_zipfile_serialization=False), save_plain]


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory, weights):
    path = tmp_path_factory.mktemp("given") / "resnet8.safetensors"
    return save_teacher(path, weights, {"architecture": "resnet8", "dataset": "digits"})


def small_run(folder, teacher_file, *callbacks):
    folders = {"results_dir": f"{folder}/results", "teachers_dir": f"{folder}/teachers"}
    experiment = prepare_experiment(**SMALL, teacher=str(teacher_file), **folders)
    return run_experiment(experiment, progress=False, callbacks=callbacks)


def state_of(folder):
    "Every name below a folder, with the content of files and the target of links."
    return {str(path): os.readlink(path) if path.is_symlink() else
            path.read_bytes() if path.is_file() else None for path in Path(folder).rglob("*")}


@pytest.mark.parametrize("save", WAYS)
@pytest.mark.parametrize("name", ["teacher.pth", "teacher.safetensors"])
def test_a_checkpoint_that_would_run_code(tmp_path, save, name, capsys, monkeypatch):
    mark, path = tmp_path / "executed", tmp_path / name
    save({"model": CreatesFile(mark)}, path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"{name} cannot be read as weights"):
        read_checkpoint(path)
    assert evaluate_command([str(path), "--architecture=resnet8", "--dataset=digits"]) == 1
    assert run(["--dataset=digits", "--preset=quick", "--device=cpu", f"--teacher={path}",
                f"--results-dir={tmp_path / 'results'}"]) == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 2 and not mark.exists()
    content = path.read_bytes()
    load = pickle.loads if save is save_plain else functools.partial(torch.load, weights_only=False)
    load(content if save is save_plain else io.BytesIO(content))
    assert mark.exists(), "the planted file does nothing, so this test shows nothing"


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory, teacher_file):
    "The folders of a run that was stopped after its first epoch."
    folder = tmp_path_factory.mktemp("interrupted")
    with pytest.raises(KeyboardInterrupt):
        small_run(folder, teacher_file, raises(KeyboardInterrupt))
    assert len(list(folder.rglob("checkpoint.pt"))) == 1
    return folder


@pytest.mark.parametrize("save", WAYS)
def test_a_training_checkpoint_of_something_else(tmp_path, interrupted, teacher_file, save):
    shutil.copytree(interrupted, tmp_path, dirs_exist_ok=True)
    checkpoint, = tmp_path.rglob("checkpoint.pt")
    save({"model": CreatesFile(checkpoint.with_name("executed"))}, checkpoint)
    with pytest.raises(ValueError, match="checkpoint.pt .*delete it to start the run again"):
        small_run(tmp_path, teacher_file)
    assert not checkpoint.with_name("executed").exists()
    assert not (tmp_path / "results" / "quick.jsonl").exists()


def member(name, content=b"", kind=tarfile.REGTYPE, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, len(content)
    return info, content


def make_archive(path, *members):
    with tarfile.open(path, "w") as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content))
    return path


def known(architecture):
    return f"cifar_teachers/{architecture}_vanilla/ckpt_epoch_240.pth"


def test_archives_of_teachers(tmp_path, web):
    "Only plain members with the names that are known are taken."
    folder, address, _ = web
    first, link, hard = known("resnet56"), tarfile.SYMTYPE, tarfile.LNKTYPE
    members = [
        member("../escaped", b"x"), member(f"{tmp_path}/escaped", b"x"), member("secret", b"x"),
        member(first, kind=link, target="../../secret"), member(f"./{first}", b"x"),
        member(first, kind=hard, target="/etc/hostname"), member(first, kind=tarfile.CHRTYPE),
        member("cifar_teachers", kind=link, target=str(tmp_path)), member(known("other"), b"x")]
    make_archive(folder / "teachers.tar", *members, member(known("vgg13"), b"good"))
    fetch_published(tmp_path / "inner" / "teachers", f"{address}/teachers.tar")
    taken = [path for path in (tmp_path / "inner").rglob("*") if not path.is_dir()]
    assert taken == [tmp_path / "inner" / "teachers" / known("vgg13")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inner", "web"]


@pytest.mark.parametrize("way", ["page", "cut", "cut file"])
def test_a_download_that_is_not_whole_leaves_nothing(tmp_path, web, way):
    folder, address, _ = web
    members = [member(known(name), os.urandom(50_000)) for name in ("resnet56", "vgg13")]
    archive = make_archive(folder / "teachers.tar", *members)
    changed = {"page": b"<html>please log in</html>" * 100,
               "cut file": archive.read_bytes()[:60_000]}
    archive.write_bytes(changed.get(way, archive.read_bytes()))
    name = "cut/teachers.tar" if way == "cut" else "teachers.tar"
    with pytest.raises(ConnectionError, match="published teachers could not be downloaded from"):
        fetch_published(tmp_path / "teachers", f"{address}/{name}")
    assert not list((tmp_path / "teachers").rglob("*"))


@pytest.mark.parametrize("link", [
    "results", "results/runs", "results/teacher_logits", "results/quick.jsonl", "results/runs/RUN",
    "results/runs/RUN/checkpoint.pt", "results/runs/RUN/run.lock", "results/quick.correct",
    "teachers", "teachers/local"])
def test_links_in_the_folders_of_a_run(tmp_path, interrupted, teacher_file, link):
    "A results folder from somebody else: whatever in it leads elsewhere is refused."
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    shutil.copytree(interrupted, inside)
    (inside / "teachers").mkdir(exist_ok=True)
    outside.mkdir()
    run_folder, = (inside / "results" / "runs").glob("resnet8-*")
    path = inside / link.replace("RUN", run_folder.name)
    if path.exists():
        shutil.move(path, outside / "target")
    elif path.suffix in (".jsonl", ".lock"):
        (outside / "target").write_text("a line that somebody needs\n")
    else:
        (outside / "target").mkdir()
    path.symlink_to(outside / "target")
    before = state_of(outside)
    with pytest.raises(ValueError, match="is a link to") as error:
        small_run(inside, teacher_file)
    assert str(outside / "target") in str(error.value), "it says where the link leads"
    assert state_of(outside) == before and path.is_symlink()


def test_a_file_system_without_locks_is_found_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr("fcntl.flock", raises(OSError(37, "No locks available")))
    with pytest.raises(ValueError, match="results_dir is .*No locks available.*name another folder"):
        prepare_experiment(**SMALL, results_dir=str(tmp_path / "r"), teachers_dir=str(tmp_path))


PLUGIN = """
from pathlib import Path
Path({mark!r}).touch()
from sortkd.experiment.plugins import register_repair
register_repair("boost")(lambda logits, target: logits)
"""
OPTIONS = {"dataset": "digits", "teacher": "none.pth"}
GRID = {"pairs": ["resnet8:resnet8"], "methods": ["kd"], "seeds": 1, "preset": "quick",
        "options": OPTIONS}
PLAN = {"question": "?", "primary": None, "comparisons": [], "beside": [], "outcome": "last_top1",
        "smallest_effect": 0.5, "level": 0.05, "looks": []}


@pytest.mark.parametrize("beside", [False, True], ids=["grid", "config.yaml beside it"])
def test_a_file_runs_no_plugin(tmp_path, monkeypatch, capsys, beside):
    "Not on a dry run either, nor in a plan; if the command line names it, it is loaded."
    monkeypatch.setattr("sortkd.experiment.slices.read_state", raises(RuntimeError("fine")))
    plugin, mark, grid = (tmp_path / name for name in ("mine.py", "executed", "grid.yaml"))
    plugin.write_text(PLUGIN.format(mark=str(mark)))
    named = GRID | {"options": OPTIONS | {"plugin": str(plugin)}}
    grid.write_text(json.dumps(named | {"plan": PLAN}))
    with pytest.raises(ValueError, match="names the plugin .*mine.py"):
        read_plan(grid)
    grid.write_text(json.dumps(named))
    if beside:
        grid.rename(tmp_path / "config.yaml")
        grid.write_text(json.dumps({name: GRID[name] for name in GRID if name != "options"}))
    assert main([str(grid), "--dry-run"]) == 1
    assert re.search("names the plugin .*mine.py", capsys.readouterr().err) and not mark.exists()
    assert main([str(grid), "--dry-run", "--plugin", str(plugin)]) == 1
    assert "fine" in capsys.readouterr().err
    del REPAIRS["boost"], sortkd.experiment.plugins._owners["repair", "boost"]
    assert mark.exists(), "the planted file does nothing, so this test shows nothing"


def test_the_workflows_shell_gets_names_and_no_commands(tmp_path):
    "Snakemake's command for the shell, in a shell where sortkd-run only says how it was called."
    pytest.importorskip("snakemake")
    results, teachers = "my $(touch planted) results; touch planted", "`touch planted`' x"
    config = {"results_dir": results, "teachers_dir": teachers, "cells_dir": "cells",
              "pairs": ["r56_r20"], "methods": ["kd+sort"], "seeds": 1, "cell": "command",
              "options": {"dataset": "digits", "cache_dir": "| touch planted", "device": "cpu"}}
    cell = "cells/quick/r56_r20/kd+sort/seed0.txt"
    said = subprocess.run(
        [sys.executable, "-m", "snakemake", "--snakefile", ROOT / "workflow" / "Snakefile",
         "--directory", tmp_path, "--dry-run", "--printshellcmds", "--cores=1", cell, "--config",
         *(f"{name}={json.dumps(value)}" for name, value in config.items())],
        capture_output=True, text=True, timeout=150)
    assert said.returncode == 0, said.stderr + said.stdout
    shell, = re.findall("Shell command: (.*sortkd-run.*)", said.stdout + said.stderr)
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "sortkd-run").write_text(
        f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    (tools / "sortkd-run").chmod(0o755)
    (tmp_path / cell).parent.mkdir(parents=True)
    subprocess.run(["bash", "-euo", "pipefail", "-c", shell], cwd=tmp_path, check=True, timeout=20,
                   env={**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"})
    assert not list(tmp_path.rglob("planted")), shell
    given = json.loads((tmp_path / cell).read_text())
    assert given[given.index("--results-dir") + 1] == results and "| touch planted" in given
    assert given[given.index("--teachers-dir") + 1] == teachers
    assert {path.name for path in tmp_path.iterdir()} <= {"tools", "cells", results, ".snakemake"}


@pytest.mark.slow
def test_nothing_is_written_outside_the_folders_that_were_named(tmp_path):
    places = {name: tmp_path / name for name in ("work", "temporary", "home", "r", "t", "c")}
    for folder in list(places.values())[:3]:
        folder.mkdir()
    environment = {
        **os.environ, "TMPDIR": str(places["temporary"]), "HOME": str(places["home"]),
        "XDG_CACHE_HOME": str(places["home"] / "cache"), "SORTKD_DATA": str(tmp_path / "none")}
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
    options = {**SMALL, "methods": "kd,kd+sort", "epochs": 1, "results_dir": places["r"],
               "teachers_dir": places["t"], "cache_dir": places["c"]}
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    command = "import sys; from sortkd.fronts.commands import run; sys.exit(run(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", command, *arguments], capture_output=True,
                          text=True, timeout=200, cwd=places["work"], env=environment)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {*places}
    assert not list(places["work"].iterdir())
    # PyTorch makes a folder there, and stays out of it; matplotlib keeps a list of fonts.
    assert all(path.is_dir() for path in places["temporary"].rglob("*"))
    assert all("matplotlib" in str(path) for path in places["home"].rglob("*") if path.is_file())


CODE = sorted((ROOT / "sortkd").rglob("*.py")) + sorted((ROOT / "benchmarks").glob("*.py"))
UNPICKLE = {"pickle", "cPickle", "dill", "marshal", "shelve", "joblib", "cloudpickle"}
EXECUTE = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.jit.load",
           "yaml.load", "yaml.unsafe_load"}


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.name)
def test_the_source_holds_nothing_that_runs_a_file(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name.split(".")[0] for alias in node.names}
            names.add((getattr(node, "module", None) or "").split(".")[0])
            assert not names & UNPICKLE, f"line {node.lineno}"
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            keywords = {each.arg: ast.unparse(each.value) for each in node.keywords}
            assert name not in EXECUTE and "allow_pickle" not in keywords, f"line {node.lineno}"
            assert keywords.get("shell") in (None, "False"), f"line {node.lineno}"
            if name.endswith(("torch.load", "load_state_dict_from_url")):
                assert keywords.get("weights_only") == "True", f"line {node.lineno}"
            if name.endswith("extractall"):
                assert keywords.get("filter") == "'data'", f"line {node.lineno}"


def test_content_reaches_the_disk_before_its_name(tmp_path, monkeypatch):
    "Else a power failure leaves an empty file under the name, or none."
    steps, file, fsync, replace = [], tmp_path / "new" / "file", os.fsync, os.replace

    def note_fsync(opened):
        about = os.fstat(opened)
        if stat.S_ISREG(about.st_mode):
            steps.append(("file", about.st_size))
            os.write(opened, b"")  # the handle must be able to write
        else:
            steps.append(("folder", sorted(os.listdir(opened))))
        fsync(opened)

    def note_replace(source, target):
        steps.append(("rename", Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    save_atomically(file, lambda temporary: temporary.write_bytes(b"content"))
    assert steps == [("file", 7), ("rename", "file"), ("folder", ["file"])]
    steps.clear()
    for _ in range(2):
        append_record(tmp_path / "records.jsonl", {"a": 1})
    assert steps == [("file", 9), ("folder", ["new", "records.jsonl"]), ("file", 18)]


def test_two_writers_of_the_same_bits_do_not_meet(tmp_path, monkeypatch):
    "The second comes while the first is between its content and its name, and waits."
    correct, fsync, second = torch.arange(100) % 3 == 0, os.fsync, []

    def meet(opened):
        if not second:
            second.append(threading.Thread(target=save_correct, args=(tmp_path / "quick.jsonl", correct)))
            second[0].start()
            second[0].join(0.2)
            assert second[0].is_alive()
        fsync(opened)

    monkeypatch.setattr(os, "fsync", meet)
    checksum = save_correct(tmp_path / "quick.jsonl", correct)
    second[0].join(60)
    read = read_correct(tmp_path / "quick.jsonl", checksum, 100)
    assert not second[0].is_alive() and read.tolist() == correct.tolist()
    kept = [path.name for path in (tmp_path / "quick.correct").glob("*.bits")]
    assert kept == [f"{checksum}.bits"]


def test_one_process_makes_a_teacher(tmp_path, capsys):
    "Of two that want it at once, one trains; the other says that it waits, and finds it."
    (tmp_path / "local").mkdir()
    left, other = (tmp_path / "local" / f".{name}-digits-00.safetensors.aa.tmp"
                   for name in ("resnet8", "resnet14"))
    left.write_bytes(b"by a killed writer")
    other.write_bytes(b"of somebody else")

    def train():
        time.sleep(1)
        return create_model("resnet8", 10).state_dict(), {"top1": 1.0}

    digits = load_digits()
    sources = at_once(
        lambda: get_teacher("resnet8", digits, tmp_path, {"seed": 0}, train).source, 2)
    assert sorted(sources) == ["found", "trained"]
    assert "Another process is making the teacher resnet8" in capsys.readouterr().out
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    assert not left.exists() and other.exists(), "what a killed writer of this teacher left is gone"


def test_no_teacher_is_trained_that_cannot_be_kept(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "inside", Path("/proc/teachers")):
        with pytest.raises(OSError, match="Not a directory|No such file|not writable|exists"):
            get_teacher("resnet8", load_digits(), folder, {}, raises(AssertionError("trained")))
