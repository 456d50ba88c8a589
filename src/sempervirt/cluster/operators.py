"""The operators of a cluster: people who ask its agents over TLS, with a role from the store.

The role is not in the certificate: it can be changed, or taken away, while the certificate lives.
"""

from __future__ import annotations

import time
from datetime import timedelta

from sempervirt.cluster.cluster import OPERATORS, REVOKED, Cluster
from sempervirt.core import roles
from sempervirt.core.errors import InvalidRequest, NotFound
from sempervirt.core.names import check_name, suggest
from sempervirt.core.roles import Role
from sempervirt.store.port import Delete, Put, Write
from sempervirt.store.records import Operator, Revocation, parse
from sempervirt.trust.authority import Authority
from sempervirt.trust.operator import OperatorKey, make_operator_key


async def add_operator(cluster: Cluster, name: str, role: Role, valid: timedelta) -> OperatorKey:
    """A new certificate and the role for it. One that the operator had before counts no more.

    Raises InvalidRequest, StateConflict where there is no authority, Unavailable, OutcomeUnknown.
    """
    if role not in roles.OPERATORS:
        raise InvalidRequest(f"{role.value} is no role of a person")
    try:
        check_name(name)
    except ValueError as error:
        raise InvalidRequest.of(error) from error
    directory = cluster.identity.directory
    doors = Authority.doors(directory, cluster.settings.cluster)
    made = make_operator_key(Authority.load(directory), doors, name, valid)
    issued = made.issued
    entry = Operator.model_validate(
        {"name": name, "role": role.value, "serial": issued.serial, "not_after": issued.not_after}
    )
    writes: list[Write] = [Put(OPERATORS + name, entry.text())]
    state = await cluster.store.read(OPERATORS + name, REVOKED)
    earlier = state.entries.get(OPERATORS + name)
    if earlier is not None:
        was = parse(Operator, OPERATORS + name, earlier.value)
        writes.append(_revocation(was, "has another certificate"))
    await cluster.store.commit(
        writes, expect={write.key: state.revision_of(write.key) for write in writes}
    )
    return made


async def operators(cluster: Cluster) -> list[Operator]:
    """All of them, by name."""
    state = await cluster.store.read(OPERATORS)
    return [parse(Operator, key, entry.value) for key, entry in sorted(state.entries.items())]


async def revoke_operator(cluster: Cluster, name: str, reason: str) -> None:
    """Makes an operator a stranger. Raises NotFound, Unavailable, OutcomeUnknown."""
    state = await cluster.store.read(OPERATORS, REVOKED)
    entry = state.entries.get(OPERATORS + name)
    if entry is None:
        known = [key.removeprefix(OPERATORS) for key in state.entries if key.startswith(OPERATORS)]
        raise NotFound(f"there is no operator {name}", remedy=suggest(name, known))
    was = parse(Operator, OPERATORS + name, entry.value)
    writes: list[Write] = [Delete(OPERATORS + name), _revocation(was, reason)]
    await cluster.store.commit(
        writes, expect={write.key: state.revision_of(write.key) for write in writes}
    )


def _revocation(operator: Operator, reason: str) -> Put:
    name = f"operator {operator.name}"
    entry = Revocation(serial=operator.serial, host=name, time=time.time(), reason=reason)
    return Put(REVOKED + operator.serial, entry.text())
