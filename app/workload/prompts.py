"""Token ids for the prompts of a trace: equal leading block ids give equal tokens, all else differs.

The ids mean nothing. They are cheap: a block repeats the digits of its id, written in a base of the vocabulary's size.
"""

from collections.abc import Iterator, Mapping

from app.workload.trace import Trace, TraceRequest

UNSHARED = 2**40
"""Blocks from here on are those of content that no other prompt has; recorded ids are below it."""


class Prompts:
    """`vocabulary` token ids from `first_id` on are used; a live model's special tokens should lie outside."""

    def __init__(self, trace: Trace, vocabulary: int, first_id: int = 0) -> None:
        assert vocabulary > 1
        self._vocabulary = vocabulary
        self._first_id = first_id
        self._digits = next(n for n in range(1, 64) if vocabulary**n >= 2 * UNSHARED)
        self._successors = _successors(trace)

    def tokens(self, request: TraceRequest) -> list[int]:
        """The prompt, `request.prompt_tokens` long."""
        tokens: list[int] = []
        for number in request.block_ids():
            tokens += self._block(number, request.block_size)
        del tokens[request.prompt_tokens :]
        return tokens + self._block(UNSHARED + request.number, request.prompt_tokens - len(tokens))

    def answer(self, request: TraceRequest) -> list[int]:
        """What it generates where a follow-up's prompt goes on from its own; else nothing, so anything will do.

        An answer is `request.output_tokens` long at most.
        """
        following = self._successors.get(request.number)
        if following is None or following.prompt_tokens <= request.prompt_tokens:
            return []
        whole, begun = self.tokens(following), self.tokens(request)
        shared = request.blocks * request.block_size if request.block_size else 0
        if not shared or whole[:shared] != begun[:shared]:
            return []
        return whole[request.prompt_tokens : request.prompt_tokens + request.output_tokens]

    def _block(self, number: int, length: int) -> list[int]:
        """Injective in `number` from `_digits` tokens on."""
        digits = list(self._written(number))
        return (digits * (length // self._digits + 1))[:length]

    def _written(self, number: int) -> Iterator[int]:
        for _ in range(self._digits):
            number, digit = divmod(number, self._vocabulary)
            yield self._first_id + digit


def _successors(trace: Trace) -> Mapping[int, TraceRequest]:
    """The first follow-up of each request that has one."""
    found: dict[int, TraceRequest] = {}
    for each in trace:
        if each.after is not None:
            found.setdefault(each.after, each)
    return found
