import torch

from brfx.compiling import compiled


def test_more_models_than_torch_has_room_for():
    """One code, twelve closures: torch alone stops at eight, and with ``fullgraph`` fails."""
    torch._dynamo.reset()

    def made(number):
        return compiled(lambda x: x + number, fullgraph=True, backend="eager")

    assert [int(made(number)(torch.tensor(0))) for number in range(12)] == list(range(12))
