"""Modules whose gradients are averaged over processes, and what a step has to know of each kind.

A step may fail on one rank, between any two of its collectives. So the wrapper's own collectives are kept out of the
user's function where that can be (DistributedDataParallel), or made up for by the rank that missed them (fully_shard).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class Wrapped:
    """A module whose gradients are averaged over a process group.

    Args:
        module: the module.
        group: the process group.
    """

    shards = False
    """Whether a rank holds only a part of every weight, so that every forward pass runs collectives."""

    def __init__(self, module: Any, group: Any) -> None:
        self.module = module
        self.group = group
        self.device: torch.device = next(module.parameters()).device

    def screening(self) -> AbstractContextManager[None]:
        """Around forward passes without a graph, which should run no collectives if they need not."""
        return nullcontext()

    def begin(self) -> None:
        """Run the collectives that come before the first forward pass with a graph."""

    def forward(self, work: Callable[[], Tensor], own: bool) -> Tensor:
        """Do a forward pass: the policy's `own`, or a draft's, which may run the module or not."""
        raise NotImplementedError

    def averages(self, last: bool) -> bool:
        """Whether the backward pass of a micro-batch runs collectives. The last one does, but for `no_sync()`."""
        return True

    def backward(self, loss: Tensor, last: bool) -> AbstractContextManager[Tensor]:
        """Around the backward pass of a micro-batch, which is of the loss that is handed out; the last one averages."""
        raise NotImplementedError

    def catch_up(self) -> None:
        """Run the collectives that are left of a forward pass that failed on this rank."""

    def abandon(self) -> None:
        """Forget forward passes that will have no backward pass, on every rank, and what they left of the weights."""

    def zero(self) -> None:
        """Set `.grad` to zero."""
        self.module.zero_grad(set_to_none=False)


class Replicated(Wrapped):
    """Under DistributedDataParallel."""

    def __init__(self, module: DistributedDataParallel) -> None:
        super().__init__(module, module.process_group)
        self._called = False

    def screening(self) -> AbstractContextManager[None]:
        # The user's function calls the wrapper, whose forward broadcasts buffers and prepares for a backward pass.
        return mock.patch.object(self.module, "forward", self.module.module.__call__)

    def begin(self) -> None:
        # What the wrapper does before a forward pass: it broadcasts buffers, and once regroups its gradients.
        with self.module.no_sync():
            self._through(torch.zeros((), device=self.device))

    def forward(self, work: Callable[[], Tensor], own: bool) -> Tensor:
        with self.module.no_sync():  # `backward` says which pass averages
            if self._called or not torch.is_grad_enabled():
                return work()
            with _calls_of([self.module]) as calls:
                log_probs = work()
        if not calls:
            raise ValueError(
                "the log-prob function does not call the DistributedDataParallel module, only what is inside it, so "
                "gradients would not be averaged; call the wrapper itself. It has a forward() and no other method: "
                "wrap a module whose forward(rows) returns the log-probs."
            )
        self._called = True
        return log_probs

    def averages(self, last: bool) -> bool:
        # A static graph is recorded in the first backward pass, which has to average; then averaging early is harmless.
        return bool(self.module.require_backward_grad_sync and (last or self.module.static_graph))

    def backward(self, loss: Tensor, last: bool) -> AbstractContextManager[Tensor]:
        # To the wrapper the loss is the output of its forward pass: it prepares to average what led to it.
        return nullcontext(self._through(loss) if self.averages(last) else loss)

    def _through(self, tensor: Tensor) -> Tensor:
        """What the wrapper does around a forward pass, with nothing inside."""
        nothing = nn.Identity()
        nothing.named_buffers = self.module.module.named_buffers  # type: ignore[method-assign]  # on this object alone
        with mock.patch.dict(self.module._modules, module=nothing):
            through: Tensor = self.module(tensor)
        return through


class Sharded(Wrapped):
    """Under fully_shard (FSDP2). Every call averages, so that no gradient can be forgotten."""

    shards = True

    def __init__(self, module: Any) -> None:
        from torch.distributed.fsdp import FSDPModule  # slow to import
        from torch.distributed.tensor import DTensor

        meshes = {p.device_mesh for p in module.parameters() if isinstance(p, DTensor)}
        if len(meshes) != 1 or next(iter(meshes)).ndim != 1:
            shapes = ", ".join(str(tuple(mesh.shape)) for mesh in meshes) or "none"
            raise ValueError(
                f"the module is sharded over meshes of shape {shapes}; expected one mesh of one dimension. Hybrid "
                "sharding and tensor parallelism are not supported: shard over all processes with fully_shard(module)."
            )
        super().__init__(module, meshes.pop().get_group())
        self._parts: list[Any] = [part for part in module.modules() if isinstance(part, FSDPModule)]
        self._orders: dict[bool, list[Any]] = {}  # whose weights the policy's own forward pass gathers, and a draft's
        self._own, self._gathered = True, self._parts  # what the last one was, and whose weights it did gather

    def forward(self, work: Callable[[], Tensor], own: bool) -> Tensor:
        self._own = own
        with _calls_of(self._parts) as self._gathered:
            log_probs = work()
        self._orders[own] = self._gathered
        return log_probs

    @contextmanager
    def backward(self, loss: Tensor, last: bool) -> Iterator[Tensor]:
        self.module.set_requires_gradient_sync(last)
        try:
            yield loss
        finally:
            self.module.set_requires_gradient_sync(True)

    def catch_up(self) -> None:
        runs = self._own or self._gathered  # a draft need not run this module
        order = self._orders.get(self._own, self._parts if runs else [])
        for part in order[len(self._gathered) :]:
            with mock.patch.object(part, "forward", lambda: None), torch.no_grad():  # noqa: PT008  # a plain function
                part()  # gathers its weights, and does nothing with them
        self._gathered = order

    def abandon(self) -> None:
        for part in self._parts:
            part.reshard()
        # Before torch 2.13 there is no such method, and before the first forward pass no state.
        with contextlib.suppress(AttributeError, RuntimeError):
            self.module.reset_iter_state()

    def zero(self) -> None:
        super().zero()
        for part in self._parts:  # what micro-batches before the last have left, which torch keeps to itself
            for group in getattr(part._get_fsdp_state(), "_fsdp_param_groups", ()):
                for parameter in group.fsdp_params:
                    parameter.unsharded_accumulated_grad = None
                    if getattr(parameter, "_unsharded_param", None) is not None:
                        parameter._unsharded_param.grad = None


@contextmanager
def _calls_of(modules: list[Any]) -> Iterator[list[Any]]:
    """Which of some modules are called meanwhile, in order."""
    calls: list[Any] = []
    hooks = [module.register_forward_pre_hook(lambda module, arguments: calls.append(module)) for module in modules]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()
