"Own repairs, objectives, networks and data: in records, repetitions and grids."
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from sortkd.experiment import plugins
from sortkd.experiment.plugins import (
    load_plugin, register_data, register_objective, register_repair)
from sortkd.experiment.repeat import prepare_repetition
from sortkd.experiment.run import run_experiment
from sortkd.experiment.record import check_record
from sortkd.experiment.setup import prepare_experiment
from sortkd.experiment.slices import main
from sortkd.fronts.commands import evaluate_command, run
from sortkd.methods import create_method
from sortkd.train.images import load_digits

SOURCE = '''
import torch
from sortkd.experiment.plugins import register_model, register_objective, register_repair

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
SIZES = dict(preset="quick", dataset="digits", device="cpu", precision="float32", epochs=1,
             train_size=40, test_size=20)
METHODS = ["kd(temperature=2)+sort", "kd+boost(temperature=2)", "mse+sort"]


def forget_plugins():
    for kind, name in list(plugins._owners):
        plugins._REGISTRIES[kind].pop(name, None)  # another file of tests may have taken it back
        del plugins._owners[kind, name]
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


@pytest.fixture
def places(tmp_path):
    return {f"{name}_dir": str(tmp_path / name) for name in ("results", "teachers")}


def flags(**values):
    return [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]


@pytest.mark.parametrize("through", ["command", pytest.param("grid", marks=pytest.mark.slow)])
def test_in_records_and_repeated(mine, tmp_path, places, through, capsys):
    if through == "command":
        values = {**SIZES, **places, "plugin": str(mine)}
        assert run(["--pair=tiny:tiny", f"--methods={','.join(METHODS)}", *flags(**values)]) == 0
    else:
        options = {name: value for name, value in SIZES.items() if name != "preset"}
        grid = {"pairs": ["tiny:tiny"], "methods": METHODS, "seeds": 1, "preset": "quick",
                "options": options | {"plugin": str(mine)}, **places}
        (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))
        assert main([str(tmp_path / "grid.yaml"), "--quiet", "--plugin", str(mine)]) == 0
    file = Path(places["results_dir"], "quick.jsonl")
    records = {each["method"]["name"]: each for each in map(json.loads, open(file))}
    assert set(records) == set(METHODS)
    assert records[METHODS[0]]["method"]["settings"] == {"temperature": 2.0}
    assert records[METHODS[1]]["method"]["repair_settings"] == {"temperature": 2.0}
    again = flags(teachers_dir=places["teachers_dir"], results_dir=tmp_path / "again")
    for record in records.values():
        check_record(record)
        assert record["plugins"] == [{"file": "mine.py", "sha256": load_plugin(mine).sha256}]
        source = f"--from-record={file}:{record['run_id']}"
        assert run([source, f"--plugin={mine}", *again]) == 0
    assert capsys.readouterr().out.count("The same: curve and weights agree to the bit.") == 3
    teacher, = Path(places["teachers_dir"]).rglob("*.safetensors")
    forget_plugins()
    assert run([source, *again]) == 1, "a record never loads a plugin"
    assert evaluate_command([str(teacher), "--dataset=digits"]) == 1
    assert evaluate_command([str(teacher), f"--plugin={mine}"]) == 0
    mine.write_text(SOURCE + "\n# other content\n")
    assert run([source, f"--plugin={mine}", *again]) == 1
    assert capsys.readouterr().err.count("used mine.py with SHA-256") == 2


def test_a_run_that_uses_no_plugin_stays_the_same_run(mine, places):
    def appended(**changes):
        experiment = prepare_experiment(pair="resnet8:resnet8", **SIZES, **places, **changes)
        return run_experiment(experiment, progress=False).appended

    assert appended(methods="kd") == 1 == appended(methods="kd,mse", plugin=str(mine))
    mine.write_text(SOURCE.replace("square().mean()", "abs().mean()"))  # another mse, another run
    assert appended(methods="kd,mse", plugin=str(mine)) == 1


def test_in_a_session(tmp_path, places):
    "A function of a notebook is recorded by its source's checksum; its cell may be executed again."
    @register_data("pixels")
    def pixels():
        return replace(load_digits(), name="pixels")

    def twice(logits, target, factor=2.0):
        return factor * logits

    for _ in range(2):
        register_repair("twice")(twice)
    given = {"pair": "resnet8:resnet8", "methods": "kd+twice", **SIZES, **places, "dataset": "pixels"}
    record, = run_experiment(prepare_experiment(**given), progress=False).records
    assert [each["file"] for each in record["plugins"]] == ["session:twice", "session:pixels"]
    assert record["data"]["name"] == "pixels"
    again = {**places, "results_dir": str(tmp_path / "again")}
    prepare_repetition(record, **again)
    register_repair("twice")(lambda logits, target, factor=2.0: logits * factor)
    with pytest.raises(ValueError, match="register it in this session first"):
        prepare_repetition(record, **again)


REPAIR, OBJECTIVE = "register_repair('new')", "register_objective('new')"


@pytest.mark.parametrize(("content", "message"), [
    ("def broken(:", "mine.py, line 2: .*SyntaxError"), ("x = 1", "registers nothing"),
    ("1 / 0", "mine.py, line 2: ZeroDivisionError: division by zero"),
    ("register_repair('sort')(lambda logits, target: logits)", "the repair 'sort' exists already"),
    ("register_repair('a+b')(lambda logits, target: logits)", r"'a\+b' cannot be the name"),
    (f"{REPAIR}(lambda logits: logits)", "takes 1 positional argument but 2 were given"),
    (f"{REPAIR}(lambda logits, target, eta='x': logits)", "a number as its default.*eta='x'"),
    (f"{REPAIR}(lambda logits, target: logits[:, 1:])", r"a finite tensor of shape \(6, 5\)"),
    (f"{REPAIR}(lambda logits, target: logits / 0)", "must return a finite tensor"),
    (f"{OBJECTIVE}(lambda s, t, y: s - t)", r"must return a finite tensor of shape \(\)"),
    (f"{OBJECTIVE}(lambda s, t, y: t.mean())", "has no gradient")])
def test_refused(mine, content, message):
    mine.write_text(f"from sortkd.experiment.plugins import *\n{content}")
    with pytest.raises(ValueError, match=message) as refusal:
        load_plugin(mine)
    assert "\n" not in str(refusal.value) and str(mine) in str(refusal.value)


def test_a_changed_file_replaces_what_it_had_registered(mine, tmp_path):
    load_plugin(mine)
    (tmp_path / "copy.py").write_text(SOURCE)
    with pytest.raises(ValueError, match="the repair 'boost' exists already"):
        load_plugin(tmp_path / "copy.py")
    mine.write_text("from sortkd.experiment.plugins import register_repair\n"
                    "register_repair('boost')(lambda logits, target: logits)\n")
    load_plugin(mine)
    assert create_method("kd+boost").repair_settings == {}


def test_gradients_of_an_own_objective_reach_the_student():
    @register_objective("mae", ce_weight=0.0, kd_weight=2.0)
    def mae(student_logits, teacher_logits, target):
        return (student_logits - teacher_logits).abs().mean()

    student, teacher = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3)
    method, target = create_method("mae+sort"), torch.tensor([0, 1, 2, 0])
    repaired = method.repair_logits(teacher, target)
    loss = method.loss(student, repaired, target, epoch=1)
    torch.testing.assert_close(loss, 2 * (student - repaired).abs().mean())
    gradient, = torch.autograd.grad(loss, student)
    torch.testing.assert_close(gradient, 2 * (student - repaired).sign().detach() / 12)
