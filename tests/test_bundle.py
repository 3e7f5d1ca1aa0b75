"""The wheel and the Flower App Bundle hold what they should, once, and run their own code."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
ROOMS = list(PYPROJECT["tool"]["setuptools"]["package-dir"].values())

# Run in a fresh process: cut off every way to this checkout (an editable install puts a finder on
# sys.meta_path, a path hook and a .pth entry), then load both apps as Flower does and say from
# where each of our modules came.
LOAD_APPS = """
import importlib.util, json, sys
unpacked, root = sys.argv[1:]
for hooks in (sys.meta_path, sys.path_hooks):
    hooks[:] = [hook for hook in hooks if "__editable__" not in getattr(hook, "__module__", "")]
sys.path[:] = [p for p in sys.path if p not in ("", root) and "__editable__" not in p]
sys.path_importer_cache.clear()
assert importlib.util.find_spec("fedaccord") is None, "fedaccord is still to be had elsewhere"
from flwr.supercore.object_ref import load_app
kinds = [type(load_app(f"fedaccord.{end}.app:app", ImportError, unpacked)).__name__
         for end in ("server", "client")]
files = {n: m.__file__ for n, m in sys.modules.items() if n.split(".")[0] == "fedaccord"}
print(json.dumps([kinds, files]))
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command without the network's chatter; its output is in the failure."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    env |= {"FLWR_HOME": str(cwd / ".flwr-home"), "COLUMNS": "200"}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def files() -> set[str]:
    """What a commit of this checkout would hold: tracked files and new ones that git minds."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: nothing says which files belong to the project")
    listed = run("git", "ls-files", "-z", "-co", "--exclude-standard", cwd=ROOT)
    return {name for name in listed.split("\0") if name and os.path.lexists(ROOT / name)}


@pytest.fixture(scope="module")
def copy(files: set[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy in a folder whose name Flower accepts; a build leaves no trace in the checkout."""
    top = tmp_path_factory.mktemp("copy") / "fedaccord"
    for name in files:
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, top / name, follow_symlinks=False)
    return top


@pytest.fixture(scope="module")
def wheel(copy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation"]
    run(*build, "--outdir", str(out), str(copy), cwd=out)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def bundle(copy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundle")
    run(Path(sys.executable).with_name("flwr"), "build", "--app", str(copy), cwd=out)
    (path,) = out.glob("*.fab")
    return path


def in_package(name: str) -> bool:
    """Whether a file of the checkout belongs into the wheel."""
    top, _, rest = name.partition("/")
    if top not in ("fedaccord", *ROOMS):
        return False
    code = rest.endswith(".py") and "/" not in rest
    data = {
        "fedaccord": rest in ("py.typed", "link.proto", "link_pb2.pyi")
        or rest.startswith("templates/"),
        "simulations": Path(rest).match("*.json") or Path(rest).match("accords/*.toml"),
        "reports": rest.startswith("templates/"),
    }
    return code or bool(data.get(top))


def test_the_wheel_holds_every_source_and_data_file_once_and_nothing_else(
    wheel: Path, files: set[str]
) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    held = [name for name in names if ".dist-info/" not in name]
    wanted = {name for name in files if in_package(name) and not (ROOT / name).is_symlink()}
    package = sorted(n if n.startswith("fedaccord/") else f"fedaccord/{n}" for n in wanted)
    assert sorted(held) == package
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_check_wheel_contents_finds_nothing_wrong(wheel: Path) -> None:
    run(Path(sys.executable).with_name("check-wheel-contents"), str(wheel), cwd=wheel.parent)


def test_the_bundle_holds_every_source_and_data_file_and_no_test(
    bundle: Path, files: set[str]
) -> None:
    held = set(zipfile.ZipFile(bundle).namelist())
    shippable = (".py", ".toml", ".json")  # Flower leaves out every other kind
    wanted = {name for name in files if in_package(name) and name.endswith(shippable)}
    assert wanted <= held
    extra = {name.split("/")[0] for name in held - wanted}
    assert extra <= {"pyproject.toml", "LICENSE", "README.md", ".info", "fedaccord"}


@pytest.mark.parametrize("kind", ["wheel", "bundle"])
def test_both_apps_load_from_their_own_files_where_nothing_is_installed(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    unpacked = tmp_path / "unpacked"
    zipfile.ZipFile(request.getfixturevalue(kind)).extractall(unpacked)
    command = [sys.executable, "-P", "-c", LOAD_APPS, str(unpacked), str(ROOT)]
    kinds, modules = json.loads(run(*command, cwd=tmp_path).splitlines()[-1])
    assert kinds == ["ServerApp", "ClientApp"]
    assert {"fedaccord", "fedaccord.server.app", "fedaccord.client.app"} <= set(modules)
    elsewhere = {n: f for n, f in modules.items() if not Path(f).is_relative_to(unpacked)}
    assert elsewhere == {}
