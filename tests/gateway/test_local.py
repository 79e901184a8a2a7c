"""Tokens that the gateway finds by itself: who is believed, who no longer, and what is recorded."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from kvplane.events.hashing import block_hashes
from kvplane.services.gateway import local
from kvplane.services.tokens import proof
from tests.support.gateways import Scene, gateway_on
from tests.support.reference_tokens import FORGETS, PLAIN, Reference, folder_of
from tests.support.rendering_engine import BLOCK, MODEL, RenderingEngine
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.support.fleet import Fleet

OTHER = PLAIN.replace("<|im_end|>", "<|im_end|> ")
SAME_LENGTH = PLAIN.replace("m['role'] +", "(m['role'] | replace('user', 'usin')) +")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@asynccontextmanager
async def scene_of(fleet: Fleet, engine: RenderingEngine, folder: Path) -> AsyncIterator[Scene]:
    await fleet.coordinator()
    async with engine.running(fleet), anyio.create_task_group() as group:
        async with gateway_on(fleet, group, tokenizers={MODEL: folder}) as scene:
            yield scene
        group.cancel_scope.cancel()


def talk(turns: int) -> dict[str, Any]:
    messages = [{"role": "user", "content": "the other thing is there " * 20}]
    for at in range(turns):
        messages += [{"role": "assistant", "content": f"so {at}"}, {"role": "user", "content": "and there " * 9}]
    return {"model": MODEL, "messages": messages}


async def ask(scene: Scene, body: dict[str, Any]) -> None:
    answer = await scene.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text


async def believed(scene: Scene) -> None:
    await ask(scene, talk(0))
    await until(lambda: scene.gateway.local.states()[MODEL] == (True, ""))


async def test_a_model_is_believed_when_its_engine_says_the_same(fleet: Fleet, files: Path) -> None:
    folder = folder_of(files, "words", FORGETS)
    reference = Reference(folder)
    engine = RenderingEngine(Reference(folder))
    async with scene_of(fleet, engine, folder) as scene:
        await believed(scene)
        assert len(engine.rendered) == len(proof.questions(MODEL)) + 1
        sources = scene.gateway.measured.sources
        assert sources == {"render": 1}
        for turn in range(proof.EARLY_EACH + 2):
            await ask(scene, talk(turn))
        await until(lambda: scene.gateway.local.compared == 2)
        assert scene.gateway.local.differed == 0
        assert sources == {"render": 1, "local": proof.EARLY_EACH + 2}
        routed, _ = await scene.recorded()
        # The log has what the engine's own tokens would have given.
        for turn, event in enumerate(routed[1:]):
            ids = reference.ids(talk(turn))
            assert event.tokens == len(ids)
            assert event.hashes == block_hashes(ids, BLOCK)
        # What it does not know how to do is asked of the engine, and others are not disturbed by it.
        await ask(scene, {**talk(1), "documents": [{"text": "there"}]})
        assert sources["render"] == 2


@pytest.mark.parametrize("template", [OTHER, SAME_LENGTH], ids=["longer", "of the same length"])
async def test_other_files_than_the_engines_are_never_believed(fleet: Fleet, files: Path, template: str) -> None:
    engine = RenderingEngine(Reference(folder_of(files, "words", PLAIN)))
    async with scene_of(fleet, engine, folder_of(files, "words", template)) as scene:
        await ask(scene, talk(0))
        await until(lambda: "other tokens" in scene.gateway.local.states()[MODEL][1])
        await ask(scene, talk(1))
        assert scene.gateway.measured.sources == {"render": 2}
        # The engine begins anew, with the files that are here.
        engine.files = Reference(folder_of(files, "words", template))
        await engine.register(fleet, replace=True)
        await until(lambda: scene.gateway.local.states()[MODEL] == (True, ""))
        await ask(scene, talk(1))
        assert scene.gateway.measured.sources == {"render": 2, "local": 1}


@pytest.mark.parametrize(
    ("template", "renders"),
    [(OTHER, True), (SAME_LENGTH, True), (OTHER, False)],
    ids=["longer", "of the same length", "longer, rendered nowhere"],
)
async def test_a_wrong_template_is_noticed_within_100_requests(
    fleet: Fleet, files: Path, template: str, renders: bool
) -> None:
    """By what an engine says of a few of them; one that renders nothing is found out by the lengths that it counts."""
    folder = folder_of(files, "words", PLAIN)
    engine = RenderingEngine(Reference(folder))
    async with scene_of(fleet, engine, folder) as scene:
        await believed(scene)
        engine.files, engine.renders = Reference(folder_of(files, "words", template)), renders
        asked = 0
        while scene.gateway.local.states()[MODEL][0] and asked < 100:
            await ask(scene, talk(asked % 3))
            asked += 1
        assert asked < 100
        before = dict(scene.gateway.measured.sources)
        await ask(scene, talk(1))
        assert scene.gateway.measured.sources["local"] == before["local"]


async def test_an_engine_that_renders_nothing_is_said_so(fleet: Fleet, files: Path) -> None:
    folder = folder_of(files, "words", PLAIN)
    engine = RenderingEngine(Reference(folder))
    engine.renders = False
    async with scene_of(fleet, engine, folder) as scene:
        await ask(scene, talk(0))
        await until(lambda: "--enable-scale-out" in scene.gateway.local.states()[MODEL][1])
        assert scene.gateway.measured.sources == {"none": 1}


async def test_files_that_are_none_are_said_so(fleet: Fleet, files: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    engine = RenderingEngine(Reference(folder_of(files, "words", PLAIN)))
    async with scene_of(fleet, engine, tmp_path) as scene:
        await ask(scene, talk(0))
        await until(lambda: "no file of the tokenizers library" in scene.gateway.local.states()[MODEL][1])
        await ask(scene, talk(0))
        assert scene.gateway.measured.sources == {"render": 2}


async def test_nobody_waits_for_the_tokens_of_a_long_text(
    fleet: Fleet, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one is tokenised, others are answered."""
    folder = folder_of(files, "words", PLAIN)
    async with scene_of(fleet, RenderingEngine(Reference(folder)), folder) as scene:
        await believed(scene)
        model = scene.gateway.local._models[MODEL]
        assert model is not None
        assert model.model is not None
        begun, released = anyio.Event(), anyio.Event()
        ids = model.model.tokenizer.ids

        def slow(pieces: list[str]) -> list[list[int]]:
            anyio.from_thread.run_sync(begun.set)
            anyio.from_thread.run(released.wait)
            return ids(pieces)

        long = {"model": MODEL, "messages": [{"role": "user", "content": "there " * local.ASIDE_CHARACTERS}]}
        async with anyio.create_task_group() as group:
            monkeypatch.setattr(model.model.tokenizer, "ids", slow)
            group.start_soon(ask, scene, long)
            await begun.wait()
            monkeypatch.setattr(model.model.tokenizer, "ids", ids)
            await ask(scene, talk(2))
            released.set()
        assert scene.gateway.measured.sources["local"] == 2


async def test_requests_that_would_hold_up_others_are_left_to_engines(fleet: Fleet, files: Path) -> None:
    folder = folder_of(files, "words", PLAIN)
    async with scene_of(fleet, RenderingEngine(Reference(folder)), folder) as scene:
        await believed(scene)
        many = [{"role": "user", "content": "a"}] * local.MOST_MESSAGES
        await ask(scene, {"model": MODEL, "messages": many})
        assert scene.gateway.measured.sources == {"render": 1, "local": 1}
        await ask(scene, {"model": MODEL, "messages": [*many, *many[:1]]})
        await ask(scene, {"model": MODEL, "messages": [{"role": "user", "content": "a" * local.LONGEST_BODY}]})
        assert scene.gateway.measured.sources == {"render": 3, "local": 1}


async def test_an_alias_has_the_files_of_its_model(fleet: Fleet, files: Path) -> None:
    folder = folder_of(files, "words", PLAIN)
    engine = RenderingEngine(Reference(folder))
    engine.models = [MODEL, "alias"]
    async with scene_of(fleet, engine, folder) as scene:
        await believed(scene)
        await ask(scene, {**talk(0), "model": "alias"})
        assert scene.gateway.measured.sources == {"render": 1, "local": 1}


async def test_a_model_whose_engine_was_away_is_tried_again(
    fleet: Fleet, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "AGAIN_SECONDS", 0)
    folder = folder_of(files, "words", PLAIN)
    engine = RenderingEngine(Reference(folder))
    engine.fails = True
    async with scene_of(fleet, engine, folder) as scene:
        await ask(scene, talk(0))
        await until(lambda: "no engine tells" in scene.gateway.local.states()[MODEL][1])
        engine.fails = False
        await believed(scene)
