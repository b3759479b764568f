import mnist_step
import pytest
import torch

from sparkjoy_lab.tasks.mnist import MnistConfig, MnistTask


@pytest.mark.timing
def test_a_gated_mnist_step_costs_about_what_the_strongest_dense_loop_does():
    torch.set_num_threads(1)
    result = mnist_step.measure(MnistTask(MnistConfig()), rounds=15, steps_a_round=30)
    dense = result["dense, engine, its own forward"]["ratio"]
    for arm in ("kondo 10%", "kondo 3%", "kondo 1%"):
        # Measured: 1.0 to 1.1 of the strongest loop and 0.7 to 0.8 of the engine's own dense pass; the rest is margin.
        assert result[arm]["ratio"] < 1.35
        assert result[arm]["ratio"] < dense
