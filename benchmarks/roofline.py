"""What a step's phases would take if nothing but the hardware held them up.

A phase cannot be faster than its arithmetic at the rate of a large matrix product, nor than its memory traffic at the
rate of a large copy; both rates are measured where it runs. Counted are the weights, the logits and the optimizer's
state; attention's own products, activations and the cache of keys are not, so the floors are a little low.
"""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import torch


class Ceilings(NamedTuple):
    flops: float  # a second
    bytes: float  # a second, read and written


class Work(NamedTuple):
    """What one optimizer step has to do; weights and tokens are numbers of, not bytes."""

    student_body: int  # weights outside the output layer
    student_head: int  # weights of the output layer
    teacher_body: int
    teacher_head: int
    vocabulary: int
    micro_batches: int
    teacher_batches: int
    tokens: int  # of all sequences, prompts included
    completion_tokens: int
    longest_completion: int
    compute_bytes: int  # of a number in forward and backward pass
    rollout_bytes: int
    teacher_bytes: int
    weight_bytes: int  # of a number that the optimizer keeps
    backward_forwards: int  # what a backward pass computes, in forward passes


def measured_ceilings(device: str, dtype: torch.dtype) -> Ceilings:
    """The best of several runs of a matrix product and of a copy."""

    def fastest(function) -> float:
        seconds = []
        for _ in range(8):
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            function()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    n = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    source = torch.ones((2**30 if device == "cuda" else 2**27), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Ceilings(
        flops=2 * n**3 / fastest(lambda: a @ b),
        bytes=2 * source.numel() / fastest(lambda: target.copy_(source)),
    )


def work_of(trainer, rollout_dtype: str) -> Work:
    """Read off a trainer after its last step."""
    student, teacher = trainer.accelerator.unwrap_model(trainer.model), trainer.teacher_model
    heads = [model.get_output_embeddings().weight for model in (student, teacher)]
    last = trainer._buffered_inputs
    completions = [(inputs["labels"] != -100).sum(1) for inputs in last]
    sequences = sum(map(len, completions))
    weights = next(student.parameters())
    return Work(
        student_body=student.num_parameters() - heads[0].numel(),
        student_head=heads[0].numel(),
        teacher_body=teacher.num_parameters() - heads[1].numel(),
        teacher_head=heads[1].numel(),
        vocabulary=heads[0].shape[0],
        micro_batches=len(last),
        teacher_batches=math.ceil(sequences / (trainer.step.teacher_batch_size or sequences / len(last))),
        tokens=sum(int(inputs["attention_mask"].sum()) for inputs in last),
        completion_tokens=sum(int(each.sum()) for each in completions),
        longest_completion=max(int(each.max()) for each in completions),
        compute_bytes=2 if trainer.args.bf16 else weights.element_size(),
        rollout_bytes=getattr(torch, rollout_dtype).itemsize,
        teacher_bytes=heads[1].element_size(),
        weight_bytes=weights.element_size(),
        backward_forwards=3 if trainer.args.gradient_checkpointing else 2,
    )


def floors(work: Work, ceilings: Ceilings) -> dict[str, float]:
    """Seconds of each phase, as step=fast divides the work between them."""
    w = work
    weights = w.student_body + w.student_head
    forward = 2 * w.student_body * w.tokens + 2 * w.student_head * w.completion_tokens
    logits = w.completion_tokens * w.vocabulary * w.compute_bytes
    demands = {  # arithmetic, memory traffic
        "generate": (forward, w.longest_completion * weights * w.rollout_bytes),
        "sync": (0, weights * (w.weight_bytes + w.rollout_bytes)),
        "student": (forward, w.micro_batches * weights * w.compute_bytes + logits),
        "teacher": (2 * w.teacher_body * w.tokens, w.teacher_batches * w.teacher_body * w.teacher_bytes),
        # The teacher's output layer, the student's logits read, their gradient written.
        "loss": (
            2 * w.teacher_head * w.completion_tokens,
            w.micro_batches * w.teacher_head * w.teacher_bytes + 2 * logits,
        ),
        "backward": (w.backward_forwards * forward, 2 * w.micro_batches * weights * w.compute_bytes + logits),
        # Clipping reads and writes the gradient; AdamW reads weight, gradient and both moments, and writes all but one.
        "optimizer": (0, 9 * weights * w.weight_bytes),
    }
    return {phase: max(flops / ceilings.flops, size / ceilings.bytes) for phase, (flops, size) in demands.items()}
