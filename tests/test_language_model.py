"The study of a small language model, examples/language_model.py, in a tiny size."
import hashlib
import json
import math
import random
import runpy

import pytest
import torch
from conftest import ROOT

from sortkd import DistillationLoss, sort_logits
from sortkd.evidence.statistics import compare

pytest.importorskip("tokenizers")
STUDY = runpy.run_path(str(ROOT / "examples" / "language_model.py"))
METHODS = STUDY["METHODS"]
FILE = ROOT / "results" / "tokens" / "runs.jsonl"
RUNS = [json.loads(line) for line in FILE.read_text().splitlines()]
SMALL = STUDY["settings"] | {
    "vocabulary": 80, "context": 16, "head_width": 8, "teacher_width": 16, "teacher_layers": 1,
    "teacher_steps": 12, "teacher_batch": 4, "student_width": 8, "student_layers": 1,
    "student_steps": 6, "student_batch": 4, "checks": 2}


def made_up_verses(count=200):
    words = "and the earth heaven light day night was good deep face".split()
    draw, weights = random.Random(0), range(1, len(words) + 1)
    return [" ".join(draw.choices(words, weights, k=8)) + "." for _ in range(count)]


@pytest.fixture(scope="module")
def tokens():
    return STUDY["encode"](STUDY["split_verses"](made_up_verses(), block=5), SMALL["vocabulary"])


@pytest.fixture(scope="module")
def teacher(tokens, tmp_path_factory):
    path = tmp_path_factory.mktemp("study") / "teacher.safetensors"
    first = STUDY["read_teacher"](path, tokens, SMALL, {"commit": None})
    again = STUDY["read_teacher"](path, tokens, SMALL, {"commit": None})
    assert all(torch.equal(value, again.state_dict()[name])
               for name, value in first.state_dict().items())
    with pytest.raises(SystemExit, match="the teacher of other tokens"):
        STUDY["read_teacher"](path, {"train": tokens["train"][:9]}, SMALL, {})
    return first


def test_another_text_is_refused(tmp_path):
    path = tmp_path / "other.txt"
    path.write_text("Ge1:1 In the beginning\n")
    with pytest.raises(SystemExit, match="another text than the study's: its sha256 is "):
        STUDY["read_verses"](path)
    assert STUDY["read_verses"](path, STUDY["checksum"](path.read_bytes())) == ["In the beginning"]


def test_each_verse_is_in_one_part():
    verses = list(map(str, range(2050)))
    parts = {name: text.split() for name, text in STUDY["split_verses"](verses).items()}
    assert sorted(sum(parts.values(), []), key=int) == verses
    assert parts["validation"] == [*verses[800:900], *verses[1800:1900]]
    assert parts["test"] == [*verses[900:1000], *verses[1900:2000]]


def test_no_place_sees_a_later_one(teacher, tokens):
    rows = tokens["test"][None, :16].clone()
    before = teacher(rows)
    rows[0, 9] = (rows[0, 9] + 1) % 80
    changed = (teacher(rows) != before).any(-1)[0]
    assert not changed[:9].any() and changed[9:].all()


def loss_by_hand(student, teacher, target):
    "Half the cross-entropy and half the divergence from teacher to student, of one token."
    def log_softmax(row):
        return [each - math.log(sum(map(math.exp, row))) for each in row]

    log_q, log_p = log_softmax(student), log_softmax(teacher)
    return 0.5 * -log_q[target] + 0.5 * sum(math.exp(p) * (p - q) for p, q in zip(log_p, log_q))


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_by_hand(teacher, tokens, method):
    student = STUDY["create_network"](SMALL, "student", 3)
    inputs, target = next(STUDY["draw"](tokens["train"], 16, 4, 0, 1))
    with torch.no_grad():
        logits, told = student(inputs).double(), 3 * teacher(inputs).double()
    made, changed = STUDY["lessons"](told, target, METHODS, SMALL["first"])
    loss = STUDY["create_loss"](method, SMALL)(logits, made[method], target)
    losses, moved = [], 0
    for row, above, right in zip(*(each.flatten(0, 1).tolist() for each in (logits, told)),
                                 target.flatten().tolist()):
        rank = 1 + sum(value > above[right] for value in above)
        if method == "kd+sort" or method == "kd+sort10" and rank <= 10:
            row_above = torch.tensor(above, dtype=torch.float64)
            above = sort_logits(row_above, torch.tensor(right)).tolist()
            moved += rank > 1
        losses.append(2 * loss_by_hand(row, row, right) if method == "ce"
                      else loss_by_hand(row, above, right))
    assert loss.item() == pytest.approx(sum(losses) / len(losses), rel=1e-12)
    assert changed[method] == moved / len(losses) and (moved > 0) == ("sort" in method)
    if method == "kd+sort":
        whole = DistillationLoss("kd+sort", temperature=1, ce_weight=0.5, kd_weight=0.5)
        assert loss.item() == pytest.approx(whole(logits, told, target).item(), rel=1e-14)
        assert 0 < changed["kd+sort10"] < changed["kd+sort"]


def test_what_is_measured_on_the_test_text():
    "A network that is sure of the next token in three of four places, and is right there."
    rows = torch.tensor([0, 1, 2, 3] * 8 + [0])

    class Sure(torch.nn.Module):
        def forward(self, inputs):
            probability = torch.full((*inputs.shape, 4), 0.1)
            likely = torch.where(inputs == 3, 1, (inputs + 1) % 4)  # after 3 it is wrong
            return probability.scatter(-1, likely[..., None], 0.7).log()

    found = STUDY["evaluate"](Sure(), rows, 8)
    assert found["top1"] == 0.75 and found["ece"] == pytest.approx(0.05, abs=1e-6)
    assert found["loss"] == pytest.approx(-(3 * math.log(0.7) + math.log(0.1)) / 4, rel=1e-6)
    assert found["entropy"] == pytest.approx(-0.7 * math.log(0.7) - 0.3 * math.log(0.1), rel=1e-6)


def records(path):
    "By seed and method, without what differs from time to time."
    found = {(each["seed"], each["method"]): each
             for each in map(json.loads, path.read_text().splitlines())}
    for each in found.values():
        for name in ("began", "ended", "seconds", "together"):
            each.pop(name)
    return found


def test_the_same_numbers_twice_and_no_run_twice(teacher, tokens, tmp_path):
    "A command that is given again trains what is missing, with the numbers of all at once."
    once, parts, known = tmp_path / "once.jsonl", tmp_path / "parts.jsonl", {"text_sha256": "a"}
    STUDY["run"](teacher, tokens, SMALL, (0, 1), METHODS, once, known)
    STUDY["run"](teacher, tokens, SMALL, (0,), ["ce", "kd+sort"], parts, known)
    for _ in range(2):
        STUDY["run"](teacher, tokens, SMALL, (0, 1), METHODS, parts, known)
        assert len(parts.read_text().splitlines()) == 8
    assert records(once) == records(parts)
    first = records(once)[0, "kd"]
    losses = {each["test"]["loss"] for each in records(once).values()}
    assert len(losses) == 8 and list(first["validation_loss"]) == ["3", "6"]
    STUDY["run"](teacher, tokens, SMALL | {"student_steps": 2}, (0,), ["ce"], once, known)
    assert len(once.read_text().splitlines()) == 9


def test_the_teacher_of_the_study_is_the_one_that_its_records_name():
    content = (ROOT / "teachers" / "tokens" / "teacher.safetensors").read_bytes()
    assert {each["teacher_sha256"] for each in RUNS} == {hashlib.sha256(content).hexdigest()}
    assert len(content) <= 16e6


def test_the_answer_that_readers_see_is_what_the_records_say():
    scores = {}
    for run in RUNS:
        scores.setdefault(run["method"], {})[run["seed"]] = -run["test"]["loss"]
    assert {method: sorted(each) for method, each in scores.items()} == dict.fromkeys(METHODS, [*range(8)])
    scores = {method: [each[seed] for seed in range(8)] for method, each in scores.items()}
    page = (ROOT / "results" / "README.md").read_text().partition("### A small language model")[2]
    for first, second in (("kd+sort", "kd"), ("kd+sort10", "kd"), ("kd", "ce")):
        row, = compare(scores, first, second, smallest_effect=0.05).itertuples()
        shown = f"8 of 8 | {row.mean:+.4f} | {row.low:+.4f} to {row.high:+.4f} | {row.verdict}"
        assert shown.replace("-", "−") in page
