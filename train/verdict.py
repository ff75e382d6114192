"""Who keeps a run from going on, in words, from what the ranks say of themselves."""

from dataclasses import dataclass
from pathlib import Path

from .exit_codes import ExitCode

_SHOWN = 4


@dataclass(frozen=True)
class Standing:
    """Where a rank is."""

    rank: int
    host: str
    step: int
    order: int  # of the phase within a step
    phase: str
    seconds: float  # that it has been there
    where: str
    in_collective: bool
    collectives: int  # that it has begun
    last_collective: str

    def words(self) -> str:
        return f"{self.phase}, step {self.step}, for {self.seconds:.0f} s, at {self.where}"


@dataclass(frozen=True)
class Cause:
    """What made the run end: a rank that is `gone`, has `left` or is `late`."""

    rank: int
    host: str
    kind: str
    text: str = ""
    code: int = ExitCode.requeue

    def words(self) -> str:
        who = f"rank {self.rank} ({self.host})"
        if self.kind == "gone":
            return f"{who} is gone: its process was killed or crashed, or its machine cannot be reached"
        if self.kind == "left":
            return f"{who} ended: {self.text}"
        return f"the run hangs: {who} is in {self.text} (raise that where it is only slow)"


def verdict(cause: Cause, standings: list[Standing], *, silent: dict[int, str], world: int, stacks: Path) -> str:
    """One message: what happened, who is behind, where the stacks are and what to do. `silent` ranks (to hosts) did not answer."""
    said = [cause.words()]
    if cause.kind != "left":
        if silent:
            names = _named([(rank, host) for rank, host in sorted(silent.items())])
            said.append(f"no answer from {names}: stopped, or held up inside a library")
        if cause.kind == "late":
            said.append(_blame(standings, world=world))
        said.append(f"the stacks of all threads are in {stacks}")
    if cause.code == ExitCode.requeue:
        said.append("the same command goes on from the last checkpoint")
    return "; ".join(filter(None, said))


def behind(standings: list[Standing]) -> list[Standing]:
    """The ranks for which the others wait: those at the earliest place with the fewest collectives, of these the ones that wait for
    nobody; none where all are alike."""
    earliest = min((standing.step, standing.order) for standing in standings)
    found = [standing for standing in standings if (standing.step, standing.order) == earliest]
    fewest = min(standing.collectives for standing in found)
    found = [standing for standing in found if standing.collectives == fewest]
    busy = [standing for standing in found if not standing.in_collective]
    found = busy or found
    return found if len(found) < len(standings) else []


def _blame(standings: list[Standing], *, world: int) -> str:
    late, first = behind(standings), standings[0]
    if late:
        names = _named([(standing.rank, standing.host) for standing in late])
        other = next(standing for standing in standings if standing not in late)
        return (
            f"behind is {names}, in {late[0].words()}; others wait for it, such as rank {other.rank} in {other.words()}"
        )
    if world > len(standings) or world == 1:
        return f"rank {first.rank} is in {first.words()}"
    for other in standings[1:]:
        if other.last_collective != first.last_collective:
            return (
                f"ranks went different ways: rank {first.rank} is in {first.words()} ({first.last_collective}), "
                f"rank {other.rank} in {other.words()} ({other.last_collective})"
            )
    return f"none of the ranks is alone behind, all are in {first.words()}"


def _named(ranks: list[tuple[int, str]]) -> str:
    shown = ", ".join(f"rank {rank} ({host})" for rank, host in ranks[:_SHOWN])
    return shown + (f" and {len(ranks) - _SHOWN} more" if len(ranks) > _SHOWN else "")
