"Whether the statistics hold what they promise, by simulation; chapter 50 has more of it."
import itertools
import math
from functools import partial

import numpy as np
import pandas as pd
import pytest
from scipy import special, stats

from sortkd.evidence.statistics import (
    compare, crossed_interval, deviation_interval, pool_effects, seeds_needed, smallest_number,
    t_half_width, t_test_power, verdict_probabilities, verdicts)

MEASURED = (0.64, 0.68)  # standard deviations of differences, in the plans few_steps and sorting


def simulated(effect, deviation, seeds, settings, seed=0, **options):
    "Effects in `settings` settings; `effect` may be one for each, `deviation` is that of a difference."
    noise = np.random.default_rng(seed).normal(0, deviation / math.sqrt(2), (2, seeds, settings))
    return compare({"a": effect + noise[0], "b": noise[1]}, "a", "b", **options)


def covered(low, high, value):
    return ((low <= value) & (value <= high)).mean()


@pytest.mark.parametrize("seeds, deviation", [*itertools.product((5, 8, 16, 60), MEASURED)])
def test_every_printed_interval_covers(seeds, deviation):
    "In 93 to 97 of 100 cases; benchmarks/coverage.py has all kinds and more cases."
    for paired in (True, False):
        effects = simulated(0.3, deviation, seeds, 3000, paired=paired)
        assert 0.93 < covered(effects.low, effects.high, 0.3) < 0.97
    half = simulated(0.3, deviation, seeds, 3000, level=0.5)
    assert 0.46 < covered(half.low, half.high, 0.3) < 0.54
    found = deviation_interval(simulated(0.3, deviation, seeds, 3000)["std"], seeds)
    assert 0.93 < covered(*found, deviation) < 0.97
    top1 = np.random.default_rng(2).normal(57, deviation, (seeds, 3000))  # of one method
    mean, half = top1.mean(0), t_half_width(top1.std(0, ddof=1), seeds)
    assert 0.93 < covered(mean - half, mean + half, 57) < 0.97


@pytest.mark.parametrize("seeds", [5, 8, 16, 60])
def test_intervals_over_settings_cover(seeds):
    "In studies of six settings, of which the effects differ by as much as seeds do."
    truth = np.random.default_rng(1).normal(0.3, 0.5, 9000)
    effects = simulated(truth, 0.68, seeds, 9000, seed=2)
    pooled = pool_effects(effects.assign(comparison=np.repeat(np.arange(1500), 6).astype(str)))
    assert 0.93 < covered(pooled.low, pooled.high, 0.3) < 0.97
    improvement = special.ndtr(0.3 / math.hypot(0.68, 0.5))
    assert 0.925 < covered(pooled.better_low, pooled.better_high, improvement) < 0.97


def test_pairs_of_one_teacher_count_once():
    effects = pd.DataFrame({"comparison": "a minus b", "teacher": list("aabc"),
                            "mean": [0.0, 0.2, 0.3, 0.2], "better": [1.0, 0.5, 0.5, 0.75]})
    row = pool_effects(effects).iloc[0]
    interval = stats.ttest_1samp([0.1, 0.3, 0.2], 0).confidence_interval()
    assert (row.settings, row.pairs, row.better) == (3, 4, pytest.approx(2 / 3))
    assert (row.low, row.high) == pytest.approx(interval) and math.isnan(row.better_low)
    assert math.isnan(pool_effects(effects[:3]).iloc[0].low), "two teachers give no interval"


def test_arrays_and_runs_give_the_same():
    scores = {name: np.random.default_rng(seed).normal(70, 1, (4, 3)) for seed, name in enumerate("ab")}
    scores["a"][1, 0] = scores["b"][3, 0] = math.nan
    rows = [{"pair": pair, "seed": seed, "method": name, "score": values[seed, pair]}
            for name, values in scores.items() for seed in range(4) for pair in range(3)]
    runs = pd.DataFrame(rows).dropna()
    for paired in (True, False):
        effects = compare(scores, "a", "b", paired=paired)
        same = compare(runs, "a", "b", outcome="score", paired=paired)
        pd.testing.assert_frame_equal(effects, same)
    assert compare(scores, "a", "b").seeds.tolist() == [2, 4, 4], "seeds that both have"
    assert effects.seeds.tolist() == [6, 8, 8], "runs of both"
    values = scores["a"][[0, 2], 0] - scores["b"][[0, 2], 0]
    assert compare(scores, "a", "b").differences[0] == tuple(values)
    test = stats.ttest_ind(scores["a"][:, 1], scores["b"][:, 1], equal_var=False)
    assert effects.loc[1, ["p", "freedom"]].tolist() == pytest.approx([test.pvalue, test.df])
    assert compare(scores, "a", "c").empty


def test_few_or_equal_seeds_have_an_effect():
    (row,) = compare({"a": [0.3], "b": [0.1]}, "a", "b").to_dict("records")
    assert math.isnan(row["p"]) and math.isnan(row["low"])
    assert row["mean"] == pytest.approx(0.2) and row["verdict"] == "inconclusive"
    (row,) = compare({"a": [0.25] * 3, "b": [0.0] * 3}, "a", "b").to_dict("records")
    assert row["low"] == row["high"] == 0.25 and (row["p"], row["verdict"]) == (0, "equivalent")
    (row,) = compare({"a": [70.0] * 3, "b": [70.0] * 3}, "a", "b").to_dict("records")
    assert (row["mean"], row["p"], row["better"]) == (0, 1, 0.5), "ties are halves"


def test_every_number_of_seeds_reaches_the_power_and_one_less_does_not():
    for ratio in np.arange(0.1, 12, 0.1):
        number = smallest_number(partial(t_test_power, ratio))
        assert t_test_power(ratio, number) >= 0.8
        assert number == 2 or t_test_power(ratio, number - 1) < 0.8
    assert smallest_number(partial(t_test_power, 0.0)) == math.inf
    needed = seeds_needed(0.68, gains=(0.2, 0.5))
    assert needed == {"a gain of 0.2": 93, "a gain of 0.5": 17, "equivalence within ±0.5": 18}


def test_wrong_verdicts_are_as_rare_as_the_level_says():
    for std, seeds in itertools.product((0.1, *MEASURED, 2.0), (2, 5, 15)):
        nothing, edge = (verdict_probabilities(effect, std, seeds) for effect in (0.0, 0.5))
        assert sum(edge.values()) == pytest.approx(1) and edge["equivalent"] <= 0.05 + 1e-6
        assert nothing["gain"] <= 0.025 + 1e-6 and nothing["loss"] <= 0.025 + 1e-6


def test_verdicts_together_are_corrected_by_holm():
    "The k-th smallest of m values is compared with level / (m - k + 1), until one is too large."
    def passes(values):
        order = np.argsort(values)
        too_large = (k for k, row in enumerate(order) if values[row] > 0.05 / (len(values) - k))
        return set(order[: next(too_large, len(values))])

    for gain in (0.3, 0.6):
        alone = simulated(gain, 0.3, 6, 12, seed=2)
        assert ((alone.verdict == "equivalent") == (alone.p_equivalent <= 0.05)).all()
        effects = verdicts(alone, together=True)
        equivalent, different = (passes(effects[name].to_numpy()) for name in ("p_equivalent", "p"))
        assert {*np.flatnonzero(effects.verdict == "equivalent")} == equivalent
        assert {*np.flatnonzero(effects.verdict == "gain")} == different - equivalent
        assert different or equivalent
        alike = verdicts(alone.set_axis([0] * len(alone)), together=True)
        assert alike.verdict.tolist() == effects.verdict.tolist(), "rows may share a label"


def test_the_interval_over_seeds_and_images_is_that_of_two_random_effects():
    plain = np.random.default_rng(4).random((40, 500)) < 0.6
    assert crossed_interval(plain, plain) == (0, 0)
    helped = np.arange(500) < 100  # an effect that other images would not show
    interval = crossed_interval(np.zeros((40, 500), bool), np.tile(helped, (40, 1)))
    of_images = stats.ttest_1samp(100.0 * helped, 0).confidence_interval()
    assert interval == pytest.approx(of_images, rel=1e-6)


@pytest.mark.parametrize("seeds", [5, 8, 16, 60])
def test_the_interval_over_seeds_and_images_covers(seeds):
    "An effect of 0 with the deviations of seeds and images, in points, that runs have."
    generator, hits = np.random.default_rng(5), []
    for _ in range(1000):
        drawn = sum(generator.normal(0, deviation / 100, shape) for deviation, shape in (
            (0.66, (seeds, 1)), (5, (1, 200)), (12, (seeds, 200))))
        low, high = crossed_interval(np.zeros_like(drawn), drawn)
        hits.append(low <= 0 <= high)
    assert 0.93 <= np.mean(hits) <= 0.97
