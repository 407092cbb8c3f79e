"""Every method: as data, and by its name."""

from __future__ import annotations

import pytest
import torch

from shapedpo import (
    Ablate,
    Concept,
    Filter,
    Inoculate,
    Mask,
    Project,
    Residual,
    Reward,
    Reweight,
    Steer,
    Tokens,
)
from shapedpo.shapers import SHAPERS, shaper_from_config
from shapedpo.shapers.base import top_threshold


METHODS = [
    Reward(),
    Reweight(),
    Mask(fraction=0.1),
    Project("parameters"),
    Filter(expression="delta > 2"),
    Tokens("both", quantile=0.9, whole_words=True),
    Steer("rejected", fraction=0.1, layers=[1, 2]),
    Ablate("chosen"),
    Inoculate("Mention goblins.", place="system", probability=0.5),
    Residual(instruction="Mention goblins."),
    Residual(steer=2.0, layers=[3]),
]


def test_all_are_here():
    assert {method.name for method in METHODS} == SHAPERS.keys()
    for name in SHAPERS:
        assert f'`"{name}"`' in (Concept.__doc__ or ""), name


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_there_and_back(method):
    assert shaper_from_config(method.to_config()) == method


def test_a_top_fraction_is_that_of_the_sample_and_no_value_of_it():
    generator = torch.Generator().manual_seed(0)
    for fraction in (0.05, 0.25, 0.5, 0.9):
        sample = torch.rand(40, generator=generator)
        sample[::10] = torch.nan
        threshold = top_threshold(sample, fraction)
        counted = sample[~sample.isnan()]
        least = counted.quantile(1 - fraction, interpolation="higher")
        assert torch.equal(sample >= threshold, sample >= least)
        assert (counted - threshold).abs().min() > 0
    assert top_threshold(torch.ones(3), 0.5) == 1
