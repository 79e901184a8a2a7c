"""Clients of the gateways under attack: each answer comes whole, or ends with an error that its client sees.

A client that can't connect to one gateway takes another, as a load balancer does. Simulated nodes always answer the same words,
so a client knows whether it got each of them once.
"""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any

import anyio
import httpx

from kvplane.services.simulation.engine_api import WORDS
from tests.chaos.world import GATEWAYS, MANAGED, MODEL

if TYPE_CHECKING:
    from tests.chaos.load import Load

TALKERS = 4
PATIENCE_SECONDS = 90.0
"""Longer than any fault: whoever hears nothing for so long was forgotten."""


class Talker:
    """One client, one request after the other."""

    def __init__(self, load: Load, seed: str) -> None:
        self._load = load
        self._rng = random.Random(seed)
        self._name = f"talk-{self._rng.getrandbits(48):x}"
        self._said = 0
        # Each request on a connection of its own: one that is kept may be closed just when it is used again.
        self._http = httpx.AsyncClient(timeout=PATIENCE_SECONDS, limits=httpx.Limits(max_keepalive_connections=0))

    async def run(self, number: int) -> None:
        """Talk until all is to rest."""
        await anyio.sleep(number * 0.1)
        async with self._http:
            while not self._load.resting.is_set():
                await anyio.sleep(self._rng.uniform(0.05, 0.3))
                self._said += 1
                await self._say(f"{self._name}.{self._said}")

    async def _say(self, request: str) -> None:
        rng = self._rng
        words = rng.randrange(4, 40)
        story = f"Story {rng.randrange(12)}. " * rng.randrange(5, 60)
        body: dict[str, Any] = {
            "model": rng.choice((MODEL, MODEL, MANAGED)),
            "max_tokens": words,
            "stream": rng.random() < 0.7,
        }
        chat = rng.random() < 0.7
        body |= {"messages": [{"role": "user", "content": story}]} if chat else {"prompt": list(story.encode())}
        path = "/v1/chat/completions" if chat else "/v1/completions"
        leaves = rng.random() < 0.05
        for process in rng.sample(GATEWAYS, len(GATEWAYS)):
            note = self._load.ledger.note
            note("sent", request=request, process=process)
            outcome, detail = await self._outcome(process, path, body, request, words, leaves=leaves)
            self._load.count(f"gateways: {outcome}")
            note("got", request=request, process=process, outcome=outcome, detail=detail[:300])
            if outcome != "refused":
                return

    async def _outcome(
        self, process: str, path: str, body: dict[str, Any], request: str, words: int, *, leaves: bool
    ) -> tuple[str, str]:
        url = self._load.world.gateway(process) + path
        try:
            async with self._http.stream("POST", url, json=body, headers={"x-request-id": request}) as answer:
                data = b""
                async for piece in answer.aiter_bytes():
                    data += piece
                    if leaves:
                        return "left", ""
        except httpx.ConnectError as error:
            return "refused", repr(error)
        except httpx.TimeoutException as error:
            return "silent", repr(error)
        except (httpx.TransportError, AttributeError) as error:
            # The latter is anyio's when a connection is gone as soon as it is made.
            return "broken", repr(error)
        if answer.status_code != 200:
            return ("error", data.decode()) if b'"error"' in data else ("unexplained", f"{answer.status_code} {data!r}")
        return judged(data, words, stream=body["stream"])


def judged(data: bytes, words: int, *, stream: bool) -> tuple[str, str]:
    """What an answer with status 200 is: `whole`, an `error` at the end of a stream, or something that may not be."""
    expected = "".join(f"{WORDS[at % len(WORDS)]} " for at in range(words))
    if not stream:
        choice = json.loads(data)["choices"][0]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        return ("whole", "") if text == expected else ("other words", text)
    events = [event.removeprefix(b"data: ") for event in data.split(b"\n\n") if event]
    last = events.pop() if events else b""
    failed = b'"error"' in last
    if last != b"[DONE]" and not failed:
        return "ended without a word", data[-200:].decode()
    text = ""
    for event in events:
        choices = json.loads(event)["choices"]
        if not choices:
            return "usage that nobody asked for", event.decode()
        text += (choices[0]["delta"].get("content") or "") if "delta" in choices[0] else choices[0]["text"]
    if text != expected and not (failed and expected.startswith(text)):
        return "other words", text
    return ("error", last.decode()) if failed else ("whole", "")
