"""The dense engines of the CPU that pruned networks are measured against, each as a callable without arguments.

All run in float32 and on as many threads as torch has now. The model comes with its batch norms folded; what an engine
fuses, packs and chooses besides is its own business, and happens before it is timed. Inputs and outputs are torch's own
memory: nothing is copied on the way in or out.

An engine's threads should not spin on when the next one is timed. Those of onnxruntime are told so; what the others
spin on for is short, and samples of several calls make it small (`cpu.py`).
"""

from __future__ import annotations

import importlib
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fxsparse.arms import Arm, compiled_or_reason, dense_arms
from fxsparse.inputs import ExampleInputs

INSTALL = "pip install 'fxsparse[benchmarks]'"
_OPSET = 18
_COMPILE_LIMIT_S = 600


def engine_arms(model: nn.Module, x: Tensor, *, compiled: bool = True) -> tuple[dict[str, Arm], dict[str, str]]:
    """Build a model for every engine that is there.

    Args:
        model: in eval mode, its batch norms folded.
        x: the input of every call.
        compiled: whether to build torch.compile's, which takes long.

    Returns:
        By engine, what to call in inference mode (it returns a tensor, which the next call may overwrite); and by
        engine, a sentence that says why it is not there.
    """
    inputs = ExampleInputs((x,), {})
    eager = dense_arms(model, inputs)
    arms: dict[str, Arm] = {name.removeprefix("dense "): arm for name, arm in eager.items()}
    reasons: dict[str, str] = {}
    if compiled:
        arm, reasons["compiled"] = compiled_or_reason(model, inputs, _COMPILE_LIMIT_S)
        if arm is not None:
            arms["compiled"] = arm
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        for name, build in {"onnxruntime": onnxruntime_arm, "openvino": openvino_arm}.items():
            arm, reasons[name] = _arm_or_reason(name, build, model, x, path)
            if arm is not None:
                arms[name] = arm
    return arms, {name: reason for name, reason in reasons.items() if reason}


def export_onnx(model: nn.Module, x: Tensor, path: Path) -> None:
    """Write a model as an ONNX file of fixed shapes, with its weights in it; what torch raises is not caught."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (x,), path, dynamo=True, opset_version=_OPSET, external_data=False, verbose=False, optimize=True
        )


def onnxruntime_arm(path: Path, x: Tensor, out: Tensor) -> Arm:
    """Load an ONNX file in onnxruntime, with all its optimizations.

    Args:
        path: of the file.
        x: the input of every call, contiguous.
        out: where every call writes; the arm returns it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    # Its threads spin while a call runs, as they do by default, but not into the call of the engine that comes next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    source, target = session.get_inputs()[0].name, session.get_outputs()[0].name
    binding.bind_input(source, "cpu", 0, np.float32, tuple(x.shape), x.data_ptr())
    binding.bind_output(target, "cpu", 0, np.float32, tuple(out.shape), out.data_ptr())

    def arm(alive: Tensor = x) -> Tensor:  # the binding has only the address of the input
        session.run_with_iobinding(binding)
        return out

    return arm


def openvino_arm(path: Path, x: Tensor, out: Tensor) -> Arm:
    """Load an ONNX file in OpenVINO's CPU plugin, tuned for latency; arguments as of `onnxruntime_arm`."""
    import openvino

    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",  # its default is bfloat16 where the CPU has that
    }
    core = openvino.Core()
    request = core.compile_model(core.read_model(path), "CPU", settings).create_infer_request()
    request.set_input_tensor(openvino.Tensor(x.numpy(), shared_memory=True))
    request.set_output_tensor(openvino.Tensor(out.numpy(), shared_memory=True))

    def arm(alive: Tensor = x) -> Tensor:
        request.infer(share_outputs=True)
        return out

    return arm


def _arm_or_reason(
    name: str, build: Callable[[Path, Tensor, Tensor], Arm], model: nn.Module, x: Tensor, path: Path
) -> tuple[Arm | None, str]:
    """Build an engine's arm from the ONNX file, which the first engine writes; or say why that is not possible."""
    try:
        importlib.import_module(name)  # before an export that nobody would read
        if not path.exists():
            export_onnx(model, x, path)
        with torch.no_grad():
            out = torch.empty_like(model(x), memory_format=torch.contiguous_format)
        return build(path, x.contiguous(), out), ""
    except ImportError as error:
        return None, f"{name} is left out: {error}. Get it with: {INSTALL}"
    except Exception as error:  # whatever an engine raises, the others can be timed without it
        lines = str(error).splitlines() or [""]
        return None, f"{name} is left out: {type(error).__name__}: {lines[0]}"
