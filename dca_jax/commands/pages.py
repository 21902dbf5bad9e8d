"""Pages from the templates beside this file; what a value holds is text there, never markup."""

import functools
import importlib.resources
from typing import Any


@functools.cache
def _templates() -> Any:
  import jinja2

  return jinja2.Environment(
    loader=jinja2.PackageLoader("dca_jax.commands"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
  )


def render(template: str, **values: Any) -> str:
  """The template with the values in it, all of them escaped except `markup`."""
  return _templates().get_template(template).render(**values)


def markup(text: str) -> Any:
  """Marks what this program drew itself, such as an SVG element, as markup."""
  import markupsafe

  return markupsafe.Markup(text)


@functools.cache
def source(name: str) -> str:
  """The text of a file beside the templates."""
  return importlib.resources.files("dca_jax.commands").joinpath("templates", name).read_text()
