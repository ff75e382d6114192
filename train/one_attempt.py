"""One attempt at a run, from the start of its processes to their exit: alone in its directory, watched, and in the run's diary."""

from pathlib import Path

import torch.distributed as dist

from ..data.index import MANIFEST_NAME
from .attempts import Attempts, code_fingerprint, no_progress_message
from .compose import plain
from .config import TrainConfig
from .life import Asked, tell_end
from .ranks import on_rank_0
from .run_lock import RunLock
from .watchdog import Watchdog


class NoProgress(RuntimeError):
    """Several attempts in a row ended without a new checkpoint."""


class OneAttempt:
    """What surrounds the trainer. Raises RunIsLocked and NoProgress, on every rank; its making is collective."""

    def __init__(self, config: TrainConfig) -> None:
        run_dir = Path(config.run_dir)
        self.step = 0  # which the loop has reached
        self.shape_name = ""  # of the clips it works on
        self._ended = False
        self._resume = config.resume
        # What decides about the run; where a copy of it lies, and whether it may be tried again, does not.
        settings = {name: value for name, value in plain(config).items() if name not in ("run_dir", "restart_limit")}
        datasets = [source.path for source in config.training_data().sources().values() if source.path]
        manifests = [Path(path) / MANIFEST_NAME for path in datasets]
        world = dist.get_world_size()
        self._code = on_rank_0(lambda: code_fingerprint(settings, world_size=world, manifests=manifests))
        self.lock = RunLock(run_dir)
        self.lock.acquire()
        self.diary: Attempts | None = None
        try:
            message = on_rank_0(lambda: no_progress_message(run_dir, self._code, config.restart_limit))
            if message:
                raise NoProgress(message)
            self.number = on_rank_0(lambda: self._open_diary(run_dir))
            stacks = run_dir / "stacks" / f"attempt-{self.number}"
            self.watchdog = Watchdog(config.watchdog, stacks, on_end=self._end_of_the_watchdog)
        except BaseException:
            self.lock.release()
            raise

    def _open_diary(self, run_dir: Path) -> int:
        self.diary = Attempts(run_dir)
        self.diary.start(world_size=dist.get_world_size(), code=self._code)
        return self.diary.number

    def start(self, step: int, checkpoint: Path | None) -> None:
        """Where the attempt begins: at a checkpoint, or from nothing."""
        self.step = step
        if self.diary is not None:
            self.diary.begin(step, checkpoint, resume=self._resume)

    def end(self, code: int, cause: str, *, asked: Asked, failed_probe: bool = False) -> None:
        """Write down how it ended, and leave the directory to the next. With a cause, the other ranks end as well."""
        if self._ended:
            return
        self._ended = True
        self.watchdog.stop(cause, code)
        self._tell(code, cause, asked, failed_probe=failed_probe)

    def _end_of_the_watchdog(self, text: str, code: int) -> None:
        self._tell(code, text, Asked.nobody)

    def _tell(self, code: int, cause: str, asked: Asked, *, failed_probe: bool = False) -> None:
        if self.diary is not None:
            excuses = {"on_request": asked is not Asked.nobody, "failed_probe": failed_probe}
            self.diary.end(step=self.step, exit_code=code, cause=cause, **excuses)
            # The script begins the next life once it has read this: the directory must be free by then.
            self.lock.release()
            stopped = "" if asked is Asked.nobody else f"stopped at step {self.step}"
            tell_end(code, asked, cause or stopped)
