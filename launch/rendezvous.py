"""The meeting point of a job over several machines, in a process of its own: python launch/rendezvous.py [PORT]

torchrun keeps it on the first machine unless told otherwise, and the loss of that one ends the job on all. Run this where
nothing is preempted, and give every machine that runs launch/multinode.sh RENDEZVOUS=host:port. It needs next to nothing and
holds nothing that outlives the job.
"""

import signal
import sys

from torch.distributed import TCPStore

store = TCPStore("0.0.0.0", int((sys.argv[1:] or ["29400"])[0]), is_master=True, wait_for_workers=False)  # noqa: S104
signal.pause()
