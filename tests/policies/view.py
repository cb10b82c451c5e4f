"""A sequence as policies see it, made by hand."""

from dataclasses import dataclass


@dataclass(frozen=True, eq=False)
class View:
    """Implements policies.views.SequenceView. `number` is the order of arrival."""

    number: int
    arrived: float = 0.0
    waiting_since: float = 0.0
    admissions: int = 0
    admitted_as: int = -1
    preemptions: int = 0
    prompt_tokens: int = 10
    max_tokens: int = 100
    expected_output_tokens: int | None = None
    priority: int = 0
    tenant: str = ""
    class_name: str = ""
    class_rank: int = 0
    weight: float = 1.0
    output_tokens: int = 0
    computed_tokens: int = 0
    held_blocks: int = 0
    kept_tokens: int = 0
    matched_tokens: int = 0
    resume_seconds: float = 0.0
    expected_remaining_tokens: float = 50.0
    tenant_service: float = 0.0
