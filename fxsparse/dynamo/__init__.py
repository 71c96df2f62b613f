"""torch.compile with `backend="fxsparse"`: sparse convolutions in a model that nobody converted.

    fast = torch.compile(model, backend="fxsparse", options={"masks": masks, "inner": "inductor"})

What became of each graph that Dynamo captured is in `reports(fast)` and, at INFO, in the log.
"""

from fxsparse.dynamo.conversion import backend as backend
from fxsparse.dynamo.live import refresh as refresh
from fxsparse.dynamo.live import reports as reports

__all__ = ["backend", "refresh", "reports"]
