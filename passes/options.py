"""Steps of `partition` that may be left out: each changes what is sharded or communicated, none the answer."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """All taken by default; tests leave some out, and find that the programs are equal.

    repeats: of blocks that are alike one is read, decided and written for all. recognise: attention in other forms becomes attention nodes. tidy: copies that nobody can tell from what they copy disappear. fuse: a sequence that is a product is read again as one atom, which can
    be cut anywhere. grids: cutting between frames or rows is tried as well. local_keys: a cross-attention may attend locally.
    phases: the cut may switch between two axes. share_counts: ranks with parts of equal sizes are counted once.
    replay: at real rates, programs of about the same price are compared by replaying them. pack: gathers that follow one another become one.
    schedule: exchanges start early and are waited for late.
    """

    repeats: bool = True
    recognise: bool = True
    tidy: bool = True
    fuse: bool = True
    grids: bool = True
    local_keys: bool = True
    phases: bool = True
    share_counts: bool = True
    replay: bool = True
    pack: bool = True
    schedule: bool = True
