"""Parts of the data that a gate has stopped keeping: found where they could still teach, and only there."""

import pytest
import torch

from sparkjoy import KondoGate, UnbiasedGate
from sparkjoy.coverage import Coverage

PARTS = [part for part in range(10) for _ in range(10)]


def one_fails(generator):
    """Of part 8 every answer fails; of the others most succeed."""
    advantages = torch.where(torch.rand(100, generator=generator) < 0.8, 0.1, -0.9)
    return advantages.masked_fill(torch.tensor(PARTS) == 8, -0.9)


def all_learn(generator):
    return torch.where(torch.rand(100, generator=generator) < 0.8, 0.1, -0.9)


@pytest.mark.parametrize("gate", [KondoGate(price=0.0), KondoGate(rate=0.3)], ids=repr)
def test_a_class_that_only_fails_is_lost_to_a_gate_that_keeps_successes(gate):
    generator, coverage, told = torch.Generator().manual_seed(0), Coverage(100), []
    for _ in range(40):
        advantages = one_fails(generator)
        told += coverage.seen(PARTS, advantages, gate(advantages * torch.rand(100, generator=generator)).keep)
    assert told == coverage.lost == [8]
    assert "stopped keeping 1 of 10 parts of the data (8)" in coverage.warning(told)
    keep = torch.zeros(100, dtype=torch.bool).index_fill_(0, torch.tensor([80]), True)
    coverage.seen(PARTS, one_fails(generator), keep)
    assert coverage.lost == []  # kept again


@pytest.mark.parametrize(
    "gate", [KondoGate(price=0.0), KondoGate(rate=0.03), UnbiasedGate(noise=0.3), UnbiasedGate(rate=0.03)], ids=repr
)
def test_nothing_is_lost_while_every_class_succeeds_now_and_then(gate):
    generator, coverage = torch.Generator().manual_seed(0), Coverage(100)
    gate.generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        advantages = all_learn(generator)
        keep = gate(advantages * torch.rand(100, generator=generator)).keep
        assert coverage.seen(PARTS, advantages, keep) == []


def test_what_is_mastered_is_never_lost():
    coverage, advantages = Coverage(10), torch.tensor([1.0, 1e-6])
    for _ in range(1000):
        coverage.seen(["hard", "mastered"], advantages, torch.tensor([True, False]))
    for _ in range(1000):
        coverage.seen(["hard", "without an advantage"], torch.tensor([1.0, 0.0]), torch.tensor([True, False]))
    assert coverage.lost == []


def test_few_of_many_are_no_news():
    """By chance one part in a thousand is passed over for long."""
    parts = [f"prompt {number}" for number in range(200)]
    keep = torch.ones(200, dtype=torch.bool)
    keep[0] = False
    coverage = Coverage(10)
    assert [coverage.seen(parts, torch.ones(200), keep) for _ in range(50)] == [[]] * 50
    assert coverage.lost == ["prompt 0"]


def test_its_state_is_all_there_is():
    generator, first = torch.Generator().manual_seed(0), Coverage(100)
    gate = KondoGate(price=0.0)
    batches = [one_fails(generator) for _ in range(30)]
    for advantages in batches[:10]:
        first.seen(PARTS, advantages, gate(advantages).keep)
    second = Coverage(100)
    second.load_state_dict(first.state_dict())
    told = [[c.seen(PARTS, advantages, gate(advantages).keep) for advantages in batches[10:]] for c in (first, second)]
    assert told[0] == told[1]
    assert first.state_dict() == second.state_dict()


def test_a_patience_of_nothing_is_refused():
    with pytest.raises(ValueError, match="patience is 0; expected at least 1 row"):
        Coverage(0)
