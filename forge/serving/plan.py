"""The state of the server after a rollout or a removal, worked out from the current state and the manifest."""

from collections.abc import Collection
from pathlib import PurePosixPath
from typing import Any

from forge.core.contracts import Engine
from forge.core.errors import ForgeError
from forge.registry.packages import ADAPTER, PACKAGE, directory_of
from forge.serving.desired import Served, Serving


def plan(
    now: Serving, served: Served, manifest: dict[str, Any], engine: Engine, replaces: Collection[str] = ()
) -> Serving:
    """The state in which the public name of a version points to it.

    An adapter of the base that serves now is loaded next to the others. A full model, or an adapter of another base,
    replaces the base; `engine` then has vLLM's options. If an adapter of the current base needs more slots or a higher
    rank than vLLM was started with, and `engine` allows them, vLLM is restarted with those. ForgeError if other public
    names would point to nothing, except for those in `replaces`, which are removed.
    """
    adapter = manifest.get("kind") == ADAPTER
    base = base_to_serve(manifest, now) if adapter else served
    names = {**now.names, served.name: served.versioned}
    if now.base is not None and now.base.digest == base.digest:
        state = now.model_copy(update={"names": names})
        adapters = _with(now.adapters, served) if adapter else _without(now.adapters, served)
    else:
        state = Serving(base=base, engine=engine, names=names)
        adapters = [served] if adapter else []
    used = set(names.values())
    state = state.model_copy(update={"adapters": tuple(one for one in adapters if one.versioned in used)})
    if adapter and now.base == state.base:
        needed = len(loading_state(now, state).adapters), manifest.get("rank") or 0
        state = state.model_copy(update={"engine": engine_with_room(now.engine, engine, *needed)})
    present = {one.versioned for one in state.all()}
    lost = {name for name, versioned in names.items() if versioned not in present}
    if refused := sorted(lost - set(replaces)):
        raise _names_lost(refused, served, base if adapter else None, now)
    return state.model_copy(update={"names": {name: to for name, to in names.items() if name not in lost}})


def engine_with_room(now: Engine, allowed: Engine, adapters: int, rank: int) -> Engine:
    """vLLM's options for this many adapters up to this rank: the current ones if they suffice, or if even the allowed
    ones don't (the memory check then refuses the rollout).
    """
    slots, ranks = max(now.max_loras, allowed.max_loras), max(now.max_lora_rank, allowed.max_lora_rank)
    suffices = adapters <= now.max_loras and rank <= now.max_lora_rank
    if suffices or adapters > slots or rank > ranks:
        return now
    return now.model_copy(update={"max_loras": slots, "max_lora_rank": ranks})


def loading_state(now: Serving, after: Serving) -> Serving:
    """The state between two others: the models of both are loaded as far as possible, and names have not moved yet."""
    kept = [one for one in now.adapters if now.base == after.base and one not in after.adapters]
    loaded = {one.versioned for one in [*kept, *after.all()]}
    names = {name: versioned for name, versioned in now.names.items() if versioned in loaded}
    return after.model_copy(update={"adapters": (*kept, *after.adapters), "names": names})


def base_to_serve(manifest: dict[str, Any], now: Serving) -> Served:
    """The base of an adapter, from its manifest; the current base if it has the same digest."""
    location, digest = manifest["base"]["location"], manifest["base"]["revision"]
    if now.base is not None and now.base.digest == digest:
        return now.base
    path = directory_of(location) or PurePosixPath(location)
    name = path.parent.name if PACKAGE.fullmatch(location) else path.name  # a package's directory is its digest
    return Served(name=name, version="", uri=location, digest=digest)


def remove(now: Serving, name: str) -> Serving:
    """The state without a public name. The base stays as long as any name points to it or to its adapters."""
    names = {public: versioned for public, versioned in now.names.items() if public != name}
    adapters = tuple(one for one in now.adapters if one.versioned in names.values())
    return now.model_copy(update={"names": names, "adapters": adapters}) if names else Serving()


def _with(adapters: Collection[Served], served: Served) -> list[Served]:
    """The adapters with this one: in the same position if it is there already, so that nothing changes then."""
    if any(one.versioned == served.versioned for one in adapters):
        return [served if one.versioned == served.versioned else one for one in adapters]
    return [*adapters, served]


def _without(adapters: Collection[Served], served: Served) -> list[Served]:
    return [one for one in adapters if one.versioned != served.versioned]


def _names_lost(names: list[str], served: Served, base: Served | None, now: Serving) -> ForgeError:
    """The error for public names that a rollout would remove. `base` is the one that an adapter needs."""
    version = f"{served.name} version {served.version}" if served.version else served.name
    reason = f"needs the base {base.versioned}" if base else "is a full model, which replaces the base"
    current = now.base.versioned if now.base else "none"
    return ForgeError(
        f"{version} {reason}, and the server has {current}: the rollout would remove {', '.join(names)}",
        fix="list these names in serving.replaces, set serving.rollout: false to end at a registered challenger, or "
        "remove them first: forge remove NAME",
    )
