"""Distillation the usual way, written plainly: what sortkd's speed is measured against.

Images are decoded, cropped and flipped one by one by a DataLoader with two workers, everything is float32 and eager, the
teacher runs in every step, and the loss and the accuracy are read in every step, as the field's code does. The mathematics
is that of the method `kd+sort`.
"""

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from sortkd.train.images import ImageData
from sortkd.train.trainer import Recipe


class Images(Dataset):
    "As torchvision's CIFAR100 class: a uint8 array, and a PIL image for each access."

    def __init__(self, images, targets, transform):
        self.images, self.targets, self.transform = images.numpy(), targets.tolist(), transform

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.images[index])), self.targets[index]


def loaders(data: ImageData, batch_size: int, workers: int = 2) -> tuple[DataLoader, DataLoader]:
    "Training and test batches of `data`."
    finish = [transforms.ToTensor(), transforms.Normalize(data.mean, data.std)]
    augment = [transforms.RandomCrop(data.image_size, padding=data.pad)] + [transforms.RandomHorizontalFlip()] * data.flip
    train = Images(data.train_images, data.train_targets, transforms.Compose([*augment, *finish]))
    test = Images(data.test_images, data.test_targets, transforms.Compose(finish))
    return (
        DataLoader(train, batch_size, shuffle=True, num_workers=workers),
        DataLoader(test, batch_size, num_workers=workers),
    )


def two_full_sorts(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    "Sorting as its definition reads: rank all classes, move the target to the front, hand out the sorted values."
    values, order = logits.sort(dim=1, descending=True, stable=True)
    is_target = order == target[:, None]
    place = torch.arange(logits.shape[1], device=logits.device).masked_fill(is_target, -1)  # the target before all others
    order = order.gather(1, place.sort(dim=1).indices)
    return torch.empty_like(logits).scatter_(1, order, values)


def kd_sort_loss(student_logits, teacher_logits, target, temperature=4.0, ce_weight=0.1, kd_weight=0.9):
    "Cross-entropy and knowledge distillation from sorted teacher logits."
    teacher_logits = two_full_sorts(teacher_logits, target)
    distillation = F.kl_div(
        F.log_softmax(student_logits / temperature, 1), F.softmax(teacher_logits / temperature, 1), reduction="batchmean"
    )
    return ce_weight * F.cross_entropy(student_logits, target) + kd_weight * temperature**2 * distillation


def optimizer_of(student, recipe: Recipe):
    return torch.optim.SGD(student.parameters(), recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)


def train_batches(student, teacher, optimizer, batches, device="cpu", steps: int = 0):
    "One step for each batch of `batches`, or `steps` of them; returns mean loss and top-1 in percent."
    student.train(), teacher.eval()
    loss_sum, hits, count = 0.0, 0, 0
    for number, (images, target) in enumerate(batches, 1):
        images, target = images.to(device), target.to(device)
        student_logits = student(images)
        with torch.no_grad():
            teacher_logits = teacher(images)
        loss = kd_sort_loss(student_logits, teacher_logits, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss_sum += loss.item() * len(target)
        hits += (student_logits.argmax(1) == target).sum().item()
        count += len(target)
        if number == steps:
            break
    return loss_sum / count, 100 * hits / count


@torch.no_grad()
def test_top1(student, batches, device="cpu") -> float:
    student.eval()
    hits = sum((student(images.to(device)).argmax(1) == target.to(device)).sum().item() for images, target in batches)
    return 100 * hits / len(batches.dataset)


def train(student, teacher, data: ImageData, recipe: Recipe, device="cpu") -> list[float]:
    "The whole run; returns the test top-1 after each epoch."
    student, teacher = student.to(device), teacher.to(device)
    train_loader, test_loader = loaders(data, recipe.batch_size)
    optimizer, curve = optimizer_of(student, recipe), []
    for epoch in range(1, recipe.epochs + 1):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr_in(epoch)
        train_batches(student, teacher, optimizer, train_loader, device)
        curve.append(test_top1(student, test_loader, device))
    return curve
