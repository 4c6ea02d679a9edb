"""The documents against the code: messages and fields in docs/protocol.md, recipe keys in docs/recipe.md, files of the
packages in the README's tree. What is missing fails, and what is described but does not exist.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from learner.telemetry import registry
from learner.telemetry.sample import Sample
from protocol import codec, weights
from protocol import messages as m
from protocol.config import RESUMABLE_KEYS, Recipe
from protocol.sections import Section

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("protocol", "actor", "learner", "deploy")

MESSAGES: tuple[type[msgspec.Struct], ...] = (*codec.FROM_ACTOR, *codec.FROM_LEARNER)
PARTS: tuple[type[msgspec.Struct], ...] = (
    m.TicketId, m.Sampling, m.Completion, m.TensorSpec, m.Manifest, m.DeltaPart, m.Delta,
)  # fmt: skip


def document(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def sections(text: str, level: str) -> dict[str, str]:
    """Title without backticks -> text below it, for the headings of one level (and of none above it in between)."""
    found: dict[str, str] = {}
    title = ""
    for line in text.splitlines():
        if line.startswith(f"{level} "):
            title = line.removeprefix(level).strip().replace("`", "")
            found[title] = ""
        elif re.match(r"#+ ", line) and line.index(" ") < len(level):
            title = ""
        elif title:
            found[title] += line + "\n"
    return found


def table(text: str) -> dict[str, list[str]]:
    """Name in the first cell -> the other cells, for the rows whose first cell is a name in backticks."""
    rows = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in row] for row in rows]
    return {row[0].strip("`"): row[1:] for row in cells}


def block(text: str, name: str) -> str:
    """What stands between <!-- name:begin --> and <!-- name:end -->."""
    return text.split(f"<!-- {name}:begin -->")[1].split(f"<!-- {name}:end -->")[0]


# --- docs/protocol.md -----------------------------------------------------------------------------------------------


def heading_of(message: type[msgspec.Struct]) -> str:
    return str(message.__struct_config__.tag or message.__name__)


@pytest.mark.parametrize("message", [*MESSAGES, *PARTS], ids=heading_of)
def test_protocol_page_has_every_field_with_its_default(message: type[msgspec.Struct]) -> None:
    documented = table(sections(document("docs/protocol.md"), "###")[heading_of(message)])
    fields = msgspec.structs.fields(message)
    assert list(documented) == [field.name for field in fields], "the same fields, in the same order"
    for field in fields:
        cell = documented[field.name][1]
        if field.required:
            assert cell == "required", field.name
        elif isinstance(field.default, bytes):
            assert cell == '`b""`', field.name
        else:
            default = {} if field.default is msgspec.NODEFAULT else msgspec.to_builtins(field.default)
            assert json.loads(cell.strip("`")) == json.loads(json.dumps(default)), field.name


def test_protocol_page_describes_no_other_message() -> None:
    known = {heading_of(message) for message in [*MESSAGES, *PARTS]}
    tables = {title for title, text in sections(document("docs/protocol.md"), "###").items() if "| Field |" in text}
    assert tables <= known


def test_protocol_page_spells_an_ack_out_byte_by_byte() -> None:
    lines = block(document("docs/protocol.md"), "ack").strip().strip("`").strip().splitlines()
    spelled = bytes.fromhex("".join(re.match(r"(?:[0-9a-f]{2} ?)+", line)[0] for line in lines))  # type: ignore[index]
    assert codec.encode(m.Ack((m.TicketId(0, 7),))) == [spelled]
    assert f"version: **{m.PROTOCOL_VERSION}**" in document("docs/protocol.md")


def test_protocol_page_shows_how_a_manifest_is_digested() -> None:
    text = block(document("docs/protocol.md"), "manifest")
    example = json.loads(text.strip().splitlines()[1])
    manifest = msgspec.convert(example, m.Manifest)
    assert weights.manifest_digest(manifest) == re.search(r"digest `([0-9a-f]{32})`", text)[1]  # type: ignore[index]


# --- docs/recipe.md -------------------------------------------------------------------------------------------------


def recipe_sections() -> Iterator[tuple[str, dict[str, Any]]]:
    """(heading, {key: default}) of the recipe's own keys and of each section's."""
    own = {}
    for name, field in Recipe.model_fields.items():
        if isinstance(field.default, Section):
            yield f"[{name}]", field.default.model_dump(mode="json")
        else:
            own[name] = field.default
    yield "The run", own


@pytest.mark.parametrize(("heading", "defaults"), list(recipe_sections()), ids=[name for name, _ in recipe_sections()])
def test_recipe_page_has_every_key_with_its_default(heading: str, defaults: dict[str, Any]) -> None:
    documented = table(sections(document("docs/recipe.md"), "##")[heading])
    assert list(documented) == list(defaults), "the same keys, in the same order"
    found = {key: tomllib.loads(f"x = {cells[1].strip('`')}")["x"] for key, cells in documented.items()}
    assert found == defaults
    prefix = "" if heading == "The run" else heading.strip("[]") + "."
    assert {f"{prefix}{key}" for key, cells in documented.items() if cells[-1] == "resume"} == {
        f"{prefix}{key}" for key in defaults if f"{prefix}{key}" in RESUMABLE_KEYS
    }


# --- docs/metrics.md ------------------------------------------------------------------------------------------------


def test_metrics_page_has_the_registry() -> None:
    assert block(document("docs/metrics.md"), "metrics").strip() == registry.markdown(), (
        "make it anew, as it says below"
    )


def test_metrics_page_has_every_field_of_a_sample() -> None:
    page = sections(document("docs/metrics.md"), "##")["timeline.jsonl"]
    described = {
        name for cell in re.findall(r"^\| (`.*?) \|", page, re.MULTILINE) for name in re.findall(r"`(\w+)`", cell)
    }
    assert described == set(Sample.__struct_fields__)


# --- README.md ------------------------------------------------------------------------------------------------------


def test_readme_tree_has_every_file_of_the_packages() -> None:
    """In the tree a directory stands at the left edge with its whole path, its files below it with two blanks."""
    documented, directory = set(), ""
    for line in block(document("README.md"), "tree").splitlines():
        name = line.split()[0] if line.split() else ""
        if line[:1].strip() and name.endswith("/"):
            directory = name
        elif line.startswith("  ") and not line.startswith("   ") and not name.endswith("/"):
            documented.add(f"{directory}{name}")
    files = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py") if file.name != "__init__.py"]
    files += [*(ROOT / "recipes").glob("*.toml"), *(ROOT / "deploy" / "requirements").glob("*.txt")]
    files += [
        file for ending in ("yaml", "sbatch", "Dockerfile", "json") for file in (ROOT / "deploy").rglob(f"*.{ending}")
    ]
    files += (ROOT / "deploy" / "prometheus").glob("*.yml")
    existing = {file.relative_to(ROOT).as_posix() for file in files}
    assert existing - documented == set(), "files that the README's tree does not name"
    packages = tuple(f"{name}/" for name in (*PACKAGES, "recipes"))
    assert {path for path in documented if path.startswith(packages)} - existing == set(), "files that do not exist"


@pytest.mark.parametrize("name", ["README.md", *(f"docs/{file.name}" for file in sorted((ROOT / "docs").glob("*.md")))])
def test_links_between_documents_lead_somewhere(name: str) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document(name))
    broken = [link for link in links if not ((ROOT / name).parent / link).exists()]
    assert not broken
