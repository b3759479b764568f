from types import SimpleNamespace

import pytest
import torch
from engine_cases import ACTIONS, TOKENS, WIDTH, make_case
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

import sparkjoy as sj
from sparkjoy_lab.flops import CALLS_TO_A_CHECK, SHAPES_MEASURED, CountedFlops, FlopCount
from sparkjoy_lab.token_gate import TokenGatedBackward

ROW = 2 * WIDTH * ACTIONS
"""FLOPs of a `TinyPolicy` forward, and as many backward: the input needs no gradient."""


class Counted:
    """A step whose FLOPs are counted; its reports have them."""

    def __init__(self, gate, **options):
        self.flops = CountedFlops()
        self.step = sj.GatedBackward(gate, backward=self.flops.backward, **options)

    def __call__(self, *args, **given):
        self.flops.counted(self.step, *args, **given)
        forward, backward = self.flops.forward_flops, self.flops.backward_flops
        return SimpleNamespace(forward_flops=forward, backward_flops=backward, flops=forward + backward)

    def state_dict(self):
        return self.flops.state_dict()

    def load_state_dict(self, state):
        self.flops.load_state_dict(state)


class Counting:
    """A backend of torch.compile that counts its calls, and those that a dispatch mode watches."""

    def __init__(self):
        self.calls = self.watched = 0

    def __call__(self, graph, _):
        def run(*args):
            self.calls += 1
            self.watched += _get_current_dispatch_mode() is not None
            return graph(*args)

        return run


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))

    def forward(self, states):
        return self.layers(states)


def in_place(body, backend):
    body.compile(backend=backend)
    return body


def inside(body, backend):
    body.layers = torch.compile(body.layers, backend=backend)
    return body


COMPILED = {
    "module": lambda body, backend: torch.compile(body, backend=backend),
    "in place": in_place,
    "function": lambda body, backend: torch.compile(lambda states: body(states) + 1.0, backend=backend),
    "inside": inside,
}
FORWARD, BACKWARD = 2 * (6 * 8 + 8 * 4), 2 * (6 * 8 + 2 * 8 * 4)


@pytest.mark.parametrize("kind", COMPILED)
@pytest.mark.parametrize("compiled_first", [True, False])
def test_counting_leaves_a_compiled_function_compiled(kind, compiled_first):
    torch._dynamo.reset()
    backend = Counting()
    logits = COMPILED[kind](Body(), backend)
    states, actions = torch.randn(32, 6), torch.randint(4, (32,))
    if compiled_first:
        with torch.no_grad():
            logits(states)

    def log_prob_fn(rows):
        return logits(rows["states"]).log_softmax(1).gather(1, rows["actions"][:, None]).squeeze(1)

    step, calls = Counted(sj.KondoGate(rate=0.25)), []
    for _ in range(4):
        before = backend.calls
        report = step(log_prob_fn, {"states": states, "actions": actions}, torch.ones(32))
        calls.append(backend.calls - before)
        assert report.forward_flops == FORWARD * (32 + 8)
        assert report.backward_flops == BACKWARD * 8
    assert calls == [0, 2, 2, 2]  # the first is measured
    before = backend.calls
    with torch.no_grad():
        logits(states)
    assert backend.calls == before + 1
    assert backend.watched == 0


def test_a_pass_is_measured_both_ways_or_not_at_all():
    torch._dynamo.reset()
    backend = Counting()
    body = torch.compile(Body(), backend=backend)

    def log_prob_fn(rows):
        return body(rows).log_softmax(1)[:, 0]

    step = Counted(sj.KondoGate(rate=0.5))
    step(log_prob_fn, torch.randn(32, 6), torch.ones(32))  # 32 rows are known forward, and 16 both ways
    everything = Counted(None)
    everything.load_state_dict(step.state_dict())
    assert backend.calls == 0
    report = everything(log_prob_fn, torch.randn(32, 6), torch.ones(32))
    assert backend.calls == 0  # else what ran compiled would go backward while it is counted
    assert (report.forward_flops, report.backward_flops) == (FORWARD * 32, BACKWARD * 32)


def test_the_stance_of_the_compiler_is_put_back():
    from torch._dynamo import eval_frame

    with torch.compiler.set_stance("eager_on_recompile"):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), FlopCount():
            torch.ones(2, 3) @ torch.ones(4, 4)
        assert eval_frame._stance.stance == "eager_on_recompile"
    assert eval_frame._stance.stance == "default"


def ragged(generator, attends):
    """A policy whose FLOPs grow with the square of the length, and batches of random lengths."""
    embed, out = nn.Embedding(20, 16), nn.Linear(16, 20)

    def log_prob_fn(rows):
        hidden = embed(rows["tokens"])
        if attends:
            hidden = hidden + (hidden @ hidden.transpose(1, 2)).softmax(-1) @ hidden
        return out(hidden).log_softmax(-1).gather(2, rows["tokens"][..., None]).squeeze(2)

    def batch():
        mask = torch.arange(60)[None] < torch.randint(1, 61, (24, 1), generator=generator)
        tokens = torch.randint(20, (24, 60), generator=generator)
        return {"tokens": tokens}, torch.randn(24, generator=generator), mask

    return log_prob_fn, batch


@pytest.mark.parametrize("attends", [False, True])
def test_ragged_batches_measure_few_shapes_and_estimate_the_others(attends):
    log_prob_fn, batch = ragged(torch.Generator().manual_seed(0), attends)
    options = {"trim": sj.TrimRight("tokens"), "micro_batch_size": 4}
    step = Counted(sj.KondoGate(rate=0.3), **options)
    estimated = measured = 0
    for _ in range(20):
        rows, advantages, mask = batch()
        report = step(log_prob_fn, rows, advantages, mask=mask)
        fresh = Counted(sj.KondoGate(rate=0.3), **options)
        exact = fresh(log_prob_fn, rows, advantages, mask=mask)
        estimated, measured = estimated + report.flops, measured + exact.flops
        if not attends:
            assert report.flops == exact.flops
    assert estimated == pytest.approx(measured, rel=0.02)
    known = step.state_dict()["passes"]
    assert {direction: len(passes) for direction, passes in known.items()} == {
        "forward": SHAPES_MEASURED,
        "backward": SHAPES_MEASURED,
    }


def test_ragged_rows_of_one_shape_are_measured_each_time():
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    step = Counted(None)
    for lengths in ((1, 2, 3), (5, 5, 5)):
        rows = torch.nested.as_nested_tensor([torch.randn(length, 3) for length in lengths], layout=torch.jagged)
        report = step(lambda r: torch.stack([layer(row).sum() for row in r.unbind()]), rows, torch.ones(3))
        assert report.forward_flops == 2 * 3 * 2 * sum(lengths)


def body_and_head():
    body, head = nn.Linear(6, 16), nn.Linear(16, 4)

    def log_prob_fn(rows):
        return head(body(rows).tanh()).log_softmax(1)[:, 0]

    return body, log_prob_fn


@pytest.mark.parametrize("thaw", [True, False])
def test_freezing_and_thawing_a_body_is_noticed(thaw):
    body, log_prob_fn = body_and_head()
    body.requires_grad_(not thaw)
    step = Counted(sj.KondoGate(rate=0.25))
    states, advantages = torch.randn(8, 6), torch.ones(8)
    before = step(log_prob_fn, states, advantages)
    frozen, full = 2 * 16 * 4, 2 * (2 * 16 * 4 + 6 * 16)
    assert before.backward_flops == 2 * (frozen if thaw else full)
    body.requires_grad_(thaw)
    for _ in range(CALLS_TO_A_CHECK):
        after = step(log_prob_fn, states, advantages)
    assert after.backward_flops == 2 * (full if thaw else frozen)
    assert step.flops.backward_over_forward == pytest.approx((full if thaw else frozen) / (2 * (6 * 16 + 16 * 4)))


def test_a_check_that_agrees_forgets_nothing():
    policy, batch, advantages, _ = make_case("rows")
    step = Counted(sj.KondoGate(rate=0.1))
    step(policy.log_probs, batch, advantages)
    known = step.state_dict()["passes"]
    for _ in range(CALLS_TO_A_CHECK + 5):
        step(policy.log_probs, batch, advantages)
    assert step.state_dict()["passes"] == known


def test_a_resumed_step_counts_and_checks_as_an_unbroken_one():
    body, log_prob_fn = body_and_head()
    body.requires_grad_(False)
    unbroken = Counted(sj.KondoGate(rate=0.5))
    for _ in range(60):
        unbroken(log_prob_fn, torch.randn(8, 6), torch.ones(8))
    resumed = Counted(sj.KondoGate(rate=0.5))
    resumed.load_state_dict(unbroken.state_dict())
    body.requires_grad_(True)
    counts = [
        [step(log_prob_fn, torch.randn(8, 6), torch.ones(8)).backward_flops for _ in range(60)]
        for step in (unbroken, resumed)
    ]
    assert counts[0] == counts[1]
    assert counts[0][0] < counts[0][-1]
    assert unbroken.state_dict() == resumed.state_dict()


def test_a_comparison_with_the_dense_gradient_is_not_counted():
    policy, batch, advantages, _ = make_case("rows")
    plain, comparing = (Counted(sj.KondoGate(rate=0.3), **options) for options in ({}, {"compare_every": 1}))
    for _ in range(2):
        assert plain(policy.log_probs, batch, advantages) == comparing(policy.log_probs, batch, advantages)


def test_gated_tokens_are_counted_too():
    policy, batch, advantages, _ = make_case("tokens")
    known, flops = policy.log_probs(batch).detach(), CountedFlops()
    step = TokenGatedBackward(sj.KondoGate(rate=1.0), backward=flops.backward)
    report = flops.counted(step, policy.log_probs, batch, advantages, log_probs=known)
    assert flops.forward_flops + flops.backward_flops == 2 * ROW * TOKENS * report.backward_rows
