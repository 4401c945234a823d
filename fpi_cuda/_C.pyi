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

class HostSteps:
    """The arrays of one solve on the CPU, by their addresses, and the steps taken on them.

    They are those that the ops of csrc/step_ops.cpp take, which check them; here nobody does. They
    must outlast this object.

    Args:
        broyden: by Broyden's method, else by Anderson's; Picard's is that of depth 0.
        state, history: places in csrc/common/state_type.h of the dtypes of x and of the columns.
        arrays: of the whole batch: best, anchor, f_previous, partner_previous, columns_f,
            columns_g, gram, control, atol, status, num_steps, residual; 0 for none.
        dim: D. depth: columns of history.
    """

    def __init__(
        self,
        broyden: bool,
        state: int,
        history: int,
        arrays: list[int],
        dim: int,
        depth: int,
        rtol: float,
        max_steps: int,
        beta: float,
        ridge: float,
    ) -> None: ...
    def hold(self, x: int, sample_of: int, rows: int) -> None:
        """Take steps on x (rows, D) from now on, whose samples are sample_of (rows,) int64, or all.

        Before the first step this has to be called.
        """

    def step(self, gx: int) -> int:
        """One step from gx (rows, D), in place; how many of the rows have not stopped.

        Raises:
            RuntimeError: no memory.
        """

    def gather(self, x: int, sample_of: int) -> None:
        """Write the rows that have not stopped to x, their samples to sample_of, and hold these."""
