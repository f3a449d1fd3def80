"""Ray's environment variables, which have to be there before it is imported. Those that are set already stay.

Processes of a cluster of our own inherit them; on others, the ingress alone is given those that it needs.
"""

from __future__ import annotations

import os

ROUTING = {
    "RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "2",
    "RAY_SERVE_MAX_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "10",
}
"""How long a replica may take to say how many requests it has before the router looks for another one. It computes
meanwhile, and by Ray's own 0.1 s one that holds a delta would be passed over for one that does not."""
_ALWAYS = {"RAY_USAGE_STATS_ENABLED": "0", **ROUTING}
_ON_ONES_OWN = {"RAY_worker_niceness": "0"}
"""On a machine with other work, replicas are no less than a server without Ray would be."""


def set_environment(*, is_own_cluster: bool) -> None:
    """Before Ray is imported in this process."""
    for name, value in (_ALWAYS | (_ON_ONES_OWN if is_own_cluster else {})).items():
        os.environ.setdefault(name, value)
