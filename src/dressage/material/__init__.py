"""The quickstart's own prompts and demonstrations; README.md beside this file says what each holds."""

from importlib.resources import files
from pathlib import Path

from dressage.errors import DataError


def path(name: str) -> Path:
    """Where a file of this folder lies, such as `demonstrations.jsonl`."""
    found = Path(str(files(__name__))) / name
    if not found.is_file():
        shipped = ", ".join(sorted(file.name for file in found.parent.glob("*.jsonl")))
        raise DataError(f"dressage ships no material named {name!r}; it ships {shipped}")
    return found
