import logging

import numpy as np
import pytest
import torch
from PIL import Image

from brfx.data import Preprocessing, load_dataset
from brfx.data.image_files import ImageFiles, upright_rgb
from brfx.errors import DataError


def pixels(path, size=4):
    return ImageFiles([path], Preprocessing(size), 0)[torch.tensor([0])][0]


def test_an_image_is_turned_as_its_exif_orientation_says(tmp_path):
    upright = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5)
    sideways = upright.transpose(Image.Transpose.ROTATE_90)  # what a camera held sideways stores
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    sideways.save(tmp_path / "a.png", exif=exif)
    expected = torch.from_numpy(np.array(upright)).permute(2, 0, 1)
    assert torch.equal(pixels(tmp_path / "a.png"), expected)


@pytest.mark.parametrize(("mode", "suffix"), [("I;16", "png"), ("I;16", "tiff"), ("I", "tiff"), ("F", "tiff")])
def test_deep_images_are_scaled_and_not_clipped(tmp_path, mode, suffix):
    share = np.linspace(0, 1, 16).reshape(4, 4)
    values = share.astype(np.float32) if mode == "F" else (share * 65535).round().astype(np.uint16)
    image = Image.fromarray(values)
    if mode == "I":
        image = Image.fromarray(values.astype(np.int32))
    assert image.mode == mode
    image.save(tmp_path / f"a.{suffix}")
    expected = torch.from_numpy((share * 255).round()).to(torch.uint8).expand(3, 4, 4)
    assert (pixels(tmp_path / f"a.{suffix}").int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("values", [np.full((4, 4), 70000, np.int32), np.full((4, 4), 1.5, np.float32)])
def test_values_that_do_not_say_which_is_white_are_refused_by_name(tmp_path, values):
    Image.fromarray(values).save(tmp_path / "odd.tiff")
    with pytest.raises(DataError, match=r"odd.tiff: cannot read this image \(mode [IF] with values from .*: takes"):
        pixels(tmp_path / "odd.tiff")


def test_grey_palette_alpha_and_cmyk_become_rgb():
    red = Image.new("RGB", (4, 4), (255, 0, 0))
    palette = red.convert("P")
    palette.info["transparency"] = b"\x00\xff"
    with_alpha = red.copy()
    with_alpha.putalpha(10)
    for image in (palette, with_alpha, red.convert("CMYK"), with_alpha.convert("RGBA")):
        assert np.array(upright_rgb(image)).reshape(-1, 3)[0].tolist() == [255, 0, 0]
    for mode in ("1", "L", "LA"):
        assert np.array(upright_rgb(Image.new("RGB", (4, 4), "white").convert(mode))).min() == 255


def test_files_that_are_no_images_are_counted_by_suffix(tmp_path, caplog):
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (8, 8)).save(tmp_path / part / name / f"{i}.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "train" / "cat" / "a.gif")
    for name in ("notes.txt", "more.txt", ".DS_Store", "README"):
        (tmp_path / "train" / "dog" / name).write_text("")
    with caplog.at_level(logging.WARNING):
        load_dataset(str(tmp_path), data_dir=tmp_path, preprocessing=Preprocessing(8))
    (record,) = caplog.records
    assert record.message.endswith("files that are not read as images: 2 .txt, 1 .gif, 1 README")
