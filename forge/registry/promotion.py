"""Which version of a name is the champion: moved by one process at a time, and recorded in the store forever.

A promotion is recorded before the alias moves. If it is interrupted, running it again finishes it. An alias that was
moved by hand is recorded by the next promotion, so that the history has no gaps.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from forge.core.errors import ForgeError
from forge.registry.mlflow_registry import CHALLENGER, CHAMPION, version_of
from forge.storage import Store
from forge.storage.lease import current_owner, lease
from forge.storage.records import parse_record

if TYPE_CHECKING:
    from mlflow import MlflowClient


class Promotion(BaseModel):
    """One entry of a name's history. `previous` is "" if there was no champion, and `version` if there is none now.

    `when` is Unix time. `trial` is the ID of the rollout that promoted the version, if any.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    number: int
    version: str
    previous: str
    when: float
    who: str
    why: str
    trial: str = ""


def promotions(store: Store, name: str) -> list[Promotion]:
    """The history of a name, oldest first; raises ForgeError if a record is missing or broken."""
    found = []
    for number, key in enumerate(store.names(f"promotions/{name}"), start=1):
        path = f"promotions/{name}/{key}"
        promotion = parse_record(Promotion, store.read(path), where=store.uri(path), fix="restore it from a backup")
        if promotion.number != number:
            raise ForgeError(
                f"record {number} is missing", where=store.uri(f"promotions/{name}"), fix="restore it from a backup"
            )
        found.append(promotion)
    return found


def promote(
    client: "MlflowClient", store: Store, name: str, version: str, instead_of: str, why: str, trial: str = ""
) -> None:
    """Move the alias champion to a version, from the version that the caller compared it with ("" for none).

    Can be repeated. Raises ForgeError if another version has become the champion meanwhile.
    """
    with _promoting(store, name, version) as check:
        now = version_of(client, name, CHAMPION) or ""
        if now not in (instead_of, version):
            raise not_the_champion(name, version, instead_of, now)
        history = promotions(store, name)
        last = history[-1].version if history else ""
        recorded = bool(history) and (last, history[-1].previous, history[-1].trial) == (version, now, trial)
        if now == version or not recorded:  # else it was interrupted after it had been recorded
            if now != last:
                reason = "found the alias here: it was moved by hand, or a promotion was interrupted"
                history.append(_record(store, name, len(history) + 1, now, last, reason))
            if now != version:
                _record(store, name, len(history) + 1, version, now, why, trial)
        check()
        _move(client, name, promotions(store, name)[-1])


def finish_promotion(client: "MlflowClient", store: Store, name: str, trial: str) -> bool:
    """Finish the promotion that a rollout recorded; returns whether its version is the champion now.

    It is not if the alias has been moved since. Only the lease is written to the store.
    """
    ours = next(past for past in promotions(store, name) if past.trial == trial)
    with _promoting(store, name, ours.version) as check:
        now = version_of(client, name, CHAMPION) or ""
        if now != ours.version and (now, promotions(store, name)[-1]) != (ours.previous, ours):
            return False
        check()
        _move(client, name, ours)
        return True


def drop_challenger(client: "MlflowClient", name: str, version: str) -> None:
    """Remove the alias challenger from a version that has become the champion or has failed, if it has the alias."""
    if version_of(client, name, CHALLENGER) == version:
        client.delete_registered_model_alias(name, CHALLENGER)


@contextlib.contextmanager
def _promoting(store: Store, name: str, version: str) -> Iterator[Callable[[], None]]:
    """Hold the lease, and turn MLflow errors into ForgeErrors."""
    from mlflow.exceptions import MlflowException

    try:
        with lease(store, f"promotion-{name}") as check:
            yield check
    except MlflowException as error:
        raise ForgeError(f"could not make {name} version {version} the champion ({error})", where="MLflow") from None


def _move(client: "MlflowClient", name: str, promotion: Promotion) -> None:
    """Move the aliases to the version of a record."""
    client.set_model_version_tag(name, promotion.version, "previous_champion", promotion.previous)
    client.set_registered_model_alias(name, CHAMPION, promotion.version)
    drop_challenger(client, name, promotion.version)


def not_the_champion(name: str, version: str, compared: str, now: str) -> ForgeError:
    """The error if the champion is not the one that a version was compared with."""
    before = f"version {compared}" if compared else "no champion"
    return ForgeError(
        f"{name} version {version} was compared with {before}, but the champion is "
        f"{f'version {now}' if now else 'gone'} now",
        fix="run again to compare it with the present champion",
    )


def _record(store: Store, name: str, number: int, version: str, previous: str, why: str, trial: str = "") -> Promotion:
    record = Promotion(
        number=number, version=version, previous=previous, when=time.time(), who=current_owner(), why=why, trial=trial
    )
    if not store.put_if_absent(f"promotions/{name}/{number:08}.json", record.model_dump_json(indent=2).encode()):
        raise ForgeError("another process was promoting", where=f"{name} version {version}", fix="run again")
    return record
