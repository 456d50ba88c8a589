"""Where the agent of a host keeps its files, and where others find its socket."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

STATE_VARIABLE = "SEMPERVIRT_STATE_DIR"
RUN_VARIABLE = "SEMPERVIRT_RUN_DIR"
SYSTEM_RUN_DIR = Path("/run/sempervirt")


@dataclass(frozen=True)
class Places:
    """`state_dir` outlives the host's boot; `run_dir` holds sockets and logs of this boot."""

    state_dir: Path
    run_dir: Path

    @property
    def socket(self) -> Path:
        """Where the agent serves its API."""
        return self.run_dir / "agent.sock"

    @property
    def cluster_file(self) -> Path:
        """The settings of the cluster that this host belongs to."""
        return self.state_dir / "cluster.json"

    @property
    def trust_dir(self) -> Path:
        """Keys and certificates of this host."""
        return self.state_dir / "trust"

    @property
    def wire_trust_dir(self) -> Path:
        """A copy of this host's pair and its authority, for the programs of a move."""
        return self.run_dir / "trust"

    def vm_run_dir(self, name: str) -> Path:
        """Sockets and logs of one VM."""
        return self.run_dir / "vm" / name

    def vm_state_dir(self, name: str) -> Path:
        """Records of one VM."""
        return self.state_dir / "vms" / name

    def vm_records(self) -> list[Path]:
        """The records of all VMs here, also of standbys and of VMs that were one."""
        patterns = ("vms/*/vm.json", "standby/*/*/vms/*/vm.json")
        return sorted(path for pattern in patterns for path in self.state_dir.glob(pattern))


def default_state_dir(environment: Mapping[str, str] = os.environ) -> Path:
    """$SEMPERVIRT_STATE_DIR, /var/lib/sempervirt for root, $XDG_STATE_HOME/sempervirt."""
    if chosen := environment.get(STATE_VARIABLE):
        return Path(chosen).absolute()
    if os.geteuid() == 0:
        return Path("/var/lib/sempervirt")
    base = environment.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "sempervirt"


def default_run_dir(environment: Mapping[str, str] = os.environ) -> Path:
    """$SEMPERVIRT_RUN_DIR, /run/sempervirt for root, $XDG_RUNTIME_DIR/sempervirt."""
    if chosen := environment.get(RUN_VARIABLE):
        return Path(chosen).absolute()
    if os.geteuid() == 0:
        return SYSTEM_RUN_DIR
    base = environment.get("XDG_RUNTIME_DIR") or f"/tmp/sempervirt-{os.geteuid()}"
    return Path(base) / "sempervirt"
