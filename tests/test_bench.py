"""The benchmark measures what it says: exact bytes, fair turns, the same loss for everybody, honest verdicts."""

import json
import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import tileloss.losses
from tileloss.bench import command, contestants, main, measure, sweep, targets
from tileloss.bench.contestants import (
    CONTESTANTS,
    FLOOR,
    METRIC_LEARNING,
    SENTENCE_TRANSFORMERS,
    TILELOSS,
    Contestant,
    floor_steps,
)
from tileloss.bench.measure import (
    Memory,
    MemoryProcess,
    accelerator_peak,
    cpu_peak,
    memory_of,
    resident_peak,
    time_in_turns,
)
from tileloss.bench.report import table
from tileloss.bench.sweep import Limits, Outcome
from tileloss.bench.targets import GPU_TARGETS, TARGETS, Target, judge
from tileloss.bench.workloads import WORKLOADS, Case

MIB = 2**20
COMPILED = "torch.compile"  # which takes longer than all else here


@pytest.mark.parametrize(
    ("device", "measure_peak"), [("cpu", cpu_peak), pytest.param("cuda", accelerator_peak, marks=pytest.mark.gpu)]
)
def test_the_peak_is_exact(device: str, measure_peak: Callable[[Callable[[], None]], int]) -> None:
    """2 + 4 MiB at once, 4 left, 6 more make 10; what was there before does not count."""
    inputs = torch.ones(16 * MIB, dtype=torch.uint8, device=device)

    def step() -> None:
        first, second = inputs.new_empty(2 * MIB), inputs.new_empty(4 * MIB)
        del first
        third = inputs.new_empty(6 * MIB)
        del second, third
        inputs.add_(1)

    assert measure_peak(step) == 10 * MIB


def test_the_cpu_peak_gives_no_credit_for_what_was_freed_from_before() -> None:
    older = [torch.empty(4 * MIB, dtype=torch.uint8)]

    def step() -> None:
        older.clear()
        torch.empty(3 * MIB, dtype=torch.uint8)

    assert cpu_peak(step) == 3 * MIB


def test_the_cpu_peak_takes_no_older_block_for_one_that_an_earlier_profile_saw() -> None:
    """Memory of an earlier profile is freed unseen, and its address given to what a later one sees the end of."""
    for _ in range(200):
        kept: list[torch.Tensor] = []
        cpu_peak(lambda kept=kept: kept.append(torch.empty(4 * MIB, dtype=torch.uint8)))
        seen = kept.pop().data_ptr()
        older = [torch.empty(4 * MIB, dtype=torch.uint8) for _ in range(3)]
        came_back = seen in [block.data_ptr() for block in older]

        def step(older: list[torch.Tensor] = older) -> None:
            older.clear()
            torch.empty(3 * MIB, dtype=torch.uint8)

        assert cpu_peak(step) == 3 * MIB
        if came_back:
            break


def test_resident_peak_sees_what_torch_does_not() -> None:
    rose = resident_peak(lambda: bytearray(64 * MIB) and None)
    if rose is None:
        pytest.skip("this system does not let a process reset its resident high-water mark")
    assert 63 * MIB < rose < 80 * MIB


def test_turns_are_fair(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each turn holds everybody once, and nobody always goes first."""
    monkeypatch.setattr(measure, "SHORTEST_SAMPLE", 0.0)
    monkeypatch.setattr(measure, "SHORTEST_COMPARISON", 0.0)
    calls: list[str] = []
    samples = time_in_turns({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=3)
    turns = [calls[start : start + 3] for start in range(0, len(calls), 3)]
    assert {name: len(taken) for name, taken in samples.items()} == {"a": 3, "b": 3, "c": 3}
    assert all(sorted(turn) == ["a", "b", "c"] for turn in turns)
    assert len({turn[0] for turn in turns[-2:]}) == 2


def test_times_are_seconds_per_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step longer than a sample is called once per sample, a shorter one as often as fills it."""
    monkeypatch.setattr(measure, "SHORTEST_COMPARISON", 1.0)
    samples = time_in_turns({"long": lambda: time.sleep(0.06), "short": lambda: time.sleep(0.005)}, rounds=3)
    assert all(0.06 <= seconds < 0.12 for seconds in samples["long"])
    assert all(0.005 <= seconds < 0.02 for seconds in samples["short"])
    assert len(samples["long"]) > 3, "there was time for more"


@pytest.mark.parametrize(
    "name", ["tileloss-reference", "tileloss-tiled", "pytorch", SENTENCE_TRANSFORMERS, METRIC_LEARNING]
)
@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=WORKLOADS)
def test_contestants_compute_the_same_loss(workload, name: str) -> None:
    """Value and gradients are those of tileloss's own choice: nobody wins by doing less."""
    if name == SENTENCE_TRANSFORMERS:
        pytest.importorskip("sentence_transformers")
    if name == METRIC_LEARNING:
        pytest.importorskip("pytorch_metric_learning")
    try:
        CONTESTANTS[name].build(workload)
    except NotImplementedError as error:
        pytest.skip(str(error))
    case = Case(workload.name, batch=37, width=8, dtype="float64")
    values, gradients = [], []
    for contestant in (TILELOSS, name):
        embeddings = case.embeddings()
        loss = CONTESTANTS[contestant].build(workload)(embeddings)
        loss.backward()
        values.append(loss.detach())
        gradients.append(torch.cat([leaf.grad for leaf in embeddings]))
    torch.testing.assert_close(values[1], values[0], rtol=1e-9, atol=0)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("block", [10**9, 7 * 32])
def test_the_floor_is_three_products(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One forward, three forward and backward, over every row even in blocks."""
    monkeypatch.setattr(contestants, "_FLOOR_ELEMENTS", block)
    case = Case("hard_negatives", batch=16, width=8)
    assert case.docs == 80
    for step, products in zip(floor_steps(case, case.embeddings()), (1, 3), strict=True):
        with FlopCounterMode(display=False) as counter:
            step()
        assert counter.get_total_flops() == products * 2 * case.batch * case.docs * case.width


def test_steps_start_without_gradients() -> None:
    case = Case("default", batch=8, width=4)
    embeddings = case.embeddings()
    steps = CONTESTANTS["pytorch"].steps(WORKLOADS["default"], embeddings)
    steps.forward_backward()
    once = [leaf.grad.clone() for leaf in embeddings]
    steps.forward()
    steps.forward_backward()
    assert all(torch.equal(leaf.grad, gradient) for leaf, gradient in zip(embeddings, once, strict=True))


def test_what_cannot_run_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(workload: object) -> None:
        raise ImportError("not installed\nmore")

    monkeypatch.setitem(CONTESTANTS, "absent", Contestant("absent", build, materialises=True))
    assert memory_of(Case("default", 4, 4), "absent", 1) == Memory(missing="ImportError: not installed")


def test_a_killed_process_is_an_answer_and_is_replaced() -> None:
    case = Case("default", batch=64, width=8)
    with MemoryProcess("pytorch", threads=1) as process:
        alive = process.measure(case)
        for pid in list(process._pool._processes):
            os.kill(pid, signal.SIGKILL)
        killed = process.measure(case)
        again = process.measure(case)
    assert alive.missing is None
    assert alive.peak > 2 * 64 * 64 * 4
    assert "killed" in killed.missing
    assert (again.peak, again.missing) == (alive.peak, None)


def test_predictions_leave_out_what_does_not_fit() -> None:
    """By squares for a materialised form, by lines for tiles; a failure holds for all larger sizes."""
    small, large, limits = Case("default", 1024, 64), Case("default", 4096, 64), Limits(memory=100 * MIB)
    measured = small, Memory(peak=10 * MIB)
    assert "0.2 GiB of 0.1 GiB" in sweep._obstacle("pytorch", large, measured, limits)
    assert sweep._obstacle(TILELOSS, large, measured, limits) is None
    assert sweep._obstacle("pytorch", large, measured, Limits(memory=160 * MIB)) is None
    assert "would need" in sweep._obstacle("pytorch", large, None, limits)
    assert sweep._obstacle(TILELOSS, large, (small, Memory(missing="broken")), limits) == "broken"
    slow = small, Memory(peak=1, seconds=10.0)
    assert "time limit" in sweep._obstacle(TILELOSS, large, slow, Limits(seconds=480 * 6))
    assert sweep._obstacle(TILELOSS, large, slow, Limits(seconds=480 * 8)) is None
    assert "time limit" in sweep._obstacle(TILELOSS, small, None, Limits(seconds=0))


def test_predictions_go_by_the_nearest_batch_that_tells() -> None:
    """The next smaller one, even if it failed; else the next larger one, unless it failed."""
    fine, failed = Memory(peak=1), Memory(missing="broken")
    tried = [(Case("default", batch, 8), memory) for batch, memory in ((64, fine), (128, failed), (16, fine))]
    assert sweep._nearest(tried, 256) == tried[1]
    assert sweep._nearest(tried, 100) == tried[0]
    assert sweep._nearest(tried, 8) == tried[2]
    assert sweep._nearest(tried[1:2], 64) is None


def test_what_was_measured_is_kept_after_each_case() -> None:
    """In the order given, so that a run that is cut short leaves the first cases behind."""
    cases = [Case("default", batch, 8) for batch in (64, 16, 32)]
    kept: list[list[Case]] = []
    results = sweep.sweep(cases, [TILELOSS], 3, Limits(seconds=0), lambda results: kept.append(list(results)))
    assert kept == [cases[:1], cases[:2], cases]
    assert all("time limit" in outcomes[TILELOSS].missing for outcomes in results.values())


def test_a_sweep_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiny sizes through everything: processes, turns, table, JSON, figure; what is too large is left out."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(measure, "SHORTEST_SAMPLE", 0.001)
    monkeypatch.setattr(measure, "SHORTEST_COMPARISON", 0.0)
    options = "--batch 64 256 --width 16 --device cpu --rounds 3 --memory-limit 0.0005 --contestant tileloss pytorch"
    assert main([*options.split(), "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"pytorch: default B=256 D=16 float32: left out: B=256 would need", printed)
    content = json.loads(next(tmp_path.glob("sweep-cpu-*.json")).read_text())
    assert content["command"].startswith("tileloss bench --batch 64 256")
    assert content["versions"]["torch"] == torch.__version__
    assert content["machine"]["torch_threads"] == torch.get_num_threads()
    small, large = content["cases"]
    assert set(small["results"]) == set(large["results"]) == {"tileloss", "pytorch", FLOOR}
    assert "missing" in large["results"]["pytorch"]
    ours = large["results"]["tileloss"]
    assert len(ours["forward"]["seconds"]) == len(ours["forward_backward"]["seconds"]) == 3
    assert ours["forward_backward"]["examples_per_second"] == pytest.approx(
        256 / sorted(ours["forward_backward"]["seconds"])[1]
    )
    assert 2 * 256 * 16 * 4 <= ours["peak_bytes"] <= 2 * MIB
    assert next(tmp_path.glob("sweep-cpu-*-default.png")).read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def promises(monkeypatch: pytest.MonkeyPatch) -> tuple[Target, ...]:
    """Four targets in place of those that stand in the code, which change: one of each kind."""
    chosen = (
        Target("default", 8192, speed_up=2.0, memory=1 / 8, floor=1.3),
        Target("four_directions", 4096, speed_up=2.5, memory=1 / 8),
        Target("batch_all", 64, speed_up=1.0),
        Target("gist", 64, milliseconds=2000, megabytes=10),
    )
    for module in (targets, command):
        monkeypatch.setattr(module, "TARGETS", chosen)
    return chosen


def results_like(promises: tuple[Target, ...], speed_up: float, memory: float, floor: float) -> sweep.Results:
    """Results of the targets' cases with these ratios to sentence-transformers and to the floor."""
    return {
        target.case: {
            TILELOSS: Outcome(Memory(peak=round(memory * 10**6)), [0.5] * 3, [1.0] * 3),
            SENTENCE_TRANSFORMERS: Outcome(Memory(peak=10**6), [0.5] * 3, [speed_up] * 3),
            FLOOR: Outcome(None, [0.1] * 3, [1 / floor] * 3),
        }
        for target in promises
    }


@pytest.mark.parametrize(
    ("ratios", "missed"),
    [
        ((2.5, 0.125, 1.25), set()),
        ((2.25, 0.125, 1.25), {"four_directions"}),
        ((2.5, 0.15, 1.25), {"default", "four_directions"}),
        ((2.5, 0.125, 1.5), {"default"}),
        ((0.5, 0.125, 1.25), {"default", "four_directions", "batch_all"}),
        ((2.5, 25.0, 1.25), {"default", "four_directions", "gist"}),
    ],
)
def test_verdicts(
    ratios: tuple[float, float, float],
    missed: set,
    promises: tuple[Target, ...],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("sentence_transformers")
    results = results_like(promises, *ratios)
    assert {verdict.target.workload for verdict in judge(results, promises) if not verdict.reached} == missed
    monkeypatch.setattr(command, "sweep", lambda *_: results)
    assert main(["--preset", "targets", "--out", str(tmp_path)]) == 0
    assert main(["--preset", "targets", "--check", "--out", str(tmp_path)]) == bool(missed)
    assert len(re.findall(r"  no$", capsys.readouterr().out, re.MULTILINE)) == 2 * len(missed)


def test_a_target_without_a_figure_is_missed(promises: tuple[Target, ...]) -> None:
    results = results_like(promises, 10.0, 0.01, 1.0)
    results[promises[0].case][SENTENCE_TRANSFORMERS] = Outcome(missing="killed")
    assert [verdict.reached for verdict in judge(results, promises)] == [False, True, True, True]
    assert "killed" in table(results)
    del results[promises[3].case]
    assert not judge(results, promises)[3].reached


def test_a_step_too_long_for_turns_is_judged_by_its_single_reading() -> None:
    target = Target("default", 64, milliseconds=1000)
    outcomes = {TILELOSS: Outcome(Memory(peak=1, seconds=0.9), missing="left out")}
    assert [verdict.milliseconds for verdict in judge({target.case: outcomes}, [target])] == [900]


def test_the_sweep_on_a_gpu_starts_with_what_tells_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything promised comes before the rest of the grid, and the grid is complete."""
    plan = command.PRESETS["gpu"]()
    first = {case.workload for case in plan.cases[:10]}
    assert {case.batch for case in plan.cases[:10]} == {32_768}
    assert first >= {"default", "symmetric", "four_directions", "gist", "matryoshka", "batch_all"}
    assert set(plan.cases[:60]) >= {target.case for target in GPU_TARGETS}
    assert len(plan.cases) >= len(first) * 12 * 4 * 2
    assert len(set(plan.cases)) == len(plan.cases)


@pytest.mark.parametrize("preset", ["gpu", "gpu-targets"])
def test_the_runs_on_a_gpu_rehearsed_without_one(
    preset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command over the same works and contestants, at sizes for a CPU: figures, reasons, verdicts, files."""
    monkeypatch.setattr(measure, "SHORTEST_SAMPLE", 0.0)
    monkeypatch.setattr(measure, "SHORTEST_COMPARISON", 0.0)
    plan = command.PRESETS[preset]()
    cases = list(dict.fromkeys(replace(case, batch=24, width=16, device="cpu") for case in plan.cases[:11]))
    promises = [Target(case.workload, 24, speed_up=1e-9, width=16, dtype=case.dtype) for case in cases[:2]]
    small = replace(plan, cases=cases, targets=promises, contestants=[n for n in plan.contestants if n != COMPILED])
    monkeypatch.setitem(command.PRESETS, preset, lambda: small)
    assert main(["--preset", preset, "--check", "--out", str(tmp_path)]) == 0
    content = json.loads(next(tmp_path.glob(f"{preset}-cpu-*.json")).read_text())
    assert [record["reached"] for record in content["targets"]] == [True, True]
    assert len(content["cases"]) == len(cases)
    for case in content["cases"]:
        assert case["results"][TILELOSS]["forward_backward"]["seconds"]
    assert "reached" in capsys.readouterr().out


@pytest.mark.parametrize("target", [*TARGETS, *GPU_TARGETS], ids=str)
def test_every_target_is_of_work_that_exists(target: Target) -> None:
    assert WORKLOADS[target.workload].loss in tileloss.losses.__all__
    assert target.case.width in (384, 768)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--check", "with --preset targets"),
        ("--preset targets --batch 8", "leave out --batch"),
        ("--batch 0", "must be 1 or more"),
        ("--rounds 2", "must be 3 or more"),
        ("--workload nonsense", "invalid choice"),
        ("--device xpu", "no xpu device"),
    ],
)
def test_bad_options_are_refused_before_any_work(
    options: str, says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(command, "sweep", lambda *_: pytest.fail("it started to measure"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        main(options.split())
    assert left.value.code == 2
    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
