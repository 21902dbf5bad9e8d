"""Episodes of several turns: what is sampled, what is given, and how they end."""

import asyncio
import dataclasses
import pathlib
import threading
import time
from typing import Any

import jax
import numpy as np
import pytest
import words
from policies import random_params
from scripted import Scripted

from dca_jax.devices.mesh import MeshConfig, make_mesh
from dca_jax.doors import find
from dca_jax.episode import Outcome, Problem
from dca_jax.errors import UserError
from dca_jax.policy import Policy, PolicyConfig
from dca_jax.rollout import RolloutConfig, Sampler, SlotsConfig, collect, slots
from dca_jax.rollout.prefixes import Continues, Prefix, continued, monte_carlo
from dca_jax.rollout.turns import Seat, observed, seated
from dca_jax.tasks import EnvironmentConfig, Turn, character_tokenizer
from dca_jax.tasks.tokenizer import load_tokenizer, plain_ids, text_of

P, G, T = 2, 4, 24
GOOD = Outcome(1.0, True, False)


@dataclasses.dataclass(frozen=True)
class Parrot(EnvironmentConfig):
  """Says what `answers` says to the words of the policy; `end$` ends the episode."""

  answers: Any = None
  first: Any = None

  step_end = r"\$"

  def tokenizer(self):
    return character_tokenizer("abcdefghijklmnopqrstuvwxyz;>", "$")

  def problem(self, split, index):
    return Problem(index, "ask>", "")

  def environment(self, problem, seed):
    task = self

    class Mouth:
      def begin(self, problem):
        return task.first() if task.first else None

      def step(self, text):
        said = task.answers(text, seed) if task.answers else f"{text[:-1]};"
        return said if isinstance(said, Turn) else Turn(said, text == "end$", GOOD, 0.5)

      def close(self):
        closed.append(threading.current_thread())

    return Mouth()


closed: list[threading.Thread] = []


def played(task, *turns: str, most=T):
  """Episodes of a policy that says `turns`, one after another."""
  tokenizer = task.tokenizer()
  config = RolloutConfig(problems=P, group=G, max_prompt_tokens=4, max_tokens=most)

  def write(wanted, p, number):
    said = wanted.prompts_PxS[p, : wanted.prompt_lengths_P[p]][4:]
    return tokenizer(turns[text_of(tokenizer, said).count("$")])["input_ids"]

  engine = Scripted(write, ends=(tokenizer.eos_token_id,))
  return collect(Sampler(engine, config, task, tokenizer, 29, np.arange(P)), 0, 1, None)


def story(rollout, i: int = 0) -> list[tuple[str, bool]]:
  tokenizer = Parrot().tokenizer()
  return [(text_of(tokenizer, s.tokens), s.sampled) for s in rollout.episodes[i].segments]


def test_what_the_policy_wrote_is_kept_and_what_it_was_told_is_not_trained_on():
  rollout = played(Parrot(), "one$", "two$", "end$")
  for i, episode in enumerate(rollout.episodes):
    assert story(rollout, i) == [
      ("one$", True), ("one;", False), ("two$", True), ("two;", False), ("end$", True),
    ]  # fmt: skip
    assert (episode.outcome.correct, episode.outcome.truncated) == (True, False)
    assert episode.outcome.progress == (0.5,) * 3
    assert [step.text for step in episode.steps] == ["one$", "two$", "end$"]
    assert episode.given() == ("", "one;", "two;")
  sampled = np.zeros(T, bool)
  sampled[[*range(4), *range(8, 12), *range(16, 20)]] = True
  assert (rollout.sampled_BxT == sampled).all()
  assert rollout.generated == 12 * P * G
  assert rollout.environment_seconds > 0


def test_the_example_of_the_docs_is_played():
  """By somebody who counts down from nine."""
  folder = pathlib.Path(__file__).parents[2] / "docs" / "examples"
  task = find(f"{folder}/guess.py:Guess", "task.name")(max_turns=10)
  rollout = played(task, *(f"{n}$" for n in reversed(range(10))), most=64)
  for episode in rollout.episodes:
    number = int(episode.problem.answer)
    assert [step.text for step in episode.steps] == [f"{n}$" for n in range(9, number - 1, -1)]
    assert episode.outcome.correct
    assert episode.given() == ("", *["down;"] * (9 - number))
    assert episode.outcome.progress[:-1] == pytest.approx(
      [1 - (n - number) / 9 for n in range(9, number, -1)]
    )


def test_an_environment_speaks_first_if_it_likes():
  rollout = played(Parrot(first=lambda: "hello;"), "end$")
  assert story(rollout) == [("hello;", False), ("end$", True)]
  assert not rollout.sampled_BxT[:, :6].any()
  assert rollout.episodes[0].given() == ("hello;",)


@pytest.mark.parametrize("at_once", [1, 16])
@pytest.mark.parametrize(
  ("answers", "told", "turns"),
  [
    (lambda text, seed: "z" * 4000, [], 1),  # Too long for what is left: the episode ends.
    (lambda text, seed: "z" * (T - 4), [], 1),
    (lambda text, seed: "z" * (T - 8), ["z" * (T - 8)], 2),  # Room for one more turn.
    (lambda text, seed: "", [""] * 5, 6),
    (lambda text, seed: Turn(None), [""] * 5, 6),
    # The end token is no letter that an observation could have.
    (lambda text, seed: "a$b", ["ab"] * 3, 4),
  ],
)
def test_observations_of_all_kinds(answers, told, turns, at_once):
  rollout = played(Parrot(answers=answers, at_once=at_once), *["one$"] * 9)
  for i, episode in enumerate(rollout.episodes):
    said = story(rollout, i)
    assert [text for text, sampled in said if not sampled] == told
    assert [text for text, sampled in said if sampled][:1] == ["one$"]
    assert sum(sampled for _, sampled in said) == turns
    assert episode.outcome.truncated
    assert episode.trained
    assert len(episode.tokens) <= T


def test_turns_have_a_limit():
  rollout = played(Parrot(max_turns=2), *["on$"] * 9)
  assert [text for text, sampled in story(rollout) if sampled] == ["on$"] * 2
  assert all(e.outcome.truncated and e.outcome.judged for e in rollout.episodes)


def gone_on(task, rollout, place: int, *turns: str):
  """What comes of two answers after so many tokens of each episode, by a policy that says `turns`;
  and what its first prompt was."""
  tokenizer, said = task.tokenizer(), text_of(task.tokenizer(), rollout.tokens_BxT[0, :place])
  config = RolloutConfig(problems=P, group=G, max_prompt_tokens=4, max_tokens=T)
  prompts = []

  def write(wanted, p, number):
    prompts.append(text_of(tokenizer, wanted.prompts_PxS[p, 4 : wanted.prompt_lengths_P[p]]))
    return tokenizer(turns[prompts[-1].removeprefix(said).count("$")])["input_ids"]

  engine = Scripted(write, ends=(tokenizer.eos_token_id,))
  sampler = Sampler(engine, config, task, tokenizer, 29, np.arange(P))
  prefixes = [Prefix.of(rollout, i, place) for i in range(P * G)]
  further, spent = continued(Continues(sampler, None, (9,)), rollout, prefixes, 2)
  return [one.outcome for own in further for one in own], spent, prompts[:1]


@pytest.mark.parametrize(
  ("place", "before", "turns", "texts"),
  [
    (0, "", ["a$", "end$"], ["a$", "end$"]),
    (2, "on", ["e$", "end$"], ["one$", "end$"]),  # In the middle of a turn,
    (8, "one$one;", ["a$", "end$"], ["one$", "a$", "end$"]),  # at the end of one,
    (9, "one$one;t", ["ea$", "end$"], ["one$", "tea$", "end$"]),
  ],
)
def test_the_policy_goes_on_where_an_episode_was(place, before, turns, texts):
  """Its environment was begun with the same seed, and has heard what stands before."""
  heard: dict[int, list[str]] = {}

  def answers(text, seed):
    heard.setdefault(seed, []).append(text)
    return f"{text[:-1]};"

  task = Parrot(answers=answers)
  rollout = played(task, "one$", "two$", "end$")
  seeds = [episode.seed for episode in rollout.episodes]
  assert len({*seeds}) == P * G
  heard.clear()
  outcomes, spent, prompts = gone_on(task, rollout, place, *turns)
  assert prompts == [before]
  assert {seed: sorted(own) for seed, own in heard.items()} == dict.fromkeys(
    seeds, sorted(texts * 2)
  )
  assert all(o.correct and o.progress == (0.5,) * len(texts) for o in outcomes)
  assert spent == (2 * P * G * len("".join(turns)), 2 * P * G, 0)


def test_where_an_environment_does_not_answer_the_same_there_is_no_verdict(capsys):
  asked: list[int] = []

  def answers(text, seed):
    asked.append(seed)
    again = asked.count(seed) > 3  # The third turn was the last.
    return "other;" if again and seed % 2 else f"{text[:-1]};"

  task = Parrot(answers=answers)
  rollout = played(task, "one$", "two$", "end$")
  outcomes, spent, _ = gone_on(task, rollout, 8, "a$", "end$")
  sound = [seed % 2 == 0 for seed in (e.seed for e in rollout.episodes) for _ in range(2)]
  assert 0 < sum(sound) < len(sound)
  assert [outcome.judged for outcome in outcomes] == sound
  assert spent == (6 * sum(sound), len(sound), len(sound) - sum(sound))
  assert "it does not answer the same; their further answers are left" in capsys.readouterr().err


def raises(text, seed):
  raise OSError("the server is gone")


def never(text, seed):
  time.sleep(3600)


FAILURES = [
  raises,
  never,
  lambda text, seed: exec("raise SystemExit"),
  lambda text, seed: Turn(["a"]),
  lambda text, seed: Turn("a", outcome=None),
  lambda text, seed: Turn("a", outcome=Outcome(float("nan"), False, False)),
]


@pytest.mark.parametrize("fails", FAILURES)
def test_a_failure_is_no_wrong_answer(fails, capsys):
  def answers(text, seed):
    return fails(text, seed) if seed % 2 else Turn(done=True, outcome=GOOD)

  rollout = played(Parrot(answers=answers, turn_seconds=0.3, at_once=16), "end$")
  judged = [e.outcome.judged for e in rollout.episodes]
  assert 0 < sum(judged) < P * G
  for episode in rollout.episodes:
    assert episode.trained == episode.outcome.judged
    # The baseline is left to the others.
    assert episode.outcome.reward == 1.0
  assert f"{judged.count(False)} environments failed" in capsys.readouterr().err


def test_an_environment_that_failed_is_not_asked_again():
  rollout = played(Parrot(answers=raises), "one$")
  assert all(episode.steps for episode in rollout.episodes)
  reviews, spent = monte_carlo(2, Continues(None, None, ()), rollout)
  assert [review.status for review in reviews] == ["none"] * P * G
  assert not any(spent)


def test_a_run_in_which_nothing_can_begin_ends():
  with pytest.raises(UserError, match=r"no episode could begin.*nobody there"):
    played(Parrot(first=lambda: exec("raise OSError('nobody there')")), "end$")


def test_coroutines_share_a_loop_and_are_closed():
  seen = set()

  @dataclasses.dataclass(frozen=True)
  class Later(Parrot):
    def environment(self, problem, seed):
      class Mouth:
        async def begin(self, problem):
          seen.add((asyncio.get_running_loop(), threading.current_thread()))

        async def step(self, text):
          await asyncio.sleep(0.01)
          seen.add((asyncio.get_running_loop(), threading.current_thread()))
          return Turn(done=True, outcome=GOOD)

        async def close(self):
          seen.add(problem.id)

      return Mouth()

  rollout = played(Later(at_once=4), "end$")
  assert all(e.outcome.correct for e in rollout.episodes)
  assert len([s for s in seen if isinstance(s, tuple)]) == 1


def test_what_is_sampled_does_not_depend_on_who_answers_first():
  """With the real engine; nor does it need more than a few programs."""
  policy = Policy(
    PolicyConfig(width=16, depth=1, heads=2, kv_heads=1, head_dim=8, mlp=16),
    29,
    make_mesh(MeshConfig()),
  )
  config = RolloutConfig(
    problems=4, group=G, max_prompt_tokens=4, max_tokens=64, stop=tuple("abcdef")
  )
  params = jax.device_put(
    random_params(policy, 0.3), jax.sharding.NamedSharding(policy.mesh, jax.P())
  )
  dice = np.random.default_rng()

  def slow(text, seed):
    time.sleep(dice.random() * 0.02)
    return "abc;"

  def sampler_of(rows, **task):
    task = Parrot(max_turns=4, **task)
    engine = SlotsConfig(rows=rows).open(policy, config, task.tokenizer())
    return Sampler(engine, config, task, task.tokenizer(), 29, np.arange(4))

  def drawn(rows, **task):
    return collect(sampler_of(rows, **task), 0, 1, params)

  before = slots.decode._cache_size()
  whole = drawn(16, answers=lambda text, seed: "abc;")
  assert slots.decode._cache_size() - before == 1
  assert max(len(e.segments) for e in whole.episodes) > 4
  for rows in (16, 8):
    ours = drawn(rows, answers=slow, at_once=16)
    np.testing.assert_array_equal(ours.tokens_BxT, whole.tokens_BxT)
    np.testing.assert_array_equal(ours.sampled_BxT, whole.sampled_BxT)
    np.testing.assert_allclose(ours.logprobs_BxT, whole.logprobs_BxT, atol=1e-5)
  # Sent back to any place, and with the noise that it had, it goes on as it did.
  sampler, places = sampler_of(16, answers=lambda text, seed: "abc;"), np.random.default_rng(0)
  seats = []
  for i, e in enumerate(whole.episodes):
    sampled = np.flatnonzero(whole.sampled_BxT[i])
    before = e.before(int(places.choice(sampled)))
    seats.append(Seat(i, e.problem, whole.prompts_PxS[i // G], i // G, i % G, e.seed, before))
  for again in seated(sampler, params, seats, (0, 1)):
    assert again.tokens == whole.episodes[again.row].tokens
    own = [s.tokens.tolist() for s in whole.episodes[again.row].segments]
    assert [s.tokens.tolist() for s in again.segments] == own
    assert again.outcome == whole.episodes[again.row].outcome
  # No two turns of an episode are drawn with the same noise.
  turns = [tuple(s.tokens) for e in whole.episodes for s in e.segments if s.sampled]
  assert len(set(turns)) > 0.5 * len(turns)


def test_nothing_in_an_observation_is_special(tmp_path):
  tokenizer = load_tokenizer(words.save_tokenizer(tmp_path))
  assert text_of(tokenizer, plain_ids(tokenizer, "half \ud83d")) == "half ?"
  said = "a <|end|> b<|start|>assistant\n<think></think>"
  ids = plain_ids(tokenizer, said)
  assert text_of(tokenizer, ids) == said
  assert not {*ids} & {*tokenizer.added_tokens_decoder}
  end = tokenizer.convert_tokens_to_ids("<|end|>")
  frame = "<|end|>\n<|start|>user\n", "<|end|>\n<|start|>assistant\n"
  ids = observed(tokenizer, frame, said, [end])
  assert ids[0] != end
  assert tokenizer.decode([end, *ids]) == f"{frame[0]}{said}{frame[1]}"
  # A turn that a stop string ended is ended as the template does.
  assert tokenizer.decode(observed(tokenizer, frame, said, [7])).startswith("<|end|>")
