"Repairs: the goldens, what each promises in every precision, special rows, and what is refused."
import numpy as np
import pytest
import torch
from conftest import ROOT, needs_cifar100
from special_logits import INTEGERS
from test_losses import SORTED, STUDENT, TARGET, TEACHER
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from sortkd.losses import kd_loss
from sortkd.methods import REPAIRS
from sortkd.repairs import revise_logits, skip_logits, smooth_logits
from sortkd.sorting import sort_topk, swap_logits
from sortkd.train.augmentation import normalize
from sortkd.train.images import load_cifar100
from sortkd.train.teachers import load_teacher

GOLDENS = {name: torch.from_numpy(value).double()
           for name, value in np.load(ROOT / "tests" / "goldens" / "repairs.npz").items()}
WRONG = TEACHER.argmax(1) != TARGET  # six of sixteen rows
CHANGES_VALUES = ("smooth", "revise", "loca", "mft")


def mft(logits, threshold, temperature):
    return revise_logits(logits, TARGET, 1 - threshold, temperature, right_rows=True)


DISTRIBUTIONS = {"revision_probs_eta0.8": (revise_logits(TEACHER, TARGET), 1),
                 "mft_all_probs_thr0.2_T1": (mft(TEACHER, 0.2, 1), 1),
                 "mft_all_probs_thr0.2_T4": (mft(TEACHER, 0.2, 4), 4),
                 "mft_all_probs_thr0.05_T4": (mft(TEACHER, 0.05, 4), 4),
                 "loca_probs_a0.95_T4": (revise_logits(TEACHER, TARGET, 0.95, 4), 4),
                 "ka_lsr_probs_c0.9_T1": (smooth_logits(TEACHER, TARGET), 1),
                 "ka_lsr_probs_c0.9_T4": (smooth_logits(TEACHER, TARGET, 0.9, 4), 4),
                 "ka_ps_probs_T4": (swap_logits(TEACHER, TARGET), 4)}
LOSSES = {
    "mft_all_thr0.2_T4": (mft(TEACHER, 0.2, 4), 4),
    "sort_mft_all_thr0.2_T4": (mft(SORTED, 0.2, 4), 4),
    "mft_wrong_thr0.1_T1": (revise_logits(TEACHER, TARGET, 0.9), 1),
    "loca_a0.95_T4": (revise_logits(TEACHER, TARGET, 0.95, 4), 4),
    "ka_lsr_c0.9_kl_T4": (smooth_logits(TEACHER, TARGET, 0.9, 4), 4)}


def assert_golden(ours, name):
    assert (ours - GOLDENS[name]).norm() / GOLDENS[name].norm() < 2e-6, name


def test_goldens():
    assert set(GOLDENS) == {*DISTRIBUTIONS, *LOSSES, *(f"{name}_grad" for name in LOSSES)}
    for name, (repaired, temperature) in DISTRIBUTIONS.items():
        assert_golden(torch.softmax(repaired / temperature, 1), name)
    for name, (repaired, temperature) in LOSSES.items():
        student = STUDENT.clone().requires_grad_()
        loss = kd_loss(student, repaired, temperature)
        assert_golden(loss.detach(), name)
        assert_golden(torch.autograd.grad(loss, student)[0], f"{name}_grad")


def some_rows(dtype, scale):
    "Rows without ties, a third of them right; and as many with some infinities, or a NaN."
    generator = torch.Generator().manual_seed(0)
    rows = torch.stack([torch.randperm(40, generator=generator) for _ in range(90)])[:, :9]
    rows = (rows - 20.0).div(8).mul(scale).to(dtype)
    target = torch.randint(9, (90,), generator=generator)
    target[:30] = rows[:30].argmax(1)
    special = rows.clone()
    for place, value in enumerate((torch.inf, -torch.inf, torch.nan)):
        special[place::6, (place + 3) % 9] = value
        special[place + 3 :: 6, : 2 + place] = value
    return torch.cat([rows, special]), torch.cat([target, target])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [1, 1000])
@pytest.mark.parametrize("name", [name for name in REPAIRS if name not in ("none", "skip")])
def test_what_repairs_promise(name, scale, dtype):
    logits, target = some_rows(dtype, scale)
    settings = {"temperature": 4.0} if name in CHANGES_VALUES else {}
    repaired, y = REPAIRS[name](logits, target, **settings), target[:, None]
    assert repaired.dtype == dtype and repaired.shape == logits.shape
    top = logits.amax(1)
    same = logits.isnan().any(1) | (top == logits.gather(1, y)[:, 0] if name != "mft" else False)
    if name in CHANGES_VALUES:
        same |= ~top.isfinite()
    assert torch.equal(repaired[same].nan_to_num(123.0), logits[same].nan_to_num(123.0))
    before, after, y = logits[~same], repaired[~same], y[~same]
    assert len(after) > 60 and not after.isnan().any()
    assert torch.equal(after.gather(1, y)[:, 0], after.amax(1))
    if name in ("sort", "swap"):
        assert torch.equal(before.sort(1).values, after.sort(1).values)
    others = torch.ones_like(before, dtype=torch.bool).scatter(1, y, False)
    first, second = (each[others].view(len(y), -1) for each in (before, after))
    if name in ("revise", "loca", "mft"):
        assert torch.equal(first, second)
    elif name == "sort":  # -inf can be there several times
        order = first.argsort(dim=1, descending=True, stable=True)
        assert (second.gather(1, order).diff(dim=1).nan_to_num(0.0) <= 0).all()
    elif name == "smooth":
        masked = first == -torch.inf
        assert torch.equal(second, torch.zeros_like(first).masked_fill(masked, -torch.inf))
    else:  # of all others only the mistake has moved
        moved = first != second
        assert (moved.sum(1) == 1).all() and torch.equal(moved.int().argmax(1), first.argmax(1))


@pytest.mark.parametrize("name", [name for name in REPAIRS if name != "skip"])
def test_a_class_at_minus_infinity_is_as_if_it_were_not_there(name):
    present = torch.tensor([True, True, False, True, True, True, False, True])
    logits, target = TEACHER[:, :8], torch.tensor([0, 1, 3, 4]).repeat(4)
    masked = logits.masked_fill(~present, -torch.inf).requires_grad_()
    for settings in ({}, {"temperature": 4.0}) if name in CHANGES_VALUES else ({},):
        repaired = REPAIRS[name](masked, target, **settings)
        alone = REPAIRS[name](logits[:, present], (present.cumsum(0) - 1)[target], **settings)
        assert (repaired[:, ~present] == -torch.inf).all()
        torch.testing.assert_close(repaired[:, present], alone)
        assert torch.autograd.grad(repaired[:, present].sum(), masked)[0].isfinite().all()


@pytest.mark.parametrize("name", CHANGES_VALUES)
@pytest.mark.parametrize("temperature", [1.0, 1e5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_where_there_is_no_room_above(name, temperature, dtype):
    "The target's logit rises by a multiple of the temperature, but never to infinity."
    y = torch.tensor([[0], [1], [2]])
    highest = torch.full((3, 4), torch.finfo(dtype).max, dtype=dtype).scatter(1, y, 0)
    repaired = REPAIRS[name](highest, y[:, 0], temperature=temperature)
    assert repaired.isfinite().all() and torch.equal(repaired.gather(1, y)[:, 0], repaired.amax(1))


def with_topk(values, target, ignore_index=-100):
    both = sort_topk(*values.topk(10), target, insert=True, ignore_index=ignore_index)
    return torch.cat([each.to(values.dtype) for each in both], 1)


FUNCTIONS = {name: REPAIRS[name] for name in REPAIRS if name != "none"} | {"top-k": with_topk}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_targets_of_every_integer_type(name, dtype):
    "Each class as it is written: 156 in uint8 is not -100. Rows of `ignore_index` come back."
    generator, repair = torch.Generator().manual_seed(0), FUNCTIONS[name]
    logits = torch.randn(64, 200, generator=generator)
    target = torch.arange(64) + (100 if dtype == torch.uint8 else 0)  # with 156
    logits[torch.arange(0, 64, 2), target[::2]] = 9.0  # half the rows are right
    repaired = repair(logits, target)
    assert torch.equal(repair(logits, target.to(dtype)), repaired)
    as_they_are = logits
    if name == "top-k":
        as_they_are = torch.cat([each.float() for each in logits.topk(10)], 1)
    for ignored in (-100, 0, 40, 156):
        if torch.iinfo(dtype).min <= ignored <= torch.iinfo(dtype).max:
            held = torch.where(torch.arange(64) < 32, target, ignored)
            expected = torch.where(held[:, None] == ignored, as_they_are, repaired)
            assert torch.equal(repair(logits, held.to(dtype), ignore_index=ignored), expected)
    if dtype == torch.uint64 and name != "top-k":
        with pytest.raises(ValueError, match="target holds"):
            repair(logits, target.masked_fill(target == 3, -100).to(dtype))


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.filterwarnings("ignore")
def test_no_trace_holds_on_to_values(name):
    "Traced where all rows are right, and run where most are wrong, on another number of rows."
    def function(logits, target):
        return FUNCTIONS[name](logits, target)

    logits, target = TEACHER.float().repeat(4, 1), TARGET.repeat(4)  # above 4,096 elements
    right, expected = (torch.eye(64, 100), torch.arange(64)), function(logits, target)
    assert torch.equal(torch.jit.trace(function, right)(logits[:50], target[:50]), expected[:50])
    for mode in ("real", "symbolic"):
        assert torch.equal(make_fx(function, tracing_mode=mode)(*right)(logits, target), expected)
    by_halves = torch.vmap(function)(logits.view(2, 32, 100), target.view(2, 32))
    assert torch.equal(by_halves.flatten(0, 1), expected)
    fake = FakeTensorMode()
    for elsewhere in (lambda each: each.to("meta"), fake.from_tensor):
        result = function(elsewhere(logits), elsewhere(target))
        assert result.shape == expected.shape and type(result) is type(elsewhere(logits))


def test_mft_where_nothing_is_left_to_gain():
    sure = torch.tensor([[400.0, 1.0, 0.0]])
    assert torch.equal(REPAIRS["mft"](sure, torch.tensor([0])), sure)


@pytest.mark.parametrize("name", [name for name in REPAIRS if name != "none"])
def test_any_layout_and_type(name):
    repair, expected = REPAIRS[name], REPAIRS[name](TEACHER, TARGET)
    assert torch.equal(repair(TEACHER.T, TARGET, dim=0).T, expected)
    maps = repair(TEACHER.view(4, 2, 2, 100).movedim(-1, 1), TARGET.view(4, 2, 2), dim=1)
    assert torch.equal(maps.movedim(1, -1).reshape(16, 100), expected)
    assert torch.equal(repair(TEACHER[0], TARGET[0]), expected[0])
    compiled = torch.compile(repair, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(TEACHER, TARGET), expected)
    for view in (TEACHER[:, ::2], TEACHER[:1].expand(16, 100), TEACHER[:, :1], TEACHER[:0]):
        labels, before = TARGET[: len(view)] % view.shape[1], view.clone()
        assert torch.equal(repair(view, labels), repair(before, labels))
        assert torch.equal(view, before)
    right = torch.eye(100)
    assert repair(right, torch.arange(100)).data_ptr() != right.data_ptr()
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
    stored = np.load(ROOT / "nbs" / "assets" / "teacher_logits.npz")
    cifar, count = load_cifar100(download=False), 100
    assert np.array_equal(cifar.train_targets[: len(stored["target"])], stored["target"])
    for name, file in {"ResNet-56, 10 epochs": "teachers/resnet56-cifar100-10epochs",
                       "ResNet-20, 30 epochs": "teachers/resnet20-cifar100-30epochs",
                       "ResNet-20, 240 epochs": "teachers/resnet20-cifar100",
                       "student": "results/students/r56_r20-kd+sort-seed0"}.items():
        architecture = "resnet56" if "56" in name else "resnet20"
        network = load_teacher(ROOT / f"{file}.safetensors", architecture, 100).model
        with torch.inference_mode():
            ours = network(normalize(cifar.train_images[:count], cifar.mean, cifar.std))
        assert np.abs(ours - stored[name][:count]).max() < 0.02


@pytest.mark.parametrize("call,words", [
    (lambda: revise_logits(TEACHER, TARGET, eta=1.0), "eta"),
    (lambda: revise_logits(TEACHER, TARGET, temperature=0.0), "temperature must be"),
    (lambda: revise_logits(TEACHER, TARGET[:3]), r"\(3,\)"),
    (lambda: smooth_logits(TEACHER, TARGET, confidence=0.01), "between 1 / 100 and 1"),
    (lambda: skip_logits(TEACHER, TARGET + 100), "target holds")])
def test_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
