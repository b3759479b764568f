"""What `sj.frontier` found: a table, a figure, one recommended setting."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from sparkjoy import checks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Kind = Literal["dense", "unbiased", "biased", "baseline"]
LEEWAY = 1.25
"""A noise counts as within the budget up to this many times it: sizes are approximate, and so is the estimate."""
WIDTH, HEIGHT = 0.18, 0.06
"""Of a name in the figure, in parts of the longest seconds and the greatest error."""
KINDS: dict[Kind, tuple[str, str | None]] = {
    "dense": ("black", None),
    "unbiased": ("C0", "unbiased: noise only"),
    "biased": ("C3", "biased: another algorithm"),
    "baseline": ("C7", "baseline"),
}
"""Colour and legend of the kinds in the figure."""


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
        micro_batch_size: rows per forward and backward pass, the same for all settings that are not shared.
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
            if setting.rows > 0 and math.isfinite(setting.error)  # else it is no step to train with
        ]
        if not within:
            why = f"The dense step: no unbiased gate was measured within a noise of {noise:g}."
            return Recommendation(self.dense, why)
        best = min(within, key=self.share)
        share, of = self.share(best), "whole step's" if self.sampling_seconds else "step's"
        what = f"{best.name} keeps {best.rows / self.rows:.0%} of the rows, takes {share:.2f} of the dense {of} seconds"
        if share > 1 - saving:
            why = f"The dense step: {what}, and is the cheapest within a noise of {noise:g}; gating is worth it from "
            return Recommendation(self.dense, f"{why}a saving of {saving:.0%} on.")
        how = (best.gate or "The dense step") + (" with shared tokens" if best.shared else "")
        why = f"{how}: {what} and adds {best.noise:.2f} of the batch's own noise, within {noise:g}."
        return Recommendation(best, why)

    def table(self) -> str:
        """One line a setting, under a line that says of what."""
        known = "known" if self.known else "not known"
        head = f"{self.rows:,} rows, {self.tokens:,} tokens, {self.micro_batch_size:,} rows in a micro-batch, "
        head += f"log-probs {known}; {self.dense.turns} turns each"
        if self.sampling_seconds is not None:
            head += "; sampling took {:.3g} s, with shared tokens {:.3g} s".format(*self.sampling_seconds)
        cells = [self._cells(setting) for setting in self.settings]
        rows = [[title for title, _ in cells[0]], *([cell for _, cell in line] for line in cells)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join([name.ljust(widths[0]), *map(str.rjust, row, widths[1:])]) for name, *row in rows)
        return "\n".join([head, *lines, f"MB: {self.bytes_are}."])

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
        finite = [setting for setting in self.settings if math.isfinite(setting.error)]
        longest, highest = max(setting.seconds for setting in finite), max(setting.error for setting in finite) or 1.0
        for kind, (colour, label) in KINDS.items():
            points = [(setting.seconds, setting.error) for setting in finite if setting.kind == kind]
            if points:
                axis.plot(*zip(*points, strict=True), "o", color=colour, label=label)
        axis.plot(recommended.seconds, recommended.error, "o", ms=14, mfc="none", mec="C2", mew=2, label="recommended")
        names: list[tuple[float, float]] = []  # where they begin, in parts of the longest and the highest
        for setting in sorted(finite, key=lambda setting: setting.error):  # from below, so that a name can move up
            x, y = setting.seconds / longest + 0.02, setting.error / highest + 0.02
            while any(abs(x - left) < WIDTH and abs(y - middle) < HEIGHT for left, middle in names):
                y += 0.01
            names.append((x, y))
            axis.annotate(
                setting.name,
                (setting.seconds, setting.error),
                (x * longest, y * highest),
                fontsize=11,
                va="center",
                color=KINDS[setting.kind][0],
                arrowprops={"arrowstyle": "-", "color": "0.7", "lw": 0.8},
                parse_math=False,
            )
        axis.set(xlim=(0, 1.2 * longest), ylim=(-0.08 * highest, max(1.15, *(y + HEIGHT for _, y in names)) * highest))
        axis.set_xlabel("seconds of a step", fontsize=12)
        axis.set_ylabel("error of the gradient, relative to the dense one", fontsize=12)
        known = "known" if self.known else "not known"
        axis.set_title(f"{self.rows:,} rows, {self.tokens:,} tokens, log-probs {known}", fontsize=12)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=11)

    def _cells(self, setting: Setting) -> list[tuple[str, str]]:
        """A line of the table, with the title of each column."""
        dense, rows = self.dense, setting.rows
        cells = [
            ("setting", setting.name),
            ("rows", f"{rows:,.4g}" if rows < 1000 else f"{rows:,.0f}"),
            ("tokens", f"{setting.tokens:,.0f}"),
            ("ms", _short(1000 * setting.seconds)),
            ("of dense", f"{setting.seconds / dense.seconds:.2f}"),
            ("MB", _short(setting.peak_bytes / 1e6)),
            ("of dense", f"{setting.peak_bytes / dense.peak_bytes:.2f}" if dense.peak_bytes else ""),
            ("error", f"{setting.error:.3f}"),
            ("cosine", f"{setting.cosine:.3f}"),
            ("noise", "biased" if setting.noise is None else f"{setting.noise:.3f}"),
        ]
        whole = [] if self.sampling_seconds is None else [("whole step, of dense", f"{self.share(setting):.2f}")]
        return cells + whole


def _short(number: float) -> str:
    return f"{number:,.1f}" if number >= 10 else f"{number:.3g}"
