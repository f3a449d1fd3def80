"""Find the strings that end an answer, also where one is spread over several pieces of text.

Nothing of a stop string is ever given out: text that might be its beginning is held back until it is clear that it is
not. Each stop string is followed by the automaton of Knuth, Morris and Pratt, so that the time is linear in the text,
whatever strings a client sends. Torch-free.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """The stop strings of one answer: `push` its text piece by piece, then `finish`."""

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops), "a stop string must not be empty"
        self._automata = [_Automaton(stop) for stop in stops]
        self._held = ""
        self.is_found = False

    def push(self, text: str) -> str:
        """The text that is surely before any stop string; what follows one is dropped."""
        if self.is_found or not self._automata:
            return "" if self.is_found else text
        held = self._held + text
        for end, character in enumerate(text, start=len(self._held) + 1):
            found = [len(automaton.stop) for automaton in self._automata if automaton.step(character)]
            if found:
                self.is_found, self._held = True, ""
                # of those that end here the longest begins first
                return held[: end - max(found)]
        num_held = max(automaton.num_matched for automaton in self._automata)
        self._held = held[len(held) - num_held :]
        return held[: len(held) - num_held]

    def finish(self) -> str:
        """What was held back, now that no stop string can come."""
        held, self._held = self._held, ""
        return held


class _Automaton:
    """How much of one stop string the text ends with."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.num_matched = 0
        self._fallbacks = [0]
        """For each length less one, the longest proper beginning of the stop string that also ends that much of it."""
        for character in stop[1:]:
            self._fallbacks.append(self._next(self._fallbacks[-1], character))

    def step(self, character: str) -> bool:
        """Take one more character; True where the stop string ends with it."""
        self.num_matched = self._next(self.num_matched, character)
        return self.num_matched == len(self.stop)

    def _next(self, num_matched: int, character: str) -> int:
        while num_matched and self.stop[num_matched] != character:
            num_matched = self._fallbacks[num_matched - 1]
        return num_matched + 1 if self.stop[num_matched] == character else 0
