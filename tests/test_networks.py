"What training needs of the networks; chapters 10 and 10a compare them with the reference."
import copy
import math
import urllib.error

import pytest
import torch
import torch.nn.functional as F
from conftest import raises, seeded_network
from torch import nn

from sortkd.experiment.pairs import check_takes
from sortkd.train.architectures import NETWORKS
from sortkd.train.networks import create_model, list_models, pretrained_weights

IMAGENET_FAMILIES = ["imagenet/ResNet18", "imagenet/MobileNetV1"]


def images_for(name):
    size = 64 if name.startswith("imagenet/") else 32
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_vgg_pools_four_times_only_from_64_pixels():
    network = create_model("vgg8").eval()
    shapes = []
    network.block4.register_forward_hook(lambda *arguments: shapes.append(arguments[2].shape[2:]))
    for size in ((16, 16), (32, 32), (32, 48), (64, 64), (128, 128)):
        network(torch.zeros(1, 3, *size))
    assert shapes == [(2, 2), (4, 4), (4, 6), (4, 4), (8, 8)]


@pytest.mark.parametrize("name", ["resnet8x4", "ResNet18", "wrn_16_2", "vgg8", "MobileNetV2"])
def test_convolutions_start_from_he_fan_out(name):
    for key, module in seeded_network(name).named_modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 10_000:
            expected = math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels))
            assert module.weight.std().item() == pytest.approx(expected, rel=0.05), key
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all(), key


@pytest.mark.parametrize("name", [
    "resnet8", "wrn_16_1", "vgg8", "MobileNetV2", "ShuffleV1", "ShuffleV2", "imagenet/MobileNetV1"])
def test_repeats_and_compiles(name):
    network, images = seeded_network(name).eval(), images_for(name)
    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    with torch.no_grad():
        logits = network(images)
        assert logits.shape == (2, 10) and torch.equal(seeded_network(name).eval()(images), logits)
        torch.testing.assert_close(compiled(images), logits)
        network.to(memory_format=torch.channels_last)
        again = network(images.contiguous(memory_format=torch.channels_last))
        torch.testing.assert_close(again, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [*list_models(), *IMAGENET_FAMILIES])
def test_logits_are_float32_under_autocast_and_every_parameter_is_trained(name):
    network = seeded_network(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = network(images_for(name))
    assert logits.dtype == torch.float32 and not torch.equal(logits, logits.bfloat16().float())
    F.cross_entropy(logits, torch.arange(2)).backward()
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("name", IMAGENET_FAMILIES)
def test_a_part_without_images(name):
    "What a process is given that has no part in a batch."
    network = create_model(name, num_classes=5).eval()
    logits = network(torch.empty(0, 3, 64, 64))
    assert logits.shape == (0, 5)
    logits.sum().backward()
    assert all((parameter.grad == 0).all() for parameter in network.parameters())


@pytest.mark.parametrize("arguments, words", [
    (("ResNet56",), r"'ResNet56'. Did you mean 'resnet56'.*list_models\(\)"),
    (("torchvision:resnet19",), "Did you mean 'torchvision:resnet1"),
    (("resnet8", 1), "num_classes is 1; give a whole number from 2")])
def test_wrong_names_and_numbers_of_classes(arguments, words):
    with pytest.raises(ValueError, match=words):
        create_model(*arguments)


class Odd(nn.Module):
    "A network whose `answer(logits, training)` is something else than logits."
    def __init__(self, num_classes, answer=lambda logits, training: logits):
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, num_classes, 16), nn.BatchNorm2d(num_classes)
        self.answer = answer

    def forward(self, images):
        maps = self.convolution(images)
        maps = self.norm(maps) if images.shape[-1] == 16 else maps
        return self.answer(maps.mean((2, 3)), self.training)


@pytest.mark.parametrize("answer, words", [
    (lambda logits, training: (logits, logits) if training else logits, "tuple"),
    (lambda logits, training: logits[:, 1:], r"not finite logits of shape \(2, 10\)"),
    (lambda logits, training: logits if training else logits * torch.nan, "not finite logits"),
    (lambda logits, training: 1 / 0 if training else logits, "division")])
def test_a_network_that_gives_no_logits_is_refused(monkeypatch, answer, words):
    monkeypatch.setitem(NETWORKS, "odd", Odd)
    check_takes("odd", 16, 10)
    monkeypatch.setitem(NETWORKS, "odd", lambda num_classes: Odd(num_classes, answer))
    with pytest.raises(ValueError, match=f"^odd cannot take images of 16×16 .*{words}"):
        check_takes("odd", 16, 10)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    "An empty hub folder, and a network on which every request fails."
    unreachable = raises(urllib.error.URLError("the network is unreachable"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", unreachable)
    return tmp_path / "checkpoints"


def test_damaged_weights_and_networks_without_any(hub):
    hub.mkdir()
    with pytest.raises(FileNotFoundError, match="(?s)resnet34-b627a593.pth.*unreachable.*checkpoint"):
        pretrained_weights("imagenet/ResNet34")
    torch.save({"fc.weight": torch.zeros(2)}, file := hub / "resnet34-b627a593.pth")
    for content in (b"", file.read_bytes()[:300]):
        file.write_bytes(content)
        with pytest.raises(FileNotFoundError, match="resnet34-b627a593.pth is damaged"):
            pretrained_weights("imagenet/ResNet34")
    with pytest.raises(ValueError, match="no weights of 'imagenet/MobileNetV1'"):
        pretrained_weights("imagenet/MobileNetV1")


def test_compiled_training_gives_the_same_gradients():
    torch._dynamo.reset()
    network, images = seeded_network("resnet8").train(), images_for("resnet8")
    reference = copy.deepcopy(network)
    torch.compile(network, fullgraph=True, backend="aot_eager")(images).square().mean().backward()
    reference(images).square().mean().backward()
    for ours, plain in zip(network.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-3, atol=1e-5)


def test_a_network_is_tried_in_the_memory_order_of_training(monkeypatch):
    class Flat(nn.Sequential):
        def forward(self, images):
            return self[1](self[0](images).view(len(images), -1))  # as contiguous maps allow
    monkeypatch.setitem(NETWORKS, "flat", lambda num_classes: Flat(
        nn.Conv2d(3, 4, 3), nn.Linear(4 * 14 * 14, num_classes)))
    with pytest.raises(ValueError, match="flat cannot take images .*view size is not compatible"):
        check_takes("flat", 16, 10)
