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
