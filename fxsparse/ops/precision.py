"""In which precision convolutions of float32 compute on CUDA: torch's own setting holds for ours too."""

from __future__ import annotations

import torch


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def convs_allow_tf32() -> bool:
    """Tell whether torch lets convolutions on CUDA round float32 factors to TF32, as it does by default.

    `torch.backends.cudnn.allow_tf32 = False` turns it off. Calls that `torch.compile` or `torch.export` trace keep what
    was set then.
    """
    # Not cudnn.allow_tf32, which raises once somebody has used the newer name.
    setting: str = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    return setting == "tf32"
