"""Plug-ins: found at start or refused with a reason; what they raise or return never harms an answer."""

import asyncio
import io
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from app.config import AlsoSection, Config, ConfigError, ModelSection, PoliciesSection
from app.config_sources import load
from app.plugins import PluginError, load_plugin, load_plugins
from engine.policy_set import PLAINEST, Catalog, GuardedRouting, PolicyConfig
from policies.pricing import RECOMPUTE, RELOAD, SPLIT, Way
from policies.rebalancing import Limits, Move, Round
from policies.routing import Placed
from tests.app.lives import configuration, served
from tests.app.rig import Rig, rig
from tests.app.test_logs import lines, logged
from tests.app.test_metrics import scrape, value
from tests.engine.driving import UNFORESEEN
from tests.policies.view import View

TEXT = "/v1/completions"


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Writes a module that can be imported."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(name: str, text: str) -> None:
        (tmp_path / f"{name}.py").write_text(text)

    return write


# --- at start ---------------------------------------------------------------------------------------------------------

GOOD = """
class Newest:
    def __call__(self, view):
        return (-view.number,)

def by_length(view, offer):
    return (view.prompt_tokens,)

class Guess:
    def remaining(self, view): return 1.0
    def quantile(self, view, q): return 1.0
    def observe(self, view): pass

guess = Guess()
number = 7

class Needy:
    def __init__(self, parameter): pass
"""


def test_classes_are_made_and_functions_and_objects_taken(module: Callable[[str, str], None]) -> None:
    module("plugs_good", GOOD)
    policies = PoliciesSection(
        order="plugs_good:Newest",
        prediction="plugs_good:guess",
        also=AlsoSection(victim=["plugs_good:by_length"], order=["plugs_good:Newest"]),
    )
    found = load_plugins(policies)
    assert {family: list(plugins) for family, plugins in found.items()} == {
        "order": ["plugs_good:Newest"],
        "prediction": ["plugs_good:guess"],
        "victim": ["plugs_good:by_length"],
        "resume": [],
        "eviction": [],
        "placement": [],
        "routing": [],
        "rebalancing": [],
    }
    assert found["order"]["plugs_good:Newest"](SimpleNamespace(number=3)) == (-3,)


@pytest.mark.parametrize(
    ("family", "path", "reason"),
    [
        ("order", "plugs_nowhere:x", "Python finds no module plugs_nowhere"),
        ("order", "plugs_nowhere.inner:x", "PYTHONPATH"),
        ("order", "plugs_bad:x", "ZeroDivisionError: division by zero"),
        ("order", "plugs_lacking:x", "No module named 'plugs_missing'"),
        ("order", "plugs_good:Oldest", "module plugs_good has no 'Oldest'"),
        ("victim", "plugs_good:number", "it cannot be called"),
        ("order", "plugs_good:Needy", "cannot be made without parameters: TypeError"),
        ("prediction", "plugs_good:by_length", "it has no method 'remaining'"),
    ],
)
def test_what_cannot_be_used_is_refused_with_the_reason(
    module: Callable[[str, str], None], family: str, path: str, reason: str
) -> None:
    module("plugs_good", GOOD)
    module("plugs_bad", "1 / 0\n")
    module("plugs_lacking", "import plugs_missing\n")
    with pytest.raises(PluginError) as caught:
        load_plugin(family, path)
    assert f"the {family} policy {path!r}" in str(caught.value)
    assert reason in str(caught.value)


def test_a_server_with_a_bad_plug_in_does_not_start() -> None:
    from app.compose import CANNOT_START
    from app.compose import load as compose

    config = Config(model=ModelSection(), policies=PoliciesSection(order="plugs_nowhere:x"))
    with pytest.raises(CANNOT_START, match="plugs_nowhere"):
        compose(config)


@pytest.mark.parametrize(
    "flag", ["policies.order=a:", "policies.order=os.system:x y", "policies.eviction=a:"]
)
def test_what_is_no_dotted_path_stops_the_start(flag: str) -> None:
    with pytest.raises(ConfigError):
        load([flag], {}, cwd=Path("/nowhere"))


def test_a_plug_in_is_named_as_a_policy_is() -> None:
    flags = ["policies.order=a.b:c", 'policies.also.victim=["d:e"]']
    policies = load(flags, {}, cwd=Path("/nowhere")).config.policies
    assert (policies.order, policies.also.victim) == ("a.b:c", ["d:e"])
    with pytest.raises(ConfigError, match=r"package\.module:name"):
        load(['policies.also.victim=["lru"]'], {}, cwd=Path("/nowhere"))


# --- in force ---------------------------------------------------------------------------------------------------------


class Predicting:
    """Answers everything with the same."""

    def __init__(self, answer: Callable[[], Any]) -> None:
        self.remaining = lambda view: answer()
        self.quantile = lambda view, q: answer()
        self.observe = lambda view: answer()


class Displacing:
    """An order by arrival that says of everybody that he displaces everybody, in its own way."""

    def __init__(self, answer: Callable[[], Any]) -> None:
        self.displaces = lambda waiter, runner: answer()

    def __call__(self, view: Any) -> tuple[float, ...]:
        return (view.number,)


def raising() -> Any:
    raise RuntimeError("a plug-in's bug")


FAILING: list[tuple[str, str, Any, str]] = [
    ("order", "raises", lambda view: raising(), "raised RuntimeError: a plug-in's bug"),
    ("order", "nan", lambda view: (math.nan,), "returned (nan,)"),
    ("order", "type", lambda view: "first", "returned 'first'"),
    ("order", "list", lambda view: [1.0], "returned [1.0]"),
    ("victim", "raises", lambda view, offer: raising(), "raised RuntimeError: a plug-in's bug"),
    ("victim", "nan", lambda view, offer: (math.nan,), "returned (nan,)"),
    ("victim", "type", lambda view, offer: None, "returned None"),
    ("prediction", "raises", Predicting(raising), "raised RuntimeError: a plug-in's bug"),
    ("prediction", "nan", Predicting(lambda: math.nan), "returned nan"),
    ("prediction", "type", Predicting(lambda: "many"), "returned 'many'"),
    ("prediction", "negative", Predicting(lambda: -1.0), "returned -1.0"),
]


async def pressed(server: Rig) -> list[Any]:
    """The choices of four sequences of some 13 blocks each, over a pool of 20."""
    prompts = ["a" * 40, "b" * 40, "c" * 40, "d" * 40]
    status, answer = await server.post(TEXT, prompt=prompts, max_tokens=160, temperature=0.0)
    assert status == 200, answer
    choices: list[Any] = answer["choices"]
    return choices


@pytest.mark.parametrize(
    ("family", "name", "plugin", "what"), FAILING, ids=[f"{f}-{n}" for f, n, *_ in FAILING]
)
async def test_a_failing_plug_in_costs_no_answer_is_counted_and_told_once(
    family: str, name: str, plugin: Any, what: str
) -> None:
    async with rig() as unpressured:
        truth = await pressed(unpressured)
    path, stream = f"broken:{name}", io.StringIO()
    policies = PolicyConfig(parameters=UNFORESEEN).having({family: path})
    async with (
        logged(stream),
        rig(blocks=20, context=320, policies=policies, plugins={family: {path: plugin}}) as server,
    ):
        assert await pressed(server) == truth
        samples = await scrape(server)
    assert value(samples, "vllm:num_preemptions_total") > 0
    assert value(samples, "sluice:policy_failures_total", family=family, policy=path) > 1
    (line,) = lines(stream, "policy_failed")
    assert (line["family"], line["policy"], line["what"]) == (family, path, what)


async def test_a_failing_plug_in_decides_as_the_plainest_would() -> None:
    async with rig(blocks=20, context=320) as plain:
        await pressed(plain)
        expected = plain.engine.state()["preemptions"]
    for family in PLAINEST:
        plugin = Predicting(raising) if family == "prediction" else lambda *asked: raising()
        policies = PolicyConfig(parameters=UNFORESEEN).having({family: "broken:x"})
        async with rig(
            blocks=20, context=320, policies=policies, plugins={family: {"broken:x": plugin}}
        ) as server:
            await pressed(server)
            assert server.engine.state()["preemptions"] == expected


@pytest.mark.parametrize("answer", [raising, lambda: "yes", lambda: None])
async def test_who_displaces_whom_is_guarded_too(answer: Callable[[], Any]) -> None:
    policies = PolicyConfig(order="broken:x", parameters=UNFORESEEN)
    plugins = {"order": {"broken:x": Displacing(answer)}}
    async with rig(max_sequences=2, blocks=20, context=320, policies=policies, plugins=plugins) as server:
        await pressed(server)
        samples = await scrape(server)
    assert value(samples, "sluice:policy_failures_total", family="order", policy="broken:x") > 0


def guarded(plugin: Any, failures: list[str], family: str = "prediction") -> Any:
    """As a policy in force."""
    catalog = Catalog({family: {"house:x": plugin}})
    made = catalog.make(
        PolicyConfig().having({family: "house:x"}), lambda *failed: failures.append(failed[2])
    )
    return getattr(made, family)


def test_a_predicted_length_is_no_more_than_max_tokens_leave() -> None:
    failures: list[str] = []
    predictor = guarded(Predicting(lambda: sys.float_info.max), failures)
    view = View(1, max_tokens=100, output_tokens=30)
    assert predictor.remaining(view) == predictor.quantile(view, 0.5) == 70
    assert not failures


NONSENSE: list[dict[str, Any]] = [
    {"moves": None},
    {"moves": iter(())},
    {"stayed": None},
    {"moves": (Move("nobody", 0, 0, 0, "", 1.0, 0.0),)},
    {"stayed": -1},
]


@pytest.mark.parametrize("answer", [None, *(Round(**wrong) for wrong in NONSENSE)])
def test_a_round_that_is_none_moves_nobody(answer: Any) -> None:
    failures: list[str] = []
    assert guarded(lambda *asked: answer, failures, "rebalancing")([], [], 0.0, Limits()) == Round()
    assert len(failures) == 1


REPLICAS = [SimpleNamespace(number=number) for number in range(2)]


def test_a_move_to_a_replica_that_is_no_whole_number_is_nonsense() -> None:
    """Regression: 1.0 was taken for 1 until it was an index, which ended the process."""
    failures: list[str] = []
    twin: Any = SimpleNamespace(request="a", choice=0)
    target: Any = 1.0
    answer = Round((Move("a", 0, 0, target, "", 1.0, 0.0),))
    rebalancing = guarded(lambda *asked: answer, failures, "rebalancing")
    assert rebalancing(REPLICAS, [twin], 0.0, Limits()) == Round()
    assert len(failures) == 1


@pytest.mark.parametrize("wrong", [{"replica": 1.0}, {"replica": 2}, {"score": None}, {"alternatives": None}])
def test_a_placement_that_is_none_is_the_plainest_policys(wrong: dict[str, Any]) -> None:
    """Regression: 1.0 was taken for 1 until it was an index; a request's timeline was a 500 without alternatives."""
    placed: dict[str, Any] = {"replica": 1, "score": 0.0, "reason": "so", "alternatives": ()}
    wanted = Placed(0, 0.0, "the plainest's", ())
    failures: list[str] = []
    routing = GuardedRouting(lambda asked: Placed(**placed | wrong), lambda asked: wanted, failures.append)
    assert routing(REPLICAS) is wanted
    assert len(failures) == 1
    assert (
        GuardedRouting(lambda asked: Placed(**placed), lambda asked: wanted, failures.append)(REPLICAS)
        != wanted
    )


def test_who_comes_back_is_loaded_where_a_plug_in_fails_to_choose_though_another_way_is_cheaper() -> None:
    failures: list[str] = []
    ways = [
        Way(name, 0, price, 0.0, price) for name, price in ((RELOAD, 3.0), (SPLIT, 1.0), (RECOMPUTE, 2.0))
    ]
    assert guarded(lambda ways: "neither", failures, "resume")(ways) is ways[0]
    assert failures == ["returned 'neither'"]


def test_the_survival_of_a_predictor_that_does_not_say_is_that_of_its_quantiles() -> None:
    plugin = SimpleNamespace(quantile=lambda view, q: 100.0 * q)
    failures: list[str] = []
    view = View(1, max_tokens=100)
    assert guarded(plugin, failures).survival(view, 30.0) == pytest.approx(0.7, abs=0.01)
    plugin.survival = lambda view, steps: 0.25
    assert guarded(plugin, failures).survival(view, 30.0) == 0.25
    assert not failures
    plugin.survival = lambda view, steps: 1.5
    assert guarded(plugin, failures).survival(view, 30.0) == 1.0, "as max_tokens has it"
    assert failures == ["returned 1.5"]


RESUMES = """
def raises(ways):
    raise RuntimeError("a plug-in's bug")

def nonsense(ways):
    return "reload"

class Enabled:
    enabled = ("teleport",)
    def __call__(self, ways):
        return ways[-1]
"""


@pytest.mark.parametrize("name", ["raises", "nonsense", "Enabled"])
async def test_a_whole_server_with_a_failing_way_back_answers_right(
    module: Callable[[str, str], None], name: str
) -> None:
    """The shipped model with a host tier, three times too few blocks, and preemptions by an operator."""
    module("plugs_resume", RESUMES)
    prompts = [f"{word} upon a time there was " * 6 for word in ("Once", "Twice", "Never")]
    path = f"plugs_resume:{name}"
    unforeseen = {"admission": {"risk": 1.0, "wait_steps": 0}}
    config = configuration(kv_blocks=12, host_bytes=2**22)
    config = config.model_copy(
        update={"policies": PoliciesSection.model_validate(unforeseen | {"resume": path})}
    )
    async with served(configuration()) as server:
        truth = await asyncio.gather(*(server.asked(prompt=prompt, max_tokens=60) for prompt in prompts))
    async with served(config) as server:
        answers = await asyncio.gather(*(server.asked(prompt=prompt, max_tokens=60) for prompt in prompts))
        assert await server.metric("vllm:num_preemptions_total") > 0
        failures = await server.metric("sluice:policy_failures_total", family="resume", policy=path)
    assert [answer.text for answer in answers] == [answer.text for answer in truth]
    assert failures > 0


async def test_a_log_of_a_plug_in_that_fails_differently_each_time_has_an_end() -> None:
    stream, count = io.StringIO(), iter(range(10**6))
    policies = PolicyConfig(order="broken:x", parameters=UNFORESEEN)
    plugins = {"order": {"broken:x": lambda view: f"{next(count)}"}}
    async with logged(stream), rig(blocks=20, context=320, policies=policies, plugins=plugins) as server:
        await pressed(server)
    assert next(count) > 20
    assert len(lines(stream, "policy_failed")) == 20


async def test_a_plug_in_that_works_decides() -> None:
    """The newest first: of two that wait, the second is served before the first."""
    policies = PolicyConfig(order="mine:newest", parameters=UNFORESEEN)
    plugins = {"order": {"mine:newest": lambda view: (-view.number,)}}
    async with rig(max_sequences=1, policies=policies, plugins=plugins) as server:
        server.worker.gate.clear()
        ended: list[int] = []

        async def ask(number: int) -> None:
            await server.post(TEXT, prompt="a", max_tokens=3)
            ended.append(number)

        calls = []
        for number in range(3):
            calls.append(asyncio.ensure_future(ask(number)))
            await server.until(running=number + 1)
        server.worker.gate.set()
        await asyncio.gather(*calls)
        samples = await scrape(server)
    assert ended == [0, 2, 1]
    assert not any(name == "sluice:policy_failures_total" for name, _ in samples)
