"""Statistics of success rates.

Owns: confidence intervals of success rates and their differences, exact tests of two policies, and percentiles. Rates
are fractions in [0, 1]. It does not know episodes, files or pages.

All intervals are score intervals (Wilson, 1927; Newcombe, 1998). Unlike `p +- 1.96 sqrt(p (1 - p) / n)`, they stay
within [0, 1] and are accurate for 20 episodes, even if all or none succeed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Z95 = 1.959963984540054
Interval = tuple[float, float]


def wilson(successes: int, trials: int) -> Interval:
    """95 % interval of a success rate; (0, 1) without trials.

    >>> [round(limit, 3) for limit in wilson(16, 20)]
    [0.584, 0.919]
    """
    if trials == 0:
        return 0.0, 1.0
    rate, z2 = successes / trials, Z95**2
    centre = (rate + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z95 / (1 + z2 / trials) * math.sqrt(rate * (1 - rate) / trials + z2 / (4 * trials**2))
    # Exactly 0 and 1 at the ends, instead of a rounding error of about 1e-17.
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == trials else centre + half)


def difference(successes_a: int, trials_a: int, successes_b: int, trials_b: int) -> Interval:
    """95 % interval of rate A - rate B for independent samples (Newcombe's hybrid score interval)."""
    return _combine(successes_a, trials_a, successes_b, trials_b, 0.0)


def mean_interval(counts: Sequence[tuple[int, int]]) -> Interval:
    """95 % interval of the unweighted mean of independent success rates, in [0, 1].

    The Wilson intervals are combined by recovering variances from their limits (MOVER; Zou, Huang and Zhang, 2009, "A
    note on confidence interval estimation for a linear function of binomial proportions"). An interval from pooled
    trials would be too wide, because it would treat the differences between tasks as random.

    >>> [round(limit, 3) for limit in mean_interval([(16, 20), (4, 20)])]
    [0.377, 0.623]
    """
    rates = [successes / trials for successes, trials in counts]
    limits = [wilson(*count) for count in counts]
    mean = sum(rates) / len(rates)
    below = math.hypot(*(rate - low for rate, (low, _) in zip(rates, limits, strict=True))) / len(rates)
    above = math.hypot(*(high - rate for rate, (_, high) in zip(rates, limits, strict=True))) / len(rates)
    return mean - below, mean + above


def paired_difference(both: int, only_a: int, only_b: int, neither: int) -> Interval:
    """95 % interval of rate A - rate B for paired trials (Newcombe's paired score interval)."""
    trials = both + only_a + only_b + neither
    margins = (both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)
    agreement = both * neither - only_a * only_b
    # Newcombe's continuity correction of the correlation
    corrected = max(agreement - trials / 2, 0.0) if agreement > 0 else float(agreement)
    correlation = corrected / math.sqrt(margins) if margins else 0.0
    return _combine(both + only_a, trials, both + only_b, trials, correlation)


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p-value of the hypothesis that A and B are equally good, for paired trials (McNemar's test).

    Args:
        only_a, only_b: number of pairs in which only A or only B succeeded.
    """
    differing = only_a + only_b
    tail = sum(math.comb(differing, k) for k in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**differing)


def fisher(successes_a: int, trials_a: int, successes_b: int, trials_b: int) -> float:
    """Exact two-sided p-value of the hypothesis that A and B are equally good, for independent samples (Fisher)."""
    total, successes = trials_a + trials_b, successes_a + successes_b

    def ways(k: int) -> int:
        return math.comb(trials_a, k) * math.comb(trials_b, successes - k)

    observed = ways(successes_a)
    possible = range(max(0, successes - trials_b), min(trials_a, successes) + 1)
    return sum(ways(k) for k in possible if ways(k) <= observed) / math.comb(total, successes)


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Percentiles p50, p95 and p99, and max, of a non-empty sample."""
    p50, p95, p99 = np.percentile(np.asarray(values, float), [50, 95, 99])
    return {"p50": float(p50), "p95": float(p95), "p99": float(p99), "max": float(max(values))}


def _combine(successes_a: int, trials_a: int, successes_b: int, trials_b: int, correlation: float) -> Interval:
    """Newcombe's interval of a difference, from the Wilson intervals of two correlated estimates."""
    if not trials_a or not trials_b:
        return -1.0, 1.0
    rate_a, rate_b = successes_a / trials_a, successes_b / trials_b
    (low_a, high_a), (low_b, high_b) = wilson(successes_a, trials_a), wilson(successes_b, trials_b)

    def distance(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a - 2 * correlation * a * b + b * b))

    return (
        rate_a - rate_b - distance(rate_a - low_a, high_b - rate_b),
        rate_a - rate_b + distance(high_a - rate_a, rate_b - low_b),
    )
