"""What a user can give in `torch.compile(model, backend="fxsparse", options={...})`."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch._dynamo import list_backends, lookup_backend
from torch.fx import GraphModule

from fxsparse.errors import FxsparseError
from fxsparse.settings import Settings

Compiled = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of the backend.

    Attributes:
        masks: as for `fxsparse.convert`, by names of the compiled model; None takes those of `nn.utils.prune`, or else
            the zeros of the weights.
        inner: what compiles the transformed graphs: the name of a backend of torch.compile, or a function as that
            takes it.
        inner_mode: of Inductor, as the `mode` of torch.compile: "reduce-overhead", for example.
        inner_options: for the inner backend: Inductor's configuration, or the `options` of another one.
        settings: of the conversion; `capture` and `fold_batch_norm` mean nothing here.
    """

    masks: Mapping[str, Any] | None = None
    inner: str | Compiled = "inductor"
    inner_mode: str | None = None
    inner_options: Mapping[str, Any] | None = None
    settings: Settings = Settings()

    @classmethod
    def of(cls, given: Any) -> Options:
        """Read what the user gave.

        Raises:
            FxsparseError: an option does not exist, has a wrong type, or does not fit another one.
        """
        given = {} if given is None else given
        if not isinstance(given, Mapping):
            raise FxsparseError(
                f"The options are a {type(given).__name__}. Give a dict, as in options={{'inner': 'eager'}}."
            )
        known = [field.name for field in dataclasses.fields(cls)]
        for name in given:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1)
                hint = f"Did you mean '{near[0]}'? " if near else ""
                raise FxsparseError(
                    f"The backend has no option '{name}'. {hint}Known: {', '.join(f'{k!r}' for k in known)}."
                )
        options = cls(**given)
        options._check()
        return options

    def _check(self) -> None:
        wanted: dict[str, tuple[bool, str]] = {
            "masks": (self.masks is None or isinstance(self.masks, Mapping), "a mapping from names to masks, or None"),
            "inner": (isinstance(self.inner, str) or callable(self.inner), "the name of a backend, or a function"),
            "inner_mode": (self.inner_mode is None or isinstance(self.inner_mode, str), "a mode of Inductor, or None"),
            "inner_options": (self.inner_options is None or isinstance(self.inner_options, Mapping), "a dict, or None"),
            "settings": (isinstance(self.settings, Settings), "a fxsparse.Settings"),
        }
        for name, (fits, what) in wanted.items():
            if not fits:
                raise FxsparseError(f"The option '{name}' is a {type(getattr(self, name)).__name__}. Give {what}.")
        if isinstance(self.inner, str) and self.inner not in _backends():
            raise FxsparseError(
                f"The option 'inner' is '{self.inner}', which is no backend of torch.compile but fxsparse's own or an "
                f"unknown one. Choose one of {', '.join(_backends())}, or give a function."
            )
        if self.inner != "inductor" and self.inner_mode is not None:
            raise FxsparseError(
                f"The option 'inner_mode' is Inductor's, and the inner backend is '{self.inner}'. Leave one out."
            )
        if self.settings.capture != "auto":
            raise FxsparseError(
                f"Settings.capture is '{self.settings.capture}', but under torch.compile Dynamo captures the model. "
                "Leave it at 'auto'."
            )
        if self.inner == "inductor":
            self._inductor_configuration()

    def compile_inner(self, gm: GraphModule, inputs: Sequence[Any]) -> Compiled:
        """Hand a graph to the inner backend."""
        compiled: Compiled
        if self.inner == "inductor":
            compiled = lookup_backend("inductor")(gm, inputs, config_patches=self._inductor_configuration())  # type: ignore[call-arg, arg-type]
        elif self.inner_options is not None:
            compiled = lookup_backend(self.inner)(gm, inputs, options=dict(self.inner_options))  # type: ignore[call-arg, arg-type]
        else:
            compiled = lookup_backend(self.inner)(gm, inputs)  # type: ignore[arg-type]
        return compiled

    def _inductor_configuration(self) -> dict[str, Any]:
        from torch import _inductor  # slow to import, and other inner backends do without
        from torch._inductor import config as inductor_config

        modes = _inductor.list_mode_options()
        if self.inner_mode is not None and self.inner_mode not in modes:
            raise FxsparseError(
                f"The option 'inner_mode' is '{self.inner_mode}', which is no mode of Inductor. Choose one of "
                f"{', '.join(modes)}."
            )
        configuration = {**modes.get(self.inner_mode or "default", {}), **(self.inner_options or {})}
        known = _inductor.list_options()
        for name in configuration:
            if name not in known:
                raise FxsparseError(
                    f"The option 'inner_options' has '{name}', which Inductor does not know. "
                    "torch._inductor.list_options() lists what it does."
                )
        if configuration.get("freezing", inductor_config.freezing):
            raise FxsparseError(
                "Inductor's 'freezing' is on: it keeps copies of the weights, which could not follow the model's. Turn "
                "it off, or freeze a converted model: fxsparse.freeze(fxsparse.convert(model, masks))."
            )
        return configuration


def _backends() -> list[str]:
    return [name for name in list_backends(exclude_tags=()) if name != "fxsparse"]
