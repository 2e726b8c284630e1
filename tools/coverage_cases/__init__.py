"""Tiny configurations of everything the coverage run covers."""

from seqpar.tools.coverage_cases import audio, controlnets, images, more_images, more_videos, streams, text, unets, videos
from seqpar.tools.coverage_cases.case import Case


def all_cases() -> tuple[Case, ...]:
    """Every case, in the order of the files; names are unique."""
    cases = tuple(case for module in (images, streams, videos, more_images, more_videos, audio, controlnets, unets, text) for case in module.CASES)
    names = [case.name for case in cases]
    assert len(set(names)) == len(names), "two cases of one name"
    return cases
