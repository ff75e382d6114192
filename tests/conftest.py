"""What tests of several folders share: commands in processes of their own, and inputs that are made once for the whole suite."""

import contextlib
import fcntl
import importlib
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from muybridge.tests.faults.fork_server import ForkServer
from muybridge.tests.patience import PATIENCE

# Before any other package looks for one called `kernels`, see there.
importlib.import_module("muybridge")

Command = Callable[..., subprocess.CompletedProcess[str]]
Once = Callable[[str, Callable[[Path], object]], Path]
SaveRun = Callable[[Path, list[str]], Path]

# A diffusion transformer of one small layer, whose start takes longer than a hundred of its steps.
TINY = [
    *("data=shapes", "data.access=latents", "objective=uniform"),
    *("model.num_layers=1", "model.dim=32", "model.num_attention_heads=2", "model.ffn_dim=64", "model.freq_dim=32"),
    *("model.patch_size=[1,2,2]", "model.text_dim=32", "text.dim=32", "text.num_heads=2"),
    *("steps=20", "global_batch=8", "micro_batch=4", "threads=1", "tracking.wandb=off", "tracking.log_every_steps=1"),
    *("optimizer.lr=1e-3", "optimizer.schedule=constant", "optimizer.warmup_steps=5"),
]


def pytest_configure(config: pytest.Config) -> None:
    # Before pytest-timeout reads it. What a module's tests share is made within the time of the first: minutes, on a slow machine.
    if config.getoption("timeout", 0) is None and "PYTEST_TIMEOUT" not in os.environ:
        config.option.timeout = PATIENCE * float(config.getini("timeout"))


# Files of a minute and more, so that none of them is alone at the end. The first takes longest and waits most of the time.
LONG = [
    *(
        "slurm/test_training.py",
        "scripts/test_quickstart.py",
        "train/test_engine.py",
        "train/test_deepspeed_contract.py",
    ),
    *("end_to_end/test_training.py", "kernels/test_interpreted.py", "slurm/test_submit_refusals.py"),
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get("/".join(item.path.parts[-2:]), len(LONG)))


@pytest.fixture(autouse=True)
def unhurried() -> Iterator[None]:
    """No test leaves the process with a priority that all later ones and their children would have (`usual_priority`)."""
    before = os.sched_getscheduler(0)
    yield
    assert os.sched_getscheduler(0) == before


@pytest.fixture(autouse=True)
def no_listener_left() -> Iterator[None]:
    """No test leaves a tracker open, which would print what all later tests log."""
    yield
    assert logging.getLogger("muybridge").handlers == []


@pytest.fixture(scope="session", autouse=True)
def user_cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder that stands for the user's caches, of which nothing is read or written."""
    os.environ["MUYBRIDGE_CACHE"] = folder = str(tmp_path_factory.mktemp("user_cache"))
    return folder


@pytest.fixture(scope="session", autouse=True)
def composed_once() -> Iterator[None]:
    """Hydra reads and merges the same YAML files once in this process, which is half of the time that loading settings takes."""
    from muybridge.train import compose

    @cache
    def merge(name: str, overrides: tuple[str, ...]) -> object:
        return compose_files(name, overrides=list(overrides))

    compose_files = compose.compose
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compose, "compose", lambda name, *, overrides: deepcopy(merge(name, tuple(overrides))))
        yield


@pytest.fixture(scope="session")
def command_env(user_cache: str) -> dict[str, str]:
    """The environment of a command: nothing of the test runner's, one thread, no network."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "MUYBRIDGE_"))}
    quiet = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"}
    quiet["MUYBRIDGE_CACHE"] = user_cache
    return {**kept, **quiet, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


@pytest.fixture(scope="session")
def launcher() -> Callable[[int], list[str]]:
    """The start of a command line that runs a program in N processes."""

    def start(processes: int) -> list[str]:
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]

    return start


@pytest.fixture(scope="session")
def server(command_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """The fork server of this worker, which takes some seconds to start; what it forks saves them."""
    server = ForkServer(command_env, tmp_path_factory.mktemp("cases"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def launch(server: ForkServer) -> Command:
    """Runs a program's FILE ARGUMENTS to its end: in N processes as torchrun does, or by itself for N=0.

    A non-zero exit is an answer, not an error.
    """

    def run(processes: int, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        program, *rest = map(str, arguments)
        return server.command(program, *rest, processes=processes)

    return run


@pytest.fixture(scope="session")
def muybridge(server: ForkServer) -> Command:
    """Runs `muybridge ARGUMENTS` to its end; a non-zero exit is an answer, not an error."""
    return lambda *arguments: server.command("muybridge.scripts.cli", *map(str, arguments))


@pytest.fixture(scope="session")
def make_once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """Calls a maker with an empty folder, once in the whole suite however many workers ask, and returns the folder."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has a folder of its own below the common one
        shared = shared.parent

    def make(name: str, maker: Callable[[Path], object]) -> Path:
        folder, finished = shared / f"once_{name}", shared / f"once_{name}.done"
        with open(shared / f"once_{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not finished.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                maker(folder)
                finished.touch()
        return folder

    return make


@pytest.fixture(scope="session")
def toy_folder(make_once: Once) -> Path:
    """24 synthetic clips (`shards`), an autoencoder with random weights (`vae`) and its latents (`latents`)."""
    from muybridge.scripts.toy_inputs import make_toy_inputs

    def make(folder: Path) -> None:
        with contextlib.redirect_stdout(None):
            make_toy_inputs(folder, clips=24)

    return make_once("toy_inputs", make)


@pytest.fixture(scope="session")
def tiny_run(toy_folder: Path) -> list[str]:
    """Settings of a run that takes seconds, all but its run_dir."""
    return [
        *TINY,
        f"vae.path={toy_folder / 'vae'}",
        f"data.path={toy_folder / 'shards' / 'train'}",
        f"data.latents={toy_folder / 'latents'}",
    ]


@pytest.fixture(scope="session")
def save_random_run() -> SaveRun:
    """Makes a run directory of settings and one checkpoint: random weights, none zero, and averages, the first of half their size,
    the next of a quarter, and so on."""
    from muybridge.tests.train.checkpoint_parts import fake_one_rank, save_at_once
    from muybridge.train.compose import plain
    from muybridge.train.config import load_train_config
    from muybridge.train.ema import average_name
    from muybridge.train.flat_shards import FlatShard, Fragment
    from muybridge.train.tasks import TextToVideoTask
    from muybridge.train.trained_weights import prepare_weights

    def save(run_dir: Path, overrides: list[str]) -> Path:
        config = load_train_config([*overrides, f"run_dir={run_dir}", "deepspeed=zero0"])
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.yaml").write_text(yaml.safe_dump(plain(config)))
        torch.manual_seed(config.seed)
        model = TextToVideoTask(config, torch.device("cpu")).build_model()
        lora = prepare_weights(model, config, None)  # freezes what is not trained
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        weights = {name: torch.randn_like(parameter) * 0.2 for name, parameter in trained.items()}
        engine = SimpleNamespace(
            config=config.deepspeed,
            parameter_shapes={name: weight.shape for name, weight in weights.items()},
            shards=[FlatShard(weight, [Fragment(name, 0, weight.numel(), 0)], {}) for name, weight in weights.items()],
            optimizer_step_count=lambda: 0.0,
        )
        with pytest.MonkeyPatch.context() as patch:
            fake_one_rank(patch)
            average = SimpleNamespace(
                averages={
                    average_name(decay): [0.5**number * weight.flatten() for weight in weights.values()]
                    for number, decay in enumerate(config.ema.decays, start=1)
                }
            )
            save_at_once(run_dir / "checkpoints", step=4, engine=engine, ema=average, run_state={"lora": lora})
        return run_dir

    return save


@pytest.fixture(scope="session")
def tiny_umt5(make_once: Once) -> Path:
    """A folder as diffusers writes it, with a umT5 of random weights, 32 wide, and a word tokenizer."""
    transformers = pytest.importorskip("transformers", reason="the extra `text` is not installed")
    tokenizers = pytest.importorskip("tokenizers", reason="the extra `text` is not installed")

    def make(folder: Path) -> None:
        torch.manual_seed(0)
        config = transformers.UMT5Config(
            vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4, feed_forward_proj="gated-gelu"
        )
        transformers.UMT5EncoderModel(config).save_pretrained(folder / "text_encoder")
        words = "a red green circle square moves to the left & < quotes".split()
        vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
        backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
        backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        end = [("</s>", 1)]
        backend.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=end)
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
        ).save_pretrained(folder / "tokenizer")

    return make_once("tiny_umt5", make)
