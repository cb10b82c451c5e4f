"""A load on one server: connect, warm up, play, and what was sampled. Which loads, and what of them: command.py."""

import asyncio
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from aiohttp import ClientError, ClientSession, ClientTimeout, TCPConnector

from app.load.client import LONGEST_LINE_BYTES, Client
from app.load.conversation import Asking, Conversations, of_run
from app.load.generator import Generator, Progress, Sample
from app.workload.trace import Trace

HELLO_SECONDS = 10.0


class CannotLoad(Exception):
    """The server cannot be measured: it does not answer, or not as an OpenAI server would."""


@dataclass(frozen=True, slots=True)
class Target:
    """A server. `url` without /v1; the key is sent, and never written anywhere."""

    url: str
    api_key: str = ""
    model: str = ""  # "": the first that it lists
    timeout_seconds: float = 600.0


@asynccontextmanager
async def connected(target: Target) -> AsyncIterator[ClientSession]:
    """For any number of requests at once."""
    headers = {"Authorization": f"Bearer {target.api_key}"} if target.api_key else {}
    base = target.url.rstrip("/").removesuffix("/v1") + "/"
    connector, timeout = TCPConnector(limit=0), ClientTimeout(total=None)
    async with ClientSession(
        base, headers=headers, connector=connector, timeout=timeout, read_bufsize=LONGEST_LINE_BYTES
    ) as http:
        yield http


async def model_of(http: ClientSession, target: Target) -> str:
    """Raises CannotLoad."""
    if target.model:
        return target.model
    try:
        async with asyncio.timeout(HELLO_SECONDS), http.get("v1/models") as response:
            listed = await response.json(content_type=None)
            return str(listed["data"][0]["id"])
    except (ClientError, OSError) as error:
        raise CannotLoad(f"no server answers at {target.url}: {error or type(error).__name__}") from error
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise CannotLoad(f"{target.url} lists no model at /v1/models: name one with --model") from error


async def load(
    http: ClientSession,
    target: Target,
    trace: Trace,
    asking: Asking,
    *,
    run: int = 1,
    warmup: int = 0,
    watch: Callable[[Progress], None] = lambda progress: None,
    interruptible: bool = False,
) -> tuple[list[Sample], bool]:
    """What was sampled, and whether it is all: Ctrl-C ends it early where `interruptible`. Raises CannotLoad."""
    asking = replace(asking, model=await model_of(http, target))
    conversations = Conversations(of_run(trace, run), asking)
    client = Client(
        http, conversations.endpoint.lstrip("/"), asyncio.get_running_loop().time, target.timeout_seconds
    )
    await _warm_up(client, target, trace[:warmup], asking)
    generator = Generator(of_run(trace, run), conversations, client.ask, watch)
    playing = asyncio.ensure_future(generator.play())
    if interruptible:
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, playing.cancel)
    try:
        await playing
    except asyncio.CancelledError:
        if not playing.cancelled() or not interruptible:
            raise
        return generator.samples, False
    finally:
        playing.cancel()
        if interruptible:
            asyncio.get_running_loop().remove_signal_handler(signal.SIGINT)
    return generator.samples, True


async def _warm_up(client: Client, target: Target, trace: Trace, asking: Asking) -> None:
    """Some of the trace's lengths with content of their own; what fails here would fail throughout."""
    warm = [replace(each, arrival=0.0, after=None) for each in of_run(trace, 0)]
    generator = Generator(warm, Conversations(warm, asking), client.ask)
    await generator.play()
    for sample in generator.samples:
        if sample.error:
            raise CannotLoad(
                f"{target.url} does not answer the first request: {sample.error}: {sample.detail}"
            )


def facts(target: Target) -> dict[str, Any]:
    """What may be written of a target."""
    return {"url": target.url, "model": target.model or None}
