"""One sign rule: the engine, TRL's trainer and `sj.select` decide alike on the same advantages and log-probs."""

from collections import defaultdict
from types import SimpleNamespace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparkjoy as sj
from sparkjoy.integrations.trl import KondoGRPOTrainer


class Numbers(KondoGRPOTrainer):
    """The trainer's decision on numbers alone: no model, no generation."""

    def __init__(self, log_probs, at_hand):
        self.accelerator = SimpleNamespace(num_processes=1, process_index=0, gather=lambda local: local, device="cpu")
        self.args = SimpleNamespace(
            gate_score="delight",
            gate_advantages="trl",
            gate_log_probs="auto",
            gate_dg_temperature=1.0,
            entropy_coef=0.0,
            seed=0,
            gradient_accumulation_steps=1,
        )
        self.state, self._step = SimpleNamespace(global_step=0), 0
        self.loss_type, self.beta, self._gate_dg, self._gate_expected = "dapo", 0.0, None, None
        self.reward_weights, self.num_generations = torch.ones(1), 1
        self.scale_rewards, self.multi_objective_aggregation = "none", "sum_then_normalize"
        self._gate_rewards, self._gate_recorded, self._gate_score = None, True, sj.delight
        self._metrics = {"train": defaultdict(list)}
        self.exact, self.at_hand = log_probs, at_hand

    def _screen(self, output, rows):
        return self.exact

    def decided(self, gate, advantages, mask):
        output = {
            "advantages": advantages,
            "completion_mask": mask.long(),
            "prompt_mask": torch.zeros(len(mask), 0, dtype=torch.long),
        }
        if self.at_hand:
            output["sampling_per_token_logps"] = self.exact
        return self._decide(gate, output), output


@st.composite
def batches(draw):
    """Advantages (B,) or (B, T), log-probs (B, T) with some of exactly 0, a mask with some rows empty."""
    rows, tokens = draw(st.integers(1, 12)), draw(st.integers(1, 3))
    values = st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.0, 0.25, 1.0])
    per_token = draw(st.booleans())

    def table(elements):
        return torch.tensor(
            draw(st.lists(st.lists(elements, min_size=tokens, max_size=tokens), min_size=rows, max_size=rows))
        )

    advantages = table(values) if per_token else table(values)[:, 0]
    return advantages, table(st.sampled_from([0.0, 0.0, -0.25, -1.0, -3.0])), table(st.booleans())


def by_engine(gate, advantages, log_probs, mask, known):
    logits = log_probs.clone().requires_grad_()
    step = sj.GatedBackward(gate, normalizer="batch")
    given = {"log_probs": log_probs} if known else {}
    return step(lambda rows: logits[rows], torch.arange(len(mask)), advantages, mask=mask, **given).decision


rates = st.sampled_from([None, 0.1, 0.3, 0.5, 0.9])
prices = st.sampled_from([None, -0.5, 0.0, 0.4])


@settings(max_examples=150)
@given(
    batches(), rates | st.none(), st.sampled_from([None, -0.5, 0.0, 0.4]), st.sampled_from([0.0, 0.3]), st.booleans()
)
def test_hard_gates_keep_the_same_rows(batch, rate, price, share, known):
    if (rate is None and price is None) or (share and price is not None and price < 0):
        return
    gate = sj.KondoGate(rate, price, negative_share=share)
    advantages, log_probs, mask = batch
    kept, _ = Numbers(log_probs, at_hand=known).decided(gate, advantages, mask)
    assert torch.equal(kept, by_engine(gate, advantages, log_probs, mask, known).keep)
    assert torch.equal(kept, sj.select(gate, advantages, log_probs, mask).decision.keep)


def test_the_case_in_which_they_once_differed():
    advantages, log_probs = torch.tensor([1.0, 1.0, -1.0, -1.0]), -torch.tensor([[0.0], [1.0], [1.0], [1.0]])
    kept, _ = Numbers(log_probs, at_hand=True).decided(sj.KondoGate(0.5), advantages, torch.ones(4, 1))
    assert kept.tolist() == [True, True, False, False]


def test_draws_are_the_same_on_every_process():
    advantages, log_probs = torch.ones(40), -torch.ones(40, 1)
    kept = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        gate = sj.SoftGate(temperature=1.0, price=1.0)
        kept.append(Numbers(log_probs, at_hand=True).decided(gate, advantages, torch.ones(40, 1))[0])
    assert torch.equal(*kept)
    assert 0 < kept[0].sum() < 40


class Seen:
    """Keeps its last decision."""

    weighted = True

    def __init__(self, *args, **options):
        self.gate = sj.UnbiasedGate(*args, **options)

    def __call__(self, score, cost=None):
        self.last = self.gate(score, cost)
        return self.last


@settings(max_examples=50)
@given(batches(), st.sampled_from([0.1, 0.5, 3.0]), st.booleans())
def test_a_noise_budget_has_the_same_probabilities(batch, noise, known):
    advantages, log_probs, mask = batch
    log_probs = log_probs.clamp(max=-0.02)
    gates = [Seen(noise=noise) for _ in range(3)]
    _, columns = Numbers(log_probs, at_hand=True).decided(gates[0], advantages, mask)
    by_engine(gates[1], advantages, log_probs, mask, known)
    sj.select(gates[2], advantages, log_probs, mask)
    for other in gates[1:]:
        torch.testing.assert_close(gates[0].last.probability, other.last.probability)
    assert torch.equal(columns["gate_weight"], gates[0].last.weight)
