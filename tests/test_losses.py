"Objectives: every golden that belongs to them, shapes beyond (N, C), and what is refused."
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sortkd.losses import create_method, dkd_loss, kd_loss, list_methods, standardize
from sortkd.sorting import sort_logits, swap_logits

GOLDENS = {name: torch.from_numpy(value) for name, value in np.load(Path(__file__).parent / "goldens" / "losses.npz").items()}
STUDENT, TEACHER, TARGET = GOLDENS["zs"], GOLDENS["zt"], GOLDENS["y"]
SORTED = sort_logits(TEACHER, TARGET)


def cases():
    for temperature in (1, 2, 4):
        for middle, teacher in (("", TEACHER), ("_sort", SORTED)):
            yield f"kd{middle}_T{temperature}", lambda z, t=teacher, T=temperature: kd_loss(z, t, T)
            yield f"lskd{middle}_T{temperature}", lambda z, t=teacher, T=temperature: kd_loss(standardize(z), standardize(t), T)
    for beta in (0.5, 2, 6, 8):
        yield f"dkd_a1_b{beta}_T4", lambda z, b=beta: dkd_loss(z, TEACHER, TARGET, beta=b)
        yield f"dkd_sort_a1_b{beta}_T4", lambda z, b=beta: dkd_loss(z, SORTED, TARGET, beta=b)
        yield f"dkd_lskd_a1_b{beta}_T2", lambda z, b=beta: dkd_loss(standardize(z), standardize(TEACHER), TARGET, beta=b, temperature=2.0)


@pytest.mark.parametrize("name,objective", list(cases()), ids=lambda value: value if isinstance(value, str) else "")
def test_golden(name, objective):
    student = STUDENT.clone().requires_grad_()
    loss = objective(student)
    gradient, = torch.autograd.grad(loss, student)
    for ours, golden, tolerance in ((loss.detach(), GOLDENS[name], 1e-5), (gradient, GOLDENS[f"{name}_grad"], 1e-4)):
        assert (ours - golden).norm() / golden.norm() < tolerance


def test_golden_repairs():
    assert torch.equal(SORTED, GOLDENS["sort"]) and torch.equal(swap_logits(TEACHER, TARGET), GOLDENS["swap"])
    assert (standardize(TEACHER) - GOLDENS["standardize"]).norm() / GOLDENS["standardize"].norm() < 1e-5


def test_temperature_may_be_learned():
    temperature = torch.tensor(4.0, requires_grad=True)
    kd_loss(STUDENT, TEACHER, temperature).backward()
    step = 1e-2
    numeric = (kd_loss(STUDENT.double(), TEACHER.double(), 4 + step) - kd_loss(STUDENT.double(), TEACHER.double(), 4 - step)) / (2 * step)
    assert abs(temperature.grad - numeric) < 1e-3 * abs(numeric)


def test_token_sequences_average_over_all_tokens():
    student, teacher, target = STUDENT.view(4, 4, 100), TEACHER.view(4, 4, 100), TARGET.view(4, 4)
    torch.testing.assert_close(kd_loss(student, teacher), kd_loss(STUDENT, TEACHER))
    torch.testing.assert_close(dkd_loss(student, teacher, target), dkd_loss(STUDENT, TEACHER, TARGET))


@pytest.mark.parametrize("name", list_methods())
def test_every_method_trains(name):
    method = create_method(name)
    student = STUDENT.clone().requires_grad_()
    optimizer = torch.optim.SGD([student], lr=1.0)
    losses = []
    for _ in range(20):
        repaired = method.repair_logits(TEACHER, TARGET) if method.uses_teacher else None
        loss = method.loss(student, repaired, TARGET, epoch=20)
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        losses.append(loss.item())
    assert all(np.isfinite(losses)) and losses[-1] < losses[0]


def test_weights_and_warm_up():
    repaired = SORTED
    dkd = create_method("dkd+sort", beta=6.0)
    for epoch, ramp in ((1, 1 / 20), (20, 1.0), (100, 1.0)):
        expected = F.cross_entropy(STUDENT, TARGET) + ramp * dkd_loss(STUDENT, repaired, TARGET, beta=6.0)
        torch.testing.assert_close(dkd.loss(STUDENT, repaired, TARGET, epoch), expected)
    kd = create_method("kd", temperature=2.0, kd_weight=3.0)
    torch.testing.assert_close(kd.loss(STUDENT, TEACHER, TARGET, 1), 0.1 * F.cross_entropy(STUDENT, TARGET) + 3 * kd_loss(STUDENT, TEACHER, 2.0))


@pytest.mark.parametrize("call,words", [
    (lambda: kd_loss(STUDENT, TEACHER[:8]), r"\(8, 100\)"),
    (lambda: kd_loss(STUDENT[0], TEACHER[0]), r"\(100,\)"),
    (lambda: kd_loss(STUDENT[:, :1], TEACHER[:, :1]), "two classes"),
    (lambda: kd_loss(STUDENT, TEACHER, 0.0), "temperature"),
    (lambda: kd_loss(STUDENT, TEACHER, float("nan")), "temperature"),
    (lambda: dkd_loss(STUDENT, TEACHER, TARGET[:3]), r"\(3,\)"),
    (lambda: standardize(torch.zeros(4, 1)), "two classes"),
    (lambda: create_method("kd+sorted"), "kd\\+sort"),
    (lambda: create_method("ce+sort"), "no method"),
    (lambda: create_method("kd", beta=1.0), "beta"),
])
def test_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("outside", [-1, 100])
def test_dkd_refuses_a_target_out_of_range(outside):
    target = TARGET.clone()
    target[3] = outside
    with pytest.raises(ValueError, match=str(outside)):
        dkd_loss(STUDENT, TEACHER, target)
