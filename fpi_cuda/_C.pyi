"""csrc/python. An address or a handle (cudaGraph_t, cudaStream_t) is an int."""

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

class HostSolve:
    """The sizes of a solve on the CPU, and the numbers of its solver.

    Args:
        broyden: by Broyden's method, else by Anderson's; Picard's is that of depth 0.
        state, history: places in csrc/common/state_type.h of the dtypes of x and of the columns.
        batch, dim: B and D. depth: columns of history.
    Attributes:
        size: bytes of memory that the solve takes besides what it returns; first of it comes
            `control`, as solver_state has it.
        atol: where in it (B,) float64 tolerances begin.
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
    @property
    def atol(self) -> int: ...

class HostSteps:
    """A solve under way, and its steps, on arrays that are given by their addresses.

    They are what the ops of csrc/step_ops.cpp take, which check them; here nobody does. They must
    outlast this object.

    Args:
        memory: of solve.size bytes.
        x, best: (B, D). best, status, num_steps and residual (B,) are made those of a solve that
            begins at x.
        atol: of (B,) float64; 0: `tolerance` is that of all.
    """

    def __init__(
        self,
        solve: HostSolve,
        memory: int,
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
