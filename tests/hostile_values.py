"""What may stand wrongly in the place of an argument."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import torch

import sparkjoy as sj
from sparkjoy.prices import EffectiveSize
from sparkjoy_lab.prices import RollingQuantile

ROWS, TOKENS, WIDTH, ACTIONS = 6, 3, 4, 5


def general_values() -> dict[str, Any]:
    """Wrong, or at the edge, nearly everywhere."""
    return {
        "None": None,
        "a string": "text",
        "an empty string": "",
        "an empty list": [],
        "a list": [1.0, 2.0],
        "a tuple": (1, 2),
        "an empty dict": {},
        "a dict": {"a": 1},
        "an object": object(),
        "the class of a gate": sj.KondoGate,
        "a gate": sj.KondoGate(rate=0.5),
        "a price": EffectiveSize(0.5),
        "a module": torch.nn.Linear(WIDTH, ACTIONS),
        "a function of nothing": lambda: None,
        "a function of one": lambda given: given,
        "a function of five": lambda a, b, c, d, e: a,
        "a function that returns None": lambda *a, **k: None,
        "a function that returns text": lambda *a, **k: "text",
        "a function that returns a list": lambda *a, **k: [1.0] * ROWS,
        "a function that returns a float": lambda *a, **k: 1.0,
        "a function that returns a short tensor": lambda *a, **k: torch.ones(2),
        "a function that returns whole numbers": lambda *a, **k: torch.ones(ROWS, dtype=torch.long),
        "a function that returns NaN": lambda *a, **k: torch.full((ROWS,), torch.nan),
        "a function that returns complex": lambda *a, **k: torch.full((ROWS,), 1j),
        "True": True,
        "float32": np.float32(0.5),
        "int64": np.int64(2),
        "bool_": np.bool_(True),
        "an array of no dimension": np.array(0.5),
        "an array": np.array([1.0, 2.0]),
        "NaN": float("nan"),
        "infinity": float("inf"),
        "minus infinity": float("-inf"),
        "-1": -1,
        "0": 0,
        "-0.0": -0.0,
        "a half": 0.5,
        "2": 2,
        "2.5": 2.5,
        "tiny": 1e-12,
        "huge": 1e300,
        "beyond a float": 10**400,
        "beyond 64 bits": 2**70,
        "complex": 1j,
        "bytes": b"x",
        "a fraction": Fraction(1, 2),
        "a decimal": Decimal("0.5"),
        "a dtype": torch.float32,
        "a range": range(3),
        "a tensor of no dimension": torch.tensor(0.5),
        "a tensor": torch.tensor([0.5, 0.5]),
        "a cube": torch.zeros(ROWS, TOKENS, 2),
        "no rows": torch.zeros(0),
        "no tokens": torch.zeros(ROWS, 0),
    }


def like_tensor(valid: torch.Tensor) -> dict[str, Any]:
    """Changes of a valid tensor, some of which are fine."""
    floating = valid.float()
    one = torch.zeros_like(floating).flatten().index_fill(0, torch.tensor([0]), 1).view_as(floating).bool()
    return {
        "its list": valid.tolist(),
        "its array": valid.numpy(),
        "its rows as a list": list(valid),
        "float64": valid.double(),
        "float16": valid.half(),
        "bfloat16": valid.bfloat16(),
        "float8": floating.to(torch.float8_e4m3fn),
        "int64": valid.long(),
        "uint8": valid.to(torch.uint8),
        "bool": valid.bool(),
        "complex": valid.to(torch.complex64),
        "meta": valid.to("meta"),
        "one short": valid[:-1],
        "one long": torch.cat((valid, valid[:1])),
        "no rows": valid[:0],
        "no columns": valid[..., :0],
        "one more dimension": valid.unsqueeze(-1),
        "one dimension before": valid.unsqueeze(0),
        "one dimension fewer": valid[0],
        "the first column": valid[..., 0],
        "one NaN": floating.where(~one, torch.nan),
        "one infinite": floating.where(~one, torch.inf),
        "one minus infinite": floating.where(~one, -torch.inf),
        "one of -1": valid.where(~one, -1) if valid.dtype != torch.bool else floating.where(~one, -1),
        "one of 2": valid.where(~one, 2) if valid.dtype != torch.bool else floating.where(~one, 2),
        "all NaN": floating * torch.nan,
        "negated": -floating,
        "large": floating * 1e30,
        "probabilities": (-floating.abs()).exp(),
        "strided": torch.stack((valid, valid), dim=-1)[..., 0],
        "transposed": valid.mT if valid.dim() > 1 else valid.flip(0),
        "expanded": valid[:1].expand_as(valid),
        "sparse": valid.to_sparse(),
        "nested": torch.nested.nested_tensor(list(floating.view(len(floating), -1)), layout=torch.jagged),
        "with a graph": floating.clone().requires_grad_() * 1.0,
        "a parameter": torch.nn.Parameter(floating.clone()),
    }


def like_state(valid: dict[str, Any], general: dict[str, Any]) -> dict[str, Any]:
    """Changes of a saved state."""
    others: dict[str, Any] = {
        "of a gate with a budget": sj.BudgetGate(0.5).state_dict(),
        "of an unbiased gate": sj.UnbiasedGate().state_dict(),
        "of a price": RollingQuantile(0.5).state_dict(),
        "of a gate with a price": sj.KondoGate(price=RollingQuantile(0.5)).state_dict(),
        "of a step": sj.GatedBackward(sj.UnbiasedGate()).state_dict(),
        "with one more": {**valid, "more": 1},
    }
    for name, value in valid.items():
        others[f"without {name}"] = {key: kept for key, kept in valid.items() if key != name}
        others |= {f"with {name} {label}": {**valid, name: wrong} for label, wrong in general.items()}
        if isinstance(value, torch.Tensor):
            others |= {f"with {name} {label}": {**valid, name: wrong} for label, wrong in like_tensor(value).items()}
    return others


def like_batch(valid: dict[str, Any], general: dict[str, Any]) -> dict[str, Any]:
    """Changes of a batch, of which a log-prob function may make what it likes."""
    part = {f"with {label}": {**valid, "more": wrong} for label, wrong in general.items()}
    return part | {f"with state {label}": {**valid, "state": wrong} for label, wrong in general.items()}


HARMLESS_TO_ASK = {"rounds", "seconds", "seed"}
"""Arguments of which a large value is what it says: it takes long."""


def hostile_values(name: str, valid: Any) -> dict[str, Any]:
    """By what they are, for the argument `name`, whose valid value is given."""
    general = general_values()
    if name in HARMLESS_TO_ASK:
        general = {label: value for label, value in general.items() if label not in ("huge", "beyond 64 bits")}
    if isinstance(valid, torch.Tensor):
        return general | like_tensor(valid)
    if name == "state":
        return general | like_state(valid, general)
    if name == "batch":
        return general | like_batch(valid, general)
    return general
