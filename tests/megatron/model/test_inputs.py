"""Inputs of the model against plain loops over tokens."""

import torch
from torch import Tensor

from megatron.config import DataConfig
from megatron.model.inputs import build_inputs, document_numbers, document_positions

EOD = 0
SAMPLES = torch.tensor([5, 9, 11])
# A document that ends first, last, twice in a row, and a sample of one document.
TOKENS = torch.tensor(
    [
        [0, 3, 4, 0, 0, 7, 8, 9, 0],
        [1, 2, 3, 4, 5, 6, 7, 0, 9],
        [1, 2, 3, 4, 5, 6, 7, 8, 9],
    ]
)


def config(**options: bool) -> DataConfig:
    return DataConfig(tokenizer="tokenizer.json", **options)  # type: ignore[arg-type]


def numbers_and_positions(tokens: Tensor) -> tuple[list[list[int]], list[list[int]]]:
    numbers: list[list[int]] = []
    positions: list[list[int]] = []
    for row in tokens.tolist():
        number = position = 0
        numbers.append([])
        positions.append([])
        for token in row:
            numbers[-1].append(number)
            positions[-1].append(position)
            position += 1
            if token == EOD:
                number, position = number + 1, 0
    return numbers, positions


def test_documents_are_counted_as_a_loop_counts_them() -> None:
    numbers, positions = numbers_and_positions(TOKENS)
    assert document_numbers(TOKENS, EOD).tolist() == numbers
    assert document_positions(TOKENS, EOD).tolist() == positions


def test_random_documents_are_counted_as_a_loop_counts_them() -> None:
    tokens = torch.randint(0, 4, (50, 33))
    numbers, positions = numbers_and_positions(tokens)
    assert document_numbers(tokens, EOD).tolist() == numbers
    assert document_positions(tokens, EOD).tolist() == positions


def test_each_token_predicts_the_next() -> None:
    inputs = build_inputs(TOKENS, SAMPLES, config(), EOD, torch.float32)
    assert torch.equal(inputs.tokens, TOKENS[:, :-1])
    assert torch.equal(inputs.targets, TOKENS[:, 1:])
    assert torch.equal(inputs.samples, SAMPLES)
    assert torch.equal(inputs.loss_weights, torch.ones(3, 8))
    assert inputs.positions is None
    assert inputs.documents is None


def test_end_of_document_as_an_input_predicts_nothing() -> None:
    inputs = build_inputs(TOKENS, SAMPLES, config(eod_mask_loss=True), EOD, torch.float64)
    want = [[float(token != EOD) for token in row] for row in TOKENS[:, :-1].tolist()]
    assert inputs.loss_weights.dtype == torch.float64
    assert inputs.loss_weights.tolist() == want
    assert inputs.documents is None


def test_resets_give_documents_and_positions_of_the_inputs() -> None:
    options = config(reset_attention_mask=True, reset_position_ids=True)
    inputs = build_inputs(TOKENS, SAMPLES, options, EOD, torch.float32)
    numbers, positions = numbers_and_positions(TOKENS[:, :-1])
    assert inputs.documents is not None
    assert inputs.positions is not None
    assert inputs.documents.tolist() == numbers
    assert inputs.positions.tolist() == positions


def test_without_an_end_of_document_token_all_tokens_count() -> None:
    inputs = build_inputs(TOKENS, SAMPLES, DataConfig(), None, torch.float32)
    assert torch.equal(inputs.loss_weights, torch.ones(3, 8))
    assert inputs.documents is None
