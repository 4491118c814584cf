"""Verbs, options and targets that are wrong."""

from __future__ import annotations

from pathlib import Path

from bad.case import Case, lines
from bad.data import GOOD


def _empty_store(place: Path) -> None:
    from dressage.feedback.store import open_store

    open_store(str(place / "f.db"), make=True).close()


CASES = (
    Case("a verb with a slip", "sftt", ("sftt", "sft", "--help")),
    Case("a verb nobody knows", "train", ("train", "--help")),
    Case("an option of all verbs that is unknown", "--verbse sft", ("--verbse",)),
    Case("an option that is unknown", "sft sft --outt out", ("--outt", "--out", "sft --help")),
    Case("a setting written as an option", "sft sft --epochs 2", ("--epochs", "sft --help")),
    Case("an option without its value", "sft sft --out", ("--out", "argument")),
    Case("an option's value that is a word", "quickstart --seed lucky", ("--seed", "integer")),
    Case("an option's value out of range", "chat tiny --max-new-tokens 0", ("--max-new-tokens", "1")),
    Case("a switch with a value", "sft sft --dry-run=yes", ("--dry-run",)),
    Case("a language nobody wrote", "report made/sft --language fr", ("--language", "'fr'")),
    Case("no recipe for run", "run", ("RECIPE", "run --help")),
    Case("no model for chat", "chat", ("model", "chat --help")),
    Case("too much for report", "report one two", ("two",)),
    # --- chat
    Case("a talk with a model that is not there", "chat ./absent", ("./absent", "no such model folder")),
    Case(
        "a talk with a folder that is empty",
        "chat nothing",
        ("nothing", "holds no model"),
        before=lambda place: (place / "nothing").mkdir(),
    ),
    Case("a talk with a file", "chat tiny/config.json", ("tiny/config.json", "model")),
    Case(
        "a talk with a reward model of words",
        "chat tiny --best-of 2 --reward-model ./absent",
        ("absent", "no reward model here"),
    ),
    Case("the best of several answers by nobody", "chat tiny --best-of 2", ("--best-of 2", "--reward-model")),
    Case(
        "the best of several by a policy",
        "chat tiny --best-of 2 --reward-model made/sft/policy",
        ("made/sft/policy", "is a policy, not a reward model"),
    ),
    Case("a temperature that is no number", "chat tiny --temperature nan", ("--temperature", "0")),
    Case("a temperature without end", "chat tiny --temperature inf", ("--temperature", "inf")),
    Case("a temperature below 0", "chat tiny --temperature -1", ("--temperature", "0")),
    Case("a thinking mode that the model has not", "chat tiny --thinking", ("thinking",)),
    # --- algorithms, recipes, report
    Case("an algorithm with a slip", "algorithms gpro", ("gpro", "did you mean gspo?")),
    Case("an algorithm nobody knows", "algorithms xyz", ("'xyz'", "dpo")),
    Case("a report of nothing", "report absent", ("absent", "no run here")),
    Case("a report of a model", "report tiny", ("tiny", "no run here")),
    Case("a report of a file", "report tiny/config.json", ("tiny/config.json", "no run here")),
    Case(
        "a report of damaged numbers",
        "report run",
        ("run/metrics.jsonl:1",),
        {"run/metrics.jsonl": "{\n{}\n", "run/stage.json": "{}"},
    ),
    Case("a report of a damaged manifest", "report run", ("run/stage.json", "damaged"), {"run/stage.json": "{"}),
    Case(
        "a report of a manifest in bytes",
        "report run",
        ("run/stage.json", "damaged"),
        {"run/stage.json": b"\xff\xfe\x00"},
    ),
    Case("a report of a manifest that is a list", "report run", ("run/stage.json",), {"run/stage.json": "[]"}),
    Case(
        "a report of settings that are a text",
        "report run",
        ("run/stage.json",),
        {"run/stage.json": '{"stage": "sft", "kind": "sft", "settings": "mine"}'},
    ),
    Case(
        "a report of numbers that are texts",
        "report run",
        ("run/metrics.jsonl",),
        {"run/stage.json": "{}", "run/metrics.jsonl": '"a"\n'},
    ),
    Case(
        "a report of steps that are texts",
        "report run",
        ("run/metrics.jsonl",),
        {"run/stage.json": "{}", "run/metrics.jsonl": '{"step": "a", "loss/train": 1}\n'},
    ),
    # --- doctor
    Case("a doctor for nothing", "doctor absent", ("absent", "no such recipe or file")),
    Case(
        "a doctor for an empty folder",
        "doctor nothing",
        ("nothing", "neither a run nor a model"),
        before=lambda place: (place / "nothing").mkdir(),
    ),
    Case(
        "a doctor for a picture",
        "doctor picture.png model.name=tiny",
        ("picture.png:1", "JSON"),
        {"picture.png": b"\x89PNG\r\n\x1a\n" + bytes(64)},
    ),
    Case("a doctor for a damaged recipe", "doctor bad.yaml", ("bad.yaml:1", "not valid YAML"), {"bad.yaml": "{"}),
    Case("a doctor for a recipe of no kind", "doctor bad.yaml", ("bad.yaml", "kind"), {"bad.yaml": "seed: 1\n"}),
    Case(
        "a doctor for a recipe whose kind is a list",
        "doctor bad.yaml",
        ("bad.yaml", "kind"),
        {"bad.yaml": "kind: [sft]\n"},
    ),
    Case(
        "a doctor for a recipe that learns nothing",
        "doctor rank.yaml",
        ("rank", "nothing learns here"),
        {"rank.yaml": "kind: rank\nanswers: a.jsonl\n"},
    ),
    Case(
        "a doctor for an empty file", "doctor data.jsonl model.name=tiny", ("data.jsonl", "no rows"), {"data.jsonl": ""}
    ),
    Case(
        "a doctor for a run with a damaged manifest",
        "doctor run",
        ("run/stage.json", "damaged"),
        {"run/stage.json": "{"},
    ),
    Case(
        "a doctor for a run of unknown settings",
        "doctor run",
        ("run", "dat"),
        {"run/stage.json": '{"stage": "sft", "kind": "sft", "settings": {"dat": 1}}'},
    ),
    Case(
        "a doctor for a run of an unknown kind",
        "doctor run",
        ("run", "'dance'"),
        {"run/stage.json": '{"stage": "x", "kind": "dance", "settings": {"a": 1}}'},
    ),
    Case(
        "a doctor for a run of a foreign program",
        "doctor run",
        ("run",),
        {"run/stage.json": '{"stage": [1], "kind": {}, "settings": 7}'},
    ),
    Case(
        "a doctor with a setting with a slip",
        "doctor data.jsonl model.nam=tiny",
        ("model.nam", "did you mean name?"),
        {"data.jsonl": lines(*GOOD)},
    ),
    Case(
        "a doctor for a model without weights", "doctor model", ("model",), before=lambda place: _without_weights(place)
    ),
    # --- folders
    Case(
        "a file where the folder should be",
        "sft model.name=tiny data.sources=[data.jsonl] --out out",
        ("out", "cannot be written"),
        {"out": "mine", "data.jsonl": lines(*GOOD)},
    ),
    Case(
        "a folder inside a file",
        "sft model.name=tiny data.sources=[data.jsonl] --out data.jsonl/out",
        ("data.jsonl/out", "cannot be written"),
        {"data.jsonl": lines(*GOOD)},
    ),
    Case(
        "a folder's name of 300 letters",
        f"sft model.name=tiny data.sources=[data.jsonl] --out {'x' * 300}",
        ("xxx",),
        {"data.jsonl": lines(*GOOD)},
    ),
    Case(
        "a folder where nobody may write",
        "sft model.name=tiny data.sources=[data.jsonl] --out /proc/nothing",
        ("/proc/nothing", "cannot be written"),
        {"data.jsonl": lines(*GOOD)},
    ),
    Case(
        "a folder without a name",
        "sft model.name=tiny data.sources=[data.jsonl] --out ''",
        ("--out",),
        {"data.jsonl": lines(*GOOD)},
    ),
    Case(
        "a dry run of data that are not there",
        "sft model.name=tiny data.sources=[absent.jsonl] --out out --dry-run",
        ("absent.jsonl", "no such file"),
    ),
    Case(
        "a dry run of rankings that are not there",
        "quickstart --rankings absent.jsonl --out out --dry-run model.name=tiny"
        " model.system=null stages.sft.data.max_tokens=512 stages.reward.depth=1",
        ("absent.jsonl", "no such file"),
    ),
    Case(
        "people's rankings that are not there",
        "quickstart --rankings absent.jsonl --out out",
        ("absent.jsonl", "no such file"),
    ),
    # --- serve and feedback
    Case("no model for serve", "serve", ("model", "serve --help")),
    Case("a model to serve that is not there", "serve ./absent --port 0", ("./absent", "no such model folder")),
    Case("a port that is none", "serve tiny --port 70000", ("--port", "65535")),
    Case("a port that is a word", "serve tiny --port http", ("--port",)),
    Case("an address for all, without saying so", "serve tiny --host 0.0.0.0", ("--host 0.0.0.0", "--expose")),
    Case(
        "an address for all, without a name",
        "serve tiny --host 0.0.0.0 --expose",
        ("--host 0.0.0.0", "--allow-host"),
    ),
    Case(
        "an address that is not this machine's",
        "serve tiny --host 192.0.2.1 --expose --port 0",
        ("192.0.2.1", "cannot listen there", "--port"),
    ),
    Case("a host with a port", "serve tiny --allow-host here:80", ("--allow-host here:80", "without port")),
    Case("a host that is an address of the web", "serve tiny --allow-host https://a.b", ("https://a.b", "://")),
    Case("a database at a port of letters", "feedback list postgresql+psycopg://h:abc/n", ("feedback's place",)),
    Case(
        "feedback to delete that nobody gave",
        "feedback delete f.db --annotator Anna --yes",
        ("f.db", "nothing of the kind"),
        before=_empty_store,
    ),
    Case("an answer of no time", "serve tiny --seconds 0", ("--seconds",)),
    Case("a temperature to serve without end", "serve tiny --temperature 11", ("--temperature",)),
    Case("votes into a folder", "serve tiny --port 0 --feedback tiny", ("tiny", "unable to open"), theirs=True),
    Case(
        "votes into a file of rows",
        "serve tiny --port 0 --feedback data.jsonl",
        ("data.jsonl", "not a database"),
        {"data.jsonl": lines(*GOOD)},
        theirs=True,
    ),
    Case("votes into a database of no kind", "serve tiny --port 0 --feedback paper://desk", ("paper",), theirs=True),
    Case("votes into an address that is none", "feedback list ://", ("feedback's place", "postgresql")),
    Case("feedback without a verb", "feedback lst", ("lst", "feedback --help")),
    Case("feedback of nobody", "feedback list absent.db", ("absent.db", "no feedback here", "dressage serve")),
    Case(
        "feedback in a file of rows",
        "feedback list data.jsonl",
        ("data.jsonl", "not a database"),
        {"data.jsonl": lines(*GOOD)},
        theirs=True,
    ),
    Case("feedback of no kind", "feedback export votes f.db", ("votes", "rankings")),
    Case("feedback to export that is not there", "feedback export rankings absent.db", ("absent.db",)),
    Case(
        "feedback to export that nobody gave",
        "feedback export ratings f.db",
        ("f.db", "no ratings", "feedback list"),
        before=_empty_store,
    ),
    Case("feedback to delete, but which?", "feedback delete f.db --yes", ("--id", "--annotator"), before=_empty_store),
    Case(
        "feedback to delete by two names",
        "feedback delete f.db --yes --id 0 --annotator Anna",
        ("--id", "--annotator"),
        before=_empty_store,
    ),
    Case(
        "feedback to delete, but really?",
        "feedback delete f.db --annotator Anna",
        ("cannot be brought back", "--yes"),
        before=_empty_store,
    ),
)


def _without_weights(place) -> None:
    import shutil

    shutil.copytree(place / "tiny", place / "model")
    (place / "model" / "model.safetensors").unlink()
