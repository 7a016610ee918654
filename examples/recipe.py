"""Knowledge distillation with sorted teacher logits on CIFAR-100, top to bottom, in plain PyTorch.

    python examples/recipe.py                       # 240 epochs, as published, for a GPU
    python examples/recipe.py epochs=2 images=5000  # any setting below; a short look, for a CPU
"""
import hashlib
import os
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torchvision.datasets import CIFAR100

from sortkd import sort_logits

settings = {
    "teacher": str(Path(__file__).parents[1] / "teachers/resnet20-cifar100-30epochs.safetensors"),
    "teacher_blocks": 3, "student_blocks": 1,  # of each stage: resnet20 and resnet8
    "seed": 0, "images": 50_000, "epochs": 240, "batch_size": 64,
    "lr": 0.05, "lr_decay": 0.1, "decay_after": (150 / 240, 180 / 240, 210 / 240),  # of the epochs
    "momentum": 0.9, "weight_decay": 5e-4,
    "temperature": 4.0, "ce_weight": 0.1, "kd_weight": 0.9,
}
DATA = os.environ.get("SORTKD_DATA", "data")  # CIFAR-100 is in this folder, or is downloaded to it
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MEAN, STD, PAD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761), 4


def conv(before, after, size, stride=1):
    return nn.Conv2d(before, after, size, stride, size // 2, bias=False)


class Block(nn.Module):
    def __init__(self, before, after, stride):
        super().__init__()
        self.conv1, self.bn1 = conv(before, after, 3, stride), nn.BatchNorm2d(after)
        self.conv2, self.bn2 = conv(after, after, 3), nn.BatchNorm2d(after)
        shortcut = [conv(before, after, 1, stride), nn.BatchNorm2d(after)] if stride > 1 else []
        self.downsample = nn.Sequential(*shortcut)

    def forward(self, x):
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(residual + self.downsample(x))


class ResNet(nn.Module):
    "He et al., 2015, section 4.2; parameters have the names of the field's checkpoints."

    def __init__(self, blocks):
        super().__init__()
        self.conv1, self.bn1 = conv(3, 16, 3), nn.BatchNorm2d(16)
        for number, (before, after) in enumerate([(16, 16), (16, 32), (32, 64)], 1):
            stage = [Block(before, after, after // before)]
            stage += [Block(after, after, 1) for _ in range(1, blocks)]
            self.add_module(f"layer{number}", nn.Sequential(*stage))
        self.fc = nn.Linear(64, 100)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.fc(x.mean((2, 3)))


def normalize(pixels):
    "uint8 (N, H, W, 3) as input (N, 3, H, W)."
    mean, std = torch.tensor([MEAN, STD], dtype=torch.float64)
    scale, shift = (1 / (255 * std)).float(), (-mean / std).float()
    return torch.addcmul(shift.to(DEVICE), pixels.float(), scale.to(DEVICE)).permute(0, 3, 1, 2)


def draw(images, seed, epoch):
    "An order, and for each image the first row and column of its crop, and whether it is mirrored."
    key = hashlib.sha256(repr(("views", seed, epoch)).encode()).digest()  # as in sortkd.train
    generator = torch.Generator().manual_seed(int.from_bytes(key[:4], "little"))
    order, side = torch.randperm(images, generator=generator), 2 * PAD + 1
    crop = torch.randint(2 * side**2, (images,), generator=generator)
    return torch.stack([order, crop // 2 // side, crop // 2 % side, crop % 2]).to(DEVICE)


def augment(padded, index, top, left, mirrored):
    "Crops (N, 3, H, W) of padded images (M, H + 8, W + 8, 3)."
    place = torch.arange(padded.shape[1] - 2 * PAD, device=DEVICE)
    rows = top[:, None] + place
    columns = left[:, None] + torch.where(mirrored[:, None] == 1, place.flip(0), place)
    return normalize(padded[index[:, None, None], rows[:, :, None], columns[:, None, :]])


def kd_loss(student_logits, teacher_logits, temperature):
    "T² · KL(teacher ‖ student), the mean over images."
    log_q, log_p = ((z / temperature).log_softmax(1) for z in (student_logits, teacher_logits))
    return (log_p.exp() * (log_p - log_q)).sum() / len(log_p) * temperature**2


@torch.no_grad()
def evaluate(network, pixels, target):
    "Accuracy in percent."
    network.eval()
    right = sum((network(normalize(x)).argmax(1) == y).sum().item()
                for x, y in zip(pixels.split(200), target.split(200)))
    return 100 * right / len(target)


def train(student, teacher, pixels, target, test_pixels, test_target, settings):
    "Return the accuracy on the test images after each epoch, in percent."
    s, padded, accuracies = settings, F.pad(pixels, (0, 0, PAD, PAD, PAD, PAD)), []
    student, teacher = (network.to(DEVICE, memory_format=torch.channels_last)
                        for network in (student, teacher.eval()))
    optimizer = torch.optim.SGD(student.parameters(), s["lr"], s["momentum"],
                                weight_decay=s["weight_decay"], fused=True)
    for epoch in range(1, s["epochs"] + 1):
        start, student = time.monotonic(), student.train()
        decays = sum(epoch > round(share * s["epochs"]) for share in s["decay_after"])
        optimizer.param_groups[0]["lr"] = s["lr"] * s["lr_decay"] ** decays
        for batch in draw(len(pixels), s["seed"], epoch).split(s["batch_size"], dim=1):
            images, y = augment(padded, *batch), target[batch[0]]
            with torch.no_grad():
                teacher_logits = sort_logits(teacher(images), y)
            logits = student(images)
            kd = kd_loss(logits, teacher_logits, s["temperature"])
            loss = s["ce_weight"] * F.cross_entropy(logits, y) + s["kd_weight"] * kd
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        accuracies.append(evaluate(student, test_pixels, test_target))
        print(f"epoch {epoch}: {accuracies[-1]:.2f} %, {time.monotonic() - start:.0f} s")
    return accuracies


if __name__ == "__main__":
    for name, value in (each.split("=") for each in sys.argv[1:]):
        settings[name] = type(settings[name])(value)
    splits = [CIFAR100(DATA, is_train, download=True) for is_train in (True, False)]
    pixels, target, *test = (torch.as_tensor(values, device=DEVICE)
                             for split in splits for values in (split.data, split.targets))
    teacher = ResNet(settings["teacher_blocks"])
    teacher.load_state_dict(load_file(settings["teacher"]))
    print(f"teacher: {evaluate(teacher.to(DEVICE), *test):.2f} %")
    torch.manual_seed(settings["seed"])
    student, images = ResNet(settings["student_blocks"]), settings["images"]
    accuracies = train(student, teacher, pixels[:images], target[:images], *test, settings)
    print(f"student, last epoch: {accuracies[-1]:.2f} %")
