"Cards of weights, and networks that go to the Hugging Face Hub and back."
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml

from sortkd.cards import card_command, model_card
from sortkd.teachers import load_teacher, read_checkpoint, save_teacher
from sortkd.models import create_model

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


def test_to_the_hub_and_back(tmp_path, monkeypatch):
    "A folder stands in for the Hub."
    hub = pytest.importorskip("sortkd.hub", reason="huggingface_hub is not installed")
    from huggingface_hub import HfApi, hub_mixin

    class Repository(str):
        repo_id = property(str)

    def upload_folder(self, repo_id, folder_path, **options):
        shutil.copytree(folder_path, tmp_path / repo_id)
        return repo_id

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **options: Repository(repo_id))
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(hub_mixin, "hf_hub_download", lambda repo_id, filename, **options: str(tmp_path / repo_id / filename))
    monkeypatch.setattr(hub, "snapshot_download", lambda repo_id, **options: tmp_path / repo_id)
    images = torch.randn(4, 3, 32, 32)
    for path in FILES[:1]:  # one is enough
        network = hub.PretrainedNetwork.from_file(path, num_classes=100)
        network.push_to_hub("somebody/network")
        again = hub.PretrainedNetwork.from_pretrained("somebody/network")
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
    hub = pytest.importorskip("sortkd.hub", reason="huggingface_hub is not installed")
    network = hub.PretrainedNetwork("resnet8", 10).eval()
    network.save_pretrained(tmp_path / "network")
    again, images = hub.PretrainedNetwork.from_pretrained(tmp_path / "network"), torch.randn(2, 3, 32, 32)
    assert again(images).equal(network(images))


def test_without_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.delitem(sys.modules, "sortkd.hub", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'sortkd\[hub\]'"):
        import sortkd.hub  # noqa: F401
