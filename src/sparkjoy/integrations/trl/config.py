"""What TRL's configs are asked besides, and which of TRL's options the gate does not go with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from trl import GRPOConfig

from sparkjoy import checks
from sparkjoy.gates import Gate
from sparkjoy.gates.decision import weighs
from sparkjoy.integrations.gates import gate_of, refuse

UNCLIPPED_LOSSES = ("cispo", "sapo", "vespo")
CHOICES: dict[str, tuple[str | None, ...]] = {
    "gate_score": ("delight", "advantage", "absolute-advantage", "uniform"),
    "gate_advantages": ("centred", "trl"),
    "gate_log_probs": ("auto", "exact", "none"),
    "gate_empty_step": ("skip", "momentum"),
    "gate_pack_for": ("speed", "memory"),
    "gate_dg": (None, "token", "sample"),
}


def option(default: Any, text: str) -> Any:
    """A field of a config: its default, and what `--help` says of it."""
    return field(default=default, metadata={"help": text})


@dataclass
class GateOptions:
    """The options that say which gate, of both trainers."""

    gate_noise: float | None = option(
        None,
        "Noise that skipping may add to the gradient, as a multiple of the batch's own: start with 0.3. Completions "
        "are kept at random, in proportion to how far each would move the policy, and weighted, so that the expected "
        "gradient is TRL's own. How many are kept, the gate finds by itself: it takes no rate. 0 skips only what has "
        "no gradient, such as groups of equal rewards.",
    )
    gate_rate: float | None = option(
        None,
        "Fraction of the completions to keep of those that are decided on together: a generation batch over all "
        "processes, or a micro-batch of the asynchronous trainer. Those of greatest delight, negative ones too where "
        "positive ones are too few. 1 is TRL's own trainer.",
    )
    gate_price: float | None = option(
        None,
        "Keep only completions whose delight, in units of the reward times nats, is above this. 0 keeps what did "
        "better than its group and needs no log-probs. With `gate_rate`: first the price, then the rate.",
    )


@dataclass
class KondoGRPOConfig(GateOptions, GRPOConfig):
    """TRL's `GRPOConfig` with the gate's options and `share_tokens`; with none of them set it is exactly TRL's.

    >>> config = KondoGRPOConfig(gate_noise=0.3, report_to="none", use_cpu=True, bf16=False)
    >>> config.gate()
    UnbiasedGate(noise=0.3)

    Raises:
        ValueError: an option outside its range, or one of TRL's that the gate does not go with.
    """

    share_tokens: bool = option(
        False,
        "Compute tokens that rows have in common once: a prompt's in all its completions, and equal completions', in "
        "every pass over rows and while transformers samples. Log-probs and gradients are TRL's up to rounding. With "
        "or without a gate.",
    )
    gate_negative_share: float = option(
        0.0, "Fraction of the kept completions reserved for the most negative delights."
    )
    gate_score: Literal["delight", "advantage", "absolute-advantage", "uniform"] = option(
        "delight",
        "What completions are ranked by. The others are there to compare with: 'uniform' keeps at random; "
        "'absolute-advantage' with `gate_price=0` drops what has no advantage, and changes no gradient.",
    )
    gate_advantages: Literal["centred", "trl"] = option(
        "centred",
        "Advantage that a rate or price ranks by; the loss always has TRL's. 'centred': reward less its group's mean. "
        "'trl': TRL's own, divided by the group's standard deviation by default, which favours a lone success in a "
        "homogeneous group.",
    )
    gate_log_probs: Literal["auto", "exact", "none"] = option(
        "auto",
        "Where log-probs to decide on come from. 'auto': those there are, of the sampler (recorded while transformers "
        "generates) or of the pass that corrects vLLM's, else a pass without a graph, or none under `gate_noise`, "
        "which then goes by advantage and length. 'exact': never the sampler's. 'none', with `gate_noise`: record and "
        "compute none.",
    )
    gate_parts: str | None = option(
        None,
        "Column of the dataset that says which part of it a prompt belongs to, such as a topic. By default each prompt "
        "is one. Parts of which nothing is kept any more are counted in the log and warned of.",
    )
    gate_empty_step: Literal["skip", "momentum"] = option(
        "skip",
        "An optimizer step without any kept completion. 'skip': weights stay. 'momentum': a gradient of zero, as TRL "
        "has with all advantages zero, so that Adam's momentum still moves them.",
    )
    gate_pack_for: Literal["speed", "memory"] = option(
        "speed",
        "How the kept completions of an optimizer step are packed. 'speed': into as few micro-batches as hold them. "
        "'memory': spread over its micro-batches, so that the largest has the fewest tokens that it can: peak memory "
        "falls with what is kept, at more and smaller passes.",
    )
    gate_dg: Literal["token", "sample"] | None = option(
        None,
        "Weight kept terms by sigmoid(delight / gate_dg_temperature), as the Delightful Policy Gradient does, of the "
        f"token or of the whole completion. For {', '.join(UNCLIPPED_LOSSES)} only.",
    )
    gate_compare_every: int | None = option(
        None,
        "At every n-th optimizer step, compute TRL's own gradient of all their completions too, and log how near the "
        "gated one comes to it; it warns, once, if the last 20 comparisons say that the gate hurts. The step stays as "
        "it is; a compared one costs a dense step besides. On one process only.",
    )
    gate_dg_temperature: float = option(1.0, "Temperature of `gate_dg`.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in CHOICES.items():
            checks.choice(name, getattr(self, name), allowed)
        if self.gate_compare_every is not None:
            steps = "a whole number of steps, or none for never"
            self.gate_compare_every = checks.whole("gate_compare_every", self.gate_compare_every, steps)
        self.gate_dg_temperature = checks.number(
            "gate_dg_temperature", self.gate_dg_temperature, "a number above 0", lambda eta: eta > 0
        )
        if self.gate_dg is not None and self.loss_type not in UNCLIPPED_LOSSES:
            raise ValueError(
                f"gate_dg weights the terms of an unclipped loss, and loss_type={self.loss_type!r} is clipped: choose "
                f"one of {', '.join(UNCLIPPED_LOSSES)}, or leave gate_dg out and let the gate alone choose."
            )
        if self.gate_negative_share and self.gate_rate is None and self.gate_price is None:
            raise ValueError(
                f"gate_negative_share={self.gate_negative_share!r} is a share of what gate_rate or gate_price keeps; "
                "give one of them, or leave gate_negative_share at 0."
            )
        gate = self.gate()
        if gate is not None:
            self.refuse_with(gate)
        if self.share_tokens:
            self._refuse_statistics("share_tokens=True makes other micro-batches", "with share_tokens=False")

    def gate(self) -> Gate | None:
        """The gate these options describe; None where none is asked for, or it would skip nothing (rate 1)."""
        return gate_of(self.gate_noise, self.gate_rate, self.gate_price, self.gate_negative_share)

    def refuse_with(self, gate: Gate) -> None:
        """Raise a ValueError where one of the options, TRL's or the gate's, does not go with this gate."""
        weighted = weighs(gate)
        instead = "gate_noise=0.3, which weights them, or without a gate"
        reasons = {
            f"{gate!r} keeps completions by how far each would move the policy; leave gate_score as it is, or give "
            "gate_rate instead.": weighted and self.gate_score != "delight",
            "gate_log_probs='none' goes with gate_noise; a delight needs the log-probs of some rows.": (
                not weighted and self.gate_log_probs == "none"
            ),
            f"beta={self.beta}: the KL term needs the gradient of every completion, and the gate skips most. Set "
            f"beta=0 and take the KL off the reward, or train with {instead}.": not weighted and self.beta != 0,
            "the entropy bonus needs the gradient of every completion, and the gate skips most. Set entropy_coef=0, "
            f"or train with {instead}.": not weighted and self.entropy_coef != 0,
        }
        refuse(reasons)
        self._refuse_statistics("the gate skips most completions", "without a gate")

    def refuse_without_a_gate(self) -> None:
        """Raise a ValueError where an option is set to what only a gate gives a meaning."""
        idle = {"gate_pack_for": ("speed",), "gate_compare_every": (None,), "gate_log_probs": ("auto", "exact")}
        for name, values in idle.items():
            if getattr(self, name) not in values and self.gate_rate is None:  # at rate 1 there is none either
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is set without a gate; give gate_noise, gate_rate or gate_price."
                )

    def _refuse_statistics(self, why: str, without: str) -> None:
        """Of micro-batches, which are others under the gate and with shared tokens."""
        reasons = {
            f"use_adaptive_entropy follows the entropy of each micro-batch's completions, and {why}. Set "
            f"use_adaptive_entropy=False, or train {without}.": self.use_adaptive_entropy,
            f"top_entropy_quantile={self.top_entropy_quantile}: its threshold is a quantile over the tokens of each "
            f"micro-batch's completions, and {why}. Set top_entropy_quantile=1, or train {without}.": (
                self.top_entropy_quantile < 1
            ),
        }
        refuse(reasons)
