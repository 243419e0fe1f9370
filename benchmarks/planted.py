"""Does explain find a cause that is known? Ten are planted, one at a time, among keys that change nothing.

    python benchmarks/planted.py            # about 70 short runs: forty minutes on two cores

A row a cause: the gap in train/loss (mean over the steps), whether it is above A's own spread over three seeds, what
explain names, and how many probes that took. The last row plants nothing. Exits with code 1 where explain names another
key than the planted one. Runs are cells in a store of their own in ./planted; the same command again goes on.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent

SHORT = (
    "trainer.max_steps=8",
    "trainer.per_device_train_batch_size=8",
    "trainer.save_strategy=no",
    "eval.num_puzzles=10",
)
INNOCENT = (
    "++trainer.data_seed=42,7",  # TRL shuffles by seed
    "++trainer.packing_strategy=bfd,wrapped",  # of sequences that are not packed
    "++trainer.do_predict=false,true",
    "++trainer.torch_empty_cache_steps=null,4",
    "++trainer.vllm_gpu_memory_utilization=0.3,0.5",
    "++trainer.ddp_timeout=1800,900",
    "++trainer.eval_steps=null,100",
    "++trainer.per_device_eval_batch_size=8,2",
    "++trainer.lr_scheduler_kwargs=null,{}",
    "++trainer.do_eval=false,true",
    "++trainer.num_completions_to_print=5,3",
    "eval.batch_size=64,32",
)
PLANTED = {
    "precision": "precision=fp32,bf16_pure",
    "learning rate": "trainer.learning_rate=1e-3,3e-4",
    "λ": "trainer.lmbda=0.5,1.0",
    "temperature": "trainer.temperature=1.0,0.7",
    "beta": "trainer.beta=0.0,1.0",
    "merge strategy": "trainer.uld_token_merge_strategy=bayesian,observed",
    "accumulation": "trainer.gradient_accumulation_steps=1,2",
    "completion length": "trainer.max_completion_length=48,16",
    "data order seed": "trainer.seed=42,7",
    "teacher's dtype": "teacher.dtype=float32,bfloat16",
    "nothing": None,
}


def explain(*overrides: str) -> tuple[str, int]:
    """What explain says, and how many probes it has run."""
    folder = Path("planted").absolute()
    folder.mkdir(exist_ok=True)
    environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db", "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, ROOT / "launch.py", "-m", "hydra/sweeper=explain", *SHORT, *INNOCENT, *overrides],
        cwd=folder, env=environment, text=True, capture_output=True,
    )  # fmt: skip
    if done.returncode:
        sys.exit(done.stdout[-2000:] + done.stderr[-4000:])
    sentence = re.search(r"^(A and B agree.*|`.*gap of.*)$", done.stdout, re.M)
    return sentence[1], len(re.findall(r"of the gap$", done.stdout, re.M))


def main() -> int:
    wrong = []
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    for header in ("planted", "gap", "above the\nseeds' spread", "explain says", "probes"):
        table.add_column(header, overflow="fold")
    spread = None
    for name, override in PLANTED.items():
        sentence, probes = explain("hydra.sweeper.tolerance=1e-6", *([override] if override else []))
        gap = float(re.search(r"gap of (\S+)", sentence)[1])
        if spread is None:  # A is the same for all
            spread = float(re.search(r"seeds:? \(?(\S+?)\)", explain(override)[0])[1])
        found = re.match(r"`(\S+)[^`]*` explains (\S+ %|\S+%)", sentence)
        told = f"{found[1]}, {found[2]}" if found else sentence.partition(":")[0]
        # Alone: of two keys the sentence says that they "together explain".
        named = found[1] if found else None
        if named != (override and override.partition("=")[0].lstrip("+")):
            wrong.append(name)
        table.add_row(name, f"{gap:.4f}", "yes" if gap > spread else "no", told, str(probes))
        print(f"{name}: {sentence}", flush=True)
    Console().print(f"\nA's own spread over three seeds: {spread:.4f}")
    Console().print(table)
    if wrong:
        print(f"Not named: {', '.join(wrong)}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
