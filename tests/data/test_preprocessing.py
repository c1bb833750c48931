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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": "32"}, "image_size='32': takes a whole number"),
        ({"image_size": 0}, "image_size=0: takes 1 or more"),
        ({"mean": (0.5, 0.5), "std": (0.2, 0.2)}, r"mean=\(0.5, 0.5\): takes one number or three"),
        ({"mean": 0.5}, "mean=0.5: takes one number or three"),
        ({"mean": (float("nan"),) * 3}, r"mean=\(nan, nan, nan\): takes finite numbers"),
        ({"std": (float("inf"),) * 3}, "takes numbers above 0"),
        ({"divisor": 0}, "takes numbers above 0"),
        ({"stretch": 1}, "stretch=1: takes true or false"),
        ({"resize": 8.5}, "resize=8.5: takes a whole number, or None"),
        ({"interpolation": None}, "interpolation=None: takes a string"),
        ({"colour": "rgb"}, "this brfx knows no setting 'colour'"),
    ],
)
def test_a_wrong_value_in_a_file_is_named(settings, message):
    with pytest.raises(ConfigError, match=f"preprocessing: {message}" if "colour" in settings else message):
        Preprocessing.from_dict({"image_size": 8} | settings)


def test_mean_and_std_have_as_many_numbers():
    for mean, std in [((0.5,), (0.2,) * 3), ((0.5,) * 3, (0.2,))]:
        with pytest.raises(ConfigError, match=rf"--mean of {len(mean)} and --std of {len(std)} numbers"):
            Preprocessing(8, mean, std)
    with pytest.raises(ConfigError, match="one each"):
        with_overrides(Preprocessing(8), mean=(0.5,))
