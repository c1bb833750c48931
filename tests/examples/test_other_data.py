"""Data from elsewhere: the examples run as they stand, on a few digits."""

import gc
import io
import runpy
import tarfile
from pathlib import Path

import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples"


def picture(image):
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def test_a_data_set_of_hugging_face(tmp_path, digits, monkeypatch):
    pytest.importorskip("datasets", reason="the example reads with it: pip install datasets")
    for part in ("train", "test"):
        for i in range(48):
            image, label = getattr(digits, part).images[i], int(getattr(digits, part).labels[i]) % 3
            path = tmp_path / "data" / part / f"class{label}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(image).save(path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    result = runpy.run_path(str(EXAMPLES / "huggingface_datasets.py"))["main"](str(tmp_path / "data"), size=16)
    assert [metrics.stage for metrics in result.history] == ["warm-up", "penalty"]
    assert result.val_accuracy is not None and result.history[-1].train.terms


@pytest.mark.filterwarnings("ignore")  # it leaves shards open until they are collected
def test_shards_of_webdataset(tmp_path, digits):
    pytest.importorskip("webdataset", reason="the example reads with it: pip install webdataset")
    for part, count in (("train", 64), ("test", 32)):
        with tarfile.open(tmp_path / f"{part}.tar", "w") as shard:
            for i in range(count):
                content = io.BytesIO()
                picture(getattr(digits, part).images[i]).save(content, "png")
                label = str(int(getattr(digits, part).labels[i])).encode()
                for suffix, value in (("png", content.getvalue()), ("cls", label)):
                    member = tarfile.TarInfo(f"{i:03}.{suffix}")
                    member.size = len(value)
                    shard.addfile(member, io.BytesIO(value))
    main = runpy.run_path(str(EXAMPLES / "webdataset_stream.py"))["main"]
    result = main([str(tmp_path / "train.tar")], [str(tmp_path / "test.tar")], batches=6, size=16)
    assert len(result.history) == 2
    assert result.history[0].train.loss > result.history[1].train.loss > 0
    gc.collect()
