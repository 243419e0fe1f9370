"""Our losses against TRL's own, in value and in gradient."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trl.experimental.gold import GOLDConfig, GOLDTrainer
from trl.experimental.gold.gold_trainer import ULDLoss as TRLsULDLoss

from countdown_kd import losses
from countdown_kd.losses import Hidden, ULDLoss, generalized_jsd_loss

TOLERANCE = 2e-5  # of the loss, and of the largest gradient
BF16 = 2**-8  # the gradient's own rounding where logits are bf16


def tokenizer(vocabulary: dict[str, int]) -> SimpleNamespace:
    return SimpleNamespace(get_vocab=lambda: vocabulary)


@st.composite
def vocabularies(draw):
    """Two vocabularies and the sizes of two output layers, which may be larger: some tokens in both, at other ids."""
    words = [f"w{i}" for i in range(draw(st.integers(2, 40)))]
    both = draw(st.integers(1, len(words)))
    sides = []
    for k in range(2):
        own = words[:both] + [f"{k}-{word}" for word in words[both : draw(st.integers(both, len(words)))]]
        order = draw(st.permutations(own)) if draw(st.booleans()) else own
        sides.append(({word: i for i, word in enumerate(order)}, len(order) + draw(st.sampled_from([0, 0, 5]))))
    return sides


@st.composite
def completions(draw):
    """Where two tokenizers cut the same text: prompt's tokens and ends of the completion's, a side."""
    length = draw(st.integers(0, 14))
    ends = []
    for _ in range(2):
        cuts = draw(st.sets(st.integers(1, max(1, length - 1)), max_size=length)) if length > 1 else set()
        side = sorted(cuts | {length}) if length else []
        side = side + [length] * draw(st.integers(0, 1))  # an end-of-sequence token covers no text
        if draw(st.integers(0, 9)) == 0:
            side = side[: draw(st.integers(0, len(side)))]  # cut off
        ends.append((draw(st.integers(0, 3)), side))
    return ends


@st.composite
def settings_of_gold(draw):
    weights = draw(st.sampled_from([(None, None), (0.7, 0.3), (1.0, 0.0), (0.0, 1.0)]))
    return GOLDConfig(
        output_dir="unused", report_to="none", use_cpu=True, bf16=False, use_uld_loss=True,
        teacher_tokenizer_name_or_path="unused",
        beta=draw(st.sampled_from([0.0, 0.3, 0.5, 1.0])),
        uld_use_hybrid_loss=draw(st.booleans()),
        uld_hybrid_matched_weight=weights[0], uld_hybrid_unmatched_weight=weights[1],
        uld_token_merge_strategy=draw(st.sampled_from(["bayesian", "observed"])),
        use_extended_uld=draw(st.integers(0, 4)) > 0,
        uld_student_temperature=draw(st.sampled_from([1.0, 0.7, 2.0])),
        uld_teacher_temperature=draw(st.sampled_from([1.0, 1.5])),
        uld_skip_student_eos=draw(st.booleans()), uld_skip_teacher_eos=draw(st.booleans()),
        uld_crossentropy_weight=draw(st.sampled_from([0.0, 0.5])),
        uld_distillation_weight=draw(st.sampled_from([1.0, 2.0])),
    )  # fmt: skip


def batch(texts, sizes, seed: int, dtype: torch.dtype, sharp: float) -> list:
    """Logits, labels, ids and byte offsets of both sides, padded to the longest."""
    generator = torch.Generator().manual_seed(seed)
    sides = []
    for k, size in enumerate(sizes):
        width = max(1, *(text[k][0] + len(text[k][1]) for text in texts))
        labels = torch.full((len(texts), width), -100)
        ids = torch.randint(0, size, labels.shape, generator=generator)
        offsets = torch.zeros(*labels.shape, 2, dtype=torch.long)
        for i, text in enumerate(texts):
            prompt, ends = text[k]
            part = slice(prompt, prompt + len(ends))
            labels[i, part] = ids[i, part]
            offsets[i, part] = torch.tensor([[a, b] for a, b in zip([0, *ends], ends, strict=False)]).reshape(-1, 2)
        logits = sharp * torch.randn(*labels.shape, size, generator=generator)
        sides.append((logits.to(dtype), labels, ids, offsets))
    return [each for pair in zip(*sides, strict=True) for each in pair]


def both(loss, logits, *arguments, **keywords):
    """The loss, and the gradient of the logits."""
    logits = logits.detach().clone().requires_grad_()
    value = loss(logits, *arguments, **keywords)
    value.sum().backward()  # TRL's is (1,) where there is nothing to compare
    return value.detach().double().sum(), logits.grad.double()


def assert_close(ours, trls, rounding: float = 0.0) -> None:
    (value, gradient), (expected, expected_gradient) = ours, trls
    assert abs(value - expected) <= TOLERANCE * max(1.0, abs(expected))
    scale = max(0.1, expected_gradient.abs().max())  # where a probability is nearly 1, the gradient is a difference
    assert ((gradient - expected_gradient).abs() <= TOLERANCE * scale + rounding * expected_gradient.abs()).all()


def made(config, sides, *arguments):
    """TRL's loss and ours, for these tokenizers."""
    if arguments[2][:, 1:].eq(-100).all():
        config.uld_crossentropy_weight = 0.0  # the mean of nothing, which is NaN in both
    tokenizers = [tokenizer(vocabulary) for vocabulary, _ in sides]
    return TRLsULDLoss(config, *tokenizers), ULDLoss(config, *tokenizers)


@settings(deadline=None, max_examples=250)
@given(
    config=settings_of_gold(), sides=vocabularies(), texts=st.lists(completions(), min_size=1, max_size=3),
    seed=st.integers(0, 2**31), sharp=st.sampled_from([0.5, 3.0, 12.0]), chunk=st.sampled_from([1, 100, 10**6]),
)  # fmt: skip
def test_uld_is_trls(config, sides, texts, seed, sharp, chunk):
    arguments = batch(texts, [size for _, size in sides], seed, torch.float32, sharp)
    trls, ours = made(config, sides, *arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(losses.CHUNK, "cpu", chunk)
        patch.setitem(losses.CHUNK_OF_HIDDEN, "cpu", chunk)
        assert_close(both(ours, *arguments), both(trls, *arguments))
    for name in ("last_matched_loss", "last_unmatched_loss"):
        assert hasattr(ours, name) == hasattr(trls, name)
        if hasattr(trls, name):
            assert getattr(ours, name).item() == pytest.approx(getattr(trls, name).item(), rel=1e-4, abs=1e-5)


@settings(deadline=None, max_examples=100)
@given(
    config=settings_of_gold(), sides=vocabularies(), texts=st.lists(completions(), min_size=1, max_size=3),
    seed=st.integers(0, 2**31), sharp=st.sampled_from([0.5, 3.0]),
)  # fmt: skip
def test_uld_of_bf16_logits_is_trls_in_fp32_and_trls_in_bf16_is_further_off(config, sides, texts, seed, sharp):
    arguments = batch(texts, [size for _, size in sides], seed, torch.bfloat16, sharp)
    trls, ours = made(config, sides, *arguments)
    value, gradient = both(ours, *arguments)
    assert gradient.dtype == torch.float64 and arguments[0].dtype == torch.bfloat16
    exact = both(trls, *(each.float() for each in arguments[:2]), *arguments[2:])
    if not config.uld_crossentropy_weight:  # which is TRL's
        assert_close((value, gradient), exact, BF16)
    rounded_value, rounded = both(trls, *arguments)
    assert abs(rounded_value - value) <= 0.1 * max(1.0, abs(value))
    assert (gradient - exact[1]).norm() <= 1.05 * (rounded - exact[1]).norm() + BF16 * exact[1].norm()


@settings(deadline=None, max_examples=60)
@given(
    config=settings_of_gold(), sides=vocabularies(), texts=st.lists(completions(), min_size=1, max_size=3),
    seed=st.integers(0, 2**31), chunk=st.sampled_from([1, 100, 10**6]),
)  # fmt: skip
def test_uld_without_whole_logits_has_the_same_gradients(config, sides, texts, seed, chunk):
    """Hidden states and output layers in place of logits: the loss, and the gradients of the student's two."""
    _, _, *rest = batch(texts, [size for _, size in sides], seed, torch.float32, 1.0)
    generator = torch.Generator().manual_seed(seed)
    heads = []
    for labels, (_, size) in zip(rest[:2], sides, strict=True):
        states = torch.randn(*labels.shape, 6, generator=generator, requires_grad=True)
        heads.append(Hidden(states, torch.randn(size, 6, generator=generator, requires_grad=True)))
    _, ours = made(config, sides, *(head.states for head in heads), *rest)
    whole = ours(*(head.states @ head.weight.T for head in heads), *rest)
    expected = torch.autograd.grad(whole, heads[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(losses.CHUNK, "cpu", chunk)
        patch.setitem(losses.CHUNK_OF_HIDDEN, "cpu", chunk)
        loss = ours(*heads, *rest)
        gradients = torch.autograd.grad(loss, heads[0], allow_unused=True)
    assert loss.item() == pytest.approx(whole.item(), rel=1e-5, abs=1e-6)
    for gradient, other in zip(gradients, expected, strict=True):
        if gradient is None:  # there was nothing to compare
            assert not other.any()
        else:
            assert (gradient - other).abs().max() <= TOLERANCE * max(1e-2, other.abs().max())


@settings(deadline=None, max_examples=150)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 30)), seed=st.integers(0, 2**31),
    beta=st.sampled_from([0.0, 0.1, 0.5, 1.0]), temperature=st.sampled_from([1.0, 0.7, 2.0]),
    reduction=st.sampled_from(["batchmean", "sum", "mean"]), items=st.sampled_from([None, 7]),
    masked=st.sampled_from([None, 0.0, 0.4, 1.0]), chunk=st.sampled_from([1, 10**6]),
)  # fmt: skip
def test_jsd_is_trls(shape, seed, beta, temperature, reduction, items, masked, chunk):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(shape, generator=generator) for _ in range(2))
    labels = None
    if masked is not None:
        labels = torch.zeros(shape[:2], dtype=torch.long)
        labels[torch.rand(shape[:2], generator=generator) < masked] = -100
        if reduction == "mean" and labels.eq(-100).all():
            reduction = "sum"  # TRL's mean of nothing is NaN
    arguments = (teacher, labels, beta, temperature, reduction, False, items)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(losses.CHUNK, "cpu", chunk)
        patch.setitem(losses.CHUNK_OF_HIDDEN, "cpu", chunk)
        ours = both(generalized_jsd_loss, student, *arguments)
    assert_close(ours, both(GOLDTrainer.generalized_jsd_loss, student, *arguments))


def test_jsd_leaves_what_is_no_loss_over_logits_to_trl():
    student, teacher = torch.rand(2, 3, 5), torch.rand(2, 3, 5)
    for keywords in ({"reduction": "none"}, {"logits_are_probs": True}):
        expected = GOLDTrainer.generalized_jsd_loss(student, teacher, **keywords)
        assert torch.equal(generalized_jsd_loss(student, teacher, **keywords), expected)


def test_logits_may_be_a_part_of_larger_ones():
    """As the trainer gives them: all positions but the last, which predicts nothing."""
    student, teacher = torch.rand(2, 4, 5), torch.rand(2, 4, 5)
    arguments = teacher[:, :-1], torch.zeros(2, 3, dtype=torch.long)
    cut = both(lambda logits, *rest: generalized_jsd_loss(logits[:, :-1], *rest), student, *arguments)
    assert_close(
        cut, both(lambda logits, *rest: GOLDTrainer.generalized_jsd_loss(logits[:, :-1], *rest), student, *arguments)
    )


def test_the_teacher_gets_no_gradient_and_the_loss_is_scaled_like_any_other():
    student, teacher = (torch.rand(1, 3, 5, requires_grad=True) for _ in range(2))
    (once,) = torch.autograd.grad(generalized_jsd_loss(student, teacher), student)
    loss = 3 * generalized_jsd_loss(student, teacher) + student.sum()
    loss.backward()
    assert torch.allclose(student.grad, 3 * once + 1) and teacher.grad is None


def test_missing_byte_offsets_are_told():
    config = GOLDConfig(output_dir="unused", use_cpu=True, bf16=False, teacher_tokenizer_name_or_path="x")
    sides = [({"a": 0, "b": 1}, 2)] * 2
    student, teacher, *rest = batch([[(1, [1, 2]), (1, [1, 2])]], (2, 2), 0, torch.float32, 1.0)
    with pytest.raises(ValueError, match="Byte offsets are required"):
        ULDLoss(config, *(tokenizer(vocabulary) for vocabulary, _ in sides))(student, teacher, *rest[:4])


def test_a_second_backward_pass_is_refused():
    """Its gradient is scaled in place: a second one would be scaled twice."""
    student = torch.rand(1, 3, 5, requires_grad=True)
    loss = generalized_jsd_loss(student, torch.rand(1, 3, 5))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        loss.backward()
