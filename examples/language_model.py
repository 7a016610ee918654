"""Does sorting help a small language model? Top to bottom, in plain PyTorch.

A teacher of 5 million parameters and students of 1 million read the King James Bible. Students of
one seed begin alike and see the same batches; they differ in what the teacher tells them.

    apt-get install bible-kjv bible-kjv-text        # Debian's, for the text alone
    bible -f gen1:1-rev22:21 </dev/null >kjv.txt
    pip install tokenizers
    python examples/language_model.py --text kjv.txt --seeds 0-7
    python examples/language_model.py --text kjv.txt --seeds 0 --out short.jsonl student_steps=50

The last words are settings, any of those below. The teacher is read from its file, or trained first
where there is none. Each student becomes one line of the file OUT; one that is there is not trained
again. No loss is printed, since the plan allows no look before all seeds are there.
"""
import argparse
import hashlib
import json
import math
import os
import platform
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from sortkd import DistillationLoss, sort_logits

settings = {
    "vocabulary": 1024, "context": 256, "head_width": 64,
    "teacher_width": 256, "teacher_layers": 6, "teacher_steps": 3000, "teacher_lr": 1e-3,
    "teacher_batch": 4, "teacher_dropout": 0.1, "teacher_seed": 2000,
    "student_width": 128, "student_layers": 4, "student_steps": 1500, "student_lr": 2e-3,
    "student_batch": 4, "student_dropout": 0.0,
    "warmup": 0.05, "last_lr": 0.1, "weight_decay": 0.1, "clip": 1.0,  # lr: shares of steps and lr
    "temperature": 1.0, "ce_weight": 0.5, "kd_weight": 0.5, "first": 10,
    "checks": 4,  # of the validation loss, the last one after the last step
    "bfloat16": True,
}
TEXT_SHA256 = "cd45f0c9cedab8e4439bd6486c8952c77cc8b0ecc5d1f6ae3513f2039f47229d"
METHODS = ("ce", "kd", "kd+sort", "kd+sort10")  # the last sorts where the target is among the first
FOLDER = Path(__file__).parents[1]


def checksum(data):
    return hashlib.sha256(data).hexdigest()


def read_verses(path, expected=TEXT_SHA256):
    "The lines of the text without their references; SystemExit for another text."
    data = Path(path).read_bytes()
    if checksum(data) != expected:
        raise SystemExit(f"{path} is another text than the study's: its sha256 is {checksum(data)},"
                         f" not {expected}. The first lines of {__file__} tell how to make it.")
    return [line.partition(" ")[2] for line in data.decode("ascii").splitlines()]


def split_verses(verses, block=100):
    "Training, validation and test text: of each ten blocks the ninth is for validation, then test."
    parts = {"train": [], "validation": [], "test": []}
    for start in range(0, len(verses), block):
        name = {8: "validation", 9: "test"}.get(start // block % 10, "train")
        parts[name] += verses[start : start + block]
    return {name: "".join(line + "\n" for line in lines) for name, lines in parts.items()}


def encode(parts, vocabulary):
    "Tokens of each part; the byte-pair encoding is learned from the training part."
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, show_progress=False)
    tokenizer.train_from_iterator(parts["train"].splitlines(keepends=True), trainer)
    tokens = {name: tokenizer.encode(text).ids for name, text in parts.items()}
    assert all(tokenizer.decode(tokens[name]) == text for name, text in parts.items())
    return {name: torch.tensor(ids) for name, ids in tokens.items()}


class Block(nn.Module):
    def __init__(self, width, head_width, dropout):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.expand, self.contract = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads, self.dropout = width // head_width, nn.Dropout(dropout)

    def forward(self, x):
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        attended = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4), is_causal=True)
        x = x + self.dropout(self.out(attended.transpose(1, 2).reshape(batch, length, width)))
        hidden = F.gelu(self.expand(self.norm2(x)))
        return x + self.dropout(self.contract(hidden))


class LanguageModel(nn.Module):
    "Logits (B, T, V) of tokens (B, T). The head is the embedding, and is computed in float32."

    def __init__(self, s, width, layers, dropout):
        super().__init__()
        self.embedding = nn.Embedding(s["vocabulary"], width)
        self.position = nn.Embedding(s["context"], width)
        blocks = (Block(width, s["head_width"], dropout) for _ in range(layers))
        self.blocks = nn.Sequential(*blocks)
        self.norm, self.bfloat16 = nn.LayerNorm(width), s["bfloat16"]
        for name, value in self.named_parameters():
            if value.dim() == 2:  # what is added to the stream begins smaller, as in GPT-2
                added = name.endswith(("out.weight", "contract.weight"))
                nn.init.normal_(value, std=0.02 / (math.sqrt(2 * layers) if added else 1))

    def forward(self, tokens):
        x = self.embedding(tokens) + self.position.weight[: tokens.shape[1]]
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16):
            x = self.blocks(x)
        return F.linear(self.norm(x.float()), self.embedding.weight)


def create_network(s, kind, seed):
    torch.manual_seed(seed)
    return LanguageModel(s, *(s[f"{kind}_{name}"] for name in ("width", "layers", "dropout")))


def draw(tokens, context, batch, seed, steps):
    "Inputs and targets (B, T) of each step: each target is the input of the next place."
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        start = torch.randint(len(tokens) - context, (batch, 1), generator=generator)
        rows = tokens[start + torch.arange(context + 1)]
        yield rows[:, :-1], rows[:, 1:]


def create_loss(method, s):
    if method == "ce":
        return DistillationLoss("ce")
    weights = {name: s[name] for name in ("temperature", "ce_weight", "kd_weight")}
    return DistillationLoss("kd", **weights)  # of logits that `lessons` has sorted, or not


def lessons(teacher_logits, target, methods, first):
    "What the teacher's logits become for each method, and the share of tokens that are changed."
    made, changed = {"ce": None, "kd": teacher_logits}, {"ce": 0.0, "kd": 0.0}
    if {"kd+sort", "kd+sort10"} & set(methods):
        above = (teacher_logits > teacher_logits.gather(-1, target[..., None])).sum(-1)
        near = above < first
        made["kd+sort"] = sort_logits(teacher_logits, target)
        made["kd+sort10"] = torch.where(near[..., None], made["kd+sort"], teacher_logits)
        changed["kd+sort"] = (above > 0).double().mean().item()
        changed["kd+sort10"] = ((above > 0) & near).double().mean().item()
    return made, changed


@torch.no_grad()
def evaluate(network, tokens, context):
    """In nats a token: loss and entropy. In shares: top1, and ece, the expected calibration error
    of the first choice in 15 bins of equal width.
    """
    network.eval()
    rows = tokens[: (len(tokens) - 1) // context * context + 1].unfold(0, context + 1, context)
    losses, entropies, confidences, rights = [], [], [], []
    for batch in rows.split(16):
        log_q, target = network(batch[:, :-1]).log_softmax(-1), batch[:, 1:]
        losses.append(-log_q.gather(-1, target[..., None]).flatten())
        entropies.append(-(log_q.exp() * log_q).sum(-1).flatten())
        confidence, choice = log_q.max(-1)
        confidences.append(confidence.exp().flatten())
        rights.append((choice == target).flatten())
    confidence, right = torch.cat(confidences).double(), torch.cat(rights).double()
    gaps = torch.zeros(15, dtype=torch.float64).index_add_(
        0, (confidence * 15).long().clamp(max=14), confidence - right)
    mean = {"loss": torch.cat(losses), "entropy": torch.cat(entropies), "top1": right}
    return {name: value.double().mean().item() for name, value in mean.items()} | {
        "ece": gaps.abs().sum().item() / len(right)}


def learning_rate(s, step, steps, lr):
    "Linear warm-up, then half a cosine down to a share of `lr`."
    warm = max(1, round(s["warmup"] * steps))
    cosine = (1 + math.cos(math.pi * max(0, step - warm) / max(1, steps - warm))) / 2
    return lr * min(1, (step + 1) / warm) * (s["last_lr"] + (1 - s["last_lr"]) * cosine)


def train(networks, teacher, tokens, s, seed, kind):
    """Train networks, by method, on the same batches. Return for each method the validation loss
    by step, and the share of the tokens that sorting changed.
    """
    steps, lr = s[f"{kind}_steps"], s[f"{kind}_lr"]
    losses = {each: create_loss(each, s) for each in networks}
    optimizers = {each: torch.optim.AdamW(network.parameters(), lr, (0.9, 0.95), fused=True,
                                          weight_decay=s["weight_decay"])
                  for each, network in networks.items()}
    checks = {round(steps * (part + 1) / s["checks"]) for part in range(s["checks"])}
    curves, shares = {each: {} for each in networks}, dict.fromkeys(networks, 0.0)
    began = time.monotonic()
    batches = draw(tokens["train"], s["context"], s[f"{kind}_batch"], seed, steps)
    for step, (inputs, target) in enumerate(batches):
        with torch.no_grad():
            teacher_logits = None if teacher is None else teacher(inputs)
        told, changed = lessons(teacher_logits, target, networks, s["first"])
        for method, network in networks.items():
            optimizer = optimizers[method]
            optimizer.param_groups[0]["lr"] = learning_rate(s, step, steps, lr)
            loss = losses[method](network.train()(inputs), told[method], target)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), s["clip"])
            optimizer.step()
            shares[method] += changed[method] / steps
            if step + 1 in checks:
                validation = evaluate(network, tokens["validation"], s["context"])
                curves[method][step + 1] = validation["loss"]
        if step + 1 in checks:
            print(f"{kind}, seed {seed}: step {step + 1} of {steps}, "
                  f"{time.monotonic() - began:.0f} s", flush=True)
    return curves, shares


def read_teacher(path, tokens, s, origin):
    "The teacher in the file at `path`, which is trained and written first if it is not there."
    text = checksum(torch.cat([*tokens.values()]).numpy().tobytes())
    if not Path(path).exists():
        began, network = time.monotonic(), create_network(s, "teacher", s["teacher_seed"])
        curves, _ = train({"ce": network}, None, tokens, s, s["teacher_seed"], "teacher")
        about = {"tokens_sha256": text, "settings": s,
                 "validation_loss": curves["ce"], "seconds": round(time.monotonic() - began),
                 **origin}
        weights = {name: value.half() for name, value in network.state_dict().items()}
        save_file(weights, path, {name: json.dumps(value) for name, value in about.items()})
    with safe_open(path, "pt") as file:
        if json.loads(file.metadata()["tokens_sha256"]) != text:
            raise SystemExit(f"{path} is the teacher of other tokens; give --teacher another name "
                             "to train one.")
    network = create_network(s, "teacher", s["teacher_seed"])
    network.load_state_dict(load_file(path))  # from half precision
    return network.eval().requires_grad_(False)


def now():
    return datetime.now(UTC).isoformat(timespec="seconds")


def source():
    "The commit and the checksum of this script."
    command = ["git", "-C", str(FOLDER), "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return {"commit": done.stdout.strip() or None,
            "script_sha256": checksum(Path(__file__).read_bytes())}


def run_seed(teacher, tokens, s, seed, methods):
    "Train one student by each method, all on the same batches; what was measured, by method."
    networks = {method: create_network(s, "student", seed) for method in methods}
    curves, shares = train(networks, teacher, tokens, s, seed, "student")
    return {method: {"validation_loss": curves[method], "changed_by_sorting": shares[method],
                     "test": evaluate(network, tokens["test"], s["context"])}
            for method, network in networks.items()}


def same_run(record):
    "What tells a student from others: seed, method, settings, and the checksums of what made it."
    return {name: value for name, value in record.items()
            if name in ("seed", "method", "settings") or name.endswith("sha256")}


def run(teacher, tokens, s, seeds, methods, out, known):
    "Append a record of each student that `out` does not hold; `known` is what all have in common."
    for seed in seeds:
        lines = out.read_text().splitlines() if out.exists() else []
        done = [same_run(json.loads(line)) for line in lines]
        wanted = {"seed": seed, "settings": s, **known}
        missing = [each for each in methods if same_run({**wanted, "method": each}) not in done]
        if not missing:
            continue
        began, clock = now(), time.monotonic()
        measured = run_seed(teacher, tokens, s, seed, missing)
        times = {"began": began, "ended": now(), "seconds": round(time.monotonic() - clock),
                 "together": missing}  # the seconds are those of all that were trained together
        records = [{"method": each, **times, **measured[each], **wanted} for each in missing]
        with open(out, "a") as file:
            file.write("".join(json.dumps(record) + "\n" for record in records))


def read_arguments():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--seeds", default="0-7", help="such as 0-7 or 3")
    parser.add_argument("--methods", default=",".join(METHODS))
    files = {"teacher": "teacher.safetensors", "plan": "plan.yaml", "out": "runs.jsonl"}
    for name, file in files.items():
        parser.add_argument(f"--{name}", default=FOLDER / "results/tokens" / file, type=Path)
    parser.add_argument("settings", nargs="*", metavar="name=value")
    return parser.parse_args()


if __name__ == "__main__":
    arguments = read_arguments()
    for name, value in (each.split("=") for each in arguments.settings):
        settings[name] = type(settings[name])(json.loads(value))
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    origin = source()
    first, _, last = arguments.seeds.partition("-")
    tokens = encode(split_verses(read_verses(arguments.text)), settings["vocabulary"])
    arguments.teacher.parent.mkdir(parents=True, exist_ok=True)
    teacher = read_teacher(arguments.teacher, tokens, settings, origin)
    known = {
        **origin, "text_sha256": TEXT_SHA256,
        "teacher_sha256": checksum(arguments.teacher.read_bytes()),
        "plan_sha256": checksum(arguments.plan.read_bytes()) if arguments.plan.exists() else None,
        "teacher_test": evaluate(teacher, tokens["test"], settings["context"]),
        "torch": torch.__version__, "machine": platform.platform(),
    }
    run(teacher, tokens, settings, range(int(first), int(last or first) + 1),
        arguments.methods.split(","), arguments.out, known)
