"Repairs: the goldens, what each promises in every precision, rows that are special, and what is refused."
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import needs_cifar100
from special_logits import INTEGERS
from test_losses import GOLDENS as OF_LOSSES
from test_losses import SORTED, STUDENT, TARGET, TEACHER
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from sortkd.train.images import load_cifar100
from sortkd.train.augmentation import normalize
from sortkd.losses import kd_loss
from sortkd.methods import REPAIRS
from sortkd.repairs import revise_logits, skip_logits, smooth_logits
from sortkd.sorting import swap_logits
from sortkd.train.teachers import load_teacher
from sortkd.topk import sort_topk

ROOT = Path(__file__).parent.parent
GOLDENS = {name: torch.from_numpy(value) for name, value in np.load(Path(__file__).parent / "goldens" / "repairs.npz").items()}
WRONG = TEACHER.argmax(1) != TARGET  # six of sixteen rows


def mft(logits, target, threshold, temperature):
    return revise_logits(logits, target, 1 - threshold, temperature, right_rows=True)


DISTRIBUTIONS = {
    "revision_probs_eta0.8": (revise_logits(TEACHER, TARGET), 1),
    "mft_all_probs_thr0.2_T1": (mft(TEACHER, TARGET, 0.2, 1), 1),
    "mft_all_probs_thr0.2_T4": (mft(TEACHER, TARGET, 0.2, 4), 4),
    "mft_all_probs_thr0.05_T4": (mft(TEACHER, TARGET, 0.05, 4), 4),
    "loca_probs_a0.95_T4": (revise_logits(TEACHER, TARGET, 0.95, 4), 4),
    "ka_lsr_probs_c0.9_T1": (smooth_logits(TEACHER, TARGET), 1),
    "ka_lsr_probs_c0.9_T4": (smooth_logits(TEACHER, TARGET, 0.9, 4), 4),
    "ka_ps_probs_T4": (swap_logits(TEACHER, TARGET), 4),
}
LOSSES = {
    "mft_all_thr0.2_T4": (mft(TEACHER, TARGET, 0.2, 4), 4),
    "sort_mft_all_thr0.2_T4": (mft(SORTED, TARGET, 0.2, 4), 4),
    "mft_wrong_thr0.1_T1": (revise_logits(TEACHER, TARGET, 0.9), 1),
    "loca_a0.95_T4": (revise_logits(TEACHER, TARGET, 0.95, 4), 4),
    "ka_lsr_c0.9_kl_T4": (smooth_logits(TEACHER, TARGET, 0.9, 4), 4),
}


def test_goldens():
    assert set(GOLDENS) == {*DISTRIBUTIONS, *LOSSES, *(f"{name}_grad" for name in LOSSES)}
    for name, (repaired, temperature) in DISTRIBUTIONS.items():
        ours = torch.softmax(repaired / temperature, 1)
        assert (ours - GOLDENS[name]).norm() / GOLDENS[name].norm() < 1e-5, name
    for name, (repaired, temperature) in LOSSES.items():
        student = STUDENT.clone().requires_grad_()
        loss = kd_loss(student, repaired, temperature)
        gradient, = torch.autograd.grad(loss, student)
        assert abs(loss - GOLDENS[name]) / GOLDENS[name] < 1e-5, name
        assert (gradient - GOLDENS[f"{name}_grad"]).norm() / GOLDENS[f"{name}_grad"].norm() < 1e-4, name
    assert torch.equal(swap_logits(TEACHER, TARGET), OF_LOSSES["swap"])


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("eta", [0.5, 0.8, 0.95])
def test_label_revision_loca_and_mft_are_one_formula(eta, temperature):
    "Each written as in its paper, in float64; the label wins by 1 - eta."
    p = torch.softmax(TEACHER.double() / temperature, 1)
    own, top, label = p.gather(1, TARGET[:, None]), p.amax(1, keepdim=True), F.one_hot(TARGET, 100)
    beta = eta / (top - own + 1)
    share = (top - own + (1 - eta)) / (1 + top - own)
    loca = (beta * p).scatter(1, TARGET[:, None], 1 - beta * (1 - own))
    ours = torch.softmax(revise_logits(TEACHER.double(), TARGET, eta, temperature) / temperature, 1)
    for theirs in (beta * p + (1 - beta) * label, loca, (1 - share) * p + share * label):
        torch.testing.assert_close(ours[WRONG], theirs[WRONG], rtol=1e-12, atol=1e-15)
    lead = ours.gather(1, TARGET[:, None]) - ours.scatter(1, TARGET[:, None], 0).amax(1, keepdim=True)
    torch.testing.assert_close(lead[WRONG], torch.full((6, 1), 1 - eta, dtype=torch.float64))


def some_rows(dtype, scale):
    "Rows without ties, a third of them right; and as many in which some values are infinite, or one is NaN."
    generator = torch.Generator().manual_seed(0)
    rows = (torch.stack([torch.randperm(40, generator=generator) for _ in range(90)])[:, :9] - 20.0).div(8).mul(scale).to(dtype)
    target = torch.randint(9, (90,), generator=generator)
    target[:30] = rows[:30].argmax(1)
    special = rows.clone()
    for place, value in enumerate((torch.inf, -torch.inf, torch.nan)):
        special[place::6, (place + 3) % 9] = value
        special[place + 3 :: 6, : 2 + place] = value
    return torch.cat([rows, special]), torch.cat([target, target])


CHANGES_VALUES = ("smooth", "revise", "loca", "mft")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [1, 1000])
@pytest.mark.parametrize("name", [name for name in REPAIRS if name not in ("none", "skip")])
def test_what_repairs_promise(name, scale, dtype):
    logits, target = some_rows(dtype, scale)
    settings = {"temperature": 4.0} if name in CHANGES_VALUES else {}
    repaired, y = REPAIRS[name](logits, target, **settings), target[:, None]
    assert repaired.dtype == dtype and repaired.shape == logits.shape
    wrong, top = logits.amax(1) > logits.gather(1, y)[:, 0], logits.amax(1)
    untouched = torch.zeros_like(wrong) if name == "mft" else ~wrong  # the rows that are right, or hold a NaN
    untouched |= logits.isnan().any(1)
    if name in CHANGES_VALUES:
        untouched |= ~top.isfinite()
    assert torch.equal(repaired[untouched].nan_to_num(123.0), logits[untouched].nan_to_num(123.0))
    before, after, y = logits[~untouched], repaired[~untouched], y[~untouched]
    assert len(after) > 60 and torch.equal(after.gather(1, y)[:, 0], after.amax(1)) and not after.isnan().any()
    if name in ("sort", "swap"):
        assert torch.equal(before.sort(1).values, after.sort(1).values)
    else:
        total = torch.softmax(after.float() / 4, 1).sum(1)
        torch.testing.assert_close(total, torch.ones_like(total))
    others = torch.ones_like(before, dtype=torch.bool).scatter(1, y, False)
    first, second = (each[others].view(len(y), -1) for each in (before, after))
    if name in ("revise", "loca", "mft"):
        assert torch.equal(first, second)
    elif name == "sort":  # -inf can be there several times
        assert (second.gather(1, first.argsort(dim=1, descending=True, stable=True)).diff(dim=1).nan_to_num(0.0) <= 0).all()
    elif name == "smooth":
        assert torch.equal(second, torch.zeros_like(first).masked_fill(first == -torch.inf, -torch.inf))
    else:  # of all others only the mistake has moved
        assert ((first != second).sum(1) == 1).all() and torch.equal((first != second).int().argmax(1), first.argmax(1))


@pytest.mark.parametrize("name", [name for name in REPAIRS if name != "skip"])
def test_a_class_at_minus_infinity_is_as_if_it_were_not_there(name):
    present = torch.tensor([True, True, False, True, True, True, False, True])
    logits, target = TEACHER[:, :8], torch.tensor([0, 1, 3, 4]).repeat(4)
    masked = logits.masked_fill(~present, -torch.inf).requires_grad_()
    for settings in ({}, {"temperature": 4.0}) if name in CHANGES_VALUES else ({},):
        repaired = REPAIRS[name](masked, target, **settings)
        assert (repaired[:, ~present] == -torch.inf).all()
        torch.testing.assert_close(repaired[:, present], REPAIRS[name](logits[:, present], (present.cumsum(0) - 1)[target], **settings))
        assert torch.autograd.grad(repaired[:, present].sum(), masked)[0].isfinite().all()


@pytest.mark.parametrize("name", CHANGES_VALUES)
@pytest.mark.parametrize("temperature", [1.0, 100.0, 1e5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_where_there_is_no_room_above(name, temperature, dtype):
    "The target's logit rises by a multiple of the temperature, but never to infinity."
    highest = torch.full((3, 4), torch.finfo(dtype).max, dtype=dtype).scatter(1, torch.tensor([[0], [1], [2]]), 0)
    repaired = REPAIRS[name](highest, torch.arange(3), temperature=temperature)
    assert repaired.isfinite().all() and torch.equal(repaired.gather(1, torch.arange(3)[:, None])[:, 0], repaired.amax(1))


def with_topk(values, target, ignore_index=-100):
    "`sort_topk`, with insertion, of the ten highest."
    return torch.cat([each.to(values.dtype) for each in sort_topk(*values.topk(10), target, insert=True, ignore_index=ignore_index)], 1)


FUNCTIONS = {name: repair for name, repair in REPAIRS.items() if name != "none"} | {"top-k": with_topk}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_targets_of_every_integer_type(name, dtype):
    "Each class as it is written: 156 in uint8 is not -100. Rows of `ignore_index` come back, whichever it is."
    repair, logits = FUNCTIONS[name], torch.randn(64, 200, generator=torch.Generator().manual_seed(0))
    target = torch.arange(64) + (100 if dtype == torch.uint8 else 0)  # with 156
    logits[torch.arange(0, 64, 2), target[::2]] = 9.0  # half the rows are right
    assert torch.equal(repair(logits, target.to(dtype)), repair(logits, target))
    as_they_are = logits if name != "top-k" else torch.cat([each.float() for each in logits.topk(10)], 1)
    for ignored in (-100, 0, 40, 156):
        if not torch.iinfo(dtype).min <= ignored <= torch.iinfo(dtype).max:
            continue
        held = torch.where(torch.arange(64) < 32, target, ignored)
        expected = torch.cat([repair(logits[:32], target[:32]), as_they_are[32:]])
        different = target[:32] != ignored
        assert torch.equal(repair(logits, held.to(dtype), ignore_index=ignored)[32:], expected[32:])
        assert torch.equal(repair(logits, held.to(dtype), ignore_index=ignored)[:32][different], expected[:32][different])
    if dtype == torch.uint64 and name != "top-k":
        with pytest.raises(ValueError, match="target holds"):
            repair(logits, target.masked_fill(target == 3, -100).to(dtype))


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.filterwarnings("ignore")
def test_no_trace_holds_on_to_values(name):
    "Traced where all rows are right, and run where most are wrong, on another number of rows; above 4,096 elements."
    repair = FUNCTIONS[name]

    def function(logits, target):
        return repair(logits, target)

    logits, target = TEACHER.repeat(4, 1), TARGET.repeat(4)
    right, expected = torch.eye(64, 100), repair(logits, target)
    assert torch.equal(torch.jit.trace(function, (right, torch.arange(64)))(logits[:50], target[:50]), expected[:50])
    for mode in ("real", "symbolic"):
        assert torch.equal(make_fx(function, tracing_mode=mode)(right, torch.arange(64))(logits, target), expected)
    by_halves = logits.view(2, 32, 100), target.view(2, 32)
    assert torch.equal(torch.vmap(function)(*by_halves).flatten(0, 1), expected)
    fake = FakeTensorMode()
    for elsewhere in (lambda each: each.to("meta"), fake.from_tensor):
        result = function(elsewhere(logits), elsewhere(target))
        assert result.shape == expected.shape and type(result) is type(elsewhere(logits))


def test_right_rows_gain_the_threshold_in_mft():
    right = ~WRONG
    for temperature in (1.0, 4.0):
        before, after = (torch.softmax(each / temperature, 1) for each in (TEACHER, mft(TEACHER, TARGET, 0.2, temperature)))
        own, raised = (each.gather(1, TARGET[:, None])[right] for each in (before, after))
        torch.testing.assert_close(raised, (own + 0.2).clamp(max=1.0), rtol=0, atol=1e-5)
    sure = torch.tensor([[400.0, 1.0, 0.0]])  # nothing is left to gain
    assert torch.equal(mft(sure, torch.tensor([0]), 0.2, 1.0), sure)


SPECIAL_ROWS = torch.tensor([
    [3., 5., 5., 1.],  # the target ties with the top: right
    [float("nan"), 9., 5., 1.],
    [2., 7., 1., 7.],  # padding
    [float("inf"), 1., 2., 3.],
    [float("-inf"), 4., float("-inf"), 1.],
    [1., 6., 2., 6.],  # two classes share the top
])
SPECIAL_TARGET = torch.tensor([1, 2, -100, 1, 2, 0])


@pytest.mark.parametrize("repair", [revise_logits, smooth_logits, REPAIRS["mft"]])
def test_special_rows(repair):
    repaired, same = repair(SPECIAL_ROWS, SPECIAL_TARGET), torch.tensor([repair is not REPAIRS["mft"], True, True, True, False, False])
    assert torch.equal(repaired[same].nan_to_num(0.5), SPECIAL_ROWS[same].nan_to_num(0.5))
    assert torch.equal(repaired[~same].argmax(1), SPECIAL_TARGET[~same]) and repaired[5].isfinite().all()
    skipped = skip_logits(SPECIAL_ROWS, SPECIAL_TARGET)
    assert (skipped.amax(1) == -torch.inf).tolist() == [False, False, False, True, True, True]
    assert torch.equal(skipped[:3].nan_to_num(0.5), SPECIAL_ROWS[:3].nan_to_num(0.5))


@pytest.mark.parametrize("name", ["revise", "mft", "smooth", "skip"])
def test_repairs_of_any_layout_and_type(name):
    repair = REPAIRS[name]
    expected = repair(TEACHER, TARGET)
    assert torch.equal(repair(TEACHER.T, TARGET, dim=0).T, expected)
    assert torch.equal(repair(TEACHER.view(4, 4, 100), TARGET.view(4, 4)).view(16, 100), expected)
    assert torch.equal(repair(TEACHER[0], TARGET[0]), expected[0])
    assert torch.equal(torch.compile(repair, fullgraph=True, backend="aot_eager")(TEACHER, TARGET), expected)
    for dtype in (torch.float16, torch.bfloat16):
        for scale in (1, 2000):  # computed in float32 and rounded once
            logits = (TEACHER * scale).to(dtype)
            assert torch.equal(repair(logits, TARGET), repair(logits.float(), TARGET).to(dtype))


@pytest.mark.parametrize("settings", [{}, {"eta": 0.95, "temperature": 4.0}, {"right_rows": True}])
def test_revise_gradient(settings):
    logits = TEACHER[:6, :9].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: revise_logits(z, torch.arange(6), **settings), logits)


@needs_cifar100
def test_the_stored_outputs_are_the_networks():
    stored = {name: torch.from_numpy(value) for name, value in np.load(ROOT / "nbs" / "assets" / "teacher_logits.npz").items()}
    cifar, count = load_cifar100(download=False), 100
    assert torch.equal(cifar.train_targets[: len(stored["target"])], stored["target"].long())
    files = {
        "ResNet-56, 10 epochs": "teachers/resnet56-cifar100-10epochs", "ResNet-20, 30 epochs": "teachers/resnet20-cifar100-30epochs",
        "ResNet-20, 240 epochs": "teachers/resnet20-cifar100",
        "student": "results/students/r56_r20-kd+sort-seed0",
    }
    for name, file in files.items():
        network = load_teacher(ROOT / f"{file}.safetensors", "resnet56" if "56" in name else "resnet20", 100).model
        with torch.inference_mode():
            ours = network(normalize(cifar.train_images[:count], cifar.mean, cifar.std))
        assert (ours - stored[name][:count]).abs().max() < 0.02


@pytest.mark.parametrize("call,words", [
    (lambda: revise_logits(TEACHER, TARGET, eta=1.0), "eta"),
    (lambda: revise_logits(TEACHER, TARGET, temperature=0.0), "temperature must be"),
    (lambda: revise_logits(TEACHER, TARGET[:3]), r"\(3,\)"),
    (lambda: smooth_logits(TEACHER, TARGET, confidence=0.01), "between 1 / 100 and 1"),
    (lambda: smooth_logits(TEACHER, TARGET, temperature=-1.0), "temperature must be"),
    (lambda: skip_logits(TEACHER, TARGET + 100), "target holds"),
])
def test_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
