"Whether the statistics hold what they promise; chapter 50 has simulations of its own."
import itertools
import math
from functools import partial

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from sortkd.evidence.results import load_results, select
from sortkd.evidence.statistics import (
    compare_methods, confidence_sequence, crossed_interval, paired_effects, pool_effects,
    seed_deviation, seeds_needed, sign_flip_test, smallest_number, t_test_power,
    verdict_probabilities, verdicts,
)
from synthetic import synthetic_records, write_lines


def outcomes(effect, sets, seeds, deviation, seed):
    "Plain and sorted runs of `sets` pairs, with a planted effect."
    generator, parts = np.random.default_rng(seed), []
    for repair, gain in (("none", 0.0), ("sort", np.reshape(effect, (-1, 1)))):
        top1 = 70 + gain + generator.normal(0, deviation, (sets, seeds))
        about = {"teacher": "resnet56", "student": "resnet20", "objective": "kd", "repair": repair}
        numbers = {"pair": np.repeat(np.arange(sets), seeds), "seed": np.tile(np.arange(seeds), sets)}
        parts.append(pd.DataFrame(numbers | {"last_top1": top1.ravel()}).assign(**about))
    return pd.concat(parts)


def within_binomial_error(share, expected, count, sigmas=4):
    return abs(share - expected) < sigmas * math.sqrt(expected * (1 - expected) / count)


def covered(effects, effect):
    return ((effects.low <= effect) & (effect <= effects.high)).mean()


@pytest.mark.parametrize("effect, seeds, level", [(-0.4, 2, 0.95), (0.0, 5, 0.95), (1.0, 5, 0.5)])
def test_intervals_cover_the_planted_effect_as_often_as_they_claim(effect, seeds, level):
    effects = paired_effects(outcomes(effect, 400, seeds, 0.3, seed=seeds), level=level)
    assert within_binomial_error(covered(effects, effect), level, 400)


def test_intervals_cover_through_files(tmp_path):
    planted = {f"set{number}": 0.3 for number in range(150)}
    records = synthetic_records(planted, np.random.default_rng(7), objectives=("kd",))
    frame = load_results(write_lines(tmp_path / "planted.jsonl", records), synthetic=True)[0]
    effects = paired_effects(select(frame))
    assert len(effects) == 150 and (effects.seeds == 5).all()
    assert within_binomial_error(covered(effects, 0.3), 0.95, 150)
    same = compare_methods(frame, "kd+sort", "kd")
    pd.testing.assert_frame_equal(same, effects)


def test_pairs_of_one_teacher_count_once():
    means = [0.0, 0.2, 0.3, 0.2]
    effects = pd.DataFrame({"objective": "kd", "teacher": list("aabc"), "mean": means})
    row = pool_effects(effects).iloc[0]
    interval = stats.ttest_1samp([0.1, 0.3, 0.2], 0).confidence_interval()
    assert (row.teachers, row.pairs) == (3, 4) and (row.low, row.high) == pytest.approx(interval)
    row = pool_effects(effects[:3]).iloc[0]
    assert row["mean"] == pytest.approx(0.2) and math.isnan(row.low), "two teachers give no interval"


def test_only_shared_seeds_are_compared():
    frame = outcomes(0.3, 1, 4, 0.2, seed=0)
    absent = {("sort", 1), ("none", 3)}
    frame = frame[[each not in absent for each in zip(frame.repair, frame.seed)]]
    (row,) = paired_effects(frame).itertuples()
    values = frame.set_index(["repair", "seed"]).last_top1
    assert row.seeds == row.unmatched == 2
    assert row.differences == tuple(values["sort", seed] - values["none", seed] for seed in (0, 2))


def test_numbers_of_a_method_do_not_hide_its_effect():
    "A sorted run is compared with its own objective, whatever the methods are called."
    frame = outcomes(0.3, 1, 4, 0.2, seed=0)
    names = {"none": "kd(temperature=2)", "sort": "kd(temperature=2)+sort"}
    frame["method"] = frame.repair.map(names)
    assert paired_effects(frame).seeds.tolist() == [4]


def test_few_or_equal_seeds_have_an_effect():
    (row,) = verdicts(paired_effects(outcomes(0.3, 1, 1, 0.2, seed=0))).to_dict("records")
    assert row["p_flip"] == 1 and math.isnan(row["p"]) and math.isnan(row["low"])
    assert math.isfinite(row["mean"]) and row["verdict"] == "inconclusive"
    equal = outcomes(0.25, 1, 3, 0.0, seed=0)
    (row,) = verdicts(paired_effects(equal)).to_dict("records")
    assert row["low"] == row["high"] == 0.25 and (row["p"], row["verdict"]) == (0, "equivalent")
    (row,) = paired_effects(equal.assign(last_top1=70.0)).to_dict("records")
    assert (row["mean"], row["p"], row["better"]) == (0, 1, 0.5), "ties are halves"


def test_the_sign_flip_test_of_many_seeds():
    assert sign_flip_test([0.3]) == sign_flip_test([0.0, 0.0]) == 1
    assert sign_flip_test([0.1] * 16 + [-0.1]) == pytest.approx(2 * 18 / 2**17)  # ties are counted
    assert sign_flip_test([0.1] * 60) < 1e-4
    differences = np.random.default_rng(0).normal(0.1, 0.6, 60)
    p = stats.ttest_1samp(differences, 0).pvalue
    assert sign_flip_test(differences) == pytest.approx(p, abs=0.01)


def test_every_number_of_seeds_reaches_the_power_and_one_less_does_not():
    for ratio in np.arange(0.1, 12, 0.1):
        number = smallest_number(partial(t_test_power, ratio))
        assert t_test_power(ratio, number) >= 0.8
        assert number == 2 or t_test_power(ratio, number - 1) < 0.8
    assert smallest_number(partial(t_test_power, 0.0)) == math.inf


def test_each_objective_needs_its_own_number_of_seeds():
    parts = [paired_effects(outcomes(0.3, 8, 5, deviation, seed=3)).assign(objective=name)
             for name, deviation in (("kd", 0.2), ("dkd", 0.4))]
    needed = seeds_needed(pd.concat(parts), gains=(0.1, 0.5))
    kd, dkd = (group.set_index("to_find") for _, group in needed.groupby("objective", sort=False))
    assert list(kd.index) == ["a gain of 0.1", "a gain of 0.5", "equivalence within ±0.5"]
    assert (kd.seeds < dkd.seeds).all()
    assert (kd.seeds_low <= kd.seeds).all() and (kd.seeds <= kd.seeds_high).all()
    nothing = paired_effects(outcomes(0.3, 1, 1, 0.2, seed=0))
    assert seeds_needed(nothing).empty and seed_deviation(nothing)["degrees_of_freedom"] == 0


def test_the_deviation_is_pooled_and_its_interval_covers():
    effects = paired_effects(outcomes(0.3, 8, 5, 0.25, seed=3))
    squares = [((np.array(each) - np.mean(each)) ** 2).sum() for each in effects.differences]
    deviation = seed_deviation(effects)
    assert deviation["degrees_of_freedom"] == 32
    assert deviation["std"] == pytest.approx(math.sqrt(sum(squares) / 32))
    effects = paired_effects(outcomes(0.0, 600, 5, 0.3, seed=5))
    each = pd.DataFrame([seed_deviation(effects.iloc[[number]]) for number in range(600)])
    assert within_binomial_error(covered(each, 0.3 * math.sqrt(2)), 0.95, 600)


def test_wrong_verdicts_are_as_rare_as_the_level_says():
    for std, seeds in itertools.product((0.1, 0.45, 2.0), (2, 5, 15)):
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
        alone = verdicts(paired_effects(outcomes(gain, 12, 6, 0.3, seed=2)))
        assert ((alone.verdict == "equivalent") == (alone.p_equivalent <= 0.05)).all()
        effects = verdicts(alone, together=True)
        equivalent, different = (passes(effects[name].to_numpy()) for name in ("p_equivalent", "p"))
        assert {*np.flatnonzero(effects.verdict == "equivalent")} == equivalent
        assert {*np.flatnonzero(effects.verdict == "gain")} == different - equivalent
        assert different or equivalent
        alike = verdicts(alone.set_axis([0] * len(alone)), together=True)
        assert alike.verdict.tolist() == effects.verdict.tolist(), "rows may share a label"
    one = effects.iloc[:1]
    assert verdicts(one).verdict.tolist() == verdicts(one, together=True).verdict.tolist()


def test_a_confidence_sequence_inverts_its_bayes_factor():
    values = np.random.default_rng(3).normal(0.3, 0.4, 12)
    sequence = confidence_sequence(values)
    row = sequence.iloc[-1]
    statistic = (values.mean() - row.low) / (values.std(ddof=1) / math.sqrt(12))
    factor = ((1 + statistic**2 / 11) / (1 + statistic**2 / (11 * 13))) ** 6 / math.sqrt(13)
    assert factor == pytest.approx(20), "at an end of the interval"
    assert sequence.seeds.tolist() == list(range(2, 13)) and sequence.high[1:2].item() == math.inf


def test_the_interval_over_seeds_and_images_is_that_of_two_random_effects():
    generator = np.random.default_rng(4)
    plain = generator.random((40, 500)) < generator.normal(0.6, 0.05, (40, 1))
    repaired = generator.random((40, 500)) < generator.normal(0.65, 0.05, (40, 1))
    of_seeds = stats.ttest_1samp(100 * (repaired.mean(1) - plain.mean(1)), 0).confidence_interval()
    interval = crossed_interval(plain, repaired)
    assert interval == pytest.approx(of_seeds, abs=0.05), "images of one kind add nothing"
    assert crossed_interval(plain, plain) == (0, 0)
    helped = np.arange(500) < 100  # an effect that other images would not show
    interval = crossed_interval(np.zeros((40, 500), bool), np.tile(helped, (40, 1)))
    of_images = stats.ttest_1samp(100.0 * helped, 0).confidence_interval()
    assert interval == pytest.approx(of_images, rel=1e-6)
