"""The agent of one host: configuration, wiring, adoption, the run loop.

async with Agent.open(AgentConfig.default()) as agent:
    vm = await agent.run_vm(load_spec(Path("web.toml")))
    await vm.stop()
"""

from sempervirt.agent.agent import Agent
from sempervirt.agent.config import AgentConfig
from sempervirt.agent.vm import Vm

__all__ = ["Agent", "AgentConfig", "Vm"]
