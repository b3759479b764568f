"""REINFORCE on CartPole, with the three lines that make its backward passes cost what the kept steps cost.

pip install -e . gymnasium
python examples/01_your_own_loop.py                 # a noise budget of 0.3, which finds its own rate
python examples/01_your_own_loop.py --noise 0       # the plain loop, to compare with
"""

import argparse

import gymnasium
import torch
from torch import nn

import sparkjoy as sj

parser = argparse.ArgumentParser()
parser.add_argument("--noise", type=float, default=0.3, help="what skipping may add to the gradient's own noise")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--iterations", type=int, default=40)
parser.add_argument("--episodes", type=int, default=16, help="played in each iteration")
options = parser.parse_args()

torch.manual_seed(options.seed)
policy = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 2))
optimizer = torch.optim.Adam(policy.parameters(), 1e-2)
environments = gymnasium.make_vec("CartPole-v1", num_envs=options.episodes, vectorization_mode="sync")


def play(seed):
    """One episode in each environment: states (T, E, 4), actions and their log-probs (T, E), and which steps count."""
    state, _ = environments.reset(seed=seed)
    alive = torch.ones(options.episodes, dtype=torch.bool)
    steps = []
    while alive.any():
        states = torch.as_tensor(state)
        with torch.no_grad():
            every = policy(states).log_softmax(1)
        actions = torch.multinomial(every.exp(), 1)
        steps.append((states, actions.squeeze(1), every.gather(1, actions).squeeze(1), alive))
        state, _, failed, out_of_time, _ = environments.step(actions.squeeze(1).numpy())
        alive = alive & ~torch.as_tensor(failed | out_of_time)
    return (torch.stack(column) for column in zip(*steps, strict=True))


def log_prob_fn(rows):
    return policy(rows["states"]).log_softmax(1).gather(1, rows["actions"][:, None]).squeeze(1)


step = sj.GatedBackward(sj.UnbiasedGate(noise=options.noise) if options.noise else None)  # 1, once
kept = total = 0
for iteration in range(1, options.iterations + 1):
    states, actions, log_probs, alive = play(seed=1000 * options.seed + iteration)
    to_go = alive.float().flip(0).cumsum(0).flip(0)  # CartPole pays 1 for every step
    mean = to_go.sum(1) / alive.sum(1)  # of the episodes that got this far
    advantages = (to_go - mean[:, None])[alive]
    advantages = advantages / advantages.std().clamp(min=1)
    rows = {"states": states[alive], "actions": actions[alive]}

    report = step(log_prob_fn, rows, advantages, log_probs=log_probs[alive])  # 2: instead of loss.backward()
    if report.kept:  # 3: and the optimizer as ever
        optimizer.step()
        optimizer.zero_grad()

    kept, total = kept + report.backward_rows, total + report.total
    if iteration % 10 == 0:
        print(f"iteration {iteration}: return {alive.sum(0).float().mean():.0f}, {kept} of {total} rows went backward")
