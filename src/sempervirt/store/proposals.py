"""What hosts want changed, each in keys of its own, and what of it counts.

etcd has rights by key and none by value. So where it asks for users, no host writes vms/… or
images/… itself. A host *proposes*: it puts the writes, and what they are compared with, into one
entry below its own prefix, which no other host can write. etcd has all proposals in one order, and
whoever reads the store applies the same rule to them in that order:

    vms/web: of a, epoch 7                      settled: written by the host with the authority
    proposals/b/web/9c… @51: web is b's, epoch 8    refused: a has not given it away
    proposals/a/web/4f… @52: web moves to b         counts: a owns it
    proposals/a/web/17… @53: web is b's, epoch 8    counts: it moves there
    proposals/b/web/e0… @54: web is free            counts: by now b owns it

The VM in a proposal's key is for those who watch that VM, and nothing follows from it.

A proposal counts if all that it expects is as the proposals before it have left it (so it is the
same compare-and-set as in `port`), and if the host in its key may change that VM:

    the VM is         may be changed by   into
    absent, free      any host            owned by that host, under the next epoch
    owned, moving     its owner           the same claim in another custody; free, with its images;
                                          the next epoch, for itself or for where the VM moves to
    owned             who keeps standbys  owned by that host, under the next epoch: its owner has
                      of it               named it for that (`Ownership.standby`)
    unknown           nobody              the host with the authority settles it: it may do all this

The next epoch is one more than the greatest of the VM and its images, exactly, and the images are
free or the VM's. What does not count changes nothing, whatever it says.

The host with the authority settles what counts: in one commit it writes vms/… and images/… with the
revision that the proposal had (`settled`, the last field), and removes the proposals. That changes
nothing of what a reader finds, so nothing waits for it, also while that host is off. Until it is
settled a host can take back what it has proposed itself; from then on nobody can. A host that
overwrites its proposals again and again holds nobody up: each overwritten one comes last in the
order, and while commits are overtaken the first proposal is settled by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum

from pydantic import ValidationError

from sempervirt.core.names import is_name
from sempervirt.host.records import RecordDamaged
from sempervirt.store.port import Delete, Entry, Put, Write
from sempervirt.store.records import Custody, ImageClaim, Ownership, Value, parse

PROPOSALS, VMS, IMAGES = "proposals/", "vms/", "images/"
# In the place of a host's name: the host with the authority, which no name of a host is.
AUTHORITY = ""
# etcd takes 128 operations and 1.5 MiB at once.
OPERATIONS_MAX = 120
SETTLED_MAX = 512 * 1024
# In bytes, as `SETTLED_MAX`. What cannot be settled by one commit does not count: it would keep all
# that comes after it from being settled.
LENGTH_MAX = 256 * 1024
_SETTLED = ',"settled":'


class Proposal(Value):
    """Writes, and the revisions at which everything was that they depend on (0: absent)."""

    writes: dict[str, str]
    expect: dict[str, int]


class Refusal(Enum):
    """Why a proposal does not count."""

    UNREADABLE = "it cannot be read"
    OUTDATED = "something else was proposed before"
    NOT_ALLOWED = "that host may not do that"


@dataclass(frozen=True)
class Counted:
    """What a reader finds: `entries` without proposals, and why which proposals do not count."""

    entries: Mapping[str, Entry]
    refused: Mapping[str, Refusal]


def is_proposed(key: str) -> bool:
    """Whether entries of that key are changed by proposals."""
    return key.startswith((VMS, IMAGES))


def proposer_prefix(host: str, vm: str = "") -> str:
    """Below which a host proposes; of one VM."""
    return f"{PROPOSALS}{host}/{vm}/" if vm else f"{PROPOSALS}{host}/"


def dependencies(raw: Mapping[str, Entry]) -> set[str]:
    """The entries that have to be among `raw`, so that `count` and `settlement` judge all proposals
    that are.
    """
    found = set[str]()
    for _, entry in _in_order(raw):
        if (proposal := _parsed(entry.value)) is not None:
            found.update(proposal.writes, proposal.expect)
    return {key for key in found if is_proposed(key)}


def count(raw: Mapping[str, Entry]) -> Counted:
    """Applies all proposals in the order in which the store has got them."""
    entries = {
        key: _unsettled(entry) if is_proposed(key) else entry
        for key, entry in raw.items()
        if not key.startswith(PROPOSALS)
    }
    refused = {}
    for key, entry in _in_order(raw):
        judged = _judge(entries, key, entry.value)
        if isinstance(judged, Refusal):
            refused[key] = judged
        else:
            for changed, value in judged.items():
                entries[changed] = Entry(value, entry.revision)
    return Counted(entries, refused)


def settlement(raw: Mapping[str, Entry], most: int = OPERATIONS_MAX) -> list[Write]:
    """What settles the first proposals, as many as one commit takes and at `most` so many; nothing
    if there are none.

    Every reader finds the same before and after, also if other proposals come between.
    """
    before = dict(raw)
    for key, _ in _in_order(raw):
        del before[key]
    changed: dict[str, Entry] = {}
    entries = dict(count(before).entries)
    removed: list[str] = []
    for key, entry in _in_order(raw):
        if len(removed) == most:
            break
        judged = _judge(entries, key, entry.value)
        new = {} if isinstance(judged, Refusal) else judged
        length = sum(_length(one, at.value) for one, at in changed.items())
        length += sum(_length(one, value) for one, value in new.items())
        operations = len(removed) + 1 + len(changed.keys() | new.keys())
        if removed and (operations > OPERATIONS_MAX or length > SETTLED_MAX):
            break
        removed.append(key)
        for one, value in new.items():
            entries[one] = changed[one] = Entry(value, entry.revision)
    puts = [Put(key, _settled(entry)) for key, entry in changed.items()]
    return [*puts, *(Delete(key) for key in removed)]


def _in_order(raw: Mapping[str, Entry]) -> Iterator[tuple[str, Entry]]:
    proposed = ((key, entry) for key, entry in raw.items() if key.startswith(PROPOSALS))
    yield from sorted(proposed, key=lambda item: (item[1].revision, item[0]))


def _length(key: str, value: str) -> int:
    """What a write takes, in bytes: etcd is told its key twice, once to compare."""
    return 2 * len(key.encode()) + len(value.encode())


def _settled(entry: Entry) -> str:
    return f"{entry.value[:-1]}{_SETTLED}{entry.revision}}}"


def _unsettled(entry: Entry) -> Entry:
    """As it was proposed. In a JSON string the quotes of the field's name would be escaped."""
    value, found, revision = entry.value.rpartition(_SETTLED)
    if not found or not revision.endswith("}") or not revision[:-1].isdecimal():
        return entry
    return Entry(value + "}", int(revision[:-1]))


def _parsed(text: str) -> Proposal | None:
    """None: it cannot be read."""
    if len(text.encode()) > LENGTH_MAX:
        return None
    try:
        return Proposal.model_validate_json(text)
    except ValidationError:
        return None


def _judge(entries: Mapping[str, Entry], key: str, text: str) -> Mapping[str, str] | Refusal:
    """What the proposal of that key changes, or why it does not count."""
    host, slash, _ = key.removeprefix(PROPOSALS).partition("/")
    proposal = _parsed(text)
    if not slash or proposal is None:
        return Refusal.UNREADABLE
    try:
        new = _values(proposal.writes)
        now = {one: entries.get(one) for one in {**proposal.writes, **proposal.expect}}
        before = _values({one: at.value for one, at in now.items() if at and one in new})
    except RecordDamaged:
        return Refusal.UNREADABLE
    # What other entries were like cannot be told once they have changed.
    if not new or new.keys() - proposal.expect.keys() or not all(map(is_proposed, now)):
        return Refusal.UNREADABLE
    if len(new) >= OPERATIONS_MAX:  # it is removed by the same commit
        return Refusal.UNREADABLE
    for one, expected in proposal.expect.items():
        at = now[one]
        if (at.revision if at is not None else 0) != expected:
            return Refusal.OUTDATED
    if host != AUTHORITY and not _may(host, before, new):
        return Refusal.NOT_ALLOWED
    return {one: value.text() for one, value in new.items()}


_Values = Mapping[str, Ownership | ImageClaim]


def _values(texts: Mapping[str, str]) -> _Values:
    """Raises RecordDamaged, also for a value under another one's key."""
    found: dict[str, Ownership | ImageClaim] = {}
    for key, text in texts.items():
        value: Ownership | ImageClaim
        if key.startswith(VMS):
            value = parse(Ownership, key, text)
            name = VMS + value.vm
        else:
            value = parse(ImageClaim, key, text)
            name = IMAGES + value.image
        if name != key:
            raise RecordDamaged(f"{key} in the store is of {name}")
        found[key] = value
    return found


def _may(host: str, before: _Values, new: _Values) -> bool:
    """Whether a host may turn the values `before` (without those that are absent) into `new`."""
    vms = [value for value in new.values() if isinstance(value, Ownership)]
    if len(vms) != 1 or not is_name(vms[0].vm):
        return False
    (after,) = vms
    now = before.get(VMS + after.vm)
    assert now is None or isinstance(now, Ownership)
    images = {
        value.image: (value, _claimed(before.get(key)))
        for key, value in new.items()
        if isinstance(value, ImageClaim)
    }
    if now is None or now.custody is Custody.FREE:
        return _is_claim(now, after, images) and after.owner == host
    if now.custody is Custody.OWNED and host == now.standby != now.owner:
        return _is_claim(now, after, images) and after.owner == after.standby == host
    if now.owner != host or now.custody is Custody.UNKNOWN:
        return False
    if (after.epoch, after.claim) != (now.epoch, now.claim):
        heirs = {host, now.destination} if now.custody is Custody.MOVING else {host}
        return _is_claim(now, after, images) and after.owner in heirs
    if after.images != now.images:
        return False
    if after.custody is Custody.FREE:
        return after.owner == "" and all(
            was is not None
            and was.vm in ("", now.vm)
            and image in now.images
            and (value.vm, value.epoch, value.claim) == ("", was.epoch, was.claim)
            for image, (value, was) in images.items()
        )
    return after.owner == host and not images


def _claimed(value: Ownership | ImageClaim | None) -> ImageClaim | None:
    assert value is None or isinstance(value, ImageClaim)
    return value


def _is_claim(
    now: Ownership | None,
    after: Ownership,
    images: Mapping[str, tuple[ImageClaim, ImageClaim | None]],
) -> bool:
    """Whether `after` is a new claim, with just its images, which are free or the VM's."""
    epochs = [now.epoch if now is not None else 0]
    for value, was in images.values():
        if was is not None:
            if was.vm not in ("", after.vm):
                return False
            epochs.append(was.epoch)
        if (value.epoch, value.claim, value.vm) != (after.epoch, after.claim, after.vm):
            return False
    return (
        after.custody is Custody.OWNED
        and after.owner != ""
        and after.epoch == max(epochs) + 1
        and after.claim not in ("", now.claim if now is not None else "")
        and after.destination == ""
        and sorted(after.images) == sorted(images)
    )
