"""The benchmark itself: its fairness, its account of what libraries do, its tables."""
# ruff: noqa: E402

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

for name in ("matplotlib", "sklearn", "torchdeq", "tqdm"):
    pytest.importorskip(name, reason="the bench extra is not installed")

import fpi_cuda as fpi
from bench import device_loop, measure, report, settings, throughput
from bench.contamination import contamination
from bench.json_files import finite, write_json
from bench.loss_scale import loss_scale
from bench.measure import loosest_tolerance, paired_rounds
from bench.memory import torch_peak_bytes
from bench.peers import Entry, Peer, load_entries
from bench.peers.ours import FpiCuda
from bench.plots import plot
from bench.problems import Problem, reference_solution, tanh_cell
from bench.record import Record
from bench.settings import Task, at_batch, choose, make_task, try_forward
from bench.training import example_f1

CPU = torch.device("cpu")
TINY = throughput.Size(
    tanh_batches=(2, 8),
    trained_batches=(8,),
    tanh_features=8,
    main_batch=8,
    digits_epochs=1,
    rounds=2,
    num_candidates=1,
    compile_everywhere=False,
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As the benchmark itself runs: small solves on many threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def unrolled(problem: Problem, v: Tensor) -> tuple[Tensor, Tensor]:
    """Fixed point and gradient in z by autograd through 500 float64 steps: another oracle."""
    exact = problem.double()
    z = exact.z.clone().requires_grad_()
    x = exact.x0
    for _ in range(500):
        x = exact.cell.step(x, exact.cell.prepare(z))
    return x.detach(), torch.autograd.grad((v.double() * x).sum(), z)[0]


def test_reference_agrees_with_unrolling() -> None:
    problem = tanh_cell(5, features=6)
    v = torch.randn(5, 6, generator=torch.Generator().manual_seed(3))
    start = FpiCuda(fpi.Picard()).solve(problem, 1e-4)
    reference = reference_solution(problem, start, v)
    x, z_grad = unrolled(problem, v)
    assert bool(reference.valid.all())
    torch.testing.assert_close(reference.x, x, rtol=0, atol=1e-12)
    torch.testing.assert_close(reference.z_grad, z_grad, rtol=1e-10, atol=1e-12)
    assert 1.0 <= reference.condition <= 10.01  # at most 1 / (1 - 0.9)


def task(batch: int = 6, features: int = 8) -> Task:
    problem = tanh_cell(batch, features, norm=0.5, rtol=1e-5)
    return make_task(problem, FpiCuda(fpi.Picard()))


ENTRIES, _ = load_entries(("ours", "loop", "torchdeq"))


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.label)
def test_every_peer_reaches_the_same_solution_and_gradient(entry: Entry) -> None:
    small = task()
    chosen = choose(entry, small, num_candidates=1)
    assert chosen.both is not None
    assert chosen.forward.tol.solved == 1.0
    x, grads = chosen.both.peer.solve_and_grad(
        small.problem, chosen.both.tol.tol, chosen.both.adjoint.tol, small.v
    )
    reference = small.reference
    error = (x - reference.x).norm(dim=1) / reference.x.norm(dim=1)
    assert float(error.max()) <= reference.condition * small.problem.rtol * 1.01
    exact = [reference.z_grad, *reference.parameter_grads]
    for grad, wanted in zip(grads, exact, strict=True):
        distance = float((grad - wanted).norm() / wanted.norm())
        assert distance <= 10 * small.gradient_rtol


def test_steps_that_a_peer_takes_are_counted() -> None:
    problem = tanh_cell(4, features=8)
    peer = next(entry for entry in ENTRIES if entry.label == "torch loop, per-sample stop")
    loose, tight = (peer.candidates[0].num_steps(problem, tol) for tol in (1e-2, 1e-5))
    assert loose.shape == (4,)
    assert 1 <= int(loose[0]) < int(tight[0]) < problem.max_steps


class Liar(Peer):
    """Claims success at once."""

    library = "liar"

    def solve(self, problem: Problem, tol: float) -> Tensor:
        return problem.x0 + tol


def test_lying_peer_is_caught() -> None:
    result = try_forward(Liar("liar"), tanh_cell(4, features=8))
    assert result.tol.solved == 0.0
    assert result.tol.worst > 1e-2


def test_peer_that_returns_nan_is_caught() -> None:
    problem = tanh_cell(4, features=8)
    x = torch.full_like(problem.x0, math.nan)
    assert problem.true_residual(x).tolist() == [math.inf] * 4


class Broken(Peer):
    """Raises."""

    def solve(self, problem: Problem, tol: float) -> Tensor:
        raise ZeroDivisionError("no such luck")


def test_broken_peer_is_reported_by_name() -> None:
    with pytest.raises(RuntimeError, match="setting A: ZeroDivisionError: no such luck"):
        choose(Entry("broken", (Broken("setting A"),)), task())


def test_reason_of_a_traceback_is_its_last_error() -> None:
    inner = "Traceback (most recent call last):\n  ...\n_EquinoxRuntimeError: A stagnation.\n\n---"
    text = f"INTERNAL: error calling callback: {inner}"
    assert settings.reason(ValueError(text)) == "_EquinoxRuntimeError: A stagnation."
    assert settings.reason(ValueError("one\ntwo")) == "ValueError: one"


def test_settings_with_one_reason_are_counted() -> None:
    assert report.grouped("a: X: no; b: X: no; c: Y") == "2 settings: X: no; c: Y"
    assert report.grouped("too slow") == "too slow"


def test_missing_library_is_skipped_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "bench.peers.loop", None)
    entries, skipped = load_entries(("loop", "ours"))
    assert list(skipped) == ["loop"]
    assert {entry.library for entry in entries} == {"fpi_cuda"}


@pytest.mark.parametrize("first", [1e-7, 1e-3, 0.05], ids=lambda first: f"from {first:g}")
def test_loosest_tolerance_is_close_below_the_threshold(first: float) -> None:
    threshold = 3.3e-4

    def error(tol: float) -> Tensor:
        return torch.tensor([tol, tol / 2])

    found = loosest_tolerance(error, threshold, first)
    reachable = min(threshold, first * 2**8)
    assert found.solved == 1.0
    assert reachable * 2**-0.126 <= found.tol <= reachable


def test_tolerance_that_never_suffices_keeps_the_most_solved() -> None:
    found = loosest_tolerance(lambda tol: torch.tensor([tol, 1.0]), 1e-3, 1e-2)
    assert found.solved == 0.5
    assert found.tol <= 1e-3


def test_search_for_a_tolerance_ends_in_time() -> None:
    tried: list[float] = []

    def error(tol: float) -> Tensor:
        tried.append(tol)
        time.sleep(0.02)
        return torch.tensor([tol])

    found = loosest_tolerance(error, 1e-6, 1e-3, within=0.05)
    assert len(tried) <= 4
    assert found.solved == 0.0


def test_tolerance_that_takes_too_long_is_not_taken() -> None:
    def error(tol: float) -> Tensor:
        time.sleep(5 if tol < 1e-4 else 0)
        return torch.tensor([tol])

    began = time.perf_counter()
    found = loosest_tolerance(error, 1e-6, 1e-3, longest=0.1)
    assert 1e-4 <= found.tol <= 1e-3
    assert time.perf_counter() - began < 3
    with pytest.raises(TimeoutError, match=r"takes more than 0\.1 s"):
        loosest_tolerance(error, 1e-6, 1e-5, longest=0.1)


def test_tolerance_at_which_a_library_raises_is_not_taken() -> None:
    def error(tol: float) -> Tensor:
        if tol < 1e-4:
            raise ArithmeticError("stagnated")
        return torch.tensor([tol])

    found = loosest_tolerance(error, 1e-6, 1e-3)
    assert (found.solved, found.tol >= 1e-4) == (0.0, True)
    with pytest.raises(ArithmeticError):
        loosest_tolerance(error, 1e-6, 1e-5)


def test_slow_call_leaves_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "LONGEST_ROW", 0.05)
    calls = {"fast": lambda: None, "slow": lambda: time.sleep(0.03)}
    times = paired_rounds(calls, 6, CPU)
    assert {name: len(values) for name, values in times.items()} == {
        "fast": 6,
        "slow": measure.FEWEST_ROUNDS,
    }


def test_row_too_slow_for_a_batch_is_left_out_with_its_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen = choose(Entry("ours", (FpiCuda(fpi.Picard()),)), task())
    monkeypatch.setattr(settings, "SOLVE_SECONDS", 0.05)
    monkeypatch.setattr(FpiCuda, "solve", lambda *_: time.sleep(5))
    with pytest.raises(TimeoutError, match=r"takes more than 0\.05 s"):
        at_batch(chosen, tanh_cell(16, features=8), torch.ones(16, 8))


def test_parts_resume_the_same_command_only(tmp_path: Path) -> None:
    path = tmp_path / "parts.json"
    throughput.Parts(path, "bench A").once("tanh", lambda: {"seconds": 1.0})
    resumed = throughput.Parts(path, "bench A --resume", resume=True)
    assert resumed.once("tanh", lambda: pytest.fail("measured again")) == {"seconds": 1.0}
    for other in (
        throughput.Parts(path, "bench B", resume=True),
        throughput.Parts(path, "bench A", resume=False),
    ):
        assert other.once("tanh", lambda: {"seconds": 2.0}) == {"seconds": 2.0}
    other.clear()
    assert not path.exists()


def test_rounds_are_interleaved_and_paired() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "AB"}
    times = paired_rounds(calls, 3, CPU)
    assert {name: len(values) for name, values in times.items()} == {"A": 3, "B": 3}
    blocks = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    assert blocks == ["A", "B"] * 4  # the warm-up round, then three


def test_peak_memory_counts_what_is_held_at_once() -> None:
    def call() -> Tensor:
        first = torch.ones(1000, 100)
        for _ in range(5):
            first = first * 2  # old and new together: two of 400,000 bytes
        return first

    assert 800_000 <= torch_peak_bytes(call, CPU) < 801_000


def test_loss_scale_and_contamination_tell_libraries_apart() -> None:
    small = task(batch=16)
    ours, default = (
        choose(next(e for e in ENTRIES if e.label == label), small)
        for label in ("fpi_cuda Anderson", "torchdeq Picard (default)")
    )
    ours_scaled, default_scaled = loss_scale(ours, small), loss_scale(default, small)
    assert ours_scaled["1e-06"] <= 2 * ours_scaled["1"]
    assert default_scaled["1e-06"] > 100 * ours_scaled["1e-06"]
    ours_moved, default_moved = (contamination(item, small.problem) for item in (ours, default))
    assert ours_moved["nan"]["moved"] == 0.0
    assert ours_moved["nan"]["solved"] == ours_moved["easy"]["solved"]
    assert ours_moved["nan"]["steps"] == ours_moved["easy"]["steps"]
    assert default_moved["nan"]["steps"] > default_moved["easy"]["steps"]


def test_example_f1_by_hand() -> None:
    predicted = torch.tensor([[True, True, False], [False, False, False], [True, False, False]])
    targets = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    assert example_f1(predicted, targets) == pytest.approx((2 / 3 + 1 + 0) / 3)


@pytest.fixture(scope="module")
def results() -> dict:
    """The main job at a tiny size."""
    record = Record()
    throughput.run(record, TINY, modules=("ours", "loop"))
    measured = record.finish()
    measured["machine"] = {
        "device": "cpu",
        "cpu": "a processor",
        "threads": 1,
        "python": "3",
        "versions": {"torch": torch.__version__},
        "commit": "0123abc",
        "command": "python -m bench.throughput",
        "date": "2000-01-01",
    }
    return json.loads(json.dumps(finite(measured), allow_nan=False))


def test_main_job_measures_every_problem(results: dict) -> None:
    assert [problem["name"] for problem in results["problems"]] == [
        "tanh",
        "digits FPI_NN",
        "digits FPI_GD",
    ]
    for problem in results["problems"]:
        assert problem["failed"] == {}
        for table in problem["tables"]:
            assert [row["solved"] for row in table["rows"]] == [1.0] * 5
            for row in table["rows"]:
                assert row["worst_residual"] <= problem["rtol"]
                assert row["forward"]["solved_per_second"] > 0
                assert 0 < row["forward"]["seconds"] < row["both"]["seconds"] * 10
            baseline = table["rows"][0]["forward"]["time_over_baseline"]
            assert baseline == {"min": 1.0, "median": 1.0, "max": 1.0}
    for layer in results["training"]:
        assert 0.0 <= layer["score"] <= 1.0


def test_terminal_tables_fit_and_name_every_row(results: dict) -> None:
    text = report.text(results)
    assert max(map(len, text.splitlines())) <= report.WIDTH
    for row in results["problems"][0]["tables"][0]["rows"]:
        assert text.count(row["label"]) >= 8  # tables, settings, contamination, loss scale
    assert "tanh: B=8, d=8, float32, true residual 1e-06" in text


def test_ranges_give_way_where_a_table_is_too_wide(results: dict) -> None:
    table = json.loads(json.dumps(results["problems"][0]["tables"][1]))
    for row in table["rows"]:
        for key in ("forward", "both"):
            row[key]["time_over_baseline"] = {"min": 123456.0, "median": 234567.0, "max": 3456789.0}
            row[key]["solved_per_second"] = 123456.0
    lines = report.aligned(report.fitting_table(table))
    assert max(map(len, lines)) <= report.WIDTH
    assert "234567" in lines[1]


def test_what_is_missing_stands_in_both_reports(results: dict) -> None:
    problem = results["problems"][0]
    problem = problem | {"failed": {"a peer": "too slow, 7 s"}}
    table = problem["tables"][0] | {"left_out": {"another": "one solve takes 9 s"}}
    partial = results | {"problems": [problem | {"tables": [table, *problem["tables"][1:]]}]}
    for told in (report.text(partial), report.markdown(partial)):
        assert "not run: a peer: too slow, 7 s" in told
        assert "left out: another: one solve takes 9 s" in told


def test_report_names_who_is_faster(results: dict) -> None:
    problem = json.loads(json.dumps(results["problems"][0]))
    for table in problem["tables"]:
        for row in table["rows"]:
            row["forward"]["time_over_baseline"]["median"] = 1.0
            row["both"]["time_over_baseline"]["median"] = 1.0
    quick = problem["tables"][1]["rows"][-1]
    quick["both"]["time_over_baseline"]["median"] = 0.25
    assert report.faster(problem) == [
        f"faster than fpi_cuda Anderson, forward+backward: {quick['label']}: "
        f"0.25 at B={problem['tables'][1]['batch']} of its time"
    ]
    quick["solved"] = 0.5
    assert report.faster(problem) == []


def test_plots_are_written(results: dict, tmp_path: Path) -> None:
    written = plot(results, tmp_path / "a.json")
    assert [path.name for path in written] == ["a-throughput.png", "a-steps.png"]
    for path in written:
        assert path.read_bytes().startswith(b"\x89PNG")


def test_pages_are_written_from_the_results(results: dict, tmp_path: Path) -> None:
    folder = tmp_path / "bench" / "results"
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    write_json(folder / "throughput-cpu.json", results)
    write_json(folder / "b.json", {"readme": "### told"})
    report.update_pages(tmp_path)
    once = readme.read_text()
    assert once.startswith(f"before\n{report.BEGIN}\n")
    assert once.endswith(f"{report.END}\nafter\n")
    assert "old" not in once
    assert "| time over fpi_cuda's |" in once
    page = (folder / "README.md").read_text()
    assert "| fpi_cuda Anderson | 100% |" in page
    assert page.endswith("### told\n")
    report.update_pages(tmp_path)
    assert readme.read_text() == once


def test_readme_without_markers_is_refused(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("nothing to replace\n")
    with pytest.raises(ValueError, match="must hold <!-- results:begin -->"):
        report.update_pages(tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("activation", ["tanh", "relu", "sigmoid", "gelu", "softplus", "identity"])
def test_jax_maps_equal_the_cells(activation: str) -> None:
    jax = pytest.importorskip("jax")
    from bench.peers.jax_common import maps_of

    energy = fpi.cells.MLPEnergy(5, 7, 9, activation="softplus")
    for cell in (
        fpi.cells.Dense(5, 7, activation),
        fpi.cells.MLP(5, 7, 9, activation, "sigmoid"),
        fpi.cells.GradientDescent(energy, 0.5),
    ):
        z, x = torch.randn(3, 5), torch.randn(3, 7)
        prepare, step = maps_of(cell)
        weights = {name: p.detach().numpy() for name, p in cell.named_parameters()}
        prepared = jax.vmap(prepare, in_axes=(0, None))(z.numpy(), weights)
        image = jax.vmap(step, in_axes=(0, 0, None))(x.numpy(), prepared, weights)
        torch.testing.assert_close(torch.tensor(image.tolist()), cell(x, z).detach())


def test_the_device_loop_benchmark_says_what_it_could_not_run() -> None:
    size = device_loop.Size(tanh=(4, 8), conv=(2, 8, 4), steps=(2, 4), rounds=2, num_candidates=1)
    record = Record(head={"machine": {"device": "cpu"}})
    device_loop.run(record, size, CPU, ("loop", "torchdeq"))
    record.skipped["jaxopt"] = "not installed"
    results = finite(record.finish())
    rows = results["conv"]["rows"]
    labels = ["fpi_cuda, host loop", "torchdeq Anderson", "torchdeq Picard"]
    assert [row["label"] for row in rows] == labels
    assert all(row["solved"] == 1.0 for row in rows)
    assert rows[0]["gradient_error"] < 0.1
    times = results["seconds_per_iteration"]
    assert list(times) == ["host loop, Picard", "host loop, Anderson", "eager loop"]
    text = device_loop.text(results)
    assert f"{1e6 * times['eager loop']['median']:10.2f}  eager loop" in text
    assert "torch loop, per-sample stop" in text
    assert "skipped, not installed: jaxopt" in text
    assert "NOT RUN: the device loop" in text
