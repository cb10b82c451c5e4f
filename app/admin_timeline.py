"""For operators: `/admin/requests/{id}`, what was decided about a request, running or ended lately, and why."""

from typing import Any

from aiohttp import web
from pydantic_core import to_json

from app.errors import ApiError
from app.served import SERVED
from engine.request import Finished
from engine.timeline import Entry, Timeline


async def timeline(http: web.Request) -> web.Response:
    """Its state and accounts, and its decisions, each with the seconds since it arrived. Infinite prices are null."""
    request_id, engine = http.match_info["id"], http.app[SERVED].engine
    found = engine.timelines.get(request_id)
    at_hand = next((each for each in engine.requests() if each["id"] == request_id), None)
    if found is None and at_hand is None:
        raise _unknown(request_id, len(engine.timelines))
    found = found or Timeline()
    told: dict[str, Any] = at_hand or _ended(found.finished)
    answer = told | {
        "ended_choices": [_choice(each) for each in found.finished],
        "decisions": [_entry(entry, told["arrived"]) for entry in found.entries],
        "dropped_decisions": found.dropped,
    }
    return web.Response(
        body=to_json(answer, inf_nan_mode="null"), content_type="application/json", charset="utf-8"
    )


def _ended(choices: list[Finished]) -> dict[str, Any]:
    """A request's accounts in the words of /admin/requests."""
    first = choices[0]
    return {
        "id": first.request,
        "state": "finished",
        "replica": choices[-1].replica,
        "choices": len(choices),
        "class": first.service,
        "tenant": first.tenant,
        "arrived": first.arrived,
        "prompt_tokens": first.prompt_tokens,
        "cached_tokens": next((each.cached_tokens for each in choices if each.choice == 0), 0),
        "output_tokens": sum(each.output_tokens for each in choices),
        "preemptions": sum(each.preemptions for each in choices),
        "promotions": sum(each.promotions for each in choices),
        "migrations": sum(each.migrations for each in choices),
        "recomputed_tokens": sum(each.recomputed_tokens for each in choices),
        "reloaded_tokens": sum(each.reloaded_tokens for each in choices),
    }


def _choice(choice: Finished) -> dict[str, Any]:
    return {
        "choice": choice.choice,
        "finish_reason": choice.reason.value,
        "replica": choice.replica,
        "output_tokens": choice.output_tokens,
        "queued_seconds": choice.queued_seconds,
        "ttft_seconds": None if choice.first_token is None else choice.first_token - choice.arrived,
        "e2e_seconds": choice.finished - choice.arrived,
    }


def _entry(entry: Entry, arrived: float) -> dict[str, Any]:
    decision = entry.decision
    return {
        "after_seconds": entry.at - arrived,
        "choice": entry.choice,
        "kind": decision.kind.value,
        "policy": decision.policy,
        "chosen": decision.chosen,
        "reason": decision.reason,
        "seconds": decision.seconds,
        "alternatives": [{"name": each.name, "price": each.price} for each in decision.alternatives],
    }


def _unknown(request_id: str, kept: int) -> ApiError:
    message = (
        f"there is no request {request_id!r}, or it ended too long ago: "
        f"{kept} requests are remembered, those at hand and the last that ended"
    )
    return ApiError(404, message, code="request_not_found")
