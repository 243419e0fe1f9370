"""The one door: composes cells with Hydra and runs each in a process of its own.

python launch.py                                            one cell, the tiny pair
python launch.py -m precision=bf16,fp32 gen=vllm,hf         four cells, side by side
python launch.py --help
"""

import os
import sys
from pathlib import Path

try:
    import hydra
except ModuleNotFoundError:
    # `python launch.py` right after `make setup`, without activating anything.
    venv = Path(__file__).resolve().parent / ".venv" / "bin" / "python"
    if not venv.exists() or Path(sys.prefix) == venv.parent.parent:
        sys.exit("launch.py: hydra-core is not installed here; run `make setup` first")
    os.execv(venv, [str(venv), *sys.argv])

from omegaconf import DictConfig

from countdown_kd.config import register_resolvers

register_resolvers()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float:
    from countdown_kd.cell import run_cell

    return run_cell(cfg)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped by Ctrl-C; what ran so far is in MLflow")
