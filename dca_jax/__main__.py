import sys

from dca_jax.cli import main

sys.exit(main())
