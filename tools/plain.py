"""The adapters of the bench without the LayerNorm that stands in front: `--adapter tools/plain.py:PlainPool`."""

from adapter import PoolAdapter, Resampler
from examples.abstractor import Abstractor
from examples.fourier import Fourier
from examples.shuffle import Shuffle


def plain(adapter):
    class Plain(adapter):
        def __init__(self, width_vit, width_llm, grid, ln_vision=True):
            super().__init__(width_vit, width_llm, grid, ln_vision=False)

    return Plain


PlainPool = plain(PoolAdapter)
PlainResampler = plain(Resampler)
PlainShuffle = plain(Shuffle)
PlainFourier = plain(Fourier)
PlainAbstractor = plain(Abstractor)
