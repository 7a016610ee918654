"Losses: every golden of one view, what must hold without a golden, and what is refused."
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from special_logits import NO_LIMIT
from torch.fx.experimental.proxy_tensor import make_fx

from sortkd.earlier_losses import _gram_loss
from sortkd.later_losses import (abkd_loss, class_costs, ikl_loss, label_first, ldrld_loss,
                                 luminet_loss, pld_loss, rc_loss, revision_loss, wkd_loss)
from sortkd.losses import (dist_loss, dkd_loss, kd_loss, mlkd_loss, nkd_loss, normkd_loss, rld_loss,
                           sld_loss, standardize, ttm_loss, wsld_loss)
from sortkd.methods import OBJECTIVES, numbers_of
from sortkd.repairs import leave_out_rows
from sortkd.sorting import sort_logits

FILES = "losses", "dist", "mlkd", "more_losses", "later_losses"
GOLDENS = {name: torch.from_numpy(value).double() for file in FILES
           for name, value in np.load(Path(__file__).parent / "goldens" / f"{file}.npz").items()}
STUDENT, TEACHER, TARGET = GOLDENS["zs"], GOLDENS["zt"], GOLDENS["y"].long()
STRONG_STUDENT, STRONG_TEACHER = GOLDENS["zs_strong"], GOLDENS["zt_strong"]
SORTED = sort_logits(TEACHER, TARGET)
COST = class_costs(GOLDENS["wkd_prototypes"])


def lskd(loss, **settings):
    return lambda s, t, *y: loss(standardize(s), standardize(t), *y, **settings)


def case(name, loss, *arguments, **settings):
    return name, lambda student: loss(student, *arguments, **settings)


def cases():
    "The name of each golden, and the loss of a student that it is the value of."
    for beta in (0.5, 2, 6, 8):
        yield case(f"dkd_a1_b{beta}_T4", dkd_loss, TEACHER, TARGET, beta=beta)
        yield case(f"dkd_sort_a1_b{beta}_T4", dkd_loss, SORTED, TARGET, beta=beta)
        of_z_scores = lskd(dkd_loss, beta=beta, temperature=2)
        yield case(f"dkd_lskd_a1_b{beta}_T2", of_z_scores, TEACHER, TARGET)
    for t, before, middle in ((TEACHER, "", ""), (SORTED, "sort_", "_sort")):
        for T in (1, 2, 4):
            yield case(f"kd{middle}_T{T}", kd_loss, t, T)
            yield case(f"lskd{middle}_T{T}", lskd(kd_loss, temperature=T), t)
        for T in (1, 4):
            weights = {"b1_g1": (1, 1), "b2_g2": (2, 2), "inter": (1, 0), "intra": (0, 1)}
            for name, both in weights.items():
                yield case(f"{before}dist_{name}_tau{T}", dist_loss, t, *both, T)
        for beta, T in ((8, 1), (8, 4), (2, 1)):
            yield case(f"{before}rld_a1_b{beta}_T4_aT{T}", rld_loss, t, TARGET, 1.0, beta, 4.0, T)
        rld = lskd(rld_loss, temperature=2, target_temperature=2)
        yield case(f"{before}rld_lskd_a1_b8_T2_aT2", rld, t, TARGET)
        for T, gamma in ((1, 1.5), (3, 3.5)):
            yield case(f"{before}nkd_temp{T}_gamma{gamma}", nkd_loss, t, TARGET, gamma, T)
        for power in (0.1, 0.25):
            yield case(f"{before}ttm_l{power}", ttm_loss, t, power)
            yield case(f"{before}wttm_l{power}", ttm_loss, t, power, weighted=True)
        for scale in (1, 2):
            yield case(f"{before}normkd_tnorm{scale}", normkd_loss, t, scale)
        for T, weight in ((1, 1), (2, 2.5), (4, 2.25)):
            yield (f"{before}wsld_tau{T}_w{weight}",
                   lambda z, t=t, T=T, weight=weight: weight * wsld_loss(z, t, TARGET, T))
        yield from cases_since_2023(t, before)


def cases_since_2023(t, before):
    for T in (1, 4):
        yield case(f"{before}pld_T{T}", pld_loss, t, TARGET, T)
    yield case(f"{before}rc_T4", rc_loss, TARGET)
    yield f"{before}rc_stand_T4", lambda z: rc_loss(standardize(z), TARGET)
    yield case(f"{before}revision_l1_4_l2_1_eta0.8", revision_loss, t, TARGET)
    for a, b, k, T in ((10.5, 7, 7, 4), (3, 2, 4, 2)):
        yield case(f"{before}ldrld_a{a}_b{b}_k{k}_T{T}", ldrld_loss, t, a, b, k, T)
    for a, T in ((33, 4), (70, 8), (2, 0.7)):
        yield case(f"{before}luminet_a{a}_T{T}", luminet_loss, t, a, T)
    for a, b, T, weight_T in ((1, 8, 4, 100), (4, 12, 4, 100), (1, 1, 1, 1)):
        yield case(f"{before}ikl_a{a}_b{b}_T{T}_weights{weight_T}", ikl_loss, t, a, b, T, weight_T)
    for gamma, T in ((600, 8), (30, 2)):
        yield case(f"{before}wkdl_g{gamma}_T{T}", wkd_loss, t, TARGET, COST, gamma, T)
    for a, b, T in ((0.8, 0.3, 1), (0.2, 0.7, 1), (0.5, 0.5, 4)):
        yield case(f"{before}abkd_a{a}_b{b}_T{T}", abkd_loss, t, a, b, T)


@pytest.mark.parametrize("name,objective", [pytest.param(*each, id=each[0]) for each in cases()])
def test_golden(name, objective):
    student = STUDENT.clone().requires_grad_()
    loss = objective(student)
    gradient, = torch.autograd.grad(loss, student)
    for ours, golden in ((loss.detach(), GOLDENS[name]), (gradient, GOLDENS[f"{name}_grad"])):
        assert (ours - golden).norm() / golden.norm() < 2e-6  # they were computed in float32


def test_rld_of_a_target_that_ranks_last():
    "No class is below it, so MCD is 0; ties with the target are left out like what stands above."
    teacher = torch.tensor([[3.0, 1.0, 2.0, -5.0], [3.0, 1.0, 1.0, 4.0]])
    student = torch.randn(2, 4, requires_grad=True)
    loss = rld_loss(student, teacher, torch.tensor([3, 1]), alpha=0.0)
    assert loss == 0 and not torch.autograd.grad(loss, student)[0].any()


def loss_of_objective(entry, student, teacher, target):
    "The term of an objective, with the same logits for both views."
    settings = {} if entry.settings.keys() - numbers_of(entry.term) else entry.settings
    settings |= {"student_teaches": True} if entry.term is sld_loss else {}
    if entry.standardize:
        student, teacher = standardize(student), standardize(teacher)
    views = [student, teacher] * (1 + entry.strong_views)
    return entry.term(*[*views, target][: entry.tensors], **settings)


TERMS = {name: each for name, each in OBJECTIVES.items() if each.term}
LOSSES = {name: partial(loss_of_objective, each) for name, each in TERMS.items()}
LOSSES["wkd"] = lambda s, t, y: wkd_loss(s, t, y, COST[: s.shape[-1], : s.shape[-1]])
SUMS_OVER_ROWS = [name for name, each in TERMS.items() if not each.relates_rows]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_and_students_that_are_too_sure(name, dtype):
    "In float32 nothing overflows: neither sums nor a student that leads by thousands."
    loss, teacher = LOSSES[name], TEACHER.to(dtype)
    half = loss(STUDENT.to(dtype), teacher, TARGET)
    wide = loss(STUDENT.to(dtype).float(), teacher.float(), TARGET)
    assert torch.equal(half, wide) and half.dtype == torch.float32
    assert loss(STUDENT.double(), TEACHER.double(), TARGET).dtype == torch.float64
    for lead in (200.0, 30000.0):
        student = torch.full((16, 100), -lead, dtype=dtype).index_fill(1, torch.tensor(7), lead)
        value = loss(student.requires_grad_(), teacher, TARGET)
        assert value.isfinite() and torch.autograd.grad(value, student)[0].isfinite().all()


def test_gram_matrices_of_many_classes_are_those_of_few():
    both = torch.randn(2, 3, 4200, generator=torch.Generator().manual_seed(0))
    student, teacher = (each.div(4).softmax(1).double() for each in both)
    expected = (student.T @ student - teacher.T @ teacher).square().sum() / 4200
    ours = _gram_loss(*both, 4.0, of_classes=True)
    torch.testing.assert_close(ours, expected.float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", sorted(
    set(LOSSES) - {*NO_LIMIT, "dist", "revision", "wkd", "abkd", "ldrld"}))
def test_a_probability_of_zero(name):
    "What only the teacher thinks possible is an infinite loss, whose gradient is finite."
    masked = torch.tensor([[1.0, 0.0, -torch.inf]], requires_grad=True)
    loss = LOSSES[name](masked, torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([0]))
    assert loss == torch.inf and torch.autograd.grad(loss, masked)[0].isfinite().all()


def test_rld_of_a_target_above_masked_classes_alone():
    teacher = torch.tensor([[1.0, 2.0, -torch.inf]])
    for student in (teacher.flip(0), torch.zeros(1, 3)):
        assert rld_loss(student, teacher, torch.tensor([0]), alpha=0.0) == 0
    student = torch.tensor([[1.0, 0.0, -torch.inf]], requires_grad=True)
    gradient, = torch.autograd.grad(rld_loss(student, teacher, torch.tensor([0])), student)
    assert gradient.isfinite().all() and not gradient[0, 2]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.filterwarnings("ignore")
def test_no_trace_of_a_loss_holds_on_to_values(name):
    "Traced on whole rows, and run on masked ones, and on fewer."
    def function(student, teacher, target):
        return LOSSES[name](student, teacher, target)

    student, teacher = STUDENT.double(), TEACHER.double()
    examples = student.flip(0), teacher.flip(0), TARGET.flip(0)
    absent = (torch.arange(100) - TARGET[:, None]) % 10 == 5
    masked = (*(each.masked_fill(absent & (name not in NO_LIMIT), -torch.inf)
                for each in (student, teacher)), TARGET)
    expected, fewer = function(*masked), (student[:9], teacher[:9], TARGET[:9])
    traced = torch.jit.trace(function, examples)
    if "mlkd" not in name:  # whose quantile the oldest PyTorch cannot trace in this way
        torch.testing.assert_close(make_fx(function)(*examples)(*masked), expected)
    torch.testing.assert_close(traced(*masked), expected)
    torch.testing.assert_close(traced(*fewer), function(*fewer))
    halves = [each.view(2, 8, *each.shape[1:]) for each in masked]
    each_half = torch.stack([function(*each) for each in zip(*halves)])
    torch.testing.assert_close(torch.vmap(function)(*halves), each_half)
    assert function(*(each.to("meta") for each in (student, teacher, TARGET))).is_meta


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"mlkd", "lskd_mlkd", "sld"}))
def test_gradients_and_tokens(name):
    student, teacher = STUDENT[:6, :7].double().requires_grad_(), TEACHER[:6, :7].double()
    loss, target = LOSSES[name], torch.arange(6)
    if name not in ("wsld", "rc"):  # part of which has no gradient
        assert torch.autograd.gradcheck(lambda z: loss(z, teacher, target), student)
    tokens = loss(student.view(2, 3, 7), teacher.view(2, 3, 7), target.view(2, 3))
    torch.testing.assert_close(tokens, loss(student, teacher, target))


def test_rows_that_are_left_out_have_no_loss_and_no_gradient():
    student, left_out = STUDENT.clone().requires_grad_(), torch.arange(16) < 12
    teacher = TEACHER.masked_fill(left_out[:, None], -torch.inf)
    losses = {name: LOSSES[name] for name in SUMS_OVER_ROWS if name not in NO_LIMIT}
    losses["ce"] = lambda s, t, y: F.cross_entropy(s, y)
    for name, loss in losses.items():
        value = loss(*leave_out_rows(student, teacher, TARGET, left_out), TARGET)
        expected = loss(STUDENT[12:], TEACHER[12:], TARGET[12:]) / 4
        torch.testing.assert_close(value, expected, msg=name)
        assert not torch.autograd.grad(value, student)[0][:12].any(), name


@pytest.mark.parametrize("name", ["ldrld", "wkd", "abkd", "ikl", "pld"])
def test_masked_classes_are_as_if_they_were_cut_off(name):
    both, target = (STUDENT[:, :20], TEACHER[:, :20]), torch.arange(16)
    masked = [each.masked_fill(torch.arange(20) >= 17, -torch.inf) for each in both]
    value, expected = (LOSSES[name](*pair, target)
                       for pair in (masked, [each[:, :17] for each in both]))
    torch.testing.assert_close(value, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dist_without_variance(dtype):
    flat = torch.zeros(4, 10, dtype=dtype, requires_grad=True)  # every row and class is constant
    loss = dist_loss(flat, torch.randn(4, 10, dtype=dtype), 2.0, 3.0, 4.0)
    loss.backward()
    assert loss == 16 * (2 + 3) and not flat.grad.any()
    one_row = STUDENT[:1].to(dtype), TEACHER[:1].to(dtype)  # every class is constant over the rows
    torch.testing.assert_close(dist_loss(*one_row), dist_loss(*one_row, 2.0, 0.0) + 32)


def test_mlkd_weighs_rows_and_classes_by_shares_of_their_own():
    "Of three rows two have at most the median confidence, of four classes two."
    generator = torch.Generator().manual_seed(0)
    weak, teacher, *strong = torch.randn(4, 3, 4, dtype=torch.float64, generator=generator)
    expected = 0.0
    for T in (4.0, 3.0, 5.0, 2.0, 6.0):
        ours, theirs = (each.div(T).softmax(1) for each in (weak, teacher))
        instances = kd_loss(weak, teacher, T)
        batch = (ours @ ours.T - theirs @ theirs.T).square().sum() / 3
        classes = (ours.T @ ours - theirs.T @ theirs).square().sum() / 4
        expected += 2 / 3 * (instances + batch) + 2 / 4 * classes
        expected += kd_loss(*strong, T) if T in (4.0, 3.0, 5.0) else instances
    torch.testing.assert_close(mlkd_loss(weak, teacher, *strong), expected)


@pytest.mark.parametrize("call,words", [
    (lambda: kd_loss(STUDENT, TEACHER[:8]), r"\(8, 100\)"),
    (lambda: kd_loss(STUDENT[0], TEACHER[0]), r"\(100,\)"),
    (lambda: kd_loss(STUDENT[:, :1], TEACHER[:, :1]), "two classes"),
    (lambda: kd_loss(STUDENT, TEACHER, 0.0), "temperature"),
    (lambda: dkd_loss(STUDENT, TEACHER, TARGET[:3]), r"\(3,\)"),
    (lambda: dkd_loss(STUDENT, TEACHER, TARGET - 100), "target holds -"),
    (lambda: mlkd_loss(STUDENT, TEACHER, STUDENT, TEACHER[:8]), r"\(8, 100\)"),
    (lambda: rld_loss(STUDENT, TEACHER, TARGET, 1, 1, 4, 0.0), "target_temperature must be"),
    (lambda: sld_loss(STUDENT, TEACHER, STUDENT, TEACHER, TARGET[:3]), r"\(3,\)"),
    (lambda: ldrld_loss(STUDENT, TEACHER, k=0), "k must be"),
    (lambda: wkd_loss(STUDENT, TEACHER, TARGET, COST[:9]), "need costs")])
def test_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_pld_ranks_as_sorting_does():
    "So sorting changes its weights alone: those of wrong rows, which then fall in the ranking."
    order = label_first(TEACHER, TARGET)
    values = TEACHER.sort(-1, descending=True)[0]
    assert torch.equal(torch.zeros_like(TEACHER).scatter(-1, order, values), SORTED)
    assert torch.equal(order, label_first(SORTED, TARGET))
    right = TEACHER.argmax(-1) == TARGET
    for rows, same in ((right, True), (~right, False)):
        both = [pld_loss(STUDENT[rows], each[rows], TARGET[rows]) for each in (TEACHER, SORTED)]
        assert (both[0] == both[1]) == same
    weights = SORTED.softmax(-1).gather(-1, order)
    chosen = [STUDENT.gather(-1, order)[:, place:].log_softmax(-1)[:, 0] for place in range(100)]
    by_hand = -(weights * torch.stack(chosen, 1)).sum(1).mean()
    torch.testing.assert_close(pld_loss(STUDENT, SORTED, TARGET, 1.0), by_hand)
