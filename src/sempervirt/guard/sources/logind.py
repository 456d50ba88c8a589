"""logind's word that the host is about to shut down, and the lock that holds the shutdown.

A *delay* lock (https://systemd.io/INHIBITOR_LOCKS): while we have its descriptor, logind waits with
a shutdown or reboot that was asked for, for at most InhibitDelayMaxSec of logind.conf (5 s unless
somebody has set it), and says so by the signal PrepareForShutdown. Not a *block* lock: that would
stop an operator, and root's `systemctl reboot` does not ask for it.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from jeepney import (
    DBusAddress,
    DBusErrorResponse,
    HeaderFields,
    MatchRule,
    Properties,
    message_bus,
    new_method_call,
)
from jeepney.io.blocking import DBusConnection, open_dbus_connection
from jeepney.wrappers import unwrap_msg

from sempervirt.core.errors import reason
from sempervirt.guard.signs import Sign, SignId
from sempervirt.guard.sources.source import AbsentError

NAME = "org.freedesktop.login1"
LOGIND = DBusAddress("/org/freedesktop/login1", NAME, "org.freedesktop.login1.Manager")
SIGNAL = "PrepareForShutdown"
SIGNALS = MatchRule(type="signal", interface=LOGIND.interface, member=SIGNAL)
SIGNALS_MAX = 64
CALL_S = 5.0


class _Signals(deque[Any]):
    """What was heard, and not looked at yet. Anybody on the bus can send signals without an end: a
    word of `believed`, who had logind's name when that was last asked, takes the place of what
    others have said, and nobody's word takes its place.
    """

    believed = ""

    def append(self, message: Any) -> None:
        """By the connection, for each signal."""
        if _sender(message) == self.believed:
            kept = [one for one in self if _sender(one) == self.believed]
            self.clear()
            self.extend([*kept, message][-SIGNALS_MAX:])
        elif len(self) < SIGNALS_MAX:
            super().append(message)


def _sender(message: Any) -> Any:
    return message.header.fields.get(HeaderFields.sender)


class Shutdowns:
    """The source of `host.shutdown`. `release` lets a shutdown that waits go on."""

    name = "logind"
    interval_s = 0.0

    def __init__(self, bus: str = "SYSTEM") -> None:
        """`bus` is SYSTEM, or an address of a bus."""
        self._bus = bus
        self._connection: DBusConnection | None = None
        # Signals that came while an answer was waited for are kept here too.
        self._signals = _Signals()
        # The descriptor is taken by the source's thread and given back by the agent's.
        self._guard = threading.Lock()
        self._lock: int | None = None
        self._going_down = False
        self.limit_s: float | None = None

    @property
    def held(self) -> bool:
        """Whether a shutdown would wait for us, or does so now."""
        with self._guard:
            return self._lock is not None

    def release(self) -> None:
        """The shutdown goes on. Never waits."""
        with self._guard:
            lock, self._lock = self._lock, None
        if lock is not None:
            with suppress(OSError):
                os.close(lock)

    def look(self, patience_s: float) -> Sequence[Sign]:
        """Waits for logind's word. Raises AbsentError without logind, OSError, ValueError."""
        try:
            connection = self._connected()
            if not self.held and not self._going_down:
                self._take(connection)
            message = connection.recv_until_filtered(self._signals, timeout=patience_s)
            return self._heard(connection, message)
        except TimeoutError:
            return ()
        except (OSError, EOFError, DBusErrorResponse, ValueError, RuntimeError):
            self.close()
            raise

    def _heard(self, connection: DBusConnection, message: Any) -> Sequence[Sign]:
        if message.header.fields.get(HeaderFields.signature) != "b":
            return ()
        # Anybody on the bus can send us a signal of that name; logind alone is believed.
        if _sender(message) != self._owner(connection):
            return ()
        (self._going_down,) = message.body
        if not self._going_down:  # it was cancelled: the next look takes the lock again
            return ()
        return (Sign(SignId.HOST_SHUTDOWN, "logind prepares for a shutdown or reboot"),)

    def _connected(self) -> DBusConnection:
        if self._connection is not None:
            return self._connection
        try:
            connection = open_dbus_connection(self._bus, enable_fds=True)
        except (OSError, EOFError, ValueError, KeyError) as error:
            raise AbsentError(f"there is no D-Bus: {error}") from error
        try:
            self._owner(connection)
            rule = MatchRule(type="signal", sender=NAME, interface=LOGIND.interface, member=SIGNAL)
            connection.filter(SIGNALS, queue=self._signals)
            _call(connection, message_bus.AddMatch(rule))
            limit = _call(connection, Properties(LOGIND).get("InhibitDelayMaxUSec"))[0][1]
            self.limit_s = float(limit) / 1e6
        except (DBusErrorResponse, TimeoutError) as error:
            connection.close()
            raise AbsentError(f"logind does not answer: {reason(error)}") from error
        self._connection = connection
        return connection

    def _owner(self, connection: DBusConnection) -> str:
        self._signals.believed = str(_call(connection, message_bus.GetNameOwner(NAME))[0])
        return self._signals.believed

    def _take(self, connection: DBusConnection) -> None:
        why = "virtual machines are moved to another host first"
        arguments = ("shutdown", "sempervirt", why, "delay")
        (lock,) = _call(connection, new_method_call(LOGIND, "Inhibit", "ssss", arguments))
        with self._guard:
            self._lock = lock.to_raw_fd()

    def close(self) -> None:
        """Leaves the bus, and lets a shutdown go on."""
        self.release()
        if self._connection is not None:
            with suppress(OSError):
                self._connection.close()
            self._connection = None
        self._signals.clear()
        self._going_down = False


def _call(connection: DBusConnection, message: Any) -> Any:
    """The body of the answer. Raises DBusErrorResponse, TimeoutError, OSError."""
    return unwrap_msg(connection.send_and_get_reply(message, timeout=CALL_S))
