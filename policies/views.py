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
    def waiting_since(self) -> float:
        """When it began to wait, the last time: at its arrival, or at a preemption."""

    @property
    def admissions(self) -> int:
        """How often it was admitted: 0 before the first time."""

    @property
    def admitted_as(self) -> int:
        """Position in the order of admissions; the last admission counts."""

    @property
    def preemptions(self) -> int:
        """How often it has given up its place."""

    # --- what the client asked for ---

    @property
    def prompt_tokens(self) -> int: ...

    @property
    def max_tokens(self) -> int:
        """It generates no more than so many."""

    @property
    def expected_output_tokens(self) -> int | None:
        """The client's hint of how many it will generate; None: no hint."""

    @property
    def priority(self) -> int:
        """Lower goes first."""

    @property
    def tenant(self) -> str:
        """Whose it is: one name per API key; "" for all clients without one."""

    @property
    def class_name(self) -> str:
        """Its service class; "" where none is configured."""

    @property
    def class_rank(self) -> int:
        """Place of its service class in the configuration, 0 the most urgent."""

    @property
    def weight(self) -> float:
        """What a second of its delay costs, beside others; 1 unless its class says otherwise."""

    # --- what has become of it ---

    @property
    def output_tokens(self) -> int:
        """Generated so far."""

    @property
    def computed_tokens(self) -> int:
        """Positions whose KV is on the device."""

    @property
    def held_blocks(self) -> int:
        """Device blocks in its block table, shared ones included."""

    @property
    def kept_tokens(self) -> int:
        """Of a preempted waiter: positions whose KV is kept for it below the device; else 0."""

    @property
    def matched_tokens(self) -> int:
        """Of a waiter: positions that some tier had of it, when it was last looked up."""

    @property
    def resume_seconds(self) -> float:
        """Of a preempted waiter: the predicted price of bringing it back; else 0."""

    @property
    def expected_remaining_tokens(self) -> float:
        """Tokens that it will still generate, as predicted when it began to wait, or at its last token."""

    @property
    def tenant_service(self) -> float:
        """What its tenant has been served, weighted (the virtual token counter); it only grows."""


class BlockView(Protocol):
    """A cached block of one tier. Times are seconds of the engine's clock."""

    @property
    def key(self) -> bytes: ...

    @property
    def used(self) -> float:
        """When it was last matched, or written."""

    @property
    def hits(self) -> int:
        """How often a sequence found it, in this tier or one above."""

    @property
    def depth(self) -> int:
        """Blocks before it in its chain."""

    @property
    def partial(self) -> bool:
        """Whether it is a snapshot's tail: fewer tokens than a block has."""

    @property
    def saves_seconds(self) -> float:
        """What finding it here saves over the next copy below, or over computing it; above 0."""

    @property
    def past(self) -> int:
        """What the tier's eviction policy has noted about it."""


class ReplicaView(Protocol):
    """A replica as a policy sees it. Seconds are predicted seconds of its device."""

    @property
    def number(self) -> int:
        """Its place in the configuration, unique."""

    @property
    def role(self) -> str:
        """Which sizes it is there for: "any", "long" or "burst"."""

    @property
    def limit_tokens(self) -> int:
        """Of size classes: prompt and output up to here belong here; 0: no limit."""

    @property
    def capacity_tokens(self) -> int:
        """KV positions that its device has."""

    @property
    def used_tokens(self) -> int:
        """Of these, what sequences hold now."""

    @property
    def requests(self) -> int:
        """Placed here and not released."""

    @property
    def placed(self) -> int:
        """Requests ever placed here."""

    @property
    def charged_seconds(self) -> float:
        """Sum of what was charged for those here when they were placed; each is released once, exactly."""

    @property
    def backlog_seconds(self) -> float:
        """Remaining prefill and expected decode steps of all that are here, given how they batch."""

    @property
    def forecast_tokens(self) -> float:
        """KV positions expected in use at the horizon (policies/forecast.py); 0 when nothing is here."""

    @property
    def waiting(self) -> int:
        """Sequences that wait here for room."""


class CandidateView(ReplicaView, Protocol):
    """A replica, as a place for one request. What is said of the request itself is the same for all candidates."""

    @property
    def prompt_tokens(self) -> int: ...

    @property
    def size_tokens(self) -> float:
        """Prompt and expected output."""

    @property
    def urgent(self) -> bool:
        """Of a class for which headroom is kept."""

    @property
    def cached_tokens(self) -> int:
        """Of the prompt, what only this replica's device has: shared tiers serve all replicas alike."""

    @property
    def prefill_seconds(self) -> float:
        """Of the whole prompt, as if nothing were cached."""

    @property
    def saved_seconds(self) -> float:
        """Of these, what the device's cached tokens save."""

    @property
    def decode_seconds(self) -> float:
        """Expected decode steps, in this replica's batch and with its KV growing."""

    @property
    def ahead_seconds(self) -> float:
        """What is computed before its own prompt: what is left of others, each as far as its own, and who waits."""

    @property
    def behind_seconds(self) -> float:
        """What its prefill, as far as it is not saved, delays the first tokens of those who wait, summed over them."""

    @property
    def disturbed_seconds(self) -> float:
        """What its prefill and its rows in their steps delay those who have a place, summed over them."""

    @property
    def session_home(self) -> bool:
        """Whether it served this session's last request."""
