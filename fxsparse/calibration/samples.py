"""The candidates of a convolution and the times that they took."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from fxsparse import timing
from fxsparse.calibration.probes import Seen

# The layout of values within a region on CUDA; no layout of torch's.
BATCH_INNER = "batch_inner"
# A candidate this much slower than the best, after the first few runs, is not looked at again.
_OUT_OF_THE_RACE = 1.5


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to run a convolution.

    Attributes:
        path: "vanilla" or "sparse".
        packing: of the sparse weight, "blocks" or "rows"; "" where vanilla.
        needs: the layout of its input.
        gives: the layout of its output; the sparse operator's is contiguous, in a region on CUDA `BATCH_INNER`.
    """

    path: str
    packing: str
    needs: str
    gives: str

    def __str__(self) -> str:
        """Name it."""
        return " ".join(part for part in (self.path, self.packing, self.needs) if part)


@dataclasses.dataclass
class Samples:
    """The times of several arms, one of each a run, summed over the calls that one run makes.

    Attributes:
        by_arm: milliseconds, in the order of the runs.
        alive: arms that are still timed.
    """

    by_arm: dict[str, list[float]]
    alive: set[str]

    @staticmethod
    def of(arms: Iterable[str]) -> Samples:
        """Begin with no samples."""
        names = list(arms)
        return Samples({name: [] for name in names}, set(names))

    def add(self, times: dict[str, float], *, to_last: bool = False) -> None:
        """Add the times of one call: to a new sample each, or to the last one."""
        for name, ms in times.items():
            known = self.by_arm[name]
            if to_last and known:
                known[-1] += ms
            else:
                known.append(ms)

    def summary(self, arm: str) -> timing.Timing:
        """Return the statistics of an arm."""
        return timing.Timings({arm: self.by_arm[arm]})[arm]

    def ratio(self, a: str, b: str) -> timing.Ratio:
        """Return the paired ratio of two arms, over the samples that both have."""
        count = min(len(self.by_arm[a]), len(self.by_arm[b]))
        return timing.Timings({a: self.by_arm[a][:count], b: self.by_arm[b][:count]}).ratio(a, b)

    def half(self, which: int) -> Samples:
        """Return every second sample, from the first (0) or the second (1) on."""
        return Samples({name: samples[which::2] for name, samples in self.by_arm.items()}, self.alive)

    def drop(self, losers: Iterable[str]) -> None:
        """Stop timing some arms."""
        self.alive -= set(losers)


@dataclasses.dataclass
class Measured:
    """What one convolution took.

    Attributes:
        input: as it arrives in the all-vanilla model.
        output_shape: of the convolution.
        candidates: by name; the first is the default.
        samples: of the candidates.
    """

    input: Seen
    output_shape: tuple[int, ...] = ()
    candidates: dict[str, Candidate] = dataclasses.field(default_factory=dict)
    samples: Samples = dataclasses.field(default_factory=lambda: Samples.of(()))

    @property
    def default(self) -> Candidate:
        """Vanilla as the user has it: on the input and the weight in the layouts that they are in."""
        return next(iter(self.candidates.values()))

    @property
    def ms(self) -> dict[Candidate, float]:
        """Medians of one run by candidate."""
        return {candidate: self.samples.summary(name).median_ms for name, candidate in self.candidates.items()}

    def ci(self, candidate: Candidate) -> tuple[float, float]:
        """Return the 95 % confidence interval of a candidate's median."""
        times = self.samples.summary(str(candidate))
        return times.ci_low_ms, times.ci_high_ms

    @property
    def spread(self) -> float:
        """Distance of the quartiles of the default's time, as a share of its median."""
        times = self.samples.summary(str(self.default))
        return (times.high_ms - times.low_ms) / times.median_ms

    def vanilla_on(self, layout: str) -> Candidate:
        """Return the vanilla candidate for an input in a layout; the default where none takes that."""
        found = (c for c in self.candidates.values() if c.path == "vanilla" and c.needs == layout)
        return next(found, self.default)

    def best(self, path: str) -> Candidate | None:
        """Return the fastest candidate of a path among those still timed, or None where the path has none."""
        ms = self.ms
        return min((c for c in ms if c.path == path and str(c) in self.samples.alive), key=ms.__getitem__, default=None)

    def beyond_noise(self, candidate: Candidate) -> bool:
        """Tell whether a sparse candidate is faster than vanilla on the same input by more than noise."""
        return self.samples.ratio(str(self.vanilla_on(candidate.needs)), str(candidate)).low > 1

    def drop_losers(self) -> None:
        """Take candidates out of the race that are far behind; of each path the best one stays, and the default."""
        # By the least sample: one that the scheduler stretched must not lose the race.
        least = {candidate: min(self.samples.by_arm[name]) for name, candidate in self.candidates.items()}
        limit = _OUT_OF_THE_RACE * min(least.values())
        kept = {self.default}
        for path in ("vanilla", "sparse"):
            kept |= {c for c in [min((c for c in least if c.path == path), key=least.__getitem__, default=None)] if c}
        self.samples.drop(str(c) for c in least if least[c] > limit and c not in kept)

    def is_clear(self, margin: float) -> bool:
        """Tell whether more samples would hardly change what is chosen here."""
        default = str(self.default)
        for name in self.samples.alive - {default}:
            ratio = self.samples.ratio(default, name)
            one_sided = ratio.low > 1 + margin or ratio.high < 1 + margin
            if not one_sided and ratio.high - ratio.low > margin:
                return False
        return True
