"""Options in words: the same on processes that were told the same."""

from functools import partial

import sparkjoy as sj
from sparkjoy.engine.options import first_difference, in_words
from sparkjoy.testing import TinyPolicy


class Plain:
    def __call__(self, rows):
        return rows


def test_the_same_options_are_the_same_words_and_others_are_not():
    def options(temperature, rate):
        function = partial(sj.delight, temperature)
        return in_words({"gate": sj.KondoGate(rate=rate), "loss": sj.delightful(temperature), "screen": function})

    assert options(2.0, 0.1) == options(2.0, 0.1)
    assert first_difference([options(2.0, 0.1)] * 2 + [options(2.0, 0.2)]) == (
        "gate is KondoGate(rate=0.1) on rank 0 and KondoGate(rate=0.2) on rank 2"
    )
    assert first_difference([options(2.0, 0.1), options(3.0, 0.1)]).startswith("loss is ")


def test_words_hold_no_address():
    objects = (Plain(), Plain().__call__, TinyPolicy(4, 3), lambda rows: rows, object(), sj.SoftGate(1.0, price=0.0))
    assert "0x" not in in_words({str(number): value for number, value in enumerate(objects)})
