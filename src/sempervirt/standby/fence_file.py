"""What this host knows of fences: a file of its operator, and nothing that comes over the network.

    /etc/sempervirt/fence.toml

    [host.a]                    how host a is switched off, and how its state is read
    off = ["fence_ipmilan", "--ip=10.0.9.1", "--username=ha", "…", "-o", "off"]
    status = ["fence_ipmilan", "--ip=10.0.9.1", "…", "-o", "status"]
    timeout_s = 60

    [revoking]                                  file systems that are as good as NFS version 4
    "fuse.example" = "its server ends the lease of a client that is silent, and refuses it"

The commands are run without a shell, as fence agents are (`standby.fence_command`). Whoever can
write the file has them run, so a file that others than its owner can write is refused.
"""

from __future__ import annotations

import os
import stat
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sempervirt.core.errors import InvalidRequest
from sempervirt.standby.fence_command import COMMAND_S, FenceCommand
from sempervirt.standby.means import REVOKING

FILE_BYTES_MAX = 256 << 10


class _Host(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    off: tuple[str, ...] = Field(min_length=1)
    status: tuple[str, ...] = Field(min_length=1)
    timeout_s: float = Field(default=COMMAND_S, gt=0, le=600)


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    host: dict[str, _Host] = {}
    revoking: dict[str, str] = {}


@dataclass(frozen=True)
class Fences:
    """By host, how it is switched off; by type of file system, why its server revokes locks."""

    commands: Mapping[str, FenceCommand] = field(default_factory=dict)
    revoking: Mapping[str, str] = field(default_factory=lambda: REVOKING)


def read_fences(path: Path) -> Fences:
    """What the file says; without one no host can be switched off. Raises InvalidRequest."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            content = file.read(FILE_BYTES_MAX + 1)
    except FileNotFoundError:
        return Fences()
    except OSError as error:
        raise _bad(path, f"cannot be read: {error.strerror}") from error
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) or status.st_uid not in (0, os.geteuid()):
        raise _bad(path, "can be written by others, who would have commands run")
    if len(content) > FILE_BYTES_MAX:
        raise _bad(path, f"has more than {FILE_BYTES_MAX} bytes")
    try:
        found = _File.model_validate(tomllib.loads(content.decode()))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise _bad(path, f"{place}: {first['msg']}") from error
    except (ValueError, RecursionError) as error:
        raise _bad(path, str(error)) from error
    commands = {
        name: FenceCommand(one.off, one.status, one.timeout_s) for name, one in found.host.items()
    }
    return Fences(commands, {**REVOKING, **found.revoking})


def _bad(path: Path, why: str) -> InvalidRequest:
    return InvalidRequest(f"{path} {why}"[:300], remedy="docs/design/fencing.md has an example")
