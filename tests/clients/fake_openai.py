"""
A stand-in for OpenAI's embeddings API: a real server on loopback with one vector per input.

The vector of an input depends on that input and on the width asked for, and on nothing else. So a test computes the
vector it expects with `vector_of` and compares, and an input that arrives changed (tokens decoded to text, a stripped
newline, dimensions dropped on the way) gives another vector and a failing test.
"""

import asyncio
import base64
import hashlib
import json
import threading

import numpy as np
from aiohttp import web

MODEL = "text-embedding-3-small"
WIDTH = 1536
WIDTHS_ALLOWED = (256, 512, 1536)
CL100K_SIZE = 100277
FIELDS = {"model", "input", "dimensions", "encoding_format", "user"}

Input = str | list[int]


def vector_of(item: Input, width: int = WIDTH) -> np.ndarray:
    """The float32 unit vector that the upstream gives this text or list of token ids at this width."""
    digest = hashlib.sha256(json.dumps([item, width]).encode()).digest()
    vector = np.random.default_rng(list(digest)).standard_normal(width)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


class FakeOpenAI:
    """
    The server, alive inside `with`, in a thread of its own.

    Attributes:
        base_url: what an OpenAI client is given as base URL.
        inputs: every text or token list that arrived, in order.
        authorizations: the Authorization header of each request, None where there was none.
    """

    def __init__(self) -> None:
        self.base_url = ""
        self.inputs: list[Input] = []
        self.authorizations: list[str | None] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fake-openai", daemon=True)

    def __enter__(self) -> "FakeOpenAI":
        self._thread.start()
        port = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()
        self.base_url = f"http://127.0.0.1:{port}/v1"
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _start(self) -> int:
        app = web.Application(client_max_size=64 * 2**20)
        app.router.add_post("/v1/embeddings", self._embeddings)
        app.router.add_get("/v1/models", self._models)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        return self._runner.addresses[0][1]

    async def _models(self, _: web.Request) -> web.Response:
        model = {"id": MODEL, "object": "model", "created": 1705948997, "owned_by": "system"}
        return web.json_response({"object": "list", "data": [model]})

    async def _embeddings(self, request: web.Request) -> web.Response:
        body = await request.json()
        refusal = _refusal(body)
        if refusal is not None:
            return refusal

        inputs = _inputs(body["input"])
        self.inputs += inputs
        self.authorizations.append(request.headers.get("Authorization"))
        vectors = [vector_of(item, body.get("dimensions", WIDTH)) for item in inputs]
        as_base64 = body.get("encoding_format") == "base64"
        tokens = sum(len(item) for item in inputs)
        return web.json_response(
            {
                "object": "list",
                "model": body["model"],
                "data": [
                    {"object": "embedding", "index": index, "embedding": _encoded(vector, as_base64)}
                    for index, vector in enumerate(vectors)
                ],
                "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            }
        )


def _encoded(vector: np.ndarray, as_base64: bool) -> str | list[float]:
    if as_base64:
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.tolist()


# --- what it accepts: as strict as the API it stands for ---


def _refusal(body: dict) -> web.Response | None:
    """The error answer this request deserves, or None when it is well-formed."""
    unknown = body.keys() - FIELDS
    if unknown:
        return _error(400, f"Unrecognized request arguments: {sorted(unknown)}")
    if body.get("model") != MODEL:
        return _error(404, f"The model {body.get('model')!r} does not exist", "model_not_found")
    if body.get("dimensions", WIDTH) not in WIDTHS_ALLOWED:
        return _error(400, f"'dimensions' is {body['dimensions']!r}")
    if body.get("encoding_format", "float") not in ("float", "base64"):
        return _error(400, f"'encoding_format' is {body['encoding_format']!r}")
    inputs = _inputs(body.get("input"))
    if not 1 <= len(inputs) <= 2048 or not all(_is_text(item) or _is_token_ids(item) for item in inputs):
        return _error(400, "'$.input' is invalid")
    return None


def _inputs(value: object) -> list:
    """The `input` field as a list of inputs, from any of its four forms."""
    if isinstance(value, str) or (isinstance(value, list) and value and isinstance(value[0], int)):
        return [value]
    return value if isinstance(value, list) else []


def _is_text(item: object) -> bool:
    return isinstance(item, str) and item != ""


def _is_token_ids(item: object) -> bool:
    return (
        isinstance(item, list)
        and 1 <= len(item) <= 8192
        and all(type(token) is int and 0 <= token < CL100K_SIZE for token in item)
    )


def _error(status: int, message: str, code: str | None = None) -> web.Response:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return web.json_response({"error": error}, status=status)
