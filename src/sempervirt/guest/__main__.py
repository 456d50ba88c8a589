"""`python -m sempervirt.guest build`: makes a guest image (`make guest`, `make debian-guest`)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sempervirt.core.errors import SempervirtError, kind_of
from sempervirt.guest.initramfs import BUSYBOX, Recipe, build


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m sempervirt.guest")
    commands = parser.add_subparsers(dest="command", required=True)
    builder = commands.add_parser("build", help="make vmlinuz, initrd.img and release")
    builder.add_argument("--kernel-tree", type=Path, required=True, metavar="DIR",
                         help="holds vmlinuz, release and modules/")  # fmt: skip
    builder.add_argument("--init", type=Path, required=True, metavar="PATH",
                         help="the first process: the probe, or a script")  # fmt: skip
    builder.add_argument("--module", action="append", default=[], metavar="NAME", dest="modules",
                         help="one more driver, if the kernel has it")  # fmt: skip
    builder.add_argument("--busybox", type=Path, default=BUSYBOX, metavar="PATH")
    builder.add_argument("--output", type=Path, required=True, metavar="DIR")
    options = parser.parse_args(arguments)
    try:
        recipe = Recipe(options.kernel_tree, options.init, options.busybox, tuple(options.modules))
        image, built = build(recipe, options.output)
    except SempervirtError as error:
        print(f"sempervirt.guest: error: {error}", file=sys.stderr)
        return kind_of(error).exit_code
    size_kib = image.initrd.stat().st_size // 1024
    state = "built" if built else "up to date"
    print(f"guest: {state}: {image.initrd} ({size_kib} KiB), kernel {image.release}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
