"""What commands of `sparkjoy` there are, and which one a line names."""

from __future__ import annotations

from difflib import get_close_matches

COMMANDS = {
    "train mnist": (
        "train:TrainMnist",
        "train one policy: sparkjoy train mnist --method kondo --rate 0.03 --out out/run",
    ),
    "train reversal": ("train:TrainReversal", "the same on token reversal with a transformer"),
    "pareto mnist": ("pareto:ParetoMnist", "train every method at every rate, and draw quality against cost"),
    "pareto reversal": ("pareto:ParetoReversal", "the same on token reversal"),
    "study scores": ("score_comparison:ScoresStudy", "the same rate by other scores than delight, under two baselines"),
    "study budget": ("budget:BudgetStudy", "one noise budget everywhere, against fixed rates and others that move"),
    "study language": (
        "language:LanguageStudy",
        "a pre-trained language model learns with TRL's trainer, gated and not",
    ),
    "study frictions": (
        "frictions:FrictionsStudy",
        "actors that are late, broken, corrupted or lucky: which method stands what",
    ),
    "study screening": (
        "screening:ScreeningStudy",
        "cheaper screeners than a forward pass, noise on delight, an unbiased gate",
    ),
    "study scaling": ("scaling:ScalingStudy", "the longest prompt each method learns to reverse within a budget"),
    "study gain": ("gain:GainStudy", "what the gate saves a step as problems grow and backward passes get dearer"),
    "study tokens": ("token_gate:TokenGateStudy", "gating single tokens against gating whole answers"),
    "study bandit": ("bandit_theory:BanditStudy", "the papers' bandit theory, checked number by number"),
    "bench": ("bench:Bench", "seconds and peak memory of one step: dense, gated, and what else one could do"),
    "frontier": ("frontier:Frontier", "what gating saves, and costs, on your own model, prompts and reward"),
}
"""Each with its class in `sparkjoy_lab.studies`, imported when it is asked for, and its line of help."""
GROUPS = tuple(dict.fromkeys(name.split()[0] for name in COMMANDS if " " in name))
"""First words that a second one follows."""


def listed(group: str = "") -> list[str]:
    """Names of the commands of a group such as `study`, or of all."""
    return [name for name in COMMANDS if name.split()[0] == group or not group]


def named(arguments: list[str]) -> list[str]:
    """The one or two words that name the command; a ValueError says which there are, and which may be meant."""
    for count in (1, 2):
        if " ".join(arguments[:count]) in COMMANDS:
            return arguments[:count]
    group = arguments[0] if arguments[0] in GROUPS else ""
    there = f"there are: {', '.join(listed(group))}. See {f'sparkjoy {group}'.strip()} --help."
    asked = " ".join(word for word in arguments[:2] if not word.startswith("-")) or arguments[0]
    if asked == group:
        raise ValueError(f"{group} needs a second word; {there}")
    called = {name.removeprefix(group).strip(): name for name in (*listed(group), *GROUPS)}
    meant = get_close_matches(asked.removeprefix(group).strip(), called, 1, cutoff=0.7)
    raise ValueError(f"no command {asked!r}; " + (f"did you mean {called[meant[0]]!r}?" if meant else there))
