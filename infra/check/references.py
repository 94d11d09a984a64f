"""References between objects resolve: names, ports, labels, keys and versions."""

from collections.abc import Iterator
from typing import Any

from forge.serving.kubernetes_target import CALLS
from infra.check.tree import BUILTIN, WORKLOADS, Object, Pod, Tree, at, key, matches, name_of

LOCAL_STORAGE = {"local-path"}  # built into k3s


def check_references(tree: Tree) -> Iterator[str]:
    """References that do not resolve."""
    yield from _namespaces(tree)
    yield from _workloads(tree)
    yield from _services(tree)
    yield from _accounts(tree)
    yield from _volumes_and_variables(tree)
    yield from _scrapes(tree)
    yield from _scaled(tree)
    yield from _flux(tree)
    yield from _versions(tree)


def _namespaces(tree: Tree) -> Iterator[str]:
    namespaces = {one["metadata"]["name"] for _, one in tree.of("Namespace")} | BUILTIN
    for where, one in tree.objects:
        namespace = one["metadata"].get("namespace")
        if namespace is not None and namespace not in namespaces:
            yield f"{name_of(where, one)}: there is no namespace {namespace} in infra/apps"
    seen: dict[tuple[str, str, str], str] = {}
    for where, one in tree.objects:
        named = (str(one.get("apiVersion")), str(one.get("kind")), key(one))
        if named in seen and seen[named] != where:
            yield f"{name_of(where, one)}: is also in {seen[named]}; define each object once"
        seen[named] = where


def _workloads(tree: Tree) -> Iterator[str]:
    classes = {one["metadata"]["name"] for _, one in tree.of("PriorityClass")}
    classes |= {"system-cluster-critical", "system-node-critical"}
    runtimes = {name.partition("/")[2] for name in _created(tree) if name.startswith("RuntimeClass/")}
    for where, one in tree.of("Deployment", "StatefulSet", "DaemonSet"):
        selector = one["spec"].get("selector") or {}
        labels = at(one, "spec.template.metadata.labels") or {}
        if not selector or not matches(selector, labels):
            yield f"{where}: its selector does not match its own pods"
        others = [pod for pod in tree.selected(one["metadata"].get("namespace", ""), selector) if pod.where != where]
        if others:
            yield f"{where}: its selector also matches the pods of {others[0].where}"
    for pod in tree.pods:
        if (name := pod.spec.get("priorityClassName")) and name not in classes:
            yield f"{pod.where}: there is no PriorityClass {name}"
        if (name := pod.spec.get("runtimeClassName")) and name not in runtimes:
            yield f"{pod.where}: nothing creates the RuntimeClass {name}"
        for container in pod.containers:
            for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                port = at(container, f"{probe}.httpGet.port") or at(container, f"{probe}.tcpSocket.port")
                if port is not None and pod.port(port) is None:
                    yield f"{pod.where}: the {probe} of {container['name']} uses port {port}, which it does not have"
    for where, one in tree.of("PodDisruptionBudget"):
        if not tree.selected(one["metadata"]["namespace"], one["spec"].get("selector")):
            yield f"{where}: its selector matches no pods"


def _services(tree: Tree) -> Iterator[str]:
    for where, one in tree.services:
        spec = one["spec"]
        if not spec.get("selector"):
            continue
        found = tree.selected(one["metadata"]["namespace"], spec["selector"])
        if not found:
            yield f"{where}: its selector matches no pods"
        for port in spec.get("ports", []):
            target = port.get("targetPort", port["port"])
            for pod in found:
                if pod.port(target) is None:
                    yield f"{where}: port {port['port']} targets {target}, which {pod.where} does not have"


def _accounts(tree: Tree) -> Iterator[str]:
    accounts = {key(one) for _, one in tree.of("ServiceAccount")}
    accounts |= {name.partition("/")[2] for name in _created(tree) if name.startswith("ServiceAccount/")}
    accounts |= {f"{one['metadata']['name']}/default" for _, one in tree.of("Namespace")} | {"default/default"}
    roles = {f"{one['kind']}/{key(one)}" for _, one in tree.of("Role", "ClusterRole")}
    roles |= {f"ClusterRole//{name}" for name in ("view", "edit", "admin", "cluster-admin")}
    for pod in tree.pods:
        name = pod.spec.get("serviceAccountName", "default")
        if not pod.chart and f"{pod.namespace}/{name}" not in accounts and pod.namespace not in BUILTIN:
            yield f"{pod.where}: there is no ServiceAccount {name} in {pod.namespace}"
    for where, one in tree.of("RoleBinding", "ClusterRoleBinding"):
        role = one["roleRef"]
        home = one["metadata"].get("namespace", "") if role["kind"] == "Role" else ""
        if f"{role['kind']}/{home}/{role['name']}" not in roles:
            yield f"{where}: there is no {role['kind']} {role['name']}"
        for subject in one.get("subjects") or []:
            if subject["kind"] == "ServiceAccount" and f"{subject['namespace']}/{subject['name']}" not in accounts:
                yield f"{where}: there is no ServiceAccount {subject['name']} in {subject['namespace']}"
    granted = {
        (verb, resource)
        for _, one in tree.of("Role") if one["metadata"]["name"] in ("vllm-reconciler", "forge-rollout")
        for rule in one["rules"] for resource in rule["resources"] for verb in rule["verbs"]
    }  # fmt: skip
    for verb, resource in sorted(set(CALLS) - granted):
        yield f"infra/apps/ml-inference/vllm: no Role grants {verb} {resource} (forge/serving/kubernetes_target.py)"


def _created(tree: Tree) -> set[str]:
    """Objects of charts, controllers and k3s that manifests refer to: `Kind/namespace/name`, or `Kind/name`."""
    return {
        name for chart in tree.lists["charts"] if chart["release"] in tree.releases for name in chart.get("makes", [])
    }


def _keys(tree: Tree) -> dict[str, set[str] | None]:
    """The keys of each ConfigMap and Secret, as `Kind/namespace/name`; None if they are unknown."""
    found: dict[str, set[str] | None] = {
        f"{one['kind']}/{key(one)}": {*(one.get("data") or {}), *(one.get("binaryData") or {})}
        for _, one in tree.of("ConfigMap", "Secret")
    }
    found |= {f"{one['kind']}/{one['namespace']}/{one['name']}": set(one["keys"]) for one in tree.lists["external"]}
    found |= {
        f"Secret/{one['metadata']['namespace']}/{one['spec']['secretName']}": {"tls.crt", "tls.key", "ca.crt"}
        for _, one in tree.of("Certificate")
    }
    return found | {name: None for name in _created(tree) if name.startswith(("ConfigMap/", "Secret/"))}


def sources_of(spec: Object) -> Iterator[tuple[str, str, str | None, bool]]:
    """The ConfigMaps and Secrets that a pod uses: kind, name, key (None for all), and whether it is optional."""
    for container in [*spec.get("initContainers", []), *spec.get("containers", [])]:
        for source in container.get("envFrom") or []:
            for field, kind in (("configMapRef", "ConfigMap"), ("secretRef", "Secret")):
                if one := source.get(field):
                    yield kind, one["name"], None, one.get("optional", False)
        for variable in container.get("env") or []:
            for field, kind in (("configMapKeyRef", "ConfigMap"), ("secretKeyRef", "Secret")):
                if one := (variable.get("valueFrom") or {}).get(field):
                    yield kind, one["name"], one["key"], one.get("optional", False)
    for volume in spec.get("volumes") or []:
        for source in [volume, *((volume.get("projected") or {}).get("sources") or [])]:
            for field, kind in (("configMap", "ConfigMap"), ("secret", "Secret")):
                if one := source.get(field):
                    name = one.get("name") or one.get("secretName")
                    for item in one.get("items") or [{}]:
                        yield kind, name, item.get("key"), one.get("optional", False)


def _volumes_and_variables(tree: Tree) -> Iterator[str]:
    keys = _keys(tree)
    used = set()
    claims = {key(one) for _, one in tree.of("PersistentVolumeClaim")}
    storage = {one["metadata"]["name"] for _, one in tree.of("StorageClass")} | LOCAL_STORAGE
    for pod in tree.pods:
        for kind, name, item, optional in sources_of(pod.spec):
            named = f"{kind}/{pod.namespace}/{name}"
            used.add(named)
            if named not in keys:
                if not optional:
                    yield f"{pod.where}: there is no {kind} {name} in {pod.namespace}, nor in infra/external.yaml"
            elif item is not None and not optional and keys[named] is not None and item not in (keys[named] or ()):
                yield f"{pod.where}: {kind} {name} has no key {item}"
        mounts = {one["name"] for one in pod.spec.get("volumes") or []}
        mounts |= {one for one, kind in _templates_of(tree, pod)}
        for container in [*pod.spec.get("initContainers", []), *pod.containers]:
            for mount in container.get("volumeMounts") or []:
                if mount["name"] not in mounts:
                    yield f"{pod.where}: {container['name']} mounts {mount['name']}, which is not a volume of the pod"
        for volume in pod.spec.get("volumes") or []:
            if (claim := at(volume, "persistentVolumeClaim.claimName")) and f"{pod.namespace}/{claim}" not in claims:
                yield f"{pod.where}: there is no PersistentVolumeClaim {claim} in {pod.namespace}"
    for where, one in tree.of("PersistentVolumeClaim", "StatefulSet"):
        specs = [one["spec"]] if one["kind"] == "PersistentVolumeClaim" else [
            claim["spec"] for claim in one["spec"].get("volumeClaimTemplates") or []
        ]  # fmt: skip
        for spec in specs:
            if spec.get("storageClassName") not in storage:
                yield f"{where}: there is no StorageClass {spec.get('storageClassName')}"
    text = "\n".join(str(one) for _, one in tree.objects)
    for one in tree.lists["external"]:
        named = f"{one['kind']}/{one['namespace']}/{one['name']}"
        if named not in used and one["name"] not in text and not one.get("by"):
            yield f"infra/external.yaml: nothing uses {named}"


def _templates_of(tree: Tree, pod: Pod) -> list[tuple[str, str]]:
    """The volumes of a StatefulSet's claim templates."""
    return [
        (claim["metadata"]["name"], one["kind"])
        for where, one in tree.of("StatefulSet") if where == pod.where
        for claim in one["spec"].get("volumeClaimTemplates") or []
    ]  # fmt: skip


def scraped(tree: Tree) -> Iterator[tuple[str, str, list[Pod], int | str]]:
    """Each endpoint that Prometheus scrapes: its monitor, the namespace, the pods (maybe none) and their port."""
    for where, one in tree.of("ServiceMonitor", "PodMonitor"):
        spec, home = one["spec"], one["metadata"]["namespace"]
        every = at(spec, "namespaceSelector.any")
        namespaces = at(spec, "namespaceSelector.matchNames") or [home]
        for namespace in [""] if every else namespaces:
            if one["kind"] == "PodMonitor":
                pods = [
                    pod for pod in tree.pods if pod.namespace == namespace and matches(spec["selector"], pod.labels)
                ]
                for end in spec["podMetricsEndpoints"]:
                    yield where, namespace, pods, end.get("port") or end.get("portNumber") or end.get("targetPort")
                continue
            services = [
                service for _, service in tree.services
                if service["metadata"]["namespace"] == namespace
                and matches(spec["selector"], service["metadata"].get("labels") or {})
            ]  # fmt: skip
            for end in spec["endpoints"]:
                found: list[Pod] = []
                target: int | str = end.get("port") or end.get("targetPort")
                for service in services:
                    for port in service["spec"]["ports"]:
                        if port.get("name") == end.get("port") or "targetPort" in end:
                            target = end.get("targetPort") or port.get("targetPort", port["port"])
                            found += tree.selected(namespace, service["spec"].get("selector"))
                yield where, namespace, found, target


def _scrapes(tree: Tree) -> Iterator[str]:
    for where, namespace, pods, port in scraped(tree):
        if not pods and not any(one["where"] in where for one in tree.lists["exceptions"] if one["rule"] == "scraped"):
            yield f"{where}: matches nothing to scrape in {namespace}; check the Service's labels and port names"
        for pod in pods:
            if pod.port(port) is None:
                yield f"{where}: {pod.where} has no port {port}"


def _scaled(tree: Tree) -> Iterator[str]:
    named = {f"{one['kind']}/{key(one)}" for _, one in tree.of(*WORKLOADS)}
    for where, one in tree.of("ScaledObject"):
        target = one["spec"]["scaleTargetRef"]
        if f"{target.get('kind', 'Deployment')}/{one['metadata']['namespace']}/{target['name']}" not in named:
            yield f"{where}: there is no {target.get('kind', 'Deployment')} {target['name']} to scale"


def _flux(tree: Tree) -> Iterator[str]:
    kustomizations = {one["metadata"]["name"]: one for one in tree.flux if one["kind"] == "Kustomization"}
    paths = {one["spec"]["path"].removeprefix("./"): name for name, one in kustomizations.items()}
    by_hand = {one["where"] for one in tree.lists["exceptions"] if one["rule"] == "by-hand"}
    for app in tree.apps:
        if f"infra/apps/{app}" not in paths and f"infra/apps/{app}" not in by_hand:
            yield f"infra/apps/{app}: no Kustomization of infra/flux applies it"
    for path, name in paths.items():
        if not (tree.root.parent / path).is_dir() and not (tree.root / path.removeprefix("infra/")).is_dir():
            yield f"infra/flux: Kustomization {name}: there is no {path}"
    for name, one in kustomizations.items():
        for other in one["spec"].get("dependsOn") or []:
            if other["name"] not in kustomizations:
                yield f"infra/flux: Kustomization {name}: depends on {other['name']}, which does not exist"
        if name in _before(kustomizations, name):
            yield f"infra/flux: Kustomization {name}: depends on itself"
        app = one["spec"]["path"].removeprefix("./infra/apps/")
        namespace = app.partition("/")[0]
        if f"{namespace}/namespace" in tree.apps and not app.endswith("/namespace"):
            home = paths.get(f"infra/apps/{namespace}/namespace")
            if home not in _before(kustomizations, name):
                yield f"infra/flux: Kustomization {name}: does not depend on its namespace ({home})"
    sources = {(one["kind"], one["metadata"]["name"]) for _, one in tree.objects if one["kind"].endswith("Repository")}
    for name, release in tree.releases.items():
        source = at(release, "spec.chart.spec.sourceRef") or at(release, "spec.chartRef") or {}
        if (source.get("kind"), source.get("name")) not in sources:
            yield f"HelmRelease {name}: there is no {source.get('kind')} {source.get('name')}"


def _before(kustomizations: dict[str, Object], name: str) -> set[str]:
    """Everything that a Kustomization depends on, directly or not."""
    found: set[str] = set()
    ahead = [one["name"] for one in kustomizations[name]["spec"].get("dependsOn") or []]
    while ahead:
        one = ahead.pop()
        if one not in found and one in kustomizations:
            found.add(one)
            ahead += [other["name"] for other in kustomizations[one]["spec"].get("dependsOn") or []]
    return found


def _versions(tree: Tree) -> Iterator[str]:
    """Charts and images are exactly those of infra/versions.yaml."""
    table: list[Any] = tree.lists["versions"]
    charts = {one["release"]: str(one["version"]) for one in table if "release" in one}
    tags = {(one["metadata"]["name"]): str(at(one, "spec.ref.tag")) for _, one in tree.of("OCIRepository")}
    for name, release in tree.releases.items():
        version = at(release, "spec.chart.spec.version") or tags.get(at(release, "spec.chartRef.name") or "")
        if charts.get(name) != version:
            yield f"HelmRelease {name}: version {version}, but infra/versions.yaml has {charts.get(name)}"
    for name in sorted(charts.keys() - tree.releases.keys()):
        yield f"infra/versions.yaml: there is no HelmRelease {name}"
    for one in table:
        if "tool" in one:
            file = tree.root / str(one["where"]).removeprefix("infra/")
            if not file.is_file() or str(one["version"]) not in file.read_text():
                yield f"infra/versions.yaml: {one['where']} does not name {one['tool']} {one['version']}"
    images = {
        f"{one['image']}:{one['tag']}" + (f"@{one['digest']}" if one.get("digest") else "")
        for one in table
        if "image" in one
    }
    used = set()
    for pod in tree.pods:
        for container in [*pod.spec.get("initContainers", []), *([] if pod.chart else pod.containers)]:
            image = container.get("image", "")
            used.add(image)
            if image not in images:
                yield f"{pod.where}: image {image} is not in infra/versions.yaml"
    for image in sorted(images - used):
        yield f"infra/versions.yaml: nothing uses image {image}"
