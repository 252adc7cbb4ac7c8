"""Goodput: the share of the time for which machines were allocated to a run that took it forward.

Useful is the time of the steps that the run has kept: for each line of metrics.jsonl the mean time of its steps (perf/step_time_s)
times the steps since the line before. Steps that a restart or a roll-back has thrown away (metrics.discarded.jsonl) are not useful,
nor is what lies between steps: start-up, loading, validation, saving. A step that was skipped for numbers that are not finite
counts, since its samples are consumed.

Allocated is the time of all attempts (pretrain.job.attempts): from `began` to `ended`, or to now where it is at work. One that was
killed ends with its last sign of life before the next began: a line of either journal, a checkpoint, a heartbeat; what Slurm held the
nodes for behind that is unknown. Time between attempts is not allocated.

Both are weighted by devices where they are known: allocated ones there, and of them those that train here, by the attempt in which a
line was written. A run outside of Slurm is one attempt where it was never restarted (run.json says when it began and ended); of one
that was restarted nobody has noted when its processes ended, and nothing can be said.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

from pretrain.job.attempts import Attempt

SKEW_S = 60.0
"""That the clocks of two nodes may differ by."""
INFINITY = float("inf")


@dataclass(frozen=True)
class Goodput:
    """Both in seconds, or device-seconds where devices are known."""

    useful: float
    allocated: float

    @property
    def share(self) -> float | None:
        """0 to 1; None of no time at all."""
        return min(1.0, self.useful / self.allocated) if self.allocated > 0 else None


def goodput(attempts: Sequence[Attempt], lines: Sequence[tuple[float, float]], signs: Sequence[float], now: float | None) -> Goodput:
    """attempts: oldest first, at least one. lines: (when, seconds of its steps) of the journal. signs: of life, in any order.

    now: where the last attempt is at work; None where it has ended or was killed. All in seconds.
    """
    known = all(attempt.devices > 0 for attempt in attempts)
    alive, trained = sorted(signs), sorted(lines)
    allocated = useful = 0.0
    for i, attempt in enumerate(attempts):
        following = attempts[i + 1].began if i + 1 < len(attempts) else INFINITY
        ended = attempt.ended
        if ended is None:
            ended = now if now is not None and following == INFINITY else _last_sign(alive, attempt.began, following)
        allocated += max(0.0, ended - attempt.began) * (attempt.devices if known else 1)
        # What was trained outside of Slurm, before the first attempt or after one, belongs to none.
        first = bisect.bisect_left(trained, (attempt.began, 0.0))
        last = bisect.bisect_left(trained, (min(following, ended + SKEW_S), 0.0))
        useful += sum(seconds for _, seconds in trained[first:last]) * (_training(attempt) if known else 1)
    return Goodput(useful, allocated)


def _last_sign(ordered: list[float], began: float, following: float) -> float:
    i = bisect.bisect_left(ordered, following) - 1
    return max(began, ordered[i]) if i >= 0 else began


def _training(attempt: Attempt) -> int:
    """Of its devices."""
    return min(attempt.processes, attempt.devices) if attempt.processes > 0 else attempt.devices
