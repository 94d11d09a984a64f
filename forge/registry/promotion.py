"""Which version of a name is the champion: moved by one at a time, and recorded in the store for good.

A promotion is recorded before the alias moves, and is finished by whoever asks for it again. An alias that
somebody moved by hand is recorded too, when the next promotion finds it, so that the history has no gaps.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, ValidationError

from forge.core.errors import ForgeError
from forge.registry.mlflow_registry import CHALLENGER, CHAMPION, version_of
from forge.storage import Store
from forge.storage.lease import current_owner, lease

if TYPE_CHECKING:
    from mlflow import MlflowClient


class Promotion(BaseModel):
    """One line of a name's history. `previous` is "" where there was no champion, `version` where there is none now.

    `when` is in seconds since 1970; `trial` is the rollout that it belongs to, where it does.
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
    """The history of a name, the oldest first; ForgeError where a record of it is missing or broken."""
    found = []
    for number, key in enumerate(store.names(f"promotions/{name}"), start=1):
        where = f"promotions/{name}/{key}"
        try:
            promotion = Promotion.model_validate_json(store.read(where) or b"")
        except ValidationError:
            raise ForgeError(f"{store.uri(where)}: not a promotion's record; put it back from a backup") from None
        if promotion.number != number:
            raise ForgeError(f"{store.uri(f'promotions/{name}')}: record {number} is missing; put it back")
        found.append(promotion)
    return found


def promote(
    client: "MlflowClient", store: Store, name: str, version: str, instead_of: str, why: str, trial: str = ""
) -> None:
    """Move the alias champion to a version, from the one that the caller compared it with ("" for none).

    Safe to run again. ForgeError where another version has become the champion meanwhile.
    """
    with _promoting(store, name, version) as check:
        now = version_of(client, name, CHAMPION) or ""
        if now not in (instead_of, version):
            raise not_the_champion(name, version, instead_of, now)
        history = promotions(store, name)
        last = history[-1].version if history else ""
        recorded = bool(history) and (last, history[-1].previous, history[-1].trial) == (version, now, trial)
        if now != version and recorded:
            pass  # recorded, and then broken off
        else:
            if now != last:
                found = "the alias was found there: moved by hand, or a promotion was broken off"
                history.append(_record(store, name, len(history) + 1, now, last, found))
            if now != version:
                _record(store, name, len(history) + 1, version, now, why, trial)
        check()
        _move(client, name, promotions(store, name)[-1])


def finish_promotion(client: "MlflowClient", store: Store, name: str, trial: str) -> bool:
    """Finish the promotion that was recorded in a trial; returns whether its version is the champion then.

    It is not where the alias was moved elsewhere since. Nothing is written to the store but the lease.
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
    """Take the alias challenger from a version, where it has it: it is the champion now, or has failed."""
    if version_of(client, name, CHALLENGER) == version:
        client.delete_registered_model_alias(name, CHALLENGER)


@contextlib.contextmanager
def _promoting(store: Store, name: str, version: str) -> Iterator[Callable[[], None]]:
    """Hold the lease, and turn MLflow's errors into a ForgeError."""
    from mlflow.exceptions import MlflowException

    try:
        with lease(store, f"promotion-{name}") as check:
            yield check
    except MlflowException as error:
        raise ForgeError(f"MLflow: {name} version {version} could not be made the champion ({error})") from None


def _move(client: "MlflowClient", name: str, promotion: Promotion) -> None:
    """Move the aliases as a record says."""
    client.set_model_version_tag(name, promotion.version, "previous_champion", promotion.previous)
    client.set_registered_model_alias(name, CHAMPION, promotion.version)
    drop_challenger(client, name, promotion.version)


def not_the_champion(name: str, version: str, compared: str, now: str) -> ForgeError:
    """What is said where the champion is not the one that a version was compared with."""
    before = f"version {compared}" if compared else "no champion"
    return ForgeError(
        f"{name} version {version} was compared with {before}, but the champion is "
        f"{f'version {now}' if now else 'gone'} now; run again, and it is compared with what serves"
    )


def _record(store: Store, name: str, number: int, version: str, previous: str, why: str, trial: str = "") -> Promotion:
    record = Promotion(
        number=number, version=version, previous=previous, when=time.time(), who=current_owner(), why=why, trial=trial
    )
    if not store.put_if_absent(f"promotions/{name}/{number:08}.json", record.model_dump_json(indent=2).encode()):
        raise ForgeError(f"{name} version {version}: somebody else was promoting at the same time; run again")
    return record
