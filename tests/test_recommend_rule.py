"""How often the rule of `recommend` errs, by the simulation of benchmarks/recommend_rule.py."""

import statistics

import numpy as np
import pytest
from benchmark_files import benchmark

from comfy_tdpo.trainer.recommend.choice import CONFIDENCE


@pytest.fixture(scope="module")
def simulation():
    return benchmark("recommend_rule")


def test_the_choice_seldom_falls_by_more_than_allowed_and_is_reported_without_its_luck(simulation):
    """Of snapshots that fall further and further; chosen by their means, every second choice falls by more.

    At most a sixth may: 10 %, and what choosing among cells adds. On the noise that chose it, the choice looks better
    than it is by 0.02; on fresh noise, the mean of 150 searches is right to three standard errors, 0.01.
    """
    rng, rule = np.random.default_rng(0), {"rule": simulation.Rule(CONFIDENCE)}
    worlds = [simulation.World(rng, "growing", fall=0.4, prompts=8) for _ in range(150)]
    found = [simulation.search(world, 11, rule)["rule"] for world in worlds]
    some = [results for results in found if results is not None]
    assert len(some) > 0.95 * len(found), "a rule that recommends nothing is never wrong"
    fell, _, then, fresh = (statistics.fmean(values) for values in zip(*some, strict=True))
    assert fell <= 1 / 6
    assert then > 0.01 and abs(fresh) < 0.01
