"""Pressure stall information (Documentation/accounting/psi.rst), and temperatures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from sempervirt.guard.signs import Sign, SignId
from sempervirt.guard.sources.source import AbsentError, read_number, read_text

PROC = Path("/proc")
SYS = Path("/sys")
EVERY_S = 10.0
ZONES_MAX = 256
TRIPS_MAX = 32

# Percent of the last minute in which nobody got on for want of it ("full"; for processors, for
# which the kernel has no "full" of the whole host, in which somebody did not, "some").
LIMITS = {
    "memory": (SignId.PRESSURE_MEMORY, "full", 40.0),
    "io": (SignId.PRESSURE_IO, "full", 80.0),
    "cpu": (SignId.PRESSURE_CPU, "some", 95.0),
}


class Pressure:
    """A resource of which too little is there for a minute. One sign at each look meanwhile."""

    interval_s = EVERY_S

    def __init__(self, resource: str, proc: Path = PROC) -> None:
        self.name = f"pressure on {resource}"
        self._resource = resource
        self._path = proc / "pressure" / resource

    def look(self, patience_s: float) -> Sequence[Sign]:
        """Raises AbsentError where the kernel does not measure that, OSError, ValueError."""
        del patience_s
        try:
            text = read_text(self._path)
        except OSError as error:
            raise AbsentError(f"this kernel measures no pressure: {error.strerror}") from error
        identifier, line, limit = LIMITS[self._resource]
        percent = stalled(text, line)
        if percent < limit:
            return ()
        evidence = (
            f"in {percent:.0f}% of the last minute work waited for {self._resource} "
            f"({line} avg60, limit {limit:.0f}%)"
        )
        return (Sign(identifier, evidence),)

    def close(self) -> None:
        """Nothing is open."""


def stalled(text: str, line: str) -> float:
    """The average over a minute, in percent, of a line of a pressure file. Raises ValueError."""
    found = re.search(rf"^{line} .*\bavg60=(\d{{1,3}}\.\d{{1,3}})\b", text, re.MULTILINE)
    if found is None:
        raise ValueError(f"no line {line!r} with avg60: {text[:80]!r}")
    return float(found[1])


class Thermal:
    """Zones that have reached a trip point of the type hot or critical."""

    name = "temperature"
    interval_s = EVERY_S

    def __init__(self, system: Path = SYS) -> None:
        self._folder = system / "class/thermal"
        self._above: frozenset[tuple[str, SignId]] = frozenset()

    def look(self, patience_s: float) -> Sequence[Sign]:
        """Raises AbsentError where nothing is measured."""
        del patience_s
        zones = sorted(self._folder.glob("thermal_zone*"))[:ZONES_MAX]
        if not zones:
            raise AbsentError("this kernel measures no temperature")
        signs, above = [], set()
        for zone in zones:
            # A zone whose sensor does not answer says so by an error of reading: others are read.
            with suppress(OSError, ValueError):
                temperature = read_number(zone / "temp")
                for identifier, trip in _trips(zone):
                    if temperature >= trip:
                        above.add((zone.name, identifier))
                        if (zone.name, identifier) not in self._above:
                            point = identifier.value.partition(".")[2]
                            evidence = (
                                f"{zone.name} has {temperature / 1000:.1f} °C, and its {point} "
                                f"point is {trip / 1000:.1f} °C"
                            )
                            signs.append(Sign(identifier, evidence))
        self._above = frozenset(above)
        return signs

    def close(self) -> None:
        """Nothing is open."""


def _trips(zone: Path) -> list[tuple[SignId, int]]:
    """In thousandths of a degree."""
    kinds = {"hot": SignId.THERMAL_HOT, "critical": SignId.THERMAL_CRITICAL}
    trips = []
    for number in range(TRIPS_MAX):
        path = zone / f"trip_point_{number}_type"
        if not path.exists():
            break
        kind = kinds.get(read_text(path).strip())
        if kind is not None:
            trips.append((kind, read_number(zone / f"trip_point_{number}_temp")))
    return trips
