"""NiNo: a network that passes messages along the weights of a model, over its neural graph."""

from wnn_jax.nowcasters.nino.nowcaster import NiNo as NiNo
from wnn_jax.nowcasters.nino.nowcaster import neural_graph as neural_graph
