"""A graph from Dynamo, read: which inputs are the model's parameters, which of them are weights, and their masks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from fxsparse import sites
from fxsparse.dynamo.binding import name_buffers
from fxsparse.dynamo.naming import attribute_names, compiled_model, plain_name, read_masks
from fxsparse.dynamo.weights import Weight, find_weights, pruning_mask, why_not, write_mask
from fxsparse.masks import WeightMask

_NOT_FOLDED = "Batch norms are not folded: the model's weights may change."
_NOT_ZERO = (
    "The masks prune weights that are not zero in the model: a convolution that Dynamo leaves out of its graphs "
    "computes with them. Write the zeros into the model to be sure."
)


class Captured:
    """A graph from Dynamo.

    Attributes:
        gm: the graph.
        values: of the placeholders.
        attributes: the placeholders that are parameters or buffers of the model, with their names.
        weights: of the convolutions, by the node that gives them.
        masks: of these weights by name, where they are known apart from the zeros.
        refused: why some weights cannot be packed, by name.
        notes: for the report.
    """

    def __init__(self, gm: GraphModule, values: dict[Node, Any]) -> None:
        """Find the weights.

        Args:
            gm: as Dynamo captured it.
            values: of its placeholders.
        """
        self.gm = gm
        self.values = values
        self._model = compiled_model()
        self.attributes = attribute_names(values, self._model)
        self.weights = find_weights(gm, self.attributes)
        self.masks: dict[str, WeightMask] = {}
        self.refused: dict[str, str] = {}
        self.notes: tuple[str, ...] = (_NOT_FOLDED,)

    def write_masks(self, given: Mapping[str, Any] | None) -> None:
        """Write the masks that the user gave into the graph; without any, take those of `nn.utils.prune`.

        Raises:
            FxsparseError: a mask does not fit the model.
        """
        for weight in self.weights.values():
            reason = why_not(self.gm, weight, self.values)
            if reason:
                self.refused[weight.name] = reason
        if given is None:
            found = {w.name: pruning_mask(w, self.attributes, self.values) for w in self.weights.values()}
            self.masks = {name: mask for name, mask in found.items() if mask is not None}
            return
        tensors = {w.name: (w.value(*(self.values[s] for s in w.sources)), w.groups) for w in self.weights.values()}
        self.masks = read_masks(given, tensors, self._model)
        if any(bool((tensors[name][0] != 0)[~mask.kept].any()) for name, mask in self.masks.items()):
            self.notes = (*self.notes, _NOT_ZERO)
        for weight in self.weights.values():
            if weight.name in self.masks:
                write_mask(self.gm, weight, self.masks[weight.name].kept)
        name_buffers(self.gm)
        self.gm.graph.lint()
        self.gm.recompile()
        self.weights = find_weights(self.gm, self.attributes)

    @property
    def packable(self) -> dict[Node, Weight]:
        """The weights that are not refused."""
        return {node: weight for node, weight in self.weights.items() if weight.name not in self.refused}

    @property
    def bound(self) -> set[Node]:
        """The placeholders that become attributes for the conversion.

        Numbers that Dynamo passes as tensors are among them; what a refused weight is made of is not.
        """
        numbers = {node for node, value in self.values.items() if isinstance(value, Tensor) and value.dim() == 0}
        refused = {s for weight in self.weights.values() if weight.name in self.refused for s in weight.sources}
        return (numbers | self.attributes.keys()) - refused

    @property
    def tensors(self) -> list[Tensor]:
        """The parameters and buffers of the model that the graph reads."""
        return [self.values[node] for node in self.attributes]

    @property
    def known(self) -> list[str]:
        """Names of all convolutions that the settings may name: of the whole model, where that is known."""
        if self._model is None:
            return [sites.name_of(weight.name) for weight in self.weights.values()]
        named = self._model.named_parameters(remove_duplicate=False)
        return [sites.name_of(plain_name(name)) for name, parameter in named if parameter.dim() == 4]
