"""The cases of `muybridge bench steps`, the most telling first, and what each asks of `muybridge bench step`."""

from dataclasses import dataclass, field

MODEL = ["+experiment=wan_1_3b_480p", "deepspeed=zero1"]
_256P = ["data.frames=17", "data.height=256", "data.width=256"]
# Settings of the clips of a step, by name.
SIZES = {
    "480p B=1": ["micro_batch=1", "global_batch=1"],
    **{f"256p B={n}": [*_256P, f"micro_batch={n}", f"global_batch={n}"] for n in (64, 16, 1)},
}
LARGE = ("480p B=1", "256p B=64")
POLICIES = ("selective", "block", "none", "every_k")
PEERS = ("cudnn", "default", "compiled")
CURVE_SIZE, CURVE_STEPS = "256p B=16", 20
# Of a case, from the start of its process: compiling takes a minute.
SECONDS = {"480p B=1": 240.0, "256p B=64": 240.0, "256p B=16": 180.0, "256p B=1": 180.0}


@dataclass(frozen=True)
class Case:
    """One process: a transformer at one size, with what sets it apart from others of that size."""

    group: str
    size: str
    transformer: str  # ours, or diffusers' as bench_step.Peer has it
    policy: str = "block"
    compiled: bool = False  # our blocks; diffusers' are as their transformer says
    optimizer: str = "configured"
    more: tuple[str, ...] = field(default=())  # settings
    steps: int = 7

    @property
    def name(self) -> str:
        if self.group == "encode":
            return "encoders"
        kind = "compiled" if self.compiled else "eager"
        who = f"ours {kind}" if self.transformer == "ours" else f"diffusers {self.transformer}"
        other = () if self.optimizer == "configured" else (self.optimizer,)
        return ", ".join([self.size, who, self.policy, *other, *self.more])

    def arguments(self) -> list[str]:
        """Of `muybridge bench`, without the file for the figures."""
        if self.group == "encode":
            return ["encode"]
        found = ["step", "--steps", str(self.steps), "--optimizer", self.optimizer]
        if self.transformer != "ours":
            found += ["--diffusers", self.transformer]
        found += [*MODEL, *SIZES[self.size], f"activations.policy={self.policy}", *self.more]
        return [*found, "compile.enabled=true"] if self.compiled else found


def cases() -> list[Case]:
    """All of them, in the order in which they are worth the time."""
    found: list[Case] = []

    def add(group: str, size: str, transformer: str, policy: str, **more: object) -> None:
        found.append(Case(group, size, transformer, policy, **more))  # type: ignore[arg-type]

    for size in LARGE:
        add("steps", size, "ours", "selective", compiled=True)
        add("steps", size, "default", "block")
        add("steps", size, "cudnn", "block")
        add("steps", size, "ours", "block", compiled=True)
    add("steps", CURVE_SIZE, "ours", "block", steps=CURVE_STEPS)
    add("steps", CURVE_SIZE, "default", "block", steps=CURVE_STEPS)
    for size in LARGE:
        add("steps", size, "ours", "none", compiled=True)
        add("steps", size, "cudnn", "none")
        add("steps", size, "ours", "selective")
        add("steps", size, "compiled", "block")
        for recipe in ("tensorwise", "rowwise"):
            add("fp8", size, "ours", "selective", compiled=True, more=(f"fp8.recipe={recipe}",))
    for size in LARGE:
        add("reference", size, "ours", "block", more=("kernels=reference",))
    small = "256p B=1"
    for compiled in (True, False):
        add("steps", small, "ours", "none", compiled=compiled)
    for peer in PEERS:
        add("steps", small, peer, "none")
    # Beside the update of a case above, which is by our AdamW.
    for optimizer in ("torch_fused", "torch_foreach"):
        add("optimizer", small, "ours", "none", optimizer=optimizer)
    add("optimizer", small, "ours", "none", more=("optimizer=muon",))
    found.append(Case("encode", "", ""))
    # And all that is left of the grid.
    for size in SIZES:
        for policy in POLICIES:
            for compiled in (True, False):
                add("steps", size, "ours", policy, compiled=compiled)
        for peer in PEERS:
            add("steps", size, peer, "block")
    unique: dict[str, Case] = {}
    for case in found:
        unique.setdefault(case.name, case)
    return list(unique.values())


GROUPS = ("steps", "fp8", "reference", "optimizer", "encode")
