"""A head of your own, in one file: what a user of the package writes to replace the MLP over pairs.

A mixture of experts: small networks, weighed for each pair by a gate that sees the same features. It is a Flax module.
"""

import flax.linen as nn
import jax

from aif_jax.heads import head


@head
class Experts(nn.Module):
    """Logits [T] as the mean of experts, weighed by a softmax gate (Jacobs et al. 1991, doi:10.1162/neco.1991.3.1.79).

    Attributes:
      experts: how many networks.
      width: hidden width of each.
      outputs: T, the objectives of the model.
    """

    revision = 1
    experts: int = 3
    width: int = 16
    outputs: int = 1

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        features = nn.LayerNorm()(features)
        gate = nn.softmax(nn.Dense(self.experts, name="gate")(features))
        hidden = nn.relu(nn.DenseGeneral((self.experts, self.width), name="hidden")(features))  # [experts, width]
        logits = nn.DenseGeneral(self.outputs, name="logits")(hidden)  # [experts, T]
        return (gate[..., None] * logits).sum(-2)
