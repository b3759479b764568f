"""The Kondo gate in TRL's GRPOTrainer: change one class name, and an update costs what the kept completions cost.

    from sparkjoy.integrations.trl import KondoGRPOConfig, KondoGRPOTrainer

    KondoGRPOTrainer(model, reward_funcs, args=KondoGRPOConfig(gate_noise=0.3, ...), train_dataset=...).train()

`KondoGRPOMixin` does the same for a GRPOTrainer of your own: `class Mine(KondoGRPOMixin, YourTrainer)`. It needs the
extra: `pip install sparkjoy[trl]`. See docs/trl.md.
"""

from sparkjoy.integrations.trl import available as available
from sparkjoy.integrations.trl.config import KondoGRPOConfig as KondoGRPOConfig
from sparkjoy.integrations.trl.trainer import KondoGRPOMixin as KondoGRPOMixin
from sparkjoy.integrations.trl.trainer import KondoGRPOTrainer as KondoGRPOTrainer

__all__ = ["KondoGRPOConfig", "KondoGRPOMixin", "KondoGRPOTrainer"]
