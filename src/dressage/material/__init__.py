"""The quickstart's own prompts and demonstrations; README.md beside this file says what each holds."""

from importlib.resources import files
from pathlib import Path

from dressage.errors import DataError


def path(name: str) -> Path:
    """Where a file of this folder lies, such as `demonstrations.jsonl`."""
    shipped = {file.name: file for file in sorted(Path(str(files(__name__))).glob("*.jsonl"))}
    if name not in shipped:
        raise DataError(f"dressage ships no material named {name!r}; it ships {', '.join(shipped)}")
    return shipped[name]
