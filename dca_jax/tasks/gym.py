"""Problems of reasoning-gym, of one turn each, made from a seed and scored by its own verifiers."""

import dataclasses
import functools
import json
import re
from typing import Any, ClassVar

from dca_jax.doors import require
from dca_jax.errors import UserError, reason
from dca_jax.tasks.chat import CHARACTERS_END, Chat, ChatConfig
from dca_jax.tasks.types import Outcome, Problem, problem_seed

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class GymConfig(ChatConfig):
  """The `task` section for `reasoning_gym`. Without a tokenizer characters are the tokens, and
  questions with their answers the demonstrations."""

  name: str = "reasoning_gym"
  dataset: str = "chain_sum"
  """The name of one of its data sets."""
  settings: str = "{}"
  """JSON object of that data set's settings, such as `{"max_terms": 3}`."""

  offers: ClassVar[tuple[str, ...]] = ("demonstrations",)

  def open(self) -> "Gym":
    return Gym(self)


class Gym:
  """The task."""

  step_end, step_limits, concurrency, sizes = "\n", (4, 32), 1, dict[str, int]()

  def __init__(self, config: GymConfig):
    require("reasoning_gym", "gym", "task.name")
    self._config, self._chat = config, Chat(config, characters=True)
    self._entry = functools.lru_cache(4096)(self._made)
    self._entry(0)

  def tokenizer(self) -> Any:
    return self._chat.tokenizer

  def _made(self, seed: int) -> tuple[Any, dict[str, Any]]:
    """A data set and its only entry."""
    import reasoning_gym

    try:
      options = json.loads(self._config.settings)
      made = reasoning_gym.create_dataset(self._config.dataset, seed=seed, size=1, **options)
      return made, made[0]
    except Exception as error:  # It raises what it likes.
      said = f"task.dataset, task.settings: reasoning-gym cannot make {self._config.dataset!r}"
      raise UserError(f"{said} ({reason(error)})") from None

  def problem(self, split: str, index: int) -> Problem:
    seed = problem_seed(split, index)
    _, entry = self._entry(seed)
    question, answer = entry["question"], str(entry["answer"])
    return Problem(index, question, answer, self.render(question), {"seed": seed})

  def render(self, prompt: str) -> str:
    return self._chat.ask(prompt)

  def demonstration(self, index: int, mistakes: bool) -> tuple[str, str]:
    problem = self.problem("demonstrations", index)
    return problem.rendered, problem.answer + self.tokenizer().eos_token

  def verify(self, problem: Problem, completion: str, truncated: bool) -> Outcome:
    """Its own score; what counts is what stands in `<answer>`, or else the last line."""
    if truncated:
      return Outcome(0.0, False, True)
    made, entry = self._entry(problem.row["seed"])
    reward = float(made.score_answer(self.final_answer(completion), entry))
    return Outcome(min(1.0, max(0.0, reward)), reward >= 1, False)

  def final_answer(self, completion: str) -> str | None:
    marked = _ANSWER.findall(completion)
    text = marked[-1] if marked else completion.removesuffix(CHARACTERS_END).strip()
    return text.strip().rpartition("\n")[2]
