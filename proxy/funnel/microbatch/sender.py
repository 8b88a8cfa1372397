"""
One model's inputs, from their waiting to their vectors.

Nothing is composed in advance. Whenever something may have changed (inputs came, a slot is free, a limit lets the next
call go) the sender is woken; it then asks whose turn it is, whether the slot should wait a moment for more, and for a
lease; and only with the lease in hand it takes what waits. All of that is one synchronous stretch, so what it sees is
what it sends. A batch in flight belongs to all whose inputs it carries: when the last of them has left, it is
cancelled.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from proxy.base.clock import Clock
from proxy.base.errors import EmbeddingError
from proxy.base.events import BatchFinished, BatchSplit, Observer
from proxy.base.lease import Lease, Leases, Outlook, Wait
from proxy.base.messages import Answer, Batch, Input, Limits, Priority
from proxy.base.settings import MicroBatchSettings
from proxy.base.stage import Snapshot, Stage
from proxy.funnel.microbatch.estimate import Drain, Tokens
from proxy.funnel.microbatch.lanes import Lanes
from proxy.funnel.microbatch.part import Part, Piece, Span, Trial, cut, halves, shares
from proxy.funnel.microbatch.portion import Portion, affordable, least, spread
from proxy.funnel.microbatch.suspect import Quarantine, is_of_one, is_refusal

_SAME_INSTANT_S = 0.001
"""The end of a hold is counted anew each time that it is asked for, and differs by the last binary digits."""


@dataclass(slots=True, eq=False)
class Flight:
    """A batch under way."""

    spans: list[Span]
    priority: Priority
    lease: Lease
    left_at: float
    inputs: int
    tokens: float
    is_full: bool = False
    """It left others of its class waiting: what it carries shows how fast these leave."""
    trial: Trial | None = None
    task: asyncio.Task[None] | None = field(default=None, repr=False)

    def leave(self) -> None:
        """End it if nobody waits for any of it."""
        if self.task is not None and all(span.part.is_over for span in self.spans):
            self.task.cancel()


class Sender:
    """Composes and sends the batches of one model."""

    def __init__(
        self,
        model: str,
        settings: MicroBatchSettings,
        inner: Stage[Batch, Answer],
        *,
        leases: Leases,
        may_retry: Callable[[], bool],
        clock: Clock,
        observe: Observer,
    ) -> None:
        """
        Args:
            model: its name as the settings know it.
            settings: turns, patience, quarantine.
            inner: where batches go.
            leases: who gives permission.
            may_retry: takes one try from the budget of retries, if there is one left.
            clock, observe: time, and who is told of facts.
        """
        self._model = model
        self._settings = settings
        self._inner = inner
        self._leases = leases
        self._may_retry = may_retry
        self._clock = clock
        self._observe = observe
        self._lanes = Lanes(settings.bulk_share)
        self._portions = {priority: Portion(settings.patience_s) for priority in Priority}
        self._flying: Counter[Priority] = Counter()
        self._flying_tokens = dict.fromkeys(Priority, 0.0)
        self._flights: set[Flight] = set()
        self._tokens = Tokens()
        self._drains = {priority: Drain() for priority in Priority}
        self._quarantine = Quarantine(settings.quarantine_s)
        self._limits = Limits(max_inputs=1_000_000, max_bytes=0)
        """What the last call could carry: the next one probably will."""
        self._batches = self._inputs = self._splits = 0
        self._is_woken = False
        self._alarm: asyncio.Task[None] | None = None
        self._alarm_at = 0.0
        self._hold: tuple[float, EmbeddingError] | None = None
        """Until when nothing leaves, and what those are told who cannot wait so long: all that wait have been asked."""
        leases.listen(model, self._called)

    # --- in and out ---

    def add(self, part: Part) -> None:
        """Let a part wait for its turn."""
        if self._hold is not None and self._refused_by(self._hold, part):
            return
        request = part.request
        now = self._clock.now()
        lane = self._lanes[request.priority]
        if not lane.waiting:
            self._drains[request.priority].rested(now)
        count = len(request.inputs)
        alone = []
        if self._quarantine:
            alone = [i for i, key in enumerate(request.keys) if self._quarantine.holds(key, now)]
        first = 0
        for index in (*alone, count):
            if first < index:
                lane.add(Piece([Span(part, first, index)]))
            if index < count:
                # It has been tried before: when it fails again it is to blame, not the upstream.
                lane.add(Piece([Span(part, index, index + 1)], is_sealed=True, trial=Trial(has_success=True)))
            first = index + 1
        self._portions[request.priority].arrived(now)
        self.wake()

    def forget(self, part: Part) -> None:
        """Let go of a part that nobody waits for; batches that carry nothing else are cancelled."""
        self._lanes[part.request.priority].forget(part)
        for flight in tuple(part.flights):
            flight.leave()
        if self._alarm is not None and not self._lanes.waiting:
            self._alarm.cancel()
            self._alarm = None

    def costs(self, part_sizes: tuple[int, ...], *, is_tokens: bool) -> list[float]:
        """Estimate the tokens of inputs by their bytes."""
        return self._tokens.costs(part_sizes, is_tokens=is_tokens)

    def expected_s(self, caller: str, priority: Priority, tokens: float) -> float:
        """
        Say how long it takes until so many tokens of a caller are done; zero while nothing waits or nobody knows.

        Each class has a drain of its own: how fast it leaves beside the other one is measured, not guessed. What is
        under way has to come back first.
        """
        lane = self._lanes[priority]
        if not lane.waiting:
            return 0.0
        return self._needs_s(priority, self._flying_tokens[priority] + lane.ahead_of(caller, tokens))

    def backlog_s(self) -> float:
        """Say how long it takes until all that waits is done; zero while nobody knows."""
        return max(self._needs_s(priority, self._lanes[priority].waiting_tokens) for priority in Priority)

    def _needs_s(self, priority: Priority, tokens: float) -> float:
        return self._drains[priority].needs_s(tokens, calls=self._leases.outlook(self._model).slots) or 0.0

    # --- waking ---

    def wake(self) -> None:
        """Look soon whether a batch can leave: after what this turn of the loop still brings."""
        if not self._is_woken and self._lanes.waiting:
            self._is_woken = True
            asyncio.get_running_loop().call_soon(self._look)

    def _called(self) -> None:
        """Look again, since a lease may be had: what was heard of holds before counts no more."""
        self._hold = None
        self.wake()

    def _wake_at(self, instant: float) -> None:
        if self._alarm is not None and not self._alarm.done():
            if self._alarm_at <= instant:
                return  # it looks earlier, and then sets the next alarm
            self._alarm.cancel()
        self._alarm_at = instant
        self._alarm = asyncio.get_running_loop().create_task(self._ring(instant))

    async def _ring(self, instant: float) -> None:
        await self._clock.sleep(instant - self._clock.now())
        self.wake()

    def _look(self) -> None:
        """Send what can be sent."""
        self._is_woken = False
        hold, self._hold = self._hold, None
        together: Counter[Priority] = Counter()
        """Batches that leave at this moment."""
        while (turn := self._lanes.turn()) is not None:
            priority, piece = turn
            lane = self._lanes[priority]
            now = self._clock.now()
            outlook = self._leases.outlook(self._model)
            target = self._portions[priority].target(now, lane.waiting + self._flying[priority], outlook)
            hold_s = 0.0 if piece.is_sealed else self._hold_s(priority, now, target, outlook)
            if hold_s > 0:
                self._wake_at(now + hold_s)
                return
            try:
                least, wish = lane.weight(piece)
                lease = self._leases.take(self._model, least=least, wish=wish)
            except EmbeddingError as error:
                self._refuse_all(error)
                return
            if isinstance(lease, Wait):
                self._wait(lease, hold, now)
                return
            ahead = min(outlook.slots - outlook.busy, -(-lane.waiting // target)) + together[priority]
            size = spread(target, together[priority], ahead, outlook)
            together[priority] += 1
            self._leave(lease, priority, piece, size, outlook, now)

    def _hold_s(self, priority: Priority, now: float, target: int, outlook: Outlook) -> float:
        """Say how long a free slot should wait for more of a class."""
        lane = self._lanes[priority]
        if outlook.busy >= outlook.slots or outlook.is_paced:
            return 0.0
        if lane.waiting >= self._limits.max_inputs or lane.waiting_tokens >= self._limits.max_tokens:
            return 0.0  # more would not fit
        if priority is Priority.BULK:
            if self._lanes[Priority.INTERACTIVE].waiting:
                return 0.0  # bulk may have its turn, but not let interactive inputs wait for bulk that might come
            target = min(target, affordable(outlook, self._settings.bulk_call_s))
        return self._portions[priority].hold_s(now, lane.waiting, target, outlook)

    def _wait(self, wait: Wait, hold: tuple[float, EmbeddingError] | None, now: float) -> None:
        """
        Go on waiting.

        Args:
            wait: what the leases say.
            hold: what they said before, if that still counts.
        """
        for priority in Priority:
            if self._lanes[priority].waiting:
                self._drains[priority].began(now)
        if wait.until is None:
            return
        if wait.error is not None:
            if hold is None or wait.until > hold[0] + _SAME_INSTANT_S:
                hold = (wait.until, wait.error)
                for part in [part for priority in Priority for part in self._lanes[priority].parts()]:
                    self._refused_by(hold, part)
            self._hold = hold
        self._wake_at(wait.until)

    def _refused_by(self, hold: tuple[float, EmbeddingError], part: Part) -> bool:
        """Tell a part now that its deadline comes before the upstream takes the next call; whether that was so."""
        until, error = hold
        if part.request.deadline > until:
            return False
        part.failed(error.own())
        return True

    def _refuse_all(self, error: EmbeddingError) -> None:
        for priority in Priority:
            for part in self._lanes[priority].clear():
                part.failed(error.own())

    # --- composing ---

    def _leave(self, lease: Lease, priority: Priority, piece: Piece, target: int, outlook: Outlook, now: float) -> None:
        """Fill a batch for this lease and send it."""
        limits = self._limits = lease.limits
        trial, most = piece.trial, limits.max_inputs
        if lease.is_probe:
            most = 1
        elif not piece.is_sealed and not outlook.is_paced:
            most = max(target, least(outlook))
            if priority is Priority.BULK:  # no more than a call should last
                most = min(most, affordable(outlook, self._settings.bulk_call_s))
        is_topped_up = outlook.is_paced and not piece.is_sealed
        spans = self._lanes[priority].take(piece, limits, most)
        if is_topped_up:
            other = self._lanes[Priority.BULK if priority is Priority.INTERACTIVE else Priority.INTERACTIVE]
            spans += other.top_up(spans, limits, most)
        self._lanes.served(priority)
        self._portions[priority].left()
        flight = Flight(
            spans=spans,
            priority=priority,
            lease=lease,
            left_at=now,
            inputs=sum(map(len, spans)),
            tokens=sum([span.tokens for span in spans]),
            is_full=self._lanes[priority].waiting > 0,
            trial=trial,
        )
        lease.charge(flight.tokens)
        batch = _batch(flight)
        self._flying[priority] += flight.inputs
        self._flying_tokens[priority] += flight.tokens
        self._flights.add(flight)
        for span in spans:
            span.part.flights.add(flight)
            progress = span.part.request.progress
            if progress.left_at is None:
                progress.left_at = now
        flight.task = asyncio.get_running_loop().create_task(self._fly(flight, batch))
        # Not a `finally` in the task: one that is cancelled before it has begun never gets there.
        flight.task.add_done_callback(lambda task: self._flown(flight, task))

    async def _fly(self, flight: Flight, batch: Batch) -> None:
        try:
            answer = await self._inner(batch)
        except EmbeddingError as error:
            self._failed(flight, error)
        else:
            self._landed(flight, batch, answer)

    def _flown(self, flight: Flight, task: asyncio.Task[None]) -> None:
        self._flights.discard(flight)
        self._flying[flight.priority] -= flight.inputs
        self._flying_tokens[flight.priority] -= flight.tokens
        # Ended without a word, by a defect of ours or at the close: whoever waits for it has to hear of that.
        defect = None if task.cancelled() else task.exception()
        for span in flight.spans:
            span.part.flights.discard(flight)
            if defect is not None:
                span.part.failed(defect)
            elif task.cancelled():
                span.part.failed(asyncio.CancelledError())
        flight.lease.release()
        self.wake()

    # --- landing ---

    def _landed(self, flight: Flight, batch: Batch, answer: Answer) -> None:
        now = self._clock.now()
        self._batches += 1
        self._inputs += flight.inputs
        spans = flight.spans
        tokens = [answer.tokens] if len(spans) == 1 else shares(answer.tokens, [span.tokens for span in spans])
        longest_s, at = 0.0, 0
        for span, counted in zip(spans, tokens, strict=True):
            part, end = span.part, at + span.last - span.first
            queue_s = flight.left_at - part.request.arrived + answer.queue_s
            if queue_s > longest_s:
                longest_s = queue_s
            part.landed(span.first, span.last, answer.rows[at:end], counted, answer, queue_s)
            at = end
        if flight.trial is not None:
            self._acquit(flight.trial, now)
        if not batch.spec.is_tokens:
            self._tokens.learn(batch.size_bytes, flight.inputs, answer.tokens)
        for priority, drain in self._drains.items():
            waiting = self._lanes[priority].waiting
            if not waiting and not drain.is_running:
                continue
            if priority is flight.priority and not flight.is_full:
                drain.looked_at(now, is_more=bool(waiting))
                continue
            tokens_done = sum([span.tokens for span in spans if span.part.request.priority is priority])
            drain.done(now, tokens_done, is_more=bool(waiting))
        self._observe(BatchFinished(self._model, answer.upstream, flight.inputs, longest_s, answer.upstream_s))

    def _failed(self, flight: Flight, error: EmbeddingError) -> None:
        """
        Tell the callers, or look for the one input that is to blame.

        The cases: (1) the batch was one input: its request gets the error, and where the input is guilty, its key;
        (2) one input may be to blame, and looking for it is allowed: the batch is cut; (3) all of them get it.
        """
        spans = [span for span in flight.spans if not span.part.is_over]
        if flight.inputs == 1:
            self._convict(flight, error)
        elif is_of_one(error) and spans and (is_refusal(error) or self._may_retry()):
            self._split(flight, error)
        else:
            for part in dict.fromkeys(span.part for span in spans):
                part.failed(error.own())

    def _convict(self, flight: Flight, error: EmbeddingError) -> None:
        """
        Blame the only input of a batch, if it is to blame.

        A refusal is about what was sent; after a failure it is the input only if others have gone well. And only these
        are evidence enough to keep it apart from others for long: a server may fail on everything, or refuse it.
        """
        (span,) = flight.spans
        trial, key = flight.trial, span.part.request.keys[span.first]
        if is_of_one(error):
            if is_refusal(error) or (trial and trial.has_success):
                error.key = key
            if trial and trial.has_success:
                self._quarantine.add(key, self._clock.now())
            elif trial:
                trial.suspects.append(key)
        span.part.failed(error)

    def _acquit(self, trial: Trial, now: float) -> None:
        """Note that the upstream has taken a piece of a batch that failed: so it is those that fail alone."""
        trial.has_success = True
        for key in trial.suspects:
            self._quarantine.add(key, now)
        trial.suspects.clear()

    def _split(self, flight: Flight, error: EmbeddingError) -> None:
        self._splits += 1
        self._observe(BatchSplit(self._model, flight.inputs))
        index = error.index
        if index is not None and 0 <= index < flight.inputs:
            rest = cut(flight.spans, 0, index) + cut(flight.spans, index + 1, flight.inputs)
            pieces = [cut(flight.spans, index, index + 1), rest]
        else:
            pieces = list(halves(flight.spans))
        trial = flight.trial or Trial()
        for spans in reversed(pieces):
            for priority in Priority:  # a batch that was topped up has both
                alive = [s for s in spans if s.part.request.priority is priority and not s.part.is_over]
                if alive:
                    self._lanes[priority].add(Piece(alive, is_sealed=True, trial=trial), in_front=True)

    # --- looking and closing ---

    def snapshot(self) -> Snapshot:
        return {
            "lanes": {priority.value: self._lanes[priority].snapshot() for priority in Priority},
            "inputs_in_flight": {priority.value: self._flying[priority] for priority in Priority},
            "batches_in_flight": len(self._flights),
            "batches": self._batches,
            "inputs_per_batch": round(self._inputs / self._batches, 2) if self._batches else None,
            "splits": self._splits,
            "quarantined_inputs": len(self._quarantine),
            "tokens_per_byte": round(self._tokens.ratio, 4),
        }

    async def aclose(self) -> None:
        """End what still waits or is under way; there is nothing when all requests have been answered."""
        for priority in Priority:
            for part in self._lanes[priority].clear():
                part.failed(asyncio.CancelledError())
        tasks = [flight.task for flight in self._flights if flight.task is not None]
        if self._alarm is not None:
            tasks.append(self._alarm)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _batch(flight: Flight) -> Batch:
    requests = [span.part.request for span in flight.spans]
    first = requests[0]
    span = flight.spans[0]
    inputs: tuple[Input, ...]
    if len(requests) == 1 and len(span) == len(first.inputs):
        inputs, size_bytes, deadline = first.inputs, first.size_bytes, first.deadline
        user = first.user
    else:
        inputs = tuple([i for s in flight.spans for i in s.part.request.inputs[s.first : s.last]])
        size_bytes = sum([size for s in flight.spans for size in s.part.request.sizes[s.first : s.last]])
        deadline = max([request.deadline for request in requests])
        users = {request.user for request in requests}
        user = first.user if len(users) == 1 else None  # several users are nobody in particular
    return Batch(
        spec=first.spec,
        inputs=inputs,
        size_bytes=size_bytes,
        deadline=deadline,
        tokens=flight.tokens,
        lease=flight.lease,
        user=user,
        traceparent=first.traceparent,
        is_suspect=flight.trial is not None,
    )
