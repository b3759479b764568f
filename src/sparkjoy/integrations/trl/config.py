"""What TRL's GRPOConfig is asked besides, and which of its options the gate does not go with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from trl import GRPOConfig

from sparkjoy import checks
from sparkjoy.gates import Gate
from sparkjoy.integrations.gates import gate_of

UNCLIPPED_LOSSES = ("cispo", "sapo", "vespo")


@dataclass
class KondoGRPOConfig(GRPOConfig):
    """TRL's `GRPOConfig` with the gate's options and `share_tokens`; with none of them set it is exactly TRL's.

    >>> config = KondoGRPOConfig(gate_noise=0.3, report_to="none", use_cpu=True, bf16=False)
    >>> config.gated
    True

    Raises:
        ValueError: an option outside its range, or one of TRL's that the gate does not go with.
    """

    share_tokens: bool = field(
        default=False,
        metadata={
            "help": "Compute tokens that rows have in common once: a prompt's in all its completions, and equal "
            "completions', in every pass over rows and while transformers samples. Log-probs and gradients are TRL's "
            "up to rounding. With or without a gate."
        },
    )
    gate_noise: float | None = field(
        default=None,
        metadata={
            "help": "Noise that skipping may add to the gradient, as a multiple of the batch's own: start with 0.3. "
            "Completions are kept at random, in proportion to how far each would move the policy, and weighted, so "
            "that the expected gradient is TRL's own. How many are kept, the gate finds by itself: it takes no rate."
        },
    )
    gate_rate: float | None = field(
        default=None,
        metadata={
            "help": "Fraction of the completions of a generation batch, over all processes, that get a backward pass: "
            "those of greatest delight, negative ones too where positive ones are too few. 1 is TRL's own trainer."
        },
    )
    gate_price: float | None = field(
        default=None,
        metadata={
            "help": "Keep only completions whose delight, in units of the reward times nats, is above this. 0 keeps "
            "what did better than its group and needs no log-probs. With `gate_rate`: first the price, then the rate."
        },
    )
    gate_negative_share: float = field(
        default=0.0,
        metadata={"help": "Fraction of the kept completions reserved for the most negative delights."},
    )
    gate_score: Literal["delight", "advantage", "absolute-advantage", "uniform"] = field(
        default="delight",
        metadata={
            "help": "What completions are ranked by. The others are there to compare with: 'uniform' keeps at random; "
            "'absolute-advantage' with `gate_price=0` drops what has no advantage, and changes no gradient."
        },
    )
    gate_advantages: Literal["centred", "trl"] = field(
        default="centred",
        metadata={
            "help": "Advantage that a rate or price ranks by; the loss always has TRL's. 'centred': reward less its "
            "group's mean. 'trl': TRL's own, divided by the group's standard deviation by default, which favours a "
            "lone success in a homogeneous group."
        },
    )
    gate_log_probs: Literal["auto", "exact", "none"] = field(
        default="auto",
        metadata={
            "help": "Where log-probs to decide on come from. 'auto': those there are, of the sampler (recorded while "
            "transformers generates) or of the pass that corrects vLLM's, else a pass without a graph, or none under "
            "`gate_noise`, which then goes by advantage and length. 'exact': never the sampler's. 'none', with "
            "`gate_noise`: record and compute none."
        },
    )
    gate_parts: str | None = field(
        default=None,
        metadata={
            "help": "Column of the dataset that says which part of it a prompt belongs to, such as a topic. By default "
            "each prompt is one. Parts of which nothing is kept any more are counted in the log and warned of."
        },
    )
    gate_empty_step: Literal["skip", "momentum"] = field(
        default="skip",
        metadata={
            "help": "An optimizer step without any kept completion. 'skip': weights stay. 'momentum': a gradient of "
            "zero, as TRL has with all advantages zero, so that Adam's momentum still moves them."
        },
    )
    gate_pack_for: Literal["speed", "memory"] = field(
        default="speed",
        metadata={
            "help": "How the kept completions of an optimizer step are packed. 'speed': into as few micro-batches as "
            "hold them. 'memory': spread over its micro-batches, so that the largest has the fewest tokens that it "
            "can: peak memory falls with what is kept, at more and smaller passes."
        },
    )
    gate_dg: Literal["token", "sample"] | None = field(
        default=None,
        metadata={
            "help": "Weight kept terms by sigmoid(delight / gate_dg_temperature), as the Delightful Policy Gradient "
            f"does, of the token or of the whole completion. For {', '.join(UNCLIPPED_LOSSES)} only."
        },
    )
    gate_compare_every: int | None = field(
        default=None,
        metadata={
            "help": "At every n-th optimizer step, compute TRL's own gradient of all their completions too, and "
            "log how near the gated one comes to it; it warns, once, if the last 20 comparisons say that the gate "
            "hurts. The step stays as it is; a compared one costs a dense step besides. On one process only."
        },
    )
    gate_dg_temperature: float = field(default=1.0, metadata={"help": "Temperature of `gate_dg`."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in {
            "gate_score": ("delight", "advantage", "absolute-advantage", "uniform"),
            "gate_advantages": ("centred", "trl"),
            "gate_log_probs": ("auto", "exact", "none"),
            "gate_empty_step": ("skip", "momentum"),
            "gate_pack_for": ("speed", "memory"),
            "gate_dg": (None, "token", "sample"),
        }.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(map(repr, allowed))}.")
        if self.gate_noise is not None and (self.gate_negative_share or self.gate_score != "delight"):
            raise ValueError(
                "gate_noise keeps completions by how far each would move the policy; leave gate_negative_share and "
                "gate_score as they are, or give gate_rate instead."
            )
        if self.gate_noise is None and self.gate_log_probs == "none":
            raise ValueError("gate_log_probs='none' goes with gate_noise; a delight needs the log-probs of some rows.")
        if self.gate_compare_every is not None:
            self.gate_compare_every = checks.whole(
                "gate_compare_every", self.gate_compare_every, "a whole number of steps, or none for never"
            )
        of_a_gate = {"gate_negative_share": 0, "gate_pack_for": "speed", "gate_compare_every": None}
        idle = [name for name, unset in of_a_gate.items() if getattr(self, name) != unset]
        if self.gate() is None and idle:
            raise ValueError(
                f"{idle[0]}={getattr(self, idle[0])!r} is set without a gate; give gate_noise, gate_rate or gate_price."
            )
        temperature, expected = self.gate_dg_temperature, "a number above 0"
        self.gate_dg_temperature = checks.number("gate_dg_temperature", temperature, expected, lambda eta: eta > 0)
        if self.gate_dg is not None and self.loss_type not in UNCLIPPED_LOSSES:
            raise ValueError(
                f"gate_dg weights the terms of an unclipped loss, and loss_type={self.loss_type!r} is clipped: choose "
                f"one of {', '.join(UNCLIPPED_LOSSES)}, or leave gate_dg out and let the gate alone choose."
            )
        if self.gated:
            self.refuse_with(self.gate())
        elif self.share_tokens:
            self._refuse_what_looks_at_micro_batches(
                "share_tokens=True makes other micro-batches", "with share_tokens=False"
            )

    def gate(self) -> Gate | None:
        """The gate these options describe; None when none is asked for."""
        return gate_of(self.gate_noise, self.gate_rate, self.gate_price, self.gate_negative_share)

    @property
    def gated(self) -> bool:
        """Whether completions are skipped at all: not without a gate, nor at rate 1 without a price."""
        gate = self.gate()
        rule = getattr(gate, "rule", None)
        return gate is not None and not (rule is not None and rule.keeps_everything)

    def refuse_with(self, gate: Gate | None) -> None:
        """Raise a ValueError where one of TRL's options does not go with this gate."""
        instead = "gate_noise=0.3, which weights them, or without a gate"
        if self.beta != 0 and not getattr(gate, "weighted", None):
            raise ValueError(
                f"beta={self.beta}: the KL term needs the gradient of every completion, and the gate skips most. Set "
                f"beta=0 and take the KL off the reward, or train with {instead}."
            )
        if self.entropy_coef != 0 and not getattr(gate, "weighted", None):
            raise ValueError(
                "the entropy bonus needs the gradient of every completion, and the gate skips most. Set "
                f"entropy_coef=0, or train with {instead}."
            )
        self._refuse_what_looks_at_micro_batches("the gate skips most completions", "without a gate")

    def _refuse_what_looks_at_micro_batches(self, why: str, without: str) -> None:
        if self.use_adaptive_entropy:
            raise ValueError(
                f"use_adaptive_entropy follows the entropy of each micro-batch's completions, and {why}. Set "
                f"use_adaptive_entropy=False, or train {without}."
            )
        if self.top_entropy_quantile < 1:
            raise ValueError(
                f"top_entropy_quantile={self.top_entropy_quantile}: its threshold is a quantile over the tokens of "
                f"each micro-batch's completions, and {why}. Set top_entropy_quantile=1, or train {without}."
            )
