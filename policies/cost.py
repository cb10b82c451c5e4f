"""What a step and a copy cost, in seconds: fitted online on real ones, so that ways to come back can be compared.

A step: base + β · prefill tokens + γ · attended + δ · decode rows + ε · decode context + ζ · copies + η · copied bytes:
those begun with it, which on a CPU take its cores and everywhere the core's time.
A copy: latency + bytes ÷ bandwidth, per route.

Pure arithmetic on samples that the core is told of, so a replay fits the same figures. How they are fitted: fitting.py;
how one replica is told from others like it: pace.py. What they are for: coming back the cheapest way (design §5).
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from policies.fitting import SHORTEST_SECONDS, Fit
from policies.pace import Paces

DEVICE = "device"
DISK = "disk"

STEP_PRIOR = (1e-3, 5e-5, 4e-8, 1e-4, 2.5e-7, 3e-4, 3e-10)
"""Before the first sample: those of a 5 M model on two cores, in the order above. Later only their ratios count."""

MEMORY_PRIOR = (2e-5, 1 / 5e9)
DISK_PRIOR = (2e-4, 1 / 1e9)
"""Seconds a copy, and a byte."""

COPIES_CHANGED_AFTER = 5
"""Outliers in a row, as CHANGED_AFTER of fitting.py: copies are few, and behind a tier that has become slow, fewer."""

LOADS_KEPT = 9
"""Of a tier: loads of which is remembered how far their copies overlapped, and what they waited beside these: for
threads to wake, and for the loop to hear of it. Neither is of one kind, so their medians count."""


@dataclass(frozen=True, slots=True)
class StepSample:
    """A finished step. Prompt chunks are rows longer than one token, or short of the sequence's end."""

    prefill_tokens: int  # positions computed in prompt chunks
    attended: float  # Σ over these rows of n × (c + n / 2): n positions computed after c before them
    decode_rows: int
    decode_context: int  # Σ of their contexts (positions before the token)
    seconds: float
    copies: int = 0  # from and to the device, begun with it
    copied_bytes: int = 0


@dataclass(frozen=True, slots=True)
class CopySample:
    """A finished copy, of the bytes that arrived."""

    source: str
    target: str
    bytes: int
    seconds: float  # from the moment a thread took it up
    queued_seconds: float  # before that; not fitted: whoever asks knows what is queued now


class StepGroup:
    """What steps take on replicas that are alike: learned by all together."""

    def __init__(self) -> None:
        self.fit = Fit(STEP_PRIOR)
        self.paces = Paces()

    def observe(self, sample: StepSample, pace: float = 1.0) -> float:
        """Learns from a step of a replica of that pace; one without rows teaches nothing.

        Returns how many times what was predicted it took, for pace 1.
        """
        features = _features(sample)
        ratio = max(sample.seconds, SHORTEST_SECONDS) / max(self.fit.predict(features), SHORTEST_SECONDS)
        if sample.prefill_tokens or sample.decode_rows:
            self.fit.observe(_step_class(sample), features, sample.seconds / pace)
        return ratio


class StepCost:
    """Seconds of steps of one replica: what its group has learned, times its own pace beside the others.

    `number`: which of the group; its pace begins anew. `group` None: it is alone.
    """

    def __init__(self, group: StepGroup | None = None, number: int = 0) -> None:
        self._group = group or StepGroup()
        self._fit, self._paces, self._number = self._group.fit, self._group.paces, number
        self._paces.join(number)

    @property
    def samples(self) -> int:
        """Observed so far by the group, outliers included."""
        return self._fit.samples

    @property
    def pace(self) -> float:
        """Its seconds over those of the others, where the two differ for good; else 1."""
        return self._paces.of(self._number)

    @property
    def coefficients(self) -> tuple[float, ...]:
        """base, β, γ, δ, ε, ζ, η."""
        return tuple(self.pace * each for each in self._fit.coefficients)

    def observe(self, sample: StepSample) -> None:
        """Learns from a step; one without rows teaches nothing."""
        self._paces.observe(self._number, self._group.observe(sample, self.pace))

    def step_seconds(
        self, prefill_tokens: int, attended: float, decode_rows: int, decode_context: int
    ) -> float:
        """Of a step with no copies beside it."""
        return self.pace * self._fit.predict((1.0, prefill_tokens, attended, decode_rows, decode_context))

    def beside_seconds(self, copies: int, copied_bytes: int) -> float:
        """What copies add to the step that they are begun with."""
        *_, copy, byte = self._fit.coefficients
        return self.pace * (copy * copies + byte * copied_bytes)

    def recompute_seconds(
        self, cached: int, count: int, chunk: int, decode_rows: int = 0, decode_context: int = 0
    ) -> float:
        """Of `count` positions after `cached`, in steps of at most `chunk`, each of which carries the decode rows too.

        α⌈n/chunk⌉ + βn + γn(c + n/2), and the decode rows' share of every step.
        """
        step = self.step_seconds(0, 0.0, decode_rows, decode_context)
        return -(-count // chunk) * step + self.added_seconds(cached, count)

    def added_seconds(self, cached: int, count: int) -> float:
        """What `count` positions after `cached` add to steps that run anyway: βn + γn(c + n/2)."""
        _, token, attended, *_ = self._fit.coefficients
        return self.pace * (token * count + attended * count * (cached + count / 2))


def _features(sample: StepSample) -> tuple[float, ...]:
    work = sample.prefill_tokens, sample.attended, sample.decode_rows, sample.decode_context
    return (1.0, *work, sample.copies, sample.copied_bytes)


def _step_class(sample: StepSample) -> int:
    """By powers of four of what there is most of; steps with prompts, and with copies, apart from those without."""
    size = sample.prefill_tokens or sample.decode_rows
    return ((size.bit_length() + 1) // 2) * 4 + (sample.prefill_tokens > 0) * 2 + (sample.copies > 0)


class CopyCost:
    """Seconds of copies between tiers, by route. One without samples goes by the other direction's, then by a prior."""

    def __init__(self) -> None:
        self._routes: dict[tuple[str, str], Fit] = {}
        self._loads: dict[str, deque[tuple[float, float]]] = {}  # by tier: of each the overlap, and the wait
        self._usual: dict[str, tuple[float, float]] = {}  # the medians

    def observe(self, sample: CopySample) -> None:
        """Learns from a copy; one of which nothing arrived teaches nothing."""
        if sample.bytes > 0:
            route = sample.source, sample.target
            fit = self._routes.get(route)
            if fit is None:
                fit = self._routes[route] = Fit(_copy_prior(*route), COPIES_CHANGED_AFTER)
            fit.observe((sample.bytes.bit_length() + 1) // 2, (1.0, sample.bytes), sample.seconds)

    def observe_load(self, source: str, copying: float, elapsed: float) -> None:
        """Learns from loads, whose copies took so long, summed, in a time that is less where they overlapped."""
        overlap = min(1.0, elapsed / max(copying, SHORTEST_SECONDS))
        loads = self._loads.setdefault(source, deque(maxlen=LOADS_KEPT))
        loads.append((overlap, max(0.0, elapsed - copying)))
        overlaps, waits = zip(*loads, strict=True)
        self._usual[source] = median(overlaps), median(waits)

    def seconds(self, source: str, target: str, size: int) -> float:
        """From the moment a thread takes it up: latency + bytes ÷ bandwidth."""
        return self._copies_seconds(source, target, copies=1, size=size)

    def reload_seconds(self, source: str, size: int, copy_bytes: int, ahead_bytes: int = 0) -> float:
        """To the device, in copies of `copy_bytes`, behind `ahead_bytes` already queued on that route."""
        copies = -(-size // copy_bytes) + -(-ahead_bytes // copy_bytes)
        copying = self._copies_seconds(source, DEVICE, copies, size + ahead_bytes)
        alone = min(copying, self.seconds(source, DEVICE, copy_bytes))
        overlap, wait = self._usual.get(source, (1.0, 0.0))
        return max(alone, overlap * copying) + wait

    def _copies_seconds(self, source: str, target: str, copies: int, size: int) -> float:
        latency, byte = self._coefficients(source, target)
        return copies * latency + size * byte

    def _coefficients(self, source: str, target: str) -> tuple[float, ...]:
        fit = self._routes.get((source, target)) or self._routes.get((target, source))
        return fit.coefficients if fit else _copy_prior(source, target)


def _copy_prior(source: str, target: str) -> tuple[float, float]:
    return DISK_PRIOR if DISK in (source, target) else MEMORY_PRIOR


@dataclass
class CostModel:
    """All figures of one replica."""

    steps: StepCost = field(default_factory=StepCost)
    copies: CopyCost = field(default_factory=CopyCost)

    @classmethod
    def calibrated(
        cls, samples: Sequence[StepSample | CopySample] = (), group: StepGroup | None = None, number: int = 0
    ) -> "CostModel":
        """Knows these samples; none: the priors. Of steps, a group that has seen any knows better already."""
        group = group or StepGroup()
        model, known = cls(StepCost(group, number)), group.fit.samples > 0
        for sample in samples:
            if isinstance(sample, CopySample):
                model.copies.observe(sample)
            elif not known:
                group.observe(sample)
        return model

    def observe(self, sample: StepSample | CopySample) -> None:
        if isinstance(sample, StepSample):
            self.steps.observe(sample)
        else:
            self.copies.observe(sample)
