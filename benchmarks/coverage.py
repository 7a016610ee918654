"""Do the intervals and tests of chapter 50 hold what they promise? Large simulations, written to results/tables/coverage.md.

    python benchmarks/coverage.py --grids 4000

Pooled intervals over pairs that differ in seeds, deviation and teacher; verdicts by true effect and number of seeds, at the
deviation that was measured; false alarms of looking more than once. The chapter and the tests simulate the same with smaller numbers.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from sortkd.evidence.statistics import VERDICTS, compare, pool_effects, verdict_probabilities
from sortkd.evidence.tables import write_table

EFFECT = 0.3
DEVIATION = 0.68  # of a difference, as in results/tables/power.md


def pooled(grids: int, generator: np.random.Generator) -> pd.DataFrame:
    "How often the pooled interval covers, by kind of grid, number of teachers, and deviation of the effect between pairs."
    kinds = {
        "5 seeds, deviation 0.35": ([5, 5], [0.35, 0.35]),
        "5 seeds, deviations 0.35 and 0.7": ([5, 5], [0.35, 0.7]),
        "15 and 3 seeds, the noisy pairs have 3": ([15, 3], [0.35, 0.7]),
        "15 and 3 seeds, the noisy pairs have 15": ([3, 15], [0.35, 0.7]),
        "5 and 15 seeds, deviations 0.35 and 0.7": ([5, 15], [0.35, 0.7]),
    }
    rows = {}
    for kind, (seeds, deviations) in kinds.items():
        for pairs in (3, 6, 12):
            error = np.resize(np.array(deviations) / np.sqrt(seeds), pairs)
            rows[kind, f"{pairs} pairs"] = {f"between pairs {tau}": covers(list(range(pairs)), error, tau, 0.0, grids, generator) for tau in (0.0, 0.2, 0.5)}
    teachers = [0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 4, 5]
    for of_teacher in (0.1, 0.2, 0.3):
        rows[f"5 seeds, teachers differ by {of_teacher}", "12 pairs of 6 teachers"] = {
            f"between pairs {tau}": covers(teachers, np.full(12, 0.35 / np.sqrt(5)), tau, of_teacher, grids, generator) for tau in (0.0, 0.2, 0.5)
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(["grid", "pairs"])


def covers(teachers, error, between, of_teacher, grids, generator) -> str:
    shape = grids, len(teachers)
    shared = generator.normal(0, of_teacher, (grids, max(teachers) + 1))[:, teachers] + generator.normal(0, between, shape)
    means = EFFECT + shared + generator.normal(0, error, shape)
    names = {"comparison": np.repeat(np.arange(grids), len(teachers)), "teacher": np.tile(teachers, grids)}
    pooled = pool_effects(pd.DataFrame(names | {"mean": means.ravel(), "better": 0.5}))
    return f"{((pooled.low <= EFFECT) & (EFFECT <= pooled.high)).mean():.3f}"


def simulate(effect: float, seeds: int, experiments: int, generator: np.random.Generator) -> pd.DataFrame:
    values = generator.normal(effect, DEVIATION, (seeds, experiments))
    return compare({"a": values, "b": np.zeros_like(values)}, "a", "b")


def decided(experiments: int, generator: np.random.Generator) -> pd.DataFrame:
    "How often each verdict is reached at the measured deviation, simulated, and by formula in brackets."
    rows = {}
    for seeds in (5, 6, 15, 20, 24):
        for effect in (0.0, 0.2, 0.5, 0.8):
            found, formula = simulate(effect, seeds, experiments, generator).verdict, verdict_probabilities(effect, DEVIATION, seeds)
            rows[str(seeds), f"{effect:+.1f}"] = {name: f"{(found == name).mean():.3f} ({formula[name]:.3f})" for name in VERDICTS}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(["seeds", "true effect"])


def false_alarms(experiments: int, generator: np.random.Generator) -> pd.DataFrame:
    "How often an effect is found where there is none, by when one looks; at most 24 seeds."
    values = generator.normal(0, DEVIATION, (24, experiments))
    beyond = {seeds: compare({"a": values[:seeds], "b": 0 * values[:seeds]}, "a", "b").p < 0.05 for seeds in range(2, 25)}
    looks = {"once, after 15 seeds": beyond[15], "after 5, and again after 15": beyond[5] | beyond[15], "after every seed": np.any([*beyond.values()], axis=0)}
    return pd.DataFrame({"false alarms": {name: f"{found.mean():.3f}" for name, found in looks.items()}}).rename_axis("looks")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grids", type=int, default=4000, help="simulations of each case")
    parser.add_argument("--output", default="results/tables")
    given, generator = parser.parse_args(), np.random.default_rng(0)
    number = f"{given.grids:,} simulations of each case (python benchmarks/coverage.py --grids {given.grids})."
    tables = {
        "coverage": (pooled(given.grids, generator), "Pooled 95 % intervals: how often they cover the true mean effect"),
        "coverage_verdicts": (decided(given.grids, generator), f"Verdicts at ±0.5 points, deviation of a difference {DEVIATION}: simulated (formula)"),
        "coverage_looks": (false_alarms(given.grids, generator), "Looking more than once: false alarms at the 5 % level"),
    }
    for name, (table, caption) in tables.items():
        write_table(table, name, caption, [number], given.output)
        print((Path(given.output) / f"{name}.md").read_text())


if __name__ == "__main__":
    main()
