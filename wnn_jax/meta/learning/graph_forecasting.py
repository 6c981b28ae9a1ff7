"""The task of forecasting whole models at once: what NiNo is trained on."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from wnn_jax._nowcaster import Nowcaster
from wnn_jax.meta.errors import UsageError
from wnn_jax.meta.learning.forecasting import (
    EVALUATED_SPLITS,
    EVALUATION_SEED,
    FORECAST_ERROR,
    REPORTED_HORIZONS,
    describe_runs,
    name_of_horizon,
)
from wnn_jax.meta.learning.objectives import multi_horizon_optimizer
from wnn_jax.meta.tasks.families import SPLITS, SplitName
from wnn_jax.meta.tasks.task import EvaluationSplit, Metric, ModelState, Params, Sums
from wnn_jax.meta.trajectories.collection import Trajectory
from wnn_jax.meta.trajectories.windows import MIN_HORIZON, NUM_HORIZONS, OFFSETS, draw_place, read_window
from wnn_jax.nowcasters import NiNo
from wnn_jax.nowcasters._moments import moments_of_tensor
from wnn_jax.nowcasters._multi_horizon import normalize, scale_of
from wnn_jax.nowcasters._neural_graph.graph import MAX_WINDOW, NUM_POSITIONS, Block, Graph, Piece, Tensor
from wnn_jax.nowcasters._neural_graph.messages import Edges, Messages, WholeEdges
from wnn_jax.nowcasters._neural_graph.tensor_edges import edges_of_no_tensor
from wnn_jax.nowcasters.nino import read_tensors

_EVALUATION_BATCHES = 8
_CONTEXT = len(OFFSETS)


class GraphBatch(NamedTuple):
    """Windows of several models, as one graph of which each is a part, filled up to a fixed size.

    Attributes:
      edges: all edges; those that fill up are not new.
      positions: `[nodes, 8]`, the places of nodes.
      degrees: `[nodes]`, how many edges lead to each.
      chosen: `[weights]`, the edges whose forecasts count.
      changes: `[weights, 40, 9]`, how far the elements of their windows will have moved, in units of their tensors.
      is_element: `[weights, 9]`, which elements there are.
      is_known: `[weights, 40]`, which snapshots the run has.
      tensor: `[weights]`, the number of their tensor in the batch; the last number is that of what fills up.
    """

    edges: Edges
    positions: Any
    degrees: Any
    chosen: Any
    changes: Any
    is_element: Any
    is_known: Any
    tensor: Any


class _TensorEdges(NamedTuple):
    """The edges of one tensor.

    Attributes:
      places: `[n, 9]`, where the elements of their windows are among the weights of the leaf; -1 for those not there.
      sources: `[n]`, the nodes where they begin.
      targets: `[n]`, the nodes where they end.
    """

    places: np.ndarray
    sources: np.ndarray
    targets: np.ndarray


class _Model(NamedTuple):
    """A trajectory with its graph.

    Attributes:
      trajectory: the run.
      graph: of its network.
      tensors: the edges of each.
    """

    trajectory: Trajectory
    graph: Graph
    tensors: tuple[_TensorEdges, ...]

    @property
    def num_edges(self) -> int:
        """Of the graph."""
        return sum(len(edges.places) for edges in self.tensors) + len(self.graph.kinds)


@dataclasses.dataclass(frozen=True)
class NiNoObjective:
    """The L1 loss over all horizons, each relative to the error of forecasting no change; see `MultiHorizonObjective`.

    Attributes:
      width: features of nodes and edges.
    """

    width: int = 128

    def init(self, key: jax.Array) -> Params:
        """Parameters to start from."""
        return NiNo.init(key, width=self.width).params

    def optimizer(self, learning_rate: float, num_steps: int) -> optax.GradientTransformation:
        """As Knyazev et al. train theirs."""
        return multi_horizon_optimizer(learning_rate, num_steps)

    def nowcaster(self, params: Params, record: Mapping[str, Any]) -> Nowcaster:
        """The nowcaster with these parameters."""
        return NiNo(params, record=record)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class GraphForecasting:
    """Training of a NiNo on windows of whole models.

    The metrics are sums of absolute errors as a share of those of forecasting no change, the mean over tensors and
    horizons. Those of `Forecasting` are means over windows of roles, so that figures of the two do not compare; those
    of `wnn-jax forecast` do. Runs of networks whose graph cannot be read, or is too large for a batch, are left out.

    In training the signs of models are drawn, one for all their weights, and of each of their eigenvectors, whose signs
    mean nothing. Otherwise the few runs that there are would be learned by heart.

    Attributes:
      objective: what is trained.
      trajectories: the runs of every split.
      num_weights: edges of a tensor whose forecasts count.
      min_stride: smallest spacing of the snapshots in a window, in snapshots of the run.
      max_stride: largest spacing.
      num_edges: the size of a batch: as many models as fit in.
      num_nodes: of a batch.
      num_tensors: of a batch.
      average: see `read_window`.

    Raises:
      UsageError: if a split has no run whose graph can be read and fits into a batch, or a run is too short.
    """

    objective: NiNoObjective
    trajectories: Mapping[SplitName, Sequence[Trajectory]]
    num_weights: int
    min_stride: int
    max_stride: int
    num_edges: int = 2**16
    num_nodes: int = 2**12
    num_tensors: int = 64
    average: bool = False

    def __post_init__(self) -> None:
        for split in SPLITS:
            if not self._models[split]:
                raise UsageError(
                    f"--collection has no finished run for {split!r} whose neural graph can be read; collect more runs."
                )

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The forecast error, of all horizons and at those of single ones that the validation runs reach."""
        return self._metrics

    @functools.cached_property
    def _metrics(self) -> tuple[Metric, ...]:
        reached = np.any([batch.is_known.any(axis=0) for batch in self.evaluation_batches("validation")], axis=0)
        horizons = [horizon for horizon in REPORTED_HORIZONS if reached[horizon - 1]]
        names = (FORECAST_ERROR, *map(name_of_horizon, horizons))
        return tuple(Metric(name, higher_is_better=False) for name in names)

    @property
    def used(self) -> Mapping[SplitName, Sequence[Trajectory]]:
        """The runs of every split that are not left out."""
        return {split: [model.trajectory for model in self._models[split]] for split in SPLITS}

    def describe(self) -> Mapping[str, Any]:
        """What its results depend on: the objective, how windows are drawn, and the content of all runs."""
        settings = ("num_weights", "min_stride", "max_stride", "num_edges", "num_nodes", "num_tensors", "average")
        return {
            "kind": "graph forecasting",
            "objective": repr(self.objective),
            **{name: getattr(self, name) for name in settings},
            "evaluation": {"seed": EVALUATION_SEED, "batches": _EVALUATION_BATCHES},
            "runs": {split: describe_runs(trajectories) for split, trajectories in self.used.items()},
        }

    def init(self, key: jax.Array) -> tuple[Params, ModelState]:
        """Parameters of the network to start from; there is no model state."""
        return self.objective.init(key), {}

    def loss(
        self, params: Params, model_state: ModelState, batch: GraphBatch, key: jax.Array
    ) -> tuple[jax.Array, tuple[ModelState, Mapping[str, jax.Array]]]:
        """The mean of the errors of all tensors at all horizons."""
        del key
        errors, is_known = self._errors(params, batch)
        return jnp.sum(errors) / jnp.maximum(jnp.sum(is_known), 1), (model_state, {})

    def batch(self, seed: int, step: int) -> GraphBatch:
        """Windows of the training runs, with signs that are drawn."""
        return self._draw(self._models["train"], seed, step, draws_signs=True)

    def evaluation_batches(self, split: EvaluationSplit) -> Iterator[GraphBatch]:
        """Windows that are always the same, of the runs and of the architectures of a split in turn."""
        for name in EVALUATED_SPLITS[split]:
            for number in range(_EVALUATION_BATCHES):
                yield self._draw(self._models[name], EVALUATION_SEED, number)

    def measure(self, params: Params, model_state: ModelState, batch: GraphBatch) -> Sums:
        """The sums of the errors of tensors."""
        del model_state
        errors, is_known = self._errors(params, batch)
        known = is_known.astype(jnp.float32)
        at = {
            name_of_horizon(horizon): (jnp.sum(errors[:, horizon - 1]), jnp.sum(known[:, horizon - 1]))
            for horizon in REPORTED_HORIZONS
        }
        return {FORECAST_ERROR: (jnp.sum(errors), jnp.sum(known)), **at}

    def _errors(self, params: Params, batch: GraphBatch) -> tuple[jax.Array, jax.Array]:
        """`[tensors, 40]`: relative errors, 0 where they are not known, and where they are."""
        messages = Messages(params, batch.positions, batch.degrees, [WholeEdges(batch.edges)])
        chosen = jax.tree.map(lambda of_edges: of_edges[batch.chosen], batch.edges)
        output = params["output"]
        forecast = jnp.tensordot(messages.last_hidden(chosen), output["kernel"], 1) + output["bias"][None]
        counts = batch.is_known[:, :, None] & batch.is_element[:, None]
        sums = jnp.stack(
            [jnp.sum(jnp.abs(x) * counts, axis=-1) for x in (forecast - batch.changes, batch.changes)], axis=1
        )
        of_tensors = jnp.zeros([self.num_tensors, *sums.shape[1:]]).at[batch.tensor].add(sums)[:-1]
        error, no_change = of_tensors[:, 0], of_tensors[:, 1]
        is_known = no_change > 1e-6
        return jnp.where(is_known, error / jnp.where(is_known, no_change, 1), 0), is_known

    @functools.cached_property
    def _models(self) -> dict[SplitName, list[_Model]]:
        return {split: list(filter(None, map(self._model, self.trajectories[split]))) for split in SPLITS}

    def _model(self, trajectory: Trajectory) -> _Model | None:
        """A run whose graph can be read, and fits into a batch."""
        tensors = tuple(
            Tensor(leaf.name, tuple(leaf.name.lower().split("/")), leaf.shape, leaf.role) for leaf in trajectory.leaves
        )
        try:
            graph = read_tensors(tensors, tuple(tensor.names for tensor in tensors))
        except ValueError:
            return None
        edges = tuple(
            _edges_of(piece, block, trajectory.leaves[piece.leaf].shape)
            for piece, block in zip(graph.pieces, graph.blocks, strict=True)
        )
        model = _Model(trajectory, graph, edges)
        fits = model.num_edges <= self.num_edges and graph.num_nodes <= self.num_nodes
        return model if fits and len(edges) < self.num_tensors else None

    def _draw(self, models: Sequence[_Model], seed: int, number: int, *, draws_signs: bool = False) -> GraphBatch:
        rng = np.random.default_rng([seed, number])
        batch = _Filling(self, draws_signs)
        while batch.add(models[int(rng.integers(len(models)))], rng):
            pass
        return batch.finish()


class _Filling:
    """A batch in the making."""

    def __init__(self, task: GraphForecasting, draws_signs: bool) -> None:
        self._task = task
        self._draws_signs = draws_signs
        self._edges: list[Edges] = []
        self._positions: list[np.ndarray] = []
        self._degrees: list[np.ndarray] = []
        self._chosen: list[dict[str, np.ndarray]] = []
        self._num_edges = self._num_nodes = self._num_tensors = 0

    def add(self, model: _Model, rng: np.random.Generator) -> bool:
        """Adds a window of a model, if there is room."""
        task, trajectory = self._task, model.trajectory
        has_room = (
            self._num_edges + model.num_edges <= task.num_edges
            and self._num_nodes + model.graph.num_nodes <= task.num_nodes
            and self._num_tensors + len(model.tensors) < task.num_tensors
        )
        if not has_room:
            return False
        reach = OFFSETS[-1] + MIN_HORIZON
        start, stride = draw_place(rng, trajectory, reach, task.min_stride, task.max_stride)
        graph = model.graph
        signs = np.ones(1 + NUM_POSITIONS, np.float32)
        if self._draws_signs:
            signs = rng.choice(np.array([-1, 1], np.float32), len(signs))
        # Of leaves, of which several tensors can be parts.
        windows = {
            number: read_window(trajectory, trajectory.leaves[number], start, stride, average=task.average)
            for number in {piece.leaf for piece in graph.pieces}
        }
        for piece, block, edges in zip(graph.pieces, graph.blocks, model.tensors, strict=True):
            history, future = (signs[0] * snapshots for snapshots in windows[piece.leaf])
            scale = scale_of(moments_of_tensor(list(history)))
            number = len(edges.places)
            features = normalize(np.moveaxis(history[:, edges.places], 0, -1), scale)
            features = np.where(edges.places[..., None] < 0, 0, features).astype(np.float32).reshape(number, -1)
            self._choose(edges.places, history, future, float(scale.std), rng)
            kinds = np.full(number, block.kind)
            self._append(Edges(edges.sources, edges.targets, kinds, features, np.ones(number, bool)))
            self._num_tensors += 1
        others = edges_of_no_tensor(graph)
        padding = [(0, 0), (0, (MAX_WINDOW - 1) * _CONTEXT)]
        self._append(others._replace(features=np.pad(others.features, padding)))
        self._positions.append(graph.positions * signs[1:])
        self._degrees.append(graph.degrees)
        self._num_nodes += graph.num_nodes
        return True

    def finish(self) -> GraphBatch:
        """The batch, filled up."""
        task = self._task
        edges = jax.tree.map(lambda *parts: _fill(np.concatenate(parts), task.num_edges), *self._edges)
        chosen = {name: np.concatenate([part[name] for part in self._chosen]) for name in self._chosen[0]}
        num_chosen = task.num_tensors * task.num_weights
        num_known = len(chosen["chosen"])
        filled = {name: _fill(part, num_chosen) for name, part in chosen.items()}
        filled["tensor"][num_known:] = task.num_tensors - 1
        return GraphBatch(
            edges=edges,
            positions=_fill(np.concatenate(self._positions), task.num_nodes).reshape(-1, NUM_POSITIONS),
            degrees=_fill(np.concatenate(self._degrees), task.num_nodes).astype(np.float32),
            **filled,
        )

    def _append(self, edges: Edges) -> None:
        edges = Edges(*map(np.asarray, edges))
        sources, targets = ((ends + self._num_nodes).astype(np.int32) for ends in (edges.sources, edges.targets))
        self._edges.append(edges._replace(sources=sources, targets=targets, kinds=edges.kinds.astype(np.int32)))
        self._num_edges += len(edges.kinds)

    def _draw_edges(self, number: int, rng: np.random.Generator) -> np.ndarray:
        size = self._task.num_weights
        return rng.choice(number, size, replace=number < size)

    def _choose(
        self, places: np.ndarray, history: np.ndarray, future: np.ndarray, std: float, rng: np.random.Generator
    ) -> None:
        """Draws the edges of a tensor whose forecasts count."""
        size = self._task.num_weights
        drawn = self._draw_edges(len(places), rng)
        is_element = places[drawn] >= 0
        changes = np.zeros([size, NUM_HORIZONS, MAX_WINDOW], np.float32)
        moved = future[:, places[drawn]] - history[-1][places[drawn]][None]
        changes[:, : len(future)] = np.where(is_element, moved, 0).transpose(1, 0, 2) / (std + 1e-6)
        self._chosen.append(
            {
                "chosen": (self._num_edges + drawn).astype(np.int32),
                "changes": changes,
                "is_element": is_element,
                "is_known": np.broadcast_to(np.arange(NUM_HORIZONS) < len(future), (size, NUM_HORIZONS)),
                "tensor": np.full(size, self._num_tensors, np.int32),
            }
        )


def _edges_of(piece: Piece, block: Block, shape: tuple[int, ...]) -> _TensorEdges:
    """The edges of a tensor that is, or is a part of, a leaf of this shape; one cut of the windows after the other."""
    tensor = piece.of(np.arange(np.prod(shape)).reshape(shape))
    matrix = block.layout.to_matrix(tensor)
    cuts = [matrix[cut].T for cut in block.layout.cuts(tensor.shape)]
    places = [np.pad(cut, [(0, 0), (0, MAX_WINDOW - cut.shape[1])], constant_values=-1) for cut in cuts]
    ends = block.ends.at(np.tile(np.arange(matrix.shape[1]), len(cuts)), np)
    return _TensorEdges(np.concatenate(places), *ends)


def _fill(array: np.ndarray, size: int) -> np.ndarray:
    return np.pad(array, [(0, size - len(array)), *[(0, 0)] * (array.ndim - 1)])
