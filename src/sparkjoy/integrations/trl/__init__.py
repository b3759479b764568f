"""The Kondo gate in TRL's GRPOTrainer: change one class name, and an update costs what the kept completions cost.

    from sparkjoy.integrations.trl import KondoGRPOConfig, KondoGRPOTrainer

    KondoGRPOTrainer(model, reward_funcs, args=KondoGRPOConfig(gate_noise=0.3, ...), train_dataset=...).train()

`KondoGRPOMixin` does the same for a GRPOTrainer of your own: `class Mine(KondoGRPOMixin, YourTrainer)`. It needs the
extra: `pip install sparkjoy[trl]`. See docs/trl.md.
"""

OLDEST, NEXT = (1, 10), (1, 17)

try:
    from trl import __version__ as found
except ImportError as error:
    raise ImportError("sparkjoy.integrations.trl needs TRL: pip install sparkjoy[trl]") from error

if not OLDEST <= tuple(int(part) for part in found.split(".")[:2]) < NEXT:
    raise ImportError(
        "sparkjoy.integrations.trl rests on private methods of TRL, tested in TRL 1.10 to 1.16; found "
        f"{found}. Install one of those: pip install sparkjoy[trl]"
    )

from sparkjoy.integrations.trl.config import KondoGRPOConfig as KondoGRPOConfig  # noqa: E402
from sparkjoy.integrations.trl.trainer import KondoGRPOMixin as KondoGRPOMixin  # noqa: E402
from sparkjoy.integrations.trl.trainer import KondoGRPOTrainer as KondoGRPOTrainer  # noqa: E402

__all__ = ["KondoGRPOConfig", "KondoGRPOMixin", "KondoGRPOTrainer"]
