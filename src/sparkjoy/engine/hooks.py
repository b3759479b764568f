"""Parameters that do something as soon as their gradient has arrived, such as stepping an optimizer."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor


def check_nothing_steps(log_probs: Tensor) -> None:
    """Raise a ValueError where a backward pass from `log_probs` would run a hook of a parameter that has its gradient.

    Before `.grad` is touched. Of several backward passes such a hook would see each gradient in part.

    >>> import torch
    >>> weight = torch.ones(2, requires_grad=True)
    >>> check_nothing_steps(2 * weight)
    >>> _ = weight.register_post_accumulate_grad_hook(lambda parameter: None)
    >>> check_nothing_steps(2 * weight)
    Traceback (most recent call last):
    ValueError: a parameter of shape (2,) has a hook that runs as soon as its gradient has arrived, ...

    Raises:
        ValueError: there is one, whatever it does.
    """
    for leaf in leaves(log_probs):
        # The second is how torch.distributed.optim marks parameters whose optimizer it applies in the backward pass.
        if leaf._post_accumulate_grad_hooks or getattr(leaf, "_in_backward_optimizers", None):
            raise ValueError(
                f"a parameter of shape {tuple(leaf.shape)} has a hook that runs as soon as its gradient has arrived, "
                "such as an optimizer's step, and this batch may take several backward passes: the hook would run once "
                "in each, with a part of the gradient. Leave out micro_batch_size and micro_batch_tokens, or make "
                "them large enough for all rows; or step after the call instead of in a hook."
            )


def leaves(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that a backward pass from `tensor` adds a gradient to."""
    nodes = [] if tensor.grad_fn is None else [tensor.grad_fn]
    met = set(nodes)
    while nodes:
        node = nodes.pop()
        if hasattr(node, "variable"):
            yield node.variable
        for following, _ in node.next_functions:
            if following is not None and following not in met:
                met.add(following)
                nodes.append(following)
