"""The sampler's arithmetic in torch: for CUDA, and the reference that the CPU's loops are tested against.

What is drawn is defined in sampler.py. Nothing here waits for the device: what shapes the work (which
rows are greedy, which are filtered) is known on the host. All sums are of integers, the rest is
elementwise or picks, so a row's bits never depend on the other rows, though those of torch's reductions
and scans of floats may.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.sampler_rows import FLOOR, GOLDEN, MASS_BITS, MIX_1, MIX_2, Rows, Summary
from engine.sampler_table import Table

_CHUNK_ELEMENTS = 1 << 24  # logits drawn from at once: each takes about five temporaries of 8 bytes
_ID_BITS = 32


def draw(
    logits: Tensor, table: Table, slots: NDArray[np.int64], positions: NDArray[np.int64]
) -> tuple[Tensor, Tensor]:
    """Tokens int64 [S], and bool [S]: whether the row could be drawn from. logits: fp32 or bf16 [S, V]."""
    rows = table.rows(slots, positions)
    peaks, tokens = logits.max(dim=-1)  # the lowest id among equals; NaN wins
    sampled = np.flatnonzero(rows.inverse_temperatures)
    chunk = max(1, _CHUNK_ELEMENTS // logits.shape[1])
    for start in range(0, len(sampled), chunk):
        part = sampled[start : start + chunk]
        index = upload(part, logits.device)
        tokens[index] = _draw_sampled(logits[index], peaks[index], _take(rows, part))
    return tokens, torch.isfinite(peaks)


def summarise(logits: Tensor, wanted: NDArray[np.int64], tokens: Tensor, top: int) -> Summary:
    """What logprobs need of the rows `wanted` [A] of logits [S, V]; they drew `tokens`[wanted]."""
    index = upload(wanted, logits.device)
    raw = logits[index].float()
    peaks = raw.amax(dim=-1)
    masses = _masses(raw.double() - peaks.double()[:, None]).sum(dim=-1)
    chosen = raw.gather(1, tokens[index][:, None])[:, 0]
    ids = _likeliest(raw, min(top, raw.shape[1]))
    return Summary(peaks, masses, chosen, ids, raw.gather(1, ids))


def released_seconds() -> float:
    """Not known for torch's own operations: none is claimed."""
    return 0.0


def upload(array: NDArray[np.generic], device: torch.device) -> Tensor:
    """A tensor on the device, copied behind the work already queued there: through pinned memory on CUDA."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def download(tensor: Tensor) -> Tensor:
    """A tensor on the host, filled once the work queued so far is done: wait for a `mark` made after it."""
    if tensor.device.type != "cuda":
        return tensor.cpu()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def mark(device: torch.device) -> torch.cuda.Event | None:
    """Something to wait for: all work queued on the device so far. None where nothing is ever queued."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch leaves its constructor untyped
    event.record(torch.cuda.current_stream(device))
    return event


def _draw_sampled(logits: Tensor, peaks: Tensor, rows: Rows) -> Tensor:
    """Rows at a temperature: [s, V], [s] -> [s]."""
    device, vocabulary = logits.device, logits.shape[1]
    distances = logits.double().sub_(peaks.double()[:, None])
    distances.mul_(upload(rows.inverse_temperatures, device)[:, None])
    scores = distances + _gumbel(upload(rows.keys.view(np.int64), device), vocabulary)
    scores.masked_fill_(distances < upload(rows.floors, device)[:, None], -torch.inf)
    filtered = np.flatnonzero((rows.top_k < vocabulary) | (rows.top_p < 1))
    if len(filtered):
        index = upload(filtered, device)
        dropped = _beyond_cut(distances[index], _take(rows, filtered))
        scores[index] = scores[index].masked_fill_(dropped, -torch.inf)
    return scores.argmax(dim=-1)


def _beyond_cut(distances: Tensor, rows: Rows) -> Tensor:
    """bool [s, V]: what top-k, then top-p drop. Ordered by distance, equal ones by id."""
    ordered, ids = distances.sort(dim=-1, descending=True, stable=True)
    sums = _masses(ordered).cumsum(dim=-1)
    kept = torch.minimum(upload(rows.top_k, distances.device), (ordered >= FLOOR).sum(dim=-1))
    last = kept.sub_(1).clamp_(min=0)[:, None]  # negative only where the logits are broken
    total = sums.gather(1, last)
    target = (upload(rows.top_p, distances.device)[:, None] * total.double()).ceil().long()
    target = target.clamp(min=1).minimum(total)
    last = torch.minimum(last, torch.searchsorted(sums, target))
    cut, cut_id = ordered.gather(1, last), ids.gather(1, last)
    every_id = torch.arange(distances.shape[1], device=distances.device)
    return (distances < cut) | ((distances == cut) & (every_id > cut_id))


def _masses(distances: Tensor) -> Tensor:
    """round(exp(distance) * 2**MASS_BITS) from FLOOR up, else 0."""
    masses = distances.exp().mul_(2.0**MASS_BITS).add_(0.5).long()
    return masses.masked_fill_(distances < FLOOR, 0)


def _likeliest(raw: Tensor, count: int) -> Tensor:
    """Ids [A, count] of the largest logits, equal ones by id: torch.topk alone leaves that open."""
    bits = raw.view(torch.int32).long()
    magnitudes = torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)  # orders as the floats do, -0 with 0
    reversed_ids = torch.arange(raw.shape[1], device=raw.device).neg_().add_((1 << _ID_BITS) - 1)
    top = ((magnitudes << _ID_BITS) + reversed_ids).topk(count, dim=-1).values
    return (1 << _ID_BITS) - 1 - (top & ((1 << _ID_BITS) - 1))


def _gumbel(keys: Tensor, vocabulary: int) -> Tensor:
    """int64 [s] -> fp64 [s, V], of key and token id alone. int64 wraps just as the loops' uint64 does."""
    ids = torch.arange(1, vocabulary + 1, device=keys.device)
    bits = _mix(keys[:, None] + ids * _signed(GOLDEN))
    uniform = _shifted(bits, 12).double().add_(0.5).mul_(2.0**-52)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)).mul_(_signed(MIX_1))
    x = (x ^ _shifted(x, 27)).mul_(_signed(MIX_2))
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, by: int) -> Tensor:
    """A logical shift to the right: torch's is arithmetic."""
    return (x >> by).bitwise_and_((1 << (64 - by)) - 1)


def _signed(constant: int) -> int:
    return constant - (1 << 64)


def _take(rows: Rows, index: NDArray[np.int64]) -> Rows:
    return Rows(
        rows.keys[index],
        rows.inverse_temperatures[index],
        rows.floors[index],
        rows.top_k[index],
        rows.top_p[index],
    )
