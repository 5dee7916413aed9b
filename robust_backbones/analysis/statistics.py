"""Statistics over few seeds: means with intervals, paired comparisons with the standard backbone, seeds needed."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import TypeVar

import scipy  # scipy.stats, which takes half a second to import, where it is first asked for

K = TypeVar("K", bound=Hashable)

ALPHA = 0.05
"""A difference is significant if its p value after Holm's correction is below this."""
POWER = 0.8
"""The probability of detecting a difference that a planned number of seeds must give."""
MOST_SEEDS = 10_000
"""Search limit: larger numbers are not computed."""
# Percentages are known to 1e-13 or so in float64, and the smallest step of an AP is far above this.
_ROUNDING = 1e-9
# Power is 1 from far below on, and scipy's series need not converge above.
_LARGEST_SHIFT = 1e4


@dataclass(frozen=True)
class Summary:
    """``n`` values: mean, sample standard deviation (n - 1), 95 % t interval of the mean; one value has no spread."""

    n: int
    mean: float
    std: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Comparison:
    """Comparison of a backbone with the standard one, over their common seeds; positive if the backbone is better.

    Undefined values are None; ``reason`` then says why there is no test.
    """

    seeds: tuple[int, ...]
    """Common seeds."""
    unpaired: tuple[int, ...]
    """Seeds of only one of the two; they count in means, but not here."""
    difference: float | None
    """Mean of the paired differences."""
    low: float | None = None
    high: float | None = None
    """95 % t interval of the difference, for this comparison alone."""
    effect: float | None = None
    """Cohen's d_z: mean of the paired differences over their standard deviation (Cohen 1988, section 2.3.5)."""
    p: float | None = None
    """Of the two-sided paired t test."""
    p_holm: float | None = None
    """The same after Holm's correction for all tests of the family."""
    seeds_needed: int | None = None
    """Seeds for 80 % power at the observed effect and the family's strictest level, ALPHA / tests; None also above
    MOST_SEEDS and for an effect of 0."""
    reason: str = ""

    @property
    def verdict(self) -> str:
        if self.p_holm is None or self.difference is None:
            return "not tested"
        if self.p_holm >= ALPHA:
            return "not distinguishable"
        return "better" if self.difference > 0 else "worse"

    @property
    def sentence(self) -> str:
        """The verdict in plain words, with its evidence."""
        if self.reason:
            return f"Not tested: {self.reason}."
        assert self.difference is not None
        assert self.p_holm is not None
        p = f"p {'' if self.p_holm < 0.001 else '= '}{p_value(self.p_holm)}"
        seeds = f"over {len(self.seeds)} paired seeds"
        if self.unpaired:
            seeds += f" ({_numbers(self.seeds)}; without a partner: {_numbers(self.unpaired)})"
        if self.effect == 0:
            return f"Not distinguishable from standard: a mean difference of 0 {seeds}."
        if self.verdict != "not distinguishable":
            return f"{self.verdict.capitalize()} than standard by {abs(self.difference):.2f} {seeds}, {p}."
        needed = f"more than {MOST_SEEDS:,}" if self.seeds_needed is None else f"about {self.seeds_needed:,}"
        found = f"Not distinguishable from standard: {self.difference:+.2f} {seeds}, {p}"
        return f"{found}; telling would take {needed} seeds."


def summarize(values: Sequence[float], *, bounds: tuple[float, float] = (-math.inf, math.inf)) -> Summary:
    """Mean, spread and interval of one or more values; the interval is truncated at the bounds of the values."""
    low, high = _interval(values, bounds)
    return Summary(len(values), fmean(values), stdev(values) if len(values) > 1 else None, low, high)


def compare(standard: Mapping[int, float], others: Mapping[K, Mapping[int, float]]) -> dict[K, Comparison]:
    """Each backbone with one standard one: ``compare_pairs`` of results (seed -> result)."""
    return compare_pairs({key: (standard, results) for key, results in others.items()})


def compare_pairs(
    pairs: Mapping[K, tuple[Mapping[int, float], Mapping[int, float]]],
    *,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> dict[K, Comparison]:
    """Each backbone with its standard one, by paired t tests that are one family for Holm's correction.

    Args:
        pairs: backbone -> (the standard one's, its own) results, each seed -> result; the seeds need not be the same.
        bounds: of a difference; intervals are truncated there.
    """
    return corrected({key: _compare_one(standard, own, bounds) for key, (standard, own) in pairs.items()})


def corrected(comparisons: Mapping[K, Comparison]) -> dict[K, Comparison]:
    """The comparisons with Holm's correction for all tests among them, replacing any earlier correction."""
    tested = {key: comparison.p for key, comparison in comparisons.items() if comparison.p is not None}
    p_holm = dict(zip(tested, holm(list(tested.values())), strict=True))
    return {
        key: replace(
            comparison,
            p_holm=p_holm[key],
            seeds_needed=seeds_needed(comparison.effect, ALPHA / len(tested)) if comparison.effect else None,
        )
        if key in p_holm
        else comparison
        for key, comparison in comparisons.items()
    }


def _compare_one(standard: Mapping[int, float], other: Mapping[int, float], bounds: tuple[float, float]) -> Comparison:
    seeds = tuple(sorted(standard.keys() & other.keys()))
    differences = [other[seed] - standard[seed] for seed in seeds]
    unpaired = tuple(sorted(standard.keys() ^ other.keys()))
    untested = Comparison(seeds, unpaired, fmean(differences) if seeds else None)
    if not standard or not other:
        return replace(untested, reason=f"no result of {'this' if standard else 'the standard'} backbone")
    if not seeds:
        return replace(untested, reason="the two share no seed, and pairs need the same one")
    if len(seeds) == 1:
        which = "one seed" if not unpaired else f"one seed that both have ({seeds[0]})"
        return replace(untested, reason=f"{which} says nothing about how results vary over seeds")
    if max(map(abs, differences)) <= _ROUNDING:
        return replace(untested, difference=0.0, low=0.0, high=0.0, effect=0.0, p=1.0)
    if max(differences) - min(differences) <= _ROUNDING:
        # t is infinite: the formula's p of 0 would be a claim about a spread that was not seen.
        same = f"the difference is {differences[0]:+.2f} in each of the {len(seeds)} seeds"
        return replace(untested, reason=f"{same}, and a t test needs differences that vary")
    low, high = _interval(differences, bounds)
    return replace(
        untested,
        low=low,
        high=high,
        effect=fmean(differences) / stdev(differences),
        p=float(scipy.stats.ttest_rel([other[s] for s in seeds], [standard[s] for s in seeds]).pvalue),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """p values after Holm's step-down correction (1979, "A simple sequentially rejective multiple test procedure").

    The smallest of m is multiplied by m, the next by m - 1 and so on; each is at least the previous one, and at most 1.
    """
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def power(effect: float, n: int, alpha: float = ALPHA) -> float:
    """The probability that a two-sided paired t test with ``n`` pairs detects an effect d_z.

    t then follows the noncentral t distribution with n - 1 degrees of freedom and noncentrality d_z sqrt(n) (Cohen
    1988; Faul et al. 2007, "G*Power 3").
    """
    critical = scipy.stats.t.ppf(1 - alpha / 2, n - 1)
    shift = min(abs(effect) * math.sqrt(n), _LARGEST_SHIFT)
    # The lower tail by symmetry: scipy's nct.cdf is NaN there from a shift of 6 on.
    return float(scipy.stats.nct.sf(critical, n - 1, shift) + scipy.stats.nct.sf(critical, n - 1, -shift))


def seeds_needed(effect: float, alpha: float = ALPHA) -> int | None:
    """The smallest number of pairs with 80 % power for an effect d_z; None above MOST_SEEDS."""
    low, high = 1, 2  # power(low) is too small, or low is no number to test with
    while power(effect, high, alpha) < POWER:
        if high >= MOST_SEEDS:
            return None
        low, high = high, min(2 * high, MOST_SEEDS)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(effect, middle, alpha) >= POWER else (middle, high)
    return high


@dataclass(frozen=True)
class LinearFit:
    """The least-squares line through points."""

    slope: float
    intercept: float
    r_squared: float
    """The share of the variance of y explained by the line."""


def linear_fit(x: Sequence[float], y: Sequence[float]) -> LinearFit | None:
    """The line through the points; None if it would be meaningless: for fewer than 3, or if x or y is constant."""
    if len(x) < 3 or max(x) - min(x) <= _ROUNDING or max(y) - min(y) <= _ROUNDING:
        return None
    fit = scipy.stats.linregress(x, y)
    return LinearFit(float(fit.slope), float(fit.intercept), float(fit.rvalue) ** 2)


def p_value(p: float) -> str:
    """As printed, with three decimals."""
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def _interval(values: Sequence[float], bounds: tuple[float, float]) -> tuple[float | None, float | None]:
    if len(values) < 2:
        return None, None
    half = float(scipy.stats.t.ppf(1 - ALPHA / 2, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return max(bounds[0], fmean(values) - half), min(bounds[1], fmean(values) + half)


def _numbers(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))
