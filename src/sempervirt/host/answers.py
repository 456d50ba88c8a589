"""Typed answers of our own programs: what each says stands in a model beside the one who reads it.

The programs promise (crates/control/golden has an example of each answer) that keys are only added.
So a key that a model does not know is ignored; one that is missing, or that is of another type,
means that program and agent do not belong together, and the error names both versions.
"""

from __future__ import annotations

import json
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

import sempervirt
from sempervirt.core.errors import OutcomeUnknown


class Answer(BaseModel):
    """What a program answers, or a part of it. Types are exact: "7" is no number."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


class AnswerNotUnderstood(OutcomeUnknown):
    """A program and the agent do not belong together; the message names both versions."""


AnswerT = TypeVar("AnswerT", bound=Answer)


def read_answer(model: type[AnswerT], answer: Any, program: str, command: str) -> AnswerT:
    """`answer`, which was decoded from JSON, as `model`. Raises AnswerNotUnderstood.

    The program's version is the answer's own key `version`, if it has one.
    """
    try:
        return model.model_validate_json(json.dumps(answer))
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in fault["loc"])
        missing = fault["type"] == "missing"
        wrong = f"with a wrong `{key}`" if key else "with what is no object"
        how = f"without `{key}`" if missing else f"{wrong} ({fault['msg']})"
        version = answer.get("version") if isinstance(answer, dict) else None
        who = f"{program} {version}" if isinstance(version, str) else f"this {program}"
        raise AnswerNotUnderstood(
            f"{who} answers {command} {how}; this agent is {sempervirt.__version__}",
            remedy=f"use the {program} that came with this agent",
        ) from error
