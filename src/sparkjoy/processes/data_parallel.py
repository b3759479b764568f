"""Modules whose gradients are averaged over processes, and what a step has to know of each kind.

A step may fail on one process, between any two meetings of all. So the wrapper's own meetings are kept out of the
user's function where that can be (DistributedDataParallel), and else caught up with by who missed them (fully_shard).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class Replicated:
    """Under DistributedDataParallel."""

    forward_meets = False
    """Whether every forward pass is a meeting of all processes."""
    shards = False
    """Whether a process has only a part of every gradient."""

    def __init__(self, module: DistributedDataParallel) -> None:
        self._module = module
        self.group = module.process_group
        self.device = next(module.parameters()).device
        self._seen_forward = False

    @property
    def syncs(self) -> bool:
        """Whether a backward pass now averages."""
        return bool(self._module.require_backward_grad_sync)

    def parameters(self) -> list[Tensor]:
        """All of the module's."""
        return list(self._module.parameters())

    @contextmanager
    def bypassed(self) -> Iterator[None]:
        """Let calls of the module be those of what it wraps, where that can be."""
        # The caller's function calls the wrapper, whose forward broadcasts buffers and prepares for a backward pass.
        with _replaced(vars(self._module), "forward", self._module.module.__call__):
            yield

    def begin(self) -> None:
        """Meet before the first forward pass that is to be differentiated."""
        # The wrapper's own meetings before a forward pass: it broadcasts buffers, and once regroups its gradients.
        with self._module.no_sync():
            self._through(torch.zeros((), device=self.device))

    def forward(self, work: Callable[[], Tensor]) -> Tensor:
        """Do a forward pass; none is to be averaged before `backward` says so."""
        with self._module.no_sync():
            if self._seen_forward or not torch.is_grad_enabled():
                return work()

            seen: list[nn.Module] = []
            handle = self._module.register_forward_pre_hook(lambda module, arguments: seen.append(module))
            try:
                log_probs = work()
            finally:
                handle.remove()
        if not seen:
            raise ValueError(
                "the log-prob function does not call the DistributedDataParallel module, only what is inside it, so "
                "gradients would not be averaged; call the wrapper itself. It has a forward() and no other method: "
                "wrap a module whose forward(rows) returns the log-probs."
            )
        self._seen_forward = True
        return log_probs

    def meets(self, last: bool) -> bool:
        """Whether the backward pass of a micro-batch is a meeting."""
        # A static graph is recorded in the first backward pass, which has to average; then averaging early is harmless.
        return self.syncs and (last or bool(self._module.static_graph))

    @contextmanager
    def backward(self, loss: Tensor, last: bool) -> Iterator[Tensor]:
        """Around a backward pass, of the loss that is handed out; the last one averages."""
        # To the wrapper the loss is the output of its forward pass: it prepares to average what led to it.
        yield self._through(loss) if self.meets(last) else loss

    def catch_up(self) -> None:
        """Do what is left of the meetings of a forward pass that failed here."""

    def abandon(self) -> None:
        """Forget forward passes without a backward pass, on every process."""

    def zero(self) -> None:
        """Zero what is in `.grad`."""
        _zero(self._module)

    def rest(self) -> None:
        """Leave the parameters as they are between steps, after a step without a backward pass."""

    def _through(self, tensor: Tensor) -> Tensor:
        """What the wrapper does around a forward pass, with nothing inside."""
        nothing = nn.Identity()
        nothing.named_buffers = self._module.module.named_buffers  # type: ignore[method-assign]  # on this object alone
        with _replaced(self._module._modules, "module", nothing):
            through: Tensor = self._module(tensor)
        return through


class Sharded:
    """Under fully_shard (FSDP2); what its methods are for is said in `Replicated`."""

    forward_meets = shards = True
    syncs = True  # every call's last backward pass reduces, so that none can be forgotten

    def __init__(self, module: nn.Module) -> None:
        from torch.distributed.fsdp import FSDPModule
        from torch.distributed.tensor import DTensor

        self._module = module
        self._parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
        meshes = {p.device_mesh for p in module.parameters() if isinstance(p, DTensor)}
        if len(meshes) != 1 or next(iter(meshes)).ndim != 1:
            shapes = ", ".join(str(tuple(mesh.shape)) for mesh in meshes) or "none"
            raise ValueError(
                f"the module is sharded over meshes of shape {shapes}; expected one mesh of one dimension. Hybrid "
                "sharding and tensor parallelism are not supported: shard over all processes with fully_shard(module)."
            )
        self.group = meshes.pop().get_group()
        self.device = next(module.parameters()).device
        self._order: list[Any] = list(self._parts)  # in which a forward pass gathers them
        self._entered: list[Any] | None = None  # in the forward pass that runs now

    def parameters(self) -> list[Tensor]:
        return list(self._module.parameters())

    def bypassed(self) -> AbstractContextManager[None]:
        return nullcontext()  # no rank has the whole weights, so screening is a meeting too

    def begin(self) -> None:
        pass

    def forward(self, work: Callable[[], Tensor]) -> Tensor:
        entered: list[Any] = []
        self._entered = entered
        hooks = [part.register_forward_pre_hook(lambda part, arguments: entered.append(part)) for part in self._parts]
        try:
            log_probs = work()
        finally:
            for hook in hooks:
                hook.remove()
        self._order, self._entered = entered, None
        return log_probs

    def meets(self, last: bool) -> bool:
        return True

    @contextmanager
    def backward(self, loss: Tensor, last: bool) -> Iterator[Tensor]:
        for part in self._parts:
            part.set_requires_gradient_sync(last, recurse=False)
        try:
            yield loss
        finally:
            for part in self._parts:
                part.set_requires_gradient_sync(True, recurse=False)

    def catch_up(self) -> None:
        if self._entered is None:
            return
        for part in self._order[len(self._entered) :]:
            with _replaced(vars(part), "forward", lambda: None), torch.no_grad():
                part()  # gathers its weights, and does nothing with them
        self._entered = None

    def abandon(self) -> None:
        from torch.distributed.fsdp import FSDPModule

        reset = getattr(FSDPModule, "reset_iter_state", None)  # torch has it since 2.13
        with contextlib.suppress(RuntimeError, AttributeError):  # before the first forward pass there is no state
            reset(self._module) if reset else self.rest()

    def zero(self) -> None:
        _zero(self._module)
        for part in self._parts:  # what micro-batches before the last have left, which torch keeps to itself
            for group in getattr(part._get_fsdp_state(), "_fsdp_param_groups", ()):
                for parameter in group.fsdp_params:
                    parameter.unsharded_accumulated_grad = None
                    if getattr(parameter, "_unsharded_param", None) is not None:
                        parameter._unsharded_param.grad = None

    def rest(self) -> None:
        for part in self._parts:
            part.reshard()


Wrapped = Replicated | Sharded
"""A module whose gradients are averaged over a process group."""


def _zero(module: nn.Module) -> None:
    for parameter in module.parameters():
        if parameter.grad is not None:
            parameter.grad.detach_().zero_()


@contextmanager
def _replaced(attributes: dict[str, Any], name: str, value: Any) -> Iterator[None]:
    """With another value in a dictionary of attributes."""
    had, before = name in attributes, attributes.get(name)
    attributes[name] = value
    try:
        yield
    finally:
        if had:
            attributes[name] = before
        else:
            del attributes[name]
