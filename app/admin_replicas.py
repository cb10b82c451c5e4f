"""For operators: sending a request to another replica; draining a replica, and resuming it. docs/replicas.md.

Each takes a JSON object, or no body; a browser must send one, so that no other web page can make it ask. An answer says
what has begun: what comes of it is in `/admin/state`, the request's timeline, the log and the metrics.
"""

from typing import Annotated, Any

from aiohttp import web
from pydantic import Field
from structlog.stdlib import get_logger

from app.admin import unknown_request
from app.bodies import Nothing, read_json_if_any
from app.errors import ApiError, bad_request
from app.served import SERVED
from engine.engine import Engine
from engine.member import Member
from engine.sequence import Sequence
from engine.state import replica_states

log = get_logger(__name__)


class Target(Nothing):
    replica: Annotated[int, Field(ge=0)] | None = None  # none: where routing says


async def migrate(http: web.Request) -> web.Response:
    """Makes a request go on at another replica, live if it runs. Its choices go one by one, in their turn."""
    request_id, engine = http.match_info["id"], http.app[SERVED].engine
    replica = (await read_json_if_any(http, Target)).replica
    sequences = engine.fleet.sequences_of(request_id)
    if not sequences:
        raise unknown_request(request_id)
    if engine.fleet.alone:
        raise ApiError(409, "there is only one replica", code="only_one_replica")
    if replica is not None:
        _check_target(engine, replica, request_id, sequences)
    if not engine.migrate(request_id, replica):
        raise _dead()
    answer: dict[str, Any] = {"id": request_id, "state": "migrating"}
    return web.json_response(answer if replica is None else answer | {"replica": replica})


async def drain(http: web.Request) -> web.Response:
    """It takes nothing more, and its requests go on elsewhere. The last that takes requests is not drained."""
    await read_json_if_any(http, Nothing)
    engine, member = _member(http)
    others = [each for each in engine.fleet.members if each is not member]
    if member.accepting and not any(each.accepting for each in others):
        message = f"replica {member.number} is the last that takes requests; SIGTERM drains the whole server"
        raise ApiError(409, message, code="last_replica")
    return _told(engine, member, draining=True)


async def resume(http: web.Request) -> web.Response:
    """It takes requests again. One that is lost is started again, at once."""
    await read_json_if_any(http, Nothing)
    engine, member = _member(http)
    if not member.up and not engine.restarts:
        message = f"replica {member.number} is lost ({member.down_reason}), and this server starts none again"
        raise ApiError(409, message, code="replica_lost")
    return _told(engine, member, draining=False)


def _told(engine: Engine, member: Member, *, draining: bool) -> web.Response:
    if engine.failure is not None:
        raise _dead()
    engine.drain_replica(member.number, draining=draining)
    log.info("replica_drains" if draining else "replica_resumes", replica=member.number)
    return web.json_response(replica_states(engine.fleet, engine.replicas)[member.number])


def _check_target(engine: Engine, replica: int, request_id: str, sequences: list[Sequence]) -> None:
    """Raises ApiError where it is clear already that nothing would come of it."""
    members = engine.fleet.members
    if replica >= len(members):
        raise bad_request(
            f"there is no replica {replica}; there are {len(members)}, from 0", "replica", "no_such_replica"
        )
    target = members[replica]
    if not target.up:
        message = f"replica {replica} is down: {target.down_reason}"
        raise ApiError(409, message, code="replica_down", param="replica")
    if target.draining:
        raise ApiError(409, f"replica {replica} drains", code="replica_draining", param="replica")
    if len(target.core.sequences.get(request_id, ())) == len(sequences):
        message = f"request {request_id!r} is at replica {replica} already"
        raise ApiError(409, message, code="same_replica", param="replica")
    wanted, context = (
        max(each.prompt_tokens + each.max_tokens for each in sequences),
        target.core.config.context,
    )
    if wanted > context:
        message = (
            f"request {request_id!r} may have {wanted} tokens, but replica {replica} has room for {context}"
        )
        raise ApiError(409, message, code="replica_too_small", param="replica")


def _member(http: web.Request) -> tuple[Engine, Member]:
    """Raises ApiError."""
    engine, number = http.app[SERVED].engine, http.match_info["number"]
    members = {str(member.number): member for member in engine.fleet.members}
    if number not in members:
        message = f"there is no replica {number!r}; there are {len(members)}, from 0"
        raise ApiError(404, message, code="replica_not_found")
    return engine, members[number]


def _dead() -> ApiError:
    return ApiError(409, "the engine has died; nothing moves any more", code="engine_dead")
