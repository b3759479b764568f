"""One of the processes of test_comparing.py: compares gradients under DistributedDataParallel and fully_shard."""

import json

import torch
import torch.distributed as dist
from distributed_worker import Policy, gradients, main, wrap
from engine_cases import ROWS, make_case
from launching import leave

import sparkjoy as sj


def figures(comparison):
    return [comparison.cosine, comparison.relative_error, comparison.norm_ratio]


def compare(kind, rank):
    torch.manual_seed(0)
    _, batch, advantages, _ = make_case("rows")
    alone = Policy()
    weights = alone.state_dict()
    step = sj.GatedBackward(sj.KondoGate(rate=0.3), module="local", compare_every=1)
    expected = step(alone, batch, advantages).comparison
    own = slice(0, 9) if rank == 0 else slice(9, ROWS)
    rows = {name: values[own] for name, values in batch.items()}
    left, found, refused = [], None, False
    for every in (None, 1):
        policy = Policy()
        policy.load_state_dict(weights)
        module = wrap(policy, kind)
        step = sj.GatedBackward(sj.KondoGate(rate=0.3), module=module, micro_batch_size=2, compare_every=every)
        for _ in range(2):
            report = step(module, rows, advantages[own])
        left.append(gradients(module))
        found = report.comparison
        if every and kind == "ddp":
            with module.no_sync():
                try:
                    step(module, rows, advantages[own])
                except ValueError as error:
                    refused = "no_sync" in str(error)
    result = {
        "kind": kind,
        "untouched": all(torch.equal(one, other) for one, other in zip(*left, strict=True)),
        "several": figures(found),
        "alone": figures(expected),
        "rows": found.backward_rows,
        "local": 9 if rank == 0 else 4 + 3,  # fillers: the other runs five micro-batches, of two rows
        "refused": refused,
    }
    print("RESULT " + json.dumps(result), flush=True)


def everything():
    for kind in ("ddp", "fsdp"):
        compare(kind, dist.get_rank())


if __name__ == "__main__":
    main(globals())
    leave()
