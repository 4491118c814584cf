"""Models, adapters, reward models, checkpoints and run folders that are damaged, foreign or do not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bad.case import Case, lines
from bad.data import GOOD

DATA = {"data.jsonl": lines(*GOOD)}
SFT = "sft model.name={} data.sources=[data.jsonl] training.steps=1 --out out"
SAMPLE = "sample model.name={} prompts.sources=[data.jsonl] max_new_tokens=2 --out out"
PPO = "ppo model.name=made/sft/policy prompts.sources=[data.jsonl] training.steps=1 --out out {}"
AGAIN = (
    "sft model.name=tiny data.sources=[made/data.jsonl] data.heldout_fraction=0 lora.rank=2 lora.alpha=4"
    " training.batch_size=2 training.steps=3 training.checkpoint_every=1 --out made/sft"
)
Damage = Callable[[Path], object]


def _model(wrong: str, damage: Damage, *names: str, command: str = SFT, theirs: bool = False) -> Case:
    """A copy of `tiny` with one thing wrong."""

    def before(place: Path) -> None:
        shutil.copytree(place / "tiny", place / "model")
        damage(place / "model")

    return Case(wrong, command.format("model"), ("model", *names), DATA, before, theirs)


def _made(wrong: str, path: str, damage: Damage, *names: str, command: str = SAMPLE, theirs: bool = False) -> Case:
    """Something that a stage made, damaged afterwards."""
    said = command.format("made/sft/policy")
    return Case(wrong, said, names or (path,), DATA, lambda place: damage(place / path), theirs)


def edited(file: str, **changes: Any) -> Damage:
    """Sets keys of a JSON file; one set to ... is taken out."""

    def damage(folder: Path) -> None:
        path = folder / file if file else folder
        value = json.loads(path.read_text(encoding="utf-8")) | changes
        path.write_text(json.dumps({key: one for key, one in value.items() if one is not ...}), encoding="utf-8")

    return damage


def _written(content: bytes) -> Damage:
    return lambda path: path.write_bytes(content)


def _file(name: str, content: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(content)


def _removed(*names: str) -> Damage:
    return lambda folder: [(folder / name).unlink() for name in names]


def _halved(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _weights(change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(path: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        change(tensors)
        save_file(tensors, path, {"format": "pt"})

    return damage


def _of_model(damage: Damage) -> Damage:
    return lambda folder: damage(folder / "model.safetensors")


def _narrowed(tensors: dict[str, Any]) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name][:8].clone()


def _pickled(name: str) -> Damage:
    def damage(folder: Path) -> None:
        import torch
        from safetensors.torch import load_file

        torch.save(load_file(folder / "model.safetensors"), folder / name)
        (folder / "model.safetensors").unlink()

    return damage


def _tokenizer(**changes: Any) -> Damage:
    return edited("tokenizer_config.json", **changes)


def _template(text: str) -> Damage:
    return _file("chat_template.jinja", text.encode())


def _remote_code(folder: Path) -> None:
    edited(
        "config.json", auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}, model_type="odd"
    )(folder)
    (folder / "code.py").write_text("open('hacked', 'w').close()\n", encoding="utf-8")


def _circle(place: Path) -> None:
    for name, below in (("one", "../two"), ("two", "../one")):
        (place / name).mkdir()
        (place / name / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": below}))


POLICY, REWARD = "made/sft/policy", "made/reward/reward"
ADAPTER = f"{POLICY}/adapter_config.json"
TENSORS = f"{POLICY}/adapter_model.safetensors"
ROLE = f"{POLICY}/role.json"
SCORED = PPO.format("reward_model=made/reward/reward")


def _checkpoints(wrong: str, damage: Damage, *names: str, command: str = AGAIN) -> Case:
    """An interrupted run whose checkpoints are all damaged in one way."""

    def before(place: Path) -> None:
        edited("", status="interrupted")(place / "made/sft/stage.json")
        for folder in sorted((place / "made/sft/checkpoints").iterdir()):
            damage(folder)

    # The run is told in its manifest to have been tried again.
    changes = tuple(f"made/sft/{name}" for name in ("stage.json", "data.json"))
    return Case(wrong, command, ("made/sft", *names), DATA, before, changes=changes)


CASES = (
    Case("a model that is not there", SFT.format("./absent"), ("./absent", "no such model folder"), DATA),
    Case(
        "a model deep in folders that are not there",
        SFT.format("runs/sft/policy"),
        ("runs/sft/policy", "no such model folder"),
        DATA,
    ),
    Case(
        "a model of the hub, offline",
        SFT.format("nobody/has-this-model"),
        ("nobody/has-this-model",),
        DATA,
        theirs=True,
    ),
    Case("a name that no model can have", SFT.format("'a model?'"), ("a model?",), DATA, theirs=True),
    Case(
        "a model's name with a zero byte",
        "sft 'model.name=\"a\\\\0b\"' data.sources=[data.jsonl] --out out",
        ("a", "tokenizer"),
        DATA,
        theirs=True,
    ),
    Case(
        "an empty folder for a model",
        SFT.format("nothing"),
        ("nothing", "holds no model", "config.json"),
        DATA,
        lambda place: (place / "nothing").mkdir(),
    ),
    Case("a file for a model", SFT.format("tiny/model.safetensors"), ("tiny/model.safetensors",), DATA, theirs=True),
    # --- configuration
    _model("a configuration that is no JSON", _file("config.json", b"{"), "config", theirs=True),
    _model("a configuration in bytes", _file("config.json", b"\xff\xfe"), "model", theirs=True),
    _model("a configuration that is a list", _file("config.json", b"[]"), "model", theirs=True),
    _model("an empty configuration", _file("config.json", b"{}"), "model_type", theirs=True),
    _model("an architecture nobody knows", edited("config.json", model_type="gptt"), "gptt", theirs=True),
    _model("a width that is a text", edited("config.json", hidden_size="wide"), "hidden_size", theirs=True),
    _model("a width that the weights have not", edited("config.json", hidden_size=64), "model", theirs=True),
    _model(
        "a layer more than the weights have",
        edited("config.json", num_hidden_layers=3),
        "model",
        "weights",
        "model.layers.2",
    ),
    _model("heads that do not divide the width", edited("config.json", num_attention_heads=5), "model", theirs=True),
    _model("a model that brings code", _remote_code, "brings code", "model.trust_remote_code=true"),
    # --- weights
    _model("no weights", _removed("model.safetensors"), "safetensors", theirs=True),
    _model("weights that end early", lambda f: _halved(f / "model.safetensors"), "model", "weights", theirs=True),
    _model("empty weights", _file("model.safetensors", b""), "weights", theirs=True),
    _model(
        "weights that are a text",
        _file("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n" * 3),
        "weights",
        theirs=True,
    ),
    _model("a header that promises too much", _file("model.safetensors", b"\xff" * 64), "weights", theirs=True),
    _model(
        "weights without a layer",
        _of_model(_weights(lambda t: [t.pop(k) for k in list(t) if ".layers.1." in k])),
        "weights",
        "model.layers.1",
    ),
    _model(
        "weights without one matrix",
        _of_model(_weights(lambda t: t.pop("model.layers.0.mlp.up_proj.weight"))),
        "weights",
        "up_proj",
    ),
    _model("weights of another shape", _of_model(_weights(_narrowed)), "weights", theirs=True),
    _model(
        "weights that are not numbers (NaN)",
        _of_model(_weights(lambda t: t["model.norm.weight"].fill_(float("nan")))),
        "NaN",
        command=SAMPLE,
    ),
    _model("pickled weights (.bin)", _pickled("pytorch_model.bin"), "safetensors", "save_pretrained", theirs=True),
    _model("pickled weights (.pt)", _pickled("model.pt"), "safetensors", "save_pretrained", theirs=True),
    # --- tokenizer and template
    _model("no tokenizer", _removed("tokenizer.json", "tokenizer_config.json"), "tokenizer", theirs=True),
    _model("a tokenizer that is no JSON", _file("tokenizer.json", b"{"), "tokenizer", theirs=True),
    _model("a tokenizer of another kind of file", _file("tokenizer.json", b"[1, 2]"), "tokenizer", theirs=True),
    _model("a tokenizer of bytes", _file("tokenizer.json", b"\xff\xfe"), "tokenizer", theirs=True),
    _model("a tokenizer with more words than the model", edited("config.json", vocab_size=100), "tokenizer", "100"),
    _model(
        "no mark that ends an answer",
        lambda f: (_template("{% for m in messages %}{{ m.content }} {% endfor %}")(f), _tokenizer(eos_token=None)(f)),
        "eos_token",
        "ends an answer",
    ),
    _model("a template with a fault", _template("{% for m in messages %}{{ m.content }"), "chat template"),
    _model("a template that divides by zero", _template("{{ 1 / 0 }}"), "chat template"),
    _model(
        "a template that reaches outside",
        _template("{{ messages.__class__.__mro__[1].__subclasses__() }}"),
        "chat template",
    ),
    _model(
        "a template that shows no answers",
        _template("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"),
        "chat template",
    ),
    _model(
        "a template that turns the order round",
        _template("{% for m in messages[::-1] %}{{ m.content }}<|im_end|>{% endfor %}"),
        "chat template",
    ),
    _model(
        "a template of the settings with a fault",
        lambda f: None,
        "chat template",
        command="sft model.name={} 'model.chat_template=\"{{% bad\"' data.sources=[data.jsonl] --out out",
    ),
    _model(
        "a thinking mode that the template has not",
        lambda f: None,
        "thinking",
        command="sft model.name={} model.thinking=true data.sources=[data.jsonl] --out out",
    ),
    _model(
        "an answer longer than the model can hold",
        edited("config.json", max_position_embeddings=16),
        "16 positions",
        "max_new_tokens",
        command=SAMPLE,
    ),
    # --- adapters
    _made("an adapter's weights that are missing", TENSORS, Path.unlink, "is missing"),
    _made("an adapter's weights that end early", TENSORS, _halved, "is damaged"),
    _made("an adapter's weights that are empty", TENSORS, _written(b""), "is damaged"),
    _made(
        "an adapter without one of its matrices",
        TENSORS,
        _weights(lambda t: t.pop(sorted(t)[0])),
        POLICY,
        "does not fit",
    ),
    _made(
        "an adapter with a matrix too many",
        TENSORS,
        _weights(lambda t: t.update(more=t[sorted(t)[0]].clone())),
        POLICY,
        "does not fit",
        "more",
    ),
    _made(
        "an adapter of other shapes",
        TENSORS,
        _weights(lambda t: t.update({k: v[:1].clone() for k, v in t.items()})),
        POLICY,
        "(1, 32), not (2, 32)",
    ),
    _made(
        "an adapter that is not numbers (NaN)",
        TENSORS,
        _weights(lambda t: [v.fill_(float("nan")) for v in t.values()]),
        TENSORS,
        "not finite",
    ),
    _made("an adapter's settings that are no JSON", ADAPTER, _written(b"{"), "not an adapter configuration"),
    _made("an adapter's settings in bytes", ADAPTER, _written(b"\xff"), "not an adapter configuration"),
    _made("an adapter's settings that are a list", ADAPTER, _written(b"[]"), "not an adapter configuration"),
    _made(
        "an adapter that names no base", ADAPTER, edited("", base_model_name_or_path=None), "base_model_name_or_path"
    ),
    _made(
        "an adapter whose base is gone",
        ADAPTER,
        edited("", base_model_name_or_path="../../../gone/away"),
        "gone/away",
        "no such model",
    ),
    _made("an adapter that is its own base", ADAPTER, edited("", base_model_name_or_path="."), "is its own base"),
    Case(
        "two adapters that are each other's base",
        SFT.format("one"),
        ("one/adapter_config.json", "is its own base"),
        DATA,
        _circle,
    ),
    _made(
        "an adapter of another kind (peft)",
        POLICY,
        lambda f: (edited("adapter_config.json", peft_type="PROMPT_TUNING", r=...)(f), (f / "role.json").unlink()),
        "adapter_config.json",
        "LORA",
    ),
    _made(
        "an adapter scaled in another way (rsLoRA)",
        POLICY,
        lambda f: (edited("adapter_config.json", use_rslora=True)(f), (f / "role.json").unlink()),
        "adapter_config.json",
        "use_rslora",
    ),
    _made(
        "an adapter of various ranks",
        POLICY,
        lambda f: (edited("adapter_config.json", alpha_pattern={"q_proj": 3})(f), (f / "role.json").unlink()),
        "adapter_config.json",
        "alpha_pattern",
    ),
    _made(
        "an adapter without a rank",
        POLICY,
        lambda f: (edited("adapter_config.json", r=...)(f), (f / "role.json").unlink()),
        "adapter_config.json",
    ),
    _made("a role that is no JSON", ROLE, _written(b"{"), "is damaged"),
    _made("a role in bytes", ROLE, _written(b"\xff"), "is damaged"),
    _made("a role that is a list", ROLE, _written(b"[]"), "is damaged"),
    _made(
        "a role whose adapter has unknown settings",
        ROLE,
        edited("", lora={"rank": 2, "alpha": 4.0, "beta": 1}),
        "is damaged",
        "beta",
    ),
    _made("a role whose adapter is a text", ROLE, edited("", lora="small"), "is damaged"),
    _made("a role deeper than the model", ROLE, edited("", depth=99), "99"),
    _made("a role to talk to, without a model", ROLE, edited("", model=...), "is damaged", command="chat {}"),
    _made(
        "a role to talk to, of unknown settings",
        ROLE,
        edited("", model={"nam": "x"}),
        "is damaged",
        "nam",
        command="chat {}",
    ),
    _model(
        "a KL to a model that has no adapter",
        lambda f: None,
        "measure_kl",
        "no adapter",
        command=SAMPLE + " measure_kl=true",
    ),
    # --- reward models
    Case(
        "a reward model that is not there",
        PPO.format("reward_model=./absent"),
        ("absent", "no reward model here", "dressage reward"),
        DATA,
    ),
    Case(
        "a policy for a reward model",
        PPO.format("reward_model=made/sft/policy"),
        ("made/sft/policy", "is a policy, not a reward model"),
        DATA,
    ),
    Case("a model for a reward model", PPO.format("reward_model=tiny"), ("tiny", "no reward model here"), DATA),
    _made("a reward model that is no JSON", f"{REWARD}/role.json", _written(b"{"), "is damaged", command=SCORED),
    _made("a reward model of no kind", f"{REWARD}/role.json", edited("", kind=...), "is damaged", command=SCORED),
    _made("a reward model without a model", f"{REWARD}/role.json", edited("", model=...), "is damaged", command=SCORED),
    _made("a reward model without depth", f"{REWARD}/role.json", edited("", depth=...), "is damaged", command=SCORED),
    _made(
        "a reward model that reads in an unknown way",
        f"{REWARD}/role.json",
        edited("", pooling="max"),
        "is damaged",
        command=SCORED,
    ),
    _made("a reward model without its head", f"{REWARD}/head.safetensors", Path.unlink, "is missing", command=SCORED),
    _made("a head that ends early", f"{REWARD}/head.safetensors", _halved, "is damaged", command=SCORED),
    _made(
        "a head of another width",
        f"{REWARD}/head.safetensors",
        _weights(lambda t: t.update({k: v[..., :8].clone() if v.dim() else v for k, v in t.items()})),
        "no scalar head of width 32",
        command=SCORED,
    ),
    _made(
        "a head that is not numbers (NaN)",
        f"{REWARD}/head.safetensors",
        _weights(lambda t: [v.fill_(float("nan")) for v in t.values()]),
        "not finite",
        command=SCORED,
    ),
    Case(
        "a critic with other words than the policy's",
        PPO.format("reward_model=made/reward/reward value.start=base value.model.name=./other value.lora.rank=2"),
        ("value.model.name=./other", "another tokenizer"),
        DATA,
        lambda place: _other_words(place),
    ),
    Case(
        "a reward to go on from that is not there",
        "reward model.name=tiny data.sources=[made/rankings.jsonl] start=./absent --out out",
        ("absent", "no reward model here"),
    ),
    Case(
        "a reward to go on from, with another rank",
        "reward model.name=made/sft/policy data.sources=[made/rankings.jsonl] start=made/reward/reward"
        " depth=1 lora.rank=7 --out out",
        ("start=made/reward/reward", "lora", "rank"),
    ),
    Case(
        "a reward to go on from, on another model",
        "reward model.name=tiny data.sources=[made/rankings.jsonl] start=made/reward/reward --out out",
        ("start=made/reward/reward", "set the same model"),
    ),
    Case(
        "a depth that the model has not",
        "reward model.name=tiny data.sources=[made/rankings.jsonl] depth=9 --out out",
        ("depth=9", "2 layers"),
    ),
    Case(
        "answers to normalise on that are not there",
        "reward model.name=tiny data.sources=[made/rankings.jsonl] normalise_on=absent.jsonl --out out",
        ("absent.jsonl", "dressage sample"),
    ),
    # --- checkpoints and run folders
    _checkpoints(
        "checkpoints that end early", lambda f: _halved(f / "weights.safetensors"), "every checkpoint is damaged"
    ),
    _checkpoints("checkpoints without manifests", _removed("manifest.json"), "every checkpoint is damaged"),
    _checkpoints(
        "checkpoints whose manifests are no JSON", _file("manifest.json", b"{"), "every checkpoint is damaged"
    ),
    _checkpoints("checkpoints without states", _removed("state.json"), "every checkpoint is damaged"),
    _checkpoints("checkpoints whose states were edited", edited("state.json", step=1), "every checkpoint is damaged"),
    _checkpoints("checkpoints without moments", _removed("moments.safetensors"), "every checkpoint is damaged"),
    _checkpoints(
        "checkpoints whose moments are empty", _file("moments.safetensors", b""), "every checkpoint is damaged"
    ),
    _made(
        "a run whose manifest is gone", "made/sft/stage.json", Path.unlink, "made/sft", "holds policy", command=AGAIN
    ),
    _made(
        "a manifest of a stage that is no JSON",
        "made/sft/stage.json",
        _written(b"{"),
        "is damaged",
        "made/sft",
        command=AGAIN,
    ),
    _made("a manifest of a stage in bytes", "made/sft/stage.json", _written(b"\xff"), "is damaged", command=AGAIN),
    _made("a manifest of a stage that is a list", "made/sft/stage.json", _written(b"[]"), "is damaged", command=AGAIN),
    _made(
        "a folder that is another's",
        "made/sft",
        lambda f: (shutil.rmtree(f), f.mkdir(), (f / "thesis.tex").write_text("mine")),
        "thesis.tex",
        "no run wrote",
        command=AGAIN,
    ),
)


def _other_words(place: Path) -> None:
    shutil.copytree(place / "tiny", place / "other")
    path = place / "other" / "tokenizer.json"
    value = json.loads(path.read_text(encoding="utf-8"))
    words = value["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    path.write_text(json.dumps(value), encoding="utf-8")
