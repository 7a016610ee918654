"""The networks against the reference (tests/goldens/README.md), and what training and tools ask of them."""
import copy
import json
import math
import pickle
import urllib.error
import urllib.request
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sortkd.train.networks import NETWORKS, Features, create_model, list_imagenet_models, list_models, pretrained_weights
from sortkd.experiment.pairs import check_takes
from sortkd.train.teachers import load_weights

GOLDENS = Path(__file__).parent / "goldens"
SHAPES = json.loads((GOLDENS / "state_dict_shapes.json").read_text())
LOGITS = np.load(GOLDENS / "model_logits.npz")
IMAGES = torch.tensor(np.random.RandomState(0).standard_normal((4, 3, 32, 32)), dtype=torch.float32)
ONE_PER_FAMILY = ["resnet8", "ResNet18", "wrn_16_1", "vgg8", "MobileNetV2", "ShuffleV1", "ShuffleV2"]

every_network = pytest.mark.parametrize("name", list_models())
every_imagenet_network = pytest.mark.parametrize("name", list_imagenet_models())
every_family = pytest.mark.parametrize("name", ONE_PER_FAMILY)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    "Batches of two to eight are slower on several threads, by far so on a busy machine."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def golden_state_dict(shapes):
    state_dict = {}
    for key, shape in shapes.items():
        random = np.random.RandomState(zlib.crc32(key.encode()))
        if key.endswith("num_batches_tracked"):
            values = np.zeros(shape, dtype=np.int64)
        elif key.endswith("running_var"):
            values = random.uniform(0.5, 1.5, shape)
        elif key.endswith(("running_mean", "bias")):
            values = 0.1 * random.standard_normal(shape)
        elif len(shape) == 1:
            values = random.uniform(0.5, 1.5, shape)
        else:
            values = random.standard_normal(shape) * math.sqrt(0.5 / math.prod(shape[1:]))
        state_dict[key] = torch.as_tensor(values)
    return state_dict


def test_list_is_the_reference_list():
    assert sorted(list_models()) == sorted(name for name in SHAPES if not name.startswith("imagenet/"))
    list_models().clear()
    assert list_models(), "list_models() must hand out a list of its own"


@every_network
def test_keys_order_and_shapes(name):
    with torch.device("meta"):
        state_dict = create_model(name).state_dict()
    assert [(key, list(value.shape)) for key, value in state_dict.items()] == list(SHAPES[name].items())


@every_network
def test_golden_logits(name):
    network = create_model(name).eval()
    network.load_state_dict(golden_state_dict(SHAPES[name]))
    with torch.no_grad():
        logits = network(IMAGES)
    error = np.linalg.norm(logits.numpy() - LOGITS[name]) / np.linalg.norm(LOGITS[name])
    assert error < 1e-5


@every_network
def test_features(name):
    network = create_model(name, num_classes=7).eval()
    with torch.no_grad():
        logits = network(IMAGES)
        again, features = network(IMAGES, return_features=True)
        assert isinstance(features, Features)
        assert torch.equal(logits, again) and logits.shape == (4, 7)
        assert torch.equal(network.classifier_layer(features.pooled), logits)
    sizes = [maps.shape[-1] for maps in features.maps]
    assert len(sizes) in (4, 5) and sizes == sorted(sizes, reverse=True)
    assert all(maps.ndim == 4 and len(maps) == 4 for maps in features.maps)
    assert features.pooled.shape == (4, network.classifier_layer.in_features)


@every_network
@pytest.mark.parametrize("size", [(16, 16), (32, 48), pytest.param((64, 64), marks=pytest.mark.slow)], ids=str)
def test_other_image_sizes(name, size):
    network = create_model(name).eval()
    with torch.no_grad():
        logits = network(torch.randn(2, 3, *size))
    assert logits.shape == (2, 100) and logits.isfinite().all()


def test_vgg_pools_four_times_only_from_64_pixels():
    network = create_model("vgg8").eval()
    heights = {size: network(torch.zeros(1, 3, size, size), return_features=True)[1].maps[-1].shape[-1]
               for size in (16, 32, 64, 128)}
    assert heights == {16: 2, 32: 4, 64: 4, 128: 8}


@every_network
@pytest.mark.parametrize(("size", "batch_size"), [(32, 2), pytest.param(16, 8, marks=pytest.mark.slow)])
def test_training_step(name, size, batch_size):
    torch.manual_seed(0)
    network = create_model(name, num_classes=10).train()
    before = [parameter.detach().clone() for parameter in network.parameters()]
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    loss = F.cross_entropy(network(torch.randn(batch_size, 3, size, size)), torch.arange(batch_size))
    loss.backward()
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None, f"{key} takes no part"
        assert parameter.grad.isfinite().all(), f"{key} has a gradient that is not finite"
    optimizer.step()
    assert any(not torch.equal(old, new) for old, new in zip(before, network.parameters(), strict=True))


@every_family
def test_number_of_classes(name):
    network = create_model(name, num_classes=10)
    assert network.classifier_layer.out_features == 10
    assert network.eval()(IMAGES).shape == (4, 10)


@every_family
def test_initialisation_repeats_under_a_seed(name):
    torch.manual_seed(1)
    first = create_model(name).state_dict()
    torch.manual_seed(1)
    second = create_model(name).state_dict()
    third = create_model(name).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], third[key]) for key in first)


@pytest.mark.parametrize("name", ["resnet8x4", "ResNet18", "wrn_16_2", "vgg8", "MobileNetV2"])
def test_convolutions_start_from_he_fan_out(name):
    torch.manual_seed(0)
    for key, module in create_model(name).named_modules():
        if isinstance(module, torch.nn.Conv2d) and module.weight.numel() > 10_000:
            expected = math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels))
            assert module.weight.std().item() == pytest.approx(expected, rel=0.05), key
        elif isinstance(module, torch.nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all(), key


@every_family
def test_copies_and_pickles(name):
    network = create_model(name).eval()
    logits = network(IMAGES)
    assert torch.equal(copy.deepcopy(network)(IMAGES), logits)
    assert torch.equal(pickle.loads(pickle.dumps(network))(IMAGES), logits)


@every_family
def test_no_module_is_registered_twice(name):
    keys = [key for key, _ in create_model(name).named_modules(remove_duplicate=False)]
    assert len(keys) == len([key for key, _ in create_model(name).named_modules()])


@every_family
def test_channels_last(name):
    network = create_model(name).eval()
    expected = network(IMAGES)
    network = network.to(memory_format=torch.channels_last)
    logits, features = network(IMAGES.to(memory_format=torch.channels_last), return_features=True)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert all(maps.is_contiguous(memory_format=torch.channels_last) for maps in features.maps)


@every_family
def test_bfloat16_autocast_trains(name):
    torch.manual_seed(0)
    network = create_model(name).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = network(IMAGES)
    assert logits.dtype == torch.float32  # the classifier stays out of autocast
    F.cross_entropy(logits.float(), torch.arange(4)).backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


@pytest.mark.parametrize(("name", "return_features"), [*((name, False) for name in ONE_PER_FAMILY), ("wrn_16_1", True)])
def test_compiles_as_one_graph(name, return_features):
    torch._dynamo.reset()
    network = create_model(name).eval()
    compiled = torch.compile(network, fullgraph=True, backend="eager")  # Capture is what depends on our code.
    with torch.no_grad():
        if return_features:
            logits, features = compiled(IMAGES, return_features=True)
            assert isinstance(features, Features)
        else:
            logits = compiled(IMAGES)
        torch.testing.assert_close(logits, network(IMAGES))


@pytest.mark.parametrize("name", ["resnet8", "ShuffleV2"])
def test_compiled_training_gives_the_same_gradients(name):
    torch._dynamo.reset()
    torch.manual_seed(0)
    network = create_model(name).train()
    reference = copy.deepcopy(network)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    compiled(IMAGES).square().mean().backward()
    reference(IMAGES).square().mean().backward()
    for ours, plain in zip(network.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-3, atol=1e-5)


def test_unknown_name_is_named_with_close_matches():
    with pytest.raises(ValueError) as error:
        create_model("ResNet56")
    message = str(error.value)
    assert "'ResNet56'" in message and "Did you mean resnet56" in message and "list_models()" in message
    assert "ShuffleV2" in message
    with pytest.raises(ValueError, match="'nothing like it'") as error:
        create_model("nothing like it")
    assert "Did you mean" not in str(error.value)
    with pytest.raises(ValueError, match="no network None"):
        create_model(None)


@pytest.mark.parametrize("num_classes", [10.0, "10", True, None])
def test_number_of_classes_of_another_type(num_classes):
    with pytest.raises(ValueError, match="num_classes is .*; give a whole number from 2"):
        create_model("resnet8", num_classes)


@pytest.mark.parametrize("num_classes", [1, 0, -5])
def test_too_few_classes(num_classes):
    with pytest.raises(ValueError, match=f"num_classes is {num_classes}; give"):
        create_model("resnet8", num_classes)


def test_numpy_number_of_classes():
    assert create_model("resnet8", np.int64(5)).classifier_layer.out_features == 5


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 1, 32, 32), (2, 32, 32, 3)])
def test_images_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"images must have the shape \(N, 3, height, width\)"):
        create_model("resnet8")(torch.zeros(shape))


# ImageNet's networks


def test_list_is_the_reference_list_of_imagenet():
    assert sorted(list_imagenet_models()) == sorted(name for name in SHAPES if name.startswith("imagenet/"))
    list_imagenet_models().clear()
    assert list_imagenet_models(), "list_imagenet_models() must hand out a list of its own"


@every_imagenet_network
def test_imagenet_keys_order_and_shapes(name):
    with torch.device("meta"):
        state_dict = create_model(name, 1000).state_dict()
    assert [(key, list(value.shape)) for key, value in state_dict.items()] == list(SHAPES[name].items())


@every_imagenet_network
def test_imagenet_golden_logits(name):
    images = torch.tensor(np.random.RandomState(0).standard_normal((2, 3, 224, 224)), dtype=torch.float32)
    network, golden = create_model(name, 1000).eval(), LOGITS[name.replace("/", "__")]
    network.load_state_dict(golden_state_dict(SHAPES[name]))
    with torch.no_grad():
        logits = network(images).numpy()
    assert np.linalg.norm(logits - golden) / np.linalg.norm(golden) < 1e-5


@pytest.mark.parametrize("name", ["imagenet/ResNet18", "imagenet/MobileNetV1"])
def test_logits_stay_float32_under_autocast(name):
    torch.manual_seed(0)
    network = create_model(name, num_classes=5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = network(torch.randn(4, 3, 64, 64))
    assert logits.dtype == torch.float32 and logits.shape == (4, 5)
    assert not torch.equal(logits, logits.bfloat16().float()), "no rounding on the way"
    F.cross_entropy(logits, torch.arange(4)).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in network.parameters())


@pytest.mark.parametrize("name", ["imagenet/ResNet18", "imagenet/MobileNetV1"])
def test_copies_repeats_and_compiles(name):
    torch.manual_seed(0)
    network = create_model(name, num_classes=5).eval()
    torch.manual_seed(0)
    again = create_model(name, num_classes=5).eval()
    images = torch.randn(2, 3, 64, 64)
    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    with torch.no_grad():
        expected = network(images)
        assert torch.equal(again(images), expected)
        assert torch.equal(pickle.loads(pickle.dumps(network))(images), expected)
        torch.testing.assert_close(compiled(images), expected)


def test_features_of_the_student():
    network = create_model("imagenet/MobileNetV1", 1000).eval()
    with torch.no_grad():
        logits, features = network(torch.randn(1, 3, 96, 96), return_features=True)
    assert [tuple(maps.shape[1:]) for maps in features.maps] == [
        (64, 48, 48), (128, 24, 24), (256, 12, 12), (512, 6, 6), (1024, 3, 3)]
    assert torch.equal(network.classifier_layer(features.pooled), logits)


@pytest.mark.parametrize("arguments, error", [
    (("resnet18",), r"no network 'resnet18'.*imagenet/ResNet18"),
    (("imagenet/VGG",), "imagenet/VGG"),
    ((None,), "None"),
    ((["imagenet/ResNet18"],), "no network"),
    (("imagenet/ResNet18", 1), "num_classes is 1; give a whole number from 2"),
    (("imagenet/MobileNetV1", "ten"), "num_classes is 'ten'"),
])
def test_wrong_names_and_classes(arguments, error):
    with pytest.raises((ValueError, TypeError), match=error):
        create_model(*arguments)


@pytest.mark.parametrize("name", ["imagenet/ResNet18", "imagenet/MobileNetV1"])
def test_a_part_without_images(name):
    "What a rank is given that has no part in a batch."
    network = create_model(name, num_classes=5).eval()
    logits = network(torch.empty(0, 3, 64, 64))
    assert logits.shape == (0, 5)
    logits.sum().backward()
    assert all((parameter.grad == 0).all() for parameter in network.parameters())


# Networks are tried before any work begins


class Odd(nn.Module):
    "A network whose `answer(logits, training)` is something else than logits."
    def __init__(self, num_classes, answer):
        super().__init__()
        self.convolution, self.norm, self.answer = nn.Conv2d(3, num_classes, 16), nn.BatchNorm2d(num_classes), answer

    def forward(self, images):
        maps = self.norm(self.convolution(images)) if images.shape[-1] == 16 else self.convolution(images)
        return self.answer(maps.mean((2, 3)), self.training)


ODD = {
    "a tuple in training mode": (lambda logits, training: (logits, logits) if training else logits, "gives tuple in training mode"),
    "a tuple in evaluation mode": (lambda logits, training: logits if training else (logits,), "gives tuple in evaluation mode"),
    "a dict": (lambda logits, training: {"logits": logits}, "gives dict in training mode"),
    "classes": (lambda logits, training: logits.argmax(1), "gives torch.int64 in training mode"),
    "a class less": (lambda logits, training: logits[:, 1:], r"shape \(2, 9\) in training mode; expected .*\(2, 10\)"),
    "maps": (lambda logits, training: logits[:, :, None, None], r"shape \(2, 10, 1, 1\)"),
    "one image for all": (lambda logits, training: logits[:1], r"shape \(1, 10\)"),
    "NaN in evaluation mode": (lambda logits, training: logits if training else logits.log() * torch.nan, "NaN or infinity .* in evaluation mode"),
    "an error": (lambda logits, training: 1 / 0 if training else logits, r"cannot take images of 16×16 in training mode \(division by zero\)"),
    "an error in evaluation mode": (lambda logits, training: logits if training else 1 / 0, "in evaluation mode"),
    "rows in memory order": (lambda logits, training: logits.t().view(-1), "in training mode"),
}


@pytest.mark.parametrize("kind", ODD)
def test_a_network_that_gives_no_logits_is_refused(monkeypatch, kind):
    answer, words = ODD[kind]
    monkeypatch.setitem(NETWORKS, "odd", lambda num_classes: Odd(num_classes, lambda logits, training: logits))
    check_takes("odd", 16, 10)
    with pytest.raises(ValueError, match="odd cannot take images of 16×16 one at a time in training mode"):
        check_takes("odd", 16, 10, batch_size=1)
    monkeypatch.setitem(NETWORKS, "odd", lambda num_classes: Odd(num_classes, answer))
    with pytest.raises(ValueError, match=f"^odd .*{words}") as error:
        check_takes("odd", 16, 10)
    assert "hoose another network" in str(error.value) and "\n" not in str(error.value)


def test_a_network_is_tried_in_the_memory_order_of_training(monkeypatch):
    class Flat(nn.Sequential):
        def forward(self, images):
            return self[1](self[0](images).view(len(images), -1))  # as contiguous maps allow
    monkeypatch.setitem(NETWORKS, "flat", lambda num_classes: Flat(nn.Conv2d(3, 4, 3), nn.Linear(4 * 14 * 14, num_classes)))
    with pytest.raises(ValueError, match="flat cannot take images .*view size is not compatible"):
        check_takes("flat", 16, 10)


@pytest.mark.parametrize("name,size", [("googlenet", 32), pytest.param("inception_v3", 96, marks=pytest.mark.slow)])
def test_networks_with_auxiliary_heads_give_logits_alone(name, size):
    check_takes(f"torchvision:{name}", size, 10)


# Published weights


@pytest.fixture
def hub(tmp_path, monkeypatch):
    "An empty hub folder and a network on which every request fails; yields the folder and the requests."
    requests = []

    def refuse(request, *arguments, **named):
        requests.append(request.full_url)
        raise urllib.error.URLError("the network is unreachable")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", refuse)
    return tmp_path / "checkpoints", requests


@pytest.mark.parametrize("name, file", [("imagenet/ResNet34", "resnet34-b627a593.pth"),
                                        ("imagenet/ResNet50", "resnet50-0676ba61.pth")])
def test_weights_without_a_network(hub, name, file):
    with pytest.raises(FileNotFoundError) as caught:
        pretrained_weights(name)
    assert hub[1] == [f"https://download.pytorch.org/models/{file}"]
    for part in (name, hub[1][0], "unreachable", "checkpoint"):
        assert part in str(caught.value)


def test_weights_are_found_and_fit(hub):
    network = create_model("imagenet/ResNet34", 1000)
    hub[0].mkdir()
    torch.save(network.state_dict(), hub[0] / "resnet34-b627a593.pth")
    weights = pretrained_weights("imagenet/ResNet34")
    assert not hub[1], "a file that is there is not downloaded"
    other = load_weights(create_model("imagenet/ResNet34", 1000), weights)
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in network.state_dict().items())


def test_a_download_with_another_checksum_is_refused(hub, tmp_path, monkeypatch):
    served = tmp_path / "served.pth"
    torch.save({"fc.weight": torch.zeros(2)}, served)
    monkeypatch.setattr(torch.hub, "urlopen", lambda request, **named: urllib.request.urlopen(served.as_uri()))
    with pytest.raises(FileNotFoundError, match="invalid hash"):
        pretrained_weights("imagenet/ResNet34")
    assert not list(hub[0].iterdir()), "what was refused is not kept"


def test_damaged_or_hostile_weights(hub, tmp_path):
    class CreatesFile:
        def __reduce__(self):
            return open, (str(tmp_path / "executed"), "w")

    hub[0].mkdir()
    file = hub[0] / "resnet34-b627a593.pth"
    torch.save({"fc.weight": torch.zeros(2)}, file)
    contents = [b"", b"hello", file.read_bytes()[:300], pickle.dumps(CreatesFile(), protocol=2)]
    for content in contents:
        file.write_bytes(content)
        with pytest.raises(ValueError, match="resnet34-b627a593.pth cannot be read as weights"):
            pretrained_weights("imagenet/ResNet34")
    assert not (tmp_path / "executed").exists()


def test_networks_without_published_weights():
    with pytest.raises(ValueError, match="no weights of 'imagenet/MobileNetV1'"):
        pretrained_weights("imagenet/MobileNetV1")
    with pytest.raises(ValueError, match="no weights of 'ResNet34'"):
        pretrained_weights("ResNet34")
