"""Build sdist and wheel, look at what is in them, install the wheel and run it from elsewhere."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def build(folder: Path) -> tuple[Path, Path]:
    """Build the sdist, and the wheel from the sdist; return both paths."""
    command = [sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def expected_names() -> set[str]:
    """Return the names that the wheel must have: every tracked file of the packages."""
    command = ["git", "ls-files", "-z", "kvxform", "passes", "codegen"]
    out = subprocess.run(command, check=True, capture_output=True, cwd=ROOT).stdout.decode()
    paths = [Path(name) for name in out.split("\0") if name]
    files = [path for path in paths if not (ROOT / path).is_symlink()]
    return {str(path if path.parts[0] == "kvxform" else Path("kvxform", path)) for path in files}


def listing_problems(sdist: Path, wheel: Path) -> list[str]:
    """Compare the wheel with the tracked files; look for doubled sources in the sdist."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    with tarfile.open(sdist) as archive:
        sources = archive.getnames()
    found = [f"wheel lacks {name}" for name in sorted(expected_names() - names)]
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    found += [f"wheel has a top-level {top}" for top in sorted(tops - {"kvxform"})]
    for link in ("/kvxform/passes/", "/kvxform/codegen/"):
        found += [f"sdist doubles {name}" for name in sources if link in name]
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
