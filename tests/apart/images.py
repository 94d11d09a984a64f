"""What an image holds, as its Dockerfile says: code, environment, and only what is installed in it."""

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
HOME = "/home/forge"  # of the images' user
TMP = "/tmp"  # noqa: S108
BASE_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
State = dict[Path, tuple[int, ...]]


class Image:
    """One image of a project, laid out in a directory: code is copied, packages are links to this environment's."""

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
        """Follow a Dockerfile; returns the packages that it installs beside the lock's."""
        installed: set[str] = set()
        text = re.sub(r"^#.*\n", "", dockerfile.read_text(), flags=re.M).replace("\\\n", " ")
        for line in text.splitlines():
            instruction, _, rest = line.partition(" ")
            if instruction == "ENV":
                for one in shlex.split(rest):
                    key, _, value = one.partition("=")
                    self.environment[key] = value.replace("$PATH", self.environment["PATH"])
            elif instruction == "WORKDIR":
                self.workdir = rest.strip()
            elif instruction == "COPY":
                *sources, target = (one for one in rest.split() if not one.startswith("--"))
                place = PurePosixPath(self.workdir) / target
                whole = len(sources) == 1 and not target.endswith("/")
                self.copies += [(one, place if whole else place / PurePosixPath(one).name) for one in sources]
            elif instruction == "RUN" and '"$TORCH"' in rest:
                installed |= _required("torch")
        return installed

    def _copy(self) -> None:
        """The code, which nobody in a pod may change, and so its bytecode."""
        for source, target in self.copies:
            if target.is_relative_to(TMP):
                continue
            here, there = self.project / source, self.root / target.relative_to("/")
            there.parent.mkdir(parents=True, exist_ok=True)
            if here.is_dir():
                shutil.copytree(here, there, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
            else:
                shutil.copy(here, there)
        self.code = [one for one in (self.root / "opt").iterdir() if one.name != Path(VENV).name]
        for one in self.code:
            compileall.compile_dir(one, quiet=2)
        self.state = self._look()

    def _look(self) -> State:
        found = ((path, path.lstat()) for one in self.code for path in [one, *one.rglob("*")])
        return {
            path: (stat.st_mode, *((stat.st_size, stat.st_mtime_ns) if path.is_file() else ())) for path, stat in found
        }

    def written(self) -> list[str]:
        """What has been changed in it since it was made; it is as before then."""
        now = self._look()
        changed = sorted(path for path, state in {**self.state, **now}.items() if self.state.get(path) != now.get(path))
        if changed:
            for one in self.code:
                shutil.rmtree(one)
            self._copy()
        return [f"/{path.relative_to(self.root)}" for path in changed]


def _required(package: str) -> set[str]:
    """A package, and those installed here that it requires."""
    found, waiting = set(), [package]
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name not in found:
            found.add(name)
            needs = [Requirement(one) for one in _distributions()[name].requires or []]
            waiting += [one.name for one in needs if one.marker is None or one.marker.evaluate({"extra": ""})]
    return found


@functools.cache
def _distributions() -> dict[str, importlib.metadata.Distribution]:
    return {canonicalize_name(one.metadata["Name"]): one for one in importlib.metadata.distributions()}


def _install(packages: set[str], venv: Path) -> None:
    """An environment of links to the packages of this one, and to no others."""
    (venv / "bin").mkdir(parents=True)
    (venv / SITE).mkdir(parents=True)
    python = Path(sys.executable).resolve()
    (venv / "pyvenv.cfg").write_text(f"home = {python.parent}\ninclude-system-site-packages = false\n")
    for name in ("python", "python3"):
        (venv / "bin" / name).symlink_to(python)
    here = Path(sys.prefix) / SITE
    files = {
        name: [Path(row[0]) for row in csv.reader((one.read_text("RECORD") or "").splitlines())]
        for name, one in _distributions().items()
    }
    # A directory that others share, such as a namespace's, is made anew; all else is linked whole.
    shared = {parent for name in files.keys() - packages for file in files[name] for parent in file.parents}
    for name in packages:
        for file in files[name]:
            if file.parts[0] == "..":
                continue
            link = next(one for one in [*reversed(file.parents), file] if one not in shared)
            there = venv / SITE / link
            if not there.is_symlink():
                there.parent.mkdir(parents=True, exist_ok=True)
                there.symlink_to(here / link)
        for script in _distributions()[name].entry_points.select(group="console_scripts"):
            file = venv / "bin" / script.name
            module, function = script.value.split()[0].split(":")
            begin = f"#!{venv}/bin/python\nimport sys\nfrom {module} import {function.split('.')[0]}\n"
            # Processes that it spawns import it, and may not run it.
            file.write_text(begin + f"if __name__ == '__main__':\n    sys.exit({function}())\n")
            file.chmod(0o755)
