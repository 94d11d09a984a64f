"""The way back by hand: an earlier version serves again, and is the champion again."""

from tasks.contracts import Deployment
from tasks.errors import ForgeError
from tasks.package import open_package, resolve
from tasks.promotion import promotions
from tasks.recipe import ServingRecipe
from tasks.registry import find_champion, open_registry
from tasks.rollout.desired import Served
from tasks.rollout.rollout import Candidate, serve
from tasks.settings import Settings
from tasks.storage import Store

EVALUATION = "evaluation_digest"  # the tag of a version with its evaluation's digest


def roll_back(name: str, to: str, recipe: ServingRecipe, settings: Settings, store: Store) -> Deployment:
    """Serve version `to` again, or without one the champion before the present one; proved as any rollout is.

    ForgeError where there is no such version, or it does not serve as it was evaluated; then nothing is changed.
    """
    client = open_registry(settings)
    champion = find_champion(client, name)
    if champion is None:
        raise ForgeError(f"rollback: {name} has no champion; name a version to serve: --to N")
    if not to:
        to = next((past.previous for past in reversed(promotions(store, name)) if past.version == champion.version), "")
        if not to:
            raise ForgeError(f"rollback: there was no champion of {name} before version {champion.version}; use --to N")
    uri, digest = resolve(f"models:/{name}/{to}", settings)
    package, manifest = open_package(uri, digest, settings, store)
    evaluated = client.get_model_version(name, to).tags.get(EVALUATION, "")
    place = f"evaluations/sha256-{evaluated}"
    if not store.exists(place):
        print(f"rollback: the evaluation of {name} version {to} is gone; it need only answer", flush=True)
    served = Served(name=name, version=to, uri=uri, digest=digest)
    candidate = Candidate(
        served,
        package,
        manifest,
        store.path(store.uri(place)) if store.exists(place) else None,
        champion.version,
        f"rolled back by hand from version {champion.version}",
    )
    return serve(candidate, recipe, settings, store)
