"""Packages that only one kind of machine needs: what a site does not use is not installed with the base.

    fedsplit              a site, and the encoder
    fedsplit[server]      what draws a run's plots and serves its metrics
    fedsplit[simulation]  many sites on one machine: Ray, partitioners, scikit-learn's digits, comparisons
    fedsplit[export]      ONNX files of trained modules
    fedsplit[tensorboard], fedsplit[mlflow], fedsplit[wandb]    the trackers that a run's metrics can go to

Whoever imports such a package does it where it is used, inside `extra`; `check_extra` asks before a run starts.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from fedsplit.core.errors import ConfigError

Extra = Literal["server", "simulation", "export", "tensorboard", "mlflow", "wandb"]


@contextmanager
def extra(name: Extra, purpose: str) -> Iterator[None]:
    """For an import of one of the extra's packages. Raises ConfigError that says which install `purpose` wants."""
    try:
        yield
    except ImportError as err:
        raise ConfigError(
            f"{purpose} needs a package that is not installed here ({err}); "
            f'install it with: pip install "fedsplit[{name}]"'
        ) from err


def check_extra(name: Extra, purpose: str, *modules: str) -> None:
    """See that all of an extra's `modules` are installed, without loading one. Raises ConfigError as `extra`."""
    with extra(name, purpose):
        for module in modules:
            if importlib.util.find_spec(module) is None:
                raise ModuleNotFoundError(f"No module named {module!r}")
