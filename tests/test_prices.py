import pytest
import torch

import sparkjoy as sj


def test_batch_quantile_is_torchs():
    score = torch.randn(101, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert sj.BatchQuantile(0.1)(score).item() == pytest.approx(torch.quantile(score, 0.9).item())
    assert int((score > sj.BatchQuantile(0.1)(score)).sum()) == 10


def test_batch_quantile_refuses_a_rate_outside_its_range():
    with pytest.raises(ValueError, match="rate is 0"):
        sj.BatchQuantile(0)


def test_prices_are_prices():
    assert isinstance(sj.FixedPrice(1.0), sj.Price)
    assert isinstance(sj.BatchQuantile(0.5), sj.Price)
