"""The house rules: one package from nine rooms, imports one way, short files, nothing unsafe."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import fedaccord

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

# Who may import whom: a room may import from itself and from any level before its own.
# Modules of fedaccord/ itself, but for cli, are level 0.
LEVELS = [
    {"models", "privacy", "fairness"},
    {"strategies"},
    {"client", "server"},
    {"simulations", "reports"},
    {"conformance"},
]
ROOMS = sorted(set().union(*LEVELS))
CODE = ["fedaccord", *ROOMS]

LINES_A_FILE = 400
LINES_A_FUNCTION = 60  # its docstring aside

# Loading any of these can run code that came with the data.
UNSAFE_MODULES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {"eval", "exec", "torch.load", "yaml.load"}

# Import name -> distribution, where they differ by more than "_" and "-".
DISTRIBUTIONS = {
    "sklearn": "scikit-learn",
    "grpc": "grpcio",
    "google": "protobuf",
    "PIL": "pillow",
    "yaml": "pyyaml",
}


def sources(*folders: str) -> list[Path]:
    """Python files of some folders of the root, each once (links into the rooms not followed)."""
    return sorted(
        Path(top, name)
        for folder in folders
        for top, _, names in os.walk(ROOT / folder)
        for name in names
        if name.endswith(".py") and not name.startswith("link_pb2")  # generated
    )


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every import as (line, dotted name), also inside functions and TYPE_CHECKING."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def level(part: str) -> int:
    """Level of `fedaccord.<part>`: a room, cli, or anything else in fedaccord/ itself."""
    if part == "cli":
        return len(LEVELS) + 3
    if part == "standing":  # what commands draw of rooms' state
        return len(LEVELS) + 1
    if part.startswith("cli_"):  # a group of commands, which cli.py puts together
        return len(LEVELS) + 2
    return next((n for n, rooms in enumerate(LEVELS, 1) if part in rooms), 0)


def wrong_imports(where: str, tree: ast.AST) -> list[str]:
    """Imports in the file `where` ("privacy/plan.py") that go against the direction."""
    folder, module = where.removesuffix(".py").split("/")[:2]
    own = module if folder == "fedaccord" else folder
    found = []
    for line, name in imports(tree):
        parts = name.split(".")
        if name.startswith(".") or parts[0] in ROOMS:
            found.append(f"{where}:{line}: {name}: say `from fedaccord...`")
        elif parts[0] == "fedaccord":
            other = parts[1] if len(parts) > 1 else ""
            same = own == other or level(own) == level(other) == 0
            if not same and level(other) >= level(own):
                found.append(f"{where}:{line}: {own} imports {name}")
    return found


def test_packages_are_the_folders_that_hold_an_init_file() -> None:
    # benchmarks has one too, since a dependency installs a package of that name; it is not shipped.
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"benchmarks"}
    expected = {"fedaccord", *(f"fedaccord.{name}" for name in folders - {"fedaccord"})}
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == expected


def test_every_list_of_rooms_names_the_same_nine() -> None:
    tool = PYPROJECT["tool"]
    assert tool["setuptools"]["package-dir"] == {f"fedaccord.{room}": room for room in ROOMS}
    bundled = [name.removesuffix("/**") for name in tool["flwr"]["app"]["fab-include"]]
    assert sorted(bundled) == sorted([*CODE, "/LICENSE", "/README.md"])
    banned = tool["ruff"]["lint"]["flake8-tidy-imports"]["banned-api"]
    assert sorted(banned) == ROOMS
    assert set(ROOMS) < set(tool["pyright"]["include"])


@pytest.mark.parametrize("room", ROOMS)
def test_a_link_in_fedaccord_leads_to_each_room(room: str) -> None:
    link = ROOT / "fedaccord" / room
    if link.is_file():
        pytest.skip("a checkout without symlinks: the __path__ line finds the rooms")
    assert link.resolve() == ROOT / room
    assert not Path(os.readlink(link)).is_absolute()


def test_rooms_are_flat_and_no_source_is_named_like_a_test() -> None:
    files = [path.relative_to(ROOT) for path in sources(*CODE)]
    assert [str(path) for path in files if len(path.parts) != 2] == []
    # A Flower App Bundle leaves such files out without a word.
    assert [str(path) for path in files if re.match(r"test_.*|.*_test$", path.stem)] == []


def test_the_version_in_the_code_is_the_one_in_pyproject() -> None:
    assert fedaccord.__version__ == PYPROJECT["project"]["version"]


def test_imports_go_one_way() -> None:
    found = [line for path in sources(*CODE) for line in wrong_imports(relative(path), parse(path))]
    assert found == []


@pytest.mark.parametrize(
    ("where", "code"),
    [
        ("privacy/plan.py", "from fedaccord.models import cnn"),
        ("privacy/plan.py", "import fedaccord.client.app"),
        ("strategies/fedavg.py", "from fedaccord import server"),
        ("client/app.py", "def f():\n    from fedaccord.server.app import app"),
        ("reports/report.py", "from fedaccord.simulations.heart import Heart"),
        ("server/app.py", "from fedaccord import cli"),
        ("server/app.py", "from fedaccord import cli_plan"),
        ("fedaccord/cli_plan.py", "from fedaccord import cli_site"),
        ("fedaccord/accord.py", "from fedaccord.privacy.plan import PrivacyPlan"),
        ("fedaccord/__init__.py", "from fedaccord.cli import main"),
        ("client/app.py", "from privacy.plan import PrivacyPlan"),
        ("client/app.py", "from .train import train"),
    ],
)
def test_an_import_against_the_direction_is_found(where: str, code: str) -> None:
    assert len(wrong_imports(where, ast.parse(code))) == 1


@pytest.mark.parametrize(
    ("where", "code"),
    [
        ("fedaccord/accord.py", "from fedaccord import registry, errors"),
        ("fedaccord/cli.py", "from fedaccord.reports import report\nimport fedaccord.accord"),
        ("fedaccord/cli.py", "from fedaccord import cli_plan"),
        ("server/app.py", "from fedaccord.server.rounds import run\nimport fedaccord.strategies"),
        ("simulations/engine.py", "from fedaccord.client.app import app\nimport flwr.server"),
        ("privacy/plan.py", "NAMES = {'a': 'fedaccord.client.app:app'}"),
    ],
)
def test_an_import_along_the_direction_is_allowed(where: str, code: str) -> None:
    assert wrong_imports(where, ast.parse(code)) == []


def test_importing_every_room_leaves_torch_alone() -> None:
    # `flwr build` and `fedaccord --help` import the parents of what they name.
    names = ", ".join(["fedaccord", *(f"fedaccord.{room}" for room in ROOMS)])
    code = f"import sys, {names}; sys.exit('torch' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env).returncode == 0


def test_no_code_bypasses_the_package() -> None:
    found = [
        f"{relative(path)}:{line}: {name}"
        for path in sources(*CODE, "benchmarks", "tests")
        for line, name in imports(parse(path))
        if name.split(".")[0] in ROOMS
    ]
    assert found == []


def test_every_file_says_in_line_one_what_it_is() -> None:
    silent = []
    for path in sources(*CODE, "benchmarks", "tests"):
        first = next((n for n in parse(path).body), None)
        shebang = path.read_text(encoding="utf-8").startswith("#!")
        if ast.get_docstring(parse(path)) is None or first is None or first.lineno > 1 + shebang:
            silent.append(relative(path))
    assert silent == []


def test_files_and_functions_are_short() -> None:
    long = []
    for path in sources(*CODE, "benchmarks", "tests"):
        lines = path.read_text(encoding="utf-8").count("\n")
        if lines > LINES_A_FILE:
            long.append(f"{relative(path)}: {lines} lines")
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                size = node.end_lineno - node.lineno + 1
                if ast.get_docstring(node) is not None:
                    size -= node.body[0].end_lineno - node.body[0].lineno + 1
                if size > LINES_A_FUNCTION:
                    long.append(f"{relative(path)}:{node.lineno}: {node.name}: {size} lines")
    assert long == []


def unsafe_uses(tree: ast.AST) -> list[tuple[int, str]]:
    """Imports and calls that can run code from data, as (line, name)."""
    found = [
        (line, name)
        for line, name in imports(tree)
        if name.split(".")[0] in UNSAFE_MODULES or name in UNSAFE_CALLS
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            words = {word.arg: ast.unparse(word.value) for word in node.keywords}
            if name in UNSAFE_CALLS or words.get("allow_pickle", "False") != "False":
                found.append((node.lineno, name))
    return found


def test_nothing_in_the_code_can_unpickle_or_evaluate_data() -> None:
    found = [
        f"{relative(path)}:{line}: {name}"
        for path in sources(*CODE, "benchmarks")
        for line, name in unsafe_uses(parse(path))
    ]
    assert found == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from joblib import load",
        "from torch import load",
        "torch.load(f)",
        "eval(s)",
        "np.load(f, allow_pickle=True)",
    ],
)
def test_an_unsafe_use_is_found(code: str) -> None:
    assert len(unsafe_uses(ast.parse(code))) == 1


@pytest.mark.parametrize(
    "code", ["model.eval()", "ast.literal_eval(s)", "load(f, allow_pickle=False)"]
)
def test_a_safe_use_is_allowed(code: str) -> None:
    assert unsafe_uses(ast.parse(code)) == []


def test_every_import_is_a_declared_dependency() -> None:
    def declared(requirements: list[str]) -> set[str]:
        return {re.match(r"[\w-]+", text)[0].lower() for text in requirements}

    project = PYPROJECT["project"]
    run = declared(project["dependencies"])
    test = run | declared(project["optional-dependencies"]["test"])
    shared = {path.stem for path in sources("tests") if not path.stem.startswith("test_")}
    ours = {*sys.stdlib_module_names, "fedaccord", "benchmarks", *shared}
    missing = []
    for allowed, folders in ((run, CODE), (test, ["benchmarks", "tests"])):
        for path in sources(*folders):
            for line, name in imports(parse(path)):
                top = name.split(".")[0]
                needed = DISTRIBUTIONS.get(top, top.replace("_", "-")).lower()
                if top not in ours and needed not in allowed:
                    missing.append(f"{relative(path)}:{line}: {top}")
    assert missing == []


def test_every_key_of_the_run_config_is_declared_to_flower_which_refuses_others() -> None:
    declared = set(PYPROJECT["tool"]["flwr"]["app"]["config"])
    read = re.compile(r'run_config(?:\.get\(|\[)"(\w+)"')
    used = {key for path in sources("client", "server") for key in read.findall(path.read_text())}
    assert used == declared
