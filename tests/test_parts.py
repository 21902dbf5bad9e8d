"""Reviews of a run in a bucket: only what is new is sent, nothing is lost or counted twice."""

import contextlib
import os
import pathlib

import pytest
from etils import epath

from dca_jax.review.cache import Cache
from dca_jax.store import workdir as workdir_module
from dca_jax.store.workdir import Growing, Parts


@pytest.fixture
def bucket(tmp_path) -> epath.Path:
  (tmp_path / "bucket").mkdir()
  return epath.Path(tmp_path / "bucket")


def start(tmp_path, bucket, name) -> tuple[Parts, pathlib.Path]:
  local = tmp_path / name / "reviews.sqlite"
  local.parent.mkdir()
  return Parts(bucket, local), local


def review(local, *keys) -> None:
  with contextlib.closing(Cache(local)) as cache:
    for key in keys:
      cache.put(key, "model", "text " * 400)
      cache.add("reviewer", 0.25)


def known(local) -> tuple[int, float]:
  with contextlib.closing(Cache(local)) as cache:
    ((replies,),) = cache._db.execute("select count(*) from replies")
    return replies, cache.spent("reviewer")


def sizes(bucket) -> list[int]:
  return [os.path.getsize(path) for path in sorted((bucket / "reviews").glob("*"))]


def test_only_what_is_new_is_sent_and_every_start_finds_all(tmp_path, bucket):
  parts, local = start(tmp_path, bucket, "first")
  parts.publish()
  assert not list(bucket.iterdir())
  review(local, *map(str, range(300)))
  for key in ("a", "b"):
    parts.publish()
    review(local, key)
  parts.publish()
  parts.publish()
  many, *few = sizes(bucket)
  assert many > 300 * 2000
  assert len(few) == 2
  assert max(few) < 40_000

  parts, local = start(tmp_path, bucket, "second")
  assert known(local) == (302, 75.5)
  review(local, "c")
  parts.close()
  assert len(sizes(bucket)) == 4
  assert known(start(tmp_path, bucket, "third")[1]) == (303, 75.75)


def test_many_parts_become_one_and_a_kill_meanwhile_does_no_harm(tmp_path, bucket, monkeypatch):
  parts, local = start(tmp_path, bucket, "first")
  for i in range(5):
    review(local, str(i))
    parts.publish()
  monkeypatch.setattr(workdir_module, "_MANY_PARTS", 3)
  kept = {path: path.read_bytes() for path in (bucket / "reviews").glob("*")}
  start(tmp_path, bucket, "second")
  assert sizes(bucket) == []
  for path in [*kept][2:]:  # Killed before they were removed.
    path.write_bytes(kept[path])
  parts, local = start(tmp_path, bucket, "third")
  assert known(local) == (5, 1.25)
  review(local, "new")
  parts.publish()
  assert known(start(tmp_path, bucket, "fourth")[1]) == (6, 1.5)


def test_a_damaged_part_is_put_aside_and_the_rest_is_kept(tmp_path, bucket, capsys):
  parts, local = start(tmp_path, bucket, "first")
  for keys in (("a", "b"), ("c",), ("d", "e")):
    review(local, *keys)
    parts.publish()
  damaged = sorted((bucket / "reviews").glob("*"))[1]
  damaged.write_bytes(b"x" * 5000)
  assert known(start(tmp_path, bucket, "second")[1]) == (4, 1.0)
  (warning,) = capsys.readouterr().err.splitlines()
  assert f"{damaged} is damaged" in warning
  assert {path.name for path in bucket.iterdir()} == {
    f"aside_reviews_{damaged.name}",
    "reviews",
    "reviews.sqlite",
  }
  assert sizes(bucket) == []
  assert known(start(tmp_path, bucket, "third")[1]) == (4, 1.0)
  assert not capsys.readouterr().err


def test_what_comes_between_checkpoints_is_sent_too(tmp_path, bucket, monkeypatch):
  monkeypatch.setattr(workdir_module, "_EVERY", 0.01)
  parts, local = start(tmp_path, bucket, "first")
  parts.keep_publishing()
  review(local, "a")
  while not sizes(bucket):
    pass
  parts.close()
  assert known(start(tmp_path, bucket, "second")[1]) == (1, 0.25)


def test_what_a_process_paid_that_is_gone_is_adopted_from_its_parts(tmp_path, bucket, monkeypatch):
  monkeypatch.setattr(workdir_module, "is_remote", lambda path: True)
  for process, keys in (("reviews", "ab"), ("reviews_1", "cd")):
    local = tmp_path / f"{process}.sqlite"
    parts = Parts(bucket, local)
    review(local, *keys)
    parts.publish()
  for _ in range(2):
    with contextlib.closing(Growing(bucket)) as growing:
      assert known(growing.reviews) == (4, 1.0)
    assert not list((bucket / "reviews_1").glob("*"))
