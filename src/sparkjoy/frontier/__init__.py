"""Quality against cost of a step on the user's own model and batch. A guided tour.

`measure.py`  frontier(): every setting takes turns       <- start here
`arms.py`     the settings while they are measured: default gates, medians and means
`cost.py`     seconds and peak bytes of a step
`result.py`   Frontier: table, figure, recommended setting

The gradients are found, set aside and compared by `sparkjoy.gradients`.
"""

from sparkjoy.frontier.measure import frontier as frontier
from sparkjoy.frontier.result import Frontier as Frontier
from sparkjoy.frontier.result import Recommendation as Recommendation
from sparkjoy.frontier.result import Setting as Setting

__all__ = ["Frontier", "Recommendation", "Setting", "frontier"]
