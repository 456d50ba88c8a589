"""HTTP with an agent, on its unix socket or over mutual TLS: answers, and the agent's errors.

An error goes over the wire as {"error": {"kind", "message", "remedy"}}, and comes out as what the
agent raised (the table is `core.errors.KINDS`).
"""

from __future__ import annotations

import ssl
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
from pydantic import BaseModel

from sempervirt.core.errors import (
    AgentUnavailable,
    NotAllowed,
    OutcomeUnknown,
    SempervirtError,
    from_wire,
)

READ_TIMEOUT_S = 20.0
# What OpenSSL calls a certificate that is not valid yet, or not any more (x509_vfy.h).
OF_CLOCKS = frozenset({9, 10})


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
    OutcomeUnknown when the agent stopped answering midway.
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
        """The answer, decoded from JSON; None when it is empty."""
        with self._failures(f"{method} {path}"):
            response = await self._http.request(
                method, path, json=body, params=query, timeout=timeout_s
            )
        if response.is_error:
            raise _failure(response)
        return response.json() if response.content else None

    async def pieces(
        self, path: str, *, query: dict[str, Any], timeout_s: float
    ) -> AsyncIterator[bytes]:
        """The answer to a GET as bytes, in pieces as they come."""
        with self._failures(f"GET {path}"):
            async with self._http.stream("GET", path, params=query, timeout=timeout_s) as response:
                if response.is_error:
                    await response.aread()
                    raise _failure(response)
                async for piece in response.aiter_bytes():
                    yield piece

    @contextmanager
    def _failures(self, asked: str) -> Iterator[None]:
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise _unreachable(self._place, self._remedy, error) from error
        except (httpx.HTTPError, ssl.SSLError) as error:  # httpx lets late alerts of TLS pass
            raise OutcomeUnknown(
                f"the agent did not answer {asked}: {error!r}",
                remedy="ask again what the state is",
            ) from error


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
    return AgentUnavailable(f"no agent answers at {place}", remedy=remedy)


def _failure(response: httpx.Response) -> SempervirtError:
    """The error that a response carries."""
    try:
        body = ErrorView.model_validate_json(response.content).error
    except ValueError:
        return OutcomeUnknown(
            f"the agent answered {response.status_code} without saying why",
            remedy="look at the agent's log",
        )
    return from_wire(body.kind, body.message, body.remedy)
