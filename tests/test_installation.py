"What is promised of installations is what was tried, and the audit tells a vulnerable package from a silent service."
import ast
import json
import re
import runpy
import subprocess
import sys
from configparser import ConfigParser
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import packages_distributions
from pathlib import Path
from threading import Thread

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from sortkd.utils.checks import EXPERIMENT_PACKAGES, need_experiments

ROOT = Path(__file__).parents[1]


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
    for requirement in map(Requirement, f"{settings['requirements']} {settings['experiments_requirements']}".split()):
        bound, = requirement.specifier  # one bound each, below
        assert bound.operator == ">=", requirement
        bounds[requirement.name] = Version(bound.version)
    records = list(map(json.loads, (ROOT / "results" / "measurements" / "installations.jsonl").read_text().splitlines()))
    for python in settings["tested_pythons"].split():
        tried = {each["versions"]: {name: Version(version) for name, version in each["installed"].items()}
                 for each in records if each["python"].startswith(f"{python}.")}
        assert tried.keys() == {"lowest", "oldest-torch", "newest"}, python
        assert bounds.items() <= tried["lowest"].items(), python  # what was tried with more than is required now, still was
        assert all(tried["oldest-torch"][name] == bounds[name] for name in ("torch", "torchvision"))
        assert tried["newest"]["torch"] > bounds["torch"]


def test_everyone_promises_the_same(settings, package):
    pythons = settings["tested_pythons"].split()
    assert settings["min_python"] == pythons[0] and package["python_requires"] == f">={pythons[0]}"
    readme = (ROOT / "README.md").read_text()
    assert f"With Python {pythons[0]} or newer" in readme and f"![Python {pythons[0]} to {pythons[-1]}]" in readme
    classifiers = [each.rpartition(" ")[2] for each in package["classifiers"] if re.fullmatch(r"Programming Language :: Python :: 3\.\d+", each)]
    assert classifiers == pythons
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    assert jobs["checks"]["strategy"]["matrix"]["python"] == jobs["installations"]["strategy"]["matrix"]["python"] == pythons


def test_every_extra_runs_experiments_and_the_base_is_torch(settings, package):
    needed, extras = settings["experiments_requirements"].split(), package["extras_require"]
    assert [Requirement(each).name for each in package["install_requires"]] == ["torch"]
    assert extras.keys() == {"experiments", "tensorboard", "wandb", "hub", "workflow", "all", "docs", "dev"} and extras["experiments"] == needed
    assert all(set(needed) < set(extras[name]) < set(extras["dev"]) for name in ("tensorboard", "wandb", "hub", "workflow", "all", "docs"))
    assert set(extras["all"]) == set(extras["tensorboard"] + extras["wandb"] + extras["hub"] + extras["workflow"])
    assert all(len(set(each)) == len(each) for each in extras.values())


def test_the_package_is_the_modules_and_their_types(package):
    assert sorted(package["packages"]) == sorted([".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "sortkd").rglob("__init__.py")])
    assert package["package_data"] == {"sortkd": ["py.typed"]} and (ROOT / "sortkd" / "py.typed").exists()
    assert package["license_expression"] == "MIT" and (ROOT / "LICENSE").read_text().startswith("MIT License")


def test_the_package_page_and_citations(package, settings):
    "README's links lead somewhere from the package page, too, and files that name the version name this one."
    links = re.findall(r"\]\(([^)]*)\)", package["long_description"])
    assert len(links) > 10 and all(re.match("https?://|#", link) for link in links), links
    local = [link.partition("/blob/main/")[2] or link.partition("/raw/main/")[2] for link in links if link.startswith(package["url"])]
    assert len(local) > 10 and not [path for path in local if path and not (ROOT / path.partition("#")[0]).exists()]
    assert "/raw/main/paper_figures/mechanism.png" in package["long_description"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == settings["version"] and citation["repository-code"] == package["url"]
    assert f"version = {{{settings['version']}}}" in (ROOT / "CITATION.bib").read_text()
    assert f"## {settings['version']}" in (ROOT / "CHANGELOG.md").read_text()
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        assert yaml.safe_load(path.read_text())
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert [hook["entry"] for hook in hooks] == ["nbdev_clean", "nbdev_export"]


OPTIONAL = {"huggingface_hub", "papermill", "tensorboard", "timm", "torchdistill", "transformers", "wandb"}  # asked for by name before they are imported, or done without


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
    assert not {name for name in foreign if not {each.lower() for each in providers[name]} & required}


BASE = ["", ".sorting", ".topk", ".losses", ".methods", ".distillation", ".utils.checks", ".utils.files"]
# A package that is not installed: neither found nor imported.
BLOCKED = f"""
import importlib, sys
for name in {(*EXPERIMENT_PACKAGES, *OPTIONAL)!r}:
    if name not in ("numpy", "filelock"):  # torch looks for the first, and brings the second
        sys.modules[name] = None
"""


def python(code):
    return subprocess.run([sys.executable, "-c", BLOCKED + code], capture_output=True, text=True, cwd=ROOT, timeout=120)


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
    loaded = set().union(*(imports_of(ROOT / "sortkd" / f"{name[1:].replace('.', '/') or '__init__'}.py") for name in BASE))
    assert loaded <= {"torch", "filelock"}, "and filelock comes with torch"


def test_experiments_name_the_extra_that_they_need(settings):
    commands = [each.replace("=", ":").split(":") for each in settings["console_scripts"].split()]
    done = python(f"""
import pkgutil, sortkd
for module in pkgutil.walk_packages(sortkd.__path__, "sortkd."):
    try:
        importlib.import_module(module.name)
    except ImportError as error:
        assert str(error).endswith("pip install 'sortkd[experiments]'.") and error.name == "PIL", error
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
    modules = {"commands", "grid", "images", "plots", "results", "run", "setup", "statistics", "tables", "teachers", "trainer"}
    assert modules | {"sortkd-run", "sortkd-grid", "sortkd-eval"} <= set(done.stdout.split())


def test_windows_is_told_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    line = "this part of sortkd needs Linux or macOS; on Windows, use the Windows Subsystem for Linux (WSL)."
    with pytest.raises(ModuleNotFoundError) as error:
        need_experiments()
    assert str(error.value) == line and error.value.name == "fcntl"
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/sortkd-run"])
    with pytest.raises(SystemExit, match=re.escape(line)):
        need_experiments()


def test_the_container_does_not_run_as_root():
    "And owns what it writes: git reads no repository of another user, and Snakemake installs into the environment."
    steps = [line.split(maxsplit=1) for line in (ROOT / "workflow" / "Dockerfile").read_text().splitlines() if re.match("[A-Z]", line)]
    users = [number for number, (step, _) in enumerate(steps) if step == "USER"]
    assert [steps[number][1] for number in users] == ["1000:1000"]
    assert all(step != "COPY" or "--chown=1000:1000" in what for step, what in steps)
    assert all("pip install" not in what or number > users[0] for number, (_, what) in enumerate(steps))


FLAW = {"id": "GHSA-0000", "summary": "runs what it reads", "schema_version": "1.0.0", "affected": [
    {"package": {"name": "tqdm", "ecosystem": "PyPI"}, "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "4.67"}]}]}]}


@pytest.fixture
def service():
    "A vulnerability service on this machine; `answers` maps a package's name to a status and an answer."
    answers = {}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, answer = answers.get(asked["package"]["name"], (200, {}))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield answers, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def audit(folder, url):
    (folder / "requirements.txt").write_text("tqdm==4.66.0\npandas==2.2.0\n")
    return subprocess.run([sys.executable, ROOT / ".ci" / "audit", "-s", "osv", "--osv-url", url, "--no-deps", "--disable-pip", "-r", "requirements.txt"],
                          cwd=folder, capture_output=True, text=True, timeout=120)


def test_an_audit_without_a_finding(service, tmp_path):
    done = audit(tmp_path, service[1])
    assert (done.returncode, done.stdout) == (0, "2 packages audited, 0 vulnerabilities known\n"), done.stderr


def test_an_audit_names_what_is_vulnerable(service, tmp_path):
    service[0]["tqdm"] = 200, {"vulns": [FLAW]}
    done = audit(tmp_path, service[1])
    assert done.returncode == 1 and "tqdm 4.66.0: GHSA-0000, mended in 4.67: runs what it reads" in done.stdout
    assert "2 packages audited, 1 vulnerabilities known" in done.stdout


@pytest.mark.parametrize("silence", ["fails", pytest.param("is not there", marks=pytest.mark.slow)])
def test_an_audit_that_nobody_answers_is_not_made(service, tmp_path, silence):
    answers, url = service
    answers["pandas"] = 503, {}
    done = audit(tmp_path, url if silence == "fails" else "http://127.0.0.1:9")
    assert done.returncode == 3 and done.stdout.startswith("The audit was NOT made: ") and len(done.stdout.splitlines()) == 1


def test_an_audit_of_packages_that_nobody_knows_is_not_made(tmp_path, monkeypatch):
    "pip-audit itself is content with them: a mirror of PyPI without advisories would look like a clean audit."
    unknown = {"dependencies": [{"name": "tqdm", "skip_reason": "Dependency not found on PyPI"}], "fixes": []}
    (tmp_path / "pip_audit.py").write_text(f"print({json.dumps(unknown)!r})")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = audit(tmp_path, "http://127.0.0.1:9")
    assert done.returncode == 3 and done.stdout == "The audit was NOT made: of 1 packages the service knows none.\n"
