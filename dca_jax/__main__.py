from dca_jax.commands.cli import run

run()
