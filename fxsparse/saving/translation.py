"""Changes of layout in the names of an exported graph.

A move names a value and its readers by nodes of the converted graph; the exported graph has other nodes. A node there
that reads a value does what an edge of the converted graph does, and gets the layout that the moves give that edge.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.fx import Node

from fxsparse import sites
from fxsparse.plan import Move
from fxsparse.saving.program import Program, pad_before

_SIZES = (torch.ops.aten.sym_size.int, torch.ops.aten.sym_stride.int)


class Translation:
    """Translates moves between the nodes of a graph and those of its exported program."""

    def __init__(self, program: Program) -> None:
        """Collect the edges of the exported graph, each with the edge of the source that it stands for."""
        self._program = program
        self._source = {node.name: node for node in program.source.graph.nodes}
        exported = {node.name: node for node in program.exported.graph.nodes}
        self._pads: dict[str, str] = {}  # of a source or an exported site, and that site
        shown: dict[str, str] = {}
        for node, site in sites.conv_sites(program.source):
            found = exported[program.values[node.name]]
            for at, names in ((node, self._pads), (found, shown)):
                pad = pad_before(at, site)
                if pad is not None:
                    names[pad.name] = at.name
        self._edges: list[tuple[str, str, str, str]] = []  # value and reader, exported; the same in the source
        for name, owner in program.owners.items():
            reader = exported[name]
            if reader.target in _SIZES:
                continue
            for value in reader.all_input_nodes:
                source = self._value_read(owner, value.name)
                if source is not None:
                    self._edges.append((value.name, shown.get(name, name), source, owner))

    def moves(self, moves: Iterable[Move]) -> tuple[Move, ...]:
        """Translate moves; those of values or readers that the graph does not have are dropped."""
        translated, moved = [], {}
        for move in moves:
            if move.value in self._source:
                moved.update({(move.value, reader): move.layout for reader in move.readers})
            else:
                translated.append(move)  # of a parameter, which keeps its name
        readers: dict[tuple[str, str], list[str]] = {}
        for value, reader, source, owner in self._edges:
            layout = self._layout(source, owner, moved)
            if layout is not None:
                readers.setdefault((value, layout), []).append(reader)
        for (value, layout), names in readers.items():
            translated.append(Move("", value, layout, tuple(sorted(set(names)))))
        return tuple(translated)

    def _value_read(self, owner: str, value: str) -> str | None:
        """Return which input of a source node the exported value is."""
        inputs = self._source[owner].all_input_nodes
        return next((node.name for node in inputs if self._program.values.get(node.name) == value), None)

    def _layout(self, value: str, reader: str, moved: dict[tuple[str, str], str]) -> str | None:
        """Return the layout that moves give the edge from a value to a reader, or None."""
        layout = moved.get((value, self._pads.get(reader, reader)))
        before = self._same_before(self._source[value])
        if layout is not None or before is None:
            return layout
        return self._layout(before, value, moved)

    def _same_before(self, node: Node) -> str | None:
        """Return the input that a node hands on as it is, so that nothing of the node was exported."""
        values = self._program.values
        if node.op == "placeholder" or node.name not in values:
            return None
        inputs = (other.name for other in node.all_input_nodes)
        return next((name for name in inputs if values.get(name) == values[node.name]), None)
