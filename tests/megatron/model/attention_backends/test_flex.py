"""What FlexAttention is given, run without being compiled, which a CPU can do forward only."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from megatron.config import AlibiPrecision
from megatron.model.alibi import alibi_slopes
from megatron.model.attention import AttentionBias, attention
from megatron.model.attention_backends import flex
from tests.megatron.model.attending import document_numbers, inputs, plain_attention

PRECISIONS: list[AlibiPrecision] = ["exact", "bloom_bf16"]
# The bias of an exact distance is computed in float32, for distances of up to 263.
ROUNDING = 263 * 2**-24


def arguments(bias: AttentionBias, seq: int) -> tuple[object, ...]:
    """What ``flex.attend`` gets besides queries, keys and values."""
    blocks = bias.visible_blocks or flex.causal_blocks(seq, torch.device("cpu"))
    return bias.exact_slopes, bias.rounded(seq), blocks


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("documents", [None, document_numbers([1, 70, 2, 60, 130])])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("size", [64, 80, 96, 128])
def test_flex_equals_the_definition(
    size: int, precision: AlibiPrecision, documents: Tensor | None
) -> None:
    query, key, value = (x.detach() for x in inputs(4, 263, 263, size)[:3])
    bias = AttentionBias(documents, alibi_slopes(12)[4:8], precision)
    got = flex.attend(query, key, value, *arguments(bias, 263))  # type: ignore[arg-type]
    want = plain_attention(query, key, value, bias)
    torch.testing.assert_close(got, want, rtol=0, atol=ROUNDING)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_equals_the_definition_without_alibi() -> None:
    query, key, value = (x.detach() for x in inputs(3, 131, 131, 5)[:3])
    bias = AttentionBias()
    got = flex.attend(query, key, value, *arguments(bias, 131))  # type: ignore[arg-type]
    torch.testing.assert_close(got, plain_attention(query, key, value, bias), rtol=0, atol=1e-12)


@pytest.mark.parametrize("with_documents", [False, True])
def test_passes_of_one_shape_are_compiled_once(
    with_documents: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(flex.attend, dynamic=False, backend=counter)
    monkeypatch.setattr(flex, "_compiled", lambda: compiled)
    for first in (10, 20, 30):
        documents = document_numbers([first, 140 - first]) if with_documents else None
        bias = AttentionBias(documents, alibi_slopes(2))
        query, key, value = (x.detach() for x in inputs(2, 140, 140, 8)[:3])
        got = attention(query, key, value, bias, backend="flex")
        want = plain_attention(query, key, value, bias)
        torch.testing.assert_close(got, want, rtol=0, atol=ROUNDING)
    assert counter.frame_count == 1


def test_blocks_that_no_query_sees_are_skipped() -> None:
    # 4 x 4 blocks of 128: the causal ones, of which one lies between documents of equal halves.
    assert flex.causal_blocks(512, torch.device("cpu")).sparsity() == pytest.approx(100 * 6 / 16)
    documents = flex.document_blocks(document_numbers([256, 256]))
    assert documents.sparsity() == pytest.approx(100 * 10 / 16)


@pytest.mark.parametrize("seq", [1, 5, 127, 128, 129, 300, 512, 1000])
@pytest.mark.parametrize("share", [0.0, 0.002, 0.02, 0.3, 1.0])
def test_blocks_of_documents_are_those_of_the_whole_mask(seq: int, share: float) -> None:
    generator = torch.Generator().manual_seed(seq)
    numbers = (torch.rand(3, seq, generator=generator) < share).long().cumsum(dim=1)
    got = flex.document_blocks(numbers)
    mask = flex.document_mask(numbers)
    want = flex.create_block_mask(mask, 3, None, seq, seq, device="cpu")
    assert (got.seq_lengths, got.BLOCK_SIZE) == (want.seq_lengths, want.BLOCK_SIZE)
    for order in ("kv", "q"):
        for part in ("", "full_"):
            for what in ("num_blocks", "indices"):
                name = f"{part}{order}_{what}"
                assert torch.equal(getattr(got, name), getattr(want, name)), name
                assert getattr(got, name).dtype == getattr(want, name).dtype
