"""Do the intervals and tests of chapter 50 hold what they promise? Large simulations.

    python benchmarks/coverage.py --cases 4000

Every kind of interval that a table, a figure or a command prints, at the standard deviations of differences that were measured;
verdicts by true effect and number of seeds; false alarms of looking more than once. Written to results/measurements/coverage.json
and results/tables/coverage*.md. The chapter and the tests simulate the same with smaller numbers.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from sortkd.evidence.statistics import VERDICTS, compare, crossed_interval, deviation_interval, t_half_width, verdict_probabilities
from sortkd.evidence.tables import write_table

EFFECT = 0.3
SEEDS = (5, 8, 16, 60)
DEVIATIONS = (0.50, 0.64, 0.68, 1.10)  # of a difference, in results/tables/power.md: weak_teacher, few_steps, sorting, the short runs
DEVIATION = 0.68
IMAGES = 200


def covered(low, high, truth) -> float:
    return float(np.mean((low <= truth) & (truth <= high)))


def by_seed(seeds: int, deviation: float, cases: int, generator: np.random.Generator) -> dict[str, float]:
    "Intervals that are computed from one number for each seed."
    def drawn(mean, std, count=seeds):
        return generator.normal(mean, std, (count, cases))

    first, second = drawn(57 + EFFECT, deviation / 2**0.5), drawn(57, deviation / 2**0.5)
    paired, apart = (compare({"a": first, "b": second}, "a", "b", paired=each) for each in (True, False))
    half = t_half_width(first.std(0, ddof=1), seeds)
    question = compare({"more": drawn(0.5, deviation), "less": drawn(0.2, deviation)}, "more", "less")
    return {
        "effect, seed by seed (t)": covered(paired.low, paired.high, EFFECT),
        "effect, two groups (Welch)": covered(apart.low, apart.high, EFFECT),
        "accuracy of one method (t)": covered(first.mean(0) - half, first.mean(0) + half, 57 + EFFECT),
        "standard deviation (chi-square)": covered(*deviation_interval(paired["std"], seeds), deviation),
        "effect of one plan minus another's (t)": covered(question.low, question.high, 0.3),
        **on_images(seeds, deviation, cases, generator),
    }


def on_images(seeds: int, deviation: float, cases: int, generator: np.random.Generator) -> dict[str, float]:
    "Effects apart on the test images that a teacher gets right and wrong, as many and as easy as those of the committed teachers."
    effects = {}
    for name, images, chance in (("right", 6900, 0.72), ("wrong", 3100, 0.24)):
        chances = chance + generator.normal(0, deviation / 2**0.5 / 100, (2, seeds, cases)) + np.array([EFFECT / 100, 0]).reshape(2, 1, 1)
        effects[name] = 100 * generator.binomial(images, chances) / images
    apart = {name: compare(dict(zip("ab", both)), "a", "b") for name, both in effects.items()}
    second = compare({name: first - plain for name, (first, plain) in effects.items()}, "wrong", "right")
    return {f"effect on images that the teacher gets {name} (t)": covered(row.low, row.high, EFFECT) for name, row in apart.items()} | {
        "the second minus the first (t)": covered(second.low, second.high, 0)}


def by_image(seeds: int, deviation: float, cases: int, generator: np.random.Generator) -> dict[str, float]:
    "The interval over seeds and images, from bits; as wide as those of the runs."
    found = []
    for _ in range(cases):
        parts = (deviation, (seeds, 1)), (5, (1, IMAGES)), (12, (seeds, IMAGES))  # in points
        differences = sum(generator.normal(0, std / 100, shape) for std, shape in parts)
        found.append(crossed_interval(np.zeros_like(differences), differences))
    return {"effect, over seeds and images": covered(*np.array(found).T, 0)}


def intervals(cases: int, generator: np.random.Generator) -> pd.DataFrame:
    "How often each kind of interval covers, by deviation (index) and number of seeds (columns)."
    found = {}
    for deviation in DEVIATIONS:
        for seeds in SEEDS:
            kinds = by_seed(seeds, deviation, cases, generator) | (by_image(seeds, deviation, cases, generator) if deviation == DEVIATION else {})
            found |= {(kind, f"{deviation:.2f}", seeds): share for kind, share in kinds.items()}
    table = pd.Series(found).unstack().sort_index(level=0, sort_remaining=True)
    top1 = [(right, binomtest(right, 10_000).proportion_ci(method="wilson")) for right in generator.binomial(10_000, 0.57, cases)]
    wilson = covered(np.array([each.low for _, each in top1]), np.array([each.high for _, each in top1]), 0.57)
    table.loc[("top-1 of one student, over 10,000 images (Wilson)", "–"), :] = wilson
    return table.rename_axis(["interval", "deviation"])


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--cases", type=int, default=4000, help="simulations of each case")
    parser.add_argument("--results", type=Path, default=Path("results"))
    given, generator = parser.parse_args(), np.random.default_rng(0)
    command = f"python benchmarks/coverage.py --cases {given.cases}"
    number = f"{given.cases:,} simulations of each case ({command})."
    coverage = intervals(given.cases, generator)
    rows = [{"interval": kind, "deviation": deviation, "seeds": {str(name): share for name, share in row.items()}} for (kind, deviation), row in coverage.iterrows()]
    file = given.results / "measurements" / "coverage.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"command": command, "covers": rows}, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    tables = {
        "coverage": (coverage.map("{:.3f}".format).rename(columns="n = {}".format), "95 % intervals: how often they cover the true value, by number of seeds",
                     [f"Deviation: of a difference between seeds, in points, as measured. {number}"]),
        "coverage_verdicts": (decided(given.cases, generator), f"Verdicts at ±0.5 points, deviation of a difference {DEVIATION}: simulated (formula)", [number]),
        "coverage_looks": (false_alarms(given.cases, generator), "Looking more than once: false alarms at the 5 % level", [number]),
    }
    for name, (table, caption, notes) in tables.items():
        print(write_table(table, name, caption, notes, given.results / "tables"))


if __name__ == "__main__":
    main()
