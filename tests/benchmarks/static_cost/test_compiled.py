"""The whole tool, on kernels that are compiled here without a GPU and whose counts are known by hand."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
ARCHITECTURES = ["sm_80", "sm_90", "sm_100"]
pytest.importorskip("triton", reason="its wheel holds the disassembler")


def static(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | variables
    command = [sys.executable, "-m", "benchmarks", "static", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=600)


@pytest.fixture(scope="module")
def cuda() -> dict[tuple[str, str, str], dict]:
    listing = str(HERE / "listing.json")
    result = static("--backends", "cuda", "--cuda-module", listing, "--json", "--arch", *ARCHITECTURES)
    assert result.returncode == 0, result.stderr
    return {(row["arch"], row["kernel"], row["phase"]): row for row in json.loads(result.stdout)}


@pytest.fixture(scope="module")
def triton() -> dict[tuple[str, str], dict]:
    module = "tests.benchmarks.static_cost.sample_kernels"
    result = static("--backends", "triton", "--triton-module", module, "--json", "--arch", *ARCHITECTURES)
    assert result.returncode == 0, result.stderr
    return {(row["arch"], row["phase"]): row for row in json.loads(result.stdout)}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_column_by_column(cuda, arch):
    """A column takes two FFMA and one MUFU.EX2, and four columns share one 16-byte load."""
    row = cuda[arch, "unrolled", "lse"]
    assert row["unroll"] == 1
    assert row["mufu_per_pair"] == 1
    assert row["breakdown"]["float"] == 2
    assert row["shared_per_pair"] == 1 / 4
    assert row["shared_bytes_per_pair"] == 4
    assert row["global_per_pair"] == row["tensor_per_pair"] == row["local_per_pair"] == 0
    assert row["shared_bytes"] == 8192  # dynamic shared memory; the kernel declares no static one
    loop_control = row["issue_slots_per_pair"] - 3 - 1 / 4
    assert 2 / 4 <= loop_control <= 5 / 4  # four columns share a compare, a branch and a few increments


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_unrolled_by_the_compiler(cuda, arch):
    """One machine trip contains eight source trips, so that eight pairs share the instructions of the loop itself."""
    row = cuda[arch, "fixed_trips", "lse"]
    assert row["unroll"] == 8
    assert row["mufu_per_pair"] == 1
    assert row["breakdown"]["float"] == 2
    assert 2 / 8 <= row["issue_slots_per_pair"] - 3 <= 4 / 8


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_enclosing_loop_is_spread_over_the_inner_trips(cuda, arch):
    row = cuda[arch, "nested", "lse"]
    assert row["mufu_per_pair"] == 1
    assert row["global_per_pair"] == 0  # the outer loop contains the store
    assert row["breakdown"]["float"] == 2
    assert 4 / 64 <= row["outer_slots_per_pair"] <= 20 / 64


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_boundary_is_told_from_the_main_loop(cuda, arch):
    main, rest = cuda[arch, "boundary", "main"], cuda[arch, "boundary", "rest"]
    assert main["mufu_per_pair"] == rest["mufu_per_pair"] == 1
    assert rest["issue_slots_per_pair"] >= main["issue_slots_per_pair"] + 2  # j % 3 == 0 and the selection
    assert main["other_loops"] == []


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_slow_path_is_counted_but_not_as_always_executed(cuda, arch):
    row = cuda[arch, "slow_path", "lse"]
    assert row["issue_slots_always_per_pair"] < row["issue_slots_per_pair"] - 5
    assert any("1 loops inside, counted as one turn each" in note for note in row["notes"])


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_sides_of_a_branch_are_told_apart(cuda, arch):
    long, short = cuda[arch, "two_sides", "long"], cuda[arch, "two_sides", "short"]
    assert long["mufu_per_pair"] == short["mufu_per_pair"] == 1
    assert (long["breakdown"]["float"], short["breakdown"]["float"]) == (25, 13)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_spills_are_seen(cuda, arch):
    row = cuda[arch, "spilling", "lse"]
    assert row["registers"] == 32
    assert row["spill_bytes"] >= 4 * 2 * (96 - 32)  # at least this many sums are stored and loaded
    assert row["local_bytes"] > 0
    assert row["local_per_pair"] > 1
    assert row["warps_per_sm"] == 64
    clean = cuda[arch, "nested", "lse"]
    assert clean["spill_bytes"] == clean["local_bytes"] == clean["local_per_pair"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_triton_tile(triton, arch):
    """A pair takes one exponential, one addition and 16 multiply-adds. Boundary tiles also compare and select."""
    whole, rest = triton[arch, "whole"], triton[arch, "rest"]
    outside, total = triton[arch, "outside"], triton[arch, "total"]
    assert outside["kernel"] == "scale"
    assert outside["registers"] > 0
    assert outside["mufu_per_pair"] == outside["issue_slots_per_pair"] == 0
    assert total["phases"] == ["whole", "rest", "outside"]
    assert total["issue_slots_per_pair"] == whole["issue_slots_per_pair"] + rest["issue_slots_per_pair"]
    for row in (whole, rest):
        assert row["unroll"] == 1
        assert row["mufu_per_pair"] == 1
        assert row["spill_bytes"] == row["local_bytes"] == 0
    if arch == "sm_100":
        assert any("size of tensor instructions unknown" in note for note in whole["notes"])
    else:
        assert whole["tensor_macs_per_pair"] == 16
    assert rest["breakdown"]["compare"] >= whole["breakdown"].get("compare", 0) + 1
    additions = whole["breakdown"].get("float", 0) + 2 * whole["breakdown"].get("packed float", 0)
    if arch == "sm_90":
        # A lane holds 2 rows of 8 columns: 7 additions per row, 2 across lanes, 1 to the running sum.
        assert additions == 2 * (7 + 2 + 1) / 16
    else:
        assert 1 <= additions <= 2


def test_a_declaration_that_does_not_fit_fails(tmp_path):
    kernels = json.loads((HERE / "listing.json").read_text())
    kernel = next(item for item in kernels if item["kernel"] == "nested")
    kernel["source"] = str(HERE / "kernels.cu")
    kernel["loops"][0]["exponentials"] = 48
    (tmp_path / "listing.json").write_text(json.dumps([kernel]))
    result = static("--backends", "cuda", "--cuda-module", str(tmp_path / "listing.json"))
    assert result.returncode
    assert "32 exponentials, expected a multiple of 48" in result.stderr


@pytest.mark.slow
def test_table_and_breakdown():
    module = "tests.benchmarks.static_cost.sample_kernels"
    result = static("--backends", "triton", "--triton-module", module, "--breakdown")
    assert result.returncode == 0, result.stderr
    for words in ("row_sums", "ms B=256", "estimates for H100", "mufu             1.000"):
        assert words in result.stdout
    nothing = static("--backends", "triton", "--triton-module", module, "--kernel", "other*")
    assert nothing.returncode
    assert "no kernel of triton matches" in nothing.stderr


# Largest allowed issue slots and exponentials per pair of loss and gradient, with everything that strips do.
MOST = {
    ("self", 16, 8): {512: (12.6, 2.1), 128: (15.2, 2.3)},
    ("self causal", 16, 8): {512: (12.1, 2.1)},
    ("self prefix", 16, 8): {512: (13.0, 2.1)},
}
MOST_IN_TRITON = {("self unordered", 16, 8): {512: (16.4, 2.3), 128: (21.5, 3.0)}}
MOST_IN_FLOAT32 = {("self", 16, 8): {512: (56, 4)}}
# The same without the diagonal.
MOST_IN_WHOLE_STRIPS = {(16, 8): 11.8, (16, 16): 15.1, (32, 16): 15.5, (64, 32): 18.0}
MOST_IN_WHOLE_PACKED_STRIPS = {(16, 8): 11.6, (16, 16): 11.6, (32, 16): 12.2, (64, 32): 14.2}  # sm_100


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_the_packages_strips(arch):
    result = static("--backends", "cuda", "--arch", arch, "--kernel", "symmetric", "--dtype", "bfloat16", "--json")
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)
    for row in rows:
        if row["phase"] in ("sums", "gradient") and not row["part"]:
            # A few registers are saved between the loops over pairs.
            assert row["local_per_pair"] < 0.05, row
            assert ("packed float" in row["breakdown"]) == (arch == "sm_100" and row["d_t"] <= 64), row
    figures = {(row["group"], row["d_t"], row["d_s"], row["phase"]): row for row in rows if not row["part"]}
    for (d_t, d_s), slots in (MOST_IN_WHOLE_PACKED_STRIPS if arch == "sm_100" else MOST_IN_WHOLE_STRIPS).items():
        row = figures["self", d_t, d_s, "total"]
        assert row["issue_slots_per_pair"] <= slots, (d_t, d_s)
        # A quarter of the exponentials are polynomials.
        assert row["mufu_per_pair"] == (1.5 if arch == "sm_100" and (d_t, d_s) == (16, 8) else 2)
    check_limits(figures, MOST)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize(
    ("dtype", "group", "most"),
    [("bfloat16", "self unordered", MOST_IN_TRITON), ("float32", "self", MOST_IN_FLOAT32)],
    ids=["bfloat16", "float32"],
)
def test_the_packages_triton_kernels(arch, dtype, group, most):
    options = ("--dtype", dtype, "--widths", "16x8", "--group", group)
    result = static("--backends", "triton", "--arch", arch, *options, "--json")
    assert result.returncode == 0, result.stderr
    figures = {(row["group"], row["d_t"], row["d_s"], row["phase"]): row for row in json.loads(result.stdout)}
    check_limits(figures, most)


def check_limits(figures: dict, most: dict) -> None:
    for call, limits in most.items():
        for length, (slots, exponentials) in limits.items():
            row = figures[(*call, f"S={length}")]
            assert row["issue_slots_per_pair"] <= slots, (call, length)
            assert row["mufu_per_pair"] <= exponentials, (call, length)


@pytest.mark.slow
@pytest.mark.nightly
def test_no_register_of_the_kernels_products_is_written_too_early():
    """The command fails if a register is written too early. The package's Triton kernels use wgmma on sm_90."""
    result = static("--backends", "triton", "--arch", "sm_90", "--dtype", "bfloat16", "--json")
    assert result.returncode == 0, result.stderr
    rows = [row for row in json.loads(result.stdout) if row["phase"] != "total"]
    kernels = {row["kernel"] for row in rows if row.get("wgmma_products")}
    assert kernels >= {"row_stats", "row_kl", "gradient", "gradient of key"}


@pytest.mark.slow
def test_a_kernel_that_another_checkout_compiled_is_not_taken(tmp_path):
    """Triton's cache finds the kernel by its text, but its line table names files of the other checkout."""
    for checkout in ("first", "second"):
        folder = tmp_path / checkout
        folder.mkdir()
        shutil.copy(HERE / "sample_kernels.py", folder / "copied_kernels.py")
        path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
        result = static(
            "--backends", "triton", "--triton-module", "copied_kernels", "--arch", "sm_90",
            PYTHONPATH=path, TRITON_CACHE_DIR=str(tmp_path / "cache"),
        )  # fmt: skip
        assert result.returncode == 0, f"{checkout}: {result.stderr}"
        shutil.rmtree(folder)
