"""Run as two processes: gated engines beside verl's own, for the test to compare."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import verl_cases as cases
from launching import leave
from verl_cases import actor_loss, dense, distance, engine, gradient, mini_batch, train, weights, with_advantages

torch.set_num_threads(1)
HALF = [1.0, 0.0, -1.0, 0.0, 0.5, 0.0, 2.0, 0.0]
KL = {"use_kl_loss": True, "kl_loss_coef": 0.1}
LOSSES = {
    "token-mean": {},
    "kl": KL,
    "sequences": {"loss_agg_mode": "seq-mean-token-mean"},
    "gspo": {"policy_loss": {"loss_mode": "gspo"}, "loss_agg_mode": "seq-mean-token-mean"},
}


def equal(folder, strategy, rank):
    """Half of the rows teach nothing: half of the passes, and the gradient of the engine that runs them all."""
    found = {}
    hard, plain = engine(folder, strategy, gate_noise=0), dense(folder, strategy=strategy)
    for name, options in LOSSES.items():
        for dynamic in (0, 26):
            data = mini_batch(rank=rank, advantages=HALF, dynamic=dynamic)
            reference, _, of_all = gradient(plain, data, actor_loss(**options))
            kept, metrics, passes = gradient(hard, data, actor_loss(**options))
            found[f"{name}, {'dynamic' if dynamic else 'fixed'}"] = {
                "error": distance(kept, reference), "passes": passes, "of": of_all, "rate": metrics["gate/kept_rate"],
                "micro_batches": metrics["gate/micro_batches"],
            }  # fmt: skip
    return found


def chosen(folder, strategy, rank):
    """A gate that skips what teaches: the gradient is that of all rows with the skipped advantages at 0."""
    found = {}
    plain = dense(folder, strategy=strategy)
    for name, gate in {"rate": {"gate_rate": 0.3}, "price": {"gate_price": 0}}.items():
        hard, data = engine(folder, strategy, **gate), mini_batch(rank=rank, seed=3)
        kept, metrics, passes = gradient(hard, data, actor_loss())
        ran = hard.ran
        zeroed = with_advantages(data, lambda row, values, ran=ran: values if row in ran else values * 0)
        reference, _, _ = gradient(plain, zeroed, actor_loss())
        found[name] = {
            "error": distance(kept, reference),
            "passes": passes,
            "kept": len(ran),
            "rate": metrics["gate/kept_rate"],
        }
    return found


def one_sided(folder, strategy, rank):
    """One rank has nothing to teach, then neither has: no process waits for the other."""
    found = {}
    hard, plain = engine(folder, strategy, gate_noise=0), dense(folder, strategy=strategy)
    for dynamic, micro in ((0, 1), (0, 2), (26, 1), (13, 1)):  # 13: the longest row, so that tokens tell too few passes
        own = HALF if rank == 0 else [0.0] * 8
        data = mini_batch(rank=rank, seed=1, advantages=own, dynamic=dynamic, micro=micro)
        reference, _, _ = gradient(plain, data, actor_loss())
        kept, metrics, passes = gradient(hard, data, actor_loss())
        found[f"{dynamic}, {micro}"] = {
            "error": distance(kept, reference), "passes": passes, "dummies": metrics["gate/dummy_rows"],
        }  # fmt: skip
    data = mini_batch(rank=rank, advantages=[0.0] * 8)
    nothing, metrics, passes = gradient(hard, data, actor_loss())
    found["none"] = {"error": float(nothing.norm()), "passes": passes, "rate": metrics["gate/kept_rate"]}
    return found


def budget(folder, strategy, rank, draws=200):
    """The mean gradient of a noise budget's draws is the dense one, of policy loss, KL and entropy together."""
    options = KL | {"entropy_coeff": 0.05}
    soft, plain = engine(folder, strategy, gate_noise=1.0), dense(folder, strategy=strategy)
    data = mini_batch(rank=rank, seed=5, micro=8, calculate_entropy=True)
    reference, _, _ = gradient(plain, data, actor_loss(**options), cases.own)
    rates, noises = [], []
    total, squares = torch.zeros_like(reference), torch.zeros(2, dtype=torch.float64)
    for _ in range(draws):
        kept, metrics, _ = gradient(soft, data, actor_loss(**options), cases.own)
        total, squares[0] = total + kept, squares[0] + (kept - reference).square().sum()
        rates += metrics["gate/kept_rate"]
        noises += metrics["gate/noise"]
    squares[1] = (total / draws - reference).square().sum()
    dist.all_reduce(squares)
    return {
        "off": float((squares[1] / (squares[0] / draws**2)).sqrt()),
        "rate": sum(rates) / draws,
        "noise": sum(noises) / draws,
    }


def refused(folder, strategy, rank):
    """What goes wrong on one rank is raised on both, in the same words."""
    hard = engine(folder, strategy, gate_noise=0.3)
    broken = mini_batch(rank=rank)
    if rank == 1:
        broken["old_log_probs"].values()[3] = float("nan")
    found = {"nan": said(lambda: gradient(hard, broken, actor_loss()))}
    dense_after = gradient(hard, mini_batch(rank=rank), actor_loss())[2]
    return found | {"passes after": dense_after}


def said(call):
    try:
        call()
    except ValueError as error:
        return str(error)
    return "nothing"


def resumed(folder, strategy, rank):
    """Two steps after a checkpoint are those of the run that was never broken."""
    path = str(Path(folder) / f"checkpoint-{strategy}")
    unbroken = engine(folder, strategy, gate_noise=0.5)
    step = lambda trained, number: train(trained, mini_batch(rank=rank, seed=number), actor_loss())  # noqa: E731
    for number in range(2):
        step(unbroken, number)
    unbroken.save_checkpoint(path)
    again = engine(folder, strategy, gate_noise=0.5)
    again.load_checkpoint(path, del_local_after_load=False)
    anew = engine(folder, strategy, gate_noise=0.5)
    super(type(anew), anew).load_checkpoint(path, del_local_after_load=False)
    rates = {name: [step(trained, 2 + n)[0]["gate/kept_rate"] for n in range(3)] for name, trained in
             (("unbroken", unbroken), ("again", again), ("anew", anew))}  # fmt: skip
    return {
        "again": distance(weights(again), weights(unbroken)),
        "anew": distance(weights(anew), weights(unbroken)),
        "rates": rates,
        "file": sorted(file.name for file in Path(path).iterdir() if file.name.startswith("gate")),
    }


def weighed(folder, strategy, rank):
    """One draw of a budget: the sum of the gradients of the kept rows, each times its weight; KL and entropy too."""
    options, more = KL | {"entropy_coeff": 0.05}, {"calculate_entropy": True}
    soft, plain = engine(folder, strategy, gate_noise=1.0), dense(folder, strategy=strategy)
    data = mini_batch(rank=rank, seed=7, micro=2, **more)
    kept, _, _ = gradient(soft, data, actor_loss(**options))
    weight = torch.zeros(2, 8)
    weight[rank, soft.ran] = soft.weights
    dist.all_reduce(weight)
    expected = torch.zeros_like(kept)
    for owner, row in weight.nonzero().tolist():
        alone, mask = data.clone(), []
        for number, values in enumerate(data["response_mask"].unbind()):
            mask.append(values * ((owner, number) == (rank, row)))
        alone["response_mask"] = torch.nested.as_nested_tensor(mask, layout=torch.jagged)
        expected += weight[owner, row].item() * gradient(plain, alone, actor_loss(**options))[0]
    return {"error": distance(kept, expected), "weights": weight.flatten().tolist()}


def learning(folder, strategy, rank, steps=10, seeds=3):
    """Ten steps that make token 7 more likely, with verl's own engine and gated ones: each seed's gain, and passes."""
    found = {}
    for name, gate in {"dense": {}, "noise": {"gate_noise": 0.3}, "price": {"gate_price": 0}}.items():
        gains, passes = torch.zeros(seeds), 0
        for seed in range(seeds):
            trained = engine(folder, strategy, lr=1e-2, **gate) if gate else dense(folder, strategy=strategy, lr=1e-2)
            torch.manual_seed(2 * seed + rank)
            rewards = []
            for _ in range(steps):
                data, reward = sampled(trained, rank)
                rewards.append(reward)
                passes += train(trained, data, actor_loss())[1]
            gains[seed] = (sum(rewards[-2:]) - sum(rewards[:2])) / 2
        dist.all_reduce(gains)
        found[name] = {"gains": (gains / 2).tolist(), "passes": passes}
    return found


def sampled(trained, rank, groups=8, answers=4, length=6):
    """A mini-batch of the policy's own answers, of group advantages; and the mean reward, the share of tokens 7."""
    prompts = torch.randint(cases.VOCABULARY, (groups, 2)).repeat_interleave(answers, 0)
    ids, log_probs = prompts, []
    with torch.no_grad(), trained.eval_mode():
        for _ in range(length):
            logits = trained.module(input_ids=ids).logits[:, -1].log_softmax(-1)
            token = logits.exp().multinomial(1)
            ids, log_probs = torch.cat([ids, token], dim=1), [*log_probs, logits.gather(1, token)]
    reward = (ids[:, 2:] == 7).float().mean(dim=1)
    advantages = (reward - reward.view(groups, answers).mean(dim=1).repeat_interleave(answers)).tolist()
    data = mini_batch(rows=len(ids), rank=rank, advantages=advantages, micro=4, all_rows=2 * len(ids))
    fields = {"prompts": prompts, "responses": ids[:, 2:], "input_ids": ids, "old_log_probs": torch.cat(log_probs, 1)}
    fields["position_ids"] = torch.arange(ids.shape[1]).expand(ids.shape)
    fields["response_mask"] = fields["loss_mask"] = torch.ones_like(ids[:, 2:])
    fields["advantages"] = torch.tensor(advantages).unsqueeze(1).expand(-1, length)
    for name, values in fields.items():
        data[name] = torch.nested.as_nested_tensor([row.clone() for row in values], layout=torch.jagged)
    del data["ref_log_prob"]
    return data, float(reward.mean())


CASES = {case.__name__: case for case in (equal, chosen, one_sided, weighed, budget, refused, resumed, learning)}


def remember_rows():
    """Have the gated engine say which rows of this rank it ran with a weight."""
    from sparkjoy.integrations.verl import GatedFSDPEngine

    decide = GatedFSDPEngine._decide

    def remembering(self, *arguments):
        rows, figures = decide(self, *arguments)
        real = rows["gate_weight"] > 0
        self.ran, self.weights = rows["row"][real].tolist(), rows["gate_weight"][real]
        return rows, figures

    GatedFSDPEngine._decide = remembering


def main(folder, strategy, *names):
    rank = int(os.environ["RANK"])
    dist.init_process_group(
        "gloo", init_method=f"file://{os.environ['STORE']}", rank=rank, world_size=int(os.environ["WORLD_SIZE"])
    )
    if rank == 0:
        cases.save_model(folder)
    dist.barrier()
    remember_rows()
    found = {name: CASES[name](folder, strategy, rank) for name in names or CASES}
    Path(folder, f"{strategy}-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave()
