"""Other libraries that normalize on a CPU, as contestants.

Each runs under its best conditions: data already in its own tensors, a session or a
compiled function already made, one call per turn. Cases that a library has no operation
for are left out; a library that is not installed is listed as absent.

| peer | operations | threads |
| --- | --- | --- |
| oneDNN, by torch's mkldnn tensors | batch norm | torch's |
| ONNX Runtime | every layer, forward | its own pool, without spinning |
| JAX, compiled by XLA | batch norm | XLA's, as many as there are cores |

Threads that spin would take the second core from the contestant after them. JAX has no
number of threads to set in a running process; with one thread the times are process
CPU time, which counts all of XLA's.
"""

from __future__ import annotations

from normkit.bench.peers import jax_xla, onednn, onnx_runtime
from normkit.bench.peers.peer import Given, Peer

__all__ = ["PEERS", "Given", "Peer"]

PEERS: tuple[Peer, ...] = (onednn.PEER, onnx_runtime.PEER, jax_xla.PEER)
