"""An image laid out as its Dockerfile says: code, environment, and only the packages that it installs."""

import compileall
import csv
import functools
import importlib.metadata
import re
import shlex
import shutil
import sys
from pathlib import Path, PurePosixPath

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

SITE = Path(f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages")
VENV = "/opt/venv"
HOME = "/home/forge"  # of the user in the images
TMP = "/tmp"  # noqa: S108
BASE_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
Snapshot = dict[Path, tuple[int, ...]]


class Image:
    """An image of a project, laid out in a directory. Code is copied; packages are links into this environment."""

    def __init__(self, project: Path, name: str, root: Path) -> None:
        self.project, self.root = project, root
        self.environment = {"PATH": BASE_PATH, "LANG": "C.UTF-8", "HOME": HOME}
        self.workdir = "/"
        self.copies: list[tuple[str, PurePosixPath]] = []
        lock = (project / "images" / "pipeline" / "requirements.lock").read_text()
        packages = {canonicalize_name(pin) for pin in re.findall(r"^([\w.-]+)==", lock, re.M)}
        for image in dict.fromkeys(["pipeline", name]):
            packages |= self._read(project / "images" / image / "Dockerfile")
        _install(packages, root / VENV[1:])
        self._copy()

    def _read(self, dockerfile: Path) -> set[str]:
        """Follow a Dockerfile; returns the packages that it installs in addition to the lock file."""
        installed: set[str] = set()
        text = re.sub(r"^#.*\n", "", dockerfile.read_text(), flags=re.M).replace("\\\n", " ")
        for line in text.splitlines():
            instruction, _, rest = line.partition(" ")
            if instruction == "ENV":
                for assignment in shlex.split(rest):
                    key, _, value = assignment.partition("=")
                    self.environment[key] = value.replace("$PATH", self.environment["PATH"])
            elif instruction == "WORKDIR":
                self.workdir = rest.strip()
            elif instruction == "COPY":
                *sources, target = (word for word in rest.split() if not word.startswith("--"))
                destination = PurePosixPath(self.workdir) / target
                exact = len(sources) == 1 and not target.endswith("/")
                self.copies += [
                    (source, destination if exact else destination / PurePosixPath(source).name) for source in sources
                ]
            elif instruction == "RUN" and '"$TORCH"' in rest:
                installed |= _required("torch")
        return installed

    def _copy(self) -> None:
        """Copy the code and compile it, since a pod may write neither code nor bytecode."""
        for source, target in self.copies:
            if target.is_relative_to(TMP):
                continue
            original, copy = self.project / source, self.root / target.relative_to("/")
            copy.parent.mkdir(parents=True, exist_ok=True)
            if original.is_dir():
                shutil.copytree(original, copy, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
            else:
                shutil.copy(original, copy)
        self.code = [path for path in (self.root / "opt").iterdir() if path.name != Path(VENV).name]
        for folder in self.code:
            compileall.compile_dir(folder, quiet=2)
        self.snapshot = self._take_snapshot()

    def _take_snapshot(self) -> Snapshot:
        found = ((path, path.lstat()) for folder in self.code for path in [folder, *folder.rglob("*")])
        return {
            path: (stat.st_mode, *((stat.st_size, stat.st_mtime_ns) if path.is_file() else ())) for path, stat in found
        }

    def undo_writes(self) -> list[str]:
        """Restore the code if it has been changed; returns the changed paths."""
        before, now = self.snapshot, self._take_snapshot()
        changed = sorted(path for path in {**before, **now} if before.get(path) != now.get(path))
        if changed:
            for folder in self.code:
                shutil.rmtree(folder)
            self._copy()
        return [f"/{path.relative_to(self.root)}" for path in changed]


def _required(package: str) -> set[str]:
    """A package and all its requirements that are installed here."""
    found, waiting = set(), [package]
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name not in found:
            found.add(name)
            needs = [Requirement(text) for text in _distributions()[name].requires or []]
            waiting += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return found


@functools.cache
def _distributions() -> dict[str, importlib.metadata.Distribution]:
    return {canonicalize_name(found.metadata["Name"]): found for found in importlib.metadata.distributions()}


def _install(packages: set[str], venv: Path) -> None:
    """Create a virtual environment with links to these packages of the current one, and no others."""
    (venv / "bin").mkdir(parents=True)
    (venv / SITE).mkdir(parents=True)
    python = Path(sys.executable).resolve()
    (venv / "pyvenv.cfg").write_text(f"home = {python.parent}\ninclude-system-site-packages = false\n")
    for name in ("python", "python3"):
        (venv / "bin" / name).symlink_to(python)
    site = Path(sys.prefix) / SITE
    files = {
        name: [Path(row[0]) for row in csv.reader((distribution.read_text("RECORD") or "").splitlines())]
        for name, distribution in _distributions().items()
    }
    # A directory shared with other packages, such as a namespace package, is created; anything else is one link.
    shared = {parent for name in files.keys() - packages for file in files[name] for parent in file.parents}
    for name in packages:
        for file in files[name]:
            if file.parts[0] == "..":
                continue
            link = next(path for path in [*reversed(file.parents), file] if path not in shared)
            target = venv / SITE / link
            if not target.is_symlink():
                target.parent.mkdir(parents=True, exist_ok=True)
                target.symlink_to(site / link)
        for script in _distributions()[name].entry_points.select(group="console_scripts"):
            file = venv / "bin" / script.name
            module, function = script.value.split()[0].split(":")
            start = f"#!{venv}/bin/python\nimport sys\nfrom {module} import {function.split('.')[0]}\n"
            # Processes that the script spawns import it, and must not run it again.
            file.write_text(start + f"if __name__ == '__main__':\n    sys.exit({function}())\n")
            file.chmod(0o755)
