"""Which test images of CIFAR-100 the committed teachers get right: a line for each in results/measurements/teachers.jsonl.

    python benchmarks/teachers.py teachers/*.safetensors

Beside the line, `teachers.correct/` holds one bit for each test image, as `results/*.correct/` does for students. The tables
use them to tell the effect of sorting on images that the teacher gets right from that on the others.
"""

import argparse
import json
from pathlib import Path

import torch

from sortkd.experiment.storage import save_correct
from sortkd.train.images import load_data
from sortkd.train.teachers import load_teacher, read_checkpoint, weights_checksum

OUTPUT = Path("results/measurements/teachers.jsonl")


def correct_images(path: Path, data) -> torch.Tensor:
    "Which test images the network in `path` gets right (bool)."
    model = load_teacher(path, read_checkpoint(path)[1]["architecture"], data.num_classes).model
    with torch.inference_mode():
        parts = [model(images).argmax(1) == target for images, target in data.batches(torch.device("cpu")).test(200)]
    return torch.cat(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("teachers", nargs="+", type=Path, metavar="FILE")
    data, lines = load_data("cifar100"), []
    for path in parser.parse_args().teachers:
        correct = correct_images(path, data)
        line = {"file": path.name, "weights_sha256": weights_checksum(read_checkpoint(path)[0]), "data_checksum": data.checksum,
                "test_images": len(correct), "top1": 100 * int(correct.sum()) / len(correct), "correct_sha256": save_correct(OUTPUT, correct)}
        lines.append(json.dumps(line))
        print(lines[-1], flush=True)
    OUTPUT.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
