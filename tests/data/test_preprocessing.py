import numpy as np
import pytest
import torch
from PIL import Image

from brfx.data import Preprocessing, with_overrides
from brfx.errors import ConfigError


def test_a_mean_of_one_number_makes_images_grey_as_pillow_does():
    images = torch.randint(0, 256, (4, 3, 5, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = Preprocessing(5, (0.5,), (0.25,)).normalize(images)
    grey = [np.array(Image.fromarray(image.permute(1, 2, 0).numpy()).convert("L")) for image in images]
    assert torch.equal(found, (torch.from_numpy(np.stack(grey))[:, None].float() / 255 - 0.5) / 0.25)
    assert found.shape == (4, 1, 5, 5)
    flat = images[:, :1].expand(-1, 3, -1, -1)
    assert torch.equal(Preprocessing(5, (0.0,), (1.0,)).normalize(flat), flat[:, :1].float() / 255)


def test_mean_and_std_have_as_many_numbers():
    for mean, std in [((0.5,), (0.2,) * 3), ((0.5,) * 2, (0.2,) * 2), ((0.5,) * 3, (0.2,))]:
        with pytest.raises(ConfigError, match=rf"--mean of {len(mean)} and --std of {len(std)} numbers"):
            Preprocessing(8, mean, std)
    with pytest.raises(ConfigError, match="one each"):
        with_overrides(Preprocessing(8), mean=(0.5,))
