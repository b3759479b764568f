"""A trainer's gate in its checkpoints, so that a resumed run decides as an unbroken one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from sparkjoy.gates import Gate
from sparkjoy.integrations.gates import load_gate, save_gate


class GateInCheckpoints(Trainer):
    """Writes the gate's state into every checkpoint, and takes it up where a run is resumed from one."""

    _gate: Gate | None
    _gate_draws = False
    """Whether its generator's state goes with it: not where that is seeded anew for every decision."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            self._save_gate(
                Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:  # on every process, so that what does not fit is raised on all
            self._load_gate(Path(checkpoint))

    def _save_gate(self, folder: Path) -> None:
        if self._gate is not None:
            save_gate(self._gate, folder, self._gate_draws)

    def _load_gate(self, folder: Path) -> None:
        load_gate(self._gate, folder, self._gate_draws)
