"""What a rank says of another that is lost or late, and how it ends where torch would wait on."""

import subprocess
import sys

import pytest
import torch.distributed as dist

from megatron.errors import LatePeerError, PeerError
from megatron.peers import during

LOST = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer "
    "[127.0.0.1]:22194. This is typically caused by a remote worker crashing. Check the logs of "
    "the remote worker before reporting an error. GLHF! \U0001f3d6\ufe0f"
)
LATE = "[/b/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 4000ms for recv operation"


@pytest.mark.parametrize(
    ("error", "kind", "reason"),
    [
        (RuntimeError(LOST), PeerError, "Connection closed by peer [127.0.0.1]:22194"),
        (RuntimeError(LATE), LatePeerError, "Timed out waiting 4000ms for recv operation"),
        (dist.DistStoreError("wait timed out\nat store.cpp:1"), LatePeerError, "wait timed out"),
    ],
)
def test_lost_peer_is_told_with_what_was_done_and_without_places_in_sources(
    error: Exception, kind: type[PeerError], reason: str
) -> None:
    with pytest.raises(PeerError) as raised, during("the run"), during("step 7"):
        raise error
    assert type(raised.value) is kind
    assert str(raised.value) == f"another rank was lost or did not answer in step 7: {reason}"


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="^a bug$"), during("step 7"):
        raise RuntimeError("a bug")


WATCHED = """
import threading, time
import torch
from megatron.peers import waiting
from megatron.spokesman import Spokesman

spokesman = Spokesman(None)
with waiting("step 7", SECONDS, torch.device("cuda"), spokesman):
    TOLD
    time.sleep(60)
"""


def watched(seconds: float, told: str = "") -> subprocess.CompletedProcess[str]:
    program = WATCHED.replace("SECONDS", str(seconds)).replace("TOLD", told)
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )


def test_process_that_waits_for_a_gpu_ends_in_time() -> None:
    """As it would if a GPU waited for that of another rank, with the code of a lost peer."""
    done = watched(0.5)
    assert done.returncode == PeerError.exit_code
    complaint = "another rank did not answer in step 7 within launch.timeout (0.5 s)"
    assert done.stderr.strip() == complaint


def test_process_that_waits_ends_after_another_has_said_why() -> None:
    done = watched(50, told="spokesman.say(lambda: print('the cause'))")
    assert (done.returncode, done.stdout, done.stderr) == (PeerError.exit_code, "the cause\n", "")
