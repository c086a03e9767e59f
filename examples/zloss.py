"""Another loss: the z-loss of PaLM, which keeps the softmax's normaliser near 1.

    python -m examples.zloss train --stage 3

Held-out losses stay the plain cross-entropy, as they are taken in eval mode. A checkpoint is like any
other: sample.py and evaluate.py read it too. Names of dimensions: M supervised places, D width, V vocabulary.
"""

from torch.nn import functional as F

import train
from model import IGNORE, InfMLLM

WEIGHT = 1e-4


def chunk_loss(self, hidden, targets):  # (M, D), (M,)
    """The loss of some supervised places, summed; IGNORE stands where one is padding."""
    logits = self.llm.head(hidden).float()  # (M, V)
    loss = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
    if self.training:
        z = logits.logsumexp(-1)  # (M,)
        loss = loss + WEIGHT * (z.square() * (targets != IGNORE)).sum()
    return loss


InfMLLM.chunk_loss = chunk_loss

if __name__ == "__main__":
    train.fork()
