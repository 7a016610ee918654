"Cards of weights, and networks that go to the Hugging Face Hub and back."
import ast
import re
import shutil
import sys

import pytest
import torch
import yaml
from conftest import ROOT

from sortkd.fronts.cards import model_card
from sortkd.train.teachers import load_teacher, read_checkpoint, save_teacher

FILES = sorted([*ROOT.glob("teachers/*.safetensors"), *ROOT.glob("results/students/*.safetensors")])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_kept_weights_have_their_card(path):
    "After a change, write `model_card(path)` beside the file."
    card = path.with_suffix(".md").read_text(encoding="utf-8")
    assert card == model_card(path)
    text = read_checkpoint(path)[1]
    metrics = yaml.safe_load(card.split("---")[1])["model-index"][0]["results"][0]["metrics"]
    assert metrics[0]["value"] == text["top1"]
    assert f"{text['top1']:.2f} %" in card and text["command"] in card


HOSTILE = ('x"); import os; os.system("touch planted") #`\n```\n# head\n---\n'
           "| <img src=x> [a](http://x) **b** $f$ \x1b[2J \u202e")
KNOWN = {"architecture": "resnet8", "dataset": "cifar100", "top1": 60.0, "train_top1": 61.0,
         "train_images": 50_000, "seed": 0, "epochs": 30, "method": "kd", "preset": "short",
         "precision": "float32", "run_id": "r", "commit": "c", "data_checksum": "d",
         "recipe": {"lr": 0.1}, "command": "sortkd-run", "note": "a note"}
NUMBERS = ("top1", "train_top1", "train_images", "epochs")


@pytest.mark.parametrize("name", [*(name for name in KNOWN if name not in NUMBERS), "the file"])
def test_texts_of_a_card_are_text(tmp_path, name):
    "Whatever the file says, the page has our blocks, our link and our statements, and no others."
    import mistune
    hostile = {HOSTILE: HOSTILE} if name == "recipe" else HOSTILE
    known = KNOWN | ({name: hostile} if name in KNOWN else {})
    file = 'a"b `c` [d](e).safetensors' if name == "the file" else "a.safetensors"
    page = model_card(save_teacher(tmp_path / file, {"w": torch.ones(2)}, known))
    head, _, page = page.partition("\n---\n\n")
    assert yaml.safe_load(head.removeprefix("---"))["library_name"] == "sortkd"
    assert "\x1b" not in page and "\u202e" not in page
    parse = mistune.create_markdown(renderer="ast", plugins=["table"])
    nodes = [node for node in parse(page) if node["type"] != "blank_line"]
    assert [node["type"] for node in nodes] == [
        "heading", "paragraph", "table", "heading", "block_code", "heading", "block_code",
        "paragraph", "heading", "list"]
    assert all(len(row["children"]) == 2 for row in nodes[2]["children"][1]["children"])
    assert str(nodes).count("'link'") == 1
    assert not re.search("'(inline_html|block_html|image|strong|emphasis)'", str(nodes))
    code = ast.parse(nodes[4]["raw"])
    values = {node.value for node in ast.walk(code)
              if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert len(code.body) == 6 and values == {known["architecture"], known["dataset"], file}


@pytest.fixture
def hub():
    return pytest.importorskip("sortkd.fronts.hub", reason="huggingface_hub is not installed")


def test_to_the_hub_and_back(hub, tmp_path, monkeypatch):
    from huggingface_hub import HfApi, hub_mixin

    class Repository(str):
        repo_id = property(str)

    def upload_folder(self, repo_id, folder_path, **options):
        shutil.copytree(folder_path, tmp_path / repo_id)
        return repo_id

    def download(repo_id, filename="", revision="", **options):
        asked.append(revision)
        return str(tmp_path / repo_id / filename)

    asked, path, name = [], FILES[0], "somebody/network"
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **options: Repository(repo_id))
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(hub_mixin, "hf_hub_download", download)
    monkeypatch.setattr(hub, "snapshot_download", download)
    network = hub.PretrainedNetwork.from_file(path, num_classes=100)
    network.push_to_hub(name)
    again = hub.PretrainedNetwork.from_pretrained(name, revision="v1")
    assert asked == ["v1", "v1"], "configuration and weights are of that revision"
    assert not again.training and again.known == network.known == read_checkpoint(path)[1]
    images, architecture = torch.randn(4, 3, 32, 32), network.known["architecture"]
    # What is published teaches: it is a file like those in teachers/.
    models = [network, again, *(load_teacher(file, architecture, 100).model for file in (
        path, tmp_path / name / "model.safetensors"))]
    with torch.inference_mode():
        expected, *others = [model(images) for model in models]
    assert all(other.equal(expected) for other in others)
    card = (tmp_path / name / "README.md").read_text(encoding="utf-8")
    assert f'PretrainedNetwork.from_pretrained("{name}")' in card
    assert f"{network.known['top1']:.2f} %" in card


@pytest.mark.parametrize("config, words", [
    ('{"num_classes": "10"}', "num_classes is '10'"), ('{"num_classes": 11}', "11"),
    ("{}", "num_classes is 0")])
def test_as_many_classes_as_the_weights_have(hub, tmp_path, config, words):
    hub.PretrainedNetwork("resnet8", 10).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=words):
        hub.PretrainedNetwork.from_pretrained(tmp_path)


def test_without_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.delitem(sys.modules, "sortkd.fronts.hub", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'sortkd\[hub\]'"):
        import sortkd.fronts.hub  # noqa: F401
