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
from bench import cost, device_loop, measure, own, report, settings, throughput
from bench.contamination import contamination
from bench.json_files import finite, write_json
from bench.loss_scale import loss_scale
from bench.measure import fresh_rounds, loosest_tolerance, paired_rounds
from bench.memory import torch_peak_bytes
from bench.peers import Entry, Peer, load_entries
from bench.peers.ours import FpiCuda
from bench.plots import plot
from bench.problems import Problem, Variants, norms, reference_solution, tanh_cell
from bench.record import Record
from bench.settings import Task, choose, try_forward
from bench.training import example_f1

CPU = torch.device("cpu")
TINY = throughput.Size(
    own=(own.Own("your tanh, d=6", lambda: own.Plain(6), (6,), 8),),
    own_batches=(1, 8),
    tanh_batches=(2, 8),
    trained_batches=(8,),
    tanh_features=8,
    main_batch=8,
    digits_epochs=1,
    rounds=2,
    variants=2,
    most_settings=1,
    compile_all=False,
    scaled=(50, 100),
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
        x = exact.cell(x, z)
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


def test_reference_of_a_map_that_no_plain_iteration_solves() -> None:
    problem = tanh_cell(4, features=6, norm=1.6)
    with torch.no_grad():
        problem.cell.A.weight.neg_()  # one slope is below -1: Picard ends in a cycle
    v = torch.ones(4, 6)
    start = FpiCuda(fpi.Anderson()).solve(problem, 1e-4)
    reference = reference_solution(problem, start, v)
    assert bool(reference.valid.all())
    exact = problem.double()
    for moved in (1e-5, -1e-5):
        z = exact.z.clone()
        z[:, 2] += moved
        there = reference_solution(problem.with_inputs(z), start, v).x
        slope = ((there - reference.x) * v).sum(1) / moved
        torch.testing.assert_close(slope, reference.z_grad[:, 2], rtol=1e-3, atol=1e-4)


class Kinked(torch.nn.Module):
    """Its slope jumps at z = 0."""

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return 0.5 * torch.relu(x) + z


def test_a_sample_at_a_kink_is_not_judged() -> None:
    z = torch.tensor([[1.0, 1.0], [0.0, 1.0], [-1.0, 1.0]])
    problem = Problem("kink", Kinked(), z, torch.zeros_like(z), 1e-4)
    reference = reference_solution(problem, 2 * z.relu(), torch.ones_like(z))
    assert reference.valid.tolist() == [True, False, True]


@pytest.mark.parametrize("activation", ["tanh", "gelu", "softplus"])
def test_cells_written_out_by_hand_are_the_cells(activation: str) -> None:
    energy = fpi.cells.MLPEnergy(5, 7, 9, activation=activation, quadratic=0.8)
    for cell in (
        fpi.cells.Dense(5, 7, activation),
        fpi.cells.MLP(5, 7, 9, activation, "sigmoid"),
        fpi.cells.GradientDescent(energy, 0.5),
    ):
        z, x = torch.randn(3, 5), torch.randn(3, 7)
        problem = Problem("", cell, z, x, 1e-4)
        assert problem.g == f"cells.{type(cell).__name__}"
        torch.testing.assert_close(problem.bound(z)(x), cell(x, z))
        wanted, given = (
            torch.autograd.grad(image.sum(), list(cell.parameters()))
            for image in (cell(x, z), problem.bound(z)(x))
        )
        torch.testing.assert_close(given, wanted)


def test_variants_write_weights_and_inputs_anew() -> None:
    problem = tanh_cell(8, features=4)
    before = [p.detach().clone() for p in problem.parameters]
    versions = [p._version for p in problem.parameters]
    variants = Variants(problem, 2, distinct=4)
    first, again, other = (variants.use(k, 6) for k in (0, 0, 1))
    assert first.z.data_ptr() != again.z.data_ptr()
    assert torch.equal(first.z, again.z)
    assert torch.equal(first.z[:2], first.z[4:])
    assert not torch.equal(first.z, other.z)
    moved = norms(problem.parameters[0].detach() - before[0]) / norms(before[0])
    assert 1e-4 < float(moved.max()) < 1e-2
    assert all(p._version > old for p, old in zip(problem.parameters, versions, strict=True))
    variants.use(0, 1)
    assert all(map(torch.equal, problem.parameters, before))


def task_of(problem: Problem, batch: int | None = None, variants: int = 1) -> Task:
    held = Variants(problem, variants, distinct=problem.batch // variants)
    return Task(held, batch or held.distinct, FpiCuda(fpi.Picard()))


def task(batch: int = 6, features: int = 8) -> Task:
    return task_of(tanh_cell(batch, features, norm=0.5, rtol=1e-5))


ENTRIES, _ = load_entries(("ours", "loop", "torchdeq"))


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.label)
def test_every_peer_reaches_the_same_solution_and_gradient(entry: Entry) -> None:
    small = task()
    chosen = choose(entry, small, 1)
    assert chosen.both is not None
    assert chosen.forward.tol.solved == 1.0
    x, grads = chosen.both.peer.solve_and_grad(
        small.problem, chosen.both.tol.tol, chosen.both.adjoint.tol, small.v
    )
    reference = small.variants.reference(0, lambda _: pytest.fail("found before"))
    error = (x - reference.x).norm(dim=1) / reference.x.norm(dim=1)
    assert float(error.max()) <= 2.01 * small.problem.rtol  # 1 / (1 - 0.5)
    exact = [reference.z_grad, *reference.parameter_grads]
    for grad, wanted in zip(grads, exact, strict=True):
        distance = float((grad - wanted).norm() / wanted.norm())
        assert distance <= 5 * small.problem.gradient_rtol


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
    result = try_forward(Liar("liar"), task_of(tanh_cell(4, features=8)))
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


def test_setting_that_is_too_slow_is_left_out_with_its_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(settings, "SOLVE_SECONDS", 0.05)
    monkeypatch.setattr(settings, "screen", lambda *_: None)
    monkeypatch.setattr(FpiCuda, "solve", lambda *_: time.sleep(5))
    with pytest.raises(RuntimeError, match=r"takes more than 0\.05 s"):
        choose(Entry("ours", (FpiCuda(fpi.Picard()),)), task())


class Coarse(FpiCuda):
    """Its adjoint is never better than one part in so many at a forward tolerance this loose."""

    promises_residual = False
    coarse = 0.0

    def solve_and_grad(
        self, problem: Problem, tol: float, adjoint_tol: float, v: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        x, grads = super().solve_and_grad(problem, min(tol, 1e-7), min(adjoint_tol, 1e-7), v)
        return x, [grad * (1 + 1e3 * tol * (tol > self.coarse)) for grad in grads]


def test_a_gradient_that_misses_its_target_makes_the_forward_tighter() -> None:
    small = task()
    forward = try_forward(Coarse(fpi.Picard()), small)
    forward.peer.coarse = 0.5 * forward.tol.tol
    both = settings.try_both(forward, small)
    assert both.adjoint.solved == 1.0
    assert both.tol.tol == pytest.approx(forward.tol.tol / 4)
    forward.peer.coarse = 0.0
    missed = settings.try_both(forward, small)
    assert missed.adjoint.solved == 0.0


def test_shares_are_those_of_the_very_batch() -> None:
    """One of four samples misses the gradient: the first batch has three of five, the next none."""

    class OneWrong(FpiCuda):
        def solve_and_grad(self, problem: Problem, *given: object) -> tuple[Tensor, list[Tensor]]:
            x, grads = super().solve_and_grad(problem, *given)
            wrong = torch.arange(problem.batch) % 4 == 1
            return x, [torch.where(wrong[:, None], 2 * grads[0], grads[0]), *grads[1:]]

    for batch, share in ((6, 4 / 6), (1, 1.0), (4, 0.75)):
        small = task_of(tanh_cell(4, 8, norm=0.5, rtol=1e-5), batch)
        chosen = choose(Entry("ours", (OneWrong(fpi.Picard()),)), small)
        assert chosen.both.adjoint.solved == pytest.approx(share)


def test_tolerances_hold_on_all_variants() -> None:
    class Worse(FpiCuda):
        """On other weights than the first, ten times the residual that it should have."""

        def solve(self, problem: Problem, tol: float) -> Tensor:
            first = torch.equal(problem.parameters[0], kept)
            return super().solve(problem, tol if first else 2 * tol)

    problem = tanh_cell(8, 8, norm=0.5, rtol=1e-4)
    kept = problem.parameters[0].detach().clone()
    small = task_of(problem, variants=2)
    found = try_forward(Worse(fpi.Picard()), small)
    assert found.tol.solved == 1.0
    assert found.tol.tol < 1e-4
    assert found.tol.worst <= 1e-4


def test_settings_found_by_a_search_are_the_ones_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = next(entry for entry in ENTRIES if entry.label == "torchdeq Picard (best)")
    names = [peer.name for peer in entry.candidates]
    held = {"cpu": {"tanh": {entry.label: {"1": [names[2]], "256": [names[1], names[3]]}}}}
    monkeypatch.setattr(settings, "BEST", tmp_path / "best.json")
    settings.BEST.write_text(json.dumps(held))
    settings.best_settings.cache_clear()
    try:
        few, many = (task_of(tanh_cell(8, 4), batch) for batch in (3, 100))
        assert [p.name for p in settings.candidates(entry, few)] == [names[2]]
        assert [p.name for p in settings.candidates(entry, many)] == [names[1], names[3]]
        other = task_of(tanh_cell(8, 4))
        other.variants.problem = own.MAPS[0].problem(1)
        assert [p.name for p in settings.candidates(entry, other)] == [names[1], names[3]]
        unknown = next(entry for entry in ENTRIES if entry.label == "torchdeq Broyden (best)")
        assert settings.candidates(unknown, few, 2) == unknown.candidates[:2]
        assert settings.candidates(unknown, few) == unknown.candidates
    finally:
        settings.best_settings.cache_clear()


def test_a_search_keeps_what_it_finds_beside_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = next(entry for entry in ENTRIES if entry.label == "torchdeq Picard (best)")
    few = Entry(entry.label, entry.candidates[1:4])
    monkeypatch.setattr("bench.peers.torchdeq.entries", lambda: [few])
    monkeypatch.setattr(throughput, "SEARCHED", (2, 4))
    path = tmp_path / "best.json"
    path.write_text(json.dumps({"cuda": {"tanh": {}}}))
    record, tanh = Record(), ("tanh",)
    throughput.search(record, TINY, modules=("ours", "torchdeq"), path=path, only=tanh)
    assert record.skipped == {}
    held = json.loads(path.read_text())
    assert held["cuda"] == {"tanh": {}}
    assert list(held["cpu"]) == ["tanh"]
    found = held["cpu"]["tanh"][entry.label]
    assert set(found) == {"2", "4"}
    assert {n for names in found.values() for n in names} <= {p.name for p in few.candidates}


def test_names_that_are_kept_are_those_of_settings() -> None:
    entries, _ = load_entries()
    known: dict[str, set[str]] = {}
    for entry in [*entries, *throughput.own_entries(entries)]:
        known.setdefault(entry.label, set()).update(peer.name for peer in entry.candidates)
    for problems in settings.best_settings().values():
        for rows in problems.values():
            for label, batches in rows.items():
                if label in known:  # of a library that is here
                    assert {n for names in batches.values() for n in names} <= known[label], label


def test_what_is_made_once_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import torchdeq

    small = task()
    for entry in ENTRIES:
        peer = entry.candidates[0]
        loaded = peer.load(small.problem, small.v)
        peer.run(loaded, 1e-3)
        peer.run_both(loaded, 1e-3, 1e-3)
        again = peer.load(small.problem, small.v)
        with monkeypatch.context() as patch:
            for module, name in ((torchdeq, "get_deq"), (fpi, "FPILayer")):
                patch.setattr(module, name, lambda *_, **__: pytest.fail("made again"))
            peer.run(again, 1e-3)
            peer.run_both(again, 1e-3, 1e-3)


def test_the_bare_op_solves_what_the_layer_solves() -> None:
    torch.manual_seed(0)
    cell, z = fpi.cells.Dense(6, 6), torch.randn(3, 6)
    for solver in (fpi.Picard(), fpi.Anderson()):
        layer = fpi.FPILayer(cell, solver=solver, rtol=cost.RTOL, max_steps=cost.MOST_STEPS)
        with torch.no_grad():
            torch.testing.assert_close(cost.bare_op(cell, z, solver)(), layer(z))


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


def test_every_call_of_a_round_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SHORTEST_SAMPLE", 0.1)
    made: list[int] = []
    taken: list[int] = []

    def ready(n: int) -> object:
        made.append(n)
        return lambda: taken.append(n) or time.sleep(0.006)

    times = fresh_rounds({"A": ready}, 3, CPU)["A"]
    assert made == taken
    assert made[:2] == [0, 1]
    repeats = (len(made) - 2) // 3
    assert repeats >= 2
    assert made[2:] == [first + n for first in range(3) for n in range(repeats)]
    assert all(seconds >= 0.006 for seconds in times)


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
        "your tanh, d=6",
        "tanh",
        "digits FPI_NN",
        "digits FPI_GD",
    ]
    for problem in results["problems"]:
        assert problem["failed"] == {}
        assert problem["judged"] > 0.9
        for table in problem["tables"]:
            assert [row["solved"] for row in table["rows"]] == [1.0] * (5 if problem["own"] else 6)
            for row in table["rows"]:
                assert row["worst_residual"] <= problem["rtol"]
                assert row["gradient_worst_error"] <= problem["gradient_rtol"]
                assert row["forward"]["solved_per_second"] > 0
                assert 0 < row["forward"]["seconds"] < row["both"]["seconds"] * 10
            baseline = table["rows"][0]["forward"]["time_over_baseline"]
            assert baseline == {"min": 1.0, "median": 1.0, "max": 1.0}
    for layer in results["training"]:
        assert 0.0 <= layer["score"] <= 1.0


def test_rows_name_the_route_and_the_map(results: dict) -> None:
    own, tanh = (results["problems"][n]["tables"][0]["rows"] for n in (0, 1))
    assert {row["way"] for row in tanh[:2]} == {"fused: cells.Dense"}
    assert own[0]["way"] in ("host: your module", "fused: your module")
    assert {row["way"] for row in own[2:]} == {"as you wrote it"}
    assert {row["way"] for row in tanh[3:]} == {"addmm by hand"}


def test_overhead_and_scaling_are_measured(results: dict) -> None:
    for row in results["overhead"]:
        assert row["over_op"] > 1
        assert 0 < row["calls"] < row["calls_with_backward"]
    assert [row["batch"] for row in results["scaling"]] == [50, 100]
    assert all(row[name] > 0 for row in results["scaling"] for name in ("Picard", "Anderson"))


def test_terminal_tables_fit_and_name_every_row(results: dict) -> None:
    text = report.text(results)
    assert max(map(len, text.splitlines())) <= report.WIDTH
    for row in results["problems"][1]["tables"][0]["rows"]:
        assert text.count(row["label"]) >= 6  # tables, contamination, loss scale
    assert "tanh: B=8, d=8, float32, true residual 1e-06" in text
    own = text.index("your tanh, d=6, float32")
    assert own < text.index("Besides the arithmetic") < text.index("tanh: B=8, d=8")
    last = text.splitlines()[-6:]
    assert [line.split(":")[0] for line in last] == [
        "your tanh, B=1",
        "your tanh, B=8",
        "cell, tanh, B=2",
        "cell, tanh, B=8",
        "cell, digits FPI_NN, B=8",
        "cell, digits FPI_GD, B=8",
    ]
    assert all("than torch loop" in line or "level with torch loop" in line for line in last)


def test_a_row_that_misses_a_target_stands_apart(results: dict) -> None:
    table = json.loads(json.dumps(results["problems"][1]["tables"][0]))
    row = table["rows"][0]
    row["gradient_solved"] = 0.6
    shown = report.throughput_table(table)
    assert shown[-1][0] == f"{row['label']}, {row['way']} *"
    assert not any(line[0].endswith("*") for line in shown[:-1])
    assert report.ratio(row, "forward") == 1.0
    assert report.ratio(row, "both") is None
    assert report.own_cell(row) == "1 / 1*"
    row["solved"] = 0.9
    assert report.own_cell(row) == "1* / 1*"


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        (0.5, "2x slower than torch loop"),
        (3.0, "3x faster than torch loop"),
        (1.02, "level with torch loop"),
    ],
)
def test_who_is_ahead_is_named_either_way(results: dict, theirs: float, said: str) -> None:
    table = json.loads(json.dumps(results["problems"][0]["tables"][0]))
    for row in table["rows"]:
        ours = row["library"] == "fpi_cuda"
        row["forward"]["time_over_baseline"]["median"] = 1.0 if ours else theirs
    assert report.verdict(table, "forward") == said
    table["rows"][-1]["solved"] = 0.5
    table["rows"][-1]["forward"]["time_over_baseline"]["median"] = 1e-3
    assert report.verdict(table, "forward") == said


def test_ranges_give_way_where_a_table_is_too_wide(results: dict) -> None:
    table = json.loads(json.dumps(results["problems"][1]["tables"][1]))
    for row in table["rows"]:
        for key in ("forward", "both"):
            row[key]["time_over_baseline"] = {"min": 123456.0, "median": 234567.0, "max": 3456789.0}
            row[key]["solved_per_second"] = 123456.0
    lines = report.aligned(report.fitting_table(table))
    assert max(map(len, lines)) <= report.WIDTH
    assert "234567" in lines[1]


def test_what_is_missing_stands_in_both_reports(results: dict) -> None:
    problem = results["problems"][1]
    problem = problem | {"failed": {"a peer": "too slow, 7 s"}}
    table = problem["tables"][0] | {"left_out": {"another": "one solve takes 9 s"}}
    partial = results | {"problems": [problem | {"tables": [table, *problem["tables"][1:]]}]}
    for told in (report.text(partial), report.markdown(partial)):
        assert "not run: a peer: too slow, 7 s" in told
        assert "left out: another: one solve takes 9 s" in told


def test_report_names_who_is_faster(results: dict) -> None:
    problem = json.loads(json.dumps(results["problems"][1]))
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
    assert "| fpi_cuda Anderson, fused: cells.Dense | 100% |" in page
    assert page.index("your tanh, d=6") < page.index("fused: cells.Dense")
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
        own.Plain(7, activation if activation in own.ACTIVATIONS else "tanh"),
        *(each.make() for each in own.MAPS[1:]),
    ):
        shape = next((each.shape for each in own.MAPS[1:] if type(cell) is each.make), None)
        z_shape, x_shape = (
            (shape, shape)
            if shape
            else ((cell.B.in_features,), (7,))
            if hasattr(cell, "B")
            else ((5,), (7,))
        )
        z, x = torch.randn(3, *z_shape), torch.randn(3, *x_shape)
        prepare, step = maps_of(cell)
        weights = {name: p.detach().numpy() for name, p in cell.named_parameters()}
        prepared = jax.vmap(prepare, in_axes=(0, None))(z.numpy(), weights)
        image = jax.vmap(step, in_axes=(0, 0, None))(x.numpy(), prepared, weights)
        torch.testing.assert_close(torch.tensor(image.tolist()), cell(x, z).detach())


def test_the_device_loop_benchmark_says_what_it_could_not_run() -> None:
    size = device_loop.Size(tanh=(4, 8), conv=(2, 8, 4), steps=(2, 4), rounds=2, most_settings=1)
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
