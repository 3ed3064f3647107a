"""What a micro-batch size needs on a GPU, as predicted and as held."""

from pathlib import Path

import pytest
import torch

from tests.distributed import run_ranks
from tests.figures import Figure
from tests.megatron.tuning.test_micro_batch import predict_and_try, training_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def test_a_size_needs_no_more_than_is_predicted_and_left_free(
    tmp_path: Path, figure: Figure
) -> None:
    config, device = training_config(tmp_path), torch.device("cuda", 0)
    (found,) = run_ranks(1, predict_and_try, config, device)
    errors = [predicted / peak - 1 for predicted, peak in found]
    figure(
        "micro-batch memory on a GPU, predicted / needed - 1", least=min(errors), most=max(errors)
    )
    assert -0.1 < min(errors) <= max(errors) < 1
