import math

import pytest
import torch

import sparkjoy as sj
from sparkjoy_lab import scores as compared


def test_delight_is_advantage_times_surprisal_and_has_no_graph():
    log_probs = torch.tensor([0.5, 0.25]).log().requires_grad_()
    advantages = torch.tensor([2.0, -1.0], requires_grad=True)
    result = sj.delight(advantages, log_probs)
    # 2 · ln 2 and −1 · ln 4
    torch.testing.assert_close(result, torch.tensor([2 * math.log(2), -math.log(4)]))
    assert not result.requires_grad


def test_one_advantage_a_row_multiplies_all_its_tokens():
    log_probs = -torch.ones(2, 3)
    torch.testing.assert_close(sj.delight(torch.tensor([1.0, -2.0]), log_probs), torch.tensor([[1.0] * 3, [-2.0] * 3]))


def test_sequence_delight_ignores_what_stands_under_the_mask():
    log_probs = torch.tensor([[-1.0, math.nan, 5.0], [-1.0, -2.0, -math.inf]])
    advantages = torch.tensor([[1.0, math.inf, 1.0], [1.0, 0.5, math.nan]])
    mask = torch.tensor([[1, 0, 0], [1, 1, 0]])
    torch.testing.assert_close(sj.sequence_delight(advantages, log_probs, mask), torch.tensor([1.0, 2.0]))


def test_sequence_delight_without_a_mask_sums_all_tokens():
    log_probs = -torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert sj.sequence_delight(torch.tensor([2.0, -1.0]), log_probs).tolist() == [6.0, -7.0]
    assert sj.sequence_delight(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), log_probs).tolist() == [1.0, 4.0]


def test_sequence_delight_of_a_row_without_tokens_is_zero():
    assert sj.sequence_delight(torch.ones(1), torch.full((1, 2), math.nan), torch.zeros(1, 2)).item() == 0


@pytest.mark.parametrize("advantages", [torch.ones(3), torch.ones(2, 3), torch.ones(2, 4)])
def test_delight_refuses_shapes_that_do_not_go_together(advantages):
    with pytest.raises(ValueError, match="advantages has shape"):
        sj.delight(advantages, -torch.ones(2) if advantages.shape != (2, 4) else -torch.ones(2, 3))


def test_a_positive_log_prob_is_refused_but_rounding_is_not():
    assert sj.surprisal(torch.tensor([1e-7])).item() == 0
    with pytest.raises(ValueError, match="at most 0"):
        sj.surprisal(torch.tensor([0.5]))


def test_sequence_delight_refuses_one_dimension_and_a_misshapen_mask():
    with pytest.raises(ValueError, match=r"expected \(B, T\)"):
        sj.sequence_delight(torch.ones(2), -torch.ones(2))
    with pytest.raises(ValueError, match="mask has shape"):
        sj.sequence_delight(torch.ones(2), -torch.ones(2, 3), torch.ones(2, 2))


def test_additive_score_weighs_advantage_and_surprisal():
    score = compared.additive_score(0.25)(torch.tensor([1.0]), torch.tensor([-2.0]))
    assert score.item() == pytest.approx(0.25 * 1 + 0.75 * 2)
    with pytest.raises(ValueError, match="alpha"):
        compared.additive_score(1.5)


def test_uniform_score_follows_its_generator():
    draws = [
        compared.uniform_score(torch.Generator().manual_seed(3))(torch.ones(5), torch.ones(5, 2)) for _ in range(2)
    ]
    assert torch.equal(*draws)
    assert draws[0].shape == (5,)
