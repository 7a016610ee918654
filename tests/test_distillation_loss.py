"The training loss of every method, for logits of any shape."
import pytest
import torch
import torch.nn.functional as F
from conftest import EVERY_METHOD

from sortkd import DistillationLoss, create_method, sort_logits, swap_logits
from sortkd.losses import dist_loss, dkd_loss, kd_loss
from sortkd.methods import OBJECTIVES

CLASSES = 5
METHODS = [each for each in EVERY_METHOD if not create_method(
    each if isinstance(each, str) else each.values[0]).strong_views]


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(2, 30, CLASSES, generator=generator).unbind()
    return student, 3 * teacher, torch.randint(CLASSES, (30,), generator=generator)


@pytest.fixture
def tokens():
    "Logits `(B, T, V)`, with a prompt and padding, at which they may be anything."
    generator = torch.Generator().manual_seed(2)
    student, teacher = 2 * torch.randn(2, 4, 6, 7, generator=generator)
    target = torch.randint(7, (4, 6), generator=generator)
    target[0, :3] = target[2, 5] = -100
    student[2, 5], teacher[2, 5], teacher[0, 0] = -torch.inf, torch.nan, torch.inf
    return student, teacher, target


def test_loss_is_the_method_by_hand(logits):
    student, teacher, target = logits
    cross_entropy, repaired = F.cross_entropy(student, target), sort_logits(teacher, target)
    swapped = swap_logits(teacher, target)
    expected = {
        ("kd+sort", None): 0.1 * cross_entropy + 0.9 * kd_loss(student, repaired, 4.0),
        ("kd", None): 0.1 * cross_entropy + 0.9 * kd_loss(student, teacher, 4.0),
        ("kd+swap", None): 0.1 * cross_entropy + 0.9 * kd_loss(student, swapped, 4.0),
        ("dist+sort", 3): cross_entropy + dist_loss(student, repaired),
        ("dkd+sort", 5): cross_entropy + 5 / 20 * dkd_loss(student, repaired, target),
        ("dkd+sort", 20): cross_entropy + dkd_loss(student, repaired, target),
        ("ce", None): cross_entropy}
    for (method, epoch), value in expected.items():
        torch.testing.assert_close(DistillationLoss(method)(*logits, epoch), value)
    assert len({round(value.item(), 5) for value in expected.values()}) == len(expected)
    no_warmup = DistillationLoss("dkd+sort", warmup_epochs=0)  # which needs no epoch
    torch.testing.assert_close(no_warmup(*logits), expected["dkd+sort", 20])
    own_numbers = DistillationLoss("kd+sort", temperature=2.0, ce_weight=0.0, kd_weight=1.0)
    torch.testing.assert_close(own_numbers(*logits), kd_loss(student, repaired, 2.0))
    assert torch.equal(own_numbers.teacher_wrong, teacher.argmax(1) != target)
    assert 0 < own_numbers.teacher_wrong.sum() < len(target)
    no_teacher = DistillationLoss("ce")
    torch.testing.assert_close(no_teacher(student, None, target), cross_entropy)
    assert no_teacher.teacher_wrong is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_before_anything_is_computed(logits, dtype):
    student, teacher, target = logits
    student, teacher, loss = student.to(dtype), teacher.to(dtype), DistillationLoss("kd+sort")
    value = loss(student, teacher, target)
    assert value.dtype == torch.float32
    assert torch.equal(value, loss(student.float(), teacher.float(), target))
    assert loss(student.double(), teacher.double(), target).dtype == torch.float64


def test_gradients_reach_the_student_and_a_learned_temperature_only(logits):
    student, teacher, target = logits
    student, teacher = student.clone().requires_grad_(), teacher.clone().requires_grad_()
    loss = DistillationLoss("ctkd+sort")
    loss(student, teacher, target, epoch=5).backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None
    (raw,) = loss.parameters()
    assert raw.grad.abs().sum() > 0
    assert not list(DistillationLoss("kd+sort").parameters())


@pytest.mark.parametrize("method", ["dkd+sort", "lskd_dkd", "ctkd", "kd(warmup_epochs=3)"])
def test_a_method_that_changes_with_the_epoch_must_know_it(logits, method):
    loss = DistillationLoss(method)
    with pytest.raises(ValueError, match="changes from epoch to epoch"):
        loss(*logits)
    # The gradient of a learned temperature changes, not the value.
    assert method == "ctkd" or loss(*logits, epoch=1) != loss(*logits, epoch=2)
    with pytest.raises(ValueError, match="counted from 1"):
        loss(*logits, epoch=0)


@pytest.mark.parametrize(("change", "error", "message"), [
    (lambda student, teacher, target: ({}, teacher, target), TypeError, "of type dict"),
    (lambda student, teacher, target: (student.long(), teacher, target), TypeError, "int64"),
    (lambda student, teacher, target: (student, None, target), TypeError, "teacher_logits"),
    (lambda student, teacher, target: (student, teacher[:, :4], target), ValueError, "classes"),
    (lambda student, teacher, target: (student, teacher, target[:7]), ValueError, "has shape"),
    (lambda student, teacher, target: (student, teacher, student), TypeError, "class indices"),
    (lambda student, teacher, target: (student, teacher, target - 99), ValueError, "holds")])
def test_bad_input_is_named(logits, change, error, message):
    for method in ("kd", "kd+sort"):
        with pytest.raises(error, match=message):
            DistillationLoss(method)(*change(*logits))


def test_bad_settings_are_refused(logits):
    for method in ("mlkd", "lskd_mlkd+sort", "sld"):
        with pytest.raises(ValueError, match="strongly augmented views"):
            DistillationLoss(method)
    with pytest.raises(ValueError, match="reduction must be 'mean' or 'sum'"):
        DistillationLoss(reduction="none")
    for count in (0, -3, float("nan")):
        with pytest.raises(ValueError, match="num_items must be greater than 0"):
            DistillationLoss()(*logits, num_items=count)


@pytest.mark.parametrize("method", METHODS)
def test_rows_that_do_not_count_are_as_if_they_were_absent(tokens, method):
    student, teacher, target = tokens
    counts, loss = target != -100, DistillationLoss(method)
    value = loss(student.requires_grad_(), teacher, target, 3)
    (gradient,) = torch.autograd.grad(value, student)
    expected = loss(student[counts], teacher[counts], target[counts], 3)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, student)[0])
    assert not gradient[~counts].any()
    if loss.method.uses_teacher:
        loss(student, teacher, target, 3)
        assert loss.teacher_wrong.shape == target.shape and not loss.teacher_wrong[~counts].any()
    dense = DistillationLoss(method, dim=1, ignore_index=99)
    maps = (each.movedim(2, 1)[..., None] for each in (student, teacher))
    torch.testing.assert_close(dense(*maps, target.where(counts, 99)[..., None], 3), value)


@pytest.mark.parametrize("method", METHODS)
def test_rows_that_all_count_change_no_bit(logits, method):
    student, teacher, target = logits
    by_method, loss = create_method(method), DistillationLoss(method)
    repaired = by_method.repair_logits(teacher, target) if by_method.uses_teacher else None
    expected = by_method.loss(student, repaired, target, 3, temperature=loss.temperature)
    assert torch.equal(loss(*logits, 3), expected)


def test_a_batch_in_which_nothing_counts(tokens):
    student, teacher, target = tokens
    student, target = student.nan_to_num(neginf=0.0).requires_grad_(), torch.full_like(target, -100)
    loss = DistillationLoss("kd+sort")(student, teacher, target)
    loss.backward()
    assert loss == 0 and not student.grad.any()
    with pytest.raises(ValueError, match="at least one row"):  # DIST relates rows
        DistillationLoss("dist")(student, teacher, target)


def test_no_target_of_a_narrow_type_is_taken_for_padding():
    "As uint8, -100 is 156: a class like any other."
    student, teacher = torch.randn(2, 2, 200, generator=torch.Generator().manual_seed(0))
    loss, target = DistillationLoss("kd+sort"), torch.tensor([156, 3])
    for dtype in (torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint64):
        assert torch.equal(loss(student, teacher, target.to(dtype)), loss(student, teacher, target))


@pytest.mark.parametrize("method", METHODS)
def test_losses_of_unequal_parts_add_up_to_that_of_the_whole(method):
    "In value and gradient, also of a learned temperature; a method that relates rows has no parts."
    generator = torch.Generator().manual_seed(5)
    student, teacher = 3 * torch.randn(2, 4, 8, 7, generator=generator, dtype=torch.float64)
    target = torch.randint(7, (4, 8), generator=generator)
    target[0, :2] = target[2:, 1:] = -100  # 14 rows count in one half and 2 in the other
    mean, halves = DistillationLoss(method).double(), [slice(0, 2), slice(2, 4)]
    if OBJECTIVES[mean.method.objective].relates_rows:
        for refused in (lambda: mean(student, teacher, target, 3, num_items=16),
                        lambda: DistillationLoss(method, reduction="sum")):
            with pytest.raises(ValueError, match="relates the rows"):
                refused()
        return

    def sum_of_parts(loss, **named):
        parts = ((student[each], teacher[each], target[each]) for each in halves)
        return sum(loss(*part, 3, **named) for part in parts)

    def gradients(loss):
        gradients = torch.autograd.grad(loss, [student, *mean.parameters()])
        return torch.cat([each.flatten().double() for each in gradients])

    whole = mean(student.requires_grad_(), teacher, target, 3)
    expected = gradients(whole)
    for count in (16, torch.tensor(16)):
        parts = sum_of_parts(mean, num_items=count)
        torch.testing.assert_close(parts, whole, rtol=1e-9, atol=0)
        torch.testing.assert_close(gradients(parts), expected, rtol=1e-6, atol=1e-9)
    summed = sum_of_parts(DistillationLoss(method, reduction="sum"))
    torch.testing.assert_close(summed, 16 * whole, rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", ["kd+sort", "dkd+revise", "lskd", "ctkd", "dist+sort"])
def test_autocast_and_compile_change_nothing(tokens, method):
    student, teacher, target = tokens
    loss, one_graph = DistillationLoss(method), not method.startswith("dist")
    expected = loss(student, teacher, target, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(student, teacher, target, 3), expected)
    torch.compiler.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=one_graph)
    value = compiled(student.requires_grad_(), teacher, target, 3)
    torch.testing.assert_close(value, expected)
    assert torch.autograd.grad(value, student)[0].isfinite().all()
