"""How a language model is spoken to: in its tokenizer's chat template, turn by turn."""

import dataclasses
import datetime
import functools
import json
from collections.abc import Sequence
from typing import Any

from dca_jax.doors import local
from dca_jax.errors import UserError
from dca_jax.tasks.environments import Frame
from dca_jax.tasks.tokenizer import character_tokenizer, load_tokenizer
from dca_jax.tasks.types import TaskConfig

# Set before a chat template that asks for the day: what a run asks may not depend on when it runs.
_TODAY = datetime.datetime(2024, 7, 26)
_CALENDAR = "".join(
  f"|replace('%{code}', '{_TODAY.strftime(f'%{code}')}')"
  for code in ("-d", "-m", *"aAbBcdeFHIjmMpSTuUVwWxXyY%")
)
_CLOCK = f"{{% macro strftime_now(format) %}}{{{{ format{_CALENDAR} }}}}{{% endmacro %}}\n"

CHARACTERS_END = "\x03"
"""What ends a completion where tokens are characters."""
_CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))

Message = tuple[str, str]
"""Who speaks (`system`, `user`, `assistant`, `tool`), and what they say."""


@dataclasses.dataclass(frozen=True)
class ChatConfig(TaskConfig):
  """What a `task` section says of the language model's side."""

  tokenizer: str = local()
  """Folder or hub id of a tokenizer; empty is that of policy.pretrained."""
  prompt: str = "{question}"
  """What the policy is asked, such as `{question} Put the answer after ####.`"""
  chat_template: bool = True
  """Writes the prompt as the tokenizer's chat template does."""
  system_prompt: str = ""
  """What the system's message says, in front of all others in the chat template; empty: there is no
  such message."""
  template_kwargs: str = "{}"
  """JSON object of further arguments to the chat template, such as `{"enable_thinking": false}`. A
  template that asks for today's date is told 26 July 2024, which is Llama's where it knows none."""

  def implied(self, pretrained: str) -> dict[str, Any]:
    return {"tokenizer": pretrained}

  def check(self) -> dict[str, str]:
    return {} if "{question}" in self.prompt else {"prompt": "must hold {question}"}

  def unused(self) -> dict[str, str]:
    keys = () if self.chat_template else ("system_prompt", "template_kwargs")
    return dict.fromkeys(keys, "task.chat_template is False")


class Chat:
  """The words around what is said. What is wrong with tokenizer or template raises a UserError."""

  def __init__(self, config: ChatConfig, characters: bool = False):
    """Where there is no tokenizer and `characters` may be tokens, they are."""
    self._config = config
    self._template = config.chat_template
    if characters and not config.tokenizer:
      self.tokenizer, self._template = character_tokenizer(_CHARACTERS, CHARACTERS_END), False
    else:
      self.tokenizer = load_tokenizer(config.tokenizer)
    if self._template and not self.tokenizer.chat_template:
      raise UserError(
        f"task.chat_template: {config.tokenizer!r} has none; set it to False, and see task.prompt"
      )
    # As a chat template would, start with what the tokenizer starts with.
    starts = self.tokenizer.bos_token_id in self.tokenizer("")["input_ids"]
    self._start = self.tokenizer.bos_token if starts else ""

  def ask(self, question: str) -> str:
    """What the policy reads where it is asked."""
    text = self._config.prompt.replace("{question}", question)
    return self.render([("user", text)]) if self._template else self._start + text

  def render(self, said: Sequence[Message]) -> str:
    """What the policy reads after all that was said, the system prompt included."""
    system = [("system", self._config.system_prompt)] if self._config.system_prompt else []
    messages = [{"role": role, "content": content} for role, content in [*system, *said]]
    try:
      options = json.loads(self._config.template_kwargs)
      template = self.tokenizer.get_chat_template(options.pop("chat_template", None))
      template = _CLOCK + template if "strftime_now" in template else template
      return self.tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True, **options
      )
    except Exception as error:  # A template raises what it likes.
      raise UserError(
        f"task.chat_template or task.template_kwargs: the template fails ({error})"
      ) from None

  @functools.cached_property
  def opening(self) -> tuple[str, Frame]:
    """The prompt up to a question that an environment will ask, and the frame of that."""
    before, _, after = self.ask("\x01").partition("\x01")
    return before, ("", after)

  def between(self, role: str) -> Frame:
    """What stands around an observation, from the end of the policy's turn to its next one.

    Raises:
      UserError: the template changes what was said before when something is added to it.
    """
    if not self._template:
      return "", "\n"
    asked = self._config.prompt.replace("{question}", "Q")
    one = [("user", asked), ("assistant", "\x01"), (role, "\x02")]
    before, after = self.render(one).partition("\x01")[2].split("\x02")
    twice = self.render([*one, ("assistant", "\x01"), (role, "\x02")]).partition("\x01")[2]
    again, _, rest = twice.partition("\x02")
    opened, _, rest = rest.partition("\x01")
    if (again, rest) != (before, f"{before}\x02{after}") or not after.startswith(opened):
      raise UserError(
        "task.chat_template: the template of this tokenizer does not go on a conversation where it"
        f" stood, so a {role} cannot answer; give another one in task.template_kwargs"
      )
    return before, after
