"""TRL's vLLM engine with what TRL does not hand to it: the rollout dtype, and weights in one call, on the CPU too."""

from __future__ import annotations

from unittest import mock

import torch
import torch._dynamo
from accelerate import Accelerator
from omegaconf import DictConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.experimental.gold import GOLDConfig
from trl.generation import vllm_generation
from trl.generation.vllm_generation import VLLMGeneration
from vllm.model_executor.layers import utils as layer_utils


class VLLM(VLLMGeneration):
    """TRL's vLLM wrapper with the arguments of ``vllm.LLM`` that it does not pass on."""

    def __init__(self, *args, llm: dict, one_weight_push: bool, **kwargs):
        self.llm_arguments = llm
        self.one_weight_push = one_weight_push
        super().__init__(*args, **kwargs)

    def _init_vllm(self):
        if self.mode == "server":
            return super()._init_vllm()
        if self.accelerator.device.type == "cpu":
            # Compiling takes longer than it saves on small models, and a C++ compiler that may not be there; vLLM's
            # sampler is compiled whatever enforce_eager says.
            self.llm_arguments["enforce_eager"] = True
            torch._dynamo.config.disable = True
        engine, pack = vllm_generation.LLM, layer_utils.dispatch_cpu_unquantized_gemm
        # On the CPU vLLM packs the weights of linear layers and lets go of them: there would be nothing to load into.
        kept = mock.patch.object(
            layer_utils, "dispatch_cpu_unquantized_gemm", lambda layer, remove_weight: pack(layer, remove_weight=False)
        )
        ours = mock.patch.object(vllm_generation, "LLM", lambda **theirs: engine(**(theirs | self.llm_arguments)))
        with kept, ours:
            super()._init_vllm()

    def sync_weights(self):
        if self.mode == "server" or self.enable_sleep_mode:
            return super().sync_weights()
        model = self.llm.llm_engine.model_executor.driver_worker.model_runner.get_model()
        if self.one_weight_push:
            model.load_weights(self._iter_named_params())
            self.llm.reset_prefix_cache()
        else:
            super().sync_weights()
        for layer in model.modules():
            if hasattr(layer, "cpu_linear"):  # a packed one, which computes with the weights of before
                layer_utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=False)


def make_vllm(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    accelerator: Accelerator,
    args: GOLDConfig,
    gen: DictConfig,
    one_weight_push: bool = False,
) -> VLLM:
    """A vLLM engine for ``model`` (or the client of a server), with GOLD's sampling settings."""
    return VLLM(
        model=model,
        accelerator=accelerator,
        processing_class=tokenizer,
        mode=args.vllm_mode,
        structured_outputs_regex=args.vllm_structured_outputs_regex,
        server_base_url=args.vllm_server_base_url,
        server_host=args.vllm_server_host,
        server_port=args.vllm_server_port,
        group_port=args.vllm_group_port,
        server_timeout=args.vllm_server_timeout,
        tensor_parallel_size=args.vllm_tensor_parallel_size,
        gpu_memory_utilization=args.vllm_gpu_memory_utilization,
        max_model_length=args.vllm_max_model_length or args.max_length,
        enable_sleep_mode=args.vllm_enable_sleep_mode,
        model_impl=args.vllm_model_impl,
        trust_remote_code=args.trust_remote_code,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        max_completion_length=args.max_completion_length,
        logprobs=None,
        llm={"dtype": gen.dtype, "max_num_seqs": gen.max_num_seqs},
        one_weight_push=one_weight_push,
    )
