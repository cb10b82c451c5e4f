"""What policies may see: read-only views. Nothing of the engine leaks in but these attributes."""

from typing import Protocol


class SequenceView(Protocol):
    """A sequence as a policy sees it. Times are seconds of the engine's clock."""

    @property
    def number(self) -> int:
        """Position in the order of arrival, unique."""

    @property
    def arrived(self) -> float: ...

    @property
    def admissions(self) -> int:
        """How often it was admitted: 0 before the first time."""

    @property
    def admitted_as(self) -> int:
        """Position in the order of admissions; the last admission counts."""

    @property
    def prompt_tokens(self) -> int: ...

    @property
    def output_tokens(self) -> int: ...

    @property
    def computed_tokens(self) -> int:
        """Positions whose KV is on the device."""

    @property
    def held_blocks(self) -> int: ...


class BlockView(Protocol):
    """A cached block of one tier. Times are seconds of the engine's clock."""

    @property
    def used(self) -> float:
        """When it was last matched, or written."""

    @property
    def hits(self) -> int:
        """How often a sequence found it, in this tier or one above."""

    @property
    def depth(self) -> int:
        """Blocks before it in its chain."""
