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
- A *watch* that has been silent for a while wants a proof that it is fed: a partition makes no
  noise. A linearizable read of one key that the same member answers is one, for all watches of this
  client; what is watched is compared seldom, for that costs more. An agent without work costs etcd
  little else.
"""

from __future__ import annotations

import asyncio
import base64
import json
import math
import ssl
import time
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from typing import Any

import httpx

from sempervirt.core import tallies
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
    is_within,
    outdated,
)

ROOT = "sempervirt/1/"
TIMEOUT_S = 5.0
SILENCE_S = 5.0
# What stands between may keep a watch deaf that the member feeds.
COMPARE_S = 60.0
# Which key is read for a proof is all the same; there is none of that name.
_PROOF = "proof"
# Before a watch begins again: one that is refused at once shall not spin.
AGAIN_S = 0.1

# etcd takes 128 operations at once.
RANGES_MAX = 100
_END = object()

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
        self._proved_by, self._proved_at = "", 0.0
        self.is_secure = tls is not None
        self._timeout_s = timeout_s
        self._http = self._client(tls)
        self._retiring: set[asyncio.Task[None]] = set()

    async def read(self, *parts: str) -> Snapshot:
        """See `Store`."""
        first, rest = parts[:RANGES_MAX], parts[RANGES_MAX:]
        answer = await self._ask("kv/txn", self._reads(first), repeatable=True)
        state = self._read(answer, first)
        return state if not rest else await self.also_read(state, rest)

    async def commit(self, writes: Sequence[Write], *, expect: Mapping[str, int]) -> int:
        """See `Store`."""
        answer = await self._transact([self._write(write) for write in writes], writes, expect)
        return int(answer["header"]["revision"])

    async def commit_and_read(
        self, writes: Sequence[Write], parts: Sequence[str], *, expect: Mapping[str, int]
    ) -> Snapshot:
        """Commits, and gives the entries of those parts as they are at that instant."""
        wanted = [*(self._write(write) for write in writes), *self._reads(parts)["success"]]
        answer = await self._transact(wanted, writes, expect)
        try:
            return self._read(answer, tuple(parts))
        except (KeyError, TypeError, ValueError) as error:
            raise _unknown(self._endpoints[0], f"it is not understood: {error!r}") from error

    async def also_read(self, state: Snapshot, parts: Sequence[str]) -> Snapshot:
        """A state with other parts as they were at the same revision, all if none is named. Raises
        Unavailable, also when etcd has forgotten that.
        """
        entries = dict(state.entries)
        for first in range(0, max(1, len(parts)), RANGES_MAX):
            asked = self._reads(parts[first : first + RANGES_MAX], state.revision)
            entries |= self._read(await self._ask("kv/txn", asked, repeatable=True)).entries
        known = (*state.parts, *parts) if state.parts and parts else ()
        return Snapshot(state.revision, entries, known)

    async def _transact(
        self,
        wanted: Sequence[Mapping[str, Any]],
        writes: Sequence[Write],
        expect: Mapping[str, int],
    ) -> Any:
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
        answer = await self._ask(
            "kv/txn", {"compare": compare, "success": wanted}, repeatable=False
        )
        if not answer.get("succeeded"):
            raise outdated(list(expect))
        return answer

    async def watch(self, *parts: str, also: Sequence[str] = ()) -> AsyncGenerator[Snapshot]:
        """See `Store`. Changes of the parts `also` are told by the same state once more: what they
        are like is not asked for.
        """
        state = await self.read(*parts)
        yield state
        while True:
            endpoint, compared_at = self._endpoints[0], time.monotonic()
            watched = (*parts, *also) if parts else ()
            following = self._changes(endpoint, watched, state.revision + 1)
            async with aclosing(following) as changes:
                async for events in changes:
                    if events:
                        state = self._after(state, events)
                        yield state
                    elif not await self._feeds(endpoint):
                        break
                    elif time.monotonic() - compared_at > COMPARE_S:
                        if (await self.read(*parts)).entries != state.entries:
                            break
                        compared_at = time.monotonic()
            # Refused, or broken, or deaf, or its history is gone.
            present = await self.read(*parts)
            await asyncio.sleep(AGAIN_S)
            if also or present.entries != state.entries:
                yield present
            state = present

    async def _feeds(self, endpoint: str) -> bool:
        """Whether a member answers, and not from memory: what it has heard of it tells to those
        who watch there. Raises Unavailable when no member does.
        """
        if self._proved_by != endpoint or time.monotonic() - self._proved_at > self._silence_s:
            await self.read(_PROOF)
        return self._endpoints[0] == endpoint

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
        own = {**self.range_of(""), "count_only": True}
        counts = [
            int((await self._ask("kv/range", asked, repeatable=True)).get("count", 0))
            for asked in (everything, own)
        ]
        return counts[0] - counts[1]

    def range_of(self, part: str) -> dict[str, str]:
        """The keys of a part, as etcd names them; of "", all below the root."""
        first, key = self.root + part, {"key": self._key(part)}
        if not first.endswith("/"):
            return key
        return {**key, "range_end": _encoded(first[:-1] + chr(ord("/") + 1))}

    @property
    def _headers(self) -> dict[str, str]:
        return {"Authorization": self._token} if self._token else {}

    # What is sent, and what comes back

    def _key(self, key: str) -> str:
        return _encoded(self.root + key)

    def _reads(self, parts: Sequence[str], revision: int = 0) -> dict[str, list[Any]]:
        """A transaction that reads, as the store was at a revision; 0: now."""
        at = {"revision": str(revision)}
        ranges = ({**self.range_of(part), **at} for part in parts or ("",))
        return {"success": [{"request_range": one} for one in ranges]}

    def _read(self, answer: Mapping[str, Any], parts: tuple[str, ...] = ()) -> Snapshot:
        """What a transaction has read. Raises KeyError, TypeError, ValueError."""
        entries: dict[str, Entry] = {}
        for response in answer.get("responses", []):
            entries |= self._entries(response.get("response_range", {}))
        return Snapshot(int(answer["header"]["revision"]), entries, parts)

    def _entries(self, answer: Mapping[str, Any]) -> dict[str, Entry]:
        return dict(self._entry(pair) for pair in answer.get("kvs", []))

    def _entry(self, pair: Mapping[str, str]) -> tuple[str, Entry]:
        return self._name(pair), Entry(_text(pair.get("value", "")), int(pair["mod_revision"]))

    def _name(self, pair: Mapping[str, str]) -> str:
        return _text(pair["key"]).removeprefix(self.root)

    def _write(self, write: Write) -> dict[str, Any]:
        key = self._key(write.key)
        if not isinstance(write, Put):
            return {"request_delete_range": {"key": key}}
        put = {"key": key, "value": _encoded(write.value)}
        if write.lease is not None:
            put["lease"] = str(write.lease.id)
        return {"request_put": put}

    def _after(self, state: Snapshot, events: Iterable[Mapping[str, Any]]) -> Snapshot:
        entries, revision = dict(state.entries), state.revision
        for event in events:
            revision = max(revision, int(event["kv"]["mod_revision"]))
            if not is_within(self._name(event["kv"]), state.parts):
                continue
            if event.get("type") == "DELETE":
                entries.pop(self._name(event["kv"]), None)
            else:
                key, entry = self._entry(event["kv"])
                entries[key] = entry
        return Snapshot(revision, entries, state.parts)

    async def _changes(
        self, endpoint: str, parts: Sequence[str], first_revision: int
    ) -> AsyncGenerator[list[Mapping[str, Any]]]:
        """Events, none after each silence. Ends when the watch has to begin again. All parts go by
        one stream, for each of which etcd watches by itself.
        """
        ranges = [self.range_of(part) for part in parts or ("",)]
        create = [{**one, "start_revision": str(first_revision)} for one in ranges]
        requests = "\n".join(json.dumps({"create_request": one}) for one in create)
        stream = self._http.stream(
            "POST",
            f"{endpoint}/v3/watch",
            content=requests,
            headers={"Content-Type": "application/json", **self._headers},
            timeout=httpx.Timeout(self._timeout_s, read=None),
        )
        async with AsyncExitStack() as stack:
            try:
                async with asyncio.timeout(self._timeout_s):
                    response = await stack.enter_async_context(stream)
                async with aclosing(_heard(_documents(response), self._silence_s)) as answers:
                    async for answer in answers:
                        if answer is None:
                            yield []
                            continue
                        result = answer.get("result", {})
                        if "error" in answer or result.get("canceled"):
                            return
                        if result.get("events"):
                            yield result["events"]
            except (TimeoutError, *BROKEN):
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
                    tallies.STORE_FAILURES.add("unknown")
                    raise _unknown(endpoint, repr(error)) from error
                failure = error
            else:
                if response.is_success:
                    if call.startswith("kv/"):
                        self._proved_by, self._proved_at = endpoint, time.monotonic()
                    return _document(response, repeatable=repeatable)
                refusal = _refusal(endpoint, response, repeatable=repeatable)
                if not (repeatable and type(refusal) is Unavailable):
                    raise refusal
                failure = refusal
            tallies.STORE_FAILURES.add("answer")
            # The next call begins with another member.
            self._endpoints.append(self._endpoints.pop(0))
        raise Unavailable(
            f"etcd does not answer at {', '.join(sorted(self._endpoints))}: {failure}",
            remedy="look after etcd and the network to it (etcdctl endpoint health); "
            "VMs run on meanwhile, and none can be started or moved",
        ) from failure

    async def _post(self, endpoint: str, call: str, body: Mapping[str, Any]) -> httpx.Response:
        url = f"{endpoint}/v3/{call}"
        with tallies.STORE_REQUESTS.timed():
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


def _text(encoded: str) -> str:
    """Any host can write bytes that are no text: they are shown, and no reader fails by them."""
    return base64.b64decode(encoded).decode(errors="backslashreplace")


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


async def _documents(response: httpx.Response) -> AsyncGenerator[Any]:
    async for line in response.aiter_lines():
        if line.strip():
            yield json.loads(line)


async def _heard(answers: AsyncGenerator[Any], silence_s: float) -> AsyncGenerator[Any]:
    """The answers, and None whenever none has come for so long; what is waited for goes on."""
    coming: asyncio.Future[Any] | None = None
    try:
        while True:
            coming = coming or asyncio.ensure_future(anext(answers, _END))
            if not (await asyncio.wait([coming], timeout=silence_s))[0]:
                yield None
                continue
            answer, coming = coming.result(), None
            if answer is _END:
                return
            yield answer
    finally:
        if coming is not None:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)
        await answers.aclose()
