"""Memory that does not suffice and numbers that are not finite: no weight is lost to either."""

import json
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import runs
import torch
from runs import arguments, checkpoints_of, resume, rows_of, train
from small import adapted, small_model
from steps import EXAMPLES, FP32, GradientsOnly, batching, cut, one_step, trained

from data.batch import MicroBatch
from files.atomic import sha256_file
from files.errors import UserError
from files.faults import listening
from files.folders import damage
from models.layers import CausalLM
from train import evaluate as evaluate_module
from train import step as step_module
from train.batches import StepBatches
from train.config.load import load_config
from train.evaluate import evaluate
from train.loop import step_that_fits
from train.optim import build_optimizer
from train.optim.adamw import AdamW
from train.optim.buffers import Optimizer
from train.plan.steps import plan_run
from train.precision import LossScaler
from train.process.memory import is_out_of_memory, within_memory
from train.process.world import ALONE
from train.run import main
from train.state import EarlyStopping, StepResult, TrainState


def refused_by_cuda() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def refused_by_the_host() -> None:
    torch.empty(1 << 60)


def refused_by_python() -> None:
    raise MemoryError


REFUSALS = [refused_by_cuda, refused_by_the_host, refused_by_python]


class Faults:
    """A listener that runs out of memory where `fails` says so, by step and micro-batch.

    Both count from 1, the micro-batches on through every attempt at their step.
    """

    def __init__(
        self, fails: Callable[[int, int], bool], refuse: Callable[[], None] = refused_by_cuda
    ) -> None:
        self.fails, self.refuse = fails, refuse
        self.step, self.micro_batch = 1, 0

    def __call__(self, name: str) -> None:
        if name == "step.micro_batch":
            self.micro_batch += 1
            if self.fails(self.step, self.micro_batch):
                self.refuse()
        if name == "step.recorded":
            self.step, self.micro_batch = self.step + 1, 0


def network(dtype: torch.dtype = torch.float64, method: str = "lora") -> CausalLM:
    """Return a network with dropout."""
    rates = {"residual_dropout": 0.1, "embedding_dropout": 0.1}
    if method == "full":
        return small_model("starcoder2", dtype, **rates)
    return adapted(0.1, dtype=dtype, **rates)


def bits(model: CausalLM, optimizer: Optimizer) -> dict[str, bytes]:
    """Return the bytes of every weight and of all that the optimizer holds."""
    tensors = {**dict(model.named_parameters()), **optimizer.state_tensors()}
    return {name: t.detach().contiguous().numpy().tobytes() for name, t in tensors.items()}


def no_gradient(model: CausalLM) -> bool:
    """Return whether nothing of a step before would be added to the next one's gradients."""
    return all(p.grad is None or not p.grad.any() for p in model.parameters())


# Out of memory in one step


@pytest.mark.parametrize("refuse", REFUSALS)
@pytest.mark.parametrize("scaled", [False, True])
def test_out_of_memory_leaves_everything_as_it_was(
    refuse: Callable[[], None], scaled: bool
) -> None:
    """The third micro-batch does not fit: by then two have left their gradients."""
    model = network(method="full")
    optimizer = build_optimizer("adamw", model)
    scaler = LossScaler() if scaled else None
    one_step(model, optimizer, cut(4), scaler=scaler)
    if scaler:
        scaler.scale, scaler.good_steps = 2.0**1023, 7  # overflows, so that attempts change it
    before = bits(model, optimizer)
    first_attempt = 2 if scaled else 0
    with listening(Faults(lambda _, j: j == first_attempt + 3, refuse)):
        batch = cut(4 if scaled else 2)
        result = one_step(model, optimizer, batch, scaler=scaler, draw=(0, 2))
    assert result.skipped == "out of memory"
    assert bits(model, optimizer) == before
    assert no_gradient(model)
    assert scaler is None or scaler.state() == {"scale": 2.0**1023, "good_steps": 7}


def test_another_error_is_no_lack_of_memory() -> None:
    def broken() -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    model = network()
    with (
        listening(Faults(lambda *_: True, broken)),
        pytest.raises(RuntimeError, match="mat1 and mat2"),
    ):
        one_step(model, build_optimizer("adamw", model), cut(4))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_what_did_not_fit_is_gone_when_memory_is_given_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An error's frames hold what they had allocated: CUDA could give none of it back."""

    class Activations:
        pass

    held: list[weakref.ref[Activations]] = []
    given_back = []

    def compute() -> None:
        activations = Activations()
        held.append(weakref.ref(activations))
        refused_by_cuda()

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given_back.append(held[0]() is None))
    assert within_memory(compute, torch.device("cuda")) is None
    assert given_back == [True]


# The step is done again


class OneStep:
    """A run that does a step, says what it says into a list, and has nothing to write."""

    def __init__(self, model: CausalLM) -> None:
        self.model = model
        self.optimizer = GradientsOnly(trained(model))
        self.state = TrainState(EarlyStopping(None))
        self.said: list[str] = []
        self.precision, self.scaler = FP32, None
        self.memory = SimpleNamespace(observe=None)
        self.world = ALONE
        self.sizes: list[list[int]] = []


def redone(dtype: torch.dtype, faults: Faults, **settings: Any) -> tuple[OneStep, StepResult]:
    """Do the first step of a run of eight examples, memory running out as `faults` say."""
    keys = {"train.effective_batch_size": 8, "train.max_steps": 3, "data.max_length": 48}
    run: Any = OneStep(network(dtype))
    run.config = load_config(overrides={**keys, "data.shuffle": False, **settings})
    run.plan = plan_run(run.config, 8)
    data: Any = SimpleNamespace(train=EXAMPLES, tokenizer=SimpleNamespace(pad_id=0), mixture=None)

    batches = StepBatches.of(run.config, run.plan, data)
    cut_step = batches.cut

    def watched(*given: Any) -> list[MicroBatch]:
        batch = cut_step(*given)
        if given[:3] == run.plan.batch(1):  # and not what is cut ahead
            run.sizes.append([len(part.examples) for part in batch])
        return batch

    batches.cut = watched  # type: ignore[method-assign]
    records: Any = SimpleNamespace(say=run.said.append)
    saver: Any = None
    with listening(faults):
        result = step_that_fits(run, records, saver, batches, 1)
    return run, result


NEVER = Faults(lambda *_: False)
# In fp64 two orders of summation of a few thousand terms differ by less than 1e-12. In fp32, of
# 2⁻²⁴ = 6e-8 a term, the 129 rows that a gradient sums over differ by about √129 · 6e-8 = 7e-7.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-6}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("micro_batch", range(1, 4))
@pytest.mark.parametrize(
    ("settings", "before", "after"),
    [
        ({"train.per_device_train_batch_size": 3}, [3, 3, 2], [1] * 8),
        ({"train.micro_batch_tokens": 62}, [3, 3, 2], [1, 1, 2, 2, 1, 1]),
    ],
)
def test_the_redone_step_is_the_same_step(
    settings: dict[str, Any],
    before: list[int],
    after: list[int],
    micro_batch: int,
    dtype: torch.dtype,
) -> None:
    before_run, expected = redone(dtype, NEVER, **settings)
    run, result = redone(dtype, Faults(lambda _, j: j == micro_batch), **settings)
    assert (before_run.sizes, run.sizes) == ([before], [before, after])
    assert (result.skipped, run.state.micro_batch_divisor) == (None, 2)
    assert len(run.said) == 1
    assert "out of memory at step 1" in run.said[0]
    assert "1/2" in run.said[0]
    assert result.loss == pytest.approx(expected.loss, rel=TOLERANCES[dtype])
    for name, gradient in before_run.optimizer.seen.items():
        difference = (run.optimizer.seen[name] - gradient).norm()
        assert difference <= TOLERANCES[dtype] * gradient.norm(), name


def test_the_redone_step_has_the_bits_of_a_step_of_that_size() -> None:
    run, result = redone(
        torch.float32, Faults(lambda _, j: j == 2), **{"train.per_device_train_batch_size": 4}
    )
    small, expected = redone(torch.float32, NEVER, **{"train.per_device_train_batch_size": 2})
    assert (result.loss, result.grad_norm) == (expected.loss, expected.grad_norm)
    assert all(torch.equal(g, small.optimizer.seen[n]) for n, g in run.optimizer.seen.items())


def test_it_is_halved_until_it_fits() -> None:
    run, _ = redone(
        torch.float32,
        # two attempts fail at their first micro-batch
        Faults(lambda _, j: j <= 2),
        **{"train.per_device_train_batch_size": 8},
    )
    assert [size[0] for size in run.sizes] == [8, 4, 2]
    assert run.state.micro_batch_divisor == 4
    assert "1/4" in run.said[-1]


# Evaluation


@pytest.mark.parametrize("refuse", REFUSALS)
def test_an_evaluation_goes_on_in_smaller_batches(refuse: Callable[[], None]) -> None:
    sizes: list[int] = []

    def limit(layer: torch.nn.Module, given: tuple[Any, ...]) -> None:
        _, _, segments, *_ = given
        if segments.num_rows > room:
            refuse()
        sizes.append(len(segments.lengths))

    model = network()
    model.model.layers[0].register_forward_pre_hook(limit)

    def evaluated() -> evaluate_module.EvalResult:
        return evaluate(model, EXAMPLES, batching(6), FP32)

    room = 1000
    expected = evaluated()
    assert (sizes, expected.reduced_batch_size) == ([6, 2], None)
    sizes.clear()
    room = 100  # 40 + 31 + 22 fit, 40 + 31 + 22 + 15 + 9 + 7 do not
    result = evaluated()
    assert (sizes, result.reduced_batch_size) == ([3, 3, 2], 3)
    assert result.targets == expected.targets
    assert result.loss == pytest.approx(expected.loss, rel=1e-12)
    room = 39
    with pytest.raises(UserError, match=r"evaluation: out of memory .* 40 tokens.*max_length"):
        evaluated()


# Not finite


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return what makes micro-batches' losses not finite; their gradients stay as they are."""
    loss_sum = step_module.loss_sum

    def install(value: float, strikes: Callable[[MicroBatch, int], bool]) -> None:
        def poisoned(
            model: CausalLM, micro_batch: MicroBatch, device: Any, draw: Any, *rest: float
        ) -> torch.Tensor:
            loss = loss_sum(model, micro_batch, device, draw, *rest)
            return loss + value if strikes(micro_batch, draw[1]) else loss

        monkeypatch.setattr(step_module, "loss_sum", poisoned)

    return install


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", ["loss", "gradient"])
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("optimizer_name", ["adamw", "adafactor"])
def test_nothing_changes_where_a_number_is_not_finite(
    optimizer_name: str, method: str, place: str, value: float, poison: Callable[..., None]
) -> None:
    """In the loss of one micro-batch, or in one element of one gradient."""
    model = network(torch.float32, method)
    optimizer = build_optimizer(optimizer_name, model, weight_decay=0.1)
    one_step(model, optimizer, cut(4))  # moments that are not zero
    before = bits(model, optimizer)
    if place == "loss":
        poison(value, lambda micro_batch, _: 5 in micro_batch.examples)
        expected = (4, 5)
    else:
        parameter = next(iter(optimizer.parameters.values()))

        def spoiled(gradient: torch.Tensor) -> torch.Tensor:
            gradient = gradient.clone()
            gradient.view(-1)[3] = value
            return gradient

        parameter.register_hook(spoiled)
        expected = tuple(range(8))
    result = one_step(model, optimizer, cut(2), draw=(0, 2))
    assert result.skipped == "non-finite"
    assert result.examples == expected
    assert math.isfinite(result.loss) == (place == "gradient")
    assert bits(model, optimizer) == before
    assert no_gradient(model)


def test_a_loss_alone_that_is_not_finite_is_no_good_step_of_the_scaler(
    poison: Callable[..., None],
) -> None:
    model = network()
    scaler = LossScaler()
    poison(math.inf, lambda *_: True)
    result = one_step(model, build_optimizer("adamw", model), cut(4), scaler=scaler)
    assert result.skipped == "non-finite"
    assert scaler.state() == LossScaler().state()


# Whole runs


def settings(model_folder: Path, rows: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """Return a run whose dropout does not depend on the cut: its attention is written out."""
    values = {
        "train.max_steps": 6,
        "model.attention": "eager",
        "lora.lora_dropout": 0.1,
        "checkpoint.steps": 2,
        "checkpoint.total_limit": None,
        **changes,
    }
    return runs.settings(model_folder, rows, output, **values)


def hashes(run: Path) -> dict[str, str]:
    last = checkpoints_of(run)[-1]
    return {path.name: sha256_file(path) for path in sorted(last.glob("*.safetensors"))}


def test_a_run_goes_on_in_smaller_micro_batches_and_so_does_its_resume(
    model_folder: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = train(settings(model_folder, rows_file, tmp_path / "plain")).folder

    def at_step_3() -> Faults:
        return Faults(lambda step, j: (step, j) == (3, 2))

    run = train(settings(model_folder, rows_file, tmp_path / "run"), at_step_3()).folder
    assert capsys.readouterr().out.count("out of memory at step 3") == 1
    divisors = [row.get("micro_batch_divisor") for row in rows_of(run, "train")]
    assert divisors == [None, None, 2, 2, 2, 2]
    for row, expected in zip(rows_of(run, "train"), rows_of(plain, "train"), strict=True):
        # fp32 as above; AdamW's division by √v̂ magnifies what each of four updates differs by
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    report = (run / "report.md").read_text()
    assert "Out of memory at step 3: from there on" in report
    assert "a micro-batch was 1 instead of 2 examples" in report

    # Killed after step 4 and resumed where memory suffices: the size stays, and so do the bits.
    other = tmp_path / "killed"

    class Killed(BaseException):
        pass

    faults = at_step_3()

    def killed(name: str) -> None:
        if name == "step.recorded" and faults.step == 5:
            raise Killed
        faults(name)

    with pytest.raises(Killed):
        train(settings(model_folder, rows_file, other), killed)
    resume(other)
    assert [row.get("micro_batch_divisor") for row in rows_of(other, "train")] == divisors
    assert hashes(other) == hashes(run)


def test_a_single_example_too_long_ends_the_run_with_its_state_saved(
    model_folder: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"train.per_device_train_batch_size": 1, "train.gradient_accumulation_steps": 4}
    plain = train(settings(model_folder, rows_file, tmp_path / "plain", **values)).folder
    run = tmp_path / "run"
    given = arguments(settings(model_folder, rows_file, run, **values))
    with listening(Faults(lambda step, j: step == 4 and j >= 3)):
        assert main(given) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: step 4: out of memory with a single example of ")
    assert "the state after step 3 is saved" in error
    assert "data.max_length" in error and "model.gradient_checkpointing=layers" in error
    assert error.count("\n") == 1
    saved = checkpoints_of(run)[-1]
    assert (saved.name, damage(saved)) == ("step-00000003", None)
    assert json.loads((run / "status.json").read_text())["state"] == "failed"
    resume(run)
    assert hashes(run) == hashes(plain)


def test_out_of_memory_in_the_update_ends_the_run_and_saves_nothing(
    model_folder: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = AdamW.step

    def half_done(self: AdamW, learning_rate: float, gradient_scale: float = 1.0) -> None:
        plain(self, learning_rate, gradient_scale)
        if self.steps == 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(AdamW, "step", half_done)
        with pytest.raises(UserError, match=r"step 4: .*cannot be undone.*step-00000002"):
            train(settings(model_folder, rows_file, run))
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000002"]
    assert [row["step"] for row in rows_of(run, "train")] == [1, 2, 3]
    resume(run)
    expected = train(settings(model_folder, rows_file, tmp_path / "plain")).folder
    assert hashes(run) == hashes(expected)


def test_three_steps_that_are_not_finite_end_with_exit_code_3_and_the_last_good_state(
    model_folder: Path, rows_file: Path, tmp_path: Path, poison: Callable[..., None]
) -> None:
    """Row 0 is dropped, so that row n makes example n - 1."""
    rows = tmp_path / "rows"
    rows.mkdir()
    lines = (rows_file / "train.jsonl").read_text()
    (rows / "train.jsonl").write_text(json.dumps({"text": "x" * 100}) + "\n" + lines)
    (rows / "valid.jsonl").write_text((rows_file / "valid.jsonl").read_text())
    run = tmp_path / "run"
    poison(math.nan, lambda micro_batch, step: step in (3, 4, 5))
    values = settings(model_folder, rows, run, **{"data.on_overflow": "drop"})
    outcome = train(values)
    assert (outcome.reason, outcome.exit_code) == ("non_finite", 3)
    skipped = rows_of(run, "train")[2:]
    assert [row["skipped"] for row in skipped] == ["non-finite"] * 3
    assert all(row["loss"] is None for row in skipped)
    assert [len(row["examples"]) for row in skipped] == [6, 4, 6]  # step 4 ends an epoch of 22
    assert all(row["rows"] == [index + 1 for index in row["examples"]] for row in skipped)
    good, last = (run / "checkpoints" / f"step-0000000{step}" for step in (2, 5))
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        assert sha256_file(good / name) == sha256_file(last / name)
    report = (run / "report.md").read_text()
    assert "3 of 5 steps changed nothing (non-finite): step 3 (rows " in report
    # A resume goes on behind them, and one more bad step ends it again.
    poison(math.nan, lambda micro_batch, step: step == 6)
    assert resume(run).reason == "non_finite"
    poison(math.nan, lambda micro_batch, step: False)
    assert resume(run, **{"train.max_steps": 8}).reason == "completed"
    assert [row["step"] for row in rows_of(run, "train")] == list(range(1, 9))


def test_an_evaluation_in_smaller_batches_is_recorded(
    model_folder: Path,
    rows_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    loss_sum = evaluate_module.loss_sum

    def limited(model: CausalLM, micro_batch: MicroBatch, *more: Any, **named: Any) -> torch.Tensor:
        if len(micro_batch.examples) > 2:
            refused_by_cuda()
        return loss_sum(model, micro_batch, *more, **named)

    monkeypatch.setattr(evaluate_module, "loss_sum", limited)
    values = {"eval.per_device_batch_size": 4, "train.max_steps": 1}
    run = train(settings(model_folder, rows_file, tmp_path / "run", **values)).folder
    assert [row["reduced_batch_size"] for row in rows_of(run, "eval")] == [2]
    assert "out of memory: batches of 2" in capsys.readouterr().out
    assert "evaluation at step 1: it was done in batches of 2" in (run / "report.md").read_text()
