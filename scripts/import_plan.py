"""Where the parts of a Wan model lie in what `muybridge import` is given: a release, a pipeline folder or single files."""

from dataclasses import dataclass, field
from pathlib import Path

from ..models.pipeline_folder import PipelineFiles, is_pipeline_folder
from ..models.wan_keys import Component
from ..models.weight_files import read_json, some

# What a release calls the parts beside the transformer.
_RELEASE_VAE = "Wan2*_VAE.*"
_RELEASE_TEXT_ENCODER = "models_t5_*"
_RELEASE_TOKENIZER = Path("google") / "umt5-xxl"
_HIGH_NOISE, _LOW_NOISE = "high_noise_model", "low_noise_model"
_TRANSFORMER_CLASSES = ("WanModel", "WanTransformer3DModel")
_TOKENIZER_FILES = ("tokenizer.json", "spiece.model")


@dataclass
class ImportPlan:
    """The sources of the parts, by the names of their folders in the output."""

    weights: dict[str, Path] = field(default_factory=dict)  # files or model folders
    copies: dict[str, Path] = field(default_factory=dict)  # folders to copy as they are
    # Of a pipeline folder, which says them itself; None: they follow from the transformers' sizes.
    boundary_ratio: float | None = None
    expand_timesteps: bool | None = None


def component_of(part: str) -> Component:
    """What the folder of a part holds."""
    return Component.transformer if part == "transformer_2" else Component(part)


def plan_import(
    source: Path,
    *,
    low_noise: Path | None = None,
    vae: Path | None = None,
    text_encoder: Path | None = None,
    tokenizer: Path | None = None,
) -> ImportPlan:
    """Finds the parts of `source`; the other paths stand in for parts that it lacks, or replace them.

    Raises ValueError for a source that is no Wan model, and naming paths that are missing or do not belong together.
    """
    named = {"--low-noise": low_noise, "--vae": vae, "--text-encoder": text_encoder, "--tokenizer": tokenizer}
    for option, path in {"SRC": source, **named}.items():
        if path is not None and not path.exists():
            raise ValueError(f"{option}={path}: no such file or folder")
    plan = _plan_of(source)
    if low_noise is not None:
        if "transformer_2" in plan.weights:
            raise ValueError(f"--low-noise={low_noise} is for a SRC of one expert; {source} has both")
        plan.weights["transformer_2"] = low_noise
    for part, path in (("vae", vae), ("text_encoder", text_encoder)):
        if path is not None:
            plan.weights[part] = path
    if tokenizer is not None:
        plan.copies["tokenizer"] = tokenizer
    _check_tokenizer(plan)
    return plan


def _plan_of(source: Path) -> ImportPlan:
    if source.is_file():
        return ImportPlan({"transformer": source})
    if is_pipeline_folder(source):
        return _plan_of_pipeline(PipelineFiles.find(source))
    experts = {"transformer": source / _HIGH_NOISE, "transformer_2": source / _LOW_NOISE}
    if any(folder.is_dir() for folder in experts.values()):
        if absent := [folder.name for folder in experts.values() if not folder.is_dir()]:
            raise ValueError(f"{source}: {absent[0]}/ is missing; the two experts make one model")
        return ImportPlan(experts | _release_weights(source), _release_copies(source))
    config = source / "config.json"
    if not config.is_file():
        held = some(sorted(path.name for path in source.iterdir())) or "nothing"
        raise ValueError(
            f"{source} is not a Wan model: it must be a folder of Wan's release (with config.json, or {_HIGH_NOISE}/ and "
            f"{_LOW_NOISE}/), a pipeline folder (with model_index.json) or a weight file; it holds {held}"
        )
    if (class_name := read_json(config).get("_class_name")) not in _TRANSFORMER_CLASSES:
        raise ValueError(f"{config}: _class_name={class_name} must be one of {', '.join(_TRANSFORMER_CLASSES)}")
    return ImportPlan({"transformer": source} | _release_weights(source), _release_copies(source))


def _plan_of_pipeline(files: PipelineFiles) -> ImportPlan:
    weights = {part: getattr(files, part) for part in ("transformer", "transformer_2", "vae", "text_encoder")}
    copies = {part: getattr(files, part) for part in ("tokenizer", "scheduler", "image_encoder", "image_processor")}
    if files.transformer is None:
        raise ValueError(f"{files.root}: model_index.json must name a transformer")
    return ImportPlan(
        {part: path for part, path in weights.items() if path is not None},
        {part: path for part, path in copies.items() if path is not None},
        files.boundary_ratio,
        files.expand_timesteps,
    )


def _release_weights(source: Path) -> dict[str, Path]:
    found = {}
    for part, pattern in (("vae", _RELEASE_VAE), ("text_encoder", _RELEASE_TEXT_ENCODER)):
        paths = sorted(path for path in source.glob(pattern) if path.is_file())
        if len(paths) > 1:
            option = part.replace("_", "-")
            raise ValueError(f"{source} has {some([path.name for path in paths])}: choose one with --{option}")
        if paths:
            found[part] = paths[0]
    return found


def _release_copies(source: Path) -> dict[str, Path]:
    tokenizer = source / _RELEASE_TOKENIZER
    return {"tokenizer": tokenizer} if tokenizer.is_dir() else {}


def _check_tokenizer(plan: ImportPlan) -> None:
    folder = plan.copies.get("tokenizer")
    if folder is None:
        if "text_encoder" in plan.weights:
            raise ValueError(
                f"{plan.weights['text_encoder']} has no tokenizer beside it: give the tokenizer's folder with --tokenizer "
                f"(google/umt5-xxl of the release, or tokenizer/ of a pipeline folder)"
            )
        return
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise ValueError(f"{folder} is no tokenizer: it must hold {' or '.join(_TOKENIZER_FILES)}")
    if not (folder / "tokenizer_config.json").is_file():
        raise ValueError(f"{folder} is no tokenizer: it must hold tokenizer_config.json, which names its class")
