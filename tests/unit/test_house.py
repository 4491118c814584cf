"""The house around the code: what must stay light stays light, and the pages say what is there."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "dressage"
PAGES = [
    "README.md",
    "README.zh.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "SECURITY.md",
    "docs/glossary.md",
    "docs/trust.md",
]

LIGHT = [
    "__init__.py",
    "cli.py",
    "config.py",
    "errors.py",
    "reward_parts.py",
    "schema.py",
    "settings.py",
    "feedback",
    "monitor",
]
"""Imported for `--help` and by tools that only read settings or records."""

IMPORT_ALL = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    for heavy in ("torch", "transformers", "datasets", "tensorboard"):
        if heavy in sys.modules:
            sys.exit(f"{name} loads {heavy}")
"""

needs_cli = pytest.mark.skipif(importlib.util.find_spec("dressage.cli") is None, reason="no dressage.cli yet")


def module_name(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def holds_something(folder: Path) -> bool:
    """More than an empty `__init__.py` or a placeholder."""
    return any(f.suffix in {".py", ".yaml", ".jsonl"} and f.stat().st_size > 0 for f in folder.rglob("*"))


def help_text() -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from dressage.cli import main; main()", "--help"],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1"},
    )


def test_light_modules_load_no_torch() -> None:
    places = [place for name in LIGHT for place in [PACKAGE / name, *sorted((PACKAGE / name).rglob("*.py"))]]
    files = [place for place in places if place.is_file()]
    ran = subprocess.run([sys.executable, "-c", IMPORT_ALL, *map(module_name, files)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


@needs_cli
def test_help_answers_at_once() -> None:
    """Best of three, so that a busy machine does not fail it; DRESSAGE_TIME_SCALE=3 for a slow one."""
    limit_seconds = 0.5 * float(os.environ.get("DRESSAGE_TIME_SCALE", "1"))
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        ran = help_text()
        seconds.append(time.perf_counter() - began)
        assert ran.returncode == 0, ran.stderr
    assert min(seconds) < limit_seconds


@needs_cli
@pytest.mark.parametrize("page", ["README.md", "README.zh.md"])
def test_a_page_shows_only_verbs_that_exist(page: str) -> None:
    shown = set(re.findall(r"(?:^|`|bin/)dressage ([a-z]+)", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE))
    assert {"quickstart", "sft", "reward", "ppo", "chat"} <= shown
    offered = set(re.findall(r"^\W+([a-z]+)\b", help_text().stdout, re.MULTILINE))
    assert shown <= offered, f"{page} shows {sorted(shown - offered)}, which `dressage --help` does not"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)|src(?:set)?=\"([^\"]+)\"", text)
    targets = {a or b for a, b in links if "://" not in a + b}
    assert [target for target in sorted(targets) if not ((ROOT / page).parent / target).exists()] == []


@pytest.mark.parametrize("page", ["README.md", "README.zh.md"])
def test_the_tree_is_the_tree(page: str) -> None:
    """Every file and folder that a README's tree names is there, and every one that is there is named."""
    text = (ROOT / page).read_text(encoding="utf-8")
    tree = text.split("src/dressage/\n", 1)[1].split("```", 1)[0]
    named = {name.rstrip("/") for name in re.findall(r"^  (\w+(?:\.py|/))", tree, re.MULTILINE)}
    there = {
        path.name
        for path in PACKAGE.iterdir()
        if not path.name.startswith(("__", ".")) and (path.suffix == ".py" or holds_something(path))
    }
    assert named == there


def test_rows_that_a_readme_shows_are_read(tmp_path: Path) -> None:
    sources = pytest.importorskip("dressage.data.sources")
    read = {
        "demonstrations": sources.read_demonstrations,
        "comparisons": sources.read_rankings,
        "rankings": sources.read_rankings,
        "ratings": sources.read_ratings,
        "prompts only": sources.read_prompts,
    }
    english, chinese = ((ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "README.zh.md"))
    examples = [("rankings", row) for text in (english, chinese) for row in re.findall(r"```json\n(.+)\n```", text)]
    use = ""
    for cells in re.finditer(r"^\| ([a-z ]*)\| (`\{\".*)$", english, re.MULTILINE):
        use = cells[1].strip() or use
        examples += [(use, row) for row in re.findall(r"`(.+?)`", cells[2]) if row.startswith("{")]
    assert len(examples) >= 12
    for use, row in examples:
        (tmp_path / "rows.jsonl").write_text(row, encoding="utf-8")
        assert len(read[use](str(tmp_path / "rows.jsonl")).records) == 1, row
    assert re.findall(r"`(\{\".+?)`", chinese) == re.findall(r"`(\{\".+?)`", english)


def test_the_glossary_names_what_the_code_has() -> None:
    code = "\n".join(file.read_text(encoding="utf-8") for file in PACKAGE.rglob("*.py"))
    page = (ROOT / "docs/glossary.md").read_text(encoding="utf-8")
    names = re.findall(r"`([^`]+)`(?=[^|\n]*\|\n)", page)
    assert len(names) > 20
    assert [name for name in names if not re.search(rf"(?<!\w){re.escape(name)}(?!\w)", code)] == []


def test_the_page_of_numerics_names_tests_that_are_there() -> None:
    page = (ROOT / "docs/numerics.md").read_text(encoding="utf-8")
    code = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("test_*.py"))
    names = set(re.findall(r"`(test_\w+)`", page))
    assert len(names) > 20
    assert names - set(re.findall(r"def (test_\w+)", code)) == set()


def test_every_planted_fault_has_its_test() -> None:
    """Each row of the page names a test that is there, and each check of the doctor has a row."""
    page = (ROOT / "docs/trust.md").read_text(encoding="utf-8").split("## Silent faults, planted", 1)[1]
    code = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("test_*.py"))
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 40
    assert [row[0] for row in rows if "test_" not in row[-1]] == []
    names = {name for row in rows for name in re.findall(r"`(\w+)`", row[-1])}
    assert names - set(re.findall(r"def (\w+)", code)) == set()
    planted = {
        int(number)
        for row in rows
        for number in re.findall(r"doctor ([\d, ]+)", row[1])[0:1]
        for number in number.split(",")
        if number.strip()
    }
    assert planted == set(range(1, 31))
