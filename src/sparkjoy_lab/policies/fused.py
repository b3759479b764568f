"""The log-probs of answers with their backward pass written out: one node of autograd's graph.

At the sizes of small tasks autograd's own work, a node and several views for every operation, costs as much as the
arithmetic. The gradients are the same; only gradients of gradients are not to be had.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sparkjoy_lab.policies.attention import Block
from sparkjoy_lab.policies.rows import Attention, Reading, Saved

if TYPE_CHECKING:
    from sparkjoy_lab.policies.attention import Block
    from sparkjoy_lab.policies.transformer import Transformer

BLOCK_WEIGHTS = 6
KNOWN = (nn.Embedding, nn.LayerNorm, nn.Linear, Block)


def fits_fused(policy: Transformer) -> bool:
    """Whether `fused_log_probs` is right here: on a CPU, not under autocast, and every module one it knows.

    It reads weights without calling their modules, so a module of another kind (an adapter around a linear layer, a
    parametrised weight) or with a hook would be passed by.
    """
    if policy.tokens.weight.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    modules = [policy.tokens, policy.positions, policy.norm, policy.head]
    for block in policy.layers:
        modules += [block, block.attention_norm, block.qkv, block.out, block.feed_forward_norm, block.up, block.down]
    return all(
        type(module) in KNOWN and not module._forward_hooks and not module._forward_pre_hooks for module in modules
    )


def fused_log_probs(policy: Transformer, layers: list[Block], reading: Reading, answers: Tensor) -> Tensor:
    """Log-probs (n, T) of `answers` after what `reading` reads, through the given ones of the policy's layers."""
    weights = [policy.tokens.weight, policy.positions.weight]
    for block in layers:
        weights += [block.attention_norm.weight, block.qkv.weight, block.out.weight]
        weights += [block.feed_forward_norm.weight, block.up.weight, block.down.weight]
    weights += [policy.norm.weight, policy.head.weight]
    taken = _LogProbs.apply(  # type: ignore[no-untyped-call]  # torch's apply is untyped
        reading, answers, policy.norm.eps, *weights
    )
    return cast(Tensor, taken)


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, reading: Reading, answers: Tensor, epsilon: float, *weights: Tensor) -> Tensor:
        tokens, positions, *of_blocks, norm, head = weights
        hidden = torch.embedding(tokens, reading.tokens).add_(torch.embedding(positions, reading.positions))
        saved: list[Tensor] = []
        counts = []
        attentions = reading.attentions(len(of_blocks) // BLOCK_WEIGHTS)
        for number, attention in enumerate(attentions):
            own = of_blocks[BLOCK_WEIGHTS * number : BLOCK_WEIGHTS * (number + 1)]
            hidden, states = _block(hidden, own, attention, epsilon)
            saved += states
            counts.append(len(states))
        states = _head(reading.predicting(hidden), norm, head, epsilon)
        chosen = answers.reshape(-1, 1)
        ctx.save_for_backward(*weights, chosen, *states, *saved)
        ctx.reading, ctx.attentions, ctx.counts = reading, attentions, counts
        return states[-1].gather(1, chosen).view(answers.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[3:]
        weights, saved = ctx.saved_tensors[: len(needed)], ctx.saved_tensors[len(needed) :]
        chosen, *states = saved[:6]
        gradients: list[Tensor | None] = [None] * len(needed)
        of_predicting, *gradients[-2:] = _head_backward(gradient, chosen, states, *weights[-2:])
        reading, end = ctx.reading, len(saved)
        if not any(needed[:-2]):
            return None, None, None, *gradients
        of_hidden = reading.predicting_backward(of_predicting)
        for number in reversed(range(len(ctx.attentions))):
            first = 2 + BLOCK_WEIGHTS * number
            own = slice(first, first + BLOCK_WEIGHTS)
            if not any(needed[: own.stop]):  # everything from here down is frozen
                return None, None, None, *gradients
            begin = end - ctx.counts[number]
            of_hidden, gradients[own] = _block_backward(
                of_hidden, weights[own], saved[begin:end], ctx.attentions[number], needed[own]
            )
            end = begin
        for index, rows in enumerate((reading.tokens, reading.positions)):
            if needed[index]:
                gradients[index] = torch.ops.aten.embedding_dense_backward(
                    of_hidden, rows, weights[index].shape[0], -1, False
                )
        return None, None, None, *gradients


def _block(hidden: Tensor, weights: list[Tensor], attention: Attention, epsilon: float) -> tuple[Tensor, Saved]:
    """The states of the finished rows after a block, and what `_block_backward` needs."""
    attention_norm, qkv, out, feed_forward_norm, up, down = weights
    width = hidden.shape[1:]
    normed, mean, deviation = torch.native_layer_norm(hidden, width, attention_norm, None, epsilon)
    attended, seen = attention.forward(torch.mm(normed, qkv.t()))
    middle = torch.addmm(attention.finished(hidden), attended, out.t())
    renormed, later_mean, later_deviation = torch.native_layer_norm(middle, width, feed_forward_norm, None, epsilon)
    active = torch.mm(renormed, up.t()).relu_()
    after = torch.addmm(middle, active, down.t())
    norms = (hidden, normed, mean, deviation, middle, renormed, later_mean, later_deviation)
    return after, (*norms, attended, active, *seen)


def _block_backward(
    gradient: Tensor, weights: Saved, saved: Saved, attention: Attention, needed: tuple[bool, ...]
) -> tuple[Tensor, list[Tensor | None]]:
    """The gradients of a block's `hidden` and, unless frozen, of its weights."""
    attention_norm, qkv, out, feed_forward_norm, up, down = weights
    hidden, normed, mean, deviation, middle, renormed, later_mean, later_deviation, attended, active, *seen = saved
    of_active = torch.ops.aten.threshold_backward(gradient.mm(down), active, 0)
    of_middle, of_later_norm = _norm_backward(of_active.mm(up), middle, later_mean, later_deviation, feed_forward_norm)
    of_middle += gradient
    of_qkv = attention.backward(of_middle.mm(out), seen)
    of_hidden, of_norm = _norm_backward(of_qkv.mm(qkv), hidden, mean, deviation, attention_norm)
    attention.add_finished(of_hidden, of_middle)
    return of_hidden, [
        of_norm,
        of_qkv.t().mm(normed) if needed[1] else None,
        of_middle.t().mm(attended) if needed[2] else None,
        of_later_norm,
        of_active.t().mm(renormed) if needed[4] else None,
        gradient.t().mm(active) if needed[5] else None,
    ]


def _head(hidden: Tensor, norm: Tensor, head: Tensor, epsilon: float) -> tuple[Tensor, ...]:
    """What `_head_backward` needs, the log-probs of all tokens last."""
    normed, mean, deviation = torch.native_layer_norm(hidden, hidden.shape[1:], norm, None, epsilon)
    return hidden, normed, mean, deviation, torch.log_softmax(torch.mm(normed, head.t()), 1)


def _head_backward(
    gradient: Tensor, chosen: Tensor, saved: list[Tensor], norm: Tensor, head: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the states that predict tokens, of the norm's weight and of the head's."""
    hidden, normed, mean, deviation, log_probs = saved
    of_log_probs = torch.zeros_like(log_probs).scatter_(1, chosen, gradient.reshape(-1, 1))
    of_logits = torch._log_softmax_backward_data(of_log_probs, log_probs, 1, log_probs.dtype)
    of_hidden, of_norm = _norm_backward(of_logits.mm(head), hidden, mean, deviation, norm)
    return of_hidden, of_norm, of_logits.t().mm(normed)


def _norm_backward(
    gradient: Tensor, states: Tensor, mean: Tensor, deviation: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of a norm's input and weight."""
    of_states, of_weight, _ = torch.ops.aten.native_layer_norm_backward(
        gradient, states, states.shape[1:], mean, deviation, weight, None, [True, True, False]
    )
    return of_states, of_weight
