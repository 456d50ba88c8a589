"""The agent of one host: which VMs there are, what can be asked of them, and adoption.

async with Agent.open(AgentConfig.default()) as agent:
    vm = await agent.run_vm(load_spec(Path("web.toml")))
    await vm.stop()
"""

from sempervirt.agent.agent import Agent
from sempervirt.vm.config import AgentConfig
from sempervirt.vm.vm import Vm

__all__ = ["Agent", "AgentConfig", "Vm"]
