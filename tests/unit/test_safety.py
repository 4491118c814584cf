"""The points of SECURITY.md that can be shown by looking at the code, or at a run with traps around it."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from dressage.monitor.page import POLICY

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "src").rglob("*.py")}
ATTACK = "<script>alert(1)</script><img src=x onerror=alert(2)>"
KEY = "sk-0123456789abcdef"
Command = Callable[..., Any]

RUN_WATCHED = """
import json, sys
seen = []
WATCHED = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.bind", "pickle.find_class")
sys.addaudithook(lambda event, args: seen.append([event, str(args[-1])[:80]]) if event in WATCHED else None)
from dressage.cli import main
try:
    main()
finally:
    print("SEEN " + json.dumps(seen), file=sys.stderr)
"""


def imported(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Calls with what is called, as it is written."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


# --- looking at the code ----------------------------------------------------------------------------------------------


def test_nothing_is_evaluated_or_unpickled() -> None:
    """Point 5, and point 1 for reading and writing."""
    forbidden = {
        "eval",
        "exec",
        "compile",
        "__import__",
        "os.system",
        "os.popen",
        "torch.load",
        "torch.save",
        "yaml.unsafe_load",
    }
    modules = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    found = []
    for path, tree in SOURCES.items():
        found += [f"{path.name}: {name}" for name in imported(tree) if name.split(".")[0] in modules]
        for name, call in calls(tree):
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            if name in forbidden or options.get("shell") == "True" or options.get("allow_pickle") == "True":
                found.append(f"{path.name}:{call.lineno}: {name}")
    assert found == []


def test_yaml_makes_no_objects() -> None:
    import yaml

    from dressage.recipe import _Loader

    loads = [
        (path.name, ast.unparse(call))
        for path, tree in SOURCES.items()
        for name, call in calls(tree)
        if name == "yaml.load"
    ]
    assert loads == [("recipe.py", "yaml.load(text, Loader=_Loader)")] and issubclass(_Loader, yaml.SafeLoader)


def test_weights_are_read_from_safetensors_alone() -> None:
    """Point 1: whoever reads weights says so to transformers; the GGUF file of the packaged model is the exception."""
    found = []
    for path, tree in SOURCES.items():
        for name, call in calls(tree):
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            if name.endswith("from_pretrained") and not re.match(r"Auto(Config|Tokenizer)\.", name):
                found.append(f"{path.name}: {name}" if "gguf_file" in options else options.get("use_safetensors"))
    assert sorted(map(str, found)) == ["True", "True", "pretrained.py: AutoModelForCausalLM.from_pretrained"]


def test_code_of_a_model_runs_only_by_the_setting() -> None:
    """Point 2: the flag is only ever the setting's, and that is off."""
    from dressage.settings import ModelConfig

    flags = {
        ast.unparse(keyword.value)
        for tree in SOURCES.values()
        for _, call in calls(tree)
        for keyword in call.keywords
        if keyword.arg == "trust_remote_code"
    }
    assert flags == {"config.trust_remote_code", "model.trust_remote_code"}
    assert ModelConfig().trust_remote_code is False


def test_there_is_one_server() -> None:
    """Point 3: nothing but `dressage serve` listens, and a model's weights are read there, never written."""
    servers = {"socketserver", "wsgiref", "uvicorn", "fastapi", "flask", "aiohttp", "tornado"}
    used = {path.name: {name.split(".")[0] for name in imported(tree)} for path, tree in SOURCES.items()}
    assert {name for name, modules in used.items() if modules & servers} == {"guard.py", "server.py"}
    assert {name for name, modules in used.items() if "socket" in modules} == {"cli_serving.py"}
    serving = [tree for path, tree in SOURCES.items() if path.name in ("asked.py", "server.py", "desk.py", "guard.py")]
    writers = ("open", "write_text", "write_bytes", "save_file", "load_state_dict", "backward", "copy_", "generate")
    assert [name for tree in serving for name, _ in calls(tree) if name.split(".")[-1] in writers] == []


def test_a_page_forbids_scripts() -> None:
    """Point 4: nothing loads, nothing runs; style alone may stand in the page."""
    rules = dict(rule.strip().partition(" ")[::2] for rule in POLICY.split(";"))
    assert rules["default-src"] == "'none'" and "script-src" not in rules
    assert [name for name, value in rules.items() if "unsafe" in value] == ["style-src"]


# --- runs with traps --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def watched(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[str]]]:
    """A run on hostile texts in a process of its own that may use the network, and what it reached for."""
    place = tmp_path_factory.mktemp("watched")
    model = place / "<b>model"
    shutil.copytree(tiny_model, model)
    rows = [{"prompt": f"{ATTACK} {n}", "completion": f"{ATTACK} {n}"} for n in range(6)]
    (place / "<i>data.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    told = {"name": model.name, "trust_remote_code": True, "system": ATTACK}
    data = {"sources": ["<i>data.jsonl"], "heldout_fraction": 0.3}
    asked = [
        "sft",
        f"model={json.dumps(told)}",
        f"data={json.dumps(data)}",
        "training.steps=2",
        f"description={json.dumps(ATTACK)}",
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    environment |= {"PYTHONPATH": str(ROOT / "src"), "HF_HOME": str(place / "hub")}
    ran = subprocess.run(
        [sys.executable, "-c", RUN_WATCHED, *asked, "--out", "out"],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    return place / "out", json.loads(ran.stderr.rpartition("SEEN ")[2])


def test_a_run_uses_no_network_and_no_pickle(watched: tuple[Path, list[list[str]]]) -> None:
    """Points 1, 3 and 8: from the first import to the report."""
    assert watched[1] == []


def test_the_manifest_shows_that_code_was_trusted(watched: tuple[Path, list[list[str]]]) -> None:
    """Point 2."""
    manifest = json.loads((watched[0] / "stage.json").read_text(encoding="utf-8"))
    assert manifest["settings"]["model"]["trust_remote_code"] is True


def test_what_people_and_models_wrote_is_escaped(watched: tuple[Path, list[list[str]]]) -> None:
    """Point 4: names of models and files, descriptions, prompts and answers."""
    page = (watched[0] / "report.html").read_text(encoding="utf-8")
    assert f'http-equiv="Content-Security-Policy" content="{POLICY}"' in page
    assert not re.search(r"<(script|img|b>model|i>data)", page)
    for planted in ("&lt;script&gt;", "&lt;b&gt;model", "&lt;i&gt;data.jsonl"):
        assert planted in page


def test_a_pickle_with_a_trap_is_not_opened(dressage: Command, tiny_model: Path, tmp_path: Path) -> None:
    """Point 1: the way to convert is told instead."""
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    sprung = tmp_path / "sprung"
    # "Call os.mkdir with this path", as a pickle.
    (folder / "pytorch_model.bin").write_bytes(b"cos\nmkdir\n(V" + str(sprung).encode() + b"\ntR.")
    ran = dressage("chat", folder)
    assert ran.exit_code == 2 and "safetensors" in ran.stderr and "save_pretrained" in ran.stderr
    assert not sprung.exists()


def test_a_key_is_written_nowhere(
    dressage: Command, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Point 8: the judge gets it, and neither the screen nor any file of the run does."""
    seen: list[str] = []

    class Judge(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            seen.append(self.headers["Authorization"])
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"choices": [{"message": {"content": str(len(seen) % 10)}}]}).encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("JUDGE_KEY", KEY)
    (tmp_path / "data.jsonl").write_text("".join(f'{{"prompt": "Why {n}?"}}\n' for n in range(4)), encoding="utf-8")
    part = {"type": "judge", "url": f"http://127.0.0.1:{server.server_port}/v1", "key_variable": "JUDGE_KEY"}
    asked = [
        "rl",
        f"model.name={tiny_model}",
        f'prompts.sources=["{tmp_path}/data.jsonl"]',
        "prompts.heldout_fraction=0",
    ]
    asked += ["training.steps=1", "rollout.prompts_per_step=4", "rollout.max_new_tokens=4", "reward_model=null"]
    asked += [
        "minibatch_size=4",
        "value.start=zero",
        "lora.layers=null",
        "gold=null",
        f"rewards.wise={json.dumps(part)}",
    ]
    try:
        ran = dressage(*asked, "--out", tmp_path / "out")
    finally:
        server.shutdown()
        server.server_close()
    assert ran.exit_code == 0, ran.output
    assert seen and set(seen) == {f"Bearer {KEY}"}
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) > 5 and not [path for path in files if KEY.encode() in path.read_bytes()]
    assert KEY not in ran.output and '"key_variable": "JUDGE_KEY"' in (tmp_path / "out" / "stage.json").read_text()


def test_security_names_tests_that_are_there() -> None:
    page = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    names = set(re.findall(r"`(test_\w+)`", page))
    assert len(names) > 12 and names - set(re.findall(r"def (test_\w+)", code)) == set()
