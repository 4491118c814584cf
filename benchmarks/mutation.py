"""Do the tests of the mathematics notice a wrong sign, mask or normaliser? Breaks the code in small ways and counts.

    pip install mutmut==3.8.1    # once; without it the script says so and does nothing
    python benchmarks/mutation.py [--only slips | mutants]

First the slips of slips.txt, mistakes of meaning that no tool would think of; then mutmut's own mutants of every
function in `algorithms/` (`[tool.mutmut]` in pyproject.toml), of new files too. Half an hour or so on one core. What
survived is shown; docs/mutation.md says why it may. Exits with 1 if less than 90 % were noticed.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src"
PROMISED = 0.9
LONGEST = 600
"""Seconds for the tests of one slip."""


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--only", choices=["slips", "mutants"])
    only = options.parse_args().only
    if importlib.util.find_spec("mutmut") is None:
        print("mutmut is not here, nothing done: pip install mutmut==3.8.1")
        return 0
    shares = []
    if only != "mutants":
        shares.append(try_slips())
    if only != "slips":
        shares.append(try_mutants())
    return 0 if min(shares) >= PROMISED else 1


@dataclass(frozen=True)
class Slip:
    """A mistake, the file where it would stand, the tests to ask first, the text as it is and as it should not be."""

    what: str
    path: Path
    judge: str
    right: str
    wrong: str


def read_slips(text: str) -> Iterator[Slip]:
    """The slips of slips.txt; what stands before the first file's name is for people."""
    path, judge = None, ""
    for block in text.strip().split("\n\n"):
        what, *lines = block.split("\n")
        if what.startswith("== "):
            _, file, name = what.split()
            path, judge = SOURCE / "dressage" / file, f"tests/reference/{name}"
        elif path is not None:
            right, wrong = ("\n".join(line[1:] for line in lines if line[0] == sign) for sign in "-+")
            yield Slip(what, path, judge, right, wrong)


def try_slips() -> float:
    """The share that was noticed."""
    for slow in ("torch", "sympy", "hypothesis", "pydantic"):  # loaded once, here, for all the children
        importlib.import_module(slow)

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mutmut"]
    how, judges = settings["pytest_add_cli_args"], settings["pytest_add_cli_args_test_selection"]
    came = []
    for slip in read_slips((ROOT / "benchmarks" / "slips.txt").read_text(encoding="utf-8")):
        came.append(outcome(slip, how, judges))
        print(f"{came[-1]:9} {slip.path.name:20} {slip.what}", flush=True)
    noticed = came.count("noticed")
    print(f"slips: {len(came)}, noticed {noticed} ({noticed / len(came):.1%})", flush=True)
    return noticed / len(came)


def outcome(slip: Slip, how: list[str], judges: list[str]) -> str:
    """What the tests say of a copy of the source with this slip in it: "noticed", "SURVIVED", or what went wrong."""
    source = slip.path.read_text(encoding="utf-8")
    if source.count(slip.right) != 1:
        return "NO FIT"  # the code has moved on: so must slips.txt
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "src"
        shutil.copytree(SOURCE, copy, ignore=shutil.ignore_patterns("__pycache__"))
        (copy / slip.path.relative_to(SOURCE)).write_text(source.replace(slip.right, slip.wrong), encoding="utf-8")
        child = os.fork()
        if child == 0:
            os._exit(run_tests(copy, how, [[slip.judge], judges]))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    # 1: a test failed; 2: it could not even be loaded; below 0: it took too long.
    return {0: "SURVIVED", 1: "noticed", 2: "noticed", -signal.SIGALRM: "noticed"}.get(code, f"ERROR {code}")


def run_tests(copy: Path, how: list[str], rounds: list[list[str]]) -> int:
    """In the child: pytest's exit code on this copy of the source, of the first round of tests that fails."""
    signal.alarm(LONGEST)
    os.chdir(ROOT)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.path.insert(0, str(copy))
    import pytest

    codes = (int(pytest.main(["-x", "-q", *how, *tests])) for tests in rounds)
    return next((code for code in codes if code), 0)


def try_mutants() -> float:
    """The share that was killed; mutmut tries those alone that it has not tried on the present code."""
    mutmut = [sys.executable, "-m", "mutmut"]
    subprocess.run([*mutmut, "run", "--max-children", "1"], cwd=ROOT, check=True)
    killed, left = 0, []
    for path in sorted((ROOT / "mutants").rglob("*.meta")):
        codes = json.loads(path.read_text(encoding="utf-8"))["exit_code_by_key"]
        # 1: a test failed. All else is no kill, a time-out (on a busy machine) and a mutant without tests included.
        survivors = [name for name, code in codes.items() if code != 1]
        killed += len(codes) - len(survivors)
        left += survivors
        if codes:
            print(f"{path.name.removesuffix('.meta'):20} {len(codes):4} mutants, {len(survivors):3} survived")
    for name in left:
        shown = subprocess.run([*mutmut, "show", name], cwd=ROOT, capture_output=True, text=True).stdout
        print(name, *(line for line in shown.splitlines() if line.startswith(("+ ", "- "))), sep="\n")
    mutants = killed + len(left)
    print(f"mutants: {mutants}, killed {killed} ({killed / mutants:.1%})")
    return killed / mutants


if __name__ == "__main__":
    sys.exit(main())
