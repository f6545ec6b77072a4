"""`--compile`: the same numbers from a compiled model, and a training that goes on where it cannot be compiled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from starling import settings
from starling.cli import train
from starling.device import Compute
from starling.model.checkpoint import load_checkpoint
from starling.training.setup import compiling
from starling.training.setup.compiling import CompiledForward

CPU = Compute(torch.device("cpu"), False, 1)


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def test_a_compiled_model_returns_what_the_model_does_and_other_shapes_go_as_they_are(
    said: list[str],
) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.SiLU())
    forward = CompiledForward(model, CPU)
    images = torch.rand(2, 3, 16, 16)
    for batch in (images, images + 1, images[:1]):
        torch.testing.assert_close(forward(batch), model(batch))
    assert len(said) == 1
    assert "compiling the model" in said[0]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "the odd batch was not compiled"


def test_where_the_compiler_fails_the_model_goes_on_and_that_is_said_once(
    monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.SiLU())
    forward = CompiledForward(model, CPU)
    images = torch.rand(2, 3, 17, 17)
    with torch._inductor.utils.fresh_cache():
        for _ in range(2):
            torch.testing.assert_close(forward(images), model(images))
    assert [line for line in said if "going on without" in line] == said[1:]
    assert "g++" in said[1]


def test_what_the_model_itself_raises_is_not_taken_for_a_failed_compilation(said: list[str]) -> None:
    def broken(images: Tensor) -> Tensor:
        raise MemoryError("no room")

    forward = CompiledForward(broken, CPU)
    with pytest.raises(MemoryError):
        forward(torch.rand(1, 3, 8, 8))
    assert not any("going on without" in line for line in said)


def test_a_training_under_compile_takes_the_course_of_one_without(
    tiny_args: list[str], runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The compiler's own code takes minutes to make; what is ours is the same with the graph run as traced.
    settings.update({"mlflow": False, "tensorboard": False})
    real = torch.compile
    monkeypatch.setattr(
        compiling.torch,
        "compile",
        lambda forward, **options: real(forward, dynamic=options["dynamic"], backend="aot_eager"),
    )
    common = [*tiny_args, "--amp", "off", "--noplots", "--epochs", "1"]
    assert train.main([*common, "--name", "plain"]) == 0
    assert train.main([*common, "--name", "compiled", "--compile"]) == 0
    plain, compiled = (
        load_checkpoint(runs / "train" / name / "weights" / "last.pt")["model"]
        for name in ("plain", "compiled")
    )
    assert plain.keys() == compiled.keys()
    for key in plain:
        torch.testing.assert_close(plain[key], compiled[key], atol=1e-5, rtol=1e-4)
