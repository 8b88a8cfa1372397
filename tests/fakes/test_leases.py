"""The leases that tests play keep the books that they are trusted with."""

from __future__ import annotations

import pytest

from proxy.base.errors import CircuitOpen
from proxy.base.lease import Outlook, Wait
from tests.fakes.leases import GivenLease, ScriptedLeases


def taken(leases: ScriptedLeases) -> GivenLease:
    lease = leases.take("m", least=1.0, wish=2.0)

    assert isinstance(lease, GivenLease)
    return lease


def test_slots() -> None:
    """A lease is given while a slot is free; whoever listens hears when one comes back."""
    leases, calls = ScriptedLeases(slots=2, view=Outlook(0, 0, 0.03, 0.001)), []
    leases.listen("m", lambda: calls.append(leases.busy))
    first, second = taken(leases), taken(leases)
    outlook, third = leases.outlook("m"), leases.take("m", least=3.0, wish=4.0)
    for lease in (first, second):
        lease.charge(5.0)
        lease.release()

    assert outlook == Outlook(2, 2, 0.03, 0.001)
    assert third == Wait()
    assert calls == [1, 0]
    assert leases.asked == [(1.0, 2.0), (1.0, 2.0), (3.0, 4.0)]
    leases.check()


def test_words() -> None:
    """What the test says comes instead of a lease, until it says None."""
    leases = ScriptedLeases()
    leases.say(Wait(5.0))
    waits = leases.take("m", least=1.0, wish=1.0)
    leases.say(CircuitOpen("open"))
    with pytest.raises(CircuitOpen):
        leases.take("m", least=1.0, wish=1.0)
    leases.say(None)

    assert waits == Wait(5.0)
    taken(leases)


def test_books() -> None:
    """A lease that is out, was never charged, or is charged or given back twice, is found."""
    leases = ScriptedLeases()
    lease = taken(leases)
    with pytest.raises(AssertionError):
        leases.check()
    lease.charge(1.0)
    with pytest.raises(AssertionError, match="charged twice"):
        lease.charge(1.0)
    lease.release()
    with pytest.raises(AssertionError, match="released twice"):
        lease.release()

    leases.check()
