"Own repairs, objectives, networks and data: in records, repetitions, workers and grids, and what is refused."

import hashlib
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from sortkd.experiment import plugins
from sortkd.fronts.commands import evaluate_command, run
from sortkd.train.images import ImageData, load_digits
from sortkd.experiment.setup import prepare_experiment
from sortkd.experiment.grid import main, read_grid, read_state
from sortkd.methods import OBJECTIVES, REPAIRS, create_method
from sortkd.train.architectures import NETWORKS
from sortkd.train.networks import create_model
from sortkd.experiment.plugins import load_plugin, register_data, register_objective, register_repair
from sortkd.experiment.repeat import prepare_repetition
from sortkd.experiment.run import run_experiment
from sortkd.experiment.record import check_record

SOURCE = '''
import torch
from sortkd.experiment.plugins import register_data, register_model, register_objective, register_repair

@register_repair("boost")
def boost(logits, target, temperature=1.0):
    return logits.scatter(1, target[:, None], logits.amax(1, keepdim=True) + temperature)

@register_objective("mse", ce_weight=1.0, kd_weight=0.1)
def mse(student_logits, teacher_logits, target, scale=1.0):
    return scale * (student_logits - teacher_logits).square().mean()

@register_model("tiny")
class Tiny(torch.nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.layer = torch.nn.Linear(3, num_classes)

    def forward(self, images):
        return self.layer(images.mean((2, 3)))
'''
SIZES = dict(preset="quick", dataset="digits", device="cpu", precision="float32", epochs=1, train_size=40, test_size=20)
FLAGS = "--preset quick --dataset digits --device cpu --precision float32 --epochs 1 --train-size 40 --test-size 20".split()


def forget_plugins():
    for kind, name in list(plugins._owners):
        del plugins._REGISTRIES[kind][name], plugins._owners[kind, name]
    plugins._loaded.clear()
    for name in [name for name in sys.modules if name.startswith("sortkd_plugin_")]:
        del sys.modules[name]


@pytest.fixture(autouse=True)
def nothing_stays():
    yield
    forget_plugins()


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    return path


def options(tmp_path):
    return [*FLAGS, "--results-dir", str(tmp_path / "r"), "--teachers-dir", str(tmp_path / "t"), "--quiet"]


def records_of(tmp_path):
    return [json.loads(line) for line in (tmp_path / "r" / "quick.jsonl").read_text().splitlines()]


def test_in_records_and_repeated(mine, tmp_path, capsys):
    command = ["--pair", "tiny:tiny", "--methods", "kd(temperature=2)+sort,kd+boost(temperature=2),mse+sort"]
    assert run([*command, "--plugin", str(mine), *options(tmp_path)]) == 0
    records = records_of(tmp_path)
    assert [each["method"]["name"] for each in records] == ["kd(temperature=2)+sort", "kd+boost(temperature=2)", "mse+sort"]
    assert records[0]["method"]["settings"] == {"temperature": 2.0} and records[1]["method"]["repair_settings"] == {"temperature": 2.0}
    about = [{"file": "mine.py", "sha256": load_plugin(mine).sha256}]
    assert all(each["plugins"] == about for each in records)
    places = ["--results-dir", str(tmp_path / "again"), "--teachers-dir", str(tmp_path / "t"), "--quiet"]
    for record in records[1:]:
        source = f"{tmp_path / 'r' / 'quick.jsonl'}:{record['run_id']}"
        assert run(["--from-record", source, "--plugin", str(mine), *places]) == 0
    assert "The same: curve and weights agree to the bit." in capsys.readouterr().out
    assert run(["--from-record", source, *places]) == 1  # a record never loads a plugin
    assert "used mine.py with SHA-256" in capsys.readouterr().err
    teacher, = (tmp_path / "t").rglob("*.safetensors")
    forget_plugins()
    assert evaluate_command([str(teacher), "--dataset", "digits"]) == 1 and evaluate_command([str(teacher), "--plugin", str(mine)]) == 0
    capsys.readouterr()
    mine.write_text(SOURCE + "\n# another content\n")
    assert run(["--from-record", source, "--plugin", str(mine), *places]) == 1
    assert f"but mine.py is {load_plugin(mine).sha256[:16]}" in capsys.readouterr().err


def test_a_run_that_uses_no_plugin_stays_the_same_run(mine, tmp_path):
    places = dict(results_dir=str(tmp_path / "r"), teachers_dir=str(tmp_path / "t"))
    run_experiment(prepare_experiment(pair="resnet8:resnet8", methods="kd", **SIZES, **places), progress=False)
    planned = prepare_experiment(pair="resnet8:resnet8", methods="kd,mse", plugin=str(mine), **SIZES, **places)
    assert run_experiment(planned, progress=False).appended == 1
    mine.write_text(SOURCE.replace("square().mean()", "abs().mean()"))  # another mse is another run
    planned = prepare_experiment(pair="resnet8:resnet8", methods="kd,mse", plugin=str(mine), **SIZES, **places)
    assert run_experiment(planned, progress=False).appended == 1


def test_an_experiment_brings_its_plugins_to_another_process(mine, tmp_path):
    "As if in a worker: nothing is registered there, and the module is unknown."
    planned = prepare_experiment(pair="tiny:tiny", methods="kd+boost,mse", plugin=str(mine), **SIZES, results_dir=str(tmp_path))
    sent = pickle.dumps((planned, create_model("tiny", 10)))
    forget_plugins()
    assert "mse" not in OBJECTIVES and "tiny" not in NETWORKS
    received, network = pickle.loads(sent)
    assert received.plugins == planned.plugins and "mse" in OBJECTIVES and isinstance(network, NETWORKS["tiny"])


@pytest.mark.slow
def test_in_workers(mine, tmp_path):
    places = dict(results_dir=str(tmp_path / "r"), teachers_dir=str(tmp_path / "t"))
    planned = prepare_experiment(pair="tiny:tiny", methods="kd+boost,mse", plugin=str(mine), workers=2, **SIZES, **places)
    assert run_experiment(planned, progress=False).appended == 2


def test_in_grids(mine, tmp_path):
    content = {
        "pairs": ["tiny:tiny"], "methods": ["kd+boost", "mse"], "seeds": 1, "preset": "quick", "cell": "command", "threads": 1,
        "options": {"dataset": "digits", "train_size": 40},
        **{name: str(tmp_path / name) for name in ("cells_dir", "teachers_dir", "results_dir")},
    }
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(content))
    state = read_state(read_grid(tmp_path / "grid.yaml", str(mine)))
    assert {job.method for job in state.missing} == {"", "kd+boost", "mse"}
    assert [each.file for each in state.planned.plugins] == ["mine.py"]


@pytest.mark.slow
@pytest.mark.parametrize("through", ["command", "papermill", "grid"])
def test_own_pair_numbers_and_methods(mine, tmp_path, through, capsys):
    "Whole records of three methods, whichever way they are run, each repeated from its record."
    methods = ["kd(temperature=2)+sort", "kd+boost", "mse+sort"]
    folders = {"teachers_dir": str(tmp_path / "t"), "results_dir": str(tmp_path / "r")}
    settings = {"dataset": "digits", "epochs": 1, "train_size": 200, "test_size": 100, "plugin": str(mine)}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in (settings | folders).items()]
    if through == "command":
        assert run(["--pair", "resnet20:resnet8", "--methods", ",".join(methods), *flags]) == 0
    elif through == "papermill":
        parameters = {"pair": "resnet20:resnet8", "methods": ",".join(methods), **settings, **folders}
        given = [part for name, value in parameters.items() for part in ("-p", name, str(value))]
        notebook = Path(__file__).parents[1] / "nbs" / "run_experiment.ipynb"
        subprocess.run([sys.executable, "-m", "papermill", notebook, tmp_path / "out.ipynb", *given], check=True)
    else:
        grid = {"pairs": ["resnet20:resnet8"], "methods": methods, "seeds": 1, "preset": "quick", "cell": "command", "threads": 1,
                "cells_dir": str(tmp_path / "cells"), "options": settings, **folders}
        (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))
        assert main([str(tmp_path / "grid.yaml"), "--quiet", "--plugin", str(mine)]) == 0
    records = records_of(tmp_path)
    assert {each["method"]["name"] for each in records} == set(methods) and len(records) == 3
    for record in records:
        check_record(record)
        assert record["plugins"] == [{"file": "mine.py", "sha256": hashlib.sha256(mine.read_bytes()).hexdigest()}]
        assert record["method"]["settings"].get("temperature") == {"kd(temperature=2)+sort": 2.0, "kd+boost": 4.0}.get(record["method"]["name"])
        source = f"{tmp_path / 'r' / 'quick.jsonl'}:{record['run_id']}"
        assert run(["--from-record", source, "--plugin", str(mine), "--teachers-dir", str(tmp_path / "t"), "--results-dir", str(tmp_path / "again")]) == 0
    assert capsys.readouterr().out.count("The same: curve and weights agree to the bit.") == 3


def test_in_a_session(tmp_path):
    "What a notebook's cell registered is recorded by the checksum of its source, and the cell may be executed again."
    def twice(logits, target, factor=2.0):
        return factor * logits

    for _ in range(2):
        register_repair("twice")(twice)
    places = dict(results_dir=str(tmp_path / "r"), teachers_dir=str(tmp_path / "t"))
    planned = prepare_experiment(pair="resnet8:resnet8", methods="kd+twice", **SIZES, **places)
    record, = run_experiment(planned, progress=False).records
    assert [each["file"] for each in record["plugins"]] == ["session:twice"]
    prepare_repetition(record, teachers_dir=str(tmp_path / "t"), results_dir=str(tmp_path / "again"))
    with pytest.raises(ValueError, match="other processes do not know session:twice"):
        prepare_experiment(pair="resnet8:resnet8", methods="kd+twice", workers=2, **SIZES, **places)
    register_repair("twice")(lambda logits, target, factor=2.0: logits * factor)
    with pytest.raises(ValueError, match="register it in this session first"):
        prepare_repetition(record, teachers_dir=str(tmp_path / "t"), results_dir=str(tmp_path / "again"))


def test_own_data(tmp_path):
    digits = load_digits()

    @register_data("pixels")
    def pixels():
        return ImageData("pixels", digits.train_images, digits.train_targets, digits.test_images, digits.test_targets,
                         digits.class_names, digits.mean, digits.std, pad=2, flip=False)

    places = dict(results_dir=str(tmp_path / "r"), teachers_dir=str(tmp_path / "t"))
    planned = prepare_experiment(pair="resnet8:resnet8", methods="kd", **SIZES | {"dataset": "pixels"}, **places)
    record, = run_experiment(planned, progress=False).records
    assert record["data"]["name"] == "pixels" and record["plugins"][0]["file"] == "session:pixels"
    register_data("other")(pixels)
    with pytest.raises(ValueError, match="must be an ImageData of that name, but the function returned 'pixels'"):
        prepare_experiment(pair="resnet8:resnet8", **SIZES | {"dataset": "other"}, **places)


def test_entry_point(tmp_path, monkeypatch):
    package = tmp_path / "their_package"
    package.mkdir()
    (package / "__init__.py").write_text(SOURCE)
    about = tmp_path / "their_package-1.2.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.2\n")
    (about / "entry_points.txt").write_text("[sortkd.experiment.plugins]\ntheirs = their_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_plugin("theirs").file == "theirs (their-package 1.2)"
    assert create_method("mse(scale=3)+boost").settings == {"scale": 3.0}


@pytest.mark.parametrize(("content", "message"), [
    ("def broken(:", r"mine.py, line 1: invalid syntax"),
    ("\n1 / 0", r"mine.py, line 2: ZeroDivisionError: division by zero"),
    ("x = 1", "registers nothing"),
    ("register_repair('sort')(lambda logits, target: logits)", "the repair 'sort' exists already"),
    ("register_objective('kd')(lambda s, t, y: (s - t).mean())", "the objective 'kd' exists already"),
    ("register_repair('a+b')(lambda logits, target: logits)", r"'a\+b' cannot be the name of a repair"),
    ("register_repair('new')(lambda logits: logits)", "must take 2 arguments and then its settings"),
    ("register_repair('new')(lambda logits, target, eta: logits)", "has a setting eta without a number as its default"),
    ("register_repair('new')(lambda logits, target, eta='x': logits)", "has a setting eta='x' without a number"),
    ("register_repair('new')(lambda logits, target: logits[:, 1:])", r"must return a tensor of shape \(6, 5\) .* returned shape \(6, 4\)"),
    ("register_repair('new')(lambda logits, target: None)", "but returned NoneType"),
    ("register_repair('new')(lambda logits, target: logits / 0)", "not finite"),
    ("register_repair('new')(lambda logits, target: logits @ logits)", "failed on logits"),
    ("register_objective('new')(lambda s, t, y: s - t)", r"must return a tensor of shape \(\)"),
    ("register_objective('new')(lambda s, t, y: t.mean())", "has no gradient"),
])
def test_refused(mine, content, message):
    mine.write_text("from sortkd.experiment.plugins import *\n" * (content[0] not in "d\nx") + content)
    before = list(OBJECTIVES), list(REPAIRS)
    with pytest.raises(ValueError, match=message) as refusal:
        load_plugin(mine)
    assert "\n" not in str(refusal.value) and str(mine) in str(refusal.value)
    assert (list(OBJECTIVES), list(REPAIRS)) == before


def test_a_changed_file_replaces_what_it_had_registered(mine):
    load_plugin(mine)
    mine.write_text(SOURCE + "\nregister_repair('sort')(boost)\n")
    with pytest.raises(ValueError, match="already"):
        load_plugin(mine)
    mine.write_text(SOURCE)
    load_plugin(mine)
    assert create_method("mse+boost").objective == "mse"
    mine.write_text("from sortkd.experiment.plugins import register_repair\nregister_repair('boost')(lambda logits, target: logits)\n")
    load_plugin(mine)
    assert "mse" not in OBJECTIVES and create_method("kd+boost").repair_settings == {}


def test_names_that_two_plugins_want(mine, tmp_path):
    load_plugin(mine)
    shutil.copy(mine, tmp_path / "copy.py")
    (tmp_path / "copy.py").write_text(SOURCE + "\n")
    with pytest.raises(ValueError, match="the repair 'boost' exists already, from mine.py"):
        load_plugin(tmp_path / "copy.py")


def test_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such file, and no installed package offers one of that name"):
        load_plugin(tmp_path / "absent.py")


def test_gradients_of_an_own_objective_reach_the_student():
    @register_objective("mae", ce_weight=0.0, kd_weight=2.0)
    def mae(student_logits, teacher_logits, target):
        return (student_logits - teacher_logits).abs().mean()

    student, teacher, target = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    method = create_method("mae+sort")
    repaired = method.repair_logits(teacher, target)
    loss = method.loss(student, repaired, target, epoch=1)
    torch.testing.assert_close(loss, 2 * (student - repaired).abs().mean())
    gradient, = torch.autograd.grad(loss, student)
    torch.testing.assert_close(gradient, 2 * (student - repaired).sign().detach() / 12)
