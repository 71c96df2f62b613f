"""The zoos' models with random weights, made so that an error anywhere shows in the output.

A network as it is initialised hides errors: layer scales of 1e-6 and last norms of zero silence whole
branches, and after pruning the signal dies out within a few layers. `prepare` draws such parameters anew
and gives every convolution an output of unit scale.
"""

from __future__ import annotations

import fnmatch
import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

from fxsparse.output_agreement import forget_caches

SIZES = (64, 96, 128, 160, 192, 224, 256)
DENSITY = 0.1
FAMILIES = ("torchvision", "timm")
# What a model of torchvision needs to be built fast (no slow initialisation) and to take small images.
_OPTIONS: dict[str, dict[str, Any]] = {
    "googlenet": {"init_weights": False},
    "inception_v3": {"init_weights": False},
    "vit_b_16": {"image_size": 64},
    "vit_b_32": {"image_size": 64},
    "vit_l_16": {"image_size": 64},
    "vit_l_32": {"image_size": 64},
    "vit_h_14": {"image_size": 56},
}
# Fixed, and varied: no two from one family unless they differ in how they call a convolution.
_TIMM = """
resnet26d resnext26ts seresnext26d_32x4d ecaresnet26t skresnet18 res2net50_26w_4s resnest14d resnetv2_50
resnetv2_50x1_bit resnetaa50 nf_resnet26 eca_nfnet_l0 nf_regnet_b1 regnetx_002 regnety_004 regnetz_b16
efficientnet_lite0 efficientnet_es tf_efficientnet_b0 tf_efficientnetv2_b0 tf_mixnet_s mobilenetv2_100
mobilenetv3_small_100 mobilenetv4_conv_small convnext_atto convnextv2_atto densenetblur121d dla34
hrnet_w18_small inception_v4 inception_next_atto legacy_xception ese_vovnet19b_dw cspdarknet53
ghostnet_100 hardcorenas_a repvgg_a0 selecsls42b legacy_seresnet18 gernet_s dpn68 rexnet_100 tinynet_e
fbnetc_100 mnasnet_small lcnet_050 edgenext_xx_small fastvit_t8 mobileone_s0 efficientvit_b0
"""
TIMM = tuple(_TIMM.split())


def names(family: str | None = None, only: str = "*") -> list[tuple[str, str]]:
    """Return (family, name) of the zoo's models, filtered by a glob."""
    found: list[tuple[str, str]] = []
    for each in FAMILIES if family is None else (family,):
        if not installed(each):
            continue
        if each == "timm":
            listed = list(TIMM)
        else:
            import torchvision

            listed = torchvision.models.list_models(module=torchvision.models)
        found += [(each, name) for name in listed if fnmatch.fnmatchcase(name, only)]
    return found


def installed(family: str) -> bool:
    """Tell whether the package of a family is there."""
    return importlib.util.find_spec(family) is not None


def build(family: str, name: str) -> nn.Module:
    """Build a model in eval mode, with the weights it is initialised with under seed 0."""
    torch.manual_seed(0)
    if family == "timm":
        import timm

        model = timm.create_model(name, pretrained=False)
    else:
        import torchvision

        model = torchvision.models.get_model(name, weights=None, **_OPTIONS.get(name, {}))
    return model.eval()


def smallest_input(model: nn.Module, batch: int) -> Tensor:
    """Return a random input of the smallest of `SIZES` that the model accepts (or was built for).

    Raises:
        RuntimeError: it accepts none of them; the message has the last error.
    """
    fixed = getattr(model, "image_size", None)  # torchvision's ViT
    last: Exception | None = None
    for size in (fixed,) if isinstance(fixed, int) else SIZES:
        x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(size))
        try:
            with torch.no_grad():
                model(x[:1])
        except Exception as error:  # whatever the model's own code raises on a size that it does not take
            last = error
        else:
            return x
    raise RuntimeError(f"The model accepts no input of {SIZES} pixels: {type(last).__name__}: {last}")


def prepare(model: nn.Module, masks: dict[str, Tensor], x: Tensor, seed: int = 0) -> None:
    """Make a freshly built model the masked dense model, in place, with weights that hide nothing.

    Args:
        model: in eval mode.
        masks: bool, by the name of the convolution.
        x: an input, to measure the scales on.
        seed: of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        _randomise(model, generator)
        apply_masks(model, masks)
        forget_caches(model)
        _unit_scale(model, x)
        forget_caches(model)


def fill_pruned(model: nn.Module, masks: dict[str, Tensor], seed: int = 0) -> None:
    """Put noise where the masks prune, in place: a conversion that forgets a mask then shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, mask in masks.items():
            weight = model.get_parameter(f"{name}.weight")
            noise = torch.empty(int((~mask).sum())).normal_(0, float(weight.abs().max()), generator=generator)
            weight[~mask] = noise.to(weight.dtype)
    forget_caches(model)


def apply_masks(model: nn.Module, masks: dict[str, Tensor]) -> None:
    """Zero the pruned weights, in place."""
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(f"{name}.weight").masked_fill_(~mask, 0)


def _randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Draw anew what initialisation leaves constant."""
    for name, parameter in model.named_parameters():
        flat = parameter.flatten()
        if flat.numel() and bool((flat == flat[0]).all()):
            if name.endswith("bias"):
                parameter.normal_(0, 0.1, generator=generator)
            else:
                parameter.uniform_(0.5, 1.5, generator=generator)
    for module in model.modules():
        mean, var = getattr(module, "running_mean", None), getattr(module, "running_var", None)
        if isinstance(mean, Tensor) and isinstance(var, Tensor):
            mean.normal_(0, 0.1, generator=generator)
            var.uniform_(0.5, 1.5, generator=generator)


def _unit_scale(model: nn.Module, x: Tensor) -> None:
    """Divide each convolution's weight and bias by its output's deviation, in the order they run."""

    def rescale(conv: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        scale = float(output.std()) if output.numel() > 1 else 1.0
        if not 1e-20 < scale < 1e20:
            return None
        for parameter in conv.parameters(recurse=False):
            parameter.div_(scale)
        again: Tensor = conv.forward(*inputs)  # a standardised weight takes no notice of its scale
        return again

    hooks = [m.register_forward_hook(rescale) for m in model.modules() if isinstance(m, nn.Conv2d)]
    model(x)
    for hook in hooks:
        hook.remove()
