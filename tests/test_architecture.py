"""Who may import whom, who may draw random numbers, and what an import does: held by reading the code."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "hf_unlearnable"

L0 = {"keys", "images", "sizes", "budget", "networks", "architectures", "columns", "options", "recipes", "environment"}
L1 = {"transform", "pgd", "augment", "batches", "checkpoint", "demo", "sources", "training"}
L1 |= {"draws", "policies", "plasma", "erasing"}
MAY_IMPORT: dict[str, set[str]] = {
    "keys": set(),
    "images": set(),
    "columns": set(),
    "options": set(),
    "architectures": set(),
    "networks": {"architectures"},
    "budget": {"images"},
    "sizes": set(),
    "transform": {"images", "columns", "environment", "sizes"},
    "draws": {"images", "keys"},
    "policies": {"augment", "images", "plasma"},
    "plasma": {"augment", "images"},
    "erasing": {"augment", "plasma", "policies"},
    "pgd": {"augment", "budget", "environment", "networks"},
    "augment": {"images", "keys"},
    "batches": {"images", "keys", "columns", "sizes"},
    "checkpoint": set(),
    "demo": {"keys"},
    "sources": {"demo"},
    "environment": set(),
    "training": {"augment", "batches", "images", "keys", "networks", "recipes"},
    "surrogate": {"checkpoint", "networks", "environment"},
    "fitting": {"surrogate"} | L0 | L1,
    "poisons": {"poisons", "surrogate", "fitting"} | L0 | L1,
    "defenses": {"defenses"} | L0 | L1,
    "metrics": {"images", "budget"},
    "recipes": set(),
    "result": {"recipes"},
    "record": {"environment"},
    "victim": {"result", "environment", "recipes", "checkpoint", "defenses", "batches", "training"}
    | {"networks", "images", "keys"},
    "preview": {"images"},
    "digests": set(),
    "card": {"record", "papers", "reported", "surrogate"},
    "papers": set(),
    "reported": set(),
    "protect": {"digests", "record", "card", "preview", "metrics", "poisons"} | L0 | L1,
    "report": {"record", "result", "surrogate"},
    "probes": {"result", "victim"} | L0 | L1,
    "detection": {"result", "victim", "defenses", "probes"} | L0 | L1,
    "set_detection": {"victim", "defenses", "probes"} | L0 | L1,
    "last_layer": {"result", "victim", "defenses", "probes"} | L0 | L1,
    "recovery": {"victim"} | L0 | L1,
    "ray_data": {"poisons"} | L0 | L1,
    "certificate": {"keys"},
    "theory": {"keys"},
    "benchmarks": {"benchmarks", "fitting", "defenses", "poisons", "sharding", "victim"} | L0 | L1,
    "sharding": {"sharding", "digests", "record", "card", "protect", "preview", "metrics", "poisons"} | L0 | L1,
    "gate": {"gate", "digests", "record", "metrics", "poisons"} | L0 | L1,
    "ownership": {"ownership", "poisons"} | L0 | L1,
    "publishing": {"publishing", "gate", "ownership", "digests", "record", "card", "preview", "poisons", "surrogate"}
    | L0
    | L1,
    "evaluation": {"evaluation", "result", "victim", "defenses", "poisons", "record", "report", "card"}
    | {"probes", "detection", "set_detection", "last_layer", "recovery", "certificate", "reported", "digests"}
    | L0
    | L1,
}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    inner = path.relative_to(PACKAGE)
    return inner.parts[0] if len(inner.parts) > 1 else inner.stem


def imported_rooms(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            found |= {f"{module}.{alias.name}" for alias in node.names} if module == "hf_unlearnable" else {module}
    inner = [name.split(".") for name in found if name.split(".")[0] == "hf_unlearnable"]
    return {parts[1] for parts in inner if len(parts) > 1}


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_follow_the_table(path: Path) -> None:
    if path == PACKAGE / "__init__.py":
        return
    assert room(path) in MAY_IMPORT, f"{path.name} is a new room: say in the table who may import whom"
    assert imported_rooms(path) <= MAY_IMPORT[room(path)]


GLOBAL_DRAWS = {"rand", "randn", "randint", "randperm", "seed", "manual_seed", "random", "normal", "uniform", "shuffle"}


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_global_generators(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in GLOBAL_DRAWS:
            owner = ast.unparse(node.func.value)
            explicit = any(keyword.arg == "generator" for keyword in node.keywords)
            forked = owner == "torch" and node.func.attr == "manual_seed" and "fork_rng" in path.read_text()
            assert owner not in {"torch", "np.random", "numpy.random", "random"} or explicit or forked, (
                f"{path.name}:{node.lineno}: {ast.unparse(node.func)} draws from a global generator"
            )


def test_importing_prints_nothing_and_parses_no_arguments() -> None:
    command = [sys.executable, "-c", "import sys; sys.argv.append('--nonsense'); import hf_unlearnable"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
