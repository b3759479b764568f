"""Every screener gives log-probs without a graph, and what sets it apart."""

import pytest
import torch

from sparkjoy import KondoGate
from sparkjoy.testing import TinyPolicy
from sparkjoy_lab.drafts import AdvantageOnly, CachedLogProbs, DistilledDraft, LowerPrecision, StaleWeights
from sparkjoy_lab.drafts.audit import Audit
from sparkjoy_lab.drafts.drafted import DraftedBackward
from sparkjoy_lab.policies.early_exit import EarlyExit
from sparkjoy_lab.policies.mlp import MLP
from sparkjoy_lab.policies.transformer import Transformer


def transformer():
    torch.manual_seed(0)
    return Transformer(vocab_size=3, positions=9, layers=3, width=16, heads=2, feed_forward=32)


@pytest.fixture
def rows(generator):
    return {
        "prompts": torch.randint(3, (6, 5), generator=generator),
        "answers": torch.randint(3, (6, 5), generator=generator),
    }


SCREENERS = {
    "stale": lambda policy: StaleWeights(policy, every=2),
    "bfloat16": LowerPrecision,
    "early exit": lambda policy: EarlyExit(policy, layers=1),
    "draft": lambda policy: DistilledDraft(transformer()),
    "cached": lambda policy: CachedLogProbs(lambda r: policy.log_probs(r).sum(1), lambda r: r["answers"][:, 0], 3, 1),
    "flat": lambda policy: AdvantageOnly(lambda rows: rows["answers"]),
}


@pytest.mark.parametrize("name", SCREENERS)
def test_log_probs_without_a_graph(name, rows):
    policy = transformer()
    log_probs = SCREENERS[name](policy)(rows)
    assert log_probs.shape == ((6,) if name == "cached" else (6, 5))
    assert not log_probs.requires_grad
    assert log_probs.dtype == torch.float32
    assert bool((log_probs <= 0).all())
    assert all(parameter.grad is None for parameter in policy.parameters())


@pytest.mark.parametrize("name", ["stale", "cached", "draft"])
def test_a_saved_state_screens_alike(name, rows, tmp_path):
    policy, step = transformer(), []
    for _ in range(2):
        screen = SCREENERS[name](policy)
        step.append(screen)
    first, second = step
    seen = [(rows, policy.log_probs(rows).detach() - 0.1)]
    if name == "cached":
        seen = [(rows, seen[0][1].sum(1))]
    first(rows)
    first.learn(seen)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for _ in range(3):
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.add_(0.01)
        assert torch.equal(first(rows), second(rows))
        first.learn(seen)
        second.learn(seen)


def test_stale_weights_are_renewed_when_due(rows):
    policy = transformer()
    screen = StaleWeights(policy, every=2)
    ages = []
    for _ in range(5):
        ages.append(bool(torch.equal(screen(rows), policy.log_probs(rows))))
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.mul_(1.1)
        screen.learn([])
    assert ages == [True, False, True, False, True]


def test_fewer_bits_are_near_and_not_the_same(rows):
    policy = transformer()
    exact, short = policy.log_probs(rows).detach(), LowerPrecision(policy)(rows)
    torch.testing.assert_close(short, exact, atol=0.05, rtol=0.05)
    assert not torch.equal(short, exact)


@pytest.mark.parametrize("lengths", [None, torch.tensor([5, 3, 4, 5, 1, 2])])
def test_an_early_exit_reads_the_first_layers_with_the_shared_head(rows, lengths):
    policy, shallow = transformer(), transformer()
    shallow.blocks = shallow.blocks[:2]
    if lengths is not None:
        rows = {**rows, "prompt_lengths": lengths}
    torch.testing.assert_close(EarlyExit(policy, 2)(rows), shallow.log_probs(rows).detach())
    torch.testing.assert_close(policy.log_probs(rows, layers=3), policy.log_probs(rows))


def test_an_early_exit_has_a_gradient_in_its_layers_alone(rows):
    policy = transformer()
    policy.log_probs(rows, layers=1).sum().backward()
    assert policy.blocks[0].qkv.weight.grad.abs().sum() > 0
    assert policy.blocks[1].qkv.weight.grad is None


def test_the_cache_computes_what_it_lacks_and_what_is_too_old():
    asked = []

    def log_prob_fn(rows):
        asked.append(rows["key"].tolist())
        return -1.0 - rows["key"] - 10 * len(asked)

    def screen(*keys):
        return cache({"key": torch.tensor(keys)}).tolist()

    cache = CachedLogProbs(log_prob_fn, lambda rows: rows["key"], size=5, max_age=2)
    assert screen(0, 1) == [-11, -12]
    assert screen(1, 2, 0) == [-12, -23, -11]
    cache.learn([({"key": torch.tensor([1])}, torch.tensor([-0.5]))])  # age 1; 1 is seen exactly, within the step
    cache.learn([])  # age 2: the limit
    assert screen(0, 1, 2) == [-11, -0.5, -23]
    cache.learn([])  # age 3 of what was computed in the first step, and in the first learn
    assert screen(0) == [-31]
    assert asked == [[0, 1], [2], [0]]
    assert cache.computed == 1
    with pytest.raises(ValueError, match="whole numbers \\(n,\\) from 0 to 4"):
        screen(5)


def test_distillation_finds_more_of_the_true_survivors(generator):
    torch.manual_seed(1)
    policy, student = MLP(8, 32, 10), MLP(8, 32, 10)
    with torch.no_grad():
        policy.layers[1].weight.mul_(6)  # sure of itself in places
    draft = DistilledDraft(student, learning_rate=1e-2)
    step = DraftedBackward(KondoGate(rate=0.05), draft, verify=2, audit=Audit(every=1, floor=0), rate=0.05)
    recalls = []
    for _ in range(400):
        inputs = torch.randn(100, 8, generator=generator)
        probabilities = policy(inputs).softmax(dim=1).detach()
        batch = {"inputs": inputs, "actions": torch.multinomial(probabilities, 1, generator=generator).squeeze(1)}
        step(policy.log_probs, batch, torch.ones(100))
        recalls.append(step.drafting.audit.recall)
    before, after = sum(recalls[:20]) / 20, sum(recalls[-50:]) / 50
    assert after > before + 0.3


def test_a_mask_hides_what_does_not_count(rows):
    draft = DistilledDraft(transformer(), mask=lambda rows: torch.arange(5).expand(6, 5) < 2)
    exact = draft(rows)
    exact[:, 2:] = torch.nan
    exact[:, :2] -= 1
    before = draft(rows)
    draft.learn([(rows, exact)])
    assert bool(draft(rows).isfinite().all())
    assert not torch.equal(draft(rows), before)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: StaleWeights(TinyPolicy(2, 2), every=0), "every is 0"),
        (lambda: StaleWeights(torch.nn.Linear(2, 2), every=1), "policy is a Linear; expected a torch module with"),
        (lambda: LowerPrecision(TinyPolicy(2, 2), torch.float32), "expected torch.bfloat16 or torch.float16"),
        (lambda: EarlyExit(transformer(), 3), "layers is 3; expected at least 1 and fewer than the 3"),
        (lambda: EarlyExit(TinyPolicy(2, 2), 1), "policy is a TinyPolicy, which has no layers"),
        (lambda: DistilledDraft(lambda rows: rows), "student is the function .* expected a torch module"),
        (lambda: DistilledDraft(TinyPolicy(2, 2), learning_rate=0), "learning_rate is 0"),
        (lambda: CachedLogProbs(len, len, 0, 0), "size is 0"),
    ],
)
def test_wrong_options_are_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_layers_out_of_range_are_refused(rows):
    with pytest.raises(ValueError, match="layers is 4; expected 1 to 3"):
        transformer().log_probs(rows, layers=4)
