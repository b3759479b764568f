"""The Kondo gate in TRL's GRPOTrainer: change one class name, and an update costs what the kept completions cost.

    from sparkjoy.integrations.trl import KondoGRPOConfig, KondoGRPOTrainer

    KondoGRPOTrainer(model, reward_funcs, args=KondoGRPOConfig(gate_rate=0.1, ...), train_dataset=...).train()

`KondoGRPOMixin` does the same for a GRPOTrainer of your own: `class Mine(KondoGRPOMixin, YourTrainer)`. It needs the
extra: `pip install sparkjoy[trl]`. See docs/trl.md.
"""

TESTED = "1.16"

try:
    from trl import __version__ as trl_version
except ImportError as error:
    raise ImportError("sparkjoy.integrations.trl needs TRL: pip install sparkjoy[trl]") from error

if not trl_version.startswith(f"{TESTED}."):
    raise ImportError(
        f"sparkjoy.integrations.trl rests on private methods of TRL and is tested with TRL {TESTED}; found {trl_version}. "
        "Install that one: pip install sparkjoy[trl]"
    )

from sparkjoy.integrations.trl.config import KondoGRPOConfig as KondoGRPOConfig
from sparkjoy.integrations.trl.trainer import KondoGRPOMixin as KondoGRPOMixin
from sparkjoy.integrations.trl.trainer import KondoGRPOTrainer as KondoGRPOTrainer

__all__ = ["KondoGRPOConfig", "KondoGRPOMixin", "KondoGRPOTrainer"]
