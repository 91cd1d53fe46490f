"""The ranks of a run as a grid, as a strategy sees it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from llmkit.core.peers import Peers
from llmkit.parallel.degrees import AXES, Degrees


@dataclass(frozen=True)
class Grid:
    """Where a rank stands, and whom it shares what with."""

    degrees: Degrees
    mesh: DeviceMesh
    """With the axes of `degrees`, all of them, also those of one rank."""
    peers: Peers

    @property
    def rank(self) -> int:
        """This rank among all."""
        return self.peers.ranks.rank

    def group(self, *axes: str) -> Any:
        """The process group of the ranks that differ from this one along `axes` alone."""
        if len(axes) == 1:
            return self.mesh[axes[0]].get_group()
        return self.mesh[axes]._flatten("_".join(axes)).get_group()

    def data(self, *also: str) -> Callable[[Any], list[Any]]:
        """A JSON value of this rank -> those of the ranks that see other tokens and are else where this one is, and
        so along the axes `also`."""
        mine = self.degrees.place(self.rank)
        alike = [
            rank
            for rank in range(self.degrees.world)
            if all(self.degrees.place(rank)[axis] == mine[axis] for axis in ("pipeline", "tensor", *also))
        ]

        def gather(value: Any) -> list[Any]:
            said = self.peers.gather(value)
            return [said[rank] for rank in alike]

        return gather


def grid(degrees: Degrees, device: str, peers: Peers) -> Grid:
    """Makes the groups: called by every rank."""
    return Grid(degrees, init_device_mesh(device, degrees.shape, mesh_dim_names=AXES), peers)
