"""A process of test_distributed_hazards.py: set-ups in which processes might wait for one another for good."""

import copy

import torch
import torch.distributed as dist
from distributed_worker import Policy, gradients, main, tell, wrap
from engine_cases import ROWS, make_case
from launching import leave
from tensordict import TensorDict
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import sparkjoy as sj

GATE = sj.KondoGate(price=0.0)


def local_case(shape="rows"):
    """A policy, and of 13 rows this rank's."""
    _, batch, advantages, mask = make_case(shape)
    rank = dist.get_rank()
    own = slice(0, 9) if rank == 0 else slice(9, ROWS)
    torch.manual_seed(0)
    return Policy(), {key: value[own] for key, value in batch.items()}, advantages[own], mask


def refusal(work, *arguments, **options):
    try:
        work(*arguments, **options)
    except ValueError as error:
        return str(error)
    return None


def relative_error(module, plain):
    pairs = zip(gradients(module), gradients(plain), strict=True)
    return max(float((found - expected).norm() / expected.norm()) for found, expected in pairs)


def accumulation_that_ends_without_survivors():
    """The last call keeps nothing, but the gradients of the one before are still each rank's own."""
    policy, batch, advantages, _ = local_case()
    module = DistributedDataParallel(copy.deepcopy(policy))
    step = sj.GatedBackward(GATE, module=module)
    with module.no_sync():
        first = step(module, batch, advantages)
    last = step(module, batch, -advantages.abs())
    again = step(module, batch, -advantages.abs())
    _, everything, all_advantages, _ = make_case("rows")
    sj.gated_backward(policy, everything, all_advantages, GATE, module="local")
    tell(
        "accumulation",
        error=relative_error(module, policy),
        kept=[first.kept, last.kept],
        rows=[last.backward_rows, again.backward_rows],
    )


def errors_of_one_rank():
    policy, batch, advantages, _ = local_case()
    for kind in ("ddp", "fsdp"):
        module = wrap(copy.deepcopy(policy), kind)
        step = sj.GatedBackward(GATE, module=module)
        dense = sj.GatedBackward(None, module=module, micro_batch_size=3)
        bad = advantages.clone()
        broken = {**batch, "state": batch["state"].clone()}
        if dist.get_rank() == 1:
            bad[0] = torch.nan
            broken["state"][0] = torch.inf
        given = policy(batch).detach() if dist.get_rank() == 0 else None
        said = [
            refusal(step, module, batch, bad),
            refusal(sj.GatedBackward(sj.KondoGate(rate=0.2), module=module), module, broken, advantages),
            refusal(step, module, batch, advantages, log_probs=given),
        ]
        untouched = all(gradient is None for gradient in gradients(module))
        said.append(refusal(dense, module, broken, advantages))
        module.zero_grad()
        report = step(module, batch, advantages)  # all ranks are still in step
        tell("errors", kind=kind, said=said, untouched=untouched, kept=report.kept)


def modules_that_do_not_fit():
    policy, batch, advantages, _ = local_case()
    module = DistributedDataParallel(policy)
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard"))
    hybrid = fully_shard(Policy(), mesh=mesh)
    tell(
        "modules",
        hybrid=refusal(sj.GatedBackward, GATE, module=hybrid),
        forgotten=refusal(sj.GatedBackward(GATE), policy, batch, advantages),
        plain=refusal(sj.GatedBackward, GATE, module=policy),
        inside=refusal(sj.GatedBackward(GATE, module=module), module.module, batch, advantages),
        untouched=all(gradient is None for gradient in gradients(module)),
        alone=sj.GatedBackward(GATE, module="local")(policy, batch, advantages).total,
    )


class Uneven(Policy):
    """One parameter is never used."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(2, 2, dtype=torch.float64)


class Normed(Policy):
    """With buffers, which DistributedDataParallel broadcasts before every forward pass of its own."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4, dtype=torch.float64).eval()

    def forward(self, rows):
        return super().forward({**rows, "state": self.norm(rows["state"])})


WRAPPERS = {
    "find_unused_parameters": (Uneven, lambda policy: DistributedDataParallel(policy, find_unused_parameters=True)),
    "static_graph": (Policy, lambda policy: DistributedDataParallel(policy, static_graph=True)),
    "bucket views": (Policy, lambda policy: DistributedDataParallel(policy, gradient_as_bucket_view=True)),
    "buffers": (Normed, DistributedDataParallel),
    "compiled inside": (Policy, lambda policy: DistributedDataParallel(torch.compile(policy, backend="eager"))),
    "compiled outside": (Policy, lambda policy: torch.compile(DistributedDataParallel(policy), backend="eager")),
}


def train(module, policy, batch, advantages, size):
    """Three steps, the second without survivors."""
    optimizer = torch.optim.SGD(policy.parameters(), 0.1)
    step = sj.GatedBackward(GATE, module="local" if module is policy else module, micro_batch_size=size)
    kept = []
    for sign in (1, -1, 1):
        report = step(module, batch, advantages if sign == 1 else -advantages.abs())
        kept.append(report.kept)
        if report.kept:
            optimizer.step()
            optimizer.zero_grad()
    return kept


def options_of_ddp():
    """Steps with and without survivors, in one and in several micro-batches, end with one process's weights."""
    _, batch, advantages, _ = local_case()
    _, everything, all_advantages, _ = make_case("rows")
    for name, (kind, wrapped) in WRAPPERS.items():
        for size in (None, 2):
            torch.manual_seed(0)
            policy = kind()
            alone = copy.deepcopy(policy)
            kept = train(wrapped(policy), policy, batch, advantages, size)
            assert train(alone, alone, everything, all_advantages, size) == kept
            pairs = zip(policy.parameters(), alone.parameters(), strict=True)
            tell(name, error=max(float((a - b).detach().abs().max()) for a, b in pairs), kept=kept)


def lengths_that_differ():
    """Rank 0 has answers of 5 tokens, rank 1 of 3: everything works."""
    policy, batch, advantages, _ = local_case("tokens")
    length = 5 if dist.get_rank() == 0 else 3
    batch = {key: value[:, :length] for key, value in batch.items()}
    _, everything, all_advantages, _ = make_case("tokens")
    mask = torch.arange(5) < torch.where(torch.arange(ROWS) < 9, 5, 3).unsqueeze(1)
    sj.gated_backward(policy, everything, all_advantages, GATE, mask=mask, module="local")
    for kind in ("ddp", "fsdp"):
        module = wrap(copy.deepcopy(policy), kind)
        sj.gated_backward(module, batch, advantages, GATE, module=module)
        tell("lengths", error=relative_error(module, policy))


def tensordicts_on_one_rank_only():
    policy, batch, _, _ = local_case()
    advantages = torch.ones(len(batch["state"]), dtype=torch.float64) * (1 if dist.get_rank() == 0 else -1)
    module = DistributedDataParallel(copy.deepcopy(policy))
    nested = TensorDict({"seen": TensorDict(batch, batch_size=[len(advantages)])}, batch_size=[len(advantages)])
    report = sj.gated_backward(lambda rows: module(rows["seen"]), nested, advantages, GATE, module=module)
    _, everything, _, _ = make_case("rows")
    signs = torch.where(torch.arange(ROWS) < 9, 1.0, -1.0).double()
    sj.gated_backward(policy, everything, signs, GATE, module="local")
    tell("tensordict", error=relative_error(module, policy), rows=report.backward_rows)


def shards_after_a_step_without_survivors():
    """Screening leaves whole weights behind, which an optimizer step of the shards would make stale."""
    policy, batch, advantages, _ = local_case()
    module = wrap(copy.deepcopy(policy), "fsdp")
    optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
    step = sj.GatedBackward(GATE, module=module)
    step(module, batch, advantages)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    step(module, batch, -advantages.abs())
    optimizer.step()  # momentum still moves the weights
    with torch.no_grad():
        for parameter, sharded in zip(policy.parameters(), module.parameters(), strict=True):
            parameter.copy_(sharded.full_tensor())
        tell("shards", error=float((module(batch) - policy(batch)).abs().max()))


if __name__ == "__main__":
    main(globals())
    leave()
