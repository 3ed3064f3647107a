"""From the tokens of a microbatch to what the model is given."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.config import DataConfig


@dataclass(frozen=True)
class ModelInputs:
    """One microbatch; ``(batch, seq)`` where nothing else is said.

    Attributes:
        tokens: ids of the tokens that are read.
        targets: ids of the tokens to predict.
        loss_weights: 1 where the prediction counts and 0 where not, float.
        samples: number of each sample in the run, ``(batch,)``.
        positions: position of each token, if not 0, 1, ...
        documents: number of the document that each token belongs to, if attention must not cross.
    """

    tokens: Tensor
    targets: Tensor
    loss_weights: Tensor
    samples: Tensor
    positions: Tensor | None = None
    documents: Tensor | None = None


def build_inputs(
    tokens: Tensor, samples: Tensor, config: DataConfig, eod_id: int | None, dtype: torch.dtype
) -> ModelInputs:
    """Cut samples into inputs and targets.

    Args:
        tokens: ``(batch, seq + 1)``: each token predicts the next.
        samples: number of each sample in the run, ``(batch,)``.
        config: what happens at the end of a document.
        eod_id: the end-of-document token, which belongs to the document that it ends.
        dtype: of the loss weights.
    """
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    loss_weights = torch.ones_like(inputs, dtype=dtype)
    if eod_id is None:
        return ModelInputs(inputs, targets, loss_weights, samples)
    if config.eod_mask_loss:
        loss_weights = (inputs != eod_id).to(dtype)
    return ModelInputs(
        tokens=inputs,
        targets=targets,
        loss_weights=loss_weights,
        samples=samples,
        positions=document_positions(inputs, eod_id) if config.reset_position_ids else None,
        documents=document_numbers(inputs, eod_id) if config.reset_attention_mask else None,
    )


def document_numbers(tokens: Tensor, eod_id: int) -> Tensor:
    """Number of each token's document in its sample, from 0: ``(batch, seq)`` -> the same."""
    ends = tokens == eod_id
    return ends.cumsum(dim=-1) - ends.long()


def document_positions(tokens: Tensor, eod_id: int) -> Tensor:
    """Position of each token in its document: ``(batch, seq)`` -> the same."""
    indices = torch.arange(tokens.size(-1), device=tokens.device).expand_as(tokens)
    starts = torch.zeros_like(indices)
    starts[:, 1:] = (indices[:, :-1] + 1).masked_fill(tokens[:, :-1] != eod_id, 0)
    return indices - starts.cummax(dim=-1).values
