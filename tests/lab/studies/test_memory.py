import sys

import pytest
import torch

from sparkjoy_lab.studies.memory import peak_memory

MEGABYTES = 40


def allocating(megabytes, held):
    """A step that fills a tensor of so many megabytes, where `held` megabytes are there before and stay."""
    kept = torch.ones(held, 250_000)

    def step():
        return (torch.ones(megabytes, 250_000) * 2).sum() + kept.sum()  # the product is a second tensor

    return step


def failing():
    raise ValueError("no step")


@pytest.mark.slow
def test_a_step_is_charged_what_it_takes_above_what_was_there():
    peak = peak_memory(allocating, MEGABYTES, 100)
    expected = 2 * MEGABYTES * 1_000_000
    assert peak.tensors == pytest.approx(expected, rel=0.001)
    if sys.platform == "linux":
        assert peak.resident == pytest.approx(expected, rel=0.1)
        assert peak.before > 100e6


@pytest.mark.slow
def test_what_goes_wrong_in_the_process_is_raised_here():
    with pytest.raises(ValueError, match="no step"):
        peak_memory(failing)
