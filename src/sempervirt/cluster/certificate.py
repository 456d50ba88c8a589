"""This host's certificate for as long as its agent runs: good for days, and renewed by itself.

    FRESH ──► DUE ──► LATE ──► ENDED      DUE    a third of its life is left: renewal is tried
      ▲        │       │        │         LATE   half of that third is gone, without success: told
      └────────┴───────┴────────┘         ENDED  nobody believes this host any more
           renewed, or joined again

The host that has the authority issues its own. Every other one asks the agent of that host, over
TLS, with the certificate that it still has; the key is new each time. What was renewed is in force
without a restart: for those who connect, for those who are asked, and for the store. So is a pair
that `semper host renew` has put there.

VMs need none of this: they run on behind a certificate that has ended, and cannot move.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections.abc import Callable, Hashable
from typing import assert_never

from pydantic import BaseModel, Field, TypeAdapter

from sempervirt.cluster import peer
from sempervirt.cluster.cluster import (
    Cluster,
    lend,
    read_credentials,
    read_settings,
    remember,
)
from sempervirt.cluster.standing import Age, Standing, age
from sempervirt.core.durations import format_duration
from sempervirt.core.errors import SempervirtError, Unavailable
from sempervirt.host.http import understood
from sempervirt.host.places import Places
from sempervirt.host.records import read_record, remove_record, write_record
from sempervirt.store.guarded import GuardedStore
from sempervirt.store.records import Host, parse
from sempervirt.trust.authority import Authority, Issued
from sempervirt.trust.identity import Identity, KeyRequest

log = logging.getLogger(__name__)

VERSION = 1
FAILURE_FILE = "renewal.json"
# How often is looked, as a part of the certificate's life, and between which bounds: a host that
# slept, or whose clock was set, notices within half a minute.
LOOKS, LOOK_MIN_S, LOOK_MAX_S = 100, 0.1, 30.0
# The same for trying again what has failed.
TRY_MAX_S = 600.0
# Clocks that differ by more are told.
SKEW_S = 30.0


class RenewRequest(BaseModel):
    """What a host hands over to have its certificate renewed."""

    request: str = Field(max_length=8192, description="a certificate signing request, PEM")


class RenewView(BaseModel):
    """What it gets: a certificate (PEM), and what time it was where that was issued."""

    certificate: str
    time: float = Field(description="seconds since the epoch")


def read_standing(config: Places) -> Standing | None:
    """How this host's certificate stands, by the files of the agent; None outside of a cluster."""
    host = ""
    try:
        settings = read_settings(config)
        if settings is None:
            return None
        host = settings.host
        issued = Identity(config.trust_dir).certificate
        if issued is None:
            raise Unavailable("this host has no certificate", remedy=_by_hand(host))
        record = read_record(config.trust_dir / FAILURE_FILE, VERSION) or {}
    except SempervirtError as error:
        return Standing(host=host, ends=None, age=Age.ENDED, failure=str(error))
    now, failure = time.time(), str(record.get("failure", ""))
    state = _age(issued, now)
    if state is Age.ENDED:
        failure = _ended(host, issued, now, failure)
    return Standing(host=host, ends=issued.not_after, age=state, failure=failure)


class OwnCertificate:
    """Made when the cluster is taken part in. `server` is for those who connect; None: as at the
    beginning. `on_change` is called with what the other hosts should hear of it; "": all is well.
    """

    def __init__(self, cluster: Cluster, on_change: Callable[[str], None]) -> None:
        self._cluster = cluster
        self._on_change = on_change
        self._stamp: Hashable = None
        self._issued: Issued | None = None
        self._failures = 0
        self._try_at = 0.0
        self._told = ""
        self._entered = False
        self._lent: bool | None = False  # None: it failed, and that was told
        self.server: ssl.SSLContext | None = None

    async def keep(self) -> None:
        """Renews it whenever that is due; ends by being cancelled."""
        while True:
            pause_s = LOOK_MAX_S
            try:
                issued = await self._look()
                pause_s = _pause_s(issued)
                await self._work(issued)
            except SempervirtError as error:
                await self._failed(str(error), pause_s)
            await asyncio.sleep(pause_s)

    async def _look(self) -> Issued:
        """The certificate in force; takes it into use if it is another than before."""
        identity = self._cluster.identity
        if self._issued is None:
            await asyncio.to_thread(identity.settle)
        stamp = await asyncio.to_thread(identity.stamp)
        if self._issued is not None and stamp == self._stamp:
            await self._lend()
            return self._issued
        found = await asyncio.to_thread(lambda: identity.certificate)
        if found is None:
            host = self._cluster.settings.host
            raise Unavailable("this host has no certificate", remedy=_by_hand(host))
        self._lent = False
        if self._issued is not None:
            await self._take(found)
        self._issued, self._stamp, self._entered = found, stamp, False
        await self._lend()
        return found

    async def _lend(self) -> None:
        """What etcd reads is as new. That it cannot be is told, and harms nothing else."""
        if self._lent:
            return
        try:
            await asyncio.to_thread(lend, self._cluster.identity, self._cluster.settings)
        except SempervirtError as error:
            if self._lent is False:
                log.error("what etcd reads is not as this host's certificate: %s", error)  # noqa: TRY400
            self._lent = None
        else:
            self._lent = True

    async def _take(self, issued: Issued) -> None:
        """Another certificate is there: from now on it is shown."""
        cluster = self._cluster
        self.server = await asyncio.to_thread(cluster.server_context)
        if isinstance(cluster.store, GuardedStore) and cluster.store.etcd.is_secure:
            tls = await asyncio.to_thread(cluster.identity.store_context)
            cluster.store.etcd.show(tls, await asyncio.to_thread(read_credentials, cluster.config))
        await asyncio.to_thread(remember, cluster.config)
        self._failures, self._try_at = 0, 0.0
        log.info("certificate ends=%s is in force", _utc(issued.not_after))
        await asyncio.to_thread(remove_record, cluster.config.trust_dir / FAILURE_FILE)
        self._tell("")

    async def _work(self, issued: Issued) -> None:
        now, own = time.time(), self._cluster.has_authority
        if own and not self._entered:
            self._entered = await self._enter()
        if _age(issued, now) is Age.FRESH:
            return
        if now < self._try_at <= now + TRY_MAX_S:  # further ahead: the clock was set
            return
        await (self._issue() if own else self._ask())
        await self._look()

    async def _enter(self) -> bool:
        try:
            await self._cluster.enter_own()
        except SempervirtError as error:
            log.info("the store does not know this host's certificate yet: %s", error)
            return False
        return True

    async def _issue(self) -> None:
        """Where the authority is. What the store hears of it comes later: etcd on this host may
        need the certificate first.
        """
        cluster, settings = self._cluster, self._cluster.settings

        def issue() -> None:
            asked = KeyRequest.made(settings.host)
            authority, valid = Authority.load(cluster.identity.directory), cluster.host_valid
            issued = authority.issue_host(asked.text, settings.host, settings.address, valid=valid)
            cluster.identity.renew(asked, issued.pem)

        await asyncio.to_thread(issue)

    async def _ask(self) -> None:
        """Where it is not."""
        cluster = self._cluster
        state = await cluster.store.read("hosts/")
        hosts = [parse(Host, key, entry.value) for key, entry in state.entries.items()]
        able = next((one for one in hosts if one.authority), None)
        if able is None:
            raise Unavailable(
                "no host says that it has the authority",
                remedy="start the agent of this release on the host where semper host init was run",
            )
        asked = await asyncio.to_thread(KeyRequest.made, cluster.settings.host)
        async with peer.connect(cluster, able.name, able.address) as connection:
            body, before = RenewRequest(request=asked.text).model_dump(), time.time()
            said = await connection.call("POST", "/renew", body=body)
            answer = understood(TypeAdapter(RenewView), said, "POST /renew")
        _compare_clocks(able.name, before, answer.time, time.time())
        await asyncio.to_thread(cluster.identity.renew, asked, answer.certificate)

    async def _failed(self, why: str, pause_s: float) -> None:
        """Keeps why, tells it in time, and puts the next try off."""
        now, issued, config = time.time(), self._issued, self._cluster.config
        self._failures += 1
        self._try_at = now + min(TRY_MAX_S, pause_s * 2.0 ** min(self._failures, 10))
        record = {"failure": why, "time": now}
        try:
            await asyncio.to_thread(write_record, config.trust_dir / FAILURE_FILE, VERSION, record)
        except OSError as error:
            log.warning("why the certificate is not renewed cannot be kept: %s", error)
        if issued is None:
            self._tell(why)
            return
        match _age(issued, now):
            case Age.FRESH | Age.DUE:
                log.info("certificate ends=%s not renewed yet: %s", _utc(issued.not_after), why)
            case Age.LATE:
                self._tell(f"it ends on {_utc(issued.not_after)}, and is not renewed: {why}")
            case Age.ENDED:
                self._tell(_ended(self._cluster.settings.host, issued, now, why))
            case _ as never:
                assert_never(never)

    def _tell(self, failure: str) -> None:
        """In the log, and to the others."""
        if failure:
            log.error("this host's certificate: %s", failure)
        if failure != self._told:
            self._told = failure
            self._on_change(failure)


def _age(issued: Issued, now: float) -> Age:
    return age(issued.not_before, issued.not_after, now)


def _pause_s(issued: Issued) -> float:
    return min(LOOK_MAX_S, max(LOOK_MIN_S, (issued.not_after - issued.not_before) / LOOKS))


def _compare_clocks(host: str, before: float, there: float, after: float) -> None:
    """Tells of a clock that is wrong: `there` was between `before` and `after`."""
    ahead_s = before - there if there < before else after - there
    if abs(ahead_s) > SKEW_S and not before <= there <= after:
        log.warning(
            "the clock of this host is %s %s that of %s, and certificates of days need clocks that "
            "are right within minutes; compare them: timedatectl",
            format_duration(abs(ahead_s)),
            "ahead of" if ahead_s > 0 else "behind",
            host,
        )


def _ended(host: str, issued: Issued, now: float, why: str) -> str:
    because = f" ({why})" if why else ""
    return (
        f"it has ended on {_utc(issued.not_after)} by the clock of this host, which says "
        f"{_utc(now)}. VMs run on, and none can be started or moved: neither the store nor another "
        f"host answers"
        f"{because}. Is the clock right (timedatectl)? Then {_by_hand(host)}"
    )


def _by_hand(host: str) -> str:
    return (
        f"where the authority is: semper host add {host} > {host}.token; and here: "
        f"semper host renew {host}.token"
    )


def _utc(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(moment))
