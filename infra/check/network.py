"""NetworkPolicies deny by default, and allow what infra/connections.yaml lists, scrapes and the mesh."""

from collections.abc import Iterator

from infra.check.references import scraped
from infra.check.tree import Object, Pod, Tree, at, matches

EXPORTED = "mirror.linkerd.io/exported"
DOCUMENTED = "multicluster.linkerd.io/export"  # the annotation in the cluster's description
INJECT = "linkerd.io/inject"
PROXY = 4143  # the inbound port of Linkerd's proxy
GATEWAY = "linkerd-multicluster"


def check_network(tree: Tree) -> Iterator[str]:
    """Connections that are blocked but needed, and namespaces that do not deny by default."""
    yield from _closed(tree)
    yield from _policies(tree)
    yield from _connections(tree)
    yield from _exports(tree)


def _closed(tree: Tree) -> Iterator[str]:
    for where, one in tree.of("Namespace"):
        name = one["metadata"]["name"]
        closed = {
            way
            for _, policy in tree.of("NetworkPolicy")
            if policy["metadata"]["namespace"] == name and not policy["spec"].get("podSelector")
            for way in policy["spec"].get("policyTypes") or []
        }
        for way in ("Ingress", "Egress"):
            excepted = any(
                entry["rule"] == "default-deny" and entry["where"] == f"Namespace/{name}"
                for entry in tree.lists["exceptions"]
            )
            if way not in closed and not excepted:
                yield f"{where}: no NetworkPolicy denies {way} by default"


def _policies(tree: Tree) -> Iterator[str]:
    """Policies select existing pods, and allow ports on which they listen."""
    for where, one in tree.of("NetworkPolicy"):
        spec, namespace = one["spec"], one["metadata"]["namespace"]
        pods = tree.selected(namespace, spec.get("podSelector"))
        if spec.get("podSelector") and not pods:
            if not any(entry["where"] in where for entry in tree.lists["exceptions"] if entry["rule"] == "policy"):
                yield f"{where}: its selector matches no pods"
            continue
        for rule in spec.get("ingress") or []:
            for port in rule.get("ports") or []:
                number = port.get("port")
                if spec.get("podSelector") and not any(_listens(pod, number) for pod in pods) and "endPort" not in port:
                    yield f"{where}: allows port {number}, on which {pods[0].where} does not listen"


def _listens(pod: Pod, port: int | str | None) -> bool:
    return port is None or pod.port(port) is not None or (port == PROXY and _meshed(pod))


def _meshed(pod: Pod) -> bool:
    return pod.annotations.get(INJECT) == "enabled"


def _peer(tree: Tree, peer: Object, home: str, pod: Pod) -> bool:
    """Whether a pod is one of a rule's peers; `home` is the policy's namespace."""
    if "ipBlock" in peer:
        return bool(at(peer, "ipBlock.cidr") in ("0.0.0.0/0", "::/0") and not at(peer, "ipBlock.except"))
    namespace = peer.get("namespaceSelector")
    if namespace is None and pod.namespace != home:
        return False
    labels = {"kubernetes.io/metadata.name": pod.namespace, **_labels(tree, pod.namespace)}
    if namespace is not None and not matches(namespace, labels):
        return False
    return matches(peer.get("podSelector") or {}, pod.labels)


def _labels(tree: Tree, namespace: str) -> dict[str, str]:
    found = [
        one["metadata"].get("labels") or {} for _, one in tree.of("Namespace") if one["metadata"]["name"] == namespace
    ]
    return dict(found[0]) if found else {}


def _passes(tree: Tree, way: str, pod: Pod, other: Pod, port: int, to: Pod) -> bool:
    """Whether the policies of `pod` allow traffic with `other` in direction `way`; `port` is on `to`, one of them."""
    mine = [
        policy for _, policy in tree.of("NetworkPolicy")
        if policy["metadata"]["namespace"] == pod.namespace
        and matches(policy["spec"].get("podSelector") or {}, pod.labels)
        and way in (policy["spec"].get("policyTypes") or ["Ingress"])
    ]  # fmt: skip
    field, side = ("ingress", "from") if way == "Ingress" else ("egress", "to")
    return not mine or any(
        (not rule.get(side) or any(_peer(tree, peer, pod.namespace, other) for peer in rule[side]))
        and (not rule.get("ports") or any(_covers(entry, port, to) for entry in rule["ports"]))
        for policy in mine
        for rule in policy["spec"].get(field) or []
    )


def _covers(entry: Object, port: int, to: Pod) -> bool:
    first = entry.get("port")
    if first is None:
        return True
    number = to.port(first) if isinstance(first, str) else int(first)
    return number is not None and number <= port <= int(entry.get("endPort", number))


def connects(tree: Tree, source: Pod, to: Pod, port: int) -> str:
    """Why one pod cannot connect to another's port; "" if it can."""
    if not _passes(tree, "Egress", source, to, port, to):
        return f"the policies of {source.where} do not allow egress to {to.where} on port {port}"
    if not _passes(tree, "Ingress", to, source, port, to):
        return f"the policies of {to.where} do not allow ingress from {source.where} on port {port}"
    return ""


def _connections(tree: Tree) -> Iterator[str]:
    for one in tree.lists["connections"]:
        namespace, _, rest = one["to"].partition("/")
        name, _, number = rest.partition(":")
        service = next(
            (
                found for _, found in tree.services
                if (found["metadata"]["namespace"], found["metadata"]["name"]) == (namespace, name)
            ),
            None,
        )  # fmt: skip
        ports = [port for port in service["spec"]["ports"] if str(port["port"]) == number] if service else []
        if not service or not ports:
            yield f"infra/connections.yaml: Service {one['to']} does not exist"
            continue
        for source in one["from"]:
            pods = _sources(tree, source)
            if not pods:
                yield f"infra/connections.yaml: {one['to']}: no pods match {source}"
            for pod in pods:
                for to in tree.selected(namespace, service["spec"]["selector"]):
                    target = to.port(ports[0].get("targetPort", ports[0]["port"]))
                    if _meshed(pod) and _meshed(to):  # traffic goes from proxy to proxy
                        target = PROXY
                    if target is not None and (why := connects(tree, pod, to, target)):
                        yield f"infra/connections.yaml: {one['to']}: {why}"
    for where, _, pods, port in scraped(tree):
        for pod in pods:
            number = pod.port(port)
            for prometheus in _sources(tree, "monitoring/prometheus"):
                if number is not None and (why := connects(tree, prometheus, pod, number)):
                    yield f"{where}: {why}"


def _sources(tree: Tree, named: str) -> list[Pod]:
    """Pods by `namespace/name`: by the label app.kubernetes.io/name, or as infra/charts.yaml names them."""
    namespace, _, name = named.partition("/")
    return [
        pod
        for pod in tree.pods
        if pod.namespace == namespace
        and (pod.labels.get("app.kubernetes.io/name") == name or pod.where.endswith(f" {name}"))
    ]


def _exports(tree: Tree) -> Iterator[str]:
    """Exported Services have both markers, meshed pods that accept Linkerd's gateway, and a name in studio."""
    namespaces = {one["metadata"]["name"] for one in tree.studio if one["kind"] == "Namespace"}
    rewrites = " ".join(str(one.get("data")) for one in tree.studio if one["kind"] == "ConfigMap")
    for where, one in tree.services:
        metadata, namespace = one["metadata"], one["metadata"]["namespace"]
        exported = (metadata.get("labels") or {}).get(EXPORTED) == "true"
        if exported != ((metadata.get("annotations") or {}).get(DOCUMENTED) == "true"):
            yield f"{where}: has only one of the two markers of an exported Service, {EXPORTED} and {DOCUMENTED}"
        if not exported:
            continue
        if namespace not in namespaces:
            yield f"{where}: is exported, but infra/studio has no namespace {namespace} to mirror it into"
        if "svc\\.forge\\.remote" not in rewrites.replace("\\\\", "\\"):
            yield f"{where}: is exported, but infra/studio does not rewrite its name"
        for pod in tree.selected(namespace, one["spec"]["selector"]):
            if not _meshed(pod):
                yield f"{where}: is exported, but {pod.where} is not meshed ({INJECT}: enabled)"
            gateway = Pod("Linkerd's gateway", GATEWAY, {"app": "linkerd-gateway"}, {}, {}, "Pod")
            if why := connects(tree, gateway, pod, PROXY):
                yield f"{where}: {why}"
