"""The store of several hosts: etcd, over its own JSON gateway (etcd 3.4 and later).

Why httpx and no client library: the gateway is a part of etcd and speaks the same protocol
buffers as JSON; httpx is here already, typed, asynchronous and well kept, and tells whether a
request had left when it failed. That difference is the one between Unavailable (known not done)
and OutcomeUnknown, and the libraries do not make it: `etcd3` has had no release since 2020,
`etcd3gw` is synchronous, `aetcd` is one person's beta and brings grpcio and protobuf. Five
calls do not pay for that.

- A *read* is linearizable: a member that is cut off from the others does not answer from
  memory. It may be asked of another member when one fails.
- A *commit* is sent to one member. Only if it never left (nobody accepted the connection) is
  another one asked. An answer that is lost, or in which etcd says that it gave up waiting, is
  OutcomeUnknown.
- With *credentials* a token is shown with each call. A call that etcd refuses for want of a token,
  or for one that has ended, was not carried out, and is repeated with another.
- A *watch* that has been silent for a while proves that the store is still there by a read: a
  partition makes no noise.
"""

from __future__ import annotations

import asyncio
import base64
import json
import math
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import httpx

from sempervirt.core.errors import NotAllowed, OutcomeUnknown, SempervirtError, Unavailable
from sempervirt.store.port import (
    Entry,
    Lease,
    LeaseEnded,
    Put,
    Snapshot,
    Write,
    boot_clock_s,
    check_writes,
    outdated,
)

ROOT = "sempervirt/1/"
TIMEOUT_S = 5.0
SILENCE_S = 5.0
# Before a watch begins again: one that is refused at once shall not spin.
AGAIN_S = 0.1

# Codes of gRPC in etcd's answers that say for certain that nothing was done: invalid argument,
# not found, permission denied, resource exhausted, failed precondition, out of range,
# unauthenticated.
_NOT_DONE = {3, 5, 7, 8, 9, 11, 16}
_NOT_FOUND = 5
_DENIED = 7
_UNAUTHENTICATED = 16
_EXHAUSTED = 8

# An alert of TLS that comes after the handshake is not translated by httpx.
BROKEN = (httpx.HTTPError, ssl.SSLError)


@dataclass(frozen=True)
class Credentials:
    """Who this host is to etcd (`etcd_rights`)."""

    user: str
    password: str = field(repr=False)


class EtcdStore:
    """A `Store` in etcd. Entries stand below `root`."""

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        tls: ssl.SSLContext | None = None,
        credentials: Credentials | None = None,
        root: str = ROOT,
        timeout_s: float = TIMEOUT_S,
        silence_s: float = SILENCE_S,
    ) -> None:
        """Endpoints as "http://127.0.0.1:2379". Nothing is asked yet."""
        self._endpoints = list(endpoints)
        self.root = root
        self.credentials = credentials
        self._token = ""
        self._silence_s = silence_s
        self.is_secure = tls is not None
        self._timeout_s = timeout_s
        self._http = self._client(tls)
        self._retiring: set[asyncio.Task[None]] = set()

    async def read(self, prefix: str = "") -> Snapshot:
        """See `Store`."""
        answer = await self._ask("kv/range", self._range(prefix), repeatable=True)
        entries = dict(self._entry(pair) for pair in answer.get("kvs", []))
        return Snapshot(int(answer["header"]["revision"]), entries)

    async def commit(self, writes: Sequence[Write], *, expect: Mapping[str, int]) -> int:
        """See `Store`."""
        check_writes(writes, expect)
        compare = [
            {
                "key": self._key(key),
                "target": "MOD",
                "result": "EQUAL",
                "mod_revision": str(revision),
            }
            for key, revision in expect.items()
        ]
        body = {"compare": compare, "success": [self._write(write) for write in writes]}
        answer = await self._ask("kv/txn", body, repeatable=False)
        if not answer.get("succeeded"):
            raise outdated(list(expect))
        return int(answer["header"]["revision"])

    async def watch(self, prefix: str = "") -> AsyncGenerator[Snapshot]:
        """See `Store`."""
        state = await self.read(prefix)
        yield state
        while True:
            async with aclosing(self._changes(prefix, state.revision + 1)) as changes:
                async for events, revision in changes:
                    entries = dict(state.entries)
                    self._apply(events, entries)
                    state = Snapshot(revision, entries)
                    yield state
            # Silent for long, or refused, or its history is gone: a read tells which.
            present = await self.read(prefix)
            await asyncio.sleep(AGAIN_S)
            if present.entries != state.entries:
                yield present
            state = present

    async def grant(self, ttl_s: float) -> Lease:
        """See `Store`. etcd counts in seconds, and has a minimum of its own."""
        before = boot_clock_s()
        # A lease that was granted and not learned of ends by itself.
        answer = await self._ask("lease/grant", {"TTL": str(math.ceil(ttl_s))}, repeatable=True)
        granted_s = float(answer["TTL"])
        return Lease(int(answer["ID"]), granted_s, before + granted_s)

    async def renew(self, lease: Lease) -> Lease:
        """See `Store`."""
        before = boot_clock_s()
        answer = await self._ask("lease/keepalive", {"ID": str(lease.id)}, repeatable=True)
        granted_s = float(answer.get("result", {}).get("TTL", 0))
        if granted_s <= 0:
            raise LeaseEnded("the lease has ended", remedy="grant another one")
        return Lease(lease.id, granted_s, before + granted_s)

    async def revoke(self, lease: Lease) -> None:
        """See `Store`."""
        try:
            await self._ask("lease/revoke", {"ID": str(lease.id)}, repeatable=True)
        except LeaseEnded:
            return

    def show(self, tls: ssl.SSLContext, credentials: Credentials | None) -> None:
        """From the next call on shows another certificate. Calls that go on end as they are; a
        watch begins again.
        """
        before, self._http = self._http, self._client(tls)
        self.credentials, self._token = credentials, ""
        task = asyncio.create_task(self._retire(before))
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    def _client(self, tls: ssl.SSLContext | None) -> httpx.AsyncClient:
        # No proxy of the environment stands between this host and its store.
        return httpx.AsyncClient(
            verify=tls if tls is not None else True, timeout=self._timeout_s, trust_env=False
        )

    async def _retire(self, client: httpx.AsyncClient) -> None:
        """Ends what only a watch uses by now: no call takes longer."""
        try:
            await asyncio.sleep(2 * self._timeout_s)
        finally:
            await client.aclose()

    async def close(self) -> None:
        """See `Store`."""
        for task in self._retiring:
            task.cancel()
        await asyncio.gather(*self._retiring, return_exceptions=True)
        await self._http.aclose()

    # Users of etcd

    async def authenticate(self) -> bool:
        """Gets a token; False when etcd asks for none. Raises NotAllowed, Unavailable."""
        credentials = self.credentials
        assert credentials is not None
        body = {"name": credentials.user, "password": credentials.password}
        self._token = ""
        try:
            answer = await self._ask("auth/authenticate", body, repeatable=True)
        except Unavailable as error:
            if "authentication is not enabled" in error.message:
                return False
            if "invalid user ID or password" in error.message:
                raise NotAllowed(
                    f"etcd does not know {credentials.user} any more, or by another password",
                    remedy="was this host revoked? To take it back: semper host add NAME",
                ) from error
            raise
        self._token = str(answer["token"])
        return True

    async def administer(self, call: str, body: Mapping[str, Any]) -> None:
        """Changes users or roles. Raises NotAllowed, Unavailable, OutcomeUnknown."""
        await self._ask(call, body, repeatable=False)

    async def count_others(self) -> int:
        """How many keys there are that are not below the root."""
        everything = {"key": _encoded("\0"), "range_end": _encoded("\0"), "count_only": True}
        own = {**self._range(""), "count_only": True}
        counts = [
            int((await self._ask("kv/range", asked, repeatable=True)).get("count", 0))
            for asked in (everything, own)
        ]
        return counts[0] - counts[1]

    @property
    def _headers(self) -> dict[str, str]:
        return {"Authorization": self._token} if self._token else {}

    # What is sent, and what comes back

    def _key(self, key: str) -> str:
        return _encoded(self.root + key)

    def _range(self, prefix: str) -> dict[str, str]:
        first = (self.root + prefix).encode()
        return {
            "key": base64.b64encode(first).decode(),
            "range_end": base64.b64encode(first[:-1] + bytes([first[-1] + 1])).decode(),
        }

    def _entry(self, pair: Mapping[str, str]) -> tuple[str, Entry]:
        value = base64.b64decode(pair.get("value", "")).decode()
        return self._name(pair), Entry(value, int(pair["mod_revision"]))

    def _name(self, pair: Mapping[str, str]) -> str:
        return base64.b64decode(pair["key"]).decode().removeprefix(self.root)

    def _write(self, write: Write) -> dict[str, Any]:
        key = self._key(write.key)
        if not isinstance(write, Put):
            return {"request_delete_range": {"key": key}}
        put = {"key": key, "value": _encoded(write.value)}
        if write.lease is not None:
            put["lease"] = str(write.lease.id)
        return {"request_put": put}

    def _apply(self, events: Iterable[Mapping[str, Any]], entries: dict[str, Entry]) -> None:
        for event in events:
            if event.get("type") == "DELETE":
                entries.pop(self._name(event["kv"]), None)
            else:
                key, entry = self._entry(event["kv"])
                entries[key] = entry

    async def _changes(
        self, prefix: str, first_revision: int
    ) -> AsyncGenerator[tuple[list[Mapping[str, Any]], int]]:
        """Events, with the revision after them. Ends when the store has to be read again."""
        create = {**self._range(prefix), "start_revision": str(first_revision)}
        timeout = httpx.Timeout(self._http.timeout.connect, read=self._silence_s)
        try:
            async with self._http.stream(
                "POST",
                f"{self._endpoints[0]}/v3/watch",
                json={"create_request": create},
                headers=self._headers,
                timeout=timeout,
            ) as response:
                async for answer in _documents(response):
                    result = answer.get("result", {})
                    if "error" in answer or result.get("canceled"):
                        return
                    if result.get("events"):
                        yield result["events"], int(result["header"]["revision"])
        except BROKEN:
            return  # the read that follows tells silence from loss

    async def _ask(self, call: str, body: Mapping[str, Any], *, repeatable: bool) -> Any:
        """Asks one member after the other, as far as that is safe."""
        failure: Exception | None = None
        for endpoint in list(self._endpoints):
            try:
                response = await self._post(endpoint, call, body)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                failure = error
            except BROKEN as error:
                if not repeatable:
                    raise _unknown(endpoint, repr(error)) from error
                failure = error
            else:
                if response.is_success:
                    return _document(response, repeatable=repeatable)
                refusal = _refusal(endpoint, response, repeatable=repeatable)
                if not (repeatable and type(refusal) is Unavailable):
                    raise refusal
                failure = refusal
            # The next call begins with another member.
            self._endpoints.append(self._endpoints.pop(0))
        raise Unavailable(
            f"etcd does not answer at {', '.join(sorted(self._endpoints))}: {failure}",
            remedy="look after etcd and the network to it (etcdctl endpoint health); "
            "VMs run on meanwhile, and none can be started or moved",
        ) from failure

    async def _post(self, endpoint: str, call: str, body: Mapping[str, Any]) -> httpx.Response:
        url = f"{endpoint}/v3/{call}"
        response = await self._http.post(url, json=body, headers=self._headers)
        if self.credentials is None or not _wants_token(response) or "authenticate" in call:
            return response
        await self.authenticate()
        return await self._http.post(url, json=body, headers=self._headers)


def _wants_token(response: httpx.Response) -> bool:
    """Whether etcd did nothing because of the token."""
    if response.is_success:
        return False
    try:
        document = response.json()
        code, text = int(document["code"]), str(document["message"])
    except (ValueError, KeyError, TypeError):
        return False
    ended = ("user name is empty", "revision of auth store is old", "revision in header is old")
    return code == _UNAUTHENTICATED or any(said in text for said in ended)


def _encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _document(response: httpx.Response, *, repeatable: bool) -> Any:
    try:
        return response.json()
    except ValueError as error:
        if repeatable:
            raise Unavailable(
                f"{response.url} does not answer as etcd: {error}",
                remedy="correct the address of the store",
            ) from error
        raise _unknown(str(response.url), str(error)) from error


def _unknown(endpoint: str, reason: str) -> OutcomeUnknown:
    return OutcomeUnknown(
        f"etcd at {endpoint} took a change, and its answer was lost ({reason})",
        remedy="ask again what the state is, once etcd answers",
    )


def _refusal(endpoint: str, response: httpx.Response, *, repeatable: bool) -> SempervirtError:
    """The error that an unsuccessful answer of etcd means."""
    try:
        document = response.json()
        code, text = int(document["code"]), str(document["message"])
    except (ValueError, KeyError, TypeError):
        code, text = 0, f"status {response.status_code}"
    if code == _NOT_FOUND and "lease" in text:
        return LeaseEnded(f"the lease has ended ({text})", remedy="grant another one")
    if code == _DENIED:
        return NotAllowed(
            f"etcd does not let this host do that: {text}",
            remedy="ask on the host that has the authority, where semper host init was run",
        )
    if code == _EXHAUSTED:
        return Unavailable(
            f"etcd at {endpoint} takes no changes: {text}",
            remedy="make room: etcdctl compact, etcdctl defrag, etcdctl alarm disarm",
        )
    if repeatable or code in _NOT_DONE:
        return Unavailable(f"etcd at {endpoint}: {text}", remedy="look at etcd's log")
    return _unknown(endpoint, text)


async def _documents(response: httpx.Response) -> AsyncIterator[Any]:
    async for line in response.aiter_lines():
        if line.strip():
            yield json.loads(line)
