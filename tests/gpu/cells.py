"""One run of worker.py, known by its name."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Cell:
    """Which stage (vqgan, or a kind of prior in `small_prior.KINDS`), under which engine, and what
    is looked at: `train` (its losses) or `steady` (whether the host waits for the device once a run
    has found its pace). `how`: eager, compile (`engine.compile`) or graphs (`engine.graphs`)."""

    stage: str
    precision: str = "fp32"
    zero: int = 0
    how: str = "eager"
    look: str = "train"

    @property
    def name(self) -> str:
        return f"{self.look}-{self.stage}-{self.precision}-zero{self.zero}-{self.how}"

    @classmethod
    def parse(cls, name: str) -> "Cell":
        look, stage, precision, zero, how = name.split("-")
        return cls(stage, precision, int(zero.removeprefix("zero")), how, look)
