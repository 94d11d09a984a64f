"""Broken manifests are caught: each mutation is one mistake, and the finding that it must cause."""

import re
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from forge.core.settings import PROJECT
from infra.check.__main__ import findings
from infra.check.tree import Tree, read_tree

INFRA = PROJECT / "infra"
VLLM = "apps/ml-inference/vllm"
NIGHT = "apps/ml-inference/vllm-night"
OLLAMA = "apps/ml-inference/ollama"


class Mutation(NamedTuple):
    """Replace `old` by `new` in a file; then a finding must match the pattern `finding`."""

    name: str
    file: str
    old: str
    new: str
    finding: str


MUTATIONS = [
    Mutation("a Service's port does not exist", f"{OLLAMA}/service.yaml", "targetPort: http", "targetPort: web",
             "Service ollama: port 11434 targets web"),
    Mutation("a Service selects nothing", f"{OLLAMA}/service.yaml", "selector:\n    app.kubernetes.io/name: ollama",
             "selector:\n    app: ollama", "Service ollama: its selector matches no pods"),
    Mutation("pods without the selector's label", f"{OLLAMA}/deployment.yaml",
             "  template:\n    metadata:\n      labels:\n        app.kubernetes.io/name: ollama",
             "  template:\n    metadata:\n      labels:\n        app.kubernetes.io/name: olama",
             "Deployment ollama: its selector does not match its own pods"),
    Mutation("a bad indent", f"{OLLAMA}/service.yaml", "  ports:", "   ports:", "ollama: does not build"),
    Mutation("an unknown field", f"{OLLAMA}/deployment.yaml", "enableServiceLinks: false",
             "enableServiceLinks: false\n      enableServiceLink: false", "Deployment ollama: .*enableServiceLink"),
    Mutation("a field of the wrong type", f"{OLLAMA}/deployment.yaml", "replicas: 1", "replicas: one",
             "Deployment ollama: .*one"),
    Mutation("no selector", f"{VLLM}/deployment.yaml",
             "  selector:\n    matchLabels:\n      app.kubernetes.io/name: vllm\n", "", "Deployment vllm: .*selector"),
    Mutation(":latest", f"{VLLM}/deployment.yaml", "vllm/vllm-openai:v0.32.0", "vllm/vllm-openai:latest",
             "vllm-openai:latest has no version tag"),
    Mutation("a version not in the table", f"{NIGHT}/deployment.yaml", "vllm/vllm-openai:v0.32.0",
             "vllm/vllm-openai:v0.31.0", "image vllm/vllm-openai:v0.31.0 is not in infra/versions.yaml"),
    Mutation("no limit", f"{OLLAMA}/deployment.yaml", "limits: {memory: 32Gi}", "limits: {}",
             "ollama: resources.limits.memory is missing"),
    Mutation("no probe", f"{VLLM}/deployment.yaml", "readinessProbe:", "lifecycle: {}\n          startupProbe:",
             "(has no readinessProbe|does not build)"),
    Mutation("a probe of a missing port", f"{VLLM}/reconciler.yaml", "{path: /healthz, port: status}",
             "{path: /healthz, port: health}", "vllm-reconciler: the livenessProbe of reconciler uses port health"),
    Mutation("privileges", f"{VLLM}/reconciler.yaml",
             "securityContext:\n            allowPrivilegeEscalation: false\n            capabilities:\n"
             "              drop: [ALL]\n          livenessProbe", "livenessProbe", "allowPrivilegeEscalation is not"),
    Mutation("root", f"{OLLAMA}/deployment.yaml", "runAsNonRoot: true", "runAsNonRoot: false",
             "ollama: may run as root"),
    Mutation("service links", f"{VLLM}/deployment.yaml", "enableServiceLinks: false",
             "enableServiceLinks: true", "VLLM_PORT in pods"),
    Mutation("CUDA_VISIBLE_DEVICES", f"{NIGHT}/deployment.yaml", "- {name: DO_NOT_TRACK, value: \"1\"}",
             "- {name: CUDA_VISIBLE_DEVICES, value: \"0,1\"}", "sets CUDA_VISIBLE_DEVICES"),
    Mutation("no shared memory", f"{NIGHT}/deployment.yaml", "medium: Memory\n            sizeLimit: 20Gi",
             "sizeLimit: 20Gi", "need /dev/shm"),
    Mutation("no runtime class", f"{NIGHT}/deployment.yaml", "runtimeClassName: nvidia", "dnsPolicy: ClusterFirst",
             "runtimeClassName is not nvidia"),
    Mutation("a GPU for Ollama", f"{OLLAMA}/deployment.yaml", "limits: {memory: 32Gi}",
             "limits: {memory: 32Gi, nvidia.com/gpu: \"1\"}", "Deployment ollama: no node has room for it"),
    Mutation("more cores than a node has", f"{OLLAMA}/deployment.yaml", 'cpu: "8", memory: 16Gi',
             'cpu: "62", memory: 16Gi', "no node has room for it"),
    Mutation("a missing node", f"{OLLAMA}/deployment.yaml", "role: inference", "role: inferences",
             "Deployment ollama: no node has room for it"),
    Mutation("no toleration", f"{NIGHT}/deployment.yaml",
             "tolerations:\n        - {key: nvidia.com/gpu, operator: Equal, value: present, effect: NoSchedule}",
             "tolerations: []", "Deployment vllm-night: no node has room for it"),
    Mutation("a surge pod on full nodes", f"{NIGHT}/deployment.yaml", "type: Recreate", "type: RollingUpdate",
             "Deployment vllm-night: no node has room for it"),
    Mutation("night serving overlaps the day", f"{NIGHT}/schedule.yaml", "end: 55 6 * * *", "end: 0 9 * * *",
             "ScaledObject vllm-night: runs at 7:00"),
    Mutation("another time zone", f"{NIGHT}/schedule.yaml", "America/Sao_Paulo", "Etc/UTC", "is not America/Sao_Paulo"),
    Mutation("a schedule of a missing Deployment", f"{NIGHT}/schedule.yaml", "name: vllm-night\n  minReplicaCount",
             "name: vllm-nights\n  minReplicaCount", "there is no Deployment vllm-nights to scale"),
    Mutation("only one export marker", f"{VLLM}/service.yaml", 'mirror.linkerd.io/exported: "true"', "tier: serving",
             "Service vllm: has only one of the two markers"),
    Mutation("exported, not meshed", f"{VLLM}/deployment.yaml", "linkerd.io/inject: enabled",
             "linkerd.io/inject: disabled", "is not meshed"),
    Mutation("the gateway is blocked", f"{NIGHT}/networkpolicy.yaml", "linkerd-multicluster", "linkerd",
             "do not allow ingress from Linkerd's gateway on port 4143"),
    Mutation("Prometheus is blocked", f"{VLLM}/networkpolicy.yaml",
             "values: [homelab-production, monitoring]\n      ports:\n        - port: 8001",
             "values: [homelab-production]\n      ports:\n        - port: 8001",
             "do not allow ingress from .* on port 8001"),
    Mutation("proxy-to-proxy traffic is blocked", "apps/ml-platform/mlflow/networkpolicy.yaml",
             "        - port: 4143 # both pods are meshed\n", "", "do not allow egress to .*minio.* on port 4143"),
    Mutation("a policy for a wrong port", f"{OLLAMA}/networkpolicy.yaml", "port: 4143", "port: 4142",
             "allows port 4142"),
    Mutation("no default deny", "apps/ml-inference/namespace/network.yaml", "[Ingress, Egress]", "[Egress]",
             "no NetworkPolicy denies Ingress by default"),
    Mutation("a missing ConfigMap", f"{VLLM}/reconciler.yaml", "name: forge-settings", "name: forge-setting",
             "there is no ConfigMap forge-setting"),
    Mutation("a missing key of a Secret", f"{VLLM}/reconciler.yaml", "key: s3-access-key", "key: s3-key",
             "Secret forge-secrets has no key s3-key"),
    Mutation("a missing volume", f"{OLLAMA}/deployment.yaml", "claimName: ollama-models", "claimName: models",
             "there is no PersistentVolumeClaim models"),
    Mutation("a mount of no volume", f"{VLLM}/deployment.yaml", "- name: shm\n              mountPath", "- name: dshm\n"
             "              mountPath", "vllm mounts dshm"),
    Mutation("a missing permission", f"{VLLM}/rbac.yaml", "resources: [replicasets]\n    verbs: [list]",
             "resources: [replicasets]\n    verbs: [get]", "no Role grants list replicasets"),
    Mutation("a missing account", f"{VLLM}/reconciler.yaml", "serviceAccountName: vllm-reconciler",
             "serviceAccountName: vllm", "there is no ServiceAccount vllm in ml-inference"),
    Mutation("permissions for a missing account", f"{VLLM}/rbac.yaml",
             "name: forge-rollout\n    namespace: homelab-production",
             "name: forge-rollouts\n    namespace: homelab-production",
             "there is no ServiceAccount forge-rollouts in homelab-production"),
    Mutation("production cannot reach reconciler", "apps/homelab-production/forge/networkpolicy.yaml",
             "        - port: 8001\n", "        - port: 8002\n", "not allow egress to .*vllm-reconciler on port 8001"),
    Mutation("a missing priority class", f"{VLLM}/deployment.yaml", "forge-serving", "forge-service",
             "there is no PriorityClass forge-service"),
    Mutation("a default credential", f"{OLLAMA}/deployment.yaml", "- {name: HOME, value: /models}",
             "- {name: HOME, value: /models}\n            - {name: S3_SECRET_KEY, value: minioadmin}",
             "default credential"),
    Mutation("a file that is not applied", f"{OLLAMA}/kustomization.yaml", "  - volume.yaml\n", "",
             "volume.yaml is not in kustomization.yaml"),
    Mutation("an unknown API version", f"{VLLM}/disruption.yaml", "policy/v1", "policy/v1beta1",
             "there is no schema for policy/v1beta1"),
    Mutation("a host path in a restricted namespace", "apps/ml-inference/namespace/namespace.yaml",
             "enforce: privileged", "enforce: restricted", "hostPath is not allowed in ml-inference"),
    Mutation("a tool version not in the table", "versions.yaml", "v1.34.6+k3s1", "v1.35.0+k3s1",
             "k3s/README.md does not name k3s v1.35.0"),
    Mutation("an unknown chart value", "apps/keda/keda/release.yaml", "nodeSelector:", "nodeSelectors:",
             "values.nodeSelectors: the chart has no such value"),
    Mutation("a wrong chart version", "apps/keda/keda/release.yaml", "version: 2.20.2", "version: 2.20.1",
             "HelmRelease keda/keda: version 2.20.1"),
    Mutation("a dependency cycle", "flux/kustomizations.yaml",
             "path: ./infra/apps/cert-manager/namespace",
             "path: ./infra/apps/cert-manager/namespace\n  dependsOn:\n    - name: secrets", "depends on itself"),
    Mutation("a scrape without targets", "apps/monitoring/monitors/platform.yaml", "app.kubernetes.io/name: minio",
             "app: minio", "ServiceMonitor minio: matches nothing to scrape"),
    Mutation("a name that studio does not rewrite", "studio/dns.yaml", "svc\\.forge", "svc\\.forges",
             "does not rewrite its name"),
    Mutation("a password in a chart's values", "apps/monitoring/kube-prometheus-stack/release.yaml",
             "passwordKey: admin-password", "passwordKey: admin-password\n        adminPassword: hunter2",
             "(is a credential in git|has no such value)"),
    Mutation("a node without its taint", "k3s/forge-worker-3.yaml", "nvidia.com/gpu=present:NoSchedule",
             "nvidia.com/gpu=here:NoSchedule", "node-taint lacks nvidia.com/gpu=present:NoSchedule"),
    Mutation("one training node fewer", "nodes.yaml", "name: forge-worker-4\n    role: training",
             "name: forge-worker-4\n    role: platform", "no node has room for it"),
]  # fmt: skip


def caught(mutation: Mutation, folder: Path) -> list[str]:
    """The findings for the manifests with this mistake."""
    copy = shutil.copytree(INFRA, folder / "infra", ignore=shutil.ignore_patterns("schemas", "check"))
    file = copy / mutation.file
    text = file.read_text()
    assert mutation.old in text, f"{mutation.file} has no {mutation.old!r}"
    file.write_text(text.replace(mutation.old, mutation.new, 1))
    return sorted(set(findings(read_tree(copy))))


def test_all_are_caught(
    tree: Tree, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    assert list(findings(tree)) == []
    found = {one.name: caught(one, tmp_path_factory.mktemp("mutation")) for one in MUTATIONS}
    missed = {
        one.name: found[one.name]
        for one in MUTATIONS
        if not any(re.search(one.finding, each) for each in found[one.name])
    }
    with capsys.disabled():
        print(f"\nmutations of the manifests: {len(found) - len(missed)} caught / {len(found)} tried")
    assert missed == {}
    assert len(found) >= 30
