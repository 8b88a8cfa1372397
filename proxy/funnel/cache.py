"""
Vectors that were computed before.

Per input, so one new text among a thousand known ones costs one. Filled only with rows that passed the gate. Stands
before coalesce: a hit needs nobody. A reload hands the same store on: a key names its vector space, and where the
canaries show that a space means other vectors than before, the store is cleared.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import replace

from proxy.base.events import CacheLookedUp, Observer
from proxy.base.messages import Request, Response, Row
from proxy.base.settings import CacheSettings
from proxy.base.stage import Snapshot, Stage

ENTRY_BYTES = 200
"""What an entry takes besides its numbers: key, object heads, its place in the dict (165 with tracemalloc, and room
for the dict to grow)."""


class CacheStore:
    """Rows by key, the least recently used leaving first."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._rows: OrderedDict[bytes, Row] = OrderedDict()
        self._bytes = 0
        self._evicted = 0

    def resize(self, max_bytes: int) -> None:
        """Take another bound; what is over it leaves."""
        self._max_bytes = max_bytes
        self._evict()

    def clear(self) -> None:
        """Forget everything."""
        self._rows.clear()
        self._bytes = 0

    def get(self, key: bytes) -> Row | None:
        row = self._rows.get(key)
        if row is not None:
            self._rows.move_to_end(key)
        return row

    def get_all(self, keys: Sequence[bytes]) -> list[Row | None]:
        """Return what is known of several keys, in order."""
        rows = list(map(self._rows.get, keys))
        for key, row in zip(keys, rows, strict=True):
            if row is not None:
                self._rows.move_to_end(key)
        return rows

    def put(self, key: bytes, row: Row) -> None:
        self.put_all((key,), (row,))

    def put_all(self, keys: Iterable[bytes], rows: Iterable[Row]) -> None:
        """Keep several rows; a list of inputs brings hundreds at a time."""
        held = self._rows
        added = 0
        for key, row in zip(keys, rows, strict=True):
            added += len(row)
            if key in held:
                added -= len(held[key])
                held.move_to_end(key)
            else:
                added += ENTRY_BYTES
            held[key] = row
        self._bytes += added
        self._evict()

    def _evict(self) -> None:
        over = self._bytes - self._max_bytes
        if over <= 0:
            return
        leave, freed, count = self._rows.popitem, 0, 0
        while freed < over:
            freed += len(leave(last=False)[1]) + ENTRY_BYTES
            count += 1
        self._bytes -= freed
        self._evicted += count

    def snapshot(self) -> Snapshot:
        return {
            "entries": len(self._rows),
            "bytes": self._bytes,
            "max_bytes": self._max_bytes,
            "evicted_entries": self._evicted,
        }


class Cache:
    """Answers what the store knows and asks the next stage for the rest."""

    def __init__(
        self, settings: CacheSettings, inner: Stage[Request, Response], *, store: CacheStore, observe: Observer
    ) -> None:
        self._is_off = settings.max_bytes == 0
        self._is_detached = False
        self._inner = inner
        self._store = store
        self._observe = observe

    async def __call__(self, request: Request) -> Response:
        if self._is_off:
            return await self._inner(request)
        rows: list[Row | None]
        rows = [None] * len(request.keys) if request.no_cache else self._store.get_all(request.keys)
        missing = [index for index, row in enumerate(rows) if row is None]
        hits = len(rows) - len(missing)
        self._observe(CacheLookedUp(request.spec.model, hits, len(missing)))
        if not missing:
            return Response(tuple(row for row in rows if row is not None), tokens=0, hits=hits)
        part = request.part(missing) if hits else request
        response = await self._inner(part)
        if not request.no_store and not self._is_detached:
            self._store.put_all(part.keys, response.rows)
        if not hits:
            return response
        for index, row in zip(missing, response.rows, strict=True):
            rows[index] = row
        return replace(response, rows=tuple(row for row in rows if row is not None), hits=hits)

    def known(self, request: Request) -> Response | None:
        """Answer a request whose inputs are all known, at once; None when one of them is not, and nothing is told."""
        if self._is_off or request.no_cache:
            return None
        rows = []
        for key in request.keys:
            row = self._store.get(key)
            if row is None:
                return None
            rows.append(row)
        self._observe(CacheLookedUp(request.spec.model, len(rows), 0))
        return Response(tuple(rows), tokens=0, hits=len(rows))

    def detach(self) -> None:
        """Store nothing any more: what is still on its way is of a space that has ended."""
        self._is_detached = True

    def snapshot(self) -> Snapshot:
        return self._store.snapshot()

    async def aclose(self) -> None:
        """Close what is behind; the store outlives the stage, the next pipeline goes on with it."""
        await self._inner.aclose()
