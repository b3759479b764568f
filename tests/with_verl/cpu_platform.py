"""The CPU as one of verl's platforms, registered as its plugins are, so that its engines run in a test."""

import contextlib
import os
import types

import torch
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry

MODULE = types.SimpleNamespace(
    **{name: lambda *_, **__: 0 for name in ("max_memory_allocated", "max_memory_reserved", "memory_allocated")},
    **{
        name: lambda *_, **__: None
        for name in ("synchronize", "empty_cache", "set_device", "manual_seed", "ipc_collect")
    },
    memory_reserved=lambda *_, **__: 0,
    mem_get_info=lambda *_, **__: (1, 1),
    current_device=lambda: "cpu",
    device_count=lambda: 1,
    is_available=lambda: True,
    get_device_name=lambda *_: "CPU",
    get_rng_state=torch.get_rng_state,
    set_rng_state=torch.set_rng_state,
)


def _nothing(*_, **__):
    return None


INIT = torch.distributed.init_process_group


def _init_process_group(backend=None, **named):
    """verl names the CPU's backend and the device's, which torch takes for two of one device."""
    return INIT("gloo" if backend == "cpu:gloo,cpu:gloo" else backend, **named)


torch.distributed.init_process_group = _init_process_group


@PlatformRegistry.register(platform="cpu")
class CPU(PlatformBase):
    device_name = "cpu"
    vendor_name = "none"
    device_module = MODULE

    def is_available(self):
        return True

    def current_device(self):
        return "cpu"

    def device_count(self):
        return os.cpu_count()

    set_device = synchronize = manual_seed = manual_seed_all = set_allocator_settings = empty_cache = _nothing
    profiler_start = profiler_stop = cudart = _nothing

    def get_device_capability(self, device_index=0):
        return None, None

    def communication_backend_name(self):
        return "gloo"

    def visible_devices_envvar(self):
        return "NO_DEVICES_TO_SEE"

    @contextlib.contextmanager
    def nvtx_range(self, msg):
        yield

    def ray_resource_name(self):
        return "GPU"  # what verl asks Ray for; ray.init is told that there are some

    def ray_noset_envvars(self):
        return []

    def is_ipc_supported(self):
        return False
