"""Where Hydra calls us: when a command starts and when it ends, under any launcher and any sweeper.

Hydra makes the callback for all that it does, printing a config included: what takes seconds to import is in sweep.py.
"""

from __future__ import annotations

import atexit
import sys
import traceback
from collections.abc import Callable
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig


class SweepCallback(Callback):
    """Checks cells before the first one runs; closes the sweep and shows its cells when it ends."""

    def __init__(self) -> None:
        self.sweep = None

    def __getstate__(self) -> dict:
        return {"sweep": None}  # a launcher that starts processes pickles its callbacks; the sweep is this process's

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        from countdown_kd.launching.sweep import start_alone

        end_on_error(start_alone, config)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        from countdown_kd.launching.sweep import Sweep

        self.sweep = end_on_error(Sweep, config)
        # Hydra calls on_multirun_end only after a sweep without an error.
        atexit.register(self.sweep.finish)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        if end_on_error(lambda _: self.sweep.finish(), config):
            raise SystemExit(1)


def end_on_error(function: Callable[[DictConfig], Any], config: DictConfig) -> Any:
    """Hydra turns what a callback raises into a warning and goes on; here it ends the program."""
    from countdown_kd.launching.folder import FolderTaken
    from countdown_kd.tracking import StoreError

    try:
        return function(config)
    except (StoreError, FolderTaken) as error:
        print(f"\nNothing was started: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except Exception:
        traceback.print_exc()
        raise SystemExit(1) from None
