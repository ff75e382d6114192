"""Pipeline folders in the form of diffusers: `model_index.json` beside one folder for each part of a Wan pipeline.

transformer/    the diffusion transformer; where there are two experts, the one of high noise
transformer_2/  the expert of low noise
vae/  text_encoder/  tokenizer/  scheduler/
image_encoder/  image_processor/    Wan 2.1 image to video only
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .weight_files import read_json, write_json

MODEL_INDEX_NAME = "model_index.json"
TEXT_TO_VIDEO, IMAGE_TO_VIDEO = "WanPipeline", "WanImageToVideoPipeline"
# The libraries that diffusers takes a part's class from.
LIBRARIES = {
    "tokenizer": "transformers",
    "text_encoder": "transformers",
    "vae": "diffusers",
    "scheduler": "diffusers",
    "transformer": "diffusers",
    "transformer_2": "diffusers",
    "image_encoder": "transformers",
    "image_processor": "transformers",
}
# Parts that only an image-to-video pipeline names.
IMAGE_PARTS = ("image_encoder", "image_processor")


@dataclass(frozen=True)
class PipelineFiles:
    """The parts of a pipeline folder, None where it has none, and how its experts and timesteps are used."""

    root: Path
    class_name: str  # TEXT_TO_VIDEO or IMAGE_TO_VIDEO
    transformer: Path | None
    transformer_2: Path | None
    vae: Path | None
    text_encoder: Path | None
    tokenizer: Path | None
    scheduler: Path | None
    image_encoder: Path | None
    image_processor: Path | None
    boundary_ratio: float | None  # `transformer` serves timesteps from 1000 x this on; None with one expert
    expand_timesteps: bool  # one timestep a token (Wan 2.2 TI2V)

    @classmethod
    def find(cls, folder: Path | str) -> "PipelineFiles":
        """The parts that model_index.json names.

        Raises ValueError where it is missing or malformed, of another kind of pipeline, or names a part that is not there.
        """
        root = Path(folder)
        index = read_json(root / MODEL_INDEX_NAME)
        where = root / MODEL_INDEX_NAME
        class_name = index.get("_class_name")
        if class_name not in (TEXT_TO_VIDEO, IMAGE_TO_VIDEO):
            raise ValueError(f"{where}: _class_name={class_name} must be {TEXT_TO_VIDEO} or {IMAGE_TO_VIDEO}")
        # A part that a pipeline can do without is left out or [null, null].
        entries = {part: index.get(part) or [None, None] for part in LIBRARIES}
        if faulty := [part for part, entry in entries.items() if not isinstance(entry, list) or len(entry) != 2]:
            raise ValueError(f"{where}: {', '.join(faulty)} must be a library and a class, or [null, null]")
        named = [part for part, (_, class_of_part) in entries.items() if class_of_part is not None]
        if absent := [part for part in named if not (root / part).is_dir()]:
            raise ValueError(f"{where} names {', '.join(absent)}, which must be folders in {root}")
        two_experts = "transformer_2" in named
        if two_experts and ("transformer" not in named or not isinstance(index.get("boundary_ratio"), int | float)):
            raise ValueError(f"{where}: transformer_2 must come with transformer and a boundary_ratio, a number")
        return cls(
            root=root,
            class_name=class_name,
            # Some published folders of one transformer have a boundary all the same; there is nothing to switch to.
            boundary_ratio=float(index["boundary_ratio"]) if two_experts else None,
            expand_timesteps=bool(index.get("expand_timesteps", False)),
            **{part: root / part if part in named else None for part in LIBRARIES},
        )


def is_pipeline_folder(folder: Path | str) -> bool:
    """Whether this is a pipeline folder (and not, say, a run directory)."""
    return (Path(folder) / MODEL_INDEX_NAME).is_file()


def write_model_index(
    folder: Path, *, boundary_ratio: float | None = None, expand_timesteps: bool = False
) -> dict[str, Any]:
    """Write model_index.json from the parts that lie in the folder; returns its contents.

    A transformer that takes more channels than it predicts makes it an image-to-video pipeline. Raises ValueError where there
    is no transformer, where `boundary_ratio` and transformer_2 do not come together, or for a part that does not name its class.
    """
    parts = [part for part in LIBRARIES if (folder / part).is_dir()]
    if "transformer" not in parts:
        raise ValueError(f"{folder} must hold transformer/")
    if (boundary_ratio is None) == ("transformer_2" in parts):
        raise ValueError(f"{folder}: boundary_ratio={boundary_ratio} must be given with transformer_2/, and only then")
    sizes = read_json(folder / "transformer" / "config.json")
    of_images = sizes.get("in_channels") != sizes.get("out_channels") or sizes.get("image_dim") is not None
    index: dict[str, Any] = {
        "_class_name": IMAGE_TO_VIDEO if of_images else TEXT_TO_VIDEO,
        "_diffusers_version": "0.35.0",  # the first that knows two experts and timesteps of tokens
        "boundary_ratio": boundary_ratio,
        "expand_timesteps": expand_timesteps,
    }
    for part, library in LIBRARIES.items():
        if part in parts:
            index[part] = [library, part_class(folder / part)]
        elif of_images or part not in IMAGE_PARTS:
            index[part] = [None, None]
    write_json(folder / MODEL_INDEX_NAME, index)
    return index


def part_class(folder: Path) -> str:
    """The class by which a part's own config says that it is read. Raises ValueError where it says none."""
    # (file, field): of diffusers models, schedulers, transformers models, tokenizers, image processors.
    places = (
        ("config.json", "_class_name"),
        ("scheduler_config.json", "_class_name"),
        ("config.json", "architectures"),
        ("tokenizer_config.json", "tokenizer_class"),
        ("preprocessor_config.json", "image_processor_type"),
    )
    for name, field in places:
        if (folder / name).is_file() and (found := read_json(folder / name).get(field)):
            return str(found[0] if isinstance(found, list) else found)
    raise ValueError(
        f"{folder} does not name its class in any of {', '.join(f'{name} ({key})' for name, key in places)}"
    )
