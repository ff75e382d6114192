"""`scheduler/scheduler_config.json` of a pipeline folder: what other tools sample with, written and read."""

from collections.abc import Mapping
from dataclasses import replace

from .noise_schedule import TIMESTEPS
from .samplers import SamplerConfig, SamplerKind

UNIPC_CLASS = "UniPCMultistepScheduler"
EULER_CLASS = "FlowMatchEulerDiscreteScheduler"

# Both classes: (needed value, diffusers' value where the file does not say).
_COMMON: dict[str, tuple[object, object]] = {
    "num_train_timesteps": (int(TIMESTEPS), 1000),
    "use_dynamic_shifting": (False, False),
    "shift_terminal": (None, None),
    "use_karras_sigmas": (False, False),
    "use_exponential_sigmas": (False, False),
    "use_beta_sigmas": (False, False),
}
_UNIPC: dict[str, tuple[object, object]] = {
    "prediction_type": ("flow_prediction", "epsilon"),
    "use_flow_sigmas": (True, False),
    "solver_order": (2, 2),
    "solver_type": ("bh2", "bh2"),
    "predict_x0": (True, True),
    "lower_order_final": (True, True),
    "final_sigmas_type": ("zero", "zero"),
    "disable_corrector": ([], []),
    "thresholding": (False, False),
    "solver_p": (None, None),
}
_EULER: dict[str, tuple[object, object]] = {
    "invert_sigmas": (False, False),
    "stochastic_sampling": (False, False),
}


def scheduler_config(config: SamplerConfig) -> dict[str, object]:
    """The contents of scheduler_config.json: UniPC with the shift of `config`, as the published Wan folders have it.

    The file has no word for `config.kind` and `config.steps`. The shift stands there under the names of two classes, because some
    tools load the file with FlowMatchEulerDiscreteScheduler, which reads `shift` alone.
    """
    settings = {name: needed for name, (needed, _) in (_COMMON | _UNIPC).items()}
    return {"_class_name": UNIPC_CLASS, **settings, "flow_shift": config.shift, "shift": config.shift}


def sampler_from_file(file: Mapping[str, object], base: SamplerConfig | None = None) -> SamplerConfig:
    """`base`, or the defaults, with kind and shift of a scheduler_config.json: `unipc` for UniPC, `euler` for FlowMatchEuler.

    Raises ValueError naming field, value and rule where the file asks for what no sampler here does.
    """
    class_name = file.get("_class_name")
    if class_name == UNIPC_CLASS:
        kind, shift_name, settings = SamplerKind.unipc, "flow_shift", _COMMON | _UNIPC
    elif class_name == EULER_CLASS:
        kind, shift_name, settings = SamplerKind.euler, "shift", _COMMON | _EULER
    else:
        raise ValueError(f"scheduler_config.json: _class_name={class_name!r} must be {UNIPC_CLASS} or {EULER_CLASS}")
    found = [
        f"{name}={file.get(name, default)!r} must be {needed!r}"
        for name, (needed, default) in settings.items()
        if file.get(name, default) != needed
    ]
    shift = file.get(shift_name, 1.0)
    if isinstance(shift, bool) or not isinstance(shift, int | float) or shift <= 0:
        found.append(f"{shift_name}={shift!r} must be a number greater than 0")
    if found:
        raise ValueError("scheduler_config.json: " + "; ".join(found))
    assert isinstance(shift, int | float)
    return replace(base or SamplerConfig(), kind=kind, shift=float(shift))
