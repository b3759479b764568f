"""One step on checked inputs: see, decide, differentiate what is kept. A value moves forward only."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from sparkjoy.engine.added_noise import added_noise
from sparkjoy.engine.deciding import decide, scored_rows
from sparkjoy.engine.inputs import Inputs
from sparkjoy.engine.looking import Asked, seen
from sparkjoy.engine.passes import HowToRun, Passes
from sparkjoy.engine.plan import EVERYTHING, Choice
from sparkjoy.gates import Decision
from sparkjoy.gates.decision import weighted
from sparkjoy.scores import ScoreFunction


class Done(NamedTuple):
    """What was decided, how, and what noise that added.

    Args:
        choice: the plan.
        decision: the gate's, about the rows of all processes.
        kept: how many it keeps.
        noise: what a weighted gate's draws added; None for other gates.
        proposed: rows that a draft let through to the gate; None: no draft was asked.
    """

    choice: Choice
    decision: Decision
    kept: int
    noise: float | None = None
    proposed: int | None = None


def everything(inputs: Inputs, passes: Passes, how: HowToRun) -> Done:
    """The plain, dense step."""
    ones = inputs.advantages.new_ones(how.ranks.total(inputs.total))
    decision = Decision(ones.bool(), None, ones, ones)
    passes.differentiate(how.ranks.own(decision.keep), None, len(ones))
    return Done(EVERYTHING, decision, len(ones))


def decided(asked: Asked, size: ScoreFunction | None, inputs: Inputs, passes: Passes, how: HowToRun) -> Done:
    """The step of a gate.

    Args:
        asked: who decides on what.
        size: of a row's gradient, for a weighted gate.
        inputs: the rows of this process.
        passes: run what has to be run.
        how: the options they run by.
    """
    gate, ranks = asked.gate, how.ranks
    sight = seen(asked, inputs, passes, how)
    scored = ranks.gather(scored_rows(gate, sight.score, inputs))
    decision = ranks.same(decide(gate, scored, inputs, asked.score))
    kept = int(decision.keep.count_nonzero())
    passes.ledger.lap("screen")
    exact, differentiated = sight.exact and asked.score is size, None
    if sight.graph is None:
        weight = None if weighted(gate) is False else ranks.own(decision.weight)
        watches = size is not None and not exact
        differentiated = passes.differentiate(ranks.own(decision.keep), weight, kept, watches)
    elif kept:
        passes.differentiate_graph(sight.graph, decision.weight * decision.keep, decision.keep)
    noise = None
    if size is not None:
        noise, sums = added_noise(size, inputs, scored, decision, exact, differentiated, ranks)
        if sums is not None and hasattr(gate, "learn"):
            gate.learn(sums)
    decision = decision if sight.priced else replace(decision, price=None)
    return Done(sight.choice, decision, kept, noise, sight.proposed)
