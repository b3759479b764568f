"""A process of test_distributed_faults.py: something goes wrong on the last rank only; then a sound step follows."""

import copy
import datetime
import os
import sys
import time
from functools import partial

import torch
import torch.distributed as dist
from distributed_worker import Policy, gradients, tell, wrap
from engine_cases import ROWS, make_case
from launching import leave
from torch import nn

import sparkjoy as sj


class Fragile(Policy):
    """With a buffer, which DistributedDataParallel broadcasts, and a switch to fail half way through."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4, dtype=torch.float64).eval()
        self.breaks = False

    def forward(self, rows):
        hidden = self.first(self.norm(rows["state"])).tanh()
        if self.breaks:
            raise RuntimeError("half way")
        return self.second(hidden).log_softmax(-1).gather(-1, rows["action"].unsqueeze(-1)).sum(-1)


class Learner:
    """Fails after the gradient is there."""

    broken = False
    weighted = True

    def __init__(self, *args, **options):
        self.gate = sj.UnbiasedGate(*args, **options)

    def __call__(self, score, cost=None):
        return self.gate(score, cost)

    def learn(self, *sums):
        if self.broken:
            raise OSError("no space left")


class Student:
    """A draft that fails."""

    def __init__(self, drafts=True):
        self.drafts = drafts

    def __call__(self, rows):
        if not self.drafts:
            raise LookupError("no such row")
        return -rows["state"].abs().sum(dim=1)


def last_rank():
    return dist.get_rank() == dist.get_world_size() - 1


def here(fault, otherwise):
    """`fault` on the last rank, for steps that are to fail."""
    return fault if last_rank() else otherwise


def raising(error):
    def function(*arguments):
        raise error

    return function


def after(module, change):
    return lambda rows: change(module(rows))


class Later:
    """Goes wrong in a later differentiable pass than the first."""

    def __init__(self, module, last=2):
        self.module, self.last = module, last
        self.calls = 0

    def __call__(self, rows):
        self.calls += torch.is_grad_enabled()
        if self.calls == self.last and torch.is_grad_enabled():
            raise ValueError(f"pass {self.last}")
        return self.module(rows)


FUNCTIONS = {
    "before the module": lambda module: raising(KeyError("nope")),
    "after the module": lambda module: after(module, lambda log_probs: log_probs.nope),
    "another shape": lambda module: after(module, lambda log_probs: log_probs[:, None, None]),
    "no graph": lambda module: after(module, torch.Tensor.detach),
    "NaN": lambda module: after(module, lambda log_probs: log_probs * torch.nan),
    "the second pass": Later,
    "comparing": partial(Later, last=5),
    "interrupt": lambda module: raising(KeyboardInterrupt()),
}
WAYS = {
    "known": (sj.KondoGate(rate=0.7), True),
    "screened": (sj.KondoGate(rate=0.7), False),
    "dense": (None, False),
}


def fault(name, module, policy, batch, advantages, gate, given):
    """A step in which only the last rank has the fault."""
    options, broken = {"module": module, "micro_batch_size": 3}, here(True, False)
    function = FUNCTIONS[name](module) if broken and name in FUNCTIONS else module
    policy.breaks = broken and name in ("half way", "drafting by the policy")
    if name == "loss":
        options["loss"] = partial(failing, sj.reinforce, broken)
    if name == "score":
        options["score"] = partial(failing, sj.delight, broken)
    if name == "gate":
        gate = partial(failing, gate, broken)
    if name == "learning":
        gate = Learner(noise=1.0, generator=torch.Generator().manual_seed(0))
        gate.broken = broken
    if name == "drafting":
        options["draft"] = sj.Draft(Student(drafts=not broken), verify=1.2)
    if name == "drafting by the policy":
        options["draft"] = sj.Draft(module, verify=1.2)
    if name == "options":
        options["micro_batch_size"] = 2 if broken else 3
    if name == "comparing":
        options["compare_every"] = 1
    if name == "rate":
        gate = sj.KondoGate(rate=0.3) if broken else gate
    if name == "behavior":
        given = {**given, "behavior_log_probs": torch.zeros_like(advantages)} if broken else given
    if name == "score of NaN":
        options["score"] = partial(times, torch.nan if broken else 1.0)
    try:
        sj.GatedBackward(gate, **options)(function, batch, advantages, **given)
    except BaseException as error:
        return type(error).__name__, str(error)
    finally:
        policy.breaks = False
    return None


def failing(function, broken, *arguments):
    if broken:
        raise LookupError("by a function of the user's own")
    return function(*arguments)


def times(factor, advantages, log_probs):
    return sj.delight(advantages, log_probs) * factor


def faults(kind, names=None, ways=WAYS):
    _, batch, advantages, _ = make_case("rows")
    own = slice(0, 7) if dist.get_rank() == 0 else slice(7, ROWS)
    local = {key: value[own] for key, value in batch.items()}
    torch.manual_seed(0)
    fresh = Fragile()
    alone = copy.deepcopy(fresh)
    gate = sj.KondoGate(rate=0.7)
    sj.gated_backward(alone, batch, advantages, gate, module="local")
    expected = [parameter.grad for parameter in alone.parameters() if parameter.grad is not None]
    known = fresh(batch).detach()[own]
    others = (
        "half way",
        "loss",
        "score",
        "gate",
        "learning",
        "options",
        "rate",
        "behavior",
        "score of NaN",
        "drafting",
        "drafting by the policy",
    )
    for way, (way_gate, has_log_probs) in WAYS.items():
        for name in names or (*FUNCTIONS, *others):
            gateless = way == "dense" and name in ("score", "gate", "rate", "score of NaN", "comparing")
            exact = way != "known" and name == "learning"  # there is nothing to learn from exact sizes
            if gateless or exact or way not in ways or ("drafting" in name and way != "screened"):
                continue
            policy = copy.deepcopy(fresh)
            module = wrap(policy, kind, gradient_as_bucket_view=True)  # whose .grad takes care to zero
            given = {"log_probs": known} if has_log_probs else {}
            run = partial(fault, name, module, policy, local, advantages[own], way_gate, given)
            found = {"kind": kind, "way": way, "said": [], "grad": [], "error": []}
            for _ in range(2):  # at the module's first pass, and where it has .grad
                before = [None if g is None else g.clone() for g in held(module)]
                found["said"].append(run())
                found["grad"].append(what_became_of(before, held(module)))
                module.zero_grad()
                sj.GatedBackward(gate, module=module, micro_batch_size=3)(module, local, advantages[own])
                pairs = zip([g for g in gradients(module) if g is not None], expected, strict=True)
                found["error"].append(max(float((g - e).norm() / e.norm()) for g, e in pairs))
            tell(name, **found)


def held(module):
    return [parameter.grad for parameter in module.parameters()]


def what_became_of(before, now):
    """Of `.grad`, on this rank."""
    before, now = ([getattr(g, "to_local", lambda g=g: g)() for g in grads] for grads in (before, now))
    pairs = list(zip(before, now, strict=True))
    if all(a is b if a is None or b is None else torch.equal(a, b) for a, b in pairs):
        return "as it was"
    return "zero" if all(g is None or not bool(g.any()) for g in now) else "changed"


def ddp():
    faults("ddp")


def fsdp():
    faults("fsdp")


def quick():
    for kind in ("ddp", "fsdp"):
        faults(
            kind,
            ("before the module", "half way", "NaN", "the second pass", "comparing", "learning", "rate"),
            ("known",),
        )
        faults(kind, ("drafting", "drafting by the policy"), ("screened",))


def skips():
    """The last rank leaves out a call, as where its batch was bad, and goes on."""
    for kind in ("ddp", "fsdp"):
        module = wrap(Policy(), kind)
        _, batch, advantages, _ = make_case("rows")
        step = sj.GatedBackward(sj.KondoGate(rate=0.3), module=module)
        step(module, batch, advantages, step_number=0)
        before, said = [g.clone() for g in held(module)], ""
        try:
            step(module, batch, advantages, step_number=here(2, 1))
        except ValueError as error:
            said = str(error)
        tell(kind, said=said, grad=what_became_of(before, held(module)))


def lost(how):
    """The last rank is not there for the second step."""
    policy = Policy()
    module = wrap(policy, "ddp")
    _, batch, advantages, _ = make_case("rows")
    step = sj.GatedBackward(sj.KondoGate(rate=0.3), module=module)
    step(module, batch, advantages)
    began = time.monotonic()
    if last_rank():
        if how == "ends":
            leave()
        time.sleep(8)
        leave()
    try:
        step(module, batch, advantages)
    except RuntimeError as error:
        tell(how, said=str(error), seconds=time.monotonic() - began)


def ends():
    lost("ends")


def waits():
    lost("waits")


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{os.environ['STORE']}",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=datetime.timedelta(seconds=60),
    )
    if sys.argv[1] in ("ends", "waits"):  # not while the processes find each other, which a busy machine makes slow
        dist.barrier()
        dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=4))
    for scenario in sys.argv[1:]:
        globals()[scenario]()
    leave()
