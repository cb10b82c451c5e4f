"""The queue before a batching server keeps time as it says, and orders do in it what they are for."""

from dataclasses import replace
from random import Random

import pytest

from bench.batch_queue import Job, Queue, Server
from policies.order import ORDERS
from policies.prediction import PREDICTIONS

SERVER = Server(places=4, budget=100, step_seconds=1.0, token_seconds=0.01)


def served(jobs: list[Job], order: str = "fcfs", server: Server = SERVER) -> list[Job]:
    oracle = PREDICTIONS["oracle"]({job.number: job.length for job in jobs})
    Queue(server, ORDERS[order](), oracle).serve(jobs)
    return jobs


def test_one_alone_takes_its_prompts_steps_and_a_step_a_token() -> None:
    (job,) = served([Job(0, 5.0, prompt_tokens=150, length=3)])
    assert job.finished == pytest.approx(5 + (1 + 1.0) + (1 + 0.5) + 2 * (1 + 0.01))


def test_decoding_goes_on_beside_a_prompt() -> None:
    first, second = served([Job(0, 0.0, 10, length=3), Job(1, 0.5, 99, length=1)])
    assert first.finished == pytest.approx(1.1 + 2.0 + 1.01)
    assert second.finished == pytest.approx(1.1 + 2.0)  # 99 tokens beside one that decodes: the whole budget


def test_no_more_run_at_once_than_there_are_places() -> None:
    jobs = served([Job(number, 0.0, 1, length=100) for number in range(8)])
    ends = [job.finished for job in jobs]
    assert max(ends[:4]) < min(ends[4:])
    assert min(ends[4:]) == pytest.approx(2 * max(ends[:4]), rel=0.01)


class OneByOne(Queue):
    def _steps_alike(self, seconds: float, next_arrival: float | None) -> int:
        return 1


def test_steps_taken_together_are_those_taken_one_by_one() -> None:
    random = Random(1)
    arrivals = sorted(random.uniform(0, 2000) for _ in range(100))
    jobs = [Job(n, at, random.randint(1, 90), random.randint(1, 40)) for n, at in enumerate(arrivals)]
    again = [replace(job) for job in jobs]
    OneByOne(SERVER, ORDERS["fcfs"](), PREDICTIONS["max_tokens"]()).serve(again)
    for job, slowly in zip(served(jobs), again, strict=True):
        assert job.finished == pytest.approx(slowly.finished)


def test_sjf_serves_short_ones_first_and_fcfs_the_first() -> None:
    def jobs() -> list[Job]:
        lengths = [50, 50, 50, 50, 80, 2, 2, 2]
        return [Job(number, number * 1e-3, 1, length) for number, length in enumerate(lengths)]

    assert served(jobs(), "fcfs")[4].finished < served(jobs(), "sjf")[4].finished
    assert served(jobs(), "sjf")[5].finished < served(jobs(), "fcfs")[5].finished
