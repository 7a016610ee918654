"The commands do what the notebook does, and say what is wrong in one line."
import ast
import os
import re
import signal
import subprocess
import sys
from dataclasses import fields
from inspect import signature
from io import BytesIO, TextIOWrapper
from pathlib import Path

import nbformat
import pytest
import torch
from papermill import inspect_notebook

from sortkd.utils.progress import ends_cleanly
from sortkd.fronts.commands import evaluate_command, evaluate_checkpoint, run
from sortkd.train.images import load_digits
from sortkd.experiment.setup import prepare_experiment
from sortkd.methods import OBJECTIVES, REPAIRS
from sortkd.experiment.pairs import IMAGENET_PAIRS, PAIRS
from sortkd.experiment.parameters import Parameters, parameter_cell, parameter_groups
from sortkd.experiment.storage import append_record, read_records
from sortkd.train.networks import create_model

NOTEBOOK = Path(__file__).parents[1] / "nbs" / "run_experiment.ipynb"
SMALL = ["--pair", "resnet20:resnet8", "--dataset", "digits", "--preset", "quick", "--epochs", "1", "--train-size", "200", "--test-size", "100", "--device", "cpu", "--quiet"]


def test_the_notebook_has_the_parameters_of_the_dataclass():
    "Regenerate the cell with `sortkd.experiment.parameters.parameter_cell()` after a change to `Parameters`."
    cell, = [cell for cell in nbformat.read(NOTEBOOK, 4).cells if "parameters" in cell.metadata.get("tags", [])]
    assert cell.source == parameter_cell()
    assert all(len(line) <= 100 for line in cell.source.splitlines()), "longer ones are clipped"
    found = inspect_notebook(NOTEBOOK)
    assert found.pop("progress") == {"name": "progress", "inferred_type_name": "bool", "default": "True", "help": "print a line after each epoch"}
    assert list(found) == [each.name for group in parameter_groups().values() for each in group] == list(signature(prepare_experiment).parameters)[:-1]
    for each in fields(Parameters):
        assert ast.literal_eval(found[each.name]["default"]) == each.default
        assert found[each.name]["inferred_type_name"] == each.type.__name__ == type(each.default).__name__
        assert found[each.name]["help"] == each.metadata["help"]


def test_the_command_has_the_parameters_of_the_dataclass(capsys):
    with pytest.raises(SystemExit, match="0"):
        run(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for title, group in parameter_groups().items():
        assert f"{title}: --{group[0].name.replace('_', '-')}" in shown
        for each in group:
            assert f"--{each.name.replace('_', '-')} " in shown and each.metadata["help"] in shown and each.metadata["more"].strip(".") in shown
            assert f"(default: {each.default})" in shown


def test_the_help_names_every_pair_objective_and_repair():
    pair, methods = (Parameters.__dataclass_fields__[name].metadata["more"] for name in ("pair", "methods"))
    assert set(re.findall(r"\w+_\w+", pair)) == {*PAIRS, *IMAGENET_PAIRS}
    assert set(re.findall(r"[a-z_]+", methods.split("Objectives:")[1].split("Repairs")[0])) == set(OBJECTIVES)
    assert set(re.findall(r"\+([a-z]+)", methods)) == set(REPAIRS) - {"none"}


def test_help_needs_no_experiment():
    code = "import sys; from sortkd.fronts.commands import run\ntry: run(['--help'])\nexcept SystemExit: assert not {'pandas', 'sklearn', 'torchvision', 'lightning_fabric'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_an_installed_command_explains_itself():
    "Another one is called in tests/test_bad_input.py."
    shown = subprocess.run([Path(sys.executable).with_name("sortkd-eval"), "--help"], capture_output=True, text=True, timeout=100)
    assert shown.returncode == 0 and shown.stdout.startswith("usage: sortkd-eval")


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
    assert evaluate_command([str(student), "--architecture", "resnet8", "--dataset", "digits", "--device", "cpu"]) == 0
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


@pytest.mark.parametrize("place,words", [
    ("link.ipynb", "is a link to"), ("folder.ipynb", "give the path of an .ipynb file"), ("out.txt", "give the path of an .ipynb file"),
    ("nowhere/out.ipynb", "in a folder that exists"), (NOTEBOOK, "holds the sources of the project"), (NOTEBOOK.with_name("new.ipynb"), "holds the sources"),
    ("nbs/index.ipynb", "holds the sources"), ("out.ipynb --methods kdd", "methods is 'kdd'"), ("out.ipynb --teacher nowhere.pth", "nowhere.pth"),
])
def test_a_notebook_that_cannot_be_made_leaves_all_as_it_was(monkeypatch, capsys, tmp_path, place, words):
    monkeypatch.setattr("sortkd.fronts.commands._run_bound", None)  # nothing is started
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out.ipynb").write_text("precious")
    (tmp_path / "link.ipynb").symlink_to("out.ipynb")
    (tmp_path / "nbs").symlink_to(NOTEBOOK.parent)
    (tmp_path / "folder.ipynb").mkdir()
    source = NOTEBOOK.read_bytes()
    assert run([*SMALL, "--results-dir", str(tmp_path / "results"), "--notebook", *str(place).split(" ")]) == 1
    assert words in (said := capsys.readouterr().err) and len(said.strip().splitlines()) == 1
    assert (tmp_path / "out.ipynb").read_text() == "precious" and NOTEBOOK.read_bytes() == source
    assert {path.name for path in tmp_path.iterdir()} == {"out.ipynb", "link.ipynb", "nbs", "folder.ipynb"}


@pytest.mark.parametrize("end,status", [("fails", 1), (KeyboardInterrupt, 130), ("ends", 0)])
def test_an_earlier_notebook_is_kept_until_another_is_whole(monkeypatch, capsys, tmp_path, end, status):
    "What was executed of one that fails is beside it, in a file that is named."
    def executed(command):
        Path(command[4]).write_text("executed")
        if end == KeyboardInterrupt:
            raise end
        return end == "fails", "it failed"
    monkeypatch.setattr("sortkd.fronts.commands._run_bound", executed)
    out, unfinished = tmp_path / "out.ipynb", tmp_path / "out.unfinished.ipynb"
    out.write_text("precious")
    assert run([*SMALL, "--results-dir", str(tmp_path / "results"), "--notebook", str(out)]) == status
    said = capsys.readouterr()
    assert (f"What was executed is in {unfinished}." in said.out) == unfinished.exists() == (status != 0)
    assert out.read_text() == ("precious" if status else "executed") and (end != "fails" or said.err == "RuntimeError: it failed\n")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_bound_command_ends_with_the_one_that_started_it(tmp_path, number):
    bound = f"import os; print(os.getpid(), flush=True); os.read(0, 1); open({str(tmp_path / 'ended')!r}, 'w')"
    code = "import sys\nfrom sortkd.fronts.commands import _run_bound\n_run_bound([sys.executable, '-c', sys.argv[1]])"
    with subprocess.Popen([sys.executable, "-c", code, bound], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        process.stdout.readline()  # it has started
        process.send_signal(number)
        assert process.stdout.read() == b""  # when both have ended
    assert (tmp_path / "ended").exists()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437", "utf-8"])
def test_a_terminal_without_a_character_shows_another(monkeypatch, encoding):
    streams = [TextIOWrapper(BytesIO(), encoding, write_through=True) for _ in range(2)]
    for name, stream in zip(("stdout", "stderr"), streams):
        monkeypatch.setattr(sys, name, stream)

    def work():
        print("kd 70.1 ± 0.2, 16×16, –")
        raise ValueError("été – 名")
    assert ends_cleanly(work, "") == 1
    out, err = (stream.buffer.getvalue().decode(encoding) for stream in streams)
    assert re.fullmatch("kd 70.1 [±?] 0.2, 16[×?x]16, [–?]\n", out) and re.search("ValueError: .t. . .", err)


@pytest.mark.slow
def test_the_notebook_of_a_command(tmp_path, capfd):
    "The same executed notebook as papermill's, with lines of progress; a mistake is one line."
    small = [argument for argument in SMALL if argument != "--quiet"] + ["--methods", "kd", "--teachers-dir", str(tmp_path / "teachers"), "--results-dir", str(tmp_path / "results")]
    out = tmp_path / "out.ipynb"
    assert run([*small, "--notebook", str(out)]) == 0
    assert "kd, seed 0: epoch 1/1, loss" in capfd.readouterr().out
    first = next(cell.outputs for cell in nbformat.read(out, 4).cells if cell.get("outputs"))  # it begins with the result
    assert "Chance is 10 %" in first[0]["data"]["text/markdown"] and len(read_records(tmp_path / "results" / "quick.jsonl")) == 1
    assert run([*small, "--notebook", str(tmp_path / "out.txt")]) == 1 and "notebook is" in capfd.readouterr().err
    assert run([*small, "--methods", "kdd", "--notebook", str(out)]) == 1
    assert "ValueError: methods is 'kdd'; give objectives (ce, kd," in capfd.readouterr().err
    assert nbformat.read(out, 4).cells and not (tmp_path / "out.unfinished.ipynb").exists()


def test_eval_mistakes(tmp_path, capsys):
    torch.save(create_model("resnet8", 10).state_dict(), tmp_path / "plain.pth")
    (tmp_path / "broken.pth").write_bytes(b"no weights")
    for path, words in (("plain.pth", "--architecture"), ("broken.pth", "cannot be read"), ("absent.pth", "there is no checkpoint")):
        assert evaluate_command([str(tmp_path / path), "--dataset", "digits"]) == 1
        assert words in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        run(["--epochs", "three"])


def test_an_interrupted_command_says_how_to_go_on(monkeypatch, capsys, tmp_path):
    def interrupt(*arguments, **settings):
        raise KeyboardInterrupt
    monkeypatch.setattr("sortkd.experiment.run.run_experiment", interrupt)
    assert run([*SMALL, "--results-dir", str(tmp_path)]) == 130
    assert "give the same command again" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_notebook_saves_and_ends(tmp_path, number):
    "Ctrl-C at a terminal, which reaches all processes of the command; or a signal to the first alone. The kernel ends, too."
    folders = [f"--{name}-dir={tmp_path / name}" for name in ("teachers", "results")]
    command = [sys.executable, "-c", "from sortkd.fronts.commands import run; raise SystemExit(run())", "--notebook", str(tmp_path / "out.ipynb"), "--pair=r56_r20", "--dataset=digits", *folders]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert "teacher resnet56, seed 0: epoch 1/4" in process.stdout.readline()
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        out, said = process.communicate(timeout=120)  # until no process is left that could write
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    checkpoint, = (tmp_path / "results" / "runs").glob("teacher-*.pt")
    assert 1 <= len(torch.load(checkpoint, weights_only=True)["curve"]) < 4
    if number != signal.SIGKILL:
        assert said.strip() == "stopped. To continue from what was saved, give the same command again."
        assert re.search(r"What was executed is in .*out.unfinished.ipynb.\n$", out)  # papermill may lose the last line of the kernel
    assert not (tmp_path / "out.ipynb").exists()


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
    for arguments, words in (([str(path)], "2 records"), ([f"{path}:nobody"], "0 records"), ([f"{path}x"], "no file of records at"), ([str(changed), "--epochs", "5"], "the record says epochs")):
        assert run([*again, *arguments]) == 1
        assert words in capsys.readouterr().err
