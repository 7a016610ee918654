"The commands do what the notebook does, and say what is wrong in one line."
import io
import re
import subprocess
import sys
import tokenize
from inspect import signature
from pathlib import Path

import nbformat
import pytest
import torch

from sortkd.commands import PARAMETERS, evaluate, evaluate_checkpoint, run
from sortkd.data import load_digits
from sortkd.experiments import plan_experiment
from sortkd.records import append_record, read_records
from sortkd.models import create_model

NOTEBOOK = Path(__file__).parents[1] / "nbs" / "run_experiment.ipynb"
SMALL = ["--pair", "r56_r20", "--dataset", "digits", "--preset", "quick", "--epochs", "1", "--train-size", "200", "--test-size", "100", "--device", "cpu", "--quiet"]


def parameter_cell():
    "Names, values and comments of the notebook's parameter cell."
    cell = next(cell for cell in nbformat.read(NOTEBOOK, 4).cells if "parameters" in cell.metadata.get("tags", []))
    comments, name = {}, None
    for token in tokenize.generate_tokens(io.StringIO(cell.source).readline):
        if token.type == tokenize.NAME and token.start[1] == 0:
            name = token.string
        elif token.type == tokenize.COMMENT:
            comments[name] = f"{comments.get(name, '')} {token.string.lstrip('# ')}".strip()
    values = {}
    exec(cell.source, {}, values)
    return values, comments


def test_notebook_command_and_function_have_the_same_parameters():
    values, comments = parameter_cell()
    parameters = {name: parameter.default for name, parameter in signature(plan_experiment).parameters.items()}
    assert values == {**parameters, "progress": True}
    assert PARAMETERS.keys() == parameters.keys()
    for name in PARAMETERS.keys() - {"pair", "methods"}:  # which the notebook lists
        assert comments[name] == PARAMETERS[name]


def test_installed_commands_explain_themselves():
    for name in ("sortkd-run", "sortkd-eval"):
        shown = subprocess.run([Path(sys.executable).with_name(name), "--help"], capture_output=True, text=True, timeout=100)
        assert shown.returncode == 0 and shown.stdout.startswith(f"usage: {name}")


def test_run_and_eval(tmp_path, capsys):
    folders = ["--teachers-dir", str(tmp_path / "teachers"), "--results-dir", str(tmp_path / "results")]
    assert run([*SMALL, *folders, "--methods", "kd+sort", "--seeds", "3"]) == 0
    record, = read_records(tmp_path / "results" / "quick.jsonl")
    assert record["seed"] == 3 and record["method"]["name"] == "kd+sort"
    assert "This is a quick run" in (shown := capsys.readouterr().out) and "kd+sort" in shown
    teacher, = (tmp_path / "teachers").rglob("*.safetensors")
    quality = evaluate_checkpoint(teacher, device="cpu")
    assert quality.images == 360 and quality.top1 <= quality.top5 <= 100
    student, = (tmp_path / "results").rglob("last.safetensors")
    assert evaluate([str(student), "--architecture", "resnet20", "--dataset", "digits", "--device", "cpu"]) == 0
    assert "calibration error (%)" in capsys.readouterr().out


def test_eval_agrees_with_arithmetic(tmp_path):
    "On a checkpoint laid out as the published ones are, with the state dict under `model`."
    torch.manual_seed(0)
    network = create_model("resnet8", 10).eval()
    with torch.no_grad():
        network.classifier_layer.weight.mul_(0.01)
    torch.save({"epoch": 240, "model": network.state_dict()}, tmp_path / "ckpt_epoch_240.pth")
    quality = evaluate_checkpoint(tmp_path / "ckpt_epoch_240.pth", "resnet8", "digits", "cpu")
    data = load_digits()
    images = (data.test_images.float() / 255 - torch.tensor(data.mean)) / torch.tensor(data.std)
    with torch.no_grad():
        logits = network(images.permute(0, 3, 1, 2))
    confidence, choice = logits.softmax(1).max(1)
    hits, bins = (choice == data.test_targets).double(), (confidence * 15).ceil().long() - 1
    error = sum((bins == number).sum() * (hits[bins == number].mean() - confidence[bins == number].mean()).abs() for number in bins.unique()) / len(hits)
    assert quality.top1 == pytest.approx(100 * hits.mean().item())
    assert quality.calibration_error == pytest.approx(100 * error.item(), rel=1e-3)
    assert quality.top5 == pytest.approx(100 * (logits.argsort(1, descending=True)[:, :5] == data.test_targets[:, None]).any(1).double().mean().item())
    assert quality.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, data.test_targets).item(), rel=1e-4)


@pytest.mark.parametrize("arguments,words", [
    (["--pair", "r56"], "r56_r20"), (["--methods", "kd+fix"], "kd"), (["--seeds", ""], "seeds"), (["--epochs", "-1"], "epochs"),
    (["--teacher", "nowhere.pth"], "nowhere.pth"), (["--dataset", "digits", "--preset", "paper"], "CIFAR-100"),
])
def test_mistakes_are_one_line(arguments, words, capsys, tmp_path):
    assert run([*SMALL, "--results-dir", str(tmp_path), *arguments]) == 1
    error = capsys.readouterr().err
    assert re.search(words, error) and len(error.strip().splitlines()) == 1 and not list(tmp_path.iterdir())


def test_eval_mistakes(tmp_path, capsys):
    torch.save(create_model("resnet8", 10).state_dict(), tmp_path / "plain.pth")
    (tmp_path / "broken.pth").write_bytes(b"no weights")
    for path, words in (("plain.pth", "--architecture"), ("broken.pth", "cannot be read"), ("absent.pth", "there is no checkpoint")):
        assert evaluate([str(tmp_path / path), "--dataset", "digits"]) == 1
        assert words in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        run(["--epochs", "three"])


def test_an_interrupted_command_says_how_to_go_on(monkeypatch, capsys, tmp_path):
    def interrupt(*arguments, **settings):
        raise KeyboardInterrupt
    monkeypatch.setattr("sortkd.runs.run_experiment", interrupt)
    assert run([*SMALL, "--results-dir", str(tmp_path)]) == 130
    assert "give the same command again" in capsys.readouterr().err


def test_from_record(tmp_path, capsys):
    folders = ["--teachers-dir", str(tmp_path / "teachers"), "--results-dir", str(tmp_path / "results")]
    assert run([*SMALL, *folders, "--methods", "kd,kd+sort"]) == 0
    path = tmp_path / "results" / "quick.jsonl"
    record = read_records(path)[1]
    again = ["--quiet", *folders[:2], "--results-dir", str(tmp_path / "repeated"), "--from-record"]
    assert run([*again, f"{path}:{record['run_id']}"]) == 0 and "agree to the bit" in capsys.readouterr().out
    changed = tmp_path / "changed.jsonl"
    append_record(changed, record | {"result": record["result"] | {"student_sha256": "0" * 64}})
    assert run([*again, str(changed)]) == 3 and "weights differ" in capsys.readouterr().out
    assert len(read_records(path)) == 2 and len(read_records(tmp_path / "repeated" / "quick.jsonl")) == 2
    for arguments, words in (([str(path)], "2 records"), ([f"{path}:nobody"], "0 records"), ([f"{path}x"], "no file of records"), ([str(changed), "--epochs", "5"], "the record says epochs")):
        assert run([*again, *arguments]) == 1
        assert words in capsys.readouterr().err
