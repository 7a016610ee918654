"The commands do what the notebook does, and say what is wrong in one line."
import ast
import re
from dataclasses import fields

import pytest
import torch
from conftest import ROOT, raises, seeded_network
from papermill import inspect_notebook

from sortkd.experiment.pairs import IMAGENET_PAIRS, PAIRS
from sortkd.experiment.parameters import Parameters, parameter_groups
from sortkd.experiment.storage import append_record, read_records
from sortkd.fronts.commands import evaluate_checkpoint, evaluate_command, measure_logits, run
from sortkd.methods import OBJECTIVES, REPAIRS
from sortkd.train.images import load_digits
from sortkd.train.networks import create_model

NOTEBOOK = ROOT / "nbs" / "run_experiment.ipynb"
SMALL = ("--pair resnet20:resnet8 --dataset digits --preset quick --epochs 1 --train-size 200 "
         "--test-size 100 --device cpu --quiet").split()


def folders_in(tmp_path, results="results"):
    return [f"--teachers-dir={tmp_path / 'teachers'}", f"--results-dir={tmp_path / results}"]


def test_the_notebook_has_the_parameters_of_the_dataclass():
    "Chapter 31 has the text of the cell."
    found = inspect_notebook(NOTEBOOK)
    assert found.pop("progress")["default"] == "True"
    assert list(found) == [each.name for group in parameter_groups().values() for each in group]
    assert list(found) == list(Parameters.__dataclass_fields__)
    for each in fields(Parameters):
        shown = found[each.name]
        assert ast.literal_eval(shown["default"]) == each.default
        assert shown["inferred_type_name"] == each.type.__name__ == type(each.default).__name__
        assert shown["help"] == each.metadata["help"]


def test_the_help_names_every_pair_objective_and_repair():
    pair, methods = (Parameters.__dataclass_fields__[name].metadata["more"]
                     for name in ("pair", "methods"))
    objectives, repairs = methods.split("Objectives:")[1].split("Repairs")
    assert set(re.findall(r"\w+_\w+", pair)) == {*PAIRS, *IMAGENET_PAIRS}
    assert set(re.findall(r"[a-z_]+", objectives)) == set(OBJECTIVES)
    assert set(re.findall(r"\+([a-z]+)", repairs)) == set(REPAIRS) - {"none"}


TWO = [*SMALL, "--methods", "kd,kd+sort", "--seeds", "3"]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    "A folder in which two students were trained."
    folder = tmp_path_factory.mktemp("ran")
    assert run([*TWO, *folders_in(folder)]) == 0
    return folder


def test_run_and_eval(ran, capsys):
    assert run([*TWO, *folders_in(ran)]) == 0
    shown = capsys.readouterr().out
    assert "This is a quick run" in shown and "0 of 2 records appended" in shown
    records = read_records(ran / "results" / "quick.jsonl")
    assert [(each["seed"], each["method"]["name"]) for each in records] == [(3, "kd"), (3, "kd+sort")]
    plan = ROOT / "results" / "plans" / "sorting.yaml"
    assert "minus" in shown
    planned = [each for each in TWO if each != "--quiet"] + ["--plan", str(plan)]
    assert run([*planned, *folders_in(ran, "planned")]) == 0
    shown = capsys.readouterr().out
    assert "epoch 1/1" in shown and "belong to a plan" in shown
    assert not {"minus", "loss", "top-1"} & {*shown.split()}, "they wait for their look"
    teacher, = (ran / "teachers").rglob("*.safetensors")
    quality = evaluate_checkpoint(teacher, device="cpu")
    assert quality["images"] == 360 and quality["top1"] <= quality["top5"] <= 100
    student, *_ = (ran / "results").rglob("last.safetensors")
    named = ["--architecture", "resnet8", "--dataset", "digits", "--device", "cpu"]
    assert evaluate_command([str(student), *named]) == 0
    assert "calibration error (%)" in capsys.readouterr().out


def test_eval_agrees_with_arithmetic(tmp_path):
    "On a checkpoint laid out as the published ones are, with the state dict under `model`."
    network = seeded_network().eval()
    with torch.no_grad():
        network.classifier_layer.weight.mul_(0.01)
    path = tmp_path / "ckpt_epoch_240.pth"
    torch.save({"epoch": 240, "model": network.state_dict()}, path)
    quality = evaluate_checkpoint(path, "resnet8", "digits", "cpu")
    data = load_digits()
    target = data.test_targets
    images = (data.test_images.float() / 255 - torch.tensor(data.mean)) / torch.tensor(data.std)
    with torch.no_grad():
        logits = network(images.permute(0, 3, 1, 2))
    confidence, choice = logits.softmax(1).max(1)
    hits, bins = (choice == target).double(), (confidence * 15).ceil().long() - 1
    gaps = [(hits - confidence)[bins == each].sum().abs().item() for each in range(15)]
    best = logits.argsort(1, descending=True)[:, :5]
    five = (best == target[:, None]).any(1).double().mean().item()
    assert quality["top1"] == pytest.approx(100 * hits.mean().item())
    assert quality["top5"] == pytest.approx(100 * five)
    assert quality["calibration_error"] == pytest.approx(100 * sum(gaps) / len(hits), rel=1e-3)
    loss = torch.nn.functional.cross_entropy(logits, target).item()
    assert quality["loss"] == pytest.approx(loss, rel=1e-4)


def test_from_record(ran, tmp_path, capsys):
    path = ran / "results" / "quick.jsonl"
    record = read_records(path)[1]
    again = ["--quiet", *folders_in(ran, "repeated"), "--from-record"]
    assert run([*again, f"{path}:{record['run_id']}"]) == 0
    assert "agree to the bit" in capsys.readouterr().out
    changed = tmp_path / "changed.jsonl"
    append_record(changed, record | {"result": record["result"] | {"student_sha256": "0" * 64}})
    assert run([*again, str(changed)]) == 3 and "weights differ" in capsys.readouterr().out
    assert len(read_records(path)) == len(read_records(ran / "repeated/quick.jsonl")) == 2
    for arguments, words in (
            ([str(path)], "2 records"), ([f"{path}:nobody"], "0 records"),
            ([f"{path}x"], "quick.jsonlx"),
            ([str(changed), "--epochs", "5"], "record says epochs")):
        assert run([*again, *arguments]) == 1
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("command, arguments, words", [
    (run, ["--epoch", "3"], "Did you mean '--epochs'"), (run, ["--epochs", "three"], "three"),
    (run, ["--method=kd"], "Did you mean '--methods'"), (run, ["kd"], "unrecognized"),
    (evaluate_command, ["a.pth", "--arch=resnet8"], "--arch")])
def test_options_are_not_abbreviated(command, arguments, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        command(arguments)
    assert words in capsys.readouterr().err


def test_eval_mistakes(tmp_path, capsys):
    torch.save(create_model("resnet8", 10).state_dict(), tmp_path / "plain.pth")
    (tmp_path / "broken.pth").write_bytes(b"no weights")
    for path, words in (("plain.pth", "--architecture"), ("broken.pth", "cannot be read"),
                        ("absent.pth", "there is no checkpoint")):
        assert evaluate_command([str(tmp_path / path), "--dataset", "digits"]) == 1
        assert words in capsys.readouterr().err


def test_the_calibration_error_has_fifteen_bins():
    "The confidences 0.34, right, and 0.39, wrong, share a bin, as they would not in fourteen."
    logits = torch.tensor([[0.34, 0.33, 0.33], [0.39, 0.305, 0.305]]).log()
    found = measure_logits(logits, torch.tensor([0, 1]))
    assert found["calibration_error"] == pytest.approx(100 * (0.5 - 0.365), rel=1e-4)


def test_an_interrupted_command_says_how_to_go_on(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sortkd.experiment.run.run_experiment", raises(KeyboardInterrupt))
    assert run([*SMALL, *folders_in(tmp_path)]) == 130
    assert "give the same command again" in capsys.readouterr().err
