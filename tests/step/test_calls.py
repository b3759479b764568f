"""When the caller's function is called, with what and how often; and rows that bring a graph."""

import copy
from typing import NamedTuple

import engine_cases
import pytest
import torch
from tensordict import TensorDict
from torch import nn

import sparkjoy as sj

ROWS = 20


class Rows(NamedTuple):
    inner: dict


CONTAINERS = {
    "tensor": (lambda features, actions: features, lambda rows: (rows, None)),
    "dict": (lambda features, actions: {"h": features, "a": actions}, lambda rows: (rows["h"], rows["a"])),
    "nested": (
        lambda features, actions: Rows({"h": features, "a": actions}),
        lambda rows: (rows.inner["h"], rows.inner["a"]),
    ),
    "tensordict": (
        lambda features, actions: TensorDict({"deep": {"h": features}, "a": actions}, batch_size=[ROWS]),
        lambda rows: (rows["deep", "h"], rows["a"]),
    ),
}
CASES = {
    "no gate": {"gate": None},
    "rate 1": {"gate": sj.KondoGate(rate=1.0)},
    "screen": {"gate": sj.KondoGate(rate=0.2)},
    "dense": {"gate": sj.KondoGate(rate=0.95)},
    "signs": {"gate": sj.KondoGate(price=0)},
    "known": {"gate": sj.KondoGate(rate=0.2), "log_probs": -torch.rand(ROWS)},
    "micro-batches": {"gate": sj.KondoGate(rate=0.8), "micro_batch_size": 3},
    "nothing kept": {"gate": sj.KondoGate(price=1e6)},
}


def make_case(container, seed=0):
    torch.manual_seed(seed)
    trunk, head = nn.Linear(6, 8), nn.Linear(8, 4)
    pack, unpack = CONTAINERS[container]

    def log_prob_fn(rows):
        features, actions = unpack(rows)
        log_probs = head(features).log_softmax(1)
        return log_probs[:, 0] if actions is None else log_probs.gather(1, actions[:, None]).squeeze(1)

    def batch(features):
        return pack(features, torch.randint(4, (ROWS,)))

    return trunk, head, torch.randn(ROWS, 6), log_prob_fn, batch


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("case", CASES)
def test_rows_with_a_graph_are_refused_by_name_in_every_plan(container, case):
    trunk, head, states, log_prob_fn, batch = make_case(container)
    features = trunk(states).tanh()
    with pytest.raises(ValueError, match=r"^batch.* has a graph, .* detached"):
        sj.gated_backward(log_prob_fn, batch(features), torch.randn(ROWS), **CASES[case])
    assert all(parameter.grad is None for parameter in (*trunk.parameters(), *head.parameters()))
    features.sum().backward()  # the caller's graph is as it was
    assert trunk.weight.grad is not None


def test_a_draft_gets_no_graph_either():
    trunk, _, states, log_prob_fn, batch = make_case("dict")
    step = sj.GatedBackward(sj.KondoGate(rate=0.2), draft=sj.Draft(log_prob_fn, verify=2))
    with pytest.raises(ValueError, match="has a graph"):
        step(log_prob_fn, batch(trunk(states)), torch.randn(ROWS))


def test_ragged_rows_with_a_graph_are_refused():
    weight = torch.ones(3, requires_grad=True)
    rows = [torch.randn(length, 3) * weight for length in range(1, 5)]
    nested = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
    for batch in (nested, {"h": nested}):
        with pytest.raises(ValueError, match=r"^batch.* has a graph"):
            sj.gated_backward(lambda _: pytest.fail("called"), batch, torch.ones(4), None)


@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_the_advice_is_right(micro_batch_size):
    """Detached features teach the head; a trunk inside the function is taught too."""
    trunk, head, states, log_prob_fn, batch = make_case("dict")
    advantages = torch.rand(ROWS)
    rows = batch(trunk(states).detach())
    sj.gated_backward(log_prob_fn, rows, advantages, sj.KondoGate(rate=0.8), micro_batch_size=micro_batch_size)
    assert trunk.weight.grad is None
    assert head.weight.grad is not None
    head.zero_grad()
    report = sj.gated_backward(
        lambda given: log_prob_fn({**given, "h": trunk(given["h"])}),
        rows | {"h": states},
        advantages,
        sj.KondoGate(rate=0.8),
        micro_batch_size=micro_batch_size,
    )
    found = trunk.weight.grad.clone()
    trunk.zero_grad()
    (-(advantages * report.decision.keep) * log_prob_fn({**rows, "h": trunk(states)})).mean().backward()
    assert (found - trunk.weight.grad).norm() < 1e-5 * found.norm()


@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_leaves_in_a_batch_get_the_gradient_of_their_rows(micro_batch_size):
    """Numbers of the rows themselves that learn, with padding to be cut off."""
    torch.manual_seed(0)
    logits = torch.randn(ROWS, 5, requires_grad=True)
    mask = torch.arange(5) < torch.randint(1, 5, (ROWS, 1))
    advantages = torch.rand(ROWS) + 0.1
    report = sj.gated_backward(
        lambda rows: nn.functional.logsigmoid(rows["logits"]),
        {"logits": logits},
        advantages,
        sj.KondoGate(rate=0.6),
        mask=mask,
        trim=sj.TrimRight("logits"),
        micro_batch_size=micro_batch_size,
    )
    found, logits.grad = logits.grad, None
    terms = -(advantages * report.decision.keep)[:, None] * nn.functional.logsigmoid(logits) * mask
    (terms.sum() / mask.sum()).backward()
    assert torch.allclose(found, logits.grad)


@pytest.mark.parametrize(
    ("case", "micro_batch_size", "screened", "differentiated"),
    [
        ("no gate", None, [], [20]),
        ("no gate", 8, [], [8, 8, 4]),
        ("known", None, [], [4]),
        ("signs", 8, [], [8, 2]),
        ("screen", None, [10], [4]),
        ("screen", 3, [3, 3, 3, 1], [3, 1]),
        ("dense", None, [], [20]),
        ("nothing kept", 8, [8, 2], []),
    ],
)
def test_how_often_the_function_is_called(case, micro_batch_size, screened, differentiated):
    torch.manual_seed(0)
    head, calls = nn.Linear(8, 4), {True: [], False: []}

    def log_prob_fn(rows):
        calls[torch.is_grad_enabled()].append(len(rows))
        return head(rows).log_softmax(1)[:, 0]

    advantages = torch.tensor([1.0, -1.0]).repeat(ROWS // 2)
    sj.gated_backward(log_prob_fn, torch.randn(ROWS, 8), advantages, micro_batch_size=micro_batch_size, **CASES[case])
    assert (calls[False], calls[True]) == (screened, differentiated)


class Running(nn.Module):
    """Takes off the mean of all it has seen while training."""

    def __init__(self):
        super().__init__()
        self.count, self.total = 0, torch.zeros(1)

    def forward(self, states):
        if self.training:
            self.count += len(states)
            self.total = self.total + states.detach().sum(0)
        return states - self.total / max(1, self.count)


@pytest.mark.parametrize("case", [case for case in CASES if case != "known"])
def test_statistics_updated_once_beforehand_are_right_in_every_plan(case):
    torch.manual_seed(0)
    running, head = Running(), nn.Linear(1, 2)
    states, actions = torch.randn(ROWS, 1), torch.randint(2, (ROWS,))
    advantages = states[:, 0] + 0.1 * torch.randn(ROWS)

    def log_prob_fn(rows):
        return head(running(rows["s"])).log_softmax(1).gather(1, rows["a"][:, None]).squeeze(1)

    with torch.no_grad():
        running.train()(states)
    running.eval()
    report = sj.gated_backward(log_prob_fn, {"s": states, "a": actions}, advantages, **CASES[case])
    assert running.count == ROWS
    assert torch.allclose(running.total / ROWS, states.mean(0))
    found = head.weight.grad
    head.zero_grad()
    (-(advantages * report.decision.keep) * log_prob_fn({"s": states, "a": actions})).mean().backward()
    assert torch.allclose(torch.zeros(2, 1) if found is None else found, head.weight.grad, atol=1e-6)


@pytest.mark.parametrize("case", [case for case in CASES if case != "known"])
def test_a_function_may_write_into_its_rows(case):
    """Screened rows are written into too, and are as they were when they come again."""
    torch.manual_seed(0)
    head, states = nn.Linear(3, 2), torch.randn(ROWS, 3)
    before, advantages = states.clone(), torch.randn(ROWS)

    def log_prob_fn(rows):
        rows.sub_(1).mul_(2)
        return head(rows).log_softmax(1)[:, 0]

    report = sj.gated_backward(log_prob_fn, states, advantages, **CASES[case])
    assert torch.equal(states, before)
    found = head.weight.grad
    head.zero_grad()
    (-(advantages * report.decision.keep) * log_prob_fn(before.clone())).mean().backward()
    assert torch.allclose(torch.zeros(2, 3) if found is None else found, head.weight.grad, atol=1e-6)


@pytest.mark.parametrize(
    ("gate", "options"),
    [
        (sj.KondoGate(rate=0.3), {"compare_every": 1}),
        (sj.KondoGate(rate=0.9), {"backward_over_forward": 1.0}),
        (sj.UnbiasedGate(rate=0.5, generator=torch.Generator()), {"micro_batch_size": 2}),
    ],
)
@pytest.mark.parametrize("draft", [False, True])
def test_a_default_device_of_the_callers_changes_nothing(gate, options, draft):
    """Of torch.set_default_device, such as "cuda" where the batch is on the CPU."""
    policy, batch, advantages, _ = engine_cases.make_case("rows")
    found = []
    for device in (None, "meta"):
        if draft:
            options = {**options, "draft": sj.Draft(policy.log_probs)}
        step = sj.GatedBackward(copy.deepcopy(gate), **options)
        torch.set_default_device(device)
        try:
            step(policy.log_probs, batch, advantages)
            sj.frontier(policy.log_probs, batch, advantages, gates={"hard": sj.KondoGate(rate=0.5)}, rounds=1)
        finally:
            torch.set_default_device(None)
        found.append(policy.layer.weight.grad)
        policy.zero_grad()
    assert torch.equal(*found)
