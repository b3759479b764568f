"""Log-probs of the tokens taken under a large vocabulary, without the logits of every position at once.

An output layer of 50,000 tokens makes a position's logits larger than everything else the model keeps for it. Here only
the positions that count reach the output layer, a chunk at a time; the backward pass computes each chunk's logits again
instead of having kept them. `docs/large_vocabularies.md` has what that costs and saves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparkjoy import checks
from sparkjoy.scores import at_least_float32

OutputLayer = Tensor | Callable[[Tensor], Tensor]
"""A weight (V, d), or what turns hidden states (n, d) into logits (n, V): an `nn.Linear`, or any other callable."""

CHUNK_LOGITS = 2**24
"""Logits of one chunk under a weight where no size is asked for: 64 MiB in float32."""

CHUNK_TOKENS = 256
"""Positions of one chunk under any other output layer, whose vocabulary is not known beforehand."""


def token_log_probs(
    hidden: Tensor,
    output_layer: OutputLayer,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    chunk_tokens: int | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Log-probs of the tokens taken, log softmax(logits / temperature)[target], logits = hidden Wᵀ + bias.

    Values and gradients are those of computing all logits; only the gradient of a gradient is not to be had. The
    softmax is computed in float32 whatever the logits are in.

    >>> head = nn.Linear(8, 1000, bias=False)
    >>> hidden, targets = torch.randn(2, 5, 8, requires_grad=True), torch.randint(1000, (2, 5))
    >>> mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    >>> log_probs = token_log_probs(hidden, head, targets, mask=mask, chunk_tokens=4)
    >>> log_probs.shape, log_probs[0, 3:].tolist()
    (torch.Size([2, 5]), [0.0, 0.0])

    Args:
        hidden: (..., d), the states that predict `targets`: for a causal model `states[:, :-1]` and `tokens[:, 1:]`.
        output_layer: a plain `nn.Linear` or a weight (V, d), such as a tied embedding's, has its gradient written
            out. Any other callable, `(n, d) -> (n, V)`, such as a layer with an adapter or a soft cap, runs once more
            for each chunk in the backward pass.
        targets: (...), the tokens taken, in [0, V) where the mask is 1.
        bias: (V,), only beside a weight.
        mask: (...), 1 where a log-prob is used; anything may stand elsewhere, NaN too. None: everywhere.
        chunk_tokens: positions whose logits exist at once; None: as many as fit in 64 MiB of float32, or
            256 where the output layer is called.
        temperature: what the logits are divided by; the sampler's, above 0.

    Returns:
        The shape of `targets`: float32, or float64 for logits in float64; 0 where the mask is 0.

    Raises:
        ValueError: shapes or dtypes that do not go together, a target outside [0, V), or an option outside its range.
    """
    used = _used_positions(hidden, targets, mask)
    if chunk_tokens is not None:
        chunk_tokens = checks.whole("chunk_tokens", chunk_tokens, "at least 1, or None for a size of its own")
    temperature = checks.number("temperature", temperature, "a number above 0", lambda temperature: temperature > 0)
    weight = output_layer
    if not isinstance(output_layer, Tensor):
        checks.function("output_layer", output_layer, "a weight (V, d), or a callable (n, d) -> (n, V)", hidden)
        if bias is not None:
            raise ValueError("bias goes with a weight; an output layer that is called adds its own.")
        if isinstance(output_layer, nn.Linear) and _is_plain_linear(output_layer):
            weight, bias = output_layer.weight, output_layer.bias
    states = hidden.flatten(0, -2) if hidden.dim() > 1 else hidden.unsqueeze(0)
    taken = targets.flatten()
    if used is not None:
        states, taken = states[used], taken[used]
    if isinstance(weight, Tensor):
        _check_weight(hidden, weight, bias, taken)
        log_probs = _from_weight(states, weight, bias, taken, chunk_tokens, temperature)
    else:
        log_probs = _from_callable(states, weight, taken, chunk_tokens, temperature)
    if used is not None:
        log_probs = log_probs.new_zeros(targets.numel()).index_copy(0, used, log_probs)
    return log_probs.view(targets.shape)


def _from_weight(
    states: Tensor, weight: Tensor, bias: Tensor | None, taken: Tensor, chunk_tokens: int | None, temperature: float
) -> Tensor:
    kind = states.device.type
    if torch.is_autocast_enabled(kind) and states.dtype != torch.float64:
        low = torch.get_autocast_dtype(kind)
        states, weight, bias = states.to(low), weight.to(low), None if bias is None else bias.to(low)
    chunk = chunk_tokens or max(1, CHUNK_LOGITS // weight.shape[0])
    with torch.autocast(kind, enabled=False):
        of_taken = _TokenLogProbs.apply(  # type: ignore[no-untyped-call]  # torch's apply is untyped
            states, weight, bias, taken, chunk, temperature
        )
        return cast(Tensor, of_taken)


class _TokenLogProbs(torch.autograd.Function):
    """Keeps one float32 a position, the logarithm of its softmax's denominator, for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, taken: Tensor, chunk: int, temperature: float
    ) -> Tensor:
        precise = torch.promote_types(states.dtype, torch.float32)
        log_probs = states.new_empty(len(states), dtype=precise)
        log_denominators = torch.empty_like(log_probs)
        for rows, logits in _chunks_of_logits(states, weight, bias, chunk, temperature):
            chosen = logits.gather(1, taken[rows].unsqueeze(1)).squeeze(1)
            largest = logits.amax(dim=1)
            denominators = logits.sub_(largest.unsqueeze(1)).exp_().sum(dim=1)
            log_denominators[rows] = denominators.log_().add_(largest)
            log_probs[rows] = chosen - log_denominators[rows]
        ctx.save_for_backward(states, weight, bias, taken, log_denominators)
        ctx.chunk, ctx.temperature = chunk, temperature
        return log_probs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True; a second derivative would silently miss terms
            raise ValueError(
                "token_log_probs has no gradient of a gradient (create_graph=True); give it a callable output layer, "
                "such as lambda hidden: head(hidden), which has one."
            )
        states, weight, bias, taken, log_denominators = ctx.saved_tensors
        of_states = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        # Summed over chunks in float32: in bfloat16 the later chunks' share would be rounded away.
        of_weight = torch.zeros_like(weight, dtype=log_denominators.dtype) if ctx.needs_input_grad[1] else None
        of_bias = torch.zeros_like(bias, dtype=log_denominators.dtype) if ctx.needs_input_grad[2] else None
        gradient = gradient / ctx.temperature
        for rows, logits in _chunks_of_logits(states, weight, bias, ctx.chunk, ctx.temperature):
            # d log π(taken) / d logits = onehot(taken) − softmax
            of_taken = gradient[rows].unsqueeze(1)
            of_logits = logits.sub_(log_denominators[rows].unsqueeze(1)).exp_().mul_(-of_taken)
            of_logits.scatter_add_(1, taken[rows].unsqueeze(1), of_taken)
            if of_bias is not None:
                of_bias += of_logits.sum(dim=0)
            of_logits = of_logits.to(weight.dtype)
            if of_states is not None:
                torch.mm(of_logits, weight, out=of_states[rows])
            if of_weight is not None and of_weight.dtype == weight.dtype:
                of_weight.addmm_(of_logits.t(), states[rows], beta=0 if rows.start == 0 else 1)
            elif of_weight is not None:
                of_weight += of_logits.t().mm(states[rows])
        return (
            of_states,
            None if of_weight is None else of_weight.to(weight.dtype),
            None if of_bias is None else of_bias.to(bias.dtype),
            None,
            None,
            None,
        )


def _chunks_of_logits(
    states: Tensor, weight: Tensor, bias: Tensor | None, chunk: int, temperature: float
) -> Iterator[tuple[slice, Tensor]]:
    """Chunk by chunk: its rows, and their logits / temperature in at least float32, to be overwritten at will."""
    buffer = states.new_empty(min(chunk, len(states)), weight.shape[0])
    for start in range(0, len(states), chunk):
        rows = slice(start, min(start + chunk, len(states)))
        logits = buffer[: rows.stop - start]
        if bias is None:
            torch.mm(states[rows], weight.t(), out=logits)
        else:
            torch.addmm(bias, states[rows], weight.t(), out=logits)
        logits = at_least_float32(logits)
        yield rows, logits if temperature == 1 else logits.div_(temperature)


def _from_callable(
    states: Tensor,
    output_layer: Callable[[Tensor], Tensor],
    taken: Tensor,
    chunk_tokens: int | None,
    temperature: float,
) -> Tensor:
    """Chunks under activation checkpointing: autograd keeps their states and calls the layer once more."""

    def log_probs(states: Tensor, taken: Tensor) -> Tensor:
        logits = checks.tensor("what output_layer returned", output_layer(states), shape="(n, V)")
        if logits.dim() != 2 or len(logits) != len(states) or not logits.is_floating_point():
            raise ValueError(
                f"the output layer returned {logits.dtype} {tuple(logits.shape)} for {len(states)} states; expected "
                "floating-point logits (n, V)."
            )
        _check_targets(taken, logits.shape[1])
        logits = at_least_float32(logits)
        logits = logits if temperature == 1 else logits / temperature
        return logits.gather(1, taken.unsqueeze(1)).squeeze(1) - logits.logsumexp(dim=1)

    chunk_tokens = chunk_tokens or CHUNK_TOKENS
    parts = []
    for start in range(0, max(1, len(states)), chunk_tokens):
        rows = slice(start, start + chunk_tokens)
        if torch.is_grad_enabled():
            parts.append(checkpoint(log_probs, states[rows], taken[rows], use_reentrant=False))
        else:
            parts.append(log_probs(states[rows], taken[rows]))
    return torch.cat(parts)


def _is_plain_linear(layer: nn.Linear) -> bool:
    """Whether calling `layer` is a product with its weight and nothing else: no subclass, hook or patched forward."""
    if type(layer) is not nn.Linear or "forward" in layer.__dict__:
        return False
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return not any(hooks)


def _used_positions(hidden: Tensor, targets: Tensor, mask: Tensor | None) -> Tensor | None:
    """The flat positions where the mask is 1; None for all. Checks the shapes."""
    checks.tensor("hidden", hidden, shape="(..., d)")
    checks.tensor("targets", targets, shape="(...)", beside=hidden)
    if hidden.dtype not in checks.FLOATING or hidden.dim() != targets.dim() + 1 or hidden.shape[:-1] != targets.shape:
        raise ValueError(
            f"hidden is {hidden.dtype} {tuple(hidden.shape)} and targets {tuple(targets.shape)}; expected floating-"
            "point (..., d) and (...). A causal model's state t predicts token t + 1: states[:, :-1], tokens[:, 1:]."
        )
    if targets.dtype != torch.int64:
        raise ValueError(f"targets is {targets.dtype}; expected token numbers of torch.int64.")
    if mask is None:
        return None
    return checks.mask(mask, targets.shape, "targets").flatten().nonzero().squeeze(1)


def _check_weight(hidden: Tensor, weight: Tensor, bias: Tensor | None, taken: Tensor) -> None:
    for name, tensor in (("output_layer, as a weight,", weight), ("bias", bias)):
        if tensor is not None:
            checks.tensor(name, tensor, (), checks.FLOATING, "(V, d), or (V,) of a bias", hidden)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or len(weight) == 0:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; expected (V, {hidden.shape[-1]}), as hidden has.")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}; expected ({len(weight)},), one per row of the weight.")
    dtypes = {tensor.dtype for tensor in (hidden, weight, bias) if tensor is not None}
    if len(dtypes) > 1 and not torch.is_autocast_enabled(hidden.device.type):
        raise ValueError(
            f"hidden, weight and bias are of {', '.join(sorted(map(str, dtypes)))}; expected one dtype. Convert one, "
            "or use autocast."
        )
    _check_targets(taken, len(weight))


def _check_targets(taken: Tensor, vocabulary: int) -> None:
    if not len(taken):
        return
    least, greatest = (int(extreme) for extreme in taken.aminmax())
    if least < 0 or greatest >= vocabulary:
        raise ValueError(
            f"targets has values from {least} to {greatest}; expected tokens in [0, {vocabulary}) where the mask is 1. "
            "Mask padding."
        )
