"""One of the processes of test_distributed.py: runs every case, and writes what came out as JSON lines."""

import copy
import json
import os
import sys
import warnings

import torch
import torch.distributed as dist
from engine_cases import ROWS, make_case
from launching import leave
from reference import masked_gradient
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import sparkjoy as sj
from sparkjoy.scores import advantage_size

warnings.simplefilter("error")
# A Linear on (n, T, D) returns a view; nothing here changes it in place.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")


class Policy(nn.Module):
    """Two layers, whose forward gives the log-probs of the actions taken."""

    def __init__(self, width=4, actions=6):
        super().__init__()
        self.first = nn.Linear(width, 8, dtype=torch.float64)
        self.second = nn.Linear(8, actions, dtype=torch.float64)

    def forward(self, rows):
        every = self.second(self.first(rows["state"]).tanh()).log_softmax(-1)
        return every.gather(-1, rows["action"].unsqueeze(-1)).sum(-1)


def other():
    """Another policy, which drafts."""
    torch.manual_seed(5)
    return Policy()


def wrap(policy, kind, **options):
    if kind == "fsdp":
        for layer in (policy.first, policy.second, policy):
            fully_shard(layer)
        return policy
    return DistributedDataParallel(policy, **options)


def gradients(module):
    found = []
    for parameter in module.parameters():
        gradient = parameter.grad
        found.append(gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient)
    return found


def split_rows(world, even):
    if even:
        return [len(part) for part in torch.arange(ROWS).tensor_split(world)]
    return {1: [13], 2: [10, 3], 4: [6, 1, 4, 2]}[world]


RATE = {"gate": lambda generator: sj.KondoGate(rate=0.3)}
PRICE = {"gate": lambda generator: sj.KondoGate(price=0.0)}
SOFT = {"gate": lambda generator: sj.SoftGate(1.0, price=0.0, generator=generator)}
CASES = {
    "everywhere": {**RATE, "micro_batch_size": None},
    "micro-batches": {**RATE, "micro_batch_size": 1},
    "on one rank only": {**PRICE, "advantages": "first"},
    "on one rank only, micro-batches": {**PRICE, "advantages": "first", "micro_batch_size": 1},
    "on the last rank only": {**PRICE, "advantages": "last", "micro_batch_size": 2},
    "nowhere": {**PRICE, "advantages": "bad"},
    "soft": SOFT,
    "dense": {"gate": lambda generator: None},
    "dense, micro-batches": {"gate": lambda generator: None, "micro_batch_size": 2},
    "rate 0.9": {"gate": lambda generator: sj.KondoGate(rate=0.9)},
    "known log-probs": {**RATE, "known": True},
    "ragged": {**RATE, "shape": "ragged tokens"},
    "ragged, kept": {**RATE, "shape": "ragged tokens", "normalizer": "kept", "micro_batch_size": 2},
    "ragged, an advantage each": {**RATE, "shape": "ragged tokens, an advantage each", "normalizer": "samples"},
    "tokens": {**RATE, "shape": "tokens", "normalizer": 7.5},
    "dg": {**RATE, "loss": sj.delightful()},
    "noise": {"gate": lambda generator: sj.UnbiasedGate(noise=0.3, generator=generator), "loss": sj.delightful()},
    "noise, known": {
        "gate": lambda generator: sj.UnbiasedGate(noise=0.3, generator=generator),
        "known": True,
        "shape": "ragged tokens",
    },
    "clipped": {**RATE, "loss": sj.clipped(0.2), "known": True, "shape": "ragged tokens"},
    "a draft": {**RATE, "draft": lambda policy: sj.Draft(other(), verify=1.5)},
    "a draft, micro-batches": {**RATE, "draft": lambda policy: sj.Draft(other(), verify=2), "micro_batch_size": 2},
    "a draft that decides": {**RATE, "draft": lambda policy: sj.Draft(other()), "shape": "ragged tokens"},
    "a draft that runs the policy": {
        **RATE,
        "draft": lambda policy: sj.Draft(policy, verify=1.5),
        "micro_batch_size": 2,
    },
}


def one_step(kind, even, case):
    shape = case.get("shape", "rows")
    _, batch, advantages, mask = make_case(shape)
    world, rank = dist.get_world_size(), dist.get_rank()
    sizes = split_rows(world, even)
    starts = [sum(sizes[:r]) for r in range(world)]
    where = case.get("advantages")
    if where is not None:
        advantages = -advantages.abs()
        good = {"first": slice(0, sizes[0]), "last": slice(starts[-1], ROWS), "bad": slice(0, 0)}[where]
        advantages[good] *= -1
    torch.manual_seed(0)
    plain = Policy()
    behavior = (plain(batch).detach() - 0.05) if case.get("known") else None
    own = slice(starts[rank], starts[rank] + sizes[rank])

    def local(tensor):
        return None if tensor is None else tensor[own]

    module = wrap(copy.deepcopy(plain), kind)
    options = {name: case[name] for name in ("loss", "normalizer", "micro_batch_size") if name in case}
    drafts = [case["draft"](policy) if "draft" in case else None for policy in (module, plain)]
    generator = torch.Generator().manual_seed(rank)
    passes = [0, 0]
    counted = module.module if kind == "ddp" else module
    counted.register_forward_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))

    def backward(loss):
        passes[1] += 1
        loss.backward()

    step = sj.GatedBackward(case["gate"](generator), module=module, draft=drafts[0], backward=backward, **options)
    report = step(
        module, {key: local(value) for key, value in batch.items()}, local(advantages),
        log_probs=local(behavior), mask=local(mask),
    )  # fmt: skip
    untouched = all(gradient is None for gradient in gradients(module))
    generator = torch.Generator().manual_seed(0)
    alone = sj.GatedBackward(case["gate"](generator), module="local", draft=drafts[1], **options)
    reference = alone(plain, batch, advantages, log_probs=behavior, mask=mask)
    error = None
    if not untouched:
        keep = report.decision.keep
        tokens = {"rows": 1}.get(shape, 5)
        valid = torch.ones(ROWS, tokens) if mask is None else mask
        divisors = {"batch": valid.sum(), "samples": ROWS, "kept": valid[keep].sum()}
        normalizer = case.get("normalizer", "batch")
        loss = case.get("loss", sj.reinforce)
        expected = masked_gradient(
            plain,
            lambda p, a, b, m: loss(p, a, p.detach() if behavior is None else behavior, m),
            batch, advantages, mask, keep, report.decision.weight,
            divisors.get(normalizer, normalizer), list(plain.parameters()),
        )  # fmt: skip
        error = max(float((g - e).norm() / e.norm()) for g, e in zip(gradients(module), expected, strict=True))
    return {
        "kind": kind,
        "even": even,
        "error": error,
        "untouched": untouched,
        "same_decision": torch.equal(report.decision.keep, reference.decision.keep),
        "price": [None if d.price is None else float(d.price) for d in (report.decision, reference.decision)],
        "kept": (report.kept, reference.kept),
        "total": report.total,
        "loss": (float(report.loss), float(reference.loss)),
        "noise": (report.noise, reference.noise),
        "state": (step.state_dict()["gate"], alone.state_dict()["gate"]),
        "backward_rows": report.backward_rows,
        "screened_rows": report.screened_rows,
        "micro_batch_size": case.get("micro_batch_size"),
        "forwards": passes[0],
        "backwards": passes[1],
        "kept_by_rank": [int(report.decision.keep[s : s + n].sum()) for s, n in zip(starts, sizes, strict=True)],
    }


def tell(name, **found):
    print("RESULT", json.dumps({"case": name, **found}), flush=True)


def equivalence(cases=CASES, divisions=(True, False)):
    for name in cases:
        for kind in ("ddp", "fsdp"):
            for even in divisions:
                tell(name, **one_step(kind, even, CASES[name]))


def quick_equivalence():
    cases = (
        "everywhere", "on one rank only", "on one rank only, micro-batches", "nowhere", "soft", "ragged, kept",
        "noise", "noise, known",
        "a draft", "a draft that decides", "a draft that runs the policy",
    )  # fmt: skip
    equivalence(cases, divisions=(False,))


def unbiased(draws=100):
    """The mean gradient over a noise budget's draws, compared with the dense one, in standard errors."""
    _, batch, advantages, mask = make_case("ragged tokens")
    world, rank = dist.get_world_size(), dist.get_rank()
    sizes = split_rows(world, even=False)
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    torch.manual_seed(0)
    plain = Policy()
    exact = plain(batch).detach()
    stale = (exact + 0.5 * torch.randn(exact.shape, dtype=exact.dtype)).clamp(max=-0.01)
    sj.GatedBackward(None, module="local")(plain, batch, advantages, mask=mask)
    dense = torch.cat([gradient.flatten() for gradient in gradients(plain)])
    local = {key: value[own] for key, value in batch.items()}
    ways = {
        "exact": ({}, {}),
        "stale": ({}, {"log_probs": stale[own]}),
        "sizes of advantages": ({"score": advantage_size}, {}),
    }
    for way, (options, given) in ways.items():
        module = DistributedDataParallel(copy.deepcopy(plain))
        gate = sj.UnbiasedGate(noise=0.3, generator=torch.Generator().manual_seed(rank))
        step = sj.GatedBackward(gate, module=module, micro_batch_size=3, **options)
        found, kept = [], []
        for _ in range(draws):
            module.zero_grad()
            kept.append(step(module, local, advantages[own], mask=mask[own], **given).kept)
            found.append(torch.cat([gradient.flatten() for gradient in gradients(module)]))
        found = torch.stack(found)
        error = found.std(dim=0) / draws**0.5
        difference = (found.mean(dim=0) - dense).abs()
        drawn = error > 1e-9 * dense.abs().max()
        tell(
            way,
            kept=sum(kept) / draws,
            errors=float((difference / error)[drawn].max()),
            certain=float(difference[~drawn].max()) if bool((~drawn).any()) else 0.0,
            drawn=int(drawn.sum()),
            relative=float(error.norm() / dense.norm()),
        )


def main(scenarios):
    """Join the others and run the scenarios named on the command line."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{os.environ['STORE']}",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )
    try:
        for name in sys.argv[1:]:
            scenarios[name]()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(globals())
    leave()
