"""Masked classes, half precision, integer types and whole vocabularies, for every objective with every repair.

A class whose logit is -inf is masked. The value of a loss is then its limit as the logit falls, in float64; so are its gradients.
"""

import itertools

import pytest
import torch

from sortkd.methods import OBJECTIVES, REPAIRS, create_method, list_methods
from sortkd.sorting import sort_logits, swap_logits

FAR = -1e7  # for a limit in float64
WHO = ("teacher", "student", "both")
INTEGERS = [torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64]
STANDARDIZED = {"lskd", "lskd_dkd", "lskd_mlkd"}  # a masked class leaves no difference between the others


def logits_of(rows, classes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    student, teacher, strong_student, strong_teacher = (3 * torch.randn(rows, classes, generator=generator).double() for _ in range(4))
    target = torch.randint(classes - 2, (rows,), generator=generator)
    return [each.to(dtype) for each in (student, teacher, strong_student, strong_teacher)], target


def loss_of(name, logits, target, mask=None):
    "The loss and the student's gradient. `mask`: who, and the value of the last two classes, which are no row's target."
    method = create_method(name)
    student, teacher, strong_student, strong_teacher = (each.clone() for each in logits)
    if mask:
        who, value = mask
        for each in [*([teacher, strong_teacher] if who != "student" else []), *([student, strong_student] if who != "teacher" else [])]:
            each[:, -2:] = value
    student.requires_grad_()
    repaired = method.repair_logits(teacher, target) if method.uses_teacher else None
    strong = (strong_student, method.repair_logits(strong_teacher, target)) if method.strong_views else None
    loss = method.loss(student, repaired, target, 5, strong, method.create_temperature())
    loss.backward()
    return loss.detach(), student.grad


@pytest.mark.parametrize("name", list_methods())
def test_masked_classes_have_the_value_of_the_limit(name):
    logits, target = logits_of(6, 12)
    objective, repair = create_method(name).objective, create_method(name).repair
    precisions = (torch.float64,) if name == "mlkd+smooth" else (torch.float32, torch.float64)  # there, a median is among equals
    for who, dtype in itertools.product(WHO, precisions):
        loss, gradient = loss_of(name, [each.to(dtype) for each in logits], target, (who, -torch.inf))
        if objective == "normkd":  # its temperature is the deviation of the logits, which has no limit
            assert loss.isnan()
            continue
        assert gradient.isfinite().all(), (who, dtype)
        # The teacher, or the smoothed label in its place, gives a class a probability that the student cannot have.
        missed = who == "student" or (who == "both" and repair == "smooth")
        if missed and objective not in STANDARDIZED | {"ce", "dist"}:
            assert loss == torch.inf, (who, dtype)
            continue
        limit, limit_gradient = loss_of(name, logits, target, (who, FAR))
        assert loss.double() == pytest.approx(limit.item(), rel=1e-4, abs=1e-5), (who, dtype)
        assert gradient.double().numpy() == pytest.approx(limit_gradient.numpy(), rel=1e-3, abs=1e-5), (who, dtype)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(objective, dtype):
    logits, target = logits_of(3, 50_257 if objective not in ("mlkd", "lskd_mlkd") else 5_000, dtype)
    expected, _ = loss_of(objective, [each.double() for each in logits], target)
    loss, gradient = loss_of(objective, logits, target)
    assert loss.dtype == torch.float32 and loss.double() == pytest.approx(expected.item(), rel=1e-4) and gradient.isfinite().all()


@pytest.mark.parametrize("name", ["ce", *OBJECTIVES, *(f"kd+{repair}" for repair in REPAIRS if repair != "none")])
def test_targets_of_every_integer_type(name):
    logits, target = logits_of(4, 12, torch.float32)
    expected = loss_of(name, logits, target)
    for dtype in INTEGERS:
        for found, wanted in zip(loss_of(name, logits, target.to(dtype)), expected):
            assert torch.equal(found, wanted), dtype
    with pytest.raises(ValueError, match="target holds 200, but logits of shape"):
        loss_of(name, logits, torch.full((4,), 200, dtype=torch.uint8))


@pytest.mark.parametrize("repair", [each for each in REPAIRS if each != "none"])
def test_no_index_wraps(repair):
    "As uint8, -100 is 156: a class like any other."
    logits = torch.randn(3, 200, generator=torch.Generator().manual_seed(1))
    target = torch.tensor([156, 0, 199])
    assert torch.equal(REPAIRS[repair](logits, target.to(torch.uint8)), REPAIRS[repair](logits, target))
    assert not torch.equal(REPAIRS[repair](logits, target.to(torch.uint8))[0], logits[0])


@pytest.mark.parametrize("repair", [sort_logits, swap_logits])
def test_repairs_of_masked_rows_are_permutations(repair):
    for dtype, size in itertools.product((torch.float32, torch.float16, torch.bfloat16), (12, 2000)):
        logits, _ = logits_of(8, size, dtype)
        logits[1][:, ::3] = -torch.inf
        target = torch.randint(size, (8,), generator=torch.Generator().manual_seed(2))  # some of them masked
        repaired = repair(logits[1], target)
        assert torch.equal(repaired.sort().values, logits[1].sort().values)
        assert torch.equal(repaired.gather(1, target[:, None])[:, 0], logits[1].amax(1))


def traced(function, logits, target):
    return torch.jit.trace(function, (torch.randn_like(logits), target.flip(0)), check_trace=False)(logits, target)


def through_make_fx(function, logits, target, mode):
    from torch.fx.experimental.proxy_tensor import make_fx
    return make_fx(function, tracing_mode=mode)(torch.randn_like(logits), target.flip(0))(logits, target)


@pytest.mark.filterwarnings("ignore:.*TracerWarning.*", "ignore:Converting a tensor")
@pytest.mark.parametrize("repair", [each for each in REPAIRS if each != "none"])
@pytest.mark.parametrize("way", ["trace", "vmap", "make_fx real", "make_fx fake", "export"])
def test_no_value_is_baked_into_a_trace(way, repair):
    "Traced with one batch, right with another; 40 rows of 200 classes are more than the fixed shape is used for."
    logits, target = logits_of(40, 200, torch.float32)
    logits = logits[1]

    def function(logits, target):
        return REPAIRS[repair](logits, target)

    expected = function(logits, target)
    if way == "trace":
        found = traced(function, logits, target)
    elif way == "vmap":
        found = torch.func.vmap(function)(logits, target)
    elif way == "export":
        class Module(torch.nn.Module):
            def forward(self, logits, target):
                return function(logits, target)
        found = torch.export.export(Module(), (torch.randn_like(logits), target.flip(0))).module()(logits, target)
    else:
        found = through_make_fx(function, logits, target, way.split()[1])
    assert torch.allclose(found, expected, atol=1e-6) and not torch.equal(found, logits)
    assert function(logits.to("meta"), target.to("meta")).shape == logits.shape
