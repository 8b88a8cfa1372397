"""
How much a free slot takes, and whether it waits a moment for more.

Taking all that waits leaves batches uneven and slots idle. A slot's share of the outstanding work, what waits and what
is under way divided by the slots, keeps all of them busy with batches of one size. When a batch comes back its callers
need a moment to come again; a slot that leaves with the first two of them is gone for a whole call. So a free slot may
wait, under three conditions: slots are scarce (there was more to do than slots a moment ago), its share is not there
yet, and the next input is likely to come before waiting costs more than it brings.

The last one is exact. A call of n inputs takes a + b·n. Leaving now with n gives n / (a + b·n) inputs a second; waiting
d for one more gives (n + 1) / (d + a + b·(n + 1)). The second is better while d < a / n.

Pure: nothing waits in here.
"""

from __future__ import annotations

import math

from proxy.base.lease import Outlook

_MEMORY_CALLS = 2.0
"""The most that was outstanding counts for about so many calls, then it fades."""

_LEAST_GAP_S = 0.0015
"""Callers that come back one after the other are this far apart on a busy machine, whatever the arithmetic says."""

_WORTH_A_CALL_S = 0.001
"""A further call takes some 0.2 ms of our processor."""

_NEARLY = 10
"""A tenth less than its share is near enough: while the loop is busy, the last of them may be milliseconds away."""

_OWN_INPUT_S = 0.0001
"""What an input takes of our processor, there and back."""

_UNKNOWN_LEAST = 4
"""Before calls of different sizes have shown what an input adds."""


class Portion:
    """The outstanding work of one lane, and what follows for a free slot."""

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._peak = 0.0
        self._peak_at = -math.inf
        self._arrived_at = -math.inf
        self._held_since: float | None = None

    def arrived(self, now: float) -> None:
        """Note that inputs have come."""
        self._arrived_at = now

    def left(self) -> None:
        """Note that a batch has left: whoever waits next waits anew."""
        self._held_since = None

    def target(self, now: float, outstanding: int, outlook: Outlook) -> int:
        """Return a slot's share, in inputs, of the most that was outstanding lately."""
        memory_s = _MEMORY_CALLS * (outlook.fixed_s + outlook.per_input_s * outstanding / max(1, outlook.slots))
        age_s = now - self._peak_at
        is_forgotten = memory_s <= 0 or age_s >= 10 * memory_s
        # Flat for the time of a call, since the work of the others is still to come back, then fading.
        faded = 0.0 if is_forgotten else self._peak * 0.5 ** max(0.0, age_s / memory_s - 1)
        if outstanding >= faded:
            self._peak, self._peak_at, faded = float(outstanding), now, float(outstanding)
        return max(1, math.ceil(faded / max(1, outlook.slots)))

    def hold_s(self, now: float, waiting: int, target: int, outlook: Outlook) -> float:
        """
        Say how long a free slot should go on waiting for one more input; zero when it should leave.

        Args:
            waiting: inputs that are there, at least one.
            target: the slot's share.
        """
        if waiting >= target - target // _NEARLY or not self._patience_s:
            return 0.0
        if self._held_since is None:
            self._held_since = now
        worth_s = max(_LEAST_GAP_S, outlook.fixed_s / waiting)
        since = max(self._arrived_at, self._held_since)
        return min(since + min(worth_s, self._patience_s), self._held_since + 2 * self._patience_s) - now


def spread(target: int, place: int, batches: int, outlook: Outlook) -> int:
    """
    Return how many inputs one of several batches takes that leave at the same moment.

    Calls of one size that leave together come back together; then all their callers are served one after the other
    while all their slots are idle, and they leave together again. So they leave with a little more and a little less:
    apart by what our own part of a batch takes, which is enough for each to find its slot when its callers are back.

    Args:
        target: a slot's share.
        place: which of them this is, from 0.
        batches: how many they are.
    """
    if batches < 2 or outlook.per_input_s <= 0:
        return target
    apart = min(math.ceil(target * _OWN_INPUT_S / outlook.per_input_s), target // batches)
    return target + int(apart * (batches - 1 - 2 * place) / 2)


def least(outlook: Outlook) -> int:
    """
    Return how many inputs a call should carry if so many are there, even with slots to spare.

    Cutting a short list into many calls gains what the inputs take over there, and costs calls: theirs of a limit, ours
    of processor time. It has to gain a tenth of the call, and several times what a call costs us.
    """
    if outlook.per_input_s <= 0:
        return _UNKNOWN_LEAST
    return max(1, int(max(0.1 * outlook.fixed_s, _WORTH_A_CALL_S) / outlook.per_input_s))


def affordable(outlook: Outlook, call_s: float) -> int:
    """Return how many inputs a call may carry so that it should take no longer than this; at least one."""
    if outlook.per_input_s <= 0:
        return 1_000_000
    return max(1, int((call_s - outlook.fixed_s) / outlook.per_input_s))
