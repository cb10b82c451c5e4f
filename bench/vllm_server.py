"""vLLM's own OpenAI server as a process, to be measured over HTTP beside bench/server.py's. Its Python is given."""

import asyncio
import contextlib
import os
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from aiohttp import ClientError, ClientSession

from bench.server import ROOT, ServerFailed

START_SECONDS, POLL_SECONDS = 120.0, 0.25
END_SECONDS = 10.0
LAST_BYTES = 2000
COUNTING = "bench.peers.vllm_counting.CountingScheduler"
COUNTS = struct.Struct("<qq")  # bench/peers/vllm_counting.py writes it

Options = Mapping[str, object]
"""`--name` → value, as its command line takes them; "" is a flag's."""


@dataclass(frozen=True, slots=True)
class VllmServer:
    """Ready to serve at `url`."""

    url: str
    counts: Path
    pid: int

    def positions(self) -> tuple[int, int]:
        """Computed so far, and of these computed again."""
        computed, again = COUNTS.unpack(self.counts.read_bytes())
        return computed, again


@contextlib.asynccontextmanager
async def running(python: str, options: Options) -> AsyncIterator[VllmServer]:
    """A server that is ready; ended at the end. Raises ServerFailed, or OSError where there is no such Python."""
    with tempfile.TemporaryFile() as log, tempfile.TemporaryDirectory() as directory:
        counts = Path(directory) / "counts"
        counts.write_bytes(COUNTS.pack(0, 0))
        url = f"http://127.0.0.1:{(port := _free_port())}"
        told = {**options, "--host": "127.0.0.1", "--port": port, "--scheduler-cls": COUNTING}
        words = [str(part) for pair in told.items() for part in pair if part != ""]
        process = _started([python, "-m", "vllm.entrypoints.openai.api_server", *words], counts, log)
        try:
            await _healthy(process, url)
            yield VllmServer(url, counts, process.pid)
        except ServerFailed as error:
            log.seek(0)
            raise ServerFailed(f"{error}\n{log.read().decode(errors='replace')[-LAST_BYTES:]}") from error
        finally:
            await asyncio.to_thread(_end, process)


def _started(command: Sequence[str], counts: Path, log: IO[bytes]) -> subprocess.Popen[bytes]:
    """In a session of its own: its engine is a child, which must not outlive it."""
    environment = _environment(command[0]) | {"SLUICE_BENCH_COUNTS": str(counts)}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _environment(python: str) -> dict[str, str]:
    """As vLLM's documentation asks on a CPU; what is set already stays. Raises ServerFailed."""
    asked = "from bench.peers.vllm import preloads; print(':'.join(preloads()))"
    found = subprocess.run([python, "-c", asked], cwd=ROOT, capture_output=True, text=True)
    if found.returncode:
        raise ServerFailed(f"{python} cannot run vLLM's helpers: {found.stderr.strip()[-LAST_BYTES:]}")
    told = {
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
        "LD_PRELOAD": found.stdout.strip(),
    }
    return told | os.environ


async def _healthy(process: subprocess.Popen[bytes], url: str) -> None:
    limit = time.perf_counter() + START_SECONDS
    async with ClientSession(url) as http:
        while time.perf_counter() < limit:
            if process.poll() is not None:
                raise ServerFailed(f"vLLM ended with code {process.returncode}")
            with contextlib.suppress(ClientError):  # it does not listen yet
                async with http.get("/health") as response:
                    if response.status == 200:
                        return
            await asyncio.sleep(POLL_SECONDS)
    raise ServerFailed(f"vLLM was not ready after {START_SECONDS:g} s")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
