"""countdown_kd: on-policy distillation on Countdown, one cell or every combination of the values given.

  python launch.py                                        one cell: the tiny pair, no GPU, no download
  python launch.py -m precision=bf16,fp32 gen=vllm,hf     four cells, side by side
  python launch.py +sweeps=precision_gen                  the same, from a file in sweeps/
  python launch.py -m baseline=student,teacher            evaluate the models as they are, train nothing
  python launch.py precision=bf16 --cfg job               print a cell's config, run nothing
  python launch.py -m precision=bf16,fp32 plan=true       what would run, what is done already; run nothing
  python launch.py -m precision=bf16,fp32 hydra/launcher=slurm    the same as Slurm jobs
  python launch.py -m precision=bf16,fp32 hydra/sweeper=explain   which differing key makes their losses differ?
  python -m countdown_kd status                           how far the newest sweep is (also: compare, parity, doctor)

The same command again runs only what is missing; force=true runs everything anew.

Keys (KEY=VALUE): seed, baseline, force, plan, trainer.*, task.*, eval.*, model.*, teacher.*, gen.*, step.*, dist.*,
tracking.*
A field of TRL's GOLDConfig that conf/trainer/gold.yaml does not list is added with a plus:
+trainer.weight_decay=0.1

Results go to outputs/ (one cell) and multirun/ (a sweep) below the current folder; metrics, figures and
predictions to MLflow (tracking.uri or MLFLOW_TRACKING_URI; by default mlflow.db beside launch.py).
Hydra's own flags: --hydra-help
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent

if {"-h", "--help"} & set(sys.argv[1:]):  # Hydra's own help takes seconds to list what it knows
    print(__doc__)
    print("Groups (GROUP=OPTION; defaults in conf/config.yaml):\n")
    for group in "task model teacher precision gen step dist eval experiment +sweeps".split():
        files = sorted((ROOT / "conf" / group.lstrip("+")).glob("*.yaml"))
        print(f"  {group:<12}{', '.join(file.stem for file in files)}")
    sys.exit()

from countdown_kd.venv import enter

enter(*sys.argv)

import hydra
from omegaconf import DictConfig

from countdown_kd.config import register_resolvers

register_resolvers()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float:
    from countdown_kd.launching.local import run_cell

    return run_cell(cfg)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped by Ctrl-C; what ran so far is in MLflow")
