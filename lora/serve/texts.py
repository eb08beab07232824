"""Tokens of an answer as text, as it becomes certain: whole characters, up to the first of the stop strings.

The first is the one that is complete first, wherever the borders of tokens are; of several, the longest.
"""

from collections.abc import Sequence

from lora.text.tokenizer import Stream, Tokenizer


class Text:
    """`push` gives what can be shown; `stopped` once a stop string came, which is not shown, nor what follows it."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]):
        self.stream, self.stops, self.held, self.stopped = Stream(tokenizer), stops, "", False

    def push(self, token: int) -> str:
        return "" if self.stopped else self._show(self.stream.push(token))

    def end(self) -> str:
        """What is left when no more tokens come."""
        return "" if self.stopped else self._show(self.stream.end()) + self._rest()

    def _rest(self) -> str:
        rest, self.held = ("" if self.stopped else self.held), ""
        return rest

    def _show(self, piece: str) -> str:
        text = self.held + piece
        found = [(place + len(stop), place) for stop in self.stops if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self.held = True, ""
            return text[: min(found)[1]]
        keep = max((begun(text, stop) for stop in self.stops), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]


def begun(text: str, stop: str) -> int:
    """The longest end of `text` with which `stop` may begin."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
