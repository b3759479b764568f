"""What is recommended, and how it is shown, on made-up numbers."""

import subprocess
import sys

import pytest

from sparkjoy.frontier import Frontier, Setting


def setting(name, seconds, noise, kind="unbiased", rows=10.0, error=0.5):
    gate = None if kind == "dense" else f"Gate({name})"
    return Setting(name, gate, kind, rows, 5 * rows, seconds, int(1e6 * seconds), error, 0.9, noise, turns=3)


def frontier(*settings):
    return Frontier((setting("dense", 1.0, 0.0, "dense", 64.0, 0.0), *settings), 64, 320, 4, True, "bytes")


@pytest.mark.parametrize(
    ("settings", "options", "expected"),
    [
        ([("mild", 0.8, 0.1), ("apt", 0.4, 0.3), ("bold", 0.2, 1.0)], {}, "apt"),
        ([("mild", 0.8, 0.1), ("apt", 0.4, 0.3), ("bold", 0.2, 1.0)], {"noise": 1.0}, "bold"),
        ([("mild", 0.8, 0.1), ("apt", 0.4, 0.3), ("bold", 0.2, 1.0)], {"noise": 0.05}, "dense"),
        ([("apt", 0.4, 0.37)], {}, "apt"),  # the estimate is a little above the budget
        ([("apt", 0.4, 0.38)], {}, "dense"),
        ([("apt", 0.91, 0.3)], {}, "dense"),  # saves less than a tenth
        ([("apt", 0.91, 0.3)], {"saving": 0.05}, "apt"),
        ([("apt", 1.7, 0.3)], {"saving": 0.0}, "dense"),
        ([("hard", 0.1, None, "biased")], {}, "dense"),
        ([("uniform", 0.1, 0.2, "baseline"), ("apt", 0.4, 0.3)], {}, "apt"),
    ],
)
def test_the_cheapest_setting_within_the_budget_is_recommended(settings, options, expected):
    best, reason = frontier(*(setting(*given) for given in settings)).recommend(**options)
    assert best.name == expected
    assert reason.startswith("The dense step" if expected == "dense" else f"Gate({expected})")
    assert reason.endswith(".")


def test_the_reason_names_the_figures():
    reason = frontier(setting("apt", 0.4, 0.3, rows=16)).recommend().reason
    assert reason == (
        "Gate(apt): apt keeps 25% of the rows, takes 0.40 of the dense step's seconds and adds 0.30 of the batch's own "
        "noise, within 0.3."
    )


@pytest.mark.parametrize("options", [{"noise": 0}, {"noise": float("inf")}, {"saving": 1.0}, {"saving": -0.1}])
def test_a_budget_or_saving_outside_its_range_is_refused(options):
    with pytest.raises(ValueError, match=r"expected a number (above 0|in .0, 1.)"):
        frontier().recommend(**options)


def test_the_table_has_a_line_a_setting_and_says_what_it_counts():
    lines = frontier(setting("apt", 0.4, 0.3), setting("hard 3%", 0.05, None, "biased")).table().splitlines()
    assert lines[0] == "64 rows, 320 tokens, 4 rows in a micro-batch, log-probs known; 3 turns each"
    assert lines[1].split()[:4] == ["setting", "rows", "tokens", "ms"]
    assert lines[3].split() == ["apt", "10", "50", "400.0", "0.40", "0.4", "0.40", "0.500", "0.900", "0.300"]
    assert lines[4].split()[-1] == "biased"
    assert lines[-1] == "MB: bytes."
    assert len({len(line) for line in lines[1:-1]}) == 1


def test_no_two_names_in_the_figure_cover_each_other(tmp_path):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    crowd = frontier(*(setting(f"noise {number}", 0.4 + 0.001 * number, 0.3, error=0.5) for number in range(5)))
    crowd.plot(tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").stat().st_size > 10_000
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axis = figure.subplots()
    crowd.draw(axis)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    names = [text for text in axis.texts if text.get_text()]
    assert [text.get_text() for text in names] == [one.name for one in crowd.settings]
    boxes = [Text.get_window_extent(text, canvas.get_renderer()) for text in names]  # without their arrows
    assert not any(one.overlaps(other) for index, one in enumerate(boxes) for other in boxes[:index])


def test_a_gradient_that_is_not_finite_is_neither_recommended_nor_drawn_nor_are_names_formulas(tmp_path):
    found = frontier(setting("broken", 0.1, 0.1, error=float("nan")), setting(r"a $\no$ formula", 0.4, 0.3))
    assert found.recommend().setting.name == r"a $\no$ formula"
    found.plot(tmp_path / "frontier.png")
    assert found.table().splitlines()[3].split()[-3:] == ["nan", "0.900", "0.100"]


def test_a_figure_without_matplotlib_says_what_to_install():
    code = """
import sys
sys.modules["matplotlib"] = sys.modules["matplotlib.figure"] = None
from sparkjoy.frontier import Frontier, Setting
dense = Setting("dense", None, "dense", 1.0, 1.0, 1.0, 1, 0.0, 1.0, 0.0, 3)
try:
    Frontier((dense,), 1, 1, 1, True, "bytes").plot("nowhere.png")
except ImportError as error:
    print(error)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert 'pip install "sparkjoy[cli]"' in said
