"""A run that was stopped and resumed is the run that was not, and its plan follows the budget."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from training import rows, train
from training.corpus import Work
from training.model import Llama, Shape
from training.train import Settings, State, Trainer

TINY = Shape(32, 64, 2, 2, 1, 16, 320, 2048)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def short_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 32 and then 64 tokens."""
    monkeypatch.setattr(train, "SHORT", 32)
    monkeypatch.setattr(train, "LONG", 64)


@pytest.fixture
def source(tokenizer: Tokenizer, works: list[Work]) -> train.Source:
    """The rows of the tiny corpus."""
    return lambda context, epoch: rows.epoch_rows(tokenizer, works[:1], context, epoch)


def fresh(budget: int = 4096) -> Trainer:
    """A tiny run of eight rows a step."""
    state = State.planned(budget)
    state.context = 32
    return Trainer(Llama(TINY, seed=1), state, Settings(batch_tokens=256), CPU, compiled=False)


def losses(trainer: Trainer, source: train.Source, steps: int) -> list[float]:
    """The losses of the next steps, fewer at the end of the budget."""
    found: list[float] = []
    for ids, weights in train.batches(trainer, source):
        found.append(trainer.step(ids, weights))
        if len(found) == steps:
            break
    return found


def test_a_resumed_run_equals_an_uninterrupted_one(source: train.Source, tmp_path: Path) -> None:
    whole = losses(fresh(), source, 99)
    first, second = fresh(), fresh()
    begun = losses(first, source, 6)
    first.save(tmp_path / "run.safetensors")
    second.load(tmp_path / "run.safetensors")
    assert second.state == first.state
    assert begun + losses(second, source, 99) == whole


def test_the_loss_falls_and_the_budget_is_spent_with_long_rows_last(source: train.Source) -> None:
    trainer = fresh(8192)
    found = losses(trainer, source, 999)
    assert sum(found[-4:]) < sum(found[:4])
    assert trainer.state.done
    assert trainer.state.context == 64
    assert trainer.state.tokens == 8192


def test_the_rate_warms_up_stays_and_falls_to_zero() -> None:
    state = State.planned(1000)
    rates = []
    for state.tokens in range(0, 1001, 10):
        rates.append(state.rate())
    assert rates[0] < 0.1
    assert rates[10] == rates[60] == 1.0
    assert rates[85] == pytest.approx(0.5)
    assert rates[-1] == 0.0


def test_a_decay_asked_for_now_begins_now_and_ends_with_the_new_budget() -> None:
    state = State.planned(1000)
    state.tokens = 300
    state.replan(600, decay_now=True)
    assert state.rate() == 1.0
    assert state.long_start == 480
    state.tokens = 450
    assert state.rate() == pytest.approx(0.5)


def test_the_model_sees_no_later_token_and_uses_none_of_them() -> None:
    model = Llama(TINY, seed=1)
    ids = torch.randint(0, 320, (1, 24), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[0, 16:] = 5
    before, after = model(ids), model(changed)
    torch.testing.assert_close(before[:, :16], after[:, :16])
    assert not torch.allclose(before[:, 17:], after[:, 17:])
