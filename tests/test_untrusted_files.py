"Planted attacks: files that would run code, leave their folder or lead elsewhere, and parameters that a shell would obey."
import ast
import functools
import hashlib
import http.server
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
from test_data import fake_cifar100
from torchvision.datasets import CIFAR100

import sortkd
import sortkd.experiment.plugins
import sortkd.train.teachers
from sortkd.fronts.commands import evaluate_command, run
from sortkd.train.images import ImageData, load_cifar100, load_digits
from sortkd.utils.checks import folder_path, short_enough
from sortkd.experiment.setup import prepare_experiment
from sortkd.utils.files import save_atomically
from sortkd.experiment.grid import main, make_grid, read_yaml
from sortkd.evidence.preregistration import read_plan, read_plans
from sortkd.experiment.storage import append_record, read_correct, read_records, save_correct
from sortkd.experiment.run import run_experiment
from sortkd.train.networks import create_model
from sortkd.train.teachers import fetch_published, find_teacher, get_teacher, load_teacher, read_checkpoint, save_teacher
from sortkd.train.checkpoints import Stopped

ROOT = Path(__file__).parents[1]
SMALL = {"pair": "resnet8:resnet8", "preset": "quick", "dataset": "digits", "methods": "kd+sort", "epochs": 2, "train_size": 200, "test_size": 100, "device": "cpu"}


class CreatesFile:
    "Unpickling an instance makes a file."

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


class RunsCommand(CreatesFile):
    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


def save_zip(content, path):
    torch.save({"model": content}, path)


def save_old(content, path):
    torch.save({"model": content}, path, _use_new_zipfile_serialization=False)


def save_plain(content, path):
    path.write_bytes(pickle.dumps({"model": content}, protocol=2))


WAYS = [save_zip, save_old, save_plain]


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory):
    "A teacher that has learned nothing."
    torch.manual_seed(0)
    return save_teacher(tmp_path_factory.mktemp("given") / "resnet8.safetensors", create_model("resnet8", 10).state_dict(), {"architecture": "resnet8", "dataset": "digits"})


def small_experiment(folder, teacher_file, **changes):
    return prepare_experiment(**SMALL | {"teacher": str(teacher_file), "teachers_dir": f"{folder}/teachers", "results_dir": f"{folder}/results"} | changes)


def state_of(folder):
    "Every name below a folder, with the content of files and the aim of links."
    return {str(path): os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None for path in sorted(Path(folder).rglob("*"))}


# Pickles


@pytest.mark.parametrize("save", WAYS)
@pytest.mark.parametrize("attack", [CreatesFile, RunsCommand])
@pytest.mark.parametrize("name", ["teacher.pth", "teacher.safetensors", "teacher"])
def test_a_checkpoint_that_would_run_code(tmp_path, save, attack, name, capsys, monkeypatch):
    mark, path = tmp_path / "executed", tmp_path / name
    save(attack(mark), path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"{name} cannot be read as weights"):
        read_checkpoint(path)
    assert evaluate_command([str(path), "--architecture=resnet8", "--dataset=digits"]) == 1
    assert run(["--dataset=digits", "--preset=quick", "--device=cpu", f"--teacher={path}", f"--results-dir={tmp_path / 'results'}"]) == 1
    assert [len(line) < 2000 for line in capsys.readouterr().err.strip().splitlines()] == [True, True] and not mark.exists()
    content = path.read_bytes()
    pickle.loads(content) if save is save_plain else torch.load(io.BytesIO(content), weights_only=False)
    assert mark.exists(), "the planted file does nothing, so this test shows nothing"


@pytest.mark.filterwarnings("ignore")  # of PyTorch, about TorchScript
def test_a_program_of_torchscript_is_no_checkpoint(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "program.pth")
    with pytest.raises(ValueError, match="program.pth cannot be read as weights"):
        read_checkpoint(tmp_path / "program.pth")


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory, teacher_file):
    "The folders of a run that was stopped after its first epoch."
    folder = tmp_path_factory.mktemp("interrupted")
    with pytest.raises(Stopped):
        run_experiment(small_experiment(folder, teacher_file), progress=False, stop=lambda: True)
    assert len(list(folder.rglob("checkpoint.pt"))) == 1
    return folder


@pytest.mark.parametrize("save", WAYS)
def test_a_training_checkpoint_that_would_run_code(tmp_path, interrupted, teacher_file, save):
    shutil.copytree(interrupted, tmp_path, dirs_exist_ok=True)
    checkpoint, = tmp_path.rglob("checkpoint.pt")
    save(CreatesFile(tmp_path / "executed"), checkpoint)
    with pytest.raises(ValueError, match="checkpoint.pt cannot be read .*delete it to start the run again"):
        run_experiment(small_experiment(tmp_path, teacher_file), progress=False)
    assert not (tmp_path / "executed").exists() and not (tmp_path / "results" / "quick.jsonl").exists()


@pytest.mark.parametrize("spoil", [
    lambda state: state.update(curve=5), lambda state: state.pop("optimizer"), lambda state: state.update(model={}),
], ids=["no rows", "no optimizer", "no weights"])
def test_a_training_checkpoint_with_something_else_in_it(tmp_path, interrupted, teacher_file, spoil):
    "It has the name of its run, and not the state: the message says what to do."
    shutil.copytree(interrupted, tmp_path, dirs_exist_ok=True)
    checkpoint, = tmp_path.rglob("checkpoint.pt")
    state = torch.load(checkpoint, weights_only=True)
    spoil(state)
    torch.save(state, checkpoint)
    with pytest.raises(ValueError, match="checkpoint.pt does not hold the state of this run .*delete it to start the run again"):
        run_experiment(small_experiment(tmp_path, teacher_file), progress=False)
    assert not (tmp_path / "results" / "quick.jsonl").exists()


def test_a_teachers_training_checkpoint_that_would_run_code(tmp_path):
    from sortkd.experiment.pairs import SHORT_TEACHER
    from sortkd.experiment.teacher import teacher_training, train_teacher
    from sortkd.train.checkpoints import fingerprint
    data = load_digits().subset(train_size=40, test_size=20)
    name = f"teacher-resnet8-{fingerprint('resnet8', teacher_training('resnet8', data, SHORT_TEACHER, 0))}.pt"
    save_zip(CreatesFile(tmp_path / "executed"), tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} cannot be read"):
        train_teacher("resnet8", data, SHORT_TEACHER, device="cpu", runs_dir=tmp_path, progress=False)
    assert not (tmp_path / "executed").exists()


def test_cifar100_that_would_run_code(tmp_path, monkeypatch, capsys):
    "The right names, the wrong content: the checksum is compared before anything is unpickled."
    folder, mark = tmp_path / "cifar-100-python", tmp_path / "executed"
    fake_cifar100(folder, monkeypatch)
    monkeypatch.setenv("SORTKD_DATA", str(tmp_path))
    for name in ("meta", "test", "train"):
        (folder / name).write_bytes(pickle.dumps(CreatesFile(mark)))
        assert run(["--dataset=cifar100", "--preset=quick", "--device=cpu", f"--results-dir={tmp_path / 'results'}"]) == 1
        assert evaluate_command([str(tmp_path / "none.pth"), "--dataset=cifar100"]) == 1
        assert f"{name} is damaged" in capsys.readouterr().err and not mark.exists()


# Downloads and archives


class Host(http.server.SimpleHTTPRequestHandler):
    "Serves a folder; /cut/NAME announces more than it sends, /to/NUMBER leads to one of `places`."
    places: list[str] = []
    asked: list[str] = []

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.asked.append(self.path)
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.places[int(self.path[4:])])
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif self.path.startswith("/cut/"):
            content = (Path(self.directory) / self.path[5:]).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:-600])
        else:
            super().do_GET()


@pytest.fixture
def web(tmp_path, monkeypatch):
    "A folder, and the address at which a server on this machine offers its files."
    folder = tmp_path / "web"
    folder.mkdir()
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(Host, "asked", [])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Host, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def member(name, content=b"", kind=tarfile.REGTYPE, aim=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, aim, len(content)
    return info, io.BytesIO(content)


def make_archive(path, *members, mode="w"):
    with tarfile.open(path, mode) as archive:
        for each in members:
            archive.addfile(*each)
    return path


def known(architecture):
    return f"cifar_teachers/{architecture}_vanilla/ckpt_epoch_240.pth"


MEMBERS = {
    "leaves the folder": [member("../escaped", b"x"), member("cifar_teachers/../../escaped", b"x")],
    "absolute": [member("/tmp/sortkd-escaped", b"x")],
    "symbolic link": [member(known("resnet56"), kind=tarfile.SYMTYPE, aim="../../../secret")],
    "link to its own": [member("secret", b"x"), member(known("resnet56"), kind=tarfile.SYMTYPE, aim="../../secret")],
    "circle of links": [member(known("resnet56"), kind=tarfile.SYMTYPE, aim="other"), member("cifar_teachers/resnet56_vanilla/other", kind=tarfile.SYMTYPE, aim="ckpt_epoch_240.pth")],
    "hard link": [member(known("resnet56"), kind=tarfile.LNKTYPE, aim="/etc/hostname")],
    "linked folder": [member("cifar_teachers", kind=tarfile.SYMTYPE, aim="/tmp"), member("cifar_teachers/escaped", b"x")],
    "device": [member(known("resnet56"), kind=tarfile.CHRTYPE)], "queue": [member(known("resnet56"), kind=tarfile.FIFOTYPE)],
    "folder": [member(known("resnet56"), kind=tarfile.DIRTYPE)],
    "other names": [member(f"./{known('resnet56')}", b"x"), member(known("resnet57"), b"x"), member("cifar_teachers/resnet56_vanilla/more", b"x")],
}


def attack_of(name):
    "New members each time, since an archive reads them up."
    return [member(info.name, content.getvalue(), info.type, info.linkname) for info, content in MEMBERS[name]]


@pytest.mark.parametrize("attack", MEMBERS)
def test_archives_of_teachers(tmp_path, web, attack):
    "Only plain members with the names that are known are taken; the good one among the bad ones is."
    folder, address = web
    make_archive(folder / "teachers.tar", *attack_of(attack), member(known("vgg13"), b"good"))
    before = state_of(folder)
    fetch_published(tmp_path / "inner" / "teachers", f"{address}/teachers.tar")
    assert [str(path.relative_to(tmp_path / "inner")) for path in (tmp_path / "inner").rglob("*") if not path.is_dir()] == [f"teachers/{known('vgg13')}"]
    assert state_of(folder) == before and not Path("/tmp/sortkd-escaped").exists() and not Path("/tmp/escaped").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inner", "web"]


def test_an_archive_with_a_teacher_that_would_run_code(tmp_path, web, monkeypatch):
    folder, address = web
    save_zip(CreatesFile(tmp_path / "executed"), tmp_path / "hostile.pth")
    make_archive(folder / "teachers.tar", member(known("resnet56"), (tmp_path / "hostile.pth").read_bytes()))
    monkeypatch.setattr(sortkd.train.teachers, "fetch_published", functools.partial(fetch_published, url=f"{address}/teachers.tar"))
    data = load_digits()
    object.__setattr__(data, "name", "cifar100")
    with pytest.raises(ValueError, match="ckpt_epoch_240.pth cannot be read as weights"):
        get_teacher("resnet56", data, tmp_path / "teachers", {}, lambda: pytest.fail("trained"), fetch=True)
    assert not (tmp_path / "executed").exists()


def many_members():
    return [member(known(name), os.urandom(50_000)) for name in ("resnet56", "vgg13")]


@pytest.mark.parametrize("way", ["absent", "page", "cut", "cut file", "compressed", "empty", "bomb"])
def test_a_download_that_is_not_whole_leaves_nothing(tmp_path, web, way):
    folder, address = web
    archive, name = folder / "teachers.tar", "teachers.tar"
    make_archive(archive, *many_members(), mode="w:gz" if way == "compressed" else "w")
    content = archive.read_bytes()
    if way == "absent":
        name = "nowhere.tar"
    elif way == "cut":
        name = "cut/teachers.tar"
    elif way == "page":
        archive.write_bytes(b"<html>please log in</html>" * 100)
    elif way == "cut file":
        archive.write_bytes(content[:60_000])
    elif way == "empty":
        archive.write_bytes(b"")
    elif way == "bomb":  # sparse: a few bytes that say that they are a terabyte
        info = tarfile.TarInfo(known("resnet56"))
        info.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.name": known("resnet56"), "GNU.sparse.size": str(10**12), "GNU.sparse.realsize": str(10**12), "GNU.sparse.map": "0,0"}
        with tarfile.open(archive, "w", format=tarfile.PAX_FORMAT) as tar:
            tar.addfile(info)
        fetch_published(tmp_path / "teachers", f"{address}/{name}")
    if way != "bomb":
        with pytest.raises(ConnectionError, match="the published teachers could not be downloaded from"):
            fetch_published(tmp_path / "teachers", f"{address}/{name}")
    assert not (tmp_path / "teachers").exists() or not list((tmp_path / "teachers").rglob("*"))


@pytest.mark.parametrize("place", ["file:///etc/hostname", "ftp://127.0.0.1/x.tar", "https://127.0.0.1:1/x.tar", "data:,x", "//127.0.0.1:1/x", "gopher://x", "FILE:///etc/hostname"])
def test_redirections_stay_within_the_scheme(tmp_path, web, monkeypatch, place):
    _, address = web
    monkeypatch.setattr(Host, "places", [place])
    with pytest.raises(ConnectionError, match="refused" if place.startswith("//") else "redirects to|redirection error|HTTP Error 302"):
        fetch_published(tmp_path / "teachers", f"{address}/to/0")
    assert not (tmp_path / "teachers").exists()


def test_addresses_are_https():
    from torchvision.models import get_model_weights
    assert all(get_model_weights(name)["IMAGENET1K_V1"].url.startswith("https://") for name in ("resnet34", "resnet50"))
    assert sortkd.train.teachers.PUBLISHED_ARCHIVE.startswith("https://") and CIFAR100.url.startswith("https://")
    assert re.fullmatch("[0-9a-f]{32}", CIFAR100.tgz_md5)


def test_https_is_never_left_for_http(monkeypatch, tmp_path):
    "Torchvision's own download tries HTTP when HTTPS fails; nothing compares a checksum with that archive, so ours must not."
    asked = []

    def refuse(self, request, *_, **__):
        asked.append(request.full_url)
        raise sortkd.train.teachers.URLError("TLS failed")

    monkeypatch.setattr("urllib.request.HTTPSHandler.https_open", refuse)
    monkeypatch.setattr("urllib.request.HTTPHandler.http_open", refuse)
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(ConnectionError, match="TLS failed"):
        fetch_published(tmp_path)
    assert asked == [sortkd.train.teachers.PUBLISHED_ARCHIVE]


def serve_cifar100(tmp_path, web, monkeypatch, *more, checksum_fits=True):
    folder, address = web
    source = tmp_path / "source" / "cifar-100-python"
    fake_cifar100(source, monkeypatch)
    archive = make_archive(folder / "cifar.tar.gz", *more, *(member(f"cifar-100-python/{path.name}", path.read_bytes()) for path in source.iterdir()), mode="w:gz")
    monkeypatch.setattr(CIFAR100, "url", f"{address}/cifar.tar.gz")
    monkeypatch.setattr(CIFAR100, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest() if checksum_fits else "0" * 32)


@pytest.mark.parametrize("checksum_fits", [True, False])
@pytest.mark.parametrize("attack", ["leaves the folder", "absolute", "symbolic link", "hard link", "linked folder", "device"])
def test_archives_of_cifar100(tmp_path, web, monkeypatch, attack, checksum_fits):
    "Without the checksum nothing is unpacked; with it, what leaves the folder is refused all the same."
    more = attack_of(attack)
    for info, _ in more:
        info.name = info.name.replace("cifar_teachers/resnet56_vanilla/", "cifar-100-python/").replace("cifar_teachers", "cifar-100-python")
    serve_cifar100(tmp_path, web, monkeypatch, *more, checksum_fits=checksum_fits)
    root = tmp_path / "data" / "inner"
    harmless = attack == "absolute" and checksum_fits  # its leading slash is dropped, and it is left behind with the rest
    if harmless:
        assert load_cifar100(root).num_classes == 4
    else:
        with pytest.raises(FileNotFoundError, match="could not be downloaded"):
            load_cifar100(root)
    assert {path.name for path in root.iterdir()} <= {".cifar-100-python.lock", "cifar-100-python"} and (root / "cifar-100-python").exists() == harmless
    assert [path.name for path in root.parent.iterdir()] == ["inner"] and not Path("/tmp/sortkd-escaped").exists() and not Path("/tmp/escaped").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "source", "web"]


# Links

LINKS = {
    "results": "results", "runs": "results/runs", "kept logits": "results/teacher_logits", "records": "results/quick.jsonl", "a run's folder": "results/runs/RUN", "its checkpoint": "results/runs/RUN/checkpoint.pt",
    "its lock": "results/runs/RUN/run.lock", "the start": "results/runs/RUN/started", "its sessions": "results/runs/RUN/sessions.jsonl", "its weights": "results/runs/RUN/weights",
    "logits of a teacher": "results/teacher_logits/LOGITS", "one of its files": "results/teacher_logits/LOGITS/checksums.bin", "its making": "results/teacher_logits/.LOGITS.making", "its lock, too": "results/teacher_logits/.LOGITS.lock",
    "which images it got right": "results/quick.correct", "tensorboard": "results/tensorboard", "wandb": "results/wandb", "teachers": "teachers", "trained teachers": "teachers/local",
}


@pytest.mark.parametrize("what, dangling", [*((what, False) for what in LINKS), (next(iter(LINKS)), True)])
def test_links_in_the_folders_of_a_run(tmp_path, interrupted, teacher_file, what, dangling):
    "A results folder from somebody else: whatever in it leads elsewhere is refused, and the place that it leads to is as it was."
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    shutil.copytree(interrupted, inside)
    (inside / "teachers").mkdir(exist_ok=True)
    (run_folder,), (logits,) = (inside / "results" / "runs").glob("resnet8-*"), (each for each in (inside / "results" / "teacher_logits").iterdir() if not each.name.startswith("."))
    path = inside / LINKS[what].replace("RUN", run_folder.name).replace("LOGITS", logits.name)
    outside.mkdir()
    if not dangling:  # what was there, moved elsewhere
        if path.exists():
            shutil.move(path, outside / "target")
        elif path.suffix in (".jsonl", ".lock"):
            (outside / "target").write_text("a line that somebody needs\n")
        else:
            (outside / "target").mkdir()
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(outside / "target")
    before = state_of(outside)
    with pytest.raises(ValueError, match=f"{re.escape(path.name)} is a link to|_dir is .*link") as error:
        run_experiment(small_experiment(inside, teacher_file), progress=False)
    assert str(outside / "target") in str(error.value), "it says where the link leads"
    assert state_of(outside) == before and path.is_symlink()


@pytest.mark.parametrize("started", ["../../../../outside", "/tmp/sortkd-outside", "", "x", "2026-01-01T00-00-00.000000Z/../../../../outside", "2026-01-01T00-00-00.000000Z\n"])
def test_the_start_of_a_run_is_no_path(tmp_path, interrupted, teacher_file, started):
    shutil.copytree(interrupted, tmp_path, dirs_exist_ok=True)
    path, = tmp_path.rglob("started")
    path.write_text(started)
    with pytest.raises(ValueError, match="started does not hold a time"):
        run_experiment(small_experiment(tmp_path, teacher_file), progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in interrupted.iterdir())


@pytest.mark.parametrize("link", ["teachers", "teachers/local", "teachers/local/.resnet8-digits.lock", "teachers/cifar_teachers", "teachers/cifar_teachers/vgg13_vanilla", f"teachers/{known('vgg13')}"])
def test_links_in_the_folder_of_teachers(tmp_path, web, link):
    folder, address = web
    make_archive(folder / "teachers.tar", member(known("vgg13"), b"good"))
    (tmp_path / "outside").mkdir()
    path = tmp_path / link
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match=f"{re.escape(path.name)} is a link to"):
        if "cifar" in link or link == "teachers":
            fetch_published(tmp_path / "teachers", f"{address}/teachers.tar")
        get_teacher("resnet8", load_digits(), tmp_path / "teachers", {}, lambda: pytest.fail("trained"))
    assert not list((tmp_path / "outside").iterdir())


def test_what_is_a_file_where_a_folder_should_be(tmp_path):
    (tmp_path / "quick.correct").write_text("a file")
    (tmp_path / "runs").mkdir()
    assert folder_path("results_dir", tmp_path, folders=["runs", "absent"], written=True) == tmp_path
    with pytest.raises(ValueError, match="results_dir is .*quick.correct is not a folder"):
        folder_path("results_dir", tmp_path, folders=["runs", "quick.correct"])


@pytest.mark.parametrize("failure", [OSError(37, "No locks available"), OSError(38, "Function not implemented")])
def test_a_file_system_without_locks_is_found_before_any_work(tmp_path, monkeypatch, failure):
    import fcntl

    def flock(*_):
        raise failure

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(ValueError, match=f"results_dir is .*nothing can be written in .*no locks: {failure.strerror}.*name another folder"):
        prepare_experiment(**SMALL | {"results_dir": str(tmp_path / "results"), "teachers_dir": str(tmp_path)})


def test_names_that_no_file_can_have():
    short_enough("methods", "kd", "r56_r20-kd-seed0")
    for name in ("k" * 191, "é" * 96, "\udcff" * 191):
        with pytest.raises(ValueError, match="methods is .*too long for the name of a file"):
            short_enough("methods", name, name)


# Files that would run code, or are more than they look like

PLUGIN = """
from pathlib import Path
Path({mark!r}).touch()
from sortkd.experiment.plugins import register_repair
register_repair("boost")(lambda logits, target: logits)
"""
GRID = {"pairs": ["resnet8:resnet8"], "methods": ["kd"], "seeds": 1, "preset": "quick", "options": {"dataset": "digits", "teacher": "none.pth"}}
PLAN = {"question": "?", "primary": None, "comparisons": [], "beside": [], "outcome": "last_top1", "smallest_effect": 0.5, "level": 0.05, "looks": []}


@pytest.mark.parametrize("way", ["grid", "config.yaml beside it", "plan", "plans", "a list", "another", "a key of its own"])
def test_a_file_runs_no_plugin(tmp_path, monkeypatch, capsys, way):
    "Not on a dry run either; the command line does, and then the file may name the same one."
    mark, plugin = tmp_path / "executed", tmp_path / "mine.py"
    plugin.write_text(PLUGIN.format(mark=str(mark)))
    named = {"options": GRID["options"] | {"plugin": [str(plugin)] if way == "a list" else str(plugin)}}
    content = GRID | named if way != "a key of its own" else GRID | {"plugin": str(plugin)}
    if way == "config.yaml beside it":
        (tmp_path / "config.yaml").write_text(json.dumps(GRID | named))
        content = {name: value for name, value in GRID.items() if name != "options"}
    grid = tmp_path / "grid.yaml"
    grid.write_text(json.dumps(content | ({"plan": PLAN} if way.startswith("plan") else {})))

    def fine(*_):
        raise RuntimeError("fine")

    monkeypatch.setattr("sortkd.experiment.grid.read_state", fine)
    if way.startswith("plan"):
        with pytest.raises(ValueError, match="names the plugin .*mine.py"):
            read_plan(grid) if way == "plan" else read_plans(tmp_path)
    else:
        other = tmp_path / "other.py"
        other.write_text(PLUGIN.format(mark=str(tmp_path / "other")))
        assert main([str(grid), "--dry-run", *(["--plugin", str(other)] if way == "another" else [])]) == 1
        assert re.search("names the plugin .*mine.py|a key of the grid is 'plugin'", capsys.readouterr().err)
    assert not mark.exists() and not (tmp_path / "other").exists()
    if way in ("grid", "config.yaml beside it"):
        assert main([str(grid), "--dry-run", "--plugin", str(plugin)]) == 1 and "fine" in capsys.readouterr().err
        sortkd.experiment.plugins._forget(str(plugin))
        assert mark.exists(), "the planted file does nothing, so this test shows nothing"


YAML_BOMBS = {
    "aliases": "a: &a [x, x]\n" + "".join(f"{each}: &{each} [{','.join(9 * ['*' + chr(ord(each) - 1)])}]\n" for each in "bcdefghi"),
    "merges": "a: &a {x: 1}\nb: {<<: [*a, *a]}", "lists": "[" * 20_000, "objects": "{a: " * 5000, "dashes": "- " * 9000, "keys": "? " * 9000,
    "size": "a: b\n" * 2_000_000, "text": "a: " + "b" * 10_000_000, "digits": "seeds: " + "9" * 5000, "hexadecimal": "seeds: 0x" + "f" * 19_000,
    "sixties": "seeds: 1" + ":59" * 6000, "threads": "threads: 0x" + "f" * 19_000, "seeds": "seeds: '" + ",".join(f"{each}-{each + 999}" for each in range(0, 1_500_000, 1000)) + "'",
    "cells": f"seeds: 1000\nmethods: [{','.join(f'kd(temperature={each})' for each in range(2, 300))}]", "option": "options: {epochs: 0x" + "f" * 19_000 + "}",
    "list as option": "options: {dataset: [[a]]}", "a pipe": None, "sparse": 0,
}


@pytest.mark.parametrize("name", YAML_BOMBS)
def test_grids_that_are_bombs_are_refused(tmp_path, name, patient):
    grid, content = tmp_path / "grid.yaml", YAML_BOMBS[name]
    if content is None:
        os.mkfifo(grid)
    elif content == 0:
        with open(grid, "wb") as file:
            file.truncate(2**34)
    else:
        grid.write_text(content)
    with patient(2), pytest.raises(ValueError) as error:
        make_grid(GRID | read_yaml(grid))
    assert len(str(error.value)) < 1000 and re.search(r"grid.yaml is not a YAML file|^(seeds|threads|the grid|option \w+) (is|has) ", str(error.value)), error.value


# Parameters that a shell would obey

COMMANDS = ["$(touch planted)", "`touch planted`", "; touch planted", "| touch planted", "&& touch planted", "x\ntouch planted", "'; touch planted; '", '"; touch planted; "', "${IFS}touch${IFS}planted", "-c touch planted", "{params.lock}"]


@pytest.mark.parametrize("text", [*COMMANDS[:4], *(pytest.param(each, marks=pytest.mark.slow) for each in COMMANDS[4:])])
def test_parameters_reach_no_shell(tmp_path, monkeypatch, capsys, teacher_file, text):
    from inspect import signature
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SORTKD_DATA", text)
    monkeypatch.setattr("sortkd.experiment.run.run_experiment", lambda *_: (_ for _ in ()).throw(RuntimeError("this would run")))
    given = SMALL | {"teacher": str(teacher_file)}
    for name in signature(prepare_experiment).parameters:
        arguments = [f"--{key.replace('_', '-')}={value}" for key, value in (given | {name: text}).items()]
        try:
            assert run([*arguments, "--quiet"]) == 1
        except SystemExit as stop:
            assert stop.code == 2
    for arguments in ([text], [str(teacher_file), f"--architecture={text}"], [str(teacher_file), f"--dataset={text}"]):
        assert evaluate_command(["--", *arguments] if arguments == [text] else arguments) == 1
    assert not list(tmp_path.iterdir())
    capsys.readouterr()


def test_a_run_in_folders_with_such_names(tmp_path, monkeypatch, teacher_file):
    "They are names as any other."
    monkeypatch.chdir(tmp_path)
    results, teachers = "$(touch planted); `touch planted` é\n'\"", "; touch planted"
    run_experiment(small_experiment(tmp_path, teacher_file, epochs=1, results_dir=results, teachers_dir=teachers), progress=False)
    assert [path.name for path in tmp_path.iterdir()] == [results] and len(read_records(tmp_path / results / "quick.jsonl")) == 1


def test_the_workflows_shell_gets_names_and_no_commands(tmp_path):
    "The command that Snakemake would give to the shell, given to one in which sortkd-run only says what it was called with."
    pytest.importorskip("snakemake")
    results, teachers = "my $(touch planted) results; touch planted", "`touch planted`' x"
    config = {"results_dir": results, "teachers_dir": teachers, "cells_dir": "cells", "pairs": ["r56_r20"], "methods": ["kd+sort"], "seeds": 1, "cell": "command", "options": {"dataset": "digits", "cache_dir": "| touch planted", "device": "cpu"}}
    command = [sys.executable, "-m", "snakemake", "--snakefile", ROOT / "workflow" / "Snakefile", "--directory", tmp_path, "--dry-run", "--printshellcmds", "--cores=1", "cells/quick/r56_r20/kd+sort/seed0.txt"]
    said = subprocess.run([*command, "--config", *(f"{name}={json.dumps(value)}" for name, value in config.items())], capture_output=True, text=True, timeout=150)
    assert said.returncode == 0, said.stderr + said.stdout
    shell = next(line.strip().removeprefix("Shell command: ") for line in (said.stdout + said.stderr).splitlines() if "sortkd-run" in line)
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "sortkd-run").write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    (tools / "sortkd-run").chmod(0o755)
    (tmp_path / "cells/quick/r56_r20/kd+sort").mkdir(parents=True)
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", shell], cwd=tmp_path, env={**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}, capture_output=True, text=True, timeout=20)
    assert not list(tmp_path.rglob("planted")), shell
    assert done.returncode == 0, done.stderr
    given = json.loads((tmp_path / "cells/quick/r56_r20/kd+sort/seed0.txt").read_text())
    assert given[given.index("--results-dir") + 1] == results and given[given.index("--teachers-dir") + 1] == teachers and "| touch planted" in given
    assert {path.name for path in tmp_path.iterdir()} <= {"tools", "cells", results, ".snakemake"}, "mkdir has split the name"


# What is written, and where

AUDITED = """
import json, os, sys
written, folders = set(), set()
def note(event, arguments):
    if event == "open":
        path, mode, flags = arguments
        if isinstance(path, int) or os.path.isdir(path) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND):
            return
        paths = [path]
    elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "os.utime"):
        paths = arguments[:1]
    elif event in ("os.rename", "os.link", "os.symlink"):
        paths = arguments[:2]
    else:
        return
    for path in paths:
        written.add((event, os.path.realpath(os.fsdecode(path)) if not isinstance(path, int) else str(path)))
sys.addaudithook(note)
status = run(sys.argv[1:])
sys.stdout.write("WRITTEN" + json.dumps(sorted(written)))
sys.exit(status)
"""


@pytest.mark.slow
def test_nothing_is_written_outside_the_folders_that_were_named(tmp_path):
    "A whole run with its teacher's training, in a process whose every opening, making, moving and removing is noted."
    work, temporary, home = (tmp_path / name for name in ("work", "temporary", "home"))
    for folder in (work, temporary, home):
        folder.mkdir()
    inherited = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}
    environment = {**inherited, "PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(temporary), "HOME": str(home), "XDG_CACHE_HOME": str(home / "cache"), "SORTKD_DATA": str(tmp_path / "none")}
    options = {**SMALL, "methods": "kd,kd+sort", "epochs": 1, "results_dir": tmp_path / "r", "teachers_dir": tmp_path / "t", "cache_dir": tmp_path / "c"}
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    done = subprocess.run([sys.executable, "-c", AUDITED, *arguments, "--quiet"], capture_output=True, text=True, timeout=200, cwd=work, env=environment)
    assert done.returncode == 0, done.stderr
    written = json.loads(done.stdout.partition("WRITTEN")[2])
    named = [os.path.realpath(tmp_path / name) + os.sep for name in "rtc"]
    inside = [path for _, path in written if f"{path}{os.sep}".startswith(tuple(named))]
    # Libraries: Python tries its folder for temporary files, PyTorch makes one there for compiled code, and stays out of
    # it; matplotlib keeps a list of fonts in the user's cache.
    libraries = ("/dev/null", os.path.realpath(temporary) + os.sep, os.path.realpath(home))
    elsewhere = [(event, path) for event, path in written if path not in inside and not path.startswith(libraries)]
    assert len(inside) > 20 and all((tmp_path / name).is_dir() for name in "rtc"), "the hook sees what is written"
    assert elsewhere == []
    assert not list(work.iterdir()) and all(path.is_dir() and "torchinductor" in path.name for path in temporary.rglob("*"))
    assert all("matplotlib" in str(path) for path in home.rglob("*") if path.is_file())


CODE = sorted((ROOT / "sortkd").rglob("*.py")) + sorted((ROOT / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.name)
def test_the_source_holds_nothing_that_runs_a_file(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name.split(".")[0] for alias in node.names} | {(getattr(node, "module", None) or "").split(".")[0]}
            assert not names & {"pickle", "cPickle", "dill", "marshal", "shelve", "joblib", "cloudpickle"}, f"line {node.lineno}"
        if not isinstance(node, ast.Call):
            continue
        name, keywords = ast.unparse(node.func), {each.arg: ast.unparse(each.value) for each in node.keywords}
        assert name not in {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.jit.load", "yaml.load", "yaml.unsafe_load"}, f"line {node.lineno}: {name}"
        assert keywords.get("shell") in (None, "False") and "allow_pickle" not in keywords, f"line {node.lineno}"  # numpy.load reads no pickle by itself
        if name in ("torch.load", "torch.hub.load_state_dict_from_url", "load_state_dict_from_url"):
            assert keywords.get("weights_only") == "True", f"line {node.lineno}"
        if name.endswith("extractall"):
            assert keywords.get("filter") == "'data'", f"line {node.lineno}"


# In which order, and by several at once


def test_content_reaches_the_disk_before_its_name(tmp_path, monkeypatch):
    "Else a power failure leaves an empty file under the name, or none."
    steps, file, fsync, replace = [], tmp_path / "new" / "file", os.fsync, os.replace

    def note_fsync(opened):
        about = os.fstat(opened)
        steps.append(("folder" if stat.S_ISDIR(about.st_mode) else "file", about.st_size if stat.S_ISREG(about.st_mode) else sorted(os.listdir(opened))))
        assert stat.S_ISDIR(about.st_mode) or os.write(opened, b"") == 0, "a handle that can write, as Windows asks for"
        fsync(opened)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", lambda source, target: (steps.append(("rename", Path(target).name)), replace(source, target)))
    save_atomically(file, lambda temporary: temporary.write_bytes(b"content"))
    assert steps == [("file", 7), ("rename", "file"), ("folder", ["file"])]
    steps.clear()
    for _ in range(2):
        append_record(tmp_path / "records.jsonl", {"a": 1})
    assert steps == [("file", 9), ("folder", ["new", "records.jsonl"]), ("file", 18)], "a new name is flushed, once"


def test_two_writers_of_the_same_bits_do_not_meet(tmp_path, monkeypatch):
    "The second writes while the first is between its content and its name."
    correct, fsync, nested = torch.arange(100) % 3 == 0, os.fsync, []

    def meet(opened):
        if not nested:
            nested.append(True)
            nested.append(save_correct(tmp_path / "quick.jsonl", correct))
        fsync(opened)

    monkeypatch.setattr(os, "fsync", meet)
    checksum = save_correct(tmp_path / "quick.jsonl", correct)
    assert nested[1] == checksum and read_correct(tmp_path / "quick.jsonl", checksum, 100).tolist() == correct.tolist()
    assert [path.name for path in (tmp_path / "quick.correct").glob("*.bits")] == [f"{checksum}.bits"]


# Several processes

MAKER = """
import os, sys, time
import torch
from pathlib import Path
from sortkd.train.teachers import get_teacher
images, targets = torch.zeros(10, 8, 8, 3, dtype=torch.uint8), torch.arange(10)
data = ImageData("digits", images, targets, images, targets, tuple("0123456789"), (0.5,) * 3, (0.5,) * 3, 1, False)
def train():
    with open("trainings", "a") as file:
        file.write("once\\n")
    while not Path("go on").exists():
        time.sleep(0.02)
    torch.manual_seed(0)
    return create_model("resnet8", 10).state_dict(), {"top1": 1.0}
print(get_teacher("resnet8", data, "teachers", {"seed": 0}, train).source, flush=True)
"""


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@pytest.mark.parametrize("killed", [pytest.param(False, marks=pytest.mark.slow), True])
def test_one_process_makes_a_teacher(tmp_path, killed):
    "Two want it at once: one trains, the other says that it waits, and finds it; if the first is killed, the second trains."
    (tmp_path / "teachers" / "local").mkdir(parents=True)
    left, other = (tmp_path / "teachers" / "local" / f".{name}-digits-00.safetensors.aa.tmp" for name in ("resnet8", "resnet14"))
    left.write_bytes(b"by a killed writer")
    other.write_bytes(b"of somebody else")

    def trainings():
        return (tmp_path / "trainings").read_text().count("once") if (tmp_path / "trainings").exists() else 0

    processes = [subprocess.Popen([sys.executable, "-c", MAKER], cwd=tmp_path, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}) for _ in range(2)]
    try:
        lines = {process: "" for process in processes}
        waiting = {}
        readers = [threading.Thread(target=lambda process=process: waiting.setdefault(process, process.stdout.readline())) for process in processes]
        for reader in readers:
            reader.start()
        wait_for(lambda: trainings() and any("waiting for it" in line for line in waiting.values()))
        waiter = next(process for process, line in waiting.items() if "waiting for it" in line)
        maker = next(process for process in processes if process is not waiter)
        assert "Another process is making the teacher resnet8" in waiting[waiter]
        if killed:
            maker.kill()
            wait_for(lambda: trainings() == 2)
        (tmp_path / "go on").touch()
        assert waiter.stdout.readline().strip() == ("trained" if killed else "found") and waiter.wait(60) == 0
        for reader in readers:
            reader.join(60)
        assert killed or (maker.wait(60) == 0 and waiting[maker].strip() == "trained")
    finally:
        for process in processes:
            process.kill()
            process.wait()
            process.stdout.close()
    assert trainings() == 1 + killed and len(list((tmp_path / "teachers").rglob("*.safetensors"))) == 1
    assert not left.exists() and other.exists(), "what a killed writer of this teacher has left is removed"


def test_cifar100_is_downloaded_once(tmp_path, web, monkeypatch, capsys):
    serve_cifar100(tmp_path, web, monkeypatch)
    (tmp_path / "data" / "cifar-100-download-killed").mkdir(parents=True)
    found = []
    threads = [threading.Thread(target=lambda: found.append(load_cifar100(tmp_path / "data").checksum)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 3 and len(set(found)) == 1
    assert Host.asked.count("/cifar.tar.gz") == 2, "it is asked once where it is, and fetched once"
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == [".cifar-100-python.lock", "cifar-100-python"]


def test_a_folder_of_teachers_that_can_only_be_read(tmp_path, monkeypatch):
    weights = create_model("resnet8", 10).state_dict()
    get_teacher("resnet8", load_digits(), tmp_path, {}, lambda: (weights, {}))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for name in ("exclusive", "save_atomically", "_check_writable"):
        monkeypatch.setattr(sortkd.train.teachers, name, lambda *_: pytest.fail("writes"))
    assert get_teacher("resnet8", load_digits(), tmp_path, {}, lambda: pytest.fail("trained")).source == "found"
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_no_teacher_is_trained_that_cannot_be_kept(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "inside", Path("/proc/teachers")):
        with pytest.raises(OSError, match=f"no teacher can be saved in {folder}.*name another folder"):
            get_teacher("resnet8", load_digits(), folder, {}, lambda: pytest.fail("trained"))


def test_a_teacher_is_neither_a_queue_nor_a_folder(tmp_path):
    os.mkfifo(tmp_path / "queue.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    assert find_teacher("resnet8", load_digits(), tmp_path, 1, {}) is None
    for path in (tmp_path / "queue.safetensors", Path("/dev/zero")):
        with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
            load_teacher(path, "resnet8", 10)


