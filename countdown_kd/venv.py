"""`python launch.py` and `python -m countdown_kd` right after `make setup`, without activating anything."""

import importlib.util
import os
import sys
from pathlib import Path

VENV = Path(__file__).resolve().parent.parent / ".venv"


def enter(*command: str) -> None:
    """Where this Python lacks our packages, start the command again with the one in .venv."""
    if importlib.util.find_spec("hydra"):
        return
    python = VENV / "bin" / "python"
    if not python.exists() or Path(sys.prefix) == VENV:
        sys.exit("hydra-core is not installed here; run `make setup` first")
    os.execv(python, [str(python), *command])
