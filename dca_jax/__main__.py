from dca_jax.cli import run

run()
