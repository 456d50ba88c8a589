"""The lock that holds an orderly shutdown, on a real bus with a logind of the test's."""

from __future__ import annotations

import os
import select
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from jeepney import DBusAddress, HeaderFields, MessageType, new_error, new_method_return, new_signal
from jeepney.bus_messages import message_bus
from jeepney.io.blocking import DBusConnection, open_dbus_connection

from sempervirt.guard.signs import SignId
from sempervirt.guard.sources.logind import NAME, SIGNALS_MAX, Shutdowns
from sempervirt.guard.sources.source import AbsentError

DEADLINE_S = 90.0
CONFIG = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><listen>unix:path={path}</listen><auth>EXTERNAL</auth>
<policy context="default"><allow send_destination="*"/><allow own="*"/>
<allow receive_sender="*"/></policy></busconfig>
"""
MANAGER = DBusAddress("/org/freedesktop/login1", NAME, "org.freedesktop.login1.Manager")


class Logind:
    """Gives a lock to whoever asks, and tells when the lock was given back."""

    def __init__(self, bus: str) -> None:
        self._connection = open_dbus_connection(bus, enable_fds=True)
        self._connection.send_and_get_reply(message_bus.RequestName(NAME))
        self._wait_name()
        self._answered = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self.asked: list[tuple[Any, ...]] = []
        self.locks: list[int] = []
        self._thread.start()

    def _wait_name(self) -> None:
        """Who had the name before may have left, and the bus not have seen it."""
        give_up = time.monotonic() + DEADLINE_S
        asked = message_bus.GetNameOwner(NAME)
        while self._connection.send_and_get_reply(asked).body != (self._connection.unique_name,):
            assert time.monotonic() < give_up
            time.sleep(0.01)  # poll interval

    def _serve(self) -> None:
        while True:
            try:
                message = self._connection.receive()
            except (OSError, EOFError, ValueError):
                return
            if message.header.message_type is MessageType.method_return:
                self._answered.set()
            if message.header.message_type is not MessageType.method_call:
                continue
            match message.header.fields.get(HeaderFields.member):
                case "Inhibit":
                    mine, theirs = os.pipe()
                    self.asked.append(message.body)
                    self._connection.send(new_method_return(message, "h", (theirs,)))
                    os.close(theirs)
                    self.locks.append(mine)
                case "Get":
                    answer = new_method_return(message, "v", (("t", 7_000_000),))
                    self._connection.send(answer)
                case _:
                    self._connection.send(new_error(message, "org.example.Unknown"))

    def prepare(self, going_down: bool) -> None:
        """What logind says to all."""
        self._connection.send(new_signal(MANAGER, "PrepareForShutdown", "b", (going_down,)))

    def passed_on(self) -> None:
        """Returns when the bus has passed on what was said: it answers in order."""
        self._connection.send(message_bus.GetId())
        assert self._answered.wait(DEADLINE_S)

    def released(self, number: int) -> bool:
        """Waits until the lock of that number was given back; False: not by the deadline."""
        waiting = select.poll()
        waiting.register(self.locks[number], select.POLLIN)
        return bool(waiting.poll(DEADLINE_S * 1000))

    def is_held(self, number: int) -> bool:
        waiting = select.poll()
        waiting.register(self.locks[number], select.POLLIN)
        return not waiting.poll(0)

    def close(self) -> None:
        self._connection.close()


@pytest.fixture
def bus(tmp_path: Path) -> Iterator[str]:
    assert shutil.which("dbus-daemon"), "no bus; run scripts/system-packages dbus-daemon"
    path = tmp_path / "bus"
    config = tmp_path / "bus.conf"
    config.write_text(CONFIG.format(path=path))
    command = ["dbus-daemon", f"--config-file={config}", "--nofork", "--print-address=1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield f"unix:path={path}"
        process.kill()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


def test_a_shutdown_is_a_sign_and_waits_until_it_is_released(bus: str, stack: ExitStack) -> None:
    logind = Logind(bus)
    stack.callback(logind.close)
    source = Shutdowns(bus)
    stack.callback(source.close)
    assert source.look(0.01) == ()
    assert is_held(source)
    assert source.limit_s == 7.0
    assert logind.asked[0][0] == "shutdown"
    assert logind.asked[0][3] == "delay"
    logind.prepare(going_down=True)
    (sign,) = source.look(DEADLINE_S)
    assert sign.id is SignId.HOST_SHUTDOWN
    assert logind.is_held(0)
    source.release()
    assert logind.released(0)
    source.release()  # once more: nothing is held
    # While the host goes down no other lock is taken.
    assert source.look(0.01) == ()
    assert not is_held(source)
    # The shutdown was cancelled: the next one is held again.
    logind.prepare(going_down=False)
    assert source.look(DEADLINE_S) == ()
    assert source.look(0.01) == ()
    assert is_held(source)
    assert len(logind.locks) == 2


def test_a_stranger_on_the_bus_cannot_announce_a_shutdown(bus: str, stack: ExitStack) -> None:
    logind = Logind(bus)
    stack.callback(logind.close)
    source = Shutdowns(bus)
    stack.callback(source.close)
    assert source.look(0.01) == ()
    stranger = open_dbus_connection(bus)
    stack.callback(stranger.close)
    for own in names_of(stranger):
        forged = new_signal(MANAGER, "PrepareForShutdown", "b", (True,))
        forged.header.fields[HeaderFields.destination] = own
        stranger.send(forged)
    for _ in range(5):
        assert source.look(0.05) == ()
    # The control: logind's own word is heard.
    logind.prepare(going_down=True)
    assert [sign.id for sign in source.look(DEADLINE_S)] == [SignId.HOST_SHUTDOWN]


def test_a_stranger_who_never_ends_cannot_push_the_word_of_logind_out(
    bus: str, stack: ExitStack
) -> None:
    logind = Logind(bus)
    stack.callback(logind.close)
    source = Shutdowns(bus)
    stack.callback(source.close)
    assert source.look(0.01) == ()
    stranger = open_dbus_connection(bus)
    stack.callback(stranger.close)

    def forge(times: int) -> None:
        for own in names_of(stranger):
            for _ in range(times):
                forged = new_signal(MANAGER, "PrepareForShutdown", "b", (False,))
                forged.header.fields[HeaderFields.destination] = own
                stranger.send(forged)
        names_of(stranger)  # the bus has passed them on

    forge(10)
    logind.prepare(going_down=True)
    logind.passed_on()
    forge(2 * SIGNALS_MAX)
    give_up, heard = time.monotonic() + DEADLINE_S, list[SignId]()
    while not heard and time.monotonic() < give_up:
        heard += [sign.id for sign in source.look(0.05)]
    heard += [sign.id for _ in range(20) for sign in source.look(0.05)]
    assert heard == [SignId.HOST_SHUTDOWN]


def is_held(source: Shutdowns) -> bool:
    return source.held


def names_of(connection: DBusConnection) -> list[str]:
    """Of everybody on the bus but the one who asks."""
    (names,) = connection.send_and_get_reply(message_bus.ListNames()).body
    return [name for name in names if name.startswith(":") and name != connection.unique_name]


def test_without_a_bus_or_without_logind_it_is_absent(bus: str, tmp_path: Path) -> None:
    with pytest.raises(AbsentError, match="no D-Bus"):
        Shutdowns(f"unix:path={tmp_path / 'none'}").look(0.01)
    with pytest.raises(AbsentError, match="logind does not answer"):
        Shutdowns(bus).look(0.01)


def test_a_logind_that_begins_again_is_held_again(bus: str, stack: ExitStack) -> None:
    first = Logind(bus)
    source = Shutdowns(bus)
    stack.callback(source.close)
    assert source.look(0.01) == ()
    first.close()
    second = Logind(bus)
    stack.callback(second.close)
    # The one who has the name now is believed, and nobody else.
    second.prepare(going_down=True)
    assert [sign.id for sign in source.look(DEADLINE_S)] == [SignId.HOST_SHUTDOWN]
