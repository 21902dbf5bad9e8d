"""The page of a run: curves, a table of episodes, an episode in the colours of its credit.

A server on this machine gives it, and follows a run that goes on; or it is one file with a part of
the episodes in it. Both are the same template and script. The script makes text nodes of whatever a
policy wrote, and the page's policy (CSP) allows no script but ours.
"""

import base64
import codecs
import functools
import hashlib
import http.server
import json
import math
import os
import pathlib
import sqlite3
import statistics
import sys
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from dca_jax.commands.pages import markup, render, source
from dca_jax.commands.report import summary
from dca_jax.config import flatten, read_saved
from dca_jax.credit import SCHEMES
from dca_jax.episode import ROLES, Episode
from dca_jax.learner.supervised import cache_folder
from dca_jax.store.index import PAGE, Index, facts
from dca_jax.store.metrics import read_metrics
from dca_jax.store.trajectories import read_trajectories
from dca_jax.store.workdir import is_remote, locate

_SECONDS = (2.0, 60.0)
"""Between looks at a folder, and at a bucket, where a look costs money."""
_FILE_EPISODES, _FILE_BYTES = 512, 2**22
"""At most so many episodes of a step, and so much text of theirs, are in one file."""
_NAMES = ("127.0.0.1", "localhost", "[::1]")

Pieces = Callable[[Sequence[int]], list[bytes]]
"""The bytes of each token."""


def write_report(workdir: epath.Path, output: epath.Path | None = None) -> epath.Path:
  """Writes the page of a run with the episodes of its first and last step in it, to `report.html`
  in the workdir unless told otherwise.

  Raises:
    ConfigError: there is no run, or it has not finished a step.
  """
  told, rows = summary(workdir), read_metrics(workdir)
  trained = [row["step"] for row in rows if "train/accuracy" in row]
  steps, pieces = dict.fromkeys((trained[0], trained[-1])), token_pieces(workdir)
  kept = {step: _some(workdir, step) for step in steps}
  folder = workdir / "trajectories"
  gone = [f"The trajectories of this step are not in {folder}: {s}." for s in kept if not kept[s]]
  episodes = [shown(episode, pieces) for own in kept.values() for episode in own]
  data = {"metrics": [rows], "episodes": episodes, "runs": [_run(workdir)]}
  path = output or workdir / "report.html"
  path.write_bytes(_page(told, data, gone).encode(errors="replace"))
  return path


def _some(workdir: epath.Path, step: int) -> list[Episode]:
  """Episodes of a step, in whole groups while there is room."""
  kept: list[Episode] = []
  size = 0
  for episode in read_trajectories(workdir / "trajectories", step):
    new = not kept or kept[-1].problem.id != episode.problem.id
    size += len(episode.text) + 20 * len(episode.credit)
    if new and (len(kept) >= _FILE_EPISODES or size > _FILE_BYTES) and kept:
      break
    kept.append(episode)
  return kept


def _run(workdir: epath.Path) -> dict[str, Any]:
  """What the script knows of a run: its name, whether it has a reviewer, and whether that is left
  out where a group fared alike."""
  saved = flatten(read_saved(os.fspath(workdir)))
  scheme = SCHEMES.get(saved.get("credit.scheme", ""))
  return {
    "name": f"{workdir.parent.name}/{workdir.name}",
    "reviewer": saved.get("reviewer.name") != "none",
    "idle": bool(scheme and scheme.idle_when_equal),
  }


def _page(told: Mapping[str, Any], data: Mapping[str, Any], gone: Sequence[str] = ()) -> str:
  """The page; `data` is what its script reads, and `gone` says what of it is missing."""
  script, style = source("view.js"), source("view.css")
  data = _finite({"roles": ROLES, "page": PAGE, **data})
  return render(
    "view.html",
    **told,
    gone=gone,
    data=data,
    policy=_policy(script, style),
    script=markup(script),
    style=markup(style),
  )


def _policy(script: str, style: str) -> str:
  """What a browser may do with the page: run and apply what is in it, and ask its own server."""
  told = [
    base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (script, style)
  ]
  return (
    f"default-src 'none'; script-src 'sha256-{told[0]}'; style-src 'sha256-{told[1]}';"
    " connect-src 'self'; base-uri 'none'; form-action 'none'"
  )


def _finite(said: Any) -> Any:
  """The same for JSON, which has no number that is not finite."""
  if isinstance(said, dict):
    return {key: _finite(value) for key, value in said.items()}
  if isinstance(said, list | tuple):
    return [_finite(value) for value in said]
  return said if not isinstance(said, float) or math.isfinite(said) else str(said)


def token_pieces(workdir: epath.Path) -> Pieces | None:
  """That of the tokenizer that the run has kept, if it can be read."""
  from dca_jax.tasks.tokenizer import token_bytes

  try:
    from transformers import PreTrainedTokenizerFast

    if is_remote(workdir) or not (workdir / "tokenizer" / "tokenizer.json").exists():
      return None
    tokenizer = PreTrainedTokenizerFast.from_pretrained(os.fspath(workdir / "tokenizer"))
    token_bytes(tokenizer, [])
    return functools.partial(token_bytes, tokenizer)
  except Exception:  # Damage shows as anything; the page then knows the steps alone.
    return None


def shown(episode: Episode, pieces: Pieces | None) -> dict[str, Any]:
  """What the page knows of an episode: its facts, and its spans in order.

  A span is a step, or what the environment gave; a step has its tokens, each with its advantage,
  where the tokenizer is known.
  """
  texts = _texts(episode.tokens, pieces)
  spans = [(step.start, _step(episode, k, texts)) for k, step in enumerate(episode.steps)]
  for start, _, segment in episode.spans():
    if not segment.sampled:
      spans.append((start, {"given": segment.text}))
  return {
    **facts(episode),
    "problem": str(episode.problem.id),
    "prompt": episode.problem.prompt,
    "answer": episode.problem.answer,
    "parts": episode.outcome.parts,
    "model": episode.review.model,
    "trained": episode.trained,
    "spans": [span for _, span in sorted(spans, key=lambda pair: pair[0])],
  }


def _texts(tokens: Sequence[int], pieces: Pieces | None) -> list[str]:
  """The text of each token; a character that several make stands at the last of them."""
  decode = codecs.getincrementaldecoder("utf-8")("replace").decode
  return [decode(piece) for piece in pieces(tokens)] if pieces else []


def _step(episode: Episode, k: int, texts: Sequence[str]) -> dict[str, Any]:
  step, review = episode.steps[k], episode.review
  credit = [float(f"{x:.4g}") for x in episode.credit[step.start : step.end]]
  told: dict[str, Any] = {"text": step.text, "credit": statistics.fmean(credit or [0.0])}
  if texts:
    told["tokens"] = [*zip(texts[step.start : step.end], credit, strict=True)]
  if review.roles:
    told |= {"role": review.roles[k], "weight": review.weights[k]}
  if review.reasons:
    told["reason"] = review.reasons[k]
  if len(episode.values) and episode.values[k] == episode.values[k]:
    told["value"] = episode.values[k]
  if k in episode.checks:
    told["effect"] = episode.checks[k].effect
  return told


class Shown:
  """A run that is looked at: its metrics, and its episodes by an index that a thread keeps up."""

  def __init__(self, workdir: epath.Path):
    self.workdir = workdir
    self.index = Index(workdir / "trajectories", _cache())
    self._seen: tuple[Any, list[dict[str, Any]], dict[str, Any]] = None, [], {}
    self._look()  # What is no run is said now.
    self.pieces: Pieces | None = None
    threading.Thread(target=self._follow, daemon=True).start()

  def _follow(self) -> None:
    self.pieces = token_pieces(self.workdir)
    while True:
      try:
        self.index.update()
      except (OSError, sqlite3.Error) as error:  # A folder that is gone may come back.
        print(f"warning: {self.workdir}: {error}", file=sys.stderr)
      time.sleep(_SECONDS[is_remote(self.workdir)])

  def _look(self) -> None:
    """Reads metrics.jsonl again where it has changed."""
    path = self.workdir / "metrics.jsonl"
    stamp = path.stat() if path.exists() else None
    if stamp is None or stamp != self._seen[0]:
      self._seen = stamp, read_metrics(self.workdir), summary(self.workdir)

  def rows(self) -> list[dict[str, Any]]:
    """Those of metrics.jsonl."""
    self._look()
    return self._seen[1]

  def summary(self) -> dict[str, Any]:
    """See `report.summary`."""
    self._look()
    return self._seen[2]

  def read(self, wanted: Mapping[str, str]) -> list[dict[str, Any]]:
    return [shown(episode, self.pieces) for episode in self.index.read(wanted)]


def _cache() -> pathlib.Path:
  """Where indexes are kept between looks, or for this one alone where nothing can be kept."""
  folder = cache_folder() / "view"
  try:
    folder.mkdir(parents=True, exist_ok=True)
    if os.access(folder, os.W_OK):
      return folder
  except OSError:
    pass
  return pathlib.Path(tempfile.mkdtemp(prefix="dca-jax-view-"))


def view(workdir: str, against: str | None, port: int) -> http.server.ThreadingHTTPServer:
  """A server of the page on this machine alone, of a run and perhaps another beside it; call its
  `serve_forever`.

  Raises:
    ConfigError: there is no run, or it has not finished a step.
    OSError: the port is taken.
  """
  runs = [Shown(locate(place)) for place in (workdir, against) if place]
  handler = functools.partial(_Handler, runs)
  return http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)


class _Handler(http.server.BaseHTTPRequestHandler):
  """Answers GET; knows no other method, and changes nothing but its own index."""

  def __init__(self, runs: Sequence[Shown], *args: Any):
    self._runs = runs
    super().__init__(*args)

  def log_message(self, *_: Any) -> None:
    pass

  def do_GET(self) -> None:
    # Another site's name may lead here (DNS rebinding).
    if (self.headers.get("Host") or "").rpartition(":")[0] not in _NAMES:
      self.send_error(403, "this page is for this machine alone")
      return
    where = urllib.parse.urlsplit(self.path)
    wanted = dict(urllib.parse.parse_qsl(where.query))
    answers = {"/metrics": self._metrics, "/episodes": self._episodes, "/episode": self._episode}
    try:
      if where.path == "/":
        runs = [_run(run.workdir) for run in self._runs]
        page = _page(self._runs[0].summary(), {"runs": runs})
        self._send(page.encode(errors="replace"), "text/html")
      elif where.path in answers:
        said = answers[where.path](self._runs[int(wanted.pop("run", "0"))], wanted)
        self._send(json.dumps(_finite(said)).encode(), "application/json")
      else:
        self.send_error(404)
    except (KeyError, ValueError, IndexError, OverflowError):
      self.send_error(400)

  def _send(self, body: bytes, kind: str) -> None:
    self.send_response(200)
    self.send_header("Content-Type", f"{kind}; charset=utf-8")
    self.send_header("Content-Length", str(len(body)))
    self.send_header("X-Content-Type-Options", "nosniff")
    self.send_header("Cache-Control", "no-store")
    self.end_headers()
    self.wfile.write(body)

  def _metrics(self, run: Shown, wanted: Mapping[str, str]) -> dict[str, Any]:
    since = int(wanted.get("since", "-1"))
    new = [row for row in run.rows() if row["step"] > since]
    statuses = run.index.statuses()
    return {"rows": new, "statuses": [*statuses], "episodes": sum(statuses.values())}

  def _episodes(self, run: Shown, wanted: dict[str, str]) -> dict[str, Any]:
    sort, down = wanted.pop("sort", "step"), wanted.pop("down", "") == "1"
    return run.index.find(wanted, sort, down, int(wanted.pop("page", "0")))

  def _episode(self, run: Shown, wanted: Mapping[str, str]) -> dict[str, Any]:
    """An episode, the others of its group, and those of the other runs on the same problem."""
    group = run.read({key: wanted[key] for key in ("step", "problem")})
    own = [episode for episode in group if str(episode["sample"]) == wanted["sample"]]
    prompt = own[0]["prompt"] if own else None
    others = [
      other.read({"problem": wanted["problem"]}) for other in self._runs if other is not run
    ]
    same = [episode for told in others for episode in told if episode["prompt"] == prompt]
    return {"episode": own[0] if own else None, "group": group, "others": same}
