"""csrc/python. An address or a handle (cudaGraph_t, cudaStream_t) is an int."""

from torch import Tensor

interface: int

def open_library(path: str) -> None:
    """Call the library at path from now on, which the process must have loaded."""

def why_not() -> str | None:
    """Why no loop can be built in this process, or None."""

def node_refusal(node_type: int) -> str | None:
    """Why the loop's body may not hold a node of this cudaGraphNodeType, or None."""

def captured_nodes(stream: int) -> int:
    """Nodes captured on a cudaStream_t so far; -1 where it is not capturing, or in vain."""

def restart_capture(stream: int) -> None:
    """Replace the void capture on a cudaStream_t by an empty one, which can be ended well."""

class DeviceLoop:
    """An executable CUDA graph that repeats a captured one on the device that is current now.

    Args:
        graph: cudaGraph_t of one round. It is copied; the memory it uses must stay.
        status: address of (batch,) int8 on the device; rounds end when none is 0.
        batch: samples.
        rounds: address of (1,) int32 on the device; counts the rounds of the latest launch.
        max_steps: most rounds of a launch.
    Raises:
        RuntimeError: graph holds what cannot be repeated on the device, or CUDA failed.
    """

    def __init__(
        self, graph: int, status: int, batch: int, rounds: int, max_steps: int
    ) -> None: ...
    def launch(self, stream: int) -> None:
        """Enqueue the loop on a cudaStream_t.

        Raises:
            RuntimeError: the loop was closed, or CUDA failed.
        """

    def close(self) -> None:
        """Free the graph; a launch under way ends as it should."""

def row_sizes(
    rows: int, batch: int, dim: int, factor: float, scaled_norms: int
) -> tuple[float, float]:
    """The largest number, by size, of the row where that is least, and of all rows.

    Args:
        rows: of (batch, dim) float32. NaN is larger than any number.
        scaled_norms: of (batch,) float64, which gets the norm of each row times factor.
    """

def newest_version(types: tuple[type, ...]) -> int:
    """The highest of the numbers that Python gives classes; 0 where one of these has none.

    A class gets a new one, higher than all so far, after each change of it or of one above it.
    """

class HostSolve:
    """The sizes of a solve on the CPU, and the numbers of its solver.

    Args:
        broyden: by Broyden's method, else by Anderson's; Picard's is that of depth 0.
        state, history: places in csrc/common/state_type.h of the dtypes of x and of the columns.
        batch, dim: B and D. depth: columns of history.
    Attributes:
        size: bytes of memory that the history takes.
    """

    def __init__(
        self,
        broyden: bool,
        state: int,
        history: int,
        batch: int,
        dim: int,
        depth: int,
        rtol: float,
        max_steps: int,
        beta: float,
        ridge: float,
    ) -> None: ...
    @property
    def size(self) -> int: ...

class HostSteps:
    """A solve under way, and its steps, on arrays that are given by their addresses.

    They are what the ops of csrc/step_ops.cpp take, which check them; here nobody does. They must
    outlast this object.

    Args:
        memory: of solve.size bytes.
        scalars: of B (CONTROL_SIZE + 1) float64: `control`, as solver_state has it, and behind it
            the tolerances.
        x, best: (B, D). best, status, num_steps and residual (B,) are made those of a solve that
            begins at x.
        atol: of (B,) float64; 0: `tolerance` is that of all.
    """

    def __init__(
        self,
        solve: HostSolve,
        memory: int,
        scalars: int,
        x: int,
        best: int,
        status: int,
        num_steps: int,
        residual: int,
        atol: int,
        tolerance: float,
    ) -> None: ...
    def step(self, gx: int) -> int:
        """One step from gx (n, D), in place; how many of the n rows of x have not stopped.

        Raises:
            RuntimeError: no memory.
        """

    def gather(self, x: int, sample_of: int) -> None:
        """Write the rows that have not stopped to x, and their samples to sample_of (n,) int64.

        The next steps advance these.
        """

class CellPlan:
    """The solves of one lowered cell on the CPU: it owns the memory that they take.

    Tensors are of float32, or float64 where the plan is. Those that are read may lie in any way;
    those that are written to are taken for contiguous ones of the shapes named. Several threads may
    call one plan at once. Weights are read anew in every call.

    Args:
        float64: the state's dtype, else float32.
        dim: features of the state.
        hidden: outputs of the first of two layers; 0: there is one layer.
        activations, derivatives: codes of fpi_cuda.activations.CODES, of each layer.
        carry: see fpi_cuda.lowered.Lowered.
        depth: of Anderson's history; 0 for Picard. beta, ridge: its numbers, or Picard's damping.
        rtol, atol, max_steps: of the stop test.
        precision: place in fpi_cuda.options.PRECISIONS.
        adjoint_depth, adjoint_beta, adjoint_ridge, adjoint_max_steps: likewise of the adjoint.
        adjoint_rtol: its tolerance, relative to the norm of v.
    Raises:
        ValueError: a number is none of those that there are.
    """

    def __init__(
        self,
        *,
        float64: bool,
        dim: int,
        hidden: int,
        activations: tuple[int, int],
        derivatives: tuple[int, int],
        carry: float,
        depth: int,
        beta: float,
        ridge: float,
        rtol: float,
        atol: float,
        max_steps: int,
        precision: int,
        adjoint_depth: int,
        adjoint_beta: float,
        adjoint_ridge: float,
        adjoint_rtol: float,
        adjoint_max_steps: int,
    ) -> None: ...
    def fits(self, batch: int, tensors: tuple[Tensor | None, ...]) -> bool:
        """Whether `solve` would take these tensors."""

    def solve(
        self,
        batch: int,
        tensors: tuple[Tensor | None, ...],
        x0: Tensor,
        x: Tensor,
        status: Tensor,
        num_steps: Tensor,
        residual: Tensor,
        hidden: Tensor | None,
        slopes: tuple[Tensor | None, ...],
    ) -> int:
        """Solve x = g(x) for every sample; return the highest status.

        With -3, nothing was done: one of the tensors, or x0, is of another shape, dtype, device or
        class.

        Args:
            tensors: weight (outputs, inputs), bias (outputs,), shift and factor (batch, outputs) of
                each layer, and x_factor (batch, dim).
            x0: (batch, dim) where to start. x: (batch, dim) the point to return.
            status: (batch,) int8. num_steps: (batch,) int32.
            residual: (batch,) float64, or float32, to which it is then rounded.
            hidden: (batch, hidden) what the first of two layers gives at the point returned;
                needed with slopes.
            slopes: (batch, outputs) of each layer: its derivative in its sums there. None: it is
                linear, or nobody asks.
        Raises:
            ValueError: an array is missing, or hidden or slopes are asked for of a map with
                factors.
        """

    def adjoint(
        self,
        batch: int,
        weights: tuple[Tensor, ...],
        x: Tensor,
        hidden: Tensor | None,
        slopes: tuple[Tensor | None, ...],
        v: Tensor,
        c: Tensor,
        status: Tensor,
        num_steps: Tensor,
        residual: Tensor,
        deltas: tuple[Tensor | None, ...],
        weight_gradients: tuple[Tensor | None, ...],
    ) -> int:
        """Solve c = J^T c + v from c = v; return the highest status.

        Where every sample has converged, the gradients too; else they are left alone. With -1,
        nothing was done: a row of v that is not zero is to be scaled first or is not finite, see
        fpi_cuda.autograd.scaling.factor_of, or the plan's precision is not 0, and the map itself
        has the last word. With -3, a weight or v is none of this plan's, as in `solve`.

        Args:
            weights: of each layer. x, hidden, slopes: as `solve` has left them.
            v: (batch, dim). c: (batch, dim), written; other memory than v.
            status, num_steps, residual: as in `solve`.
            deltas, weight_gradients: see `gradients`.
        Raises:
            ValueError: an array is missing.
        """

    def gradients(
        self,
        batch: int,
        weights: tuple[Tensor, ...],
        x: Tensor,
        hidden: Tensor | None,
        slopes: tuple[Tensor | None, ...],
        c: Tensor,
        deltas: tuple[Tensor | None, ...],
        weight_gradients: tuple[Tensor | None, ...],
    ) -> int:
        """Write the gradients of <c, g(x)> in what the layers are made of, those asked for.

        Args:
            weights, x, hidden, slopes: as in `adjoint`.
            c: (batch, dim).
            deltas: (batch, outputs) of each layer: the gradient in its sums, and so in its shift.
            weight_gradients: (outputs, inputs) of each layer.
        Returns:
            -3: nothing was done, a weight or c is none of this plan's.
        Raises:
            ValueError: an array is missing.
        """

    def bytes(self) -> int:
        """Memory that is kept for calls to come; that of calls under way is not counted."""

    def clear(self) -> None:
        """Give that memory back."""
