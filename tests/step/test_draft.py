"""A verified draft decides exactly among what it proposes."""

import pytest
import torch
from draft_cases import draft_of, gradients
from engine_cases import ROWS, SHAPES, make_case

import sparkjoy as sj
from sparkjoy import Draft, GatedBackward, KondoGate, SoftGate, UnbiasedGate, clipped
from sparkjoy.scores import delight
from sparkjoy.step.deciding import row_scores
from sparkjoy.step.inputs import check_inputs
from sparkjoy.testing import TinyPolicy
from sparkjoy_lab.scores import surprisal_score


def scores_of(policy, batch, advantages, mask, kept=4):
    """Delights (B,), minus infinity where the sign of the advantage, or a delight of 0, rules a row out."""
    log_probs = policy.log_probs(batch).detach()
    score = delight(advantages, log_probs)
    if score.dim() == 2:
        score = (score if mask is None else score.where(mask, 0)).sum(dim=1)
    enough = advantages.dim() == 1 and int((advantages > 0).sum()) >= kept
    return score.masked_fill((score <= 0) if enough else (score == 0), -torch.inf)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("normalizer", ["batch", "samples", "kept", 3.0])
def test_proposing_everything_is_exact_screening(shape, normalizer):
    policy, batch, advantages, mask = make_case(shape)
    exact = GatedBackward(KondoGate(rate=0.3), normalizer=normalizer)
    expected_report = exact(policy.log_probs, batch, advantages, mask=mask)
    expected = gradients(policy)
    step = GatedBackward(KondoGate(rate=0.3), draft=Draft(draft_of(policy).log_probs, verify=4), normalizer=normalizer)
    report = step(policy.log_probs, batch, advantages, mask=mask)
    assert report.proposed == int((scores_of(policy, batch, advantages, mask) > -torch.inf).sum())
    assert torch.equal(report.decision.keep, expected_report.decision.keep)
    if expected_report.decision.price is not None:  # exact screening has no score where signs decide
        assert float(report.decision.price) == pytest.approx(float(expected_report.decision.price))
    for got, wanted in zip(gradients(policy), expected, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("verify", [1, 1.5, 2])
def test_the_gate_decides_exactly_among_the_proposed(shape, verify):
    policy, batch, advantages, mask = make_case(shape)
    draft = draft_of(policy)
    report = GatedBackward(KondoGate(rate=0.3), draft=Draft(draft.log_probs, verify=verify))(
        policy.log_probs, batch, advantages, mask=mask
    )
    count = {1: 4, 1.5: 6, 2: 8}[verify]
    proposed = scores_of(draft, batch, advantages, mask).sort(descending=True).indices[:count]
    exact = scores_of(policy, batch, advantages, mask)
    best = proposed[exact[proposed].sort(descending=True).indices[:4]]
    assert sorted(best.tolist()) == report.decision.keep.nonzero().squeeze(1).tolist()
    count = min(count, int((scores_of(draft, batch, advantages, mask) > -torch.inf).sum()))
    assert (report.proposed, report.kept, report.total) == (count, 4, ROWS)
    assert bool((exact[report.decision.keep] > -torch.inf).all())
    if shape == "rows":  # else signs keep some, which have no score
        assert report.decision.price == pytest.approx(float(exact[best].min()))


def test_rows_are_counted_as_they_ran():
    policy, batch, advantages, _ = make_case("rows")
    step = GatedBackward(KondoGate(rate=0.3), draft=Draft(draft_of(policy).log_probs, verify=2))
    first = step(policy.log_probs, batch, advantages)
    step.backward_over_forward = 1.0
    second = step(policy.log_probs, batch, advantages)
    # The 7 of positive advantage are drafted; of these, all proposed, 4 are kept: a screening pass and 4 again, until
    # it is known that going backward costs no more than going forward.
    assert int((advantages > 0).sum()) == 7
    assert (first.plan, first.screened_rows, first.forward_rows, first.backward_rows) == ("draft", 7 + 7, 11, 4)
    assert (second.plan, second.screened_rows, second.forward_rows, second.backward_rows) == ("draft", 7, 7, 7)


def test_rows_that_signs_rule_out_are_not_drafted():
    policy, batch, advantages, _ = make_case("rows")
    draft, drafted = draft_of(policy), []

    def watched(rows):
        drafted.append(rows["state"])
        return draft.log_probs(rows)

    for gate in (KondoGate(rate=0.3), KondoGate(price=0.5)):
        GatedBackward(gate, draft=Draft(watched, verify=1))(policy.log_probs, batch, advantages)
        assert torch.equal(drafted.pop(), batch["state"][advantages > 0])
    few = KondoGate(rate=0.75)  # keeps 10: the 7 of positive advantage, and some of the others
    GatedBackward(few, draft=Draft(watched, verify=1))(policy.log_probs, batch, advantages)
    assert torch.equal(drafted.pop(), batch["state"][advantages < 0])
    own = GatedBackward(KondoGate(rate=0.3), draft=Draft(watched, verify=1, score=surprisal_score))
    own(policy.log_probs, batch, advantages)
    assert len(drafted.pop()) == ROWS - 1  # a score of one's own may have any sign; row 2 teaches nothing


def test_a_price_proposes_what_the_draft_puts_above_it():
    policy, batch, advantages, _ = make_case("rows")
    draft = draft_of(policy)
    report = GatedBackward(KondoGate(price=0.5), draft=Draft(draft.log_probs, verify=1))(
        policy.log_probs, batch, advantages
    )
    drafted, exact = (scores_of(p, batch, advantages, None) for p in (draft, policy))
    assert torch.equal(report.decision.keep, (drafted > 0.5) & (exact > 0.5))
    assert bool((drafted > 0.5).any() & (exact > 0.5).any())


def test_nothing_worth_keeping_leaves_gradients_alone():
    policy, batch, advantages, _ = make_case("rows")
    step = GatedBackward(KondoGate(price=1e6), draft=Draft(draft_of(policy).log_probs, verify=2))
    report = step(policy.log_probs, batch, advantages)
    assert (report.kept, report.decision.price, report.loss) == (0, None, 0)
    assert all(parameter.grad is None for parameter in policy.parameters())
    report = GatedBackward(KondoGate(rate=0.3), draft=Draft(draft_of(policy).log_probs, verify=2))(
        policy.log_probs, batch, torch.zeros_like(advantages)
    )
    assert report.kept == 0


def test_without_verification_the_draft_decides():
    policy, batch, advantages, _ = make_case("rows")
    draft = draft_of(policy)
    report = GatedBackward(KondoGate(rate=0.3), draft=Draft(draft.log_probs))(policy.log_probs, batch, advantages)
    expected = GatedBackward(KondoGate(rate=0.3), draft=Draft(draft.log_probs))(policy.log_probs, batch, advantages)
    assert torch.equal(report.decision.keep, expected.decision.keep)
    assert report.proposed == report.kept == 4


def test_known_log_probs_are_verified_and_the_ratio_is_over_them():
    policy, batch, advantages, _ = make_case("rows")
    older = draft_of(policy).log_probs(batch).detach()
    dense = GatedBackward(None, loss=clipped(0.2), normalizer=1.0)
    dense(policy.log_probs, batch, advantages, behavior_log_probs=older)
    expected = gradients(policy)
    step = GatedBackward(KondoGate(rate=1, price=-100), draft=Draft(None, verify=1), loss=clipped(0.2), normalizer=1.0)
    report = step(policy.log_probs, batch, advantages, log_probs=older)
    assert report.kept == ROWS - 1
    for got, wanted in zip(gradients(policy), expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_a_draft_may_be_ranked_by_another_score():
    policy, batch, advantages, _ = make_case("rows")
    step = GatedBackward(KondoGate(rate=0.3), draft=Draft(policy.log_probs, verify=1, score=surprisal_score))
    report = step(policy.log_probs, batch, advantages)
    score = surprisal_score(advantages, policy.log_probs(batch)).where(advantages != 0, 0)
    assert report.decision.keep.nonzero().squeeze(1).tolist() == sorted(
        score.sort(descending=True).indices[:4].tolist()
    )


def test_a_draft_that_decides_has_no_price_where_signs_keep_rows():
    policy, batch, advantages, _ = make_case("rows")
    good = int((advantages > 0).sum())
    for rate in (good / ROWS, 0.75):  # the quota is the 7 of positive advantage, or these and some others
        step = GatedBackward(KondoGate(rate=rate), draft=Draft(draft_of(policy).log_probs))
        report = step(policy.log_probs, batch, advantages)
        assert bool(report.decision.keep[advantages > 0].all())
        assert report.decision.price is None


def test_log_probs_above_0_are_refused_where_a_delight_would_be_of_them():
    policy, batch, advantages, _ = make_case("rows")
    known = policy.log_probs(batch).detach()

    def densities(rows):
        return policy.log_probs(rows) + 5

    for draft in (Draft(None, verify=2), Draft(densities)):  # a price of 0 keeps by sign: no delight is computed
        with pytest.raises(ValueError, match="of a discrete action"):
            GatedBackward(KondoGate(price=0), draft=draft)(
                densities, batch, advantages, log_probs=known if draft.source is None else None
            )
        assert all(parameter.grad is None for parameter in policy.parameters())
    own = Draft(densities, score=lambda advantages, log_probs: advantages * log_probs.abs())
    assert GatedBackward(KondoGate(rate=0.3), draft=own)(densities, batch, advantages).kept == 4


def test_seconds_of_a_comparison_are_not_those_of_the_step(monkeypatch):
    policy, batch, advantages, _ = make_case("rows")
    clock = [0.0]

    def log_prob_fn(rows):  # a second each time
        clock[0] += 1
        return policy.log_probs(rows)

    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    draft = Draft(draft_of(policy).log_probs, verify=1)
    report = GatedBackward(KondoGate(rate=0.3), draft=draft, compare_every=1)(log_prob_fn, batch, advantages)
    assert report.comparison.seconds == 1
    assert sum(report.seconds.values()) == clock[0] - 1


def test_every_option_of_a_draft_is_compared_between_processes():
    inputs = check_inputs(torch.ones(2), torch.ones(2), None, None, None)

    def words(**options):
        return str(GatedBackward(KondoGate(rate=0.3), draft=Draft(torch.neg, **options))._in_words(inputs))

    others = {"verify": 2}, {"score": surprisal_score}
    assert len({words(), *(words(**options) for options in others)}) == 3


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"verify": 0.5}, "verify is 0.5; expected how many times"),
        ({"verify": float("nan")}, "verify is nan"),
        ({"verify": 2, "gate": SoftGate(1.0, rate=0.1)}, "expected a hard KondoGate"),
        ({"verify": 2, "gate": KondoGate(rate=0.1, negative_share=0.5)}, "expected a hard KondoGate of no negative"),
        ({"verify": 2, "gate": UnbiasedGate(rate=0.1)}, "expected a hard KondoGate"),
        ({"source": "draft"}, "source is 'draft'; expected a function"),
        ({"gate": None}, "draft is given with the gate None"),
        ({"draft": "small"}, "draft is 'small'; expected a Draft"),
        ({"normalizer": "all"}, "normalizer is 'all'"),
    ],
)
def test_wrong_options_are_refused(options, says):
    gate = options.pop("gate", KondoGate(rate=0.1))
    of_draft = {name: options.pop(name) for name in ("source", "verify") if name in options}

    def made(draft=None, **others):
        draft = draft or Draft(**{"source": TinyPolicy(2, 2).log_probs, **of_draft})
        return GatedBackward(gate, draft=draft, **others)

    with pytest.raises((ValueError, TypeError), match=says):
        made(**options)


@pytest.mark.parametrize("shape", ["ragged tokens", "ragged tokens, an advantage each"])
@pytest.mark.parametrize("options", [{}, {"micro_batch_tokens": 12}, {"micro_batch_size": 2}, {"trim": True}], ids=str)
def test_drafts_run_in_the_steps_own_micro_batches(shape, options):
    policy, batch, advantages, mask = make_case(shape)
    draft, widths = draft_of(policy), []

    def watched(rows):
        widths.append(rows["state"].shape[0] * rows["state"].shape[1])
        return draft.log_probs(rows)

    if options.pop("trim", False):
        options = {"trim": sj.TrimRight("state", "action"), "micro_batch_tokens": 12}
    expected = GatedBackward(KondoGate(rate=0.3), draft=Draft(draft.log_probs, verify=2))
    decision = expected(policy.log_probs, batch, advantages, mask=mask).decision
    wanted = gradients(policy)
    step = GatedBackward(KondoGate(rate=0.3), draft=Draft(watched, verify=2), **options)
    report = step(policy.log_probs, batch, advantages, mask=mask)
    assert torch.equal(report.decision.keep, decision.keep)
    for got, expected_gradient in zip(gradients(policy), wanted, strict=True):
        torch.testing.assert_close(got, expected_gradient)
    if "micro_batch_tokens" in options:
        assert max(widths) <= 12


def test_a_drafted_step_compares_its_gradient_too():
    policy, batch, advantages, _ = make_case("rows")
    step = GatedBackward(KondoGate(rate=0.3), draft=Draft(draft_of(policy).log_probs, verify=2), compare_every=1)
    report = step(policy.log_probs, batch, advantages)
    got = torch.cat([gradient.flatten() for gradient in gradients(policy)])
    GatedBackward(None)(policy.log_probs, batch, advantages)
    dense = torch.cat([gradient.flatten() for gradient in gradients(policy)])
    assert report.comparison.cosine == pytest.approx(float(torch.cosine_similarity(got, dense, dim=0)))


def test_there_is_one_draft():
    policy, batch, advantages, _ = make_case("rows")
    log_probs = policy.log_probs(batch).detach()
    for screen, known, says in (
        (policy.log_probs, log_probs, "both the draft's source and log_probs are given"),
        (None, None, "the draft has no source and log_probs is None"),
    ):
        with pytest.raises(ValueError, match=says):
            GatedBackward(KondoGate(rate=0.1), draft=Draft(screen))(
                policy.log_probs, batch, advantages, log_probs=known
            )


def test_row_scores_refuse_another_shape():
    from sparkjoy.step.inputs import check_inputs

    _, batch, advantages, _ = make_case("rows")
    inputs = check_inputs(batch, advantages, None, None, None)
    with pytest.raises(ValueError, match="expected \\(13,\\), one per row"):
        row_scores(lambda advantages, log_probs: advantages[:2], inputs, advantages)
