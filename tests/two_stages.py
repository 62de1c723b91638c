"""A training of milliseconds that starts from the weights of another one."""

import dataclasses

from tiny_training import TinyData, TinyModel, tiny_run
from torch import nn

from nomadam.experiments.configuration import Run
from nomadam.experiments.first_stage import final_weights


def tiny_stage(**changes) -> Run:
    return tiny_run("adamw", 1e-2, name="two_stages.tiny_stage", steps=8, **changes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SecondModel(TinyModel):
    """The tiny model, from the weights of `tiny_stage`."""

    stage: Run = dataclasses.field(default_factory=tiny_stage)

    def first_stage(self) -> Run:
        return self.stage

    def build(self, *, vocab_size: int, pretrained=None) -> nn.Module:
        module = super().build(vocab_size=vocab_size)
        if pretrained is not None:
            module.load_state_dict(final_weights(pretrained))
        return module


def two_stages(stage: Run | None = None, **changes) -> Run:
    model = SecondModel(stage=stage or tiny_stage())
    data = TinyData(text="counting on")
    changes = {"name": "two_stages.two_stages", "steps": 6, **changes}
    return tiny_run(model=model, data=data, **changes)
