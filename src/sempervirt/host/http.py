"""HTTP with an agent, on its unix socket or over mutual TLS: answers, and the agent's errors.

An error goes over the wire as {"error": {"kind", "message", "remedy"}}, and comes out as what the
agent raised (the table is `core.errors.KINDS`).
"""

from __future__ import annotations

import asyncio
import grp
import json
import os
import pwd
import ssl
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx
from pydantic import BaseModel, TypeAdapter

from sempervirt.core.errors import (
    AgentUnavailable,
    NotAllowed,
    OutcomeUnknown,
    SempervirtError,
    from_wire,
)
from sempervirt.host.sockets import GROUP

T = TypeVar("T")
READ_TIMEOUT_S = 20.0
# The longest answer, the events of a busy host, has some megabytes.
ANSWER_BYTES_MAX = 64 << 20
# What OpenSSL calls a certificate that is not valid yet, or not any more (x509_vfy.h).
OF_CLOCKS = frozenset({9, 10})


class Unanswered(OutcomeUnknown):
    """The agent was asked, and did not answer."""


class ErrorBody(BaseModel):
    """An error, named by its remedy; `kind` is from the table in sempervirt.core.errors."""

    kind: str
    message: str
    remedy: str = ""


class ErrorView(BaseModel):
    """The body of every response that is not a success."""

    error: ErrorBody


class Connection:
    """Made by `to_socket` or `to_host`. Each call raises what the agent raised; AgentUnavailable
    when no agent answers; NotAllowed when the one that answers is not the one that was asked for;
    OutcomeUnknown when the agent stopped answering midway, or answered what is no answer.
    """

    def __init__(self, http: httpx.AsyncClient, place: str, remedy: str) -> None:
        self._http = http
        self._place = place
        self._remedy = remedy

    @classmethod
    @asynccontextmanager
    async def to_socket(cls, socket: Path, remedy: str) -> AsyncIterator[Connection]:
        """With the agent at `socket`; whether an agent is there shows in the first call."""
        transport = httpx.AsyncHTTPTransport(uds=str(socket))
        async with httpx.AsyncClient(transport=transport, base_url="http://agent/v1") as http:
            yield cls(http, str(socket), remedy)

    @classmethod
    @asynccontextmanager
    async def to_host(
        cls, address: str, host: str, tls: ssl.SSLContext
    ) -> AsyncIterator[Connection]:
        """With the agent at "HOST:PORT", which has to prove that it is the agent of `host`."""

        async def expect(request: httpx.Request) -> None:
            request.extensions["sni_hostname"] = host

        async with httpx.AsyncClient(
            verify=tls,
            base_url=f"https://{address}/v1",
            trust_env=False,
            event_hooks={"request": [expect]},
        ) as http:
            yield cls(http, address, f"is semperd running on {host}, and is {address} right?")

    async def call(
        self,
        method: str,
        path: str,
        *,
        body: Any = None,
        query: dict[str, Any] | None = None,
        timeout_s: float = READ_TIMEOUT_S,
    ) -> Any:
        """The answer, decoded from JSON; None when it is empty. Whoever answers, honest or not: the
        answer is there in twice `timeout_s`, and has at most ANSWER_BYTES_MAX.
        """
        asked = f"{method} {path}"
        with self._failures(asked):
            # httpx bounds the time of each read; a peer that sends byte after byte has no end.
            async with (
                asyncio.timeout(2 * timeout_s),
                self._http.stream(
                    method, path, json=body, params=query, timeout=timeout_s
                ) as response,
            ):
                content = await _bounded(response, asked)
        if response.is_error:
            raise _failure(response.status_code, content)
        try:
            return json.loads(content) if content else None
        except (ValueError, RecursionError) as error:
            raise not_understood(asked, error) from error

    async def pieces(
        self, path: str, *, query: dict[str, Any], timeout_s: float
    ) -> AsyncIterator[bytes]:
        """The answer to a GET as bytes, in pieces as they come."""
        with self._failures(f"GET {path}"):
            async with self._http.stream("GET", path, params=query, timeout=timeout_s) as response:
                if response.is_error:
                    content = await _bounded(response, f"GET {path}")
                    raise _failure(response.status_code, content)
                async for piece in response.aiter_bytes():
                    yield piece

    async def text(self, path: str) -> str:
        """The answer to a GET of what does not stand below the version of the API."""
        url = self._http.base_url.copy_with(path=path)
        pieces = self.pieces(str(url), query={}, timeout_s=READ_TIMEOUT_S)
        return b"".join([piece async for piece in pieces]).decode()

    @contextmanager
    def _failures(self, asked: str) -> Iterator[None]:
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise _unreachable(self._place, self._remedy, error) from error
        # httpx lets late alerts of TLS pass.
        except (httpx.HTTPError, ssl.SSLError, TimeoutError) as error:
            raise Unanswered(
                f"the agent did not answer {asked}: {error!r}",
                remedy="ask again what the state is",
            ) from error


async def _bounded(response: httpx.Response, asked: str) -> bytes:
    content = bytearray()
    async for piece in response.aiter_bytes():
        content += piece
        if len(content) > ANSWER_BYTES_MAX:
            raise not_understood(asked, f"longer than {ANSWER_BYTES_MAX >> 20} MiB")
    return bytes(content)


def not_understood(asked: str, why: object) -> OutcomeUnknown:
    """The error of an answer that is none: an agent of another release, or no agent."""
    return OutcomeUnknown(
        f"the answer to {asked} cannot be understood: {str(why)[:200]}",
        remedy="is the same release of sempervirt on both hosts?",
    )


def understood(kind: TypeAdapter[T], answer: Any, asked: str) -> T:
    """An answer of another host's agent as the value that it should be. Raises OutcomeUnknown: that
    agent may have another release, or be hostile.
    """
    try:
        return kind.validate_python(answer)
    except (ValueError, OverflowError, RecursionError) as error:
        raise not_understood(asked, error) from error


def _unreachable(place: str, remedy: str, error: Exception) -> SempervirtError:
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ssl.SSLCertVerificationError):
        cause = cause.__cause__ or cause.__context__
    if cause is not None and cause.verify_code in OF_CLOCKS:
        return NotAllowed(
            f"who answers at {place} shows a certificate that is out of its time by the clock of "
            f"this host, which says {time.strftime('%Y-%m-%d %H:%M:%S UTC', time.gmtime())}: "
            f"{cause.verify_message}",
            remedy="compare the clocks of both hosts (timedatectl); if both are right, see which "
            "certificate was not renewed: semper host list",
        )
    if cause is not None:
        return NotAllowed(
            f"who answers at {place} is not to be trusted: {cause.verify_message}",
            remedy="check the address; was the certificate replaced, or has it expired?",
        )
    if _is_refused(error):
        return NotAllowed(
            f"permission denied: user {_user()} may not connect to {place}",
            remedy=f"ask as root (sudo); or have root do once: {_admission()}",
        )
    return AgentUnavailable(f"no agent answers at {place}", remedy=remedy)


def _is_refused(error: BaseException) -> bool:
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, PermissionError):
        cause = cause.__cause__ or cause.__context__
    return cause is not None


def _admission() -> str:
    """How root lets this user in."""
    admit = f"usermod -aG {GROUP} {_user()}; then log in again"
    try:
        grp.getgrnam(GROUP)
    except KeyError:
        return f"groupadd --system {GROUP}; systemctl restart semperd; {admit}"
    return admit


def _user() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return "USER"


def _failure(status: int, content: bytes) -> SempervirtError:
    """The error that a response carries."""
    try:
        body = ErrorView.model_validate_json(content).error
    except ValueError:
        return OutcomeUnknown(
            f"the agent answered {status} without saying why",
            remedy="look at the agent's log",
        )
    return from_wire(body.kind, body.message, body.remedy)
