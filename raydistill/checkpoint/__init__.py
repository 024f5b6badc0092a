"""Snapshots of a run: what is written, when it counts, and how it is read back.

    root/step_00000120/
        generator.safetensors   weights and optimiser tensors of one role
        generator.json          its JSON state, and the size and hash of the weights; written after them
        critic.safetensors ...  other ranks write their own parts at the same time
                                of a role that is sharded over ranks one such pair of each (`sharded`)
        manifest.json           names, sizes and hashes of all parts; written last, by one rank

A folder without a manifest is not a snapshot. Nothing is unpickled: tensors are safetensors, the rest is
JSON. The root is a local folder or any fsspec URL (`s3://bucket/run`, `memory://run`).
"""

from raydistill.checkpoint.mirror import Mirror
from raydistill.checkpoint.optimizer_state import pack_optimizer, unpack_optimizer
from raydistill.checkpoint.sharded import part_name, sharded_part
from raydistill.checkpoint.snapshots import Snapshot, Snapshots
from raydistill.checkpoint.tensor_file import prefixed, unprefixed

__all__ = [
    "Mirror", "Snapshot", "Snapshots", "pack_optimizer", "part_name", "prefixed", "sharded_part", "unpack_optimizer",
    "unprefixed",
]  # fmt: skip
