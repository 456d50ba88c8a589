"""Requests that nobody should send, in short what `make fuzz-api` does with a hundred thousand."""

from __future__ import annotations

import json

import pytest

from tests import fuzz_api
from tests.fuzz_api import DEADLINE_S, LARGEST, Answered, Asked, campaign, wrong

REQUESTS = 400


async def test_no_request_takes_long_answers_much_or_meets_what_was_not_thought_of() -> None:
    report = await campaign(seed=1, requests=REQUESTS)
    assert report.findings == []
    assert report.requests == REQUESTS
    assert report.doors.keys() == {*fuzz_api.DOORS}
    # What was asked got somewhere: done; refused for what it is, for whom, for what is not there.
    assert {200, 400, 403, 404, 422} <= report.statuses.keys()


async def test_what_is_late_or_grows_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: with limits that nothing can keep."""
    monkeypatch.setattr(fuzz_api, "LATE_S", -DEADLINE_S)
    monkeypatch.setattr(fuzz_api, "GROWTH", -1 << 40)
    report = await campaign(seed=1, requests=10)
    assert len([said for said in report.findings if "takes" in said]) == report.late > 0
    assert "the agent has" in report.findings[-1]


def test_an_answer_that_must_not_be_is_told_from_one_that_may() -> None:
    asked = Asked("root", b"", what="GET /v1/vms")

    def answered(status: int, body: object) -> Answered:
        content = json.dumps(body).encode()
        return Answered(status, len(content), 0.0, content)

    error = {"error": {"kind": "not-found", "message": "none", "remedy": ""}}
    for fine in (answered(200, []), answered(404, error), answered(400, {"detail": "?"})):
        assert wrong(asked, fine) == ""
    assert "status 500" in wrong(asked, answered(500, error))
    assert "no kind" in wrong(asked, answered(409, {"detail": "?"}))
    assert "no kind" in wrong(asked, answered(409, {"error": {"kind": "new"}}))
    assert "bytes" in wrong(asked, Answered(200, LARGEST + 1, 0.0))
