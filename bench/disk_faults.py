"""Bit flips in the disk tier's store: `python -m bench.disk_faults [--trials 500]`.

At rest: one flip, then a fresh process opens the store, reads all of it, writes and drops, and opens it again. Half of
the trials flip a bit in LMDB's own pages, by type, half in records. While open: flips under a process that goes on
reading and writing; it may die, as LMDB trusts its pages, but the next one opens the store. Bytes are never wrong.

Fails where bytes were wrong, or where an opening process died.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from mmap import ACCESS_READ, PAGESIZE, mmap
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO, Final

import numpy as np
from rich.table import Table

from bench.report import console
from kvstore.audit import BRANCH_PAGE, FREE_PAGE, FREE_TREE_PAGE, LEAF_PAGE, META_PAGE, VALUE_PAGE, Audit
from kvstore.copies import Loss, Place
from kvstore.disk import DiskTier
from kvstore.format import HEADER_BYTES, PAGE_HEADER_BYTES, value_pages
from kvstore.lmdb_pages import TREE_PAGE
from kvstore.tier import Buffer

BLOCK_BYTES: Final = 16_384
QUOTA_BYTES: Final = 2**26
RECORDS: Final = 2000
TREES: Final = {"meta": META_PAGE, "branch": BRANCH_PAGE, "leaf": LEAF_PAGE, "free list": FREE_TREE_PAGE}
RECORD_PARTS: Final = ("page header", "record header", "payload")
WRONG: Final = 99  # a child's status: it was given wrong bytes

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.disk_faults", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rows", type=Path, help="write raw rows to this file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        sys.exit(child(given.child, given.path, given.seed))
    rows = trials(given.trials, given.seed, given.workers)
    if given.rows:
        given.rows.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for when in ("at rest", "while open"):
        console().print(table(when, [row for row in rows if row["when"] == when]))
    failed = [row for row in rows if row["outcome"] in ("wrong", "dead")]
    for row in failed:
        print("FAILED", row)
    sys.exit(bool(failed))


def table(when: str, rows: list[Row]) -> Table:
    """Trials by where the flip was, and what came of it."""
    outcomes = ("audit", "checksum", "missing", "died", "harmless", "wrong", "dead")
    shown = Table("flip in", "trials", *outcomes, title=f"bit flips {when}")
    for place in dict.fromkeys(row["place"] for row in rows):
        found = Counter(row["outcome"] for row in rows if row["place"] == place)
        shown.add_row(place, str(found.total()), *(str(found[outcome] or "") for outcome in outcomes))
    return shown


# --- trials -----------------------------------------------------------------------------------------------------------


def trials(count: int, seed: int, workers: int) -> list[Row]:
    """Half at rest in LMDB's pages, half in records; a fifth as many again while open."""
    with TemporaryDirectory() as directory:
        base = Path(directory) / "base"
        build(base)
        kinds = page_kinds(base / "data.mdb")
        places = [*alternating(TREES, count // 2), *alternating(RECORD_PARTS, count - count // 2)]
        open_places = alternating([*TREES, *RECORD_PARTS], count // 5)
        jobs = [("at rest", place, seed + n) for n, place in enumerate(places)]
        jobs += [("while open", place, seed + count + n) for n, place in enumerate(open_places)]
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(lambda job: trial(base, kinds, *job), jobs))


def alternating(places: Iterable[str], count: int) -> list[str]:
    names = list(places)
    return sorted((names[n % len(names)] for n in range(count)), key=names.index)


def trial(base: Path, kinds: bytes, when: str, place: str, seed: int) -> Row:
    """One flip in a copy of the store, and what came of it."""
    random = Random(seed)
    with TemporaryDirectory(dir=base.parent) as directory:
        path = Path(directory) / "store"
        shutil.copytree(base, path)
        if when == "at rest":
            flips = [flip(path / "data.mdb", kinds, place, random)]
            outcome = opened(path, seed)
        else:
            outcome, flips = disturbed(path, kinds, place, random, seed)
    return {"when": when, "place": place, "seed": seed, "flips": flips, "outcome": outcome}


def opened(path: Path, seed: int) -> str:
    """What a fresh process makes of the store."""
    command = [
        sys.executable,
        "-m",
        "bench.disk_faults",
        "--child",
        "read",
        "--path",
        str(path),
        "--seed",
        str(seed),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
        return "wrong" if done.returncode == WRONG else "dead"
    return str(json.loads(done.stdout)["outcome"])


def disturbed(path: Path, kinds: bytes, place: str, random: Random, seed: int) -> tuple[str, list[list[int]]]:
    """Eight flips under a process that has the store open; then another opens it."""
    command = [
        sys.executable,
        "-m",
        "bench.disk_faults",
        "--child",
        "go on",
        "--path",
        str(path),
        "--seed",
        str(seed),
    ]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as user:
        assert user.stdin
        assert user.stdout
        assert user.stdout.readline() == b"open\n"
        flips = [flip(path / "data.mdb", kinds, place, random) for _ in range(8)]
        output, _ = user.communicate(b"go\n", timeout=120)
    after = opened(path, seed)
    if user.returncode == WRONG or after in ("wrong", "dead"):
        return ("wrong" if user.returncode == WRONG else after), flips
    return "died" if user.returncode else json.loads(output)["outcome"], flips


def flip(data: Path, kinds: bytes, place: str, random: Random) -> list[int]:
    """Flips one bit; which byte, and its mask. Seldom between the nodes of a tree's page, where nothing is."""
    mask = 1 << random.randrange(8)
    with data.open("r+b") as file:
        byte = random.choice(list(candidates(kinds, place, random)))
        while place in TREES and place != "meta" and unused(file, byte) and random.random() < 0.9:
            byte = random.choice(list(candidates(kinds, place, random)))
        file.seek(byte)
        (old,) = file.read(1)
        file.seek(byte)
        file.write(bytes([old ^ mask]))
    return [byte, mask]


def unused(file: BinaryIO, byte: int) -> bool:
    """Whether a byte of a tree's page lies between its lower and its upper bound."""
    page, offset = divmod(byte, PAGESIZE)
    file.seek(page * PAGESIZE)
    *_, lower, upper = TREE_PAGE.unpack(file.read(TREE_PAGE.size))
    return bool(lower <= offset < upper)


def candidates(kinds: bytes, place: str, random: Random) -> Iterator[int]:
    """One byte of each page of this type; of a meta page one that LMDB reads."""
    pages = value_pages(BLOCK_BYTES, PAGESIZE)
    if place in TREES:
        numbers = [number for number, kind in enumerate(kinds) if kind == TREES[place]]
        span = (0, 152) if place == "meta" else (0, PAGESIZE)
    else:
        values = [number for number, kind in enumerate(kinds) if kind == VALUE_PAGE]
        numbers = value_starts(values, pages)
        header = PAGE_HEADER_BYTES + HEADER_BYTES
        span = {
            "page header": (0, PAGE_HEADER_BYTES),
            "record header": (PAGE_HEADER_BYTES, header),
            "payload": (header, header + BLOCK_BYTES),
        }[place]
    return (number * PAGESIZE + random.randrange(*span) for number in numbers)


def value_starts(pages: list[int], each: int) -> list[int]:
    """First pages of values, from all their pages: neighbouring values stand in one run."""
    starts: list[int] = []
    for page in pages:
        if not starts or page >= starts[-1] + each:
            starts.append(page)
    return starts


def page_kinds(data: Path) -> bytes:
    with data.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as mapped:
        audit = Audit(mapped, file.fileno())
        audit.run()
        kinds = bytes(audit.kinds)
        del audit
    assert {*TREES.values(), VALUE_PAGE, FREE_PAGE} <= set(kinds), "every type of page is there"
    return kinds


# --- the store, and who uses it ---------------------------------------------------------------------------------------


def key_of(number: int) -> bytes:
    return sha256(b"%d" % number).digest()


def block_of(number: int) -> Buffer:
    return np.frombuffer(np.random.default_rng(number).bytes(BLOCK_BYTES), np.uint8)


def open_tier(path: Path) -> DiskTier:
    return DiskTier.open(path, quota_bytes=QUOTA_BYTES, block_bytes=BLOCK_BYTES, fingerprint="faults")


def write(tier: DiskTier, numbers: range, drops: range = range(0)) -> list[Loss | None]:
    places = [Place(key_of(number), tokens=16) for number in numbers]
    return tier.write(places, [block_of(number) for number in numbers], [key_of(number) for number in drops])


def build(path: Path) -> None:
    """RECORDS records, after as many others have come and gone."""
    tier = open_tier(path)
    step = tier.transaction_blocks
    for start in range(0, 2 * RECORDS, step):
        numbers = range(start, min(start + step, 2 * RECORDS))
        gone = range(max(0, numbers.start - RECORDS), max(0, numbers.stop - RECORDS))
        assert not any(write(tier, numbers, gone)), "the store has room"
    tier.close()


def child(task: str, path: Path, seed: int) -> int:
    """Uses the store, prints what came of it; WRONG where bytes were."""
    tier = open_tier(path)
    if task == "go on":
        print("open", flush=True)
        sys.stdin.readline()
    outcome = "audit" if tier.notice else use(tier, seed)
    if tier.notice and tier.records():
        return WRONG
    tier.close()
    if task == "read":
        tier = open_tier(path)
        if tier.notice and outcome not in ("audit", "broken"):
            raise SystemExit(f"what the first opening let pass, the second does not: {tier.notice}")
        use(tier, seed + 1)
        tier.close()
    print(json.dumps({"outcome": "checksum" if outcome == "broken" else outcome}))
    return 0


def use(tier: DiskTier, seed: int) -> str:
    """Reads all, writes and drops a share, and reads all again."""
    losses = read_all(tier)
    random = Random(seed)
    step = tier.transaction_blocks
    for _ in range(10):
        if tier.broken:
            break
        start, gone = random.choice(LATER), random.randrange(RECORDS, 2 * RECORDS)
        write(tier, range(start, start + step), range(gone, gone + step))
    later = read_all(tier)
    if tier.broken:
        return "broken"
    if losses[Loss.MISSING] or losses.keys() | later.keys() <= {None, Loss.MISSING}:
        return "missing" if losses[Loss.MISSING] else "harmless"
    return "checksum"


LATER: Final = range(10**6, 10**6 + 4000)
"""What is written after a flip; a write has some more."""

KNOWN: Final = {
    key_of(number): number for number in (*range(2 * RECORDS), *range(LATER.start, LATER.stop + 1000))
}


def read_all(tier: DiskTier) -> Counter[Loss | None]:
    """What reading every record answers. Ends the process where one was wrong."""
    found: Counter[Loss | None] = Counter(
        read(tier, key_of(number)) for number in range(RECORDS, 2 * RECORDS)
    )
    if not tier.broken:
        found.update(read(tier, place.key) for place in tier.records())
    return found


def read(tier: DiskTier, key: bytes) -> Loss | None:
    buffer = np.empty(BLOCK_BYTES, np.uint8)
    answer = tier.read([Place(key)], [buffer])[0]
    if answer is None and not np.array_equal(buffer, block_of(KNOWN[key])):
        sys.exit(WRONG)
    return answer


if __name__ == "__main__":
    main()
