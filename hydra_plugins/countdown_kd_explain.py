"""Hydra takes sweepers from below hydra_plugins only; the work is in countdown_kd/explain.py."""

from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class ExplainSweeper(Sweeper):
    """Searches for the keys that carry the difference of two configs; conf/hydra/sweeper/explain.yaml has the keys."""

    def __init__(self, metric: str, seeds: int, tolerance: float | None, share: float):
        self.metric, self.seeds, self.tolerance, self.share = metric, seeds, tolerance, share

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config, self.hydra_context = config, hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        from countdown_kd.explain import explain

        explain(self)
