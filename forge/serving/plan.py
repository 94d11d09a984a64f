"""What a rollout will change: derived from the package, not asked."""

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
    """The state in which the public name leads to what is to be served.

    An adapter of the base that serves is loaded beside it. Whole weights, and an adapter of another base, take the
    base's place; `engine` is how vLLM is started then, and also where an adapter needs more slots, or a higher rank,
    than it was started with, and the recipe grants them. ForgeError where others' public names would lead nowhere,
    except for those that the recipe `replaces`: they are taken away.
    """
    adapter = manifest.get("kind") == ADAPTER
    base = base_to_serve(manifest, now) if adapter else served
    names = {**now.names, served.name: served.versioned}
    if now.base is not None and now.base.digest == base.digest:
        state = now.model_copy(update={"names": names})
        adapters = [one for one in now.adapters if one.versioned != served.versioned]
        if adapter:  # in its place, so that what serves already changes nothing
            at = next((at for at, one in enumerate(now.adapters) if one.versioned == served.versioned), len(adapters))
            adapters.insert(at, served)
    else:
        state = Serving(base=base, engine=engine, names=names)
        adapters = [served] if adapter else []
    used = set(state.names.values())
    state = state.model_copy(update={"adapters": tuple(one for one in adapters if one.versioned in used)})
    if adapter and now.base == state.base:
        needed = len(loading_state(now, state).adapters), manifest.get("rank") or 0
        state = state.model_copy(update={"engine": engine_with_room(now.engine, engine, *needed)})
    there = {one.versioned for one in state.all()}
    lost = {name for name, versioned in names.items() if versioned not in there}
    if kept := sorted(lost - set(replaces)):
        version = f"{served.name} version {served.version}" if served.version else served.name
        needs = f"needs the base {base.versioned}" if adapter else "is whole weights, which take the base's place"
        raise ForgeError(
            f"{version} {needs}, and the server has {now.base.versioned if now.base else 'none'}: it "
            f"would take away {', '.join(kept)}. List these names in serving.replaces, or set serving.rollout: false "
            "to end at a registered challenger, or remove them first: python -m forge.serving remove NAME"
        )
    return state.model_copy(update={"names": {name: to for name, to in names.items() if name not in lost}})


def engine_with_room(now: Engine, granted: Engine, adapters: int, rank: int) -> Engine:
    """vLLM's options for so many adapters of such a rank: as they are if they suffice, or the granted ones do not."""
    slots, ranks = max(now.max_loras, granted.max_loras), max(now.max_lora_rank, granted.max_lora_rank)
    suffices = adapters <= now.max_loras and rank <= now.max_lora_rank
    if suffices or adapters > slots or rank > ranks:
        return now
    return now.model_copy(update={"max_loras": slots, "max_lora_rank": ranks})


def loading_state(now: Serving, after: Serving) -> Serving:
    """The state before public names move: all that is needed is there, and names lead where they did, if they can."""
    kept = [one for one in now.adapters if now.base == after.base and one not in after.adapters]
    there = {one.versioned for one in [*kept, *after.all()]}
    names = {name: versioned for name, versioned in now.names.items() if versioned in there}
    return after.model_copy(update={"adapters": (*kept, *after.adapters), "names": names})


def base_to_serve(manifest: dict[str, Any], now: Serving) -> Served:
    """What an adapter stands on, by its manifest: the base that serves, where it is that one."""
    location, digest = manifest["base"]["location"], manifest["base"]["revision"]
    if now.base is not None and now.base.digest == digest:
        return now.base
    path = directory_of(location) or PurePosixPath(location)
    name = path.parent.name if PACKAGE.fullmatch(location) else path.name  # a package's directory is its digest
    return Served(name=name, version="", uri=location, digest=digest)


def remove(now: Serving, name: str) -> Serving:
    """The state without a public name; the base stays for as long as any name leads to it or its adapters."""
    names = {public: versioned for public, versioned in now.names.items() if public != name}
    adapters = tuple(one for one in now.adapters if one.versioned in names.values())
    return now.model_copy(update={"names": names, "adapters": adapters}) if names else Serving()
