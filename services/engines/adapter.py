"""The adapter beside an engine: makes it a node of the fleet, and keeps what the log says of its cache true.

It takes the engine's batches in order (`sequence`), commits what they mean in groups, and reports everything anew whenever the
fleet's knowledge ends: after its own start, after the engine's, when the node was concluded to be lost, after a gap, and
after the log was away for longer than can be buffered. Every start of an adapter is a new epoch, so that what an earlier one
still has in flight changes nothing.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel
import msgspec
import structlog

from kvplane.events.allowance import Pace
from kvplane.events.log.append import Appender, new_writer
from kvplane.events.log.group import GroupWriter, Writers
from kvplane.events.subjects import subject
from kvplane.services.engines.groups import GROUPS_FORMAT
from kvplane.services.engines.hearing import Hearing
from kvplane.services.engines.life import Event, Health, Life, Looks, State
from kvplane.services.engines.oddities import Oddities, not_understood
from kvplane.services.engines.outbox import Outbox
from kvplane.services.engines.remembered import remembered
from kvplane.services.engines.sequence import Track, Verdict, joined
from kvplane.services.engines.sleep import REASON, Sleep
from kvplane.services.engines.sockets import Published, replay
from kvplane.services.engines.translate import Translator
from kvplane.services.membership.member import REGISTER_SECONDS, Conclusion, Member
from kvplane.services.protocol import labels, messages
from kvplane.services.protocol.errors import AnswerTooLarge, EngineUnfit, ServiceFault

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from anyio.abc import TaskStatus
    from nats.aio.client import Client

    from kvplane.events import types
    from kvplane.services.engines.attachment import AdapterConfig
    from kvplane.services.engines.facts import Engine, Facts, Gauges, Source
    from kvplane.services.engines.sequence import Numbered

LINGER_SECONDS = 0.002
MODELS_SECONDS = 20.0
"""How often the engine is asked whether its models are the same."""

_log = structlog.get_logger("kvplane.engines")


class Adapter:
    """One data-parallel rank of an engine as a node of the fleet."""

    def __init__(
        self,
        client: Client,
        fleet: str,
        engine: Engine,
        facts: Facts,
        source: Source,
        config: AdapterConfig,
        sources: Callable[[Facts], Sequence[Source]] | None = None,
    ) -> None:
        self.client = client
        self.fleet = fleet
        self.engine = engine
        self.facts = facts
        self.source = source
        self._sources = sources or (lambda facts: facts.sources)
        self.config = config
        self.writer = new_writer(f"node-{config.node}"[:100])
        self.appender = Appender(client, fleet, self.writer)
        self.writers = Writers()
        self.member = Member(client, fleet, config.node, self._concluded, writer=self.writer)
        self.replays = 0
        """How often the replay buffer was asked."""
        self.repeated_reports = 0
        """How often everything was reported anew in an epoch that had begun before."""
        self.published = Published(source.events, engine.host)
        # An SGLang of plain replicas says 0, whichever it is.
        ranks = (
            frozenset({source.rank, 0} if engine.kind == "sglang" else {source.rank}) if config.ranked else frozenset()
        )
        self.track = Track(
            Translator(config.node, facts.block_size, {"gpu": facts.capacity_blocks}),
            ranks=ranks, where=self.published.endpoint,
        )  # fmt: skip
        log = GroupWriter(
            self.appender, subject(fleet, "cache", config.node), linger=LINGER_SECONDS, limit=2 * config.buffer_events,
            pace=Pace(anyio.current_time()),
        )  # fmt: skip
        self._log = self.writers.add(log)
        self.outbox = Outbox(self._log, config.node, config.buffer_events)
        self.hearing = Hearing(engine.kind, config.node, facts.block_size, self.published)
        self.life = Life()
        self.health = Health()
        self.sleep = Sleep(config.node)
        self._looks = Looks(config.idle_seconds)
        self._gauges: Gauges | None = None
        self._oddities = Oddities(config.node)
        self._replayed = False
        self._models_at = 0.0
        """When the engine is to be asked for its models again."""
        self._ended: EngineUnfit | None = None
        """Why the node is not this adapter's any more."""

    @property
    def epoch(self) -> int:
        """In which the cache is reported to the fleet; 0 while the engine's life is not registered."""
        return self.track.translator.epoch

    @property
    def well(self) -> bool:
        """Whether the engine is, as far as it was asked."""
        return self.health.well(anyio.current_time())

    def trouble(self) -> str:
        """What keeps the fleet from knowing of this node what it should; empty when nothing does."""
        if not self.well:
            return "the engine is not well"
        if self.life.state is not State.MEMBER:
            return REASON if self.sleep.asleep else "it is not registered"
        if self.sleep.asleep:
            return REASON
        if self.hearing.nobody:
            return self.hearing.nobody
        if strange := not_understood(self.track):
            return strange
        if self.outbox.behind or not self._log.available:
            return "the log is away"
        return ""

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Run until cancelled. Started means: registered, and everything that is known is handed to the log.

        Raises `EngineUnfit` when the engine can't be a node, or the node was given to someone else.
        """
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(self.writers.run)
                try:
                    group.start_soon(self.published.run)
                    group.start_soon(self._observe)
                    await self.member.listen()
                    await self._remember()
                    await self._look()
                    if self.life.state is State.REBORN:
                        # Its facts were asked a moment ago.
                        self.life.on(Event.REFRESHED)
                    await self._register()
                    group.start_soon(self.member.heartbeat, self._heartbeat, self.config.pulse_seconds)
                    group.start_soon(self.member.check)
                    task_status.started()
                    await self._follow()
                finally:
                    await self.writers.close()
        finally:
            self.published.close()

    async def leave(self) -> None:
        """Tell the fleet that the node leaves, when `run` has ended in good order."""
        await self.member.leave("its adapter was stopped")

    async def _remember(self) -> None:
        """Take from the log what an earlier adapter knew of this life of the engine, if the engine says when it began."""
        while self.facts.started:
            try:
                before = await remembered(self.client, self.member.coordinator("cache.names"), self.config.node)
            except ServiceFault as error:
                if error.status == AnswerTooLarge.status:
                    _log.warning("not_remembered", node=self.config.node, error=str(error))
                    return
                if error.status < 429:
                    raise
                _log.warning("log_waited_for", node=self.config.node, error=str(error))
                await anyio.sleep(REGISTER_SECONDS)
            else:
                break
        else:
            return
        if before is None or before.position is None:
            return
        same = before.labels.get(labels.STARTED) == self.facts.started
        if same and before.block_size == self.facts.block_size:
            self.track.restore(before, before.position)
            _log.info("remembered", node=self.config.node, batch=before.position, blocks=self.track.translator.used())

    async def _follow(self) -> None:
        """Apply batches as they come."""
        while True:
            if self._ended is not None:
                raise self._ended
            if self.life.must_register and self.well and not self.sleep.asleep:
                # Not for an engine that is gone: it will be another life when it is back.
                await self._join()
            self._catch_up()
            published, now = self.published, anyio.current_time()
            due = now >= self._looks.next and self.well
            connected = published.connections != self._looks.connections
            if connected or published.overflowed or self.health.suspect or due:
                await self._look()
                continue
            arrived = published.arrived
            if published.waiting:
                await self._apply_waiting()
                continue
            if self.sleep.falls():
                # What it published before has been applied.
                self.track.translator.clear()
                self._put(self.track.cleared(REASON))
            with anyio.move_on_after(max(0.0, min(self._looks.next, now + 0.2) - now)):
                await arrived.wait()

    async def _apply_waiting(self) -> None:
        """Apply what waits, up to a change of the connection or a hole."""
        published, track = self.published, self.track
        for _ in range(min(len(published.waiting), 256)):
            if published.connections != self._looks.connections:
                return
            number, payload = published.take()
            events = track.live(number, payload)
            if events is not None:
                self._put(events)
            elif track.next is None or number > track.next:
                await self._look(missing=[(number, payload)])
                return
            # Otherwise a replay has brought it already.
        await anyio.lowlevel.checkpoint()

    async def _look(self, missing: Sequence[Numbered] = ()) -> None:
        """Ask the replay buffer for what was missed, and judge whether it is still the same life of the engine."""
        published, track = self.published, self.track
        connected = self._looks.begin(anyio.current_time(), published.connections)
        held = [*missing, *published.waiting]
        published.forget()
        lost, published.overflowed = published.overflowed, False
        suspect, self.health.suspect = self.health.suspect, False
        same_life = await self._same_life() if connected or suspect else True
        position, drifting = track.next is not None, track.adrift
        # Another life's buffer says nothing of what was missed, and may be elsewhere.
        replies, ended = ([], False) if same_life is False else await self._replay(track.ask_from)
        look = track.resync(
            joined(held, replies) if ended and same_life else replies, ended=ended, same_life=same_life,
            missing=bool(missing) or lost,
        )  # fmt: skip
        self._check_size()
        if not ended and same_life:
            published.put_back(held)
        if look.verdict is Verdict.RESTARTED:
            await self._begin_again()
        elif drifting and track.adrift:
            # As before: nothing is known, and nobody answers.
            return
        elif look.verdict is Verdict.GAP or not position:
            if look.reason and self.source.replay:
                _log.warning("learned_anew", node=self.config.node, reason=look.reason)
            self._report_anew(look.reason or "gap: the engine's replay endpoint answers again")
        else:
            self._put(look.events)

    async def _replay(self, start: int) -> tuple[list[Numbered], bool]:
        if not self.source.replay:
            return [], False
        self.replays += 1
        replies, ended = await replay(self.source.replay, self.engine.host, start, seconds=self.config.replay_seconds)
        self._replayed |= bool(replies)
        return replies, ended

    async def _same_life(self) -> bool | None:
        """Whether the engine is in the life that it was in, as far as it says."""
        try:
            started = (await self.engine.load(self.source.rank)).started
        except EngineUnfit:
            return None
        return started == self.facts.started if started and self.facts.started else None

    async def _begin_again(self) -> None:
        """The engine has begun another life: nothing that was known holds, and it is no node before it is well."""
        _log.warning("engine_restarted", node=self.config.node, epoch=self.epoch)
        self._put(self.track.cleared("the engine restarted"))
        self.track.restart()
        replies, ended = await self._replay(0)
        self.track.resync(replies, ended=ended, same_life=None)
        self.track.translator.epoch = 0
        self.life.on(Event.RESTARTED)
        self.health.ill()

    async def _refresh(self) -> None:
        """Ask what the engine says of its new life."""
        facts = await self.engine.facts()
        if facts.block_size not in {0, self.facts.block_size}:
            raise EngineUnfit(
                f"the engine came back with blocks of {facts.block_size} tokens instead of {self.facts.block_size}; "
                "start the adapter again"
            )
        self.facts = msgspec.structs.replace(
            self.facts,
            started=facts.started,
            version=facts.version,
            models=facts.models,
            loras_from=facts.loras_from,
        )
        self._move(facts)
        self.life.on(Event.REFRESHED)

    def _move(self, facts: Facts) -> None:
        """Listen where this life of the engine publishes: it may have taken another free port."""
        found = next((source for source in self._sources(facts) if source.rank == self.source.rank), self.source)
        if found.events != self.source.events:
            _log.info("events_moved", node=self.config.node, before=self.source.events, now=found.events)
            self.published.move(found.events)
        self.source = found

    async def _join(self) -> None:
        """Register after the first time, with what is true of the engine now."""
        if self.life.state is State.REBORN:
            try:
                await self._refresh()
            except EngineUnfit:
                # It may have gone again, before that was seen: what it is shall be asked of the life that comes next.
                if not await self.engine.healthy():
                    self.health.ill()
                    return
                await self._refresh()
        await self._look()
        if self.life.state in {State.JOINING, State.FORGOTTEN}:
            # Otherwise the look has shown yet another life, or the node was given away meanwhile.
            await self._register()

    async def _register(self) -> None:
        """Register until it succeeds, and report all that is known."""
        self.life.on(Event.ASKING)
        # A commit must not hold events of two epochs: what is on its way goes first.
        await self._log.flush()
        facts, config = self.facts, self.config
        own = {labels.ADAPTER: self.writer}
        if config.ranked:
            own[labels.RANK] = str(self.source.rank)
        if facts.loras_from:
            own[labels.LORAS_FROM] = str(facts.loras_from)
        if facts.started:
            own[labels.STARTED] = facts.started
        request = messages.RegisterRequest(
            node=config.node, address=config.address, models=facts.models, block_size=facts.block_size,
            capacity_blocks={"gpu": facts.capacity_blocks}, engine=f"{self.engine.kind} {facts.version}".strip(),
            max_active=config.max_active, pulse_seconds=config.pulse_seconds, labels=own, replace=True,
        )  # fmt: skip
        translator, last = self.track.translator, self.track.position
        translator.epoch = await self.member.register(request, self._not_registered)
        self.life.on(Event.REGISTERED)
        translator.groups.tells = self.member.format >= GROUPS_FORMAT
        self.outbox.begin(translator.report(last))
        _log.info("node_registered", node=config.node, epoch=self.epoch, blocks=translator.used(), batch=last)

    def _not_registered(self, error: ServiceFault) -> None:
        if error.status < 429:
            raise error
        _log.warning("registration_waits", node=self.config.node, error=str(error))

    def _report_anew(self, reason: str) -> None:
        """Take back all that was reported in this epoch, and report what is known."""
        self.repeated_reports += self.life.reporting
        self._put(self._full_report(reason))

    def _full_report(self, reason: str) -> list[types.Event]:
        return [*self.track.cleared(reason), *self.track.translator.report(self.track.position)]

    def _put(self, events: Sequence[types.Event]) -> None:
        if self.life.reporting:
            self.outbox.put(events)

    def _catch_up(self) -> None:
        """When more was to be reported than could wait: report all of it anew as soon as the log takes it."""
        if self.life.reporting and self.outbox.may_begin:
            self.repeated_reports += 1
            self.outbox.begin(self._full_report("gap: the log was away for longer than could be buffered"))

    def _check_size(self) -> None:
        wrong = self.track.translator.wrong_size
        if wrong:
            flag = "--page-size" if self.engine.kind == "sglang" else "--block-size"
            raise EngineUnfit(
                f"the engine's blocks have {wrong} tokens, but {self.facts.block_size} were taken; give --block-size {wrong}, "
                f"or start the engine with {flag} {self.facts.block_size}"
            )

    def _concluded(self, conclusion: Conclusion) -> None:
        """The log says something about this node."""
        if conclusion is Conclusion.FORGOTTEN:
            self.life.on(Event.FORGOTTEN)
            return
        before = self.life.state
        if self.life.on(Event.DISOWNED) is not State.ENDED or before is State.ENDED:
            return
        node = self.config.node
        self._ended = EngineUnfit(
            f"node {node!r} was removed from the fleet; attach it again if it is back"
            if conclusion is Conclusion.REMOVED
            else f"node {node!r} was registered by someone else; an engine has one adapter, with a --node of its own"
        )

    async def _look_at_models(self, now: float) -> None:
        """Register anew, with all that is held, when the engine has loaded or unloaded a LoRA, or more of it can be told."""
        if self.life.state is not State.MEMBER or now < self._models_at:
            return
        self._models_at = now + MODELS_SECONDS
        if self.track.translator.groups.untold and await self.member.log_takes(GROUPS_FORMAT):
            self.life.on(Event.FORGOTTEN)
            return
        models, loras_from = await self.engine.models()
        facts = self.facts
        known = (set(facts.models), set(facts.models[facts.loras_from :]))
        if models and (set(models), set(models[loras_from:])) != known:
            _log.info("models_changed", node=self.config.node, models=models)
            self.facts = msgspec.structs.replace(facts, models=models, loras_from=loras_from)
            if self.life.state is State.MEMBER:
                self.life.on(Event.FORGOTTEN)

    async def _observe(self) -> None:
        """Ask the engine how it is, and log it when it publishes what can't be followed."""
        while True:
            self._oddities.look(self.track)
            well = await self.engine.healthy()
            self.health.answered(anyio.current_time(), well=well)
            if well:
                self.hearing.connected(anyio.current_time())
                with suppress(EngineUnfit):
                    await self._look_at_models(anyio.current_time())
                    self._gauges = gauges = await self.engine.load(self.source.rank)
                    self.sleep.look(asleep=gauges.asleep)
                    received = self._replayed or bool(self.track.applied or self.published.malformed)
                    self.hearing.look(gauges.served, anyio.current_time(), received=received)
                    self.health.began(gauges.started, "" if self.life.state is State.REBORN else self.facts.started)
            await anyio.sleep(self.config.pulse_seconds)

    def _heartbeat(self) -> messages.Heartbeat | None:
        """For as long as the engine is well."""
        asleep = self.sleep.asleep
        if not self.life.reporting or not self.well or (asleep and not self.sleep.tells()):
            return None
        gauges = self._gauges
        return messages.Heartbeat(
            node=self.config.node, epoch=self.epoch, asleep=asleep, active=gauges.active if gauges else 0,
            waiting=gauges.waiting if gauges else 0, used_blocks=self.track.translator.used(),
            unheard=self.hearing.missing, inexact=self.track.translator.groups.trouble(),
        )  # fmt: skip
