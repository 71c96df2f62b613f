"""The weights of a checkpoint, masked and packed for the graph that loads them.

The masks and the tables of the packed weights belong to the conversion and stay; only values are loaded. Tables of the
checkpoint are used where the graph's own have no content any more (a model on the meta device), and are validated
before a kernel sees them.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxsparse import sites
from fxsparse.errors import FxsparseError
from fxsparse.sites import PACKED_SUFFIXES, ConvSite

DENSE_KEYS = "fxsparse_dense_keys"  # in a graph's meta: the keys that a dense checkpoint has for it, as plain data
_MASK = "_mask"


@dataclasses.dataclass
class Loading:
    """A state dict on its way into a graph.

    Attributes:
        gm: the graph.
        tensors: what is loaded, by name in the graph.
        prefix: what the names begin with outside, for messages.
        missing: full names of what is missing.
        errors: what does not fit.
        assign: whether the tensors replace the model's, as in `nn.Module.load_state_dict`.
        dropped: norms of pruned and of all weights of the convolutions that lost some, and how many those were.
    """

    gm: GraphModule
    tensors: dict[str, Any]
    prefix: str
    missing: list[str]
    errors: list[str]
    assign: bool
    dropped: dict[str, tuple[int, float, float]] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def own(self) -> set[str]:
        """Names of the graph's tensors."""
        return set(self.gm.state_dict(keep_vars=True))

    @functools.cached_property
    def dense_keys(self) -> list[str]:
        """Names that a dense checkpoint has."""
        keys: list[str] = self.gm.meta.get(DENSE_KEYS, [])
        return keys

    @functools.cached_property
    def known(self) -> set[str]:
        """Names that either form has, with what `freeze` dropped."""
        frozen = {name for _, s in sites.conv_sites(self.gm) if s.frozen for name in (s.weight, *dropped_names(s))}
        return self.own | set(self.dense_keys) | frozen

    @functools.cached_property
    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every conv site's weight, by name."""
        return {site.weight: site.weight_shape for _, site in sites.conv_sites(self.gm)}

    def keep(self, name: str) -> None:
        """Load what the graph has; a weight that `freeze` dropped is left out."""
        self.tensors.pop(name, None)
        if name in self.own:
            self.tensors[name] = sites.attribute(self.gm, name)

    def report_missing(self, names: Iterable[str]) -> None:
        """Report names as missing, once each."""
        self.missing.extend(full for name in names if (full := self.prefix + name) not in self.missing)


def derived_names(site: ConvSite) -> tuple[str, ...]:
    """Name the tensors of a site that follow from its weight: mask and packed weight."""
    return (*([site.mask] if site.mask else []), *(site.packed_names if site.packed else ()))


def dropped_names(site: ConvSite) -> tuple[str, ...]:
    """Name what `freeze` may have dropped besides the weight."""
    return tuple(site.weight + suffix for suffix in (_MASK, *PACKED_SUFFIXES))


def is_lost(table: Tensor) -> bool:
    """Tell whether a `rows` table has no content: one that has names every output channel once."""
    return table.is_meta or not bool(table.any())


def refit(loading: Loading) -> None:
    """Bring every convolution's weight into the form that the graph holds: masked, packed, in its dtype.

    Raises:
        FxsparseError: a mask of the checkpoint differs, or its packed weights cannot be used.
    """
    for tied in _tied(loading.gm):
        _refit(loading, tied)
    for _, site in sites.conv_sites(loading.gm):
        if site.frozen:
            for name in {site.weight, *dropped_names(site)} - loading.own:
                loading.tensors.pop(name, None)
    _warn(loading)


def _tied(gm: GraphModule) -> Iterator[list[ConvSite]]:
    """Yield the sites that share one weight."""
    groups: dict[Any, list[ConvSite]] = {}
    for _, site in sites.conv_sites(gm):
        weight = _own_weight(gm, site)
        groups.setdefault(site.packed if weight is None else id(weight), []).append(site)
    yield from groups.values()


def _own_weight(gm: GraphModule, site: ConvSite) -> Tensor | None:
    owner, _, leaf = site.weight.rpartition(".")
    return getattr(gm.get_submodule(owner), leaf, None)


def _refit(loading: Loading, tied: list[ConvSite]) -> None:
    tensors = loading.tensors
    names = list(dict.fromkeys(site.weight for site in tied))
    packed = {site.packed: site for site in tied if site.packed}
    theirs = {stem: _packed_in(loading, site) for stem, site in packed.items()}
    given = next((tensors[name] for name in reversed(names) if name in tensors), None)
    from_packed = given is None
    if given is None:
        # What freeze leaves: the dense weight follows from the packed one.
        found = next(((packed[stem], four) for stem, four in theirs.items() if four is not None), None)
        if found is not None:
            given = torch.ops.fxsparse.unpack(*found[1], list(found[0].weight_shape))
    if given is None:
        loading.report_missing(name for name in names if name not in loading.own)  # torch reports the others
    if not _fits(given, tied[0]):
        for name in {name for site in tied for name in derived_names(site)}:
            loading.keep(name)
        return
    assert given is not None
    weight = _like_own(loading, tied[0], given)
    kept = _kept(loading, tied[0], packed_only=from_packed)
    masked = weight if kept is None else masked_weight(loading, tied[0].weight, weight, kept)
    if loading.assign and tied[0].mask is not None:
        tensors[tied[0].mask] = tensors[tied[0].mask].to(weight.device)
    for stem, site in packed.items():
        _repack(loading, site, masked, theirs[stem])
    for name in names:
        if name in loading.own and (name in tensors or from_packed):
            tensors[name] = masked


def _fits(given: Any, site: ConvSite) -> bool:
    """Tell whether a tensor can be a site's weight; where it cannot, torch reports it."""
    return isinstance(given, Tensor) and given.is_floating_point() and tuple(given.shape) == site.weight_shape


def _like_own(loading: Loading, site: ConvSite, given: Tensor) -> Tensor:
    """Return a weight in the dtype, and on the device, that the graph will have it in."""
    own = _own_weight(loading.gm, site)
    if own is None:
        own = sites.attribute(loading.gm, site.packed_names[0])
    if loading.assign:
        return given.detach()
    return given.detach().to(own.dtype) if own.is_meta else given.detach().to(own.device, own.dtype)


def _packed_in(loading: Loading, site: ConvSite) -> tuple[Tensor, ...] | None:
    """Return the packed weight that a checkpoint has for a site, on the CPU and validated where it is another one."""
    names = site.packed_names
    absent = [name for name in names if name not in loading.tensors]
    if absent:
        if len(absent) < len(names):
            loading.report_missing(absent)
        return None
    four = tuple(loading.tensors[name] for name in names)
    own = tuple(sites.attribute(loading.gm, name) for name in names)
    if not all(isinstance(tensor, Tensor) and tensor.layout == torch.strided for tensor in four):
        raise _unusable(loading, site, "they are no dense tensors")
    if _same_tables(own, four):
        return tuple(tensor.cpu() for tensor in four)
    return _validated(loading, site, four)


def _same_tables(own: tuple[Tensor, ...], four: tuple[Tensor, ...]) -> bool:
    """Tell whether a checkpoint's packed weight has the graph's own tables, with as many values."""
    tables = zip(own[1:], four[1:], strict=True)
    return four[0].shape == own[0].shape and all(not a.is_meta and _identical(a, b.to(a.device)) for a, b in tables)


def _validated(loading: Loading, site: ConvSite, four: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    values, *tables = (tensor.detach().cpu().contiguous() for tensor in four)
    if values.dim() != 1 or not values.is_floating_point():
        raise _unusable(loading, site, f"the values are {values.dtype} {tuple(values.shape)}")
    try:
        torch.ops.fxsparse.validate(*tables, values.numel(), list(site.weight_shape), site.groups)
    except RuntimeError as error:
        raise _unusable(loading, site, str(error).splitlines()[0]) from error
    return (values, *tables)


def _unusable(loading: Loading, site: ConvSite, why: str) -> FxsparseError:
    return FxsparseError(
        f"The checkpoint's packed weight of '{loading.prefix}{site.packed}' cannot be used: {why}. Load a dense "
        "checkpoint of the original model, or the state_dict of a model that was converted from it."
    )


def _kept(loading: Loading, site: ConvSite, *, packed_only: bool) -> Tensor | None:
    """Return the mask to load under; None where nothing is pruned, or nothing can say what is.

    Raises:
        FxsparseError: the checkpoint's mask is another one.
    """
    if site.mask is None:
        return _kept_by_frozen(loading, site) if site.frozen and not packed_only else None
    own: Tensor = sites.attribute(loading.gm, site.mask)
    theirs = loading.tensors.get(site.mask, own)
    if own.is_meta or bool(own.all()):
        if theirs is own:
            raise _no_content(loading, site.mask)
        own = theirs
    if not isinstance(theirs, Tensor) or theirs.dtype != torch.bool or tuple(theirs.shape) != site.weight_shape:
        raise _other_masks(loading, site.mask)
    if not torch.equal(theirs.to(own.device), own):
        raise _other_masks(loading, site.mask)
    loading.tensors[site.mask] = theirs
    return own


def _no_content(loading: Loading, name: str) -> FxsparseError:
    return FxsparseError(
        f"'{loading.prefix}{name}' has no content: the model was on the meta device. Load the state_dict of a "
        "converted model first (with assign=True while it is there); a dense checkpoint has neither masks nor tables."
    )


def _other_masks(loading: Loading, name: str) -> FxsparseError:
    return FxsparseError(
        f"The checkpoint is that of a model under other masks: its '{loading.prefix}{name}' differs. Convert the "
        "original model under those masks, or load its dense checkpoint here: what the masks here prune becomes zero."
    )


def _kept_by_frozen(loading: Loading, site: ConvSite) -> Tensor | None:
    """Return where a frozen site, which has no mask any more, has weights that are not zero."""
    weight = _own_weight(loading.gm, site)
    if weight is None:
        own = tuple(sites.attribute(loading.gm, name) for name in site.packed_names)
        if is_lost(own[3]):
            return None
        weight = torch.ops.fxsparse.unpack(*own, list(site.weight_shape))
    return None if weight.is_meta else weight != 0


def masked_weight(loading: Loading, name: str, weight: Tensor, kept: Tensor) -> Tensor:
    """Return a weight with exact zeros where it is pruned: the same tensor where it has them already."""
    kept = kept.to(weight.device)
    pruned = weight[~kept]
    lost = pruned != 0
    if not bool(lost.any()):
        return weight
    norm, total = (float(torch.linalg.vector_norm(v.double())) for v in (pruned, weight))
    loading.dropped[name] = (int(lost.sum()), norm, total)
    return weight.masked_fill(~kept, 0)


def _repack(loading: Loading, site: ConvSite, weight: Tensor, theirs: tuple[Tensor, ...] | None) -> None:
    """Put a site's packed weight into the state dict: its own tables, and the values that the weight gives."""
    names = site.packed_names
    values, *tables = (sites.attribute(loading.gm, name) for name in names)
    count = values.numel()
    if lost := is_lost(tables[2]):
        if theirs is None:
            raise _no_content(loading, names[3])
        count, tables = theirs[0].numel(), list(theirs[1:])
    tables = [table.to(weight.device) for table in tables]
    packed = torch.ops.fxsparse.repack(weight.contiguous(), *tables, count)
    if lost or theirs is not None:
        unpacked = torch.ops.fxsparse.unpack(packed, *tables, list(site.weight_shape))
        if bool(((unpacked != weight) & ~weight.isnan()).any()):
            raise _other_masks(loading, names[3])
    for name, tensor in zip(names, (packed, *tables), strict=True):
        found = loading.tensors.get(name)
        # The checkpoint's own tensor where it is the same: with assign=True it may be in memory that others share.
        if not (isinstance(found, Tensor) and _identical(found, tensor)):
            loading.tensors[name] = tensor


def _identical(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


def _warn(loading: Loading) -> None:
    if not loading.dropped:
        return
    counts, norms, totals = zip(*loading.dropped.values(), strict=True)
    share = sum(n * n for n in norms) ** 0.5 / sum(t * t for t in totals) ** 0.5
    names = [f"'{loading.prefix}{name}'" for name in loading.dropped]
    warnings.warn(
        f"The checkpoint has {sum(counts)} weights that are not zero where the masks prune, with {share:.3%} of the "
        f"norm of their tensors ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''}). They were set to zero. "
        "To keep them, convert the model again under the masks of this checkpoint.",
        UserWarning,
        stacklevel=2,
    )
