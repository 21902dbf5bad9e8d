"""A bar where something takes over five seconds; with TQDM_DISABLE=1, or where stderr is no
terminal, there is none."""

import functools

from tqdm import tqdm

progress = functools.partial(tqdm, delay=5.0, disable=None, leave=False)
