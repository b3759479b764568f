from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from tensordict import TensorDict

from sparkjoy.engine.survivors import row_shapes, take

Pair = namedtuple("Pair", ["x", "y"])


@dataclass
class Fields:
    x: torch.Tensor
    nested: dict


X, Y = torch.arange(5), torch.arange(10).view(5, 2)
BATCHES = {
    "tensor": (X, lambda b: (b,)),
    "dict": ({"x": X, "y": Y}, lambda b: (b["x"], b["y"])),
    "ordered": (OrderedDict(x=X, y=Y), lambda b: (b["x"], b["y"])),
    "namedtuple": (Pair(X, Y), lambda b: (b.x, b.y)),
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


@pytest.mark.parametrize("name", BATCHES)
def test_rows_are_counted_and_shaped(name):
    batch, _ = BATCHES[name]
    assert row_shapes(batch, 5) == (((), (2,)) if name != "tensor" else ((),))
    with pytest.raises(ValueError, match="leading dimension of 4"):
        row_shapes(batch, 4)


def test_the_part_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"batch\['a'\]\.y has shape \(3,\)"):
        row_shapes({"a": Pair(X, torch.zeros(3))}, 5)
    with pytest.raises(ValueError, match="batch is a list"):
        row_shapes([X, Y], 5)
