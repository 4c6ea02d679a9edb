"""Who may import whom (docs/architecture.md): checked on the source of every file, and on what an import loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("protocol", "actor", "learner", "deploy")
FILES = sorted(path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

FORBIDDEN_BETWEEN = {
    "protocol": {"actor", "learner", "deploy"},
    "actor": {"learner", "deploy"},
    "learner": {"actor", "deploy"},
    "deploy": set(),
}

ONLY_IN = {
    "vllm": {"actor/vllm_engine.py", "actor/vllm_weights.py"},
    "ray": {"actor/cluster.py", "deploy/ray_cluster.py", "deploy/placement.py", "deploy/desk.py", "deploy/doctor.py"},
    "zmq": {f"protocol/{name}.py" for name in ("sockets", "hub", "link", "door", "handshakes", "keys")},
    "msgspec.msgpack": {"protocol/codec.py"},
    "starlette": {"deploy/dashboard/access.py", "deploy/dashboard/app.py"},
    "uvicorn": {"deploy/dashboard/server.py"},
    "torch.distributed": {"learner/joining.py", "learner/ranks.py", "learner/sharding.py"},
    "wandb": {"learner/telemetry/wandb_log.py", "deploy/preflight.py"},
    "prometheus_client": {"learner/telemetry/exporter.py", "actor/vllm_engine.py"},
    "msgspec.json": {
        "actor/grading.py",
        "actor/grading_worker.py",
        "actor/slots.py",
        "deploy/dashboard/jsonl_tail.py",
        "learner/telemetry/timeline.py",
    },
}
"""Module -> the only files that may use it."""

NEVER = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}

LIGHT = ("protocol", "learner/intake", "actor/rewards", "actor/grading.py", "actor/grading_worker.py")
"""Where no heavy module may be imported at module level."""
HEAVY = {"torch", "vllm", "ray", "transformers"}


def read(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text("utf-8"), str(path))


def imported(tree: ast.AST, package: str) -> Iterator[tuple[str, int]]:
    """(full module name, line) of every import, wherever it stands; `from a import b` counts as a and as a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(filter(None, [package if node.level else "", node.module or ""]))
            yield module, node.lineno
            yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from ((str(a.value), node.lineno) for a in node.args[:1] if isinstance(a, ast.Constant))


def imported_at_load(tree: ast.Module, package: str) -> Iterator[tuple[str, int]]:
    """Imports that run when the module is imported: outside functions and outside `if TYPE_CHECKING`."""

    def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                yield from statements(node.orelse)
                continue
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                yield node
            for field in ("body", "orelse", "finalbody"):
                yield from statements(getattr(node, field, []))
            for handler in getattr(node, "handlers", []):
                yield from statements(handler.body)

    for node in statements(tree.body):
        yield from imported(node, package)


def attribute_uses(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of uses like `msgspec.msgpack.encode`, also under another name (`import msgspec as m`)."""
    aliases = {a.asname: a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names if a.asname}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            first, _, rest = ast.unparse(node).partition(".")
            yield f"{aliases.get(first, first)}.{rest}", node.lineno


def is_of(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def uses(path: Path) -> list[tuple[str, int]]:
    tree = read(path)
    return [*imported(tree, path.parts[0]), *attribute_uses(tree)]


@pytest.mark.parametrize("path", FILES, ids=str)
def test_file_imports_only_its_own_side(path):
    forbidden = FORBIDDEN_BETWEEN[path.parts[0]]
    wrong = [f"{path}:{line}: {name}" for name, line in imported(read(path), path.parts[0])
             if name.split(".")[0] in forbidden]  # fmt: skip
    assert not wrong


@pytest.mark.parametrize("path", FILES, ids=str)
def test_file_uses_a_guarded_library_only_where_allowed(path):
    wrong = [f"{path}:{line}: {name} belongs to {sorted(allowed)}"
             for module, allowed in ONLY_IN.items() if path.as_posix() not in allowed
             for name, line in (imported(read(path), path.parts[0]) if "." not in module else uses(path))
             if is_of(name, module)]  # fmt: skip
    assert not wrong


@pytest.mark.parametrize("path", FILES, ids=str)
def test_file_never_unpickles_nor_evaluates(path):
    wrong = [f"{path}:{line}: {name}" for name, line in uses(path)
             if name.split(".")[0] in NEVER or name in ("torch.load", "numpy.load")]  # fmt: skip
    for call in (node for node in ast.walk(read(path)) if isinstance(node, ast.Call)):
        if isinstance(call.func, ast.Name) and call.func.id in ("eval", "exec"):
            wrong.append(f"{path}:{call.lineno}: {call.func.id}()")
        for keyword in call.keywords:
            if keyword.arg in ("allow_pickle", "trust_remote_code") and ast.unparse(keyword.value) != "False":
                wrong.append(f"{path}:{call.lineno}: {keyword.arg} = {ast.unparse(keyword.value)}")
    assert not wrong


@pytest.mark.parametrize("path", [p for p in FILES if p.as_posix().startswith(LIGHT)], ids=str)
def test_light_file_loads_nothing_heavy(path):
    wrong = [f"{path}:{line}: {name}" for name, line in imported_at_load(read(path), path.parts[0])
             if name.split(".")[0] in HEAVY]  # fmt: skip
    assert not wrong


@pytest.mark.parametrize("path", [p for p in FILES if p.as_posix().startswith("actor/rewards")], ids=str)
def test_grader_matches_with_regex(path):
    """Python's own `re` before 3.11.5 takes the wrong way behind possessive quantifiers: right answers would get 0."""
    assert not [f"{path}:{line}" for name, line in imported(read(path), path.parts[0]) if is_of(name, "re")]


def modules_loaded_by(*names: str) -> set[str]:
    """Top-level modules in a fresh interpreter after these imports."""
    code = f"import sys, {', '.join(names)}; print(*{{name.split('.')[0] for name in sys.modules}})"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    return set(process.stdout.split())


def module_names(prefix: str) -> list[str]:
    paths = [path for path in FILES if path.as_posix().startswith(prefix) and path.name != "__main__.py"]
    return [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in paths]


def test_protocol_loads_neither_torch_nor_ray_nor_vllm():
    loaded = modules_loaded_by(*module_names("protocol/"))
    assert {"msgspec", "zmq", "protocol"} <= loaded, "the check itself looks at what it should"
    assert not loaded & (HEAVY | {"actor", "learner", "deploy"})


def test_intake_loads_no_torch():
    loaded = modules_loaded_by(*module_names("learner/intake/"))
    assert not loaded & (HEAVY | {"actor", "deploy"})


def test_launcher_loads_ray_only_when_it_starts_or_joins_one():
    """Ray reads its token's place when it is loaded: loaded before that is said, it starts without a token."""
    loaded = modules_loaded_by("deploy.cli", "deploy.launch", "deploy.site", "deploy.crew", "deploy.desk")
    assert "ray" not in loaded


def test_dashboard_is_light_beside_a_launcher():
    loaded = modules_loaded_by("deploy.dashboard.server", "deploy.dashboard.command")
    assert {"uvicorn", "starlette"} <= loaded
    assert not loaded & HEAVY


@pytest.mark.parametrize("package", PACKAGES)
def test_package_itself_loads_nothing(package):
    assert not modules_loaded_by(package) & (HEAVY | {"zmq", "pydantic", "numpy"})


def test_rules_catch_what_they_forbid():
    tree = ast.parse(
        "import msgspec as m\nfrom msgspec import msgpack\nimport torch.nn as nn\nm.msgpack.encode(1)\n"
        "def f():\n    from ray import get\n    import vllm.engine\n"
        "if TYPE_CHECKING:\n    import transformers\nelse:\n    import zmq\n"
        "try:\n    import pickle\nexcept ImportError:\n    import dill\nfrom . import loop\n"
    )
    names = {name for name, _ in imported(tree, "actor")}
    assert {"msgspec.msgpack", "torch.nn", "ray.get", "vllm.engine", "pickle", "dill", "actor.loop", "zmq"} <= names
    at_load = {name for name, _ in imported_at_load(tree, "actor")}
    assert {"torch.nn", "zmq", "pickle", "dill"} <= at_load
    assert not at_load & {"ray", "vllm.engine", "transformers"}
    assert ("msgspec.msgpack.encode", 4) in set(attribute_uses(tree))
    assert is_of("msgspec.msgpack.encode", "msgspec.msgpack")
    assert not is_of("rayon", "ray")
