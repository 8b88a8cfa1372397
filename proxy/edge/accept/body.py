"""
Bodies, read within their bounds: in bytes, whatever a head claims and together with all others, and in time.
"""

from __future__ import annotations

from aiohttp import web

from proxy.base.clock import Clock
from proxy.base.errors import InvalidRequest, Overloaded, SlowBody, TooLarge
from proxy.base.settings import ListenSettings


class Bodies:
    """All bodies that are being read."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._bytes = 0

    def insist(self, body: bytes, listen: ListenSettings) -> None:
        """
        Hold a body that has arrived as a whole against its bounds.

        Raises:
            TooLarge, Overloaded: it is over its own bound, or over the bound of all of them.
        """
        if len(body) > listen.max_body_bytes:
            raise _too_large(len(body), listen)
        if self._bytes + len(body) > listen.max_bodies_bytes:
            raise _too_many(listen)

    async def read(self, http: web.BaseRequest, listen: ListenSettings, patience_s: float) -> bytes:
        """
        Read a body.

        Raises:
            TooLarge, Overloaded: as with `insist()`, at the first byte too many.
            SlowBody: it was not here within `patience_s`.
            InvalidRequest: it broke off.
        """
        bound = listen.max_body_bytes
        if (http.content_length or 0) > bound:
            raise _too_large(http.content_length or 0, listen)
        if http.headers.get("Expect", "").lower() == "100-continue" and http.transport is not None:
            # curl waits a second for this before it sends a larger body (RFC 9110 §10.1.1).
            http.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        chunks: list[bytes] = []
        size = 0
        try:
            async with self._clock.timeout_at(self._clock.now() + patience_s):
                while chunk := await http.content.readany():
                    chunks.append(chunk)
                    size += len(chunk)
                    self._bytes += len(chunk)
                    if size > bound:
                        raise TooLarge(f"the body has more than {bound} bytes, the bound")
                    if self._bytes > listen.max_bodies_bytes:
                        raise _too_many(listen)
        except TimeoutError:
            raise SlowBody(f"the body did not arrive within {patience_s:g} s; {size} bytes were there") from None
        except web.RequestPayloadError as error:
            raise InvalidRequest("the body broke off or is not well-formed HTTP", code="invalid_body") from error
        finally:
            self._bytes -= size
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def _too_large(body_bytes: int, listen: ListenSettings) -> TooLarge:
    return TooLarge(f"the body has {body_bytes} bytes, the bound is {listen.max_body_bytes}")


def _too_many(listen: ListenSettings) -> Overloaded:
    all_of_them = f"all bodies being read have more than {listen.max_bodies_bytes} bytes, the bound"
    return Overloaded(all_of_them, retry_after_s=1.0)
