"""Build sdist and wheel, look at what is in them, install the wheel and run it from elsewhere."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import tomllib
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def build(folder: Path) -> tuple[Path, Path]:
    """Build the sdist, and the wheel from the sdist; return both paths."""
    command = [sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def listing_problems(sdist: Path, wheel: Path) -> list[str]:
    """Compare the wheel with the package list; look for doubled sources in the sdist."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = project["tool"]["setuptools"]["packages"]
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    with tarfile.open(sdist) as archive:
        sources = archive.getnames()
    found = [
        f"wheel lacks {init}"
        for init in (f"{package.replace('.', '/')}/__init__.py" for package in packages)
        if init not in names
    ]
    tops = {name.split("/")[0] for name in names}
    found += [f"wheel has a top-level {top}" for top in tops & {"passes", "codegen", "tests"}]
    found += [f"wheel lacks {name}" for name in ("kvxform/py.typed",) if name not in names]
    for link in ("kvxform/passes/", "kvxform/codegen/"):
        found += [f"sdist doubles {name}" for name in sources if f"/{link}" in name]
    for path in sorted((ROOT / "kvxform" / "recipes").glob("*.*")):
        if path.suffix != ".pyc" and f"kvxform/recipes/{path.name}" not in names:
            found.append(f"wheel lacks the recipe file {path.name}")
    return found


def run_installed(wheel: Path, folder: Path) -> None:
    """Install the wheel alone into a new environment that borrows our dependencies; run it."""
    env = folder / "env"
    venv.create(env, with_pip=True)
    python = env / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", wheel]
    subprocess.run(install, check=True)
    ask = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.run(ask, check=True, capture_output=True, text=True).stdout.strip())
    # A path added by a .pth file does not run the .pth files in it, so our editable install of
    # kvxform stays out.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    empty = folder / "empty"
    empty.mkdir()
    where = "import kvxform, sys; sys.exit(not kvxform.__file__.startswith(sys.prefix))"
    subprocess.run([python, "-c", where], check=True, cwd=empty)
    for verb in ("passes", "recipes"):
        subprocess.run([env / "bin" / "kvxform", verb], check=True, cwd=empty)


def main() -> int:
    """Run all checks; return the exit status."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sdist, wheel = build(folder / "dist")
        found = listing_problems(sdist, wheel)
        if found:
            print("\n".join(found))
            return 1
        run_installed(wheel, folder)
        print(f"wheel: {wheel.name} installs and runs from an empty folder")
    return 0


if __name__ == "__main__":
    sys.exit(main())
