"""What every test stands on: no network, the same random numbers each time, real data where there are any."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]

# Set before anything imports the libraries that read them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# A busy machine is no reason to fail, and a failure must come back when it is looked for.
settings.register_profile("dressage", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("dressage")


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """Seed torch before each test, where a test has loaded it."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets: DRESSAGE_SHARED_DATA, or ../shared/data beside the repository."""
    folder = Path(os.environ.get("DRESSAGE_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no real data here: set DRESSAGE_SHARED_DATA to their folder")
    return folder
