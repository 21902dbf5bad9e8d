"""Settings that must stand before jax is imported."""

import getpass
import os
import pathlib
import tempfile

_TEMP = pathlib.Path(tempfile.gettempdir()) / f"dca-jax-tests-{getpass.getuser()}"

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_OFFLINE"] = "1"
# Most of the tests' time is compilation, so programs are optimized little, and kept from run to
# run.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(_TEMP / "xla")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
# One folder for the whole session: warm starts are made once.
os.environ["DCA_JAX_CACHE"] = str(_TEMP / "cache")

import jax  # noqa: E402
import pytest  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def few_programs():
  """Compiled programs take up the mappings that a process may have, 65,530 on Linux, of which a
  whole session would need more."""
  yield
  maps = pathlib.Path("/proc/self/maps")
  if maps.exists() and maps.read_text().count("\n") > 45_000:
    jax.clear_caches()
