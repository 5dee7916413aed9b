"""Statistics over seeds: hand-computed cases, scipy as the reference, and simulations of what the numbers promise."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from robust_backbones.analysis import statistics
from robust_backbones.analysis.statistics import (
    ALPHA,
    MOST_SEEDS,
    POWER,
    compare,
    holm,
    power,
    seeds_needed,
    summarize,
)

RESULTS = st.floats(0, 100).map(lambda value: round(value, 3))


def test_summary_by_hand() -> None:
    """1, 2, 6: mean 3; squares of deviations 4 + 1 + 9 = 14, std sqrt(14 / 2) = sqrt(7); t(0.975, 2) = 4.302653, so
    that half the interval is 4.302653 * sqrt(7) / sqrt(3) = 6.572411."""
    summary = summarize([1.0, 2.0, 6.0])
    assert (summary.n, summary.mean) == (3, 3)
    assert summary.std == pytest.approx(math.sqrt(7))
    assert summary.low == pytest.approx(3 - 6.572411, abs=1e-5)
    assert summary.high == pytest.approx(3 + 6.572411, abs=1e-5)


def test_one_value_has_a_mean_and_no_spread() -> None:
    summary = summarize([40.5])
    assert (summary.n, summary.mean, summary.std, summary.low, summary.high) == (1, 40.5, None, None, None)


def test_comparison_by_hand() -> None:
    """Differences 1, 2, 3: mean 2, std 1, so d_z = 2 and t = 2 sqrt(3). With 2 degrees of freedom the two-sided p is
    1 - t / sqrt(t^2 + 2) = 1 - sqrt(12 / 14) = 0.074180. Half the interval: 4.302653 / sqrt(3) = 2.484138."""
    (comparison,) = compare({0: 40.0, 1: 41.0, 2: 42.0}, {"robust": {0: 41.0, 1: 43.0, 2: 45.0}}).values()
    assert (comparison.difference, comparison.effect) == pytest.approx((2, 2))
    assert comparison.p == pytest.approx(1 - math.sqrt(12 / 14))
    assert comparison.p_holm == comparison.p
    assert (comparison.low, comparison.high) == pytest.approx((2 - 2.484138, 2 + 2.484138), abs=1e-5)
    assert comparison.verdict == "not distinguishable"
    assert comparison.seeds_needed == 5  # see test_seeds_needed_are_those_of_the_literature
    assert comparison.sentence == (
        "Not distinguishable from standard: +2.00 over 3 paired seeds, p = 0.074; telling would take about 5 seeds."
    )


def test_better_and_worse() -> None:
    standard = {0: 50.0, 1: 50.5, 2: 49.5}
    found = compare(standard, {"up": {0: 52.0, 1: 52.6, 2: 51.4}, "down": {0: 48.0, 1: 48.4, 2: 47.6}})
    assert (found["up"].verdict, found["down"].verdict) == ("better", "worse")
    assert found["up"].sentence.startswith("Better than standard by 2.00 over 3 paired seeds, p = 0.00")
    assert found["down"].sentence.startswith("Worse than standard by 2.00 over 3 paired seeds, p = 0.00")


def test_one_seed_is_not_tested() -> None:
    (comparison,) = compare({0: 40.0}, {"robust": {0: 45.0}}).values()
    assert comparison.difference == 5
    assert (comparison.p, comparison.p_holm, comparison.effect, comparison.low) == (None, None, None, None)
    assert comparison.verdict == "not tested"
    assert comparison.sentence == "Not tested: one seed says nothing about how results vary over seeds."


def test_only_common_seeds_are_paired_and_it_says_so() -> None:
    standard, robust = {0: 40.0, 1: 41.0, 2: 42.0}, {1: 42.0, 2: 44.0, 7: 99.0}
    (comparison,) = compare(standard, {"robust": robust}).values()
    assert (comparison.seeds, comparison.unpaired) == ((1, 2), (0, 7))
    assert comparison.difference == 1.5  # of 42 - 41 and 44 - 42
    assert "over 2 paired seeds (1, 2; without a partner: 0, 7)" in comparison.sentence
    (single,) = compare({0: 40.0, 1: 41.0}, {"robust": {1: 42.0}}).values()
    assert single.reason == "one seed that both have (1) says nothing about how results vary over seeds"
    (none,) = compare({0: 40.0}, {"robust": {1: 42.0}}).values()
    assert (none.difference, none.verdict) == (None, "not tested")
    assert "share no seed" in none.sentence
    assert "no result of the standard" in compare({}, {"robust": {1: 42.0}})["robust"].sentence
    assert "no result of this" in compare({1: 42.0}, {"robust": {}})["robust"].sentence


def test_differences_that_do_not_vary() -> None:
    # 0.3 - 0.2 and 0.2 - 0.1 differ by rounding, which must not pass for a spread (it would give p = 1e-16).
    standard = {0: 0.1, 1: 0.2}
    found = compare(standard, {"same": dict(standard), "shifted": {0: 0.2, 1: 0.3}})
    assert (found["same"].difference, found["same"].p, found["same"].effect) == (0, 1, 0)
    assert found["same"].sentence == "Not distinguishable from standard: a mean difference of 0 over 2 paired seeds."
    assert (found["shifted"].p, found["shifted"].verdict) == (None, "not tested")
    assert "is +0.10 in each of the 2 seeds" in found["shifted"].sentence


def test_a_mean_difference_of_zero() -> None:
    (comparison,) = compare({0: 1.0, 1: 2.0}, {"robust": {0: 2.0, 1: 1.0}}).values()
    assert (comparison.difference, comparison.p, comparison.seeds_needed) == (0, 1, None)
    assert "difference of 0 over" in comparison.sentence


def test_an_effect_too_small_for_any_number_of_seeds() -> None:
    standard = dict.fromkeys(range(4), 40.0)
    (comparison,) = compare(standard, {"robust": {0: 41.0, 1: 39.0, 2: 41.0, 3: 39.001}}).values()
    assert comparison.seeds_needed is None
    assert f"more than {MOST_SEEDS:,} seeds" in comparison.sentence


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(RESULTS, RESULTS), min_size=2, max_size=8))
def test_it_is_scipys_paired_t_test(pairs: list[tuple[float, float]]) -> None:
    standard, robust = (dict(enumerate(column)) for column in zip(*pairs, strict=True))
    (comparison,) = compare(standard, {"robust": robust}).values()
    assert "nan" not in comparison.sentence
    differences = np.array([b - a for a, b in pairs])
    if np.ptp(differences) < 1e-6:
        assert comparison.p in (None, 1)
        return
    reference = stats.ttest_rel(list(robust.values()), list(standard.values()))
    interval = reference.confidence_interval(0.95)
    assert comparison.p == pytest.approx(reference.pvalue, abs=1e-9)
    assert (comparison.low, comparison.high) == pytest.approx((interval.low, interval.high), abs=1e-6)
    assert comparison.effect == pytest.approx(differences.mean() / differences.std(ddof=1), abs=1e-9)
    assert math.copysign(1, comparison.effect or 0) == math.copysign(1, comparison.difference or 0)


def test_holm_by_hand() -> None:
    """Of 4: 0.01 x 4 = 0.04; 0.02 x 3 = 0.06; 0.03 x 2 = 0.06; 0.005 first: 0.005 x 4 = 0.02, then 0.01 x 3 = 0.03,
    0.03 x 2 = 0.06, 0.04 x 1 = 0.04, which may not be below the 0.06 before it."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.5]) == [1, 1]
    assert holm([0.03]) == [0.03]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0.001, 0.5))
def test_holm_rejects_what_the_step_down_procedure_rejects(p_values: list[float], alpha: float) -> None:
    """The paper's own wording: go through the ordered p values, stop at the first above alpha / (m - rank)."""
    rejected = set()
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        if (len(p_values) - rank) * p_values[index] >= alpha:
            break
        rejected.add(index)
    assert {index for index, p in enumerate(holm(p_values)) if p < alpha} == rejected


def test_only_tests_that_were_made_belong_to_the_family() -> None:
    standard = {0: 40.0, 1: 41.0, 2: 42.0}
    found = compare(standard, {"tested": {0: 41.0, 1: 43.0, 2: 45.0}, "single": {0: 50.0}})
    assert found["tested"].p_holm == found["tested"].p
    both = compare(standard, {"a": {0: 41.0, 1: 43.0, 2: 45.0}, "b": {0: 41.0, 1: 43.0, 2: 45.0}})
    assert both["a"].p_holm == pytest.approx(2 * (both["a"].p or 0))
    assert (both["a"].seeds_needed, seeds_needed(2.0, ALPHA / 2)) == (6, 6)


def test_family_wise_error_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three backbones that are the standard one, 5 seeds: some verdict is wrong in at most 5 % of studies, and
    uncorrected it would be in about 11 % (the three share the standard's runs)."""
    monkeypatch.setattr(statistics, "seeds_needed", lambda *_: None)  # slow, and not asked for here
    generator, studies, wrong, uncorrected = np.random.default_rng(0), 400, 0, 0
    for _ in range(studies):
        runs = [dict(enumerate(generator.normal(40, 0.2, 5))) for _ in range(4)]
        found = compare(runs[0], dict(enumerate(runs[1:]))).values()
        wrong += any(comparison.verdict != "not distinguishable" for comparison in found)
        uncorrected += any((comparison.p or 1) < ALPHA for comparison in found)
    spread = math.sqrt(0.05 * 0.95 / studies)
    assert wrong / studies < 0.05 + 3 * spread
    assert uncorrected / studies > 0.05 + 3 * spread


@pytest.mark.parametrize(("effect", "n"), [(0.5, 34), (0.8, 15), (0.2, 199), (1.0, 10)])
def test_seeds_needed_are_those_of_the_literature(effect: float, n: int) -> None:
    """G*Power's numbers for a paired t test, two-sided, alpha 0.05, power 0.8."""
    assert seeds_needed(effect) == n
    assert seeds_needed(-effect) == n


def test_power_is_what_a_simulation_finds() -> None:
    generator, trials = np.random.default_rng(0), 4000
    for effect, n, alpha in ((1.0, 5, 0.05), (2.0, 4, 0.05 / 3), (0.0, 6, 0.05)):
        p = stats.ttest_1samp(generator.normal(effect, 1, (trials, n)), 0, axis=1).pvalue
        expected = power(effect, n, alpha)
        assert np.mean(p < alpha) == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / trials))


@given(st.floats(-4, 6).map(lambda exponent: 10**exponent), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_seeds_needed_is_the_smallest_number(effect: float, tests: int) -> None:
    """Also where scipy's noncentral t distribution has no number for the lower tail."""
    n = seeds_needed(effect, ALPHA / tests)
    if n is None:
        assert power(effect, MOST_SEEDS, ALPHA / tests) < POWER
    else:
        assert power(effect, n, ALPHA / tests) >= POWER
        assert n == 2 or power(effect, n - 1, ALPHA / tests) < POWER
