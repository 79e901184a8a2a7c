"""One URL in front of the fleet, as a step of the demonstration: a chat over HTTP, what its answer says, and why."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any

import aiohttp
import anyio

from kvplane.services.demo.history import caught_up
from kvplane.services.demo.stage import check
from kvplane.services.embedded.server import free_port
from kvplane.services.protocol import messages
from kvplane.services.protocol.errors import StepFailed
from kvplane.services.rpc.client import ask

if TYPE_CHECKING:
    from kvplane.services.demo.stage import Stage

READY_SECONDS = 30.0
_ABOUT = "You are a helpful assistant who answers in whole sentences and always says where an answer comes from. " * 4
_QUESTIONS = ("Where does the cache of my conversation lie?", "And where is it now?")


async def one_url(stage: Stage) -> str:
    """A chat by OpenAI's API: its second question finds the first cached as predicted, and the decision is explained."""
    port = free_port()
    await stage.fleet.start("gateway", "gateway", "--listen", f"127.0.0.1:{port}")
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as http:
            await _ready(stage, http)
            chat: list[dict[str, str]] = [{"role": "system", "content": _ABOUT}]
            for question in _QUESTIONS:
                chat.append({"role": "user", "content": question})
                answer, headers = await _answer(stage, http, chat)
                chat.append(answer["choices"][0]["message"])
                await stage.settled(headers["x-request-id"])
    finally:
        # It leaves in good order: the other routers are killed later, and how soon they are back is measured.
        stage.fleet.signal("gateway", signal.SIGTERM)
        await stage.fleet.ended("gateway")
    request, node, match = (headers[f"x-{name}"] for name in ("request-id", "kvplane-node", "kvplane-match"))
    predicted, tokens = map(int, match.split("/"))
    found = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    check(found == predicted > 0, f"{predicted} tokens were predicted to be cached, the node found {found}")
    verdict = await _explained(stage, request)
    check(verdict == "agrees", f"the decision made again: {verdict}")
    return (
        f"a chat by OpenAI's API; its second answer says x-kvplane-node {node}, x-kvplane-match {predicted} of {tokens}, and "
        f"{found} tokens were cached; `kvplane explain {request}` agrees"
    )


async def _ready(stage: Stage, http: aiohttp.ClientSession) -> None:
    """Wait until the gateway answers. Raises `StepFailed`."""
    with anyio.move_on_after(READY_SECONDS):
        while True:
            try:
                async with http.get("/health") as answer:
                    if answer.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await anyio.sleep(0.05)
    raise StepFailed(f"the gateway did not answer in {READY_SECONDS:g} s; see its log in {stage.fleet.folder}")


async def _answer(
    stage: Stage, http: aiohttp.ClientSession, chat: list[dict[str, str]]
) -> tuple[dict[str, Any], dict[str, str]]:
    """A chat's answer and its headers. Raises `StepFailed`."""
    body = {"model": stage.traffic.model, "messages": chat, "max_tokens": 16}
    try:
        async with http.post("/v1/chat/completions", json=body) as answer:
            if answer.status != 200:
                raise StepFailed(f"the gateway answers {answer.status}: {(await answer.text())[:300]}")
            return await answer.json(), {name.lower(): value for name, value in answer.headers.items()}
    except (aiohttp.ClientError, TimeoutError) as error:
        raise StepFailed(f"the gateway gave no answer: {error!r}") from None


async def _explained(stage: Stage, request: str) -> str:
    """What becomes of the decision when it is made again from the log."""
    await caught_up(stage)
    answer: dict[str, Any] = await ask(
        stage.client, f"kv.{stage.fleet.name}.explain", messages.ExplainRequest(request=request), seconds=60
    )
    return str(answer["verdict"])
