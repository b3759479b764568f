"""How far a gated gradient is from DG's: relative variance by size, and the hard gate's bias beside it.

    python benchmarks/unbiased_gate.py

On batches of MNIST, at points of a run by DG, every row's gradient g_i of the DG loss is computed; a gate that keeps
row i with weight w_i has the error ‖Σ (w_i − 1) g_i‖² / ‖Σ g_i‖², here averaged over draws and batches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparkjoy.gates import KondoGate, UnbiasedGate
from sparkjoy.losses import delightful
from sparkjoy.scores import delight, update_size
from sparkjoy_lab.tasks.mnist import MnistConfig, MnistTask
from sparkjoy_lab.training.loop import Training
from sparkjoy_lab.training.settings import Settings

STEPS = (100, 500, 2000)
BATCHES, DRAWS = 10, 100


def sizes(training: Training, batch: dict[str, Tensor], advantages: Tensor, log_probs: Tensor) -> dict[str, Tensor]:
    """Signed sizes (B,), each nearer to the length of a row's gradient than the one before."""
    layers, inputs = training.policy.layers, batch["inputs"]
    hidden = layers[1](layers[0](inputs).relu()).relu()
    probabilities = layers[2](hidden).softmax(dim=1)
    residual = torch.nn.functional.one_hot(batch["actions"], 10) - probabilities
    weight = torch.sigmoid(delight(advantages, log_probs)) * advantages
    return {
        "|sigma U|": weight,
        "|sigma U| (1 - pi)": update_size(advantages, log_probs),
        "|sigma U| |e - pi|": weight * residual.norm(dim=1),
        "|sigma U| |e - pi| |h|": weight * residual.norm(dim=1) * (1 + hidden.square().sum(dim=1)).sqrt(),
    }


def row_gradients(training: Training, batch: dict[str, Tensor], advantages: Tensor) -> Tensor:
    """(B, P), of each row's DG term."""
    terms = delightful()(training.policy.log_probs(batch), advantages, None, None)
    parameters = list(training.policy.parameters())
    rows = [torch.autograd.grad(term, parameters, retain_graph=True) for term in terms]
    return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])


def main() -> None:
    torch.set_num_threads(1)
    task = MnistTask(MnistConfig())
    training = Training(task, Settings(method="dg"))
    generator = torch.Generator().manual_seed(1)
    for steps in STEPS:
        while training.steps_done < steps:
            training.step()
        errors: dict[tuple[str, float], list[float]] = {}
        for _ in range(BATCHES):
            rollout = task.rollout(training.policy, generator, graph=False)
            gradients = row_gradients(training, rollout.batch, rollout.advantages)
            products = (gradients @ gradients.T).double()
            with torch.no_grad():
                found = sizes(training, rollout.batch, rollout.advantages, rollout.log_probs)
            found["its true length"] = gradients.norm(dim=1) * rollout.advantages.sign()
            for rate in (0.03, 0.1):
                hard = KondoGate(rate=rate)(delight(rollout.advantages, rollout.log_probs)).keep.double()
                errors.setdefault(("hard gate", rate), []).append(_error(hard, products))
                for name, size in found.items():
                    gate = UnbiasedGate(rate=rate, generator=generator)
                    drawn = [_error(gate(size).weight.double(), products) for _ in range(DRAWS)]
                    errors.setdefault((name, rate), []).append(sum(drawn) / DRAWS)
        for (name, rate), values in errors.items():
            print(f"step {steps}, rate {100 * rate:g}%: {name}: {sum(values) / len(values):.2f}")


def _error(weight: Tensor, products: Tensor) -> float:
    return float((weight - 1) @ products @ (weight - 1) / products.sum())


if __name__ == "__main__":
    main()
