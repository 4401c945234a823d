"""What the JAX libraries share: maps in jax.numpy, weights by way of numpy, jit and vmap."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor

import fpi_cuda as fpi
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
    if isinstance(cell, fpi.cells.Dense):
        return _affine("B"), _dense_step(cell)
    if isinstance(cell, fpi.cells.MLP):
        return _affine("B"), _mlp_step(cell)
    if isinstance(cell, fpi.cells.GradientDescent):
        return _affine("energy.B"), _gradient_descent_step(cell)
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


class JaxPeer(Peer):
    """A JAX library: one sample's solve under vmap, the whole under jit."""

    compiles = True

    def __init__(self, name: str, **settings: Any) -> None:
        super().__init__(name, **settings)
        self._compiled: WeakKeyDictionary[Problem, _Compiled] = WeakKeyDictionary()

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
        """Fixed point and number of evaluations of one sample, differentiable.

        Args:
            step: step(x, prepared, weights) of one sample.
            tol, adjoint_tol: traced scalars, so that a new tolerance compiles nothing anew.
        """
        raise NotImplementedError

    def _of(self, problem: Problem) -> _Compiled:
        if problem not in self._compiled:
            self._compiled[problem] = _Compiled(self, problem)
        return self._compiled[problem]

    def solve(self, problem: Problem, tol: float) -> Tensor:
        compiled = self._of(problem)
        x, _ = compiled.forward(compiled.weights, compiled.z, compiled.x0, tol)
        return _to_torch(x, problem.x0.device)

    def num_steps(self, problem: Problem, tol: float) -> Tensor:
        compiled = self._of(problem)
        _, steps = compiled.forward(compiled.weights, compiled.z, compiled.x0, tol)
        return _to_torch(steps, problem.x0.device)

    def solve_and_grad(
        self, problem: Problem, tol: float, adjoint_tol: float, v: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        compiled = self._of(problem)
        (weight_grads, z_grad), x = compiled.backward(
            compiled.weights, compiled.z, compiled.x0, tol, adjoint_tol, _to_jax(v)
        )
        ordered = [weight_grads[name] for name, _ in problem.cell.named_parameters()]
        return _to_torch(x, v.device), [_to_torch(g, v.device) for g in (z_grad, *ordered)]

    def peak_bytes(self, problem: Problem, tol: float) -> int:
        """XLA's own plan of the compiled solve: temporaries and outputs."""
        compiled = self._of(problem)
        lowered = compiled.forward.lower(compiled.weights, compiled.z, compiled.x0, tol)
        plan = lowered.compile().memory_analysis()
        return int(plan.temp_size_in_bytes + plan.output_size_in_bytes)


class _Compiled:
    def __init__(self, peer: JaxPeer, problem: Problem) -> None:
        prepare, step = maps_of(problem.cell)
        cap = problem.max_steps
        self.weights = {
            name: _to_jax(value.detach()) for name, value in problem.cell.named_parameters()
        }
        self.z = _to_jax(problem.z)
        self.x0 = _to_jax(problem.x0)

        def forward(weights: Weights, z: Any, x0: Any, tol: Any, adjoint_tol: Any = None) -> Any:
            prepared = jax.vmap(prepare, in_axes=(0, None))(z, weights)

            def one(x: Any, p: Any) -> Any:
                return peer.solve_one(step, x, p, weights, tol, adjoint_tol, cap)

            return jax.vmap(one)(x0, prepared)

        def loss(weights: Weights, z: Any, x0: Any, tol: Any, adjoint_tol: Any, v: Any) -> Any:
            x, _ = forward(weights, z, x0, tol, adjoint_tol)
            return jnp.sum(v * x), x

        self.forward = jax.jit(forward)
        self.backward = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))


def _to_jax(t: Tensor) -> Any:
    """The same numbers where they are; from the CPU, wherever JAX computes."""
    return jnp.from_dlpack(t.contiguous()) if t.is_cuda else jnp.asarray(t.numpy())


def _to_torch(array: Any, device: torch.device) -> Tensor:
    """Computed, and the same numbers on `device`: without a copy where they are there."""
    jax.block_until_ready(array)
    if device.type == "cuda" and array.devices().pop().platform != "cpu":
        return torch.from_dlpack(array)
    return torch.from_numpy(np.asarray(array).copy()).to(device)
