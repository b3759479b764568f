"""Modules whose gradients are averaged over processes, and what a step has to know of each kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class Wrapped(Protocol):
    """A module whose gradients are averaged over a process group."""

    group: Any
    device: torch.device

    @property
    def syncs(self) -> bool:
        """Whether a backward pass now averages."""
        ...

    def bypassed(self) -> AbstractContextManager[None]:
        """Let calls of the module be those of what it wraps, where that can be."""
        ...

    def forward(self, work: Callable[[], Tensor]) -> Tensor:
        """Do a forward pass that is to be differentiated."""
        ...

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """Average the gradients in the last backward pass only."""
        ...

    def rest(self) -> None:
        """Leave the parameters as they are between steps, after a step without a backward pass."""
        ...


class Replicated:
    """Under DistributedDataParallel."""

    def __init__(self, module: DistributedDataParallel) -> None:
        self._module = module
        self.group = module.process_group
        self.device = next(module.parameters()).device
        self._seen_forward = False

    @property
    def syncs(self) -> bool:
        return bool(self._module.require_backward_grad_sync)

    @contextmanager
    def bypassed(self) -> Iterator[None]:
        # The caller's function calls the wrapper, whose forward broadcasts buffers and prepares for a backward pass.
        attributes = vars(self._module)
        before = attributes.get("forward")
        attributes["forward"] = self._module.module.__call__
        try:
            yield
        finally:
            if before is None:
                del attributes["forward"]
            else:
                attributes["forward"] = before

    def forward(self, work: Callable[[], Tensor]) -> Tensor:
        if self._seen_forward:
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

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        # A static graph is recorded in the first backward pass, which has to average; then averaging early is harmless.
        return nullcontext() if last or self._module.static_graph else self._module.no_sync()

    def rest(self) -> None:
        pass


class Sharded:
    """Under fully_shard (FSDP2)."""

    syncs = True  # every call's last backward pass reduces, so that none can be forgotten

    def __init__(self, module: nn.Module) -> None:
        from torch.distributed.fsdp import FSDPModule
        from torch.distributed.tensor import DTensor

        self._modules = [part for part in module.modules() if isinstance(part, FSDPModule)]
        meshes = {p.device_mesh for p in module.parameters() if isinstance(p, DTensor)}
        if len(meshes) != 1 or next(iter(meshes)).ndim != 1:
            shapes = ", ".join(str(tuple(mesh.shape)) for mesh in meshes) or "none"
            raise ValueError(
                f"the module is sharded over meshes of shape {shapes}; expected one mesh of one dimension. Hybrid "
                "sharding and tensor parallelism are not supported: shard over all processes with fully_shard(module)."
            )
        self.group = meshes.pop().get_group()
        self.device = next(module.parameters()).device

    def bypassed(self) -> AbstractContextManager[None]:
        return nullcontext()  # no rank has the whole weights, so screening is a meeting too

    def forward(self, work: Callable[[], Tensor]) -> Tensor:
        return work()

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        for part in self._modules:
            part.set_requires_gradient_sync(last, recurse=False)
        try:
            yield
        finally:
            for part in self._modules:
                part.set_requires_gradient_sync(True, recurse=False)

    def rest(self) -> None:
        for part in self._modules:
            part.reshard()
