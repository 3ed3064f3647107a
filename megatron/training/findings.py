"""What is wrong with the data and in which order it is read, found out once for many ranks.

Only ranks that read data need to know, and of those on one node only the first works:

    first of each node    reads a share of the token files, so that a shared disk is read once
    first of each node    reads those that are still unknown on its node
    rank 0                computes the orders of samples and keeps them
    first of each node    verifies them, or computes them where its node has none
    the others            open what the first of their node has found

What could be kept is opened by each rank from its file, and what could not is sent. In the end all
compare what they have with rank 0: data or orders that differ would train another model.
"""

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch.distributed import ProcessGroup

from megatron.config import Config
from megatron.data.content import Findings
from megatron.data.history import Phase
from megatron.data.indexed_dataset import bin_path, idx_path
from megatron.data.loader import Split, build_samples, read_contents
from megatron.errors import DataError
from megatron.together import (
    receive,
    run_everywhere,
    run_on_first,
    run_patiently,
    run_together,
    send,
)

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def read_data(config: Config, *, reads: bool, group: ProcessGroup | None) -> Findings:
    """What is known of the tokens when all files of the run have been read.

    Collective over ``group``. It takes as long as it takes: ranks that wait do so patiently.

    Args:
        reads: whether this rank reads data, which the first rank of the group has to.

    Raises:
        DataError: on every rank, if a file cannot be read.
    """
    findings = Findings()
    paths = list(config.data.paths)
    if group is None:
        read_contents(config, paths, findings)
        return findings
    places = _find_places(reads, group)
    mine = paths if places.leads else []
    run_patiently(lambda: read_contents(config, mine[places.turn :: places.turns], findings), group)
    run_patiently(lambda: read_contents(config, mine, findings), group)
    return findings


def find_orders(
    config: Config,
    needed: Mapping[Split, Sequence[Phase]],
    findings: Findings,
    *,
    reads: bool,
    group: ProcessGroup | None,
) -> Findings:
    """What is known besides ``findings`` when the samples ``needed`` of each split are built.

    Collective, as ``read_data`` is.

    Raises:
        DataError: on every rank, if the data cannot be used.
    """

    def build() -> None:
        for split, phases in needed.items():
            if phases[-1].num_samples > 0:
                build_samples(config, split, phases, findings)

    if group is None:
        build()
        return findings
    places = _find_places(reads, group)
    run_patiently(lambda: build() if group.rank() == 0 else None, group)
    if group.rank() == 0:
        for leader in places.leaders[1:]:
            send(findings.cache.only_unkept(), leader, group)
    elif places.leads:
        findings.cache.take(receive(0, group))
    run_patiently(lambda: build() if places.leads else None, group)
    if places.leads:
        for rank in places.followers:
            send(findings, rank, group)
    elif reads:
        findings = receive(places.leader, group)
    return findings


def compare_findings(findings: Findings, group: ProcessGroup | None) -> None:
    """Refuse data and orders that are not those of the first rank of ``group``. Collective.

    Raises:
        DataError: on every rank, naming the rank, its host and what differs.
    """
    first = run_on_first(lambda: (platform.node(), _digests(findings)), group)
    rank = 0 if group is None else group.rank()
    run_everywhere(lambda: _compare(_digests(findings), rank, *first), group)


def _compare(own: Mapping[str, str], rank: int, host: str, first: Mapping[str, str]) -> None:
    for name, digest in own.items():
        if first.get(name) != digest:
            raise DataError(
                f"{name} is {digest} on rank {rank} (host {platform.node()}), but "
                f"{first.get(name, 'unknown')} on rank 0 (host {host}): "
                "all ranks must read the same data"
            )


def _digests(findings: Findings) -> dict[str, str]:
    digests = {}
    for prefix, content in findings.contents.items():
        digests[f"{idx_path(prefix)}: the fingerprint"] = content.fingerprint
        digests[f"{bin_path(prefix)}: the hash of the content"] = content.hash
    orders = findings.cache.digests
    return digests | {f"the hash of the order {stem}": it for stem, it in orders.items()}


class _Places:
    """Which ranks work for which.

    Args:
        nodes: the node of each rank that reads data, None for the others.
        rank: this rank.
    """

    def __init__(self, nodes: list[str | None], rank: int) -> None:
        self.leaders = sorted({nodes.index(node) for node in nodes if node is not None})
        self.leads = rank in self.leaders
        self.turns = len(self.leaders)
        self.turn = self.leaders.index(rank) if self.leads else 0
        node = nodes[rank]
        same = [] if node is None else [r for r, other in enumerate(nodes) if other == node]
        self.leader = same[0] if same else 0
        self.followers = same[1:]


def _find_places(reads: bool, group: ProcessGroup) -> _Places:
    return _Places(run_together(lambda: _node() if reads else None, group), group.rank())


def _node() -> str:
    """The machine that this process is on; names alone may be those of several containers."""
    boot = _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""
    return f"{platform.node()} {boot}"
