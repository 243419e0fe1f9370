"""Makes what a cell makes of its trainer's settings, with the tiny pair and one conversation, and says what objects.

    python -m countdown_kd.rehearsal < settings

A line in is a JSON object with a cell's ``trainer`` and ``gen``; a line out is the list of its problems. The rules are
the libraries' own: nothing here knows a range or a name that they check. libraries.py starts this.

Not covered: what only the cell's own models and data can show, what a GPU or a vLLM engine refuses, and settings that
nothing checks (a negative weight decay).
"""

from __future__ import annotations

import copy
import json
import logging
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import fields
from functools import cache
from typing import Any, get_args

import datasets
import torch
from omegaconf import OmegaConf
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils.logging import disable_progress_bar
from trl.experimental.gold import GOLDConfig
from vllm import SamplingParams
from vllm.config import CacheConfig
from vllm.config.model import ModelDType

from countdown_kd.config import ROOT
from countdown_kd.declared import shown
from countdown_kd.gold import CountdownTrainer

# They only have a meaning with the cell's own models, and are left out here.
OF_THE_MODELS = {"eos_token", "pad_token", "chat_template_path", "assistant_only_loss", "router_aux_loss_coef"}
CONVERSATION = {
    "prompt": [{"role": "user", "content": "1 2 3 -> 6"}],
    "completion": [{"role": "assistant", "content": "<answer>1 + 2 + 3 = 6</answer>"}],
}
CHOSEN = {"trainer.use_vllm", "gen.steps_per_rollout", "gen.max_num_seqs"}  # by gen=, not to blame
NOTHING = object()
STEP = OmegaConf.load(ROOT / "conf/step/trl.yaml")


def problems(settings: dict[str, dict[str, Any]], usual: dict[str, Any]) -> Iterator[str]:
    """Everything that objects to the settings, with the keys to blame: those with whose usual values it would not."""
    settings = {f"{group}.{key}": value for group, values in settings.items() for key, value in values.items()}
    while problem := objection(settings):
        blamed = {
            key: value
            for key, value in settings.items()
            if key not in CHOSEN and value != usual.get(key, NOTHING)
            if form(objection(usually(settings, [key], usual))) != form(problem)
        }
        yield f"{', '.join(f'{key}={shown(value)}' for key, value in blamed.items()) or 'trainer'}: {problem}"
        if not blamed:
            return
        settings = usually(settings, blamed, usual)


def usually(settings: dict[str, Any], keys: Iterable[str], usual: dict[str, Any]) -> dict[str, Any]:
    """Settings with the usual values of some keys, or without those that are not usually given."""
    return {key: value for key, value in settings.items() if key not in keys} | {
        key: usual[key] for key in keys if key in usual
    }


def form(problem: str) -> str:
    """A problem without its numbers: the same one has others where other keys have other values."""
    return re.sub(r"[\d.]+", "", problem)


def objection(settings: dict[str, Any]) -> str:
    """The first thing that objects; empty where nothing does."""
    groups: dict[str, dict[str, Any]] = {"trainer": {}, "gen": {}}
    for key, value in settings.items():
        group, _, name = key.partition(".")
        groups[group][name] = value
    try:
        rehearse(**groups)
    except ValidationError as error:  # pydantic's text has a line for each, an address, and the input
        return "; ".join(each["msg"] for each in error.errors())
    except Exception as error:
        return " ".join(str(error).split()) or type(error).__name__
    return ""


def rehearse(trainer: dict[str, Any], gen: dict[str, Any]) -> None:
    """Make a cell's arguments, samplers, trainer and optimizer, and sample a token. Raises what they raise."""
    for each in fields(GOLDConfig):
        choices = each.metadata.get("choices")
        if choices and trainer.get(each.name, each.default) not in (*choices, each.default):
            raise ValueError(f"it must be one of {', '.join(choices)}")
    with tempfile.TemporaryDirectory() as folder:
        use_cpu = trainer.get("use_cpu", False) or not torch.cuda.is_available()
        args = GOLDConfig(**trainer | {"output_dir": folder, "use_cpu": use_cpu})
        if args.fp16 and use_cpu:
            raise ValueError("fp16 needs a GPU; on a CPU it does nothing. Use precision=bf16 or precision=fp32")
        SamplingParams(
            temperature=args.temperature, top_p=args.top_p, top_k=args.top_k, max_tokens=args.max_completion_length
        )
        if args.use_vllm:
            if gen["dtype"] not in get_args(ModelDType):
                raise ValueError(f"vLLM samples in {', '.join(get_args(ModelDType))}")
            CacheConfig(gpu_memory_utilization=args.vllm_gpu_memory_utilization)

        # Nothing that is started, sent or taken from a GPU.
        given = {key: value for key, value in trainer.items() if key not in OF_THE_MODELS}
        here = {"output_dir": folder, "use_cpu": True, "use_vllm": False, "push_to_hub": False, "disable_tqdm": True}
        if given.get("optim_target_modules"):
            here["optim_target_modules"] = "all-linear"  # the cell's models have others
        (student, tokenizer), (teacher, _) = (tiny(side) for side in ("student", "teacher"))
        args = GOLDConfig(**given | here)
        args.teacher_tokenizer_name_or_path = teacher.name_or_path
        rehearsed = CountdownTrainer(
            model=copy.deepcopy(student), teacher_model=copy.deepcopy(teacher), args=args, step=STEP,
            gen=OmegaConf.create(gen), train_dataset=datasets.Dataset.from_list([CONVERSATION]),
            processing_class=tokenizer,
        )  # fmt: skip
        rehearsed.get_train_dataloader()
        rehearsed.create_optimizer_and_scheduler(max(args.max_steps, 1))
        if not trainer.get("use_vllm"):
            sampling: GenerationConfig = copy.deepcopy(rehearsed.generation_config)
            sampling.max_new_tokens = 1
            ids = torch.tensor([tokenizer("1").input_ids])
            student.generate(ids, attention_mask=torch.ones_like(ids), generation_config=sampling)


@cache
def tiny(side: str) -> tuple:
    """A model of the tiny pair with one layer, of which copies are made, and its tokenizer."""
    folder = ROOT / "countdown_kd/tiny" / side
    model = AutoModelForCausalLM.from_pretrained(folder, num_hidden_layers=1, layer_types=["full_attention"])
    return model, AutoTokenizer.from_pretrained(folder)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    logging.disable()
    warnings.filterwarnings("ignore")
    disable_progress_bar()
    datasets.disable_progress_bars()
    defaults = OmegaConf.create({"seed": 42, "trainer": OmegaConf.load(ROOT / "conf/trainer/gold.yaml")})
    usual = {f"trainer.{key}": value for key, value in OmegaConf.to_container(defaults.trainer, resolve=True).items()}
    usual |= {"gen.dtype": "float32", "gen.cache_implementation": None}
    for line in sys.stdin:
        print(json.dumps(list(problems(json.loads(line), usual))), file=answers, flush=True)


if __name__ == "__main__":
    main()
