"What nobody should pass, passed: an answer within seconds, which is a result or one error that names what is wrong."
import functools
import json
import os
import subprocess
import sys
import time
from inspect import signature
from pathlib import Path

import numpy
import pytest
import torch
from conftest import EVERY_METHOD, needs_cifar100
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_data import fake_cifar100, toy_data

import sortkd.train.images
import sortkd.experiment.setup
import sortkd.experiment.run
from sortkd.fronts.commands import evaluate_command, run
from sortkd.train.augmentation import Batches
from sortkd.train.images import load_cifar100
from sortkd.experiment.setup import Experiment, describe_teacher_logits, prepare_experiment
from sortkd.experiment.run import run_experiment
from sortkd.losses import dist_loss, dkd_loss, kd_loss, mlkd_loss, sld_loss, standardize
from sortkd.repairs import revise_logits, skip_logits, smooth_logits
from sortkd.methods import OBJECTIVES, REPAIRS, create_method
from sortkd.train.networks import create_model
from sortkd.sorting import sort_logits, swap_logits
from sortkd.train.teachers import load_teacher, read_checkpoint, save_teacher
from sortkd.train.devices import create_fabric
from sortkd.train.trainer import Recipe, train

NOTEBOOK = Path(__file__).parents[1] / "nbs" / "run_experiment.ipynb"
SMALL = {"pair": "resnet20:resnet8", "preset": "quick", "dataset": "digits", "epochs": 1, "train_size": 200, "test_size": 100, "device": "cpu"}
REAL_CIFAR100 = sortkd.train.images._cifar_folder("CIFAR-100", None).resolve()  # before the place hides it
LONGEST_MESSAGE, LONGEST_ANSWER = 2000, 5.0  # characters, seconds


# The parameters of an experiment

load_digits_once = functools.lru_cache(sortkd.train.images.load_data)


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


ENDLESS = []
ENDLESS.append(ENDLESS)
LONG = "x" * 100_000
NO_TEXT = [
    None, float("nan"), float("-inf"), 10**30, -1, 1.5, 1j, numpy.float32(2), numpy.array([1, 2]), b"kd", [], nested(50), ENDLESS, {"a": 1}, {"kd"}, (), object(), type, range(3),
    torch.tensor(float("nan")),
]
TEXTS = ["", "\t\n", "\0", "a\0b", "\ud800", "\u202ekd", "kd\nce", LONG, "٣", "1e3", "9" * 5000, "AUTO", "auto ", "$(touch x)", "../../x", "é" * 300]
EVERYTHING = NO_TEXT + TEXTS + [True, numpy.bool_(True), 0, 1, numpy.int64(3), ["kd"], ("kd",)]
PATHS = ["FOLDER/file", "FOLDER/file/inside", "FOLDER/absent", "FOLDER/folder", "FOLDER/link", "FOLDER/loop", "a/" * 3000, "x" * 300, "/dev/null", "/proc/nowhere", "http://example.org/x.pth"]
NAMES = ["r56", "kd+fix", "kd+sort+sort", "cpu,cuda", "tpu", "float16", "imagenet", "online,offline"]
NUMBERS = [2**31, 2**63, 10**400, "0", "1", "-1", "1.0"]
VALUES = {
    "pair": EVERYTHING + NAMES + ["resnet8:", ":resnet8", "resnet8:resnet9", "timm:resnet8", "timm:x:resnet8", "resnet8:torchvision:" + LONG, ":" * 1000, "a:b:c"], "methods": EVERYTHING + NAMES + ["kd(", "kd)", "kd()(", "kd(a=1)", "kd(temperature=)", "kd(temperature=1e999)", "(" * 50_000, "kd(a," * 20_000, "kd,kd", "kd,,dkd", ",", [["kd"]], ["kd", None], ["kd", "kd"]],
    "seeds": EVERYTHING + NUMBERS + ["0,0", "-1", "0;1", [0, 0], [-1], [2**31], [None], "²"], "preset": EVERYTHING + NAMES, "dataset": EVERYTHING + NAMES,
    "set": EVERYTHING + NAMES + ["lr", "lr=", "=1", "lr=x", "lr=nan", "lr=-1", "lr=1,lr=2", "lr=(1,2)", "batch_size=1.5", "batch_size=0", "epochs=3", "milestones=1", "lr==1"],
    "epochs": EVERYTHING + NUMBERS, "train_size": EVERYTHING + NUMBERS + [1438], "test_size": EVERYTHING + NUMBERS + [361],
    "teacher": EVERYTHING + PATHS, "teachers_dir": EVERYTHING + PATHS, "results_dir": EVERYTHING + PATHS, "cache_dir": EVERYTHING + PATHS,
    "device": EVERYTHING + NAMES, "precision": EVERYTHING + NAMES, "deterministic": EVERYTHING, "compile": EVERYTHING, "cache": EVERYTHING + NAMES, "workers": EVERYTHING + NUMBERS,
    "again": EVERYTHING, "plan": EVERYTHING + PATHS, "plugin": EVERYTHING + PATHS, "tensorboard": EVERYTHING, "wandb": EVERYTHING + NAMES,
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
        patch.setattr(sortkd.experiment.setup, "load_data", load_digits_once)
        patch.chdir(folder)
        create_fabric("cpu")  # its import takes seconds, and is not the answer's
        yield folder
    assert os.getcwd() == before


def everything_in(folder):
    return sorted((str(path), path.lstat().st_mtime_ns if path.is_file() else 0) for path in folder.rglob("*"))


def answer(place, **given):
    "What planning says: an experiment or a message. All that is promised of both is checked here."
    there, start = everything_in(place), time.monotonic()
    try:
        plan = prepare_experiment(**SMALL | {"results_dir": str(place / "results"), "teachers_dir": str(place / "teachers")} | given)
    except (ValueError, TypeError, OSError) as error:
        plan, said = None, str(error)
        assert len(said) <= LONGEST_MESSAGE, f"{len(said)} characters"
        assert "\n" not in said and said.isprintable(), f"not one line that can be shown: {said!r}"
        assert any(name in said or repr(value)[1:40].rstrip("'") in said for name, value in given.items()), f"nothing is named: {said}"
    else:
        assert isinstance(plan, Experiment)
        said = plan.describe() + describe_teacher_logits(plan)  # a plan can be talked about
    assert time.monotonic() - start < LONGEST_ANSWER
    assert everything_in(place) == there, "planning has written"
    return plan, said


def test_every_parameter_has_bad_values():
    assert VALUES.keys() | {"data"} == signature(prepare_experiment).parameters.keys()


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
@settings(max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
def test_generated_values(place, given):
    download = given.get("preset") in ("paper", "short") or given.get("dataset") == "cifar100"
    with pytest.MonkeyPatch.context() as patch:
        if download:  # never from here
            patch.setattr(sortkd.experiment.setup, "load_data", lambda name: load_cifar100("no data", download=False))
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

    monkeypatch.setattr(sortkd.experiment.run, "run_experiment", stop)
    option, there = f"--{name.replace('_', '-')}", everything_in(place)
    small = [part for key, value in (SMALL | {"results_dir": place / "r", "teachers_dir": place / "t"}).items() for part in (f"--{key.replace('_', '-')}", str(value))]
    values = ["", "kd\nce", LONG, "9" * 5000, "$(touch x)", "tpu", "-1", "nan", "None", "--"]  # planning has answered to many more
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
            status, error = said_by(evaluate_command, ["--", value], capsys)
            assert status == 1 and len(error.strip().splitlines()) == 1 and len(error) <= LONGEST_MESSAGE, value[:40]
        for option in ("--architecture", "--dataset", "--device", "--precision"):
            for value in ("", "kd\nce", LONG, "9" * 5000, "$(touch x)", "tpu", "-1"):
                status, error = said_by(evaluate_command, [str(place / "teacher.safetensors"), f"{option}={value}"], capsys)
                assert status == 1 and len(error.strip().splitlines()) == 1 and len(error) <= LONGEST_MESSAGE, (option, value[:40], error[:300])
        assert everything_in(place) == there
    finally:
        (place / "teacher.safetensors").unlink()


@pytest.mark.parametrize("command, arguments, words", [
    ("sortkd-run", ["--results-dir=a\n\u202e\ud800b", "--epochs=-1"], "epochs is -1"),
    pytest.param("sortkd-eval", ["\u202eé\nx.pth"], "there is no checkpoint", marks=pytest.mark.slow),
])
def test_in_a_process_of_its_own(tmp_path, command, arguments, words):
    arguments = [os.fsencode(each.replace("\ud800", "\udcff")) for each in arguments]  # a byte that is no UTF-8
    done = subprocess.run([Path(sys.executable).with_name(command), *arguments], capture_output=True, timeout=100, cwd=tmp_path)
    error = done.stderr.decode()
    assert done.returncode == 1 and words in error and len(error.strip().splitlines()) == 1 and not list(tmp_path.iterdir())


# Data


def spoil(folder, how):
    "Damage CIFAR-100's files in one of many ways; the name of the file that is to be blamed."
    what, name = how.split()
    path = folder / name
    content = path.read_bytes()
    path.unlink()
    if what == "flipped":
        path.write_bytes(content[:10] + bytes([content[10] ^ 1]) + content[11:])
    elif what == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif what == "empty":
        path.write_bytes(b"")
    elif what == "swapped":
        path.write_bytes((folder / {"train": "test", "test": "train", "meta": "test"}[name]).read_bytes())
    elif what == "folder":
        path.mkdir()
    elif what == "loop":
        path.symlink_to(path)
    return name


SPOILT = [f"{what} {name}" for what in ("flipped", "truncated", "empty", "swapped", "missing", "folder", "loop") for name in ("train", "test", "meta")]


@pytest.mark.parametrize("how", SPOILT)
def test_spoilt_cifar100(tmp_path, monkeypatch, how, capsys):
    fake_cifar100(tmp_path / "cifar-100-python", monkeypatch)
    assert load_cifar100(tmp_path, download=False).num_classes == 4, "unspoilt it loads"
    name = spoil(tmp_path / "cifar-100-python", how)
    with pytest.raises(ValueError, match=f"{name} is (damaged|missing).*Nothing was read"):
        load_cifar100(tmp_path, download=False)
    monkeypatch.setenv("SORTKD_DATA", str(tmp_path))
    status, error = said_by(run, ["--preset=quick", "--dataset=cifar100", "--device=cpu", f"--results-dir={tmp_path / 'results'}"], capsys)
    assert status == 1 and name in error and len(error.strip().splitlines()) == 1


@needs_cifar100
@pytest.mark.parametrize("how", ["swapped", "meta truncated", "meta empty"])
def test_spoilt_cifar100_for_real(tmp_path, how):
    source, folder = REAL_CIFAR100, tmp_path / "cifar-100-python"
    folder.mkdir()
    for name in ("train", "test", "meta"):
        (folder / name).symlink_to(source / ({"train": "test", "test": "train"}.get(name, name) if how == "swapped" else name))
    if how != "swapped":
        content = (source / "meta").read_bytes()
        (folder / "meta").unlink()
        (folder / "meta").write_bytes(content[:-1] if "truncated" in how else b"")
    with pytest.raises(ValueError, match="train is damaged" if how == "swapped" else "meta is damaged"):
        load_cifar100(tmp_path)


@pytest.mark.parametrize("changes, words", [
    ({"train_targets": torch.full((40,), 2**62)}, "train_targets holds 4611686018427387904"), ({"test_targets": torch.zeros(12)}, "test_targets is"),
    ({"train_images": torch.zeros(40, 8, 9, 3, dtype=torch.uint8)}, "train_images"), ({"train_images": torch.zeros(40, 8, 8, 1, dtype=torch.uint8)}, "train_images"),
    ({"test_images": torch.zeros(0, 8, 8, 3, dtype=torch.uint8), "test_targets": torch.zeros(0, dtype=torch.int64)}, "test_images"),
    ({"train_images": torch.zeros(40, 0, 0, 3, dtype=torch.uint8)}, "train_images"), ({"train_images": None}, "train_images is"),
    ({"test_targets": torch.tensor(0)}, "test_targets"), ({"class_names": ()}, "class_names"), ({"class_names": ("a",)}, "class_names"),
    ({"mean": (float("nan"), 0.4, 0.3)}, "mean"), ({"std": (0.2, float("inf"), 0.3)}, "std"), ({"std": (0.2, float("nan"), 0.3)}, "std"), ({"std": (0.2, -0.1, 0.3)}, "std"),
    ({"mean": ("a", "b", "c")}, "mean"), ({"mean": ()}, "mean"), ({"pad": 10.5}, "pad"), ({"pad": -(10**30)}, "pad"),
])
def test_data_that_makes_no_sense(changes, words):
    with pytest.raises((ValueError, TypeError), match=words):
        toy_data(**changes)


def one_epoch(data, **recipe):
    torch.manual_seed(0)
    return train(create_model("resnet8", data.num_classes), Batches(data), create_method("ce"), Recipe(**{"epochs": 1, "batch_size": 16, "lr": 0.01, "milestones": ()} | recipe), create_fabric("cpu"))


@pytest.mark.parametrize("data, recipe", [
    (toy_data(), {"batch_size": 10**6}),  # larger than the data
    (toy_data(train=1, test=1), {}),
    (toy_data(train_targets=torch.zeros(40, dtype=torch.int64), test_targets=torch.zeros(12, dtype=torch.int64)), {}),  # one class only
    (toy_data(class_names=tuple(map(str, range(1000)))), {}),  # most classes have no image
    (toy_data(train_images=torch.zeros(40, 8, 8, 3, dtype=torch.uint8)), {}),  # nothing to see
    (toy_data(train_images=torch.zeros(3, 8, 8, 40, dtype=torch.uint8).permute(3, 1, 2, 0)), {}),  # not contiguous
], ids=["batch beyond the data", "one image", "one class", "classes without images", "black", "not contiguous"])
def test_odd_data_is_trained_on(data, recipe):
    outcome = one_epoch(data, **recipe)
    assert len(outcome.curve) == 1 and torch.tensor([outcome.last["train_loss"], outcome.last["test_loss"]]).isfinite().all()
    assert all(value.isfinite().all() for value in outcome.last_weights.values())


# Checkpoints


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    return create_model("resnet8", 10).state_dict()


def saved(folder, weights, kind, text=None):
    path = folder / f"teacher.{kind}"
    torch.save(weights, path) if kind == "pth" else save_teacher(path, weights, text or {"architecture": "resnet8", "dataset": "digits"})
    return path


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_cut_checkpoints(tmp_path, weights, kind):
    path = saved(tmp_path, weights, kind)
    content = path.read_bytes()
    for length in (0, 1, 7, 8, 9, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=rf"teacher.{kind} cannot be read as weights"):
            load_teacher(path, "resnet8", 10)


@given(st.sampled_from(["pth", "safetensors"]), st.integers(0, 4000), st.binary(min_size=1, max_size=20), st.booleans())
@settings(max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
def test_overwritten_checkpoints(tmp_path_factory, place, kind, start, written, from_end):
    "Some bytes are others: weights, or a ValueError that names the file."
    path = place.parent / f"small.{kind}"
    small = {"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(2, dtype=torch.int64)}
    torch.save(small, path) if kind == "pth" else save_teacher(path, small, {})
    content = bytearray(path.read_bytes())
    start = start % len(content)
    content[start : start + len(written)] = written
    path.write_bytes(content)
    try:
        read, text = read_checkpoint(path)
    except ValueError as error:
        assert path.name in str(error) and len(str(error)) <= LONGEST_MESSAGE
    else:
        assert all(isinstance(value, torch.Tensor) for value in read.values()) and isinstance(text, dict)


def spoilt(weights, value):
    "The weights with a layer that holds `value`, or is what `value` makes of it."
    layer = weights["fc.weight"]
    return weights | {"fc.weight": value(layer) if callable(value) else layer.clone().fill_(value)}


@pytest.mark.parametrize("value, words", [
    (torch.nan, "NaN or infinity in fc.weight"), (torch.inf, "NaN or infinity in fc.weight"), (-torch.inf, "NaN or infinity in fc.weight"),
    (torch.Tensor.long, "fc.weight as torch.int64"), (torch.Tensor.bool, "fc.weight as torch.bool"), (lambda layer: layer.to(torch.complex64), "fc.weight as torch.complex64"),
    (torch.Tensor.to_sparse, "fc.weight as .*sparse"), (lambda layer: layer.to("meta"), "fc.weight"), (lambda layer: torch.quantize_per_tensor(layer, 0.1, 0, torch.qint8), "fc.weight as torch.qint8"),
    (torch.Tensor.flatten, r"fc.weight is \(640,\)"), (lambda layer: layer.new_zeros(1).expand(10**6, 10**6), r"fc.weight is \(1000000, 1000000\)"), (lambda layer: layer[:0], r"\(0, 64\)"),
])
@pytest.mark.filterwarnings("ignore")  # of PyTorch, about sparse and quantized tensors
def test_weights_that_are_none(tmp_path, weights, value, words):
    path = tmp_path / "teacher.pth"
    torch.save(spoilt(weights, value), path)
    with pytest.raises(ValueError, match=f"teacher.pth.*{words}"):
        load_teacher(path, "resnet8", 10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_weights_of_another_precision(tmp_path, weights, dtype):
    path = saved(tmp_path, {name: value.to(dtype) if value.is_floating_point() else value for name, value in weights.items()}, "pth")
    assert {value.dtype for value in load_teacher(path, "resnet8", 10).model.parameters()} == {torch.float32}


@pytest.mark.parametrize("content", [5, None, "text", [], {}, {"model": {}}, {"model": 5}, {1: torch.zeros(2)}, {"a": {"b": torch.zeros(2)}}, {"model": {"a": [torch.zeros(2)]}}, torch.zeros(3)])
def test_checkpoints_of_something_else(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="other.pth holds no state dict"):
        read_checkpoint(tmp_path / "other.pth")


@pytest.mark.parametrize("text", ["[]", "5", "null", "{", "", '{"epochs": "240"}', '{"top1": []}', '{"epochs": null}', "[" * 100_000], ids=lambda text: text[:20] or "empty")
def test_texts_of_teachers(tmp_path, weights, text):
    from safetensors.torch import save_file
    from sortkd.train.teachers import find_teacher
    save_file({name: value.contiguous() for name, value in weights.items()}, tmp_path / "odd.safetensors", {"sortkd": text})
    with pytest.raises(ValueError, match="odd.safetensors"):
        find_teacher("resnet8", load_digits_once("digits"), tmp_path, 1, {})


# Images in files


def png_that_says(width, height):
    "A PNG whose header says that it is enormous."
    import struct, zlib
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.fixture
def image_folder(tmp_path):
    from PIL import Image
    for split in ("train", "val"):
        for number, name in enumerate(("cat", "dog")):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (20, 30), (100 * number, 0, 0)).save(tmp_path / split / name / "0.JPEG")
    return tmp_path


@pytest.mark.parametrize("content", [png_that_says(10**9, 10**9), png_that_says(20_000, 20_000), png_that_says(0, 5), png_that_says(5, 5), b"\xff\xd8\xff", b"GIF89a", b"P6 9999999999 9999999999 255\n", b"\0" * 1000],
                         ids=["enormous", "large", "flat", "cut", "head", "gif", "pnm", "zeros"])
def test_images_that_are_none(image_folder, content):
    from sortkd.train.image_files import ImageFolderBatches, load_image_folder
    (image_folder / "train" / "cat" / "1.JPEG").write_bytes(content)
    with pytest.raises(ValueError, match="1.JPEG cannot be read as an image"):
        list(ImageFolderBatches(load_image_folder(image_folder, 8), workers=0).train(2, 0, 1))


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (8, 8)])
def test_images_of_any_size(image_folder, size):
    from PIL import Image
    from sortkd.train.image_files import ImageFolderBatches, load_image_folder
    for split in ("train", "val"):
        Image.new("RGB", size).save(image_folder / split / "cat" / "1.JPEG")
    batches = ImageFolderBatches(load_image_folder(image_folder, 8), workers=0)
    assert [len(images) for images, _ in [*batches.train(1000, 0, 1), *batches.test(1000)]] == [3, 3]


# Logits

INFINITE = {"inf": torch.inf, "-inf": -torch.inf, "NaN": torch.nan}


def some_logits(rows=6, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, classes, generator=generator), torch.randn(rows, classes, generator=generator), torch.arange(rows) % classes


def loss_of(name, student, teacher, target, strong=True):
    method = create_method(name)
    repaired = method.repair_logits(teacher, target) if method.uses_teacher else None
    views = (student, repaired) if strong and method.strong_views else None
    return method.loss(student, repaired, target, 1, views, method.create_temperature())


@pytest.mark.parametrize("name", EVERY_METHOD)
def test_losses_of_values_that_are_not_finite(name):
    "What Method.loss says: NaN stays NaN; an infinity is a probability of 0 or 1 where that has a meaning, else it is seen in the loss."
    student, teacher, target = some_logits()
    assert loss_of(name, student, teacher, target).isfinite()
    for kind, value in INFINITE.items():
        for row, column in ((0, 0), (0, 1), (3, 4)):
            broken = student.clone()
            broken[row, column] = value
            loss = loss_of(name, broken, teacher, target)
            assert loss.ndim == 0 and (kind == "-inf" or loss.isnan())
            broken = teacher.clone()
            broken[row, column] = value
            loss, wrong = loss_of(name, student, broken, target), bool(broken[row].max() > broken[row, target[row]])
            skipped = "+skip" in name and wrong
            assert loss.ndim == 0 and (kind == "-inf" or name == "ce" or skipped or loss.isnan())
            assert loss.isfinite() if name == "ce" or skipped else True


@pytest.mark.parametrize("name", EVERY_METHOD)
def test_losses_of_odd_shapes_and_dtypes(name):
    student, teacher, target = some_logits()
    needs_teacher = create_method(name).uses_teacher
    empty, label = torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64)
    refused = [
        (ValueError, "at least one row", empty, empty, label), (ValueError, "no classes", student[:, :0], teacher[:, :0], target),
        (TypeError, "floating-point", student.long(), teacher, target), (TypeError, "floating-point", student.tolist(), teacher, target), (TypeError, "floating-point", student.to(torch.complex64), teacher, target),
        (ValueError, r"\(\)", torch.tensor(1.0), torch.tensor(1.0), torch.tensor(0)), (ValueError, r"\(5,\)", student[0], teacher[0], target[0]), (ValueError, r"\(1, 6, 5\)", student[None], teacher[None], target[None]),
        (ValueError, "target holds 5", student, teacher, target + 1), (ValueError, "target holds -1", student, teacher, target - 1), (ValueError, "target holds -100", student, teacher, target.masked_fill(target == 0, -100)),
        (TypeError, "class indices", student, teacher, target.float()), (TypeError, "class indices", student, teacher, target.bool()), (ValueError, r"\(3,\)", student, teacher, target[:3]),
        *([(TypeError, "floating-point", student, teacher.long(), target), (TypeError, "floating-point", student, None, target), (ValueError, "at least two classes", student[:, :1], teacher[:, :1], target * 0),
           (ValueError, "shape", student, teacher[:, :4], target % 4), (ValueError, "shape", student[:3], teacher, target)] if needs_teacher else []),
    ]
    for error, words, *arguments in refused:
        with pytest.raises(error, match=words):
            loss_of(name, *arguments)
        if needs_teacher and isinstance(arguments[1], torch.Tensor) and error is not TypeError:  # with logits that no repair has looked at
            method = create_method(name)
            with pytest.raises(ValueError):
                method.loss(*arguments, 1, arguments[:2] if method.strong_views else None, method.create_temperature())
    if not needs_teacher:
        assert loss_of(name, student[:, :1], None, target * 0) == 0, "with one class nobody can be wrong"
    expected = loss_of(name, student, teacher, target)
    across = [each.t().contiguous().t() for each in (student, teacher)]
    torch.testing.assert_close(loss_of(name, *across, target), expected)
    torch.testing.assert_close(loss_of(name, student[::2], teacher[::2], target[::2]), loss_of(name, student[::2].clone(), teacher[::2].clone(), target[::2]))
    assert loss_of(name, student[:1], teacher[:1], target[:1]).isfinite() and loss_of(name, student * 0, teacher * 0, target).isfinite()
    followed = student.clone().requires_grad_()
    loss = loss_of(name, followed, teacher.clone().requires_grad_(), target)
    loss.backward()
    assert followed.grad.isfinite().all() and torch.equal(loss.detach(), expected)


@pytest.mark.parametrize("repair", [sort_logits, swap_logits, revise_logits, REPAIRS["mft"], smooth_logits, skip_logits])
def test_repairs_of_odd_logits(repair):
    "What chapters 00 and 01 promise of rows that hold NaN or an infinity; other shapes and dtypes for the repairs that tests/test_sorting.py leaves out."
    inf, nan = torch.inf, torch.nan
    rows = torch.tensor([[1.0, nan, 2.0], [nan, nan, nan], [inf, 1.0, 2.0], [-inf, 1.0, 2.0], [-inf, -inf, -inf], [inf, inf, inf], [inf, -inf, 0.0]])
    for label in range(3):
        target = torch.full((len(rows),), label)
        repaired = repair(rows, target)
        assert torch.equal(repaired[:2].isnan(), rows[:2].isnan()) and torch.equal(repaired[:2].nan_to_num(), rows[:2].nan_to_num()), "a NaN cannot be ranked"
        assert torch.equal(repaired[4:6], rows[4:6]), "all are the largest"
        for before, after in zip(rows[2:], repaired[2:]):
            if repair in (sort_logits, swap_logits):
                assert torch.equal(before.sort().values, after.sort().values) and after[label] == before.max()
            elif repair is skip_logits:
                assert torch.equal(after, before) if before[label] == before.max() else (after == -inf).all()
            elif before.max() == inf:
                assert torch.equal(after, before)
            else:
                assert after[label] >= after.max() and not after.isnan().any()
    good, target = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    for error, *arguments in ((TypeError, good.long(), target), (TypeError, good.tolist(), target), (TypeError, good, target.float()), (ValueError, good, target + 1), (ValueError, good, target[:2]),
                              (ValueError, good[:, :0], target), (ValueError, torch.tensor(1.0), torch.tensor(0)), (ValueError, good, target.fill_(-1).clone())):
        with pytest.raises(error):
            repair(*arguments)
    target = torch.tensor([0, 1, 2, 0])
    assert repair(good[:0], target[:0]).shape == (0, 3) and torch.equal(repair(good[:, :1], target * 0), good[:, :1])
    assert torch.equal(repair(good.t().contiguous().t(), target), repair(good, target))
    followed = good.clone().requires_grad_()
    repair(followed, target).clamp(-10, 10).sum().backward()
    assert followed.grad.isfinite().all()


@pytest.mark.parametrize("loss", [kd_loss, dist_loss, lambda s, t, **more: dkd_loss(s, t, torch.zeros(s.shape[:-1], dtype=torch.int64), **more), lambda s, t, **more: mlkd_loss(s, t, s, t, **more)], ids=["kd", "dist", "dkd", "mlkd"])
def test_temperatures(loss):
    student, teacher, _ = some_logits()
    for temperature in (0, -1, float("nan"), float("inf"), "4", None, [4.0], 0.0):
        with pytest.raises(ValueError, match="temperature must be greater than 0"):
            loss(student, teacher, temperature=temperature)
    assert loss(student, teacher, temperature=numpy.float32(4)).isfinite() and loss(student, teacher, temperature=1e6).isfinite()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_settings_of_methods(objective):
    method = create_method(objective)
    for name in ("ce_weight", "kd_weight", *method.settings):
        for value in (float("nan"), float("inf"), "4", None, [1.0], 1j):
            with pytest.raises(ValueError, match=f"{name} of {objective} must be a (finite|whole) number"):
                create_method(objective, **{name: value})


@pytest.mark.parametrize("call", [lambda: standardize(torch.zeros(3, 4, dtype=torch.int64)), lambda: standardize([1.0]), lambda: sld_loss(*[torch.zeros(2, 3)] * 4, torch.zeros(2)), lambda: kd_loss(None, None)])
def test_losses_by_themselves(call):
    with pytest.raises(TypeError, match="must be"):
        call()


# Records that are to be repeated


@pytest.fixture(scope="module")
def recorded(place):
    "A real record, of a student that an untrained teacher has taught, and the options to repeat it."
    torch.manual_seed(0)
    folder = place.with_name("recorded")
    teacher = save_teacher(folder / "resnet20.safetensors", create_model("resnet20", 10).state_dict(), {"architecture": "resnet20", "dataset": "digits"})
    plan = prepare_experiment(**SMALL | {"methods": "kd+sort", "teacher": str(teacher), "teachers_dir": str(folder), "results_dir": str(folder / "results")})
    record, = run_experiment(plan, progress=False).records
    return json.loads(json.dumps(record)), ["--quiet", f"--teachers-dir={folder}", f"--results-dir={folder / 'again'}", "--from-record"]


def changed(record, path, value):
    name, _, rest = path.partition(".")
    return record | {name: changed(record[name], rest, value) if rest else value}


NEEDED = ["run_id", "pair", "method", "method.name", "seed", "preset", "full_recipe", "recipe", "recipe.epochs", "data", "data.name", "data.train_images", "device", "precision", "teacher_logits",
          "about_teacher", "about_teacher.file", "about_teacher.weights_sha256", "machine", "machine.threads"]


def test_records_with_other_values(tmp_path, place, recorded, monkeypatch, capsys):
    "Each field that a repetition needs, as what it should not be: one line, or the repetition."
    def stop(*_):
        raise RuntimeError("this would run")

    monkeypatch.setattr(sortkd.experiment.run, "run_experiment", stop)
    record, options = recorded
    path, refused = tmp_path / "records.jsonl", 0
    for field in NEEDED:
        for value in (None, "../../x", LONG, -1, 10**30, [], {"a": 1}):
            path.write_text(json.dumps(changed(record, field, value)) + "\n")
            status, error = said_by(run, [*options, str(path)], capsys)
            assert status == 1 and len(error.strip().splitlines()) == 1 and len(error) <= LONGEST_MESSAGE, (field, str(value)[:40], error[:500])
            refused += "this would run" not in error
    assert refused > len(NEEDED) * 7 / 2
    path.write_text(json.dumps(record) + "\n")
    assert "this would run" in said_by(run, [*options, str(path)], capsys)[1], "unchanged it is repeated"


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"null\n5\n", b"\xff\xfe\n", b'{"run_id": 5}', b'{"run_id": "a"}\n{"run_id": "a"}\n', b"[" * 100_000, b"\0" * 1000], ids=lambda content: str(content[:12]))
@pytest.mark.filterwarnings("ignore:.*is not a whole record")
def test_files_of_no_records(tmp_path, place, content, capsys):
    (tmp_path / "records.jsonl").write_bytes(content)
    for source in (str(tmp_path / "records.jsonl"), str(tmp_path), "x" * 5000, "nowhere:", ":", ""):
        status, error = said_by(run, ["--quiet", f"--from-record={source}"], capsys)
        assert status == 1 and len(error.strip().splitlines()) == 1 and len(error) <= LONGEST_MESSAGE, error[:300]
