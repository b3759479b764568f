"""Seconds and peak memory of one step, gated and dense, each arm at its own best micro-batch size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import numpy as np
import torch
import tyro

from sparkjoy import checks
from sparkjoy.gates import UnbiasedGate
from sparkjoy_lab.bench.arms import WITHOUT_RATE, Arm, flops_ratio, prepare, step_of
from sparkjoy_lab.bench.models import Problem, Workload, build
from sparkjoy_lab.bench.timing import machine, median, percentiles, timed, turns
from sparkjoy_lab.studies.memory import peak_memory
from sparkjoy_lab.training.flags import refuse_idle
from sparkjoy_lab.training.tracking import write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Record = dict[str, Any]
Progress = Callable[[float, str], None]
SEARCH_RATE = 0.25
"""The rate at which a gated arm's best micro-batch size is looked for."""


@dataclass(frozen=True)
class BenchConfig:
    """What to measure."""

    workload: Annotated[Workload, tyro.conf.arg(name="")] = field(default_factory=Workload)
    arms: tuple[Arm, ...] = get_args(Arm)
    """Ways to take a step; the plain dense loop is always among them."""
    rates: tuple[float, ...] = (1.0, 0.9, 0.7, 0.5, 0.25, 0.1, 0.03)
    """Fractions of the rows to keep."""
    noises: tuple[float, ...] = (0.3, 1.0)
    """Budgets of the arm noise, which finds its own rate."""
    micro_batch_sizes: tuple[int, ...] = (1, 4, 16, 64)
    """Rows per forward and backward pass that each arm may choose from."""
    rounds: int = 5
    """Rounds, in each of which every arm takes a step; figures are medians over rounds."""
    memory: bool = True
    """Measure peak memory too, each arm in a fresh process."""
    memory_rates: tuple[float, ...] = (0.1, 0.03)
    """Rates at which memory is measured."""
    threads: int = 2
    """Threads of torch."""

    def __post_init__(self) -> None:
        if not self.arms or not self.rates:
            raise ValueError("--arms and --rates: expected at least one of each.")
        for rate in (*self.rates, *self.memory_rates):
            checks.rate(rate)
        for noise in self.noises:
            UnbiasedGate(noise=noise)
        rated = (any(arm not in (*WITHOUT_RATE, "noise") for arm in self.arms), "an arm among --arms that has a rate")
        of_noise = ("noise" in self.arms, "noise among --arms")
        refuse_idle(self, {"rates": rated, "noises": of_noise, "memory_rates": (self.memory, "--memory")})
        if self.rounds < 1 or self.threads < 1 or not self.micro_batch_sizes or min(self.micro_batch_sizes) < 1:
            raise ValueError("--rounds, --threads and every one of --micro-batch-sizes: expected at least 1.")

    def cases(self) -> list[tuple[Arm, float]]:
        """Every arm at every rate, or budget of noise, that it knows, the dense loop first."""
        arms: tuple[Arm, ...] = ("dense", *(arm for arm in self.arms if arm != "dense"))
        # kondo-gate's step costs the same at every rate: the full one.
        once = {"kondo-gate": min(self.rates)}
        cases: list[tuple[Arm, float]] = []
        for arm in arms:
            rates = (1.0,) if arm in WITHOUT_RATE else (once[arm],) if arm in once else self.rates
            rates = self.noises if arm == "noise" else rates
            cases += [(arm, rate) for rate in rates]
        return cases


def run(config: BenchConfig, out: Path, progress: Progress) -> Record:
    """Measure everything; summary.json is written whole after every round, so what is finished stays.

    Args:
        config: what to measure.
        out: folder for summary.json.
        progress: called with the fraction done and what is going on.

    Returns:
        What summary.json holds.
    """
    torch.set_num_threads(config.threads)
    problem = build(config.workload)
    problem.module.zero_grad(set_to_none=False)
    cases = config.cases()
    sizes = _best_sizes(config, problem, cases, lambda done, what: progress(0.3 * done, what))
    steps = {case: step_of(*case, sizes[case[0]], problem) for case in cases}
    measured: dict[tuple[Arm, float], list[Record]] = {case: [] for case in cases}
    optimizer = torch.optim.Adam(problem.module.parameters(), lr=0.0, fused=True)  # the same weights in every round
    optimizer_seconds: list[float] = []
    result: Record = {}
    arms = {f"{arm} {rate:g}": step for (arm, rate), step in steps.items()}
    names = dict(zip(arms, cases, strict=True))

    def say(number: int, name: str) -> None:
        done = 0.3 + 0.5 * (number + list(arms).index(name) / len(arms)) / config.rounds
        progress(done, f"round {number + 1} of {config.rounds}: {name}")

    wait = _wait_for(config.workload.device)
    taken = turns(arms, config.rounds, warm_up=0, wait=wait, before=say)  # the search has warmed up
    for _, of_round in groupby(taken, key=lambda turn: turn.round):
        for turn in of_round:
            seconds, rows = turn.outcome
            measured[names[turn.arm]].append({"total": turn.seconds, "rows": rows, **seconds})
        optimizer_seconds.append(timed(optimizer.step)[0])
        result = _summary(config, problem, sizes, measured, optimizer_seconds)
        write_json(out / "summary.json", result)
    if config.memory:
        result["memory"] = _memory(config, sizes, lambda done, what: progress(0.8 + 0.2 * done, what))
        write_json(out / "summary.json", result)
    return result


def _wait_for(device: str) -> Callable[[], object]:
    return torch.cuda.synchronize if device == "cuda" else lambda: None


def _best_sizes(
    config: BenchConfig, problem: Problem, cases: list[tuple[Arm, float]], progress: Progress
) -> dict[Arm, int]:
    """Per arm the fastest micro-batch size, by the best of two steps each."""
    sizes = sorted({min(size, config.workload.rows) for size in config.micro_batch_sizes})
    arms = list(dict.fromkeys(arm for arm, _ in cases))
    best: dict[Arm, int] = {}
    for number, arm in enumerate(arms):
        taken = {}
        for index, size in enumerate(sizes):
            progress((number + index / len(sizes)) / len(arms), f"{arm}: {size} rows in a micro-batch")
            step = step_of(arm, SEARCH_RATE, size, problem)
            taken[size] = min(timed(step, wait=_wait_for(config.workload.device))[0] for _ in range(2))
        best[arm] = min(taken, key=taken.__getitem__)
    return best


def _summary(
    config: BenchConfig,
    problem: Problem,
    sizes: dict[Arm, int],
    measured: dict[tuple[Arm, float], list[Record]],
    optimizer_seconds: list[float],
) -> Record:
    dense = median([record["total"] for record in measured["dense", 1.0]])
    forward, backward = (median([r[phase] for r in measured["dense", 1.0]]) for phase in ("forward", "backward"))
    rows = []
    for (arm, rate), records in measured.items():
        total = median([record["total"] for record in records])
        rows.append(
            {
                "arm": arm,
                "rate": None if arm in WITHOUT_RATE or arm == "noise" else rate,
                "noise": rate if arm == "noise" else None,
                "backward_rows": round(float(np.mean([record["rows"] for record in records]))),
                "micro_batch_size": sizes[arm],
                "speedup": dense / total,
                "seconds": {key: percentiles([r[key] for r in records]) for key in records[-1] if key != "rows"},
            }
        )
    parameters = sum(parameter.numel() for parameter in problem.module.parameters())
    return {
        "parameters": parameters,
        "machine": machine(config.workload.device, "transformers", "kondo-gate"),
        "backward_over_forward": {"seconds": backward / forward, "flops": flops_ratio(problem)},
        "optimizer_seconds": percentiles(optimizer_seconds),
        "arms": rows,
    }


def _memory(config: BenchConfig, sizes: dict[Arm, int], progress: Progress) -> list[Record]:
    """Peak bytes of a step above what was there before it, each in a fresh process."""
    cases: list[tuple[Arm, float, int]] = [("dense", 1.0, config.workload.rows), ("dense", 1.0, sizes["dense"])]
    cases += [("kondo-gate", 0.03, config.workload.rows)] if "kondo-gate" in config.arms else []
    gated: tuple[Arm, ...] = ("known", "screened")
    cases += [(arm, rate, sizes[arm]) for rate in config.memory_rates for arm in gated if arm in config.arms]
    records = []
    for number, (arm, rate, size) in enumerate(dict.fromkeys(cases)):
        progress(number / len(cases), f"memory: {arm} {rate:g}, {size} rows in a micro-batch")
        peak = peak_memory(prepare, config.workload, arm, rate, size, threads=config.threads)
        records.append(
            {
                "arm": arm,
                "rate": None if arm in WITHOUT_RATE else rate,
                "micro_batch_size": size,
                "peak_bytes": peak.tensors,
                "peak_resident_bytes": peak.resident,
            }
        )
    return records


def plot(result: Record, positive: float) -> Figure:
    """Speed-up against the fraction kept, with what is possible at best.

    Args:
        result: of `run`.
        positive: fraction of the rows with a positive advantage: those that signs leave open to a rate below it.
    """
    from sparkjoy_lab.studies.drawing import log_axes, panels

    figure, (axis,) = panels(1, 1, 5.6)
    rows = max(row["backward_rows"] for row in result["arms"])
    kept = np.geomspace(1 / rows, 1, 100)
    ratio = result["backward_over_forward"]["seconds"]
    axis.plot(100 * kept, 1 / kept, "k--", lw=1, label="at best, known log-probs: 1 / k")
    below = kept[kept <= positive]
    screened = (1 + ratio) / (positive + below * (1 + ratio))
    label = f"at best, screened: signs leave {positive:.0%} open, r = {ratio:.2g}"
    axis.plot(100 * below, screened, "k:", lw=1, label=label)
    for number, arm in enumerate(dict.fromkeys(row["arm"] for row in result["arms"])):
        of_arm = sorted((row for row in result["arms"] if row["arm"] == arm), key=lambda row: row["backward_rows"])
        percents, speedups = zip(*((100 * row["backward_rows"] / rows, row["speedup"]) for row in of_arm), strict=True)
        axis.plot(percents, speedups, "o-" if len(of_arm) > 1 else "o", color=f"C{number}", label=arm)
    axis.axhline(1, color="0.7", lw=1)
    axis.set(
        xlabel="rows that passed backward, %",
        ylabel="seconds of the dense loop over the arm's",
        title="one step without the optimizer, each arm at its best micro-batch size",
    )
    axis.margins(0.03)
    log_axes(axis)
    axis.legend(fontsize="small")
    return figure
