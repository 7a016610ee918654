"Cards of weights, and networks that go to the Hugging Face Hub and back."
import ast
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml

from sortkd.fronts.cards import card_command, model_card
from sortkd.train.teachers import load_teacher, read_checkpoint, save_teacher
from sortkd.train.networks import create_model

ROOT = Path(__file__).parents[1]
FILES = [path for folder in ("teachers", "results/students") for path in sorted((ROOT / folder).glob("*.safetensors"))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_kept_weights_have_their_card(path):
    "After a change of the card: sortkd-card --write teachers/*.safetensors results/students/*.safetensors."
    card = path.with_suffix(".md").read_text(encoding="utf-8")
    assert card == model_card(path)
    text = read_checkpoint(path)[1]
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["model-index"][0]["results"][0]["metrics"][0]["value"] == text["top1"]
    assert f"{text['top1']:.2f} %" in card and text["command"] in card


def test_the_command(tmp_path, capsys):
    weights, known = create_model("resnet8", 10).state_dict(), {"architecture": "resnet8", "dataset": "digits", "epochs": 4}
    files = [str(save_teacher(tmp_path / f"{name}.safetensors", weights, known)) for name in "ab"]
    assert card_command(files[:1]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("---\nlibrary_name: sortkd") and "# resnet8 on digits" in printed
    assert "top-1" not in printed and "How it was made" not in printed  # of which the file says nothing
    assert card_command(["--write", *files]) == 0
    assert (tmp_path / "b.md").read_text(encoding="utf-8") == model_card(files[1])
    (tmp_path / "c.safetensors").write_bytes(b"no weights")
    (tmp_path / "a.md").unlink()
    assert card_command(["--write", files[0], str(tmp_path / "c.safetensors")]) == 1
    assert not (tmp_path / "a.md").exists() and "damaged" in capsys.readouterr().err


HOSTILE = 'x"); import os; os.system("touch planted") #`\n```\n# head\n---\n| <img src=x> [a](http://x) **b** $f$ \x1b[2J \u202e'
KNOWN = {"architecture": "resnet8", "dataset": "cifar100", "top1": 60.0, "train_top1": 61.0, "train_images": 50_000, "seed": 0, "epochs": 30, "method": "kd",
         "preset": "short", "precision": "float32", "run_id": "r", "commit": "c", "data_checksum": "d", "recipe": {"lr": 0.1}, "command": "sortkd-run", "note": "a note"}


@pytest.mark.parametrize("name", [*KNOWN, "the file"])
def test_texts_of_a_card_are_text(tmp_path, name):
    import mistune

    known = KNOWN | ({name: {HOSTILE: HOSTILE} if name == "recipe" else HOSTILE} if name in KNOWN else {})
    path = save_teacher(tmp_path / ('a"b `c` [d](e).safetensors' if name == "the file" else "a.safetensors"), {"w": torch.ones(2)}, known)
    if name in ("top1", "train_top1", "train_images", "seed", "epochs"):
        with pytest.raises(ValueError, match=f"{name} is|damaged"):
            model_card(path)
        return
    head, _, page = model_card(path).partition("\n---\n\n")
    assert yaml.safe_load(head.removeprefix("---"))["library_name"] == "sortkd" and "\x1b" not in page and "\u202e" not in page
    nodes = [node for node in mistune.create_markdown(renderer="ast", plugins=["table"])(page) if node["type"] != "blank_line"]
    kinds = ["heading", "paragraph", "table", "heading", "block_code", "heading", "block_code", "paragraph", "heading", "list"]
    assert [node["type"] for node in nodes] == kinds
    assert all(len(row["children"]) == 2 for row in nodes[2]["children"][1]["children"])
    assert str(nodes).count("'link'") == 1 and not re.search("'(inline_html|block_html|image|strong|emphasis)'", str(nodes))
    code = ast.parse(nodes[4]["raw"])
    assert len(code.body) == 5, "no statement but ours"
    values = {node.value for node in ast.walk(code) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert values == {known["architecture"], known["dataset"], path.name}


@pytest.mark.parametrize("name", KNOWN)
def test_malformed_values_of_a_card_are_named(tmp_path, name):
    import json

    from safetensors.torch import save_file

    for value in (None, True, [], {}, "", " ", -1, "x", [1], 10**4000):
        if value == "x" and not isinstance(KNOWN[name], int | float | dict) or value == {} and name == "recipe":
            continue
        save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors", {"sortkd": json.dumps(KNOWN | {name: value})})
        with pytest.raises(ValueError, match=rf"a.safetensors (has no card, since its {name} is|is damaged|cannot be read as weights)") as error:
            model_card(tmp_path / "a.safetensors")
        assert len(str(error.value)) < 600


def test_to_the_hub_and_back(tmp_path, monkeypatch):
    "A folder stands in for the Hub."
    hub = pytest.importorskip("sortkd.fronts.hub", reason="huggingface_hub is not installed")
    from huggingface_hub import HfApi, hub_mixin

    class Repository(str):
        repo_id = property(str)

    def upload_folder(self, repo_id, folder_path, **options):
        shutil.copytree(folder_path, tmp_path / repo_id)
        return repo_id

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **options: Repository(repo_id))
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    asked = []
    monkeypatch.setattr(hub_mixin, "hf_hub_download", lambda repo_id, filename, **options: asked.append(options["revision"]) or str(tmp_path / repo_id / filename))
    monkeypatch.setattr(hub, "snapshot_download", lambda repo_id, **options: asked.append(options["revision"]) or tmp_path / repo_id)
    images = torch.randn(4, 3, 32, 32)
    for path in FILES[:1]:  # one is enough
        network = hub.PretrainedNetwork.from_file(path, num_classes=100)
        network.push_to_hub("somebody/network")
        again = hub.PretrainedNetwork.from_pretrained("somebody/network", revision="v1")
        assert asked == ["v1", "v1"], "configuration and weights are of that revision"
        assert not again.training and again.known == network.known == read_checkpoint(path)[1]
        with torch.inference_mode():
            expected = load_teacher(path, network.known["architecture"], 100).model(images)
            assert again(images).equal(expected) and network(images).equal(expected)
    card = (tmp_path / "somebody/network/README.md").read_text(encoding="utf-8")
    assert 'PretrainedNetwork.from_pretrained("somebody/network")' in card and f"{network.known['top1']:.2f} %" in card
    # What is published teaches: it is a file like those in teachers/.
    model = load_teacher(tmp_path / "somebody/network/model.safetensors", network.known["architecture"], 100).model
    assert model(images).equal(expected)


def test_trained_in_full_precision_stays_so(tmp_path):
    hub = pytest.importorskip("sortkd.fronts.hub", reason="huggingface_hub is not installed")
    network = hub.PretrainedNetwork("resnet8", 10).eval()
    network.save_pretrained(tmp_path / "network")
    again, images = hub.PretrainedNetwork.from_pretrained(tmp_path / "network"), torch.randn(2, 3, 32, 32)
    assert again(images).equal(network(images))


@pytest.mark.parametrize("name", ["model.safetensors", "README.md", "model.safetensors dangling", "README.md dangling"])
def test_a_network_is_saved_through_no_link(tmp_path, name):
    hub = pytest.importorskip("sortkd.fronts.hub", reason="huggingface_hub is not installed")
    (tmp_path / "network").mkdir()
    name, _, dangling = name.partition(" ")
    if not dangling:
        (tmp_path / "outside").write_text("somebody's")
    (tmp_path / "network" / name).symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match=f"{name} is a link to"):
        hub.PretrainedNetwork("resnet8", 10).save_pretrained(tmp_path / "network")
    assert not (tmp_path / "outside").exists() if dangling else (tmp_path / "outside").read_text() == "somebody's"


@pytest.mark.parametrize("classes, words", [("1000000000", "has no layer for num_classes=1000000000"), ('"10"', "num_classes is '10'"), ("[10]", "num_classes is"), (None, "num_classes is 0")])
def test_as_many_classes_as_the_weights_have(tmp_path, classes, words):
    hub = pytest.importorskip("sortkd.fronts.hub", reason="huggingface_hub is not installed")
    hub.PretrainedNetwork("resnet8", 10).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}" if classes is None else f'{{"architecture": "resnet8", "num_classes": {classes}}}')
    with pytest.raises(ValueError, match=words):
        hub.PretrainedNetwork.from_pretrained(tmp_path)


def test_statistics_of_batch_normalisation_keep_their_precision(tmp_path):
    fine = 1 + torch.arange(1, 4) * 2.0**-23  # which half precision cannot tell from 1
    weights = {"bn.running_mean": fine, "bn.running_var": 2 * fine, "bn.num_batches_tracked": torch.tensor(100_001), "bn.weight": fine}
    read = read_checkpoint(save_teacher(tmp_path / "a.safetensors", weights, {}))[0]
    assert all(read[name].equal(value) and read[name].dtype == value.dtype for name, value in weights.items() if name != "bn.weight")
    assert read["bn.weight"].dtype == torch.float16


def test_the_calibration_error_has_fifteen_bins(tmp_path, monkeypatch):
    "Four confidences that share bins with fifteen of them, and not with ten, fourteen or sixteen."
    from types import SimpleNamespace as Made

    from sortkd.fronts.commands import evaluate_checkpoint

    class Confidence(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.odds = torch.nn.Parameter(torch.zeros(1))

        def forward(self, images):
            return torch.nn.functional.pad(images[:, :1, 0, 0], (0, 1)) + self.odds  # logits of two classes

    shares = torch.tensor([0.62, 0.66, 0.68, 0.72])
    images, target = (shares / (1 - shares)).log()[:, None, None, None].expand(4, 3, 8, 8), torch.tensor([0, 1, 0, 0])
    data = Made(num_classes=2, test_targets=target, batches=lambda device: Made(test=lambda size: [(images, target)]))
    monkeypatch.setattr("sortkd.train.images.load_data", lambda name: data)
    monkeypatch.setattr("sortkd.train.networks.create_model", lambda *_: Confidence())
    torch.save({"odds": torch.zeros(1)}, tmp_path / "a.pth")
    quality = evaluate_checkpoint(tmp_path / "a.pth", "resnet8", "digits", "cpu")
    # In the bin from 0.600 to 0.667 one of two is right at 0.64 on average; in the next both, at 0.70.
    assert quality.calibration_error == pytest.approx(100 * (abs(0.5 - 0.64) + abs(1 - 0.70)) / 2, abs=1e-4)
    assert (quality.top1, quality.top5, quality.images) == (75, 100, 4)


def test_without_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.delitem(sys.modules, "sortkd.fronts.hub", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'sortkd\[hub\]'"):
        import sortkd.fronts.hub  # noqa: F401
