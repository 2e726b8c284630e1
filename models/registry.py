"""All model families by name; each is imported only when asked for, so no family needs another one's packages."""

import importlib
from types import MappingProxyType

from seqpar.errors import SeqparError
from seqpar.models.family import Family

_LOCATIONS = MappingProxyType(
    {
        "flux": ("flux", "FAMILY"),
        "qwen-image": ("qwen_image", "FAMILY"),
        "wan": ("wan", "FAMILY"),
        "wan-ti2v": ("wan", "TI2V_FAMILY"),
        "z-image": ("z_image", "FAMILY"),
        "longcat-image": ("longcat_image", "FAMILY"),
        "sd3": ("sd3", "FAMILY"),
        "ltx-video": ("ltx_video", "FAMILY"),
        "hunyuan-video": ("hunyuan_video", "FAMILY"),
        "bagel": ("bagel", "FAMILY"),
        "pattern-standard": ("patterns", "STANDARD"),
        "pattern-rope": ("patterns", "ROPE"),
        "pattern-unified": ("patterns", "UNIFIED"),
    }
)


def names() -> tuple[str, ...]:
    """Every family name `get` knows."""
    return tuple(_LOCATIONS)


def get(name: str) -> Family:
    """The family called `name`. Raises SeqparError with the known names, or naming the package that is missing."""
    if name not in _LOCATIONS:
        raise SeqparError(f"no model family {name!r}; known: {', '.join(_LOCATIONS)}")
    module, attribute = _LOCATIONS[name]
    try:
        family = getattr(importlib.import_module(f"seqpar.models.{module}"), attribute)
    except ImportError as error:
        raise SeqparError(f"family {name!r} needs a package that is not installed ({error}); pip install 'seqpar[diffusers]'") from error
    assert isinstance(family, Family) and family.name == name
    return family
