"""An engine of real sockets: a publisher and a replay buffer as vLLM's, and the HTTP endpoints that the adapter asks."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import anyio
import zmq
import zmq.asyncio
from aiohttp import web

from tests.support.fake_openai import FakeApi
from tests.support.naive_engine import NaiveEngine
from tests.support.ports import free_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


END = (-1).to_bytes(8, "big", signed=True)


class FakeEngine:
    """One engine, which can be killed and started again with another life of its cache."""

    def __init__(
        self, kind: str = "vllm", *, replays: bool = True, has_start_time: bool = True, **options: Any
    ) -> None:
        self.kind, self.replays, self.has_start_time, self.options = kind, replays, has_start_time, options
        self.ports = [free_port() for _ in range(3)]
        self.life = 0
        self.cache = NaiveEngine(0, **options)
        self.topic = b"kv@a@m"
        self.block_size: int | None = None
        self.running, self.waiting = 2, 1
        self.models: list[Any] = [{"id": "m", "parent": None}, {"id": "ad", "parent": "m"}]
        self.more_metrics = ""
        """What its page of metrics says beside its load."""
        self.sleeping: bool | None = None
        """What it says at `/is_sleeping`; none where it has no such endpoint."""
        self.key, self.guards = "", "/"
        """The key that requests must have whose path begins so; none is asked for when it is empty."""
        self.missing: set[str] = set()
        """Paths that it does not have."""
        self.replay_requests = 0
        self.drops = 0
        """So many answers of replays lose batches and their end, as when the socket's queue is full."""
        self.loading = False
        """Its sockets are there, and it serves nothing yet."""
        self.api = FakeApi(self)
        self._up: anyio.CancelScope | None = None
        self._down = anyio.Event()
        self._tasks: anyio.abc.TaskGroup | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ports[0]}"

    @property
    def endpoint(self) -> str:
        return f"tcp://*:{self.ports[1]}"

    @property
    def replay_endpoint(self) -> str:
        return f"tcp://*:{self.ports[2]}" if self.replays else ""

    async def start(self, tasks: anyio.abc.TaskGroup) -> None:
        self._tasks = tasks
        await tasks.start(self._run)

    async def kill(self) -> None:
        assert self._up is not None
        self._up.cancel()
        await self._down.wait()

    async def restart(self, *, missed: int = 0, loading: bool = False) -> None:
        """Another life, of which the first batches come before anyone listens."""
        await self.kill()
        self.life += 1
        self.cache = NaiveEngine(self.life, **self.options)
        for number in range(missed):
            self.cache.request([number + 1000] * 4 * self.cache.size)
            self.cache.step()
        assert self._tasks is not None
        self.loading = loading
        await self.start(self._tasks)

    async def publish(self, *, lost: bool = False) -> None:
        """Publish what happened since the last batch; `lost`: it does not arrive, as when a subscriber is too slow."""
        batch = self.cache.step()
        if batch is not None and not lost:
            await self._pub.send_multipart([self.topic, batch[0].to_bytes(8, "big"), batch[1]])

    async def _run(self, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        self._down = anyio.Event()
        context = zmq.asyncio.Context()
        try:
            with anyio.CancelScope() as self._up:
                self._pub = context.socket(zmq.PUB)
                if "*" in self.options_endpoint():
                    self._pub.bind(self.options_endpoint())
                else:
                    self._pub.connect(self.options_endpoint())
                runner = web.AppRunner(self._pages(), access_log=None, shutdown_timeout=0.1)
                await runner.setup()
                await web.TCPSite(runner, "127.0.0.1", self.ports[0], reuse_address=True).start()
                try:
                    async with anyio.create_task_group() as group:
                        if self.replays:
                            router = context.socket(zmq.ROUTER)
                            router.bind(self.replay_endpoint)
                            group.start_soon(self._answer, router)
                        task_status.started()
                        await anyio.sleep_forever()
                finally:
                    with anyio.CancelScope(shield=True):
                        await runner.cleanup()
        finally:
            context.destroy(linger=0)
            self._down.set()

    connect_to = ""
    """Where the publisher connects instead of binding."""

    def options_endpoint(self) -> str:
        return self.connect_to or self.endpoint

    async def _answer(self, router: Any) -> None:
        while True:
            client, _, start = await router.recv_multipart()
            self.replay_requests += 1
            topic = [] if self.kind == "sglang" else [self.topic]
            dropping = self.drops > 0
            self.drops -= dropping
            for place, (number, payload) in enumerate(self.cache.replay(int.from_bytes(start, "big"))):
                if dropping and place % 5 in {2, 3}:
                    continue
                await router.send_multipart([client, b"", *topic, number.to_bytes(8, "big"), payload])
            if not dropping:
                await router.send_multipart([client, b"", *([b""] if topic else []), END, b""])

    def _pages(self) -> web.Application:
        app = web.Application(client_max_size=1 << 28)
        size, blocks = self.block_size or self.cache.size, self.cache.capacity

        async def answer(request: web.Request) -> web.Response:
            if self.loading:
                return web.Response(status=503)
            authorized = request.headers.get("Authorization") == f"Bearer {self.key}"
            if self.key and request.path.startswith(self.guards) and not authorized:
                return web.Response(status=401)
            if request.path in self.missing:
                return web.Response(status=404)
            if request.path == "/v1/models":
                return web.Response(text=json.dumps({"data": self.models[::-1]}))
            if request.path == "/is_sleeping" and self.sleeping is not None:
                return web.Response(text=json.dumps({"is_sleeping": self.sleeping}))
            with suppress(KeyError):
                return web.Response(text=pages[request.path] + self.more_metrics * (request.path == "/metrics"))
            return web.Response(status=404)

        started = f"process_start_time_seconds {1.7e9 + self.life}\n" if self.has_start_time else ""
        pages = {
            "/health": "",
            "/metrics": started
            + f'vllm:cache_config_info{{block_size="{size}",num_gpu_blocks="{blocks + 1}",engine="0"}} 1.0\n'
            f'vllm:num_requests_running{{engine="0"}} {self.running}\nvllm:num_requests_running{{engine="1"}} 50\n'
            f'vllm:num_requests_waiting{{engine="0"}} {self.waiting}\n',
        }
        if self.kind == "vllm":
            pages["/version"] = '{"version": "0.32.0"}'
            source = {
                "publisher": "zmq",
                "endpoint": self.options_endpoint(),
                "replay_endpoint": self.replay_endpoint or None,
            }
            pages["/kv_event_sources"] = json.dumps({"0": source})
        else:
            config = {"publisher": "zmq", "endpoint": self.options_endpoint(), "replay_endpoint": self.replay_endpoint}
            pages["/metrics"] = (
                started + f"sglang:num_running_reqs {self.running}\nsglang:num_queue_reqs {self.waiting}\n"
            )
            pages["/server_info"] = json.dumps({
                "version": "0.9", "page_size": size, "max_total_num_tokens": size * blocks, "dp_size": 1,
                "kv_events_config": json.dumps(config),
            })  # fmt: skip
        app.router.add_get("/{any:.*}", answer)
        self.api.route(app)
        return app


@asynccontextmanager
async def running(engine: FakeEngine) -> AsyncIterator[FakeEngine]:
    async with anyio.create_task_group() as tasks:
        await engine.start(tasks)
        yield engine
        tasks.cancel_scope.cancel()
