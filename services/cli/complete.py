"""The command `kvplane complete`: one request to the engine that the router chooses, and what came of it."""

from __future__ import annotations

import json as json_text
import sys
from pathlib import Path  # noqa: TC003 - cyclopts reads annotations
from typing import TYPE_CHECKING, Annotated, Any

import anyio
from cyclopts import Parameter

from kvplane.services.cli import show
from kvplane.services.cli.ask import CONNECT_SECONDS, Json, show_json
from kvplane.services.cli.common import COMMON, Common, run_async, start
from kvplane.services.cli.show import Styled
from kvplane.services.cli.words import seconds
from kvplane.services.process.terminal import printable
from kvplane.services.protocol.errors import BadRequest

if TYPE_CHECKING:
    from kvplane.services.dataplane.complete import Completer, Completion
    from kvplane.services.dataplane.openai import Body

ATTEMPTS = 3
WAIT_SECONDS = 1.0
"""Seconds without a word of the engine after which the command prints whom it waits for."""


def complete(
    model: str | None = None,
    text: str | None = None,
    *,
    prompt: str | None = None,
    system: str | None = None,
    body: Annotated[Path | None, Parameter(allow_leading_hyphen=True)] = None,
    max_tokens: int | None = None,
    temperature: float | None = None,
    session: str = "",
    api_key: Annotated[str, Parameter(env_var="KVPLANE_API_KEY")] = "",
    attempts: int = ATTEMPTS,
    json: Json = False,
    common: Common = COMMON,
) -> None:
    """Send a request to the engine that the router chooses, and record what the engine found cached.

    `kvplane complete MODEL "What is a block?"` is a chat of one message, `--prompt` a bare prompt, and `--body` any request of
    OpenAI's API. The answer is printed as it comes; how it went, on standard error.

    Parameters
    ----------
    model
        Model, or LoRA adapter.
    text
        The user's message.
    prompt
        A prompt that is completed as it is, instead of a message.
    system
        The system's message, before the user's.
    body
        File with the request as JSON, with messages or prompt; - reads standard input. Options add to it.
    max_tokens
        Most tokens of the answer.
    temperature
        Temperature; the engine's own default if not given.
    session
        Session that the request belongs to.
    api_key
        Key that the engines ask for.
    attempts
        How many engines are tried before giving up.
    json
        Print the outcome as JSON.
    """
    start(common, quiet=True)
    if attempts < 1:
        raise BadRequest("--attempts must be at least 1")
    asked = _read(body) if body is not None else {}
    if body is None and (prompt is None) == (text is None):
        raise BadRequest(
            'say what to complete: a message, as in `kvplane complete MODEL "Hello"`, or --prompt, or --body FILE'
        )
    if system is not None and text is None:
        raise BadRequest("--system goes before a message; with --prompt or --body, write it there")
    if text is not None:
        asked["messages"] = [
            *([{"role": "system", "content": system}] if system is not None else []),
            {"role": "user", "content": text},
        ]
    given = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": temperature}
    asked |= {name: value for name, value in given.items() if value is not None}

    shown = _Shown(quiet=json)
    try:
        completion = run_async(_complete, asked, session, api_key, attempts, shown, common)
    finally:
        shown.end()
    if json:
        show_json(completion)
    else:
        _print_summary(completion)


async def _complete(
    asked: Body, session: str, api_key: str, attempts: int, shown: _Shown, common: Common
) -> Completion:
    # Loaded here, so that the command's help needs no HTTP.
    from kvplane.services.dataplane.complete import Completer  # noqa: PLC0415

    async with (
        common.connected("kvplane-complete", seconds=CONNECT_SECONDS) as client,
        Completer(client, common.fleet, api_key=api_key, attempts=attempts) as completer,
    ):
        async with anyio.create_task_group() as group:
            group.start_soon(shown.say_whom_it_waits_for, completer)
            completion = await completer.complete(asked, session=session, on_chunk=shown.chunk)
            group.cancel_scope.cancel()
        return completion


class _Shown:
    """The answer on standard output, as it comes."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._begun = False
        self._last = "\n"

    def chunk(self, chunk: Body) -> None:
        from kvplane.services.dataplane.openai import text  # noqa: PLC0415 - as above

        self._begun = True
        for index, added in text(chunk).items():
            if index == 0 and not self._quiet:
                # An engine's words are not for the terminal to obey; in a pipe they stay as they are.
                sys.stdout.write(printable(added, lines=True) if show.on_terminal() else added)
                sys.stdout.flush()
                self._last = added

    async def say_whom_it_waits_for(self, completer: Completer) -> None:
        """Say it once, if nothing has come by then."""
        await anyio.sleep(WAIT_SECONDS)
        if not self._begun and completer.waits_for:
            _dim(f"waiting for {completer.waits_for}")

    def end(self) -> None:
        if not self._quiet and not self._last.endswith("\n"):
            sys.stdout.write("\n")


def _print_summary(completion: Completion) -> None:
    decision, usage = completion.decision, completion.usage
    cached = "unknown" if usage.cached_tokens is None else f"{usage.cached_tokens:,}"
    lines = [f"{attempt.node}: {attempt.reason}" for attempt in completion.failed]
    lines.append(
        f"node {decision.node}: {cached} of {usage.prompt_tokens:,} prompt tokens cached, "
        f"{decision.matched_tokens:,} predicted; {usage.output_tokens:,} tokens in {seconds(completion.duration)}, "
        f"the first after {seconds(completion.ttft)}"
    )
    if not completion.recorded:
        lines.append("no router took the outcome: the history will not have it")
    for line in lines:
        _dim(line)


def _dim(line: str) -> None:
    show.say(Styled(line, "dim"), error=True)


def _read(file: Path) -> dict[str, Any]:
    try:
        text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
        body = json_text.loads(text)
    except OSError as error:
        raise BadRequest(f"--body {file} can't be read: {error.strerror}") from None
    except ValueError as error:
        raise BadRequest(f"--body {file} is no JSON: {error}") from None
    if not isinstance(body, dict):
        raise BadRequest(f'--body {file} is no JSON object; a request looks like {{"model": ..., "messages": [...]}}')
    return body
