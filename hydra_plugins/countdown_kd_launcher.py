"""Hydra takes launchers from below hydra_plugins only; the work is in countdown_kd/launching/slurm/."""

from collections.abc import Sequence

from hydra.core.utils import JobReturn
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher as StockLauncher


class SlurmLauncher(StockLauncher):
    """Sends cells to Slurm with hydra-submitit-launcher's parameters; submission and supervision are ours."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from countdown_kd.launching.slurm.submit import launch

        return launch(self.hydra_context.config_loader, self.config, self.params, job_overrides, initial_job_idx)
