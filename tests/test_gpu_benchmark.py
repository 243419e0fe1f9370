"""benchmarks/gpu.py, which is run seldom and has to work then: all of it that runs without a GPU."""

import json
import os
import subprocess
import sys
import time

import psutil
import pytest

from countdown_kd.config import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu  # noqa: E402

COMMAND = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--dry", "--out"]


def figures(values: dict[str, list[float]], **head) -> dict:
    return {
        "card": "NVIDIA H200", "date": "2026-11-26", "commit": "abc", "versions": {}, "command": "", **head,
        "figures": {name: {"unit": "s", "values": each} for name, each in values.items()},
    }  # fmt: skip


def test_a_dry_run_gives_every_figure_that_needs_no_gpu(tmp_path):
    done = subprocess.run([*COMMAND, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    kept = json.loads((tmp_path / "figures.json").read_text())
    expected = ("Liger", "idle: not measured, there is no GPU")
    assert all(any(each in note for each in expected) for note in kept["notes"]), kept["notes"]
    expected = {
        "gen=hf, TRL: step", "gen=vllm, step=trl: step", "gen=vllm, fast: step", "gen=vllm, fast: generate",
        "gen=vllm, fast: sync", "gen=vllm, fast: floor of backward", "gen=vllm, 4 steps a rollout: step",
        "loss of the first step, step=trl", "loss of the first step, step=fast",
        "gradient norms of three steps differ by", "loss, 2 x 16 tokens, TRL", "loss, 2 x 16 tokens, chunked",
        "JSD, 2 x 16 tokens, ours", "gen=hf, bf16_pure, static cache: step", "recipe, gen=vllm: speed",
    }  # fmt: skip
    assert expected <= kept["figures"].keys()
    assert max(kept["figures"]["gradient norms of three steps differ by"]["values"]) < 0.02
    assert kept["card"].endswith(", dry") and kept["commit"] != "unknown" and "torch" in kept["versions"]


def begin(folder, *arguments: str) -> tuple[subprocess.Popen, psutil.Process]:
    """A run, and the process of it that measures."""
    command = subprocess.Popen([*COMMAND, str(folder), *arguments], stdout=subprocess.PIPE, text=True)
    while not (children := psutil.Process(command.pid).children()):
        time.sleep(0.05)
    return command, children[0]


def test_what_a_crash_or_the_clock_leaves_out_is_named(tmp_path):
    command, measuring = begin(tmp_path, "--seconds", "20")
    measuring.kill()
    out, _ = command.communicate(timeout=60)
    assert command.returncode == 0
    notes = json.loads((tmp_path / "figures.json").read_text())["notes"]
    assert notes[0] == "engine: its process ended with -9; what is not above was not measured"
    # A second process went on behind it, until the clock stopped that one too.
    done = {part for part, state in gpu.states(tmp_path) if state == "done"}
    assert done | {note.partition(":")[0] for note in notes} == set(gpu.SHARES), notes
    assert all("not measured" in note for note in notes)
    assert notes[-1] in out


def test_a_run_that_is_stopped_ends_what_it_started_and_tells_what_it_has(tmp_path):
    command, measuring = begin(tmp_path)
    command.terminate()
    out, _ = command.communicate(timeout=60)
    assert command.returncode == 130 and not measuring.is_running()
    assert "recipe: not measured, it was interrupted" in out and (tmp_path / "figures.json").exists()


def test_a_small_budget_takes_its_seconds_from_the_parts_behind_the_engine():
    for budget in (480, 300, 60):
        ends = gpu.ends(1000, budget)
        assert list(ends) == list(gpu.SHARES) and ends["idle"] == pytest.approx(1000 + budget)
        assert ends["engine"] - 1000 == min(gpu.ENGINE_S, 0.75 * budget)


def test_a_figure_has_moved_where_its_values_lie_apart_from_those_before():
    before = figures({"slower": [1.0, 1.2], "as before": [1.0, 1.2], "once": [1.0], "same": [1.0], "gone": [1.0]})
    before["figures"]["one slow step"] = {"unit": "s", "values": [1.0] * 11 + [2.0]}
    now = figures({"slower": [1.5, 1.3], "as before": [1.1, 1.4], "once": [9.0], "same": [1.01], "new": [1.0]})
    now["figures"]["one slow step"] = {"unit": "s", "values": [1.5] * 12}
    verdicts = {name: (ratio, verdict) for name, _, _, ratio, verdict in gpu.compare(now, before)}
    assert verdicts == {
        "slower, s": ("1.27", "moved"),
        "as before, s": ("1.14", ""),
        "once, s": ("9.00", "a tenth or more, once"),
        "same, s": ("1.01", "measured once"),
        "one slow step, s": ("1.50", "moved"),
    }


def test_the_last_figures_of_the_same_card_are_the_baseline(tmp_path, capsys):
    for number, (card, date) in enumerate([("A", "2026-01-01"), ("A", "2026-03-01"), ("B", "2026-05-01")]):
        (tmp_path / f"{number}.json").write_text(json.dumps(figures({}, card=card, date=date)))
    (tmp_path / "broken.json").write_text('{"card": "A"')
    assert gpu.last_baseline("A", tmp_path)["date"] == "2026-03-01"
    assert gpu.last_baseline("C", tmp_path) is None
    assert "broken.json holds no figures" in capsys.readouterr().err


@pytest.mark.parametrize("file", sorted(gpu.BASELINES.glob("*.json")), ids=lambda file: file.name)
def test_a_kept_baseline_says_what_it_is_of(file):
    kept = json.loads(file.read_text())
    assert kept["card"] != "CPU"
    assert all(kept[key] for key in ("date", "commit", "command", "versions", "figures"))


def test_figures_of_a_run_that_was_cut_off_are_read(tmp_path):
    lines = [{"head": figures({})}, {"figure": "step", "unit": "s", "values": [2.0]}, {"note": "loss: not measured"}]
    (tmp_path / gpu.FIGURES).write_text("\n".join(map(json.dumps, lines)) + '\n{"figure": "half')
    environment = os.environ | {"COLUMNS": "80"}
    done = subprocess.run(
        [*COMMAND[:2], "--read", str(tmp_path)], capture_output=True, text=True, env=environment, timeout=60
    )
    assert "1 figures" in done.stdout and "loss: not measured" in done.stdout
    assert json.loads((tmp_path / gpu.KEPT).read_text())["figures"]["step"]["values"] == [2.0]


def test_a_folder_without_figures_is_refused_and_left_as_it_is(tmp_path):
    (tmp_path / gpu.KEPT).write_text("{}")
    done = subprocess.run([*COMMAND[:2], "--read", str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "has no figures.jsonl" in done.stderr
    assert (tmp_path / gpu.KEPT).read_text() == "{}"
