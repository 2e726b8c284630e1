"""When a denoising loop is running (through pipelines: test_pipelines.py)."""

import threading
from types import SimpleNamespace

from tqdm import tqdm

from seqpar.denoising_loops import Loops, draws_bars


class Drawing:
    """Draws its bars as pipelines of diffusers do."""

    def progress_bar(self, iterable=None, total=None):
        return tqdm(iterable, total=total, disable=True)


class Own(Drawing):
    def progress_bar(self, total):
        return super().progress_bar(total=total)


def test_a_loop_runs_from_its_bar_on_to_its_end():
    loops, pipe = Loops(), Drawing()
    with loops.watched([pipe]):
        with pipe.progress_bar(total=2):
            assert loops.running
        assert not loops.running
        assert [loops.running for _ in pipe.progress_bar(range(2))] == [True, True] and not loops.running
        bar = pipe.progress_bar(total=1)
        assert loops.running
        bar.close()
        assert not loops.running
    with pipe.progress_bar(total=2):
        assert not loops.running, "watching is over"


def test_bars_of_blocks_and_of_classes_with_their_own_method():
    modular = SimpleNamespace(blocks=SimpleNamespace(sub_blocks={"denoise": SimpleNamespace(sub_blocks={"loop": Own()})}))
    loops = Loops()
    assert draws_bars(modular) and draws_bars(Own()) and not draws_bars(loops)
    with loops.watched([modular, Drawing()]):
        with Own().progress_bar(total=1):
            assert loops.running
        assert not loops.running


def test_another_thread_draws_for_itself():
    loops, seen = Loops(), []

    def elsewhere():
        with Drawing().progress_bar(total=1) as bar:
            seen.append((loops.running, type(bar)))

    with loops.watched([Drawing()]):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert seen == [(False, tqdm)]
