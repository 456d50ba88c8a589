"""How the server answers errors; `client` turns the answers into errors again."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from sempervirt.core.errors import InvalidRequest, SempervirtError, kind_of
from sempervirt.core.remedies import remedy_of
from sempervirt.host.http import ErrorBody, ErrorView

# Of a request that is wrong in many things, so many are told.
ERRORS_MAX = 20


def install(app: FastAPI) -> None:
    """Makes the app answer errors of our tree, and of validation, in our form."""

    @app.exception_handler(SempervirtError)
    async def _ours(_request: Request, error: SempervirtError) -> JSONResponse:
        return to_response(error)

    @app.exception_handler(RequestValidationError)
    async def _validation(_request: Request, error: RequestValidationError) -> JSONResponse:
        texts, found = [], error.errors()
        for detail in found[:ERRORS_MAX]:
            key = ".".join(str(part) for part in detail["loc"][1:])
            texts.append(f"{key}: {detail['msg'].removeprefix('Value error, ')}")
        if len(found) > ERRORS_MAX:
            texts.append(f"and {len(found) - ERRORS_MAX} more")
        return to_response(InvalidRequest("; ".join(texts)))


def to_response(error: SempervirtError) -> JSONResponse:
    """The response for an error."""
    kind = kind_of(error)
    message, remedy = _sendable(error.message), _sendable(remedy_of(error))
    body = ErrorView(error=ErrorBody(kind=kind.name, message=message, remedy=remedy))
    return JSONResponse(body.model_dump(), status_code=kind.http_status)


def _sendable(text: str) -> str:
    """As UTF-8 can have it: half of a pair (\\ud800), which JSON can name, comes back in words."""
    return text.encode("utf-8", "backslashreplace").decode()
