"""A run screened by anything: what it leaves, and that it goes on to the bit."""

from dataclasses import replace

import pytest
import torch

from sparkjoy_lab.tasks.mnist import MnistConfig, MnistTask
from sparkjoy_lab.tasks.reversal import ReversalConfig, ReversalTask
from sparkjoy_lab.training.loop import Training
from sparkjoy_lab.training.settings import Settings

SMALL = ReversalConfig(prompt_length=4, prompts=4, answers=5, layers=2, width=16, heads=2, feed_forward=16, held_out=20)
SCREENS = {
    "mnist": ("stale", "bfloat16", "draft", "cached", "flat", "exact", "sampler"),
    "reversal": ("stale", "bfloat16", "early-exit", "draft", "flat", "exact", "sampler"),
}


def task_of(name):
    return MnistTask(MnistConfig()) if name == "mnist" else ReversalTask(SMALL)


def comparable(record):
    """A record without what a clock had a part in."""
    screening = record["screening"] and {k: v for k, v in record["screening"].items() if not k.endswith("over_forward")}
    return {**record, "seconds": None, "screening": screening}


def steps(training, count):
    for _ in range(count):
        training.step()


@pytest.mark.filterwarnings("ignore:the draft found")  # giving up has to be resumed alike too
@pytest.mark.parametrize(
    ("task_name", "screen", "verify"),
    [
        (task, screen, (None, 3)[(place + turn) % 2])
        for turn, task in enumerate(SCREENS)
        for place, screen in enumerate(SCREENS[task])
    ],
)
def test_a_resumed_run_is_the_unbroken_one(task_name, screen, verify, tmp_path):
    verify = None if screen == "exact" else verify
    own = {"refresh_every": 4} if screen == "stale" else {}
    audits = {"audit_every": 2, "recall_floor": 0.9} if verify or screen not in ("exact", "sampler") else {}
    settings = Settings(rate=0.1, screen=screen, verify=verify, steps=14, **audits, **own)
    task = task_of(task_name)

    unbroken = Training(task, settings)
    steps(unbroken, 14)
    first = Training(task, settings)
    steps(first, 7)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = Training(task, settings)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    steps(second, 7)
    for name, weight in unbroken.policy.state_dict().items():
        assert torch.equal(second.policy.state_dict()[name], weight), name
    assert comparable(second.evaluate()) == comparable(unbroken.evaluate())


def test_records_say_how_good_the_draft_is():
    training = Training(task_of("mnist"), Settings(rate=0.03, screen="draft", verify=4, audit_every=2, recall_floor=0))
    steps(training, 8)
    record = training.evaluate()
    found = record["screening"]
    assert (found["audits"], found["exact"]) == (4, False)
    assert 3 < found["proposed"] <= 12  # fewer where a fresh policy has fewer successes
    assert 0 <= found["draft_recall"] <= found["recall"] <= 1
    assert found["seconds_over_forward"] > 0
    assert found["flops_over_forward"] == pytest.approx(784 * 10 / (784 * 100 + 100 * 100 + 100 * 10))
    assert (record["kept"], record["backward_samples"]) == (24, 24)
    steps(training, 1)
    later = training.evaluate()["screening"]
    assert later["recall_since"] is None
    assert later["recall"] == found["recall"]


def test_a_draft_given_up_is_named_in_the_records():
    training = Training(task_of("mnist"), Settings(rate=0.03, screen="draft", audit_every=1, recall_floor=1.0))
    with pytest.warns(UserWarning, match="less than the 100% asked for"):
        steps(training, 8)
    assert training.evaluate()["screening"]["exact"]


def test_screening_leaves_the_seed_alone():
    """The same images and initial weights, whatever screens: with everything proposed, the same run."""
    task = task_of("mnist")
    exact, drafted = (
        Training(task, Settings(rate=0.1, **options))
        for options in ({"screen": "exact"}, {"screen": "draft", "verify": 10, "audit_every": 3, "recall_floor": 0})
    )
    for training in (exact, drafted):
        steps(training, 12)
    for left, right in zip(exact.policy.parameters(), drafted.policy.parameters(), strict=True):
        torch.testing.assert_close(left, right)


def test_cached_screening_runs_fewer_flops():
    training = Training(task_of("mnist"), Settings(rate=0.03, screen="cached", audit_every=5, recall_floor=0))
    digits = training.task._digits
    few = replace(digits, train_images=digits.train_images[:50], train_labels=digits.train_labels[:50])
    training.task._digits = few  # which come round again soon
    steps(training, 40)
    assert training.evaluate()["screening"]["flops_over_forward"] < 0.6


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "dg", "screen": "draft"}, "go with a gate of whole samples"),
        ({"unit": "token", "screen": "draft"}, "go with a gate of whole samples"),
        ({"screen": "exact", "verify": 2}, "--verify 2 verifies a draft; --screen exact needs none"),
        ({"verify": 0.5}, "verify is 0.5"),
        ({"audit_every": 0}, "--audit-every 0: expected at least 1"),
        ({"method": "unbiased", "price": 1.0}, "--method unbiased goes by a score of its own"),
        ({"method": "pg", "score_noise": 0.5}, "--score-noise 0.5: goes with"),
        ({"score_noise": -1.0}, "--score-noise -1.0: expected a number of at least 0"),
        ({"method": "pg", "noise": 0.5}, "--noise 0.5: a budget that finds its own rate"),
        ({"method": "unbiased", "noise": 0.5, "rate": 0.1}, "--noise 0.5: a budget that finds its own rate"),
        ({"method": "unbiased", "noise": -1.0}, "noise is -1.0"),
    ],
)
def test_settings_that_do_not_go_together(options, says):
    with pytest.raises(ValueError, match=says):
        Settings(**options)


def test_screeners_that_a_task_lacks():
    with pytest.raises(ValueError, match="policy is a MLP, which has no layers to exit early from"):
        Training(task_of("mnist"), Settings(screen="early-exit"))
    with pytest.raises(ValueError, match="--screen cached: no example of reversal comes round again"):
        Training(task_of("reversal"), Settings(screen="cached"))
