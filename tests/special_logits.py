"Every method on masked, half and wide logits and on all integers: chapter 02, and test_methods."
import torch

from sortkd.methods import OBJECTIVES, create_method, list_methods

INTEGERS = [getattr(torch, f"{sign}int{bits}") for sign in ("u", "") for bits in (8, 16, 32, 64)]
CASES = {  # who is masked, the dtype of logits, that of the target, the number of classes
    "teacher masked": ("teacher", torch.float32, torch.int64, 9),
    "student masked": ("student", torch.float32, torch.int64, 9),
    "both masked": ("both", torch.float32, torch.int64, 9),
    "both masked, half": ("both", torch.float16, torch.int64, 9),
    "float16": ("", torch.float16, torch.int64, 9),
    "bfloat16": ("", torch.bfloat16, torch.int64, 9),
    **{f"target {str(each)[6:]}": ("", torch.float32, each, 9) for each in INTEGERS},
    "50,257 classes": ("", torch.float16, torch.int64, 50257)}
NO_LIMIT = ["normkd", "lskd", "lskd_dkd", "lskd_mlkd", "luminet"]  # -inf has no mean
INFINITE = ["revision"]  # a squared distance of logits
OUTCOMES = {  # the loss and its gradients
    "right": "those of float64, with a mask of -1e30 for the limit of ever lower ones",
    "∞": "infinite, like the limit", "NaN": "there is no limit",
    "finite": "LDRLD leaves out other classes that one network excludes altogether"}


def example(case):
    "Student, teacher, and the same for a second view, with the masks of the case; and the target."
    who, dtype, integers, classes = CASES[case]
    generator = torch.Generator().manual_seed(1)
    rows = 6 if classes < 100 else 2
    students, teachers = torch.randn(2, 2, rows, classes, generator=generator).mul(2).to(dtype)
    target = torch.arange(rows)
    masked = (torch.arange(classes) - target[:, None]) % classes % 4 == 3  # never the target
    lowest = ((target[:, None] + 1) % classes).expand(2, rows, 1)
    teachers.scatter_(2, lowest, -9.0)  # else RLD would find no class below some targets
    for name, logits in (("student", students), ("teacher", teachers)):
        if who in (name, "both"):
            logits.masked_fill_(masked, -torch.inf)
    return students.unbind(), teachers.unbind(), target.to(integers)


def loss_and_gradients(method, students, repaired, target):
    students = [each.clone().requires_grad_() for each in students]
    temperature, inputs = method.create_temperature(), students[: 1 + method.strong_views]
    if temperature is not None:
        inputs = [*inputs, temperature.raw]
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
    marks = [each.amax(1, keepdim=True) == -torch.inf for each in repaired]  # of skip
    tied = method.objective.endswith("mlkd") and method.repair in ("smooth", "loca", "mft")
    precision = torch.float32 if tied else torch.float64  # confidences are tied but for rounding
    low = [[each.to(precision).masked_fill(each == -torch.inf, -1e30) for each in both]
           for both in (students, repaired)]
    low[1] = [each.masked_fill(mark, -torch.inf) for each, mark in zip(low[1], marks)]
    expected, expected_gradients = loss_and_gradients(method, *low, target.long())
    beside_mask = any(gradient[student == -torch.inf].any()
                      for student, gradient in zip(students, gradients)
                      if gradient.shape == student.shape)
    if method.objective == "ldrld" and CASES[case][0]:  # -1e30 among themselves rounds
        sound = loss.isfinite() and gradients[0].isfinite().all() and not beside_mask
        return "finite" if sound else f"{loss}, {gradients}"
    if expected > 1e20:
        return "∞" if loss == torch.inf else f"{loss}, but the limit is infinite"
    for ours, limit in zip((loss, *gradients), (expected, *expected_gradients)):
        tolerance = 1e-2 if ours.dtype.itemsize < 4 else 2e-3 if case.startswith("50") else 1e-4
        # a temperature's gradient is a difference of large sums; below 6e-8, float16 has only 0
        scale = tolerance * float(expected if ours.shape == (1,) else limit.abs().max())
        scale = max(scale, 6e-8) if ours.dtype == torch.float16 else scale
        if not torch.allclose(ours.double(), limit.double(), rtol=tolerance, atol=scale):
            return f"{ours}, but the limit is {limit}"
    return "a gradient where the student is masked" if beside_mask else "right"


def table():
    "For each objective and kind of case, the outcomes of all its methods."
    found = {objective: {} for objective in OBJECTIVES}
    for name in list_methods():
        for case in CASES:
            kind = "half precision" if "float" in case else case
            kind = "integer targets" if case.startswith("target") else kind
            found[create_method(name).objective].setdefault(kind, set()).add(outcome(name, case))
    return {objective: {kind: " or ".join(sorted(each)) for kind, each in row.items()}
            for objective, row in found.items()}
