"""`forge doctor`: check that this machine has what a run needs. It changes nothing."""

import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from forge.core.errors import ForgeError
from forge.core.full_disk import existing, free_space

if TYPE_CHECKING:
    from forge.core.settings import Settings

FREE_GB = 5  # of disk space: the data set, checkpoints and packages of a small run
HARNESS = "from importlib.metadata import version; print(version('lm_eval'))"


@dataclass(frozen=True)
class Diagnosis:
    """What one check found. `optional` is for what only some recipes need."""

    name: str
    found: str
    fix: str = ""
    ok: bool = True
    optional: bool = False

    @property
    def state(self) -> str:
        """ok, optional or problem."""
        return "ok" if self.ok else "optional" if self.optional else "problem"


@click.command()
def doctor() -> None:
    """Check this machine: settings, environments, store, MLflow, port, GPUs and disk space.

    Nothing is changed. Exits with status 1 if there is a problem.
    """
    colours = {"ok": "green", "optional": "yellow", "problem": "red"}
    problems = 0
    for diagnosis in diagnose():
        problems += diagnosis.state == "problem"
        state = click.style(f"{diagnosis.state:8}", colours[diagnosis.state])
        click.echo(f"{state}  {diagnosis.name:12}  {diagnosis.found}")
        if diagnosis.fix:
            click.echo(f"{'':24}fix: {diagnosis.fix}")
    if problems:
        raise ForgeError(f"{problems} problem{'s' * (problems > 1)} found", fix="see the lines above")


def diagnose() -> Iterator[Diagnosis]:
    """Run the checks. If the settings are wrong, no other check can run."""
    from forge.core.settings import load_settings

    try:
        settings = load_settings()
    except ForgeError as error:
        yield Diagnosis("settings", error.message, "correct or unset these variables", ok=False)
        return
    changed = sorted(name for name in os.environ if name.startswith("FORGE_"))
    yield Diagnosis("settings", ", ".join(changed) or "all as by default")
    here = [("vLLM", check_vllm), ("port", check_port)]
    checks: list[tuple[str, Callable[[Settings], Diagnosis]]] = [
        *(here if settings.serving_target == "local" else [("reconciler", check_reconciler)]),
        ("harness", check_harness),
        ("store", check_store),
        ("MLflow", check_mlflow),
        ("signing keys", check_signing),
        ("GPUs", check_gpus),
        ("disk", check_disk),
    ]
    for name, check in checks:
        try:
            yield check(settings)
        except ForgeError as error:
            text = f"{error.where}: {error.what}" if error.where else error.what
            yield Diagnosis(name, text, error.fix, ok=False)


def check_vllm(settings: "Settings") -> Diagnosis:
    """The environment that holds vLLM."""
    from forge.serving.vllm_environment import vllm_release

    release = vllm_release(settings.serving_python)
    if release:
        return Diagnosis("vLLM", f"{release} in {settings.serving_python}")
    fix = "make setup, or set FORGE_SERVING_PYTHON"
    return Diagnosis("vLLM", f"not installed for {settings.serving_python}", fix, ok=False)


def check_port(settings: "Settings") -> Diagnosis:
    """The serving port is free, or held by this home's own server."""
    from forge.serving.vllm_process import LocalServer, port_is_free

    port, running = settings.serving_port, LocalServer(settings).running()
    if running is not None and running.spec.port == port:
        return Diagnosis("port", f"{port}, where {running.spec.base} serves")
    if port_is_free(port):
        return Diagnosis("port", f"{port} is free")
    return Diagnosis(
        "port", f"{port} is in use by another program", "stop that program, or set FORGE_SERVING_PORT", ok=False
    )


def check_reconciler(settings: "Settings") -> Diagnosis:
    """The cluster's reconciler answers."""
    from forge.serving.targets import read_serving

    names = sorted(read_serving(settings).names)
    return Diagnosis("reconciler", f"answers at {settings.reconciler_url}; served: {', '.join(names) or 'nothing'}")


def check_harness(settings: "Settings") -> Diagnosis:
    """The environment of lm-evaluation-harness, which recipes with evaluation.harness_tasks need."""
    try:
        probe = [str(settings.harness_python), "-c", HARNESS]
        done = subprocess.run(probe, capture_output=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        fix = "only recipes with evaluation.harness_tasks need it: make .venv-harness, or set FORGE_HARNESS_PYTHON"
        return Diagnosis("harness", "lm-evaluation-harness is not installed", fix, ok=False, optional=True)
    return Diagnosis("harness", f"lm-evaluation-harness {done.stdout.decode(errors='replace').strip()}")


def check_store(settings: "Settings") -> Diagnosis:
    """The store: a bucket that answers, or a directory that can be written."""
    if not settings.store:
        return check_writable("store", settings.store_root, "set FORGE_HOME to a directory of your own")
    from forge.storage.s3 import connect, split

    bucket, _ = split(settings.store)
    with connect(f"FORGE_STORE {settings.store}", settings) as client:
        if client.bucket_exists(bucket):
            return Diagnosis("store", settings.store)
    return Diagnosis("store", f"there is no bucket {bucket}", "create it, or correct FORGE_STORE", ok=False)


def check_mlflow(settings: "Settings") -> Diagnosis:
    """MLflow: the server answers, or the embedded registry can be opened if it exists yet."""
    from forge.registry.mlflow_registry import configure_client, tracking_uri

    database = settings.home / "mlflow" / "mlflow.db"
    if not settings.mlflow_uri and not database.exists():
        return check_writable("MLflow", database, "set FORGE_HOME to a directory of your own")
    configure_client()
    from mlflow import MlflowClient

    uri = tracking_uri(settings)
    try:
        models = MlflowClient(uri, registry_uri=uri).search_registered_models(max_results=100)
    except Exception as error:  # the client raises its HTTP library's and its database's errors as well as its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return Diagnosis("MLflow", f"{uri}: {reason}", "start the server, or correct FORGE_MLFLOW_URI", ok=False)
    return Diagnosis("MLflow", f"{uri}, models: {', '.join(sorted(model.name for model in models)) or 'none yet'}")


def check_signing(settings: "Settings") -> Diagnosis:
    """The keys that packages are signed and verified with."""
    from forge.registry.signature import check_keys

    check_keys(settings)
    signs, verifies = settings.signing_key is not None, settings.verify_key is not None
    found = "packages are signed and verified" if signs else "packages are verified" if verifies else "none set"
    return Diagnosis("signing keys", found)


def check_gpus(settings: "Settings") -> Diagnosis:
    """The GPUs that torch can use. A machine without one trains on its CPUs."""
    import pynvml  # type: ignore[import-untyped]

    from forge.cluster.gpus import GIB, find_gpus

    gpus = find_gpus()
    if gpus:
        return Diagnosis("GPUs", ", ".join(f"{gpu.name} ({gpu.memory / GIB:.0f} GiB)" for gpu in gpus))
    try:
        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
    except pynvml.NVMLError:
        return Diagnosis("GPUs", f"none: trains on {os.cpu_count()} CPU cores")
    if count == 0:
        return Diagnosis("GPUs", f"none: trains on {os.cpu_count()} CPU cores")
    fix = "check CUDA_VISIBLE_DEVICES, and install a CUDA build of torch"
    return Diagnosis("GPUs", f"the driver has {count}, and torch can use none", fix, ok=False)


def check_disk(settings: "Settings") -> Diagnosis:
    """Free disk space where the home is, or will be."""
    free = free_space(settings.home) / 1e9
    found = f"{free:,.0f} GB free for {settings.home}"
    if free >= FREE_GB:
        return Diagnosis("disk", found)
    fix = f"free {FREE_GB} GB (forge prune lists old packages), or move FORGE_HOME"
    return Diagnosis("disk", found, fix, ok=False)


def check_writable(name: str, path: Path, fix: str) -> Diagnosis:
    """A path that exists and can be written, or can be created."""
    if not os.access(existing(path), os.W_OK):
        return Diagnosis(name, f"{path} cannot be written", fix, ok=False)
    return Diagnosis(name, str(path) if path.exists() else f"{path}, which the first run creates")
