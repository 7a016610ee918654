"Losses: every golden of one view, what must hold without a golden, and what is refused."
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from sortkd.losses import (
    _gram_loss, dist_loss, dkd_loss, kd_loss, mlkd_loss, nkd_loss, normkd_loss, rld_loss,
    sld_loss, standardize, ttm_loss, wsld_loss,
)
from sortkd.repairs import leave_out_rows
from sortkd.sorting import sort_logits, swap_logits

GOLDENS = {name: torch.from_numpy(value) for file in ("losses", "dist", "mlkd", "more_losses")
           for name, value in np.load(Path(__file__).parent / "goldens" / f"{file}.npz").items()}
STUDENT, TEACHER, TARGET = GOLDENS["zs"], GOLDENS["zt"], GOLDENS["y"]
STRONG_STUDENT, STRONG_TEACHER = GOLDENS["zs_strong"], GOLDENS["zt_strong"]
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
    for before, teacher in (("", TEACHER), ("sort_", SORTED)):
        for tau in (1, 4):
            for name, weights in (("b1_g1", (1, 1)), ("b2_g2", (2, 2)), ("inter", (1, 0)), ("intra", (0, 1))):
                yield f"{before}dist_{name}_tau{tau}", lambda z, t=teacher, w=weights, T=tau: dist_loss(z, t, *w, T)
        for beta, T in ((8, 1), (8, 4), (2, 1)):
            yield f"{before}rld_a1_b{beta}_T4_aT{T}", lambda z, t=teacher, b=beta, T=T: rld_loss(z, t, TARGET, beta=b, target_temperature=T)
        yield f"{before}rld_lskd_a1_b8_T2_aT2", lambda z, t=teacher: rld_loss(standardize(z), standardize(t), TARGET, temperature=2, target_temperature=2)
        for T, gamma in ((1, 1.5), (3, 3.5)):
            yield f"{before}nkd_temp{T}_gamma{gamma}", lambda z, t=teacher, g=gamma, T=T: nkd_loss(z, t, TARGET, g, T)
        for power in (0.1, 0.25):
            yield f"{before}ttm_l{power}", lambda z, t=teacher, l=power: ttm_loss(z, t, l)
            yield f"{before}wttm_l{power}", lambda z, t=teacher, l=power: ttm_loss(z, t, l, weighted=True)
        for scale in (1, 2):
            yield f"{before}normkd_tnorm{scale}", lambda z, t=teacher, s=scale: normkd_loss(z, t, s)
        for T, weight in ((1, 1), (2, 2.5), (4, 2.25)):
            yield f"{before}wsld_tau{T}_w{weight}", lambda z, t=teacher, T=T, w=weight: w * wsld_loss(z, t, TARGET, T)


@pytest.mark.parametrize("name,objective", list(cases()), ids=lambda value: value if isinstance(value, str) else "")
def test_golden(name, objective):
    student = STUDENT.clone().requires_grad_()
    loss = objective(student)
    gradient, = torch.autograd.grad(loss, student)
    for ours, golden, tolerance in ((loss.detach(), GOLDENS[name], 1e-5), (gradient, GOLDENS[f"{name}_grad"], 1e-4)):
        assert (ours - golden).norm() / golden.norm() < tolerance


@pytest.mark.parametrize("T", [1.0, 4.0])
def test_rld_on_a_sorted_teacher_is_dkd(T):
    "In value and gradient, where both temperatures are equal; on a wrong teacher only SCD is as on the sorted one."
    for student in (STUDENT, torch.randn(16, 100, generator=torch.Generator().manual_seed(1))):
        student = student.double().requires_grad_()
        rld = rld_loss(student, SORTED.double(), TARGET, 1.5, 3.0, T, T)
        dkd = dkd_loss(student, SORTED.double(), TARGET, 1.5, 3.0, T)
        torch.testing.assert_close(rld, dkd)
        torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (rld, dkd)))
        one_part = [[rld_loss(student, teacher.double(), TARGET, *weights, T, T) for teacher in (TEACHER, SORTED)] for weights in ((1, 0), (0, 1))]
        torch.testing.assert_close(*one_part[0])
        assert abs(one_part[1][0] - one_part[1][1]) > 1e-3


def test_rld_of_a_target_that_ranks_last():
    "No class is below it, so MCD is 0; ties with the target are left out like what stands above."
    teacher = torch.tensor([[3.0, 1.0, 2.0, -5.0], [3.0, 1.0, 1.0, 4.0]])
    student = torch.randn(2, 4, requires_grad=True)
    loss = rld_loss(student, teacher, torch.tensor([3, 1]), alpha=0.0)
    assert loss == 0 and not torch.autograd.grad(loss, student)[0].any()


NEW_LOSSES = {
    "rld": rld_loss, "nkd": nkd_loss, "wsld": wsld_loss, "normkd": lambda s, t, y: normkd_loss(s, t),
    "ttm": lambda s, t, y: ttm_loss(s, t), "wttm": lambda s, t, y: ttm_loss(s, t, weighted=True),
}
EVERY_LOSS = NEW_LOSSES | {
    "kd": lambda s, t, y: kd_loss(s, t), "lskd": lambda s, t, y: kd_loss(standardize(s), standardize(t)), "dkd": dkd_loss,
    "dist": lambda s, t, y: dist_loss(s, t), "mlkd": lambda s, t, y: mlkd_loss(s, t, s, t),
    "sld": lambda s, t, y: sld_loss(s, t, s, t, y, student_teaches=True),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", EVERY_LOSS)
def test_half_precision_and_students_that_are_too_sure(name, dtype):
    "Computed in float32, so that nothing overflows: neither sums over rows nor a student that leads by thousands."
    loss = EVERY_LOSS[name]
    half, wide = (loss(STUDENT.to(dtype).to(each), TEACHER.to(dtype).to(each), TARGET) for each in (dtype, torch.float32))
    assert torch.equal(half, wide) and half.dtype == torch.float32
    assert loss(STUDENT.double(), TEACHER.double(), TARGET).dtype == torch.float64
    for lead in (200.0, 30000.0):
        student = torch.full((16, 100), -lead, dtype=dtype).index_fill(1, torch.tensor(7), lead).requires_grad_()
        value = loss(student, TEACHER.to(dtype), TARGET)
        assert value.isfinite() and torch.autograd.grad(value, student)[0].isfinite().all()


def test_half_precision_of_a_vocabulary():
    student, teacher = torch.randn(2, 2, 50257, generator=torch.Generator().manual_seed(0)).mul(3).half()
    for name in ("dist", "mlkd"):  # the latter without matrices of vocabulary by vocabulary
        torch.testing.assert_close(EVERY_LOSS[name](student, teacher, None), EVERY_LOSS[name](student.double(), teacher.double(), None).float())


def test_gram_matrices_of_many_classes_are_those_of_few(monkeypatch):
    student, teacher = torch.randn(2, 3, 4200, generator=torch.Generator().manual_seed(0))
    both = [each.div(4).softmax(1).double() for each in (student, teacher)]
    expected = (both[0].T @ both[0] - both[1].T @ both[1]).square().sum() / 4200
    torch.testing.assert_close(_gram_loss(student, teacher, 4.0, of_classes=True), expected.float(), rtol=1e-5, atol=0)


def test_a_probability_of_zero():
    "0 · log 0 is 0. What the teacher thinks possible and the student does not is an infinite loss, whose gradient is finite."
    inf, target = torch.inf, torch.tensor([0])
    student, masked = torch.tensor([[1.0, 0.0, 0.0]], requires_grad=True), torch.tensor([[1.0, 0.0, -inf]], requires_grad=True)
    for logits in (student, masked):
        loss = kd_loss(logits, torch.tensor([[2.0, 1.0, -inf]]), 1.0)
        gradient, = torch.autograd.grad(loss, logits)
        assert gradient.isfinite().all() and not gradient[logits == -inf].any()
    assert abs(kd_loss(student, torch.tensor([[2.0, 1.0, -inf]]), 1.0) - 0.2382) < 1e-4 and loss == 0
    for name in set(EVERY_LOSS) - {"dist", "lskd", "normkd"}:  # DIST compares probabilities, not logarithms
        loss = EVERY_LOSS[name](masked, torch.tensor([[2.0, 1.0, 0.0]]), target)
        assert loss == inf and torch.autograd.grad(loss, masked)[0].isfinite().all(), name
    teacher = torch.tensor([[1.0, 2.0, -inf]])  # RLD finds no class but a masked one below the target
    assert rld_loss(masked, teacher, target, alpha=0.0) == rld_loss(student, teacher, target, alpha=0.0) == 0
    gradient, = torch.autograd.grad(rld_loss(masked, teacher, target), masked)
    assert gradient.isfinite().all() and not gradient[0, 2]


@pytest.mark.parametrize("name", EVERY_LOSS)
@pytest.mark.filterwarnings("ignore")
def test_no_trace_of_a_loss_holds_on_to_values(name):
    "Traced on whole rows, and run on masked ones, and on fewer."
    loss, student, teacher = EVERY_LOSS[name], STUDENT.double(), TEACHER.double()

    def function(student, teacher, target):
        return loss(student, teacher, target)

    examples = student.flip(0), teacher.flip(0), TARGET.flip(0)
    traced = torch.jit.trace(function, examples)
    graph = make_fx(function)(*examples)
    absent = (torch.arange(100) - TARGET[:, None]) % 10 == 5 if name not in ("lskd", "normkd") else torch.tensor(False)
    masked = [each.masked_fill(absent, -torch.inf) for each in (student, teacher)]
    for other in (traced, graph):
        torch.testing.assert_close(other(*masked, TARGET), function(*masked, TARGET))
    torch.testing.assert_close(traced(student[:9], teacher[:9], TARGET[:9]), function(student[:9], teacher[:9], TARGET[:9]))
    halves = [each.view(2, 8, *each.shape[1:]) for each in (*masked, TARGET)]
    torch.testing.assert_close(torch.vmap(function)(*halves), torch.stack([function(*each) for each in zip(*halves)]))
    assert function(*(each.to("meta") for each in (student, teacher, TARGET))).is_meta


def test_normkd_of_constant_rows():
    flat = torch.full((2, 100), 0.1, requires_grad=True)
    loss = normkd_loss(flat, TEACHER[:2])
    uniform = torch.zeros(2, 100).log_softmax(1)
    widths = 2 * TEACHER[:2].std(1, keepdim=True)
    torch.testing.assert_close(loss, (widths[:, 0] ** 2 * (torch.softmax(TEACHER[:2] / widths, 1) * (torch.log_softmax(TEACHER[:2] / widths, 1) - uniform)).sum(1)).mean())
    assert not torch.autograd.grad(loss, flat)[0].any() and normkd_loss(STUDENT[:2], torch.full((2, 100), 0.1)) == 0


@pytest.mark.parametrize("name", NEW_LOSSES)
def test_gradients_and_tokens_of_the_new_losses(name):
    student, teacher, target = STUDENT[:6, :7].double().requires_grad_(), TEACHER[:6, :7].double(), torch.arange(6)
    loss = NEW_LOSSES[name]
    if name != "wsld":  # its weight has no gradient
        assert torch.autograd.gradcheck(lambda z: loss(z, teacher, target), student)
    torch.testing.assert_close(loss(student.view(2, 3, 7), teacher.view(2, 3, 7), target.view(2, 3)), loss(student, teacher, target))


def test_rows_that_are_left_out_have_no_loss_and_no_gradient():
    student, left_out = STUDENT.clone().requires_grad_(), torch.arange(16) < 12
    teacher = TEACHER.masked_fill(left_out[:, None], -torch.inf)
    losses = NEW_LOSSES | {"ce": lambda s, t, y: F.cross_entropy(s, y), "dkd": dkd_loss, "kd": lambda s, t, y: kd_loss(s, t)}
    for name, loss in losses.items():
        value = loss(*leave_out_rows(student, teacher, TARGET, left_out), TARGET)
        torch.testing.assert_close(value, loss(STUDENT[12:], TEACHER[12:], TARGET[12:]) / 4, msg=name)
        assert not torch.autograd.grad(value, student)[0][:12].any(), name


def numpy_distance(first, second):
    "Pearson's distance with 1e-8 added to the product of the two lengths."
    lengths = np.sqrt(first.var(1) * second.var(1)) * first.shape[1]
    correlations = np.array([scipy.stats.pearsonr(one, other).statistic for one, other in zip(first, second)])
    return np.mean(1 - correlations * lengths / (lengths + 1e-8))


def test_dist_is_pearson_with_the_authors_epsilon():
    student, teacher = (torch.softmax(z.double() / 3, 1).numpy() for z in (STUDENT, TEACHER))
    expected = 9 * (0.5 * numpy_distance(student, teacher) + 2 * numpy_distance(student.T, teacher.T))
    assert abs(dist_loss(STUDENT.double(), TEACHER.double(), 0.5, 2.0, 3.0) - expected) < 1e-12
    assert abs(dist_loss(STUDENT, TEACHER, 0.5, 2.0, 3.0) - expected) < 1e-4


def test_dist_sees_relations_only():
    teacher = TEACHER.double()
    probabilities = torch.softmax(teacher / 4, 1)
    squeezed = 4 * (0.3 * probabilities + 0.7 / 100).log()  # a positive affine map of the probabilities, as logits at temperature 4
    for scale, logits in ((0.3, squeezed), (1.0, teacher)):  # ρ = 1: all that is left is ε / (product of the lengths + ε)
        lengths = [scale * (each - each.mean(1, keepdim=True)).square().sum(1) for each in (probabilities, probabilities.T)]
        expected = 16 * 2 * sum((1e-8 / (each + 1e-8)).mean() for each in lengths)
        assert abs(dist_loss(logits, teacher) - expected) < 1e-12
    assert kd_loss(squeezed, teacher) > 0.01
    # elsewhere ε's share of the lengths (2e-4 at most) differs; times ρ, of either sign, it comes to 1e-8 of the sum
    torch.testing.assert_close(dist_loss(STUDENT.double(), squeezed), dist_loss(STUDENT.double(), teacher), rtol=1e-7, atol=0)


def test_dist_gradient():
    student, teacher = STUDENT[:5, :7].double().requires_grad_(), TEACHER[:5, :7].double()
    assert torch.autograd.gradcheck(lambda z: dist_loss(z, teacher, 1.0, 3.0, 2.0), student)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dist_without_variance(dtype):
    flat = torch.zeros(4, 10, dtype=dtype, requires_grad=True)  # every row and every class is constant
    loss = dist_loss(flat, torch.randn(4, 10, dtype=dtype), 2.0, 3.0, 4.0)
    loss.backward()
    assert loss == 16 * (2 + 3) and not flat.grad.any()
    one_row = STUDENT[:1].to(dtype).requires_grad_()  # one sample: every class is constant over the rows
    torch.testing.assert_close(dist_loss(one_row, TEACHER[:1].to(dtype)), dist_loss(one_row, TEACHER[:1].to(dtype), 2.0, 0.0) + 32)


def test_golden_repairs():
    assert torch.equal(SORTED, GOLDENS["sort"]) and torch.equal(swap_logits(TEACHER, TARGET), GOLDENS["swap"])
    assert (standardize(TEACHER) - GOLDENS["standardize"]).norm() / GOLDENS["standardize"].norm() < 1e-5


def test_mlkd_weighs_rows_and_classes_by_shares_of_their_own():
    "Of three rows two have at most the median confidence, of four classes two: the goldens have equal shares."
    weak, teacher, strong, strong_teacher = torch.randn(4, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = 0.0
    for temperature in (4.0, 3.0, 5.0, 2.0, 6.0):
        ours, theirs = (each.div(temperature).softmax(1) for each in (weak, teacher))
        instances = kd_loss(weak, teacher, temperature)
        expected += 2 / 3 * (instances + (ours @ ours.T - theirs @ theirs.T).square().sum() / 3)
        expected += 2 / 4 * (ours.T @ ours - theirs.T @ theirs).square().sum() / 4
        expected += kd_loss(strong, strong_teacher, temperature) if temperature in (4.0, 3.0, 5.0) else instances
    torch.testing.assert_close(mlkd_loss(weak, teacher, strong, strong_teacher), expected)


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


@pytest.mark.parametrize("call,words", [
    (lambda: kd_loss(STUDENT, TEACHER[:8]), r"\(8, 100\)"),
    (lambda: kd_loss(STUDENT[0], TEACHER[0]), r"\(100,\)"),
    (lambda: kd_loss(STUDENT[:, :1], TEACHER[:, :1]), "two classes"),
    (lambda: kd_loss(STUDENT, TEACHER, 0.0), "temperature"),
    (lambda: kd_loss(STUDENT, TEACHER, float("nan")), "temperature"),
    (lambda: dkd_loss(STUDENT, TEACHER, TARGET[:3]), r"\(3,\)"),
    (lambda: standardize(torch.zeros(4, 1)), "two classes"),
    (lambda: dist_loss(STUDENT, TEACHER[:8]), r"\(8, 100\)"),
    (lambda: dist_loss(STUDENT, TEACHER, temperature=0.0), "temperature"),
    (lambda: mlkd_loss(STUDENT, TEACHER, STUDENT, TEACHER[:8]), r"\(8, 100\)"),
    (lambda: rld_loss(STUDENT, TEACHER, TARGET, target_temperature=0.0), "target_temperature must be"),
    (lambda: nkd_loss(STUDENT, TEACHER, TARGET[:3]), r"\(3,\)"),
    (lambda: ttm_loss(STUDENT, TEACHER, -0.1), "exponent must be"),
    (lambda: normkd_loss(STUDENT, TEACHER, 0), "scale must be"),
    (lambda: wsld_loss(STUDENT, TEACHER, TARGET + 100), "target holds"),
    (lambda: sld_loss(STUDENT, TEACHER, STUDENT, TEACHER, TARGET[:3]), r"\(3,\)"),
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
