"""Saving, joining and comparing pictures."""

from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest

from seqpar.errors import UnsupportedError
from seqpar.tools import picture


def test_frames_of_pictures_and_videos():
    image, video = np.zeros((2, 4, 6, 3)), np.zeros((1, 5, 4, 6, 3))
    assert picture.frames_of(SimpleNamespace(images=image)).shape == (1, 4, 6, 3)
    assert picture.frames_of(SimpleNamespace(frames=video)).shape == (5, 4, 6, 3)
    with pytest.raises(UnsupportedError, match="neither"):
        picture.frames_of(SimpleNamespace())


@pytest.mark.parametrize(("name", "frames"), [("a.png", 1), ("a.png", 3), ("a.gif", 3), ("a.jpg", 1)])
def test_save(tmp_path, name, frames):
    path = tmp_path / "new" / name
    picture.check_writable(path, frames)
    picture.save(np.random.default_rng(0).random((frames, 4, 6, 3)).astype(np.float32), path)
    with PIL.Image.open(path) as saved:
        assert saved.size == (6, 4) and getattr(saved, "n_frames", 1) == frames


@pytest.mark.parametrize(("name", "frames"), [("a.jpg", 2), ("a.mp4", 2), ("a", 1)])
def test_refuses_names_it_cannot_save_under(tmp_path, name, frames):
    with pytest.raises(UnsupportedError, match=r"\.png"):
        picture.check_writable(tmp_path / name, frames)


def test_difference_and_side_by_side():
    left = np.full((1, 4, 6, 3), 0.5, dtype=np.float32)
    right = left.copy()
    right[0, 1, 2, 0] = 0.25
    assert picture.max_abs_difference(left, left) == 0
    assert picture.max_abs_difference(left, right) == 0.25
    assert picture.max_abs_difference(left, right[:, :2]) == float("inf")
    assert picture.max_abs_difference(left, np.full_like(left, np.nan)) == float("inf")
    both = picture.side_by_side(left, right)
    assert both.shape == (1, 4, 14, 3) and np.array_equal(both[:, :, -6:], right)
    assert picture.to_levels(np.array([np.nan, -1.0, 0.5, 2.0])).tolist() == [0, 0, 128, 255]
