"""Every method on logits that are masked, of half precision or of a vocabulary's size, and on targets of every integer
type. One list makes the table of chapter 02 and the tests of tests/test_methods.py.
"""
import torch

from sortkd.methods import OBJECTIVES, create_method, list_methods

INTEGERS = [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32, torch.int64]
CASES = {  # who is masked, the dtype of logits, that of the target, the number of classes
    "teacher masked": ("teacher", torch.float32, torch.int64, 9),
    "student masked": ("student", torch.float32, torch.int64, 9),
    "both masked": ("both", torch.float32, torch.int64, 9),
    "both masked, half": ("both", torch.float16, torch.int64, 9),
    **{str(dtype).removeprefix("torch."): ("", dtype, torch.int64, 9) for dtype in (torch.float16, torch.bfloat16)},
    **{f"target {str(dtype).removeprefix('torch.')}": ("", torch.float32, dtype, 9) for dtype in INTEGERS},
    "50,257 classes": ("", torch.float16, torch.int64, 50257),
}
NO_LIMIT = [name for name, each in OBJECTIVES.items() if each.standardize or name in ("normkd", "lskd_mlkd")]  # no mean at -inf
OUTCOMES = {  # the loss and its gradients
    "right": "those of float64, with a mask of -1e30 for the limit of ever lower ones", "∞": "infinite, like the limit",
    "NaN": "there is no limit",
}


def example(case):
    "Student, teacher, and the same for a second view, with the masks of the case; and the target."
    who, dtype, integers, classes = CASES[case]
    generator = torch.Generator().manual_seed(1)
    rows = 6 if classes < 100 else 2
    student, strong_student, teacher, strong_teacher = torch.randn(4, rows, classes, generator=generator).mul(2).to(dtype)
    target = torch.arange(rows)
    masked = (torch.arange(classes) - target[:, None]) % classes % 4 == 3  # two classes of each row, never the target
    for logits in (teacher, strong_teacher):  # else RLD would find no class below some targets
        logits.scatter_(1, (target[:, None] + 1) % classes, -9.0)
    for logits in [student, strong_student] * (who in ("student", "both")) + [teacher, strong_teacher] * (who in ("teacher", "both")):
        logits.masked_fill_(masked, -torch.inf)
    return (student, strong_student), (teacher, strong_teacher), target.to(integers)


def loss_and_gradients(method, students, repaired, target):
    students, temperature = [each.clone().requires_grad_() for each in students], method.create_temperature()
    inputs = students[: 1 + method.strong_views] + ([temperature.raw] if temperature is not None else [])
    teacher = repaired[0] if method.uses_teacher else None
    strong = (students[1], repaired[1]) if method.strong_views else None
    loss = method.loss(students[0], teacher, target, 200, strong, temperature)
    return loss.detach(), torch.autograd.grad(loss, inputs)


def outcome(name, case):
    "Which of `OUTCOMES` the method's loss is, or what is wrong with it."
    method, (students, teachers, target) = create_method(name), example(case)
    repaired = [method.repair_logits(each, target) for each in teachers]
    loss, gradients = loss_and_gradients(method, students, repaired, target)
    if loss.isnan():
        return "NaN"
    marks = [each.amax(1, keepdim=True) == -torch.inf for each in repaired]  # of skip: they are no logits
    tied = method.objective.endswith("mlkd") and method.repair in ("smooth", "loca", "mft")  # in confidence, but for rounding
    precision = torch.float32 if tied else torch.float64
    low = [[each.to(precision).masked_fill(each == -torch.inf, -1e30) for each in both] for both in (students, repaired)]
    low[1] = [each.masked_fill(mark, -torch.inf) for each, mark in zip(low[1], marks)]
    expected, expected_gradients = loss_and_gradients(method, *low, target.long())
    if expected > 1e20:
        return "∞" if loss == torch.inf else f"{loss}, but the limit is infinite"
    for ours, limit in zip((loss, *gradients), (expected, *expected_gradients)):
        tolerance = 1e-2 if ours.dtype.itemsize < 4 else 2e-3 if case.startswith("50") else 1e-4
        scale = expected if ours.shape == (1,) else limit.abs().max()  # a temperature's gradient is a difference of large sums
        if not torch.allclose(ours.double(), limit.double(), rtol=tolerance, atol=tolerance * float(scale)):
            return f"{ours}, but the limit is {limit}"
    if any(gradient[student == -torch.inf].any() for student, gradient in zip(students[: 1 + method.strong_views], gradients)):
        return "a gradient where the student is masked"
    return "right"


def table():
    "For each objective and kind of case, the outcomes of all its methods."
    found = {objective: {} for objective in OBJECTIVES}
    for name in list_methods():
        for case in CASES:
            kind = "integer targets" if case.startswith("target") else "half precision" if "float" in case else case
            found[create_method(name).objective].setdefault(kind, set()).add(outcome(name, case))
    return {objective: {kind: " or ".join(sorted(each)) for kind, each in row.items()} for objective, row in found.items()}
