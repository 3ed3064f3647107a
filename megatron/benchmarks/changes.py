"""The changes that the training step owes its speed to, with the gains that arithmetic predicts.

A gain is how many times as long the step takes without the change. The predictions were written
down before any change was undone, and stay where they were wrong: they tell how well the costs are
understood. Where they name no other processor, they are computed from the time of the step on an
Intel Xeon, and from these rates:

    its core    products 200 GFLOP/s in fp32 and 100 in bf16; passes over memory 30 GB/s in the
                L3 cache, 17 beyond; 0.25 s for each GB of memory that the system has to clear
    a GPU       1b7 at 4 x 2048 on one H200: 19.4 us a token, 15.9 of them products at 650 TFLOP/s,
                2.0 attention, 1.1 element-wise, 0.35 loss; AdamW 12 ms; memory 4.3 TB/s: 171 ms
"""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from megatron.benchmarks.ablations import Ablation

Kept: TypeAlias = Literal["yes", "for memory", "option", "no"]


@dataclass(frozen=True)
class Change:
    """A change to the training step.

    Attributes:
        step: which step it is measured in, of those of ``gains``.
        why: the arithmetic of the prediction.
        ablation: what undoes it, or makes it if it is not kept; None: this program cannot.
    """

    what: str
    instead_of: str
    step: str
    why: str
    predicted: float
    ablation: Ablation | None
    kept: Kept = "yes"


CPU_CHANGES = [
    Change(
        "attention in blocks",
        "explicit scores",
        "med",
        "half the scores are never computed: 6.4 GFLOP, 32 ms; 22 passes over 17 MB of scores in "
        "4 layers that now stay in L2: 49 ms; of 743 ms",
        1.11,
        "explicit attention",
    ),
    Change(
        "attention in blocks",
        "torch's kernel, widened",
        "med",
        "7 products instead of 6, and 72 columns instead of 64: 2 GFLOP, 10 ms; copies 2 ms",
        1.02,
        "sdpa attention",
    ),
    Change(
        "head in chunks, gradients in the forward pass",
        "all logits",
        "bigvocab",
        "three tensors of 0.5 GB less to clear: 0.39 s; 11 passes over them beyond the cache "
        "instead of 12 inside: 0.27 s; of 0.96 s",
        1.69,
        "plain head",
    ),
    Change(
        "the same memory for the logits of all chunks",
        "new memory for each",
        "bigvocab",
        "7 times 66 MB less for the system to clear: 0.2 s, of 1.33 s on an AMD processor",
        1.18,
        "new logits",
    ),
    Change(
        "weight gradients added in place",
        "autograd adds them",
        "med",
        "59 MB of gradients written, read and added once more: 3 passes, 10 ms",
        1.01,
        "autograd gradients",
        kept="for memory",
    ),
    Change(
        "fused AdamW",
        "one operation for all tensors",
        "med",
        "7 passes over 59 MB instead of 21: 49 ms",
        1.07,
        "foreach AdamW",
    ),
    Change(
        "denormal numbers are zero",
        "as IEEE has them",
        "med",
        "exp(-103) to exp(-87) is denormal: 1.8 % of the scores of 8 heads, 37,000 a layer; each "
        "stalls 16 instructions for 150 cycles: 119 ms",
        1.16,
        "denormal numbers",
    ),
    Change(
        "bf16 products from fp32 copies",
        "the processor's bf16 products",
        "wide bf16",
        "510 of 536 GFLOP take 2.55 s instead of 5.1 s, of 4.48 s; not where bf16 is faster",
        1.57,
        "native bf16 products",
    ),
    Change(
        "low-precision weight gradients in parts of 8 MiB",
        "in parts of 2**14 rows",
        "wide bf16",
        "4 times 32 MiB less for the system to clear: 0.12 s, of 3.8 s on an AMD processor",
        1.03,
        "large parts",
    ),
    Change(
        "float32 products by oneDNN on an AMD processor",
        "by MKL",
        "med",
        "51.5 GFLOP of outputs and input gradients at 103 GFLOP/s instead of 93: 54 ms, of 1.16 s "
        "there; on others nothing changes",
        1.05,
        "torch's float32 products",
    ),
    Change(
        "input gradients summed beside the weight gradients",
        "before them",
        "wide, 2 ranks",
        "16 sums of 4 MiB at 1.5 GB/s: 45 ms of 2.2 s; both cores are busy, so half of it at most",
        1.01,
        "sums in turn",
    ),
    Change(
        "whole layers compiled",
        "operations as they are",
        "med",
        "54 MB less to pass over in each of 4 layers: 7 ms; it needs a compiler for C++",
        1.01,
        "compiled layers",
        kept="no",
    ),
]

GPU_CHANGES = [
    Change(
        "FlexAttention",
        "explicit scores",
        "1b7",
        "14 passes over 64 KB of scores a token in 24 layers: 5.1 us; the masked half: 0.6 us",
        1.28,
        "explicit attention",
    ),
    Change(
        "FlexAttention",
        "torch's kernel, widened",
        "1b7",
        "136 columns instead of 128 leave the kernel's tile: 2.0 us become 2.6",
        1.03,
        "sdpa attention",
    ),
    Change(
        "head in chunks, gradients in the forward pass",
        "all logits",
        "1b7",
        "14.5 MB of passes a token instead of 10: 1.1 us lost, and 25 GB of memory won",
        0.95,
        "plain head",
        kept="for memory",
    ),
    Change(
        "weight gradients added in place",
        "autograd adds them",
        "1b7",
        "a bf16 product is added to fp32 either way; it saves memory",
        1.00,
        "autograd gradients",
        kept="for memory",
    ),
    Change(
        "fused AdamW",
        "one operation for all tensors",
        "1b7",
        "7 passes over 6.9 GB instead of 21: 22 ms",
        1.13,
        "foreach AdamW",
    ),
    Change(
        "element-wise chains compiled",
        "operations as they are",
        "1b7",
        "11 MB of passes a token instead of 4.7: 1.6 us; torchtitan has 1.16 for all of a layer",
        1.08,
        "eager chains",
    ),
    Change(
        "the loss read once a step",
        "between forward and backward",
        "1b7",
        "the GPU waits for the first launches of the backward pass: 50 us",
        1.00,
        "loss read at once",
    ),
    Change(
        "symmetric memory",
        "collectives in turn",
        "1b7",
        "2 GPUs send 393 KB a token at 300 GB/s: 1.3 of 11.8 us, of which a part stays; torchtitan "
        "has 1.09",
        1.09,
        None,
        kept="option",
    ),
    Change(
        "fp8 products in the layers",
        "bf16",
        "1b7",
        "7.25 GFLOP a token at 1200 TFLOP/s: 5.1 us less, 1.8 us of casts more; nanochat has 1.17",
        1.19,
        None,
        kept="option",
    ),
    Change(
        "CUDA graphs",
        "launches",
        "1b7",
        "the CPU is ahead of the GPU, see Launches: nothing to win",
        1.00,
        None,
        kept="no",
    ),
]
