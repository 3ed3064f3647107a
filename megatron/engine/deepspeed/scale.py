"""The loss scale of DeepSpeed, and the numbers that a save keeps of it.

DeepSpeed's scale follows overflows as ``megatron.optim.loss_scaler`` does, and counts differently:

    here         DeepSpeed
    good_steps   cur_iter - last_overflow_iter - 1, without whole windows
    patience     cur_hysteresis, which stays at 1 where ours goes to 0
"""

from collections.abc import Mapping
from typing import Any


def scale_state(scaler: Any) -> dict[str, float]:
    """What ``load_scale``, or the scaler of the other engine, needs to go on."""
    good_steps = (scaler.cur_iter - scaler.last_overflow_iter - 1) % scaler.scale_window
    return {
        "loss_scale": float(scaler.cur_scale),
        "good_steps": good_steps,
        "patience": scaler.cur_hysteresis,
    }


def load_scale(scaler: Any, state: Mapping[str, float]) -> None:
    scaler.cur_scale = float(state["loss_scale"])
    scaler.cur_iter = int(state["good_steps"])
    scaler.last_overflow_iter = -1
    scaler.cur_hysteresis = max(1, int(state["patience"]))
