"What is promised of installations is what was tried."
import ast
import json
import re
import runpy
import subprocess
import sys
from configparser import ConfigParser
from importlib.metadata import packages_distributions

import pytest
import yaml
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.version import Version

from sortkd.utils.checks import EXPERIMENT_PACKAGES, need_experiments

@pytest.fixture(scope="module")
def settings():
    parser = ConfigParser(delimiters=["="], interpolation=None)
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


@pytest.fixture
def package(monkeypatch):
    "What setup.py tells setuptools."
    setuptools, told = pytest.importorskip("setuptools"), {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: told.update(arguments))
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    return told


def test_the_promise_is_what_was_tried(settings):
    "A new requirement, bound or Python takes a run of .ci/install-matrix."
    bounds = {}
    required = f"{settings['requirements']} {settings['experiments_requirements']}"
    for requirement in map(Requirement, required.split()):
        bound, = requirement.specifier  # one bound each, below
        assert bound.operator == ">=", requirement
        bounds[requirement.name] = Version(bound.version)
    file = ROOT / "results" / "measurements" / "installations.jsonl"
    records = list(map(json.loads, file.read_text().splitlines()))
    for python in settings["tested_pythons"].split():
        own = [each for each in records if each["python"].startswith(f"{python}.")]
        tried = {each["versions"]: {name: Version(has) for name, has in each["installed"].items()}
                 for each in own}
        assert tried.keys() == {"lowest", "oldest-torch", "newest"}, python
        assert bounds.items() <= tried["lowest"].items(), python
        assert all(tried["oldest-torch"][name] == bounds[name] for name in ("torch", "torchvision"))
        assert tried["newest"]["torch"] > bounds["torch"]


def test_everyone_promises_the_same(settings, package):
    pythons = settings["tested_pythons"].split()
    assert settings["min_python"] == pythons[0] and package["python_requires"] == f">={pythons[0]}"
    readme = (ROOT / "README.md").read_text()
    assert f"With Python {pythons[0]} or newer" in readme
    assert f"![Python {pythons[0]} to {pythons[-1]}]" in readme
    classifiers = re.findall(r"Language :: Python :: (3\.\d+)", str(package["classifiers"]))
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    matrices = [jobs[name]["strategy"]["matrix"]["python"] for name in ("checks", "installations")]
    assert [classifiers, *matrices] == [pythons] * 3


def test_the_package_its_page_and_citations(package, settings):
    "README's links lead somewhere from the package page, too; every file names the same version."
    folders = (path.parent.relative_to(ROOT) for path in (ROOT / "sortkd").rglob("__init__.py"))
    assert set(package["packages"]) == {".".join(folder.parts) for folder in folders}
    assert package["package_data"] == {"sortkd": ["py.typed"]}
    assert [Requirement(each).name for each in package["install_requires"]] == ["torch"]
    needed, extras = settings["experiments_requirements"].split(), package["extras_require"]
    assert all(set(needed) <= set(extras[name]) for name in extras)
    links = re.findall(r"\]\(([^)]*)\)", package["long_description"])
    assert len(links) > 10 and all(re.match("https?://|#", link) for link in links), links
    local = re.findall(package["url"] + r"/(?:blob|raw)/main/([^\s#]+)", " ".join(links))
    assert len(local) > 10 and all((ROOT / path).exists() for path in local)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == settings["version"]
    assert citation["repository-code"] == package["url"]
    assert f"version = {{{settings['version']}}}" in (ROOT / "CITATION.bib").read_text()
    assert f"## {settings['version']}" in (ROOT / "CHANGELOG.md").read_text()


# Asked for by name before they are imported, or done without.
OPTIONAL = {"huggingface_hub", "papermill", "timm", "torchdistill", "transformers"}


def imports_of(path):
    "The packages, beside the standard library's and IPython, of which ipykernel is made."
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules.add(node.module.partition(".")[0])
    return modules - sys.stdlib_module_names - OPTIONAL - {"sortkd", "IPython"}


def test_what_is_imported_is_required(settings):
    "Though other requirements may bring it along."
    required = {Requirement(each).name for each in settings["experiments_requirements"].split()}
    foreign = set().union(*map(imports_of, (ROOT / "sortkd").rglob("*.py"))) - {"torch"}
    assert foreign == set(EXPERIMENT_PACKAGES), "list what modules import in sortkd.utils.checks"
    providers = packages_distributions()
    assert all({each.lower() for each in providers[name]} & required for name in foreign)


BASE = ["", ".sorting", ".losses", ".methods", ".distillation", ".utils.checks", ".utils.files"]
# A package that is not installed: neither found nor imported.
BLOCKED = f"""
import importlib, sys
for name in {(*EXPERIMENT_PACKAGES, *OPTIONAL)!r}:
    if name not in ("numpy", "filelock"):  # torch looks for the first, and brings the second
        sys.modules[name] = None
"""


def python(code):
    command = [sys.executable, "-c", BLOCKED + code]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)


def test_the_method_needs_torch_alone():
    done = python(f"""
sys.modules["fcntl"] = None  # as on Windows
for name in {BASE!r}:
    importlib.import_module("sortkd" + name)
import torch
from sortkd import DistillationLoss, create_method, kd_loss, sort_logits, swap_logits
logits, target = torch.randn(2, 4, 10), torch.arange(4)
for method in ("kd+sort", "dist+swap", "lskd+revise"):
    assert DistillationLoss(method)(*logits, target).isfinite()
""")
    assert done.returncode == 0, done.stderr
    files = (ROOT / "sortkd" / f"{name[1:].replace('.', '/') or '__init__'}.py" for name in BASE)
    assert set().union(*map(imports_of, files)) <= {"torch", "filelock"}  # which comes with torch


def test_experiments_name_the_extra_that_they_need(settings):
    commands = [each.replace("=", ":").split(":") for each in settings["console_scripts"].split()]
    done = python(f"""
import pkgutil, sortkd
for module in pkgutil.walk_packages(sortkd.__path__, "sortkd."):
    try:
        importlib.import_module(module.name)
    except ImportError as error:
        assert str(error).endswith("pip install 'sortkd[experiments]'."), error
        print(module.name.rpartition(".")[2])
for command, module, _ in {commands!r}:  # which end with a line, and without a traceback
    sys.argv = ["/somewhere/bin/" + command]
    try:
        importlib.import_module(module)
    except SystemExit as end:
        assert end.code.endswith("pip install 'sortkd[experiments]'."), end.code
        print(command)
""")
    assert done.returncode == 0, done.stderr
    modules = "commands grid images results run setup statistics tables teachers trainer"
    commands = "sortkd-run sortkd-grid sortkd-eval"
    assert {*modules.split(), *commands.split()} <= set(done.stdout.split())


def test_windows_is_told_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with pytest.raises(ModuleNotFoundError, match="Windows Subsystem"):
        need_experiments()
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/sortkd-run"])
    with pytest.raises(SystemExit, match="Windows Subsystem"):
        need_experiments()
