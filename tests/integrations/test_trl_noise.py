"""`gate_noise`: the expected gradient is TRL's own, for every loss and whatever the sizes are."""

import json

import pytest
import torch
import trl_task
from trl import GRPOConfig, GRPOTrainer
from trl_cases import Drawing, drawn, far_from, trained, trainer

import sparkjoy as sj
from sparkjoy.integrations.sizes import LEAST_DOUBT, RowSize
from sparkjoy.integrations.trl import KondoGRPOConfig, KondoGRPOTrainer
from sparkjoy.integrations.trl.packing import LOSS_NORMALIZERS

FAST = [("dapo", "exact"), ("grpo", "none"), ("bnpo", "stale")]
SIZES = ("exact", "stale", "none")
SLOW = [case for place, loss in enumerate(LOSS_NORMALIZERS) if (case := (loss, SIZES[place % 3])) not in FAST]


@pytest.mark.parametrize(("loss", "sizes"), FAST + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW])
def test_the_mean_gradient_is_trls(tmp_path, loss, sizes):
    draws, dense, made = drawn(tmp_path, 60, sizes, loss_type=loss)
    along, anywhere = far_from(draws, dense)
    assert along < 4
    assert anywhere < 4
    assert draws.std(dim=0).norm() > 0.2 * dense.norm()  # it is the mean that agrees, not the draws
    assert 0.2 < made.state.log_history[0]["gate/kept_rate"] < 0.8
    assert made.first["completion_mask"].sum(dim=1).unique().numel() > 3  # ragged


def test_without_the_weights_it_would_not_be(tmp_path):
    class Unweighted(Drawing):
        def _decide(self, gate, output):
            keep = super()._decide(gate, output)
            output["gate_weight"] = keep.float()
            return keep

    draws, dense, _ = drawn(tmp_path, 100, cls=Unweighted)
    assert far_from(draws, dense)[0] > 8


@pytest.mark.parametrize(
    "changes",
    [
        {"steps_per_generation": 2},
        {"importance_sampling_level": "sequence", "loss_type": "luspo"},
        {"loss_type": "vespo", "gate_dg": "sample", "gate_dg_temperature": 0.5},
        {"mask_truncated_completions": True},
        {"top_p": 0.9, "gate_log_probs": "exact"},
    ],
    ids=str,
)
@pytest.mark.slow
def test_so_it_is_with_other_options(tmp_path, changes):
    draws, dense, made = drawn(tmp_path, 100, **changes)
    assert max(far_from(draws, dense)) < 4
    assert made.state.log_history[0]["gate/kept_rate"] < 0.8


def alike(completions, **_):
    return [1.0] * len(completions)


@pytest.mark.parametrize(
    ("beside", "rewards"),
    [
        ({"beta": 0.5}, trl_task.copied),
        ({"beta": 0.5, "loss_type": "grpo", "steps_per_generation": 8}, alike),
        ({"entropy_coef": 0.3}, trl_task.copied),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_terms_beside_the_policys_are_weighted_too(tmp_path, beside, rewards):
    """The reference is the model without its adapter. Where no row has an advantage, these terms are all there is."""
    changes = {"arguments": {"reward_funcs": rewards}, "lora": True, "gate_noise": 1.0} | beside
    draws, dense, made = drawn(tmp_path, 60, **changes)
    assert dense.norm() > 1e-3
    assert max(far_from(draws, dense)) < 4
    assert made.state.log_history[0]["gate/kept_rate"] < 0.9


def spread(completions, **_):
    """Rewards of which no group is without spread."""
    return [float(index % 4) for index, _ in enumerate(completions)]


@pytest.mark.parametrize("loss", ["dapo", "bnpo"])
def test_noise_so_small_that_all_are_kept_is_trls_own_step_to_the_bit(tmp_path, loss):
    changes = {"max_steps": 3, "optim": "adamw_torch", "learning_rate": 1e-2, "max_grad_norm": 1.0, "loss_type": loss}
    theirs, _ = trained(tmp_path, cls=GRPOTrainer, config=GRPOConfig, arguments={"reward_funcs": spread}, **changes)
    ours, _ = trained(tmp_path, gate_noise=1e-12, arguments={"reward_funcs": spread}, **changes)
    for parameter, expected in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(parameter, expected)
    logs = [[entry["loss"] for entry in made.state.log_history if "loss" in entry] for made in (ours, theirs)]
    assert logs[0] == logs[1]
    entry = ours.state.log_history[0]
    assert (entry["gate/kept_rate"], entry["gate/micro_steps"], entry["gate/noise"]) == (1, 4, 0)


@pytest.mark.parametrize("updates", [{}, {"steps_per_generation": 8}, {"num_iterations": 2}], ids=str)
def test_a_stopped_run_goes_on_as_if_it_had_not(tmp_path, updates):
    """Stopped where a generation ends; of several steps on one, each leaves the gate what the checkpoint has."""
    changes = {"gate_noise": 0.5, "save_strategy": "steps", "save_steps": 2, "max_steps": 6, "top_p": 0.9} | updates
    whole, _ = trained(tmp_path / "whole", cls=Stale, **changes)
    saved = json.loads((tmp_path / "whole" / "checkpoint-2" / "gate_state.json").read_text())
    state = json.loads(saved["state"])
    fresh = sj.UnbiasedGate(noise=0.5).state_dict()
    assert all(state[name] != value for name, value in fresh.items())  # it remembers, and has learnt
    resumed, _ = trainer(tmp_path / "resumed", cls=Stale, **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for parameter, expected in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(parameter, expected)
    assert resumed._gate.state_dict() == whole._gate.state_dict()


class Stale(KondoGRPOTrainer):
    """Sizes by log-probs that are off by a lot."""

    def _log_probs_at_hand(self, output):
        off = torch.randn(output["completion_ids"].shape, generator=torch.Generator().manual_seed(0))
        return -3 * off.abs()


def test_it_logs_what_the_budget_did(tmp_path):
    made, _ = trained(tmp_path, gate_noise=0.4)
    log = made.state.log_history[0]
    assert log["gate/noise"] == pytest.approx(0.4, rel=0.05)
    assert 1 < log["gate/effective_size"] <= 16
    assert 0 < log["gate/kept_rate"] < 1
    assert log["gate/price"] > 0
    assert log["gate/screened_rate"] == 0
    assert "gate/delight_std" not in log


def test_sizes_by_exact_log_probs_where_they_are_asked_for(tmp_path):
    logs = {}
    for where in ("auto", "exact", "none"):
        made, _ = trained(tmp_path, gate_noise=0.4, gate_log_probs=where)
        logs[where] = made.state.log_history[0]
    assert [log["gate/screened_rate"] for log in logs.values()] == [0, 1, 0]
    assert logs["auto"]["gate/price"] == pytest.approx(logs["exact"]["gate/price"], rel=1e-4)
    assert logs["none"]["gate/price"] > 1.05 * logs["auto"]["gate/price"]  # each token counts as if it were unlikely


def test_a_row_costs_its_prompt_too(tmp_path):
    costs = []

    class Watching(KondoGRPOTrainer):
        def _decide(self, gate, output):
            def watched(score, cost):
                costs.append((cost, output["prompt_mask"].sum(dim=1) + output["completion_mask"].sum(dim=1)))
                return gate(score, cost)

            watched.weighted = True
            return super()._decide(watched, output)

    trained(tmp_path, cls=Watching, gate_noise=0.4)
    assert torch.equal(costs[0][0], costs[0][1].float())


def test_a_size_is_that_of_the_losses_own_term():
    log_probs = torch.tensor([[0.5, 0.75], [0.5, 0.5], [0.9, 0.5]]).log()
    mask = torch.tensor([[1, 1], [1, 0], [1, 1]])
    advantages = torch.tensor([2.0, -1.0, 0.0])
    plain, short = RowSize(by_length=False), RowSize(by_length=True)
    torch.testing.assert_close(plain(advantages, log_probs, mask), torch.tensor([1.25**0.5, -0.5, 0.0]))
    torch.testing.assert_close(short(advantages, log_probs, mask), torch.tensor([1.25**0.5 / 2, -0.5, 0.0]))
    torch.testing.assert_close(plain(advantages, None, mask), torch.tensor([8**0.5, -1.0, 0.0]))
    of_tokens = advantages[:, None] * torch.tensor([1.0, 3.0])
    torch.testing.assert_close(plain(of_tokens, log_probs, mask), torch.tensor([3.25**0.5, -0.5, 0.0]))
    ratio = torch.tensor([[0.0], [2.0], [1.0]])
    torch.testing.assert_close(plain(advantages, log_probs, mask, ratio), torch.tensor([0.0, -1.0, 0.0]))


def test_only_a_row_without_a_term_has_a_size_of_zero():
    certain, mask = torch.zeros(2, 3), torch.tensor([[1, 1, 1], [0, 0, 0]])
    sizes = RowSize(by_length=False)(torch.ones(2), certain, mask)
    torch.testing.assert_close(sizes, torch.tensor([3**0.5 * LEAST_DOUBT, 0.0]))
    certain = certain.masked_fill(mask == 0, float("nan"))
    for terms in (RowSize(False, beta=0.1), RowSize(False, entropy_coef=0.1)):
        sizes = terms(torch.zeros(2), certain, mask, reference=certain)
        assert sizes[0] > 0
        assert sizes[1] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate_noise": 0.3, "gate_rate": 0.1}, "give it alone"),
        ({"gate_noise": 0.3, "gate_price": 0.0}, "give it alone"),
        ({"gate_noise": 0.3, "gate_negative_share": 0.2}, "leave gate_negative_share"),
        ({"gate_noise": 0.3, "gate_score": "uniform"}, "leave gate_score as it is"),
        ({"gate_rate": 0.3, "gate_log_probs": "none"}, "goes with gate_noise"),
        ({"gate_noise": -1.0}, "noise is -1"),
        ({"gate_noise": 0.3, "top_entropy_quantile": 0.2}, "Set top_entropy_quantile=1"),
        ({"gate_noise": 0.3, "use_adaptive_entropy": True}, "use_adaptive_entropy=False"),
    ],
)
def test_what_does_not_go_with_it_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        KondoGRPOConfig(**trl_task.options(output_dir=str(tmp_path), **options))
