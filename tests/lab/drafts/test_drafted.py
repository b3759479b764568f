"""A bad draft is given up, a good one is taught, and both are saved whole."""

import pytest
import torch
from draft_cases import draft_of, gradients
from engine_cases import ACTIONS, ROWS, WIDTH, make_case

from sparkjoy import GatedBackward, KondoGate, UnbiasedGate, clipped
from sparkjoy_lab.drafts import StaleWeights
from sparkjoy_lab.drafts.audit import Audit, recall, spearman
from sparkjoy_lab.drafts.drafted import DraftedBackward


class Wrong:
    """A draft that ranks the rows backwards, and counts its lessons."""

    def __init__(self, policy):
        self.policy, self.lessons, self.rows = policy, 0, 0

    def __call__(self, rows):
        return -1 / (self.policy.log_probs(rows) - 1e-3).abs()

    def learn(self, seen):
        self.lessons += 1
        self.rows += sum(len(log_probs) for _, log_probs in seen)
        assert not any(log_probs.requires_grad for _, log_probs in seen)

    def state_dict(self):
        return {"lessons": self.lessons}

    def load_state_dict(self, state):
        self.lessons = state["lessons"]


def test_a_bad_draft_is_replaced_by_exact_screening_with_a_warning():
    policy, batch, advantages, _ = make_case("rows")
    advantages = torch.full_like(advantages, 1.0)
    draft = Wrong(policy)
    step = DraftedBackward(KondoGate(rate=0.3), draft, audit=Audit(every=2, floor=0.6, window=2))
    done = []
    for _ in range(3):
        step(policy.log_probs, batch, advantages)
        done.append(step.drafting)
    assert [drafting.audit is not None for drafting in done] == [False, True, False]
    assert not any(drafting.exact for drafting in done)
    with pytest.warns(UserWarning, match="less than the 60% asked for: screening is exact from here on"):
        report = step(policy.log_probs, batch, advantages)
    assert step.drafting.exact
    exact = GatedBackward(KondoGate(rate=0.3))(policy.log_probs, batch, advantages)
    assert torch.equal(report.decision.keep, exact.decision.keep)
    assert draft.lessons == 3  # nothing to teach once it is given up
    fresh = DraftedBackward(KondoGate(rate=0.3), Wrong(policy), audit=Audit(every=2, floor=0.6, window=2))
    fresh.load_state_dict(step.state_dict())
    fresh(policy.log_probs, batch, advantages)
    assert fresh.drafting.exact


def test_exact_screening_goes_on_from_what_the_drafted_steps_kept():
    policy, batch, advantages, _ = make_case("rows")
    audit = Audit(every=2, floor=1.0, window=1)
    step = DraftedBackward(KondoGate(price=0), Wrong(policy), audit=audit, rate=0.3)
    assert step(policy.log_probs, batch, torch.ones_like(advantages)).kept == len(advantages)
    with pytest.warns(UserWarning, match="screening is exact"):
        report = step(policy.log_probs, batch, advantages)
    assert report.kept < len(advantages)
    remembered = step.state_dict()["exact_step"]["kept_fraction"]
    assert remembered == pytest.approx(0.8 * 1 + 0.2 * report.kept / len(advantages))


def test_a_good_draft_is_kept_and_taught_what_was_verified():
    policy, batch, advantages, _ = make_case("rows")
    draft = Wrong(policy)
    step = DraftedBackward(
        KondoGate(rate=0.3), draft, verify=4, audit=Audit(every=1, floor=1.0, window=1, rows=5), rate=0.3
    )
    step(policy.log_probs, batch, advantages)
    assert step.drafting.audit.recall == 1.0  # everything is proposed
    assert not step.drafting.exact
    assert draft.rows == 5 + 4  # the audited, and of the 7 proposed, of which the kept are some, the others


@pytest.mark.parametrize("verify", [None, 1])
def test_given_log_probs_that_are_given_up_decide_no_more_and_stay_the_ratio_s_denominator(verify):
    policy, batch, advantages, _ = make_case("rows")
    advantages = torch.ones_like(advantages)
    backwards = Wrong(policy)(batch).detach()
    exact = GatedBackward(KondoGate(rate=0.3), loss=clipped(0.2))
    expected = exact(policy.log_probs, batch, advantages, behavior_log_probs=backwards)
    wanted = gradients(policy)
    audit = Audit(every=1, floor=1.0, window=1)
    step = DraftedBackward(KondoGate(rate=0.3), None, verify=verify, audit=audit, rate=0.3, loss=clipped(0.2))
    with pytest.warns(UserWarning, match="screening is exact from here on"):
        reports = [step(policy.log_probs, batch, advantages, log_probs=backwards)]
    found = [gradients(policy)]
    reports.append(step(policy.log_probs, batch, advantages, log_probs=backwards))
    found.append(gradients(policy))
    for report, got in zip(reports, found, strict=True):
        assert report.plan == "screen"
        assert torch.equal(report.decision.keep, expected.decision.keep)
        for one, other in zip(got, wanted, strict=True):
            torch.testing.assert_close(one, other)


def test_a_warning_is_of_the_line_that_called():
    policy, batch, advantages, _ = make_case("rows")
    step = DraftedBackward(KondoGate(rate=0.3), Wrong(policy), audit=Audit(every=1, floor=1.0, window=1), rate=0.3)
    with pytest.warns(UserWarning, match="screening is exact") as found:
        step(policy.log_probs, batch, torch.ones_like(advantages))
    assert [warning.filename for warning in found] == [__file__]


def test_rows_that_signs_keep_are_lessons_too():
    policy, batch, advantages, _ = make_case("rows")
    draft = Wrong(policy)
    step = DraftedBackward(KondoGate(rate=0.75), draft, verify=1, audit=Audit(every=99), micro_batch_size=4)
    report = step(policy.log_probs, batch, advantages)
    assert (report.proposed, report.kept, report.screened_rows) == (10, 10, 5 + 3)
    assert draft.rows == 10  # the 3 proposed when they were screened, the 7 of positive advantage when differentiated


@pytest.mark.parametrize("options", [{"micro_batch_tokens": 12}, {"micro_batch_size": 2}], ids=str)
def test_audits_run_in_the_steps_own_micro_batches(options):
    policy, batch, advantages, mask = make_case("ragged tokens")
    draft, drafted, exact = draft_of(policy), [], []

    def watched(log_prob_fn, shapes):
        def log_probs(rows):
            shapes.append(rows["state"].shape[:2])
            return log_prob_fn(rows)

        return log_probs

    step = DraftedBackward(
        KondoGate(rate=0.3), watched(draft.log_probs, drafted), verify=2, audit=Audit(every=1, floor=0), **options
    )
    report = step(watched(policy.log_probs, exact), batch, advantages, mask=mask)
    assert step.drafting.audit is not None
    for shapes in (drafted, exact):
        for rows, columns in shapes:
            assert rows * columns <= options.get("micro_batch_tokens", 1000)
            assert rows <= options.get("micro_batch_size", 1000)
    assert report.forward_rows == sum(rows for rows, _ in exact)
    assert report.screened_tokens > 2 * int(mask.sum())  # the audit's two passes, and what the step looked at


def test_a_damaged_state_changes_nothing():
    policy, batch, advantages, _ = make_case("rows")

    def made():
        return DraftedBackward(UnbiasedGate(noise=0.3), policy.log_probs, audit=Audit())

    saved, fresh = made(), made()
    saved(policy.log_probs, batch, advantages)
    state = saved.state_dict()
    state["steps"] = -1
    before = str(fresh.state_dict())
    with pytest.raises(ValueError, match="state has steps: -1"):
        fresh.load_state_dict(state)
    assert str(fresh.state_dict()) == before


def test_audits_time_and_count_by_turns():
    policy, batch, advantages, _ = make_case("rows")
    step, found = DraftedBackward(KondoGate(rate=0.3), policy.log_probs, audit=Audit(every=1), rate=0.3), []
    for _ in range(2):
        report = step(policy.log_probs, batch, advantages)
        found.append(step.drafting.audit)
    counted, timed = found
    assert (report.screened_rows, report.forward_rows) == (2 * ROWS + 7, ROWS + 4)
    assert timed.draft_flops is None
    assert timed.exact_seconds > 0
    assert counted.exact_seconds is None
    assert counted.draft_flops == counted.exact_flops == 2 * WIDTH * ACTIONS * ROWS
    assert (timed.recall, timed.spearman) == (1.0, pytest.approx(1.0))


def test_recall_counts_ties_and_leaves_out_zeros():
    exact = torch.tensor([5.0, 3.0, 3.0, 0.0, -1.0])
    assert recall(exact, torch.tensor([5.0, 0.0, 3.0, 1.0, 2.0]), rate=0.4) == 1.0  # either of the tied is right
    assert recall(exact, torch.tensor([0.0, 0.0, 1.0, 0.0, 2.0]), rate=0.4) == 0.5
    assert recall(torch.zeros(5), exact, rate=0.4) == 1.0
    assert recall(exact, -exact, rate=0.4) == 0.0


def test_spearman_agrees_with_the_formula_for_distinct_ranks(generator):
    left, right = torch.randperm(20, generator=generator), torch.randperm(20, generator=generator)
    expected = 1 - 6 * float((left - right).square().sum()) / (20 * (20**2 - 1))
    assert spearman(left.float(), right.float() ** 3) == pytest.approx(expected)


@pytest.mark.parametrize("options", [{"every": 0}, {"rows": 0}, {"window": 0}, {"floor": 1.5}])
def test_wrong_audits_are_refused(options):
    with pytest.raises(ValueError, match=f"audit {next(iter(options))} is"):
        Audit(**options)


def test_a_resumed_draft_goes_on_as_it_would_have():
    policy, batch, advantages, _ = make_case("rows")

    def made():
        audit = Audit(every=2, rows=5, floor=0)
        return DraftedBackward(KondoGate(rate=0.3), StaleWeights(draft_of(policy), 3), verify=2, audit=audit, rate=0.3)

    def steps(step, count):
        found = []
        for _ in range(count):
            step(policy.log_probs, batch, advantages)
            found.append(step.drafting)
        return found

    whole, first, second = made(), made(), made()
    expected = steps(whole, 6)
    steps(first, 3)
    second.load_state_dict(first.state_dict())
    found = steps(second, 3)
    assert [one.audit and one.audit.recall for one in found] == [one.audit and one.audit.recall for one in expected[3:]]


@pytest.mark.parametrize("option", ["trim", "group_by"])
def test_what_reads_the_batch_is_refused(option):
    with pytest.raises(ValueError, match=f"{option} is given"):
        DraftedBackward(KondoGate(rate=0.3), None, audit=Audit(), **{option: "tokens"})
