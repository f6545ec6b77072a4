#!/usr/bin/env python3
"""A pipeline on a ClearML server: dataset → search → train → export. Each step is a task, cached while its input is the same.

    python examples/clearml_pipeline.py --folder ~/data/cells --trials 20 --search-epochs 10 --epochs 100
    python examples/clearml_pipeline.py --folder ~/data/cells --queue gpus         # steps run on agents

Steps run in this project's Python: here, or in agents whose image is made from the trainer's (docs/clearml.md).
"""

import argparse
import sys
from pathlib import Path

from clearml import PipelineController


def run(words: list[str]) -> None:
    """Run a command of this project, with what it prints in the step's console; a failure fails the step."""
    import subprocess  # a step is sent as the text of its function, so each brings its imports
    import sys

    print("$ python", *words, flush=True)
    subprocess.run([sys.executable, *words], check=True)


def make_dataset(folder: str, project: str, name: str) -> str:
    """Check the folder, make a version of it, and return its id."""
    import json
    import subprocess
    import sys

    words = ["-m", "starling", "data", "version", folder, "--project", project, "--name", name, "--json"]
    done = subprocess.run([sys.executable, *words], check=True, stdout=subprocess.PIPE, text=True)
    return str(json.loads(done.stdout)["id"])


def search(dataset: str, project: str, trials: int, flags: list[str]) -> str:
    """Search hyperparameters, and return the best set as YAML: a file here would not be there on another agent."""
    from pathlib import Path

    from starling.outputs.run_dir import runs_root

    words = ["-m", "starling", "train", "--data", f"clearml://{dataset}"]
    words += ["--project", project, "--name", "search"]
    run([*words, "--exist-ok", "--evolve", str(trials), *flags])
    return Path(runs_root() / project / "search" / "hyp_evolve.yaml").read_text()


def train(dataset: str, project: str, hyp: str, flags: list[str]) -> str:
    """Train with the best set, and return the run's folder."""
    from starling.outputs.run_dir import create_run_dir, runs_root

    folder = create_run_dir(project, "train", runs_root())
    (folder / "best-of-search.yaml").write_text(hyp)
    words = ["-m", "starling", "train", "--data", f"clearml://{dataset}"]
    words += ["--project", project, "--name", folder.name]
    run([*words, "--exist-ok", "--hyp", str(folder / "best-of-search.yaml"), *flags])
    return str(folder)


def export(folder: str, flags: list[str]) -> str:
    """Write the best weights as ONNX, and return the file's name."""
    run(["-m", "starling", "export", "--weights", f"{folder}/weights/best.pt", "--include", "onnx", *flags])
    return f"{folder}/weights/best.onnx"


def build(options: argparse.Namespace) -> PipelineController:
    """Return the pipeline, its steps in a row."""
    pipeline = PipelineController(
        name=options.name, project=options.project, version="1.0.0", add_pipeline_tags=True
    )
    if options.queue:
        pipeline.set_default_execution_queue(options.queue)
    model = ["--weights", options.weights, "--img", str(options.img), "--batch", str(options.batch)]
    model += ["--cfg", options.cfg] if options.cfg else []
    model += ["--device", options.device] if options.device else []
    steps = {
        "dataset": (make_dataset, {"folder": str(options.folder.absolute()), "project": options.project, "name": options.name}, "dataset"),
        "search": (search, {"dataset": "${dataset.dataset}", "project": options.project, "trials": options.trials,
                            "flags": [*model, "--epochs", str(options.search_epochs)]}, "hyp"),
        "train": (train, {"dataset": "${dataset.dataset}", "project": options.project, "hyp": "${search.hyp}",
                          "flags": [*model, "--epochs", str(options.epochs)]}, "folder"),
        "export": (export, {"folder": "${train.folder}", "flags": ["--img", str(options.img)]}, "onnx"),
    }  # fmt: skip
    before: list[str] = []
    for name, (function, arguments, result) in steps.items():
        pipeline.add_function_step(
            name=name, function=function, function_kwargs=arguments, function_return=[result], helper_functions=[run],
            parents=before, project_name=options.project, packages=False, repo="", cache_executed_step=name == "dataset",
        )  # fmt: skip
        before = [name]
    return pipeline


def parse() -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="the dataset, with its YAML at the root")
    parser.add_argument("--project", default="pipeline", help="[%(default)s]")
    parser.add_argument("--name", default="detector", help="of the pipeline and the dataset [%(default)s]")
    parser.add_argument("--queue", default="", help="queue of the steps [they run here]")
    parser.add_argument("--weights", default="yolov5s.pt", help="weights to start from [%(default)s]")
    parser.add_argument("--cfg", default="", help="layout, without weights")
    parser.add_argument("--img", type=int, default=640, help="[%(default)s]")
    parser.add_argument("--batch", type=int, default=16, help="[%(default)s]")
    parser.add_argument("--device", default="", help="[the first GPU, else cpu]")
    parser.add_argument(
        "--trials", type=int, default=20, help="finished trainings of the search [%(default)s]"
    )
    parser.add_argument("--search-epochs", type=int, default=10, help="of each of them [%(default)s]")
    parser.add_argument("--epochs", type=int, default=100, help="of the training [%(default)s]")
    return parser.parse_args()


def main() -> int:
    """Build the pipeline, run it, and return the exit code."""
    options = parse()
    pipeline = build(options)
    if options.queue:
        pipeline.start_locally(run_pipeline_steps_locally=False)
    else:
        pipeline.start_locally(run_pipeline_steps_locally=True)
    return 0 if pipeline.is_successful() else 1


if __name__ == "__main__":
    sys.exit(main())
