"""What `sj.frontier` found: a table, a figure, one recommended setting."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from sparkjoy import checks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Kind = Literal["dense", "unbiased", "biased", "baseline"]
LEEWAY = 1.25
"""How far above the budget a noise may be estimated and still be within it: as far as the estimate itself may be off
where sizes are approximate."""

NAME = (0.18, 0.06)
"""Width and height of a name in the figure, in parts of its longest seconds and greatest error."""


@dataclass(frozen=True)
class Setting:
    """One way to take the step, measured.

    Args:
        name: such as "noise 0.3".
        gate: how to make it, such as "UnbiasedGate(noise=0.3)"; None for the dense step.
        kind: "dense"; "unbiased": its expected gradient is the dense one; "biased": another algorithm than the dense
            step; "baseline": to compare with, never recommended.
        rows: kept, mean over the turns.
        tokens: of the kept rows, likewise.
        seconds: of a step without the optimizer, median.
        peak_bytes: see `Frontier.bytes_are`.
        error: ‖g − g_dense‖ / ‖g_dense‖, root of the mean square.
        cosine: of g to g_dense, mean.
        noise: what gating added to the second moment of the gradient, over the batch's own, mean; None where the gate
            is not weighted, so that its error is a bias as well.
        turns: steps taken.
        shared: tokens that rows have in common are computed once.
    """

    name: str
    gate: str | None
    kind: Kind
    rows: float
    tokens: float
    seconds: float
    peak_bytes: int
    error: float
    cosine: float
    noise: float | None
    turns: int
    shared: bool = False


def checked_seconds(sampling: Any) -> tuple[float, float] | None:
    """Seconds of sampling without shared tokens and with them, from one number or two, or a ValueError."""
    if sampling is None:
        return None
    both = sampling if isinstance(sampling, tuple | list) else (sampling, sampling)
    if len(both) != 2:
        raise ValueError(
            f"sampling_seconds has {len(both)} numbers; expected one, or two: without shared tokens, with."
        )
    plain, shared = (
        checks.number("sampling_seconds", one, "a number of at least 0", lambda value: value >= 0) for one in both
    )
    return plain, shared


class Recommendation(NamedTuple):
    """The setting to use, and why in one sentence."""

    setting: Setting
    reason: str


@dataclass(frozen=True)
class Frontier:
    """Quality against cost of one step on one batch: what `sj.frontier` returns.

    >>> import torch, sparkjoy as sj
    >>> logits = torch.zeros(20, 3, requires_grad=True)
    >>> gates = {"best quarter": sj.KondoGate(rate=0.25)}
    >>> advantages = torch.tensor([1.0, -1.0]).repeat(10)
    >>> found = sj.frontier(
    ...     lambda rows: logits[rows].log_softmax(1)[:, 0], torch.arange(20), advantages, gates=gates, rounds=3
    ... )
    >>> [(setting.name, setting.kind, setting.rows) for setting in found.settings]
    [('dense', 'dense', 20.0), ('best quarter', 'biased', 5.0)]
    >>> found.recommend().setting.name  # a gate whose mean gradient is another one is never recommended
    'dense'

    Args:
        settings: what was measured, the dense step first.
        rows: of the batch.
        tokens: of the batch that count.
        micro_batch_size: rows per forward and backward pass, the same for all settings.
        known: whether the log-probs to decide on were given.
        bytes_are: what `peak_bytes` counts.
        sampling_seconds: of the batch, without shared tokens and with them; None where they were not given.
    """

    settings: tuple[Setting, ...]
    rows: int
    tokens: int
    micro_batch_size: int
    known: bool
    bytes_are: str
    sampling_seconds: tuple[float, float] | None = None

    @property
    def dense(self) -> Setting:
        """The dense step."""
        return self.settings[0]

    def share(self, setting: Setting) -> float:
        """Seconds of a setting's step over those of the dense one; of the whole step where sampling's are known."""
        plain, shared = self.sampling_seconds or (0.0, 0.0)
        sampling = shared if setting.shared else plain
        return (sampling + setting.seconds) / (plain + self.dense.seconds)

    def recommend(self, noise: float = 0.3, saving: float = 0.1) -> Recommendation:
        """The cheapest setting within a budget of noise, or the dense step where it would save too little.

        Only gates whose expected gradient is the dense one are within any budget.

        Args:
            noise: the most that gating may add, in units of the batch's own; estimates up to a quarter above count as
                within it.
            saving: the least part of the dense step's seconds that makes gating worth while.

        Raises:
            ValueError: a noise that is not above 0, or a saving outside [0, 1).
        """
        noise = checks.number("noise", noise, "a number above 0", lambda noise: noise > 0)
        saving = checks.number("saving", saving, "a number in [0, 1)", lambda saving: 0 <= saving < 1)
        within = [
            setting
            for setting in self.settings
            if setting.kind == "unbiased" and setting.noise is not None and setting.noise <= LEEWAY * noise
        ]
        if not within:
            return Recommendation(
                self.dense, f"The dense step: no unbiased gate was measured within a noise of {noise:g}."
            )
        best = min(within, key=self.share)
        share = self.share(best)
        of = "whole step's" if self.sampling_seconds else "step's"
        found = (
            f"{best.name} keeps {best.rows / self.rows:.0%} of the rows, takes {share:.2f} of the dense {of} seconds"
        )
        if share > 1 - saving:
            return Recommendation(
                self.dense,
                f"The dense step: {found}, and is the cheapest within a noise of {noise:g}; gating is worth it from a "
                f"saving of {saving:.0%} on.",
            )
        how = " with shared tokens".join([best.gate or "The dense step", ""]) if best.shared else best.gate
        return Recommendation(
            best, f"{how}: {found} and adds {best.noise:.2f} of the batch's own noise, within {noise:g}."
        )

    def table(self) -> str:
        """One line a setting, under a line that says of what."""
        head = (
            f"{self.rows:,} rows, {self.tokens:,} tokens, {self.micro_batch_size:,} rows in a micro-batch, log-probs "
            f"{'known' if self.known else 'not known'}; {self.dense.turns} turns each"
        )
        names: tuple[str, ...] = (
            "setting",
            "rows",
            "tokens",
            "ms",
            "of dense",
            "MB",
            "of dense",
            "error",
            "cosine",
            "noise",
        )
        if self.sampling_seconds is not None:
            head += (
                "; sampling took "
                + " s, with shared tokens ".join(f"{took:.3g}" for took in self.sampling_seconds)
                + " s"
            )
            names += ("whole step, of dense",)
        lines = [names, *(self._cells(setting) for setting in self.settings)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(names))]
        body = (
            "  ".join(cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(cells))
            for cells in (zip(line, widths, strict=True) for line in lines)
        )
        return "\n".join([head, *body, f"MB: {self.bytes_are}."])

    def plot(self, path: str | Path, noise: float = 0.3) -> None:
        """Write a figure: error of the gradient against seconds.

        Args:
            path: of any kind that matplotlib writes, such as frontier.png.
            noise: as for `recommend`, whose setting is marked.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError('Frontier.plot needs matplotlib: pip install "sparkjoy[cli]".') from error
        figure = Figure(figsize=(9, 5.5), layout="constrained")
        self.draw(figure.subplots(), noise)
        figure.savefig(path, dpi=150)

    def draw(self, axis: Axes, noise: float = 0.3) -> None:
        """The figure of `plot`, on an axis of matplotlib's."""
        recommended = self.recommend(noise).setting
        colours = {"dense": "black", "unbiased": "C0", "biased": "C3", "baseline": "C7"}
        labels = {"unbiased": "unbiased: noise only", "biased": "biased: another algorithm", "baseline": "baseline"}
        for kind, colour in colours.items():
            of_kind = [setting for setting in self.settings if setting.kind == kind]
            axis.plot(
                [setting.seconds for setting in of_kind],
                [setting.error for setting in of_kind],
                "o",
                color=colour,
                label=labels.get(kind) if of_kind else None,
            )
        axis.plot(recommended.seconds, recommended.error, "o", ms=14, mfc="none", mec="C2", mew=2, label="recommended")
        longest = max(setting.seconds for setting in self.settings)
        highest = max(setting.error for setting in self.settings) or 1.0
        places = _places([(setting.seconds / longest, setting.error / highest) for setting in self.settings])
        for setting, (x, y) in zip(self.settings, places, strict=True):
            axis.annotate(
                setting.name,
                (setting.seconds, setting.error),
                (x * longest, y * highest),
                fontsize=11,
                va="center",
                color=colours[setting.kind],
                arrowprops={"arrowstyle": "-", "color": "0.7", "lw": 0.8},
            )
        axis.set_xlim(0, 1.2 * longest)
        axis.set_ylim(-0.08 * highest, 1.15 * highest)
        axis.set_xlabel("seconds of a step", fontsize=12)
        axis.set_ylabel("error of the gradient, relative to the dense one", fontsize=12)
        axis.set_title(
            f"{self.rows:,} rows, {self.tokens:,} tokens, log-probs {'known' if self.known else 'not known'}",
            fontsize=12,
        )
        axis.grid(alpha=0.3)
        axis.legend(fontsize=11)

    def _cells(self, setting: Setting) -> tuple[str, ...]:
        dense = self.dense
        return (
            setting.name,
            f"{setting.rows:,.4g}" if setting.rows < 1000 else f"{setting.rows:,.0f}",
            f"{setting.tokens:,.0f}",
            f"{1000 * setting.seconds:,.1f}" if setting.seconds >= 0.1 else f"{1000 * setting.seconds:.3g}",
            f"{setting.seconds / dense.seconds:.2f}",
            f"{setting.peak_bytes / 1e6:,.1f}" if setting.peak_bytes >= 1e7 else f"{setting.peak_bytes / 1e6:.3g}",
            f"{setting.peak_bytes / dense.peak_bytes:.2f}" if dense.peak_bytes else "",
            f"{setting.error:.3f}",
            f"{setting.cosine:.3f}",
            "biased" if setting.noise is None else f"{setting.noise:.3f}",
            *([] if self.sampling_seconds is None else [f"{self.share(setting):.2f}"]),
        )


def _places(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Where names may begin, beside their points in the unit square, without covering another name or point."""
    places: dict[int, tuple[float, float]] = {}
    for index in sorted(range(len(points)), key=lambda number: points[number][1]):
        x, y = points[index][0] + 0.02, points[index][1] + 0.02

        def free(height: float, x: float = x) -> bool:
            names = (abs(x - other) < NAME[0] and abs(height - y) < NAME[1] for other, y in places.values())
            covered = (0 < other - x < NAME[0] and abs(height - y) < NAME[1] / 2 for other, y in points)
            return not any(names) and not any(covered)

        while not free(y):
            y += 0.01
        places[index] = (x, y)
    return [places[index] for index in range(len(points))]
