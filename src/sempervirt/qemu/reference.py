"""The reference of the VM file, from the model: `python -m sempervirt.qemu.reference` prints it.

A key's example is the first of `examples` in `spec.py`. What it can only stand beside is in
`BESIDE`, so that every example is a whole file that is accepted (`whole`; a test reads each).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo

from sempervirt.core.sizes import parse_size
from sempervirt.qemu.spec import (
    ChannelSpec,
    DiskSpec,
    HaSpec,
    NicSpec,
    PassthroughSpec,
    PciSpec,
    StandbySpec,
    TakeOverSpec,
    VmSpec,
)


@dataclass(frozen=True)
class Table:
    """A table of the file: how it is headed there, and what it is for."""

    model: type[BaseModel]
    heading: str
    title: str
    note: str = ""


TABLES = (
    Table(VmSpec, "", "The VM itself", "These keys come first, before any table."),
    Table(DiskSpec, "[[disks]]", "Disks", "One table for each; the guest starts from the first."),
    Table(NicSpec, "[[nics]]", "Network cards"),
    Table(ChannelSpec, "[[channels]]", "Channels", "Ports of virtio-serial."),
    Table(HaSpec, "[ha]", "When the host has to be emptied"),
    Table(StandbySpec, "[standby]", "Standbys"),
    Table(
        TakeOverSpec,
        "[standby.take_over]",
        "When a standby takes over",
        'Seconds from what is seen until the take-over, at most a day, or "never".',
    ),
    Table(PassthroughSpec, "[[passthrough]]", "Devices of ours", "An NVMe controller on an image."),
    Table(
        PciSpec,
        "[[passthrough]]",
        "Devices of the host",
        "With `pci` the table is one of the host's PCI devices, bound to vfio-pci.",
    ),
)

# The other keys that an example needs, by heading and key: "" is the VM's own table.
BESIDE: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("", "initrd"): {"kernel": "vmlinuz"},
    ("", "cmdline"): {"kernel": "vmlinuz"},
    ("", "firmware_vars"): {"firmware": "/usr/share/OVMF/OVMF_CODE_4M.fd"},
    ("[[disks]]", "bus"): {"backend": "qemu"},
    ("[[nics]]", "type"): {"tap": "tap0"},
    ("[[nics]]", "tap"): {"type": "tap"},
    ("[[nics]]", "queues"): {"type": "tap", "tap": "tap0"},
    ("[[nics]]", "vhost"): {"type": "tap", "tap": "tap0"},
    ("[standby]", "initialised"): {"marker": "login:"},
    ("[standby]", "marker"): {"initialised": "console"},
    ("[standby]", "channel"): {"initialised": "channel", "marker": "ready"},
}
# What an example needs in other tables.
ELSEWHERE: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("[standby]", "channel"): {"channels": [{"name": "org.example.port"}]},
    ("[standby.take_over]", "service_silent"): {"standby": {"service": "192.0.2.10:443"}},
}


def keys(table: Table) -> Iterator[tuple[str, FieldInfo]]:
    """The keys of a table that are not tables themselves, each with its field."""
    for name, field in table.model.model_fields.items():
        if field.examples:
            yield name, field


def example(table: Table, key: str) -> dict[str, Any]:
    """The key with its example, and what has to stand beside it in its table."""
    (value, *_) = table.model.model_fields[key].examples or (None,)
    return {key: value, **BESIDE.get((table.heading, key), {})}


def whole(table: Table, key: str) -> str:
    """A whole VM file that has nothing but the example and what that needs."""
    required = {
        name: (field.examples or [None])[0]
        for name, field in table.model.model_fields.items()
        if field.is_required()
    }
    content: dict[str, Any] = {**required, **example(table, key)}
    further = ELSEWHERE.get((table.heading, key), {})
    if not table.heading:
        document: dict[str, Any] = content
    elif table.heading.startswith("[["):
        document = {"name": "web", table.heading.strip("[]"): [content]}
    else:
        outer, _, inner = table.heading.strip("[]").partition(".")
        beside = dict(further.get(outer, {}))
        document = {"name": "web", outer: {**beside, inner: content} if inner else content}
    document = {**{name: one for name, one in further.items() if name not in document}, **document}
    return "".join(f"{name} = {toml(one)}\n" for name, one in document.items())


def toml(value: Any) -> str:
    """A value as TOML has it, on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {toml(one)}" for name, one in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml(one) for one in value) + "]"
    return json.dumps(value)  # strings, numbers, true and false look the same in both


def values(model: type[BaseModel], key: str) -> str:
    """What a key may have."""
    field = model.model_fields[key]
    if any(isinstance(one, BeforeValidator) and one.func is parse_size for one in field.metadata):
        return "size"
    schema = model.model_json_schema()
    return ", ".join(_named(schema["properties"][key]))


def _named(schema: Mapping[str, Any]) -> Iterator[str]:
    if "anyOf" in schema:
        for one in schema["anyOf"]:
            if one.get("type") != "null":
                yield from _named(one)
    elif "const" in schema:
        yield f"`{toml(schema['const'])}`"
    elif "enum" in schema:
        yield from (f"`{toml(one)}`" for one in schema["enum"])
    else:
        yield _kind(schema)


def _kind(schema: Mapping[str, Any]) -> str:
    match schema.get("type"), schema.get("format"):
        case "boolean", _:
            return "`true`, `false`"
        case (("integer" | "number"), _) if "minimum" in schema:
            return f"{schema['minimum']} to {schema['maximum']}"
        case "array", _:
            return "list of numbers"
        case "string", ("path" | "uuid") as known:
            return "path" if known == "path" else "UUID"
        case "string", _:
            return "text"
        case other:
            raise ValueError(f"there is no word for {other}")


def _default(field: FieldInfo, known: str) -> str:
    if field.is_required():
        return "required"
    if field.default is None or field.default == "":
        return "–"
    if known == "size":
        return f"`{toml(f'{field.default >> 20}M')}`"
    return f"`{toml(field.default)}`"


def text() -> str:
    """The page."""
    return HEAD + "".join(_section(table) for table in TABLES)


def _section(table: Table) -> str:
    heading = f": `{table.heading}`" if table.heading else ""
    lines = ["", f"## {table.title}{heading}", ""]
    lines += [table.note, ""] if table.note else []
    lines += ["| key | values | default | what it is | example |", "|---|---|---|---|---|"]
    for name, field in keys(table):
        shown = "; ".join(f"`{one} = {toml(value)}`" for one, value in example(table, name).items())
        known = values(table.model, name)
        default = _default(field, known)
        lines.append(f"| `{name}` | {known} | {default} | {field.description} | {shown} |")
    return "\n".join(lines) + "\n"


HEAD = """\
# The VM file

*Written by `python -m sempervirt.qemu.reference`; a test reads every example.*

The file is TOML. A key that is not known is an error, which names the line and the nearest key that
is. Paths may be relative to the file. A *size* is a number of bytes, or a text with K, M, G, T or P
(`"2G"`). `semper vm run FILE` starts the VM; changes in it count from the next `run`.
A first guest, step by step: [first-guest.md](../first-guest.md).

```toml
name = "web"
memory = "2G"
vcpus = 2
autostart = true

[[disks]]
name = "root"
image = "web.raw"

[[nics]]
type = "tap"
tap = "tap0"

[[channels]]
name = "org.qemu.guest_agent.0"
```
"""


if __name__ == "__main__":
    sys.stdout.write(text())
