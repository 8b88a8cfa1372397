"""The cache answers what it knows, asks for the rest, and stays within its bytes."""

from __future__ import annotations

from collections import OrderedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.base.errors import UpstreamFailed
from proxy.base.events import CacheLookedUp, Event
from proxy.base.messages import Request, Response
from proxy.base.settings import CacheSettings
from proxy.funnel.cache import ENTRY_BYTES, Cache, CacheStore
from tests.fakes.stage import AnsweringStage, make_request, rows_of

SAME_EACH_TIME = settings(deadline=None, derandomize=True, max_examples=100)
MIB = 1024 * 1024
ROW = b"12345678"
ROW_BYTES = len(ROW) + ENTRY_BYTES


def right(request: Request) -> Response:
    """Answer as the stages behind do."""
    return Response(rows_of(request.inputs), tokens=len(request.inputs), upstream="u", queue_s=1, upstream_s=2)


class Room:
    """A cache, what stands behind it, and what it tells."""

    def __init__(self, max_bytes: int = MIB, store: CacheStore | None = None) -> None:
        self.told: list[Event] = []
        self.inner = AnsweringStage(right)
        self.store = store or CacheStore(max_bytes)
        self.cache = Cache(CacheSettings(max_bytes), self.inner, store=self.store, observe=self.told.append)

    @property
    def asked(self) -> list[tuple]:
        """The inputs of each request that went further in."""
        return [request.inputs for request in self.inner.messages]

    def knows(self, *texts: str) -> None:
        for key, row in zip(make_request(texts).keys, rows_of(texts), strict=True):
            self.store.put(key, row)


# --- the store ---


@pytest.mark.parametrize(("max_bytes", "entries"), [(2 * ROW_BYTES - 1, 1), (2 * ROW_BYTES, 2), (2 * ROW_BYTES + 1, 2)])
def test_store_at_its_bound(max_bytes: int, entries: int) -> None:
    """Rows stay up to the bound exactly; one byte less and the older one leaves."""
    store = CacheStore(max_bytes)

    store.put(b"old", ROW)
    store.put(b"new", ROW)

    assert store.get(b"new") == ROW
    assert store.get(b"old") == (ROW if entries == 2 else None)
    assert store.snapshot() == {
        "entries": entries,
        "bytes": entries * ROW_BYTES,
        "max_bytes": max_bytes,
        "evicted_entries": 2 - entries,
    }


def test_row_that_was_used_lately() -> None:
    """The least recently used row leaves first: a look at it counts as a use."""
    store = CacheStore(2 * ROW_BYTES)
    store.put(b"first", ROW)
    store.put(b"second", ROW)
    store.get(b"first")

    store.put(b"third", ROW)

    assert store.get(b"second") is None
    assert store.get(b"first") == ROW


def test_row_that_is_put_again() -> None:
    """A key that comes again takes its new row, counts once, and is the latest."""
    store = CacheStore(2 * ROW_BYTES + 4)
    store.put(b"a", ROW)
    store.put(b"b", ROW)
    store.put(b"a", ROW + b"more")
    before = store.snapshot()["bytes"]

    store.put(b"c", ROW)

    assert before == 2 * ROW_BYTES + 4
    assert store.get(b"b") is None
    assert store.get(b"a") == ROW + b"more"


def test_row_over_the_whole_bound() -> None:
    """A row that would not even fit alone is not kept."""
    store = CacheStore(ROW_BYTES - 1)

    store.put(b"a", ROW)

    assert store.get(b"a") is None
    assert store.snapshot()["bytes"] == 0


def test_store_that_shrinks_and_grows() -> None:
    """With a smaller bound the oldest leave at once; with a larger one there is room again."""
    store = CacheStore(3 * ROW_BYTES)
    for key in (b"a", b"b", b"c"):
        store.put(key, ROW)

    store.resize(2 * ROW_BYTES)
    shrunk = [store.get(key) for key in (b"a", b"b", b"c")]
    store.resize(3 * ROW_BYTES)
    store.put(b"d", ROW)

    assert shrunk == [None, ROW, ROW]
    assert [store.get(key) for key in (b"b", b"c", b"d")] == [ROW, ROW, ROW]
    assert store.snapshot()["max_bytes"] == 3 * ROW_BYTES


def test_store_that_shrinks_to_nothing() -> None:
    """At a bound of zero everything leaves."""
    store = CacheStore(MIB)
    store.put(b"a", ROW)

    store.resize(0)

    assert store.snapshot() == {"entries": 0, "bytes": 0, "max_bytes": 0, "evicted_entries": 1}


def test_store_that_is_cleared() -> None:
    """A store that is cleared knows nothing and has all its room."""
    store = CacheStore(MIB)
    store.put(b"a", ROW)

    store.clear()

    assert store.get(b"a") is None
    assert store.snapshot() == {"entries": 0, "bytes": 0, "max_bytes": MIB, "evicted_entries": 0}


KEYS = st.sampled_from([b"a", b"b", b"c", b"d"])
STEPS = st.one_of(
    st.tuples(st.just("get"), KEYS, st.just(0)),
    st.tuples(st.just("put"), KEYS, st.integers(0, 40)),
    st.tuples(st.just("resize"), st.just(b""), st.integers(0, 4 * (ENTRY_BYTES + 40))),
)


@SAME_EACH_TIME
@given(st.lists(STEPS, max_size=40))
def test_store_through_any_history(steps: list[tuple[str, bytes, int]]) -> None:
    """Whatever comes, the store holds the latest used rows that fit, and counts each byte of them."""
    bound = 3 * (ENTRY_BYTES + 20)
    store = CacheStore(bound)
    model: OrderedDict[bytes, bytes] = OrderedDict()

    def size() -> int:
        return sum(len(row) + ENTRY_BYTES for row in model.values())

    for verb, key, number in steps:
        if verb == "get":
            assert store.get(key) == model.get(key)
            if key in model:
                model.move_to_end(key)
        elif verb == "put":
            store.put(key, b"x" * number)
            model[key] = b"x" * number
            model.move_to_end(key)
        else:
            bound = number
            store.resize(bound)
        while size() > bound:
            model.popitem(last=False)

        numbers = store.snapshot()
        assert (numbers["entries"], numbers["bytes"], numbers["max_bytes"]) == (len(model), size(), bound)


# --- the stage ---


async def test_first_request() -> None:
    """What nobody has asked for is asked for as it came, and its answer says that nothing was known."""
    room = Room()
    request = make_request(("a", "b"))

    response = await room.cache(request)

    assert response == right(request)
    assert room.inner.messages == [request]
    assert room.told == [CacheLookedUp("m", hits=0, misses=2)]


async def test_second_request() -> None:
    """What was computed before needs nobody: no upstream, no tokens, no waiting."""
    room = Room()
    await room.cache(make_request(("a", "b")))

    response = await room.cache(make_request(("b", "a")))

    assert response == Response(rows_of(("b", "a")), tokens=0, hits=2)
    assert len(room.inner.messages) == 1
    assert room.told[-1] == CacheLookedUp("m", hits=2, misses=0)


async def test_one_new_text_among_known_ones() -> None:
    """Only what is missing is asked for; the answer is put together by position and keeps what the call cost."""
    room = Room()
    room.knows("a", "c")

    response = await room.cache(make_request(("a", "b", "c")))

    assert room.asked == [("b",)]
    assert response == Response(rows_of(("a", "b", "c")), tokens=1, hits=2, upstream="u", queue_s=1, upstream_s=2)
    assert room.told == [CacheLookedUp("m", hits=2, misses=1)]


async def test_part_that_goes_further_in() -> None:
    """What goes further in is the same request, thinned out: its keys and bytes are those of its inputs."""
    room = Room()
    room.knows("a")
    whole = make_request(("a", "four"), user="somebody")

    await room.cache(whole)

    assert room.inner.messages == [whole.part([1])]


async def test_text_in_another_space() -> None:
    """The same text at another model is another vector."""
    room = Room()
    await room.cache(make_request(("a",)))

    await room.cache(make_request(("a",), model="other"))

    assert len(room.asked) == 2


async def test_caller_that_wants_no_cached_rows() -> None:
    """`no-cache` asks for everything anew, and what comes replaces what was known."""
    room = Room()
    request = make_request(("a", "b"), no_cache=True)
    room.store.put(request.keys[0], b"outdated")

    response = await room.cache(request)

    assert response == right(request)
    assert room.told == [CacheLookedUp("m", hits=0, misses=2)]
    assert room.store.get(request.keys[0]) == rows_of(("a",))[0]


async def test_caller_that_wants_nothing_stored() -> None:
    """`no-store` leaves no trace of the request's rows."""
    room = Room()
    request = make_request(("a",), no_cache=True, no_store=True)

    response = await room.cache(request)

    assert response.rows == rows_of(("a",))
    assert room.store.snapshot()["entries"] == 0


async def test_request_that_fails() -> None:
    """An error travels on, and nothing is stored."""
    room = Room()
    failure = UpstreamFailed("broke off")
    cache = Cache(CacheSettings(), AnsweringStage(lambda _: failure), store=room.store, observe=room.told.append)

    with pytest.raises(UpstreamFailed) as caught:
        await cache(make_request(("a",)))

    assert caught.value is failure
    assert cache.snapshot()["entries"] == 0


async def test_cache_that_is_off() -> None:
    """At a bound of zero the cache is not there: requests pass as they are, and no look-up is told."""
    room = Room(max_bytes=0)
    request = make_request(("a",))

    first = await room.cache(request)
    await room.cache(request)

    assert first == right(request)
    assert room.inner.messages == [request, request]
    assert room.told == []
    assert room.cache.snapshot() == {"entries": 0, "bytes": 0, "max_bytes": 0, "evicted_entries": 0}


async def test_store_handed_on_by_a_reload() -> None:
    """The next pipeline's cache knows what the one before knew, also after that one was closed."""
    before = Room()
    await before.cache(make_request(("a",)))
    await before.cache.aclose()
    after = Room(store=before.store)

    response = await after.cache(make_request(("a",)))

    assert response.hits == 1
    assert after.asked == []


async def test_rows_that_leave_while_their_request_waits() -> None:
    """A hit is the request's for good, even when the same request's misses push it out of the store."""
    width_bytes = len(rows_of(("a",))[0])
    room = Room(max_bytes=width_bytes + ENTRY_BYTES)
    room.knows("a")

    response = await room.cache(make_request(("a", "b", "c")))

    assert response.rows == rows_of(("a", "b", "c"))
    assert room.store.snapshot()["entries"] == 1


async def test_answers_on_their_way_when_the_space_ends() -> None:
    """A detached cache answers from what is known, but keeps nothing: what still comes is of a space that has ended."""
    room = Room()
    room.knows("a")
    room.cache.detach()

    response = await room.cache(make_request(("a", "b")))

    assert response.rows == rows_of(("a", "b"))
    assert room.store.snapshot()["entries"] == 1


# --- what is known at once ---


def test_request_whose_inputs_are_all_known() -> None:
    """Where all is known the answer is there without waiting, as the stage itself would give it."""
    room = Room()
    room.knows("a", "b")

    assert room.cache.known(make_request(("b", "a", "b"))) == Response(rows_of(("b", "a", "b")), tokens=0, hits=3)
    assert room.told == [CacheLookedUp("m", hits=3, misses=0)]
    assert room.asked == []


def test_request_with_an_unknown_input() -> None:
    """Where one input is not known there is no answer yet, and nothing is told: the stage will be asked."""
    room = Room()
    room.knows("a")

    assert room.cache.known(make_request(("a", "b"))) is None
    assert room.told == []
    assert room.asked == []


def test_known_inputs_that_are_not_wanted() -> None:
    """Who asks for everything anew gets nothing at once; nor does anybody where the cache is off."""
    room, off = Room(), Room(max_bytes=0)
    room.knows("a")

    assert room.cache.known(make_request(("a",), no_cache=True)) is None
    assert off.cache.known(make_request(("a",))) is None
    assert room.told == off.told == []


def test_known_input_is_used() -> None:
    """An answer at once counts as a use: what was asked for lately stays."""
    room = Room(max_bytes=2 * (len(rows_of(("a",))[0]) + ENTRY_BYTES))
    room.knows("a", "b")
    room.cache.known(make_request(("a",)))
    room.knows("c")

    assert room.cache.known(make_request(("a",))) is not None
    assert room.cache.known(make_request(("b",))) is None


TEXTS = st.sampled_from(["a", "b", "c", "d", "e"])


@SAME_EACH_TIME
@given(known=st.sets(TEXTS), inputs=st.lists(TEXTS, min_size=1, max_size=12), is_anew=st.booleans())
async def test_any_pattern_of_hits_and_misses(known: set[str], inputs: list[str], is_anew: bool) -> None:
    """Whatever is known and however often an input comes, each position gets exactly its own row."""
    room = Room()
    room.knows(*sorted(known))
    hits = 0 if is_anew else sum(text in known for text in inputs)
    missing = tuple(text for text in inputs if is_anew or text not in known)

    response = await room.cache(make_request(inputs, no_cache=is_anew))

    assert response.rows == rows_of(inputs)
    assert response.hits == hits
    assert response.tokens == len(missing)
    assert room.asked == ([missing] if missing else [])
    assert room.told == [CacheLookedUp("m", hits=hits, misses=len(missing))]
    assert room.store.snapshot()["entries"] == len(known | set(inputs))
