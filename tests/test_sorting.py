"The mechanism where the chapter does not look: devices, layouts, special values, top-k."
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from special_logits import INTEGERS

from sortkd import sort_logits, sort_topk, swap_logits
from sortkd.sorting import _sort_wrong_rows, find_wrong_rows, sort_whole_rows

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
REPAIRS = [sort_logits, swap_logits]


def sorted_by(way, logits, target, dim=1):
    index, value, _, wrong = find_wrong_rows(logits, target, dim, -100)
    return way(logits, index, value, wrong, dim)


whole_rows, wrong_rows = partial(sorted_by, sort_whole_rows), partial(sorted_by, _sort_wrong_rows)


def two_full_sorts(logits, target):
    "The plain way to the new values, for rows `(N, C)` that hold neither NaN nor zero."
    values, order = logits.sort(dim=1, descending=True, stable=True)
    target = target.unsqueeze(1)
    others = order[order != target].view(len(order), -1)
    return values.gather(1, torch.cat([target, others], dim=1).argsort(dim=1))


def sort_one_row(row, label):
    if label == -100 or row.isnan().any():
        return row
    ranking = row.argsort(descending=True, stable=True)
    cycle = torch.cat([torch.tensor([label]), ranking[row[ranking] > row[label]]])
    return row.scatter(0, cycle, row[cycle.roll(-1)])


def bits(values):
    sizes = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return values.contiguous().view(sizes[values.element_size()])


def test_the_papers_own_code_returns_the_same():
    path = Path(__file__).parent / "goldens" / "sortkd.npz"
    golden = {name: torch.from_numpy(value) for name, value in np.load(path).items()}
    for way in (sort_logits, wrong_rows, whole_rows):
        assert torch.equal(way(golden["logits"], golden["target"]), golden["sorted"])


@pytest.mark.parametrize("way", [wrong_rows, whole_rows])
def test_gradient_is_the_permutation(way):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(16, 12, dtype=torch.float64, generator=generator)
    target = torch.randint(12, (16,), generator=generator)
    assert torch.autograd.gradcheck(lambda z: way(z, target), logits.requires_grad_())
    upstream = torch.randn_like(logits)
    gradient, = torch.autograd.grad(way(logits, target), logits, upstream)
    assert torch.equal(gradient.sort(1).values, upstream.sort(1).values)


@pytest.mark.parametrize("repair", REPAIRS)
@pytest.mark.parametrize("logits,target,dim,error,words", [
    (torch.zeros(3, 4), torch.tensor([0, 1, 4]), -1, ValueError, "target holds 4"),
    (torch.zeros(3, 4), torch.tensor([0, -1, 2]), -1, ValueError, "target holds -1"),
    (torch.zeros(3, 4), torch.zeros(3, 1, dtype=torch.int64), -1, ValueError, r"\(3, 1\)"),
    (torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64), 2, ValueError, "dim=2"),
    (torch.zeros(3, 0), torch.zeros(3, dtype=torch.int64), -1, ValueError, "no classes"),
    (torch.zeros(3, 4).long(), torch.zeros(3).long(), -1, TypeError, "floating-point"),
    ([[1.0, 2.0]], torch.zeros(1, dtype=torch.int64), -1, TypeError, "list"),
    (torch.zeros(3, 4), torch.zeros(3, dtype=torch.bool), -1, TypeError, "class indices")])
def test_bad_input_is_named(repair, logits, target, dim, error, words):
    with pytest.raises(error, match=words):
        repair(logits, target, dim=dim)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("rank", [2, 30, None])
@pytest.mark.parametrize("shape,dim", [
    ((300, 10), 1), ((40, 1000), 1), ((120, 100), 1), ((6000,), 0), ((2, 30, 200), -1),
    ((4, 50, 8, 8), 1)])
def test_every_way_through_the_data_gives_the_same_bits(dtype, share, rank, shape, dim):
    "Few and many wrong rows and classes above the target: on both sides of each bound."
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(shape, generator=generator).add(5).to(dtype)
    order = logits.argsort(dim=dim, descending=True, stable=True).movedim(dim, -1)
    wrong = torch.rand(order.shape[:-1], generator=generator) < share
    place = (order.shape[-1] if rank is None else min(rank, order.shape[-1])) - 1
    target = torch.where(wrong, order[..., place], order[..., 0])
    before, repaired = logits.clone(), sort_logits(logits, target, dim)
    rows, labels = logits.movedim(dim, -1).reshape(-1, shape[dim]), target.reshape(-1)
    expected = two_full_sorts(rows, labels).view(order.shape).movedim(-1, dim)
    assert torch.equal(repaired, expected) and torch.equal(logits, before)
    assert repaired.stride() == logits.stride()
    assert torch.equal(bits(repaired), bits(whole_rows(logits, target, dim)))
    for device in DEVICES[1:]:
        assert torch.equal(sort_logits(logits.to(device), target.to(device), dim).cpu(), expected)


SPECIAL = torch.tensor([0.0, -0.0, 1.0, 1.0, 2.0, -3.0, torch.inf, -torch.inf, torch.nan])
SHAPES = [(3, 4), (430, 10), (900, 10), (9, 500), (30, 500)]


@given(st.integers(0, 2**32), st.sampled_from(SHAPES), st.floats(0, 1), st.integers(1, 500),
       st.booleans())
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
def test_special_values_on_every_way(seed, shape, share, rank, ignoring):
    "Zeros of both signs, infinities, NaN and ties, on both sides of each bound."
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=generator).round(decimals=1)
    special = SPECIAL[torch.randint(len(SPECIAL), shape, generator=generator)]
    logits = torch.where(torch.rand(shape, generator=generator) < 2 / shape[1], special, logits)
    order = logits.argsort(dim=1, descending=True, stable=True)
    wrong = torch.rand(shape[0], generator=generator) < share
    target = torch.where(wrong, order[:, min(rank, shape[1]) - 1], order[:, 0])
    if ignoring:
        target[::3] = -100
    expected = torch.stack([sort_one_row(row, int(label)) for row, label in zip(logits, target)])
    for way in (wrong_rows, whole_rows):
        assert torch.equal(bits(way(logits, target)), bits(expected))
    tracked = logits.clone().requires_grad_()
    assert torch.equal(bits(sort_logits(tracked, target).detach()), bits(expected))


@st.composite
def kept(draw, outside=False):
    "A row with many ties, its `k` highest classes in any order, a target in or `outside` the list."
    step = draw(st.sampled_from([0.125, 1.0, 8.0]))  # of the values
    count = draw(st.integers(2, 9))
    values = draw(st.lists(st.integers(-2, 3), min_size=count, max_size=count))
    logits = step * torch.tensor(values, dtype=torch.float32)
    k = draw(st.integers(1, count - 1 if outside else count))
    ranked = logits.argsort(descending=True, stable=True)  # ties by class index
    classes = ranked[:k][torch.tensor(draw(st.permutations(range(k))))]
    target = ranked[draw(st.integers(k, count - 1) if outside else st.integers(0, k - 1))]
    return logits, classes, target


@settings(deadline=None)
@given(kept(), st.booleans())
def test_a_listed_target_is_sorted_as_in_the_whole_row(row, insert):
    logits, classes, target = row
    values, same = sort_topk(logits[classes], classes, target, insert=insert)
    assert torch.equal(values, sort_logits(logits, target)[classes]) and torch.equal(same, classes)


@settings(deadline=None)
@given(kept(outside=True))
def test_a_target_outside_the_list(row):
    logits, classes, target = row
    before = logits[classes]
    values, same = sort_topk(before, classes, target)
    assert torch.equal(values, before) and torch.equal(same, classes)
    values, listed = sort_topk(before, classes, target, insert=True)
    order = sorted(range(len(before)), key=lambda place: (-before[place], classes[place]))
    ranking = [int(target), *classes[order].tolist()]
    expected = dict(zip(ranking, before[order].tolist()))  # the last class finds no value
    assert dict(zip(listed.tolist(), values.tolist())) == expected


def test_any_shape_and_what_comes_back_as_it_is():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 40, generator=generator)
    target = torch.randint(40, (3, 5), generator=generator)
    target[0, 0], logits[1, 1, 2], logits[1, 1, 3] = -100, torch.nan, torch.inf
    values, classes = logits.topk(20)
    repaired, listed = sort_topk(values, classes, target)
    inside = (classes == target[..., None]).any(-1, keepdim=True)
    expected = torch.where(inside, sort_logits(logits, target).gather(-1, classes), values)
    assert torch.equal(repaired.nan_to_num(), expected.nan_to_num())
    assert repaired.data_ptr() != values.data_ptr()
    repaired, listed = sort_topk(values, classes, target, insert=True)
    on_top = listed.gather(-1, repaired.argmax(-1, keepdim=True))[..., 0] == target
    for row in ((0, 0), (1, 1)):
        assert torch.equal(repaired[row].nan_to_num(), values[row].nan_to_num())
        assert torch.equal(listed[row], classes[row])
        on_top[row] = True
    assert on_top.all()
    half, _ = sort_topk(values.half(), classes, target, insert=True)
    assert torch.equal(half.nan_to_num(), repaired.half().nan_to_num())


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_classes_of_every_integer_type(dtype):
    "A target that their type cannot hold is not in the list, and can be put there."
    values, classes = torch.tensor([[9.0, 8.0, 7.0]]), torch.tensor([[44, 2, 3]])
    target = torch.tensor([44 + 256])
    repaired, listed = sort_topk(values, classes.to(dtype), target)
    assert torch.equal(repaired, values) and torch.equal(listed, classes)
    assert sort_topk(values, classes.to(dtype), target, insert=True)[1].tolist() == [[44, 2, 300]]


def test_gradients_of_topk_and_one_graph():
    values, classes = torch.tensor([5.0, 4.0, 3.0], requires_grad=True), torch.tensor([7, 1, 4])
    repaired, _ = sort_topk(values, classes, torch.tensor(4))
    gradient, = torch.autograd.grad(repaired @ torch.tensor([1.0, 2.0, 3.0]), values)
    assert gradient.tolist() == [3.0, 1.0, 2.0]
    values, classes = torch.randn(4, 50).topk(9)
    compiled = torch.compile(sort_topk, backend="aot_eager", fullgraph=True)
    for insert in (False, True):
        arguments = values, classes, torch.tensor([1, 2, 3, 60]), insert
        assert all(map(torch.equal, compiled(*arguments), sort_topk(*arguments)))


@pytest.mark.parametrize(("change", "error", "message"), [
    (lambda v, c, y: (v.long(), c, y), TypeError, "floating-point"),
    (lambda v, c, y: (v, c.float(), y), TypeError, "classes must be integers"),
    (lambda v, c, y: (v, c[:, :2], y), ValueError, r"shape of values.* shape \(2, 2\)"),
    (lambda v, c, y: (v, None, y), TypeError, "NoneType"),
    (lambda v, c, y: (v, c, y[:1]), ValueError, "target has shape"),
    (lambda v, c, y: (v, c, y - 5), ValueError, "target holds -4")])
def test_bad_lists_are_named(change, error, message):
    with pytest.raises(error, match=message):
        sort_topk(*change(torch.ones(2, 3), torch.arange(6).view(2, 3), torch.tensor([1, 9])))


def test_lists_of_a_row_that_is_left_out_stay():
    values, classes = torch.tensor([[3.0, 2.0], [3.0, 2.0]]), torch.tensor([[4, 7], [4, 7]])
    repaired, _ = sort_topk(values, classes, torch.tensor([7, 7]), ignore_index=7)
    assert torch.equal(repaired, values)
    repaired, _ = sort_topk(values, classes, torch.tensor([7, 9]), ignore_index=9)
    assert repaired.tolist() == [[2.0, 3.0], [3.0, 2.0]]


def some_rows(rows=64, classes=100):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, classes, generator=generator), torch.randint(
        classes, (rows,), generator=generator)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling needs a C++ compiler")
def test_compiles_to_machine_code():
    logits, target = some_rows()
    compiled = torch.compile(sort_logits, fullgraph=True)
    assert torch.equal(compiled(logits, target), sort_logits(logits, target))


def test_swap_exchanges_two_values():
    logits, target = some_rows(500, 9)
    logits = logits.mul(2).round()  # with ties
    for before, after, label in zip(logits, swap_logits(logits, target), target):
        expected = before.clone()
        if before[label] < before.max():
            expected[before.argmax()], expected[label] = before[label], before.max()
        assert torch.equal(after, expected)
