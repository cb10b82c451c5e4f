"""Calls that schemathesis makes up from `/openapi.json`, valid and not, against a running server.

No answer may be a 5xx, and each must be as the description says: status, content type, and schema; a body that breaks
the description must be refused. Ends with 1 and the calls that were answered otherwise.
"""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.errors import InvalidSchema
from schemathesis.core.failures import FailureGroup
from schemathesis.core.result import Err, Result
from schemathesis.schemas import APIOperation
from schemathesis.specs.openapi import checks

from app.credentials import authorization

CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]
REFUSED = checks.negative_data_rejection
"""Not of a body that is too large: that is a refusal too, but not in schemathesis' list of them."""

ANSWER_SECONDS = 300.0
"""For one call: what is made up may ask a real model for dozens of long answers."""

Operation = APIOperation[Any, Any, Any, Any]
Counts = Counter[tuple[str, str, int]]
"""By operation, kind of call (by the description: positive or negative), and status."""


def fuzz(url: str, examples: int, *, repeatable: bool) -> tuple[Counts, list[str]]:
    """At most so many calls of each kind to each operation. Blocks.

    Returns counts, and what was wrong: a text for each operation and kind, with the simplest call found.
    """
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json", headers=authorization(os.environ))
    counts: Counts = Counter()
    problems = []
    for operation, mode in _kinds(schema.get_all_operations()):
        name = f"{operation.method.upper()} {operation.path}"

        def told(status: int, of: tuple[str, str] = (name, mode.value)) -> None:
            counts[*of, status] += 1

        try:
            _run(operation.as_strategy(mode), url, told, _settings(examples, repeatable))
        except FailureGroup as wrong:
            problems.append(f"{name} ({mode.value}): {wrong}")
    return counts, problems


def _kinds(found: Iterator[Result[Operation, InvalidSchema]]) -> Iterator[tuple[Operation, GenerationMode]]:
    for result in found:
        if isinstance(result, Err):
            raise result.err()
        operation = result.ok()
        yield operation, GenerationMode.POSITIVE
        if operation.body:  # there is hardly another way to call one wrongly
            yield operation, GenerationMode.NEGATIVE


def _run(
    strategy: st.SearchStrategy[Case[Any]], url: str, told: Callable[[int], None], how: settings
) -> None:
    """Raises FailureGroup."""

    @how
    @given(strategy)
    def call(case: Case[Any]) -> None:
        response = case.call(base_url=url, headers=authorization(os.environ), timeout=ANSWER_SECONDS)
        told(response.status_code)
        case.validate_response(response, checks=CHECKS if response.status_code == 413 else [*CHECKS, REFUSED])

    call()


def _settings(examples: int, repeatable: bool) -> settings:
    return settings(
        max_examples=examples,
        derandomize=repeatable,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )


def shown(counts: Counts) -> Table:
    table = Table("operation", "calls", "status", "answers", title="made-up calls")
    for (operation, kind, status), count in sorted(counts.items()):
        table.add_row(operation, kind, str(status), str(count))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.fuzz", description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--examples", type=int, default=200, help="of each operation and kind")
    options = parser.parse_args()
    counts, problems = fuzz(options.url, options.examples, repeatable=False)
    console = Console()
    console.print(shown(counts))
    console.print(f"{counts.total()} calls, {len(problems)} operations answered wrongly")
    if problems:
        sys.exit("\n\n".join(problems))


if __name__ == "__main__":
    main()
