"""One who asks, and the files that such a one may name.

Over the unix socket every file and program, for root and the agent's own user. Over TLS, and for
the socket's group, no program at all, and files below the roots of this host alone (`vm.config`),
whatever the role: a certificate that was stolen is not root.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sempervirt.core.errors import NotAllowed
from sempervirt.core.roles import Role
from sempervirt.host.beneath import require_beneath, require_new
from sempervirt.host.storage_call import call_storage
from sempervirt.qemu.spec import VmSpec
from sempervirt.trust.identity import Peer
from sempervirt.vm.config import AgentConfig

IMAGE_REMEDY = "put it below one, or name its directory to semperd there: --image-root DIR"
SAVED_REMEDY = "put it below one, or name its directory to semperd there: --saved-root DIR"


@dataclass(frozen=True)
class Caller:
    """Who asks. `peer` is what a certificate has shown; None: over the unix socket. `bounded`: as a
    member of the socket's group, who may name what one over TLS may name.
    """

    name: str
    role: Role
    peer: Peer | None = None
    bounded: bool = False

    @property
    def local(self) -> bool:
        """Whether it is root, or the agent's own user, who may name every file and program."""
        return self.peer is None and not self.bounded

    def require_installed(self, program: Path | None) -> None:
        """Raises NotAllowed for a program that is named from elsewhere."""
        if program is not None and not self.local:
            raise NotAllowed(
                f"nobody names a program from elsewhere, as {program}",
                remedy="ask on the host itself; or leave it out, for the installed one",
            )

    async def require_images(self, config: AgentConfig, paths: Iterable[Path]) -> None:
        """Raises NotAllowed for an image, a kernel or a firmware outside of the roots."""
        await self._require(config.image_roots, paths, IMAGE_REMEDY)

    async def require_spec(self, config: AgentConfig, spec: VmSpec) -> None:
        """As `require_images`, for all that a VM names."""
        await self.require_images(config, spec.files)

    async def require_saved(self, config: AgentConfig, path: Path) -> None:
        """Raises NotAllowed for a saved state outside of the roots."""
        await self._require(config.saved_roots, [path], SAVED_REMEDY)

    async def require_new_saved(self, config: AgentConfig, path: Path) -> None:
        """As `require_saved`, for one that is to be made: nothing is replaced."""
        if not self.local:
            check = partial(require_new, path, config.saved_roots, SAVED_REMEDY)
            await call_storage(path, check)

    async def require_new_image(self, config: AgentConfig, path: Path) -> None:
        """As `require_images`, for one that is to be made: nothing is replaced."""
        if not self.local:
            check = partial(require_new, path, config.image_roots, IMAGE_REMEDY)
            await call_storage(path, check)

    async def _require(self, roots: Iterable[Path], paths: Iterable[Path], remedy: str) -> None:
        if self.local:
            return
        for path in paths:
            await call_storage(path, partial(require_beneath, path, roots, remedy))
