"""From token ids to the text that may leave: incremental detokenisation, and stop strings held back.

Pure, standard library only: the core runs it for every token, so it is kept to a few dictionary look-ups. A
vocabulary (the bytes of each token id, special tokens empty) comes from engine/tokenizer.py; which *tokens*
end a sequence is the core's business.
"""

from codecs import utf_8_decode
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True, slots=True)
class TextState:
    """All that an OutputText remembers between two tokens; with it the text goes on elsewhere or later."""

    undecoded: bytes = b""  # the beginning of a code point, at most 3 bytes
    held: str = ""  # text that may be the beginning of a stop string


class _Node:
    """A prefix of a stop string, in the automaton below."""

    __slots__ = ("depth", "fallback", "match", "next")

    def __init__(self, depth: int) -> None:
        self.depth = depth  # characters of the prefix: as many are held back here
        self.next: dict[str, _Node] = {}
        self.fallback: _Node | None = None  # the longest proper suffix that is a prefix too; None at the root
        self.match: str | None = None  # the longest stop string that ends here


class StopStrings:
    """Finds stop strings in text that comes in pieces, holding back what may be the beginning of one.

    An Aho-Corasick automaton: time linear in the text, whatever the strings; held back are at most as many
    characters as the longest stop string has, less one. The match that *ends* first wins, then the longest:
    so the outcome never depends on where the pieces were cut, and no answer waits for a longer match.
    """

    __slots__ = ("_held", "_include", "_node", "_root")

    def __init__(self, stop: Sequence[str], *, include_stop_str: bool = False, held: str = "") -> None:
        """`held` comes from another one's property, with the same strings."""
        assert all(stop), "an empty stop string is refused at the door"
        self._root = _automaton(tuple(stop))
        self._include = include_stop_str
        self._node = self._root
        self._held = ""
        if held:
            released, _ = self.push(held, heed=False)
            assert not released, "text held for other stop strings"

    @property
    def held(self) -> str:
        """Text that may be the beginning of a stop string: it has gone in and not come out."""
        return self._held

    def push(self, text: str, *, heed: bool = True) -> tuple[str, str | None]:
        """(text that may leave, the stop string that completed or None); what follows a match is dropped.

        Without `heed` a completed match is let through; one that completes later, in heeded text, counts.
        """
        node, root = self._node, self._root
        for index, character in enumerate(text):
            while (child := node.next.get(character)) is None and node is not root:
                node = node.fallback or root
            node = child or root
            if node.match is not None:
                if heed:
                    return self._cut(self._held + text[: index + 1], node.match), node.match
                node = _longest_unfinished(node)
        self._node = node
        whole = self._held + text
        release = len(whole) - node.depth
        self._held = whole[release:]
        return whole[:release], None

    def flush(self) -> str:
        """The end came otherwise: what was held back leaves."""
        held, self._held, self._node = self._held, "", self._root
        return held

    def _cut(self, text: str, match: str) -> str:
        self._held, self._node = "", self._root
        return text if self._include else text[: len(text) - len(match)]


class OutputText:
    """The text of one sequence as its tokens come: whole code points, then stop strings if there are any.

    Invalid UTF-8 becomes U+FFFD, just as in a decode of all bytes at once.
    """

    __slots__ = ("_stops", "_undecoded", "vocabulary")

    def __init__(
        self,
        vocabulary: Sequence[bytes],
        stop: Sequence[str] = (),
        include_stop_str: bool = False,
        state: TextState | None = None,
    ) -> None:
        """`vocabulary` is shared, not copied. `state` (of one with the same stop strings) goes on where that was."""
        state = state or TextState()
        self.vocabulary = vocabulary
        self._undecoded = state.undecoded
        self._stops = StopStrings(stop, include_stop_str=include_stop_str, held=state.held) if stop else None

    @property
    def state(self) -> TextState:
        """Everything remembered, as a value."""
        return TextState(self._undecoded, self._stops.held if self._stops else "")

    def push(self, token_id: int, heed_stops: bool = True) -> tuple[str, str | None]:
        """What this token releases: (text that may leave, the stop string that has just completed or None).

        The text has never half a code point, nor part of a stop string that may still complete; nothing may be pushed
        after one that has. Without `heed_stops` (min_tokens) a stop string may complete and pass.
        """
        undecoded = self._undecoded + self.vocabulary[token_id]
        text, length = utf_8_decode(undecoded, "replace")
        self._undecoded = undecoded[length:]
        return (text, None) if self._stops is None else self._stops.push(text, heed=heed_stops)

    def finish(self) -> str:
        """The sequence ended otherwise than by a stop string: what was held back. Call it once, at the end.

        A code point left incomplete becomes U+FFFD; a stop string that this completes is cut, not reported.
        """
        text = self._undecoded.decode(errors="replace")
        if self._stops is None:
            return text
        released, _ = self._stops.push(text)
        return released + self._stops.flush()


@lru_cache(maxsize=8)  # a request's choices are made one after another, with one automaton; it never changes
def _automaton(stop: tuple[str, ...]) -> _Node:
    """The root of the trie of `stop`, with fallbacks and matches filled in, breadth first."""
    root = _trie(stop)
    queue = deque([root])
    while queue:
        node = queue.popleft()
        for character, child in node.next.items():
            child.fallback = _fallback(node, character, root)
            child.match = child.match or child.fallback.match  # own is longer than any suffix's
            queue.append(child)
    return root


def _trie(stop: Sequence[str]) -> _Node:
    root = _Node(0)
    for string in stop:
        node = root
        for character in string:
            node = node.next.setdefault(character, _Node(node.depth + 1))
        node.match = string
    return root


def _fallback(parent: _Node, character: str, root: _Node) -> _Node:
    """Where the child of `parent` by `character` falls back to."""
    node = parent.fallback
    while node is not None and character not in node.next:
        node = node.fallback
    return root if node is None else node.next[character]


def _longest_unfinished(node: _Node) -> _Node:
    """From a match let through: the longest suffix that a stop string may still go on from."""
    while node.fallback is not None and not node.next:
        node = node.fallback
    return node
