"""Write examples.json, the images and logits of the page: python site/explorer/examples.py

The rule: of the first 5,000 training images of CIFAR-100 as they are, without augmentation, the first ones of each group by the
target's rank, each with a class that no image before it has.
"""

import base64
import hashlib
import io
import json
from pathlib import Path

import torch
from PIL import Image

from sortkd.train.augmentation import normalize
from sortkd.train.images import load_cifar100
from sortkd.train.teachers import load_teacher

HERE = Path(__file__).parent
TEACHER = HERE.parents[1] / "teachers" / "resnet20-cifar100-30epochs.safetensors"
IMAGES = 5000
GROUPS = {  # title: first and last rank of the target, how many images
    "Nearly right: second": (2, 2, 7),
    "Third to fifth": (3, 5, 6),
    "Sixth to twentieth": (6, 20, 5),
    "Deep down": (21, 100, 4),
    "Right, for comparison": (1, 1, 2),
}


def png(pixels: torch.Tensor) -> str:
    "An image, uint8 (H, W, 3), as the base64 text of a PNG file."
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


@torch.inference_mode()
def examples() -> dict:
    data = load_cifar100(download=False)
    teacher = load_teacher(TEACHER, "resnet20", data.num_classes)
    images, target = data.train_images[:IMAGES], data.train_targets[:IMAGES]
    inputs = normalize(images, data.mean, data.std)
    logits = torch.cat([teacher.model(part) for part in inputs.split(250)]).half()  # what float16 holds is enough, and short
    ranks = 1 + (logits > logits.gather(1, target[:, None])).sum(1)
    chosen: list[dict] = []
    for group, (first, last, count) in GROUPS.items():
        for index in ((ranks >= first) & (ranks <= last)).nonzero().flatten().tolist():
            if target[index].item() not in [each["target"] for each in chosen]:
                chosen.append({"group": group, "index": index, "target": target[index].item(), "png": png(images[index]),
                               "logits": logits[index].tolist()})
                count -= 1
                if not count:
                    break
    return {
        "teacher": {"file": f"teachers/{TEACHER.name}", "sha256": hashlib.sha256(TEACHER.read_bytes()).hexdigest(),
                    **{name: teacher.training[name] for name in ("architecture", "epochs", "top1")}},
        "images": IMAGES, "wrong": (ranks > 1).sum().item(),
        "classes": [name.replace("_", " ") for name in data.class_names],
        "examples": chosen,
    }


if __name__ == "__main__":
    (HERE / "examples.json").write_text(json.dumps(examples()) + "\n")
