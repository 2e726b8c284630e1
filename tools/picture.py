"""Save, join and compare what a pipeline made: frames as float arrays [F, H, W, 3] in 0..1."""

from pathlib import Path

import numpy as np
import PIL.Image

from seqpar.errors import UnsupportedError

ANIMATED = (".gif", ".png", ".webp")
FRAMES_PER_SECOND = 16


def frames_of(output: object) -> np.ndarray:
    """The frames [F, H, W, 3] of the first prompt in a pipeline's output (`output_type="np"`), pictures and videos alike."""
    if hasattr(output, "images"):
        return np.asarray(output.images, dtype=np.float32)[:1]
    if hasattr(output, "frames"):
        return np.asarray(output.frames, dtype=np.float32)[0]
    raise UnsupportedError(f"the pipeline returned {type(output).__name__}, which has neither images nor frames")


def check_writable(path: Path, frames: int) -> None:
    """Refuse, before any work is done, a file name that the result cannot be saved under."""
    PIL.Image.init()
    if path.suffix.lower() not in PIL.Image.EXTENSION:
        raise UnsupportedError(f"cannot save a picture as {path.name!r}: use a name that ends in .png, .webp, .gif or .jpg")
    if frames > 1 and path.suffix.lower() not in ANIMATED:
        raise UnsupportedError(f"{frames} frames do not fit into {path.name!r}: use a name that ends in {', '.join(ANIMATED)}")


def save(frames: np.ndarray, path: Path) -> None:
    """Write one picture, or an animation if there are several frames. Folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    first, *rest = (PIL.Image.fromarray(frame) for frame in to_levels(frames))
    if rest:
        first.save(path, save_all=True, append_images=rest, duration=round(1000 / FRAMES_PER_SECOND), loop=0)
    else:
        first.save(path)


def to_levels(frames: np.ndarray) -> np.ndarray:
    """Float 0..1 -> uint8 0..255, rounded as image libraries do; NaN becomes 0."""
    return (np.nan_to_num(frames).clip(0, 1) * 255).round().astype(np.uint8)


def side_by_side(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """[F, H, W, 3] twice -> [F, H, 2W + gap, 3] with a white gap between."""
    gap = np.ones((*left.shape[:2], max(2, left.shape[2] // 64), left.shape[3]), dtype=left.dtype)
    return np.concatenate([left, gap, right], axis=2)


def max_abs_difference(left: np.ndarray, right: np.ndarray) -> float:
    """Largest difference of one colour value, on the scale 0..1; infinite if shapes differ or a value is not finite."""
    if left.shape != right.shape or not (np.isfinite(left).all() and np.isfinite(right).all()):
        return float("inf")
    return float(np.abs(left.astype(np.float64) - right).max(initial=0.0))
