"""What a log says now and then, however often it happens."""

from __future__ import annotations

SAID_S = 10.0
_MOST = 64  # kinds that are remembered


class Repeats:
    """Whether something is news: it has not been said within the last `every_s`, or was said with another detail."""

    def __init__(self, every_s: float = SAID_S):
        self.every_s = every_s
        self._said: dict[str, tuple[str, float]] = {}

    def is_news(self, kind: str, now: float, detail: str = "") -> bool:
        """now: seconds, of any clock; one that goes back makes everything news."""
        said, at = self._said.get(kind, ("", now + 1))
        if said == detail and 0 <= now - at < self.every_s:
            return False
        if kind not in self._said and len(self._said) >= _MOST:
            self._said = {key: known for key, known in self._said.items() if now - known[1] < self.every_s}
            if len(self._said) >= _MOST:
                return False  # a flood of kinds, such as machines
        self._said[kind] = detail, now
        return True
