"What a record says of the code and of the plan that made it."
import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest

import sortkd
from sortkd.experiment import provenance
from sortkd.experiment.setup import prepare_experiment
from sortkd.experiment.provenance import describe_machine
from sortkd.experiment.run import run_experiment


def git(folder, *arguments):
    subprocess.run(["git", "-C", folder, "-c", "user.name=a", "-c", "user.email=a@b", *arguments], check=True, capture_output=True)


@pytest.fixture
def clone(tmp_path, monkeypatch):
    "A clone with one commit, which is what was imported."
    folder = tmp_path / "clone"
    shutil.copytree(Path(sortkd.__file__).parent, folder / "sortkd", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "nbs").mkdir()
    (folder / "nbs" / "index.ipynb").touch()
    git(folder, "init", "-q"), git(folder, "add", "."), git(folder, "commit", "-qm", "all")
    monkeypatch.setattr(sortkd, "__file__", str(folder / "sortkd" / "__init__.py"))
    return folder


@pytest.mark.parametrize(("file", "content", "marked"), [
    ("nbs/notes.ipynb", "{}", False), ("nbs/index.ipynb", "{}", False), ("results.jsonl", "{}", False),
    ("sortkd/losses.py", "# changed", True), ("sortkd/added.py", "value = 1", True),
])
def test_a_record_tells_whether_the_code_was_changed(clone, file, content, marked):
    before, checksum = describe_machine("cpu"), provenance._code_checksum(clone / "sortkd")
    assert checksum == provenance.CODE_SHA256 and len(before["commit"]) == 40
    with (clone / file).open("a") as opened:
        opened.write(content)
    after = describe_machine("cpu")
    assert after["commit"] == before["commit"] + "+" * marked
    assert (provenance._code_checksum(clone / "sortkd") != checksum) == marked
    assert after["code_sha256"] == before["code_sha256"], "of the files as they were imported"


def test_a_run_names_its_plan(tmp_path):
    plan = tmp_path / "plan.yaml"
    plan.write_text("plan: {question: '?'}\n")
    given = {"pair": "resnet20:resnet8", "methods": "ce", "dataset": "digits", "preset": "quick", "epochs": 1, "train_size": 20, "test_size": 20,
             "results_dir": str(tmp_path), "teachers_dir": str(tmp_path)}
    record, = run_experiment(prepare_experiment(**given, plan=str(plan)), progress=False).records
    assert record["plan"] == {"name": "plan", "sha256": hashlib.sha256(plan.read_bytes()).hexdigest()}
    again, = run_experiment(prepare_experiment(**given), progress=False).records
    assert again["run_id"] == record["run_id"], "it is the same run, planned or not"
    with pytest.raises(FileNotFoundError, match="nothing.yaml"):
        prepare_experiment(**given, plan="nothing.yaml")
