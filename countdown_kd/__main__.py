"""What is not launching: a look at a sweep from any shell, at two runs side by side, at a machine. Imports no torch."""

from __future__ import annotations

import argparse
import gc
import sys
from functools import cache

from countdown_kd.venv import enter

enter("-m", "countdown_kd", *sys.argv[1:])

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from countdown_kd.config import ROOT, register_resolvers


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="countdown-kd",
        description=__doc__,
        epilog="KEY=VALUE: what launch.py is given too, such as tracking.uri=… or hydra/launcher=slurm",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    status = commands.add_parser("status", help="the cells of a sweep: state, step, loss, s/it, log")
    status.add_argument("sweep", nargs="?", help="the beginning of a sweep's run id (default: the newest)")
    status.add_argument("--follow", action="store_true", help="until every cell has ended")
    comparison = commands.add_parser("compare", help="what differs between runs, or between printed configs")
    comparison.add_argument(
        "sides", nargs="+", metavar="RUN", help="run id, run name, sweep id, or a file with configs"
    )
    comparison.add_argument("--all", action="store_true", help="folders, names and addresses too")
    twins = commands.add_parser("parity", help="the same batch through two configs, and what differs")
    twins.add_argument(
        "sides", nargs=2, metavar="CONFIG", help="run id, run name, YAML file, or overrides in quotes ('' for none)"
    )
    doctor = commands.add_parser("doctor", help="is everything there that a sweep needs, here and in a job?")
    for command in (status, doctor):
        command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", default=[])
    given = parser.parse_args(arguments)

    register_resolvers()
    if given.command == "status":
        from countdown_kd.launching.status import status as show_status
        from countdown_kd.tracking import open_store

        if given.sweep and "=" in given.sweep:
            given.overrides, given.sweep = [given.sweep, *given.overrides], None
        client, experiment_id = open_store(composed(given.overrides).tracking)
        return show_status(client, experiment_id, given.sweep, given.follow)

    if given.command == "compare":
        gc.disable()  # of this command's time, looking for garbage would take a fifth
        from countdown_kd.compare import compare
        from countdown_kd.tracking import open_store

        # A run's name may have a "=" too.
        overrides = [side for side in given.sides if side.startswith(("tracking.", "tracking="))]
        store = cache(lambda: open_store(composed(overrides).tracking))
        code = compare(store, [side for side in given.sides if side not in overrides], given.all)
        gc.freeze()  # Python looks once more when it ends, but not at what is frozen
        return code

    if given.command == "parity":
        from countdown_kd.parity_report import parity

        return parity(given.sides, composed)

    from countdown_kd.doctor import examine

    return examine(composed(given.overrides))


def composed(overrides: list[str]) -> DictConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", overrides, return_hydra_config=True)


def run() -> None:
    """The command ``countdown-kd``, and ``python -m countdown_kd``."""
    from countdown_kd.tracking import StoreError

    try:
        sys.exit(main(sys.argv[1:]))
    except StoreError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    run()
