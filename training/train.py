"""Train the demonstration model; can be stopped (SIGTERM or SIGINT saves) and started again at any time.

    python -m training.train DATA --model app/shipped/tales --checkpoint run.safetensors --tokens 30000000

The budget counts tokens, so that a pause does no harm.  The learning rate warms up, stays, and falls linearly
to zero over the last part of the budget; rows are short (512) first and long (2,048) at the end.  Starting
again with another ``--tokens`` moves the end; ``--decay-from-now`` lets the rate fall from there on.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import save
from tokenizers import Tokenizer
from torch import Tensor

from training import corpus, rows
from training.model import Llama, pick_device, shape_from
from training.tokenizer import export, replace

SHORT, LONG = 512, 2048
WARM_SHARE, LONG_SHARE, DECAY_SHARE = 0.02, 0.8, 0.7

Loss = Callable[[Tensor, Tensor], Tensor]  # ids and weights [B, C+1] -> mean nats
Source = Callable[[int, int], rows.Rows]  # context, epoch -> the rows of that epoch


@dataclass
class State:
    """Where the run stands and what it aims at; counts are tokens, except ``epoch`` and ``cursor`` (rows)."""

    budget: int
    decay_start: int
    long_start: int
    tokens: int = 0
    epoch: int = 0
    cursor: int = 0
    context: int = SHORT

    @classmethod
    def planned(cls, budget: int) -> State:
        """A fresh run of ``budget`` tokens."""
        return cls(budget, int(DECAY_SHARE * budget), int(LONG_SHARE * budget))

    def replan(self, budget: int, decay_now: bool) -> None:
        """Move the end of the run to ``budget`` tokens, and the start of the decay to now if asked."""
        if budget != self.budget:
            self.decay_start, self.long_start = int(DECAY_SHARE * budget), int(LONG_SHARE * budget)
        if decay_now:
            self.decay_start = self.tokens
        self.budget = budget

    def rate(self) -> float:
        """The present learning rate as a share of its peak, 0 to 1."""
        warm = min(1.0, (self.tokens + 1) / (WARM_SHARE * self.budget))
        fall = (self.budget - self.tokens) / max(1, self.budget - self.decay_start)
        return max(0.0, min(warm, fall, 1.0))

    @property
    def done(self) -> bool:
        """Whether the budget is spent."""
        return self.tokens >= self.budget


# ---------------------------------------------------------------- optimisers and checkpoints


@dataclass(frozen=True)
class Settings:
    """Peak learning rates, and tokens in one step."""

    muon_rate: float = 0.008
    adam_rate: float = 0.004
    batch_tokens: int = 8192
    seed: int = 0


class Trainer:
    """Model, optimisers and state of one run."""

    def __init__(
        self, model: Llama, state: State, settings: Settings, device: torch.device, compiled: bool
    ) -> None:
        self.model, self.state, self.settings, self.device = model.to(device), state, settings, device
        named = dict(model.named_parameters())
        hidden = {n: p for n, p in named.items() if p.dim() == 2 and "embed" not in n}
        other = {n: p for n, p in named.items() if n not in hidden}
        muon = torch.optim.Muon(hidden.items(), lr=settings.muon_rate, adjust_lr_fn="match_rms_adamw")
        adam = torch.optim.AdamW(other.values(), lr=settings.adam_rate, betas=(0.9, 0.95), weight_decay=0.0)
        self.optimizers = {"muon": (muon, hidden), "adam": (adam, other)}
        self.loss: Loss = torch.compile(self._loss, dynamic=False) if compiled else self._loss

    def _loss(self, ids: Tensor, weights: Tensor) -> Tensor:
        """Weighted mean of the cross entropy in nats; ids and weights [B, C+1]."""
        with torch.autocast(self.device.type, torch.bfloat16):
            logits = self.model(ids[:, :-1])
        losses = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
        asked = weights[:, 1:].flatten()
        return (losses * asked).sum() / asked.sum()

    def step(self, ids: Tensor, weights: Tensor) -> float:
        """One update from a batch [B, C+1]; returns its loss in nats."""
        loss = self.loss(ids, weights)
        loss.backward()  # type: ignore[no-untyped-call]  # torch's omission
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        peaks = {"muon": self.settings.muon_rate, "adam": self.settings.adam_rate}
        for name, (optimizer, _) in self.optimizers.items():
            optimizer.param_groups[0]["lr"] = peaks[name] * self.state.rate()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.state.tokens += ids.shape[0] * (ids.shape[1] - 1)
        return loss.item()

    def save(self, path: Path) -> None:
        """Write weights, optimiser state and progress to one safetensors file, replacing it in one step."""
        tensors = {f"model/{name}": p.detach() for name, p in self.model.named_parameters()}
        for kind, (optimizer, named) in self.optimizers.items():
            for name, p in named.items():
                tensors |= {f"{kind}/{name}/{key}": value for key, value in optimizer.state[p].items()}
        plain = {name: value.cpu().contiguous() for name, value in tensors.items()}
        replace(path, save(plain, metadata={"state": json.dumps(asdict(self.state))}))

    def load(self, path: Path) -> None:
        """Continue from a checkpoint that ``save`` wrote."""
        with safe_open(path, framework="pt") as stored:
            self.state = State(**json.loads(stored.metadata()["state"]))
            for key in stored.keys():  # noqa: SIM118 (it is no mapping)
                self._restore(key.split("/"), stored.get_tensor(key))

    @torch.no_grad()
    def _restore(self, parts: list[str], value: Tensor) -> None:
        if parts[0] == "model":
            self.model.get_parameter(parts[1]).copy_(value)
            return
        optimizer, named = self.optimizers[parts[0]]
        where = "cpu" if parts[2] == "step" else self.device
        optimizer.state[named[parts[1]]][parts[2]] = value.to(where)


# ---------------------------------------------------------------- data and measuring


Batch = tuple[Tensor, Tensor]


def batches(trainer: Trainer, source: Source) -> Iterator[Batch]:
    """Batches from where the state stands until the budget is spent."""
    state = trainer.state
    while not state.done:
        if state.context == SHORT and state.tokens >= state.long_start:
            state.context, state.epoch, state.cursor = LONG, state.epoch + 1, 0
        epoch = source(state.context, state.epoch)
        yield from _from_epoch(trainer, epoch, max(1, trainer.settings.batch_tokens // state.context))
        if state.context == LONG or state.tokens < state.long_start:
            state.epoch, state.cursor = state.epoch + 1, 0


def _from_epoch(trainer: Trainer, epoch: rows.Rows, count: int) -> Iterator[Batch]:
    """The rest of one epoch; ends early when the budget is spent or longer rows are due."""
    state = trainer.state
    while state.cursor + count <= len(epoch.ids) and not state.done:
        if state.context == SHORT and state.tokens >= state.long_start:
            return
        chosen = slice(state.cursor, state.cursor + count)
        state.cursor += count
        ids = torch.from_numpy(epoch.ids[chosen].astype(np.int64))
        weights = torch.from_numpy(epoch.weights[chosen].astype(np.float32) / 10)
        yield ids.to(trainer.device), weights.to(trainer.device)


class HeldOut:
    """A fixed sample of held-out text for watching a run: rows of 512 tokens, measured in bits per byte."""

    def __init__(self, tokenizer: Tokenizer, works: list[corpus.Work], limit: int = 64) -> None:
        parts = [
            ids[i : i + SHORT + 1]
            for ids in rows.encode_works(tokenizer, works)
            for i in range(0, len(ids) - SHORT - 1, SHORT)
        ]
        stride = max(1, len(parts) // limit)
        self.ids = torch.from_numpy(np.stack(parts[::stride]).astype(np.int64))
        self.bytes = int(rows.token_bytes(tokenizer)[self.ids[:, 1:].numpy()].sum())

    @torch.inference_mode()
    def bits_per_byte(self, model: Llama, device: torch.device) -> float:
        """Bits the model needs for one byte of the sample."""
        nats = 0.0
        for part in torch.split(self.ids.to(device), 16):
            with torch.autocast(device.type, torch.bfloat16):
                logits = model(part[:, :-1])
            targets = part[:, 1:].flatten()
            nats += F.cross_entropy(logits.flatten(0, 1).float(), targets, reduction="sum").item()
        return nats / math.log(2) / self.bytes


# ---------------------------------------------------------------- the run


class Interrupt:
    """Set by SIGTERM and SIGINT: the run saves after the present step and ends."""

    def __init__(self) -> None:
        self.asked = False
        signal.signal(signal.SIGTERM, self._ask)
        signal.signal(signal.SIGINT, self._ask)

    def _ask(self, *_: object) -> None:
        self.asked = True


class Meter:
    """The progress bar, with a line to the log now and then."""

    def __init__(self, state: State) -> None:
        fields = ("{task.percentage:>5.1f}%", "{task.fields[note]}", "{task.fields[bpb]} bits/byte held out")
        self.bar = Progress(BarColumn(), *map(TextColumn, fields), TimeRemainingColumn())
        self.task = self.bar.add_task("", total=state.budget, completed=state.tokens, note="", bpb="-")
        self.loss, self.mark = 0.0, (time.monotonic(), state.tokens)

    def step(self, state: State, loss: float) -> None:
        """Show one step."""
        self.loss = loss if not self.loss else 0.98 * self.loss + 0.02 * loss
        note = f"loss {self.loss:.3f}, {self._speed(state):,.0f} tokens/s"
        self.bar.update(self.task, completed=state.tokens, note=note)

    def measured(self, state: State, bpb: float) -> None:
        """Show a held-out measurement and write it to the log."""
        self.bar.update(self.task, bpb=f"{bpb:.3f}")
        line = (
            f"{time.strftime('%H:%M:%S')} {state.tokens:,} tokens, epoch {state.epoch}, "
            f"rows of {state.context}, rate {state.rate():.2f}, loss {self.loss:.3f}, {bpb:.4f} bits/byte, "
            f"{self._speed(state):,.0f} tokens/s"
        )
        self.bar.console.print(line, highlight=False, soft_wrap=True)
        self.mark = (time.monotonic(), state.tokens)

    def _speed(self, state: State) -> float:
        """Tokens a second since the last measurement."""
        return (state.tokens - self.mark[1]) / (time.monotonic() - self.mark[0])


def run(trainer: Trainer, source: Source, held_out: HeldOut, checkpoint: Path, out: Path, every: int) -> None:
    """Train until the budget is spent or a signal comes, saving every ``every`` tokens and at the end."""
    stop, meter, due = Interrupt(), Meter(trainer.state), trainer.state.tokens + every
    with meter.bar:
        for ids, weights in batches(trainer, source):
            meter.step(trainer.state, trainer.step(ids, weights))
            if trainer.state.tokens >= due or trainer.state.done or stop.asked:
                due = trainer.state.tokens + every
                meter.measured(trainer.state, held_out.bits_per_byte(trainer.model, trainer.device))
                trainer.save(checkpoint)
                export(trainer.model, out)
            if stop.asked:
                return


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with the *.jsonl.gz texts")
    parser.add_argument("--model", type=Path, required=True, help="folder that training.tokenizer wrote")
    parser.add_argument("--checkpoint", type=Path, required=True, help="file to resume from and to save to")
    parser.add_argument("--tokens", type=int, default=30_000_000, help="budget of the whole run")
    parser.add_argument(
        "--decay-from-now", action="store_true", help="let the learning rate fall from here on"
    )
    parser.add_argument("--every", type=int, default=1_000_000, help="tokens between saves")
    parser.add_argument("--muon-rate", type=float, default=Settings.muon_rate)
    parser.add_argument("--adam-rate", type=float, default=Settings.adam_rate)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args()


def main() -> None:
    """Command line."""
    given = arguments()
    tokenizer = Tokenizer.from_file(str(given.model / "tokenizer.json"))
    works, held_out = corpus.split(corpus.load(given.data))
    settings = Settings(given.muon_rate, given.adam_rate, seed=given.seed)
    model = Llama(shape_from(given.model / "config.json"), given.seed)
    trainer = Trainer(model, State.planned(given.tokens), settings, pick_device(given.device), given.compile)
    if given.checkpoint.exists():
        trainer.load(given.checkpoint)
        trainer.state.replan(given.tokens, given.decay_from_now)

    def source(context: int, epoch: int) -> rows.Rows:
        """Everything in short rows first; only the tales, and the chats about them, in the long ones."""
        chosen = works if context == SHORT else corpus.tale_works(works)
        return rows.epoch_rows(tokenizer, chosen, context, given.seed * 1000 + epoch)

    run(trainer, source, HeldOut(tokenizer, held_out), given.checkpoint, given.model, given.every)


if __name__ == "__main__":
    main()
