"""What every command needs: where the agent is, and how an error leaves the program."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from sempervirt.api.client import Client
from sempervirt.vm.config import AgentConfig

Result = TypeVar("Result")


def ask_agent(question: Callable[[Client], Awaitable[Result]]) -> Result:
    """Runs `question` with a client of this user's agent."""

    async def _ask() -> Result:
        async with Client.connect(AgentConfig.default().socket) as client:
            return await question(client)

    return asyncio.run(_ask())
