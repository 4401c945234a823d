"""What the JAX libraries share: maps in jax.numpy, weights by way of numpy, jit and vmap."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor

import fpi_cuda as fpi
from bench import own
from bench.peers.base import Peer
from bench.problems import Problem

# A solver's failure inside a compiled solve is raised too: JAX need not log its traceback.
logging.getLogger("jax._src.callback").setLevel(logging.CRITICAL)

Weights = dict[str, Any]
Prepare = Callable[[Any, Weights], Any]
Step = Callable[[Any, Any, Weights], Any]

ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "identity": lambda a: a,
    "relu": jax.nn.relu,
    "sigmoid": jax.nn.sigmoid,
    "gelu": lambda a: jax.nn.gelu(a, approximate=False),
    "softplus": jax.nn.softplus,
    "tanh": jnp.tanh,
}


def maps_of(cell: Any) -> tuple[Prepare, Step]:
    """`prepare(z, weights)` and `step(x, prepared, weights)` of one sample; weights by name."""
    for kind, step in STEPS.items():
        if isinstance(cell, kind):
            return PREPARES.get(kind, _affine("B")), step(cell)
    raise NotImplementedError(f"no jax.numpy form of {type(cell).__name__}")


def _affine(layer: str) -> Prepare:
    return lambda z, weights: weights[f"{layer}.weight"] @ z + weights[f"{layer}.bias"]


def _dense_step(cell: Any) -> Step:
    activation = ACTIVATIONS[cell.activation]
    return lambda x, prepared, weights: activation(weights["A.weight"] @ x + prepared)


def _mlp_step(cell: Any) -> Step:
    activation, out_activation = ACTIVATIONS[cell.activation], ACTIVATIONS[cell.out_activation]

    def step(x: Any, prepared: Any, weights: Weights) -> Any:
        hidden = activation(weights["A.weight"] @ x + prepared)
        return out_activation(weights["W.weight"] @ hidden + weights["W.bias"])

    return step


def _gradient_descent_step(cell: Any) -> Step:
    activation = ACTIVATIONS[cell.energy.activation]

    def energy(x: Any, prepared: Any, weights: Weights) -> Any:
        hidden = activation(weights["energy.A.weight"] @ x + prepared)
        return weights["energy.w"] @ hidden + 0.5 * cell.energy.quadratic * jnp.sum(x * x)

    gradient = jax.grad(energy)
    return lambda x, prepared, weights: x - cell.step_size * gradient(x, prepared, weights)


def _mlp_norm_step(cell: Any) -> Step:
    def step(x: Any, prepared: Any, weights: Weights) -> Any:
        hidden = jax.nn.relu(weights["A.weight"] @ x + prepared)
        out = weights["W.weight"] @ hidden + weights["W.bias"]
        return 0.5 * (_normal(out) * weights["norm.weight"] + weights["norm.bias"])

    return step


def _normal(x: Any, axis: Any = None) -> Any:
    mean = jnp.mean(x, axis, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(jnp.var(x, axis, keepdims=True) + 1e-5)


def _conv_norm_step(cell: Any) -> Step:
    def conv(x: Any, weight: Any) -> Any:
        return jax.lax.conv(x[None], weight, (1, 1), "SAME")[0]

    def norm(x: Any, name: str, weights: Weights) -> Any:
        grouped = x.reshape(cell.norm1.num_groups, -1)
        scale, shift = (weights[f"{name}.{w}"][:, None, None] for w in ("weight", "bias"))
        return _normal(grouped, 1).reshape(x.shape) * scale + shift

    def step(x: Any, z: Any, weights: Weights) -> Any:
        first = norm(jax.nn.relu(conv(x, weights["conv1.weight"])), "norm1", weights)
        inner = norm(z + conv(first, weights["conv2.weight"]), "norm2", weights)
        return 0.5 * norm(jax.nn.relu(x + inner), "norm3", weights)

    return step


def _attention_step(cell: Any) -> Step:
    def step(x: Any, z: Any, weights: Weights) -> Any:
        q, k, v = (x @ weights[f"{name}.weight"].T for name in "qkv")
        attended = jax.nn.softmax(q @ k.T * x.shape[-1] ** -0.5, axis=-1) @ v
        return jnp.tanh(attended @ weights["out.weight"].T + z)

    return step


STEPS: dict[type, Callable[[Any], Step]] = {
    fpi.cells.Dense: _dense_step,
    fpi.cells.MLP: _mlp_step,
    fpi.cells.GradientDescent: _gradient_descent_step,
    own.Plain: _dense_step,
    own.MLPNorm: _mlp_norm_step,
    own.ConvNorm: _conv_norm_step,
    own.Attention: _attention_step,
}
PREPARES: dict[type, Prepare] = {
    fpi.cells.GradientDescent: _affine("energy.B"),
    own.ConvNorm: lambda z, weights: z,
    own.Attention: lambda z, weights: z,
}
"""Where it is not B z + b."""


class Loaded(NamedTuple):
    """A problem as JAX has it: arrays where JAX computes, made before anything is timed."""

    compiled: Compiled
    weights: Weights
    z: Any
    x0: Any
    v: Any


class JaxPeer(Peer):
    """A JAX library under jit: one sample's solve under vmap, or one solve of the whole batch.

    Args:
        batched: the state of the solver is the batch, with one stop test for all samples.
    """

    compiles = True

    def __init__(self, name: str, batched: bool = False, **settings: Any) -> None:
        super().__init__(name, batched=batched, **settings)
        self._compiled: WeakKeyDictionary[Any, dict[int, Compiled]] = WeakKeyDictionary()

    def solve_one(
        self,
        step: Step,
        x0: Any,
        prepared: Any,
        weights: Weights,
        tol: Any,
        adjoint_tol: Any,
        max_steps: int,
    ) -> tuple[Any, Any]:
        """Fixed point and number of evaluations of one state, differentiable.

        Args:
            step: step(x, prepared, weights) of one sample, or of the batch.
            tol, adjoint_tol: traced scalars, so that a new tolerance compiles nothing anew.
        """
        raise NotImplementedError

    def first_tolerance(self, problem: Problem) -> float:
        whole = problem.batch**0.5 if self.settings["batched"] else 1.0
        return super().first_tolerance(problem) * whole

    def load(self, problem: Problem, v: Tensor | None = None) -> Loaded:
        made = self._compiled.setdefault(problem.cell, {})
        if problem.max_steps not in made:
            made[problem.max_steps] = Compiled(self, problem)
        weights = {name: _to_jax(p.detach()) for name, p in problem.cell.named_parameters()}
        arrays = [None if t is None else _to_jax(t) for t in (problem.z, problem.x0, v)]
        loaded = Loaded(made[problem.max_steps], weights, *arrays)
        jax.block_until_ready((weights, arrays))
        return loaded

    def run(self, loaded: Loaded, tol: float) -> Any:
        compiled, weights, z, x0, _ = loaded
        return jax.block_until_ready(compiled.forward(weights, z, x0, _scalar(tol)))

    def run_both(self, loaded: Loaded, tol: float, adjoint_tol: float) -> Any:
        compiled, weights, z, x0, v = loaded
        given = (weights, z, x0, _scalar(tol), _scalar(adjoint_tol), v)
        return jax.block_until_ready(compiled.backward(*given))

    def way(self, problem: Problem, tol: float) -> str:
        return "jax.numpy, jit"

    def solve(self, problem: Problem, tol: float) -> Tensor:
        return _to_torch(self.run(self.load(problem), tol)[0], problem.x0.device)

    def num_steps(self, problem: Problem, tol: float) -> Tensor:
        steps = _to_torch(self.run(self.load(problem), tol)[1], problem.x0.device)
        return steps.expand(problem.batch)

    def solve_and_grad(
        self, problem: Problem, tol: float, adjoint_tol: float, v: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        (weight_grads, z_grad), x = self.run_both(self.load(problem, v), tol, adjoint_tol)
        ordered = [weight_grads[name] for name, _ in problem.cell.named_parameters()]
        return _to_torch(x, v.device), [_to_torch(g, v.device) for g in (z_grad, *ordered)]

    def peak_bytes(self, problem: Problem, tol: float) -> int:
        """XLA's own plan of the compiled solve: temporaries and outputs."""
        compiled, weights, z, x0, _ = self.load(problem)
        plan = compiled.forward.lower(weights, z, x0, _scalar(tol)).compile().memory_analysis()
        return int(plan.temp_size_in_bytes + plan.output_size_in_bytes)


class Compiled:
    """A map's solve, and its gradient, under jit; a new batch size compiles them anew."""

    def __init__(self, peer: JaxPeer, problem: Problem) -> None:
        prepare, step = maps_of(problem.cell)
        cap = problem.max_steps

        def forward(weights: Weights, z: Any, x0: Any, tol: Any, adjoint_tol: Any = None) -> Any:
            prepared = jax.vmap(prepare, in_axes=(0, None))(z, weights)
            if peer.settings["batched"]:
                whole = jax.vmap(step, in_axes=(0, 0, None))
                return peer.solve_one(whole, x0, prepared, weights, tol, adjoint_tol, cap)

            def one(x: Any, p: Any) -> Any:
                return peer.solve_one(step, x, p, weights, tol, adjoint_tol, cap)

            return jax.vmap(one)(x0, prepared)

        def loss(weights: Weights, z: Any, x0: Any, tol: Any, adjoint_tol: Any, v: Any) -> Any:
            x, _ = forward(weights, z, x0, tol, adjoint_tol)
            return jnp.sum(v * x), x

        self.forward = jax.jit(forward)
        self.backward = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))


@functools.lru_cache(maxsize=64)
def _scalar(value: float) -> Any:
    return jnp.float32(value)


def _to_jax(t: Tensor) -> Any:
    """A copy where JAX computes; from a CUDA device without a way through the host."""
    return jnp.array(jnp.from_dlpack(t.contiguous()) if t.is_cuda else t.numpy(), copy=True)


def _to_torch(array: Any, device: torch.device) -> Tensor:
    """The same numbers on `device`: without a copy where they are there."""
    if device.type == "cuda" and array.devices().pop().platform != "cpu":
        return torch.from_dlpack(array)
    return torch.from_numpy(np.array(array)).to(device)
