"""What users make of the logits of a large head, written as they write it.

Legend: B sequences, T tokens each, D model, V vocabulary. Every program takes the hidden states x_BTD, the head w_VD,
labels_BT and whatever it names; all gradients are of the first two.
"""

from losses.cross_entropy import CROSS_ENTROPY as CROSS_ENTROPY
from losses.distillation import DISTILLATION as DISTILLATION
from losses.heads import CHECKPOINTED as CHECKPOINTED
from losses.heads import HEADS as HEADS
from losses.heads import RETURNED as RETURNED
from losses.per_token import PER_TOKEN as PER_TOKEN
from losses.pieces import MARKED as MARKED
from losses.pieces import PIECES as PIECES
from losses.programs import B as B
from losses.programs import D as D
from losses.programs import Program as Program
from losses.programs import T as T
from losses.programs import V as V
from losses.programs import flat as flat
from losses.reinforcement import REINFORCEMENT as REINFORCEMENT
from losses.shifted import SHIFTED as SHIFTED
