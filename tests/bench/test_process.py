"""A peer's process: started, asked, ended; and how its death is told."""

import os
from collections.abc import Iterator
from contextlib import closing

import pytest

from bench.peers.wire import FIRST_PLAIN_ID, Job, Setup, prompts
from bench.process import PeerFailed, PeerProcess, Program
from tests.bench.fakes import Peers

JOB = Job(streams=2, context=4, new_tokens=3, seed=1)


@pytest.fixture
def dies_later(peers: Peers, setup: Setup) -> Iterator[PeerProcess]:
    """Loads, and listens no more: writing to it fails from the first job on."""
    source = "import os, sys\nos.close(0)\nprint('{\"ready\": {}}', flush=True)\nsys.exit('no more')"
    with closing(PeerProcess(peers.scripted("brief", source), setup)) as peer:
        yield peer


def test_a_peer_says_its_facts_and_answers_every_job_by_a_trace_a_stream(peers: Peers, setup: Setup) -> None:
    with closing(PeerProcess(peers.peer("fake", first="0.5"), setup)) as peer:
        assert peer.facts == {"version": "made up"}
        for _ in range(2):
            traces = peer.ask(JOB)
            assert [trace.times for trace in traces] == [[0.5, 0.75, 1.0]] * 2
            assert [trace.tokens[0] for trace in traces] == [sum(ids) for ids in prompts(JOB, 100)]


def test_what_a_peer_prints_is_no_answer(peers: Peers, setup: Setup) -> None:
    noise = "print('hello'); os.system('echo from a child')"
    with closing(PeerProcess(peers.peer("loud", loading=noise, before=noise), setup)) as peer:
        assert len(peer.ask(JOB)) == 2


def test_a_peer_that_cannot_load_fails_with_its_last_words(peers: Peers, setup: Setup) -> None:
    with pytest.raises(PeerFailed, match=r"(?s)broken ended with code 1:.*No module named 'no_engine'"):
        PeerProcess(peers.peer("broken", loading="import no_engine"), setup)


def test_a_python_that_is_not_there_is_an_os_error(setup: Setup) -> None:
    with pytest.raises(FileNotFoundError):
        PeerProcess(Program("lost", "/no/such/python", "nothing"), setup)


def test_a_peer_that_dies_of_a_job_fails_with_its_last_words(peers: Peers, setup: Setup) -> None:
    with (
        closing(PeerProcess(peers.peer("weak", before="sys.exit('out of memory')"), setup)) as peer,
        pytest.raises(PeerFailed, match=r"weak ended with code 1:\nout of memory"),
    ):
        peer.ask(JOB)


def test_a_peer_that_died_between_jobs_fails_alike_not_with_a_broken_pipe(dies_later: PeerProcess) -> None:
    with pytest.raises(PeerFailed, match="brief ended with code 1:\nno more"):
        dies_later.ask(JOB)


def test_a_peer_killed_halfway_through_an_answer_has_failed(peers: Peers, setup: Setup) -> None:
    source = "import sys\nprint('{\"ready\": {}}', flush=True)\nsys.stdin.readline()\nprint('{\"tra', end='')"
    with (
        closing(PeerProcess(peers.scripted("cut", source), setup)) as peer,
        pytest.raises(PeerFailed, match="cut ended with code 0"),
    ):
        peer.ask(JOB)


def test_a_stream_that_ends_early_is_a_failure_not_a_figure(peers: Peers, setup: Setup) -> None:
    with (
        closing(PeerProcess(peers.peer("short", before="new_tokens -= 1"), setup)) as peer,
        pytest.raises(PeerFailed, match="a stream ended early"),
    ):
        peer.ask(JOB)


def test_closing_ends_the_process(peers: Peers, setup: Setup) -> None:
    peer = PeerProcess(peers.peer("fake"), setup)
    peer.close()
    with pytest.raises(ProcessLookupError):
        os.kill(peer.pid, 0)


def test_prompts_depend_on_seed_and_stream_alone_so_that_a_longer_job_shares_its_prefixes() -> None:
    short, long = prompts(JOB, 100), prompts(Job(streams=3, context=9, new_tokens=1, seed=1), 100)
    assert short == [ids[:4] for ids in long[:2]]
    assert short[0] != short[1]
    assert short != prompts(Job(2, 4, 3, seed=2), 100)
    assert all(FIRST_PLAIN_ID <= token < 100 for ids in long for token in ids)
