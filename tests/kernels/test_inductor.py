from functools import partial

import torch

from brfx.kernels.inductor import compiled


def test_more_models_than_torch_has_room_for(monkeypatch):
    """One code, twelve closures: torch alone stops at eight, and with ``fullgraph`` fails."""
    torch._dynamo.reset()
    compile = partial(torch.compile, backend="eager")  # which takes none of inductor's options
    monkeypatch.setattr("torch.compile", lambda function, *, options, **more: compile(function, **more))

    def made(number):
        return compiled(lambda x: x + number, fullgraph=True)

    assert [int(made(number)(torch.tensor(0))) for number in range(12)] == list(range(12))
