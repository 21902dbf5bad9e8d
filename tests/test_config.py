"""Every mistake in a config is found before the first step, and the message names the key."""

import ast
import dataclasses
import json
import operator
import pathlib
import re

import hypothesis
import hypothesis.strategies as st
import pytest
import tiny
from ml_collections import ConfigDict

import dca_jax
from dca_jax import config as config_lib
from dca_jax.commands.compare import arm_config
from dca_jax.config import Config, ConfigError, build, claim_workdir, difference, load
from dca_jax.errors import UserError

RECIPES = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))
ORACLE = {"reviewer": {"name": "oracle"}}
REVIEWED = {"credit.scheme": "weighted"}
PPO = {"loss": "ppo", "updates_per_batch": 2}


def message(settings) -> str:
  with pytest.raises(ConfigError) as raised:
    build(ConfigDict(settings))
  return str(raised.value)


# Unknown keys and wrong types.


@pytest.mark.parametrize(
  ("settings", "wrong", "right"),
  [
    ({"stepz": 3}, "stepz", "steps"),
    ({"learner": {"learning_rate": 1.0, "los": "ppo"}}, "learner.learning_rate", ""),
    ({"learner": {"los": "ppo"}}, "learner.los", "learner.loss"),
    ({"rolout": {"group": 4}}, "rolout", "rollout"),
    ({"rollout": {"max_token": 4}}, "rollout.max_token", "rollout.max_tokens"),
    (
      {"credit": {"scheme": "weighted", "blame": {"eror": 1.0}}},
      "credit.blame.eror",
      "credit.blame.error",
    ),
  ],
)
def test_an_unknown_key_is_named_with_the_nearest_valid_one(settings, wrong, right):
  said = message(settings)
  assert said.startswith(f"{wrong}: no such key")
  assert right in said


@pytest.mark.parametrize("key", ["check", "unused", "fixed", "to_json"])
def test_a_method_is_no_key(key):
  assert f"{key}: no such key" in message({key: 1})


@pytest.mark.parametrize(
  ("section", "key"), [("warmstart", "total"), ("rollout", "sampling"), ("learner", "check")]
)
@pytest.mark.parametrize("value", [1, "x"])
def test_a_property_of_a_section_is_no_key(section, key, value):
  assert f"{section}.{key}: no such key" in message({section: {key: value}})


def test_a_key_that_resembles_none_lists_the_known_ones():
  said = message({"checkpoint": {"qqqqqqqqqqqqqqqqqqqqqqqqqqqqqq": 1}})
  assert "checkpoint.every" in said
  assert "checkpoint.keep" in said


@pytest.mark.parametrize(
  ("settings", "key", "kind"),
  [
    ({"steps": 1.5}, "steps", "int"),
    ({"steps": True}, "steps", "int"),
    ({"seed": "0"}, "seed", "int"),
    ({"seed": None}, "seed", "int"),
    ({"learner": {"lr": "1e-3"}}, "learner.lr", "float"),
    ({"learner": {"reference": 1}}, "learner.reference", "bool"),
    ({"learner": {"loss": 3}}, "learner.loss", "str"),
    ({"rollout": {"top_k": 2.0}}, "rollout.top_k", "int"),
    ({"credit": {"scheme": "weighted", "blame": {"error": "much"}}}, "credit.blame.error", "float"),
    ({"rollout": {"group": (4,)}}, "rollout.group", "int"),
  ],
)
def test_a_wrong_type_is_named(settings, key, kind):
  said = message(settings)
  assert said.startswith(f"{key}: ")
  assert kind in said


@pytest.mark.parametrize("value", [3, "uniform", None, 1.0])
def test_a_section_must_be_a_section(value):
  assert message({"credit": value}).startswith("credit: ")


def test_a_whole_number_serves_as_a_float():
  config = build(ConfigDict({"learner": {"lr": 1}}))
  assert config.learner.lr == 1.0
  assert type(config.learner.lr) is float


# Impossible values.


@pytest.mark.parametrize(
  ("key", "value", "others"),
  [
    ("seed", -1, {}),
    ("seed", 2**31, {}),
    ("steps", 0, {}),
    ("task.name", "chain", {}),
    ("task.lines", 3, {}),
    ("task.lines", 0, {}),
    ("task.lines", 26, {}),
    ("task.modulus", 1, {}),
    ("task.modulus", 11, {}),
    ("task.repeat", -0.1, {}),
    ("task.drop", 1.1, {}),
    ("task.misconceptions", 2.0, {}),
    ("task.wrong", "some", {}),
    ("task.wrong_low", 0.9, {}),
    ("task.wrong_high", 1.1, {}),
    ("policy.width", 0, {}),
    ("policy.depth", 0, {}),
    ("policy.heads", 0, {}),
    ("policy.heads", 3, {"policy.kv_heads": 2}),
    ("policy.kv_heads", 0, {}),
    ("policy.head_dim", 3, {}),
    ("policy.head_dim", 0, {}),
    ("policy.mlp", -1, {}),
    ("policy.rope_theta", 0.0, {}),
    ("policy.rope_theta", -1.0, {}),
    ("policy.dtype", "float16", {}),
    ("policy.weights", "bfloat16", {}),  # Without policy.pretrained.
    ("policy.remat", "none", {}),
    ("policy.attention", "flash", {}),
    ("policy.attention", "cudnn", {}),  # In float32.
    ("warmstart.clean_steps", -1, {}),
    ("warmstart.steps", -1, {}),
    ("warmstart.batch", 0, {}),
    ("warmstart.lr", 0.0, {}),
    ("rollout.problems", 0, {}),
    ("rollout.group", 1, {}),
    ("rollout.max_prompt_tokens", 0, {}),
    ("rollout.max_tokens", 1, {}),
    ("rollout.temperature", 0.0, {}),
    ("rollout.temperature", float("nan"), {}),
    ("rollout.top_k", -1, {}),
    ("rollout.top_p", 0.0, {}),
    ("rollout.top_p", 1.5, {}),
    ("rollout.zero_variance", "drop", {}),
    ("rollout.refill_rounds", 0, {"rollout.zero_variance": "refill"}),
    ("reviewer.name", "oracel", {}),
    ("reviewer.name", "oracel", {"credit.scheme": "weighted"}),
    ("reviewer.name", "none", {"credit.scheme": "weighted"}),
    ("reviewer.flip", 1.5, {"credit.scheme": "weighted", "reviewer.name": "noisy"}),
    ("reviewer.name", "none", {"credit.scheme": "potential"}),
    (
      *("reviewer.name", "gemini"),
      {"credit.scheme": "potential", "reviewer.client.level": "verdict"},
    ),
    ("reviewer.audit_floor", 1.5, {**REVIEWED, "reviewer.audit_every": 5}),
    ("reviewer.client.level", "quick", {**REVIEWED, "reviewer.name": "gemini"}),
    ("reviewer.client.samples", 0, {**REVIEWED, "reviewer.name": "gemini"}),
    ("reviewer.panel", (), {**REVIEWED, "reviewer.name": "panel"}),
    ("reviewer.panel", ("oracle", "geminy:x"), {**REVIEWED, "reviewer.name": "panel"}),
    ("reviewer.escalate", "geminy", {**REVIEWED, "reviewer.name": "oracle"}),
    ("reviewer.combine", "sum", {**REVIEWED, "reviewer.name": "oracle"}),
    ("reviewer.deadline", 0.0, {**REVIEWED, "reviewer.name": "oracle"}),
    ("reviewer.sample_frac", 0.0, {**REVIEWED, "reviewer.name": "oracle"}),
    ("reviewer.overlap", 2, {**REVIEWED, "reviewer.name": "oracle"}),
    ("learner.loss", "reinforce", {**REVIEWED, "reviewer.name": "oracle", "reviewer.overlap": 1}),
    ("learner.loss", "reinforce", {"rollout.carry": 4}),
    ("rollout.carry", -1, {}),
    *(
      ("rollout.carry", 4, {"learner.loss": "ppo", **others})
      for others in (
        {"rollout.zero_variance": "refill"},
        {**REVIEWED, "reviewer.name": "oracle", "reviewer.overlap": 1},
        {"task": {"name": "docs/examples/guess.py:Guess"}},
        {"engine.rows": 15},
        {"engine": {"name": "docs/examples/plainly.py:Plainly"}},
      )
    ),
    ("reviewer.client.base_url", "", {**REVIEWED, "reviewer.name": "openai"}),
    ("reviewer.client.thinking", "hard", {**REVIEWED, "reviewer.name": "gemini"}),
    ("reviewer.client.on_budget", "weep", {**REVIEWED, "reviewer.name": "gemini"}),
    ("reviewer.client.concurrency", 0, {**REVIEWED, "reviewer.name": "gemini"}),
    ("reviewer.client.max_dollars", -1.0, {**REVIEWED, "reviewer.name": "gemini"}),
    ("reviewer.client.min_ok_frac", 1.5, {**REVIEWED, "reviewer.name": "gemini"}),
    ("credit.discount", 1.5, {"credit.scheme": "potential", "reviewer.name": "oracle"}),
    ("credit.log_epsilon", -0.1, {"credit.scheme": "potential", "reviewer.name": "oracle"}),
    ("credit.penalty", -1.0, {"credit.scheme": "capo", "reviewer.name": "oracle"}),
    ("value.source", "montecarlo", {"credit.scheme": "potential"}),
    ("value.continuations", 0, {"credit.scheme": "potential", "value.source": "monte_carlo"}),
    ("value.width", 0, {"credit.scheme": "potential", "value.source": "learned"}),
    ("value.updates", 0, {"credit.scheme": "potential", "value.source": "learned"}),
    ("value.lr", 0.0, {"credit.scheme": "potential", "value.source": "learned"}),
    ("credit.scheme", "weighed", {"reviewer.name": "oracle"}),
    ("credit.scheme", "weighed", {}),
    ("credit.baseline", "median", {}),
    ("credit.conserve", "all", {}),
    ("credit.lam", 1.5, {"credit.scheme": "weighted", "reviewer.name": "oracle"}),
    ("credit.cap", 0.5, {"credit.scheme": "weighted", "reviewer.name": "oracle"}),
    ("credit.cap", -1.0, {"credit.scheme": "signed", "reviewer.name": "oracle"}),
    ("credit.beta", -0.1, {"credit.scheme": "signed", "reviewer.name": "oracle"}),
    ("credit.beta", float("nan"), {"credit.scheme": "signed", "reviewer.name": "oracle"}),
    ("credit.credit.necessary", -1.0, {"credit.scheme": "weighted", "reviewer.name": "oracle"}),
    ("credit.blame.error", 1001.0, {"credit.scheme": "weighted", "reviewer.name": "oracle"}),
    (
      "credit.blame_truncated.error",
      float("nan"),
      {"credit.scheme": "weighted", "reviewer.name": "oracle"},
    ),
    ("learner.loss", "grpo", {}),
    ("learner.updates_per_batch", 0, {}),
    ("learner.updates_per_batch", 2, {}),
    ("learner.micro_batches", 0, {}),
    ("learner.micro_batches", -2, {}),
    ("learner.normalizer", "rows", {}),
    ("learner.clip_low", 1.0, {"learner.loss": "ppo", "learner.updates_per_batch": 2}),
    ("learner.clip_high", -0.1, {"learner.loss": "ppo", "learner.updates_per_batch": 2}),
    ("learner.kl", -0.1, {}),
    ("learner.kl", float("nan"), {}),
    ("learner.entropy", -0.1, {}),
    ("learner.lr", 0.0, {}),
    ("learner.lr", float("nan"), {}),
    ("learner.lr", float("inf"), {}),
    ("learner.schedule", "exponential", {}),
    ("learner.warmup_updates", -1, {}),
    ("learner.adam_b1", 1.0, {}),
    ("learner.adam_b2", -0.1, {}),
    ("learner.weight_decay", -0.1, {}),
    ("learner.max_grad_norm", -1.0, {}),
    ("rewrite.rows", 0, {"rewrite.source": "oracle"}),
    ("rewrite.rows", 5, {"rewrite.source": "omission"}),
    ("rewrite.forced_weight", 0.0, {"rewrite.source": "oracle"}),
    ("rewrite.weight", -1.0, {"rewrite.source": "oracle"}),
    ("rewrite.source", "psychic", {}),
    ("rewrite.by", "oracle", {"rewrite.source": "model"}),
    ("rewrite.client.base_url", "", {"rewrite.source": "model", "rewrite.by": "openai"}),
    ("evaluate.problems", 0, {}),
    ("evaluate.samples", 0, {}),
    ("evaluate.k", 0, {}),
    ("evaluate.k", 9, {}),
    ("evaluate.every", -1, {}),
    ("checkpoint.every", 0, {}),
    ("checkpoint.keep", 0, {}),
    ("mesh.data", 0, {}),
    ("mesh.fsdp", -2, {}),
    ("mesh.data", -1, {"mesh.tensor": -1}),
  ],
)
def test_an_impossible_value_is_named(key, value, others):
  assert message(tiny.settings({**others, key: value})).startswith(f"{key}: ")


# Keys without effect.


@pytest.mark.parametrize(
  ("key", "value", "others"),
  [
    ("credit.lam", 0.7, {}),
    ("credit.lam", 0.7, {"credit.scheme": "signed", "reviewer.name": "oracle"}),
    ("credit.beta", 0.7, {"credit.scheme": "weighted", "reviewer.name": "oracle"}),
    ("credit.cap", 3.0, {}),
    ("credit.blame", {"redundant": 1.0}, {}),
    ("learner.clip_low", 0.1, {}),
    ("learner.clip_high", 0.1, {}),
    ("learner.clip_high", 0.1, {"learner.loss": "ppo"}),
    ("rollout.refill_rounds", 2, {}),
    ("rollout.refill_rounds", 2, {"rollout.zero_variance": "skip"}),
    ("reviewer.flip", 0.1, {"credit.scheme": "weighted", "reviewer.name": "oracle"}),
    ("reviewer.flip", 0.1, {"credit.scheme": "weighted", "reviewer.name": "random"}),
    ("reviewer.seed", 1, {"credit.scheme": "weighted", "reviewer.name": "oracle"}),
    ("reviewer.name", "oracle", {}),
    ("reviewer.name", "oracle", {"credit.scheme": "potential", "value.source": "learned"}),
    ("reviewer.step", 2, {"credit.scheme": "weighted", "reviewer.name": "oracle"}),
    ("reviewer.required", False, {"credit.scheme": "weighted", "reviewer.name": "oracle"}),
    ("reviewer.panel", ("oracle",), {"credit.scheme": "weighted", "reviewer.name": "oracle"}),
    (
      "reviewer.client.model",
      "gemini-3.5-flash",
      {"credit.scheme": "weighted", "reviewer.name": "oracle"},
    ),
    (
      "reviewer.client.vertex",
      True,
      {**REVIEWED, "reviewer.name": "openai", "reviewer.client.base_url": "http://x"},
    ),
    (
      "reviewer.client.on_budget",
      "stop",
      {**REVIEWED, "reviewer.name": "gemini", "reviewer.client.max_dollars": 0.0},
    ),
    ("reviewer.overlap", 1, {"learner.loss": "ppo"}),
    ("learner.clip_low", 0.1, {"learner.loss": "ppo"}),
    ("rewrite.rows", 2, {}),
    ("rewrite.client.level", "deliberate", {"rewrite.source": "model"}),
    ("value.source", "learned", {}),
    ("value.source", "monte_carlo", {"credit.scheme": "weighted", "reviewer.name": "oracle"}),
    ("value.continuations", 8, {"credit.scheme": "potential", "value.source": "learned"}),
    ("value.lr", 0.1, {"credit.scheme": "potential", "value.source": "monte_carlo"}),
    ("credit.discount", 0.5, {"credit.scheme": "weighted", "reviewer.name": "oracle"}),
    ("credit.penalty", 0.1, {"credit.scheme": "weighted", "reviewer.name": "oracle"}),
    ("credit.conserve", "completion", {"credit.scheme": "potential", "reviewer.name": "oracle"}),
    ("credit.divide_by_std", True, {"credit.scheme": "return_to_go", "reviewer.name": "oracle"}),
    (
      "credit.blame",
      {"redundant": 1.0},
      {"credit.scheme": "return_to_go", "reviewer.name": "oracle"},
    ),
    ("credit.credit", {"redundant": 1.0}, {"credit.scheme": "capo", "reviewer.name": "oracle"}),
    ("task.misconceptions", 0.25, {"task.wrong": "slips"}),
    ("warmstart.lr", 0.1, {"warmstart.steps": 0, "warmstart.batch": 32}),
    ("learner.reference", True, {"learner.kl": 0.1}),
  ],
)
def test_a_key_without_effect_is_refused(key, value, others):
  said = message(tiny.settings({**others, key: value}))
  assert said.startswith(key)
  assert "no effect" in said


def test_a_key_without_effect_may_stand_at_its_default():
  default = Config()
  given = {
    "learner": {"clip_low": default.learner.clip_low},
    "value": {"source": default.value.source},
  }
  assert (
    build(ConfigDict({**given, "credit": {"scheme": "uniform"}, "reviewer": {"name": "none"}}))
    == default
  )


def test_a_message_shows_the_value_it_complains_of():
  assert "-7" in message({"steps": -7})


# The command line's overrides.


def keys_of(section):
  for field in dataclasses.fields(section):
    yield field.name
    if dataclasses.is_dataclass(inner := getattr(section, field.name)):
      yield from (f"{field.name}.{key}" for key in keys_of(inner))


def every_choice():
  """The default config, and one for each built-in choice of a section."""
  yield Config()
  for key, choice in config_lib.CHOICES.items():
    yield from (Config(**{key.partition(".")[0]: kind()}) for kind in choice.known.values())


def test_every_key_that_a_message_names_is_one():
  known = {key for config in every_choice() for key in keys_of(config)}
  sections = "|".join({key.partition(".")[0] for key in known if "." in key})
  named = re.compile(rf"(?<![\w./-])(?:{sections})(?:\.(?!py)[a-z_]+)+(?![\w/(])")
  found = []
  for path in pathlib.Path(dca_jax.__file__).parent.rglob("*.py"):
    nodes = list(ast.walk(ast.parse(path.read_text())))
    docs = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    texts = [node for node in nodes if isinstance(node, ast.Constant) and id(node) not in docs]
    found += [(path.name, key) for text in texts for key in named.findall(str(text.value))]
  assert len(found) > 50
  assert [each for each in found if each[1] not in known] == []


def test_overrides_have_the_types_of_their_keys():
  given = ConfigDict({"learner": {"entropy": 0.1}})
  arguments = [
    "--config.steps=7",
    "--config.learner.lr=1",
    "--config.learner.reference=true",
    "--config.rollout.zero_variance=skip",
    "--config.credit.blame.error=0.5",
    "--config.credit.scheme=weighted",
    "--config.reviewer.name=oracle",
  ]
  config = build(given, arguments)
  assert config.steps == 7
  assert config.learner.lr == 1.0
  assert type(config.learner.lr) is float
  assert config.learner.reference is True
  assert config.rollout.zero_variance == "skip"
  assert config.credit.blame.error == 0.5
  assert config.learner.entropy == 0.1  # The recipe's own stays.


def test_of_two_overrides_the_last_counts():
  assert build(ConfigDict(), ["--config.steps=7", "--config.steps=8"]).steps == 8


def test_overrides_do_not_read_the_arguments_of_the_process(monkeypatch):
  # The process may well be a test runner or a notebook.
  monkeypatch.setattr("sys.argv", ["pytest", "--config=elsewhere.py", "--config.steps=99"])
  assert build(ConfigDict(), []).steps == Config().steps
  assert build(ConfigDict(), ["--config.seed=5"]).seed == 5


def test_overrides_leave_the_recipe_alone():
  given = ConfigDict({"steps": 3})
  build(given, ["--config.steps=7"])
  assert given.to_dict() == {"steps": 3}


@pytest.mark.parametrize(
  ("argument", "parts"),
  [
    ("--config.stepz=3", ["stepz", "steps"]),
    ("--config.learner.los=ppo", ["learner.los", "learner.loss"]),
    ("--config.rolout.group=3", ["rolout.group", "rollout.group"]),
    ("--config.steps=three", ["steps", "three"]),
    ("--config.steps=1.5", ["steps", "1.5"]),
    ("--config.learner.lr=fast", ["learner.lr", "fast"]),
    ("--config.learner.reference=maybe", ["learner.reference", "maybe"]),
    ("--config.steps", ["steps"]),
    ("--config.credit=uniform", ["credit"]),
    ("--confg.steps=3", ["confg.steps", "--config."]),
    ("--steps=3", ["--config.steps"]),
    ("steps=3", ["steps=3"]),
  ],
)
def test_a_wrong_override_is_named(argument, parts):
  with pytest.raises(ConfigError) as raised:
    build(ConfigDict(), [argument])
  said = str(raised.value)
  assert "\n" not in said
  for part in parts:
    assert part in said


def test_an_override_that_is_impossible_is_named():
  with pytest.raises(ConfigError, match=r"^rollout\.group: "):
    build(ConfigDict(), ["--config.rollout.group=1"])


# What overrides make pointless.

QUICKSTART, *_ = [path for path in RECIPES if path.name == "quickstart.py"]
GEMMA, *_ = [path for path in RECIPES if "gemma" in path.name]
JSONL = [
  "--config.task.name=jsonl",
  "--config.task.path=a.jsonl",
  "--config.task.heldout_fraction=0.1",
]


@pytest.mark.parametrize(
  ("recipe", "overrides", "causes", "left_out"),
  [
    (QUICKSTART, ["--config.reviewer.name=none"], 1, "credit.scheme"),
    (QUICKSTART, ["--config.credit.scheme=uniform", "--config.steps=3"], 1, "reviewer.name"),
    (GEMMA, ["--config.reviewer.name=none"], 1, "credit.scheme, reviewer.client.max_dollars"),
    (GEMMA, ["--config.policy.lora_rank=0"], 1, "policy.lora_alpha"),
    (GEMMA, JSONL, 1, "task.dataset"),
    (
      QUICKSTART,
      ["--config.task.name=tfds", "--config.task.dataset=d", "--config.task.tokenizer=t"],
      1,
      "task.misconceptions, task.wrong_high, task.wrong_low, reviewer.name, warmstart.clean_steps,"
      " warmstart.steps, credit.scheme",
    ),
    (
      GEMMA,
      ["--config.task.name=chains", "--config.reviewer.name=oracle"],
      2,
      "task.dataset, task.prompt, reviewer.client.max_dollars",
    ),
    (QUICKSTART, ["--config.policy.pretrained=x", *JSONL], 2, None),
  ],
)
def test_what_an_override_makes_pointless_is_left_out_and_said(
  capsys, recipe, overrides, causes, left_out
):
  config = load(str(recipe), overrides)
  (said,) = capsys.readouterr().err.splitlines()
  because, names = said.removeprefix("note: left out for ").split(": ")
  assert because.split() == overrides[:causes]
  assert left_out in (None, names)
  # What was left out is as if the recipe had never said it: the result is whole, and can be built
  # again.
  assert build(ConfigDict(json.loads(config.to_json()))) == config


@pytest.mark.parametrize(
  ("recipe", "left_out"),
  [
    ({"reviewer.name": "gemini", "reviewer.audit_every": 5}, ""),
    ({"reviewer.name": "gemini", "reviewer.escalate": "noisy"}, "reviewer.escalate"),
    (
      {"reviewer.name": "panel", "reviewer.panel": ("random", "oracle")},
      "reviewer.name, reviewer.panel, credit.scheme",
    ),
    ({"reviewer.name": "panel", "reviewer.panel": ("random", "lexical")}, ""),
  ],
)
def test_what_a_text_task_cannot_have_is_left_out(capsys, recipe, left_out):
  config_lib.build(
    ConfigDict(tiny.settings({**REVIEWED, **recipe})), ["--config.policy.pretrained=x", *JSONL]
  )
  said = capsys.readouterr().err.strip().split(": ")[-1].split(", ")
  assert [key for key in said if key.split(".")[0] in ("reviewer", "credit")] == [
    *filter(None, left_out.split(", "))
  ]


def test_a_model_in_the_place_of_the_quickstarts_policy_needs_no_warm_start(capsys):
  assert load(str(QUICKSTART), ["--config.policy.pretrained=x"]).warmstart.total == 0
  assert "warmstart.clean_steps, warmstart.steps" in capsys.readouterr().err


def test_a_default_that_a_recipe_spells_out_is_nothing_to_tell(capsys):
  recipe = ConfigDict({"credit": {"scheme": "uniform"}, "reviewer": {"name": "none"}})
  assert build(recipe, ["--config.steps=3"]).steps == 3
  assert not capsys.readouterr().err


def test_a_text_task_in_the_place_of_the_quickstarts_needs_nothing_else():
  config = load(str(QUICKSTART), ["--config.policy.pretrained=x", *JSONL])
  assert (config.reviewer.name, config.credit.scheme) == ("none", "uniform")
  assert (config.warmstart.total, config.task.tokenizer) == (0, "x")


@pytest.mark.parametrize(
  ("recipe", "overrides", "key"),
  [
    (
      {"reviewer": {"name": "none"}, "credit": {"scheme": "weighted"}},
      ["--config.steps=3"],
      "reviewer.name",
    ),
    ({"credit": {"lam": 0.3}}, ["--config.steps=3"], "credit.lam"),
    ({}, ["--config.credit.lam=0.3"], "credit.lam"),
    ({}, ["--config.credit.scheme=weighted", "--config.reviewer.name=none"], "reviewer.name"),
    ({}, ["--config.task.lines=4", *JSONL], "task.lines"),
    (
      {**ORACLE, **{"credit": {"scheme": "weighted"}}},
      ["--config.reviewer.flip=0.1"],
      "reviewer.flip",
    ),
  ],
)
def test_what_was_typed_together_is_an_error(capsys, recipe, overrides, key):
  with pytest.raises(ConfigError, match=f"^{key}: "):
    build(ConfigDict(recipe), overrides)
  assert not capsys.readouterr().err


def test_what_a_later_level_says_again_counts(capsys):
  recipe = ConfigDict(
    {"reviewer": {"name": "noisy", "flip": 0.1}, "credit": {"scheme": "weighted"}}
  )
  config = build(
    recipe,
    ["--config.reviewer.name=oracle"],
    ["--config.reviewer.name=noisy", "--config.reviewer.flip=0.2"],
  )
  assert (config.reviewer.name, config.reviewer.flip) == ("noisy", 0.2)
  # Also of what a level between would have left out.
  for between in (["--config.credit.scheme=uniform"], ["--config.reviewer.name=none"]):
    after = [
      "--config.credit.scheme=weighted",
      *["--config.reviewer.name=noisy"] * (between[0].endswith("none")),
    ]
    assert build(recipe, between, after) == build(recipe)
  assert not capsys.readouterr().err


VALUES = {
  "reviewer.name": ["none", "oracle", "noisy", "gemini", "panel", "x", 3],
  "reviewer.panel": [("oracle",), ("gemini:m", "noisy"), ()],
  "reviewer.flip": [0.1, 2.0],
  "reviewer.overlap": [1],
  "reviewer.client.model": ["m"],
  "reviewer.audit_every": [5],
  "credit.scheme": ["uniform", "weighted", "signed", "potential", "y"],
  "credit.lam": [0.1, -1.0],
  "credit.discount": [0.5],
  "value.source": ["monte_carlo", "learned", "reviewer"],
  "value.continuations": [2],
  "learner.loss": ["ppo", "reinforce"],
  "learner.clip_low": [0.1],
  "policy.pretrained": ["m", ""],
  "policy.lora_rank": [4, 0],
  "policy.lora_alpha": [8.0],
  "policy.width": [32],
  "task.name": ["chains", "tfds", "jsonl", "hub", "z"],
  "task.lines": [4],
  "task.dataset": ["d"],
  "task.path": ["p"],
  "task.tokenizer": ["t"],
  "warmstart.steps": [0, 7],
  "warmstart.lr": [0.1],
}
LEVEL = st.fixed_dictionaries(
  {}, optional={key: st.sampled_from(values) for key, values in VALUES.items()}
)


@hypothesis.settings(
  max_examples=150,
  deadline=None,
  derandomize=True,
  suppress_health_check=list(hypothesis.HealthCheck),
)
@hypothesis.given(LEVEL, LEVEL, LEVEL)
def test_any_three_levels_give_a_config_or_one_sentence(capsys, recipe, line, arm):
  levels = [[f"--config.{key}={value}" for key, value in level.items()] for level in (line, arm)]
  capsys.readouterr()
  try:
    config = build(ConfigDict(config_lib.nested(recipe)), *levels)
  except ConfigError as error:
    if "\n" in str(error):
      raise
    return
  left_out = [
    part
    for said in capsys.readouterr().err.splitlines()
    for part in said.split(": ")[-1].split(", ")
  ]
  for key, value in (config_lib.flatten(recipe) | line | arm).items():
    # Nothing that was said is lost in silence.
    now = operator.attrgetter(key)(config) if key not in left_out else value
    assert now == value or key in left_out
  assert not set(left_out) & arm.keys()


# What makes two runs the same run.


def test_the_fixed_keys_change_with_what_is_learnt_and_with_nothing_else():
  base = tiny.make_config()
  assert tiny.make_config().fixed() == base.fixed()
  for key, value in {
    "seed": 1,
    "learner.lr": 0.5,
    "rollout.temperature": 0.5,
    "task.lines": 4,
  }.items():
    assert tiny.make_config({key: value}).fixed() != base.fixed(), key
  for key, value in {
    "checkpoint.every": 9,
    "checkpoint.keep": 9,
    "evaluate.every": 2,
    "mesh.fsdp": 2,
  }.items():
    assert tiny.make_config({key: value}).fixed() == base.fixed(), key


def test_which_keys_a_resumed_run_may_change():
  fixed = {key for config in every_choice() for key in config.fixed()}
  every = {
    key for config in every_choice() for key in config_lib.flatten(dataclasses.asdict(config))
  }
  free = [key for key in every if key not in fixed]
  others = {
    key
    for key in free
    if key.split(".")[0] not in ("reviewer", "rewrite", "checkpoint", "evaluate", "log", "mesh")
  }
  assert others == {"steps", "task.turn_seconds", "task.verifier_seconds"}
  assert not [key for key in fixed if key.split(".")[0] in ("checkpoint", "evaluate", "mesh")]
  # What is asked of whom is fixed; how long, how often and for how much is not.
  ours = {"name", "flip", "step", "seed", "panel", "combine", "escalate", "sample_frac", "overlap"}
  ours |= {"path", "refit_every"}
  asked = {"model", "thinking", "base_url", "vertex", "rubric", "whole_group", "max_output_tokens"}
  asked |= {"level", "reference", "examples", "samples"}
  reviewer = {key for key in fixed if key.startswith("reviewer.")}
  assert reviewer == {f"reviewer.{key}" for key in ours} | {
    f"reviewer.client.{key}" for key in asked
  }
  rewriter = {key for key in fixed if key.startswith("rewrite.client.")}
  assert rewriter == {f"rewrite.client.{key}" for key in asked}


def test_more_steps_are_the_same_run_unless_the_schedule_ends_with_them():
  assert tiny.make_config({"steps": 9}).fixed() == tiny.make_config().fixed()
  linear = {"learner.schedule": "linear"}
  assert tiny.make_config({**linear, "steps": 9}).fixed() != tiny.make_config(linear).fixed()


def test_a_resumed_run_may_be_given_more_money_and_another_pace_but_no_other_model():
  gemini = {**REVIEWED, "reviewer.name": "gemini"}
  saved = tiny.make_config(gemini)
  richer = tiny.make_config(
    {**gemini, "reviewer.client.max_dollars": 50.0, "reviewer.client.concurrency": 4}
  )
  assert difference(richer, saved.to_json()) == []
  assert richer.fixed() == saved.fixed()
  other = tiny.make_config({**gemini, "reviewer.client.model": "gemini-3.8-flash"})
  assert [change.split()[0] for change in difference(other, saved.to_json())] == [
    "reviewer.client.model"
  ]


def test_a_scheme_that_reads_values_alone_asks_a_model_for_them():
  gemini = {"reviewer.name": "gemini", "credit.scheme": "potential"}
  assert tiny.make_config(gemini).reviewer.client.level == "values"
  weighted = {**gemini, "credit.scheme": "weighted"}
  assert tiny.make_config(weighted).reviewer.client.level == "verdict"
  alone = {**gemini, "reviewer.client.level": "values", "reviewer.client.whole_group": True}
  assert message(tiny.settings(alone)).startswith("reviewer.client.whole_group: ")
  audited = {**gemini, "reviewer.audit_every": 5}  # It looks at roles.
  assert message(tiny.settings(audited)).startswith("reviewer.audit_every: ")


def test_who_asks_a_reviewer_and_reads_what_it_says():
  assert build({**ORACLE, "credit": {"scheme": "weighted"}}).asks
  assert not build({}).asks
  by_head = {"credit": {"scheme": "potential"}, "value": {"source": "learned"}}
  assert not build(by_head).asks


def test_difference_names_what_a_resumed_run_may_not_change():
  saved = tiny.make_config().to_json()
  free = {"checkpoint.every": 9, "evaluate.every": 1, "steps": 99}
  assert difference(tiny.make_config(free), saved) == []
  (said,) = difference(tiny.make_config({"seed": 3, **free}), saved)
  assert "seed" in said
  assert "0" in said
  assert "3" in said
  weighted = {"credit.scheme": "weighted", "reviewer.name": "oracle", "credit.blame.error": 0.25}
  assert any(
    change.startswith("credit.blame.error ")
    for change in difference(tiny.make_config(weighted), saved)
  )


def test_a_folder_is_the_same_from_every_folder(tmp_path, monkeypatch):
  """In runs that were begun before that was so, too; what is no folder stays as it is."""
  (tmp_path / "model").mkdir()
  monkeypatch.chdir(tmp_path)

  def settings(name):
    return load(str(QUICKSTART), [f"--config.policy.pretrained={name}", *JSONL])

  here, named = settings("model"), settings(str(tmp_path / "model"))
  assert here == named
  assert here.policy.pretrained == here.task.tokenizer == str(tmp_path / "model")
  assert difference(here, here.to_json().replace(f"{tmp_path}/model", "model")) == []
  assert settings("org/model").policy.pretrained == "org/model"


def test_difference_sees_keys_that_one_side_lacks():
  # As where the run was made by another version of the program.
  saved = json.loads(tiny.make_config().to_json())
  del saved["learner"]["entropy"]
  saved["learner"]["gone"] = 1
  changes = difference(tiny.make_config(), json.dumps(saved))
  assert sorted(change.split()[0] for change in changes) == ["learner.entropy", "learner.gone"]


def test_a_config_survives_json():
  config = tiny.make_config(
    {"credit.scheme": "weighted", "reviewer.name": "oracle", "credit.blame.error": 0.5}
  )
  text = config.to_json()
  again = build(ConfigDict(json.loads(text)))
  assert again == config
  assert again.to_json() == text
  assert again.fixed() == config.fixed()


def test_a_config_is_frozen():
  with pytest.raises(dataclasses.FrozenInstanceError):
    Config().seed = 3


# Recipes and workdirs.


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_builds(path):
  assert load(str(path)).steps > 0


def test_every_arm_of_every_recipe_builds():
  for path in RECIPES:
    recipe = config_lib.read_recipe(str(path))
    for arm in getattr(recipe, "ARMS", {}):
      arm_config(recipe, arm, 0, [])


def test_there_are_recipes():
  assert RECIPES


def test_a_workdir_is_claimed_once(tmp_path):
  config = tiny.make_config()
  folder = claim_workdir(config, str(tmp_path / "run"))
  assert build(ConfigDict(json.loads((folder / "config.json").read_text()))) == config
  claim_workdir(
    tiny.make_config({"checkpoint.every": 5}), str(folder)
  )  # The same run, saved less often.
  with pytest.raises(UserError, match="seed was 0 and is now 4"):
    claim_workdir(tiny.make_config({"seed": 4}), str(folder))


def test_a_workdir_claimed_halfway_can_be_claimed_again(tmp_path):
  # A process that was killed, or a full disk, while config.json was being written.
  (tmp_path / ".config.json").write_text('{"seed')
  claim_workdir(tiny.make_config(), str(tmp_path))
  assert (tmp_path / "config.json").exists()


def test_a_workdir_with_other_files_is_refused(tmp_path):
  (tmp_path / "thesis.tex").write_text("")
  with pytest.raises(UserError, match="no run"):
    claim_workdir(tiny.make_config(), str(tmp_path))
  assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
