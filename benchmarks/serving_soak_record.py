"""What happened in the soak: requests by kind and status, and everything that should not have happened."""

from __future__ import annotations

import statistics
import time
from collections import Counter, defaultdict

_MOST_KEPT = 50


class Record:
    def __init__(self) -> None:
        self.statuses: Counter[tuple[str, str]] = Counter()
        """By kind of request and status; "left" where the client left."""
        self.seconds: dict[str, list[float]] = defaultdict(list)
        """Of whole requests, by kind."""
        self.num_checked = 0
        """Answers compared with the right ones."""
        self.wrong: list[str] = []
        self.unexpected: list[str] = []
        self.num_wrong = self.num_unexpected = 0
        self.began = time.monotonic()

    def count(self, kind: str, status: int | str, seconds: float | None = None) -> None:
        self.statuses[kind, str(status)] += 1
        if seconds is not None:
            self.seconds[kind].append(seconds)

    def is_wrong(self, what: str) -> None:
        self.num_wrong += 1
        self._keep(self.wrong, what)

    def is_unexpected(self, what: str) -> None:
        self.num_unexpected += 1
        self._keep(self.unexpected, what)

    def _keep(self, where: list[str], what: str) -> None:
        if len(where) < _MOST_KEPT:
            where.append(f"{time.monotonic() - self.began:.1f} s: {what}")
            print(where[-1][:1500], flush=True)

    @property
    def num_requests(self) -> int:
        return sum(self.statuses.values())

    def num_of_kind(self, kind: str) -> int:
        return sum(num for (of, _), num in self.statuses.items() if of == kind)

    def num_server_errors(self) -> int:
        """Of status 5xx, but for the documented 503 of a server that closes."""
        return sum(num for (_, status), num in self.statuses.items() if status.startswith("5") and status != "503")

    def rows(self) -> list[tuple[str, dict[str, int], float | None, float | None]]:
        """Kind, numbers by status, median and longest seconds."""
        found = []
        for kind in sorted({kind for kind, _ in self.statuses}):
            numbers = {status: num for (of, status), num in sorted(self.statuses.items()) if of == kind}
            seconds = self.seconds.get(kind)
            found.append(
                (kind, numbers, statistics.median(seconds) if seconds else None, max(seconds) if seconds else None)
            )
        return found
