"""What has been charged to each replica for the requests placed there, and not released: exact, never polled. Pure.

A sequence is charged once, when it is placed; the charge goes with it when it moves, and is released once, whatever its
end. Seconds are kept as whole nanoseconds, so that what is released is just what was charged, and nothing is left.
"""

from dataclasses import dataclass

ChoiceId = tuple[str, int]
"""(request id, choice)"""

NANO = 1_000_000_000


@dataclass(slots=True)
class Account:
    """Of one replica."""

    sequences: int = 0  # charged, and not released
    placed: int = 0  # ever
    nanoseconds: int = 0  # charged, and not released

    @property
    def seconds(self) -> float:
        return self.nanoseconds / NANO


class Ledger:
    def __init__(self, replicas: int) -> None:
        self.accounts = [Account() for _ in range(replicas)]
        self._charges: dict[ChoiceId, tuple[int, int]] = {}  # (replica, nanoseconds)

    def __len__(self) -> int:
        """Sequences that are charged to somebody."""
        return len(self._charges)

    def charge(self, sequence: ChoiceId, replica: int, seconds: float) -> None:
        assert sequence not in self._charges, f"{sequence} is charged already"
        nanoseconds = int(seconds * NANO)
        self._charges[sequence] = replica, nanoseconds
        account = self.accounts[replica]
        account.sequences += 1
        account.placed += 1
        account.nanoseconds += nanoseconds

    def release(self, sequence: ChoiceId) -> float:
        """The seconds that were charged."""
        replica, nanoseconds = self._charges.pop(sequence)
        account = self.accounts[replica]
        account.sequences -= 1
        account.nanoseconds -= nanoseconds
        return nanoseconds / NANO

    def move(self, sequence: ChoiceId, replica: int) -> None:
        """It is charged to another from now on."""
        self.charge(sequence, replica, self.release(sequence))

    def seconds(self, sequence: ChoiceId) -> float:
        charge = self._charges.get(sequence)
        return charge[1] / NANO if charge else 0.0

    def check(self) -> None:
        """Asserts that accounts and charges agree."""
        for number, account in enumerate(self.accounts):
            mine = [nanoseconds for replica, nanoseconds in self._charges.values() if replica == number]
            assert account.sequences == len(mine)
            assert account.nanoseconds == sum(mine)
