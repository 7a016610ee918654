"Losses in chunks, from logits and from hidden states, equal those of whole logits in float64."
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sortkd import DistillationLoss, kd_loss, list_methods, sort_logits, sort_topk
from sortkd.methods import OBJECTIVES, create_method
from sortkd.sorted_kl import sorted_kd_loss, sorted_kl_correction
from sortkd.tokens import LinearDistillationLoss

TOKENS, CLASSES = 30, 60
METHODS = [name for name in list_methods() if not create_method(name).strong_views
           and not OBJECTIVES[create_method(name).objective].relates_rows]


def a_batch(dtype=torch.float32, seed=0):
    "Hidden states, heads and a target of which some tokens do not count and half are wrong."
    torch.manual_seed(seed)
    hidden, teacher_hidden = torch.randn(2, TOKENS, 8), torch.randn(2, TOKENS, 12)
    heads = nn.Linear(8, CLASSES + 4), nn.Linear(12, CLASSES + 9)  # padded, each its own way
    with torch.no_grad():
        best = heads[1](teacher_hidden)[..., :CLASSES].argmax(-1)
    target = best.where(torch.rand(2, TOKENS) < 0.5, torch.randint(CLASSES, (2, TOKENS)))
    target[:, :5] = target[1, 20:] = -100
    return hidden.to(dtype), heads[0].to(dtype), teacher_hidden.to(dtype), heads[1].to(dtype), target


def results_of(loss, hidden, head, teacher_hidden, teacher_head, target, from_hidden, **settings):
    "The loss, its gradients for hidden states, head and temperature, and the wrong tokens."
    hidden = hidden.clone().requires_grad_()
    inputs = (hidden, head, teacher_hidden, teacher_head) if from_hidden else (
        head(hidden), teacher_head(teacher_hidden).detach())
    value = loss(*inputs, target, epoch=3, **settings)
    leaves = [hidden, *head.parameters(), *loss.parameters()]
    return [value.detach(), *torch.autograd.grad(2 * value, leaves)], loss.teacher_wrong


@pytest.mark.parametrize("method", METHODS)
def test_chunks_equal_whole_logits_in_float64(method):
    batch = a_batch()
    wide = [each.double() if each.is_floating_point() else each for each in batch[::2]]
    heads = [nn.Linear(*each.weight.shape[::-1]).double() for each in batch[1:4:2]]
    for wide_head, head in zip(heads, batch[1:4:2]):
        wide_head.load_state_dict(head.state_dict())
    wide = wide[0], heads[0], wide[1], heads[1], wide[2]
    expected, wrong = results_of(
        DistillationLoss(method, vocabulary=CLASSES).double(), *wide, from_hidden=False)
    for make, from_hidden in ((DistillationLoss, False), (LinearDistillationLoss, True)):
        for chunk in (10, 7):
            loss = make(method, vocabulary=CLASSES, chunk_tokens=chunk)
            for given, tolerance in ((batch, 2e-4), (wide, 1e-8)):
                found, wrong_found = results_of(loss.double() if given is wide else loss, *given,
                                                from_hidden=from_hidden)
                for one, other in zip(found, expected, strict=True):
                    assert (one - other).norm() <= tolerance * other.norm().clamp(min=0.05)
                if loss.method.uses_teacher:
                    assert torch.equal(wrong_found, wrong)


@pytest.mark.parametrize("make", [DistillationLoss, LinearDistillationLoss])
def test_accumulated_chunks_with_unequal_counts_add_up(make):
    hidden, head, teacher_hidden, teacher_head, target = a_batch()
    loss, count = make("kd+sort", vocabulary=CLASSES, chunk_tokens=4), (target != -100).sum()
    from_hidden = make is LinearDistillationLoss
    whole, _ = results_of(
        loss, hidden, head, teacher_hidden, teacher_head, target, from_hidden=from_hidden)
    halves = [results_of(loss, hidden[row], head, teacher_hidden[row], teacher_head, target[row],
                         from_hidden=from_hidden, num_items=count)[0]
              for row in (slice(0, 1), slice(1, 2))]
    torch.testing.assert_close(halves[0][0] + halves[1][0], whole[0])
    torch.testing.assert_close(torch.cat([halves[0][1], halves[1][1]]), whole[1])
    torch.testing.assert_close(halves[0][2] + halves[1][2], whole[2])


def test_heads_that_are_weights_frozen_or_narrow():
    hidden, head, teacher_hidden, teacher_head, target = a_batch(torch.bfloat16)
    loss = LinearDistillationLoss("kd+sort", vocabulary=CLASSES, chunk_tokens=7)
    value = loss(hidden, head, teacher_hidden, teacher_head, target)
    assert value.dtype == torch.float32 and head.weight.grad is None
    value.backward()
    assert head.weight.grad.dtype == torch.bfloat16 and not head.weight.grad[CLASSES:].any()
    whole = DistillationLoss("kd+sort", vocabulary=CLASSES)(
        head(hidden), teacher_head(teacher_hidden), target)
    torch.testing.assert_close(value, whole, rtol=1e-4, atol=0)
    hidden = hidden.clone().requires_grad_()
    frozen = loss(hidden, head.weight.detach(), teacher_hidden, teacher_head.weight, target)
    frozen.backward()
    assert hidden.grad.abs().sum() > 0 and teacher_head.weight.grad is None
    with torch.no_grad():
        assert loss(hidden, head.weight, teacher_hidden, teacher_head.weight, target) == frozen
    with pytest.raises(RuntimeError, match="differentiated once"):
        value.backward()


def test_where_nothing_counts():
    *batch, target = a_batch()
    for make, from_hidden in ((DistillationLoss, False), (LinearDistillationLoss, True)):
        loss = make("dkd(warmup_epochs=0)+sort", vocabulary=CLASSES, chunk_tokens=7)
        found, wrong = results_of(
            loss, *batch, torch.full_like(target, -100), from_hidden=from_hidden)
        assert not any(each.any() for each in found) and not wrong.any()


def test_an_optimizer_learns_the_same_with_autocast_and_compiled():
    batch = a_batch()
    loss = LinearDistillationLoss("kd+sort", vocabulary=CLASSES, chunk_tokens=25)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = loss(*batch)
    narrow.backward()
    wide = loss(*batch)
    torch.testing.assert_close(narrow, wide, rtol=2e-2, atol=0)
    assert batch[1].weight.grad.dtype == torch.float32
    compiled = torch.compile(loss, backend="eager")
    torch.testing.assert_close(compiled(*batch), wide)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("deep", [False, True])
def test_sorted_kl_is_kl_of_sorted_logits(dtype, temperature, deep):
    "In rows of a few classes and of many, which are searched in blocks; with ties and masks."
    for classes in (50, 5000):
        generator = torch.Generator().manual_seed(classes)
        student, teacher = torch.randn(2, 40, classes, generator=generator).to(dtype)
        teacher = (3 * teacher).round(decimals=1)
        teacher[:, 3], student[:, 3] = -torch.inf, -torch.inf
        target = torch.randint(4, classes if deep else 20, (40,), generator=generator)
        if not deep:
            teacher[:, 4:20] += 6
        student.requires_grad_()
        found = sorted_kd_loss(student, teacher, target, temperature)
        expected = kd_loss(student, sort_logits(teacher, target), temperature)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(*(torch.autograd.grad(each, student)[0] for each in (found, expected)))


def test_correction_of_lists():
    generator = torch.Generator().manual_seed(0)
    student, teacher = 3 * torch.randn(2, 4, 25, 300, generator=generator, dtype=torch.float64)
    target = torch.randint(300, (4, 25), generator=generator)
    target[0, :5] = -100
    values, classes = teacher.topk(200)
    values[1, 1, 150:], classes[1, 1, 150:] = -torch.inf, -1  # padded
    student.requires_grad_()
    correction = sorted_kl_correction(
        student.gather(-1, classes.clamp(min=0)), values, classes, target, teacher.logsumexp(-1))
    repaired, _ = sort_topk(values, classes, target)
    rows = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    whole = sort_logits(teacher, target).log_softmax(-1)
    after = F.kl_div(student.log_softmax(-1), whole, log_target=True, reduction="none").sum(-1)
    listed = (repaired != values).any(-1)
    torch.testing.assert_close((rows + correction)[listed], after[listed])
    assert not correction[~listed].any() and listed.any() and not listed[0, :5].any()
    gradient, = torch.autograd.grad(correction.sum(), student)
    expected, = torch.autograd.grad((after - rows)[listed].sum(), student)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize(("settings", "words"), [
    ({"method": "dist"}, "relates the rows"), ({"chunk_tokens": 0}, "chunk_tokens must be"),
    ({"method": "mlkd"}, "strongly augmented")])
def test_settings_are_refused(settings, words):
    for make in (DistillationLoss, LinearDistillationLoss):
        with pytest.raises(ValueError, match=words):
            make(**({"chunk_tokens": 7} | settings))


def test_a_vocabulary_that_targets_exceed_is_named():
    for vocabulary, words in ((CLASSES // 2, "target holds"), (CLASSES + 5, "vocabulary=65")):
        with pytest.raises(ValueError, match=words):
            LinearDistillationLoss(vocabulary=vocabulary)(*a_batch())


def test_the_plain_trainer_of_transformers(tmp_path, monkeypatch):
    "The example's loss is that of whole logits, and batches with unequal counts weigh by token."
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    import token_distillation
    trainer = token_distillation.main(str(tmp_path))
    losses = [each["loss"] for each in trainer.state.log_history if "loss" in each]
    assert len(losses) == 2 and losses[1] < losses[0]
    whole = DistillationLoss(
        "kd(temperature=1,ce_weight=0.5,kd_weight=0.5)+sort", vocabulary=300, reduction="sum")
    model, batch = trainer.model.eval(), next(iter(trainer.get_train_dataloader()))
    batch["labels"][0, :20] = -100
    count, target = (batch["labels"] != -100).sum(), F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    with torch.no_grad():
        logits = [each(batch["input_ids"]).logits for each in (model, trainer.teacher)]
        found = trainer.compute_loss(model, batch, num_items_in_batch=count)
    torch.testing.assert_close(found, whole(*logits, target) / count)
