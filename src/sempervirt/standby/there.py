"""The VM of another host that standbys are kept for here, as `ports.FirstVm`.

    the store: who owns it, is that host's lease there ─┐
    its host:  is QEMU there, how has it ended         ─┴─► evidence ─► rules ─► seen()
    its host's word, or the storage of its disks       ───► fence() ─► the store moves the claim

The end of the other host's lease is a suspicion, and no more: what counts before anything is
written is a proof by the storage, the other host's own word, or an operator's
(docs/design/fencing.md). While the VM runs on this host, as after a take-over or a move, all of
that is asked of `here`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import assert_never

from sempervirt.cluster import peer
from sempervirt.cluster.cluster import Cluster
from sempervirt.core.errors import (
    AgentUnavailable,
    NotAllowed,
    NotFound,
    OutcomeUnknown,
    SempervirtError,
    StateConflict,
    Unavailable,
    reason,
)
from sempervirt.disk.backend import BackendCommand
from sempervirt.disk.export import Source, write_snapshot
from sempervirt.host import background
from sempervirt.host.beneath import require_beneath
from sempervirt.host.storage_call import call_storage
from sempervirt.qemu.spec import VmSpec
from sempervirt.qemu.state import Runstate
from sempervirt.standby.disks import FirstDisks, copied
from sempervirt.standby.evidence import (
    LOOK_S,
    Alive,
    Began,
    Heard,
    Mended,
    Over,
    Sign,
    Silent,
    Trouble,
    Troubled,
)
from sempervirt.standby.fence_file import Fences
from sempervirt.standby.first import WatchedFirst
from sempervirt.standby.means import (
    Ability,
    Impossible,
    Means,
    NotYet,
    Proven,
    Where,
    storage_can,
)
from sempervirt.standby.messages import FirstPeer, FirstTold, GiveUpFirst
from sempervirt.standby.ports import Snapshot
from sempervirt.standby.proof import Fence, Target
from sempervirt.standby.rules import GoAhead, Provable, Rules, rules_of
from sempervirt.standby.service import ask_tcp
from sempervirt.standby.state import First
from sempervirt.standby.watching import Watch, observations
from sempervirt.store import epoch
from sempervirt.store.port import boot_clock_s
from sempervirt.store.records import Custody, Host, Ownership, Presence, parse
from sempervirt.store.registry import Registry
from sempervirt.vm.claims import claimed_images
from sempervirt.vm.config import AgentConfig

log = logging.getLogger(__name__)

STORE_S = 3.0
# What the storage of the disks can is looked at anew so often.
ABILITIES_S = 60.0
ROOTS_REMEDY = "name its directory to semperd: --image-root DIR"
# A host that has reserved nothing can write on what was on the way when another one reserves.
NOT_HELD = "but the VM's host has reserved nothing, so its last requests could not be ended"
# An answer of the VM's host is good for so long.
FRESH_S = 5.0
_LIVES = (Runstate.RUNNING, Runstate.PAUSED, Runstate.STOPPING)


@dataclass(frozen=True)
class _Owner:
    """The host that owns the VM, as the store says. `address` is where its agent listens."""

    name: str
    address: str


class FirstThere:
    """The VM `name` of another host, described by `spec` as it was told last. `here` is the same VM
    while it runs on this host. `fences` is what this host's operator says of fences, `learn` is
    told of a new description, `dismissed` that the store names another keeper of its standbys;
    `ready`: whether one could take over now.
    """

    def __init__(
        self,
        name: str,
        config: AgentConfig,
        here: WatchedFirst,
        spec: VmSpec | None,
        fences: Callable[[], Fences],
        learn: Callable[[VmSpec], None],
        dismissed: Callable[[], None],
        ready: Callable[[], bool],
        clock: Callable[[], float] = boot_clock_s,
    ) -> None:
        self.told_spec = spec
        self.abilities: Mapping[str, tuple[Path, Ability]] = {}
        self._name = name
        self._config = config
        self._here = here
        self._fences = fences
        self._learn = learn
        self._dismissed = dismissed
        self._ready = ready
        self._clock = clock
        self._own = ""
        self._owned: Ownership | None = None
        self._last = ""  # the host that had it last
        self._told: FirstTold | None = None
        self._life = ""
        self._told_at = 0.0
        self._looked_at = -ABILITIES_S
        self._why = "its host was not asked yet"
        self._fence: Fence | None = None
        self._fenced: tuple[Ownership | None, str] = (None, "")
        monitor_s = config.patience.command_s
        self._watch = Watch(
            name, lambda: None, self._rules, Provable.NO, self._ask_service, monitor_s=monitor_s
        )

    @property
    def is_here(self) -> bool:
        """Whether the VM runs on this host, or has ended here."""
        vm = self._here.vm
        ours = self._owned is not None and self._last in ("", self._own)
        return vm is not None and (not vm.freed or ours)

    @property
    def spec(self) -> VmSpec | None:
        """What it has; None: nobody here knows."""
        return self._here.spec if self.is_here else self.told_spec

    @property
    def watch(self) -> Watch:
        """Who judges."""
        return self._here.watch if self.is_here else self._watch

    @property
    def fenced(self) -> tuple[Ownership | None, str]:
        """Of which owner the last fence was proved, and by what; None: of a VM of this host."""
        return (None, "") if self.is_here else self._fenced

    @property
    def left(self) -> VmSpec | None:
        """What it has on another host; None where it is of this one."""
        return None if self.is_here else self.told_spec

    def disks(self) -> FirstDisks:
        """Raises Unavailable while nobody knows what the VM has."""
        if self.is_here:
            return self._here.disks()
        return DisksThere(self._require_told(), self._own, self._config.backend, self._peer)

    async def run(self) -> None:
        """Watches it, wherever it runs, until it is cancelled."""
        tasks = [
            background.start(self._watch.run(), f"{self._name}: watch there", crash=True),
            background.start(self._here.run(), f"{self._name}: watch", crash=True),
            background.start(self._follow(), f"{self._name}: follow", crash=True),
        ]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # What is seen

    def seen(self) -> tuple[First, str]:
        """What it is, and why a standby may take over."""
        if self.is_here:
            return self._here.seen()
        permission = self._watch.look().permission
        if isinstance(permission, GoAhead):
            return First.DEAD, permission.why
        if self._told_run() is Runstate.RUNNING:
            return First.RUNNING, ""
        return First.AWAY, f"{self._why}; {permission.why}" if self._why else permission.why

    async def changed(self, seen: tuple[First, str]) -> None:
        """Returns when it is, or may be, something else than `seen`."""
        if self.is_here:
            await self._here.changed(seen)
        else:
            await asyncio.sleep(LOOK_S)

    async def take(self) -> Snapshot:
        """Takes a snapshot of the disks of which a standby has copies."""
        if self.is_here:
            return await self._here.take()
        disks = self.disks()
        if names := [disk.name for disk in copied(disks.spec)]:
            return await disks.take(names)
        return Snapshot(time.time(), (), "")

    def _rules(self) -> Rules:
        return rules_of(self.told_spec.standby if self.told_spec is not None else None)

    async def _ask_service(self) -> str | None:
        told = self.told_spec.standby if self.told_spec is not None else None
        if self.is_here or told is None or told.service is None:
            return None
        return await ask_tcp(told.service)

    async def _follow(self) -> None:
        while True:
            try:
                async with Cluster.opened(self._config) as cluster:
                    self._own = cluster.settings.host
                    while True:
                        await self._follow_owner(cluster)
                        await asyncio.sleep(LOOK_S)
            except (SempervirtError, OSError) as error:  # the settings cannot be read, say
                self._missing_store(str(error))
            await asyncio.sleep(LOOK_S)

    async def _follow_owner(self, cluster: Cluster) -> None:
        """Asks the store, and the host that owns the VM for as long as that is the same one."""
        owner = await self._ask_store(cluster)
        if owner is None:
            return
        try:
            async with peer.connect(cluster, owner.name, owner.address) as connection:
                there = FirstPeer(connection, self._name)
                while True:
                    await self._ask_host(there, owner.name)
                    await self._look_at_storage(owner.name)
                    await asyncio.sleep(LOOK_S)
                    if await self._ask_store(cluster) != owner:
                        return
        except SempervirtError as error:
            self._why = error.message
            await self._look_at_storage(owner.name)

    async def _ask_store(self, cluster: Cluster) -> _Owner | None:
        """Who owns the VM, and is to be asked; what the store says of that host is evidence."""
        asked = self._clock()
        try:
            async with asyncio.timeout(STORE_S):
                owned = await Registry(cluster.store).find(self._name)
                self._owned = owned
                if owned.owner and owned.owner != self._last:
                    # What was seen is of another host, and of an earlier life of the VM.
                    self._watch.see(Began(self._clock()))
                # When it has ended it is nobody's: who had it can still tell how it ended.
                owner = self._last = owned.owner or self._last
                if not owner or owner == self._own:
                    self._told, self._why = None, "no other host owns it"
                    self._watch.see(Began(self._clock()))
                    self._mended(Trouble.STORE)
                    return None
                host, key = f"hosts/{owner}", f"alive/{owner}"
                entries = (await cluster.store.read(key, host)).entries
        except (SempervirtError, TimeoutError) as error:
            said = error.message if isinstance(error, SempervirtError) else "no answer in time"
            self._missing_store(said)
            return None
        self._mended(Trouble.STORE)
        now = self._clock()
        if key in entries:
            parse(Presence, key, entries[key].value)
            self._watch.see(Heard(now, Sign.HOST))
        else:
            why = f"the lease of host {owner} has ended"
            self._watch.see(Silent(now, Sign.HOST, asked, why))
        if owned.custody is Custody.MOVING:
            self._watch.see(Troubled(now, Trouble.WORK, "it moves to another host"))
        if owned.standby != self._own:
            self._dismissed()
            return None
        if host not in entries:
            return None
        return _Owner(owner, parse(Host, host, entries[host].value).address)

    def _missing_store(self, why: str) -> None:
        self._watch.see(Troubled(self._clock(), Trouble.STORE, f"the store does not answer: {why}"))

    def _mended(self, trouble: Trouble) -> None:
        self._watch.see(Mended(self._clock(), trouble))

    async def _ask_host(self, there: FirstPeer, owner: str) -> None:
        try:
            told = await there.look(ready=self._ready())
        except (AgentUnavailable, OutcomeUnknown) as error:
            self._told, self._why = None, error.message
            raise
        except SempervirtError as error:
            self._told, self._why = None, f"host {owner} says: {error.message}"
            return
        if self.told_spec != told.spec:
            try:
                await self._require_ours(told.spec)
            except (SempervirtError, OSError) as error:
                self._told, self._why = (
                    None,
                    f"host {owner} tells of what is not to be had: {error}",
                )
                return
            self.told_spec = told.spec
            self._learn(told.spec)
        now = self._clock()
        if self._life and self._life != told.life:
            self._watch.see(Began(now))
        self._watch.see(Heard(now, Sign.HOST))  # also one that the store hears nothing of
        self._life = told.life
        self._told, self._told_at, self._why = told, now, ""
        monitor_s = self._config.patience.command_s
        for seen in observations(told.seen, self._watch.evidence, now, monitor_s, there=True):
            self._watch.see(seen)

    async def _require_ours(self, spec: VmSpec) -> None:
        """Another host names no file outside of this one's roots. Raises NotAllowed, OSError."""
        if spec.name != self._name:
            raise NotAllowed(f"VM {self._name} cannot be called {spec.name}")
        roots = self._config.image_roots
        for file in spec.files:
            await call_storage(file, partial(require_beneath, file, roots, ROOTS_REMEDY))

    async def _look_at_storage(self, owner: str) -> None:
        """What the storage can decides whether a silence counts. A host that answers can tell of
        its VM's end itself.
        """
        now = self._clock()
        if now - self._looked_at >= ABILITIES_S and self.told_spec is not None:
            self._looked_at = now
            self.abilities = await self.find_abilities(self.told_spec, owner)
        able = all(ability.means is not None for _, ability in self.abilities.values())
        provable = (bool(self.abilities) and able) or self._told is not None
        self._watch.provable = Provable.YES if provable else Provable.NO

    async def find_abilities(self, spec: VmSpec, owner: str) -> Mapping[str, tuple[Path, Ability]]:
        """How it can be proved of each disk that `owner` does not write it any more."""
        fences = self._fences()
        command = owner in fences.commands
        found: dict[str, tuple[Path, Ability]] = {}
        for disk in spec.disks:
            if disk.read_only:
                continue
            able = await storage_can(
                disk.image, Where.ELSEWHERE, command=command, revoking=fences.revoking
            )
            if able.means is Means.RESERVATION:
                able = Ability(Means.COMMAND if command else None, f"{able.why}; {NOT_HELD}")
            found[disk.name] = disk.image, able
        return found

    # The fence

    async def fence(self, *, kill: bool, word: str = "") -> None:
        """As `ports.FirstVm.fence`: by the word of the VM's own host where that answers, or by what
        the storage of each disk proves, or by an operator's `word` where the storage can nothing.
        """
        if self.is_here:
            await self._here.fence(kill=kill, word=word)
            return
        if not kill:
            self._require_permission()
        self.let_go()
        spec = self._require_spec()
        owned, ended = await self._ended_there(kill=kill)
        await self._require_on_record(spec, owned)  # before another host would wait for our locks
        fences = self._fences()
        images = await self.find_abilities(spec, owned.owner)
        self.abilities = images
        first = Target(
            self._name,
            Where.ELSEWHERE,
            word=word,
            ended=ended,
            command=fences.commands.get(owned.owner),
        )
        self._fence = Fence(first, images)
        proof = await self._fence.prove()
        match proof:
            case Proven(means, evidence):
                try:  # again: from here on nobody else gets the locks
                    await self._require_on_record(spec, owned)
                except BaseException:
                    self.let_go()
                    raise
                log.warning("standby vm=%s fenced means=%s: %s", self._name, means.value, evidence)
                self._fenced = (owned, evidence)
            case NotYet(why):
                raise Unavailable(f"VM {self._name} may still write: {why}")
            case Impossible(why):
                raise Unavailable(
                    f"VM {self._name} may still write, and its storage can prove nothing: {why}",
                    remedy="see that its host is off, and say so: semper standby failover "
                    f'{self._name} --i-know "how you know"; or: semper standby cancel {self._name}',
                )
            case _:
                assert_never(proof)

    async def prove_anew(self, *, kill: bool, word: str = "") -> None:
        """See `ports.FirstVm`."""
        if self.is_here or self._fenced[0] is not None:
            return
        async with Cluster.opened(self._config) as cluster:
            owned = await Registry(cluster.store).find(self._name)
            if owned.owner == cluster.settings.host:
                return
        await self.fence(kill=kill, word=word)

    def _require_permission(self) -> None:
        """Raises StateConflict for a VM that lives or was ended on purpose; Unavailable while this
        agent knows too little of it: another one, which has begun to take it over, knew more. That
        its host is heard of says nothing of the VM: it may have been started anew.
        """
        judged = self._watch.look()
        why = judged.permission.why
        if isinstance(judged.permission, GoAhead):
            return
        if isinstance(judged.verdict, Over) or self._lives():
            raise StateConflict(f"VM {self._name} is not to be taken over: {why}")
        if self._told_run() is Runstate.CRASHED:
            return  # its host is back, and nobody there had asked for that end
        if isinstance(judged.verdict, Alive):
            why = f"host {self._last} is heard of, and has not said yet what became of it"
        raise Unavailable(f"VM {self._name} is not known to be dead: {why}")

    def _told_run(self) -> Runstate | None:
        """What its host has said of it just now; None: nothing."""
        if self._told is None or self._clock() - self._told_at > FRESH_S:
            return None
        return self._told.seen.run

    def _lives(self) -> bool:
        """Whether it was heard of itself: by its host's word, or by what it serves."""
        served = self._watch.evidence.last_heard(Sign.SERVICE)
        serves = served is not None and 0 <= self._clock() - served <= FRESH_S
        return serves or self._told_run() in _LIVES

    async def _require_on_record(self, spec: VmSpec, owned: Ownership) -> None:
        """What was proved is of the host that the store names. Raises Unavailable where another one
        has the VM by its images, of which the store does not know yet.
        """
        for image in await claimed_images(spec):
            record = await call_storage(image, partial(_record_of, image))
            if record is None or record.epoch < owned.epoch:
                continue
            if (record.epoch, record.claim) != (owned.epoch, owned.claim):
                raise Unavailable(
                    f"{image} is of host {record.holder}, epoch {record.epoch}, and the store does "
                    f"not know of that: what was proved is of {owned.owner or 'nobody'}, epoch "
                    f"{owned.epoch}",
                    remedy=f"see what runs there: semper vm show {self._name}; or: semper standby "
                    f"cancel {self._name}",
                )

    def let_go(self) -> None:
        """The locks of the fence are free for the standby."""
        self._here.let_go()
        if self._fence is not None:
            self._fence.let_go()
            self._fence = None

    async def _ended_there(self, *, kill: bool) -> tuple[Ownership, str]:
        """Who owns the VM, and what that host says of its end; "" when it cannot be asked. Raises
        StateConflict when the VM lives there, Unavailable without the store.
        """
        async with Cluster.opened(self._config) as cluster:
            self._own = cluster.settings.host
            try:
                async with asyncio.timeout(STORE_S):
                    owned = await Registry(cluster.store).find(self._name)
                    known = await cluster.store.read(f"hosts/{owned.owner}")
            except (NotFound, TimeoutError) as error:
                raise Unavailable(
                    f"only the store says who owns VM {self._name}: {reason(error)}"
                ) from error
            if not owned.custody.is_certain:
                raise Unavailable(
                    f"VM {self._name} is {owned.custody.value} by the store, between "
                    f"{owned.owner} and {owned.destination or 'others'}: no end of it at one of "
                    "them says that another one does not run it",
                    remedy=f"settle it: semper vm resolve {self._name}",
                )
            if owned.custody is Custody.FREE:
                return owned, "the host that had it has released it, after its end"
            entry = known.entries.get(f"hosts/{owned.owner}")
            if entry is None or owned.owner == self._own:
                return owned, ""
            address = parse(Host, f"hosts/{owned.owner}", entry.value).address
            evidence = await self._end_at(cluster, owned.owner, address, kill=kill)
            return owned, evidence

    async def _end_at(self, cluster: Cluster, host: str, address: str, *, kill: bool) -> str:
        """What a host says of the VM's end; "" when it says nothing. Raises StateConflict when the
        VM lives there, and is not to be ended; Unavailable when it is not to be ended yet.
        """
        async with AsyncExitStack() as stack:
            try:
                connecting = peer.connect(cluster, host, address)
                there = FirstPeer(await stack.enter_async_context(connecting), self._name)
                if not kill:
                    await self._ask_host(there, host)
            except SempervirtError as error:
                log.info("standby vm=%s host %s: %s", self._name, host, error.message)
                return ""
            if not kill:  # it is there by now, and what was its silence may be explained
                self._require_permission()
            try:
                evidence = await there.end(kill=kill)
            except StateConflict:
                raise
            except NotAllowed as error:  # and no reason to have that host switched off
                raise Unavailable(f"host {host} says: {error.message}") from error
            except SempervirtError as error:
                log.info("standby vm=%s host %s: %s", self._name, host, error.message)
                return ""
        return f"host {host} says: {evidence}"

    @asynccontextmanager
    async def _peer(self) -> AsyncIterator[FirstPeer]:
        async with Cluster.opened(self._config) as cluster:
            owned = await Registry(cluster.store).find(self._name)
            key = f"hosts/{owned.owner}"
            entry = (await cluster.store.read(key)).entries.get(key)
            if entry is None:
                raise Unavailable(f"no host owns VM {self._name}")
            address = parse(Host, key, entry.value).address
            async with peer.connect(cluster, owned.owner, address) as connection:
                yield FirstPeer(connection, self._name)

    def _require_told(self) -> FirstTold:
        if self._told is None:
            raise Unavailable(f"VM {self._name} is on another host, which tells nothing of it")
        return self._told

    def _require_spec(self) -> VmSpec:
        if self.told_spec is None:
            raise Unavailable(f"nobody here knows what VM {self._name} has")
        return self.told_spec


class DisksThere:
    """Of a VM on another host, as that host has told; this host, `own`, copies with `backend`."""

    def __init__(
        self,
        told: FirstTold,
        own: str,
        backend: BackendCommand,
        connect: Callable[[], AbstractAsyncContextManager[FirstPeer]],
    ) -> None:
        self._told = told
        self._backend = backend
        self._connect = connect
        self._reader = f"standby-{own}"[:40]

    @property
    def spec(self) -> VmSpec:
        """See `FirstDisks`."""
        return self._told.spec

    @property
    def served(self) -> frozenset[str]:
        """See `FirstDisks`."""
        return self._told.served

    async def take(self, names: Sequence[str]) -> Snapshot:
        """See `FirstDisks`."""
        async with self._connect() as there:
            return await there.snapshot(tuple(names))

    async def copy_out(self, disk: str, snapshot: int, target: Path) -> None:
        """See `FirstDisks`."""
        image = self.spec.disk(disk).image
        source = Source(self._backend.binary(), str(image), f"{self.spec.name}/{disk}")
        await write_snapshot(source, snapshot, self._reader, target, _ignore)

    async def give_up(self, disk: str, snapshot: int, ours: set[int]) -> str:
        """See `FirstDisks`."""
        asked = GiveUpFirst(disk=disk, snapshot=snapshot, ours=frozenset(ours), reader=self._reader)
        try:
            async with self._connect() as there:
                return await there.give_up(asked)
        except SempervirtError as error:
            return f"snapshot {snapshot} of disk {disk} stays: {error.message}"


def _record_of(image: Path) -> epoch.EpochRecord | None:
    return epoch.read_epoch(epoch.record_path(image))


def _ignore(_done: int, _total: int) -> None:
    """Nobody looks how far a standby is copied."""
