"""What the system says, in words that say what is wrong and where."""

import errno
import os
from urllib.error import URLError

import pytest

from brfx.errors import explained, first_line


def test_a_number_of_the_systems_is_a_sentence(tmp_path):
    with pytest.raises(OSError) as caught:
        (tmp_path / "absent" / "file").write_text("")
    assert explained(caught.value) == f"{tmp_path}/absent/file: no such file or folder"
    with pytest.raises(OSError) as caught:
        tmp_path.read_text()
    assert explained(caught.value) == first_line(caught.value) == f"{tmp_path}: is a folder, not a file"
    assert explained(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))) == "No space left on device"
    assert explained(OSError("odd")) == "odd"
    assert first_line(URLError(OSError(-3, "Temporary failure in name resolution"))) == (
        "Temporary failure in name resolution"
    )


def test_a_long_message_of_others_is_one_line():
    assert first_line(ValueError("\n\nfirst\nsecond")) == "first" and len(first_line(ValueError("x" * 999))) == 200
