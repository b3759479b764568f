import dataclasses
import warnings
from collections import OrderedDict, UserDict, defaultdict, namedtuple
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import pytest
import torch
from tensordict import NonTensorStack, TensorDict, lazy_stack, tensorclass
from transformers import BatchEncoding
from transformers.modeling_outputs import CausalLMOutput

from sparkjoy.step.batches import check_rows, take

Pair = namedtuple("Pair", ["x", "y"])


@dataclass
class Fields:
    x: torch.Tensor
    nested: dict


@dataclass(frozen=True, slots=True)
class Scaled:
    """Changes what it is given, and derives from it: neither may happen to rows taken from one."""

    x: torch.Tensor
    y: torch.Tensor
    norm: torch.Tensor = dataclasses.field(init=False)
    unset: torch.Tensor = dataclasses.field(init=False)
    scale: dataclasses.InitVar[int] = 1

    def __post_init__(self, scale):
        object.__setattr__(self, "x", self.x + 1)
        object.__setattr__(self, "norm", self.x * scale)


@dataclass
class Counted:
    x: torch.Tensor

    def __post_init__(self):
        self.x, self.source = self.x + 1, "sampler"


class ScaledPair(NamedTuple("ScaledPair", [("x", torch.Tensor), ("y", torch.Tensor)])):
    def __new__(cls, x):
        return super().__new__(cls, x, torch.stack([2 * x, 2 * x + 1], 1))


class OwnDict(dict):
    def __init__(self, x, y):
        super().__init__(x=x, y=y)
        self.name = "rollout"


@tensorclass
class Rollout:
    x: torch.Tensor
    y: torch.Tensor


X, Y = torch.arange(5), torch.arange(10).view(5, 2)
BATCHES = {
    "tensor": (X, lambda b: (b,)),
    "dict": ({"x": X, "y": Y}, lambda b: (b["x"], b["y"])),
    "ordered": (OrderedDict(x=X, y=Y), lambda b: (b["x"], b["y"])),
    "namedtuple": (Pair(X, Y), lambda b: (b.x, b.y)),
    "default": (defaultdict(list, x=X, y=Y), lambda b: (b["x"], b["y"])),
    "user's dict": (UserDict(x=X, y=Y), lambda b: (b["x"], b["y"])),
    "dict with an __init__": (OwnDict(X, Y), lambda b: (b["x"], b["y"])),
    "proxy": (MappingProxyType({"x": X, "y": Y}), lambda b: (b["x"], b["y"])),
    "tokenizer's": (BatchEncoding({"x": X, "y": Y}), lambda b: (b["x"], b["y"])),
    "model's": (CausalLMOutput(loss=X, logits=Y), lambda b: (b.loss, b["logits"])),
    "namedtuple with a __new__": (ScaledPair(X), lambda b: (b.x, b.y)),
    "tensorclass": (Rollout(X, Y, batch_size=[5]), lambda b: (b.x, b.y)),
    "dataclass": (Fields(X, {"y": Y}), lambda b: (b.x, b.nested["y"])),
    "tensordict": (TensorDict({"x": X, "deep": {"y": Y}}, batch_size=[5]), lambda b: (b["x"], b["deep", "y"])),
}


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("rows", [torch.tensor([4, 1]), slice(1, 3)])
def test_rows_are_taken_from_every_tensor(name, rows):
    batch, parts = BATCHES[name]
    taken = take(batch, rows)
    assert type(taken) is type(batch)
    for part, whole in zip(parts(taken), (X, Y), strict=False):
        assert torch.equal(part, whole[rows])
        part.zero_()
    for part, whole in zip(parts(batch), (X, Y), strict=False):
        assert torch.equal(part, whole)
    assert X.tolist() == list(range(5))
    assert Y.flatten().tolist() == list(range(10))


@pytest.mark.parametrize("name", BATCHES)
def test_rows_are_counted_and_shaped(name):
    batch, _ = BATCHES[name]
    check_rows(batch, 5)
    with pytest.raises(ValueError, match="leading dimension of 4"):
        check_rows(batch, 4)


@pytest.mark.parametrize("rows", [torch.tensor([4, 1]), slice(1, 3)])
def test_lists_go_by_row_and_what_is_for_all_goes_along(rows):
    others = {"mode": None, "run": "run 3", "clip": 0.2, "steps": np.int64(4), "scale": torch.tensor(0.7), "on": True}
    batch = {"x": X, "prompt": list("abcde"), "deep": Fields(Y, {"turns": [[n] for n in range(5)], **others})}
    taken = take(batch, rows)
    of_rows = torch.arange(5)[rows].tolist()
    assert taken["prompt"] == ["abcde"[row] for row in of_rows]
    assert taken["deep"].nested == {"turns": [[row] for row in of_rows], **others}
    assert torch.equal(taken["deep"].x, Y[rows])
    check_rows(batch, 5)
    check_rows({"prompt": list("abcde"), **others}, 5)
    with pytest.raises(ValueError, match=r"batch\['prompt'\] is a list of 5; expected one of 4, an item for each row"):
        check_rows({"prompt": list("abcde")}, 4)
    with pytest.raises(ValueError, match=r"batch\['scale'\] has a graph"):
        check_rows({"x": X, "scale": torch.ones((), requires_grad=True) * 2}, 5, X.device)
    for batch in (None, "text", 0.5, torch.tensor(0.7)):
        with pytest.raises(ValueError, match=r"^batch (is|has shape)"):
            check_rows(batch, 5)


def test_the_part_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"batch\['a'\]\.y has shape \(3,\)"):
        check_rows({"a": Pair(X, torch.zeros(3))}, 5)
    with pytest.raises(ValueError, match="batch is a list"):
        check_rows([X, Y], 5)


@pytest.mark.parametrize("rows", [torch.tensor([4, 1]), slice(1, 3)])
def test_a_dataclass_is_not_made_anew(rows):
    taken = take(Scaled(X, Y, scale=7), rows)
    assert type(taken) is Scaled
    assert torch.equal(taken.x, X[rows] + 1)
    assert torch.equal(taken.norm, 7 * X[rows] + 7)
    assert not hasattr(taken, "unset")
    check_rows(taken, 2)
    assert torch.equal(take(Counted(X), rows).x, X[rows] + 1)
    assert take(Counted(X), rows).source == "sampler"
    assert take(OwnDict(X, Y), rows).name == "rollout"


PARTS = [torch.arange(3 * n).view(n, 3) for n in (2, 5, 1, 3)]
with warnings.catch_warnings(action="ignore"):  # torch tells once that the strided layout is the older one
    STRIDED = torch.nested.as_nested_tensor(PARTS, layout=torch.strided)
RAGGED = {
    "jagged": torch.nested.as_nested_tensor(PARTS, layout=torch.jagged),
    "inference": None,
    "jagged, transposed": torch.nested.as_nested_tensor(PARTS, layout=torch.jagged).transpose(1, 2),
    "jagged, of a padded tensor": torch.nested.narrow(
        torch.nested.to_padded_tensor(STRIDED, 0),
        1,
        torch.zeros(4, dtype=torch.int64),
        torch.tensor([2, 5, 1, 3]),
        layout=torch.jagged,
    ),
}
with torch.inference_mode():
    RAGGED["inference"] = torch.nested.as_nested_tensor([part.clone() for part in PARTS], layout=torch.jagged)


@pytest.mark.parametrize("name", RAGGED)
@pytest.mark.parametrize("rows", [torch.tensor([3, 0]), torch.tensor([2]), slice(1, 3), slice(0, 4)])
def test_rows_of_nested_tensors(name, rows):
    nested = RAGGED[name]
    taken = take({"tokens": nested}, rows)["tokens"]
    chosen = rows.tolist() if isinstance(rows, torch.Tensor) else range(4)[rows]
    turned = [part.t() if "transposed" in name else part for part in PARTS]
    assert taken.layout == nested.layout
    assert not taken.is_inference()
    for part, row in zip(taken.unbind(), chosen, strict=True):
        assert torch.equal(part, turned[row])
        part.zero_()
    assert all(torch.equal(part, before) for part, before in zip(nested.unbind(), turned, strict=True))
    check_rows(nested, 4)
    with pytest.raises(ValueError, match="leading dimension of 3"):
        check_rows(nested, 3)


def test_text_beside_tensors_goes_along():
    batch = TensorDict(x=X, prompt=NonTensorStack(*"abcde"), batch_size=[5])
    check_rows(batch, 5)
    assert take(batch, torch.tensor([4, 1]))["prompt"] == ["e", "b"]
    assert take(batch, slice(1, 3))["prompt"] == ["b", "c"]


LAZY = lazy_stack([TensorDict(x=x) for x in X])
REFUSED = {
    "sparse": (torch.eye(5).to_sparse(), "of the layout torch.sparse_coo"),
    "nested": (torch.nested.as_nested_tensor(list(torch.ones(5, 2)), layout=torch.strided), "nested in the strided"),
    "lazy": (LAZY, "a lazy stack"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("deep", [False, True])
def test_what_rows_cannot_be_taken_from_is_refused_with_a_way_out(name, deep):
    batch, message = REFUSED[name]
    with pytest.raises(ValueError, match=f"{message}.*give indices as the batch"):
        check_rows({"x": batch} if deep else batch, 5)


@pytest.mark.parametrize("rows", [torch.tensor([4, 1]), slice(1, 3), slice(0, 5)])
@pytest.mark.parametrize("strides", ["expanded", "transposed", "of a slice", "channels last"])
def test_rows_of_any_strides_are_copies(rows, strides):
    tensor = {
        "expanded": torch.arange(3.0).expand(5, 3),
        "transposed": torch.arange(15.0).view(3, 5).t(),
        "of a slice": torch.arange(30.0).view(5, 6)[:, ::2],
        "channels last": torch.rand(5, 2, 3, 4).to(memory_format=torch.channels_last),
    }[strides]
    before = tensor.clone()
    taken = take(tensor, rows)
    assert torch.equal(taken, before[rows])
    taken.add_(1)
    assert torch.equal(tensor, before)


def test_tensors_on_another_device_are_named():
    batch = {"x": X, "deep": Pair(X, torch.empty(5, device="meta"))}
    with pytest.raises(ValueError, match=r"batch\['deep'\]\.y is on meta and advantages on cpu"):
        check_rows(batch, 5, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"batch\['x'\] is on meta"):
        check_rows(TensorDict(x=X, batch_size=[5], device="meta"), 5, torch.device("cpu"))
