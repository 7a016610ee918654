"Mistakes and damaged files get a result within seconds, or one line that names what is wrong."
import functools
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import EVERY_METHOD, raises, seeded_network
from safetensors.torch import save_file
from synthetic import changed
from test_data import toy_data

from sortkd.experiment.parameters import Parameters
from sortkd.experiment.run import run_experiment
from sortkd.experiment.setup import prepare_experiment
from sortkd.fronts.commands import evaluate_command, run
from sortkd.methods import REPAIRS, create_method
from sortkd.train.augmentation import Batches
from sortkd.train.devices import create_fabric
from sortkd.train.images import load_data, load_digits
from sortkd.train.networks import create_model
from sortkd.train.teachers import find_teacher, load_teacher, read_checkpoint, save_teacher
from sortkd.train.trainer import Recipe, train

SMALL = {"pair": "resnet20:resnet8", "preset": "quick", "dataset": "digits", "epochs": 1,
         "train_size": 200, "test_size": 100, "device": "cpu"}

WRONG = {
    "pair": [None, "", "r56", "resnet8:", "resnet8:resnet9", "timm:resnet8", "kd\nce"],
    "methods": [None, "", "kd,", "kd+fix", "kd+sort+sort", "kd(", "kd(a=1)", "kd(temperature=)", "kd,kd",
                "kd(kd_weight=1,temperature=2),kd(temperature=2.0,kd_weight=1)"],
    "seeds": [None, "", 1.5, -1, "-1", "0,0", "0-2,1", "0;1", [0, 0], 2**31],
    "recipe": [1, "lr", "lr=", "=1", "lr=x", "lr=nan", "lr=-1", "batch_size=0", "epochs=3", "lr==1", "batchsize=3"],
    **dict.fromkeys(("preset", "dataset", "device", "precision", "cache"), [None, "", "AUTO", "tpu"]),
    **dict.fromkeys(("epochs", "train_size", "test_size"), [None, True, -1, 1.5, 10**30, "1"]),
    **dict.fromkeys(("teachers_dir", "results_dir", "cache_dir"), [
        None, 3, "", "FOLDER/file", "FOLDER/file/inside", "FOLDER/link", "FOLDER/loop"]),
    "teacher": [None, 3], "plan": ["FOLDER/absent", "FOLDER/folder"],
    "plugin": ["FOLDER/absent", "FOLDER/file"],
    **dict.fromkeys(("deterministic", "compile", "again"), [None, 1, "yes"])}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A working folder with a file, a folder, a link and a loop; CIFAR-100 is out of sight."
    folder = tmp_path_factory.mktemp("place")
    (folder / "file").write_text("no weights")
    (folder / "folder").mkdir()
    (folder / "link").symlink_to(folder / "folder")
    (folder / "loop").symlink_to(folder / "loop")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SORTKD_DATA", str(folder / "no data"))
        load = functools.lru_cache(load_data)
        patch.setattr("sortkd.experiment.setup.load_data", load)
        patch.chdir(folder)
        create_fabric("cpu")  # its import takes seconds, and is not the answer's
        yield folder


def everything_in(folder):
    return sorted((str(path), path.lstat().st_mtime_ns if path.is_file() else 0)
                  for path in folder.rglob("*"))


@pytest.mark.parametrize("name", WRONG)
def test_wrong_values_of_parameters(place, name):
    "Refused within seconds, in one line that names the parameter or the value; nothing is written."
    assert WRONG.keys() == Parameters.__dataclass_fields__.keys()
    folders = {"results_dir": str(place / "results"), "teachers_dir": str(place / "teachers")}
    there = everything_in(place)
    for value in WRONG[name]:
        value = value.replace("FOLDER", str(place)) if isinstance(value, str) else value
        start = time.monotonic()
        with pytest.raises((ValueError, OSError)) as refusal:
            prepare_experiment(**SMALL | folders | {name: value})
        said = str(refusal.value)
        assert len(said) <= 2000 and "\n" not in said and said.isprintable(), said
        assert name in said or str(value) in said, f"nothing is named: {said}"
        assert time.monotonic() - start < 5
    assert everything_in(place) == there, "planning has written"


def one_line(command, arguments, capsys):
    "What the command says of a mistake: one line, and exit status 1, or argparse's usage and 2."
    try:
        status = command(arguments)
    except SystemExit as stop:  # argparse
        status = stop.code
    error = capsys.readouterr().err
    assert status == 2 or status == 1 and len(error.strip().splitlines()) == 1, error
    assert "Traceback" not in error and (status == 2 or len(error) <= 2000)
    return error


stop = raises(RuntimeError("this would run"))


@pytest.mark.parametrize("value", ["", "kd\nce", "-1"])
def test_bad_values_for_commands(place, value, weights, capsys, monkeypatch):
    monkeypatch.setattr("sortkd.experiment.run.run_experiment", stop)
    given = SMALL | {"results_dir": place / "r", "teachers_dir": place / "t"}
    for name in ("pair", "methods", "preset", "epochs", "results_dir"):
        one_line(run, [f"--{key.replace('_', '-')}={each}"
                       for key, each in (given | {name: value}).items()], capsys)
    one_line(evaluate_command, ["--", value], capsys)
    file, known = place.with_name("eval") / "a.safetensors", {"architecture": "resnet8"}
    path = save_teacher(file, weights, known)
    for name in ("architecture", "dataset", "device", "precision"):
        one_line(evaluate_command, [str(path), f"--{name}={value}"], capsys)


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_damaged_checkpoints(tmp_path, weights, kind):
    path, known = tmp_path / f"teacher.{kind}", {"architecture": "resnet8", "dataset": "digits"}
    torch.save(weights, path) if kind == "pth" else save_teacher(path, weights, known)
    content = path.read_bytes()
    for length in (0, 1, 8, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=f"teacher.{kind} cannot be read as weights"):
            load_teacher(path, "resnet8", 10)
    for start in (0, 4, 8, 50, 200, 1000, len(content) - 60, len(content) - 10):
        path.write_bytes(content[:start] + b"\xffdamaged" + content[start + 8:])
        try:
            read, text = read_checkpoint(path)
            assert all(isinstance(value, torch.Tensor) for value in read.values())
        except ValueError as error:
            assert path.name in str(error)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_weights_of_another_precision(tmp_path, weights, dtype):
    torch.save({name: value.to(dtype) if value.is_floating_point() else value
                for name, value in weights.items()}, tmp_path / "a.pth")
    model = load_teacher(tmp_path / "a.pth", "resnet8", 10).model
    assert {value.dtype for value in model.parameters()} == {torch.float32}


def test_texts_of_teachers(tmp_path, weights):
    weights = {name: value.contiguous() for name, value in weights.items()}
    save_file(weights, tmp_path / "odd.safetensors", {"sortkd": "{"})
    with pytest.raises(ValueError, match="odd.safetensors"):
        find_teacher("resnet8", load_digits(), tmp_path, 1, {})


def some_logits(rows=6, classes=5):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(rows, classes, generator=generator),
            torch.randn(rows, classes, generator=generator), torch.arange(rows) % classes)


def loss_of(name, student, teacher, target):
    method = create_method(name)
    repaired = method.repair_logits(teacher, target) if method.uses_teacher else None
    views = (student, repaired) if method.strong_views else None
    return method.loss(student, repaired, target, 1, views, method.create_temperature())


@pytest.mark.parametrize("name", EVERY_METHOD)
def test_losses_of_values_that_are_not_finite(name):
    "NaN stays NaN; an infinity is a probability of 0 or 1 where that has a meaning, else NaN."
    student, teacher, target = some_logits()
    assert loss_of(name, student, teacher, target).isfinite()
    for value in (torch.inf, -torch.inf, torch.nan):
        for row, column in ((0, 0), (0, 1), (3, 4)):
            broken = student.clone()
            broken[row, column] = value
            assert value == -torch.inf or loss_of(name, broken, teacher, target).isnan()
            broken = teacher.clone()
            broken[row, column] = value
            loss = loss_of(name, student, broken, target)
            skipped = "+skip" in name and bool(broken[row].max() > broken[row, target[row]])
            if name == "ce" or skipped:
                assert loss.isfinite()
            else:
                infinite = name == "revision" and loss.isinf()  # the distance of two logits
                assert value == -torch.inf or loss.isnan() or value == torch.inf and infinite


@pytest.mark.parametrize("name", EVERY_METHOD)
def test_losses_of_odd_shapes_and_dtypes(name):
    student, teacher, target = some_logits()
    empty, label = torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64)
    refused = [
        ("at least one row", empty, empty, label),
        ("no classes", student[:, :0], teacher[:, :0], target),
        ("floating-point", student.long(), teacher, target),
        ("floating-point", student.tolist(), teacher, target),
        (r"\(\)", torch.tensor(1.0), torch.tensor(1.0), torch.tensor(0)),
        (r"\(5,\)", student[0], teacher[0], target[0]),
        (r"\(1, 6, 5\)", student[None], teacher[None], target[None]),
        ("target holds 5", student, teacher, target + 1),
        ("target holds -100", student, teacher, target.masked_fill(target == 0, -100)),
        ("class indices", student, teacher, target.float()),
        (r"\(3,\)", student, teacher, target[:3])]
    if create_method(name).uses_teacher:
        refused += [
            ("floating-point", student, teacher.long(), target),
            ("floating-point", student, None, target),
            ("at least two classes", student[:, :1], teacher[:, :1], target * 0),
            ("shape", student, teacher[:, :4], target % 4), ("shape", student[:3], teacher, target)]
    for words, *arguments in refused:
        with pytest.raises((ValueError, TypeError), match=words):
            loss_of(name, *arguments)
    expected = loss_of(name, student, teacher, target)
    across = [each.t().contiguous().t() for each in (student, teacher)]
    torch.testing.assert_close(loss_of(name, *across, target), expected)
    assert loss_of(name, student[:1], teacher[:1], target[:1]).isfinite()
    assert loss_of(name, student * 0, teacher * 0, target).isfinite()
    followed = student.clone().requires_grad_()
    loss = loss_of(name, followed, teacher.clone().requires_grad_(), target)
    loss.backward()
    assert followed.grad.isfinite().all() and torch.equal(loss.detach(), expected)


@pytest.mark.parametrize("name", ["sort", "swap", "revise", "mft", "smooth", "skip"])
@pytest.mark.parametrize("label", range(3))
def test_repairs_of_rows_that_are_not_finite(name, label):
    inf, nan = torch.inf, torch.nan
    rows = torch.tensor([[1, nan, 2], [nan, nan, nan], [inf, 1, 2], [-inf, 1, 2],
                         [-inf, -inf, -inf], [inf, inf, inf], [inf, -inf, 0]])
    repaired = REPAIRS[name](rows, torch.full((len(rows),), label))
    assert repaired[:2].equal(rows[:2]) or repaired[:2].nan_to_num().equal(rows[:2].nan_to_num())
    assert torch.equal(repaired[4:6], rows[4:6]), "all are the largest"
    for before, after in zip(rows[2:], repaired[2:]):
        if name in ("sort", "swap"):
            assert before.sort().values.equal(after.sort().values) and after[label] == before.max()
        elif name == "skip":
            right = before[label] == before.max()
            assert torch.equal(after, before) if right else (after == -inf).all()
        elif before.max() == inf:
            assert torch.equal(after, before)
        else:
            assert after[label] >= after.max() and not after.isnan().any()


@pytest.fixture(scope="module")
def recorded(place):
    "A real record, of a student of an untrained teacher, and the options to repeat it."
    folder = place.with_name("recorded")
    weights, known = seeded_network("resnet20").state_dict(), {"architecture": "resnet20"}
    teacher = save_teacher(folder / "resnet20.safetensors", weights, known | {"dataset": "digits"})
    plan = prepare_experiment(**SMALL, methods="kd+sort", teacher=str(teacher),
                           teachers_dir=str(folder), results_dir=str(folder / "results"))
    record, = run_experiment(plan, progress=False).records
    return json.loads(json.dumps(record)), [
        "--quiet", f"--teachers-dir={folder}", f"--results-dir={folder / 'again'}", "--from-record"]


def test_records_with_other_values(tmp_path, recorded, monkeypatch, capsys):
    "Each field that a repetition needs, as what it should not be: one line, or the repetition."
    monkeypatch.setattr("sortkd.experiment.run.run_experiment", stop)
    record, options = recorded
    path = tmp_path / "records.jsonl"
    for field in ("run_id", "pair", "method.name", "seed", "preset", "recipe.epochs", "data.name",
                  "device", "about_teacher", "about_teacher.weights_sha256", "machine.threads"):
        path.write_text(json.dumps(changed(record, field, {"a": 1})) + "\n")
        assert "this would run" not in one_line(run, [*options, str(path)], capsys)
    path.write_text(json.dumps(record) + "\n")
    assert "this would run" in one_line(run, [*options, str(path)], capsys), "it is repeated"


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\xfe\n"])
@pytest.mark.filterwarnings("ignore:.*is not a whole record")
def test_files_of_no_records(tmp_path, content, capsys):
    path = tmp_path / "records.jsonl"
    path.write_bytes(content)
    for source in (str(path), str(tmp_path), "nowhere:"):
        one_line(run, ["--quiet", f"--from-record={source}"], capsys)


def test_in_a_process_of_its_own(tmp_path):
    command = [Path(sys.executable).with_name("sortkd-run"), "--results-dir=é", "--epochs=-1"]
    done = subprocess.run(command, capture_output=True, timeout=100, cwd=tmp_path, text=True)
    assert done.returncode == 1 and "epochs is -1" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("data, batch_size", [
    (toy_data(), 10**6), (toy_data(train=1, test=1), 16),
    (toy_data(train_images=torch.zeros(3, 8, 8, 40, dtype=torch.uint8).permute(3, 1, 2, 0)), 16),
], ids=["batch beyond the data", "one image", "not contiguous"])
def test_odd_data_is_trained_on(data, batch_size):
    torch.manual_seed(0)
    recipe = Recipe(epochs=1, batch_size=batch_size, lr=0.01, milestones=())
    outcome = train(create_model("resnet8", data.num_classes), Batches(data), create_method("ce"),
                    recipe, create_fabric("cpu"))
    losses = [outcome.last["train_loss"], outcome.last["test_loss"]]
    assert len(outcome.curve) == 1 and torch.tensor(losses).isfinite().all()
    assert all(value.isfinite().all() for value in outcome.last_weights.values())
