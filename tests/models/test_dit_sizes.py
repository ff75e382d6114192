"""The public sizes: every YAML file of a Wan model builds, on meta tensors, the tensors that diffusers' class has for it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from muybridge.models.dit import DiT, DiTConfig

diffusers = pytest.importorskip("diffusers", reason="the oracle, diffusers, is not installed")

FOLDER = Path(__file__).parents[2] / "configs" / "model"


@dataclass(frozen=True)
class PublicModel:
    """What is published of a model, apart from our files."""

    channels: tuple[int, int]  # of the input and of the velocity
    layers: int
    heads: int
    ffn_dim: int
    parameters: int
    tensors: int
    image_dim: int | None = None
    image_rows: int | None = None

    def to_diffusers(self) -> dict[str, Any]:
        """Keyword arguments of diffusers' class; what is the same in all of them is its default."""
        return {
            "in_channels": self.channels[0],
            "out_channels": self.channels[1],
            "num_layers": self.layers,
            "num_attention_heads": self.heads,
            "ffn_dim": self.ffn_dim,
            "image_dim": self.image_dim,
            "added_kv_proj_dim": None if self.image_dim is None else 128 * self.heads,
            "pos_embed_seq_len": self.image_rows,
        }


MODELS = {
    "wan_1_3b": PublicModel((16, 16), 30, 12, 8960, 1_418_996_800, 825),
    "wan_14b": PublicModel((16, 16), 40, 40, 13824, 14_288_491_584, 1095),
    "wan_i2v_14b": PublicModel((36, 16), 40, 40, 13824, 16_394_878_784, 1303, image_dim=1280),
    "wan2_2_5b": PublicModel((48, 48), 30, 24, 14336, 4_999_787_712, 825),
    "wan2_2_a14b": PublicModel((16, 16), 40, 40, 13824, 14_288_491_584, 1095),
    "wan2_2_i2v_a14b": PublicModel((36, 16), 40, 40, 13824, 14_288_901_184, 1095),
}
# Wan 2.1 FLF2V-14B, from the settings of I2V.
OVERRIDES: dict[str, dict[str, Any]] = {"wan_i2v_14b pos_embed_seq_len=514": {"pos_embed_seq_len": 514}}
MODELS["wan_i2v_14b pos_embed_seq_len=514"] = PublicModel(
    (36, 16), 40, 40, 13824, 16_394_878_784 + 514 * 1280, 1304, image_dim=1280, image_rows=514
)


def read(name: str) -> DiTConfig:
    return DiTConfig(**yaml.safe_load((FOLDER / f"{name.split()[0]}.yaml").read_text()) | OVERRIDES.get(name, {}))


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", MODELS)
def test_the_tensors_of_a_public_model_are_those_of_diffusers(name: str) -> None:
    public = MODELS[name]
    with torch.device("meta"):
        ours = DiT(read(name))
        theirs = diffusers.WanTransformer3DModel(**public.to_diffusers())
    assert shapes(ours) == shapes(theirs)
    assert len(shapes(ours)) == public.tensors
    assert sum(parameter.numel() for parameter in ours.parameters()) == public.parameters


@pytest.mark.parametrize("name", MODELS)
def test_the_config_of_a_public_model_moves_both_ways(name: str) -> None:
    config = read(name)
    assert config.faults("model") == []
    with torch.device("meta"):
        theirs = diffusers.WanTransformer3DModel(**MODELS[name].to_diffusers() | {"num_layers": 1})
    written = {key: value for key, value in theirs.config.items() if not key.startswith("_")} | {
        "num_layers": config.num_layers
    }
    ours = config.to_diffusers()
    assert {key: ours[key] for key in written} == written | {"patch_size": [1, 2, 2]}
    read_back = DiTConfig.from_diffusers(dict(written))
    assert read_back == config


def test_every_wan_file_is_checked() -> None:
    assert {path.stem for path in FOLDER.glob("wan*.yaml")} == {name.split()[0] for name in MODELS}
