"""A sampler in vLLM's place, for verl's own trainer on a CPU: transformers, on the weights that the actor sends."""

import os
from pathlib import Path

import ray
import torch
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
from verl.workers.rollout import base, replica

# verl's own engine, which the reference runs in: verl has none for a CPU, and for other devices this line is in it.
EngineRegistry.register("language_model", ["fsdp", "fsdp2"], device="cpu")(FSDPEngineWithLMHead)
torch.Tensor.pin_memory = lambda self, *_: self  # the reference's weights wait in pinned memory
base._ROLLOUT_REGISTRY["stub", "async"] = "stub_rollout.Adapter"


class Adapter(base.BaseRollout):
    """In the actor's worker: leaves its weights in a file."""

    async def resume(self, tags):
        pass

    async def release(self):
        pass

    async def update_weights(self, weights, **_):
        state = {name: value.detach().clone() for name, value in weights}
        if torch.distributed.get_rank() == 0:
            path = weights_file(self.model_config.path)
            torch.save(state, path.with_suffix(".new"))
            path.with_suffix(".new").rename(path)
        torch.distributed.barrier()


def weights_file(folder):
    return Path(folder) / "sent.pt"


@ray.remote(num_cpus=0)
class Server:
    """Samples token by token."""

    def __init__(self, folder, length):
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(1)
        torch.manual_seed(os.getpid())
        self.folder, self.length, self.read = folder, length, None
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    @torch.no_grad()
    def generate(self, request_id, prompt_ids, sampling_params, **_):
        path = weights_file(self.folder)
        if path.exists() and self.read != path.stat().st_mtime_ns:
            self.read = path.stat().st_mtime_ns
            self.model.load_state_dict(torch.load(path))
        ids, log_probs = torch.tensor([list(prompt_ids)]), []
        for _ in range(self.length):
            logits = self.model(ids).logits[0, -1].log_softmax(-1)
            token = logits.exp().multinomial(1)
            ids, log_probs = torch.cat([ids, token[None]], dim=1), [*log_probs, float(logits[token])]
        return replica.TokenOutput(
            token_ids=ids[0, len(prompt_ids) :].tolist(), log_probs=log_probs, stop_reason="completed",
            extra_fields={"global_steps": 0},
        )  # fmt: skip

    def nothing(self, *_, **__):
        pass

    wake_up = sleep = abort_all_requests = resume_generation = clear_kv_cache = nothing


class Replica(replica.RolloutReplica):
    async def launch_servers(self):
        server = Server.remote(self.model_config.path, self.config.response_length)
        self.servers, self._server_handle, self._server_address = [server], server, f"stub-{self.replica_rank}"


replica.RolloutReplicaRegistry.register("stub", lambda: Replica)
