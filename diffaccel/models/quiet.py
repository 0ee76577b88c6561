"""Keeps diffusers and transformers from printing while they load, where what matters is raised as an error anyway."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_diffusers() -> Iterator[None]:
    """Keep diffusers' warnings and progress bars off stderr; its settings come back afterwards."""
    from diffusers.utils import logging

    with _quiet(logging):
        yield


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' warnings, load reports and progress bars off stderr; its settings come back afterwards."""
    from transformers.utils import logging

    with _quiet(logging), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _quiet(logging) -> Iterator[None]:
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
