"""Which token is chosen, and what follows a prompt."""

import pytest
import torch
from torch.distributed import ProcessGroup

from megatron.errors import ConfigError
from megatron.inference.generation import Sampling, generate
from tests.megatron.model.sample import SMALL, small_model, with_options

# Tokens 2, 0, 3, 1 in falling probability: 0.4, 0.3, 0.2, 0.1.
PROBABILITIES = torch.tensor([0.3, 0.1, 0.4, 0.2])
DRAWS = 4000


def frequencies(sampling: Sampling) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    logits = PROBABILITIES.log()
    drawn = torch.tensor([sampling.choose(logits, generator) for _ in range(DRAWS)])
    return drawn.bincount(minlength=4) / DRAWS


@pytest.mark.parametrize(
    ("sampling", "want"),
    [
        (Sampling(), [0.3, 0.1, 0.4, 0.2]),
        (Sampling(greedy=True), [0, 0, 1, 0]),
        (Sampling(top_k=1), [0, 0, 1, 0]),
        (Sampling(top_k=2), [3 / 7, 0, 4 / 7, 0]),
        (Sampling(top_k=9), [0.3, 0.1, 0.4, 0.2]),
        (Sampling(top_p=0.3), [0, 0, 1, 0]),
        (Sampling(top_p=0.6), [3 / 7, 0, 4 / 7, 0]),
        (Sampling(top_p=0.8), [3 / 9, 0, 4 / 9, 2 / 9]),
        # Of the two that are left, the first has 4/7 alone.
        (Sampling(top_k=2, top_p=0.5), [0, 0, 1, 0]),
        (Sampling(temperature=0.5), [9 / 30, 1 / 30, 16 / 30, 4 / 30]),
    ],
    ids=str,
)
def test_tokens_are_drawn_with_their_probabilities(sampling: Sampling, want: list[float]) -> None:
    found = frequencies(sampling)
    probabilities = torch.tensor(want)
    # Five standard deviations of a binomial distribution.
    bound = 5 * (probabilities * (1 - probabilities) / DRAWS).sqrt()
    assert ((found - probabilities).abs() <= bound).all()


@pytest.mark.parametrize(
    ("options", "name"),
    [({"temperature": 0.0}, "temperature"), ({"top_k": 0}, "top_k"), ({"top_p": 1.5}, "top_p")],
)
def test_sampling_out_of_range_is_refused(options: dict[str, float], name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be .* got {options[name]}"):
        Sampling(**options)  # type: ignore[arg-type]


def test_each_token_follows_from_all_before_it(single_group: ProcessGroup) -> None:
    model = small_model(single_group)
    tokens = [5, 3, 8]
    for token in generate(model, tokens, max_new_tokens=9, sampling=Sampling(greedy=True)):
        logits = model.logits(torch.tensor([tokens]))[0, -1, : SMALL.vocab_size]
        assert token == int(logits.argmax())
        tokens = [*tokens, token]
    assert len(tokens) == 12


def test_padding_of_the_vocabulary_is_never_chosen(single_group: ProcessGroup) -> None:
    model = small_model(single_group)
    with torch.no_grad():
        model.head_weight[SMALL.vocab_size :] = 1e6
    new = generate(model, [1], max_new_tokens=50, sampling=Sampling(temperature=100.0))
    assert max(new) < SMALL.vocab_size


def test_seed_decides_what_is_drawn(single_group: ProcessGroup) -> None:
    model = small_model(single_group)
    runs = [
        list(generate(model, [1, 2], max_new_tokens=12, sampling=Sampling(), seed=seed))
        for seed in (7, 7, 8)
    ]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_generation_ends_with_the_end_of_document(single_group: ProcessGroup) -> None:
    model = small_model(single_group)
    greedy = Sampling(greedy=True)
    tokens = list(generate(model, [5, 3, 8], max_new_tokens=12, sampling=greedy))
    eod = tokens[4]
    ended = list(generate(model, [5, 3, 8], max_new_tokens=12, sampling=greedy, eod_id=eod))
    assert ended == tokens[: tokens.index(eod) + 1]


def test_more_tokens_than_learned_positions_are_refused(single_group: ProcessGroup) -> None:
    model = small_model(single_group, with_options(position_embedding="learned"))
    fits = generate(model, [1] * 20, max_new_tokens=4, sampling=Sampling())
    assert len(list(fits)) == 4
    with pytest.raises(ConfigError, match="exceeds the 24 positions"):
        next(generate(model, [1] * 20, max_new_tokens=5, sampling=Sampling()))
