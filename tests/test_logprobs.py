import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparkjoy import logprobs
from sparkjoy.logprobs import token_log_probs

ROWS, TOKENS, WIDTH, VOCABULARY = 3, 7, 16, 53
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2}


def case(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(ROWS, TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64) / 4
    bias = torch.randn(VOCABULARY, generator=generator, dtype=torch.float64)
    targets = torch.randint(VOCABULARY, (ROWS, TOKENS), generator=generator)
    mask = torch.arange(TOKENS) < torch.tensor([[5], [0], [7]])
    upstream = torch.randn(ROWS, TOKENS, generator=generator, dtype=torch.float64)
    leaves = [tensor.to(dtype).requires_grad_() for tensor in (hidden, weight, bias)]
    return leaves, targets, mask, upstream


def full_logits(hidden, weight, bias, targets, mask, temperature=1.0):
    """All logits at once, as research code does."""
    logits = F.linear(hidden, weight, bias)
    logits = (logits if logits.dtype == torch.float64 else logits.float()) / temperature
    return logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1).where(mask, 0)


def values_and_gradients(log_probs, upstream, leaves):
    return log_probs, *torch.autograd.grad((log_probs * upstream.to(log_probs)).sum(), leaves)


def assert_same(own, reference, tolerance):
    for mine, theirs in zip(own, reference, strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, atol=tolerance, rtol=tolerance)


@given(chunk=st.integers(1, ROWS * TOKENS + 3), temperature=st.sampled_from([1.0, 0.7]), seed=st.integers(0, 10))
def test_any_chunk_gives_the_values_and_gradients_of_full_logits(chunk, temperature, seed):
    leaves, targets, mask, upstream = case(seed=seed)
    hidden, weight, bias = leaves
    own = token_log_probs(hidden, weight, targets, bias=bias, mask=mask, chunk_tokens=chunk, temperature=temperature)
    reference = full_logits(hidden, weight, bias, targets, mask, temperature)
    assert_same(values_and_gradients(own, upstream, leaves), values_and_gradients(reference, upstream, leaves), 1e-10)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("called", [False, True])
def test_every_dtype(dtype, called):
    leaves, targets, mask, upstream = case(dtype)
    hidden, weight, bias = leaves
    if called:
        own = token_log_probs(hidden, lambda h: F.linear(h, weight, bias), targets, mask=mask, chunk_tokens=4)
    else:
        own = token_log_probs(hidden, weight, targets, bias=bias, mask=mask, chunk_tokens=4)
    assert own.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    reference = full_logits(hidden, weight, bias, targets, mask)
    assert_same(
        values_and_gradients(own, upstream, leaves),
        values_and_gradients(reference, upstream, leaves),
        TOLERANCE[dtype],
    )


def test_many_chunks_in_bfloat16_sum_the_weights_gradient_in_float32():
    generator = torch.Generator().manual_seed(0)
    hidden, targets = torch.rand(4096, 8, generator=generator), torch.zeros(4096, dtype=torch.long)
    weight = torch.zeros(4, 8)
    gradients = {}
    for chunk in (4096, 8):
        low = weight.bfloat16().requires_grad_()
        token_log_probs(hidden.bfloat16(), low, targets, chunk_tokens=chunk).sum().backward()
        gradients[chunk] = low.grad.float()
    torch.testing.assert_close(gradients[8], gradients[4096], rtol=0.01, atol=0)


def test_autocast_is_that_of_a_linear_layer():
    leaves, targets, mask, upstream = case(torch.float32)
    hidden, weight, bias = leaves
    with torch.autocast("cpu", dtype=torch.bfloat16):
        own = token_log_probs(hidden, weight, targets, bias=bias, mask=mask, chunk_tokens=4)
        reference = full_logits(hidden, weight, bias, targets, mask)
    assert own.dtype == torch.float32
    assert_same(values_and_gradients(own, upstream, leaves), values_and_gradients(reference, upstream, leaves), 3e-2)


def test_gradcheck():
    (hidden, weight, bias), targets, mask, _ = case()
    torch.autograd.gradcheck(
        lambda *leaves: token_log_probs(
            leaves[0], leaves[1], targets, bias=leaves[2], mask=mask, chunk_tokens=4, temperature=1.3
        ),
        (hidden, weight, bias),
    )


def test_tied_embeddings_get_both_gradients():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (ROWS, TOKENS + 1), generator=generator)
    embedding = nn.Embedding(VOCABULARY, WIDTH, dtype=torch.float64)
    head = nn.Linear(WIDTH, VOCABULARY, bias=False, dtype=torch.float64)
    head.weight = embedding.weight
    mask = torch.ones(ROWS, TOKENS, dtype=torch.bool)
    states = embedding(tokens[:, :-1]).cumsum(dim=1).tanh()
    upstream = torch.randn(ROWS, TOKENS, generator=generator)
    own = token_log_probs(states, head, tokens[:, 1:], chunk_tokens=4)
    reference = full_logits(states, head.weight, None, tokens[:, 1:], mask)
    (gradient,) = torch.autograd.grad((own * upstream).sum(), embedding.weight, retain_graph=True)
    (expected,) = torch.autograd.grad((reference * upstream).sum(), embedding.weight)
    torch.testing.assert_close(gradient, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("called", [False, True])
def test_nothing_leaks_from_where_the_mask_is_0(called):
    (hidden, weight, bias), targets, mask, _ = case()
    with torch.no_grad():
        hidden[~mask] = math.nan
        targets[~mask] = -100
    layer = (lambda h: F.linear(h, weight, bias)) if called else weight
    own = token_log_probs(hidden, layer, targets, bias=None if called else bias, mask=mask, chunk_tokens=4)
    assert own[~mask].tolist() == [0.0] * int((~mask).sum())
    own.backward(torch.where(mask, 1.0, math.nan).double())  # not even what comes from above
    assert hidden.grad[~mask].count_nonzero() == 0
    assert all(leaf.grad.isfinite().all() for leaf in (hidden, weight, bias))


@pytest.mark.parametrize("called", [False, True])
def test_no_position_at_all(called):
    (hidden, weight, _), targets, _, _ = case()
    layer = (lambda h: F.linear(h, weight)) if called else weight
    own = token_log_probs(hidden, layer, targets, mask=torch.zeros(ROWS, TOKENS))
    own.sum().backward()
    assert own.shape == targets.shape
    assert weight.grad.shape == weight.shape
    for zeros in (own, hidden.grad, weight.grad):
        assert zeros.count_nonzero() == 0


class LargestResult(TorchDispatchMode):
    """Numbers of the largest tensor that any operation gives, and how many matrix products ran."""

    def __init__(self):
        super().__init__()
        self.largest, self.products = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.products += "mm" in function.__name__
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize("called", [False, True])
def test_no_tensor_has_more_logits_than_a_chunk(called):
    hidden = torch.randn(4, 50, 3, requires_grad=True)
    weight = torch.randn(200, 3, requires_grad=True)
    targets = torch.randint(200, (4, 50))
    with LargestResult() as seen:
        layer = (lambda h: F.linear(h, weight)) if called else weight
        token_log_probs(hidden, layer, targets, chunk_tokens=10).sum().backward()
    assert seen.largest == 10 * 200


def test_what_is_kept_for_the_backward_pass_has_no_logits():
    (hidden, weight, _), targets, _, _ = case()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape), lambda _: None):
        token_log_probs(hidden, weight, targets, chunk_tokens=4)
    assert max(math.prod(shape) for shape in kept) == max(hidden.numel(), weight.numel()) < targets.numel() * VOCABULARY


def test_a_frozen_weight_or_body_costs_no_product():
    (hidden, weight, _), targets, _, _ = case()
    products = {}
    for frozen in (None, "weight", "hidden"):
        h = hidden.detach() if frozen == "hidden" else hidden
        w = weight.detach() if frozen == "weight" else weight
        own = token_log_probs(h, w, targets)
        with LargestResult() as seen:
            own.sum().backward()
        products[frozen] = seen.products
    assert products == {None: 3, "weight": 2, "hidden": 2}


def test_no_grad_and_screening():
    (hidden, weight, bias), targets, mask, _ = case()
    with torch.no_grad():
        own = token_log_probs(hidden, weight, targets, bias=bias, mask=mask)
    assert not own.requires_grad
    torch.testing.assert_close(own, full_logits(hidden, weight, bias, targets, mask))


def test_a_graph_can_be_kept_and_used_twice():
    leaves, targets, mask, upstream = case()
    own = token_log_probs(leaves[0], leaves[1], targets, bias=leaves[2], mask=mask, chunk_tokens=4)
    first = torch.autograd.grad((own * upstream).sum(), leaves, retain_graph=True)
    second = torch.autograd.grad((own * upstream).sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_gradient_of_a_gradient_is_refused():
    (hidden, weight, _), targets, _, _ = case()
    with pytest.raises(ValueError, match="gradient of a gradient"):
        torch.autograd.grad(token_log_probs(hidden, weight, targets).sum(), hidden, create_graph=True)
    second = []
    called = token_log_probs(hidden, lambda states: F.linear(states, weight), targets, chunk_tokens=4)
    for log_probs in (called, full_logits(hidden, weight, None, targets, torch.tensor(True))):
        (gradient,) = torch.autograd.grad(log_probs.sum(), hidden, create_graph=True)
        second.append(torch.autograd.grad(gradient.square().sum(), weight)[0])
    torch.testing.assert_close(second[0], second[1], atol=1e-10, rtol=1e-10)


class Adapted(nn.Module):
    """A linear layer with a low-rank adapter beside it, its own weight frozen."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(WIDTH, 2, bias=False, dtype=torch.float64)
        self.up = nn.Linear(2, VOCABULARY, bias=False, dtype=torch.float64)

    def forward(self, states):
        return self.base(states) + self.up(self.down(states))


def test_an_adapted_output_layer_is_called():
    (hidden, _, _), targets, mask, upstream = case()
    base = nn.Linear(WIDTH, VOCABULARY, bias=False, dtype=torch.float64)
    layer = Adapted(base)
    leaves = [hidden, layer.down.weight, layer.up.weight]
    own = values_and_gradients(token_log_probs(hidden, layer, targets, mask=mask, chunk_tokens=4), upstream, leaves)
    merged = base.weight + layer.up.weight @ layer.down.weight
    reference = values_and_gradients(full_logits(hidden, merged, None, targets, mask), upstream, leaves)
    assert_same(own, reference, 1e-10)
    assert base.weight.grad is None


def test_a_hooked_or_patched_linear_layer_is_called():
    hidden, targets = torch.randn(4, WIDTH), torch.zeros(4, dtype=torch.long)
    plain = nn.Linear(WIDTH, VOCABULARY)
    expected = token_log_probs(hidden, lambda h: 2 * plain(h), targets)
    hooked, patched = copy.deepcopy(plain), copy.deepcopy(plain)
    hooked.register_forward_hook(lambda _module, _inputs, output: 2 * output)
    patched.forward = lambda h: 2 * plain(h)
    for layer in (hooked, patched):
        torch.testing.assert_close(token_log_probs(hidden, layer, targets), expected)
    assert not torch.allclose(token_log_probs(hidden, plain, targets), expected)


def test_one_dimension_and_the_size_of_a_default_chunk(monkeypatch):
    (hidden, weight, _), targets, _, _ = case()
    monkeypatch.setattr(logprobs, "CHUNK_LOGITS", 2 * VOCABULARY)
    with LargestResult() as seen:
        own = token_log_probs(hidden[0].detach(), weight.detach(), targets[0])
    assert seen.largest == max(2 * VOCABULARY, weight.numel())
    torch.testing.assert_close(own, full_logits(hidden[0], weight, None, targets[0], torch.tensor(True)).detach())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden": torch.zeros(ROWS, TOKENS + 1, WIDTH)}, "states.:, :-1."),
        ({"hidden": torch.zeros(ROWS, TOKENS, WIDTH, dtype=torch.long)}, "floating"),
        ({"hidden": torch.zeros(ROWS, TOKENS, WIDTH, dtype=torch.bfloat16)}, "one dtype"),
        ({"output_layer": torch.zeros(VOCABULARY, WIDTH + 1)}, "weight has shape"),
        ({"output_layer": torch.zeros(VOCABULARY)}, "weight has shape"),
        ({"output_layer": lambda h: h.sum()}, "the output layer returned"),
        ({"output_layer": nn.Linear(WIDTH, VOCABULARY), "bias": torch.zeros(VOCABULARY)}, "bias goes with a weight"),
        ({"bias": torch.zeros(VOCABULARY - 1)}, "bias has shape"),
        ({"mask": torch.ones(ROWS, TOKENS - 1)}, "mask has shape"),
        ({"targets": torch.zeros(ROWS, TOKENS)}, "targets is torch.float32"),
        ({"targets": torch.full((ROWS, TOKENS), VOCABULARY)}, f"values from {VOCABULARY}"),
        ({"targets": torch.full((ROWS, TOKENS), -100)}, "Mask padding"),
        ({"chunk_tokens": 0}, "chunk_tokens is 0"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"temperature": math.nan}, "temperature is nan"),
    ],
)
def test_wrong_input_is_refused(changed, message):
    given = {
        "hidden": torch.zeros(ROWS, TOKENS, WIDTH),
        "output_layer": torch.zeros(VOCABULARY, WIDTH),
        "targets": torch.zeros(ROWS, TOKENS, dtype=torch.long),
        **changed,
    }
    with pytest.raises(ValueError, match=message):
        token_log_probs(given.pop("hidden"), given.pop("output_layer"), given.pop("targets"), **given)


def test_the_documented_use_with_transformers_runs():
    pytest.importorskip("transformers")
    document = (Path(__file__).parent.parent / "docs" / "large_vocabularies.md").read_text()
    snippet = document.split("```python\n")[1].split("```")[0]
    exec(compile(snippet, "large_vocabularies.md", "exec"), {})
