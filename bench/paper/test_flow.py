"""The optical-flow experiment: files, generator, networks, and its smoke form."""
# ruff: noqa: E402

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

for name in ("matplotlib", "numpy", "tqdm"):
    pytest.importorskip(name, reason="the bench extra is not installed")

from PIL import Image

from bench.paper import flow, flow_report
from bench.paper.checkpoints import Checkpoints
from bench.paper.experiment import Run, main
from bench.paper.flow_colours import colour_coded
from bench.paper.flow_files import Pair, find_pairs, read_flo, read_pair, write_flo
from bench.paper.flow_models import (
    FLOW_UNIT,
    FlowNetS,
    FlowNetSFPI,
    Refinement,
    endpoint_errors,
    full_size,
    loss_of,
)
from bench.paper.flow_pairs import Motion, displacement, make_pairs, pixel_grid
from bench.paper.retell import retell

STILL = Motion(background=0, shape=0, turn=0, zoom=0)


def textures(count: int = 5, size: int = 96) -> Tensor:
    """(count, size, size) smooth random images, without mean in common."""
    coarse = torch.rand(count, 1, 12, 12, generator=torch.Generator().manual_seed(1))
    return functional.interpolate(coarse, (size, size), mode="bicubic")[:, 0].clamp(0, 1)


def write_pair(folder: Path, stem: str, ends: tuple[str, str, str], pair: Pair) -> None:
    """A pair as Flying Chairs keeps it."""
    for end, image in zip(ends, (pair.first, pair.second), strict=False):
        array = (255 * image).round().byte().permute(1, 2, 0).contiguous().numpy()
        Image.fromarray(array).save(folder / (stem + end))
    write_flo(folder / (stem + ends[2]), pair.flow)


def one(pairs: Pair, k: int = 0) -> Pair:
    return Pair(*(part[k] for part in pairs))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten images to make pairs of, and two example pairs of 64 x 128 pixels."""
    folder = tmp_path_factory.mktemp("data")
    images = folder / "denoise" / "train400"
    images.mkdir(parents=True)
    for k, image in enumerate(textures(10)):
        Image.fromarray((255 * image).byte().numpy()).save(images / f"{k}.png")
    examples = folder / flow.EXAMPLES
    examples.mkdir(parents=True)
    pairs = make_pairs(textures(), 2, 130, generator=torch.Generator().manual_seed(0))
    for k in range(2):
        whole = one(pairs, k)
        wide = flow.cut(whole, 0, 0, 70, 130)
        write_pair(examples, f"000000{k}", ("-img0.ppm", "-img1.ppm", "-gt.flo"), wide)
    return folder


def test_smoke_form_runs_and_resumes_nothing(data: Path, tmp_path: Path) -> None:
    arguments = ["--data", str(data), "--smoke", "--out", str(tmp_path)]
    arguments += ["--checkpoints", str(tmp_path / "checkpoints")]
    result = main("flow", flow.experiment, flow_report.tell, flow.SIZES, arguments)
    written = tmp_path / "paper-flow-smoke.json"
    assert result == json.loads(written.read_text())
    written.write_text(json.dumps(result | {"readme": "old words", "finding": "old"}))
    retell(written)
    assert result == json.loads(written.read_text())
    assert "settles nothing" in result["readme"]
    for picture in ("paper-flow-smoke.png", "paper-flow-smoke-width0.125.png"):
        assert (tmp_path / picture).stat().st_size > 10_000
    assert result["pairs"] == "generated"
    entry = result["widths"]["0.125"]
    config = flow.SIZES["smoke"]
    for method in (flow.PLAIN, flow.WITH_FPI):
        trainings = entry["trainings"][method]
        assert len(trainings) == 3
        for training in trainings:
            assert len(training["history"]) == config.epochs
            assert training["history"][-1]["loss"] > 0
        last = [training["history"][-1] for training in trainings]
        for key in ("test", "examples"):
            mean = sum(item[f"{key}_aepe"] for item in last) / 3
            assert entry["aepe"][key][method]["mean"] == pytest.approx(mean, rel=1e-5)
    assert all(t["solves"]["solved"] == 1 for t in entry["trainings"][flow.WITH_FPI])
    gap = entry["aepe"]["test"][flow.WITH_FPI]["mean"] - entry["aepe"]["test"][flow.PLAIN]["mean"]
    assert entry["fpi_minus_plain"]["test"]["mean"] == pytest.approx(gap, abs=1e-6)


def test_real_data_set_is_read_where_it_is(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / flow.CHAIRS
    folder.mkdir(parents=True)
    position = torch.arange(80.0)
    for k in range(3):
        # A flow that tells its own place, so that crops can be checked.
        right, down = position[None, :].expand(80, 80), position[:, None].expand(80, 80)
        image = torch.stack((right / 255, down / 255, torch.full((80, 80), k / 255)))
        pair = Pair(image, image, torch.stack((right, down)) + k)
        write_pair(folder, f"0000{k}", ("_img1.ppm", "_img2.ppm", "_flow.flo"), pair)
    checkpoints = Checkpoints(tmp_path / "checkpoints", {}, resume=False)
    run = Run("flow", tmp_path, torch.device("cpu"), "smoke", tmp_path, checkpoints)
    source = flow.Source(run, dataclasses.replace(flow.SIZES["smoke"], batch=6))
    assert source.name == "Flying Chairs"
    assert source.test.first.shape == (1, 3, 64, 64)
    assert int(source.test.first[0, 2, 0, 0] * 255) == 0
    pairs = source.batch()
    assert pairs.flow.shape == (6, 2, 64, 64)
    numbers = (pairs.first[:, 2:] * 255).round()
    assert set(numbers.unique().tolist()) <= {1.0, 2.0}
    torch.testing.assert_close(pairs.flow, (pairs.first[:, :2] * 255).round() + numbers)


def test_flo_files_keep_every_vector(tmp_path: Path) -> None:
    vectors = torch.randn(2, 5, 7)
    write_flo(tmp_path / "a.flo", vectors)
    assert torch.equal(read_flo(tmp_path / "a.flo"), vectors)
    # Column 3 of row 1: 12 bytes of header, 7 vectors a row, right before down.
    content = (tmp_path / "a.flo").read_bytes()
    assert content[:4] == b"PIEH"
    import struct

    assert struct.unpack_from("<ii", content, 4) == (7, 5)
    assert struct.unpack_from("<ff", content, 12 + 8 * 10) == tuple(vectors[:, 1, 3].tolist())


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"PNG" + bytes(20), "must start with b'PIEH'"),
        (b"PIEH" + bytes([2, 0, 0, 0, 2, 0, 0, 0]) + bytes(31), "must hold 2 x 2 vectors"),
    ],
)
def test_broken_flo_file_is_refused(tmp_path: Path, content: bytes, complaint: str) -> None:
    (tmp_path / "a.flo").write_bytes(content)
    with pytest.raises(ValueError, match=complaint):
        read_flo(tmp_path / "a.flo")


def test_incomplete_pairs_are_left_out_and_sizes_compared(data: Path, tmp_path: Path) -> None:
    files = find_pairs(data / flow.EXAMPLES)
    assert [item[2].name for item in files] == ["0000000-gt.flo", "0000001-gt.flo"]
    pair = read_pair(files[0])
    assert pair.first.shape == (3, 70, 130)
    assert flow.middle(pair).flow.shape == (2, 64, 128)
    write_flo(tmp_path / "0-gt.flo", pair.flow)
    assert find_pairs(tmp_path) == []
    write_flo(tmp_path / "small.flo", pair.flow[:, 1:])
    with pytest.raises(ValueError, match="sizes differ"):
        read_pair((files[0][0], files[0][1], tmp_path / "small.flo"))


def warped_back(pairs: Pair) -> tuple[Tensor, Tensor]:
    """The second image where the flow says, and where that is inside the image."""
    count, _, height, width = pairs.first.shape
    down, right = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    at = torch.stack((right, down)) + pairs.flow
    scaled = (2 * at + 1) / torch.tensor([width, height]).reshape(2, 1, 1) - 1
    sampled = functional.grid_sample(pairs.second, scaled.permute(0, 2, 3, 1), align_corners=False)
    return sampled, (scaled.abs() < 0.95).all(1)[:, None].expand(count, 3, -1, -1)


def test_flow_leads_from_the_first_image_to_the_second() -> None:
    pairs = make_pairs(textures(), 6, 64, generator=torch.Generator().manual_seed(0))
    sampled, inside = warped_back(pairs)
    warped = (sampled - pairs.first).abs()[inside]
    unwarped = (pairs.second - pairs.first).abs()[inside]
    # What is hidden in the second image cannot agree; the rest does.
    assert float(warped.quantile(0.8)) < 0.02 < float(unwarped.quantile(0.5))
    assert float(pairs.flow.norm(dim=1).mean()) > 1


def test_background_alone_agrees_everywhere() -> None:
    pairs = make_pairs(textures(), 4, 64, shapes=0, generator=torch.Generator().manual_seed(2))
    sampled, inside = warped_back(pairs)
    assert float((sampled - pairs.first).abs()[inside].max()) < 0.05


def test_shapes_move_on_their_own() -> None:
    motion = dataclasses.replace(STILL, shape=0.1)
    generator = torch.Generator().manual_seed(0)
    pairs = make_pairs(textures(), 3, 64, motion=motion, generator=generator)
    moving = pairs.flow.norm(dim=1) > 0
    assert 0.05 < float(moving.float().mean()) < 0.95
    # Each is moved as a whole.
    for sample in pairs.flow:
        assert len({tuple(v) for v in sample.flatten(1).round(decimals=3).T.tolist()}) <= 5


def test_nothing_moves_without_motion() -> None:
    pairs = make_pairs(textures(), 2, 64, motion=STILL)
    assert float(pairs.flow.abs().max()) < 1e-4
    torch.testing.assert_close(pairs.first, pairs.second, atol=1e-4, rtol=0)


def test_generator_repeats_itself() -> None:
    first, second = (
        make_pairs(textures(), 2, 64, generator=torch.Generator().manual_seed(4)) for _ in range(2)
    )
    for ours, theirs in zip(first, second, strict=True):
        assert torch.equal(ours, theirs)


def test_displacement_of_a_translation_and_a_turn() -> None:
    grid = pixel_grid(5, torch.device("cpu"))
    shift = torch.tensor([[1.0, 0, 3], [0, 1, -2], [0, 0, 1]])
    turn = torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])
    flows = displacement(grid, torch.stack((shift, turn)))
    assert torch.equal(flows[0], torch.tensor([3.0, -2.0]).reshape(2, 1, 1).expand(2, 5, 5))
    # The pixel right of the middle, (1, 0), goes to (0, 1).
    assert flows[1, :, 2, 3].tolist() == [-1.0, 1.0]


def test_flows_at_five_scales() -> None:
    pairs = make_pairs(textures(), 2, 128)
    flows = FlowNetS(0.0625)(pairs.first, pairs.second)
    assert [tuple(f.shape) for f in flows] == [(2, 2, n, n) for n in (2, 4, 8, 16, 32)]


def test_both_networks_start_from_the_same_weights() -> None:
    config = flow.SIZES["smoke"]
    plain, with_fpi = (flow.make(m, 0.0625, config, 7) for m in (flow.PLAIN, flow.WITH_FPI))
    for ours, theirs in zip(plain.parameters(), with_fpi.base.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_layer_refines_the_last_flow_only() -> None:
    model = FlowNetSFPI(0.0625, 8, 0.9)
    pairs = make_pairs(textures(), 2, 64)
    with torch.no_grad():
        plain, features = model.base.analyse(pairs.first, pairs.second)
        flows = model(pairs.first, pairs.second)
        for ours, theirs in zip(flows[:-1], plain[:-1], strict=True):
            assert torch.equal(ours, theirs)
        cell = model.layer.g
        torch.testing.assert_close(
            flows[-1], cell(flows[-1], features, plain[-1]), rtol=1e-3, atol=1e-4
        )
        assert not torch.allclose(flows[-1], plain[-1])


def test_refinement_contracts() -> None:
    cell = Refinement(6, 8, norm=0.9)
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.add_(torch.randn_like(parameter))
        x, y = 5 * torch.randn(2, 4, 2, 9, 9)
        z, base = torch.randn(4, 6, 9, 9), torch.randn(4, 2, 9, 9)
        moved = (cell(x, z, base) - cell(y, z, base)).flatten(1).norm(dim=1)
    assert float((moved / (x - y).flatten(1).norm(dim=1)).max()) <= 0.81


def test_errors_and_loss_of_a_known_flow() -> None:
    truth = torch.zeros(1, 2, 64, 64)
    truth[:, 0] = 3.0
    truth[:, 1] = 4.0
    assert endpoint_errors(torch.zeros_like(truth), truth).tolist() == [5.0]
    right = [truth[:, :, :n, :n] / FLOW_UNIT for n in (1, 2, 4, 8, 16)]
    assert float(loss_of(right, truth)) < 1e-3
    # Half a unit off at the finest scale: 256 places of 0.25, weighed by 0.005.
    wrong = [*right[:-1], right[-1] + torch.tensor([0.25, 0.0]).reshape(1, 2, 1, 1)]
    assert float(loss_of(wrong, truth)) == pytest.approx(0.005 * 256 * 0.25, abs=1e-3)
    torch.testing.assert_close(full_size(right[-1], (64, 64)), truth)


def test_colours_tell_direction_and_length() -> None:
    still, right, left, half = (
        torch.tensor(v).reshape(2, 1, 1) for v in ([0.0, 0.0], [2.0, 0.0], [-2.0, 0.0], [1.0, 0.0])
    )
    assert colour_coded(still, 2.0)[0, 0].tolist() == [1, 1, 1]
    bright, opposite, pale = (colour_coded(v, 2.0)[0, 0] for v in (right, left, half))
    # Opposite directions have complementary colours, half the length is half way to white.
    assert (bright + opposite).tolist() == pytest.approx([1, 1, 1])
    assert pale.tolist() == pytest.approx(((bright + 1) / 2).tolist())
