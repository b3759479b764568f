"""Quality against cost of a step on the user's own model and batch. A guided tour.

`measure.py`    frontier(): every setting takes turns       <- start here
`arms.py`       the settings: the plain dense loop, and the default gates
`gradients.py`  the gradients of whatever parameters the log-probs depend on, compared and put back
`cost.py`       seconds and peak bytes
`result.py`     Frontier: table, figure, recommended setting
"""

from sparkjoy.frontier.measure import frontier as frontier
from sparkjoy.frontier.result import Frontier as Frontier
from sparkjoy.frontier.result import Recommendation as Recommendation
from sparkjoy.frontier.result import Setting as Setting

__all__ = ["Frontier", "Recommendation", "Setting", "frontier"]
