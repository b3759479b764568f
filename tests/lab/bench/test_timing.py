from itertools import count

import pytest

from sparkjoy_lab.bench.timing import collect, machine, options, percentiles, ratio, turns


def test_arms_take_turns_and_warm_up_is_left_out():
    ran = []
    arms = {name: (lambda name=name: ran.append(name) or len(ran)) for name in "abc"}
    told = []
    seconds, outcomes = collect(turns(arms, 3, warm_up=1, before=lambda number, arm: told.append((number, arm))))
    rounds = ["".join(ran[start : start + 3]) for start in range(0, 12, 3)]
    assert rounds == ["cab", "abc", "bca", "cab"]
    assert [number for number, _ in told] == [-1] * 3 + [0] * 3 + [1] * 3 + [2] * 3
    assert [arm for _, arm in told] == ran
    assert {name: len(values) for name, values in seconds.items()} == dict.fromkeys("abc", 3)
    assert outcomes["a"] == [4, 9, 11]


def test_the_clock_is_read_around_the_work_and_after_the_wait():
    order = []
    ticks = count()

    def clock():
        order.append("clock")
        return next(ticks)

    (turn,) = turns({"one": lambda: order.append("work")}, 1, warm_up=0, clock=clock, wait=lambda: order.append("wait"))
    assert order == ["wait", "clock", "work", "wait", "clock"]
    assert turn.seconds == 1


def test_figures_of_rounds():
    assert percentiles([1.0, 2.0, 3.0], 1000) == {"p20": pytest.approx(1400), "p50": 2000, "p80": pytest.approx(2600)}
    assert ratio([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == 2  # the median of 2, 3 and 1, not 4 over 3
    described = machine("cpu", "no-such-package")
    assert described["no-such-package"] == "not installed"
    assert described["device"]


def test_options_are_those_asked_for(tmp_path):
    parser = options("What it measures.", rounds=3, out="out/x.json", arms=("a", "b"))
    given = parser.parse_args(["--arms", "b", "--rounds", "7", "--out", str(tmp_path)])
    assert (given.arms, given.rounds, given.out) == (["b"], 7, tmp_path)
    assert vars(options(None).parse_args([])) == {"out": None}
