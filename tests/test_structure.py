"Which part may use which, and how large modules, functions and cells may be; nothing is imported."
import ast
import json
import statistics
from graphlib import TopologicalSorter

from conftest import ROOT

MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path
           for path in sorted((ROOT / "sortkd").rglob("*.py"))
           if path.name not in ("__init__.py", "_modidx.py")}
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}
MAY_USE = {  # the method is `sortkd` itself
    "utils": {"utils"}, "sortkd": {"sortkd", "utils"}, "loops": {"loops", "sortkd", "utils"},
    "train": {"train", "sortkd", "utils"}, "experiment": {"experiment", "train", "sortkd", "utils"},
    "evidence": {"evidence", "experiment", "train", "sortkd", "utils"},
    "fronts": {"fronts", "evidence", "experiment", "train", "loops", "sortkd", "utils"}}


def part(module):
    return module.split(".")[-2]


def imports(module):
    "Modules of the package that `module` imports, also in functions, each with the names it takes."
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[:-node.level] if node.level else []
            source = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                whole = f"{source}.{alias.name}"
                if whole in MODULES:
                    yield whole, ""
                elif source in MODULES:
                    yield source, alias.name


IMPORTS = {module: sorted(set(imports(module))) for module in MODULES}


def test_no_part_uses_one_above_it():
    assert not [f"{module} uses {used}" for module, found in IMPORTS.items() for used, _ in found
                if part(used) not in MAY_USE[part(module)]]


def test_modules_have_no_circles():
    TopologicalSorter({module: {used for used, _ in found}
                       for module, found in IMPORTS.items()}).prepare()


def test_private_names_stay_in_their_module():
    assert not [f"{module} takes {name} from {used}" for module, found in IMPORTS.items()
                for used, name in found if name.startswith("_") and not name.startswith("__")]


def long_lines(module):
    "The numbers of lines over 100 columns, but for `__all__`, which nbdev writes."
    skipped = {number for node in TREES[module].body if isinstance(node, ast.Assign)
               and ast.unparse(node.targets[0]) == "__all__"
               for number in range(node.lineno, node.end_lineno + 1)}
    lines = MODULES[module].read_text().splitlines()
    return [f"{module}:{number}" for number, line in enumerate(lines, 1)
            if len(line) > 100 and number not in skipped]


def test_modules_functions_and_lines_are_short():
    sizes = {module: len(path.read_text().splitlines()) for module, path in MODULES.items()}
    functions = {f"{module}.{node.name}": node.end_lineno - node.lineno + 1
                 for module, tree in TREES.items() for node in ast.walk(tree)
                 if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    found = {"modules over 450 lines": [name for name, size in sizes.items() if size > 450],
             "functions over 60 lines": [name for name, size in functions.items() if size > 60],
             "lines over 100 columns": [line for module in MODULES for line in long_lines(module)]}
    assert not any(found.values()), "\n".join(
        f"{len(each)} {title}: {', '.join(each[:30])}" for title, each in found.items())


def exported_cells():
    "The number of lines of each cell that exports more than imports, and its notebook."
    for path in sorted((ROOT / "nbs").rglob("[0-9]*.ipynb")):
        for cell in json.loads(path.read_text())["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] == "code" and "#| export" in source:
                nodes = ast.parse(source).body
                if not all(isinstance(node, ast.Import | ast.ImportFrom) for node in nodes):
                    lines = [each for each in source.splitlines()
                             if each.strip() and not each.startswith("#|")]
                    yield len(lines), path.stem


def test_cells_are_small():
    sizes, names = zip(*sorted(exported_cells()))
    ninth = statistics.quantiles(sizes, n=10)[-1]
    largest = [f"{name}: {size}" for size, name in zip(sizes, names) if size > 70]
    figures = f"median {statistics.median(sizes)}, ninth decile {ninth:.0f}, over 70: {largest}"
    assert statistics.median(sizes) <= 12 and ninth <= 35 and not largest, figures
