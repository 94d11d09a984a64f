"""Each alert fires when it should, stays silent otherwise, and has a runbook. Checked with promtool."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from forge.cluster.nodes import all_nodes
from forge.core.settings import PROJECT

RULES = PROJECT / "infra" / "apps" / "monitoring" / "rules"
RUNBOOKS = PROJECT / "docs" / "runbooks.md"
GPU = 'gpu="0", Hostname="forge-worker-3"'
POD = 'pod="a1-n3-0", namespace="homelab-production"'
Series = dict[str, str]  # series with labels -> values in promtool's notation, one per minute

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is missing: apt-get install prometheus"
)


class Case(NamedTuple):
    """Series for which an alert fires after `minutes` with these labels, and series for which it does not."""

    alert: str
    fires: Series
    labels: dict[str, str]
    silent: Series
    minutes: int = 90


def gpu(metric: str, values: str, **labels: str) -> Series:
    """A series of a node's first GPU."""
    more = "".join(f', {name}="{value}"' for name, value in labels.items())
    return {f"{metric}{{{GPU}{more}}}": values}


def six(values: str, count: int = 6) -> Series:
    """The utilization of `count` GPUs."""
    return {f'DCGM_FI_DEV_GPU_UTIL{{gpu="{n}"}}': values for n in range(count)}


def first_token(seconds: str) -> Series:
    """A histogram in which every request takes less than 10 s, and half of them `seconds`."""
    labels = 'service="vllm", namespace="ml-inference"'
    return {
        f'vllm:time_to_first_token_seconds_bucket{{{labels}, le="{seconds}"}}': "0+50x120",
        f'vllm:time_to_first_token_seconds_bucket{{{labels}, le="10"}}': "0+100x120",
        f'vllm:time_to_first_token_seconds_bucket{{{labels}, le="+Inf"}}': "0+100x120",
    }


def up(service: str, values: str) -> Series:
    """Whether a Service in ml-inference is up."""
    return {f'up{{namespace="ml-inference", service="{service}"}}': values}


ON_GPU = {"gpu": "0", "Hostname": "forge-worker-3"}
OF_POD = {"pod": "a1-n3-0", "namespace": "homelab-production"}
DAY = "1+0x2880"
IDLE = {"exported_pod": "notebook", "exported_namespace": "ml-platform"}
DBE = "DCGM_FI_DEV_UNCORRECTABLE_REMAPPED_ROWS"
PHASE = f'kube_pod_status_phase{{{POD}, phase="Failed"}}'
PENDING = f'kube_pod_status_phase{{{POD}, phase="Pending"}}'
JOB = 'kube_job_status_failed{namespace="data-ml", job_name="minio-set-up"}'
VOLUME = '{namespace="data-ml", persistentvolumeclaim="data-minio-0"}'
POSTGRES = 'kube_statefulset_status_replicas_ready{namespace="ml-platform", statefulset="postgres"}'
BACKUP = 'kube_cronjob_status_last_successful_time{namespace="ml-platform", cronjob="postgres-backup"}'
CERTIFICATE = '{name="linkerd-identity-issuer", exported_namespace="linkerd"}'
OF_CERTIFICATE = {"name": "linkerd-identity-issuer", "exported_namespace": "linkerd"}
CASES = [
    Case("GPUTooHot", gpu("DCGM_FI_DEV_GPU_TEMP", "60+1x90"), ON_GPU, gpu("DCGM_FI_DEV_GPU_TEMP", "84+0x90")),
    Case("GPUXidError", gpu("DCGM_FI_DEV_XID_ERRORS", "79+0x90"), ON_GPU, gpu("DCGM_FI_DEV_XID_ERRORS", "0+0x90")),
    Case(
        "GPURowRemapFailed", gpu("DCGM_FI_DEV_ROW_REMAP_FAILURE", "0x60 1x60"), ON_GPU,
        gpu("DCGM_FI_DEV_ROW_REMAP_FAILURE", "0x120"),
    ),
    Case("GPUUncorrectableMemory", gpu(DBE, "3x60 4x60"), ON_GPU, gpu(DBE, "3x120")),
    Case("GPUPowerAboveLimit", gpu("DCGM_FI_DEV_POWER_USAGE", "420+0x90"), ON_GPU,
         gpu("DCGM_FI_DEV_POWER_USAGE", "395+0x90")),
    Case("GPUHeldButIdle", gpu("DCGM_FI_DEV_GPU_UTIL", "0+0x90", **IDLE), {**ON_GPU, **IDLE}, {
        **gpu("DCGM_FI_DEV_GPU_UTIL", "60+0x90", **IDLE), 'DCGM_FI_DEV_GPU_UTIL{gpu="1"}': "0+0x90",
        'DCGM_FI_DEV_GPU_UTIL{gpu="2", exported_pod="vllm-0", exported_namespace="ml-inference"}': "0+0x90",
    }),
    Case("GPUMemoryNearlyFull",
         {**gpu("DCGM_FI_DEV_FB_USED", "40000+0x90"), **gpu("DCGM_FI_DEV_FB_FREE", "400+0x90")}, ON_GPU,
         {**gpu("DCGM_FI_DEV_FB_USED", "37000+0x90"), **gpu("DCGM_FI_DEV_FB_FREE", "3400+0x90")}),
    Case("GPUMissing", six("1x90", 5), {}, six("1x90")),
    Case("VLLMDown", up("vllm", "1x60 0x60"), {}, up("vllm", "1x120")),
    Case("VLLMSlowFirstToken", first_token("4"), {"service": "vllm"}, first_token("0.5") | {
        'vllm:time_to_first_token_seconds_bucket{service="vllm", namespace="ml-inference", le="0.5"}': "0+99x120",
    }),
    Case("VLLMQueueGrows", {'vllm:num_requests_waiting{service="vllm"}': "0+1x90"}, {"service": "vllm"},
         {'vllm:num_requests_waiting{service="vllm"}': "20x90"}),
    Case("VLLMKVCacheFull", {'vllm:kv_cache_usage_perc{service="vllm"}': "0.99x90"}, {"service": "vllm"},
         {'vllm:kv_cache_usage_perc{service="vllm"}': "0.9x90"}),
    Case("VLLMErrors",
         {'forge_request_errors_total{version="dates-1"}': "0+5x90",
          'forge_requests_total{version="dates-1"}': "0+99x90"},
         {"version": "dates-1"},
         {'forge_request_errors_total{version="dates-1"}': "0+1x90",
          'forge_requests_total{version="dates-1"}': "0+99x90"}),
    Case("ReconcilerDown", up("vllm-reconciler", "0x90"), {}, up("vllm-reconciler", "1x90")),
    Case("NotServingAsDesired", {"forge_serving_as_desired": "0x90"}, {}, {"forge_serving_as_desired": "1x60 0x30"}),
    Case("VersionCannotBeServed", {'forge_serving_failed{version="dates-2"}': "1x90"}, {"version": "dates-2"},
         {"forge_serving_as_desired": "1x90"}),
    Case("TrainingStalled",
         {f"forge_training_step{{{POD}}}": "0+1x30 30x60", f"forge_training_steps{{{POD}}}": "500x90"}, OF_POD,
         {f"forge_training_step{{{POD}}}": "0+1x30 30x60", f"forge_training_steps{{{POD}}}": "30x90"}),
    Case("TrainingLossNotFinite", {f"forge_training_loss{{{POD}}}": "2x30" + 60 * " NaN"}, OF_POD,
         {f"forge_training_loss{{{POD}}}": "2-0.01x90"}),
    Case("TrainingSkipsSteps", {f"forge_training_skipped_steps_total{{{POD}}}": "0x30 5x60"}, OF_POD,
         {f"forge_training_skipped_steps_total{{{POD}}}": "5x90"}, 60),
    Case("RunFailed", {PHASE: "1x90"}, OF_POD, {PHASE: "0x90"}),
    Case("RunPending", {PENDING: "1x90"}, OF_POD, {PENDING: "1x20 0x70"}),
    Case("JobFailed", {JOB: "1x90"}, {"namespace": "data-ml", "job_name": "minio-set-up"}, {JOB: "0x90"}),
    Case("VolumeNearlyFull",
         {f"kubelet_volume_stats_available_bytes{VOLUME}": "5x90",
          f"kubelet_volume_stats_capacity_bytes{VOLUME}": "100x90"},
         {"namespace": "data-ml", "persistentvolumeclaim": "data-minio-0"},
         {f"kubelet_volume_stats_available_bytes{VOLUME}": "50x90",
          f"kubelet_volume_stats_capacity_bytes{VOLUME}": "100x90"}),
    Case("NodeDiskNearlyFull",
         {'node_filesystem_avail_bytes{instance="n", mountpoint="/"}': "5x90",
          'node_filesystem_size_bytes{instance="n", mountpoint="/"}': "100x90"}, {"instance": "n", "mountpoint": "/"},
         {'node_filesystem_avail_bytes{instance="n", mountpoint="/boot"}': "5x90",
          'node_filesystem_size_bytes{instance="n", mountpoint="/boot"}': "100x90"}),
    Case("StoreNearlyFull",
         {"minio_cluster_capacity_usable_free_bytes": "5x90", "minio_cluster_capacity_usable_total_bytes": "99x90"}, {},
         {"minio_cluster_capacity_usable_free_bytes": "50x90", "minio_cluster_capacity_usable_total_bytes": "99x90"}),
    Case("StoreDriveOffline", {"minio_cluster_drive_offline_total": "1x90"}, {},
         {"minio_cluster_drive_offline_total": "0x90"}),
    Case("DatabaseDown", {POSTGRES: "0x90"}, {"namespace": "ml-platform", "statefulset": "postgres"},
         {POSTGRES: "1x90"}),
    Case("BackupMissing", {BACKUP: "0x2880"}, {"namespace": "ml-platform", "cronjob": "postgres-backup"},
         {BACKUP: "86400x2880"}, 2400),
    Case("CertificateExpiresSoon", {f"certmanager_certificate_expiration_timestamp_seconds{CERTIFICATE}": "600000x90"},
         OF_CERTIFICATE, {f"certmanager_certificate_expiration_timestamp_seconds{CERTIFICATE}": "7776000x90"}),
    Case("CertificateNotReady", {f'certmanager_certificate_ready_status{CERTIFICATE[:-1]}, condition="True"}}': "0x90"},
         {**OF_CERTIFICATE, "condition": "True"},
         {f'certmanager_certificate_ready_status{CERTIFICATE[:-1]}, condition="True"}}': "1x90",
          f'certmanager_certificate_ready_status{CERTIFICATE[:-1]}, condition="False"}}': "0x90"}),
]  # fmt: skip


def alerts() -> dict[str, dict[str, Any]]:
    """All alerts of the manifests, by name."""
    specs = [
        yaml.safe_load(path.read_text())["spec"]
        for path in sorted(RULES.glob("*.yaml"))
        if path.stem != "kustomization"
    ]
    return {rule["alert"]: rule for spec in specs for group in spec["groups"] for rule in group["rules"]}


def expected(rule: dict[str, Any], labels: dict[str, str]) -> dict[str, Any]:
    """What promtool should report for an alert that fires with these labels."""
    fill = {
        name: re.sub(r"{{ \$labels\.(\w+) }}", lambda found: labels[found[1]], text)
        for name, text in rule["annotations"].items()
    }
    return {"exp_labels": {**labels, **rule["labels"]}, "exp_annotations": fill}


@pytest.fixture(scope="module")
def rules_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All rules in one file, as Prometheus reads them."""
    path = tmp_path_factory.mktemp("rules") / "rules.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "forge", "rules": list(alerts().values())}]}))
    return path


@needs_promtool
def test_prometheus_accepts_the_rules(rules_file: Path) -> None:
    done = subprocess.run(["promtool", "check", "rules", str(rules_file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(alerts())} rules found" in done.stdout


@needs_promtool
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.alert)
def test_alert_fires_when_it_should_and_only_then(case: Case, rules_file: Path, tmp_path: Path) -> None:
    rule = alerts()[case.alert]
    tests = [
        {
            "interval": "1m",
            "input_series": [{"series": name, "values": values} for name, values in series.items()],
            "alert_rule_test": [{"eval_time": f"{case.minutes}m", "alertname": case.alert, "exp_alerts": found}],
        }
        for series, found in ((case.fires, [expected(rule, case.labels)]), (case.silent, []))
    ]
    file = tmp_path / "test.yaml"
    file.write_text(yaml.safe_dump({"rule_files": [str(rules_file)], "evaluation_interval": "1m", "tests": tests}))
    done = subprocess.run(["promtool", "test", "rules", str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tested_and_has_a_runbook() -> None:
    assert sorted(case.alert for case in CASES) == sorted(alerts())
    headings = {line[3:].strip().lower() for line in RUNBOOKS.read_text().splitlines() if line.startswith("## ")}
    for name, rule in alerts().items():
        assert rule["annotations"]["runbook_url"] == f"docs/runbooks.md#{name.lower()}"
        assert name.lower() in headings
        assert rule["labels"]["severity"] in ("warning", "critical")
    assert headings - {"before anything else"} == {name.lower() for name in alerts()}


def test_gpu_missing_alert_uses_the_number_of_gpus() -> None:
    count = sum(node.gpus.count for node in all_nodes() if node.gpus)
    assert f"< {count} or" in alerts()["GPUMissing"]["expr"]
