"""What the passes of a stage need, measured on the stage with all its layers in one go."""

import torch
from torch.autograd.graph import get_gradient_edge

from megatron.model.init import build_model
from megatron.model.placement import Placement
from megatron.model.stages import Stage
from megatron.optim.flat_parameters import FlatParameters
from megatron.planning.absent_peers import absent_peers
from megatron.planning.live_bytes import LiveBytes
from megatron.planning.parameters import META
from megatron.planning.pass_bytes import KernelsOnMeta, PassBytes, PassShape, meta_microbatch
from mpu import PLAIN, ParallelDims, RngStreams
from mpu.cross_entropy import tokens_at_once
from mpu.deferral import DeferringProducts
from mpu.products import main_grad


def measure_whole(shape: PassShape, stage: Stage) -> PassBytes:
    """Send a microbatch forward and backward through ``stage``."""
    products = DeferringProducts(PLAIN) if shape.deferring else PLAIN
    with absent_peers(ParallelDims(tensor=shape.tensor)) as groups:
        placement = Placement(
            groups.tensor, sequence_parallel=shape.sequence, dtype=shape.dtype, products=products
        )
        model = build_model(
            shape.model,
            placement,
            device=META,
            backend=shape.backend,
            recompute=shape.recompute,
            stage=stage,
        )
        FlatParameters([model], groups, META)
        if stage.last:
            model.head_chunk = tokens_at_once(model.head_weight.size(0), shape.gpu_memory)
        inputs = meta_microbatch(shape)
        given = [value for value in vars(inputs).values() if value is not None]
        gradients = [main_grad(parameter) for parameter in model.parameters()]
        buffers = [buffer for buffer in gradients if buffer is not None]
        known = [*model.parameters(), *buffers, *given]
        with KernelsOnMeta(), LiveBytes(besides=known) as live:
            hidden = None
            if not stage.first:
                hidden = model.new_hidden(*inputs.tokens.shape).requires_grad_()
            output = model(inputs, RngStreams(0, inputs.samples), hidden)
            forward = live.take_peak()
            edge = get_gradient_edge(output)
            gradient = None if stage.last else torch.empty_like(output)
            del output
            kept = live.now - (0 if gradient is None else gradient.nbytes)
            live.take_peak()
            if not isinstance(products, DeferringProducts):
                torch.autograd.backward(edge, gradient)
                return PassBytes(kept, forward, live.take_peak())
            with products.deferring() as jobs:
                torch.autograd.backward(edge, gradient)
            backward = live.take_peak()
            del edge, gradient, hidden
            deferred = live.now
            while jobs:
                jobs.pop(0)()
            return PassBytes(kept, forward, backward, deferred, live.take_peak())
