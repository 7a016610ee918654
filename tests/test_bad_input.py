"What nobody should pass, passed: an answer within seconds, which is a result or one error that names what is wrong."
import functools
import os
import subprocess
import sys
import time
from dataclasses import replace
from inspect import signature
from pathlib import Path

import numpy
import pytest
import torch
from conftest import needs_cifar100
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_data import fake_cifar100, toy_data

import sortkd.data
import sortkd.experiments
from sortkd.commands import evaluate, evaluate_checkpoint, run
from sortkd.data import Batches, load_cifar100
from sortkd.experiments import Experiment, plan_experiment, run_experiment
from sortkd.losses import OBJECTIVES, create_method, dist_loss, dkd_loss, kd_loss, list_methods, mlkd_loss, revise_logits, skip_logits, sld_loss, standardize
from sortkd.models import create_model
from sortkd.sorting import sort_logits, swap_logits
from sortkd.teachers import load_teacher, read_checkpoint, save_teacher
from sortkd.training import Recipe, create_fabric, train

NOTEBOOK = Path(__file__).parents[1] / "nbs" / "run_experiment.ipynb"
SMALL = {"pair": "r56_r20", "preset": "quick", "dataset": "digits", "epochs": 1, "train_size": 200, "test_size": 100, "device": "cpu"}
LONGEST_MESSAGE, LONGEST_ANSWER = 2000, 5.0  # characters, seconds


# The parameters of an experiment

load_digits_once = functools.lru_cache(sortkd.data.load_data)


class Unwritable:
    def __repr__(self):
        raise RuntimeError("cannot be shown")


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


ENDLESS = []
ENDLESS.append(ENDLESS)
LONG = "x" * 100_000
NO_TEXT = [
    None, float("nan"), float("inf"), float("-inf"), 10**30, -(10**30), 10**5000, -1, 1.5, -0.0, 1j, numpy.float32(2), numpy.array([1, 2]),
    numpy.array(["kd"]), numpy.array([]), b"kd", b"", bytearray(b"x"), [], [[]], nested(50), nested(2000), ENDLESS, {}, {"a": 1}, {"kd"}, (), object(), Unwritable(),
    type, print, range(3), iter([1]), torch.zeros(3), torch.tensor(float("nan")),
]
TEXTS = ["", " ", "\t\n", "\0", "a\0b", "\ud800", "\u202ekd", "kd\nce", LONG, "kd," * 50_000, "٣", "1e3", "0x10", "9" * 5000, "AUTO", "auto ", "$(touch x)", "; touch x", "`touch x`", "../../x", "é" * 300]
EVERYTHING = NO_TEXT + TEXTS + [True, False, numpy.bool_(True), 0, 1, numpy.int64(3), ["kd"], ("kd",)]
PATHS = ["FOLDER/file", "FOLDER/file/inside", "FOLDER/absent", "FOLDER/folder", "FOLDER/link", "FOLDER/loop", "a/" * 3000, "x" * 300, "/dev/null", "/proc/nowhere", "http://example.org/x.pth"]
NAMES = ["r56", "kd+fix", "kd+sort+sort", "cpu,cuda", "tpu", "float16", "imagenet", "online,offline"]
NUMBERS = [2**31, 2**63, 10**400, "0", "1", "-1", "1.0"]
VALUES = {
    "pair": EVERYTHING + NAMES, "methods": EVERYTHING + NAMES + ["kd,kd", "kd,,dkd", ",", [["kd"]], ["kd", None], ["kd", "kd"]],
    "seeds": EVERYTHING + NUMBERS + ["0,0", "-1", "0;1", [0, 0], [-1], [2**31], [None], "²"], "preset": EVERYTHING + NAMES, "dataset": EVERYTHING + NAMES,
    "epochs": EVERYTHING + NUMBERS, "train_size": EVERYTHING + NUMBERS + [1438], "test_size": EVERYTHING + NUMBERS + [361],
    "teacher": EVERYTHING + PATHS, "teachers_dir": EVERYTHING + PATHS, "results_dir": EVERYTHING + PATHS, "cache_dir": EVERYTHING + PATHS,
    "device": EVERYTHING + NAMES, "precision": EVERYTHING + NAMES, "deterministic": EVERYTHING, "cache": EVERYTHING + NAMES, "workers": EVERYTHING + NUMBERS,
    "skip_recorded": EVERYTHING, "tensorboard": EVERYTHING, "wandb": EVERYTHING + NAMES,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A working folder with a file, a folder, a link and a loop; the digits are read once, and CIFAR-100 is out of sight."
    folder, before = tmp_path_factory.mktemp("place"), os.getcwd()
    (folder / "file").write_text("no weights")
    (folder / "folder").mkdir()
    (folder / "link").symlink_to(folder / "folder")
    (folder / "loop").symlink_to(folder / "loop")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SORTKD_DATA", str(folder / "no data"))
        patch.setattr(sortkd.experiments, "load_data", load_digits_once)
        patch.chdir(folder)
        create_fabric("cpu")  # its import takes seconds, and is not the answer's
        yield folder
    assert os.getcwd() == before


def everything_in(folder):
    return sorted((str(path), path.lstat().st_mtime_ns if path.is_file() else 0) for path in folder.rglob("*"))


def written(value):
    try:
        return repr(value)
    except Exception:
        return type(value).__name__


def answer(place, **given):
    "What planning says: an experiment or a message. All that is promised of both is checked here."
    there, start = everything_in(place), time.monotonic()
    try:
        plan = plan_experiment(**SMALL | {"results_dir": str(place / "results"), "teachers_dir": str(place / "teachers")} | given)
    except (ValueError, TypeError, OSError) as error:
        plan, said = None, str(error)
        assert len(said) <= LONGEST_MESSAGE, f"{len(said)} characters"
        assert "\n" not in said and said.isprintable(), f"not one line that can be shown: {said!r}"
        assert any(name in said or written(value)[1:40].rstrip("'") in said for name, value in given.items()), f"nothing is named: {said}"
    else:
        assert isinstance(plan, Experiment)
        said = plan.describe() + plan.describe_teacher_logits()  # a plan can be talked about
    assert time.monotonic() - start < LONGEST_ANSWER
    assert everything_in(place) == there, "planning has written"
    return plan, said


def test_every_parameter_has_bad_values():
    assert VALUES.keys() == signature(plan_experiment).parameters.keys()


@pytest.mark.parametrize("name", VALUES)
def test_hand_picked_values(place, name):
    outcomes = [answer(place, **{name: value.replace("FOLDER", str(place)) if isinstance(value, str) else value})[0] for value in VALUES[name]]
    assert outcomes.count(None) >= len(outcomes) / 4, "most of these make no sense"
    if name.endswith("_dir"):
        refused = {value for value, outcome in zip(VALUES[name], outcomes) if outcome is None and isinstance(value, str)}
        assert refused >= {"\0", "a\0b", "\ud800", "", "FOLDER/file", "FOLDER/file/inside", "FOLDER/link", "FOLDER/loop", "x" * 300}, "a place that cannot be a folder, or leads elsewhere"


ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=30), st.text(st.characters(), max_size=30), st.binary(max_size=10),
    st.lists(st.one_of(st.text(max_size=5), st.integers(), st.none()), max_size=4), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.sampled_from(["auto", "kd", "kd,kd+sort", "0", "0,1", "quick", "paper", "short", "digits", "cifar100", "off", "full", "offline", "float32", "cpu"]),
    st.integers(0, 2**31), st.integers(-(10**40), 10**40),
)


@given(st.dictionaries(st.sampled_from(sorted(VALUES)), ANYTHING, min_size=1, max_size=4))
@settings(max_examples=400, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
def test_generated_values(place, given):
    download = given.get("preset") in ("paper", "short") or given.get("dataset") == "cifar100"
    with pytest.MonkeyPatch.context() as patch:
        if download:  # never from here
            patch.setattr(sortkd.experiments, "load_data", lambda name: load_cifar100("no data", download=False))
            given = given | {"dataset": given.get("dataset", "cifar100")}
        try:
            answer(place, **given)
        except AssertionError as error:
            if not (download and "SORTKD_DATA" in str(error)):  # CIFAR-100 is absent, which is said without naming a parameter
                raise


# The commands


def said_by(command, arguments, capsys):
    "Exit status and what stands on standard error; nothing else may come out of a command."
    start = time.monotonic()
    try:
        status = command(arguments)
    except SystemExit as stop:  # argparse
        status = stop.code
    error = capsys.readouterr().err
    assert time.monotonic() - start < LONGEST_ANSWER and "Traceback" not in error
    return status, error


COMMAND_TEXTS = [text for text in TEXTS if "\0" not in text and "\ud800" not in text]  # a shell cannot pass the others


@pytest.mark.parametrize("name", VALUES)
def test_run_with_bad_values(place, name, capsys, monkeypatch):
    def stop(*_):
        raise RuntimeError("this would run")

    monkeypatch.setattr(sortkd.experiments, "run_experiment", stop)
    option, there = f"--{name.replace('_', '-')}", everything_in(place)
    small = [part for key, value in (SMALL | {"results_dir": place / "r", "teachers_dir": place / "t"}).items() for part in (f"--{key.replace('_', '-')}", str(value))]
    values = COMMAND_TEXTS + NAMES + [str(value) for value in NUMBERS] + ["nan", "inf", "None", "[]", "--", "-"]
    for value in values:
        status, error = said_by(run, [*small, "--quiet", f"{option}={value}"], capsys)
        assert status in (1, 2), f"{value[:40]!r}: {status}"
        assert status == 2 or len(error.strip().splitlines()) == 1, error
        assert status == 2 or len(error) <= LONGEST_MESSAGE, value[:40]  # argparse repeats what it was given, whole
    assert everything_in(place) == there


def test_eval_with_bad_values(place, capsys):
    save_teacher(place / "teacher.safetensors", create_model("resnet8", 10).state_dict(), {"architecture": "resnet8", "dataset": "digits"})
    try:
        there = everything_in(place)
        for value in COMMAND_TEXTS + [each.replace("FOLDER", str(place)) for each in PATHS] + ["-", ".", ".."]:
            status, error = said_by(evaluate, ["--", value], capsys)
            assert status == 1 and len(error.strip().splitlines()) == 1 and len(error) <= LONGEST_MESSAGE, value[:40]
        for option in ("--architecture", "--dataset", "--device", "--precision"):
            for value in [text for text in COMMAND_TEXTS if text != "auto "] + NAMES:
                status, error = said_by(evaluate, [str(place / "teacher.safetensors"), f"{option}={value}"], capsys)
                assert status == 1 and len(error.strip().splitlines()) == 1 and len(error) <= LONGEST_MESSAGE, (option, value[:40], error[:300])
        assert everything_in(place) == there
    finally:
        (place / "teacher.safetensors").unlink()


@pytest.mark.parametrize("command, arguments, words", [
    ("sortkd-run", ["--results-dir=a\n\u202e\ud800b", "--epochs=-1"], "epochs is -1"),
    ("sortkd-eval", ["\u202eé\nx.pth"], "there is no checkpoint"),
])
def test_in_a_process_of_its_own(tmp_path, command, arguments, words):
    arguments = [os.fsencode(each.replace("\ud800", "\udcff")) for each in arguments]  # a byte that is no UTF-8
    done = subprocess.run([Path(sys.executable).with_name(command), *arguments], capture_output=True, timeout=100, cwd=tmp_path)
    error = done.stderr.decode()
    assert done.returncode == 1 and words in error and len(error.strip().splitlines()) == 1 and not list(tmp_path.iterdir())


def test_through_papermill(tmp_path):
    import papermill
    with pytest.raises(papermill.PapermillExecutionError, match="epochs is -1; give a whole number"):
        papermill.execute_notebook(NOTEBOOK, tmp_path / "out.ipynb", SMALL | {"epochs": -1, "results_dir": str(tmp_path / "results")}, progress_bar=False)
    assert not (tmp_path / "results").exists()
