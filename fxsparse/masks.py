"""Reads the masks, whatever form they come in, and writes them into a private copy of the model.

After `bake`, the copy is the masked dense model: `nn.utils.prune` and `torch.nn.utils.parametrize` have been made
permanent (tracing would drop the former's forward pre-hooks silently) and pruned weights are exactly zero.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from fxsparse import names
from fxsparse.errors import FxsparseError
from fxsparse.regrouping import Regrouping


@dataclasses.dataclass(frozen=True)
class WeightMask:
    """The mask of one weight.

    Attributes:
        kept: bool, of the weight's shape; True = kept.
        regrouping: given where the user gave a block list.
        source: where it came from, for the report.
    """

    kept: Tensor
    regrouping: Regrouping | None
    source: str


@dataclasses.dataclass(frozen=True)
class BakedModel:
    """A private copy of the user's model with the masks written into its weights.

    Attributes:
        model: the copy.
        masks: by parameter name; only weights whose mask is known apart from their zeros.
        notes: what a reader of the report should know.
    """

    model: nn.Module
    masks: dict[str, WeightMask]
    notes: list[str]


def bake(model: nn.Module, masks: Mapping[str, Any] | None) -> BakedModel:
    """Copy the model, make its reparametrisations permanent and zero what the masks prune.

    Args:
        model: any module; not changed.
        masks: by module name, parameter name or `*_mask` buffer name: a tensor of the weight's shape (bool, or
            numbers: non-zero = kept), or a block list [(rows, columns), ...] over the weight as
            [O, (C / groups)·kh·kw]. None takes them from `nn.utils.prune`, or else from the zeros of the weights.

    Returns:
        The baked model.

    Raises:
        FxsparseError: the model cannot be copied, or a mask has a wrong name, shape or content.
    """
    if masks is not None and not isinstance(masks, Mapping):
        raise FxsparseError(
            f"masks is a {type(masks).__name__}. Give a mapping from module or parameter names to masks, or None."
        )
    private = _copy(model)
    aliases = _aliases(private)
    found = _make_permanent(private)
    notes = []
    if masks is not None:
        found = {}
        parameters = dict(private.named_parameters(remove_duplicate=False))
        for name, given in masks.items():
            target = _resolve(name, aliases, parameters)
            if target in found:
                raise FxsparseError(
                    f"The masks name the weight '{target}' twice (the second time as '{name}'). Give one mask a weight."
                )
            found[target] = read(name, given, parameters[target], _groups(private, target))
            if parameters[target].dim() != 4:
                notes.append(f"'{target}' is masked but is no 2-D convolution's weight: it runs dense, with its zeros.")
        for target, mask in found.items():
            parameters[target].data.masked_fill_(~mask.kept.to(parameters[target].device), 0)
    return BakedModel(private, found, notes)


def _copy(model: nn.Module) -> nn.Module:
    if isinstance(model, torch.jit.ScriptModule):
        raise FxsparseError(
            "The model is a TorchScript module, whose graph cannot be rewritten. Convert the original nn.Module."
        )
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            # nn.utils.prune and weight_norm leave the computed weight, a non-leaf tensor, which deepcopy refuses.
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(parameter, nn.UninitializedParameter):
                raise FxsparseError(
                    f"Parameter '{name}' of a {type(module).__name__} is not initialised. Run the model once first."
                )
            if parameter.is_meta:
                raise FxsparseError(
                    f"Parameter '{name}' of a {type(module).__name__} is on the meta device: it has no values to "
                    "convert. Load the weights first."
                )
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise FxsparseError(
            f"The model cannot be copied ({error}). fxsparse works on a copy and never changes the model: make it "
            "work with copy.deepcopy first."
        ) from error


def _aliases(model: nn.Module) -> dict[str, str]:
    """Map every name a mask may be given under to the weight's name after reparametrisations are removed."""
    aliases: dict[str, str] = {}
    for name, _ in model.named_parameters(remove_duplicate=False):
        owner, _, leaf = name.rpartition(".")
        prefix = owner + "." if owner else ""
        if leaf.endswith("_orig") and hasattr(model.get_submodule(owner), leaf[:-5] + "_mask"):
            plain = prefix + leaf[:-5]
            aliases[name] = aliases[plain + "_mask"] = plain
        elif leaf.startswith("original") and ".parametrizations." in "." + name:
            module, attr = ("." + owner).split(".parametrizations.")
            plain = f"{module[1:]}.{attr}" if module else attr
            aliases[name] = plain
        elif leaf in ("weight_g", "weight_v") and hasattr(model.get_submodule(owner), "weight"):
            plain = prefix + "weight"
            aliases[name] = plain
        else:
            plain = name
            aliases[name + "_mask"] = plain
        aliases[plain] = plain
    for plain in set(aliases.values()):
        owner, _, leaf = plain.rpartition(".")
        if leaf == "weight" and owner:
            aliases.setdefault(owner, plain)
    return aliases


def _make_permanent(model: nn.Module) -> dict[str, WeightMask]:
    """Remove the known reparametrisations, leaving the weight they compute; return the masks of `nn.utils.prune`."""
    found: dict[str, WeightMask] = {}
    for path, module in model.named_modules():
        prefix = path + "." if path else ""
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, prune.BasePruningMethod):
                name = hook._tensor_name
                kept = getattr(module, name + "_mask").detach() != 0
                prune.remove(module, name)
                # A NaN or infinity in a pruned place must not survive the product with its mask.
                getattr(module, name).data.masked_fill_(~kept, 0)
                found[prefix + name] = WeightMask(kept, None, "nn.utils.prune")
        for hook in list(module._forward_pre_hooks.values()):
            if type(hook).__module__ == "torch.nn.utils.weight_norm":
                torch.nn.utils.remove_weight_norm(module, hook.name)
            elif type(hook).__module__ == "torch.nn.utils.spectral_norm" and not module.training:
                torch.nn.utils.remove_spectral_norm(module, hook.name)
        if parametrize.is_parametrized(module) and not module.training:
            _make_parametrizations_permanent(module)
    return found


def _make_parametrizations_permanent(module: nn.Module) -> None:
    """Put the computed tensors in the place of the parametrizations.

    `parametrize.remove_parametrizations` would delete attributes of the class, which a deepcopy shares with the
    user's model.
    """
    with torch.no_grad():
        computed = {
            name: getattr(module, name).clone()
            for name in module.parametrizations  # type: ignore[union-attr]
        }
    del module._modules["parametrizations"]
    module.__class__ = parametrize.type_before_parametrizations(module)
    for name, value in computed.items():
        module.register_parameter(name, nn.Parameter(value, requires_grad=value.is_floating_point()))


def _resolve(name: str, aliases: Mapping[str, str], parameters: Mapping[str, nn.Parameter]) -> str:
    target = aliases.get(name)
    if target is None or target not in parameters:
        known = sorted(name for name, parameter in parameters.items() if parameter.dim() > 1)
        raise FxsparseError(f"The masks name '{name}', which is no weight of the model. {names.near(name, known)}")
    return target


def read(name: str, given: Any, parameter: Tensor, groups: int) -> WeightMask:
    """Read one mask.

    Args:
        name: that the user gave it under.
        given: a tensor of the weight's shape, or a block list.
        parameter: the weight, [O, C / groups, kh, kw] or, for a tensor, any shape.
        groups: of the convolution.

    Raises:
        FxsparseError: the mask does not fit the weight.
    """
    shape = tuple(parameter.shape)
    if isinstance(given, np.ndarray):
        given = torch.from_numpy(given)
    if isinstance(given, Tensor):
        if tuple(given.shape) != shape:
            raise FxsparseError(
                f"Mask '{name}' has shape {tuple(given.shape)}; the weight has {shape}. Give the mask of the "
                "convolution's own weight."
            )
        if given.is_floating_point() and bool(given.isnan().any()):
            raise FxsparseError(f"Mask '{name}' contains NaN. A mask is bool, or numbers where non-zero means kept.")
        return WeightMask((given != 0).detach().to(parameter.device), None, "masks")
    if isinstance(given, Sequence) and not isinstance(given, str):
        if len(shape) != 4:
            raise FxsparseError(f"Mask '{name}' is a block list; the weight has shape {shape}, not a conv's 4.")
        matrix = (shape[0], shape[1] * shape[2] * shape[3])
        try:
            regrouping = Regrouping.from_blocks(given, matrix, groups)
        except FxsparseError as error:
            raise FxsparseError(f"Mask '{name}': {error}") from None
        kept = regrouping.to_mask().reshape(shape).to(parameter.device)
        return WeightMask(kept, regrouping, "block list")
    raise FxsparseError(
        f"Mask '{name}' is a {type(given).__name__}. Give a tensor of the weight's shape {shape} or a block list "
        "[(rows, columns), ...]."
    )


def _groups(model: nn.Module, weight: str) -> int:
    """Return the convolution groups of a weight, as far as its owner tells (a functional call may not)."""
    owner = model.get_submodule(weight.rpartition(".")[0])
    return owner.groups if isinstance(owner, nn.Conv2d) else 1
