"""A call either adds the right gradient or is a ValueError or TypeError that leaves every `.grad` alone."""

import math
from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from engine_cases import ROWS, make_case
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict

import sparkjoy as sj

WIDTH, ACTIONS = 3, 4
Pair = namedtuple("Pair", ["state", "action"])


@dataclass
class Halved:
    """Its states are halved when it is made."""

    state: torch.Tensor
    action: torch.Tensor

    def __post_init__(self):
        self.state = self.state / 2


@dataclass(frozen=True, slots=True)
class Frozen:
    state: torch.Tensor
    action: torch.Tensor


def of_names(rows):
    return rows["state"], rows["action"]


def of_fields(rows):
    return rows.state, rows.action


CONTAINERS = {
    "tensor": (lambda s, a: torch.cat([s, a.unsqueeze(-1).to(s)], dim=-1), lambda r: (r[..., :-1], r[..., -1].long())),
    "dict": (lambda s, a: {"state": s, "action": a}, of_names),
    "deep dict": (lambda s, a: {"in": {"state": s}, "action": a}, lambda r: (r["in"]["state"], r["action"])),
    "namedtuple": (Pair, of_fields),
    "dataclass": (Halved, of_fields),
    "frozen": (Frozen, of_fields),
    "TensorDict": (lambda s, a: TensorDict(state=s, action=a, batch_size=[len(s)]), of_names),
}
STRIDES = {
    "contiguous": lambda tensor: tensor.contiguous(),
    "transposed": lambda tensor: tensor.movedim(0, -1).contiguous().movedim(-1, 0),
    "every second": lambda tensor: torch.stack([tensor, tensor + 1], dim=1).flatten(0, 1)[::2],
    "expanded": lambda tensor: tensor[:1].expand_as(tensor),
    "inference": lambda tensor: in_inference_mode(tensor),
}
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 1e-1, torch.float32: 1e-4, torch.float64: 1e-4}
FORMS = {
    **{str(dtype): (lambda values, dtype=dtype: values.to(dtype)) for dtype in DTYPES},
    "int64": lambda values: values.long(),
    "bool": lambda values: values > 0,
    "list": lambda values: values.tolist(),
    "array": lambda values: values.numpy(),
    "reversed array": lambda values: values.flip(0).numpy()[::-1],
    "inference": lambda values: in_inference_mode(values),
    "with a graph": lambda values: values.clone().requires_grad_(),
}
GATES = {
    "none": lambda: None,
    "rate": lambda: sj.KondoGate(rate=0.4),
    "high rate": lambda: sj.KondoGate(rate=0.9),
    "rate 1": lambda: sj.KondoGate(rate=1),
    "price": lambda: sj.KondoGate(price=0),
    "both signs": lambda: sj.KondoGate(rate=0.5, negative_share=0.5),
    "soft": lambda: sj.SoftGate(1.0, rate=0.5, generator=torch.Generator().manual_seed(0)),
    "unbiased": lambda: sj.UnbiasedGate(rate=0.5, generator=torch.Generator().manual_seed(0)),
}


@torch.inference_mode()
def in_inference_mode(tensor):
    return tensor.clone()


FAULTS = {
    "NaN advantage": lambda call: {**call, "advantages": [1.0] * (call["total"] - 1) + [math.nan]},
    "a row too many": lambda call: {**call, "advantages": torch.ones(call["total"] + 1)},
    "an advantage of no kind": lambda call: {**call, "advantages": ["good"] * call["total"]},
    "complex advantages": lambda call: {**call, "advantages": torch.ones(call["total"]) * 1j},
    "advantages elsewhere": lambda call: {**call, "advantages": torch.ones(call["total"], device="meta")},
    "log-probs above 0": lambda call: {**call, "above": 30.0},
    "log-probs elsewhere": lambda call: {**call, "known": torch.zeros(call["shape"], device="meta")},
    "integer log-probs": lambda call: {**call, "known": torch.zeros(call["shape"], dtype=torch.int64)},
    "NaN log-probs": lambda call: {**call, "known": torch.full(call["shape"], math.nan)},
    "a mask of another shape": lambda call: {**call, "mask": torch.ones(call["total"], 7)},
    "a mask of halves": lambda call: {**call, "mask": torch.full(call["shape"], 0.5)},
    "a batch elsewhere": lambda call: {**call, "batch": {"state": torch.ones(call["total"], device="meta")}},
    "a batch of bytes": lambda call: {**call, "batch": {"state": b"good"}},
    "a batch of no class": lambda call: {**call, "batch": [torch.ones(call["total"])]},
}
FORGIVEN = {"log-probs above 0": ("none",)}  # densities have a plain policy gradient


@settings(max_examples=250)
@given(data=st.data())
def test_a_call_is_right_or_refused(data):
    def pick(options):
        return data.draw(st.sampled_from(list(options)))

    total, tokens = data.draw(st.integers(1, 9)), data.draw(st.sampled_from([None, 1, 3]))
    dtype, form, stride, container, gate = pick(DTYPES), pick(FORMS), pick(STRIDES), pick(CONTAINERS), pick(GATES)
    fault = data.draw(st.sampled_from([None, None, *FAULTS]))
    size = (total,) if tokens is None else (total, tokens)
    torch.manual_seed(data.draw(st.integers(0, 99)))
    weights = torch.randn(WIDTH, ACTIONS).to(dtype).requires_grad_()
    state, action = STRIDES[stride](torch.randn(*size, WIDTH)), STRIDES[stride](torch.randint(ACTIONS, size))
    make, read = CONTAINERS[container]
    per_token = tokens is not None and data.draw(st.booleans())
    values = torch.randn(size if per_token else (total,)).mul(2).round().div(2)  # exact in every dtype
    advantages = FORMS[form](values)
    masked = tokens is not None and data.draw(st.booleans())
    mask = (torch.rand(size) < 0.7).index_fill(1, torch.tensor([0]), True) if masked else None
    call = {
        "batch": make(state, action),
        "advantages": advantages,
        "known": None,
        "mask": mask,
        "above": 0.0,
        "total": total,
        "shape": size,
    }
    call = call if fault is None else FAULTS[fault](call)

    def log_prob_fn(rows):
        own_state, own_action = read(rows)
        own_state.mul_(0.5)  # a function may write into its rows
        logits = own_state.to(dtype) @ weights
        log_probs = logits.log_softmax(-1).gather(-1, own_action.unsqueeze(-1)).squeeze(-1)
        return log_probs + call["above"]

    options = {
        "micro_batch_size": pick([None, 2]),
        "normalizer": pick(["batch", "samples", 5.0, *(["kept"] if gate != "unbiased" else [])]),
    }
    known = call["known"]
    if fault is None and data.draw(st.booleans()):
        known = FORMS[pick(["inference", "with a graph", str(dtype)])](
            log_prob_fn(make(state.clone(), action.clone())).detach()
        )
    given_known = {} if known is None else {"log_probs": known}
    if call["mask"] is not None:
        given_known["mask"] = (
            call["mask"] if fault else pick([mask, mask.long(), mask.to(dtype), in_inference_mode(mask)])
        )
    before, before_action = (None, None) if fault else [part.clone() for part in read(call["batch"])]
    try:
        report = sj.gated_backward(
            log_prob_fn, call["batch"], call["advantages"], GATES[gate](), **given_known, **options
        )
    except (ValueError, TypeError):
        assert fault is not None
        assert weights.grad is None
        return
    assert fault is None or gate in FORGIVEN.get(fault, ()) or report.kept == 0
    if fault is not None:
        return
    assert torch.equal(read(call["batch"])[0], before)  # what the function wrote, it wrote into copies
    weight = (report.decision.weight * report.decision.keep).double().view(total, *[1] * (len(size) - 1))
    exact_weights = weights.detach().double().requires_grad_()
    logits = (before / 2).to(dtype).double() @ exact_weights
    log_probs = logits.log_softmax(-1).gather(-1, before_action.unsqueeze(-1)).squeeze(-1)
    used = {"int64": values.long(), "bool": values > 0}.get(form, values).double()
    used = used if per_token else used.view(total, *[1] * (len(size) - 1))
    valid = torch.ones(size) if mask is None else mask.double()
    kept = report.decision.keep
    divisor = {"batch": valid.sum(), "samples": total, "kept": valid[kept].sum(), 5.0: 5}[options["normalizer"]]
    (-(used * weight * valid * log_probs).sum() / max(1, float(divisor))).backward()
    found = torch.zeros_like(exact_weights) if weights.grad is None else weights.grad.double()
    scale = (used.abs() * weight * valid).sum().item() / max(1, float(divisor))
    assert (found - exact_weights.grad).abs().max().item() <= TOLERANCE[dtype] * max(scale, 1e-3) * 4


@settings(max_examples=60)
@given(data=st.data())
def test_ragged_rows_are_right(data):
    lengths = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=6))
    kind, gate = data.draw(st.sampled_from(["jagged", "TensorDict"])), data.draw(st.sampled_from(list(GATES)))
    dtype, micro_batch_size = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from([None, 2]))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    states, advantages = [torch.randn(n, WIDTH) for n in lengths], torch.randn(len(lengths))
    weights = torch.randn(WIDTH, ACTIONS).to(dtype).requires_grad_()
    jagged = torch.nested.as_nested_tensor(states, layout=torch.jagged)
    batch = {
        "jagged": {"state": jagged},
        "TensorDict": TensorDict(state=jagged, batch_size=[len(lengths)]),
    }[kind]

    def log_prob(state, of):
        return (state.to(of.dtype) @ of).log_softmax(1)[:, 0].sum()

    def log_prob_fn(rows):
        parts = rows["state"].unbind()
        for part in parts:
            part.mul_(2)
        return torch.stack([log_prob(part, weights) for part in parts])

    report = sj.gated_backward(log_prob_fn, batch, advantages, GATES[gate](), micro_batch_size=micro_batch_size)
    exact = weights.detach().double().requires_grad_()
    log_probs = torch.stack([log_prob(2 * state.to(dtype), exact) for state in states])
    weight = (report.decision.weight * report.decision.keep).double()
    (-(advantages * weight * log_probs).mean()).backward()
    found = torch.zeros_like(exact) if weights.grad is None else weights.grad.double()
    scale = (advantages.abs() * weight).mean().item()
    assert (found - exact.grad).abs().max().item() <= TOLERANCE[dtype] * max(scale, 1e-3) * 16


@pytest.mark.parametrize("name", ["log_probs", "behavior_log_probs", "mask"])
def test_what_is_on_another_device_is_named(name):
    policy, batch, advantages, _ = make_case("tokens")
    elsewhere = {name: torch.zeros(ROWS, 5, device="meta")}
    with pytest.raises(ValueError, match=f"{name} is on meta and advantages on cpu; expected one device"):
        sj.gated_backward(policy.log_probs, batch, advantages, sj.KondoGate(rate=0.5), **elsewhere)


@pytest.mark.parametrize("gate", [None, sj.KondoGate(rate=0.5)])
def test_a_function_that_answers_on_another_device_is_named(gate):
    policy, batch, advantages, _ = make_case("rows")
    with pytest.raises(ValueError, match="the log-prob function returned is on meta and advantages on cpu"):
        sj.gated_backward(lambda rows: policy.log_probs(rows).to("meta"), batch, advantages, gate)


@pytest.mark.parametrize("name", ["advantages", "log_probs", "behavior_log_probs", "mask"])
def test_tensors_of_an_inference_mode_are_used_by_a_loss_of_ones_own(name):
    policy, batch, advantages, mask = make_case("ragged tokens")
    known = policy.log_probs(batch).detach() - 0.1
    given = {"advantages": advantages, "log_probs": known, "behavior_log_probs": known, "mask": mask}
    gradients = []
    for values in (given, {**given, name: in_inference_mode(given[name])}):
        policy.zero_grad()
        sj.gated_backward(policy.log_probs, batch, gate=sj.KondoGate(rate=0.9), loss=sj.clipped(0.2), **values)
        gradients.append(policy.layer.weight.grad.clone())
    assert torch.equal(*gradients)


@pytest.mark.parametrize(
    ("given", "mask", "says"),
    [
        (torch.ones(6, 1), None, r"expected \(\d, 1\), as the advantages .* advantages.squeeze\(-1\)"),
        (torch.ones(6), torch.ones(6, 4), r"expected \(\d, 4\), as the mask of these rows"),
    ],
)
def test_a_shape_that_does_not_fit_says_what_it_has_to_fit(given, mask, says):
    weight = torch.zeros(6, requires_grad=True)
    step = sj.GatedBackward(sj.KondoGate(rate=0.5))
    with pytest.raises(ValueError, match=says):
        step(lambda rows: weight[rows] - 1, torch.arange(6), given, mask=mask)
    assert weight.grad is None
