"""What every test stands on: no network, the same random numbers each time, real data where there are any."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import Phase, settings

if TYPE_CHECKING:
    from click.testing import Result

ROOT = Path(__file__).resolve().parents[1]

# Set before anything imports the libraries that read them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# A busy machine is no reason to fail, and a failure must come back when it is looked for.
settings.register_profile("dressage", deadline=None, derandomize=True, print_blob=True)
# benchmarks/mutation.py wants to know that a test fails, not on what smallest example.
settings.register_profile("mutation", settings.get_profile("dressage"), phases=[Phase.explicit, Phase.generate])
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


@pytest.fixture(params=["avx2", "avx512"])
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterable[str]:
    """Within, few_rows.c and next_token.c as they were built for this kind."""
    from dressage import few_rows
    from dressage.compiled import library

    found = library(f"few_rows_{request.param}")
    if found is None or not found.few_rows_suit():
        pytest.skip(f"few_rows.c was not built for {request.param}, or this processor is none of that kind")
    monkeypatch.setattr(few_rows, "library", lambda name: found if name.endswith(request.param) else None)
    remembered = (few_rows.built, few_rows.fewest, few_rows.kernel)
    for known in remembered:
        known.cache_clear()
    yield request.param
    for known in remembered:
        known.cache_clear()


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers on disk, with a tokenizer that writes bytes; padding and end mark are one token."""
    torch = pytest.importorskip("torch")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = CHATML
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        )
    )
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def dressage(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """`dressage("sft", "--out", folder)`: the command in this process, with its exit code, stdout and stderr."""
    from typer.testing import CliRunner

    from dressage.cli import app

    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    # Else all verbs are made anew from their functions each time.
    monkeypatch.setattr("typer.testing._get_command", _verbs)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="dressage")


@cache
def _verbs(app: Any) -> Any:
    from typer.main import get_command

    return get_command(app)


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """`write_rows("data.jsonl", [{...}, ...])` under the test's own folder; a text is written as it is."""

    def write(name: str, rows: Iterable[object]) -> Path:
        path = tmp_path / name
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return path

    return write
