"""Recipes and settings that are wrong, contradict each other, or would do harm."""

from __future__ import annotations

from bad.case import Case, Content

ONE = "sft recipe.yaml --out out"
PIPE = "run recipe.yaml --out out"
SFT = "sft sft {} --out out"
REWARD = "reward reward {} --out out"
PPO = "ppo ppo {} --out out"


def _recipe(wrong: str, text: Content, *names: str, command: str = ONE, theirs: bool = False) -> Case:
    return Case(wrong, command, names, {"recipe.yaml": text}, theirs=theirs)


def _setting(wrong: str, settings: str, *names: str, command: str = SFT) -> Case:
    return Case(wrong, command.format(settings), names)


def _laughs() -> bytes:
    """A billion laughs: each line ten times the one before."""
    rows = ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    rows += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    return "\n".join(rows).encode()


CASES = (
    # --- the file
    Case(
        "a recipe that is not there",
        "sft absent.yaml --out out",
        ("absent.yaml", "no such recipe or file", "dressage recipes"),
    ),
    Case("a recipe's name with a slip", "sft sfd --out out", ("sfd", "did you mean sft?")),
    Case("a pipeline's name with a slip", "run quikstart --out out", ("quikstart", "did you mean quickstart?")),
    Case("a folder in the place of a recipe", "sft tiny --out out", ("tiny", "no such recipe or file")),
    Case("a recipe's name of 300 letters", f"sft {'x' * 300} --out out", ("xxx", "no such recipe or file")),
    Case(
        "a model in the place of a recipe",
        "sft tiny/model.safetensors --out out",
        ("model.safetensors", "not valid YAML"),
    ),
    Case("a pipeline for one stage's verb", "sft quickstart --out out", ("quickstart", "dressage run quickstart")),
    Case("one stage's recipe for run", "run sft --out out", ("sft", "has no stages", "dressage sft sft")),
    Case("a recipe of another kind", "sft reward --out out", ("reward", "dressage reward")),
    Case("a recipe to print that is not there", "recipes quickstrat", ("quickstrat", "did you mean quickstart?")),
    _recipe("an empty recipe", "", "recipe.yaml", "mapping"),
    _recipe("a recipe of nothing but comments", "# to do\n", "recipe.yaml", "mapping"),
    _recipe("a recipe that is a list", "- data\n- training\n", "recipe.yaml", "mapping", "list"),
    _recipe("a recipe that is a text", "learn well", "recipe.yaml", "mapping", "text"),
    _recipe("a recipe that is a number", "7", "recipe.yaml", "mapping", "7"),
    _recipe("two documents in a recipe", "seed: 1\n---\nseed: 2\n", "recipe.yaml:2", "not valid YAML"),
    _recipe(
        "a bracket that is not closed",
        "data: {sources: [a.jsonl]\ntraining: {epochs: 2}",
        "recipe.yaml:2",
        "not valid YAML",
    ),
    _recipe("a tab that indents", "data:\n\tsources: [a.jsonl]\n", "recipe.yaml:2", "not valid YAML"),
    _recipe("a wrong indent", "data:\n  sources: [a.jsonl]\n limit: 3\n", "recipe.yaml:3", "not valid YAML"),
    _recipe("a quote that is not closed", 'data: {sources: ["a.jsonl]}\n', "recipe.yaml:2", "not valid YAML"),
    _recipe("a colon inside a text", "description: note: mine\n", "recipe.yaml:1", "not valid YAML"),
    _recipe("a key twice", "seed: 1\ndata: {sources: [a.jsonl]}\nseed: 2\n", "recipe.yaml:3", "seed", "twice"),
    _recipe(
        "a section twice",
        "data: {sources: [a.jsonl]}\ntraining: {epochs: 1}\ntraining: {batch_size: 2}\n",
        "recipe.yaml:3",
        "training",
        "twice",
    ),
    _recipe("a key that is a list", "? [a, b]\n: 1\n", "recipe.yaml:1", "not valid YAML"),
    _recipe("a date that is none", "description: 2001-99-99\n", "recipe.yaml", "not valid YAML"),
    _recipe("a whole number that is none", "seed: !!int one\n", "recipe.yaml", "not valid YAML"),
    _recipe("not UTF-8", b"description: \xff\xfe\n", "recipe.yaml", "not valid YAML"),
    _recipe("a zero byte", b"description: a\x00b\n", "recipe.yaml", "not valid YAML"),
    _recipe(
        "a Python object",
        "description: !!python/object/apply:os.system ['touch hacked']\n",
        "recipe.yaml:1",
        "not valid YAML",
        "python/object",
    ),
    _recipe("a Python name", "seed: !!python/name:os.system\n", "recipe.yaml:1", "not valid YAML"),
    _recipe("a tag of one's own", "seed: !mine 1\n", "recipe.yaml:1", "not valid YAML", "!mine"),
    _recipe("an alias for nothing", "seed: *d\n", "recipe.yaml:1", "alias", "d"),
    _recipe("a billion laughs", _laughs, "recipe.yaml:", "more than 10,000 values", "aliases"),
    _recipe("a list that holds itself", "description: &a [*a]\n", "recipe.yaml:1", "alias"),
    _recipe("a recipe nested too deep", "a: " + "[" * 600, "recipe.yaml", "not valid YAML", "deep"),
    _recipe("a setting without a value", '{"data": {"sources": ["a.jsonl"]},\n "seed": }', "recipe.yaml: seed"),
    # --- extends
    _recipe("extends a recipe that is not there", "extends: nowhere\n", "nowhere", "no such recipe"),
    _recipe("extends itself", "extends: recipe.yaml\n", "recipe.yaml", "extends itself"),
    Case(
        "two recipes that extend each other",
        ONE,
        ("extends itself",),
        {"recipe.yaml": "extends: other.yaml\n", "other.yaml": "extends: recipe.yaml\n"},
    ),
    _recipe("extends a list", "extends: [sft, ppo]\n", "recipe.yaml", "extends", "one"),
    _recipe("extends a number", "extends: 7\n", "recipe.yaml", "extends"),
    _recipe("extends a recipe of another kind", "extends: reward\n", "dressage reward"),
    Case(
        "a fault in the recipe below",
        ONE,
        ("other.yaml:1", "not valid YAML"),
        {"recipe.yaml": "extends: other.yaml\n", "other.yaml": "{"},
    ),
    # --- keys and types
    _recipe("a section that is unknown", "dat: {sources: [a.jsonl]}\n", "recipe.yaml", "dat", "did you mean data?"),
    _recipe("nothing set", "{}", "recipe.yaml", "data", "must be set"),
    _recipe("a section that is empty", "data:\n", "recipe.yaml", "data", "section"),
    _recipe("a section that is a list", "data: [a.jsonl]\n", "recipe.yaml", "data", "section"),
    _recipe("a section that is a text", "data: a.jsonl\n", "recipe.yaml", "data", "section"),
    _recipe("a key that is a number", "1: 2\ndata: {sources: [a.jsonl]}\n", "recipe.yaml", "1"),
    _recipe("a key that YAML reads as true", "on: 2\ndata: {sources: [a.jsonl]}\n", "recipe.yaml", "True"),
    _recipe("a kind that is a list", "kind: [sft]\ndata: {sources: [a.jsonl]}\n", "recipe.yaml", "kind"),
    _recipe("a kind nobody knows", "kind: stf\ndata: {sources: [a.jsonl]}\n", "recipe.yaml", "kind", "sft"),
    _setting("a setting with a slip", "training.epocs=2", "training.epocs", "did you mean epochs?"),
    _setting("a setting in another section", "training.rank=2", "training.rank", "known here"),
    _setting("a setting of nothing like it", "training.zzz=2", "training.zzz", "batch_size"),
    _setting("a section of a number", "training.epochs.more=2", "training.epochs", "whole number"),
    _setting("settings of another algorithm", "settings.beta=1", "settings", "known here"),
    _setting("words for a number", "training.batch_size=many", "training.batch_size", "'many'"),
    _setting("a fraction for a whole number", "training.batch_size=2.5", "training.batch_size", "2.5"),
    _setting("true for a number", "training.batch_size=yes", "training: batch_size", "number", "true"),
    _setting("true for an adapter", "lora=true", "lora", "section"),
    _setting("null for a number", "training.batch_size=null", "training.batch_size", "None"),
    _setting("null for the data", "data=null", "data", "section"),
    _setting("a list for a number", "seed=[1,2]", "seed", "[1, 2]"),
    _setting("a number for a list", "data.sources=7", "data.sources", "list"),
    _setting("a list of numbers for names", "data.sources=[1,2]", "data.sources.0", "1"),
    _setting("nothing", "model.name=", "model.name", "None"),
    _setting("an empty name", "model.name=\"''\"", "model.name", "empty"),
    _setting("zero for a count", "training.batch_size=0", "training.batch_size", "at least 1", "got 0"),
    _setting("a count below zero", "training.steps=-3", "training.steps", "at least 1"),
    _setting("a share above 1", "data.heldout_fraction=1.0", "data.heldout_fraction", "below 1"),
    _setting("a share below 0", "data.heldout_fraction=-0.1", "data.heldout_fraction", "at least 0"),
    _setting("a learning rate below 0", "optimizer.learning_rate=-1e-4", "optimizer.learning_rate", "at least 0"),
    _setting("an endless learning rate", "optimizer.learning_rate=.inf", "optimizer.learning_rate", "finite"),
    _setting("a learning rate that is no number", "optimizer.learning_rate=.nan", "optimizer.learning_rate", "finite"),
    _setting("a moment above 1", "optimizer.betas=[0.9,1.5]", "optimizer.betas.1", "at most 1"),
    _setting("one moment of two", "optimizer.betas=[0.9]", "optimizer.betas.1"),
    _setting("a schedule nobody knows", "optimizer.schedule=sine", "optimizer.schedule", "cosine"),
    _setting("a type nobody computes in", "model.dtype=float16", "model.dtype", "bfloat16"),
    _setting("a way to cut nobody knows", "data.on_too_long=truncate", "data.on_too_long", "cut"),
    _setting("adapters without rank", "lora.rank=0", "lora.rank", "at least 1"),
    _setting("dropout of everything", "lora.dropout=1", "lora.dropout", "below 1"),
    _setting("a seed beyond what a generator takes", "seed=99999999999999999999999", "seed"),
    _setting("more steps than can be counted", "training.steps=1e30", "training.steps"),
    _setting("an alarm nobody knows", "health.on_alarm=panic", "health.on_alarm", "rollback"),
    _setting(
        "bounds for a metric that has none",
        'model.name=tiny data.sources=["material:demonstrations.jsonl"] health.bounds={loss/trian:[1,2]}',
        "health.bounds.loss/trian",
    ),
    _setting("one bound of two", "health.bounds={entropy/mean:[1]}", "health.bounds.entropy/mean"),
    _setting("merging for demonstrations", "model.name=tiny data.merge=elo", "data.merge=elo", "rankings"),
    # --- overrides
    _setting("an override without a value", "training.epochs", "training.epochs", "section.setting=value"),
    _setting("an override without a name", "=2", "section.setting=value"),
    _setting("an override with an option's dashes", "-- --training.epochs=2", "section.setting=value"),
    _setting("an override with two dots", "training..epochs=2", "training..epochs"),
    _setting("an override that ends in a dot", "training.=2", "training."),
    _setting("an override of a list's item", "data.sources.0=a.jsonl", "data.sources"),
    _setting("an override that is broken YAML", "data.sources=[a", "data.sources=[a", "not valid YAML"),
    _setting(
        "an override with a Python object", "seed='!!python/object/apply:os.getpid []'", "seed=", "not valid YAML"
    ),
    _setting("an override with an alias", "seed='*a'", "seed=*a", "not valid YAML"),
    _setting("an override with a date that is none", "seed=2001-99-99", "seed=", "not valid YAML"),
    _setting("an override nested too deep", "seed=" + "[" * 600, "seed=", "deep"),
    _setting("an override of the kind", "kind=ppo", "dressage ppo"),
    # --- settings that contradict each other
    _setting("dropout while a reward is learnt", "lora.dropout=0.1", "lora.dropout=0.1", command=REWARD),
    _setting("dropout of the critic's", "value.start=base value.lora.dropout=0.1", "value.lora.dropout", command=PPO),
    _setting("a batch that does not divide", "minibatch_size=7", "minibatch_size=7", "24", command=PPO),
    _setting("demonstrations without weight", "ptx.data.sources=[a.jsonl]", "ptx", "settings.ptx_coef", command=PPO),
    _setting("weight without demonstrations", "settings.ptx_coef=0.1", "settings.ptx_coef", "ptx.data", command=PPO),
    _setting("no reward", "reward_model=null", "reward_model", "rewards", command=PPO),
    _setting("two rewards", "rewards.short.type=length rewards.short.high=9", "reward_model", "rewards", command=PPO),
    _setting("filtered sampling", "rollout.top_p=0.9", "top_p", "allow_filtered_sampling", command=PPO),
    _setting("a sampling share above 1", "rollout.top_p=1.5", "rollout.top_p", "at most 1", command=PPO),
    _setting("no temperature", "rollout.temperature=0", "rollout.temperature", "above 0", command=PPO),
    _setting("limits that go down", "rollout.length_range=[30,10]", "length_range=[30, 10]", command=PPO),
    _setting(
        "limits above the limit",
        "rollout.length_range=[10,300]",
        "length_range=[10, 300]",
        "max_new_tokens=40",
        command=PPO,
    ),
    _setting("a band upside down", "kl.low_per_answer=20", "low_per_answer", "high_per_answer", command=PPO),
    _setting("a KL nobody knows", "kl.estimator=k4", "kl.estimator", "k3", command=PPO),
    _setting("a critic's model on the reward's", "value.model.name=tiny", "value.model", "value.start", command=PPO),
    _setting(
        "a critic's adapter on the policy's trunk", "value.start=zero value.lora.rank=3", "value.lora", command=PPO
    ),
    _setting(
        "a critic of whole shared weights",
        "value.start=base value.lora=null",
        "value.lora=null",
        "value.model",
        command=PPO,
    ),
    _setting("a soft end beyond the end", "truncated=soft soft_tokens=999", "soft_tokens=999", command=PPO),
    _setting("an algorithm with a letter too many", "algorithm=pppo", "algorithm", "did you mean ppo?", command=PPO),
    _setting(
        "an algorithm of another verb",
        "algorithm=grpo",
        "'grpo'",
        "does not learn from preferences",
        command="dpo dpo {} --out out",
    ),
    _setting(
        "a group of one",
        "model.name=tiny rollout.answers_per_prompt=1 minibatch_size=null",
        "rollout.answers_per_prompt=1",
        "grpo",
        command="rl grpo {} --out out",
    ),
    _setting(
        "a setting the algorithm has not",
        "settings.betta=0.1",
        "settings.betta",
        "beta",
        command="dpo dpo {} --out out",
    ),
    _setting(
        "a word for an algorithm's number",
        "settings.beta=high",
        "settings.beta",
        "'high'",
        command="dpo dpo {} --out out",
    ),
    _setting(
        "no number for an algorithm's number",
        "settings.beta=.nan",
        "settings.beta",
        "finite",
        command="dpo dpo {} --out out",
    ),
    _setting("no rounds", "training.steps=null", "training.steps", command=PPO),
    _setting(
        "both a file of people's and a simulated annotator",
        "rankings=mine.jsonl",
        "answers",
        "rankings",
        command="rank rank {} --out out",
    ),
    _setting("noise without end", "noise=.inf", "noise", "finite", command="rank rank {} --out out"),
    _setting(
        "a judge that is not there",
        "judge=reward reward_model=null",
        "judge=reward",
        "reward_model",
        command="evaluate evaluate {} --out out",
    ),
    _setting(
        "a judge of pairs that nobody named",
        "judge=model",
        "judge=model",
        "pair_judge",
        command="evaluate evaluate {} --out out",
    ),
    _setting(
        "a judge of pairs beside another judge",
        "pair_judge.url=http://127.0.0.1:9/x",
        "judge=gold",
        "pair_judge",
        command="evaluate evaluate {} --out out",
    ),
    _setting(
        "a judge of pairs that is to grade",
        "judge=model pair_judge.high=5",
        "pair_judge.high",
        "unknown setting",
        command="evaluate evaluate {} --out out",
    ),
    _setting(
        "a key for a judge of pairs without a server",
        "judge=model pair_judge.key_variable=NO_SUCH_KEY",
        "pair_judge",
        "set url",
        command="evaluate evaluate {} --out out",
    ),
    _setting(
        "the best of several by nobody", "best_of=4", "best_of=4", "reward_model", command="sample sample {} --out out"
    ),
    _setting(
        "the best of several equals",
        "best_of=4 reward_model=x temperature=0",
        "best_of=4",
        "temperature",
        command="sample sample {} --out out",
    ),
    _setting(
        "the KL of the best of several",
        "best_of=4 reward_model=x measure_kl=true",
        "measure_kl",
        "best_of=4",
        command="sample sample {} --out out",
    ),
    _setting(
        "whole weights in bfloat16",
        'model.name=tiny data.sources=["material:demonstrations.jsonl"] lora=null model.dtype=bfloat16',
        "lora=null",
        "model.dtype=bfloat16",
    ),
    _setting("imitation by part of the model", "settings.lm_coef=0.1", "settings.lm_coef", "depth=12", command=REWARD),
    # --- pipelines
    _recipe("no stages", "stages: {}\n", "recipe.yaml", "stages", command=PIPE),
    _recipe("stages in a list", "stages: [sft, ppo]\n", "recipe.yaml", "stages", command=PIPE),
    _recipe("a stage that is a text", "stages: {sft: sft.yaml}\n", "recipe.yaml", "stages.sft", command=PIPE),
    _recipe(
        "a stage of an unknown kind",
        "stages: {rnk: {answers: a.jsonl}}\n",
        "stages.rnk: kind",
        "'rnk'",
        "rank",
        command=PIPE,
    ),
    _recipe(
        "a stage whose kind is a list", "stages: {sft: {kind: [sft]}}\n", "stages.sft: kind", "['sft']", command=PIPE
    ),
    _recipe(
        "a stage's setting with a slip",
        "stages: {sft: {dat: {}}}\n",
        "recipe.yaml: stages.sft",
        "dat",
        "did you mean data?",
        command=PIPE,
    ),
    _recipe(
        "a stage that reads what none makes",
        'stages: {rank: {answers: "stage:sampels/answers.jsonl"}}\n',
        "stages.rank",
        "stage:sampels/answers.jsonl",
        command=PIPE,
    ),
    _recipe(
        "a stage that reads its own",
        'stages: {rank: {answers: "stage:rank/answers.jsonl"}}\n',
        "stages.rank",
        "no earlier stage",
        command=PIPE,
    ),
    _recipe(
        "a stage outside the run's folder",
        "stages: {../../elsewhere: {kind: rank, answers: a.jsonl}}\n",
        "../../elsewhere",
        "name",
        command=PIPE,
    ),
    _recipe(
        "a stage named by a path", "stages: {/tmp/x: {kind: rank, answers: a.jsonl}}\n", "/tmp/x", "name", command=PIPE
    ),
    _recipe("a stage without a name", 'stages: {"": {kind: rank, answers: a.jsonl}}\n', "stages", "name", command=PIPE),
    _recipe(
        "a stage whose name is a number", "stages: {1: {kind: rank, answers: a.jsonl}}\n", "stages.1", command=PIPE
    ),
    _recipe(
        "a product outside the stage's folder",
        'stages: {rank: {answers: a.jsonl}, reward: {data: {sources: ["stage:rank/../../../etc/passwd"]}}}\n',
        "stage:rank/../../../etc/passwd",
        command=PIPE,
    ),
    _recipe(
        "a seed for all that is a word",
        "seed: lucky\nstages: {rank: {answers: a.jsonl}}\n",
        "recipe.yaml: seed",
        "'lucky'",
        command=PIPE,
    ),
    _setting(
        "a stage's override with a slip",
        "stages.sft.trainig.epochs=1",
        "stages.sft",
        "trainig",
        "did you mean training?",
        command="run quickstart {} --out out",
    ),
    _setting(
        "an override of a stage that is not there",
        "stages.stf.training.epochs=1",
        "stages.stf",
        "'stf'",
        command="run quickstart {} --out out",
    ),
)
