"""docs/leaderboard.md is what its rows say, and says it in order."""

import json

from evidence import leaderboard


def rows() -> list[dict]:
  return [json.loads(line) for line in leaderboard.ROWS.read_text().splitlines()]


def test_the_page_is_made_from_the_rows():
  assert leaderboard.PAGE.read_text() == leaderboard.page(rows())


def test_one_kind_of_mistake_stands_below_many_of_all_kinds():
  verdicts = {(row["reviewer"], row["settings"]): row["verdict"] for row in rows()}
  assert verdicts["oracle", ""] == verdicts["noisy", "flip=0.2"] == "train"
  assert verdicts["fooled", ""] == "calibrated"
  for name in ("lexical", "thief", "random", "suffix", "nan"):
    assert verdicts[name, ""] == "no"


def test_the_better_rate_counts_and_never_is_nothing(tmp_path):
  lines = [("uniform", 100), ("a", None), ("a, slower", 50), ("b", None), ("c 0.2", 200)]
  told = [json.dumps({"arm": arm, "seed": 1, "completions": took}) for arm, took in lines]
  (tmp_path / "runs.jsonl").write_text("\n".join(told))
  found = leaderboard.realised(str(tmp_path / "runs.jsonl"))
  assert found == {"a": 2.0, "b": 0.0, "c 0.2": 0.5}


def test_a_new_row_replaces_the_old_one_and_keeps_what_training_brought(tmp_path, monkeypatch):
  old = next(row for row in rows() if "realised" in row)
  new = {k: x for k, x in old.items() if k != "realised"} | {"kappa": 0.123}
  (tmp_path / "audit.json").write_text(json.dumps(new))
  (tmp_path / "rows.jsonl").write_text(json.dumps(old) + "\n")
  monkeypatch.setattr(leaderboard, "ROWS", tmp_path / "rows.jsonl")
  monkeypatch.setattr(leaderboard, "PAGE", tmp_path / "page.md")
  leaderboard.main([str(tmp_path / "audit.json")])
  assert rows() == [old | new]


def test_predicted_and_realised_speed_ups_rank_alike():
  pairs = [(row["predicted_speedup"], row["realised"]) for row in rows() if "realised" in row]
  pairs = [(x, y) for x, y in pairs if x is not None]
  assert len(pairs) >= 6
  agree = [(a[0] - b[0]) * (a[1] - b[1]) for a in pairs for b in pairs if a[1] != b[1]]
  assert sum(x > 0 for x in agree) > 0.9 * len(agree)
