"""Every plan comes to the decision and the gradient that known log-probs give, for less work where it can."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import masked_gradient

import sparkjoy as sj
from sparkjoy.scores import advantage_score
from sparkjoy_lab.scores import uniform_score

TOKENS = 3


class Table:
    """A policy whose log-probs are parameters, so that any value can be set, exact zeros included."""

    def __init__(self, log_probs):
        self.parameter = log_probs.double().clone().requires_grad_()
        self.forwards = 0

    def __call__(self, rows):
        self.forwards += len(rows)
        return self.parameter[rows]


def differs(first, second):
    return (first - second).abs().max() > 1e-9


GATES = st.one_of(
    st.builds(sj.KondoGate, rate=st.sampled_from([0.25, 0.6]), negative_share=st.sampled_from([0.3, 0.5])),
    st.builds(sj.KondoGate, rate=st.sampled_from([0.05, 0.25, 0.5, 0.75, 0.9])),
    st.builds(sj.KondoGate, price=st.sampled_from([-1.0, 0.0, 0.5])),
    st.builds(sj.KondoGate, rate=st.sampled_from([0.2, 0.6]), price=st.sampled_from([-1.0, 0.0, 0.5])),
)


@settings(max_examples=300)
@given(
    gate=GATES,
    signs=st.lists(st.sampled_from([-1.0, -0.5, 0.0, 0.5, 1.0]), min_size=1, max_size=12),
    surprisals=st.lists(st.sampled_from([0.0, 0.0, 0.3, 1.0, 2.0]), min_size=12, max_size=12),
    per_token=st.booleans(),
    micro_batch_size=st.sampled_from([None, 1, 3]),
    normalizer=st.sampled_from(["batch", "kept"]),
    backward_over_forward=st.sampled_from([0.5, 2.0, 20.0]),
)
def test_every_plan_decides_and_differentiates_as_known_log_probs_do(
    gate, signs, surprisals, per_token, micro_batch_size, normalizer, backward_over_forward
):
    advantages = torch.tensor(signs, dtype=torch.float64)
    log_probs = -torch.tensor(surprisals[: len(signs)], dtype=torch.float64)
    if per_token:
        log_probs = log_probs.unsqueeze(1) * torch.arange(TOKENS)
        advantages = advantages.unsqueeze(1) * torch.tensor([1.0, 0.0, 2.0])
    options = {"normalizer": normalizer, "micro_batch_size": micro_batch_size}
    rows = torch.arange(len(signs))
    known_policy, policy = Table(log_probs), Table(log_probs)
    known = sj.gated_backward(known_policy, rows, advantages, gate, log_probs=log_probs, **options)
    step = sj.GatedBackward(gate, backward_over_forward=backward_over_forward, **options)
    for _ in range(2):  # the second time the kept fraction is known, which may change the plan
        policy.parameter.grad, policy.forwards = None, 0
        report = step(policy, rows, advantages)
        assert torch.equal(report.decision.keep, known.decision.keep), report.reason
        if report.decision.price is None:  # nothing is kept, or signs settled it without a score
            assert report.kept == 0 or "keep 0 " not in report.reason
        else:
            assert report.decision.price.item() == pytest.approx(known.decision.price.item())
        gradients = [torch.zeros(()) if p.parameter.grad is None else p.parameter.grad for p in (policy, known_policy)]
        assert not differs(*gradients), report.reason
        assert report.loss.item() == pytest.approx(known.loss.item())
        assert policy.forwards == report.forward_rows
        assert report.screened_rows <= int((advantages.view(len(signs), -1) != 0).any(dim=1).sum())


def run(gate, signs, **options):
    signs = torch.tensor(signs)
    policy = Table(-torch.linspace(0.5, 1.5, len(signs)))
    return sj.gated_backward(policy, torch.arange(len(signs)), signs, gate, **options)


HALF = [1.0, -1.0] * 10


@pytest.mark.parametrize(
    ("gate", "signs", "plan", "screened", "differentiated"),
    [
        (sj.KondoGate(rate=0.1), HALF, "screen", 10, 2),  # the ten successes contend for two places
        (sj.KondoGate(rate=0.5), HALF, "signs", 0, 10),  # they fill the quota
        (sj.KondoGate(price=0), HALF, "signs", 0, 10),
        (sj.KondoGate(price=0, rate=0.7), HALF, "signs", 0, 10),
        (sj.KondoGate(price=0.9), HALF, "screen", 10, 6),
        (sj.KondoGate(price=0), [-1.0] * 20, "signs", 0, 0),
        (sj.KondoGate(rate=0.1), [0.0] * 20, "signs", 0, 0),
        (sj.KondoGate(rate=0.1), [0.0] * 18 + [1.0, -1.0], "signs", 0, 2),  # no more than the quota teach
        (sj.KondoGate(rate=0.6), HALF, "screen", 10, 12),
        (sj.KondoGate(rate=0.95), HALF, "dense", 0, 20),
        (sj.SoftGate(1e-9, rate=0.5), HALF, "screen", 20, 10),
    ],
)
def test_only_rows_that_can_still_be_kept_are_screened(gate, signs, plan, screened, differentiated):
    report = run(gate, signs)
    assert (report.plan, report.screened_rows, report.backward_rows) == (plan, screened, differentiated), report.reason


def test_a_dense_pass_does_not_hold_the_graphs_of_several_micro_batches():
    assert run(sj.KondoGate(rate=0.95), HALF, micro_batch_size=10).plan == "screen"


def test_what_is_measured_decides():
    step = sj.GatedBackward(sj.KondoGate(rate=0.7), backward_over_forward=0.2)
    signs = torch.tensor(HALF)
    policy = Table(-torch.linspace(0.5, 1.5, 20))
    assert (
        step(policy, torch.arange(20), signs).plan == "dense"
    )  # a backward pass this cheap is not worth screening for
    step = sj.GatedBackward(sj.KondoGate(rate=0.7), backward_over_forward=2.0)
    assert step(policy, torch.arange(20), signs).plan == "screen"


def test_scores_that_do_not_read_log_probs_need_no_screening():
    for score in (advantage_score, uniform_score(torch.Generator().manual_seed(0))):
        report = run(sj.KondoGate(rate=0.1), HALF, score=score)
        assert (report.plan, report.screened_rows, report.backward_rows) == ("known", 0, 2)


def test_the_reason_is_a_sentence_with_the_counts():
    reason = run(sj.KondoGate(rate=0.1), HALF).reason
    assert "keep 0 and skip 10 of 20" in reason
    assert "r = 2" in reason


def padded_case(rows=12, width=9, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(20, 7, generator=generator, dtype=dtype).requires_grad_()
    lengths = torch.randint(0, width + 1, (rows,), generator=generator)
    mask = torch.arange(width) < lengths.unsqueeze(1)
    batch = {"tokens": torch.randint(7, (rows, 2 + width), generator=generator), "id": torch.arange(rows)}
    widths = []

    def log_probs(part):
        tokens = part["tokens"]
        widths.append((len(tokens), tokens.shape[1] - 2))
        answers = tokens[:, 2:]
        context = embedding[tokens.cumsum(1)[:, 1:-1] % 20]  # depends on all earlier tokens, on no later one
        return context.log_softmax(-1).gather(2, answers.unsqueeze(2)).squeeze(2)

    return log_probs, batch, torch.randn(rows, generator=generator, dtype=dtype), mask, embedding, widths


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("rate", [0.25, 0.6, 0.9, 1.0])
@pytest.mark.parametrize(("size", "budget"), [(None, 12), (2, None), (3, 20), (None, 1)])
def test_packed_by_length_the_gradient_is_the_same(known, rate, size, budget):
    log_probs, batch, advantages, mask, embedding, widths = padded_case()
    with torch.no_grad():
        before = log_probs(batch).where(mask, 0)
    widths.clear()
    report = sj.gated_backward(
        log_probs,
        batch,
        advantages,
        sj.KondoGate(rate=rate),
        log_probs=before if known else None,
        mask=mask,
        micro_batch_size=size,
        micro_batch_tokens=budget,
        trim=sj.TrimRight("tokens"),
    )
    keep, weight = report.decision.keep, report.decision.weight
    assert torch.equal(keep, sj.KondoGate(rate=rate)(sj.sequence_delight(advantages, before, mask)).keep)
    expected = masked_gradient(
        log_probs, sj.reinforce, batch, advantages, mask, keep, weight, int(mask.sum()), [embedding]
    )
    torch.testing.assert_close(embedding.grad, expected[0], rtol=1e-9, atol=1e-12)
    for rows, width in widths[:-1]:  # the last is the reference's
        assert size is None or rows <= size
        assert budget is None or rows == 1 or rows * width <= budget


def test_trimmed_widths_are_those_of_the_longest_row():
    log_probs, batch, advantages, mask, _, widths = padded_case()
    sj.gated_backward(log_probs, batch, advantages, None, mask=mask, micro_batch_size=1, trim=sj.TrimRight("tokens"))
    assert [width for _, width in widths] == sorted(mask.sum(dim=1).clamp(min=1).tolist(), reverse=True)
    widths.clear()
    trim = sj.TrimRight("tokens", multiple=4)
    sj.gated_backward(log_probs, batch, advantages, None, mask=mask, micro_batch_size=1, trim=trim)
    assert {width for _, width in widths} <= {4, 8, 9}


def test_a_trim_that_cuts_what_counts_is_refused():
    log_probs, batch, advantages, mask, _, _ = padded_case()

    def careless(rows, mask):
        return {**rows, "tokens": rows["tokens"][:, :3]}, slice(None, 1)

    with pytest.raises(ValueError, match="some that count"):
        sj.gated_backward(log_probs, batch, advantages, None, mask=mask, trim=careless)


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("padded", ["left", "right", "both"])
def test_micro_batches_hold_no_more_columns_than_asked_for(padded, multiple):
    """Padding on the left stays, and a rounded length counts in full."""
    places = torch.arange(16).expand(8, -1)
    mask = {"left": places >= 11, "right": places < 5, "both": (places >= 4) & (places < 9)}[padded]
    table, seen = torch.nn.Embedding(9, 1), []

    def log_probs(rows):
        seen.append(tuple(rows["tokens"].shape))
        return table(rows["tokens"]).squeeze(2) - 5

    trim = sj.TrimRight("tokens", multiple=multiple)
    step = sj.GatedBackward(None, micro_batch_tokens=32, trim=trim)
    step(log_probs, {"tokens": torch.zeros(8, 16, dtype=torch.long)}, torch.randn(8), mask=mask)
    assert sum(rows for rows, _ in seen) == 8
    assert max(rows * columns for rows, columns in seen) <= 32


def test_a_token_budget_needs_a_mask():
    with pytest.raises(ValueError, match="micro_batch_tokens"):
        run(sj.KondoGate(rate=0.1), HALF, micro_batch_tokens=4)
    with pytest.raises(ValueError, match="micro_batch_tokens"):
        sj.GatedBackward(None, micro_batch_tokens=0)
    with pytest.raises(ValueError, match="backward_over_forward"):
        sj.GatedBackward(None, backward_over_forward=0)
    with pytest.raises(ValueError, match="TrimRight"):
        sj.TrimRight()
    mask = torch.tensor([[True, False]])
    for batch in ({"other": mask}, mask):
        with pytest.raises(ValueError, match="finds no 'tokens'"):
            sj.TrimRight("tokens")(batch, mask)
