"Teachers' lists in the layouts of DistillKit, Axolotl and vLLM, their labels, and their loss."
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from sortkd import kd_loss
from sortkd.token_lists import (TokenLists, read_axolotl, read_distillkit, read_distillkit_raw,
                                read_vllm, shifted_target, topk_kd_loss)

GOLDENS = np.load(Path(__file__).parent / "goldens" / "distillkit.npz")
CONFIGS = json.loads(str(GOLDENS["configs"]))
CLASSES, K = 12, 4
INPUT_IDS = [5, 2, 7, 1, 1, 8, 11]
EXACT = {"d": CLASSES, "k": K, "exact_k": K, "residual_bins": [], "delta_encoding": False}


def teacher():
    "Log-probabilities `(T, V)` of a teacher that looks at the last token alone, row t at token t."
    bigrams = 2 * torch.randn(CLASSES, CLASSES, generator=torch.Generator().manual_seed(3))
    return bigrams.log_softmax(-1)[INPUT_IDS]


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


def vllm_entries():
    entries = [None]
    for row, following in zip(teacher(), INPUT_IDS[1:]):
        rank = {int(each): place for place, each in enumerate(row.argsort(descending=True), 1)}
        tokens = [following, *(token for token in rank if rank[token] <= K)]
        entries.append({token: Logprob(row[token].item(), rank[token]) for token in tokens})
    return entries


def pack(classes, bits):
    digits = "".join(f"{each:0{bits}b}" for each in classes)
    return [int(digits[at:at + 8].ljust(8, "0"), 2) for at in range(0, len(digits), 8)]


def raw(kept, count=None):
    return {"input_ids": INPUT_IDS, "token_ids": kept.indices[:count].tolist(),
            "top_values": kept.values[:count].tolist()}


def compressed(kept, count=None):
    return {"input_ids": INPUT_IDS,
            "compressed_logprobs": [row.numpy().tobytes() for row in kept.values[:count]],
            "bytepacked_indices": [pack(row, 4) for row in kept.indices[:count].tolist()]}


def axolotl(kept, temperature=1.0):
    "Row t is the distribution of token t, as of chat templates; the first two tokens are a prompt."
    softened = (kept.values / temperature).log_softmax(-1)
    return {"input_ids": INPUT_IDS,
            "target_logprobs": [[-torch.inf] * K, [-1e9] * K, *softened[1:-1].tolist()],
            "target_token_ids": [list(range(K)), [0] * K, *kept.indices[1:-1].tolist()],
            "target_mask": [[0] * K] * 2 + [[1] * K] * (len(INPUT_IDS) - 2)}


def test_each_layout_gives_row_t_the_distribution_of_the_next_token():
    kept, last = teacher().topk(K), len(INPUT_IDS) - 1
    over_list = kept.values.log_softmax(-1)
    as_json = json.loads(json.dumps([entry and {token: vars(each) for token, each in entry.items()}
                                     for entry in vllm_entries()]))
    unshifted = axolotl(kept)
    shifted = {name: column[name != "input_ids":] for name, column in unshifted.items()}
    shuffled = torch.tensor([2, 0, 3, 1])
    read = {  # lists, rows that they have, values
        "raw": (read_distillkit_raw(raw(kept, last)), range(last), kept.values),
        "raw, in another order": (
            read_distillkit_raw({"input_ids": INPUT_IDS, "token_ids": kept.indices[:, shuffled],
                                 "top_values": kept.values[:, shuffled].numpy()}),
            range(last + 1), kept.values),
        "raw logits": (read_distillkit_raw(raw(type(kept)((kept.values + 3, kept.indices)), last),
                                           log_values=False), range(last), over_list),
        "compressed": (read_distillkit(compressed(kept, last), EXACT), range(last), kept.values),
        "compressed, packed": (
            read_distillkit(compressed(kept), EXACT), range(last + 1), kept.values),
        "axolotl": (read_axolotl(unshifted), range(1, last), over_list),
        "axolotl at 2": (read_axolotl(axolotl(kept, 2), temperature=2), range(1, last), over_list),
        "axolotl, shifted": (read_axolotl(shifted, shifted=True), range(1, last), over_list),
        "vllm": (read_vllm(vllm_entries(), K), range(last), kept.values),
        "vllm, json": (read_vllm(as_json, K), range(last), kept.values)}
    for name, (lists, rows, values) in read.items():
        assert lists.log_probs.dtype == torch.float32 and lists.classes.dtype == torch.int64, name
        assert lists.log_probs.shape == lists.classes.shape == (len(INPUT_IDS), K), name
        has_list = torch.zeros(len(INPUT_IDS), dtype=torch.bool)
        has_list[list(rows)] = True
        assert torch.equal(lists.classes >= 0, has_list[:, None].expand(-1, K)), name
        assert torch.equal(lists.log_probs > -torch.inf, lists.classes >= 0), name
        assert torch.equal(lists.classes[has_list], kept.indices[has_list]), name
        torch.testing.assert_close(lists.log_probs[has_list], values[has_list])


@pytest.mark.parametrize("name", CONFIGS)
def test_distillkits_own_rows_are_read_as_it_reads_them(name):
    columns = ("compressed_logprobs", "bytepacked_indices", "log_probs", "classes")
    row = {key: torch.from_numpy(GOLDENS[f"{name}_{key}"]) for key in columns}
    lists = read_distillkit(row | {"input_ids": [0, 0, 0]}, CONFIGS[name])
    expected, order = row["log_probs"].float().sort(descending=True, stable=True)
    torch.testing.assert_close(lists.log_probs, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(lists.classes, row["classes"].long().gather(1, order))
    one = {key: row[key][1:2].tolist() for key in columns[:2]}  # as Parquet gives it
    alone = read_distillkit(one | {"input_ids": [0]}, CONFIGS[name])
    assert torch.equal(alone.log_probs[0], lists.log_probs[1])


def test_rows_that_do_not_fit_are_refused():
    row, kept = compressed(teacher().topk(K)), teacher().topk(K)
    for change, message in (({"exact_k": 3}, "16 bytes a token, but config describes 12"),
                            ({"residual_bins": [{"element_bits": 1}]}, "by DistillKit alone"),
                            ({"d": 300}, "has 2 bytes a token, but k = 4 and d = 300 need 5")):
        with pytest.raises(ValueError, match=message):
            read_distillkit(row, EXACT | change)
    for row, message in (
            ({"input_ids": [1], "top_values": [[-1.0]]}, "no column 'token_ids'; its columns are"),
            (raw(kept) | {"input_ids": INPUT_IDS[1:]}, "7 lists, but only 6 input_ids"),
            (raw(kept) | {"token_ids": kept.indices[:, :2]}, "do not belong together")):
        with pytest.raises(ValueError, match=message):
            read_distillkit_raw(row)
    with pytest.raises(ValueError, match="target_mask has shape"):
        read_axolotl(axolotl(kept) | {"target_mask": [[1]] * 7})


def test_missing_values_and_ragged_rows_are_empty_places():
    lists = read_distillkit_raw({
        "input_ids": [1, 2, 3, 4], "token_ids": [[7, 8, 9], [5], None, [6, 7, 8]],
        "top_values": [[-2.0, -torch.inf, -1.0], [-0.5], None, [torch.nan, -1.0, -2.0]]})
    assert lists.classes.tolist() == [[9, 7, -1], [5, -1, -1], [-1] * 3, [7, 8, -1]]
    assert lists.log_probs[0].tolist() == [-1, -2, -torch.inf]
    assert read_vllm([None], 3).classes.tolist() == [[-1] * 3]
    tied = {3: Logprob(-1.0, 3), 1: Logprob(-1.0, 1), 2: {"logprob": -1.0, "rank": 2}}
    assert read_vllm([None, tied], 2).classes[0].tolist() == [1, 2]


def test_targets_are_the_next_tokens_that_count():
    ids = torch.tensor([[4, 5, 6, 7], [8, 9, 0, 0]], dtype=torch.int32)
    assert shifted_target(ids).tolist() == [[5, 6, 7, -100], [9, 0, 0, -100]]
    padding = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    for mask in (padding, padding.bool()):
        assert shifted_target(ids, mask).tolist() == [[5, 6, 7, -100], [9, -100, -100, -100]]
    answers = torch.tensor([[0, 0, 1, 1], [0, 1, 0, 1]])
    assert shifted_target(ids, answers, -1).tolist() == [[-1, 6, 7, -1], [9, -1, 0, -1]]
    documents = torch.tensor([1, 1, 2, 2])
    assert shifted_target(ids[0], documents).tolist() == [5, -100, 7, -100]
    assert shifted_target(torch.tensor([-100, -100, 3])).tolist() == [-100, 3, -100]
    assert shifted_target(torch.tensor([3])).tolist() == [-100]
    with pytest.raises(ValueError, match="mask must have the shape"):
        shifted_target(ids, padding[0])


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(4)
    return 2 * torch.randn(2, 3, 5, 20, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_whole_vocabulary_as_list_is_kd(rows, dtype):
    student, teacher = rows.to(dtype)
    for tail, temperature in (("class", 1), ("zero", 1), ("zero", 4)):
        logits, same = student.clone().requires_grad_(), student.clone().requires_grad_()
        loss = topk_kd_loss(logits, *teacher.log_softmax(-1).topk(20), tail, temperature)
        expected = kd_loss(same, teacher, temperature)
        loss.backward(), expected.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(logits.grad, same.grad, rtol=1e-4, atol=1e-6)


def test_losses_of_short_lists_by_hand(rows):
    student, teacher = rows
    log_p, log_q, (values, classes) = (each for each in (
        teacher.log_softmax(-1), student.log_softmax(-1), teacher.log_softmax(-1).topk(6)))
    listed = torch.zeros_like(log_p, dtype=torch.bool).scatter(-1, classes, True)
    merged = [torch.cat([each.masked_fill(~listed, -torch.inf),
                         each.masked_fill(listed, -torch.inf).logsumexp(-1, keepdim=True)], -1)
              for each in (log_q, log_p)]
    torch.testing.assert_close(topk_kd_loss(student, values, classes), kd_loss(*merged, 1))
    alone = log_p.masked_fill(~listed, -torch.inf)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    for temperature in (1, 3):
        loss = topk_kd_loss(student, values[..., order], classes[..., order], "zero", temperature)
        torch.testing.assert_close(loss, kd_loss(student, alone, temperature))
    for tail in ("class", "zero"):
        assert torch.autograd.gradcheck(
            topk_kd_loss, (student.requires_grad_(), values, classes, tail))


@pytest.mark.parametrize("tail", ["class", "zero"])
def test_empty_places_and_rows_do_not_count(rows, tail):
    student, (values, classes) = rows[0], rows[1].log_softmax(-1).topk(6)
    padded = TokenLists(torch.cat([values, values.new_full((3, 5, 2), -torch.inf)], -1),
                        torch.cat([classes, classes.new_full((3, 5, 2), -1)], -1))
    loss = topk_kd_loss(student, values, classes, tail)
    torch.testing.assert_close(topk_kd_loss(student, *padded, tail), loss)
    other = TokenLists(padded.log_probs.nan_to_num(neginf=-3.0), padded.classes)  # -1 is enough
    torch.testing.assert_close(topk_kd_loss(student, *other, tail), loss)
    values[0], classes[1] = -torch.inf, -1
    logits = student.clone().requires_grad_()
    topk_kd_loss(logits, values, classes, tail).backward()
    torch.testing.assert_close(topk_kd_loss(logits, values, classes, tail),
                               topk_kd_loss(logits[2], values[2], classes[2], tail))
    assert not logits.grad[:2].any() and logits.grad[2].isfinite().all()
    parts = [topk_kd_loss(logits[:, at], values[:, at], classes[:, at], tail, num_items=5)
             for at in range(5)]
    torch.testing.assert_close(sum(parts), topk_kd_loss(logits, values, classes, tail))
    assert topk_kd_loss(student[:2], values[:2], classes[:2], tail) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tail", ["class", "zero"])
def test_extreme_lists_and_students_have_finite_losses(dtype, tail):
    classes = torch.tensor([[0, 1], [0, 1], [0, 1], [2, 3]])
    lists = torch.tensor([[-0.0001, -1.0], [0.0, -200.0], [-1.0, -2.0], [-0.6931, -0.6931]])
    student = torch.tensor([[60.0, -60, 0, 0], [60, -60, 0, 0], [14, 0, 0, 0], [60, -60, 0, 0]])
    student = student.to(dtype).requires_grad_()
    loss = topk_kd_loss(student, lists, classes, tail)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite() and loss >= 0
    assert student.grad.dtype == dtype and student.grad.isfinite().all()
    if tail == "class":  # the third's mass outside of the list still pulls the student
        assert student.grad[2, 2:].lt(0).all()
    masked = torch.tensor([[2.0, 1.0, -torch.inf, -torch.inf]], requires_grad=True)
    topk_kd_loss(masked, lists[:1], classes[:1], tail).backward()
    assert masked.grad.isfinite().all()


def test_what_the_loss_cannot_take_is_refused(rows):
    student, (values, classes) = rows[0], rows[1].log_softmax(-1).topk(6)
    for arguments, message in (
            ((student, values, classes, "class", 2), "at temperature 2 the mass outside"),
            ((student, values, classes, "uniform"), "tail must be 'class' or 'zero'"),
            ((student[..., :10], values, classes), "vocabulary has only 10"),
            ((student[:, 1:], values, classes), "lists need shapes"),
            ((student, values, values), "classes must be integers")):
        with pytest.raises((TypeError, ValueError), match=message):
            topk_kd_loss(*arguments)
