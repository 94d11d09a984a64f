"""What the tests of rollouts serve: names and digests alone."""

from forge.serving.desired import Desired, Served, Serving


def version(number: int, name: str = "dates") -> Served:
    """A version of a name."""
    digest = f"{number:x}" * 64
    return Served(name=name, version=str(number), uri=f"file:///store/models/{name}/sha256-{digest}", digest=digest)


def serving(base: Served, *adapters: Served, names: dict[str, Served] | None = None) -> Serving:
    """A state of the server; without `names`, each public name leads to what has it."""
    leads = names if names is not None else {one.name: one for one in (base, *adapters)}
    return Serving(base=base, adapters=adapters, names={name: one.versioned for name, one in leads.items()})


def desired(state: Serving, generation: int = 1) -> Desired:
    """A document without a trial."""
    return Desired(generation=generation, serving=state)


WEIGHTS = {"kind": "model", "base": {"location": "random bytes", "revision": ""}}


def adapter_of(base: Served) -> dict:
    """The manifest of an adapter of a base."""
    return {"kind": "adapter", "base": {"location": base.uri, "revision": base.digest}}
