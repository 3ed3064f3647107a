"""The machines that a run is planned for: their GPUs, and the links between these.

Figures are those of data sheets. What programs reach of them is a property of the kernels and of
the collective library, and stands beside:

    matrix products    0.85 of the peak on A100, 0.80 on H100 and H200: what large products of
                       16-bit numbers were measured to reach
    memory             0.80: what kernels that read and write reach
    links              0.75: what NCCL's rings reach of NVLink
    network            0.5: a judgement; from one network of many nodes to the next it differs
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from megatron.config.rules import require_multiple

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Nodes of GPUs.

    Attributes:
        gpus: in all.
        gpus_per_node: in each node.
        memory: bytes of a GPU.
        num_sms: multiprocessors of a GPU, which compute the tiles of a product.
        peak_flops: FLOP/s of a GPU, dense, 16-bit.
        memory_bandwidth: bytes/s of a GPU's memory.
        intra_bandwidth: bytes/s that a GPU sends to others of its node.
        inter_bandwidth: bytes/s that a node sends to others.
        kernel_efficiency: share of the peak that large products reach.
        memory_efficiency: share of the memory's bandwidth that kernels reach.
        link_efficiency: share of a link that collectives reach inside a node.
        network_efficiency: share that they reach between nodes.
        launch_seconds: between two kernels.
        overlaps: collectives can run beside products.
    """

    gpus: int
    gpus_per_node: int
    memory: float
    num_sms: int
    peak_flops: float
    memory_bandwidth: float
    intra_bandwidth: float
    inter_bandwidth: float
    kernel_efficiency: float
    memory_efficiency: float = 0.8
    link_efficiency: float = 0.75
    network_efficiency: float = 0.5
    launch_seconds: float = 5e-6
    overlaps: bool = True

    def bandwidth(self, stride: int, size: int) -> float:
        """Bytes/s of each rank in a ring of ``size`` ranks, each ``stride`` after the one before.

        All groups of an axis send at once. Where a ring leaves a node, the rings that do so share
        the links of the node.
        """
        inside = self.intra_bandwidth * self.link_efficiency
        if stride * size <= self.gpus_per_node:
            return inside
        members = max(1, self.gpus_per_node // stride)
        rings = self.gpus_per_node / members
        return min(inside, self.inter_bandwidth * self.network_efficiency / rings)


def _eight_gpus(**figures: float) -> Cluster:
    """A node of eight GPUs; more of them come with ``replace``."""
    return Cluster(gpus=8, gpus_per_node=8, **figures)  # type: ignore[arg-type]


CLUSTERS: Mapping[str, Cluster] = MappingProxyType(
    {
        # BLOOM's: NVLink 3, and four links of 100 Gb/s for each node.
        "a100": _eight_gpus(
            memory=80 * GIB,
            num_sms=108,
            peak_flops=312e12,
            memory_bandwidth=2.04e12,
            intra_bandwidth=300e9,
            inter_bandwidth=50e9,
            kernel_efficiency=0.85,
        ),
        "h100": _eight_gpus(
            memory=80 * GIB,
            num_sms=132,
            peak_flops=989.5e12,
            memory_bandwidth=3.35e12,
            intra_bandwidth=450e9,
            inter_bandwidth=400e9,
            kernel_efficiency=0.8,
        ),
        "h200": _eight_gpus(
            memory=139 * GIB,
            num_sms=132,
            peak_flops=989.5e12,
            memory_bandwidth=4.8e12,
            intra_bandwidth=450e9,
            inter_bandwidth=400e9,
            kernel_efficiency=0.8,
        ),
    }
)
"""By name; with eight links of 400 Gb/s for each node of H100 and H200."""


def cluster_of(
    name: str, gpus: int, gpus_per_node: int = 8, memory: float | None = None
) -> Cluster:
    """``gpus`` GPUs of the kind ``name``, in nodes of as many as given or all in one.

    Args:
        memory: bytes of a GPU, if other than usual.

    Raises:
        ConfigError: if they do not fill their nodes.
    """
    named = CLUSTERS[name]
    per_node = min(gpus, gpus_per_node)
    require_multiple("--gpus", gpus, "--gpus_per_node", per_node)
    memory = named.memory if memory is None else memory
    return replace(named, gpus=gpus, gpus_per_node=per_node, memory=memory)
