"""Adds the Rust programs to the wheel; everything else is in pyproject.toml."""

import os
import platform

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools_rust import RustBin

# An editable installation leaves the programs to scripts/binaries, which cargo keeps up to date.
EDITABLE = os.environ.get("SEMPERVIRT_BINARIES") == "none"

# semper-probe runs as the first process of a guest that has no C library. Naming the target keeps
# the flag away from build scripts and procedural macros. The same words stand in scripts/binaries.
STATIC = {**os.environ, "RUSTFLAGS": "-C target-feature=+crt-static"}
TARGET = f"{platform.machine()}-unknown-linux-gnu"

PROGRAMS = [
    RustBin("semper-blkd", path="crates/blkd/Cargo.toml", args=["--locked"], debug=False),
    RustBin("semper-load", path="crates/load/Cargo.toml", args=["--locked"], debug=False),
    RustBin("semper-saved", path="crates/saved/Cargo.toml", args=["--locked"], debug=False),
    RustBin("semper-vfiod", path="crates/vfiod/Cargo.toml", args=["--locked"], debug=False),
    RustBin("semper-wired", path="crates/wired/Cargo.toml", args=["--locked"], debug=False),
    RustBin(
        "semper-probe",
        path="crates/probe/Cargo.toml",
        args=["--locked", "--target", TARGET],
        env=STATIC,
        debug=False,
    ),
]


class PlatformWheel(bdist_wheel):
    """A wheel for one architecture and any Python: it holds programs, no extension module."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform_tag = super().get_tag()
        return "py3", "none", platform_tag


setup(
    rust_extensions=[] if EDITABLE else PROGRAMS,
    cmdclass={"bdist_wheel": PlatformWheel},
    zip_safe=False,
)
